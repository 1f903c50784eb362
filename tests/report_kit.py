"""A run folder made by hand: everything a report shows, without training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data_kit import fundus, save
from train_kit import card

from eyetune.config import Config
from eyetune.data.fundus import FundusSettings
from eyetune.files import write_json, write_text
from eyetune.metrics.predictions import Predictions
from eyetune.metrics.scores import generalization, primary_metric, score
from eyetune.train.checkpoints import MODEL
from eyetune.train.rundir import RunDir
from eyetune.train.sealed import seal

GRADES = ("0", "1", "2", "3", "4")
NUMBERS = {"test": 60, "handheld": 40, "val": 30}


def predictions(
    count: int,
    classes: Sequence[str] = GRADES,
    *,
    skill: float = 2.0,
    seed: int = 0,
    prefix: str = "eye",
    patients: bool = True,
) -> Predictions:
    """A table of `count` images, two a patient, right more often the higher the skill."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, len(classes), count)
    logits = rng.normal(size=(count, len(classes)))
    logits[np.arange(count), targets] += skill
    return Predictions(
        images=[f"{prefix}{n}.png" for n in range(count)],
        patients=[f"{prefix}P{n // 2}" if patients else None for n in range(count)],
        eyes=["left" if n % 2 else "right" for n in range(count)],
        targets=targets,
        logits=logits,
        classes=classes,
    )


def run_folder(
    path: Path,
    *,
    classes: Sequence[str] = GRADES,
    tables: Mapping[str, Predictions] | None = None,
    pictures: bool = True,
    extras: Mapping[str, Mapping[str, Any]] | None = None,
    resamples: int = 20,
) -> RunDir:
    """A finished run at `path`: predictions, scores, splits, history, a sealed best checkpoint, a few photographs.

    Args:
        path: the run folder; photographs lie in `photos` beside it.
        classes: of the run.
        tables: dataset -> predictions; None = a test split, a validation split and "handheld".
        pictures: keep photographs of the mistakes.
        extras: dataset -> keys added to its part of metrics.json.
        resamples: of the intervals.
    """
    from eyetune.report.mistakes import shown

    folder = RunDir.create(path)
    if tables is None:
        tables = {
            name: predictions(count, classes, seed=number, prefix=name, skill=1.0 if name == "handheld" else 2.5)
            for number, (name, count) in enumerate(NUMBERS.items())
        }
    config = {"data": {"table": str(path.parent / "labels.csv"), "cache": False}, "out": str(path)}
    folder.write_config(Config.parse(config, check_files=False))
    folder.write_environment({"command": "eyetune finetune --out runs/<x>", "commit": "c0ffee", "versions": {"a": "1"}})
    folder.write_load_report({"sha256": "ab" * 32, "counts": {"loaded": 78, "dropped": 0}})
    folder.write_history(
        [
            {"epoch": n + 1, "train_loss": 1 / (n + 1), "val_loss": 1.2 / (n + 1), "val_qwk": 0.2 * n, "seconds": 2.5}
            for n in range(4)
        ]
    )
    scores = {name: score(table, resamples=resamples) for name, table in tables.items()}
    for name, added in (extras or {}).items():
        scores[name] |= added
    content: dict[str, Any] = {"datasets": scores}
    if "test" in scores and "handheld" in scores:
        content["generalization"] = generalization("test", scores, ["handheld"])
    folder.write_metrics(content)
    for name, table in tables.items():
        folder.write_predictions(name, table)
    _splits(folder, tables)
    made = card(
        classes=tuple(classes),
        backbone="nano",
        weights=None,
        metric=primary_metric(classes),
        epoch=2,
        value=0.5,
        fundus=FundusSettings(pixels=48).to_dict(),
    )
    seal(folder.best, {MODEL: {"weight": torch.zeros(1)}}, {}, made.to_dict())
    folder.update_data(
        source="labels.csv",
        rows=210,
        left_out=[{"why": "cannot be read", "images": 3}],
        images=207,
        notes=[],
        identical={"groups": 0, "across_splits": [], "other_labels": []},
    )
    if pictures:
        folder.update_data(pictures={name: _photographs(path.parent, name, shown(tables[name])) for name in tables})
    return folder


def _splits(folder: RunDir, tables: Mapping[str, Predictions]) -> None:
    rows = ["image,split,patient,eye,target"]
    for name in ("val", "test"):
        if name in tables:
            table = tables[name]
            rows += [
                f'"{image}",{name},{patient or ""},left,"{table.classes[target]}"'
                for image, patient, target in zip(table.images, table.patients, table.targets, strict=True)
            ]
    rows += [f"train{n}.png,train,T{n // 2},left,{n % 5}" for n in range(100)]
    write_text(folder.splits_file, "\n".join(rows) + "\n")


def _photographs(folder: Path, dataset: str, cases: Sequence[Any]) -> dict[str, str]:
    places = {}
    for number, case in enumerate(cases):
        path = save(folder / "photos" / f"{dataset}{number}.png", fundus(60, 60, radius=26, seed=number))
        places[case.image] = str(path)
    return places


#: Keys of metrics.json that come from calibration, subgroups and the like, in the shapes that were agreed on.
EVERYTHING: dict[str, Any] = {
    "calibrated_metrics": {
        "ece": {"value": 0.05, "ci": [0.03, 0.09]},
        "ece_equal_mass": {"value": 0.06, "ci": [0.03, 0.1]},
    },
    "reliability": {
        "before": [
            {"low": 0.4, "high": 0.6, "n": 20, "confidence": 0.5, "accuracy": 0.8},
            {"low": 0.6, "high": 0.8, "n": 0, "confidence": None, "accuracy": None},
            {"low": 0.8, "high": 1.0, "n": 40, "confidence": 0.9, "accuracy": 0.95},
        ],
        "after": [{"low": 0.8, "high": 1.0, "n": 60, "confidence": 0.9, "accuracy": 0.91}],
        "by_chance_before": {"ece": 0.071, "ece_equal_mass": 0.1},
        "by_chance_after": {"ece": 0.072, "ece_equal_mass": 0.1},
    },
    "operating_points": [
        {
            "name": "95 % specificity",
            "positive": "grade >= 2",
            "threshold": 0.41,
            "chosen_on": "val",
            "target": {"specificity": 0.95},
            "sensitivity": {"value": 0.81, "ci": [0.7, 0.9]},
            "specificity": {"value": 0.93, "ci": [0.85, 0.98]},
            "ppv": {"value": 0.9, "ci": [0.8, 0.96]},
            "npv": {"value": None, "ci": [None, None], "reason": "nothing was called negative"},
        }
    ],
    "selective": {
        "aurc": {"value": 0.12, "ci": [0.08, 0.2]},
        "aurc_of_chance": {"value": 0.3, "ci": [0.25, 0.35]},
        "curve": [{"coverage": 0.1, "risk": 0.0}, {"coverage": 0.5, "risk": 0.1}, {"coverage": 1.0, "risk": 0.3}],
    },
    "conformal": {
        "level": 0.9,
        "marginal": {
            "coverage": {"value": 0.7, "ci": [0.6, 0.8]},
            "mean_size": 1.8,
            "by_class": {"0": {"value": 0.9, "ci": [0.8, 1.0]}},
        },
        "by_class": {"coverage": {"value": 0.92, "ci": [0.85, 0.97]}, "mean_size": 2.4, "by_class": {}},
    },
    "ood": {
        "score": "mahalanobis",
        "threshold": 31.5,
        "share_above": 0.4,
        "auroc_against_val": {"value": 0.83, "ci": [0.75, 0.9]},
        "quantiles": [1.0, 2.0],
    },
    "subgroups": {
        "sex": {
            "groups": {
                "F": {"n": 30, "patients": 15, "metrics": {"accuracy": {"value": 0.9, "ci": [0.8, 0.97]}}},
                "?": {"n": 1, "patients": 1, "metrics": {}, "too_small": "1 patient"},
                "M": {"n": 30, "patients": 15, "metrics": {"accuracy": {"value": 0.6, "ci": [0.5, 0.7]}}},
            },
            "gap": {"accuracy": {"value": 0.3, "ci": [0.1, 0.5], "between": ["F", "M"]}},
        }
    },
    "patient_level": {"n": 30, "rule": "the worse eye", "metrics": {"qwk": {"value": 0.8, "ci": [0.7, 0.9]}}},
    "label_map": {"none": "0", "severe": "3", "glaucoma": None},
    "left_out": [{"why": "left out by the label map", "images": 15}],
    "warnings": [
        "2 of its 60 photographs were among those the run was trained or chosen on (the very same bytes: test4.png, "
        "gone.png). Its scores come out too good; leave them out."
    ],
}


def comparison_folder(path: Path) -> Path:
    """The folder of a comparison of two strategies, one of whose runs has a report and one of which failed."""

    def arm(name: str, value: float, trained: int, moved: float) -> dict[str, Any]:
        score = {"value": value, "ci": [value - 0.05, value + 0.05], "sd": None, "by_seed": {"0": value}}
        return {
            "name": name,
            "strategy": name,
            "kind": name,
            "backbone": "nano",
            "weights": None,
            "settings": {"lr": 0.001, "epochs": 3, "batch": 8, "adapt": {}},
            "cells": [f"{name}-seed0"],
            "seeds": [0],
            "scores": {"val": {"qwk": score}, "test": {"qwk": score}},
            "cost": {
                "trainable_parameters": trained,
                "parameters": 2_893_061,
                "seconds": 61.4,
                "peak_memory": 3 * 2**30,
                "memory_of": "cpu",
                "epochs": 3,
            },
            "drift": {"split": "test", "images": 60, "cka": 0.9, "cka_debiased": 0.81, "cosine_distance": moved},
        }

    def cell(name: str, status: str, error: str | None = None) -> dict[str, Any]:
        return {"name": name, "folder": name, "arm": name[:-6], "seed": 0, "status": status, "error": error}

    pair = {"first": "lora", "second": "linear", "seeds": [0], "same_direction": 1, "reason": None}
    content = {
        "schema": 1,
        "eyetune": "0.1.0",
        "status": "failed",
        "command": "eyetune compare c.yaml",
        "budget": {"kind": "epochs", "text": "3 epochs each"},
        "seeds": [0],
        "split": {"seed": 0, "test": {"images": 60, "patients": 30}},
        "datasets": ["val", "test"],
        "external": {},
        "classes": list(GRADES),
        "primary": {"metric": "qwk", "higher_is_better": True, "dataset": "test", "why": "fixed before training"},
        "metrics": ["qwk"],
        "arms": [arm("lora", 0.8, 37_829, 0.2), arm("linear", 0.7, 965, 0.0)],
        "cells": [cell("lora-seed0", "finished"), cell("linear-seed0", "failed", "it broke <b>badly</b>")],
        "tests": [
            {
                "metric": "qwk",
                "primary": True,
                "dataset": "test",
                "method": "patient-level permutation",
                "unit": "patient",
                "clusters": 30,
                "images": 60,
                "pairs": [pair | {"difference": 0.1, "ci": [-0.01, 0.21], "p": 0.04, "p_holm": 0.04, "differs": True}],
            }
        ],
        "sentences": ["lora has a higher QWK than linear: 0.800 against 0.700."],
        "warnings": ["one run failed"],
        "files": {},
    }
    path.mkdir(parents=True)
    write_json(path / "comparison.json", content)
    write_text(path / "lora-seed0" / "report.html", "the report of a run")
    return path
