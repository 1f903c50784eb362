"""`eyetune check memory`: the slope, the largest batch, the advice; a leak is found."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from train_kit import photographs, tiny_model

from eyetune.adapt.classifier import Classifier
from eyetune.adapt.strategy import Strategy
from eyetune.checks import memory
from eyetune.checks.scale import Point, Scale, line
from eyetune.checks.subject import Subject
from eyetune.config import Config
from eyetune.data.records import Manifest
from eyetune.findings import Status
from eyetune.runtime import Runtime
from eyetune.train.task import SupervisedTask

MIB = 2**20


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    found = photographs(tmp_path_factory.mktemp("photographs"), 64)
    return found.with_records(replace(record, split="train") for record in found)


def subject(manifest: Manifest, **train: Any) -> Subject:
    config = Config.parse({"data": {"table": "t.csv"}, "adapt": {"kind": "full"}, "train": train}, check_files=False)
    return Subject(config, manifest, partial(tiny_model, "full"))


def fake(
    monkeypatch: pytest.MonkeyPatch, fixed: int, each: int, checkpointed: int, seconds: float = 0.1
) -> list[tuple[int, bool]]:
    """Children that take `fixed` MiB and so many an image; returns the list of what was asked of them."""
    asked: list[tuple[int, bool]] = []

    def measured(self: memory.Elsewhere, batch: int) -> Point:
        checkpointing = self.asked[1]
        asked.append((batch, checkpointing))
        return Point(batch, checkpointing, (fixed + batch * (checkpointed if checkpointing else each)) * MIB, seconds)

    monkeypatch.setattr(memory.Elsewhere, "run", measured)
    return asked


def test_the_line_through_two_points() -> None:
    assert line([Point(1, False, 9, 1.0), Point(2, False, 30, 1.0), Point(4, False, 50, 1.0)]) == (10.0, 10.0)
    assert line([Point(2, False, 30, 1.0)]) == (0.0, 15.0)


@pytest.mark.parametrize(("room", "largest"), [(1000, 8), (10_000, 64), (150, 0)])
def test_the_largest_batch_by_the_slope(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch, room: int, largest: int
) -> None:
    asked = fake(monkeypatch, fixed=100, each=100, checkpointed=10)
    scale = memory.measure(subject(manifest, batch_size=32), Runtime("cpu", "fp32"), room * MIB, 64, False)
    assert scale.largest == largest  # (0.9 * room - 100) / 100, and no more than there are images
    # Nothing is tried that would not fit, but for the first two that tell the slope.
    assert all(100 + 100 * batch < room for batch, _ in asked[2:])


def test_what_does_not_fit_fails_with_settings_that_do(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, fixed=100, each=100, checkpointed=10)
    one = subject(manifest, batch_size=32)
    scales = [memory.measure(one, Runtime("cpu", "fp32"), 1000 * MIB, 64, on) for on in (False, True)]
    finding = memory._verdict(one, scales, 1000 * MIB, 64)
    assert finding.status == Status.FAIL
    assert "the largest that fits is about 8, with train.grad_checkpointing on about 64" in finding.why
    assert "--train.batch_size 8 --train.accumulate 4, or --train.grad_checkpointing true" in finding.advice
    scales = [memory.measure(one, Runtime("cpu", "fp32"), 9000 * MIB, 64, on) for on in (False, True)]
    assert memory._verdict(one, scales, 9000 * MIB, 64).status == Status.PASS
    none = [Scale(False, (), 0, True)]
    assert memory._verdict(one, none, 10 * MIB, 64).status == Status.FAIL


def test_what_takes_long_is_predicted_and_said(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = fake(monkeypatch, fixed=100, each=100, checkpointed=10, seconds=20.0)
    one = subject(manifest, batch_size=32)
    scale = memory.measure(one, Runtime("cpu", "fp32"), 10_000 * MIB, 64, False)
    assert [batch for batch, _ in asked] == [1, 4]  # two tell the slope; two steps of 16 would take 160 s
    assert (scale.largest, scale.certain, scale.hurried) == (64, False, True)
    finding = memory._verdict(one, [scale], 10_000 * MIB, 64)
    assert finding.status == Status.PASS
    assert "takes about 3.22 of" in finding.why
    assert "batches above 4 take long here: predicted, not measured" in finding.why


def test_loading_counts_and_is_no_part_of_the_slope() -> None:
    """A network that takes more memory to load than for small batches: the steps alone tell what an image takes."""
    points = (Point(1, False, 110, 1.0, 300), Point(4, False, 140, 1.0, 300))
    scale = Scale(False, points, 40, False)
    assert line(points) == (100.0, 10.0)
    assert [scale.peak(batch) for batch in (1, 4, 20, 40)] == [300, 300, 300, 500]


@pytest.mark.slow
def test_growth_is_looked_for_in_as_many_steps_as_there_is_patience_for(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "PATIENCE", 0.0)
    short = memory.growth(subject(manifest), Runtime("cpu", "fp32"), None)
    assert short.status == Status.PASS, short.why
    assert short.values["steps"] == 5
    assert "in so few, less than 10.7 MiB a step goes unseen" in short.why or short.values["bytes"][0] > 1600 * MIB
    assert short.advice.startswith("--steps 100 takes about")
    asked = memory.growth(subject(manifest), Runtime("cpu", "fp32"), 10)
    assert asked.values["steps"] == 10
    assert not asked.advice


def test_a_process_that_is_killed_for_its_memory_is_an_answer(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory.Elsewhere, "run", lambda *_: None)
    scale = memory.measure(subject(manifest), Runtime("cpu", "fp32"), 1000 * MIB, 64, False)
    assert scale == Scale(False, (), 0, True)


def test_on_a_gpu_the_largest_is_found_by_trying(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(self: memory.Trial, batch: int) -> Point | None:
        return Point(batch, False, batch, 0.1) if batch <= 37 else None

    monkeypatch.setattr(memory.Trial, "run", run)
    scale = memory._by_trying(subject(manifest), Runtime("cpu", "fp32"), 64, False)
    assert 37 - 37 // 16 <= scale.largest <= 37
    assert scale.certain
    assert memory._by_trying(subject(manifest), Runtime("cpu", "fp32"), 20, False).largest == 20
    monkeypatch.setattr(memory.Trial, "run", lambda self, batch: None)
    assert memory._by_trying(subject(manifest), Runtime("cpu", "fp32"), 20, False).largest == 0


@pytest.mark.slow
def test_running_out_of_memory_is_an_answer(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = memory.Trial(subject(manifest), Runtime("cpu", "fp32"), False)

    def full(self: Classifier, images: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB.")

    point = trial.run(2)
    assert point is not None
    assert point.peak > 50 * MIB
    monkeypatch.setattr(Classifier, "forward", full)
    assert trial.run(2) is None


@pytest.mark.slow
def test_steps_that_keep_nothing_pass(manifest: Manifest) -> None:
    finding = memory.growth(subject(manifest), Runtime("cpu", "fp32"), 25)
    assert finding.status == Status.PASS, finding.why


@pytest.mark.slow
def test_a_leak_fails(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Tensor] = []
    real = SupervisedTask.loss

    def leaking(self: SupervisedTask, network: Any, batch: Any) -> Tensor:
        kept.append(real(self, network, batch))  # with its graph
        return kept[-1]

    monkeypatch.setattr(SupervisedTask, "loss", leaking)
    finding = memory.growth(subject(manifest), Runtime("cpu", "fp32"), 25)
    assert finding.status == Status.FAIL, finding.why
    assert "detach" in finding.advice


def test_bytes_that_pile_up_fail(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = iter([(100, 0)] + [(100, 40 * MIB * number) for number in range(1, 5)])
    monkeypatch.setattr(memory, "_held", lambda device: next(samples))
    assert memory.growth(subject(manifest), Runtime("cpu", "fp32"), 5).status == Status.FAIL


@pytest.mark.slow
def test_a_process_of_its_own_measures_its_own_memory(manifest: Manifest) -> None:
    ballast = torch.ones(2**28)  # a GiB here is none there
    with memory.Elsewhere(subject(manifest), False) as child:
        small, large = child.run(1), child.run(2048)
    assert small is not None
    assert large is not None
    assert ballast.numel()
    assert small.needs < 2**30
    assert small.loading > 0
    assert large.peak > small.peak + 100 * MIB


def test_strategy_and_features(manifest: Manifest) -> None:
    """A frozen backbone without augmentation is measured as it runs: forward passes, and a head on features."""
    config = Config.parse(
        {"data": {"table": "t.csv"}, "adapt": {"kind": "linear"}, "augment": "none"}, check_files=False
    )

    def build() -> tuple[Classifier, Strategy]:
        return tiny_model("linear")

    trial = memory.Trial(Subject(config, manifest, build), Runtime("cpu", "fp32"), False)
    assert trial.once
    assert trial.run(4) is not None
