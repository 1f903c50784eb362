"""fit(): the only training loop."""

from __future__ import annotations

import contextlib
import math
import signal
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from eyetune.adapt.strategy import Step
from eyetune.errors import ConfigError, RunError, UserError
from eyetune.interrupt import Interrupted, at_once, deferred, heeded, obey, pending
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
from eyetune.train.rundir import Checkpoint, ModelCard, RunDir
from eyetune.train.steps import EpochResult, EpochState, EpochStopped, train_epoch
from eyetune.train.task import Batch, Batches, Task, Validation

if TYPE_CHECKING:
    from eyetune.adapt.classifier import Classifier
    from eyetune.adapt.strategy import Strategy
    from eyetune.backbones.backbone import Backbone
    from eyetune.config import LoopConfig
    from eyetune.data.loader import Loader
    from eyetune.runtime import Runtime

Say = Callable[[str], None]

AfterEpoch = Callable[[int, float | None, dict[str, Any]], None]
"""Told of every epoch that is done and saved: which (from 0), its validation metric, its row of history.csv."""


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
    card: ModelCard
    """Of the best epoch, with what was fitted on its validation."""


def fit(
    model: Classifier,
    strategy: Strategy,
    task: Task,
    train_loader: Loader,
    val_loader: Loader | None,
    *,
    run: RunDir,
    runtime: Runtime,
    train: LoopConfig,
    lr: float,
    card: ModelCard,
    resume: bool = False,
    features_once: bool = False,
    settings: dict[str, Any] | None = None,
    say: Say | None = None,
    after_epoch: AfterEpoch | None = None,
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
        after_epoch: is told of every epoch, and may end the run by raising.

    Raises ConfigError when the schedule needs a validation split and there is none, UserError when training diverges
    (NaN or infinite loss), the device's memory is too small or the run folder cannot be written, RunError when the
    checkpoint to resume from is damaged or of another model. On Ctrl-C and SIGTERM saves where it is, at the end of
    the batch, and raises Interrupted (a KeyboardInterrupt), saying what is kept and how to go on.
    """
    trainer = _Trainer(
        model, strategy, task, run=run, runtime=runtime, train=train, lr=lr, card=card, say=say or _to_stderr
    )
    with heeded():
        try:
            trainer.prepare(train_loader, val_loader, resume=resume, features_once=features_once)
            return trainer.run_epochs(open_logs(run, train, trainer.progress.epochs_done, settings or {}), after_epoch)
        except KeyboardInterrupt as interrupt:
            text = f"{trainer.kept()} in {run.path}. Go on with: {run.resume_command()}"
            raise Interrupted(text, getattr(interrupt, "signum", signal.SIGINT)) from None


def check_validation(task: Task, train: LoopConfig, there: bool) -> None:
    """Raise ConfigError when there is no validation split, and schedule or task cannot do without."""
    if there:
        return
    if train.schedule == "plateau":
        raise ConfigError(
            "train.schedule: plateau lowers the learning rate when the validation score stalls, and there is no "
            "validation split. Use cosine or constant, or keep some images for validation (data.val)."
        )
    if task.needs_validation:
        raise ConfigError(f"{task.needs_validation}, and there are none. Keep some images for validation (data.val).")


class _Trainer:
    """The parts of one run, and its story: prepare, then epoch after epoch."""

    optimizer: torch.optim.Optimizer
    schedule: Schedule
    network: nn.Module
    train_loader: Batches
    val_loader: Batches | None
    finish: Callable[[Batch], Batch]
    """What is left to do to a training batch on the device."""

    def __init__(
        self,
        model: Classifier,
        strategy: Strategy,
        task: Task,
        *,
        run: RunDir,
        runtime: Runtime,
        train: LoopConfig,
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
        #: What a resumed run would find on the disk: finished epochs, and what was done of the next one.
        self.epochs_saved = 0
        self.part_saved = ""
        #: Where inside an epoch the run goes on: in the middle of training it, or before validating it.
        self.begun: EpochState | EpochResult | None = None
        self.on_features = False

    def prepare(self, train_loader: Loader, val_loader: Loader | None, *, resume: bool, features_once: bool) -> None:
        """Model on the device, resumed where asked; optimizer, schedule, and the loaders the epochs run over."""
        check_validation(self.task, self.train, val_loader is not None)
        last = self.run.load_last() if resume else None
        self.runtime.place(self.model, move=not self.train.fsdp)
        if self.train.grad_checkpointing:
            for tower in self.model.towers().values():
                tower.set_grad_checkpointing(True)
        if last is not None:
            self._check_same(last.card)
            self.card = replace(self.card, task=last.card.task)
            self.progress = _read_progress(last.state, self.run)
            self.epochs_saved = self.progress.epochs_done
            self.strategy.load_state(self.model, last.state["strategy"])
            self.strategy.load_checkpoint(self.model, last.tensors)
            if self.progress.best_epoch is not None:
                self.run.load_best(self.progress.best_epoch)  # damage is better known now than at the end
            self.runtime.wait()  # all have read
            with self.runtime.main_first():
                self.run.settle(self.progress.best_epoch)
                self.run.write_history(self.progress.history)
        self.train_loader = train_loader
        self.val_loader = val_loader
        self.finish = train_loader.finish
        self.on_features = features_once
        if features_once and not self._finished():
            self.train_loader = compute_once(
                self.model, train_loader, self.runtime, "Features of the training images", views=self.strategy.views
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
            self._load_part(last)
            part = f" and {self.part_saved}" if self.part_saved else ""
            self.say(f"going on after epoch {self.progress.epochs_done} of {self.epochs}{part}")

    def run_epochs(self, logs: list[Log], after_epoch: AfterEpoch | None = None) -> FitResult:
        """The epochs that are left; then the best weights back into the model."""
        try:
            if self.progress.history:  # killed between saving an epoch and logging it
                for log in logs:
                    log.epoch(self.progress.epochs_done - 1, self.progress.history[-1])
            while not self._finished():
                self._epoch(self.progress.epochs_done, logs)
                if after_epoch is not None:
                    row = self.progress.history[-1]
                    after_epoch(self.progress.epochs_done - 1, row.get(f"val_{self.task.metric}"), row)
        finally:
            for log in logs:
                log.close()
        if self.progress.stopped:
            self.say(f"stopped: {self.progress.stopped}")
        return self._finish()

    # -- one epoch ---------------------------------------------------------------------------------------------------

    def _epoch(self, epoch: int, logs: Iterable[Log]) -> None:
        with deferred():  # from end to end: who asks to stop in between two parts finds the one saved
            trained = self.begun if isinstance(self.begun, EpochResult) else self._train(epoch)
            self.begun = None
            validation = self._validate(epoch, trained)
            self._commit(epoch, trained, validation, logs)
            if self.runtime.any(pending() is not None) and not self._finished():
                raise obey("")

    def _train(self, epoch: int) -> EpochResult:
        """One pass over the training images, or what is left of it; stopped, it is saved where it is."""
        start = self.begun if isinstance(self.begun, EpochState) else None
        if start is None:
            self.runtime.seed_epoch(epoch)
        self.train_loader.set_epoch(epoch, start.batches if start else 0)
        self.strategy.set_mode(self.model, True)
        try:
            return train_epoch(
                self.network,
                self.task,
                self.train_loader,
                optimizer=self.optimizer,
                schedule=self.schedule,
                runtime=self.runtime,
                batch_size=self.train.batch_size,
                accumulate=self.train.accumulate,
                clip_norm=self.train.clip_norm,
                skip_nonfinite=self.train.skip_nonfinite,
                description="" if self.on_features else f"Epoch {epoch + 1}/{self.epochs}",
                start=start,
                stop=lambda: pending() is not None,
                finish=self.finish,
            )
        except EpochStopped as stopped:
            self._save_part(stopped.state)
            raise obey("") from None
        except UserError as error:
            kept = f"The state after {self.kept(short=True)} is kept in {self.run.last}." if self._anything() else ""
            raise UserError(f"in epoch {epoch + 1}: {error}\n{kept}".rstrip()) from error

    def _validate(self, epoch: int, trained: EpochResult) -> Validation:
        """The epoch's score. Interrupted, its training is saved: validation itself is done again."""
        self.strategy.set_mode(self.model, False)
        try:
            if self.runtime.any(pending() is not None):
                raise obey("")
            if self.val_loader is None:
                return Validation(None, {})
            # Not through what wraps the network for training: processes may have different numbers of batches here.
            self.runtime.share_buffers(self.model)
            # Several processes have to stop together (see task.predict): one that left in the middle of what they do
            # together would have the others wait, or take what it saves for what they wait for.
            with at_once() if self.runtime.processes == 1 else contextlib.nullcontext():
                return self.task.validate(self._plain(), self.val_loader, self.runtime)
        except KeyboardInterrupt as interrupt:
            if not getattr(interrupt, "again", False):
                self._save_part(trained)
            raise

    def _commit(self, epoch: int, trained: EpochResult, validation: Validation, logs: Iterable[Log]) -> None:
        """Take the epoch into the account, save it, and only then speak of it."""
        value = _defined(validation.metrics.get(self.task.metric))
        if validation.task is not None:
            self.card = replace(self.card, task=validation.task)
        improved = self._note_best(epoch, value)
        row = self._row(epoch, trained, validation)
        if self.val_loader is not None and value is None:
            self._say_undefined(epoch, validation)
        self.progress.history.append(row)
        self.progress.epochs_done = epoch + 1
        if improved:
            self.run.save_best(self.strategy.checkpoint(self.model), self.card.at(epoch, self.task.metric, value))
        if self.train.save_every and (epoch + 1) % self.train.save_every == 0:
            self.run.save_epoch(self.strategy.checkpoint(self.model), self.card.at(epoch, self.task.metric, value))
        news = self._advance(epoch, value)
        self._save_last(epoch, value)
        self.epochs_saved, self.part_saved = epoch + 1, ""
        self._say_row(row, trained, value, improved)
        if news:
            self.say(news)
        self.run.write_history(self.progress.history)
        for log in logs:
            log.epoch(epoch, row)

    # -- inside an epoch ---------------------------------------------------------------------------------------------

    def _save_part(self, done: EpochState | EpochResult) -> None:
        """Save the run inside an epoch: in the middle of training it, or trained and not yet validated."""
        mine = self.runtime.random_state() if isinstance(done, EpochState) else {}
        shares = self.runtime.gather((asdict(done), mine)) if isinstance(done, EpochState) else [(asdict(done), mine)]
        part = {
            "kind": type(done).__name__,
            "processes": self.runtime.processes,
            "done": [share for share, _ in shares],
        }
        gradients = {
            name: parameter.grad
            for name, parameter in self.model.named_parameters()
            if isinstance(done, EpochState) and done.in_step and parameter.grad is not None
        }
        random = {f"{rank}|{name}": state for rank, (_, one) in enumerate(shares) for name, state in one.items()}
        self._save_last(self.progress.epochs_done - 1, None, part=part, random=random, gradients=gradients)
        self.part_saved = self._part_text(done)

    def _load_part(self, last: Checkpoint) -> None:
        """Go back to where :meth:`_save_part` left. Raises RunError when that cannot be."""
        part = last.state.get("part")
        if not part:
            return
        try:
            if part["kind"] == EpochResult.__name__:
                self.begun = EpochResult(**part["done"][0])
            elif part["processes"] != self.runtime.processes:
                raise RunError(
                    f"{self.run.path} was stopped in the middle of an epoch with {part['processes']} processes, and "
                    f"only as many can go on from there; here are {self.runtime.processes}. Start as many, or go back "
                    f"to the last whole epoch: {self.run.resume_command()} --from previous"
                )
            else:
                self.begun = EpochState(**part["done"][self.runtime.rank])
                prefix = f"{self.runtime.rank}|"
                self.runtime.set_random_state(
                    {name[len(prefix) :]: state for name, state in last.random.items() if name.startswith(prefix)}
                )
                self._load_gradients(last.gradients)
        except (KeyError, TypeError, IndexError) as error:
            raise RunError(f"{self.run.last} is damaged: its state lacks {error}.") from error
        self.part_saved = self._part_text(self.begun)

    def _load_gradients(self, gradients: dict[str, torch.Tensor]) -> None:
        parameters = dict(self.model.named_parameters())
        for name, gradient in gradients.items():
            parameter = parameters.get(name)
            if parameter is None or parameter.shape != gradient.shape or parameter.dtype != gradient.dtype:
                raise RunError(f"{self.run.last} does not fit this run: it has a gradient for {name!r}.")
            parameter.grad = gradient.to(parameter.device, copy=True)

    def _part_text(self, done: EpochState | EpochResult) -> str:
        epoch = self.progress.epochs_done + 1
        if isinstance(done, EpochResult):
            return f"the training of epoch {epoch}"
        return f"{done.batches} of {len(self.train_loader)} batches of epoch {epoch}"

    def kept(self, *, short: bool = False) -> str:
        """What a resumed run would find."""
        done, part = self.epochs_saved, self.part_saved
        if short:
            return " and ".join(filter(None, [f"epoch {done}" if done else "", part]))
        if not done and not part:
            return "no epoch was finished yet"
        whole = f"{done} of {self.epochs} epochs"
        return f"{whole} and {part} are kept" if part else f"{whole} are kept"

    def _anything(self) -> bool:
        return bool(self.epochs_saved or self.part_saved)

    def _note_best(self, epoch: int, value: float | None) -> bool:
        """Whether `epoch` is the best so far. A metric that is not defined is never the best, nor worse than it."""
        signed, best = self._signed(value), self._signed(self.progress.best_value)
        improved = signed is not None and (best is None or signed > best)
        if improved:
            self.progress.best_epoch, self.progress.best_value, self.progress.waited = epoch, value, 0
        elif signed is not None and self.strategy.last_phase():
            self.progress.waited += 1
        return improved

    def _advance(self, epoch: int, value: float | None) -> str:
        """Let schedule and strategy draw their consequences from the epoch; returns what there is to say of them."""
        signed = self._signed(value)
        self.schedule.end_epoch(signed)
        advance = self.strategy.after_epoch(self.model, epoch, signed)
        if advance.step is Step.STOP:
            self.progress.stopped = advance.message or "the strategy is done"
        elif advance.step is Step.NEXT_PHASE:
            self._next_phase()
            return advance.message
        elif self._out_of_patience():
            self.progress.stopped = f"no better {self.task.metric} for {self.train.patience} epochs"
        return ""

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
        self.runtime.unwrap(self.network)
        self._wrap()

    def _save_last(
        self,
        epoch: int,
        value: float | None,
        *,
        part: dict[str, Any] | None = None,
        random: dict[str, torch.Tensor] | None = None,
        gradients: dict[str, torch.Tensor] | None = None,
    ) -> None:
        scaler = self.runtime.scaler
        state = {
            **vars(self.progress),
            "schedule": self.schedule.state(),
            "strategy": self.strategy.state(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "part": part,
        }
        self.run.save_last(
            self.strategy.checkpoint(self.model) if self.run.main or self.train.fsdp else {},
            self.card.at(epoch, self.task.metric, value),
            state_tensors(self.optimizer, self.model) if self.run.main or self.train.fsdp else {},
            state,
            random=random,
            gradients=gradients,
        )

    # -- parts -------------------------------------------------------------------------------------------------------

    def _build(self, steps: int) -> None:
        groups = self.strategy.groups(self.model)
        if self.train.fsdp:
            names = {parameter: name for name, parameter in self.model.named_parameters()}
            self.runtime.shard(self.model, self.model.backbone.blocks())
            split = dict(self.model.named_parameters())
            for group in groups:
                group.parameters = [split[names[parameter]] for parameter in group.parameters]
        self.optimizer = build_optimizer(groups, self.lr, self.train.weight_decay)
        self.schedule = build_schedule(self.optimizer, self.train, epochs=self.epochs, steps_per_epoch=steps)
        self._wrap()

    def _wrap(self) -> None:
        """The network that forward and backward run through; wrapped anew when other parameters train."""
        network = self._plain()
        if self.train.compile and not self.on_features:
            for tower in self.model.towers().values():
                compile_network(tower)
        self.network = self.runtime.prepare(network)

    def _plain(self) -> nn.Module:
        """The network on one process's part: images or, when they are computed once, features to logits."""
        return FeatureHead(self.model) if self.on_features else self.model

    def _finished(self) -> bool:
        return bool(self.progress.stopped) or self.progress.epochs_done >= self.epochs

    def _finish(self) -> FitResult:
        progress = self.progress
        self.runtime.unwrap(self.network)
        if progress.best_epoch is None:
            # Nothing to choose by: the last weights are the result.
            progress.best_epoch = progress.epochs_done - 1
            if self.val_loader is not None:
                self.say(f"{self.task.metric} was not defined in any epoch: the last one counts as the best")
            self.run.save_best(
                self.strategy.checkpoint(self.model), self.card.at(progress.best_epoch, self.task.metric, None)
            )
            self._save_last(progress.best_epoch, None)
            card = self.card.at(progress.best_epoch, self.task.metric, None)
        else:
            self.runtime.wait()
            best = self.run.load_best(progress.best_epoch)
            self.strategy.load_checkpoint(self.model, best.tensors)
            card = self.card.at(progress.best_epoch, self.task.metric, progress.best_value)
            card = replace(card, task=best.card.task)
        self.runtime.wait()  # all have read the best
        self.run.drop_previous()
        self.strategy.set_mode(self.model, False)
        return FitResult(
            best_epoch=progress.best_epoch,
            best_value=progress.best_value,
            metric=self.task.metric,
            epochs=progress.epochs_done,
            stopped=progress.stopped,
            history=progress.history,
            card=card,
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
        tasks = [{"kind": "classification", "head": "softmax"} | one.task for one in (theirs, mine)]
        before, now = (f"{one['kind']}, {one['head']}" for one in tasks)
        if before != now:
            raise RunError(f"cannot go on with {self.run.path}: its task was {before}, now it is {now}.")

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
            **({"skipped_steps": trained.skipped} if self.train.skip_nonfinite else {}),
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
        if trained.skipped and self.train.skip_nonfinite:
            parts.append(f"{trained.skipped} steps left out")
        self.say("  ".join([*parts, f"lr {rates}", f"{row['images_per_second']:.1f} images/s"]))


def compile_network(backbone: Backbone) -> None:
    """torch.compile, block by block: the blocks are alike, so that one is compiled for all of them, in a fraction of
    the time (docs/benchmarks.md). A network that repeats nothing is compiled whole. Batches may differ in size: the
    shorter last one of an epoch, and those of validation, are one more compilation, not one each."""
    for part in backbone.blocks() or [backbone.network]:
        part.compile()


def _read_progress(state: dict[str, Any], run: RunDir) -> Progress:
    try:
        return Progress(**{name: state[name] for name in vars(Progress())})
    except KeyError as error:
        raise RunError(f"{run.last} is damaged: its state lacks {error}.") from error


def _defined(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
