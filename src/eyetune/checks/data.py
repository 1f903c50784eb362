"""Is the data sound? Files, classes, splits, and a look at what the network gets to see.

What makes a table unreadable (missing images, labels that make no sense, an image listed twice) is said by the readers
themselves and ends the check. Here is what can be read and would still spoil a result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from eyetune.backbones import find_spec
from eyetune.checks import plots
from eyetune.checks.subject import in_turns
from eyetune.data.audit import judge, rows
from eyetune.data.cache import Cache
from eyetune.data.config import IGNORE, DataConfig
from eyetune.data.fundus import FundusSettings
from eyetune.data.identical import same_bytes
from eyetune.data.loader import make_dataset
from eyetune.data.readable import find_faults
from eyetune.data.record import Kind, Record
from eyetune.data.records import Manifest, open_manifest
from eyetune.data.splits import split_configured
from eyetune.errors import DataError, listing
from eyetune.findings import Finding, Report, Status, carry_out

if TYPE_CHECKING:
    from eyetune.backbones import Preprocess
    from eyetune.config import Config

ROWS, VIEWS = 5, 5
"""Photographs in the picture, and augmented views of each."""


def check_data(config: Config, folder: Path, *, say: Callable[[Finding], None], start: Callable[[str], None]) -> Report:
    """Carry out every check of the data and draw the classes and some batches.

    Args:
        config: the configuration.
        folder: for the pictures.
        say: takes each finding as it is made.
        start: takes the line that says what is checked.

    Raises DataError when the table cannot be read or split, or no image can be decoded.
    """
    spec = find_spec(config.model.backbone)
    preprocess = replace(spec.preprocess, pixels=spec.check_pixels(config.model.pixels))
    settings = FundusSettings.of(config.data, preprocess)
    manifest = open_for_checking(config)
    sizes = ", ".join(f"{name} {len(manifest.select(name))}" for name in manifest.splits)
    line = f"{manifest.source}: {len(manifest)} images ({sizes}), classes {', '.join(manifest.classes)}"
    start(line)
    cache = Cache.of(config.data)
    faults = find_faults(manifest, workers=config.workers, cache=cache, settings=settings)
    readable = manifest.with_records(r for r, fault in zip(manifest, faults, strict=True) if fault is None)
    if not len(readable):
        raise DataError(f"{manifest.source}: none of the {len(manifest)} images can be read:\n  {faults[0]}")
    findings = []
    for name, check in (
        ("readable", lambda: _readable(manifest, faults, config.data.skip_unreadable)),
        ("classes", lambda: classes(readable, config.train.balance)),
        ("splits", lambda: splits(readable)),
        ("patients", lambda: judge.patients(rows.entries_of_manifest(readable))),
        ("identical", lambda: identical(readable, cache)),
        ("sizes", lambda: _sizes(readable, preprocess.pixels)),
    ):
        findings.append(carry_out(name, check))
        say(findings[-1])
    pictures = [folder / "data-classes.png"]
    plots.class_histogram(
        _counts(readable), readable.classes, pictures[0], title=f"Images by class, {Path(manifest.source).name}"
    )
    if "train" in readable.splits:
        pictures.append(folder / "data-batches.png")
        _draw_views(readable.select("train"), config, preprocess, settings=settings, cache=cache, path=pictures[1])
    details = {"classes": readable.classes, "counts": {name: list(found) for name, found in _counts(readable).items()}}
    return Report("data", line, findings, pictures, details)


def open_for_checking(config: Config) -> Manifest:
    """The photographs with their splits, as a run would have them; but a patient in two splits is let through.

    Raises DataError for everything else that the readers refuse.
    """
    try:
        found = open_manifest(config.data, kind=config.reads)
    except DataError as error:
        try:
            return _with_leaks(config.data, config.reads)
        except DataError:
            raise error from None
    return split_configured(found, config.data, config.split_seed, Cache.of(config.data))


def _with_leaks(data: DataConfig, kind: Kind = "classes") -> Manifest:
    """Patients and splits read one at a time, so that the reader cannot object to how they go together."""
    splits = open_manifest(data.model_copy(update={"patient_column": IGNORE}), kind=kind)
    people = open_manifest(data.model_copy(update={"split_column": IGNORE}), kind=kind)
    patient = {record.name: record.patient for record in people}
    return splits.with_records(replace(record, patient=patient[record.name]) for record in splits)


# -- the checks --------------------------------------------------------------------------------------------------------


def _readable(manifest: Manifest, faults: Sequence[str | None], skip: bool) -> Finding:
    bad = [f"{record.row}: {fault}" for record, fault in zip(manifest, faults, strict=True) if fault]
    values = {"images": len(manifest), "unreadable": [r.row for r, f in zip(manifest, faults, strict=True) if f]}
    if not bad:
        return Finding(Status.PASS, f"all {len(manifest)} images can be decoded", values=values)
    why = f"{len(bad)} of {len(manifest)} images cannot be read:\n{listing(bad)}"
    if skip:
        return Finding(Status.WARN, why, "They are left out (data.skip_unreadable).", values)
    return Finding(Status.FAIL, why, "Replace them, or leave them out with --skip-unreadable.", values)


def classes(manifest: Manifest, balance: str) -> Finding:
    """Whether the training images show every class, and often enough."""
    counts = dict(zip(manifest.classes, manifest.select("train").class_counts(), strict=True))
    values: dict[str, object] = {"train": counts}
    shown = ", ".join(f"{name}: {count}" for name, count in counts.items())
    absent = [name for name, count in counts.items() if not count]
    if absent:
        return Finding(
            Status.FAIL,
            f"training images: {shown}",
            f"No training image shows {', '.join(absent)}: add some, or name the classes that count in data.classes.",
            values,
        )
    ratio = judge.imbalance(counts.values())
    values["imbalance"] = ratio
    why = f"training images: {shown}; the most frequent class is {ratio:.1f} times the rarest"
    if ratio > judge.IMBALANCE and balance == "none":
        return Finding(
            Status.FAIL,
            f"{why} (at most {judge.IMBALANCE} without train.balance)",
            "Set train.balance: weighted (or sampler, or focal); look at balanced_accuracy and the scores of each "
            "class, not at accuracy.",
            values,
        )
    rare = [name for name, count in counts.items() if count < judge.FEWEST]
    if rare:
        advice = f"Fewer than {judge.FEWEST} training images show {', '.join(rare)}: expect little of that."
        return Finding(Status.WARN, why, advice, values)
    return Finding(
        Status.PASS, f"{why}{f' (train.balance {balance})' if ratio > judge.IMBALANCE else ''}", values=values
    )


def splits(manifest: Manifest) -> Finding:
    """Whether every split can do its work: labels there, every class there, a split to choose the epoch on."""
    counts = _counts(manifest)
    remarks, advice = [], []
    for name in manifest.splits:
        part = manifest.select(name)
        unknown = sum(all(one is None for one in record.truth) for record in part)
        absent = [one for one, count in zip(manifest.classes, counts[name], strict=True) if not count]
        if unknown:
            remarks.append(f"{unknown} of {len(part)} {name} images have no label")
        if absent and name != "train":
            remarks.append(f"the {name} split shows no {', '.join(absent)}")
            advice.append(f"Scores on {name} say nothing of {', '.join(absent)}.")
    if "val" not in manifest.splits:
        remarks.append("no validation split: the last epoch counts as the best")
        advice.append("Keep some images for it (data.val).")
    if "test" not in manifest.splits:
        remarks.append("no test split: nothing says how good the result is")
        advice.append("Keep some images for it (data.test).")
    values = {"sizes": {name: sum(counts[name]) for name in manifest.splits}, "remarks": remarks}
    sizes = ", ".join(f"{name} {len(manifest.select(name))}" for name in manifest.splits)
    if any("have no label" in remark and "train" in remark for remark in remarks):
        return Finding(Status.FAIL, "\n".join([sizes, *remarks]), "Label the training images or remove them.", values)
    if remarks:
        return Finding(Status.WARN, "\n".join([sizes, *remarks]), " ".join(advice), values)
    return Finding(Status.PASS, f"{sizes}; every class in each", values=values)


def identical(manifest: Manifest, cache: Cache | None = None) -> Finding:
    """Whether two files hold the same bytes: across splits, or under different labels, that spoils the result."""
    entries = rows.entries_of_manifest(manifest)
    same = same_bytes([record.image for record in manifest], cache)
    groups = [rows.make_group(entries, group, "bytes", "", lambda one, other: True) for group in same]
    return judge.copies(entries, groups, "bytes", len(entries))


def _sizes(manifest: Manifest, pixels: int) -> Finding:
    found = []
    for record in manifest:
        try:
            with Image.open(record.image) as image:
                found.append(image.size)
        except OSError:  # not a format with a header Pillow knows
            continue
    if not found:
        return Finding(Status.SKIP, "no file says its size without being decoded")
    sides = np.array(found)
    short = sides.min(axis=1)
    small = int((short < pixels).sum())
    low, middle, high = (found[i] for i in np.argsort(sides.prod(axis=1))[[0, len(found) // 2, -1]])
    values = {"smallest": low, "median": middle, "largest": high, "smaller_than_input": small, "pixels": pixels}
    why = f"{low[0]} x {low[1]} to {high[0]} x {high[1]} pixels, {middle[0]} x {middle[1]} in the middle"
    if small > len(found) // 10:
        return Finding(
            Status.WARN,
            f"{why}; {small} of {len(found)} are smaller than the network's {pixels} x {pixels}",
            "They are enlarged, which adds no detail: use the originals, or a smaller model.pixels.",
            values,
        )
    return Finding(Status.PASS, f"{why}; the network sees {pixels} x {pixels}", values=values)


# -- pieces ------------------------------------------------------------------------------------------------------------


def _counts(manifest: Manifest) -> dict[str, tuple[int, ...]]:
    return {name: manifest.select(name).class_counts() for name in manifest.splits}


def _label(manifest: Manifest, record: Record) -> str:
    if manifest.kind == "labels":
        return ", ".join(name for name, one in zip(manifest.classes, record.values, strict=True) if one) or "none"
    return manifest.truth_cells(record)[0] or "no label"


def _draw_views(
    train: Manifest,
    config: Config,
    preprocess: Preprocess,
    *,
    settings: FundusSettings,
    cache: Cache | None,
    path: Path,
) -> None:
    """A few training images as prepared, and as the first epochs show them."""
    some = train.with_records(train[index] for index in in_turns(train)[:ROWS])
    plain, changed = (
        make_dataset(
            some, preprocess, settings, training=training, augment=config.augment, seed=config.seed, cache=cache
        )
        for training in (False, True)
    )
    rows = []
    for index, record in enumerate(some):
        views = [plain[0, index], *(changed[epoch, index] for epoch in range(VIEWS))]
        rows.append(
            (f"{record.name}\n{_label(some, record)}", [_picture(v["image"].numpy(), preprocess) for v in views])
        )
    heads = ["prepared", *(f"epoch {epoch + 1}" for epoch in range(VIEWS))]
    level = config.augment if isinstance(config.augment, str) else "a list of transforms"
    title = f"{preprocess.pixels} x {preprocess.pixels} pixels as {config.model.backbone} sees them; augment: {level}"
    plots.picture_grid(rows, heads, path, title=title)


def _picture(image: np.ndarray, preprocess: Preprocess) -> np.ndarray:
    """float32[3, P, P], normalised, back to float[P, P, 3] in 0..1."""
    mean, std = (np.array(values)[:, None, None] for values in (preprocess.mean, preprocess.std))
    shown: np.ndarray = np.clip(image * std + mean, 0, 1).transpose(1, 2, 0)
    return shown
