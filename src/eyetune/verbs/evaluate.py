"""`eyetune evaluate`: score one run on one or more datasets, and say how much is lost outside its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cyclopts import Parameter

from eyetune.errors import ConfigError, DataError, UserError, did_you_mean
from eyetune.flags import USUAL, Computing, Several, Switch, Workers, parse_dataset, parse_maps

if TYPE_CHECKING:
    from eyetune.data.records import Manifest
    from eyetune.metrics.labelmap import LabelMap
    from eyetune.metrics.subgroups import Grouping
    from eyetune.metrics.table import Table
    from eyetune.train.run import Run

#: The run's own test split: what other datasets are held against when nobody says otherwise.
REFERENCE = "test"


@Parameter(name="*")
@dataclass(frozen=True)
class Older:
    """How to read a checkpoint of another program."""

    out: Path | None = None
    """The run folder to make from it (default: runs/ and the file's name); predict and report then take that."""
    backbone: str | None = None
    """Its network, where the file does not say and several fit (default: by shapes, RETFound where it fits)."""
    pool: str | None = None
    """Its pooling, likewise."""
    classes: str | None = None
    """Names of its classes, as in healthy,glaucoma (default: as in the file, else 0,1,…)."""
    alpha: float | None = None
    """alpha of its LoRA adapters (default: as in the file, else four times their rank)."""
    fit: Literal["pad", "squash"] | None = None
    """How photographs became square in its training (default: as for the backbone)."""
    no_crop: Switch = False
    """Photographs were not cropped to the field of view in its training."""

    def adopt(self, path: Path, computing: Computing) -> Path:
        """Make the run folder; returns where it is."""
        from eyetune.train.adopt import adopt

        names = None if self.classes is None else [name.strip() for name in self.classes.split(",")]
        folder = adopt(
            path,
            self.out,
            backbone=self.backbone,
            pool=self.pool,
            classes=names,
            alpha=self.alpha,
            weights=computing.weights,
            fit=self.fit,
            crop=not self.no_crop,
            device=computing.device,
        )
        return folder.path


#: When nothing is said.
AS_FOUND = Older()


def command(
    run: Path,
    *,
    data: Several = None,
    map: Several = None,
    by: Several = None,
    reference: str | None = None,
    calibration: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    patient_column: str | None = None,
    eye_column: str | None = None,
    skip_unreadable: Switch = False,
    older: Older = AS_FOUND,
    computing: Computing = USUAL,
) -> None:
    """Score a run on datasets it was not trained on, next to its own test split.

    Writes predictions/NAME.csv and adds to metrics.json and plots/ in the run folder.

    Args:
        run: The run folder; or a checkpoint of another program (.pth, .safetensors, a PEFT folder).
        data: NAME=TABLE or NAME=TABLE:IMAGES; repeat it for several datasets. TABLE may be a class folder.
        map: NAME=MAP, what the labels of that dataset mean: pairs (0:healthy,1:glaucoma; null leaves out), referable or
            any-dr (joins grades), as-is, or a YAML file.
        by: Columns to score by, as in sex,camera,age:40:60; without --data, columns of the run's own table.
        reference: The dataset that the others are held against (default: test, the run's own).
        calibration: A site's calibration for the probabilities of the datasets, of those that eyetune calibrate wrote:
            its NAME, or its file (default: the run's own).
        image_column: Column of the image names (default: as in training, or the usual names).
        label_column: Column of the labels (default: likewise); of a run with several labels theirs, as in a,b.
        patient_column: Column of the patients (default: likewise).
        eye_column: Column of the eyes (default: likewise).
        skip_unreadable: Leave out images that cannot be read, and say which.
        older: How to read a checkpoint of another program.
        computing: Device, precision, workers, batch size, weights, cache.
    """
    from eyetune.backbones.older import is_older
    from eyetune.data.readable import check_readable
    from eyetune.metrics.subgroups import Grouping
    from eyetune.terminal import show
    from eyetune.train.elsewhere import open_dataset
    from eyetune.train.results import remarks_table, scores_table
    from eyetune.train.run import load_run

    named = dict(parse_dataset(word) for word in data or ())
    if len(named) < len(data or ()):
        raise ConfigError("two --data have the same NAME; each needs its own.")
    if not (named or by or reference):
        raise ConfigError("nothing to do: name a dataset with --data NAME=TABLE, or columns with --by.")
    if calibration is not None and not named:
        raise ConfigError("--calibration is for the datasets of --data: the run's own splits keep the run's own.")
    groupings = Grouping.parse(by or ())
    said = parse_maps(map or (), list(named))
    if is_older(run):
        run, computing = older.adopt(run, computing), replace(computing, weights=None)
    elif older != AS_FOUND:
        raise ConfigError(
            f"{run} is no checkpoint file: --out, --backbone and the like are for those of other programs."
        )
    trained = load_run(run, **computing.loading())
    columns = {
        "image_column": image_column,
        "label_column": label_column,
        "patient_column": patient_column,
        "eye_column": eye_column,
    }
    manifests, maps = {}, {}
    for name, (table, images) in named.items():
        manifest, maps[name] = open_dataset(trained, table, images, columns, name=name, said=said.get(name))
        manifests[name] = check_readable(
            manifest, skip_unreadable, workers=computing.workers, cache=trained.cache, settings=trained.settings
        )
        if trained.runtime.is_main:
            print("\n".join(f"{name}: {note}" for note in manifests[name].notes))
    content = evaluate(
        trained,
        manifests,
        maps=maps,
        by=groupings,
        reference=reference,
        calibration=calibration,
        workers=computing.workers,
        batch_size=computing.batch_size,
    )
    if trained.runtime.is_main:
        show(scores_table(content))
        for shown in remarks_table(content, list(named) or [REFERENCE]):
            print(shown) if isinstance(shown, str) else show(shown)


def evaluate(
    run: Run,
    datasets: Mapping[str, Manifest],
    *,
    maps: Mapping[str, Any] | None = None,
    by: Sequence[str | Grouping] = (),
    reference: str | None = None,
    calibration: str | None = None,
    workers: Workers = "auto",
    batch_size: int = 32,
) -> dict[str, Any]:
    """Predict and score datasets with a run; returns the content of the run's metrics.json afterwards.

    Args:
        run: the trained run.
        datasets: name -> manifest. The names `train`, `val` and `test` belong to the run itself.
        maps: name -> what that dataset's labels mean, as :func:`eyetune.metrics.labelmap.parse` takes it: a mapping
            {their label: class of the run, or None to leave out}, "referable", "any-dr", "as-is", a YAML file. Without
            one, labels must be the run's classes by name.
        by: columns to score by: names of columns of the tables ("camera", "age:40:60"). With datasets, of theirs; the
            run's own test split is scored by them too where its table has them.
        reference: the dataset that the others are held against; None: as before, at first the test split.
        calibration: name or file of a site's calibration, for the datasets; None: the run's own.
        workers: processes that read images, or "auto".
        batch_size: images in one forward pass.

    Raises DataError for labels without a meaning, a taken name, a column that no dataset has, or an image that cannot
    be read; ConfigError for a map that does not hold together; RunError when another process works on the run.
    """
    from eyetune.metrics.subgroups import Grouping
    from eyetune.report.mistakes import remember
    from eyetune.report.page import refresh
    from eyetune.train.leaks import Seen, calibrated_on
    from eyetune.train.results import add_scores

    for name in datasets:
        run.folder.predictions_file(name)  # refuses what cannot be the name of a file
        if name in ("train", "val", REFERENCE):
            raise DataError(f"the name {name!r} belongs to the run's own split; call the dataset otherwise.")
    if unknown := [name for name in maps or {} if name not in datasets]:
        raise ConfigError(f"maps: no dataset is called {unknown[0]!r}.{did_you_mean(unknown[0], datasets)}")
    groupings = [one if isinstance(one, Grouping) else Grouping.parse([one])[0] for one in by]
    found = {name: label_map(run, name, manifest, (maps or {}).get(name)) for name, manifest in datasets.items()}
    labelled = {name: in_our_terms(run, manifest, found[name]) for name, manifest in datasets.items()}
    traits = {name: traits_of(manifest, groupings) for name, manifest in labelled.items()}
    own = own_traits(run, groupings)
    refuse_unknown(groupings, {**traits, REFERENCE: own}, labelled, run)
    site = None if calibration is None else run.calibration_for(calibration)
    with run.folder.in_use():
        seen = Seen.of_run(run.folder) if run.folder.main else Seen()
        tables, about = {}, {}
        for name, manifest in labelled.items():
            meant = found[name]
            about[name] = {
                "left_out": [{"why": why, "images": count} for why, count in manifest.left_out],
                "warnings": warnings_of(run, manifest, meant, seen) + calibrated_on(manifest.records, site, run.cache),
            } | (meant.to_dict() if meant else {})
            table = predict(run, manifest, meant, workers, batch_size)
            tables[name] = replace(table, traits=traits[name])
        if own:
            kept = run.folder.read_predictions(REFERENCE)
            assert kept is not None  # else it had no traits
            cells = {column: [by_image.get(image, "") for image in kept.images] for column, by_image in own.items()}
            tables[REFERENCE] = replace(kept, traits=cells)
            about[REFERENCE] = kept_about(run, REFERENCE)
        content = add_scores(
            run.folder, tables, run.calibration, about=about, by=groupings, reference=reference, site=site
        )
        if run.folder.main:
            remember(run.folder, tables, labelled)
            refresh(run.folder)
        return content


def in_our_terms(run: Run, manifest: Manifest, found: LabelMap | None) -> Manifest:
    """A dataset with its labels in the map's classes, or its several labels, or its number, under the run's names."""
    if found is not None:
        return found.apply(manifest)
    if manifest.kind != run.reads:
        raise DataError(f"{manifest.source} holds {manifest.kind}; {run.folder.path} learnt {run.reads}.")
    return manifest.with_classes(run.classes)


def predict(run: Run, manifest: Manifest, found: LabelMap | None, workers: Workers, batch_size: int) -> Table:
    """The predictions on a dataset whose labels index the map's classes, in those classes; without a map, as it is."""
    import numpy as np

    if found is None or found.ours is None:
        return run.table(manifest, workers=workers, batch_size=batch_size)
    bare = replace(manifest, records=tuple(replace(one, label=None) for one in manifest), classes=run.classes)
    table = found.merge(run.predictions(bare, workers=workers, batch_size=batch_size))
    return replace(table, targets=np.array([-1 if one.label is None else one.label for one in manifest]))


def label_map(run: Run, name: str, manifest: Manifest, said: Any) -> LabelMap | None:
    """What the labels of a dataset mean: as was said, or by their names where that leaves no doubt; None for a run that
    learnt several labels or a number."""
    from eyetune.metrics.labelmap import LabelMap, parse, unstated
    from eyetune.train.elsewhere import refuse_map

    if run.reads != "classes":
        refuse_map(run.reads, run.folder.path, name, said)
        return None
    if isinstance(said, LabelMap):
        return said
    if said is not None:
        return parse(said, run.classes, f"--map {name}")
    if tuple(manifest.classes) == tuple(run.classes):  # said when the manifest was read
        return LabelMap({label: label for label in run.classes}, None, run.classes, stated=False)
    return unstated(manifest, run.classes, name=name)


def warnings_of(run: Run, manifest: Manifest, found: LabelMap | None, seen: Any) -> list[str]:
    """What a reader of the scores must not overlook: shared photographs and patients, labels taken as they are."""
    from eyetune.metrics.labelmap import remarks
    from eyetune.train.leaks import overlap, unnamed_patients

    if not run.folder.main:
        return []
    left = [f"{count} images {why} and were not scored." for why, count in manifest.left_out if "label map" not in why]
    shared = overlap(manifest.records, seen, run.cache)
    about_map = remarks(found) if found is not None else []
    return [*about_map, *shared, *unnamed_patients([r.patient for r in manifest]), *left]


def kept_about(run: Run, name: str) -> dict[str, Any]:
    """What metrics.json says of a dataset beside its scores, for when they are computed again."""
    content = run.folder.read_metrics() if run.folder.metrics_file.is_file() else {}
    before = content.get("datasets", {}).get(name, {})
    return {key: before[key] for key in ("warnings", "label_map", "merged") if key in before}


def traits_of(manifest: Manifest, groupings: Sequence[Grouping]) -> dict[str, list[str]]:
    """The cells of the columns that groupings name, where the table has them; `eye` whatever that one is called."""
    from eyetune.data.tables import STANDARD

    found = {}
    for column in (one.column for one in groupings):
        known = {name.lower(): name for record in manifest for name in record.extra}
        if column.lower() in known:
            found[column] = [record.extra.get(known[column.lower()], "") for record in manifest]
        elif column.lower() in STANDARD["eye"] and any(record.eye for record in manifest):
            found[column] = [record.eye or "" for record in manifest]
    return found


def own_traits(run: Run, groupings: Sequence[Grouping]) -> dict[str, dict[str, str]]:
    """Column -> image -> cell, from the table that the run was trained with, for its test split."""
    if not groupings or not run.folder.predictions_file(REFERENCE).is_file():
        return {}
    manifest = _own_table(run)
    if manifest is None:
        return {}
    names = [record.name for record in manifest]
    return {column: dict(zip(names, cells, strict=True)) for column, cells in traits_of(manifest, groupings).items()}


def _own_table(run: Run) -> Manifest | None:
    """The table that the run was trained with; None where it is gone."""
    from eyetune.data.records import open_manifest

    try:
        config = run.folder.read_config()
        return open_manifest(config.data, labels_required=False, kind=config.reads)
    except UserError:
        return None


def refuse_unknown(
    groupings: Sequence[Grouping], traits: Mapping[str, Mapping[str, Any]], manifests: Mapping[str, Manifest], run: Run
) -> None:
    """Raise DataError for a column that no dataset has."""
    missing = [one.column for one in groupings if not any(one.column in cells for cells in traits.values())]
    if not missing:
        return
    looked, where = dict(manifests), ", ".join(manifests)
    if not looked and (own := _own_table(run)) is not None:
        looked, where = {REFERENCE: own}, f"{own.source}, which the run was trained with"
    where = where or "the table the run was trained with, which is gone"
    known = dict.fromkeys(name for manifest in looked.values() for one in manifest[:1] for name in one.extra)
    eye = ["eye"] if any(one.eye for manifest in looked.values() for one in manifest) else []
    listed = f" There are: {', '.join([*known, *eye])}." if known or eye else ""
    raise DataError(f"--by {missing[0]}: no such column in {where}.{did_you_mean(missing[0], [*known, *eye])}{listed}")
