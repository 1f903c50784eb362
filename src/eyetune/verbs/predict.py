"""`eyetune predict`: files, folders or tables in; one row an image out."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from eyetune.errors import DataError, UserError
from eyetune.files import atomic
from eyetune.flags import USUAL, Computing, Workers

if TYPE_CHECKING:
    from eyetune.data.record import Record
    from eyetune.train.run import Run

#: What is taken for a table rather than an image.
TABLES = {".csv", ".tsv", ".jsonl"}

#: How many images are predicted before their rows are written: what is in memory does not grow with their number.
CHUNK = 4096


def command(
    run: Path,
    paths: Annotated[list[Path], Parameter(negative=())],
    *,
    out: Path | None = None,
    images: Path | None = None,
    image_column: str | None = None,
    computing: Computing = USUAL,
) -> int:
    """Predict photographs with a run: class and probabilities, one row an image.

    A file that is missing or cannot be read becomes a row with the reason in its `error` column; the exit code is 0
    unless not one could be predicted (2). For research; not a diagnosis.

    Args:
        run: The run folder.
        paths: Image files, folders (searched with their subfolders), or tables with an image column.
        out: CSV file to write (default: standard output).
        images: Folder of the images that tables name.
        image_column: Column of the image names in tables (default: the usual names).
        computing: Device, precision, workers, batch size, weights, cache.
    """
    from eyetune.train.run import load_run

    trained = load_run(run, **computing.loading())
    records = [record for path in paths for record in _records(path, images, image_column)]
    counts = [0, 0]
    with _output(out if trained.runtime.is_main else Path(os.devnull)) as write:
        columns = ["image", "predicted", *(f"prob_{name}" for name in trained.classes), "error"]
        write(columns)
        for start in range(0, len(records), CHUNK):
            chunk = records[start : start + CHUNK]
            for row in predict_records(trained, chunk, workers=computing.workers, batch_size=computing.batch_size):
                write([row[name] for name in columns])
                counts[bool(row["error"])] += 1
    predicted, refused = counts
    if trained.runtime.is_main:
        said = f"{predicted} predicted" + (f", {refused} refused (column error says why)" if refused else "")
        print(f"{said}{'' if out is None else f': {out}'}", file=sys.stderr)
    return 0 if predicted else UserError.exit_code


@contextlib.contextmanager
def _output(out: Path | None) -> Iterator[Callable[[Sequence[str]], object]]:
    """Write rows to a file, which is there only when all are, or to standard output."""
    # surrogateescape: a file name that is not valid UTF-8 comes back as it was.
    if out is None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="surrogateescape")
        yield csv.writer(sys.stdout, lineterminator="\n").writerow
        return
    with (
        contextlib.nullcontext(out) if out == Path(os.devnull) else atomic(out) as place,
        open(place, "w", encoding="utf-8", errors="surrogateescape", newline="") as stream,
    ):
        yield csv.writer(stream, lineterminator="\n").writerow


def predict_records(
    run: Run, records: Sequence[Record], *, workers: Workers = "auto", batch_size: int = 32
) -> list[dict[str, Any]]:
    """One row a record, in order: image, predicted, prob_<class>…, error (empty when there was none)."""
    from eyetune.data.loader import find_faults
    from eyetune.data.records import Manifest

    manifest = Manifest(tuple(records), run.classes, "the images")
    faults = find_faults(manifest, workers=workers, cache=run.cache, settings=run.settings)
    good = [index for index in range(len(records)) if faults[index] is None]
    probabilities = {}
    if good:
        readable = manifest.with_records(records[index] for index in good)
        table = run.predictions(readable, workers=workers, batch_size=batch_size)
        probabilities = {index: table.probabilities[row] for row, index in enumerate(good)}
    rows = []
    for index, record in enumerate(records):
        row: dict[str, Any] = {"image": record.name, "predicted": ""}
        found = probabilities.get(index)
        if found is not None:
            row["predicted"] = run.classes[int(found.argmax())]
        row |= {f"prob_{name}": "" if found is None else repr(float(found[k])) for k, name in enumerate(run.classes)}
        rows.append(row | {"error": faults[index] or ""})
    return rows


def _records(path: Path, images: Path | None, image_column: str | None) -> Sequence[Record]:
    from eyetune.data.images import is_image_name
    from eyetune.data.record import Record
    from eyetune.data.records import Manifest

    if not path.exists() and not is_image_name(path.name):
        raise DataError(f"no file or folder at {path}.")
    if path.is_dir():
        return Manifest.from_images(path).records
    if path.suffix.lower() in TABLES:
        # Of a table only the image column matters here; the rest may be of another task.
        rest = dict.fromkeys(("label_column", "patient_column", "eye_column", "split_column"), "none")
        found = Manifest.from_table(path, images=images, image_column=image_column, labels_required=False, **rest)
        return found.records
    return [Record(image=path, label=None, name=str(path), row=str(path))]
