"""`eyetune data …`: what is done with photographs before any training."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from eyetune.data.config import Contrast, DataConfig, Fit
from eyetune.errors import DataError, UserError, listing
from eyetune.flags import Switch, Workers
from eyetune.progress import duration, meter

if TYPE_CHECKING:
    from eyetune.data.cache import Cache

PROBLEMS_FOUND = 1

#: As data.bits and data.cache_limit of the configuration.
Bits = Annotated[int, Parameter(validator=Number(gte=9, lte=16))]
Limit = Annotated[float, Parameter(validator=Number(gt=0, lt=float("inf")))]


def synth(
    out: Path,
    *,
    patients: int = 100,
    size: str = "512",
    seed: int = 0,
    cameras: str = "clinic",
    every_camera: bool = False,
    first_patient: int = 1,
    grades: str | None = None,
    splits: str | None = None,
    defects: str | None = None,
    workers: int | None = None,
) -> None:
    """Draw a cohort of synthetic eyes whose labels are true by construction.

    Writes images/ and labels.csv (image, patient, eye, camera, dr_grade, vcdr, glaucoma, caption). The same seed
    draws the same eyes, on any number of workers and at any size.

    Args:
        out: Folder to write to; empty, or not there yet.
        patients: How many patients, two eyes each.
        size: Pixels of a square photograph, or WIDTHxHEIGHT such as 2592x1944.
        seed: Number that decides everything.
        cameras: One or more of clinic, handheld, legacy, separated by commas. Patients take turns among them.
        every_camera: Photograph every eye with every camera instead.
        first_patient: Number of the first patient: cohorts of one seed with other numbers share no patient.
        grades: Weights of the diabetic retinopathy grades 0 to 4 (default 30,15,25,15,15).
        splits: Shares of patients for a split column, such as train=0.7,val=0.1,test=0.2.
        defects: Faults to plant and list in defects.json: a number of each kind (such as 3), or some of
            duplicates, near_duplicates, patient_leaks, truncated, mislabelled, reencoded, conflicts, blank, missing,
            out_of_range with numbers, such as duplicates=2,truncated=1.
        workers: Processes (default: one for every processor).
    """
    from eyetune.data.phantom import write_cohort

    pixels = _size(size)
    names = tuple(_words(cameras))
    weights = None if grades is None else [_number(word, "grades") for word in _words(grades)]
    shares = None if splits is None else _pairs(splits, "splits")
    faults = None if defects is None else _defects(defects, with_leaks=shares is not None)
    total = 2 * patients * (len(names) if every_camera else 1)
    with meter(total, "Drawing", "images") as update:
        summary = write_cohort(
            out,
            patients=patients,
            seed=seed,
            size=pixels,
            cameras=names,
            every_camera=every_camera,
            first_patient=first_patient,
            grades=weights,
            defects=faults,
            splits=shares,
            workers=_workers(total) if workers is None else workers,
            progress=lambda done, _total: update(done),
        )
    counted = ", ".join(f"grade {grade}: {n}" for grade, n in enumerate(summary.grades))
    print(
        f"{summary.images} images of {summary.patients} patients in {summary.folder} ({counted}), "
        f"{duration(summary.seconds)}."
    )
    if summary.splits:
        print("Splits: " + ", ".join(f"{name}: {n}" for name, n in summary.splits.items()) + ".")
    if summary.defects:
        planted = ", ".join(f"{n} {kind.replace('_', ' ')}" for kind, n in summary.defects.items())
        print(f"Planted: {planted}; listed in {summary.out / 'defects.json'}.")
    print(
        f"Labels in {summary.table}. Train on it: eyetune finetune --data.table {summary.table} "
        "--data.label-column dr_grade --out runs/first"
    )


def table(folder: Path, *, out: Path) -> None:
    """Write a table of the photographs below a folder, with what DICOM headers say: image, patient, eye, date.

    For DICOM the patient is the number in the header (PatientID), so that all eyes of a patient end up in one split;
    the table identifies people: keep it where the files are kept. Other photographs have these cells empty. A DICOM
    file whose header cannot be read has the reason in the column error. Add a column of labels to train on it.

    Args:
        folder: Searched with its subfolders; DICOM files are found whatever they are called.
        out: CSV file to write.
    """
    import csv

    from eyetune.data.dicom import Header, read_header
    from eyetune.data.folders import walk
    from eyetune.data.images import is_image_name
    from eyetune.data.photo import has_dicom_mark, is_dicom_name
    from eyetune.files import atomic

    if not folder.is_dir():
        raise UserError(f"no folder at {folder}.")
    found = [(file, marked) for file in walk(folder) if (marked := has_dicom_mark(file)) or is_image_name(file.name)]
    if not found:
        raise UserError(f"{folder}: no images in it.")
    read = refused = 0
    with (
        atomic(out) as temporary,
        # surrogateescape: a file name that is not valid UTF-8 comes back as it was.
        open(temporary, "w", encoding="utf-8", errors="surrogateescape", newline="") as stream,
    ):
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["image", "patient", "eye", "date", "error"])
        for file, marked in found:
            header, error = Header(), ""
            if marked or is_dicom_name(file.name):
                try:
                    header = read_header(file)
                    read += 1
                except DataError as fault:
                    error, refused = str(fault), refused + 1
            name = os.path.relpath(file, out.parent)
            writer.writerow([name, header.patient, header.eye, header.date, error])
    said = f", {refused} whose header cannot be read (column error says why)" if refused else ""
    print(f"{len(found)} images, {read} of them DICOM with a header{said}: {out}")


def cache(
    *tables: str,
    images: Path | None = None,
    image_column: str | None = None,
    backbone: str = "nano",
    pixels: int | None = None,
    crop: bool = True,
    contrast: Contrast = "none",
    fit: Fit | None = None,
    bits: Bits | None = None,
    folder: Path | None = None,
    limit: Limit = 50.0,
    workers: Workers = "auto",
    info: Switch = False,
    clear: Switch = False,
) -> int:
    """Prepare photographs in advance; show or clear what is kept. (Every verb fills the cache by itself.)

    Exit code 1: some photographs cannot be read; they are named.

    Args:
        tables: Tables, class folders or hf:NAME.
        images: Folder of the images that the tables name.
        image_column: Column of the image names (default: the usual names).
        backbone: Network to prepare for: it decides pixels and fit.
        pixels: Side of the square (default: the backbone's own).
        crop: Crop to the field of view.
        contrast: none, clahe or ben-graham.
        fit: pad or squash (default: as the backbone was trained).
        bits: Bits that gray images of more than 8 bits use, 9 to 16 (default: what the file says, else 16).
        folder: The cache folder (default: the user's).
        limit: GiB the cache may take.
        workers: Files at a time; auto chooses by the number of processors.
        info: Show what is kept, and where.
        clear: Delete everything that is kept.
    """
    from eyetune.data.cache import Cache

    if clear and (tables or info):
        raise UserError("--clear deletes everything that is kept: it goes with neither tables nor --info.")
    kept = Cache.of(DataConfig(table="", cache=folder or True, cache_limit=limit))
    assert kept is not None
    if clear:
        print(f"deleted {kept.clear() / 2**20:,.1f} MiB from {kept.store.folder}")
        return 0
    unreadable = 0
    for table in tables:
        config = DataConfig(
            table=table,
            images=images,
            image_column=image_column,
            crop=crop,
            contrast=contrast,
            fit=fit,
            bits=bits,
            **dict.fromkeys(("label_column", "patient_column", "eye_column", "split_column"), "none"),
        )
        unreadable += _prepare(config, kept, backbone, pixels, workers)
    if info or not tables:
        _show(kept)
    return PROBLEMS_FOUND if unreadable else 0


def _prepare(config: DataConfig, kept: Cache, backbone: str, pixels: int | None, workers: Workers) -> int:
    """Fill the cache with one table; say and return how many of its images cannot be read."""
    from eyetune.backbones import find_spec
    from eyetune.data.fundus import FundusSettings
    from eyetune.data.readable import find_faults
    from eyetune.data.records import open_manifest

    settings = FundusSettings.of(config, find_spec(backbone).preprocess_at(pixels))
    manifest = open_manifest(config, labels_required=False)
    faults = find_faults(manifest, workers=workers, cache=kept, settings=settings)
    bad = [f"{record.row}: {fault}" for record, fault in zip(manifest, faults, strict=True) if fault]
    print(f"{config.table}: {len(manifest) - len(bad)} of {len(manifest)} images prepared, {settings.pixels} px")
    if bad:
        print(f"{len(bad)} cannot be read:\n{listing(bad)}")
    return len(bad)


def _show(kept: Cache) -> None:
    from eyetune.data.store import Kind

    found = kept.info()
    print(f"{found.folder}: {found.bytes / 2**20:,.1f} MiB of at most {found.limit / 2**20:,.0f} MiB")
    names = {
        Kind.SQUARE: "prepared images",
        Kind.FEATURES: "features of frozen backbones",
        Kind.LOOK: "looks of the audit",
        Kind.FILE: "files known",
    }
    for kind, name in names.items():
        print(f"  {name}: {found.counts[kind]:,} ({found.sizes[kind] / 2**20:,.1f} MiB)")


def _size(text: str) -> int | tuple[int, int]:
    found = re.fullmatch(r"\s*(\d+)(?:\s*[xX×]\s*(\d+))?\s*", text)
    if found is None:
        raise UserError(f"--size must be pixels, such as 512, or WIDTHxHEIGHT, such as 2592x1944; got {text!r}.")
    width = int(found[1])
    return width if found[2] is None else (width, int(found[2]))


def _words(text: str) -> list[str]:
    return [word for word in re.split(r"[,\s]+", text.strip()) if word]


def _number(text: str, flag: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"--{flag}: {text!r} is not a number.") from None


def _pairs(text: str, flag: str) -> dict[str, float]:
    pairs: dict[str, float] = {}
    for word in _words(text):
        name, equals, value = word.partition("=")
        if not name or not equals:
            raise UserError(f"--{flag} takes NAME=NUMBER, separated by commas; got {word!r}.")
        pairs[name] = _number(value, flag)
    return pairs


def _defects(text: str, *, with_leaks: bool) -> Mapping[str, int]:
    from eyetune.data.phantom import DEFECTS

    if text.strip().isdigit():  # leaks need splits; without them a number means one of each other kind
        return {kind: int(text) for kind in DEFECTS if with_leaks or kind != "patient_leaks"}
    return {kind: int(count) for kind, count in _pairs(text, "defects").items()}


def _workers(images: int) -> int:
    """One a processor, but none for a handful of images: a process takes longer to start than twenty to draw."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(available, images // 20)
