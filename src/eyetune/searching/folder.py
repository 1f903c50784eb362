"""The files of a search: trials.csv and search.html for people, best.yaml for finetune, search.json for programs."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from eyetune import __version__
from eyetune.files import write_json, write_text
from eyetune.searching.page import write_search
from eyetune.searching.plan import Plan
from eyetune.searching.results import Outcome, Row, count_rows, describe, first_line
from eyetune.searching.space import Choices
from eyetune.train.sealed import read_json

FILE = "search.json"
TABLE = "trials.csv"
BEST = "best.yaml"
PARETO = "pareto"


def write_results(found: Outcome, command: str, shown: str) -> None:
    """Write trials.csv, best.yaml (and pareto/), search.json and search.html, each whole or not at all.

    Args:
        found: what is known.
        command: as it may be written down.
        shown: where the trials are kept, as people may see it.
    """
    out = found.plan.out
    write_text(out / TABLE, _table(found))
    if found.best is not None:
        write_text(out / BEST, _yaml(found, found.best, out / "best"))
    if len(found.objectives) > 1:
        wanted = {f"trial-{row.number:04d}.yaml": row for row in found.front}
        for name, row in wanted.items():
            write_text(out / PARETO / name, _yaml(found, row, out / f"best-{row.number:04d}"))
        for file in (out / PARETO).glob("trial-*.yaml"):
            if file.name not in wanted:
                file.unlink(missing_ok=True)
    write_json(out / FILE, _content(found, command, shown))
    write_search(found, command, shown)


def other_search(plan: Plan, shown: str) -> str | None:
    """What the folder's search is called, where it is another than the one asked for; None where it is not."""
    file = plan.out / FILE
    if not file.is_file():
        return None
    known = read_json(file)
    # The folder may have been moved, with the database in it.
    same = known.get("storage") == shown or (plan.storage is None and not known.get("own_storage"))
    if same and known.get("study") == plan.study:
        return None
    return f"{known.get('study')!r} in {known.get('storage')}"


def _yaml(found: Outcome, row: Row, out: Path) -> str:
    values = ", ".join(f"{one.name} {value:.6g}" for one, value in zip(found.objectives, row.values, strict=True))
    head = [
        f"# Trial {row.number} of eyetune search: {values} on the validation split ({describe(row.parameters)}).",
        "# Train it and score the test split, which the search has not seen:  eyetune finetune THIS_FILE",
    ]
    return "\n".join([*head, found.plan.config(row.parameters, out).to_yaml()])


def _table(found: Outcome) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    names, fields = [one.name for one in found.objectives], list(found.plan.space.fields)
    facts = [name for name in ("epochs", "best_epoch", "trainable_parameters") if name not in names]
    front = {row.number for row in found.front}
    writer.writerow(["trial", "state", *names, "best", *fields, *facts, "wall_seconds", "reason"])
    for row in found.rows:
        values = [str(value) for value in row.values] or [""] * len(names)
        writer.writerow(
            [str(row.number), row.state, *values, "yes" if row.number in front else ""]
            + [_exact(row.parameters[path]) if path in row.parameters else "" for path in fields]
            + [row.facts.get(name, "") for name in facts]
            + ["" if row.seconds is None else f"{row.seconds:.1f}", first_line(row.reason)]
        )
    return stream.getvalue()


def _content(found: Outcome, command: str, shown: str) -> dict[str, Any]:
    """search.json: how far the search is, its best trials, what to mind."""
    plan = found.plan
    counts = count_rows(found.rows)
    return {
        "schema": 1,
        "eyetune": __version__,
        "command": command,
        "storage": shown,
        "own_storage": plan.storage is not None,
        "study": plan.study,
        "objectives": [{"name": one.name, "direction": one.direction} for one in found.objectives],
        "pruner": plan.pruner,
        "space": plan.space.texts(),
        "trials_wanted": plan.trials,
        "counts": counts,
        "best": [
            {"trial": row.number, "values": list(row.values), "parameters": row.parameters, "facts": row.facts}
            for row in found.front
        ],
        "importance": found.importance,
        "warnings": list(found.warnings),
    }


def _exact(value: Any) -> str:
    """A value to the last digit."""
    return repr(value) if isinstance(value, float) else Choices.label(value)
