"""A calibration for a new site: what is fitted, what it is said to bring, what is refused, and how it is used."""

from __future__ import annotations

import csv
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import eyetune as et
from eyetune.cli import main
from eyetune.data.phantom import write_cohort
from eyetune.errors import ConfigError, DataError, RunError
from eyetune.metrics.calibration import fit_calibration, fit_site
from eyetune.metrics.predictions import Predictions
from eyetune.metrics.scores import METRICS
from eyetune.metrics.site import (
    FEWEST,
    FEWEST_FOR_SHIFTS,
    JUDGED,
    Brought,
    fit_scaling,
    folds,
    judge,
    patients_of,
    too_few,
    unseen,
)
from eyetune.train import results

CLASSES = ("a", "b", "c")
EVEN, SKEWED = np.full(3, 1 / 3), np.array([0.7, 0.2, 0.1])


def sample(
    n: int, seed: int, *, shares: np.ndarray = EVEN, sharpness: float = 1.0, eyes: int = 1, model: np.ndarray = EVEN
) -> Predictions:
    """Normal clouds and their exact posterior at the shares `model`, times `sharpness`; `eyes` images a patient."""
    rng = np.random.default_rng(seed)
    means = 1.5 * np.eye(3)
    targets = np.repeat(rng.choice(3, size=n // eyes, p=shares), eyes)
    seen = means[targets] + rng.normal(size=(len(targets), 3))
    logits = sharpness * (np.log(model) + seen @ means.T)
    names = [str(i) for i in range(len(targets))]
    patients = [str(i // eyes) if eyes > 1 else None for i in range(len(targets))]
    return Predictions(names, patients, [None] * len(names), targets, logits, CLASSES)


def loss(table: Predictions) -> float:
    return float(-np.log(table.probabilities[np.arange(len(table)), table.targets]).mean())


# -- the fit -----------------------------------------------------------------------------------------------------------


def test_folds_keep_patients_together_and_do_not_look_at_the_classes() -> None:
    table = sample(300, 0, eyes=2, shares=SKEWED)
    fold = folds(patients_of(table))
    assert (fold[::2] == fold[1::2]).all()
    assert np.bincount(fold).tolist() == [60] * 5
    others = Predictions(table.images, table.patients, table.eyes, table.targets[::-1], table.logits, CLASSES)
    assert (folds(patients_of(others)) == fold).all()


def test_other_shares_of_the_classes_are_found() -> None:
    """The shift of the log-odds is that of the shares, and the temperature that of the sharpness."""
    found = fit_scaling(sample(6000, 1, shares=SKEWED, sharpness=2.0))
    assert found.temperature == pytest.approx(2.0, rel=0.08)
    assert found.bias is not None
    expected = np.log(SKEWED) - np.log(EVEN)
    assert found.bias == pytest.approx(expected - expected.mean(), abs=0.15)


def test_shifts_wait_for_enough_patients() -> None:
    assert fit_scaling(sample(FEWEST_FOR_SHIFTS - 1, 2, shares=SKEWED)).bias is None
    assert fit_scaling(sample(2 * FEWEST_FOR_SHIFTS - 2, 2, shares=SKEWED, eyes=2)).bias is None
    assert fit_scaling(sample(200, 2, shares=SKEWED)).bias is not None


def test_where_nothing_is_wrong_shifts_are_mostly_left_alone() -> None:
    kept = sum(fit_scaling(sample(100, seed)).bias is None for seed in range(12))
    assert kept >= 8


def test_no_image_is_judged_by_what_was_fitted_on_its_patient() -> None:
    """Whatever the network says of the patients of a fold, what scales their logits stays the same."""
    table = sample(120, 3, eyes=2, shares=SKEWED, sharpness=2.0)
    fold = folds(patients_of(table), seed=1)
    before = unseen(table)
    for one in range(5):
        mine = fold == one
        changed = table.logits.copy()
        changed[mine] = 5 * np.random.default_rng(one).normal(size=(mine.sum(), 3))
        other = Predictions(table.images, table.patients, table.eyes, table.targets, changed, CLASSES)
        after = unseen(other)
        scale = (after[mine] - before[mine]) / (changed[mine] - table.logits[mine])
        assert scale == pytest.approx(np.full(scale.shape, scale[0, 0]))
        assert after[~mine] != pytest.approx(before[~mine])


def test_what_it_brings_is_the_difference_on_the_same_images() -> None:
    before, after = sample(200, 4, sharpness=3.0), sample(200, 4)
    found = judge(before, after, "no calibration", resamples=200)
    assert tuple(found.difference) == JUDGED
    assert found.before["nll"].value == pytest.approx(loss(before))
    assert found.after["nll"].value == pytest.approx(loss(after))
    for name in JUDGED:
        first, second, gap = (side[name].value for side in (found.before, found.after, found.difference))
        assert gap == pytest.approx(second - first)
        low, high = found.difference[name].ci
        assert low < gap < high
    assert found.helps
    nothing = judge(before, before, "no calibration", resamples=50)
    assert nothing.difference["nll"].ci == (0.0, 0.0)
    assert not nothing.helps


def test_cross_validation_does_not_flatter() -> None:
    """The loss it tells is, on average, that on other patients of the site."""
    told, true = [], []
    for seed in range(15):
        table = sample(60, seed, shares=SKEWED, sharpness=1.5)
        rest = sample(3000, 1000 + seed, shares=SKEWED, sharpness=1.5)
        told.append(loss(Predictions(*_parts(table, unseen(table)))))
        true.append(loss(Predictions(*_parts(rest, fit_scaling(table)(rest.logits)))))
    assert np.mean(told) == pytest.approx(np.mean(true), abs=2.5 * np.std(told) / np.sqrt(len(told)))


def _parts(table: Predictions, logits: np.ndarray) -> tuple[Any, ...]:
    return table.images, table.patients, table.eyes, table.targets, logits, table.classes


def test_a_sites_calibration_mends_its_probabilities() -> None:
    own = fit_calibration(sample(400, 5, sharpness=2.0), "val", resamples=20)
    assert own is not None
    here, there = (sample(n, seed, shares=SKEWED, sharpness=3.0) for n, seed in ((300, 6), (3000, 7)))
    found = fit_site(here, own, "clinic", model="m", photographs=["0f"], resamples=200)
    assert (found.fitted_on.dataset, found.fitted_on.n, found.model) == ("clinic", 300, "m")
    assert found.bias is not None
    assert found.brought is not None
    assert found.brought.helps
    assert found.brought.against == "the run's own calibration"
    gain = loss(found.apply(there)) - loss(own.apply(there))
    low, high = found.brought.difference["nll"].ci
    assert low < gain < high < 0
    assert {point.chosen_on for point in found.operating_points} == {"clinic"}
    assert found.conformal is not None
    inside = found.conformal.sets(found.apply(there).probabilities)[np.arange(len(there)), there.targets]
    assert inside.mean() == pytest.approx(0.9, abs=0.04)
    again = type(found).model_validate(json.loads(json.dumps(found.to_dict(), allow_nan=False)))
    assert again == found


def test_a_site_that_needs_nothing_is_told_so() -> None:
    own = fit_calibration(sample(2000, 8), "val", resamples=20)
    found = fit_site(sample(60, 9), own, "clinic", resamples=100)
    assert isinstance(found.brought, Brought)
    assert any("not shown to be better than the run's own calibration" in one for one in found.warnings)
    assert fit_site(sample(60, 9), None, "clinic", resamples=20).brought.against == "no calibration"  # type: ignore[union-attr]


def test_samples_that_are_too_small_say_why() -> None:
    assert too_few(sample(FEWEST, 0)) == ""
    assert f"of {FEWEST - 1} images" in too_few(sample(FEWEST - 1, 0))
    assert f"of {FEWEST - 1} patients" in too_few(sample(2 * FEWEST - 2, 0, eyes=2))
    many = sample(200, 0)
    assert "all of b" in too_few(many.take(many.targets == 1))
    unlabelled = Predictions(many.images, many.patients, many.eyes, np.full(200, -1), many.logits, CLASSES)
    assert too_few(unlabelled) == "no image of it has a label"
    with pytest.raises(DataError, match="clinic: its labelled images are of 10"):
        fit_site(sample(10, 0), None, "clinic")
    rare = many.take(many.targets != 2)
    assert any("no image of c" in one for one in fit_site(rare, None, "clinic", resamples=10).warnings)


# -- with a run --------------------------------------------------------------------------------------------------------


def eyes(folder: Path, **options: Any) -> Path:
    """A table of drawn eyes, each referable or not."""
    write_cohort(folder, size=64, **options)
    content = rows(folder / "labels.csv")
    return write(folder / "labels.csv", [row | {"referable": str(int(int(row["dr_grade"]) >= 2))} for row in content])


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def write(path: Path, content: list[dict[str, str]]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(content[0]))
        writer.writeheader()
        writer.writerows(content)
    return path


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Plots, reports and the intervals of scores have tests of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "_draw", lambda *given: None)
        patch.setattr(results, "score", functools.partial(results.score, resamples=10))
        patch.setattr(results, "trust", functools.partial(results.trust, resamples=10))
        patch.setattr("eyetune.report.page.refresh", lambda *given: None)
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> tuple[et.Run, Path]:
    """A run on drawn eyes of one camera, and the folder of those."""
    folder = tmp_path_factory.mktemp("calibrate")
    eyes(folder / "home", patients=15, seed=3)
    config = {
        "model": {"backbone": "nano", "pixels": 64},
        "data": {"table": str(folder / "home/labels.csv"), "label_column": "referable", "val": 0.2, "test": 0.2},
        "adapt": {"kind": "linear"},
        "train": {"epochs": 2, "batch_size": 8, "tensorboard": False},
        "augment": "none",
        "workers": 0,
        "precision": "fp32",
        "out": str(folder / "run"),
    }
    return et.finetune(et.Config.parse(config)), folder


@pytest.fixture(scope="module")
def site(home: tuple[et.Run, Path]) -> Path:
    """Eyes as another camera sees them."""
    folder = home[1] / "site"
    eyes(folder, patients=34, first_patient=101, seed=11, cameras=("handheld",))
    return folder


@pytest.mark.slow
def test_a_site_is_calibrated_and_the_run_left_as_it_was(
    home: tuple[et.Run, Path], site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = home
    before = run.folder.calibration_file().read_bytes()
    words = [str(run.folder.path), "--data", f"clinic={site}/labels.csv", "--workers", "0"]
    assert main(["calibrate", *words]) == 0
    said = capsys.readouterr().out
    for expected in ("by cross-validation", "nll", "ece", "brier", "--calibration clinic", "not a medical device"):
        assert expected in said
    assert run.folder.calibration_file().read_bytes() == before
    found = et.load_run(run.folder.path).calibration_for("clinic")
    assert found is not None
    assert (found.fitted_on.dataset, found.fitted_on.n, found.fitted_on.unit) == ("clinic", 68, "patient")
    assert found.ood == run.calibration.ood if run.calibration else None
    assert len(found.photographs) == 68
    # The raw predictions are the ground it stands on.
    table = run.predictions(et.Manifest.from_csv(site / "labels.csv", label_column="referable", classes=run.classes))
    again = fit_site(table, run.calibration, "clinic", model=found.model, photographs=found.photographs)
    assert again.temperature.value == pytest.approx(found.temperature.value, rel=1e-6)

    assert main(["calibrate", *words]) == 2
    assert "--replace" in capsys.readouterr().err
    assert main(["calibrate", *words, "--replace"]) == 0


def test_evaluate_uses_it_and_says_where_it_was_fitted(
    home: tuple[et.Run, Path], site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, folder = home
    words = [str(run.folder.path), "--data", f"clinic={site}/labels.csv", "--workers", "0"]
    if "clinic" not in run.folder.calibrations():
        assert main(["calibrate", *words]) == 0
    eyes(folder / "later", patients=6, first_patient=201, seed=12, cameras=("handheld",))
    data = [*words, "--data", f"later={folder}/later/labels.csv"]
    assert main(["evaluate", *data, "--calibration", "clinic"]) == 0
    found = run.folder.read_metrics()["datasets"]
    calibration = run.folder.read_calibration("clinic")
    assert calibration is not None
    table = et.Predictions.from_csv(run.folder.predictions_file("later"))
    expected = loss(calibration.apply(table))
    assert found["later"]["calibrated_metrics"]["nll"]["value"] == pytest.approx(expected)
    assert found["later"]["calibrated_by"]["dataset"] == "clinic"
    assert found["test"]["calibrated_by"]["dataset"] == "val"
    assert "rest on 68 labelled images of clinic" in found["later"]["warnings"][0]
    assert len(found["later"]["warnings"]) == 1
    assert any("68 of its 68 photographs were among those" in one for one in found["clinic"]["warnings"])
    assert found["later"]["ood"]["share_above"] is not None
    # By its file, too; a name that is none, and a run's own split, are refused.
    file = run.folder.calibration_file("clinic")
    assert main(["evaluate", *data, "--calibration", str(file)]) == 0
    capsys.readouterr()
    assert main(["evaluate", *data, "--calibration", "clinik"]) == 2
    assert "Did you mean 'clinic'" in capsys.readouterr().err
    assert main(["evaluate", *data, "--calibration", str(folder / "none.json")]) == 2
    assert "no calibration at" in capsys.readouterr().err
    assert main(["evaluate", words[0], "--by", "eye", "--calibration", "clinic"]) == 2
    assert "--data" in capsys.readouterr().err


def test_what_is_refused(home: tuple[et.Run, Path], site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, folder = home
    good = rows(site / "labels.csv")
    positive = [row for row in good if row["referable"] == "1"]
    wrong = {
        "few": (good[:20], "with fewer than 30"),
        "one": ([row | {"patient": str(n)} for n, row in enumerate(positive * 4)][: len(positive)], "all of 1"),
        "unknown": ([row | {"referable": "perhaps"} for row in good], "--map unknown="),
        "blank": ([row | {"referable": ""} for row in good], "label"),
    }
    for name, (content, said) in wrong.items():
        table = write(site / f"{name}.csv", content)
        assert main(["calibrate", str(run.folder.path), "--data", f"{name}={table}", "--workers", "0"]) == 2, name
        assert said in capsys.readouterr().err, name
        assert not run.folder.calibration_file(name).exists()
    trained_on = f"leak={folder}/home/labels.csv"
    for words, said in (
        (["--data", trained_on], "were trained or chosen on|was trained or chosen on"),
        (["--data", trained_on], "row"),
        ([], "--data clinic="),
        (["--data", f"val={site}/labels.csv"], "cannot be called 'val'"),
        (["--data", f"a.json={site}/labels.csv"], "cannot be called"),
        (["--data", f"a={site}/labels.csv", "--data", f"a={site}/labels.csv"], "same NAME"),
        (["--data", f"a={site}/labels.csv", "--map", "b=as-is"], "no --data is called 'b'"),
    ):
        assert main(["calibrate", str(run.folder.path), *words, "--workers", "0"]) == 2
        error = capsys.readouterr().err
        assert any(one in error for one in said.split("|")), error
        assert "Traceback" not in error


def test_in_python(home: tuple[et.Run, Path], site: Path) -> None:
    run, _ = home
    manifest = et.Manifest.from_csv(site / "labels.csv", label_column="referable", classes=run.classes)
    found = et.calibrate(run, "from_python", manifest)
    assert found == run.calibration_for("from_python")
    with pytest.raises(RunError, match="replace"):
        et.calibrate(run, "from_python", manifest)
    with pytest.raises(ConfigError, match="cannot be called"):
        et.calibrate(run, "test", manifest)
    other = et.Manifest.from_csv(site / "labels.csv", label_column="dr_grade")
    with pytest.raises(DataError, match="its classes are"):
        et.calibrate(run, "grades", other)


def test_every_judge_is_a_metric() -> None:
    assert all(not METRICS.get(name).higher_is_better for name in JUDGED)
