"""What is to be prepared: photographs of patients and texts about them, before any pixel is read; and what is amiss."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from eyetune.errors import DataError, listing
from eyetune.files import atomic

EyeTexts = Literal["join", "each", "apart"]
"""What becomes of texts about one eye each: one text about both; two texts of the patient; two samples of one eye."""

Repeats = Literal["refuse", "first", "each"]
"""What becomes of a patient's further photographs: an error; left out; samples of their own."""


@dataclass(frozen=True)
class InDataset:
    """A photograph inside a Hugging Face dataset, by its number in one of the dataset's splits."""

    split: str
    index: int


@dataclass(frozen=True)
class InTable:
    """A photograph inside a TSV of RET-CLIP's layout: its base64, by the bytes of the file, and their checksum."""

    file: Path
    offset: int
    length: int
    where: str
    digest: bytes = b""


Source = Path | InDataset | InTable


@dataclass(frozen=True)
class Sample:
    """Both eyes of a patient, or one, and the texts about them: what becomes one entry of the images.

    Attributes:
        name: under which the images are stored; unique in its split.
        group: who it really is; a group is never in two splits.
        eyes: the photographs by "left" and "right"; one alone stands for both, "" where its side is not known.
        texts: (text, label) each, the label "" where there is none; one or more.
        split: train, val or test; None where it is still to be cut.
        where: the row, for messages.
    """

    name: str
    group: str
    eyes: Mapping[str, Source]
    texts: tuple[tuple[str, str], ...]
    split: str | None
    where: str

    @property
    def single(self) -> str | None:
        """The eye that stands for both: "left", "right" or "unknown"; None where there are two."""
        return (next(iter(self.eyes)) or "unknown") if len(self.eyes) == 1 else None

    @property
    def sides(self) -> tuple[Source, ...]:
        """The photographs to be read, left before right: two, or one."""
        return tuple(self.eyes[side] for side in sorted(self.eyes))


KINDS = {
    "text_missing": "images without a text",
    "image_missing": "texts without their image",
    "outside": "indexes that the dataset does not have",
    "broken": "images that cannot be read",
    "repeated": "further photographs of a patient already there",
    "name": "patients without a usable name",
}
"""What may be amiss with a row, and how it is called in messages."""

_COLUMNS = ("kind", "where", "what")


@dataclass
class Problems:
    """What is amiss, by kind, with the row or line it is in. Which of these are refused is the caller's to say."""

    found: dict[str, list[tuple[str, str]]] = field(default_factory=lambda: {kind: [] for kind in KINDS})

    def add(self, kind: str, where: str, what: str = "") -> None:
        """Note one. `what` names files or says how it is wrong; never a patient."""
        self.found[kind].append((where, what))

    def __bool__(self) -> bool:
        return any(self.found.values())

    def counts(self) -> dict[str, int]:
        """How many of each kind there are, of those there are."""
        return {kind: len(items) for kind, items in self.found.items() if items}

    def said(self, kinds: Iterable[str] = KINDS) -> str:
        """A paragraph a kind: how many, and the first of them."""
        parts = []
        for kind in kinds:
            if items := self.found[kind]:
                lines = [f"{where}: {what}" if what else where for where, what in items]
                parts.append(f"{len(items)} {KINDS[kind]}:\n{listing(lines)}")
        return "\n".join(parts)

    def refuse(self, source: str, *, skip: bool, repeats: Repeats = "refuse") -> None:
        """Raise DataError for what is not to be skipped, all of it together."""
        kinds = [] if skip else [kind for kind in KINDS if kind != "repeated"]
        remedies = (
            ["mend them, or leave them out with --skip-broken"] if any(self.found[kind] for kind in kinds) else []
        )
        if repeats == "refuse" and self.found["repeated"]:
            kinds.append("repeated")
            remedies.append(
                "take further photographs of a patient as samples of their own with --repeats each, or only the first "
                "with --repeats first; --eye-column names the column that tells left from right"
            )
        if remedies:
            raise DataError(f"{source}:\n{self.said(kinds)}\nWhat to do: {'; '.join(remedies)}.")

    def write(self, path: Path) -> None:
        """A CSV of all of them."""
        with atomic(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(_COLUMNS)
            writer.writerows((kind, where, what) for kind, items in self.found.items() for where, what in items)


def check_apart(samples: Sequence[Sample], source: str) -> None:
    """Raise DataError for a patient in two splits. Patients are not named."""
    first: dict[str, dict[str, str]] = {}
    for sample in samples:
        if sample.split is not None:
            first.setdefault(sample.group, {}).setdefault(sample.split, sample.where)
    shared = [
        ", ".join(f"{where} ({split})" for split, where in found.items()) for found in first.values() if len(found) > 1
    ]
    if shared:
        raise DataError(
            f"{source}: {len(shared)} patients are in more than one split, so the test would meet eyes it was trained "
            f"on; move each to one split, or set --split-column none to cut new splits:\n{listing(shared)}"
        )


def with_names(samples: Sequence[Sample]) -> list[Sample]:
    """The samples with names that are unique in their split: the second of a patient is called NAME-2, and so on."""
    taken = {(sample.split, sample.name) for sample in samples}
    seen: Counter[tuple[str | None, str]] = Counter()
    result = []
    for sample in samples:
        seen[sample.split, sample.name] += 1
        number = seen[sample.split, sample.name]
        name = sample.name
        while number > 1 and (sample.split, name) in taken:
            name = f"{sample.name}-{number}"
            number += 1
        taken.add((sample.split, name))
        result.append(replace(sample, name=name))
    return result
