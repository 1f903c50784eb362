"""Ctrl-C and SIGTERM: saved where it is, resumed to the same bits, the exit code of the signal."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from train_kit import fit_tiny, photographs

from eyetune import interrupt
from eyetune.data.records import Manifest
from eyetune.errors import RunError
from eyetune.interrupt import Interrupted, deferred, heeded, pending
from eyetune.train import loop, task
from eyetune.train.rundir import RunDir
from eyetune.train.task import SupervisedTask

#: Phases of one epoch each, so that three epochs see three phases.
GRADUAL = {"kind": "gradual", "phases": [0, 1, "all"], "patience": 1}

WAYS = [
    ("full", {"augment": "medium", "mixup": 0.5}),
    ("full", {"accumulate": 2, "schedule": "plateau"}),
    (GRADUAL, {}),
    ("lora", {"balance": "sampler"}),
    ("linear", {"features_once": True}),
]
NAMES = ["full", "accumulated", "gradual", "lora", "linear"]


@pytest.fixture(scope="module")
def train_images(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return photographs(tmp_path_factory.mktemp("train"), 10)


@pytest.fixture(scope="module")
def val_images(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return photographs(tmp_path_factory.mktemp("val"), 6, start=100)


def signal_in(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, signum: int) -> None:
    """Send this process `signum` at the `call`th call of a function (from 1)."""
    original = getattr(owner, name)
    calls = 0

    def signalled(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signum)
        return original(*args, **options)

    monkeypatch.setattr(owner, name, signalled)


def checkpoint(run: RunDir) -> dict[str, Tensor]:
    last = run.load_last()
    assert last is not None
    return last.tensors | last.optimizer


def assert_same(first: RunDir, second: RunDir) -> None:
    mine, theirs = checkpoint(first), checkpoint(second)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    timing = ("seconds", "images_per_second")
    histories = [
        [{k: v for k, v in row.items() if k not in timing} for row in r.read_history()] for r in (first, second)
    ]
    assert histories[0] == histories[1]
    best = [run.load_best() for run in (first, second)]
    assert best[0].card == best[1].card
    assert all(torch.equal(tensor, best[1].tensors[name]) for name, tensor in best[0].tensors.items())


@pytest.mark.slow
@pytest.mark.parametrize(("adapt", "options"), WAYS, ids=NAMES)
def test_stopped_after_any_batch_it_ends_the_same(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    train_images: Manifest,
    val_images: Manifest,
    adapt: Any,
    options: Any,
) -> None:
    """Ten images in batches of four: three batches an epoch, three epochs. The last of an epoch is trained anyway."""
    whole = RunDir.create(tmp_path / "whole")
    fit_tiny(whole, train_images, val_images, adapt=adapt, **options)
    for batch in range(1, 9):
        run = RunDir.create(tmp_path / str(batch))
        with monkeypatch.context() as patch:
            signal_in(patch, SupervisedTask, "loss", batch, signal.SIGTERM)
            with pytest.raises(Interrupted, match=f"--resume {run.path}") as caught:
                fit_tiny(run, train_images, val_images, adapt=adapt, **options)
        assert caught.value.signum == signal.SIGTERM
        epochs, batches = divmod(batch, 3)
        part = f"{batches} of 3 batches of epoch {epochs + 1}" if batches else f"the training of epoch {epochs}"
        assert part in str(caught.value)
        fit_tiny(run, train_images, val_images, adapt=adapt, resume=True, **options)
        assert_same(run, whole)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("epoch", [1, 3])
def test_stopped_in_validation_the_training_of_the_epoch_is_kept(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    train_images: Manifest,
    val_images: Manifest,
    signum: int,
    epoch: int,
) -> None:
    whole, run = RunDir.create(tmp_path / "whole"), RunDir.create(tmp_path / "run")
    fit_tiny(whole, train_images, val_images)
    with monkeypatch.context() as patch:
        signal_in(patch, task, "predict", epoch, signum)
        with pytest.raises(Interrupted, match=f"the training of epoch {epoch} are kept") as caught:
            fit_tiny(run, train_images, val_images)
    assert caught.value.signum == signum
    seen = []
    original = SupervisedTask.loss
    with monkeypatch.context() as patch:
        patch.setattr(SupervisedTask, "loss", lambda *args: seen.append(1) or original(*args))
        fit_tiny(run, train_images, val_images, resume=True)
    assert len(seen) == 3 * (3 - epoch), "an epoch that was trained is not trained again"
    assert_same(run, whole)


def test_stopped_again_and_again_it_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train_images: Manifest, val_images: Manifest
) -> None:
    whole, run = RunDir.create(tmp_path / "whole"), RunDir.create(tmp_path / "run")
    fit_tiny(whole, train_images, val_images, augment="medium")
    for attempt in range(20):
        with monkeypatch.context() as patch:
            signal_in(patch, SupervisedTask, "loss", 1, signal.SIGTERM)
            try:
                fit_tiny(run, train_images, val_images, augment="medium", resume=attempt > 0)
                break
            except Interrupted:
                continue
    assert attempt == 9, "every attempt is one batch further"
    assert_same(run, whole)


def test_a_signal_during_the_save_does_not_break_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train_images: Manifest, val_images: Manifest
) -> None:
    run = RunDir.create(tmp_path / "run")
    signal_in(monkeypatch, RunDir, "save_last", 2, signal.SIGINT)
    with pytest.raises(Interrupted, match="2 of 3 epochs are kept"):
        fit_tiny(run, train_images, val_images)
    last = run.load_last()
    assert last is not None
    assert last.state["epochs_done"] == 2


def test_a_second_ctrl_c_stops_at_once_and_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train_images: Manifest, val_images: Manifest
) -> None:
    monkeypatch.setattr(interrupt, "ONE_WISH", 0.0)
    run = RunDir.create(tmp_path / "run")
    original = SupervisedTask.loss
    calls = 0

    def loss(*args: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 5:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("not reached")
        return original(*args)

    monkeypatch.setattr(SupervisedTask, "loss", loss)
    with pytest.raises(Interrupted, match="1 of 3 epochs are kept"):
        fit_tiny(run, train_images, val_images)
    last = run.load_last()
    assert last is not None
    assert (last.state["epochs_done"], last.state["part"]) == (1, None)


def test_signals_that_come_together_are_one_wish() -> None:
    """A terminal and a launcher both pass Ctrl-C on."""
    with heeded():
        with deferred():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            assert pending() == signal.SIGINT
        with pytest.raises(Interrupted):
            raise interrupt.obey("")
        assert pending() is None
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_the_middle_of_an_epoch_needs_as_many_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train_images: Manifest, val_images: Manifest
) -> None:
    run = RunDir.create(tmp_path / "run")
    with monkeypatch.context() as patch:
        signal_in(patch, SupervisedTask, "loss", 5, signal.SIGTERM)
        with pytest.raises(Interrupted):
            fit_tiny(run, train_images, val_images)
    original = loop._Trainer._load_part

    def load_part(trainer: loop._Trainer, last: Any) -> None:
        last.state["part"]["processes"] = 2
        original(trainer, last)

    monkeypatch.setattr(loop._Trainer, "_load_part", load_part)
    with pytest.raises(RunError, match=r"with 2 processes.*here are 1.*--from previous"):
        fit_tiny(run, train_images, val_images, resume=True)
