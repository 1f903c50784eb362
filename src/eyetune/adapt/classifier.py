"""The network that is trained: a backbone, dropout, and one linear layer (or one whose outputs share their weights)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from eyetune.backbones.backbone import Backbone

HEAD_STD = 0.02
"""Standard deviation of the head's initial weights, as timm initialises the classifier of a vision transformer."""


class SharedLinear(nn.Module):
    """One weighted sum of the features, and a bias an output: float[B, width] -> float[B, outputs].

    The last layer of CORAL (Cao, Mirjalili and Raschka, Pattern Recognition Letters 140, 2020): the outputs differ by
    their biases only, so where those fall the probabilities of being above each grade do too. They begin in that order.

    Attributes:
        weight: float[1, width].
        bias: float[outputs].
    """

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.in_features, self.out_features = width, outputs
        self.weight = nn.Parameter(torch.zeros(1, width))
        self.bias = nn.Parameter(torch.arange(outputs, 0, -1, dtype=torch.float32) / (outputs + 1) - 0.5)

    def forward(self, features: Tensor) -> Tensor:
        """float[B, width] -> float[B, outputs]."""
        # As one layer whose rows are all the same, so that autocast and exports treat it as any other.
        return nn.functional.linear(features, self.weight.expand(self.out_features, -1), self.bias)


class Classifier(nn.Module):
    """Images to logits, or to whatever numbers a head gives.

    The head starts with truncated-normal weights (standard deviation 0.02) and zero biases: logits near zero, so the
    first loss is close to log K, and yet a gradient for the backbone from the first step (all zeros would give none).

    Args:
        backbone: where the features come from.
        outputs: how many numbers the head gives: of K classes K logits, with a head for their order others.
        dropout: share of the features dropped before the linear layer in training, 0 <= p < 1.
        shared: all outputs share one row of weights (:class:`SharedLinear`).

    Attributes:
        heads: the heads of adapters loaded over this base, by adapter name; empty without LoRA.
        adapter: the adapter in use, one of `heads`; None without LoRA.
    """

    def __init__(self, backbone: Backbone, outputs: int, dropout: float = 0.0, *, shared: bool = False) -> None:
        super().__init__()
        self.backbone = backbone
        self.head: nn.Module = make_head(backbone.width, outputs, dropout, shared=shared)
        self.outputs = outputs
        # A plain mapping: registered, the heads of idle adapters would show up as parameters of the model.
        self.heads: dict[str, nn.Module] = {}
        #: What the numbers of the head say of each class (label, number): float[B, outputs] -> float[B, ·].
        self.reading: Callable[[Tensor], Tensor] = _as_they_are
        self.adapter: str | None = None
        self._base_fingerprint: str | None = None

    def forward(self, images: Tensor) -> Tensor:
        """images float[B, 3, H, W], normalised -> logits float[B, outputs]."""
        return self.logits_from(self.backbone.features(images))

    def scores(self, images: Tensor) -> Tensor:
        """images float[B, 3, H, W], normalised -> float[B, ·]: how much speaks for each class, each label, or the
        number; the logits, where the head gives a logit a class."""
        return self.reading(self(images))

    def logits_from(self, features: Tensor) -> Tensor:
        """features float[B, width] -> logits float[B, outputs]."""
        logits: Tensor = self.head(features)
        return logits

    def towers(self) -> dict[str, Backbone]:
        """The networks below the head, by name: one."""
        return {"backbone": self.backbone}

    def base_fingerprint(self) -> str:
        """The fingerprint of the backbone's weights as they were at the first call, before training or wrapping.

        A strategy asks first, when it is applied; from then on the answer stays, whatever training does.
        """
        if self._base_fingerprint is None:
            self._base_fingerprint = self.backbone.fingerprint()
        return self._base_fingerprint


def _as_they_are(raw: Tensor) -> Tensor:
    return raw


def make_head(width: int, outputs: int, dropout: float, *, shared: bool = False) -> nn.Sequential:
    """Dropout and a linear layer, initialised as :class:`Classifier` says: float[B, width] -> float[B, outputs]."""
    linear = SharedLinear(width, outputs) if shared else nn.Linear(width, outputs)
    nn.init.trunc_normal_(linear.weight, std=HEAD_STD)
    if isinstance(linear, nn.Linear):
        nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.Dropout(dropout), linear)


def put_norm_before(model: Classifier) -> None:
    """A LayerNorm before the head's dropout and linear layer: the head of some programs whose checkpoints are read."""
    if not isinstance(model.head, nn.Sequential):
        raise TypeError(f"the head is a {type(model.head).__name__}, not a sequence that a norm could lead")
    model.head.insert(0, nn.LayerNorm(model.backbone.width))
