"""`eyetune predict`: files, folders, tables or a stream of paths in; one row an image out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from eyetune.errors import ConfigError, DataError, UserError
from eyetune.flags import USUAL, Computing, Switch

if TYPE_CHECKING:
    from eyetune.data.record import Record
    from eyetune.predicting import Predictor, Sources
    from eyetune.predicting.model import TrainedModel

#: How many images are predicted before their rows are written: what is in memory does not grow with their number, and
#: no more are lost by an interruption.
CHUNK = 1024


def command(
    run: Path,
    paths: Annotated[list[Path], Parameter(negative=(), allow_leading_hyphen=True)],
    *,
    out: Path | None = None,
    format: Literal["csv", "jsonl"] | None = None,
    resume: Switch = False,
    calibration: str | None = None,
    no_calibration: Switch = False,
    operating_point: str = "specificity",
    no_quality: Switch = False,
    tta: Switch = False,
    heatmaps: Path | None = None,
    images: Path | None = None,
    image_column: str | None = None,
    computing: Computing = USUAL,
) -> int:
    """Predict photographs with a run: class, calibrated probabilities, what to doubt; one row an image.

    A file that is missing or cannot be read becomes a row with the reason in its `error` column; the exit code is 0
    unless not one could be predicted (2). For research; not a diagnosis.

    Args:
        run: The run folder.
        paths: Image files, folders (searched with their subfolders), tables with an image column, or - for a list of
            paths on standard input, one a line or one a NUL byte.
        out: File to write (default: standard output). It is there when it is whole.
        format: csv or jsonl (default: by the suffix of --out; CSV).
        resume: Go on with the rows that an interrupted run with the same --out has left.
        calibration: The site whose calibration counts, of those fitted (default: the run's own).
        no_calibration: Probabilities as the network gives them, and no column of the operating point.
        operating_point: What decides referable or not: specificity or sensitivity (95% of it on validation), or the
            name of a point in calibration.json.
        no_quality: Do not look at the quality of the photographs, which costs a second look at each file.
        tta: Also judge each photograph mirrored left to right (test-time augmentation): twice the time.
        heatmaps: Folder for a picture of each photograph that shows where the network looked.
        images: Folder of the images that tables name.
        image_column: Column of the image names in tables (default: the usual names).
        computing: Device, precision, workers, batch size, weights, cache.
    """
    from eyetune.predicting import Predictor, Sources, choose_format
    from eyetune.predicting.model import open_model
    from eyetune.predicting.rows import choose_points

    if calibration is not None and no_calibration:
        raise ConfigError("--calibration and --no-calibration exclude each other.")
    form = choose_format(out, format)
    _refuse_own_pictures(heatmaps, paths)
    trained = open_model(run, **computing.loading())
    main = trained.runtime.is_main
    sources = Sources(paths, images=images, image_column=image_column) if main else None
    fitted = None if no_calibration else trained.calibration_for(calibration)
    points = {} if no_calibration else choose_points(trained, fitted, operating_point)
    predictor = Predictor(
        trained,
        calibration=fitted,
        points=points,
        quality=not no_quality,
        mirrored=tta,
        heat_maps=heatmaps,
        workers=computing.workers,
        batch_size=computing.batch_size,
    )
    if main:
        _say_how(predictor, no_calibration)
    predicted, refused = _write(predictor, sources, out, form, resume)
    if main:
        said = f"{predicted} predicted" + (f", {refused} refused (column error says why)" if refused else "")
        print(f"{said}{'' if out is None else f': {out}'}", file=sys.stderr)
    return 0 if predicted else UserError.exit_code


def _refuse_own_pictures(heatmaps: Path | None, paths: Sequence[Path]) -> None:
    """Raise ConfigError when the heat maps would lie among the photographs: the next time they would be some."""
    if heatmaps is None:
        return
    for path in paths:
        if path.is_dir() and heatmaps.resolve().is_relative_to(path.resolve()):
            raise ConfigError(
                f"--heatmaps {heatmaps} lies in {path}, whose images are predicted: choose another folder."
            )


def _say_how(predictor: Predictor, no_calibration: bool) -> None:
    """What the probabilities and calls rest on, to stderr."""
    fitted, points = predictor.calibration, predictor.points
    said = []
    if predictor.interval is not None and fitted is not None:
        low = f"{predictor.interval.level:.0%} of the images of {fitted.fitted_on.dataset}"
        said.append(f"low and high: predicted ± {predictor.interval.half_width:.3g}, which held {low} or more")
    if not predictor.has_probabilities:
        pass
    elif fitted is not None:
        said.append(f"probabilities calibrated on {fitted.fitted_on.n} images of {fitted.fitted_on.dataset}")
    elif no_calibration:
        said.append("probabilities as the network gives them, not calibrated")
    else:
        said.append(
            "probabilities are not calibrated: the run has no calibration.json (finetune --resume adds it where there "
            "are labelled validation images)"
        )
    for column, point in points.items():
        said.append(f"{column}: {point.name}, chosen on {point.chosen_on}: {point.threshold:.3f} or more")
    if predictor.model.reads == "labels" and not no_calibration:
        missing = [name for name in predictor.model.classes if f"positive_{name}" not in points]
        said += [f"no column positive_{name}: no operating point of it was chosen" for name in missing]
    elif not points and predictor.has_probabilities:
        said.append("no column referable or positive: there is no operating point for it")
    if predictor.strangeness is None:
        said.append("no column out_of_distribution: the run has nothing to compare with")
    print(*said, sep="\n", file=sys.stderr)


def _write(predictor: Predictor, sources: Sources | None, out: Path | None, form: str, resume: bool) -> tuple[int, int]:
    """Predict everything and write its rows; returns how many were predicted and how many refused. The first process
    reads the paths and writes (`sources` is None in the others); all of them compute."""
    from eyetune.predicting.output import writer
    from eyetune.predicting.rows import describe
    from eyetune.predicting.sources import chunks
    from eyetune.progress import meter

    model = predictor.model
    if sources is None:
        for first, part in _shared(model, None):
            predictor.rows(part, first=first)
        return 1, 0
    records = iter(sources)
    names = (record.name for record in records)
    with (
        writer(out, predictor.columns, form, names, made_by=describe(predictor), resume=resume) as rows,
        meter(sources.total, "Predicting") as update,
    ):
        numbered = ((rows.count, part) for part in chunks(records, CHUNK))
        for first, part in _shared(model, numbered):
            rows.add(predictor.rows(part, first=first, update=partial(_count, update, first)))
        if not rows.count:
            raise DataError("no paths came on standard input.")
        return rows.count - rows.refused, rows.refused


def _count(update: Callable[[int], None], first: int, done: int) -> None:
    update(first + done)


def _shared(
    model: TrainedModel, chunks: Iterator[tuple[int, list[Record]]] | None
) -> Iterator[tuple[int, list[Record]]]:
    """The chunks of the first process, in every process; `chunks` is None in the others."""
    while True:
        own = None if chunks is None else next(chunks, None)
        shared = model.runtime.gather(own)[0] if model.runtime.processes > 1 else own
        if shared is None:
            return
        yield shared
