"""The network that is trained: a backbone, dropout, and one linear layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from eyetune.backbones.backbone import Backbone

HEAD_STD = 0.02
"""Standard deviation of the head's initial weights, as timm initialises the classifier of a vision transformer."""


class Classifier(nn.Module):
    """Images to logits.

    The head starts with truncated-normal weights (standard deviation 0.02) and zero biases: logits near zero, so the
    first loss is close to log K, and yet a gradient for the backbone from the first step (all zeros would give none).

    Args:
        backbone: where the features come from.
        num_classes: K, at least 2.
        dropout: share of the features dropped before the linear layer in training, 0 <= p < 1.

    Attributes:
        heads: the heads of adapters loaded over this base, by adapter name; empty without LoRA.
        adapter: the adapter in use, one of `heads`; None without LoRA.
    """

    def __init__(self, backbone: Backbone, num_classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.backbone = backbone
        self.head: nn.Module = make_head(backbone.width, num_classes, dropout)
        self.num_classes = num_classes
        # A plain mapping: registered, the heads of idle adapters would show up as parameters of the model.
        self.heads: dict[str, nn.Module] = {}
        self.adapter: str | None = None
        self._base_fingerprint: str | None = None

    def forward(self, images: Tensor) -> Tensor:
        """images float[B, 3, H, W], normalised -> logits float[B, K]."""
        return self.logits_from(self.backbone.features(images))

    def logits_from(self, features: Tensor) -> Tensor:
        """features float[B, width] -> logits float[B, K]."""
        logits: Tensor = self.head(features)
        return logits

    def base_fingerprint(self) -> str:
        """The fingerprint of the backbone's weights as they were at the first call, before training or wrapping.

        A strategy asks first, when it is applied; from then on the answer stays, whatever training does.
        """
        if self._base_fingerprint is None:
            self._base_fingerprint = self.backbone.fingerprint()
        return self._base_fingerprint


def make_head(width: int, num_classes: int, dropout: float) -> nn.Sequential:
    """Dropout and a linear layer, initialised as :class:`Classifier` says: float[B, width] -> float[B, K]."""
    linear = nn.Linear(width, num_classes)
    nn.init.trunc_normal_(linear.weight, std=HEAD_STD)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.Dropout(dropout), linear)


def put_norm_before(model: Classifier) -> None:
    """A LayerNorm before the head's dropout and linear layer: the head of some programs whose checkpoints are read."""
    if not isinstance(model.head, nn.Sequential):
        raise TypeError(f"the head is a {type(model.head).__name__}, not a sequence that a norm could lead")
    model.head.insert(0, nn.LayerNorm(model.backbone.width))
