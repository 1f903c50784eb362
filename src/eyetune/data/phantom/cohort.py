"""Patients by the hundred: images, labels.csv and, where asked for, planted defects with their ground truth."""

from __future__ import annotations

import csv
import io
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from eyetune.data.phantom.caption import describe
from eyetune.data.phantom.defects import check_defects, plant
from eyetune.data.phantom.plan import check_weights, patient_name, plan_patient
from eyetune.data.phantom.sample import check_size, find_camera, take_photo
from eyetune.errors import UserError
from eyetune.files import write_json, write_text, writing_failed

COLUMNS = ("image", "patient", "eye", "camera", "dr_grade", "vcdr", "glaucoma", "caption")
"""Columns of labels.csv; `split` follows when splits were asked for."""

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class CohortSummary:
    """What was written."""

    out: Path
    images: int
    patients: int
    grades: tuple[int, ...]
    """Images of each DR grade 0..4, as labelled."""
    defects: dict[str, int]
    splits: dict[str, int]
    """Images in each split; empty without splits."""
    seconds: float

    @property
    def table(self) -> Path:
        """labels.csv."""
        return self.out / "labels.csv"

    @property
    def folder(self) -> Path:
        """The folder that the table's file names are in."""
        return self.out / "images"


@dataclass(frozen=True, slots=True)
class _Job:
    """One patient's photographs."""

    folder: Path
    seed: int
    patient: int
    cameras: tuple[str, ...]
    height: int
    width: int
    grades: tuple[float, ...]


def write_cohort(
    out: Path,
    *,
    patients: int,
    seed: int = 0,
    size: int | tuple[int, int] = 512,
    cameras: Sequence[str] = ("clinic",),
    every_camera: bool = False,
    first_patient: int = 1,
    grades: Sequence[float] | None = None,
    defects: Mapping[str, int] | None = None,
    splits: Mapping[str, float] | None = None,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> CohortSummary:
    """Write `images/`, `labels.csv` and, with defects, `defects.json` into `out`. The table is written last.

    Args:
        out: A folder that is empty or not there yet.
        patients: How many; each has two eyes.
        seed: The same seed gives the same bytes, whatever `workers`.
        size: Pixels of a square photograph, or (width, height), up to 2592x1944 and beyond.
        cameras: Names in :data:`CAMERAS`; patients take turns among them.
        every_camera: Photograph every eye with every camera instead.
        first_patient: Number of the first patient. Cohorts of one seed share no patient when their numbers do not
            meet; cohorts of different seeds never share one, but may share names.
        grades: Five weights for the DR grades 0..4, see :func:`plan_patient`.
        defects: How many of each of :data:`DEFECTS` to plant.
        splits: Shares by name, such as {"train": 0.7, "val": 0.1, "test": 0.2}: patients are divided so, in a column
            `split`.
        workers: Processes; 0 or 1 draws in this one.
        progress: Called with (images done, images in all) as they are written.
    """
    start = time.perf_counter()
    if patients < 1 or first_patient < 0:
        raise UserError(f"A cohort needs one patient or more, numbered from 0; got {patients} from {first_patient}.")
    width, height = (size, size) if isinstance(size, int) else size
    check_size(height, width)
    if not cameras:
        raise UserError("Name at least one camera.")
    names = tuple(find_camera(name).name for name in cameras)
    shares = check_weights(grades)
    wanted = check_defects(defects, splits)
    numbers = range(first_patient, first_patient + patients)
    assigned = _assign_splits(numbers, splits, seed)
    if sum(wanted.values()) > patients:
        raise UserError(f"{sum(wanted.values())} defects need as many patients, one each; got {patients}.")

    folder = _prepare(Path(out))
    jobs = [
        _Job(folder, seed, n, names if every_camera else (names[i % len(names)],), height, width, shares)
        for i, n in enumerate(numbers)
    ]
    total = sum(2 * len(job.cameras) for job in jobs)
    rows: list[Row] = []
    for written in _run(jobs, workers):
        rows += written
        if progress is not None:
            progress(len(rows), total)
    rows.sort(key=lambda row: str(row["image"]))
    for row in rows:
        if assigned:
            row["split"] = assigned[str(row["patient"])]
    if wanted:
        try:
            truth = plant(folder, rows, wanted, seed=seed, new_patient=numbers[-1] + 1)
        except OSError as error:
            raise writing_failed(folder, error) from error
        write_json(Path(out) / "defects.json", {"seed": seed, "defects": truth})
    write_text(Path(out) / "labels.csv", _table(rows, with_split=bool(assigned)))
    return CohortSummary(
        out=Path(out),
        images=len(rows),
        patients=len({row["patient"] for row in rows}),
        grades=tuple(Counter(row["dr_grade"] for row in rows).get(grade, 0) for grade in range(5)),
        defects=wanted,
        splits=dict(Counter(row["split"] for row in rows)) if assigned else {},
        seconds=time.perf_counter() - start,
    )


def _prepare(out: Path) -> Path:
    """Make `out`/images; refuse to mix with what is already there."""
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out} is not an empty folder. Name another one, or empty it first.")
        folder = out / "images"
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise writing_failed(out, error) from error
    return folder


def _assign_splits(numbers: range, splits: Mapping[str, float] | None, seed: int) -> dict[str, str]:
    """A split for every patient, in the shares asked for (to the nearest patient)."""
    if not splits:
        return {}
    total = sum(splits.values())
    if min(splits.values()) < 0 or not 0 < total < float("inf"):
        raise UserError(f"Split shares must be positive numbers; got {dict(splits)}.")
    order = np.random.default_rng(np.random.SeedSequence([seed, 78])).permutation(len(numbers))
    edges = np.rint(np.cumsum(list(splits.values())) / total * len(numbers))
    names = list(splits)
    return {
        patient_name(number): names[int(np.searchsorted(edges, place, side="right"))]
        for number, place in zip(numbers, order, strict=True)
    }


def _run(jobs: list[_Job], workers: int) -> Iterator[list[Row]]:
    """Each job's rows, as they come."""
    if workers <= 1:
        for job in jobs:
            yield _write_patient(job)
        return
    # spawn, not fork: the caller may hold threads (torch, OpenCV) that do not survive a fork.
    pool = ProcessPoolExecutor(
        min(workers, len(jobs)), mp_context=multiprocessing.get_context("spawn"), initializer=_one_thread
    )
    try:
        waiting: list[Future[list[Row]]] = [pool.submit(_write_patient, job) for job in jobs]
        for done in as_completed(waiting):
            yield done.result()
    except BrokenProcessPool as error:
        raise UserError(
            "A worker process ended without a word, most likely for want of memory: ask for fewer workers or a smaller "
            "size. In a script of your own, call write_cohort under `if __name__ == '__main__':`, or with workers=1."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _one_thread() -> None:
    cv2.setNumThreads(1)


def _write_patient(job: _Job) -> list[Row]:
    rows: list[Row] = []
    for plan in plan_patient(job.seed, job.patient, grades=job.grades):
        for name in job.cameras:
            camera = find_camera(name)
            photo = take_photo(plan, camera, job.height, job.width)
            file = f"{plan.name}_{name}.jpg"
            _write_jpeg(job.folder / file, photo, camera.quality)
            rows.append(
                {
                    "image": file,
                    "patient": patient_name(plan.patient),
                    "eye": plan.eye,
                    "camera": name,
                    "dr_grade": plan.grade,
                    "vcdr": plan.vcdr,
                    "glaucoma": int(plan.glaucoma),
                    "caption": describe(plan),
                }
            )
    return rows


def _write_jpeg(path: Path, photo: NDArray[np.uint8], quality: int) -> None:
    """Write under a temporary name and rename; not synced, as labels.csv, which makes the cohort valid, comes last."""
    content = cv2.imencode(".jpg", cv2.cvtColor(photo, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.write_bytes(content.tobytes())
        os.replace(temporary, path)
    except OSError as error:
        raise writing_failed(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def _table(rows: list[Row], *, with_split: bool) -> str:
    text = io.StringIO()
    columns = (*COLUMNS, "split") if with_split else COLUMNS
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
