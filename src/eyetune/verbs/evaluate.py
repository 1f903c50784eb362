"""`eyetune evaluate`: score one run on one or more datasets, and say how much is lost outside its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from eyetune.errors import ConfigError, DataError
from eyetune.flags import USUAL, Computing, Switch, Workers, table_and_images

if TYPE_CHECKING:
    from eyetune.data.records import Manifest
    from eyetune.train.run import Run

#: The run's own test split: what other datasets are held against.
REFERENCE = "test"


def command(
    run: Path,
    *,
    data: Annotated[list[str], Parameter(negative=())],
    image_column: str | None = None,
    label_column: str | None = None,
    patient_column: str | None = None,
    eye_column: str | None = None,
    skip_unreadable: Switch = False,
    computing: Computing = USUAL,
) -> None:
    """Score a run on datasets it was not trained on, next to its own test split.

    Writes predictions/NAME.csv and adds to metrics.json and plots/ in the run folder. Labels must be the run's classes.

    Args:
        run: The run folder.
        data: NAME=TABLE or NAME=TABLE:IMAGES; repeat it for several datasets. TABLE may be a class folder.
        image_column: Column of the image names (default: as in training, or the usual names).
        label_column: Column of the labels (default: likewise).
        patient_column: Column of the patients (default: likewise).
        eye_column: Column of the eyes (default: likewise).
        skip_unreadable: Leave out images that cannot be read, and say which.
        computing: Device, precision, workers, batch size, weights, cache.
    """
    from eyetune.data.loader import check_readable
    from eyetune.terminal import show
    from eyetune.train.results import scores_table
    from eyetune.train.run import load_run

    named = dict(parse_dataset(word) for word in data)
    if len(named) < len(data):
        raise ConfigError("two --data have the same NAME; each needs its own.")
    trained = load_run(run, **computing.loading())
    columns = {
        "image_column": image_column,
        "label_column": label_column,
        "patient_column": patient_column,
        "eye_column": eye_column,
    }
    manifests = {}
    for name, (table, images) in named.items():
        manifest = check_readable(
            open_dataset(trained, table, images, columns),
            skip_unreadable,
            workers=computing.workers,
            cache=trained.cache,
            settings=trained.settings,
        )
        if trained.runtime.is_main:
            print("\n".join(f"{name}: {note}" for note in manifest.notes))
        manifests[name] = manifest
    content = evaluate(trained, manifests, workers=computing.workers, batch_size=computing.batch_size)
    if trained.runtime.is_main:
        show(scores_table(content))


def evaluate(
    run: Run, datasets: Mapping[str, Manifest], *, workers: Workers = "auto", batch_size: int = 32
) -> dict[str, Any]:
    """Predict and score datasets with a run; returns the content of the run's metrics.json afterwards.

    Args:
        run: the trained run.
        datasets: name -> manifest; its classes are all among the run's. The names `train`, `val` and `test` belong to
            the run itself.
        workers: processes that read images, or "auto".
        batch_size: images in one forward pass.

    Raises DataError for a class the run does not know, a taken name, or an image that cannot be read, and RunError
    when another process works on the run.
    """
    from eyetune.report.mistakes import remember
    from eyetune.report.page import refresh
    from eyetune.train.results import add_scores

    for name in datasets:
        run.folder.predictions_file(name)  # refuses what cannot be the name of a file
        if name in ("train", "val", REFERENCE):
            raise DataError(f"the name {name!r} belongs to the run's own split; call the dataset otherwise.")
    with run.folder.in_use():
        tables = {
            name: run.predictions(manifest.with_classes(run.classes), workers=workers, batch_size=batch_size)
            for name, manifest in datasets.items()
        }
        content = add_scores(run.folder, tables, run.calibration)
        if run.folder.main:
            remember(run.folder, tables, datasets)
            refresh(run.folder)
        return content


def open_dataset(run: Run, table: str, images: Path | None, columns: Mapping[str, str | None]) -> Manifest:
    """A dataset in the run's classes. A column that is not given is the one trained with, if the table has it."""
    from eyetune.data.config import DataConfig
    from eyetune.data.records import open_manifest
    from eyetune.data.tables import read_rows

    trained = run.folder.read_config().data
    here = read_rows(Path(table))[0] if Path(table).is_file() else []
    chosen = {}
    for field, given in columns.items():
        before = getattr(trained, field)
        chosen[field] = given if given is not None or before not in (*here, "none") else before
    # A split column of theirs says nothing here: all of it is outside the run.
    config = DataConfig(table=table, images=images, split_column="none", **chosen)
    return open_manifest(config, classes=run.classes)


def parse_dataset(word: str) -> tuple[str, tuple[str, Path | None]]:
    """`NAME=TABLE[:IMAGES]` -> (name, (table, images)). Raises ConfigError."""
    name, equals, rest = word.partition("=")
    if not (name and equals and rest):
        raise ConfigError(f"--data {word}: write NAME=TABLE or NAME=TABLE:IMAGES, as in --data messidor=messidor.csv.")
    return name, table_and_images(rest)
