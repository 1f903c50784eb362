"""fit(): the only training loop."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from eyetune.adapt.strategy import Step
from eyetune.errors import ConfigError, RunError, UserError
from eyetune.train.features import FeatureHead, compute_once
from eyetune.train.logs import Log, open_logs
from eyetune.train.optim import (
    Schedule,
    build_optimizer,
    build_schedule,
    carry_over,
    layer_rates,
    load_state_tensors,
    state_tensors,
)
from eyetune.train.rundir import ModelCard, RunDir
from eyetune.train.steps import EpochResult, train_epoch
from eyetune.train.task import SMALLER_FORWARD, Batches, Task, Validation, enough_memory

if TYPE_CHECKING:
    from eyetune.adapt.classifier import Classifier
    from eyetune.adapt.strategy import Strategy
    from eyetune.config import TrainConfig
    from eyetune.data.loader import Loader
    from eyetune.runtime import Runtime

Say = Callable[[str], None]


@dataclass
class Progress:
    """How far a run is: all that is not in tensors. Written into the `last` checkpoint and read back to resume."""

    epochs_done: int = 0
    phase: int = 1
    best_epoch: int | None = None
    best_value: float | None = None
    waited: int = 0
    """Epochs since the best one, in the last phase; those whose metric is not defined do not count."""
    stopped: str = ""
    """Why the run ended before its last epoch."""
    history: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class FitResult:
    """What came of a run. The model holds the best epoch's weights."""

    best_epoch: int
    """From 0."""
    best_value: float | None
    """The chosen metric then; None without a validation split, or where it was never defined."""
    metric: str
    epochs: int
    """How many were run, those before a resume included."""
    stopped: str
    """Why before the last one; empty when all were run."""
    history: list[dict[str, Any]]


def fit(
    model: Classifier,
    strategy: Strategy,
    task: Task,
    train_loader: Loader,
    val_loader: Loader | None,
    *,
    run: RunDir,
    runtime: Runtime,
    train: TrainConfig,
    lr: float,
    card: ModelCard,
    resume: bool = False,
    features_once: bool = False,
    settings: dict[str, Any] | None = None,
    say: Say | None = None,
) -> FitResult:
    """Train `model`, keep the best epoch, leave the model with its weights.

    Args:
        model: with the strategy applied; on any device.
        strategy: decides what trains; its hooks are called here.
        task: the loss and the validation.
        train_loader, val_loader: batches; without validation the last epoch counts as the best.
        run: where checkpoints and history go.
        lr: the head's learning rate (`Config.learning_rate`).
        card: describes the model; epoch and metric are filled in here.
        resume: go on from `run`'s last checkpoint; from the start when no epoch was finished.
        features_once: compute the backbone's features once (see features.can_compute_once).
        settings: the configuration, for Weights & Biases.
        say: takes a line an epoch; None prints to stderr.

    Raises ConfigError when the schedule needs a validation split and there is none, UserError when training diverges
    (NaN or infinite loss), the device's memory is too small or the run folder cannot be written, RunError when the
    checkpoint to resume from is damaged or of another model, and KeyboardInterrupt, saying how to go on, on Ctrl-C.
    """
    trainer = _Trainer(
        model, strategy, task, run=run, runtime=runtime, train=train, lr=lr, card=card, say=say or _to_stderr
    )
    try:
        trainer.prepare(train_loader, val_loader, resume=resume, features_once=features_once)
        return trainer.run_epochs(open_logs(run, train, trainer.progress.epochs_done, settings or {}))
    except KeyboardInterrupt:
        done = trainer.epochs_saved
        kept = f"{done} of {trainer.epochs} epochs are kept" if done else "no epoch was finished yet"
        raise KeyboardInterrupt(f"{kept} in {run.path}. Go on with: eyetune finetune --resume {run.path}") from None


class _Trainer:
    """The parts of one run, and its story: prepare, then epoch after epoch."""

    optimizer: torch.optim.Optimizer
    schedule: Schedule
    network: nn.Module
    train_loader: Batches
    val_loader: Batches | None

    def __init__(
        self,
        model: Classifier,
        strategy: Strategy,
        task: Task,
        *,
        run: RunDir,
        runtime: Runtime,
        train: TrainConfig,
        lr: float,
        card: ModelCard,
        say: Say,
    ) -> None:
        self.model = model
        self.strategy = strategy
        self.task = task
        self.run = run
        self.runtime = runtime
        self.train = train
        self.lr = lr
        self.card = card
        self.say = say if runtime.is_main else lambda line: None
        self.epochs = strategy.epochs(train.epochs)
        self.progress = Progress()
        self.epochs_saved = 0  # what a resumed run would find on disk
        self.on_features = False

    def prepare(self, train_loader: Loader, val_loader: Loader | None, *, resume: bool, features_once: bool) -> None:
        """Model on the device, resumed where asked; optimizer, schedule, and the loaders the epochs run over."""
        if self.train.schedule == "plateau" and val_loader is None:
            raise ConfigError(
                "train.schedule: plateau lowers the learning rate when the validation score stalls, and there is no "
                "validation split. Use cosine or constant, or keep some images for validation (data.val)."
            )
        last = self.run.load_last() if resume else None
        self.runtime.place(self.model)
        if self.train.grad_checkpointing:
            self.model.backbone.set_grad_checkpointing(True)
        if last is not None:
            self._check_same(last.card)
            self.progress = _read_progress(last.state, self.run)
            self.epochs_saved = self.progress.epochs_done
            self.strategy.load_state(self.model, last.state["strategy"])
            self.strategy.load_checkpoint(self.model, last.tensors)
            self.runtime.wait()  # all have read
            with self.runtime.main_first():
                self.run.settle(self.progress.best_epoch)
        self.train_loader = train_loader
        self.val_loader = val_loader
        self.on_features = features_once
        if features_once and not self._finished():
            with enough_memory(SMALLER_FORWARD):
                self.train_loader = compute_once(
                    self.model,
                    train_loader,
                    self.runtime,
                    "Features of the training images",
                    views=self.strategy.views,
                )
                if val_loader is not None:
                    self.val_loader = compute_once(
                        self.model, val_loader, self.runtime, "Features of the validation images"
                    )
        steps = math.ceil(len(self.train_loader) / self.train.accumulate)
        self._build(steps)
        if last is not None:
            try:
                load_state_tensors(self.optimizer, self.model, last.optimizer)
            except ValueError as error:
                raise RunError(f"{self.run.last} does not fit this run: {error}.") from error
            self.schedule.load_state(last.state["schedule"])
            if self.runtime.scaler is not None and last.state.get("scaler"):
                self.runtime.scaler.load_state_dict(last.state["scaler"])
            self.say(f"going on after epoch {self.progress.epochs_done} of {self.epochs}")

    def run_epochs(self, logs: list[Log]) -> FitResult:
        """The epochs that are left; then the best weights back into the model."""
        try:
            while not self._finished():
                self._epoch(self.progress.epochs_done, logs)
        finally:
            for log in logs:
                log.close()
        if self.progress.stopped:
            self.say(f"stopped: {self.progress.stopped}")
        return self._finish()

    # -- one epoch ---------------------------------------------------------------------------------------------------

    def _epoch(self, epoch: int, logs: Iterable[Log]) -> None:
        self.runtime.seed_epoch(epoch)
        self.train_loader.set_epoch(epoch)
        self.strategy.set_mode(self.model, True)
        try:
            trained = train_epoch(
                self.network,
                self.task,
                self.train_loader,
                optimizer=self.optimizer,
                schedule=self.schedule,
                runtime=self.runtime,
                batch_size=self.train.batch_size,
                accumulate=self.train.accumulate,
                clip_norm=self.train.clip_norm,
                description="" if self.on_features else f"Epoch {epoch + 1}/{self.epochs}",
            )
        except UserError as error:
            kept = f"The checkpoint of epoch {epoch} is kept in {self.run.last}." if epoch else ""
            raise UserError(f"in epoch {epoch + 1}: {error}\n{kept}".rstrip()) from error
        self.strategy.set_mode(self.model, False)
        validation = Validation(None, {})
        if self.val_loader is not None:
            validation = self.task.validate(self.network, self.val_loader, self.runtime)
        value = _defined(validation.metrics.get(self.task.metric))
        improved = self._note_best(epoch, value)
        row = self._row(epoch, trained, validation)
        if self.val_loader is not None and value is None:
            self._say_undefined(epoch, validation)
        self.progress.history.append(row)
        self.progress.epochs_done = epoch + 1
        if improved:
            self.run.save_best(self.strategy.checkpoint(self.model), self.card.at(epoch, self.task.metric, value))
        self._say_row(row, trained, value, improved)
        self._advance(epoch, value)
        self._save_last(epoch, value)
        self.epochs_saved = epoch + 1
        self.run.write_history(self.progress.history)
        for log in logs:
            log.epoch(epoch, row)

    def _note_best(self, epoch: int, value: float | None) -> bool:
        """Whether `epoch` is the best so far. A metric that is not defined is never the best, nor worse than it."""
        signed, best = self._signed(value), self._signed(self.progress.best_value)
        improved = signed is not None and (best is None or signed > best)
        if improved:
            self.progress.best_epoch, self.progress.best_value, self.progress.waited = epoch, value, 0
        elif signed is not None and self.strategy.last_phase():
            self.progress.waited += 1
        return improved

    def _advance(self, epoch: int, value: float | None) -> None:
        """Let schedule and strategy draw their consequences from the epoch."""
        signed = self._signed(value)
        self.schedule.end_epoch(signed)
        advance = self.strategy.after_epoch(self.model, epoch, signed)
        if advance.step is Step.STOP:
            self.progress.stopped = advance.message or "the strategy is done"
        elif advance.step is Step.NEXT_PHASE:
            self.say(advance.message)
            self._next_phase()
        elif self._out_of_patience():
            self.progress.stopped = f"no better {self.task.metric} for {self.train.patience} epochs"

    def _out_of_patience(self) -> bool:
        return (
            self.train.patience > 0
            and self.val_loader is not None
            and self.strategy.last_phase()
            and self.progress.waited >= self.train.patience
        )

    def _next_phase(self) -> None:
        self.runtime.wait()  # the main process has written the best checkpoint that all read
        if self.progress.best_epoch is not None:
            best = self.run.load_best(self.progress.best_epoch)
            self.strategy.load_checkpoint(self.model, best.tensors)
        self.progress.phase += 1
        self.progress.waited = 0
        old = self.optimizer
        self.optimizer = build_optimizer(self.strategy.groups(self.model), self.lr, self.train.weight_decay)
        carry_over(old, self.optimizer)
        self.schedule.attach(self.optimizer)
        self.model.zero_grad(set_to_none=True)
        self._wrap()

    def _save_last(self, epoch: int, value: float | None) -> None:
        scaler = self.runtime.scaler
        state = {
            **vars(self.progress),
            "schedule": self.schedule.state(),
            "strategy": self.strategy.state(),
            "scaler": scaler.state_dict() if scaler is not None else None,
        }
        self.run.save_last(
            self.strategy.checkpoint(self.model) if self.run.main else {},
            self.card.at(epoch, self.task.metric, value),
            state_tensors(self.optimizer, self.model) if self.run.main else {},
            state,
        )

    # -- parts -------------------------------------------------------------------------------------------------------

    def _build(self, steps: int) -> None:
        self.optimizer = build_optimizer(self.strategy.groups(self.model), self.lr, self.train.weight_decay)
        self.schedule = build_schedule(self.optimizer, self.train, epochs=self.epochs, steps_per_epoch=steps)
        self._wrap()

    def _wrap(self) -> None:
        """The network that forward and backward run through; wrapped anew when other parameters train."""
        network: nn.Module = FeatureHead(self.model) if self.on_features else self.model
        if self.train.compile:
            network.compile()
        self.network = self.runtime.prepare(network)

    def _finished(self) -> bool:
        return bool(self.progress.stopped) or self.progress.epochs_done >= self.epochs

    def _finish(self) -> FitResult:
        progress = self.progress
        if progress.best_epoch is None:
            # Nothing to choose by: the last weights are the result.
            progress.best_epoch = progress.epochs_done - 1
            if self.val_loader is not None:
                self.say(f"{self.task.metric} was not defined in any epoch: the last one counts as the best")
            self.run.save_best(
                self.strategy.checkpoint(self.model), self.card.at(progress.best_epoch, self.task.metric, None)
            )
            self._save_last(progress.best_epoch, None)
        else:
            self.runtime.wait()
            self.strategy.load_checkpoint(self.model, self.run.load_best(progress.best_epoch).tensors)
        self.strategy.set_mode(self.model, False)
        return FitResult(
            best_epoch=progress.best_epoch,
            best_value=progress.best_value,
            metric=self.task.metric,
            epochs=progress.epochs_done,
            stopped=progress.stopped,
            history=progress.history,
        )

    def _check_same(self, card: ModelCard) -> None:
        mine, theirs = self.card, card
        for name in ("backbone", "pool", "pixels", "fingerprint", "classes"):
            if getattr(mine, name) != getattr(theirs, name):
                what = "base weights" if name == "fingerprint" else name
                raise RunError(
                    f"cannot go on with {self.run.path}: its {what} were {getattr(theirs, name)!r}, "
                    f"now they are {getattr(mine, name)!r}."
                )

    def _signed(self, value: float | None) -> float | None:
        """`value` so that higher is better."""
        if value is None:
            return None
        return value if self.task.higher_is_better else -value

    def _row(self, epoch: int, trained: EpochResult, validation: Validation) -> dict[str, Any]:
        return {
            "epoch": epoch + 1,
            "phase": self.progress.phase,
            "train_loss": trained.loss,
            "val_loss": validation.loss,
            **{f"val_{name}": _defined(value) for name, value in validation.metrics.items()},
            "seconds": round(trained.seconds, 3),
            "images_per_second": round(trained.images / max(trained.seconds, 1e-9), 2),
            **{f"lr/{layer}": rate for layer, rate in layer_rates(trained.rates).items()},
        }

    def _say_undefined(self, epoch: int, validation: Validation) -> None:
        """Once a run: that the epoch has no score to choose by, and why as far as known."""
        column = f"val_{self.task.metric}"
        if all(row.get(column) is not None for row in self.progress.history):
            because = f" ({validation.gaps})" if validation.gaps else ""
            self.say(
                f"epoch {epoch + 1}: {self.task.metric} is not defined on the validation split{because}. Epochs "
                "without it are never the best and do not count towards stopping early."
            )

    def _say_row(self, row: dict[str, Any], trained: EpochResult, value: float | None, improved: bool) -> None:
        lowest, highest = min(trained.rates.values()), max(trained.rates.values())
        rates = f"{lowest:.2e}" if lowest == highest else f"{lowest:.2e} … {highest:.2e}"
        parts = [f"epoch {row['epoch']:>{len(str(self.epochs))}}/{self.epochs}", f"train loss {row['train_loss']:.4f}"]
        if row["val_loss"] is not None:
            parts.append(f"val loss {row['val_loss']:.4f}")
        if self.val_loader is not None:
            shown = "not defined" if value is None else f"{value:.4f}"
            parts.append(f"{self.task.metric} {shown}{' (best)' if improved else ''}")
        self.say("  ".join([*parts, f"lr {rates}", f"{row['images_per_second']:.1f} images/s"]))


def _read_progress(state: dict[str, Any], run: RunDir) -> Progress:
    try:
        return Progress(**{name: state[name] for name in vars(Progress())})
    except KeyError as error:
        raise RunError(f"{run.last} is damaged: its state lacks {error}.") from error


def _defined(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
