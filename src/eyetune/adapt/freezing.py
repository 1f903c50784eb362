"""Linear probe, gradual unfreezing, full fine-tuning: three uses of one ordered partition of the layers.

Linear probe: only the head learns. Gradual unfreezing and rates that fall from layer to layer: Howard and Ruder,
"Universal Language Model Fine-tuning for Text Classification" (ACL 2018); the decay of 0.9 a layer for vision
transformers follows the seed guide and Clark et al. (ELECTRA, ICLR 2020).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator

from eyetune.adapt.strategy import STRATEGIES, Advance, Plateau, Step, Strategy, StrategyConfig
from eyetune.errors import ConfigError, RunError, listing

if TYPE_CHECKING:
    from eyetune.adapt.classifier import Classifier
    from eyetune.backbones.backbone import LayerGroup

ALL = "all"
"""The phase that trains every parameter."""


@STRATEGIES.register("linear")
class LinearConfig(StrategyConfig):
    """Train the head only, on fixed features: quick, and the baseline every other strategy must beat."""

    kind: Literal["linear"] = "linear"
    """Strategy: the head only, on fixed features."""

    max_epochs: int = Field(default=10, ge=1)
    """Train at most this many epochs, and no more than `train.epochs`."""

    patience: int = Field(default=3, ge=1)
    """Stop after this many epochs without a better validation score."""

    views: int = Field(default=0, ge=0)
    """Take turns among this many augmented views of each image, their features computed once; 0 augments anew in every
    epoch, a forward pass each."""

    default_lr: ClassVar[float] = 1e-3

    def build(self) -> Linear:
        """The strategy with these settings."""
        return Linear(self)


@STRATEGIES.register("gradual")
class GradualConfig(StrategyConfig):
    """Train the head, then the top layers with it, then everything: each phase begins when the last one stalls."""

    kind: Literal["gradual"] = "gradual"
    """Strategy: head, then the top layers, then everything."""

    phases: tuple[int | str, ...] = Field(default=(0, 2, ALL), min_length=1)
    """What trains beside the head in each phase: 0 nothing; n the last n blocks and the norm above them, in whole
    stages where there are stages (a ResNet's layer4); "all"; or a regular expression searched in parameter names."""

    patience: int = Field(default=3, ge=1)
    """Move on after this many epochs without a better validation score."""

    layer_decay: float = Field(default=0.9, gt=0, le=1)
    """Learning rate of each layer over that of the layer above; the head has `train.lr`. 1 = the same everywhere."""

    default_lr: ClassVar[float] = 3e-4

    @field_validator("phases", mode="before")
    @classmethod
    def _numbers_from_flags(cls, value: Any) -> Any:
        """On a command line every phase is text: what looks like a number is one."""
        if not isinstance(value, (list, tuple)):
            value = [value]
        return tuple(int(phase) if isinstance(phase, str) and phase.strip().isdigit() else phase for phase in value)

    @field_validator("phases")
    @classmethod
    def _phases_mean_something(cls, phases: tuple[int | str, ...]) -> tuple[int | str, ...]:
        for phase in phases:
            if isinstance(phase, bool) or (isinstance(phase, int) and phase < 0):
                raise ValueError(f"{phase!r} is not a number of blocks: 0 or more")
            if isinstance(phase, str):
                try:
                    re.compile(phase)
                except re.error as error:
                    raise ValueError(f"{phase!r} is not a regular expression ({error})") from error
        return phases

    def build(self) -> Gradual:
        """The strategy with these settings."""
        return Gradual(self)


@STRATEGIES.register("full")
class FullConfig(StrategyConfig):
    """Train everything, lower layers at lower rates: what asks for most data and memory."""

    kind: Literal["full"] = "full"
    """Strategy: every layer, lower layers at lower rates."""

    layer_decay: float = Field(default=0.9, gt=0, le=1)
    """Learning rate of each layer over that of the layer above; the head has `train.lr`. 1 = the same everywhere."""

    default_lr: ClassVar[float] = 1e-4

    def build(self) -> Full:
        """The strategy with these settings."""
        return Full(self)


class Linear(Strategy):
    """The head only; the backbone stays in eval mode (batch norm, dropout and drop-path off), so features never
    change and the loop may compute them once. Stops at a plateau of the validation metric."""

    frozen_backbone = True

    def __init__(self, config: LinearConfig) -> None:
        self.config = config
        self.views = config.views
        self.plateau = Plateau(config.patience)

    def apply(self, model: Classifier) -> Classifier:
        """Freeze the backbone."""
        model.base_fingerprint()
        model.backbone.requires_grad_(False)
        model.head.requires_grad_(True)
        return model

    def epochs(self, requested: int) -> int:
        """`requested`, but no more than `max_epochs` (10)."""
        return min(requested, self.config.max_epochs)

    def after_epoch(self, model: Classifier, epoch: int, metric: float | None) -> Advance:
        """Stop after `patience` epochs without a better metric; without validation, never."""
        if metric is not None and self.plateau.reached(metric):
            return Advance(Step.STOP, f"no better validation score for {self.config.patience} epochs")
        return Advance()

    def state(self) -> dict[str, Any]:
        """The plateau's count."""
        return self.plateau.state()

    def load_state(self, model: Classifier, state: Mapping[str, Any]) -> None:
        """Go on counting. Raises RunError when the state is damaged."""
        self.plateau.load_state(state)

    def saved(self, model: Classifier, name: str) -> bool:
        """Only the head: the backbone is the published one."""
        return name.startswith("head.")


class Full(Strategy):
    """Everything, each layer group at `layer_decay` times the rate of the group above it."""

    shardable = True

    def __init__(self, config: FullConfig) -> None:
        self.config = config
        self.layer_decay = config.layer_decay

    def apply(self, model: Classifier) -> Classifier:
        """Make every parameter trainable."""
        model.base_fingerprint()
        model.requires_grad_(True)
        return model


class Gradual(Strategy):
    """Phases, each training more than the one before it; a phase ends when validation stops improving for
    `patience` epochs (without validation: after `patience` epochs). Rates fall by `layer_decay` as in full."""

    def __init__(self, config: GradualConfig) -> None:
        self.config = config
        self.layer_decay = config.layer_decay
        self.plateau = Plateau(config.patience)
        self.phase = 0

    def apply(self, model: Classifier) -> Classifier:
        """Begin the first phase. Raises ConfigError when a phase matches nothing or does not add to the last."""
        model.base_fingerprint()
        self._check_phases(model)
        self._begin(model, 0)
        return model

    def last_phase(self) -> bool:
        """Early stopping counts only once everything that will train does."""
        return self.phase == len(self.config.phases) - 1

    def after_epoch(self, model: Classifier, epoch: int, metric: float | None) -> Advance:
        """Move on at a plateau; in the last phase, leave stopping to the loop."""
        if not self.plateau.reached(metric) or self.last_phase():
            return Advance()
        self._begin(model, self.phase + 1)
        self.plateau.stale = 0
        epochs = "1 epoch" if self.config.patience == 1 else f"{self.config.patience} epochs"
        if self.plateau.best is None:
            why = f"{epochs} without a validation score to go by"
        else:
            why = f"no better validation score for {epochs}"
        return Advance(
            Step.NEXT_PHASE,
            f"{why}: phase {self.phase + 1} of {len(self.config.phases)} trains "
            f"{self._describe(self.config.phases[self.phase])}",
        )

    def state(self) -> dict[str, Any]:
        """The phase and the plateau's count."""
        return {"phase": self.phase, **self.plateau.state()}

    def load_state(self, model: Classifier, state: Mapping[str, Any]) -> None:
        """Return to the phase. Raises RunError when the state is damaged or of other phases."""
        phase = state.get("phase")
        if not isinstance(phase, int) or not 0 <= phase < len(self.config.phases):
            raise RunError(f"the saved state of the strategy is damaged: phase={phase!r} of {len(self.config.phases)}.")
        self.plateau.load_state(state)
        self._begin(model, phase)

    def _begin(self, model: Classifier, phase: int) -> None:
        self.phase = phase
        trained = self._trained(model, self.config.phases[phase])
        for name, parameter in model.backbone.network.named_parameters():
            parameter.requires_grad_(name in trained)
        model.head.requires_grad_(True)

    def _trained(self, model: Classifier, phase: int | str) -> set[str]:
        """The names, inside the network, of the parameters that `phase` trains."""
        layers = self.layers(model)
        if isinstance(phase, int):
            layers = layers[len(layers) - top_layers(layers, phase) :]
            return {name for layer in layers for name, _ in layer.parameters}
        names = {name for layer in layers for name, _ in layer.parameters}
        return names if phase == ALL else {name for name in names if re.search(phase, name)}

    def _check_phases(self, model: Classifier) -> None:
        before: set[str] | None = None
        for phase in self.config.phases:
            trained = self._trained(model, phase)
            if isinstance(phase, str) and not trained:
                groups = listing((layer.name for layer in self.layers(model)), limit=40)
                raise ConfigError(
                    f"adapt.phases: {phase!r} matches no parameter of {model.backbone.spec.name}. "
                    f"Its layer groups:\n{groups}"
                )
            if before is not None and not trained > before:
                raise ConfigError(
                    f"adapt.phases: {phase!r} trains nothing beyond the phase before it on "
                    f"{model.backbone.spec.name}; every phase must keep what the last one trained, and add to it."
                )
            before = trained

    @staticmethod
    def _describe(phase: int | str) -> str:
        if phase == ALL:
            return "everything"
        return f"the head and the last {phase} blocks" if isinstance(phase, int) else f"the head and {phase!r}"


def top_layers(layers: list[LayerGroup], blocks: int) -> int:
    """How many of the last layer groups hold the last `blocks` blocks; 0 blocks are 0 groups.

    What stands above the last block (final norm, last convolution) comes with it, and a stage is never cut: two
    blocks are the last two of a vision transformer, ``layer4`` of any ResNet, the last stage of a Swin. Raises
    ConfigError when the network has fewer blocks.
    """
    if blocks == 0:
        return 0
    found = 0
    for taken, layer in enumerate(reversed(layers), start=1):
        found += layer.kind == "block"
        below = layers[-taken - 1] if taken < len(layers) else None
        if found >= blocks and (below is None or _stage(below) is None or _stage(below) != _stage(layer)):
            return taken
    raise ConfigError(f"adapt.phases: {blocks} blocks are asked for, the network has {found}. 'all' trains everything.")


def _stage(layer: LayerGroup) -> str | None:
    """The stage a block is in: "layer4" of "layer4.1", "stages.3" of "stages.3.blocks.0"; None in a flat network."""
    match = re.match(r"(.*?\d+)\..*\d", layer.name) if layer.kind == "block" else None
    return match.group(1) if match else None
