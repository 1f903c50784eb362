"""Temperature scaling against a slow search; calibration.json against damage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from train_kit import card

from eyetune.errors import RunError
from eyetune.metrics.calibration import Calibration, fit_calibration, read_calibration
from eyetune.metrics.intervals import Clusters
from eyetune.metrics.predictions import Predictions
from eyetune.metrics.temperature import HOTTEST, fit_temperature
from eyetune.train.results import calibration_line
from eyetune.train.rundir import RunDir


def sample(n: int, k: int, seed: int, temperature: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Logits float64[n, k] that are right once divided by `temperature`, and targets drawn from them."""
    rng = np.random.default_rng(seed)
    honest = 1.5 * rng.normal(size=(n, k))
    shares = np.exp(honest) / np.exp(honest).sum(axis=1, keepdims=True)
    targets = np.array([rng.choice(k, p=one) for one in shares])
    return honest * temperature, targets


def table(logits: np.ndarray, targets: np.ndarray, patients: list[str | None] | None = None) -> Predictions:
    names = [f"{i}.jpg" for i in range(len(targets))]
    none: list[str | None] = [None] * len(names)
    classes = [f"c{k}" for k in range(logits.shape[1])]
    return Predictions(names, patients or none, none, targets, logits, classes)


def loss(logits: np.ndarray, targets: np.ndarray, temperature: float) -> float:
    shares = table(logits, targets).calibrated(temperature).probabilities
    return float(-np.log(shares[np.arange(len(targets)), targets]).mean())


@pytest.mark.parametrize("k", [2, 5])
@pytest.mark.parametrize("true", [0.5, 1.0, 3.0])
def test_the_temperature_is_the_one_a_search_finds(k: int, true: float) -> None:
    logits, targets = sample(400, k, seed=k, temperature=true)
    found, warnings = fit_temperature(logits, targets)
    tried = np.exp(np.linspace(-1.5, 1.5, 751))
    best = tried[np.argmin([loss(logits, targets, t) for t in tried])]
    assert found == pytest.approx(best, rel=0.004)
    assert loss(logits, targets, found) <= min(loss(logits, targets, best), loss(logits, targets, 1.0))
    assert warnings == []


def test_the_temperature_of_many_images_is_the_true_one_and_inside_its_interval() -> None:
    logits, targets = sample(20_000, 3, seed=1, temperature=2.5)
    found = fit_calibration(table(logits, targets), "val", resamples=200)
    assert found is not None
    low, high = found.temperature.ci
    assert low is not None
    assert high is not None
    assert found.temperature.value == pytest.approx(2.5, rel=0.03)
    assert low < found.temperature.value < high
    assert low < 2.5 < high
    assert found.warnings == ()


def test_the_interval_is_that_of_temperatures_fitted_to_resamples_written_out() -> None:
    logits, targets = sample(150, 3, seed=2, temperature=1.7)
    patients: list[str | None] = [str(i // 2) for i in range(150)]
    found = fit_calibration(table(logits, targets, patients), "val", resamples=60, seed=4)
    clusters = Clusters.of(patients, targets)
    slow = []
    for counts in clusters.draws(60, 4):
        rows = np.repeat(np.arange(150), counts)
        slow.append(fit_temperature(logits[rows], targets[rows])[0])
    from eyetune.metrics.intervals import bias_corrected

    assert found is not None
    assert found.temperature.ci == pytest.approx(bias_corrected(np.array(slow), found.temperature.value), rel=1e-3)
    assert found.fitted_on.unit == "patient"
    assert found.fitted_on.patients == 75


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.2, 5.0))
def test_dividing_the_logits_divides_the_temperature_and_changes_no_call(seed: int, factor: float) -> None:
    logits, targets = sample(60, 4, seed)
    first, second = fit_temperature(logits, targets)[0], fit_temperature(logits * factor, targets)[0]
    if 1 / 15 < first < 15 and 1 / 15 < second < 15:
        assert second == pytest.approx(first * factor, rel=1e-6)
    raw = table(logits, targets)
    assert (raw.calibrated(first).predicted == raw.predicted).all()


def test_samples_that_fix_no_temperature_say_so() -> None:
    targets = np.array([0, 1, 1, 0])
    right = np.eye(2)[targets] * 3
    assert fit_temperature(right, targets)[0] == 1.0
    assert "no lower bound" in fit_temperature(right, targets)[1][0]
    assert fit_temperature(right, 1 - targets) == (HOTTEST, fit_temperature(right, 1 - targets)[1])
    assert "knows nothing" in fit_temperature(right, 1 - targets)[1][0]
    assert fit_temperature(np.zeros((4, 2)), targets)[0] == 1.0
    found = fit_calibration(table(right, targets), "val", resamples=10)
    assert found is not None
    assert "4 labelled images" in found.warnings[0]
    assert found.temperature.ci == (None, None)
    assert "fitted on 4 images of val" in calibration_line(found)
    assert fit_calibration(table(right, np.full(4, -1)), "val") is None
    assert "no validation image has a label" in calibration_line(None)


def test_extreme_logits_are_calibrated() -> None:
    logits = np.array([[1e308, -1e308], [0.0, 1e-300], [5.0, 4.0]])
    assert np.isfinite(fit_temperature(logits, np.array([0, 1, 1]))[0])
    assert np.isfinite(table(logits, np.array([0, 1, 1])).calibrated(0.05).logits).all()


def test_a_bias_moves_log_odds() -> None:
    raw = table(np.array([[0.2, 0.1], [2.0, -1.0]]), np.array([0, 1]))
    moved = raw.calibrated(2.0, [0.0, 1.0])
    odds = np.log(moved.probabilities[:, 1] / moved.probabilities[:, 0])
    assert odds == pytest.approx([(0.1 - 0.2) / 2 + 1, (-1 - 2) / 2 + 1])
    for wrong in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="above 0"):
            raw.calibrated(wrong)


# -- the file ----------------------------------------------------------------------------------------------------------


def fitted() -> Calibration:
    logits, targets = sample(120, 2, seed=0)
    found = fit_calibration(table(logits, targets), "val", resamples=20)
    assert found is not None
    return found


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    import torch

    folder = RunDir.create(tmp_path / "run")
    folder.save_best({"head.weight": torch.zeros(2)}, card())
    folder.save_last({"head.weight": torch.zeros(2)}, card(), {}, {})
    return folder


def test_the_file_holds_all_of_it(run: RunDir) -> None:
    assert run.read_calibration() is None
    before = fitted().model_copy(update={"model": run.best_model()})
    run.write_calibration(before)
    run.write_calibration(before.model_copy(update={"bias": (0.5, -0.5)}), "clinic")
    assert run.read_calibration() == before
    site = run.read_calibration("clinic")
    assert site is not None
    assert site.bias == (0.5, -0.5)
    assert list(run.calibrations()) == ["clinic"]
    content = json.loads(run.calibration_file().read_text())
    assert content["schema"] == 1
    assert content["fitted_on"] == {"dataset": "val", "n": 120, "patients": None, "unit": "image"}
    assert set(content["versions"]) == {"eyetune", "numpy", "scipy"}


def test_only_the_main_process_writes(run: RunDir) -> None:
    RunDir(run.path, main=False).write_calibration(fitted())
    assert not run.calibration_file().exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": {"value": 0.0}}, "temperature.value"),
        ({"temperature": {"value": float("nan")}}, "temperature.value"),
        ({"temperature": {"value": "hot"}}, "temperature.value"),
        ({"bias": [1.0]}, "1 numbers for 2 classes"),
        ({"classes": 3}, "classes"),
        ({"fitted_on": None}, "fitted_on"),
        ({"extra": 1}, "extra"),
        ({"schema": 99}, "schema 99"),
        ({"schema": "one"}, "schema"),
        ({"model": "of another run"}, "other weights"),
    ],
)
def test_a_damaged_or_foreign_file_is_refused(run: RunDir, change: dict[str, Any], message: str) -> None:
    content = fitted().model_copy(update={"model": run.best_model()}).to_dict()
    run.calibration_file().write_text(json.dumps(content | change))
    with pytest.raises(RunError, match=message) as caught:
        run.read_calibration()
    assert f"eyetune finetune --resume {run.path}" in str(caught.value)
    assert "calibration.json" in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00\xff", "[" * 100_000])
def test_a_file_that_is_no_json_is_refused(run: RunDir, text: str) -> None:
    run.calibration_file().write_text(text, encoding="latin-1")
    with pytest.raises(RunError, match="finetune --resume"):
        run.read_calibration()


def test_a_missing_site_is_named(run: RunDir) -> None:
    run.write_calibration(fitted(), "clinic")
    with pytest.raises(RunError, match="Did you mean 'clinic'"):
        run.read_calibration("clinik")


def test_content_that_is_none_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="Field required"):
        read_calibration({})
