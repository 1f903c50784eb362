"""From a table to a scored run folder and back, through every strategy, on a small cohort of drawn eyes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import eyetune as et
from eyetune.cli import main
from eyetune.data.loader import make_loader
from eyetune.data.phantom import write_cohort
from eyetune.errors import RunError
from eyetune.train.rundir import RunDir

STRATEGIES = (
    "linear",
    pytest.param("gradual", marks=pytest.mark.slow),
    pytest.param("full", marks=pytest.mark.slow),
    pytest.param("lora", marks=pytest.mark.slow),
)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cohort") / "eyes"
    write_cohort(folder, patients=24, size=64, seed=3)
    return folder


def config(cohort: Path, out: Path, kind: str, **train: Any) -> dict[str, Any]:
    return {
        "model": {"backbone": "nano", "weights": "random", "pixels": 64},
        "data": {"table": str(cohort / "labels.csv"), "label_column": "dr_grade", "val": 0.2, "test": 0.2},
        "adapt": {"kind": kind},
        "train": {"epochs": 2, "batch_size": 8, "warmup_epochs": 0, **train},
        "augment": "none" if kind == "linear" else "light",
        "workers": 0,
        "precision": "fp32",
        "seed": 5,
        "out": str(out),
    }


@pytest.fixture(scope="module", params=STRATEGIES)
def run(request: pytest.FixtureRequest, cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> et.Run:
    return et.finetune(et.Config.parse(config(cohort, tmp_path_factory.mktemp(request.param) / "run", request.param)))


def test_the_run_folder_is_the_contracts(run: et.Run) -> None:
    folder = run.folder.path
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    expected = {"config.yaml", "environment.json", "splits.csv", "history.csv", "metrics.json"}
    expected |= {
        f"checkpoints/{one}/{name}" for one in ("best", "last") for name in ("model.safetensors", "model.json")
    }
    expected |= {"predictions/val.csv", "predictions/test.csv", "plots/learning_curves.png", "load_report.json"}
    expected |= {"plots/confusion_matrix_test.png", "plots/roc_test.png"}
    assert expected <= names
    assert any(name.startswith("tensorboard/") for name in names)
    assert (("adapter/adapter_model.safetensors") in names) == (run.card.adapt["kind"] == "lora")
    assert not [name for name in names if "/." in f"/{name}"], "temporary files were left behind"
    metrics = json.loads((folder / "metrics.json").read_text())["datasets"]
    assert set(metrics) == {"val", "test"}
    assert {"n", "patients", "classes", "metrics", "per_class", "confusion_matrix"} <= set(metrics["test"])
    assert metrics["test"]["metrics"]["qwk"].keys() >= {"value", "ci"}


def test_the_run_is_calibrated_on_validation(run: et.Run) -> None:
    calibration = et.load_run(run.folder.path).calibration
    assert calibration is not None
    assert calibration == run.calibration
    val = et.Predictions.from_csv(run.folder.predictions_file("val"))
    assert (calibration.fitted_on.dataset, calibration.fitted_on.n) == ("val", len(val))
    assert calibration.model == run.folder.best_model()


def test_how_unlike_training_an_image_is_comes_with_its_prediction(run: et.Run, cohort: Path) -> None:
    """The score of the table is that of the features computed apart; a damaged file is refused."""
    again = et.load_run(run.folder.path, precision="fp32")
    assert again.calibration is not None
    assert again.calibration.ood is not None
    val = et.Predictions.from_csv(run.folder.predictions_file("val"))
    assert val.ood is not None
    assert again.calibration.ood.flagged(val.ood).mean() <= 0.05
    test = et.Predictions.from_csv(run.folder.predictions_file("test"))
    manifest = et.Manifest.from_csv(cohort / "labels.csv", label_column="dr_grade", classes=run.classes)
    by_name = {record.name: record for record in manifest}
    few = manifest.with_records(by_name[name] for name in test.images[:5])
    batch = next(iter(make_loader(few, again.model.backbone.preprocess, again.settings, batch_size=5, training=False)))
    with torch.no_grad():
        features = again.model.backbone.features(again.runtime.to_device(batch["image"]))
    assert test.ood is not None
    assert again.ood(features) == pytest.approx(test.ood[:5], rel=1e-3)
    found = json.loads((run.folder.path / "metrics.json").read_text())["datasets"]
    assert {"share_above", "auroc_against_val", "threshold", "quantiles"} <= set(found["test"]["ood"])
    file = run.folder.path / "calibration.safetensors"
    whole = file.read_bytes()
    try:
        file.write_bytes(whole[:-4] + b"\0\0\0\0")
        with pytest.raises(RunError, match="finetune --resume"):
            _ = et.load_run(run.folder.path).novelty
    finally:
        file.write_bytes(whole)


def test_patients_stay_together(run: et.Run) -> None:
    lines = (run.folder.path / "splits.csv").read_text().splitlines()[1:]
    where: dict[str, set[str]] = {}
    for _, split, patient, *_ in (line.split(",") for line in lines):
        where.setdefault(patient, set()).add(split)
    assert len(where) == 24
    assert all(len(splits) == 1 for splits in where.values())


def test_a_run_read_back_predicts_the_same(run: et.Run, cohort: Path) -> None:
    before = et.Predictions.from_csv(run.folder.predictions_file("test"))
    again = et.load_run(run.folder.path, precision="fp32")
    paths = [cohort / "images" / name for name in before.images]
    np.testing.assert_allclose(again.predict(paths), before.probabilities, atol=1e-6)


@pytest.mark.slow
def test_the_configuration_in_the_folder_runs_again(run: et.Run, cohort: Path, tmp_path: Path) -> None:
    kind = run.card.adapt["kind"]
    asked = et.Config.parse(config(cohort, run.folder.path, kind))
    assert et.Config.from_yaml(run.folder.path / "config.yaml") == asked
    if kind != "lora":
        return
    again = et.finetune(et.Config.from_yaml(run.folder.path / "config.yaml", {"out": str(tmp_path / "again")}))
    first = et.Predictions.from_csv(run.folder.predictions_file("test"))
    second = et.Predictions.from_csv(again.folder.predictions_file("test"))
    np.testing.assert_array_equal(first.logits, second.logits)


def test_evaluate_adds_a_dataset_and_the_gap(run: et.Run, cohort: Path) -> None:
    manifest = et.Manifest.from_csv(cohort / "labels.csv", label_column="dr_grade", classes=run.classes)
    scores = et.evaluate(run, {"everyone": manifest}, workers=0)
    inside = scores["datasets"]["test"]["metrics"]["accuracy"]["value"]
    outside = scores["datasets"]["everyone"]["metrics"]["accuracy"]["value"]
    gap = scores["generalization"]["external"]["everyone"]["accuracy"]["value"]
    assert gap == pytest.approx(inside - outside)
    assert json.loads((run.folder.path / "metrics.json").read_text()) == scores


def test_predict_gives_a_row_for_every_file(
    run: et.Run, cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    out = tmp_path / "rows.csv"
    words = [str(cohort / "images"), str(cohort / "labels.csv"), str(tmp_path / "broken.jpg")]
    assert main(["predict", str(run.folder.path), *words, "--out", str(out), "--workers", "0"]) == 0
    rows = out.read_text().splitlines()
    assert len(rows) == 1 + 48 + 48 + 1
    assert "broken.jpg" in rows[-1]
    assert "1 refused" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_line_runs_a_yaml_with_flags(cohort: Path, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config(cohort, tmp_path / "run", "lora")))
    assert main(["finetune", str(file), "--adapt.r", "2", "--train.epochs", "1"]) == 0
    resolved = et.Config.from_yaml(tmp_path / "run" / "config.yaml")
    assert resolved.train.epochs == 1
    assert resolved.adapt.model_dump()["r"] == 2


@pytest.mark.slow
def test_a_finished_run_is_only_scored_again(run: et.Run, capsys: pytest.CaptureFixture[str]) -> None:
    weights = (run.folder.best / "model.safetensors").read_bytes()
    calibrated = run.folder.calibration_file().read_text()
    run.folder.calibration_file().write_text("damaged")  # it is fitted anew, as in a run that has none yet
    assert main(["finetune", "--resume", str(run.folder.path)]) == 0
    assert run.folder.calibration_file().read_text() == calibrated
    assert (run.folder.best / "model.safetensors").read_bytes() == weights


@pytest.mark.slow
def test_stopped_before_training_the_data_is_described_all_the_same(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill between the files that are written before training must not leave a run that counts as begun."""
    settings = et.Config.parse(config(cohort, tmp_path / "run", "linear", epochs=1))
    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "update_data", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            et.finetune(settings)
    assert main(["finetune", "--resume", str(tmp_path / "run")]) == 0
    assert et.load_run(tmp_path / "run").folder.read_data()["rows"] == 48


@pytest.mark.slow
def test_linear_features_are_computed_once(cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from eyetune.backbones import Backbone

    seen = []
    real = Backbone.features
    monkeypatch.setattr(Backbone, "features", lambda self, images: seen.append(len(images)) or real(self, images))
    et.finetune(et.Config.parse(config(cohort, tmp_path / "run", "linear", epochs=6, patience=0)))
    training = 48
    assert sum(seen) <= 1.3 * training, "each image once, and val and test once more for the scores"
