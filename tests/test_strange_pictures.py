"""The out-of-distribution score of a whole run: another camera, and pictures that are no fundus photographs."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

import eyetune as et
from eyetune.data.phantom import write_cohort
from eyetune.data.record import Record
from eyetune.metrics.strangeness import strangeness_scores


def no_eyes(folder: Path, size: int = 96) -> et.Manifest:
    """Noise, stripes, a gradient, words, a chequered disc, a white page with a frame."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    down, across = np.mgrid[:size, :size]
    disc = np.hypot(down - size / 2, across - size / 2) < size / 3
    pictures = {
        "noise": rng.integers(0, 256, (size, size, 3)),
        "stripes": 255 * (np.sin(across / 3) > 0),
        "gradient": 255 * across / size,
        "words": np.full((size, size), 255.0),
        "disc": 255 * disc * ((down // 8 + across // 8) % 2),
        "frame": np.where((np.minimum(down, across) < 10) | (np.maximum(down, across) > size - 10), 40, 250),
    }
    records = []
    for name, picture in pictures.items():
        whole = picture if picture.ndim == 3 else np.repeat(picture[..., None], 3, axis=2)
        canvas = np.ascontiguousarray(whole, dtype=np.uint8)
        if name == "words":
            for line in range(20, size, 20):
                cv2.putText(canvas, "no eye", (2, line), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (0, 0, 0), 1)
        path = folder / f"{name}.png"
        cv2.imwrite(str(path), canvas)
        records.append(Record(image=path, label=None, name=path.name, row=name))
    return et.Manifest(tuple(records), ("0", "1", "2", "3", "4"), "pictures")


@pytest.mark.slow
def test_another_camera_and_no_eyes_are_told(tmp_path: Path) -> None:
    """Few photographs of the run's own camera are flagged, many of another's, and every picture that is no eye."""
    cohorts = (("home", "clinic", 60, 1), ("own", "clinic", 20, 101), ("other", "handheld", 20, 201))
    for name, camera, patients, first in cohorts:
        write_cohort(tmp_path / name, patients=patients, first_patient=first, size=96, cameras=(camera,))
    config = {
        "model": {"backbone": "nano", "pixels": 96},
        "data": {"table": str(tmp_path / "home/labels.csv"), "label_column": "dr_grade", "val": 0.25, "test": 0.05},
        "adapt": {"kind": "linear"},
        "train": {"epochs": 1, "batch_size": 16, "tensorboard": False},
        "augment": "none",
        "workers": 0,
        "precision": "fp32",
        "out": str(tmp_path / "run"),
    }
    run = et.finetune(et.Config.parse(config))
    assert run.calibration is not None
    rule = run.calibration.ood
    assert rule is not None
    val = et.Predictions.from_csv(run.folder.predictions_file("val"))
    found = {}
    for name in ("own", "other"):
        manifest = et.Manifest.from_csv(tmp_path / name / "labels.csv", label_column="dr_grade", classes=run.classes)
        found[name] = strangeness_scores(rule, run.predictions(manifest), val, resamples=100)
    assert found["own"]["share_above"] < 0.2
    assert found["own"]["auroc_against_val"]["value"] < 0.7
    assert found["other"]["auroc_against_val"]["value"] > 0.85
    assert found["other"]["auroc_against_val"]["ci"][0] > found["own"]["auroc_against_val"]["value"]
    strange = run.predictions(no_eyes(tmp_path / "none"))
    assert strange.ood is not None
    assert rule.flagged(strange.ood).all()
    assert strangeness_scores(rule, strange, val, resamples=20)["share_above"] == 1.0  # labels are not needed
