"""From finished cells to `comparison.json`: one table, tests between arms, and what they come to in words.

The content of `comparison.json`::

    schema           1
    eyetune          version
    status           "running", "interrupted", "finished" (all cells are done) or "failed" (finished, some cells failed)
    command          what was typed
    budget           {"kind": "epochs" | "own", "text"}
    seeds            [0, 1, …]
    split            {"seed", "train": {"images", "patients"}, "val": …, "test": …}; patients null where not known
    datasets         ["val", "test", external …]
    external         {name: "TABLE[:IMAGES]"}
    maps             {name: label map as it was given}
    joined           {name: [class, …]}   external datasets for which classes of the runs were joined, and to which
    task             "classification", "multilabel" or "regression"
    classes          [name, …]   of labels theirs, of a number its name
    primary          {"metric", "higher_is_better", "dataset": "test", "why"}   decided before training
    metrics          ["qwk", …]   the ones under scores
    arms             [{"name", "strategy", "kind", "backbone", "weights",
                       "settings": {"lr", "epochs", "batch", "adapt"},
                       "cells": [name, …], "seeds": [0, …],
                       "scores": {dataset: {metric: {"value", "ci": [low, high], "sd", "by_seed": {"0": x}}}},
                       "cost": {"trainable_parameters", "parameters", "seconds", "training_seconds", "peak_memory",
                                "memory_of", "images_per_second", "epochs"},
                       "drift": {"split", "images", "cka", "cka_debiased", "cosine_distance"} | null}]
    cells            [{"name", "folder" (beside this file), "arm", "seed",
                       "status": "waiting" | "finished" | "failed" | "interrupted", "error", "cost", "drift",
                       "epochs": {"run", "best"}, "device"}]
    tests            [{"metric", "primary", "dataset", "method", "unit", "clusters", "images",
                       "pairs": [{"first", "second", "seeds": [0, …], "difference", "ci", "p", "p_holm", "differs",
                                  "same_direction": n of seeds, "reason"}]}]
    sentences        [text, …]   what differs and what does not, of the primary metric
    warnings         [text, …]   what a reader must not overlook
    files            {"table": "comparison.csv", "picture": "comparison.png"}

An arm is a strategy on a backbone; a cell is an arm with a seed. `value` is the mean over the seeds, `sd` their
standard deviation (null of one seed), `ci` the 95% interval of that mean over other patients, the trained models held
fixed: it does not hold what other seeds would bring, which `sd` shows. `difference` is first minus second, `p_holm` is
corrected for all pairs of one metric, `differs` is p_holm <= 0.05. `cost` and `drift` of an arm are means over its
cells, `peak_memory` is their maximum. A value that is not defined is null. `arms`, `tests` and `sentences` are empty
until all cells are done.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from eyetune import __version__
from eyetune.comparison.plan import Arm, Plan
from eyetune.comparison.words import listed, sentences
from eyetune.errors import RunError
from eyetune.metrics.intervals import Clusters
from eyetune.metrics.paired import AREA_METRICS, Answers, Compared, delong, holm, permutation, resampled_means
from eyetune.metrics.scores import METRICS, Undefined, is_graded_dr, sample
from eyetune.metrics.table import Table
from eyetune.train.results import OWN, headline
from eyetune.train.rundir import RunDir

SCHEMA = 1
ALPHA = 0.05
REFERENCE = "test"
FILE, TABLE, PICTURE = "comparison.json", "comparison.csv", "comparison.png"

FEW_SEEDS = 3
"""Below that, the spread over seeds is hardly known."""


def started(plan: Plan, cells: Sequence[Mapping[str, Any]], status: str, command: str) -> dict[str, Any]:
    """The content while cells are still to come: what was asked for, and how far each cell is."""
    return {
        "schema": SCHEMA,
        "eyetune": __version__,
        "status": status,
        "command": command,
        "budget": {"kind": plan.budget, "text": plan.budget_text()},
        "seeds": list(plan.seeds),
        "split": {"seed": plan.cells[0].config.split_seed},
        "datasets": [],
        "external": plan.datasets,
        "maps": plan.maps,
        "joined": {},
        "task": None,
        "classes": [],
        "primary": None,
        "metrics": [],
        "arms": [],
        "cells": list(cells),
        "tests": [],
        "sentences": [],
        "warnings": [],
        "files": {},
    }


def finished(plan: Plan, cells: Sequence[Mapping[str, Any]], command: str) -> dict[str, Any]:
    """The whole content, from the run folders of the finished cells.

    Raises RunError when no cell is finished, or the cells were not scored on the same images.
    """
    done = [cell for cell in cells if cell["status"] == "finished"]
    if not done:
        raise RunError("no run of the comparison was finished: there is nothing to compare.")
    failed = [cell for cell in cells if cell["status"] == "failed"]
    content = started(plan, cells, "failed" if failed else "finished", command)
    tables = _Tables(plan, done)
    first = tables.folders[done[0]["name"]]
    described = first.read_metrics()["datasets"]
    metrics = _metrics(described[tables.datasets[0]], first)
    content["datasets"], content["classes"] = tables.datasets, list(tables.names)
    content["task"], content["metrics"] = tables.task, list(metrics)
    content["split"] |= _split_sizes(first)
    content["joined"] = {name: one["classes"] for name, one in described.items() if one.get("merged")}
    content["primary"] = {
        "metric": metrics[0],
        "higher_is_better": METRICS.get(metrics[0]).higher_is_better,
        "dataset": REFERENCE,
        "why": "the metric that chose every run's best epoch on validation, fixed before training",
    }
    scores = {name: tables.scores(name, metrics) for name in tables.datasets}
    arms = [arm for arm in plan.arms if arm in tables.arms]
    drifts = {cell["name"]: cell.get("drift") for cell in done}
    content["arms"] = [_arm(plan, arm, tables, scores, drifts) for arm in arms]
    if REFERENCE in tables.datasets and len(arms) > 1:
        for metric in dict.fromkeys([metrics[0], _second(metrics)]):
            content["tests"].append(_test(tables, arms, metric, primary=metric == metrics[0]))
        content["sentences"] = sentences(content["tests"][0])
    content["warnings"] = _warnings(plan, tables, failed, done, content["joined"])
    content["files"] = {"table": TABLE, "picture": PICTURE}
    return content


# -- what the run folders hold -----------------------------------------------------------------------------------------


class _Tables:
    """The predictions of all finished cells, on images that are the same for all.

    Attributes:
        task: what all learnt, as in metrics.json.
        names: of the classes, of the labels, or of the number.
        arms: arm -> seed -> cell name.
        outcomes: dataset -> cell name -> the labelled images.
        clusters: dataset -> the patients of these images.
    """

    def __init__(self, plan: Plan, done: Sequence[Mapping[str, Any]]) -> None:
        names = {cell["name"] for cell in done}
        self.folders = {name: RunDir.open(plan.out / name) for name in names}
        self.arms: dict[Arm, dict[int, str]] = {}
        for cell in plan.cells:
            if cell.name in names:
                self.arms.setdefault(cell.arm, {})[cell.seed] = cell.name
        self.outcomes: dict[str, dict[str, Answers]] = {}
        self.clusters: dict[str, Clusters] = {}
        self.task = ""
        self.names: tuple[str, ...] = ()
        for dataset in (*OWN, *plan.datasets):
            self._read(dataset)
        self.datasets = list(self.outcomes)
        if not self.datasets:
            raise RunError("no image that the runs were scored on has a label: there is nothing to compare.")

    def _read(self, dataset: str) -> None:
        expected: Table | None = None
        for name, folder in self.folders.items():
            table = folder.read_predictions(dataset)
            if table is None:
                continue
            if expected is None:
                expected = table
                self.task, self.names = table.task, self.names or table.names
            if not table.same_truth(expected):
                raise RunError(
                    f"{folder.path} was scored on other images of {dataset!r} than the other runs: the table or its "
                    "labels have changed since. Start the comparison in a new folder."
                )
            if table.known.any():
                outcomes, clusters = sample(table.labelled())
                self.outcomes.setdefault(dataset, {})[name] = outcomes
                self.clusters.setdefault(dataset, clusters)

    def of(self, arm: Arm, dataset: str, seeds: Sequence[int] | None = None) -> list[Answers]:
        """The outcomes of an arm, a seed each."""
        chosen = self.arms[arm] if seeds is None else {seed: self.arms[arm][seed] for seed in seeds}
        return [self.outcomes[dataset][name] for name in chosen.values()]

    def common_seeds(self, first: Arm, second: Arm) -> list[int]:
        """Seeds that both arms have finished."""
        return [seed for seed in self.arms[first] if seed in self.arms[second]]

    def scores(self, dataset: str, metrics: Sequence[str]) -> dict[Arm, dict[str, Any]]:
        """Every metric of every arm: mean over seeds, its interval over patients, spread over seeds."""
        found: dict[Arm, dict[str, Any]] = {arm: {} for arm in self.arms}
        by_name = {arm.name: arm for arm in self.arms}
        for name in metrics:
            metric = METRICS.get(name)
            values = {}
            for arm, cells in self.arms.items():
                try:
                    one_each = [metric(outcomes) for outcomes in self.of(arm, dataset)]
                except Undefined as reason:
                    found[arm][name] = {"value": None, "ci": [None, None], "sd": None, "reason": str(reason)}
                    continue
                values[arm] = one_each
                sd = float(np.std(one_each, ddof=1)) if len(one_each) > 1 else None
                by_seed = dict(zip(map(str, cells), one_each, strict=True))
                found[arm][name] = {"value": float(np.mean(one_each)), "sd": sd, "by_seed": by_seed}
            drawn = resampled_means({arm.name: self.of(arm, dataset) for arm in values}, self.clusters[dataset], metric)
            for arm_name, resamples in drawn.items():
                entry = found[by_name[arm_name]][name]
                ci = metric.interval(resamples, entry["value"])
                entry["ci"] = [None, None] if ci is None else ci
        return found


def _metrics(described: Mapping[str, Any], folder: RunDir) -> tuple[str, ...]:
    """The metrics of the table, the primary one first; `described` is a dataset in the runs' own classes."""
    card = folder.read_card()
    usual, shown = headline(described)
    primary = (card.metric if card else None) or usual
    more = ("referable_auroc",) if is_graded_dr(described.get("classes", ())) else ()
    names = dict.fromkeys([primary, *more, *(["auroc_macro"] if "auroc_macro" in described["metrics"] else []), *shown])
    return tuple(name for name in names if not METRICS.get(name).descriptive)


def _second(metrics: Sequence[str]) -> str:
    """The metric that is tested beside the primary one: ranking for classes and labels, agreement for a number."""
    return next(name for name in ("referable_auroc", "auroc_macro", "ccc") if name in metrics)


def _split_sizes(folder: RunDir) -> dict[str, Any]:
    sizes: dict[str, Any] = {}
    rows = folder.read_splits()
    for split in ("train", *OWN):
        mine = [row for row in rows if row["split"] == split]
        patients = {row.get("patient") for row in mine} - {"", None}
        if mine:
            sizes[split] = {"images": len(mine), "patients": len(patients) or None}
    return sizes


def _arm(
    plan: Plan, arm: Arm, tables: _Tables, scores: Mapping[str, Mapping[Arm, Any]], drifts: Mapping[str, Any]
) -> dict[str, Any]:
    config = plan.config(arm)
    names = tables.arms[arm]
    costs = [tables.folders[name].read_cost() for name in names.values()]
    return {
        "name": arm.name,
        "strategy": arm.strategy,
        "kind": config.adapt.kind,
        "backbone": arm.backbone,
        "weights": config.model.weights,
        "settings": {
            "lr": config.learning_rate,
            "epochs": config.train.epochs,
            "batch": config.train.batch_size * config.train.accumulate,
            "adapt": config.adapt.model_dump(mode="json"),
        },
        "cells": list(names.values()),
        "seeds": list(names),
        "scores": {dataset: of_arms[arm] for dataset, of_arms in scores.items()},
        "cost": _mean_cost(costs),
        "drift": _mean_drift([drift for name in names.values() if (drift := drifts[name]) is not None]),
    }


def _mean_cost(costs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    def mean(name: str) -> float | None:
        values = [cost[name] for cost in costs if cost.get(name) is not None]
        return float(np.mean(values)) if values else None

    seconds = sum(cost.get("training_seconds", 0.0) for cost in costs)
    images = sum(cost.get("images_trained", 0) for cost in costs)
    peaks = [cost["peak_memory"] for cost in costs if cost.get("peak_memory") is not None]
    return {
        "trainable_parameters": costs[0].get("trainable_parameters"),
        "parameters": costs[0].get("parameters"),
        "seconds": mean("seconds"),
        "training_seconds": mean("training_seconds"),
        "images_per_second": images / seconds if seconds else None,
        "peak_memory": max(peaks) if peaks else None,
        "memory_of": costs[0].get("memory_of"),
        "epochs": mean("epochs"),
    }


def _mean_drift(drifts: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    if not drifts:
        return None
    found: dict[str, Any] = {"split": drifts[0]["split"], "images": drifts[0]["images"]}
    for name in ("cka", "cka_debiased", "cosine_distance"):
        values = [drift[name] for drift in drifts if drift[name] is not None]
        found[name] = float(np.mean(values)) if values else None
    return found


# -- tests -------------------------------------------------------------------------------------------------------------


def _test(tables: _Tables, arms: Sequence[Arm], metric: str, *, primary: bool) -> dict[str, Any]:
    """Every pair of arms by one metric on the test split."""
    clusters = tables.clusters[REFERENCE]
    by_area = metric in AREA_METRICS
    drawn: dict[tuple[Arm, tuple[int, ...]], Any] = {}
    pairs = []
    for first, second in itertools.combinations(arms, 2):
        seeds = tables.common_seeds(first, second)
        sides = [tables.of(arm, REFERENCE, seeds) for arm in (first, second)]
        pair: dict[str, Any] = {"first": first.name, "second": second.name, "seeds": seeds}
        try:
            each = [METRICS.get(metric)(a) - METRICS.get(metric)(b) for a, b in zip(*sides, strict=True)]
            found = (
                delong(sides[0], sides[1], metric, clusters)
                if by_area
                else permutation(sides[0], sides[1], METRICS.get(metric), clusters)
            )
            ci = found.ci
            if not by_area:
                for arm, side in zip((first, second), sides, strict=True):
                    if (arm, tuple(seeds)) not in drawn:  # the same patients are drawn each time
                        one = resampled_means({"": side}, clusters, METRICS.get(metric))
                        drawn[arm, tuple(seeds)] = one[""]
                apart = drawn[first, tuple(seeds)] - drawn[second, tuple(seeds)]
                ci = METRICS.get(metric).gap_interval(apart, found.difference)
        except (Undefined, ZeroDivisionError) as reason:
            found, ci, each = Compared(float("nan"), None, reason=str(reason) or "no seed in common"), None, []
        pairs.append(pair | _outcome(found, ci, each))
    for pair, adjusted in zip(pairs, holm([pair["p"] for pair in pairs]), strict=True):
        pair["p_holm"] = adjusted
        pair["differs"] = None if adjusted is None else adjusted <= ALPHA
    return {
        "metric": metric,
        "primary": primary,
        "dataset": REFERENCE,
        "method": "DeLong, clustered (Obuchowski)" if by_area else "permutation of patients",
        "unit": clusters.unit,
        "clusters": int(clusters.of_image.max()) + 1,
        "images": len(clusters.of_image),
        "pairs": pairs,
    }


def _outcome(found: Compared, ci: list[float] | None, each: Sequence[float]) -> dict[str, Any]:
    known = bool(each)
    return {
        "difference": found.difference if known else None,
        "ci": ci or [None, None],
        "p": found.p,
        "same_direction": sum(one * found.difference > 0 for one in each),
        **({"exchanges": found.exchanges, "exact": found.exact} if found.exchanges else {}),
        "reason": found.reason,
    }


# -- what a reader must not overlook -----------------------------------------------------------------------------------


def _warnings(
    plan: Plan,
    tables: _Tables,
    failed: Sequence[Mapping[str, Any]],
    done: Sequence[Mapping[str, Any]],
    joined: Mapping[str, Sequence[str]],
) -> list[str]:
    found = [f"{cell['name']} failed: {str(cell['error']).splitlines()[0]}" for cell in failed]
    if REFERENCE not in tables.datasets:
        found.append("there is no labelled test split: nothing was tested, and validation scores chose their own epoch")
    elif tables.clusters[REFERENCE].unit == "image":
        found.append(
            "the patients are not known: every image counts as one of its own, so intervals are too narrow and "
            "p-values too small if patients repeat"
        )
    first = tables.folders[done[0]["name"]].read_metrics()["datasets"]
    found += [f"{name}: {said}" for name in tables.datasets for said in first.get(name, {}).get("warnings", [])]
    found += [
        f"{name}: classes were joined to {listed(classes)}; its scores are of these, another question than that of "
        f"{REFERENCE}: do not hold the one against the other"
        for name, classes in joined.items()
    ]
    if len(plan.seeds) < FEW_SEEDS:
        seeds = "one seed" if len(plan.seeds) == 1 else f"{len(plan.seeds)} seeds"
        found.append(
            f"{seeds}: how much of a difference is the luck of a training is "
            f"{'not' if len(plan.seeds) == 1 else 'hardly'} known; --seeds 0,1,2,3,4 says more"
        )
    if plan.budget == "own":
        found.append(f"the budget is not equal: {plan.budget_text()}")
    if len({cell.get("device") for cell in done}) > 1:
        found.append("the runs were on different devices: their times and memory cannot be compared")
    kept = [arm.name for arm in plan.arms if arm in tables.arms and _features_kept(plan, arm)]
    if kept:
        found.append(
            f"{listed(kept)}: the features of the images are computed once and kept on disk; a run that finds them "
            "there is faster than the first"
        )
    return found


def _features_kept(plan: Plan, arm: Arm) -> bool:
    from eyetune.train.features import can_compute_once

    config = plan.config(arm)
    return bool(config.data.cache) and can_compute_once(config.adapt.build(), config.train, config.augment)
