"""The photographs an export is checked on, and an int8 network is scaled by: of the run's splits, as it saw them."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from eyetune.data.fundus import FundusSettings, load_square
from eyetune.errors import DataError, UserError
from eyetune.progress import track
from eyetune.train.novelty import sample_places

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from eyetune.train.run import Run

MOST = 200
"""Photographs an export is checked on: each is looked at by two networks."""

DRAWN = "drawn eyes"
"""What stands for the split where the run's photographs are gone, or there never were any."""

_DRAWN_PATIENTS = 8


@dataclass(frozen=True)
class Photographs:
    """Squares uint8[P, P, 3], as the network sees them, and the split they are of (or :data:`DRAWN`)."""

    split: str
    squares: list[NDArray[np.uint8]]


def to_check_on(run: Run, most: int = MOST) -> Photographs:
    """Photographs of validation; of training where there is no validation; drawn eyes where neither is at hand."""
    for split in ("val", "train"):
        if squares := photographs(run, split, most):
            return Photographs(split, squares)
    return Photographs(DRAWN, _drawn(run.settings))


def photographs(run: Run, split: str, most: int = MOST) -> list[NDArray[np.uint8]]:
    """At most `most` squares of a split, the same every time; those whose file is gone or damaged left out."""
    from eyetune.data.records import open_manifest

    config = run.folder.read_config()
    wanted = {row["image"] for row in run.folder.read_splits() if row["split"] == split}
    if not wanted:
        return []
    try:
        manifest = open_manifest(config.data, kind=config.reads)
    except UserError:  # the table has moved, or is not reachable from here
        return []
    paths = [record.image for record in manifest if record.name in wanted]
    found = []
    chosen = [paths[place] for place in sample_places(len(paths), run.card.seed, most)]
    for path in track(chosen, len(chosen), f"Photographs of {split}"):
        try:
            found.append(run.cache.square(path, run.settings) if run.cache else load_square(path, run.settings))
        except DataError:
            continue
    return found


def _drawn(settings: FundusSettings) -> list[NDArray[np.uint8]]:
    from eyetune.data.phantom import write_cohort

    with tempfile.TemporaryDirectory() as scratch:
        write_cohort(Path(scratch), patients=_DRAWN_PATIENTS, size=max(64, settings.pixels))
        return [load_square(path, settings) for path in sorted((Path(scratch) / "images").iterdir())]
