"""`eyetune clip zeroshot`: classes given in words, or by a few labelled photographs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

from eyetune.errors import ConfigError, DataError
from eyetune.flags import READING, Reading, Several, Switch, parse_dataset, parse_maps

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor

    from eyetune.clip.prompts import Prompts
    from eyetune.clip.run import ClipRun
    from eyetune.clip.zeroshot import Per, Subject
    from eyetune.data.records import Manifest
    from eyetune.metrics.predictions import Predictions
    from eyetune.train.rundir import RunDir

TEST = 0.5
"""Share of the patients that few-shot probes are tested on where the table has no split."""

METHODS = {"linear": "linear probe", "tip_adapter": "Tip-Adapter"}


@Parameter(name="*")
@dataclass(frozen=True)
class Columns:
    """Which columns of the tables are meant."""

    image_column: str | None = None
    """Column of the image names (default: the usual names)."""
    label_column: str | None = None
    """Column of the labels (default: likewise)."""
    patient_column: str | None = None
    """Column of the patients (default: likewise)."""
    eye_column: str | None = None
    """Column of the eyes (default: likewise)."""
    split_column: str | None = None
    """Column of the splits, for --split and --shots (default: split)."""


#: When nothing is said.
AS_NAMED = Columns()


@Parameter(name="*")
@dataclass(frozen=True)
class FewShot:
    """What few labelled photographs add."""

    shots: str | None = None
    """Photographs a class, as in 1,2,4,8,16: a linear probe and Tip-Adapter beside the words, on the test split."""
    draws: Annotated[int, Parameter(validator=Number(gte=1))] = 10
    """How often the photographs are drawn."""
    seed: int = 0
    """Of the draws, and of the split where the table has none."""

    def numbers(self) -> list[int]:
        """`shots` as numbers. Raises ConfigError."""
        try:
            found = sorted({int(word) for word in (self.shots or "").split(",") if word.strip()})
        except ValueError:
            found = []
        if self.shots is not None and (not found or found[0] < 1):
            raise ConfigError(f"--shots {self.shots}: whole numbers from 1, as in --shots 1,2,4,8,16.")
        return found


#: When nothing is said.
NONE = FewShot()


def command(
    run: Path,
    *,
    data: Several = None,
    prompts: str,
    map: Several = None,
    per: Literal["image", "patient"] = "image",
    split: str | None = None,
    out: Path | None = None,
    skip_unreadable: Switch = False,
    columns: Columns = AS_NAMED,
    few: FewShot = NONE,
    reading: Reading = READING,
) -> None:
    """Tell photographs into classes that are described in words, and score it as evaluate does.

    Writes OUT/metrics.json, OUT/predictions/NAME.csv and OUT/plots.

    Args:
        run: The run folder of clip train, or a RET-CLIP file with --text.
        data: NAME=TABLE or NAME=TABLE:IMAGES; repeat it for several datasets. TABLE may be a class folder.
        prompts: A shipped set (dr, glaucoma, amd, cataract, myopia, hypertension; in Chinese dr-zh, ...), or a YAML
            file of classes, their phrases, and templates.
        map: NAME=MAP, what the labels of that dataset mean in the classes of the prompts, as for evaluate.
        per: image: each photograph alone, standing for both eyes; patient: both eyes seen together, a row a patient.
        split: Only rows of this split of the table.
        out: Folder for what is written (default: RUN/zeroshot/PROMPTS; of a file NAME.pt, NAME/zeroshot/PROMPTS).
        skip_unreadable: Leave out images that cannot be read, and say which.
        columns: Which columns of the tables are meant.
        few: Few-shot probes.
        reading: Device, precision, workers, batch size, text.
    """
    from eyetune.clip.features import results_of, scale_of
    from eyetune.clip.prompts import class_vectors, read_prompts
    from eyetune.clip.run import open_clip_run
    from eyetune.terminal import show
    from eyetune.train.results import add_scores, remarks_table, scores_table
    from eyetune.train.rundir import RunDir

    named = dict(parse_dataset(word) for word in data or ())
    if not named or len(named) < len(data or ()):
        raise ConfigError("name each dataset once, as in --data idrid=labels.csv:images.")
    asked, shots = read_prompts(prompts), few.numbers()
    if shots and split is not None:
        raise ConfigError("--shots draws from the train split and scores the test split: leave --split out.")
    said = parse_maps(map or (), list(named))
    manifests = {}
    for name, where in named.items():
        manifest = _manifest(name, where, columns, asked, said.get(name))
        manifests[name] = _of_split(manifest, split, shots, few.seed)
    opened = open_clip_run(run, **reading.loading())
    vectors = class_vectors(opened, asked)
    main, scale = opened.runtime.is_main, scale_of(opened)
    place = out or results_of(run) / "zeroshot" / Path(prompts).stem
    folder = RunDir(place, main)
    tables, notes = {}, {}
    for name, manifest in manifests.items():
        folder.predictions_file(name)  # refuses what cannot be the name of a file
        store = place / "features" / f"{name}.safetensors"
        seen = _look(opened, manifest, asked, store, per=per, reading=reading, skip=skip_unreadable)
        whole = _table(seen, asked, vectors, scale)
        test = [row.split == "test" for row in seen.rows] if shots else None
        tables[name] = whole if test is None else whole.take(_rows(test))
        if main:
            notes[name] = _notes(seen, opened, asked, per, "test" if shots else None)
        if shots and main:
            notes[name]["few_shot"] = _few_shot(seen, whole, vectors, scale=scale, few=few)
    _drop_others(folder, opened.fingerprint)
    content = add_scores(folder, tables, about=notes)
    if not main:
        return
    print(f"{asked.title}: {len(asked.classes)} classes, {len(asked.texts(next(iter(asked.classes))))} sentences each")
    show(scores_table(content))
    for shown in remarks_table(content, list(named)):
        print(shown) if isinstance(shown, str) else show(shown)
    for name in named:
        if "few_shot" in content["datasets"][name]:
            show(few_shot_table(name, content["datasets"][name]))
    print(f"written to {place}")


def _manifest(
    name: str, where: tuple[str, Path | None], columns: Columns, prompts: Prompts, said: str | None
) -> Manifest:
    """A dataset with its labels in the classes of the prompts. Raises DataError for labels these do not have."""
    from dataclasses import asdict

    from eyetune.data.config import DataConfig
    from eyetune.data.labels import AS_THEY_STAND
    from eyetune.data.records import open_manifest
    from eyetune.metrics.labelmap import parse, unstated

    table, images = where
    config = DataConfig(table=table, images=images, **asdict(columns))
    manifest = open_manifest(config, classes=AS_THEY_STAND)
    classes = tuple(prompts.classes)
    if said is not None:
        found = parse(said, classes, f"--map {name}")
        if found.ours is not None:
            raise ConfigError(f"--map {name}: it joins classes; write prompts of the joined classes instead.")
        return found.apply(manifest)
    return unstated(manifest, classes, name=name).apply(manifest)


def _drop_others(folder: RunDir, model: str) -> None:
    """Forget datasets that another model, or this one before it was trained further, was scored on."""
    if folder.main and folder.metrics_file.is_file():
        content = folder.read_metrics()
        kept = {name: one for name, one in content["datasets"].items() if one.get("model") == model}
        if len(kept) < len(content["datasets"]):
            folder.write_metrics({"datasets": kept})


def _of_split(manifest: Manifest, split: str | None, shots: Sequence[int], seed: int) -> Manifest:
    from eyetune.data import splits

    if shots:
        return splits.split(manifest, 0.0, TEST, seed)
    if split is None:
        return manifest
    if split not in manifest.splits:
        known = ", ".join(manifest.splits) or "none: its table has no split column"
        raise DataError(f"--split {split}: {manifest.source} has no such split. It has {known}.")
    return manifest.select(split)


@dataclass(frozen=True)
class _Seen:
    """A dataset as it could be read, its rows with their features, and how many patients were left out, and why."""

    manifest: Manifest
    rows: list[Subject]
    features: Tensor
    left_out: list[tuple[str, int]]


def _look(
    run: ClipRun, manifest: Manifest, prompts: Prompts, store: Path, *, per: Per, reading: Reading, skip: bool
) -> _Seen:
    from eyetune.clip.zeroshot import look, subjects
    from eyetune.data.readable import check_readable

    whole = check_readable(manifest, skip, workers=reading.workers, settings=run.settings)
    if run.runtime.is_main:
        print("\n".join(whole.notes))
    rows, left_out = subjects(whole, per, ordered=prompts.ordered)
    features = look(run, rows, store=store, batch_size=reading.batch_size, workers=reading.workers)
    return _Seen(whole, rows, features, left_out)


def _notes(seen: _Seen, run: ClipRun, prompts: Prompts, per: Per, split: str | None) -> dict[str, Any]:
    """What metrics.json says of a dataset beside its scores; of those of a split only, where one is scored alone."""
    from eyetune.clip.run import learnt_from
    from eyetune.clip.zeroshot import about
    from eyetune.train.leaks import overlap, unnamed_patients

    rows = [row for row in seen.rows if split in (None, row.split)]
    photographs = [one for one in seen.manifest if split in (None, one.split)]
    said = about(rows, per, seen.left_out)
    return said | {
        "left_out": [{"why": why, "images": count} for why, count in seen.manifest.left_out] + said["left_out"],
        "prompts": prompts.name,
        "model": run.fingerprint,
        "warnings": [
            *overlap(photographs, learnt_from(run)),
            *unnamed_patients([one.patient for one in photographs]),
        ],
    }


def _table(seen: _Seen, prompts: Prompts, vectors: Tensor, scale: float) -> Predictions:
    from eyetune.clip.zeroshot import predictions

    classes, ordered = tuple(prompts.classes), prompts.ordered or None
    return predictions(seen.rows, seen.features, classes, vectors, scale=scale, ordered=ordered)


def _rows(chosen: Sequence[bool]) -> Any:
    import numpy as np

    return np.array(chosen, dtype=bool)


def _few_shot(seen: _Seen, whole: Predictions, vectors: Tensor, *, scale: float, few: FewShot) -> dict[str, Any]:
    from eyetune.clip.fewshot import few_shot, linear_probe, tip_adapter
    from eyetune.train.results import headline

    features = seen.features.double().numpy()
    test, train = (_rows([row.split == name for row in seen.rows]) for name in ("test", "train"))
    methods = {"linear": linear_probe, "tip_adapter": tip_adapter(vectors.double().numpy(), scale)}
    return few_shot(
        whole.take(train),
        features[train],
        whole.take(test),
        features[test],
        methods,
        metrics=headline({"classes": whole.classes})[1],
        shots=few.numbers(),
        draws=few.draws,
        seed=few.seed,
    )


def few_shot_table(name: str, found: Mapping[str, Any]) -> Table:
    """The words alone, then each number of shots by each method: the mean over the draws, and where draws lie."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from eyetune.train.results import headline

    shown = headline(found)[1]
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column(f"{name}, few-shot")
    for metric in shown:
        table.add_column(metric.replace("_", " "), justify="right")
    table.add_row("words alone", *(_cell(found["metrics"].get(metric)) for metric in shown))
    for shots, methods in found["few_shot"]["shots"].items():
        for method, metrics in methods.items():
            table.add_row(f"{shots} a class, {METHODS[method]}", *(_cell(metrics.get(metric)) for metric in shown))
    return table


def _cell(entry: Mapping[str, Any] | None) -> str:
    if entry is None or entry["value"] is None:
        return "-"
    low, high = entry["ci"]
    return f"{entry['value']:.3f}" + ("" if low is None else f" ({low:.3f} to {high:.3f})")
