"""From predictions to what the run folder says of them: metrics.json, plots, the table at the end."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from eyetune.errors import DataError, did_you_mean
from eyetune.metrics import agreement, plots
from eyetune.metrics.calibration import Calibration, LabelCalibration, fit_calibration, trust
from eyetune.metrics.fitted import Fitted
from eyetune.metrics.forest import forest
from eyetune.metrics.labelmap import merging
from eyetune.metrics.patients import patient_level
from eyetune.metrics.predictions import LabelPredictions, Predictions, ValuePredictions
from eyetune.metrics.ranges import ValueCalibration
from eyetune.metrics.scores import generalization, is_graded_dr, primary_metric, score
from eyetune.metrics.strangeness import Strangeness, choose_threshold
from eyetune.metrics.subgroups import Grouping, subgroups
from eyetune.metrics.table import Table as Said
from eyetune.metrics.trust_plots import reliability, risk_coverage
from eyetune.train.novelty import SCORE, Novelty
from eyetune.train.rundir import RunDir

if TYPE_CHECKING:
    from eyetune.train.run import Run

#: The splits of the run's own data; every other dataset is external.
OWN = ("val", "test")

_HEADLINE = ("accuracy", "balanced_accuracy", "qwk", "f1_macro", "auroc_macro")
_LABELS_HEADLINE = ("auroc_macro", "auprc_macro", "f1_macro", "exact_match", "hamming_loss")
_VALUE_HEADLINE = ("mae", "rmse", "r2", "pearson", "ccc", "bias")
_GRADED_HEADLINE = ("accuracy", "balanced_accuracy", "qwk", "auroc_macro", "referable_auroc")


def calibrate(run: Run, val: Said | None) -> Fitted | None:
    """Fit the calibration of a trained run on its validation split, write it, and say what came of it.

    Returns None, and says so, when there is no labelled validation image.
    """
    folder = run.folder
    found = None if val is None else fit_calibration(val, "val", model=folder.best_model())
    if found is not None and val is not None:
        found = found.model_copy(update={"ood": _strangeness(run.novelty, val)})
        folder.write_calibration(found)
    if folder.main:
        print(calibration_line(found))
        for warning in found.warnings if found else ():
            print(f"calibration: {warning}")
    return found


def _strangeness(novelty: Novelty | None, val: Said) -> Strangeness | None:
    threshold = choose_threshold(val)
    if novelty is None or threshold is None:
        return None
    return Strangeness(
        score=SCORE, threshold=threshold, chosen_on="val", fitted_on=novelty.images, tensors=novelty.digest
    )


def calibration_line(calibration: Fitted | None) -> str:
    """A calibration in one line."""
    if calibration is None:
        return "calibration: none, for no validation image has a label; what the network gives stays as it is"
    sample, said = calibration.fitted_on, "nothing"
    if isinstance(calibration, Calibration):
        said = f"temperature {_temperature(calibration)}"
    elif isinstance(calibration, LabelCalibration):
        said = ", ".join(f"temperature of {name} {_temperature(one)}" for name, one in calibration.labels.items())
    elif isinstance(calibration, ValueCalibration) and calibration.interval.half_width is not None:
        interval = calibration.interval
        said = f"predicted ± {interval.half_width:.3g} holds {interval.level:.0%}"
    return f"calibration: {said}, fitted on {sample.n} images of {sample.dataset}"


def _temperature(calibration: Calibration) -> str:
    low, high = calibration.temperature.ci
    interval = "" if low is None or high is None else f" ({low:.2f} to {high:.2f})"
    return f"{calibration.temperature.value:.2f}{interval}"


def add_scores(
    folder: RunDir,
    tables: Mapping[str, Said],
    calibration: Fitted | None = None,
    *,
    about: Mapping[str, Mapping[str, Any]] | None = None,
    by: Sequence[Grouping] = (),
    reference: str | None = None,
    site: Fitted | None = None,
) -> dict[str, Any]:
    """Write the predictions, their scores and plots into a run folder, beside what stands there already.

    Args:
        folder: the run folder.
        tables: dataset name -> predictions.
        calibration: the run's own (`Run.calibration`).
        about: dataset name -> what else is said of it: `warnings`, `label_map`, `merged`.
        by: how the traits of the tables are grouped; a trait without a grouping by its values.
        reference: the dataset that the others are held against; None: as before, at first the test split.
        site: a site's calibration, for all but the run's own splits; None: the run's own for all.

    Returns the new content of metrics.json: `datasets`, and `generalization` when the reference and an external
    dataset are there. Raises DataError when there is no dataset of the name `reference`.
    """
    content: dict[str, Any] = folder.read_metrics() if folder.metrics_file.is_file() else {"datasets": {}}
    if reference is not None and reference not in {*content["datasets"], *tables}:
        known = [*content["datasets"], *tables]
        raise DataError(f"--reference {reference}: no such dataset.{did_you_mean(reference, known)} There are {known}.")
    val = tables["val"] if "val" in tables else folder.read_predictions("val")
    for name, table in tables.items():
        folder.write_predictions(name, table)
        fitted = calibration if site is None or name in OWN else site
        content["datasets"][name] = _described(table, fitted, val, by) | dict((about or {}).get(name, {}))
        if folder.main:
            _draw(folder, name, table, content["datasets"][name])
    chosen = reference or content.get("generalization", {}).get("reference", "test")
    external = [name for name in content["datasets"] if name not in (*OWN, chosen)]
    if chosen in content["datasets"] and external:
        content["generalization"] = _generalize(folder, content["datasets"], chosen, external, tables)
    folder.write_metrics(content)
    return content


def _described(table: Said, calibration: Fitted | None, val: Said | None, by: Sequence[Grouping]) -> dict[str, Any]:
    """The scores of a dataset, by patient and by group too where the table says who and which."""
    # What was fitted for the run's classes says nothing of others that some of them were joined to. (Nothing read from
    # a file knows what a number is called.)
    alike = calibration is None or calibration.classes == table.names or isinstance(table, ValuePredictions)
    found, trusted = score(table), trust(table, calibration if alike else None, val)
    for name, more in trusted.pop("per_label", {}).items():
        found["per_label"][name] |= more
    found |= trusted
    if (joined := patient_level(table)) is not None:
        found["patient_level"] = joined
    groupings = {one.column: one for one in by}
    if table.traits:
        found["subgroups"] = {
            name: subgroups(table, groupings.get(name, Grouping(name)), cells) for name, cells in table.traits.items()
        }
    return found


def _draw(folder: RunDir, name: str, table: Said, found: Mapping[str, Any]) -> None:
    """The pictures of one dataset."""
    if isinstance(table, Predictions):
        matrix_file = folder.plot_file(f"confusion_matrix_{name}")
        plots.confusion_matrix(found["confusion_matrix"], found["classes"], matrix_file, title=name)
        plots.roc(table, folder.plot_file(f"roc_{name}"), title=name)
        if "reliability" in found:
            reliability(found, folder.plot_file(f"reliability_{name}"), title=name)
            risk_coverage(found["selective"], folder.plot_file(f"risk_coverage_{name}"), title=name)
    elif isinstance(table, LabelPredictions):
        plots.roc_of_labels(table, folder.plot_file(f"roc_{name}"), title=name)
    elif isinstance(table, ValuePredictions) and found["n"]:
        agreement.draw(table, found["metrics"], folder.plot_file(f"agreement_{name}"), title=name)
    for column, groups in found.get("subgroups", {}).items():
        plain = re.sub(r"[^\w.-]+", "_", column)
        target = folder.plot_file(f"subgroups_{name}_{plain}")
        forest(groups, found["metrics"], headline(found)[1][:3], target, title=f"{name}, by {column}")


def _generalize(
    folder: RunDir,
    datasets: Mapping[str, Any],
    reference: str,
    external: Sequence[str],
    tables: Mapping[str, Said],
) -> dict[str, Any]:
    """`generalization` of metrics.json. Where classes of the run were joined for a dataset, the reference is scored
    with the same classes joined: numbers of different questions are never held against each other."""
    found: dict[str, Any] = {"reference": reference, "external": {}}
    kept = _reference_table(folder, reference, tables)
    alike: dict[str, dict[str, Any]] = {}
    for name in external:
        merged = datasets[name].get("merged")
        inside = datasets[reference]
        if merged != inside.get("merged"):
            if merged is None or inside.get("merged") is not None or not isinstance(kept, Predictions):
                why = "its classes are not those of the reference, which could not be joined likewise"
                found["external"][name] = {
                    key: {"value": None, "ci": [None, None], "reason": why} for key in datasets[name]["metrics"]
                }
                continue
            key = json.dumps(merged, sort_keys=True)
            if key not in alike:
                joined = merging(kept.classes, merged).merge(kept)
                scores = score(joined)
                alike[key] = {"classes": scores["classes"], "metrics": scores["metrics"]}
            inside = alike[key]
            found.setdefault("joined_reference", {})[name] = inside
        pair = {reference: inside, name: datasets[name]}
        found["external"][name] = generalization(reference, pair, [name])["external"][name]
    return found


def _reference_table(folder: RunDir, name: str, tables: Mapping[str, Said]) -> Said | None:
    return tables[name] if name in tables else folder.read_predictions(name)


def headline(found: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """Of one dataset of metrics.json: the metric shown with its interval, and all that a short table shows."""
    task = found.get("task", "classification")
    if task == "multilabel":
        return _LABELS_HEADLINE[0], _LABELS_HEADLINE
    if task == "regression":
        return _VALUE_HEADLINE[0], _VALUE_HEADLINE
    classes = tuple(found["classes"])
    # Grades that only the configuration says have an order (`task.kind: ordinal`).
    primary = "qwk" if found.get("ordered") else primary_metric(classes)
    shown = _GRADED_HEADLINE if is_graded_dr(classes) else _HEADLINE
    return primary, shown if primary in shown else (primary, *shown)


def scores_table(content: Mapping[str, Any]) -> Table:
    """The datasets of metrics.json as a table: a row a dataset with the headline metrics, then the gaps outside.

    The metric that chose the epoch has its 95% interval beside it.
    """
    datasets = content["datasets"]
    primary, shown = headline(next(iter(datasets.values())))
    names = [name for name in shown if any(_value(one, name) is not None for one in datasets.values())]
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("dataset")
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


def remarks_table(content: Mapping[str, Any], names: Sequence[str]) -> list[str | Table]:
    """What the scores of the datasets `names` come with: warnings as lines, then patients and groups as tables."""
    shown: list[str | Table] = []
    for name in names:
        found = content["datasets"][name]
        shown += [f"WARNING, {name}: {warning}" for warning in found.get("warnings", [])]
        if merged := found.get("merged"):
            pairs = ", ".join(f"{ours} counts as {joined}" for ours, joined in merged.items())
            shown.append(f"{name}: {pairs}")
        if joined := found.get("patient_level"):
            shown.append(_patient_line(name, found, joined))
        shown += [_group_table(name, column, found) for column in found.get("subgroups", {})]
    return shown


def _patient_line(name: str, found: Mapping[str, Any], joined: Mapping[str, Any]) -> str:
    primary, _ = headline(found)
    entry = joined["metrics"].get(primary, {})
    low, high = entry.get("ci") or (None, None)
    interval = "" if low is None else f" ({_number(low)} to {_number(high)})"
    value = f"{primary.replace('_', ' ')} {_number(entry.get('value'))}{interval}"
    return f"{name}, by patient ({joined['rule'].partition(':')[0]}): {value}, {joined['n']} patients"


def _group_table(name: str, column: str, found: Mapping[str, Any]) -> Table:
    groups, gap = found["subgroups"][column]["groups"], found["subgroups"][column]["gap"]
    primary, shown = headline(found)
    names = [
        one
        for one in shown
        if any((entry["metrics"].get(one) or {}).get("value") is not None for entry in groups.values())
    ]
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column(f"{name} by {column}")
    for one in ("images", "patients", *names):
        table.add_column(one.replace("_", " "), justify="right")
        if one == primary:
            table.add_column("95% interval")
    for group, entry in groups.items():
        small = f" ({entry['too_small']})" if "too_small" in entry else ""
        cells = _cells(entry["metrics"], names, primary)
        table.add_row(group + small, str(entry["n"]), str(entry["patients"] or "-"), *cells)
    if gap:
        table.add_row("largest gap", "", "", *_cells(gap, names, primary), style="italic")
    return table
