"""Every task from a table to a scored run folder, a report, and back; or one clear message."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import eyetune as et
from eyetune.cli import main
from eyetune.data.phantom import write_cohort
from eyetune.errors import ConfigError
from eyetune.metrics.predictions import LabelPredictions, Predictions, ValuePredictions, read_table
from eyetune.metrics.scores import score
from eyetune.train.answers import Ranked
from eyetune.train.results import headline
from eyetune.train.task import SupervisedTask

TASKS: dict[str, dict[str, Any]] = {
    "corn": {"label_column": "dr_grade", "task": {"head": "corn"}},
    "coral": {"label_column": "dr_grade", "task": {"head": "coral"}},
    "regression": {"label_column": "dr_grade", "task": {"head": "regression"}},
    "words": {"label_column": "word", "task": {"kind": "ordinal"}, "classes": ["fine", "worse", "worst"]},
    "labels": {"label_column": ["glaucoma", "referable"], "task": {}},
    # Nine patients for validation at least: fewer have no prediction interval.
    "number": {"label_column": "vcdr", "val": 0.45, "task": {"kind": "regression"}},
}
EVERY = (
    "labels",
    *(pytest.param(one, marks=pytest.mark.slow) for one in ("number", "regression", "corn", "coral", "words")),
)
TABLES = {"labels": LabelPredictions, "number": ValuePredictions}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn eyes of one camera, with a column of words and one of labels with gaps."""
    folder = tmp_path_factory.mktemp("tasks") / "eyes"
    write_cohort(folder, patients=24, size=64, seed=3)
    with open(folder / "labels.csv", encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    for number, row in enumerate(rows):
        grade = int(row["dr_grade"])
        row["word"] = ("fine", "worse", "worst")[(grade > 0) + (grade > 2)]
        row["referable"] = "" if number % 7 == 0 else str(int(grade >= 2))
    with open(folder / "more.csv", "w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, [*rows[0]])
        writer.writeheader()
        writer.writerows(rows)
    return folder


def config(cohort: Path, out: Path, name: str, **changes: Any) -> et.Config:
    asked = dict(TASKS[name])
    task = asked.pop("task")
    content = {
        "model": {"backbone": "nano", "weights": "random", "pixels": 64},
        "data": {"table": str(cohort / "more.csv"), "images": str(cohort / "images"), **asked},
        "task": task,
        "adapt": {"kind": "linear"},
        "train": {"epochs": 2, "batch_size": 16, "warmup_epochs": 0, "lr": 0.01, "tensorboard": False},
        "augment": "none",
        "workers": 0,
        "precision": "fp32",
        "seed": 5,
        "out": str(out),
    }
    return et.Config.parse(content | changes)


@pytest.fixture(scope="module", params=EVERY)
def trained(
    request: pytest.FixtureRequest, cohort: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, et.Run]:
    name = request.param
    return name, et.finetune(config(cohort, tmp_path_factory.mktemp(name) / "run", name))


def test_predictions_and_scores_are_of_the_task(trained: tuple[str, et.Run]) -> None:
    name, run = trained
    table = read_table(run.folder.predictions_file("test"))
    assert isinstance(table, TABLES.get(name, Predictions))
    found = run.folder.read_metrics()["datasets"]["test"]
    kept = run.folder.read_predictions("test")
    assert kept is not None
    expected = score(kept, resamples=0)
    assert found["task"] == expected["task"]
    for metric, entry in expected["metrics"].items():
        assert found["metrics"][metric]["value"] == entry["value"], metric
    primary = found["metrics"][str(run.card.metric)]
    assert run.card.metric == {"labels": "auroc_macro", "number": "mae"}.get(name, "qwk")
    assert primary["ci"][0] <= primary["value"] <= primary["ci"][1]
    assert found["intervals"]["unit"] == "patient"
    trusted = found["per_label"]["referable"] if name == "labels" else found
    assert ("calibrated_metrics" in trusted) == (name != "number")
    assert ("prediction_interval" in found) == (name == "number")
    assert found["ood"]["n"] == len(kept)
    assert found["patient_level"]["metrics"][str(run.card.metric)]["ci"][0] is not None
    page = (run.folder.path / "report.html").read_text(encoding="utf-8")
    assert "Out of distribution" in page
    assert "By patient" in page
    assert ("Prediction interval made" in page) == (name == "number")
    assert ("furthest from the label" if name == "number" else "before and after calibration") in page
    card = run.folder.card_file.read_text(encoding="utf-8")
    assert ("pipeline_tag: image-classification" in card) == (name != "number")
    assert ("prediction interval of 90 %: the number predicted ±" in card) == (name == "number")
    assert "the most probable class is called" not in card or name not in TABLES
    low = found["metrics"]["r2"]["ci"][0] if name == "number" else 1
    assert ("than always saying the mean (R²)" in page) == (low <= 0)
    assert page.count("<figure><img") >= 1, "the mistakes are shown as pictures"


def test_a_run_read_again_says_the_same(trained: tuple[str, et.Run], cohort: Path) -> None:
    name, run = trained
    table = read_table(run.folder.predictions_file("test"))
    paths = [cohort / "images" / image for image in table.images[:5]]
    again = et.load_run(run.folder.path).predict(paths)
    expected = table.predicted if isinstance(table, ValuePredictions) else table.probabilities
    np.testing.assert_allclose(again, expected[:5], atol=1e-5)
    if name == "regression":
        answer = et.load_run(run.folder.path).answer
        assert isinstance(answer, Ranked)
        assert answer.thresholds is not None
        assert answer.mean != 0


def test_evaluate_scores_another_table_by_column_and_says_what_is_lost(
    trained: tuple[str, et.Run], cohort: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, run = trained
    words = ["evaluate", str(run.folder.path), "--data", f"again={cohort / 'more.csv'}:{cohort / 'images'}"]
    words += ["--by", "camera", "--workers", "0"]
    words += [] if name in TABLES else ["--map", "again=as-is"]
    assert main(words) == 0
    assert "lost on again" in capsys.readouterr().out
    content = run.folder.read_metrics()
    found = content["datasets"]["again"]
    assert found["n"] == len(read_table(run.folder.predictions_file("again")).labelled())
    assert set(found["subgroups"]["camera"]["groups"]) >= {"clinic"}
    assert str(run.card.metric) in content["generalization"]["external"]["again"]
    assert any("train" in warning for warning in found["warnings"]), "these were trained on"


def test_a_site_cannot_join_classes_and_an_unknown_column_is_told(
    trained: tuple[str, et.Run], cohort: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, run = trained
    folder, table = str(run.folder.path), f"clinic={cohort / 'more.csv'}:{cohort / 'images'}"
    if name not in (*TABLES, "words"):  # any-dr is of the five grades
        assert main(["calibrate", folder, "--data", table, "--map", "clinic=any-dr"]) == 2
        assert "it joins classes of the run" in capsys.readouterr().err
        assert run.folder.calibrations() == {}
    assert main(["evaluate", folder, "--by", "camra"]) == 2
    said = capsys.readouterr().err
    assert "which the run was trained with. Did you mean 'camera'?" in said
    assert all(column in said.partition("There are: ")[2] for column in ("camera", "caption", "eye"))


def test_the_order_that_only_the_configuration_knows_decides_the_shown_metric() -> None:
    rng = np.random.default_rng(0)
    names, nobody = [str(n) for n in range(30)], [None] * 30
    table = Predictions(names, nobody, nobody, rng.integers(0, 3, 30), rng.normal(size=(30, 3)), ("a", "b", "c"))
    assert headline(score(table, resamples=0))[0] == "f1_macro"
    assert headline(score(replace(table, ordered=True), resamples=0))[0] == "qwk"


def test_predict_and_embed_know_the_task(trained: tuple[str, et.Run], cohort: Path, tmp_path: Path) -> None:
    name, run = trained
    assert main(["predict", str(run.folder.path), str(cohort / "more.csv"), "--images", str(cohort / "images"),
                 "--out", str(tmp_path / "p.csv"), "--workers", "0"]) == 0  # fmt: skip
    with open(tmp_path / "p.csv", encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    table = read_table(run.folder.predictions_file("test"))
    by_image = {row["image"]: row for row in rows}
    assert {"ood", "out_of_distribution"} <= set(rows[0])
    if name == "number":
        half = run.folder.read_calibration().interval.half_width  # type: ignore[union-attr]
        first = {column: float(rows[0][column]) for column in ("low", "predicted", "high")}
        assert first["high"] - first["predicted"] == pytest.approx(half)
        assert first["predicted"] - first["low"] == pytest.approx(half)
    if name == "labels":
        calibration = run.folder.read_calibration()
        calibrated = calibration.apply(read_table(run.folder.predictions_file("test")))  # type: ignore[union-attr]
        for place, image in enumerate(calibrated.images[:5]):
            shares = dict(zip(calibrated.labels, calibrated.probabilities[place], strict=True))
            for label, share in shares.items():
                row = by_image[image]
                assert float(row[f"prob_{label}"]) == pytest.approx(share, abs=1e-4)
                point = calibration.labels[label].point(label, "specificity")  # type: ignore[union-attr]
                assert (f"positive_{label}" in row) == (point is not None)
                if point is not None and abs(share - point.threshold) > 1e-4:
                    assert row[f"positive_{label}"] == ("yes" if share >= point.threshold else "no")
    for place, image in enumerate(table.images[:5]):
        for column, cell in table.said(place).items():
            said = {"yes": "1", "no": "0"}.get(by_image[image][column], by_image[image][column])
            assert float(said) == pytest.approx(float(cell), abs=1e-4) if name in TABLES else said == cell
    assert main(["embed", str(run.folder.path), "--out", str(tmp_path / "f.safetensors"), "--workers", "0"]) == 0
    with open(tmp_path / "f.csv", encoding="utf-8", newline="") as stream:
        header = next(csv.reader(stream))
    truth = {"labels": ["target_glaucoma", "target_referable"], "number": ["target"]}.get(name, ["label"])
    assert header == ["image", *truth, "patient", "eye", "split"]


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("name", ["regression", "labels", "number"])
def test_a_resumed_run_ends_as_the_whole_one(name: str, cohort: Path, tmp_path: Path) -> None:
    whole = et.finetune(config(cohort, tmp_path / "whole", name))
    asked = config(cohort, tmp_path / "parts", name)
    calls, original = [], SupervisedTask.validate

    def stop(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SupervisedTask, "validate", stop)
        with pytest.raises(KeyboardInterrupt):
            et.finetune(asked)
    assert len(calls) == 2, "the first epoch is kept, the second is trained again"
    assert main(["finetune", "--resume", str(tmp_path / "parts")]) == 0
    resumed = et.load_run(tmp_path / "parts")
    assert resumed.card.task == whole.card.task
    first, second = (run.folder.predictions_file("test").read_text() for run in (whole, resumed))
    assert first == second


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("name", ["coral", "labels"])
def test_lora_keeps_the_head(name: str, cohort: Path, tmp_path: Path) -> None:
    run = et.finetune(config(cohort, tmp_path / "run", name, adapt={"kind": "lora"}))
    table = read_table(run.folder.predictions_file("test"))
    again = et.load_run(run.folder.path).predict([cohort / "images" / image for image in table.images[:3]])
    np.testing.assert_allclose(again, table.probabilities[:3], atol=1e-5)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"task": {"kind": "multilabel"}}, ["data.label_column", "list"]),
        ({"task": {"kind": "regression", "head": "corn"}}, ["task", "ordered classes"]),
        ({"task": {"kind": "regression"}, "train": {"balance": "weighted"}}, ["train.balance", "regression"]),
        ({"task": {"head": "coral"}, "train": {"balance": "focal"}}, ["train.balance", "focal", "coral"]),
        ({"task": {"head": "regression"}, "train": {"label_smoothing": 0.1}}, ["train.label_smoothing"]),
        ({"data": {"label_column": ["a", "b"]}, "task": {"kind": "ordinal"}}, ["data.label_column", "multilabel"]),
        ({"data": {"label_column": ["a", "b"], "classes": ["x", "y"]}}, ["data.classes", "multilabel"]),
        ({"data": {"label_column": ["a", "b"]}, "train": {"balance": "sampler"}}, ["train.balance", "several labels"]),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_what_does_not_go_together_is_said_at_once(changes: dict[str, Any], words: list[str]) -> None:
    content: dict[str, Any] = {"data": {"table": "t.csv"}}
    for section, fields in changes.items():
        content[section] = content.get(section, {}) | fields
    with pytest.raises(ConfigError) as caught:
        et.Config.parse(content, check_files=False)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("name", ["labels", "number"])
def test_check_data_counts_as_unknown_only_what_is(name: str, cohort: Path, tmp_path: Path) -> None:
    from eyetune.checks.data import splits
    from eyetune.data.records import open_manifest
    from eyetune.data.splits import split
    from eyetune.findings import Status

    asked = config(cohort, tmp_path / "run", name)
    manifest = split(open_manifest(asked.data, kind=asked.reads), 0.2, 0.2, 0)
    said = splits(manifest)
    assert said.status is not Status.FAIL
    assert "no label" not in said.why
    first = next(place for place, record in enumerate(manifest) if record.split == "train")
    bare = [replace(one, values=(None,) * len(one.values)) if n == first else one for n, one in enumerate(manifest)]
    lacking = splits(manifest.with_records(bare))
    assert lacking.status is Status.FAIL
    assert "1 of " in lacking.why


def test_regression_heads_need_validation(cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = config(cohort, tmp_path / "run", "regression").model_copy(deep=True)
    data = asked.data.model_copy(update={"split_column": "none", "val": 0.0})
    with pytest.raises(ConfigError, match="thresholds between the grades on validation"):
        et.finetune(asked.model_copy(update={"data": data}))


@pytest.mark.slow
def test_verbs_that_cannot_say_so(cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(et.finetune(config(cohort, tmp_path / "run", "number")).folder.path)
    table = f"again={cohort / 'more.csv'}:{cohort / 'images'}"
    for words, said in (
        (["evaluate", run, "--data", table, "--map", "again=as-is"], ["--map again", "a number"]),
        (["calibrate", run, "--data", table], ["regression", "one class an image", "calibration.json"]),
    ):
        capsys.readouterr()
        assert main(words) == 2
        err = capsys.readouterr().err
        assert all(word in err for word in said), err
        assert "Traceback" not in err


@pytest.mark.slow
def test_labels_of_another_table_may_be_fewer(cohort: Path, tmp_path: Path) -> None:
    run = et.finetune(config(cohort, tmp_path / "run", "labels"))
    table = f"again={cohort / 'labels.csv'}:{cohort / 'images'}"
    assert main(["evaluate", str(run.folder.path), "--data", table, "--workers", "0"]) == 0
    found = run.folder.read_metrics()["datasets"]["again"]
    assert found["per_label"]["referable"]["n"] == 0
    page = (run.folder.path / "report.html").read_text(encoding="utf-8")
    assert "again: of no photograph is “referable” known." in page
    assert found["per_label"]["glaucoma"]["n"] > 0
    assert "referable" in found["metrics"]["auroc_macro"]["note"]
    assert not math.isnan(found["metrics"]["auroc_macro"]["value"])
