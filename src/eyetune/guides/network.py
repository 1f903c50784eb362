"""What the networks of the older guides have in common, on top of the house's classifier."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor, nn

from eyetune.adapt.classifier import Classifier
from eyetune.adapt.strategy import count_parameters
from eyetune.config import NOT_FILES
from eyetune.errors import ConfigError

if TYPE_CHECKING:
    from eyetune.adapt.strategy import Strategy
    from eyetune.backbones.backbone import Backbone


class GuideNetwork(Classifier):
    """A classifier with the methods that the guides call.

    Args:
        backbone: where the features come from.
        num_classes: logits an image; 0 gives the features themselves.
        dropout: share of the features dropped before the linear layer in training, 0 <= p < 1.

    Attributes:
        strategy: what says which modules are in train mode; None: all of them, as in any network.

    A new network is in train mode, as PyTorch's are. Raises ConfigError for values out of range.
    """

    def __init__(self, backbone: Backbone, num_classes: int, dropout: float) -> None:
        check_count("num_classes", num_classes, least=0)
        check_share("dropout", dropout)
        super().__init__(backbone, max(1, num_classes), dropout)
        if num_classes == 0:
            self.head, self.outputs = nn.Identity(), 0
        self.num_classes = num_classes
        self.strategy: Strategy | None = None

    def train(self, mode: bool = True) -> Self:
        """Train or eval mode. What is frozen stays in eval mode, so that its features do not change in training."""
        if mode and self.strategy is not None:
            self.strategy.set_mode(self, True)
            return self
        return super().train(mode)

    def forward_features(self, images: Tensor) -> Tensor:
        """images float[B, 3, H, W], normalised -> features float[B, width]."""
        return self.backbone.features(images)

    def get_num_params(self) -> tuple[int, int]:
        """How many parameters there are, and how many of them train."""
        trainable, total = count_parameters(self)
        return total, trainable

    def get_feature_dim(self) -> int:
        """Numbers in a feature: 2048 of resnet50, 1024 of RETFound, 384 of RETFound-Green."""
        return self.backbone.width

    def described(self) -> dict[str, Any]:
        """What a checkpoint says of this network beside its tensors: plain values, the backbone's name among them."""
        return {
            "backbone": self.backbone.spec.name,
            "pool": self.backbone.pool,
            "pixels": self.backbone.preprocess.pixels,
            "num_classes": self.num_classes,
        }

    def differences(self, said: Mapping[str, Any]) -> list[str]:
        """In what a file that says this of its network (as :meth:`described`) differs from this one, in words."""
        own = self.described()
        return [
            f"{name}: {said[name]!r} in the file, {value!r} here"
            for name, value in own.items()
            if said.get(name, value) != value
        ]


def check_count(name: str, value: Any, *, least: int) -> None:
    """Raise ConfigError unless `value` is a whole number from `least` on."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name}: must be a whole number, {least} or more, got {value!r}.")


def check_share(name: str, value: Any) -> None:
    """Raise ConfigError unless 0 <= `value` < 1."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < 1:
        raise ConfigError(f"{name}: must be at least 0 and below 1, got {value!r}.")


def file_or_word(weights: str | Path | None) -> str | Path | None:
    """Weights as the backbones take them: `random` and `hub` are words, None says nothing, all else is a file."""
    return weights if weights is None or str(weights) in NOT_FILES else Path(weights)
