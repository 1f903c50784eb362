"""`eyetune clip retrieve`: how well photographs and texts find each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

from eyetune.flags import READING, Reading

if TYPE_CHECKING:
    from rich.table import Table

    from eyetune.clip.run import ClipRun


NO_CLASS = "no class, or several"
"""Queries of the whole that stand in the row of no class: a patient whose eyes differ, a text without a label."""


def command(
    run: Path,
    *,
    data: str,
    features: Path | None = None,
    out: Path | None = None,
    by: Literal["patient", "left", "right"] = "patient",
    resamples: Annotated[int, Parameter(validator=Number(gte=0))] = 2000,
    seed: int = 0,
    reading: Reading = READING,
) -> None:
    """Retrieval in both directions, each query against the whole gallery, with chance and 95% intervals.

    Writes OUT/retrieval.json, OUT/retrieval.html (the best and worst queries, to look at) and the features.

    Args:
        run: The run folder of clip train, or a RET-CLIP file with --text.
        data: FOLDER or FOLDER:SPLIT, as clip prepare wrote it (default split: test).
        features: The features' file: read where it is there, refused where it does not fit, else written (default:
            OUT/features.safetensors, computed anew where it does not fit).
        out: Folder for what is written (default: RUN/retrieval/FOLDER-SPLIT; of a file NAME.pt, NAME/retrieval/…).
        by: patient compares both eyes with the text about them; left and right one eye with what is said of it.
        resamples: Of patients, for the intervals.
        seed: Of the resampling.
        reading: Device, precision, workers, batch size, text.
    """
    from eyetune.clip.features import results_of, reuse
    from eyetune.clip.gallery import write_retrieval
    from eyetune.clip.run import open_clip_run
    from eyetune.clip.scoring import measured
    from eyetune.data.pairs import PairSet
    from eyetune.files import write_json
    from eyetune.terminal import show

    folder, split = folder_and_split(data)
    pairs = PairSet.open(folder, split)
    opened = open_clip_run(run, **reading.loading())
    place = out or results_of(run) / "retrieval" / f"{folder.resolve().name}-{pairs.split}"
    file = features or place / "features.safetensors"
    found, reused = reuse(
        file, opened, pairs, anew=features is None, batch_size=reading.batch_size, workers=reading.workers
    )
    if not opened.runtime.is_main:
        return
    about = found.about
    ranked = found.ranking(by, device=opened.runtime.device)
    content = {
        "run": str(run),
        "model": about.model,
        "data": about.data,
        "folder": about.folder,
        "split": pairs.split,
        "compared": by,
        "one_eye": int(found.single.sum()),
        "warnings": [*pairs.warnings, *reading_faults(opened, about.texts)],
        **measured(ranked[1], ranked[0], labels=about.labels, resamples=resamples, seed=seed),
    }
    write_json(place / "retrieval.json", content)
    page = write_retrieval(place / "retrieval.html", found, pairs, content, ranked, by=by)
    for warning in content["warnings"]:
        print(f"WARNING: {warning}")
    show(*tables(content))
    print(f"features {'read from' if reused else 'written to'} {file}; look at {page}")


def reading_faults(run: ClipRun, texts: Sequence[str]) -> list[str]:
    """What the model does not get to read of the texts: words it does not know, ends that are cut off."""
    coverage = run.tokenizer.coverage(texts, run.length)
    found = [fault] if (fault := coverage.fault()) else []
    if coverage.truncated_share:
        found.append(
            f"{coverage.truncated_share:.0%} of the texts are longer than the {run.length} tokens that it reads: "
            "their end was not seen, and texts that differ only there are one to it."
        )
    return found


def folder_and_split(word: str) -> tuple[Path, str]:
    """`FOLDER[:split]` -> (folder, split)."""
    if not Path(word).exists():
        folder, colon, split = word.rpartition(":")
        if colon and folder and split:
            return Path(folder), split
    return Path(word), "test"


def tables(content: Mapping[str, Any]) -> list[Table]:
    """A table a direction: all queries, chance, the classes."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from eyetune.clip.gallery import METRICS, TITLES

    found = []
    for direction, title in TITLES.items():
        side = content[direction]
        table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, title=title, title_justify="left")
        table.add_column("")
        table.add_column("queries", justify="right")
        for name in side["metrics"]:
            table.add_column(METRICS.get(name, name), justify="right")
        table.add_row("all", str(side["queries"]), *(_cell(name, entry) for name, entry in side["metrics"].items()))
        chance = [_number(name, entry["chance"]) for name, entry in side["metrics"].items()]
        table.add_row("by chance", "", *chance, style="italic")
        for label, own in side["per_class"].items():
            table.add_row(label, str(own["queries"]), *(_cell(name, one) for name, one in own["metrics"].items()))
        if side["per_class"] and side["without_class"]:
            table.add_row(NO_CLASS, str(side["without_class"]))
        found.append(table)
    return found


def _cell(name: str, entry: Mapping[str, Any]) -> str:
    low, high = entry["ci"]
    interval = "" if low is None else f" ({_number(name, low)} to {_number(name, high)})"
    return _number(name, entry["value"]) + interval


def _number(name: str, value: float) -> str:
    return f"{value:.1f}" if name == "median_rank" else f"{value:.3f}"
