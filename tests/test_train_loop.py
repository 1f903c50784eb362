"""Whole runs of a tiny network: resumed exactly, interrupted politely, the best epoch kept."""

from __future__ import annotations

import csv
import errno
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from train_kit import card, fit_tiny, loader, photographs, tiny_model

from eyetune import files
from eyetune.adapt.strategy import Advance, Step
from eyetune.config import TrainConfig
from eyetune.data.records import Manifest
from eyetune.errors import ConfigError, MissingExtra, RunError, UserError
from eyetune.runtime import Runtime
from eyetune.train import loop
from eyetune.train.features import can_compute_once, compute_once
from eyetune.train.logs import check_available, scalars
from eyetune.train.loop import fit
from eyetune.train.rundir import RunDir
from eyetune.train.task import SupervisedTask, Validation, predict

#: Phases of one epoch each, so that three epochs see three phases.
GRADUAL = {"kind": "gradual", "phases": [0, 1, "all"], "patience": 1}


@pytest.fixture(scope="module")
def train_images(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return photographs(tmp_path_factory.mktemp("train"), 10)


@pytest.fixture(scope="module")
def val_images(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return photographs(tmp_path_factory.mktemp("val"), 6, start=100)


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


class Interrupt:
    """Ctrl-C in the middle of epoch `epoch` (from 0)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, epoch: int) -> None:
        original = SupervisedTask.loss
        calls = 0

        def loss(task: SupervisedTask, *args: Any) -> Tensor:
            nonlocal calls
            calls += 1
            if calls > 3 * epoch + 1:  # ten images in batches of four: three a epoch
                raise KeyboardInterrupt
            return original(task, *args)

        monkeypatch.setattr(SupervisedTask, "loss", loss)


@pytest.mark.parametrize("interrupted_in", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("adapt", "options"),
    [
        ("full", {"augment": "medium", "mixup": 0.5}),
        ("full", {"schedule": "plateau", "accumulate": 2}),
        (GRADUAL, {}),
        ("lora", {"balance": "sampler"}),
        ("linear", {"features_once": True}),
    ],
    ids=["full", "plateau", "gradual", "lora", "linear"],
)
def test_a_resumed_run_ends_with_the_same_weights(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    train_images: Manifest,
    val_images: Manifest,
    adapt: Any,
    options: dict[str, Any],
    interrupted_in: int,
) -> None:
    """Dropout, drop-path, augmentation, mixup, order, phases, schedule: all of it goes on as if nothing had been."""
    whole, expected = fit_tiny(RunDir.create(tmp_path / "whole"), train_images, val_images, adapt=adapt, **options)
    run = RunDir.create(tmp_path / "cut")
    with monkeypatch.context() as patch:
        Interrupt(patch, interrupted_in)
        with pytest.raises(KeyboardInterrupt, match=rf"{interrupted_in} of 3 epochs.*--resume {run.path}"):
            fit_tiny(run, train_images, val_images, adapt=adapt, **options)
    resumed, found = fit_tiny(run, train_images, val_images, adapt=adapt, resume=True, **options)
    assert found.best_epoch == expected.best_epoch
    ignored = {"seconds", "images_per_second"}
    for mine, theirs in zip(found.history, expected.history, strict=True):
        assert {k: v for k, v in mine.items() if k not in ignored} == {
            k: v for k, v in theirs.items() if k not in ignored
        }
    mine, theirs = weights(resumed), weights(whole)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    lasts = [RunDir(tmp_path / name).load_last() for name in ("whole", "cut")]
    assert lasts[0] is not None
    assert lasts[1] is not None
    for part in ("tensors", "optimizer"):
        first, second = getattr(lasts[0], part), getattr(lasts[1], part)
        assert first.keys() == second.keys()
        assert first
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("adapt", "augment"), [("full", "none"), ("linear", "medium")], ids=["dropout and drop-path", "augmentation"]
)
def test_epochs_differ_from_one_another(tmp_path: Path, train_images: Manifest, adapt: str, augment: str) -> None:
    """What makes the test above worth something: with a rate of nearly nothing only chance tells epochs apart."""
    dropout = 0.1 if adapt == "full" else 0.0
    _, result = fit_tiny(
        RunDir.create(tmp_path / "r"), train_images, None, adapt=adapt, augment=augment, lr=1e-12, dropout=dropout
    )
    assert len({round(row["train_loss"], 5) for row in result.history}) == 3


def test_interrupted_before_the_first_epoch_it_starts_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train_images: Manifest, val_images: Manifest
) -> None:
    run = RunDir.create(tmp_path / "run")
    with monkeypatch.context() as patch:
        Interrupt(patch, 0)
        with pytest.raises(KeyboardInterrupt, match="no epoch was finished yet"):
            fit_tiny(run, train_images, val_images)
    _, result = fit_tiny(run, train_images, val_images, resume=True)
    assert result.epochs == 3


def test_an_interrupted_save_is_not_reported_as_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train_images: Manifest, val_images: Manifest
) -> None:
    run = RunDir.create(tmp_path / "run")
    original = loop._Trainer._save_last

    def save_last(trainer: loop._Trainer, epoch: int, value: float | None) -> None:
        if epoch == 1:
            raise KeyboardInterrupt
        original(trainer, epoch, value)

    monkeypatch.setattr(loop._Trainer, "_save_last", save_last)
    for resume in (False, True):
        with pytest.raises(KeyboardInterrupt, match="1 of 3 epochs are kept"):
            fit_tiny(run, train_images, val_images, adapt="linear", resume=resume)


def test_resuming_a_finished_run_only_brings_back_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train_images: Manifest, val_images: Manifest
) -> None:
    run = RunDir.create(tmp_path / "run")
    model, first = fit_tiny(run, train_images, val_images)
    Interrupt(monkeypatch, 0)
    again, second = fit_tiny(run, train_images, val_images, resume=True)
    assert second == first
    mine, theirs = weights(again), weights(model)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_a_run_of_another_base_is_not_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train_images: Manifest
) -> None:
    run = RunDir.create(tmp_path / "run")
    fit_tiny(run, train_images, None, epochs=1)
    monkeypatch.setattr("train_kit.card", lambda: card(fingerprint="other"))
    with pytest.raises(RunError, match="base weights"):
        fit_tiny(run, train_images, None, epochs=1, resume=True)


def scripted(monkeypatch: pytest.MonkeyPatch, values: list[float | None]) -> list[dict[str, Tensor]]:
    """Let validation say these values, epoch by epoch; returns the weights it was shown."""
    shown: list[dict[str, Tensor]] = []

    def validate(task: SupervisedTask, network: torch.nn.Module, *_: Any) -> Validation:
        shown.append(weights(network))
        return Validation(0.5, {task.metric: values[len(shown) - 1]})

    monkeypatch.setattr(SupervisedTask, "validate", validate)
    return shown


def test_the_model_ends_with_the_best_epochs_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train_images: Manifest, val_images: Manifest
) -> None:
    """An undefined metric is never the best; of equal ones the first is."""
    shown = scripted(monkeypatch, [None, 0.4, 0.8, 0.8, math.nan, 0.5])
    run = RunDir.create(tmp_path / "run")
    model, result = fit_tiny(run, train_images, val_images, epochs=6)
    assert (result.best_epoch, result.best_value) == (2, 0.8)
    assert all(torch.equal(tensor, shown[2][name]) for name, tensor in weights(model).items())
    best = run.load_best()
    assert (best.card.epoch, best.card.metric, best.card.value) == (2, "auroc_macro", 0.8)
    assert all(torch.equal(tensor, shown[2][name]) for name, tensor in best.tensors.items())
    assert not torch.equal(shown[2]["head.1.weight"], shown[3]["head.1.weight"])


def test_a_metric_where_lower_is_better(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train_images: Manifest, val_images: Manifest
) -> None:
    scripted(monkeypatch, [0.9, 0.3, 0.6])
    _, result = fit_tiny(RunDir.create(tmp_path / "run"), train_images, val_images, metric="nll")
    assert (result.best_epoch, result.best_value) == (1, 0.3)


def test_early_stopping(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train_images: Manifest, val_images: Manifest
) -> None:
    scripted(monkeypatch, [0.5, 0.6, 0.6, 0.5, 0.9, 0.9])
    _, result = fit_tiny(RunDir.create(tmp_path / "run"), train_images, val_images, epochs=6, patience=2)
    assert (result.epochs, result.best_epoch) == (4, 1)
    assert "no better auroc_macro for 2 epochs" in result.stopped


def test_an_undefined_metric_does_not_stop_early_and_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train_images: Manifest, val_images: Manifest
) -> None:
    one_class = val_images.with_records(record for record in val_images if record.label == 0)
    lines: list[str] = []
    monkeypatch.setattr(loop, "_to_stderr", lines.append)
    monkeypatch.setattr("train_kit.fit", lambda *args, **options: fit(*args, **(options | {"say": None})))
    _, result = fit_tiny(RunDir.create(tmp_path / "run"), train_images, one_class, epochs=4, patience=2)
    assert (result.epochs, result.stopped) == (4, "")
    said = [line for line in lines if "not defined on the validation split" in line]
    assert len(said) == 1
    assert said[0].startswith("epoch 1: auroc_macro is not defined")
    assert "(no validation image is of yes)" in said[0]


def test_patience_counts_only_epochs_with_a_metric(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train_images: Manifest, val_images: Manifest
) -> None:
    scripted(monkeypatch, [0.6, 0.5, None, 0.5, 0.9])
    _, result = fit_tiny(RunDir.create(tmp_path / "run"), train_images, val_images, epochs=5, patience=2)
    assert result.epochs == 4


def test_plateau_without_validation_is_refused_before_training(tmp_path: Path, train_images: Manifest) -> None:
    with pytest.raises(ConfigError, match=r"train\.schedule: plateau.*no validation split"):
        fit_tiny(RunDir.create(tmp_path / "run"), train_images, None, schedule="plateau")


def test_patience_zero_never_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train_images: Manifest, val_images: Manifest
) -> None:
    scripted(monkeypatch, [0.5, *[0.1] * 7])
    _, result = fit_tiny(RunDir.create(tmp_path / "run"), train_images, val_images, epochs=8, patience=0)
    assert (result.epochs, result.stopped) == (8, "")


@pytest.mark.parametrize("defined", [False, True], ids=["never defined", "no validation"])
def test_with_nothing_to_choose_by_the_last_epoch_is_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train_images: Manifest, val_images: Manifest, defined: bool
) -> None:
    scripted(monkeypatch, [None] * 3)
    run = RunDir.create(tmp_path / "run")
    model, result = fit_tiny(run, train_images, None if defined else val_images)
    assert (result.best_epoch, result.best_value) == (2, None)
    best = run.load_best()
    assert (best.card.epoch, best.card.value) == (2, None)
    assert all(torch.equal(tensor, weights(model)[name]) for name, tensor in best.tensors.items())


def test_a_new_phase_starts_from_the_best_weights_and_keeps_the_moments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train_images: Manifest, val_images: Manifest
) -> None:
    shown = scripted(monkeypatch, [0.9, 0.5, 0.5, 0.5])
    seen: dict[str, Any] = {}
    original = loop._Trainer._next_phase

    def next_phase(trainer: loop._Trainer) -> None:
        head = trainer.model.head[1].weight
        before = trainer.optimizer.state[head]["exp_avg"].clone()
        original(trainer)
        seen.setdefault("weights", weights(trainer.model))
        seen.setdefault("kept", torch.equal(trainer.optimizer.state[head]["exp_avg"], before))
        seen.setdefault("groups", [group["name"] for group in trainer.optimizer.param_groups])
        seen.setdefault("fresh", trainer.model.backbone.network.blocks[1].mlp.fc1.weight in trainer.optimizer.state)

    monkeypatch.setattr(loop._Trainer, "_next_phase", next_phase)
    _, result = fit_tiny(RunDir.create(tmp_path / "run"), train_images, val_images, adapt=GRADUAL, epochs=4, patience=2)
    assert all(torch.equal(tensor, shown[0][name]) for name, tensor in seen["weights"].items())
    assert not torch.equal(shown[0]["head.1.weight"], shown[1]["head.1.weight"])
    assert seen["kept"]
    assert not seen["fresh"]
    assert any(name.startswith("backbone.blocks.1") for name in seen["groups"])
    assert [row["phase"] for row in result.history] == [1, 1, 2, 3]


def test_the_strategy_may_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train_images: Manifest) -> None:
    monkeypatch.setattr(
        "eyetune.adapt.freezing.Full.after_epoch",
        lambda self, model, epoch, metric: Advance(Step.STOP, "enough") if epoch == 1 else Advance(),
    )
    _, result = fit_tiny(RunDir.create(tmp_path / "run"), train_images, None, epochs=5)
    assert (result.epochs, result.stopped) == (2, "enough")


def test_divergence_names_the_images_and_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train_images: Manifest
) -> None:
    original = SupervisedTask.loss
    calls = 0

    def loss(task: SupervisedTask, network: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
        nonlocal calls
        calls += 1
        return original(task, network, batch) * (math.nan if calls == 5 else 1.0)

    monkeypatch.setattr(SupervisedTask, "loss", loss)
    run = RunDir.create(tmp_path / "run")
    with pytest.raises(UserError, match=r"in epoch 2: training diverged at batch 2: the loss is nan") as caught:
        fit_tiny(run, train_images, None)
    assert str(caught.value).count("t.csv row") == 4
    last = run.load_last()
    assert last is not None
    assert last.card.epoch == 0


def test_history_has_a_row_an_epoch_with_the_real_rates(
    tmp_path: Path, train_images: Manifest, val_images: Manifest
) -> None:
    run = RunDir.create(tmp_path / "run")
    _, result = fit_tiny(
        run, train_images, val_images, adapt={"kind": "full", "layer_decay": 0.5}, lr=1e-3, schedule="constant"
    )
    rows = run.read_history()
    assert rows == [{name: row[name] for name in rows[0]} for row in result.history]
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    # One column a layer, whether it has parameters with weight decay, without, or both.
    assert {name: rate for name, rate in rows[2].items() if name.startswith("lr")} == pytest.approx(
        {
            "lr/backbone.embeddings": 1e-3 / 16,
            "lr/backbone.blocks.0": 1e-3 / 8,
            "lr/backbone.blocks.1": 1e-3 / 4,
            "lr/backbone.norm": 1e-3 / 2,
            "lr/head": 1e-3,
        }
    )
    assert {"phase", "train_loss", "val_loss", "val_auroc_macro", "seconds", "images_per_second"} <= set(rows[0])
    with open(run.history_file, newline="") as stream:
        assert len(list(csv.DictReader(stream))) == 3


def test_tensorboard_gets_the_rate_of_every_group(tmp_path: Path, train_images: Manifest, val_images: Manifest) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = RunDir.create(tmp_path / "run")
    fit_tiny(
        run,
        train_images,
        val_images,
        adapt={"kind": "full", "layer_decay": 0.5},
        schedule="constant",
        epochs=2,
        tensorboard=True,
    )
    events = EventAccumulator(str(run.tensorboard))
    events.Reload()
    assert events.Scalars("lr/backbone.blocks.1")[1].value == pytest.approx(1e-3 / 4)
    assert events.Scalars("lr/head")[1].value == pytest.approx(1e-3)
    assert [event.step for event in events.Scalars("loss/train")] == [0, 1]
    assert events.Scalars("val/auroc_macro")


def test_undefined_values_stay_out_of_the_dashboards() -> None:
    assert scalars({"epoch": 1, "val_qwk": None, "train_loss": 0.5, "lr/head": 0.1, "lr/backbone.norm": None}) == {
        "loss/train": 0.5,
        "lr/head": 0.1,
    }


def test_a_missing_extra_is_noticed_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_available(TrainConfig())
    with pytest.raises(MissingExtra, match=r"eyetune\[wandb\]"):
        check_available(TrainConfig(wandb=True))


def test_wandb_is_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train_images: Manifest) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(MissingExtra, match=r"eyetune\[wandb\]"):
        fit_tiny(RunDir.create(tmp_path / "run"), train_images, None, epochs=1, wandb=True)


def test_features_once_trains_as_the_images_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train_images: Manifest, val_images: Manifest
) -> None:
    """The same order, the same head: the same weights, while the backbone sees each image once."""
    seen = {"images": 0}
    from eyetune.backbones.backbone import Backbone

    original = Backbone.features

    def features(backbone: Backbone, images: Tensor) -> Tensor:
        seen["images"] += len(images)
        return original(backbone, images)

    monkeypatch.setattr(Backbone, "features", features)
    # Without dropout: a DataLoader draws one number from the generator that dropout draws from.
    options: dict[str, Any] = {"adapt": "linear", "dropout": 0.0}
    slow, _ = fit_tiny(RunDir.create(tmp_path / "slow"), train_images, val_images, **options)
    assert seen.pop("images") == 3 * 16
    seen["images"] = 0
    fast, _ = fit_tiny(RunDir.create(tmp_path / "fast"), train_images, val_images, features_once=True, **options)
    assert seen["images"] == 16
    for mine, theirs in zip(fast.parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=0)


def test_features_stand_at_the_index_of_their_image(train_images: Manifest) -> None:
    model, _ = tiny_model("linear")
    runtime = Runtime("cpu", "fp32")
    shuffled = loader(train_images, training=True, batch_size=3)
    shuffled.set_epoch(5)
    found = compute_once(model, shuffled, runtime, "")
    expected = predict(model.backbone, loader(train_images, training=False), runtime).raw
    torch.testing.assert_close(found.features, expected[None])
    found.set_epoch(2)
    shuffled.set_epoch(2)
    for mine, theirs in zip(found, shuffled, strict=True):
        assert torch.equal(mine["index"], theirs["index"])
        assert torch.equal(mine["target"], theirs["target"])
        torch.testing.assert_close(mine["features"], expected[theirs["index"]])


def test_features_are_computed_once_only_where_they_cannot_change() -> None:
    _, linear = tiny_model("linear")
    _, full = tiny_model("full")
    plain = TrainConfig()
    assert can_compute_once(linear, plain, "none")
    assert can_compute_once(linear, plain, ())
    assert not can_compute_once(linear, plain, "light")
    assert not can_compute_once(linear, plain, ("RandomHorizontalFlip",))
    assert not can_compute_once(linear, TrainConfig(mixup=0.2), "none")
    assert not can_compute_once(linear, TrainConfig(cutmix=1.0), "none")
    assert not can_compute_once(full, plain, "none")


def test_bf16_learns_with_float32_weights(tmp_path: Path, train_images: Manifest, val_images: Manifest) -> None:
    model, result = fit_tiny(
        RunDir.create(tmp_path / "run"), train_images, val_images, precision="bf16", epochs=5, patience=0
    )
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert result.history[-1]["train_loss"] < 0.7 * result.history[0]["train_loss"]


def test_gradient_checkpointing_changes_nothing(tmp_path: Path, train_images: Manifest) -> None:
    models = [
        fit_tiny(
            RunDir.create(tmp_path / str(on)), train_images, None, epochs=1, warmup_epochs=0, grad_checkpointing=on
        )[0]
        for on in (False, True)
    ]
    assert models[1].backbone.network.grad_checkpointing
    untrained, _ = tiny_model()
    for plain, checkpointed, fresh in zip(*(model.parameters() for model in (*models, untrained)), strict=True):
        torch.testing.assert_close(plain, checkpointed, atol=1e-6, rtol=0)
        assert not torch.equal(plain, fresh)


@pytest.mark.slow
def test_compiled_it_trains_to_the_same(tmp_path: Path) -> None:
    images = photographs(tmp_path / "images", 8)
    losses = []
    for on in (False, True):
        model, result = fit_tiny(
            RunDir.create(tmp_path / str(on)), images, None, adapt="lora", epochs=1, compile=on, dropout=0.0
        )
        losses.append(result.history[0]["train_loss"])
        assert all((block._compiled_call_impl is not None) == on for block in model.backbone.blocks())
    # LoRA's and the network's own dropout draw otherwise when compiled.
    assert losses[1] == pytest.approx(losses[0], abs=0.05)


def test_a_disk_that_fills_up_leaves_a_run_that_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train_images: Manifest, val_images: Manifest
) -> None:
    run = RunDir.create(tmp_path / "run")
    original = files.sync
    calls = 0

    def sync(path: Path) -> None:
        nonlocal calls
        calls += 1
        if calls > 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(path)

    with monkeypatch.context() as patch:
        patch.setattr(files, "sync", sync)
        with pytest.raises(UserError, match="disk is full"):
            fit_tiny(run, train_images, val_images)
    _, result = fit_tiny(run, train_images, val_images, resume=True)
    assert result.epochs == 3


def test_fit_speaks_a_line_an_epoch(tmp_path: Path, train_images: Manifest, val_images: Manifest) -> None:
    settings = TrainConfig(epochs=2, batch_size=4, tensorboard=False)
    model, strategy = tiny_model("linear")
    lines: list[str] = []
    fit(
        model,
        strategy,
        SupervisedTask.of(train_images, settings),
        loader(train_images, training=True),
        loader(val_images, training=False),
        run=RunDir.create(tmp_path / "run"),
        runtime=Runtime("cpu", "fp32"),
        train=settings,
        lr=1e-3,
        card=card(),
        say=lines.append,
    )
    assert [line.split("  ")[0] for line in lines] == ["epoch 1/2", "epoch 2/2"]
    assert "auroc_macro" in lines[0]
    assert "(best)" in lines[0]
    assert "images/s" in lines[0]


@pytest.mark.slow
def test_a_reading_process_that_dies_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    """As when memory runs out: SIGKILL, and no hang."""
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, str(here / "faults" / "reader.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(here), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=90,  # a minute for the error, and the imports
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"a process that reads images has died.*--workers", done.stdout)
