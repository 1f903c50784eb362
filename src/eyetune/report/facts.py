"""A run folder as the report sees it: everything read once, what is missing left empty, what is damaged refused."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eyetune.backbones import BackboneSpec, find_spec
from eyetune.data.record import SPLITS
from eyetune.errors import RunError, UserError
from eyetune.metrics.predictions import TARGET
from eyetune.metrics.scores import primary_metric
from eyetune.metrics.table import Table
from eyetune.report.content import Dataset, LeftOut, Metrics, Score, read_content
from eyetune.train.leaks import SAME_BYTES
from eyetune.train.results import headline
from eyetune.train.rundir import ModelCard, RunDir

if TYPE_CHECKING:
    from eyetune.config import Config
    from eyetune.metrics.fitted import Fitted

#: The run's own splits that are scored.
VAL, TEST = "val", "test"


@dataclass(frozen=True)
class Part:
    """Images of one split or dataset: how many, of how many patients (None: not known), and of which classes."""

    name: str
    images: int
    patients: int | None
    classes: Mapping[str, int] = field(default_factory=dict)
    unlabelled: int = 0
    left_out: Sequence[LeftOut] = ()


@dataclass(frozen=True)
class Facts:
    """What is known of a run.

    Attributes:
        folder: the run folder.
        metrics: metrics.json.
        config: what was asked; None when config.yaml is of another version.
        card: of the best epoch's checkpoint; None without one.
        spec: of the backbone; None when this installation does not know it.
        environment, load_report, data, cost: the JSON files; empty when they are not there.
        history: a row an epoch.
        splits: rows of splits.csv.
        predictions: dataset -> table, of those that are there.
        calibrated: the same with calibrated probabilities, where the run has a calibration of their classes.
        calibration: the run's own, fitted on validation; None without one, or one of other weights.
    """

    folder: RunDir
    metrics: Metrics
    config: Config | None
    card: ModelCard | None
    spec: BackboneSpec | None
    environment: dict[str, Any]
    load_report: dict[str, Any]
    data: dict[str, Any]
    cost: dict[str, Any]
    history: list[dict[str, Any]]
    splits: list[dict[str, str]]
    predictions: dict[str, Table]
    calibrated: dict[str, Table]
    calibration: Fitted | None

    @property
    def datasets(self) -> dict[str, Dataset]:
        """Dataset -> scores: the test split first, then the outside ones, the validation split last."""
        found = self.metrics.datasets
        order = [TEST, *(name for name in found if name not in (VAL, TEST)), VAL]
        return {name: found[name] for name in order if name in found}

    @property
    def outside(self) -> dict[str, Dataset]:
        """The datasets that are not the run's own."""
        return {name: found for name, found in self.datasets.items() if name not in (VAL, TEST)}

    @property
    def judged_on(self) -> str | None:
        """The dataset the headline is of: the test split, else an outside one; None when only validation was scored."""
        return next((name for name in self.datasets if name != VAL), None)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, in order; none for a task without classes."""
        if self.card is not None:
            return self.card.classes
        return next((found.classes for found in self.datasets.values()), ())

    @property
    def task(self) -> str:
        """What was learnt: "classification", "multilabel" or "regression"."""
        return next((found.task for found in self.datasets.values()), "classification")

    @property
    def model(self) -> str | None:
        """SHA-256 of the best checkpoint's tensors; None where there is none, or it does not say."""
        return self.folder.best_model() if self.card is not None else None

    @property
    def primary(self) -> str:
        """The metric the run is judged by."""
        name = self.card.metric if self.card is not None and self.card.metric else None
        if name and any(name in found.metrics for found in self.datasets.values()):
            return name
        known = next((list(found.metrics) for found in self.datasets.values()), [])
        usual = primary_metric(self.classes) if len(self.classes) > 1 else ""
        return usual if usual in known else next(iter(known), usual)

    @property
    def headline(self) -> tuple[str, ...]:
        """The metrics worth a line of their own, of those that are there: the primary one, then the usual ones."""
        known = dict.fromkeys(name for found in self.datasets.values() for name in found.metrics)
        usual: Iterable[str] = known
        if self.task != "classification" or len(self.classes) > 1:
            usual = headline({"task": self.task, "classes": self.classes})[1]
        return tuple(name for name in dict.fromkeys((self.primary, *usual)) if name in known)

    @property
    def rejoined(self) -> list[str]:
        """The datasets that were scored in other classes than the run's."""
        scored = {name: found.classes for name, found in self.datasets.items() if found.task == "classification"}
        return [name for name, classes in scored.items() if tuple(classes) != tuple(self.classes)]

    @property
    def knows_patients(self) -> bool | None:
        """Whether the table names patients; None when there is no splits.csv to tell."""
        return any(row.get("patient") for row in self.splits) if self.splits else None

    def score(self, dataset: str, name: str) -> Score:
        """One score; without a value when it is not there."""
        found = self.metrics.datasets.get(dataset)
        return found.metrics.get(name, Score()) if found else Score()

    def warnings(self, dataset: str) -> list[str]:
        """What evaluating a dataset warned of; photographs are named by their row, for names may be of people."""
        table = self.predictions.get(dataset)
        rows = {name: row for row, name in enumerate(table.images, 2)} if table is not None else {}

        def unnamed(found: re.Match[str]) -> str:
            known = [f"row {rows[name]}" if name in rows else name for name in found[1].split(", ")]
            return f"({SAME_BYTES}: {', '.join(known)})"

        pattern = re.compile(rf"\({SAME_BYTES}: (.*)\)")
        return [pattern.sub(unnamed, text) for text in self.metrics.datasets[dataset].warnings]

    def parts(self) -> list[Part]:
        """The splits of the run's own data, with all their images."""
        return [
            _part(name, rows, self.task, self.classes)
            for name in SPLITS
            if (rows := [row for row in self.splits if row.get("split") == name])
        ]

    def outside_parts(self) -> list[Part]:
        """The other datasets, with their scored images."""
        found = []
        for name, one in self.outside.items():
            sizes = [sum(row) for row in one.confusion_matrix]
            counts = dict(zip(one.classes, sizes, strict=True)) if len(sizes) == len(one.classes) else {}
            for label, alone in one.per_label.items():
                counts[label] = sum(alone.confusion_matrix[-1]) if alone.confusion_matrix else 0
            if one.task == "regression":
                counts = dict.fromkeys(self.classes, one.n)
            found.append(Part(name, one.n, one.patients, counts, one.unlabelled, one.left_out))
        return found


def read_facts(path: Path | str) -> Facts:
    """Everything in a run folder that a report shows.

    Raises RunError when there is no run, it was not scored yet, or a file of it is damaged.
    """
    folder = RunDir.open(path)
    if not folder.metrics_file.is_file():
        raise RunError(
            f"{folder.path} has no metrics.json: the run was not scored yet. Finish it with: "
            f"eyetune finetune --resume {folder.path}"
        )
    metrics = read_content(Metrics, folder.read_metrics(), folder.metrics_file)
    card = folder.read_card()
    tables = {name: table for name in metrics.datasets if (table := folder.read_predictions(name)) is not None}
    return Facts(
        folder=folder,
        metrics=metrics,
        config=_config(folder),
        card=card,
        spec=_spec(card),
        environment=folder.read_environment(),
        load_report=folder.read_load_report(),
        data=folder.read_data(),
        cost=folder.read_cost(),
        history=folder.read_history(),
        splits=folder.read_splits(),
        predictions=tables,
        calibrated={name: _calibrated(folder, table, metrics.datasets[name]) for name, table in tables.items()},
        calibration=_calibration(folder, None),
    )


def _calibration(folder: RunDir, site: str | None) -> Fitted | None:
    try:
        return folder.read_calibration(site) if folder.best.is_dir() else None
    except UserError:
        return None


def _calibrated(folder: RunDir, table: Table, found: Dataset) -> Table:
    """The table calibrated as its scores were; as it is where that calibration is gone, or of other weights or
    classes: what was fitted for the run's classes says nothing of others that some of them were joined to."""
    fitted_on = None if found.calibrated_by is None else found.calibrated_by.dataset
    calibration = _calibration(folder, None if fitted_on in (None, VAL) else fitted_on)
    fits = calibration is not None and calibration.classes == table.names and table.task == found.task
    return calibration.apply(table) if calibration is not None and fits else table


def _part(name: str, rows: Sequence[Mapping[str, str]], task: str, classes: Sequence[str]) -> Part:
    """Of a split: images of each class, images that have each label, or images whose number is known."""
    patients = {row["patient"] for row in rows if row.get("patient")}
    if task == "multilabel":
        cells = {label: [row.get(TARGET + label, "") for row in rows] for label in classes}
        counts = Counter({label: of.count("1") for label, of in cells.items()})
        unlabelled = sum(not any(of) for of in zip(*cells.values(), strict=True))
        return Part(name, len(rows), len(patients) or None, dict(counts), unlabelled)
    counts = Counter(row.get("target", "") for row in rows)
    unlabelled = counts.pop("", 0)
    if task == "regression":
        counts = Counter(dict.fromkeys(classes, len(rows) - unlabelled))
    return Part(name, len(rows), len(patients) or None, dict(counts), unlabelled)


def _config(folder: RunDir) -> Config | None:
    try:
        return folder.read_config()
    except UserError:  # a field that this version does not know: the text is shown as it is
        return None


def _spec(card: ModelCard | None) -> BackboneSpec | None:
    if card is None:
        return None
    try:
        return find_spec(card.backbone)
    except UserError:
        return None
