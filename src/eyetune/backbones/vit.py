"""The vision transformers behind the foundation models, as timm builds them. Imports torch and timm."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.layers import LayerNorm
from timm.models.vision_transformer import VisionTransformer
from torch import nn


def vision_transformer(pixels: int, *, patch: int, width: int, depth: int, heads: int, **options: Any) -> nn.Module:
    """A headless timm vision transformer: float[B, 3, pixels, pixels] -> float[B, width].

    `options` go to :class:`timm.models.vision_transformer.VisionTransformer`. `fc_norm` must be explicit when
    `global_pool="avg"`: by default timm then swaps the pretrained `norm` for an untrained `fc_norm`.
    """
    return _vit(VisionTransformer, pixels, patch=patch, width=width, depth=depth, heads=heads, **options)


def last_four_tokens(pixels: int, *, patch: int, width: int, depth: int, heads: int, **options: Any) -> nn.Module:
    """As :func:`vision_transformer`, giving the CLS tokens of the last four blocks: float[B, 4 * width]."""
    return _vit(_LastFourTokens, pixels, patch=patch, width=width, depth=depth, heads=heads, **options)


def projected(pixels: int, *, patch: int, width: int, depth: int, heads: int, out: int, **options: Any) -> nn.Module:
    """As :func:`vision_transformer`, followed by a linear projection without bias: float[B, out]."""
    return _vit(_Projected, pixels, patch=patch, width=width, depth=depth, heads=heads, out=out, **options)


def _vit(
    kind: type[VisionTransformer], pixels: int, *, patch: int, width: int, depth: int, heads: int, **options: Any
) -> nn.Module:
    options.setdefault("norm_layer", partial(LayerNorm, eps=1e-6))
    return kind(
        img_size=pixels,
        patch_size=patch,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        num_classes=0,
        **options,
    )


class _LastFourTokens(VisionTransformer):
    """The CLS tokens of the last four blocks, each after the final norm, first block first."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pairs = self.forward_intermediates(
            images, indices=4, return_prefix_tokens=True, norm=True, output_fmt="NLC", intermediates_only=True
        )
        return torch.cat([prefix[:, 0] for _, prefix in pairs], dim=-1)


class _Projected(VisionTransformer):
    """CLS token after the final norm, projected into a space shared with text."""

    def __init__(self, *, out: int, **options: Any) -> None:
        super().__init__(**options)
        self.projection = nn.Linear(self.embed_dim, out, bias=False)
        nn.init.normal_(self.projection.weight, std=self.embed_dim**-0.5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.projection(super().forward(images))
