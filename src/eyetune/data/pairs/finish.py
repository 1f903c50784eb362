"""The last step of preparing: from the journal to tables, databases and report; and whether that was done before."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from eyetune.data.pairs.journal import NAME as JOURNAL
from eyetune.data.pairs.journal import Journal
from eyetune.data.pairs.layout import REPORT, SPLITS, database_folder, images_file, texts_file
from eyetune.data.pairs.pairset import PairSet
from eyetune.data.pairs.plan import Plan, counts_of, notes_of, texts_of
from eyetune.data.pairs.sample import Sample, Source
from eyetune.data.pairs.texts import Images
from eyetune.data.pairs.write import write_split
from eyetune.errors import DataError, RunError
from eyetune.files import is_temporary, write_json

PROBLEMS = "problems.csv"
"""All that is amiss with the tables, beside what was prepared."""


def finished(folder: Path, fingerprint: str, splits: Sequence[str]) -> bool:
    """Whether `folder` holds this very preparation, whole.

    Raises RunError when it holds another one, or files that would be in the way.
    """
    report = folder / REPORT
    if not report.exists():
        # What a killed run of this folder wrote is beside its journal, and is written anew.
        names = [path.name for path in _in_the_way(folder)]
        if names and not (folder / JOURNAL).exists():
            raise RunError(f"{folder} holds {', '.join(names)}, which nobody finished here. Choose another folder.")
        return False
    try:
        found = json.loads(report.read_text(encoding="utf-8"))
        known = found["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{report} cannot be read ({error}). Choose another folder, or delete this one.") from None
    if known != fingerprint:
        raise RunError(
            f"{folder} holds another preparation: other photographs, texts, splits or settings ({REPORT} says which). "
            "Choose another folder, or delete this one."
        )
    with contextlib.suppress(DataError):
        for split in splits:
            PairSet.open(folder, split)
        return True
    return False


def _in_the_way(folder: Path) -> Iterator[Path]:
    for split in SPLITS:
        for path in (images_file(folder, split), texts_file(folder, split), database_folder(folder, split)):
            if path.exists():
                yield path


def write_all(folder: Path, plan: Plan, keys: Mapping[Source, str], journal: Journal, report: dict[str, Any]) -> None:
    """Write every split, then the list of problems, then the report, which makes the rest valid.

    Args:
        keys: of every photograph in the journal.
        report: what prepare.json is to say besides the splits.
    """
    (folder / REPORT).unlink(missing_ok=True)
    for left in filter(
        is_temporary, folder.iterdir()
    ):  # by a process that was killed: who writes here holds the journal
        left.unlink()
    splits: dict[str, Any] = {}
    for split in plan.splits:
        samples = plan.of(split)
        texts, ambiguous = texts_of(samples)
        photographs = {journal.photograph(keys[eye]) for sample in samples for eye in sample.sides}
        notes = notes_of(samples, texts) | {"photographs": sorted(photographs)}
        write_split(folder, split, _images(samples, keys, journal), texts, notes)
        splits[split] = counts_of(samples, texts, ambiguous)
    if plan.problems:
        plan.problems.write(folder / PROBLEMS)
    write_json(
        folder / REPORT, {**report, "splits": splits, "left_out": plan.problems.counts(), "warnings": plan.warnings}
    )


def _images(samples: Sequence[Sample], keys: Mapping[Source, str], journal: Journal) -> Iterator[Images]:
    for sample in samples:
        images = [journal.get(keys[eye]) for eye in sample.sides]
        yield Images(sample.name, images[0], images[-1])
