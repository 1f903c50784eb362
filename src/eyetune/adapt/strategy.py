"""What every fine-tuning strategy is, and the register of those there are.

A strategy decides what trains: it prepares the model, orders its parameters into groups with their own rates, owns
train/eval mode, moves from phase to phase, and says which tensors a checkpoint must hold. One file adds one: a
configuration class registered with :data:`STRATEGIES` and the :class:`Strategy` it builds (see ``freezing.py`` for
the shortest). Other packages do the same behind an entry point of the group ``eyetune.strategies``.

This module imports neither torch nor peft, so that ``eyetune --help`` stays fast.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Union

from pydantic import ValidationError, ValidatorFunctionWrapHandler, WrapValidator
from pydantic_core import InitErrorDetails, PydanticCustomError

from eyetune.errors import RunError, UserError, listing
from eyetune.registry import Registry
from eyetune.section import Section

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from eyetune.adapt.classifier import Classifier
    from eyetune.backbones.backbone import LayerGroup

NO_DECAY = re.compile(r"token|pos_embed|position|class_embed|rel_pos|gamma|logit_scale|lora_magnitude_vector")
"""Parameters that take no weight decay although they have two or more dimensions: tokens, positions, scales."""


class StrategyConfig(Section):
    """The base of every strategy's section: `kind` names the strategy, the other fields are its own."""

    kind: str
    """Which strategy: linear, gradual, full or lora."""

    default_lr: ClassVar[float]
    """The learning rate when `train.lr` is not given."""

    def build(self) -> Strategy:
        """The strategy with these settings, ready for :meth:`Strategy.apply`."""
        raise NotImplementedError(f"{type(self).__name__} must say which Strategy it builds")


STRATEGIES: Registry[type[StrategyConfig]] = Registry("strategy", "eyetune.strategies")


class Step(StrEnum):
    """What the training loop does after an epoch."""

    CONTINUE = "continue"
    NEXT_PHASE = "next phase"
    """Restore the best weights, ask for `groups()` again, carry the optimizer state of parameters trained before."""
    STOP = "stop"


@dataclass(frozen=True)
class Advance:
    """A strategy's verdict on an epoch, and the sentence that explains it in the log."""

    step: Step = Step.CONTINUE
    message: str = ""


@dataclass
class RateGroup:
    """Parameters that share a learning rate and whether weight decay applies.

    Attributes:
        name: the layer group ("backbone.blocks.3", "head"), with " (no decay)" behind it where that holds; unique.
        parameters: trainable parameters only.
        scale: the group's learning rate is `train.lr` times this; 1 for the head, at most 1 elsewhere.
        decay: whether weight decay applies (not to biases, norms, tokens, position embeddings, layer scales).
    """

    name: str
    parameters: list[nn.Parameter]
    scale: float
    decay: bool


@dataclass
class Plateau:
    """Counts epochs without a new best.

    Attributes:
        patience: this many epochs in a row without a new best make a plateau.
        best: the highest metric so far.
        stale: epochs since then.
    """

    patience: int
    best: float | None = None
    stale: int = 0

    def reached(self, metric: float | None) -> bool:
        """Note one epoch's metric (higher is better; None and NaN are no improvement). True at a plateau."""
        if metric is not None and metric == metric and (self.best is None or metric > self.best):  # noqa: PLR0124
            self.best, self.stale = metric, 0
        else:
            self.stale += 1
        return self.stale >= self.patience

    def state(self) -> dict[str, Any]:
        """What :meth:`load_state` needs."""
        return {"best": self.best, "stale": self.stale}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`. Raises RunError when it is not what :meth:`state` wrote."""
        best, stale = state.get("best"), state.get("stale")
        if not (best is None or isinstance(best, (int, float))) or not isinstance(stale, int):
            raise RunError(f"the saved state of the strategy is damaged: best={best!r}, stale={stale!r}.")
        self.best, self.stale = None if best is None else float(best), stale


class Strategy(ABC):
    """One way to adapt a classifier. An instance belongs to one model and one run.

    A subclass must write :meth:`apply`; every other method has the behaviour of a strategy that trains once, in one
    phase, whatever `apply` left trainable, at one rate.
    """

    frozen_backbone: bool = False
    """True when the backbone's features never change in training: the loop may then compute them once."""

    views: int = 0
    """With a frozen backbone: this many augmented views of each image stand for its augmentation, and the loop computes
    their features once; 0 augments anew in every epoch."""

    shardable: bool = False
    """Whether the parameters may be split over processes (`train.fsdp`): what trains must stay the same throughout."""

    layer_decay: float = 1.0
    """The rate of each layer group over that of the group above it; the head is the top, at 1."""

    @abstractmethod
    def apply(self, model: Classifier) -> Classifier:
        """Prepare `model` for training, in place, and return it: `requires_grad`, added layers.

        `model.backbone` stays usable: `features()`, `width`, `preprocess`. Raises ConfigError when the settings do
        not fit the network.
        """

    def epochs(self, requested: int) -> int:
        """How many epochs to train at most, when the configuration asks for `requested`."""
        return requested

    def last_phase(self) -> bool:
        """Whether the run may end early: the loop's early stopping counts only in the last phase."""
        return True

    def after_epoch(self, model: Classifier, epoch: int, metric: float | None) -> Advance:
        """Decide what follows `epoch` (counted from 0).

        Args:
            model: the model in training.
            epoch: the epoch just ended.
            metric: its validation metric, higher is better; None when there is no validation split.
        """
        return Advance()

    def layers(self, model: Classifier) -> list[LayerGroup]:
        """The ordered partition of the backbone's parameters, input side first."""
        return model.backbone.layer_groups()

    def groups(self, model: Classifier) -> list[RateGroup]:
        """The trainable parameters, each in exactly one group, input side first, the head last."""
        layers = self.layers(model)
        undecayed = _declared_undecayed(model.backbone.network)
        groups: list[RateGroup] = []
        for index, layer in enumerate(layers):
            scale = self.layer_decay ** (len(layers) - index)
            groups += split_by_decay(f"backbone.{layer.name}", layer.parameters, scale, undecayed)
        groups += split_by_decay("head", tuple(model.head.named_parameters()), 1.0, frozenset())
        check_coverage(model, groups)
        return groups

    def set_mode(self, model: Classifier, training: bool) -> None:
        """Put every module into train or eval mode.

        In training, only modules all of whose parameters train are in train mode; one without parameters (dropout,
        drop-path) follows its parent. A frozen stage thus keeps its batch statistics and gives the same features
        for the same image.
        """
        model.eval()
        if training:
            model.training = True
            model.head.train()
            _train_where_trainable(model.backbone, False)

    def state(self) -> dict[str, Any]:
        """What :meth:`load_state` needs to resume, as JSON values."""
        return {}

    def load_state(self, model: Classifier, state: Mapping[str, Any]) -> None:
        """Resume from :meth:`state`: called after `apply`, before `groups`. Raises RunError when it is damaged."""
        if state:
            raise RunError(f"the saved state is of another strategy: {', '.join(state)}.")

    def saved(self, model: Classifier, name: str) -> bool:
        """Whether the entry `name` of the model's state dict belongs in a checkpoint. By default, all do."""
        return True

    def checkpoint(self, model: Classifier) -> dict[str, Tensor]:
        """Copies of the tensors that training changes, buffers included, under their names in the model.

        Whole ones, also where the model is split over processes; all of these must then ask.
        """
        from eyetune.runtime import whole

        return {
            name: whole(tensor.detach()).clone().contiguous()
            for name, tensor in model.state_dict().items()
            if self.saved(model, name)
        }

    def load_checkpoint(self, model: Classifier, tensors: Mapping[str, Tensor]) -> None:
        """Load what :meth:`checkpoint` gave. Nothing is loaded unless everything fits.

        Raises RunError when a tensor is missing, unexpected, of another shape or type, or not finite.
        """
        own = {name: tensor for name, tensor in model.state_dict().items() if self.saved(model, name)}
        load_audited(own, tensors, "the checkpoint")

    def write_artifacts(self, model: Classifier, folder: Path) -> None:  # noqa: B027 - most have nothing to write
        """Write what other programs read into the run folder, after training. By default, nothing.

        Raises UserError when the folder cannot be written.
        """


def load_audited(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], what: str) -> None:
    """Copy `tensors` into `own`, the live tensors of a model, after checking all of them.

    Raises RunError, naming every fault of `what`, unless names, shapes and types agree and all values are finite.
    """
    import torch

    from eyetune.runtime import alike

    faults = [f"missing: {name}" for name in own if name not in tensors]
    faults += [f"unexpected: {name}" for name in tensors if name not in own]
    for name, tensor in tensors.items():
        target = own.get(name)
        if target is None:
            continue
        if tensor.shape != target.shape:
            faults.append(f"{name}: shape {tuple(tensor.shape)}, expected {tuple(target.shape)}")
        elif tensor.dtype != target.dtype:
            faults.append(f"{name}: {tensor.dtype}, expected {target.dtype}")
        elif not torch.isfinite(tensor).all():
            faults.append(f"{name}: holds NaN or infinity")
    if faults:
        raise RunError(
            f"{what} does not fit this model ({len(faults)} of {len(own)} tensors). It was written for another "
            f"network or other settings, or it is damaged:\n{listing(faults)}"
        )
    with torch.no_grad():
        for name, target in own.items():
            target.copy_(alike(tensors[name], target))


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """How many parameters `model` trains, and how many it has."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)


def describe_parameters(model: nn.Module) -> str:
    """One line for the log: "trains 791,557 of 304,093,189 parameters (0.26 %)"."""
    trainable, total = count_parameters(model)
    return f"trains {trainable:,} of {total:,} parameters ({trainable / total:.2%})"


def parse_adapt(value: Any) -> StrategyConfig:
    """The strategy configuration that `value` describes: a mapping with `kind`, or the bare name of a strategy.

    Raises pydantic's ValidationError, every fault located relative to the section (`kind`, `r`, …): inside a larger
    model pydantic puts the name of the section before it (`adapt.r`). An unknown kind brings the nearest known one.
    """
    if isinstance(value, StrategyConfig):
        return value
    if isinstance(value, str):
        value = {"kind": value}
    if not isinstance(value, Mapping):
        known = ", ".join(STRATEGIES.names())
        raise _kind_error((), f"must be a section with a kind ({known}), got {value!r}", value)
    if "kind" not in value:
        raise _kind_error(("kind",), f"is missing: one of {', '.join(STRATEGIES.names())}", value)
    try:
        section = STRATEGIES.get(str(value["kind"]))
    except UserError as error:
        raise _kind_error(("kind",), str(error), value["kind"]) from error
    return section.model_validate({**value, "kind": STRATEGIES.canonical(str(value["kind"]))})


def adapt_union() -> Any:
    """The type of the field `adapt`: the union of the registered sections, told apart by `kind`.

    Written as ``adapt: adapt_union()``; the members are visible to whoever builds flags or a schema from the type.
    """

    def dispatch(value: Any, _: ValidatorFunctionWrapHandler) -> StrategyConfig:
        return parse_adapt(value)

    members = tuple(section for _, section in STRATEGIES)
    return Annotated[Union[members], WrapValidator(dispatch)]  # noqa: UP007


def _kind_error(location: tuple[str, ...], message: str, value: Any) -> ValidationError:
    # The message goes in as a context value: a brace in it would otherwise be taken for a placeholder.
    problem = PydanticCustomError("strategy", "{message}", {"message": message})
    return ValidationError.from_exception_data(
        "adapt", [InitErrorDetails(type=problem, loc=location, input=value, ctx={})]
    )


def _declared_undecayed(network: nn.Module) -> frozenset[str]:
    """The parameters that a timm network itself exempts from weight decay."""
    declared = getattr(network, "no_weight_decay", None)
    return frozenset(declared()) if callable(declared) else frozenset()


def split_by_decay(
    name: str, parameters: Sequence[tuple[str, nn.Parameter]], scale: float, undecayed: frozenset[str]
) -> list[RateGroup]:
    """The trainable ones of `parameters` as one group or two: with weight decay, and those that are spared it.

    Args:
        name: of the group.
        parameters: (name inside the network, parameter).
        scale: of the group's rate.
        undecayed: names that the network itself spares.
    """
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for own_name, parameter in parameters:
        if parameter.requires_grad:
            spare = parameter.ndim <= 1 or own_name in undecayed or NO_DECAY.search(own_name) is not None
            (spared if spare else decayed).append(parameter)
    groups = [RateGroup(name, decayed, scale, True), RateGroup(f"{name} (no decay)", spared, scale, False)]
    return [group for group in groups if group.parameters]


def check_coverage(model: nn.Module, groups: list[RateGroup]) -> None:
    """A parameter that trains but has no rate would silently stay as it was: a defect, never the user's mistake."""
    grouped = [id(parameter) for group in groups for parameter in group.parameters]
    trainable = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if len(grouped) != len(set(grouped)) or set(grouped) != set(trainable):
        lost = [name for key, name in trainable.items() if key not in set(grouped)]
        raise AssertionError(f"layer groups do not cover the trainable parameters exactly once; left out: {lost[:5]}")


def _train_where_trainable(module: nn.Module, inherited: bool) -> None:
    parameters = [parameter.requires_grad for parameter in module.parameters()]
    module.training = all(parameters) if parameters else inherited
    for child in module.children():
        _train_where_trainable(child, module.training)
