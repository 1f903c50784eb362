"""One page over several runs: a line each, the headline scores with intervals, and the way to each report."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from eyetune.errors import ConfigError
from eyetune.pages.page import write_page
from eyetune.report import glossary
from eyetune.report.facts import VAL, Facts, read_facts
from eyetune.report.spans import Spans, spans
from eyetune.report.words import summarise, title


@dataclass(frozen=True)
class Row:
    """One run on the page: its address from there, its title, and what stands out against it."""

    address: str
    title: str
    folder: str
    bad: int
    warn: int


def write_overview(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page over several runs; returns its path.

    Args:
        runs: run folders, each with its report written.
        out: the page; None = overview.html in the folder that holds them all.

    Raises RunError as :func:`read_facts`, and ConfigError when a run is named twice.
    """
    folders = [Path(run).resolve() for run in runs]
    if len(set(folders)) < len(folders):
        raise ConfigError("a run is named twice: name each once.")
    page = Path(os.path.commonpath([folder.parent for folder in folders])) / "overview.html" if out is None else out
    facts = {folder: read_facts(folder) for folder in folders}
    rows = [_row(folder, one, page) for folder, one in facts.items()]
    return write_page(
        page,
        "overview.html.j2",
        title=f"{len(runs)} runs",
        rows=rows,
        ranges=_ranges(list(facts.values())),
        label=glossary.label,
        meaning=glossary.meaning,
    )


def _row(folder: Path, facts: Facts, page: Path) -> Row:
    levels = [one.level for one in summarise(facts).cautions]
    there = os.path.relpath(folder / "report.html", page.resolve().parent)
    return Row(quote(there), title(facts), folder.name, levels.count("bad"), levels.count("warn"))


def _ranges(runs: Sequence[Facts]) -> list[tuple[str, str, Spans]]:
    """(metric, dataset, a line a run), the runs' own validation left out. A dataset of the same name that is of other
    photographs, or of another truth, has lines of its own."""
    names = dict.fromkeys(name for facts in runs for name in facts.headline)
    datasets = dict.fromkeys(name for facts in runs for name in facts.datasets if name != VAL)
    result = []
    for name in names:
        for dataset in datasets:
            alike = _alike(runs, dataset)
            for group in alike:
                called = [facts.folder.path.resolve().name for facts in group]
                scores = [facts.score(dataset, name) for facts in group]
                lines = spans(name, list(zip(called, scores, strict=True)))
                if lines.known:
                    which = dataset if len(alike) == 1 else f"{dataset} of {', '.join(called)}"
                    result.append((name, which, lines))
    return result


def _alike(runs: Sequence[Facts], dataset: str) -> list[list[Facts]]:
    """The runs that were scored on a dataset, those together that were on the same photographs with the same truth."""
    groups: list[list[Facts]] = []
    for facts in runs:
        if dataset not in facts.datasets:
            continue
        table = facts.predictions.get(dataset)
        for group in groups:
            other = group[0].predictions.get(dataset)
            if table is not None and other is not None and table.same_truth(other):
                group.append(facts)
                break
        else:
            groups.append([facts])
    return groups
