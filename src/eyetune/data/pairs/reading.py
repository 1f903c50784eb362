"""From tables to samples: a row a patient with two images, a row an eye, or a row an image of a dataset."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from eyetune.data.config import IGNORE
from eyetune.data.images import Finder
from eyetune.data.labels import is_missing
from eyetune.data.pairs.dataset import PhotoDataset
from eyetune.data.pairs.sample import EyeTexts, InDataset, Problems, Repeats, Sample, Source, with_names
from eyetune.data.pairs.texts import name_fault
from eyetune.data.tables import EYE_WORDS, STANDARD, read_rows, split_word
from eyetune.errors import DataError, did_you_mean

USUAL: Mapping[str, tuple[str, ...]] = {
    **STANDARD,
    "text": ("text", "prompt", "caption", "report", "description", "findings", "impression"),
    "left": ("left", "left_image", "image_left", "left_path", "path_left", "left_eye", "img_left"),
    "right": ("right", "right_image", "image_right", "right_path", "path_right", "right_eye", "img_right"),
    "text_left": ("text_left", "left_text", "prompt_left", "caption_left", "report_left", "left_keywords"),
    "text_right": ("text_right", "right_text", "prompt_right", "caption_right", "report_right", "right_keywords"),
    "index": ("dataset_index",),
}  # fmt: skip
"""Column names that are understood without being told, most usual first; compared without case."""

_NUMBERED = re.compile(r"(text|prompt|caption|report|description)[ _]?\d+", re.IGNORECASE)
"""Columns of several texts about one patient."""

_HAN = re.compile(r"[\u4e00-\u9fff]")
_SIDES = {"left": ("Left eye: ", "左眼：", r"\bleft\b|左"), "right": ("Right eye: ", "右眼：", r"\bright\b|右")}
"""What is put before a text about one eye, in English and Chinese, unless the text names the side itself."""


@dataclass(frozen=True)
class Wanted:
    """Columns as the user named them: by part, None to find the usual name, "none" for no such column."""

    patient: str | None = None
    eye: str | None = None
    split: str | None = None
    image: str | None = None
    left: str | None = None
    right: str | None = None
    label: str | None = None
    index: str | None = None
    text: tuple[str, ...] = ()


@dataclass
class _Visit:
    """Photographs that belong together, and the texts: about the patient, and about one eye."""

    patient: str | None
    split: str | None
    where: str
    eyes: dict[str, Source] = field(default_factory=dict)
    """By "left" and "right"; a photograph of unknown side is alone, under ""."""
    texts: dict[str, list[tuple[str, str]]] = field(default_factory=lambda: {"": [], "left": [], "right": []})


def read_table(
    path: Path,
    *,
    split: str | None,
    images: Path | None,
    dataset: PhotoDataset | None,
    wanted: Wanted,
    eye_texts: EyeTexts,
    repeats: Repeats,
    problems: Problems,
) -> tuple[list[Sample], list[str]]:
    """The samples of a table, and notes on how it was read. What is amiss with rows goes into `problems`.

    Args:
        path: CSV, TSV or JSONL with a header.
        split: of all its rows; None to take a split column, or to cut later.
        images: folder that image names are relative to.
        dataset: what `dataset_index` counts in.
        wanted: columns by name.

    Raises DataError for a table that cannot be read, lacks a column, or of which no image is found.
    """
    names, rows = read_rows(path)
    columns = _choose(names, wanted, path, indexed=dataset is not None)
    table = _Table(path, columns, [(row, where, split or columns.split(row, where, path)) for row, where in rows])
    notes = [columns.note()]
    if "left" in columns.chosen:
        visits = _pairs(table, Finder(path, images), problems)
    else:
        sources = (
            _files(table, Finder(path, images), problems) if dataset is None else _inside(table, dataset, problems)
        )
        visits = _one_by_one(table, sources)
        if eye_texts != "apart":
            visits = _put_together(visits)
    if "patient" not in columns.chosen:
        notes.append("no patient column: every row counts as a patient of its own")
    # Eyes that stand apart are samples of their own, however many a patient has.
    further: Repeats = "each" if eye_texts == "apart" else repeats
    return _samples(_merge(visits, further, problems), eye_texts, problems), notes


# -- columns -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Columns:
    """The column of each part, and the columns of texts about the patient (or the row's eye)."""

    chosen: Mapping[str, str]
    texts: Sequence[str]

    def cell(self, row: Mapping[str, str], part: str) -> str:
        """What a row says of a part; empty where it says nothing."""
        text = row[self.chosen[part]].strip() if part in self.chosen else ""
        return "" if is_missing(text) else text

    def texts_in(self, row: Mapping[str, str], names: Iterable[str]) -> list[tuple[str, str]]:
        """(text, label) of the columns `names` that are not empty, each once, its spaces single."""
        label = self.cell(row, "label")
        cells = (" ".join(row[name].split()) for name in names)
        return list(dict.fromkeys((cell, label) for cell in cells if not is_missing(cell)))

    def split(self, row: Mapping[str, str], where: str, path: Path) -> str | None:
        """The split a row names. Raises DataError for a word that is none."""
        if "split" not in self.chosen:
            return None
        word = split_word(row[self.chosen["split"]])
        if word is None:
            raise DataError(
                f"{path}: {where} of the column {self.chosen['split']!r} says {row[self.chosen['split']]!r}, not "
                "train, val or test; correct it, or set --split-column none to cut new splits."
            )
        return word

    def note(self) -> str:
        """Which columns were taken, in words."""
        shown = [f"{part} {name}" for part, name in self.chosen.items()]
        return "columns: " + "; ".join([*shown, *([f"texts {', '.join(self.texts)}"] if self.texts else [])])


@dataclass(frozen=True)
class _Table:
    """A table's rows: cells, where they stand, split."""

    path: Path
    columns: _Columns
    rows: Sequence[tuple[Mapping[str, str], str, str | None]]


def _choose(names: Sequence[str], wanted: Wanted, path: Path, *, indexed: bool) -> _Columns:
    """Which column plays which part. Raises DataError, with all that is wrong, for columns that are not there."""
    by_lower = {name.strip().lower(): name for name in reversed(names)}
    faults: list[str] = []
    chosen: dict[str, str] = {}
    for part in ("patient", "eye", "split", "label", "left", "right", "index", "image"):
        found = _column(part, getattr(wanted, part), by_lower, chosen.values(), faults)
        if found is not None:
            chosen[part] = found
    if ("left" in chosen) != ("right" in chosen):
        lone = "left" if "left" in chosen else "right"
        if getattr(wanted, lone) is not None:
            faults.append("--left-column and --right-column go together.")
        chosen.pop(lone)
    texts = [by_lower.get(name.strip().lower(), name) for name in wanted.text]
    faults += [f"no column {name!r} (--text-column).{did_you_mean(name, names)}" for name in texts if name not in names]
    if not wanted.text:
        texts = [by_lower[known] for known in USUAL["text"] if known in by_lower][:1]
        texts += [name for name in names if _NUMBERED.fullmatch(name.strip())]
        for part in ("text_left", "text_right"):
            if (name := next((by_lower[known] for known in USUAL[part] if known in by_lower), None)) is not None:
                chosen[part] = name
    faults += _lacking(chosen, texts, indexed=indexed)
    if faults:
        raise DataError(f"{path}: " + "\n".join(faults) + f"\nIts columns: {', '.join(names[:100])}.")
    if indexed or "left" in chosen:
        chosen.pop("image", None)
    if indexed:
        chosen = {part: name for part, name in chosen.items() if part not in ("left", "right")}
    return _Columns(chosen, texts)


def _column(
    part: str,
    asked: str | None,
    by_lower: Mapping[str, str],
    taken: Iterable[str],
    faults: list[str],
) -> str | None:
    """The column of a part: the one asked for, else the first usual name that no other part has."""
    if asked is None:
        usual = (by_lower[known] for known in USUAL[part] if known in by_lower)
        return next((name for name in usual if name not in taken), None)
    found = by_lower.get(asked.strip().lower())
    if found is None and asked.lower() != IGNORE:
        faults.append(f"no column {asked!r} (--{part}-column).{did_you_mean(asked, by_lower.values())}")
    return found


def _lacking(chosen: Mapping[str, str], texts: Sequence[str], *, indexed: bool) -> Iterator[str]:
    """What is missing among the columns, and how to name it."""
    if not texts and not {"text_left", "text_right"} & chosen.keys():
        yield "no column with a usual name for the texts; name it with --text-column."
    if indexed and "index" not in chosen:
        yield "no column dataset_index; name the one that counts in the dataset with --index-column."
    if not indexed and "index" in chosen and not {"left", "image"} & chosen.keys():
        yield f"its column {chosen['index']} counts in a dataset: name that with --dataset."
    elif not indexed and not {"left", "image"} & chosen.keys():
        yield (
            "no column with a usual name for the images: name it with --image-column, or two of them with "
            "--left-column and --right-column."
        )


# -- rows --------------------------------------------------------------------------------------------------------------


def _files(table: _Table, finder: Finder, problems: Problems) -> list[Source | None]:
    """The file of each row; None, and a problem, where there is none."""
    cells = [(table.columns.cell(row, "image"), where) for row, where, _ in table.rows]
    found = _look_up(cells, finder)
    for cell, where in cells:
        if cell not in found:
            problems.add("image_missing", where, f"no file {cell}" if cell else "no image is named")
    return [found.get(cell) for cell, _ in cells]


def _look_up(named: Sequence[tuple[str, str]], finder: Finder) -> dict[str, Path]:
    """The file of each image name that has one. Raises DataError when none has, or a name may mean several."""
    unique = {cell: where for cell, where in reversed(named) if cell}
    if not unique:
        return {}
    paths, _ = finder.find(list(unique), list(unique.values()), all_there=False)
    return {cell: path for cell, path in zip(unique, paths, strict=True) if path.is_file()}


def _inside(table: _Table, dataset: PhotoDataset, problems: Problems) -> list[Source | None]:
    """The photograph in the dataset of each row; None, and a problem, where there is none."""
    result: list[Source | None] = []
    for row, where, split in table.rows:
        cell = table.columns.cell(row, "index")
        part = dataset.split_for(split)
        count = dataset.count(part)
        source = None
        if not (cell.isascii() and cell.isdigit() and len(cell) < 19):
            problems.add("outside", where, f"{cell!r} is no index (a whole number from 0)" if cell else "no index")
        elif count is not None and int(cell) >= count:
            problems.add("outside", where, f"index {int(cell)}, but {part} has {count:,} images")
        else:
            source = InDataset(part, int(cell))
        result.append(source)
    return result


def _pairs(table: _Table, finder: Finder, problems: Problems) -> list[_Visit]:
    """A visit of every row of a table with a left and a right image."""
    columns = table.columns
    found = _look_up([(columns.cell(row, side), at) for row, at, _ in table.rows for side in ("left", "right")], finder)
    visits = []
    for row, where, split in table.rows:
        named = {side: columns.cell(row, side) for side in ("left", "right")}
        missing = [cell for cell in named.values() if cell and cell not in found]
        if missing or not any(named.values()):
            problems.add("image_missing", where, f"no file {missing[0]}" if missing else "neither image is named")
            continue
        visit = _Visit(columns.cell(row, "patient") or None, split, where)
        visit.eyes.update((side, found[cell]) for side, cell in named.items() if cell)
        visit.texts[""] = columns.texts_in(row, columns.texts)
        for side in ("left", "right"):
            if f"text_{side}" in columns.chosen:
                visit.texts[side] = columns.texts_in(row, [columns.chosen[f"text_{side}"]])
        visits.append(visit)
    return visits


def _one_by_one(table: _Table, sources: Sequence[Source | None]) -> list[_Visit]:
    """A visit of every row of a table with one image a row."""
    columns = table.columns
    visits = []
    for (row, where, split), source in zip(table.rows, sources, strict=True):
        if source is not None:
            side = EYE_WORDS.get(columns.cell(row, "eye").lower(), "")
            visit = _Visit(columns.cell(row, "patient") or None, split, where)
            visit.eyes[side] = source
            visit.texts[side] = columns.texts_in(row, columns.texts)
            visits.append(visit)
    return visits


def _put_together(visits: Sequence[_Visit]) -> list[_Visit]:
    """Left and right eyes of a patient in one visit: the first with the first, the second with the second.

    A photograph of unknown side, and one without a patient, stays alone.
    """
    waiting: dict[tuple[str, str | None], list[_Visit]] = {}
    result: list[_Visit] = []
    for visit in visits:
        side, source = next(iter(visit.eyes.items()))
        if visit.patient is None or not side:
            result.append(visit)
            continue
        others = waiting.setdefault((visit.patient, visit.split), [])
        same = next((other for other in others if other.eyes.get(side) == source), None)
        partner = same or next((other for other in others if side not in other.eyes), None)
        if partner is None:
            others.append(visit)
            result.append(visit)
        else:
            partner.eyes[side] = source
            partner.texts[side] = list(dict.fromkeys([*partner.texts[side], *visit.texts[side]]))
    return result


def _merge(visits: Sequence[_Visit], repeats: Repeats, problems: Problems) -> list[_Visit]:
    """One visit of those with the same photographs, with all their texts; further ones of a patient as `repeats`."""
    by_images: dict[tuple[str | None, str | None, tuple[tuple[str, Source], ...]], _Visit] = {}
    first: dict[tuple[str, str | None], _Visit] = {}
    for visit in visits:
        key = visit.split, visit.patient, tuple(sorted(visit.eyes.items(), key=lambda eye: eye[0]))
        if (same := by_images.get(key)) is not None:
            for side, texts in visit.texts.items():
                same.texts[side] = list(dict.fromkeys([*same.texts[side], *texts]))
            continue
        if visit.patient is not None and repeats != "each":
            earlier = first.setdefault((visit.patient, visit.split), visit)
            if earlier is not visit:
                problems.add("repeated", visit.where, f"the same patient as {earlier.where}")
                continue
        by_images[key] = visit
    return list(by_images.values())


# -- samples -----------------------------------------------------------------------------------------------------------


def _samples(visits: Sequence[_Visit], eye_texts: EyeTexts, problems: Problems) -> list[Sample]:
    samples: list[Sample] = []
    for visit in visits:
        one = next(iter(visit.eyes.values()))
        name, group = visit.patient or _name_of(one), visit.patient or _group_of(one)
        if fault := name_fault(name):
            problems.add("name", visit.where, fault)
            continue
        parts = [visit.eyes] if eye_texts != "apart" else [{side: eye} for side, eye in visit.eyes.items()]
        for eyes in parts:
            texts = _texts_of(visit, tuple(eyes), eye_texts)
            if not texts:
                problems.add("text_missing", visit.where)
                continue
            samples.append(Sample(name, group, eyes, texts, visit.split, visit.where))
    return with_names(samples)


def _texts_of(visit: _Visit, sides: tuple[str, ...], eye_texts: EyeTexts) -> tuple[tuple[str, str], ...]:
    """The texts of a sample that shows these sides."""
    own = [text for side in sides if side for text in visit.texts[side]]
    if eye_texts == "join" and len(sides) == 2 and visit.texts["left"] and visit.texts["right"]:
        own = [_joined(visit.texts["left"][0], visit.texts["right"][0])]
        longer = max(len(visit.texts["left"]), len(visit.texts["right"]))
        # Several texts an eye: the first with the first; an eye that has fewer repeats its last.
        for number in range(1, longer):
            own.append(_joined(*(visit.texts[side][min(number, len(visit.texts[side]) - 1)] for side in sides)))
    return tuple(dict.fromkeys([*visit.texts[""], *own]))


def _joined(left: tuple[str, str], right: tuple[str, str]) -> tuple[str, str]:
    """One text about both eyes; what is said of both alike is said once. The label where both have the same."""
    label = left[1] if left[1] == right[1] else ""
    if left[0] == right[0]:
        return left[0], label
    return " ".join(_named(side, text) for side, (text, _) in (("left", left), ("right", right))), label


def _named(side: str, text: str) -> str:
    english, chinese, mark = _SIDES[side]
    if re.search(mark, text, re.IGNORECASE):
        return text
    return (chinese if _HAN.search(text) else english) + text


def _name_of(source: Source) -> str:
    return str(source.index) if isinstance(source, InDataset) else Path(_group_of(source)).stem


def _group_of(source: Source) -> str:
    """Who a photograph without a patient is of: itself, wherever it is named."""
    return f"{source.split}/{source.index}" if isinstance(source, InDataset) else str(source)
