"""`eyetune calibrate`: make a run's probabilities mean what they say at a new site, from a small labelled sample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eyetune.errors import ConfigError, DataError, RunError, listing
from eyetune.flags import USUAL, Computing, Several, Switch, Workers, parse_dataset, parse_maps

if TYPE_CHECKING:
    from rich.table import Table

    from eyetune.data.records import Manifest
    from eyetune.metrics.calibration import Calibration
    from eyetune.metrics.site import Figure
    from eyetune.train.run import Run


def command(
    run: Path,
    *,
    data: Several = None,
    map: Several = None,
    replace: Switch = False,
    image_column: str | None = None,
    label_column: str | None = None,
    patient_column: str | None = None,
    eye_column: str | None = None,
    skip_unreadable: Switch = False,
    computing: Computing = USUAL,
) -> None:
    """Fit a run's probabilities to a new site, from a small labelled sample of its photographs.

    Writes RUN/calibration/NAME.json, beside the run's own calibration; predict and evaluate use it with --calibration
    NAME. By cross-validation it says what that brings. For research; not a medical device.

    Args:
        run: The run folder.
        data: NAME=TABLE or NAME=TABLE:IMAGES, where NAME is what the site shall be called; repeat it for several sites.
            30 labelled patients at least, none of whom the run was trained on; 100 or more are better.
        map: NAME=MAP, what the labels of that sample mean: pairs (0:healthy,1:glaucoma; null leaves out), as-is, or a
            YAML file.
        replace: Write over a calibration of the same name.
        image_column: Column of the image names (default: as in training, or the usual names).
        label_column: Column of the labels (default: likewise).
        patient_column: Column of the patients (default: likewise).
        eye_column: Column of the eyes (default: likewise).
        skip_unreadable: Leave out images that cannot be read, and say which.
        computing: Device, precision, workers, batch size, weights, cache.
    """
    from eyetune.data.readable import check_readable
    from eyetune.metrics.labelmap import remarks
    from eyetune.terminal import show
    from eyetune.train.elsewhere import open_dataset
    from eyetune.train.run import load_run

    named = dict(parse_dataset(word) for word in data or ())
    if not named:
        raise ConfigError("name the site's labelled sample, as in --data clinic=clinic.csv:photos.")
    if len(named) < len(data or ()):
        raise ConfigError("two --data have the same NAME; each needs its own.")
    said = parse_maps(map or (), list(named))
    trained = load_run(run, **computing.loading())
    refuse_task(trained)
    for name in named:
        check_name(trained, name, replace)
    columns = {
        "image_column": image_column,
        "label_column": label_column,
        "patient_column": patient_column,
        "eye_column": eye_column,
    }
    for name, (table, images) in named.items():
        manifest, meaning = open_dataset(trained, table, images, columns, name=name, said=said.get(name))
        assert meaning is not None  # a run of classes
        if meaning.ours is not None:
            raise ConfigError(
                f"--map {name}: it joins classes of the run. A calibration is of the run's own classes: map the labels "
                f"to {', '.join(trained.classes)}, or leave images out with null."
            )
        readable = check_readable(
            meaning.apply(manifest),
            skip_unreadable,
            workers=computing.workers,
            cache=trained.cache,
            settings=trained.settings,
        )
        found = calibrate(
            trained,
            name,
            readable,
            doubts=remarks(meaning),
            replace=replace,
            workers=computing.workers,
            batch_size=computing.batch_size,
        )
        if trained.runtime.is_main:
            print("\n".join(f"{name}: {note}" for note in readable.notes))
            show(brought_table(found))
            print("\n".join(lines(trained, found)))
    if trained.runtime.is_main:
        print("For research; not a medical device.")


def calibrate(
    run: Run,
    site: str,
    manifest: Manifest,
    *,
    doubts: Sequence[str] = (),
    replace: bool = False,
    workers: Workers = "auto",
    batch_size: int = 32,
) -> Calibration:
    """Fit a calibration for a site on a labelled sample of it, write it into the run folder, and return it.

    Args:
        run: the trained run.
        site: what the calibration is called; it stands in calibration/SITE.json.
        manifest: the sample, with the run's classes; rows without a label are left out.
        doubts: what else a reader of the calibration must not overlook.
        replace: write over a calibration of the same name.
        workers: processes that read images, or "auto".
        batch_size: images in one forward pass.

    Raises DataError for a sample that is too small, of one class, of other classes, or that shares photographs with the
    run's training; RunError when the name is taken, or another process works on the run.
    """
    from eyetune.metrics.calibration import Calibration, fit_site
    from eyetune.train.leaks import Seen, digests, overlap, unnamed_patients

    refuse_task(run)
    if tuple(manifest.classes) != run.classes:
        raise DataError(
            f"{manifest.source}: its classes are {', '.join(manifest.classes)}; the run's are {', '.join(run.classes)}."
        )
    labelled = manifest.with_records(record for record in manifest if record.label is not None)
    with run.folder.in_use():
        check_name(run, site, replace)
        seen = Seen.of_run(run.folder)
        refuse_seen(run, labelled, seen)
        shared = overlap(labelled.records, seen, run.cache)
        unnamed = unnamed_patients([record.patient for record in labelled])
        table = run.predictions(labelled, workers=workers, batch_size=batch_size)
        own = run.calibration
        found = fit_site(
            table,
            own if isinstance(own, Calibration) else None,
            site,
            model=run.folder.best_model(),
            photographs=digests(labelled.records, run.cache),
            seed=run.card.seed,
        )
        found = found.model_copy(update={"warnings": (*doubts, *shared, *unnamed, *found.warnings)})
        run.folder.write_calibration(found, site)
    return found


def refuse_task(run: Run) -> None:
    """Raise ConfigError for a run that does not tell one class an image."""
    if run.reads != "classes":
        raise ConfigError(
            f"{run.folder.path} learnt a {run.answer.kind} task; a site's calibration is for one class an image. What "
            "was fitted on the run's own validation split is in its calibration.json."
        )


def check_name(run: Run, site: str, replace: bool) -> None:
    """Raise where a site cannot be called so: ConfigError for a name that is none, RunError for one that is taken."""
    file = run.folder.calibration_file(site)  # refuses what cannot be the name of a file
    if site in ("train", "val", "test") or site.endswith(".json"):
        raise ConfigError(f"the site cannot be called {site!r}: choose another NAME in --data NAME=TABLE.")
    if file.exists() and not replace:
        raise RunError(f"{file} is there already: choose another NAME in --data NAME=TABLE, or add --replace.")


def refuse_seen(run: Run, manifest: Manifest, seen: Any) -> None:
    """Raise DataError, naming rows, for photographs that the run was trained or chosen on."""
    from eyetune.train.leaks import same_photographs

    same = same_photographs(manifest.records, seen.records, run.cache)
    if same:
        raise DataError(
            f"{manifest.source}: {len(same)} of its {len(manifest)} labelled photographs were among those the run was "
            "trained or chosen on (the very same bytes). It is surer of them than of any other, so nothing can be "
            f"learnt from them about a site. Take these rows out:\n{listing(record.row for record in same)}"
        )


def brought_table(found: Calibration) -> Table:
    """What a site's calibration brings there, a row a measure."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    brought = found.brought
    assert brought is not None
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in (f"{found.fitted_on.dataset}, by cross-validation", brought.against, "this one", "difference"):
        table.add_column(column)
    for name in brought.before:
        row = brought.before[name], brought.after[name]
        table.add_row(name, *(_figure(one) for one in row), _figure(brought.difference[name], signed=True))
    return table


def lines(run: Run, found: Calibration) -> list[str]:
    """A site's calibration in words: what was fitted, what is to doubt, where it is and how it is used."""
    from eyetune.train.results import calibration_line

    site = found.fitted_on.dataset
    said = [calibration_line(found)]
    if found.bias is not None:
        odds = ", ".join(f"{name} {math.exp(b):.2f}" for name, b in zip(found.classes, found.bias, strict=True))
        said.append(f"odds of the classes, times: {odds}")
    said += [f"calibration: {warning}" for warning in found.warnings]
    said.append(f"{run.folder.calibration_file(site)}: use it with --calibration {site} (predict, evaluate)")
    return said


def _figure(one: Figure, signed: bool = False) -> str:
    if one.value is None:
        return "-"
    form = "+.3f" if signed else ".3f"
    low, high = one.ci
    interval = "" if low is None or high is None else f" ({low:{form}} to {high:{form}})"
    return f"{one.value:{form}}{interval}"
