"""From predictions to what the run folder says of them: metrics.json, plots, the table at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from eyetune.metrics import plots
from eyetune.metrics.calibration import Calibration, fit_calibration, trust
from eyetune.metrics.predictions import Predictions
from eyetune.metrics.scores import generalization, is_graded_dr, primary_metric, score
from eyetune.metrics.trust_plots import reliability, risk_coverage
from eyetune.train.rundir import RunDir

#: The splits of the run's own data; every other dataset is external.
OWN = ("val", "test")

_HEADLINE = ("accuracy", "balanced_accuracy", "qwk", "f1_macro", "auroc_macro")
_GRADED_HEADLINE = ("accuracy", "balanced_accuracy", "qwk", "auroc_macro", "referable_auroc")


def calibrate(folder: RunDir, val: Predictions | None) -> Calibration | None:
    """Fit the calibration of a trained run on its validation split, write it, and say what came of it.

    Returns None, and says so, when there is no labelled validation image.
    """
    found = None if val is None else fit_calibration(val, "val", model=folder.best_model())
    if found is not None:
        folder.write_calibration(found)
    if folder.main:
        print(calibration_line(found))
        for warning in found.warnings if found else ():
            print(f"calibration: {warning}")
    return found


def calibration_line(calibration: Calibration | None) -> str:
    """A calibration in one line."""
    if calibration is None:
        return "calibration: none, for no validation image has a label; probabilities stay as the network gives them"
    temperature, sample = calibration.temperature, calibration.fitted_on
    low, high = temperature.ci
    interval = "" if low is None or high is None else f" ({low:.2f} to {high:.2f})"
    return (
        f"calibration: temperature {temperature.value:.2f}{interval}, fitted on {sample.n} images of {sample.dataset}"
    )


def add_scores(
    folder: RunDir, tables: Mapping[str, Predictions], calibration: Calibration | None = None
) -> dict[str, Any]:
    """Write the predictions, their scores and plots into a run folder, beside what stands there already.

    Args:
        folder: the run folder.
        tables: dataset name -> predictions.
        calibration: the run's own (`Run.calibration`).

    Returns the new content of metrics.json: `datasets`, and `generalization` when there is a test split and an
    external dataset.
    """
    content: dict[str, Any] = folder.read_metrics() if folder.metrics_file.is_file() else {"datasets": {}}
    for name, table in tables.items():
        folder.write_predictions(name, table)
        content["datasets"][name] = score(table) | trust(table, calibration)
        if folder.main:
            found = content["datasets"][name]
            matrix_file = folder.plot_file(f"confusion_matrix_{name}")
            plots.confusion_matrix(found["confusion_matrix"], found["classes"], matrix_file, title=name)
            plots.roc(table, folder.plot_file(f"roc_{name}"), title=name)
            if "reliability" in found:
                reliability(found, folder.plot_file(f"reliability_{name}"), title=name)
                risk_coverage(found["selective"], folder.plot_file(f"risk_coverage_{name}"), title=name)
    external = [name for name in content["datasets"] if name not in OWN]
    if "test" in content["datasets"] and external:
        content["generalization"] = generalization("test", content["datasets"], external)
    folder.write_metrics(content)
    return content


def headline_metrics(classes: tuple[str, ...]) -> tuple[str, ...]:
    """The metrics that a short table shows, the one that chose the epoch among them."""
    chosen = _GRADED_HEADLINE if is_graded_dr(classes) else _HEADLINE
    primary = primary_metric(classes)
    return chosen if primary in chosen else (primary, *chosen)


def scores_table(content: Mapping[str, Any]) -> Table:
    """The datasets of metrics.json as a table: a row a dataset with the headline metrics, then the gaps outside.

    The metric that chose the epoch has its 95% interval beside it.
    """
    datasets = content["datasets"]
    classes = tuple(next(iter(datasets.values()))["classes"])
    names = [
        name for name in headline_metrics(classes) if any(_value(one, name) is not None for one in datasets.values())
    ]
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("dataset")
    primary = primary_metric(classes)
    for column in ("images", "patients", *names):
        table.add_column(column.replace("_", " "), justify="right")
        if column == primary:
            table.add_column("95% interval")
    for dataset, found in datasets.items():
        cells = _cells(found["metrics"], names, primary)
        table.add_row(dataset, str(found["n"]), str(found["patients"] or "-"), *cells)
    for dataset, gaps in content.get("generalization", {}).get("external", {}).items():
        table.add_row(f"lost on {dataset}", "", "", *_cells(gaps, names, primary, signed=True), style="italic")
    return table


def _cells(
    metrics: Mapping[str, Mapping[str, Any]], names: Sequence[str], primary: str, signed: bool = False
) -> list[str]:
    cells = []
    for name in names:
        entry = metrics.get(name, {})
        cells.append(_number(entry.get("value"), signed))
        if name == primary:
            low, high = entry.get("ci") or (None, None)
            cells.append("-" if low is None else f"{_number(low, signed)} to {_number(high, signed)}")
    return cells


def _number(value: float | None, signed: bool = False) -> str:
    return "-" if value is None else f"{value:+.3f}" if signed else f"{value:.3f}"


def _value(found: Mapping[str, Any], name: str) -> float | None:
    entry = found["metrics"].get(name)
    return None if entry is None else entry["value"]
