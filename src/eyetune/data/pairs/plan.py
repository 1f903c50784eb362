"""What goes into which split: the samples of all tables, cut by patient; and their texts, each of them once."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from eyetune.data.identical import join, same_bytes
from eyetune.data.pairs.layout import SPLITS, images_file, texts_file
from eyetune.data.pairs.sample import InTable, Problems, Sample, Source, check_apart, with_names
from eyetune.data.pairs.texts import Text, name_fault, read_texts, scan_images
from eyetune.data.splits import draw_patients
from eyetune.errors import DataError, plural

VALIDATED_ON_TEST = (
    "the test split was also used for validation: the epoch was chosen on the images it is scored on, so the scores "
    "are too good"
)


@dataclass(frozen=True)
class Shares:
    """What is cut from train where it is not given.

    Attributes:
        val, test: shares of the patients, 0..1.
        validate_on_test: cut no validation split; the test split stands for it.
        seed: another seed, another cut.
    """

    val: float = 0.1
    test: float = 0.1
    validate_on_test: bool = False
    seed: int = 0


@dataclass
class Plan:
    """All that will be written but the pixels.

    Attributes:
        samples: with their splits.
        source: the tables, for messages.
        problems: what is amiss with rows.
        notes: how tables were read.
        warnings: what a reader of results must not overlook.
    """

    samples: list[Sample]
    source: str
    problems: Problems
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def splits(self) -> list[str]:
        """Those that have samples, in the usual order."""
        return [split for split in SPLITS if any(sample.split == split for sample in self.samples)]

    def of(self, split: str) -> list[Sample]:
        """The samples of a split, in the order of the tables."""
        return [sample for sample in self.samples if sample.split == split]

    def sources(self) -> list[Source]:
        """Every photograph, once."""
        return list(dict.fromkeys(eye for sample in self.samples for eye in sample.sides))

    def without(self, faults: Mapping[Source, str], outside: str) -> None:
        """Leave out the samples of which a photograph cannot be read, and note them; `outside` is such a fault too."""
        kept = []
        for sample in self.samples:
            bad = [faults[eye] for eye in sample.sides if eye in faults]
            if bad:
                where, what = sample.where, bad[0].rstrip(".")
                if what.startswith(f"{where}, "):  # an image inside a table names its line and side itself
                    where, _, what = what.partition(": ")
                self.problems.add("outside" if bad[0] == outside else "broken", where, what)
            else:
                kept.append(sample)
        self.samples = kept

    def fingerprint(self, keys: Mapping[Source, str]) -> str:
        """The same for the same patients, texts, splits, and photographs prepared in the same way."""
        content = [
            [one.split, one.name, one.group, one.texts, sorted((side, keys[eye]) for side, eye in one.eyes.items())]
            for one in self.samples
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def read_layout(folder: Path, problems: Problems) -> list[Sample]:
    """The samples of a folder of RET-CLIP's tables, `{split}_imgs.tsv` and `{split}_texts.jsonl`.

    Names are often numbers that begin anew in each split, so the same name in two of them is two patients. (The same
    image in two is found by :func:`cut`.)

    Raises DataError for a table that is missing beside the other, or cannot be read.
    """
    samples: list[Sample] = []
    for split in SPLITS:
        tables = images_file(folder, split), texts_file(folder, split)
        if not any(table.exists() for table in tables):
            continue
        eyes = scan_images(tables[0], problems)
        texts: dict[str, list[tuple[str, str]]] = {patient: [] for patient in eyes}
        where: dict[str, str] = {}
        for text in read_texts(tables[1]):
            if not text.text.strip():
                problems.add("text_missing", text.where, "the text is empty")
                continue
            for patient in text.patients:
                if patient in texts:
                    texts[patient].append((text.text, text.label or ""))
                    where.setdefault(patient, text.where)
                else:
                    problems.add("image_missing", text.where, "image_ids names a patient who has no images")
        for patient, found in texts.items():
            line = next(iter(eyes[patient].values())).where.partition(",")[0]
            if not found:
                problems.add("text_missing", line)
            elif fault := name_fault(patient):
                problems.add("name", line, fault)
            else:
                samples.append(Sample(patient, patient, eyes[patient], tuple(dict.fromkeys(found)), split, line))
    splits: dict[str, set[str | None]] = {}
    for sample in samples:
        splits.setdefault(sample.name, set()).add(sample.split)
    return [replace(s, group=f"{s.split}/{s.name}") if len(splits[s.name]) > 1 else s for s in samples]


def cut(plan: Plan, shares: Shares, *, alone: bool = False) -> None:
    """Give every sample a split: what is given stays; test and validation, where missing, are cut from train.

    `alone`: all samples have one split by the user's word; nothing is cut, and it need not be train.

    Patients stay together, and so do files with the same bytes. Raises DataError when a patient is in two splits, when
    there are too few patients, or no train or test split comes of it.
    """
    check_apart(plan.samples, plan.source)
    together = _groups(plan)
    given = {sample.split for sample in plan.samples} - {None}
    wanted = [] if "test" in given or not shares.test else [("test", shares.test)]
    if "val" not in given and shares.val and not shares.validate_on_test:
        wanted.append(("val", shares.val))
    if alone:
        wanted = []
    pool = {together[sample.group] for sample in plan.samples if sample.split in (None, "train")}
    if wanted and len(pool) <= len(wanted):
        names = ", ".join(["train", *(name for name, _ in wanted)])
        raise DataError(
            f"{plan.source}: {plural(len(pool), 'patient')} cannot be cut into {names}; give more, or set --val-share "
            "or --test-share to 0."
        )
    drawn: dict[str, str] = {}
    for name, share in wanted:
        # The share is of all that could be cut, so that the order of cutting does not matter.
        rest = sorted(pool - drawn.keys())
        drawn.update(dict.fromkeys(draw_patients(rest, min(share * len(pool) / len(rest), 0.9), shares.seed), name))
    cut_now = [
        replace(sample, split=drawn.get(together[sample.group], "train")) if sample.split in (None, "train") else sample
        for sample in plan.samples
    ]
    plan.samples = with_names(cut_now)
    _check_splits(plan, shares, together, alone=alone)


def _groups(plan: Plan) -> dict[str, str]:
    """For every group the one it is to stay with: patients who share a file's bytes count as one."""
    groups = sorted({sample.group for sample in plan.samples})
    place = {group: index for index, group in enumerate(groups)}
    owners = [(eye, place[sample.group]) for sample in plan.samples for eye in sample.sides]
    files = [(eye, owner) for eye, owner in owners if isinstance(eye, Path)]
    same = same_bytes([eye for eye, _ in files])
    links = [(files[first][1], files[other][1]) for first, *rest in same for other in rest]
    first_of: dict[bytes, int] = {}
    stored = [(eye.digest, owner) for eye, owner in owners if isinstance(eye, InTable)]
    links += [(first_of.setdefault(digest, owner), owner) for digest, owner in stored]
    result = {group: group for group in groups}
    for first, *rest in join(len(groups), links):
        result.update(dict.fromkeys((groups[other] for other in rest), groups[first]))
    return result


def _check_splits(plan: Plan, shares: Shares, together: Mapping[str, str], *, alone: bool) -> None:
    have = plan.splits
    if not have or ("train" not in have and not alone):
        raise DataError(f"{plan.source} has {', '.join(have) or 'no samples'} but nothing to train on.")
    if shares.validate_on_test:
        if "test" not in have:
            raise DataError(f"{plan.source} has no test split to validate on (--validate-on-test).")
        if "val" in have:
            raise DataError(f"{plan.source} has a validation split: leave out --validate-on-test.")
        plan.warnings.append(VALIDATED_ON_TEST)
    across: dict[str, set[str | None]] = {}
    for sample in plan.samples:
        across.setdefault(together[sample.group], set()).add(sample.split)
    crossing = sum(len(splits) > 1 for splits in across.values())
    if crossing:
        plan.warnings.append(
            f"{plural(crossing, 'photograph')} or more are in two splits under different patients (files with the same "
            "bytes), so that the test meets what was trained on"
        )


def texts_of(samples: Sequence[Sample]) -> tuple[list[Text], int]:
    """The texts of a split's samples, the same text once; and how many of them came with different labels."""
    patients: dict[str, list[str]] = {}
    labels: dict[str, set[str]] = {}
    for sample in samples:
        for text, label in sample.texts:
            about = patients.setdefault(text, [])
            if sample.name not in about[-1:]:
                about.append(sample.name)
            labels.setdefault(text, set()).add(label)
    found = []
    for number, (text, about) in enumerate(patients.items()):
        label = next(iter(labels[text])) if len(labels[text]) == 1 else ""
        found.append(Text(number, text, tuple(about), label or None))
    return found, sum(len(several - {""}) > 1 for several in labels.values())


def notes_of(samples: Sequence[Sample], texts: Sequence[Text]) -> dict[str, Any]:
    """The content of pairs.json."""
    patients = {}
    for sample in samples:
        labels = {label for _, label in sample.texts}
        label = next(iter(labels)) if len(labels) == 1 else ""
        patients[sample.name] = {"group": sample.group, "single": sample.single, "label": label or None}
    return {
        "format": 1,
        "patients": patients,
        "labels": {str(text.number): text.label for text in texts if text.label is not None},
    }


def counts_of(samples: Sequence[Sample], texts: Sequence[Text], ambiguous: int) -> dict[str, Any]:
    """What prepare.json says of a split."""
    labels = Counter(text.label for text in texts for _ in text.patients)
    return {
        "patients": len({sample.group for sample in samples}),
        "samples": len(samples),
        "single_eyes": sum(sample.single is not None for sample in samples),
        "texts": len(texts),
        "pairs": sum(len(text.patients) for text in texts),
        "texts_with_several_labels": ambiguous,
        "pairs_by_label": {label: count for label, count in sorted(labels.items(), key=str) if label is not None},
    }
