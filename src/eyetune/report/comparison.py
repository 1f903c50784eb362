"""The report of a comparison: what differs and what does not, every arm with its cost, the way to each run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pydantic import Field

from eyetune.comparison.results import FILE, PICTURE
from eyetune.errors import RunError, plural
from eyetune.pages.page import picture, write_page
from eyetune.report import glossary
from eyetune.report.content import Part, Score, read_content
from eyetune.report.spans import Spans, spans
from eyetune.train.leaks import SAME_BYTES
from eyetune.train.sealed import read_json


class Primary(Part):
    """The metric that decides, and on which dataset."""

    metric: str
    dataset: str = "test"
    why: str = ""


class Arm(Part):
    """A strategy on a backbone, over its seeds."""

    name: str
    strategy: str
    backbone: str
    settings: dict[str, Any] = Field(default_factory=dict)
    cells: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    scores: dict[str, dict[str, Score]] = Field(default_factory=dict)
    cost: dict[str, Any] = Field(default_factory=dict)
    drift: dict[str, Any] | None = None


class Cell(Part):
    """One run of a comparison."""

    name: str
    folder: str
    arm: str
    seed: int
    status: str
    error: str | None = None


class Pair(Part):
    """Two arms held against each other."""

    first: str
    second: str
    difference: float | None = None
    ci: tuple[float | None, float | None] | None = None
    p: float | None = None
    p_holm: float | None = None
    differs: bool | None = None
    reason: str | None = None


class Test(Part):
    """The paired tests of one metric on one dataset."""

    metric: str
    primary: bool = False
    dataset: str
    method: str = ""
    unit: str = ""
    clusters: int | None = None
    images: int | None = None
    pairs: tuple[Pair, ...] = ()


class Comparison(Part):
    """comparison.json, as far as the page shows it; see :mod:`eyetune.comparison.results`."""

    status: str
    command: str = ""
    eyetune: str = ""
    budget: dict[str, Any] = Field(default_factory=dict)
    seeds: tuple[int, ...] = ()
    split: dict[str, Any] = Field(default_factory=dict)
    datasets: tuple[str, ...] = ()
    primary: Primary | None = None
    metrics: tuple[str, ...] = ()
    arms: tuple[Arm, ...] = ()
    cells: tuple[Cell, ...] = ()
    tests: tuple[Test, ...] = ()
    sentences: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def is_comparison(path: Path) -> bool:
    """Whether a folder is that of a comparison."""
    return (path / FILE).is_file()


def write_comparison(path: Path) -> Path:
    """Write `report.html` into the folder of a comparison; returns its path.

    Raises RunError when comparison.json is damaged, or nothing of the comparison is finished.
    """
    found = read_content(Comparison, read_json(path / FILE), path / FILE)
    if not found.arms:
        raise RunError(f"{path}: the comparison is {found.status}, and nothing can be compared yet. Run it again.")
    # Names of photographs may be of people; they stand in the runs' own metrics.json.
    unnamed = tuple(re.sub(rf" \({SAME_BYTES}: .*\)", f" ({SAME_BYTES})", text) for text in found.warnings)
    found = found.model_copy(update={"warnings": unnamed})
    drawn = path / PICTURE
    return write_page(
        path / "report.html",
        "comparison.html.j2",
        title=f"{len(found.arms)} ways compared",
        found=found,
        ranges=_ranges(found),
        runs=[(cell, quote(f"{cell.folder}/report.html")) for cell in found.cells if _has_report(path, cell)],
        others=[cell for cell in found.cells if not _has_report(path, cell)],
        drawn=picture(drawn) if drawn.is_file() else None,
        label=glossary.label,
        meaning=glossary.meaning,
        size=_size,
        probability=_probability,
        plural=plural,
    )


def _has_report(path: Path, cell: Cell) -> bool:
    return (path / cell.folder / "report.html").is_file()


def _ranges(found: Comparison) -> list[tuple[str, str, Spans]]:
    """(metric, dataset, a line an arm): the deciding metric first, validation left out."""
    first = found.primary.metric if found.primary else ""
    names = dict.fromkeys([*([first] if first in found.metrics else []), *found.metrics])
    return [
        (name, dataset, spans(name, known))
        for name in names
        for dataset in found.datasets
        if dataset != "val"
        and (
            known := [
                (arm.name, arm.scores[dataset][name]) for arm in found.arms if name in arm.scores.get(dataset, {})
            ]
        )
    ]


def _probability(p: float | None) -> str:
    return "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _size(count: Any) -> str:
    """Bytes as GiB or MiB; a dash where they are not known."""
    if not isinstance(count, (int, float)):
        return "–"
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
