"""`eyetune compare` from a table to one table: two strategies, two seeds, drawn eyes, an untrained tiny network."""

from __future__ import annotations

import csv
import functools
import gc
import json
import os
import signal
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import eyetune as et
from eyetune.cli import main
from eyetune.comparison import results
from eyetune.comparison.words import heading, sentences
from eyetune.data.phantom import write_cohort
from eyetune.metrics import plots
from eyetune.metrics.predictions import read_table
from eyetune.report import page
from eyetune.train import results as run_results
from eyetune.train.run import Run
from eyetune.train.task import SupervisedTask

SETTINGS = """
data: {{table: {table}, label_column: dr_grade, val: 0.2, test: 0.3, cache: {cache}}}
model: {{backbone: test_vit, weights: random, pixels: 32}}
train: {{epochs: 2, batch_size: 8, warmup_epochs: 0, tensorboard: false}}
augment: none
workers: 0
precision: fp32
seed: 5
"""


@pytest.fixture(scope="module")
def few_resamples() -> Iterator[None]:
    """Intervals, the pictures, the report and the strangeness score of a run are tested elsewhere, and small networks
    may lie about for a while."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "collect", lambda *generation: 0)
        patch.setattr(Run, "fit_novelty", lambda *arguments, **more: None)
        patch.setattr(run_results, "_draw", lambda folder, name, table, found: None)
        patch.setattr(run_results, "trust", lambda table, calibration, val: {})
        patch.setattr(plots, "learning_curves", lambda *arguments, **more: None)
        patch.setattr(page, "write_report", lambda *arguments, **more: None)
        for name in ("score", "patient_level"):
            patch.setattr(run_results, name, functools.partial(getattr(run_results, name), resamples=10))
        patch.setattr(results, "resampled_means", functools.partial(results.resampled_means, resamples=50))
        yield


@pytest.fixture(scope="module")
def configuration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cohort")
    write_cohort(folder / "eyes", patients=24, size=64, seed=3)
    file = folder / "config.yaml"
    file.write_text(SETTINGS.format(table=folder / "eyes" / "labels.csv", cache=folder / "cache"), encoding="utf-8")
    return file


def run(configuration: Path, out: Path, *words: str) -> int:
    return main(["compare", str(configuration), "--out", str(out), *words])


@pytest.fixture(scope="module")
def compared(configuration: Path, few_resamples: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compared") / "out"
    table = configuration.parent / "eyes" / "labels.csv"
    words = ("--data", f"elsewhere={table}", "--data", f"joined={table}", "--map", "joined=any-dr")
    assert run(configuration, out, "--strategies", "linear,lora", "--seeds", "0,1", *words) == 0
    return out


def content(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / results.FILE).read_text(encoding="utf-8"))
    return found


def test_one_table_of_all_runs(compared: Path) -> None:
    found = content(compared)
    assert (found["status"], found["schema"], found["seeds"]) == ("finished", 1, [0, 1])
    assert found["datasets"] == ["val", "test", "elsewhere", "joined"]
    assert found["primary"]["metric"] == "qwk"
    assert [arm["name"] for arm in found["arms"]] == ["linear", "lora"]
    for arm in found["arms"]:
        runs = [json.loads((compared / name / "metrics.json").read_text())["datasets"] for name in arm["cells"]]
        for dataset in found["datasets"][:-1]:
            for metric in ("qwk", "auroc_macro", "referable_auroc"):
                entry = arm["scores"][dataset][metric]
                each = [one[dataset]["metrics"][metric]["value"] for one in runs]
                assert list(entry["by_seed"].values()) == pytest.approx(each, abs=1e-12)
                assert entry["value"] == pytest.approx(np.mean(each), abs=1e-12)
                assert entry["sd"] == pytest.approx(np.std(each, ddof=1), abs=1e-12)
        low, high = arm["scores"]["test"]["qwk"]["ci"]
        assert low <= high
    with open(compared / results.TABLE, encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [float(row["test_qwk"]) for row in rows] == [arm["scores"]["test"]["qwk"]["value"] for arm in found["arms"]]
    assert (compared / results.PICTURE).read_bytes().startswith(b"\x89PNG")


def test_joined_classes_are_scored_as_such_and_said(compared: Path) -> None:
    found = content(compared)
    assert found["maps"] == {"joined": "any-dr"}
    assert found["joined"] == {"joined": ["no DR", "any DR"]}
    (arm, _) = found["arms"]
    table = et.Predictions.from_csv(compared / arm["cells"][0] / "predictions" / "joined.csv")
    assert table.classes == ("no DR", "any DR")
    assert arm["scores"]["joined"]["referable_auroc"]["value"] is None
    expected = et.Predictions.from_csv(compared / arm["cells"][0] / "predictions" / "elsewhere.csv").targets > 0
    np.testing.assert_array_equal(table.targets, expected)
    assert any(warning.startswith("joined: classes were joined to no DR and any DR") for warning in found["warnings"])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--data", "other=nowhere.csv"), "nowhere.csv"),
        (("--data", "other={table}", "--map", "other=9:0"), "no meaning for the run"),
        (("--data", "other={table}", "--map", "other=0:no"), "no class of the run"),
    ],
)
def test_faults_outside_are_told_before_anything_is_trained(
    configuration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], said: str
) -> None:
    table = configuration.parent / "eyes" / "labels.csv"
    words = [word.format(table=table) for word in more]
    assert run(configuration, tmp_path / "out", "--strategies", "lora", *words) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_splits_are_the_same_and_the_trainings_are_not(compared: Path) -> None:
    cells = content(compared)["cells"]
    splits = {(compared / cell["folder"] / "splits.csv").read_text() for cell in cells}
    assert len(cells) == 4
    assert len(splits) == 1
    logits = [
        et.Predictions.from_csv(compared / c["folder"] / "predictions" / "test.csv").logits.tobytes() for c in cells
    ]
    assert len(set(logits)) == 4


def test_what_it_cost(compared: Path) -> None:
    linear, lora = (arm["cost"] for arm in content(compared)["arms"])
    assert linear["trainable_parameters"] < lora["trainable_parameters"] < lora["parameters"]
    for cost in (linear, lora):
        assert 0 < cost["training_seconds"] < cost["seconds"]
        assert cost["images_per_second"] > 0
        assert cost["epochs"] == 2
        assert cost["peak_memory"] is None or cost["peak_memory"] > 2**20


def test_a_frozen_backbone_did_not_move(compared: Path) -> None:
    linear, lora = (arm["drift"] for arm in content(compared)["arms"])
    assert (linear["cosine_distance"], linear["cka"]) == (0.0, 1.0)
    assert lora["cosine_distance"] > 0
    assert lora["cka"] < 1
    assert linear["split"] == "val"


def test_the_pairs_are_tested(compared: Path) -> None:
    found = content(compared)
    assert [(test["metric"], test["primary"]) for test in found["tests"]] == [("qwk", True), ("referable_auroc", False)]
    for test in found["tests"]:
        (pair,) = test["pairs"]
        means = [arm["scores"]["test"][test["metric"]]["value"] for arm in found["arms"]]
        assert pair["difference"] == pytest.approx(means[0] - means[1], abs=1e-12)
        assert 0 < pair["p"] <= 1
        assert pair["p_holm"] == pair["p"]
        assert test["unit"] == "patient"
    assert found["sentences"]


TASKS = {
    "labels": (
        ["--data.label_column", "[disease, referable]", "--train.metric", "f1_macro"],
        "multilabel",
        ["f1_macro", "auroc_macro"],
    ),
    "number": (["--data.label_column", "vcdr", "--task.kind", "regression"], "regression", ["mae", "ccc"]),
}


@pytest.mark.parametrize("name", TASKS)
def test_labels_and_numbers_are_compared_too(
    name: str, configuration: Path, few_resamples: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked, task, tested = TASKS[name]
    rows = (configuration.parent / "eyes" / "labels.csv").read_text(encoding="utf-8").splitlines()
    place = rows[0].split(",").index("dr_grade")
    table = configuration.parent / "eyes" / "more.csv"
    grades = [int(row.split(",")[place]) for row in rows[1:]]
    cells = [f"{int(grade > 0)},{int(grade > 1)}" for grade in grades]
    lines = zip(rows, ["disease,referable", "1,", *cells[1:]], strict=True)  # one is not known
    table.write_text("".join(f"{cell},{row}\n" for row, cell in lines), encoding="utf-8")
    words = ["--strategies", "slow=linear,fast=linear", "--fast.train.lr", "0.3", "--train.epochs", "1", *asked]
    words += ["--data.table", str(table), "--data.test", "0.5", "--data", f"elsewhere={table}"]
    assert run(configuration, tmp_path / "out", *words, "--map", "elsewhere=as-is") == 2
    assert "a map is for classes" in capsys.readouterr().err
    assert run(configuration, tmp_path / "out", *words) == 0
    found = content(tmp_path / "out")
    assert (found["task"], found["datasets"]) == (task, ["val", "test", "elsewhere"])
    assert [test["metric"] for test in found["tests"]] == tested
    assert found["primary"]["higher_is_better"] == (name == "labels")
    assert not {"bias", "loa_low", "loa_high"} & set(found["metrics"]), "they say how results are, not how good"
    for test in found["tests"]:
        (pair,) = test["pairs"]
        means = [arm["scores"]["test"][test["metric"]]["value"] for arm in found["arms"]]
        assert pair["difference"] == pytest.approx(means[0] - means[1], abs=1e-12)
        assert 0 < pair["p"] <= 1
    for arm in found["arms"]:
        scores = json.loads((tmp_path / "out" / arm["cells"][0] / "metrics.json").read_text())["datasets"]
        for metric in found["metrics"]:
            entry = arm["scores"]["elsewhere"][metric]
            assert entry["value"] == pytest.approx(scores["elsewhere"]["metrics"][metric]["value"], abs=1e-12)
            assert entry["ci"][0] <= entry["ci"][1]
    inside, outside = (
        read_table(tmp_path / "out" / arm["cells"][0] / f"predictions/{n}.csv") for n in ("test", "elsewhere")
    )
    where = {image: row for row, image in enumerate(outside.images)}
    assert all(inside.truth(row) == outside.truth(where[image]) for row, image in enumerate(inside.images))
    assert main(["report", str(tmp_path / "out")]) == 0
    assert found["sentences"][0] in unescape((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))


def test_a_failing_run_is_a_row_and_the_rest_is_kept(
    configuration: Path, compared: Path, few_resamples: None, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in compared.rglob("predictions/test.csv")}
    words = ("--strategies", "linear,lora,bad=lora", "--seeds", "0,1", "--bad.targets", "nonsense")
    assert run(configuration, compared, *words) == 1
    found = content(compared)
    said = capsys.readouterr()
    assert found["status"] == "failed"
    failed = {cell["name"]: cell["error"] for cell in found["cells"] if cell["status"] == "failed"}
    assert set(failed) == {"test_vit-bad-seed0", "test_vit-bad-seed1"}
    assert all("nonsense" in error for error in failed.values())
    assert any("test_vit-bad-seed0 failed" in warning for warning in found["warnings"])
    assert [arm["name"] for arm in found["arms"]] == ["linear", "lora"]
    assert {path: path.stat().st_mtime_ns for path in compared.rglob("predictions/test.csv")} == before
    assert said.out.count("finished before") == 4
    assert "Traceback" not in said.err


def test_another_configuration_is_refused(
    configuration: Path, compared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (compared / results.FILE).read_bytes()
    assert run(configuration, compared, "--strategies", "lora", "--seeds", "0", "--lora.r", "2") == 2
    assert "test_vit-lora-seed0: adapt.r: was 8, now 2" in capsys.readouterr().err
    assert run(configuration, configuration.parent / "eyes", "--strategies", "lora") == 2
    assert "not a comparison" in capsys.readouterr().err
    assert (compared / results.FILE).read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"])
def test_interrupted_it_goes_on_to_the_same_end(
    configuration: Path,
    compared: Path,
    few_resamples: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    signum: int,
    code: int,
) -> None:
    calls = 0
    original = SupervisedTask.loss

    def signalled(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 7:  # in the second run: three batches an epoch, two epochs
            os.kill(os.getpid(), signum)
        return original(*arguments)

    words = ("--strategies", "lora,linear", "--seeds", "1")
    with monkeypatch.context() as patch:
        patch.setattr(SupervisedTask, "loss", signalled)
        assert run(configuration, tmp_path / "out", *words) == code
    assert "1 of 2 runs are finished" in capsys.readouterr().err
    found = content(tmp_path / "out")
    assert found["status"] == "interrupted"
    assert [cell["status"] for cell in found["cells"]] == ["finished", "interrupted"]
    assert run(configuration, tmp_path / "out", *words) == 0
    for name in ("test_vit-lora-seed1", "test_vit-linear-seed1"):
        again, whole = (
            et.Predictions.from_csv(out / name / "predictions" / "test.csv") for out in (tmp_path / "out", compared)
        )
        np.testing.assert_array_equal(again.logits, whole.logits)


# --- in words -----------------------------------------------------------------------------------------------------


def pair(first: str, second: str, difference: float, p: float | None, **more: Any) -> dict[str, Any]:
    ci = [difference - 0.02, difference + 0.02]
    differs = None if p is None else p <= 0.05
    values = {"seeds": [0, 1], "same_direction": 2, "reason": "no curve" if p is None else ""}
    return {"first": first, "second": second, "difference": difference, "ci": ci, "p_holm": p, "differs": differs} | (
        values | more
    )


def test_what_differs_in_words() -> None:
    test = {
        "metric": "qwk",
        "unit": "patient",
        "images": 80,
        "clusters": 40,
        "dataset": "test",
        "method": "permutation of patients",
        "pairs": [
            pair("linear", "lora", -0.1, 0.0004),
            pair("linear", "full", -0.09, 0.012, same_direction=1),
            pair("lora", "full", 0.01, 0.6),
        ],
    }
    better, alike = sentences(test)
    assert better == (
        "lora (by 0.100 [0.080, 0.120], p < 0.001) and full (by 0.090 [0.070, 0.110], p = 0.012, though in 1 of 2 "
        "seeds only) are better than linear."
    )
    assert alike.startswith("No difference was found between lora and full (0.010 [-0.010, 0.030], p = 0.600).")
    assert "does not show that they are equal" in alike
    assert heading(test) == (
        "QWK on the test split, 80 images of 40 patients; permutation of patients, p corrected for 3 comparisons "
        "(Holm), the intervals not:"
    )


def test_of_an_error_less_is_better() -> None:
    (sentence,) = sentences({"metric": "nll", "pairs": [pair("a", "b", 0.3, 0.01)]})
    assert sentence.startswith("b (by 0.300 [0.280, 0.320]")
    assert sentence.endswith("is better than a.")


def test_what_answered_alike_is_no_interval_of_nothing() -> None:
    (sentence,) = sentences({"metric": "qwk", "pairs": [pair("a", "b", 0.0, 1.0, ci=[0.0, 0.0])]})
    assert sentence == "a and b answered alike, image by image: there was nothing to tell them apart by."


def test_what_could_not_be_tested_is_said() -> None:
    assert sentences({"metric": "qwk", "pairs": [pair("a", "b", 0.3, None)]}) == [
        "a and b could not be compared: no curve."
    ]
