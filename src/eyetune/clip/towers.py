"""What trains in which tower: each is frozen, trained whole, or adapted, by the strategies of fine-tuning.

A strategy of :mod:`eyetune.adapt` knows one network and the head on it. :class:`BothTowers` gives each tower its own,
puts their rate groups one after the other, and the projections, mappings and logit scales, which always train, last.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from eyetune.adapt.classifier import Classifier
from eyetune.adapt.freezing import FullConfig
from eyetune.adapt.lora import LoraConfig, merge
from eyetune.adapt.strategy import RateGroup, Strategy, check_coverage, split_by_decay
from eyetune.backbones.backbone import Backbone
from eyetune.clip.model import HEADS, SCALES

if TYPE_CHECKING:
    from eyetune.clip.config import TowerConfig

TOWERS = {"visual": "image", "bert": "text"}
"""The towers' names in the model, and in the configuration and the log."""


class _Alone(Classifier):
    """One tower with nothing on top: what a strategy of fine-tuning is given."""

    def __init__(self, backbone: Backbone) -> None:
        nn.Module.__init__(self)
        self.backbone = backbone
        self.head = nn.Identity()
        self.outputs = 0
        self.heads: dict[str, nn.Module] = {}
        self.adapter: str | None = None
        self._base_fingerprint: str | None = None


class Frozen(Strategy):
    """The tower stays as it is, in eval mode: its features never change, and may be computed once."""

    frozen_backbone = True

    def apply(self, model: Classifier) -> Classifier:
        """Freeze it."""
        model.base_fingerprint()
        model.backbone.requires_grad_(False)
        return model

    def saved(self, model: Classifier, name: str) -> bool:
        """Nothing of it: it is the published one."""
        return False


def tower_strategy(config: TowerConfig) -> Strategy:
    """What :attr:`TowerConfig.kind` names."""
    if config.kind == "frozen":
        return Frozen()
    if config.kind == "full":
        return FullConfig(layer_decay=config.layer_decay).build()
    return LoraConfig(
        r=config.r,
        alpha=config.alpha,
        dropout=config.dropout,
        targets=config.targets,
        layer_decay=config.layer_decay,
    ).build()


class BothTowers(Strategy):
    """A strategy a tower, and what stands on both of them.

    Args:
        image, text: what becomes of each tower.
    """

    def __init__(self, image: TowerConfig, text: TowerConfig) -> None:
        self.configs = {"visual": image, "bert": text}
        self.parts = {name: tower_strategy(config) for name, config in self.configs.items()}
        self.frozen_backbone = all(part.frozen_backbone for part in self.parts.values())
        self.alone: dict[str, _Alone] = {}

    def apply(self, model: Any) -> Any:
        """Prepare both towers of a :class:`RetClip`, in place. Raises ConfigError as their strategies do."""
        for name, tower in model.towers().items():
            self.alone[name] = _Alone(tower)
            self.parts[name].apply(self.alone[name])
        for name in HEADS:
            getattr(model, name).requires_grad_(True)
        return model

    def fingerprint(self, name: str) -> str:
        """Of a tower's weights before training: "visual" or "bert"."""
        return self.alone[name].base_fingerprint()

    def groups(self, model: Any) -> list[RateGroup]:
        """The image tower's groups, the text tower's, then the heads; each tower's rates times its `rate`."""
        groups: list[RateGroup] = []
        for name, part in self.parts.items():
            for group in part.groups(self.alone[name]):
                group.name = f"{TOWERS[name]}.{group.name.removeprefix('backbone.')}"
                group.scale *= self.configs[name].rate
                groups.append(group)
        heads = [
            (name, parameter)
            for name, parameter in model.named_parameters()
            if name.partition(".")[0] in HEADS or name in SCALES
        ]
        groups += split_by_decay("heads", tuple(heads), 1.0, frozenset())
        check_coverage(model, groups)
        return groups

    def set_mode(self, model: Any, training: bool) -> None:
        """Each tower as its strategy says; the heads train."""
        model.eval()
        for name, part in self.parts.items():
            part.set_mode(self.alone[name], training)
        if training:
            model.training = True
            for name in HEADS:
                getattr(model, name).train()

    def saved(self, model: Any, name: str) -> bool:
        """Of each tower what its strategy changes, and the heads."""
        tower, _, inner = name.partition(".")
        if tower not in self.parts:
            return True
        own = inner if tower == "visual" else f"network.{inner}"
        return self.parts[tower].saved(self.alone[tower], f"backbone.{own}")

    def checkpoint(self, model: Any) -> dict[str, Tensor]:
        """As :meth:`Strategy.checkpoint`, of a :class:`RetClip`."""
        return super().checkpoint(model)

    def load_checkpoint(self, model: Any, tensors: Mapping[str, Tensor]) -> None:
        """As :meth:`Strategy.load_checkpoint`, of a :class:`RetClip`."""
        super().load_checkpoint(model, tensors)


def merged_tower(tower: Backbone) -> Backbone:
    """`tower` with any adapter added into its weights: a copy then, else itself."""
    alone = _Alone(tower)
    adapters = getattr(tower.network, "peft_config", None)
    if not adapters:
        return tower
    alone.adapter = next(iter(adapters))
    return merge(alone).backbone
