"""RET-CLIP (Du et al., MICCAI 2024): the image tower as a backbone. The whole model is `eyetune.clip`.

Layout: https://github.com/sStonemason/RET-CLIP (OpenAI CLIP ViT-B/16, QuickGELU, LayerNorm eps 1e-5).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isqrt
from typing import TYPE_CHECKING

from eyetune.backbones.spec import BACKBONES, BackboneSpec, KeyLayout, Preprocess

if TYPE_CHECKING:
    from torch import Tensor, nn

_HEAD_WIDTH = 64
"""Channels of an attention head in every image tower of CLIP's that RET-CLIP's trainer offers but ViT-H/14."""


@dataclass(frozen=True)
class VisionShape:
    """What a file's shapes tell of a CLIP vision transformer."""

    patch: int
    width: int
    depth: int
    out: int
    pixels: int

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> VisionShape | None:
        """Of the keys `visual.…` as published, without a trainer's prefix; None when they are of no such network."""
        conv, position, out = (
            tensors.get(f"visual.{name}") for name in ("conv1.weight", "positional_embedding", "proj")
        )
        blocks = [re.match(r"visual\.transformer\.resblocks\.(\d+)\.", key) for key in tensors]
        depths = [int(found[1]) for found in blocks if found]
        if conv is None or position is None or out is None or not depths:
            return None
        if (conv.ndim, position.ndim, out.ndim) != (4, 2, 2) or conv.shape[0] % _HEAD_WIDTH or len(position) < 2:
            return None
        patch, width = int(conv.shape[-1]), int(conv.shape[0])
        grid = isqrt(len(position) - 1)
        # The published file may be transposed; the width tells which side is which.
        length = out.shape[1] if out.shape[0] == width else out.shape[0]
        return cls(patch, width, max(depths) + 1, int(length), grid * patch)


_PUBLISHED = VisionShape(16, 768, 12, 512, 224)


def _network(shape: VisionShape, pixels: int) -> nn.Module:
    from functools import partial

    from timm.layers import LayerNorm

    from eyetune.backbones.vit import projected

    return projected(
        pixels,
        patch=shape.patch,
        width=shape.width,
        depth=shape.depth,
        heads=shape.width // _HEAD_WIDTH,
        out=shape.out,
        pre_norm=True,
        norm_layer=partial(LayerNorm, eps=1e-5),
        act_layer="quick_gelu",
        global_pool="token",
    )


def _build(pixels: int, pool: str) -> nn.Module:
    return _network(_PUBLISHED, pixels)


_NAMES = {
    "class_embedding": "cls_token",
    "positional_embedding": "pos_embed",
    "proj": "projection.weight",
    "conv1.weight": "patch_embed.proj.weight",
    "ln_pre.": "norm_pre.",
    "ln_post.": "norm.",
}
"""The published names after `visual.`, and timm's; those that end in a dot go on with `weight` or `bias`."""

_IN_BLOCKS = {
    "attn.in_proj_": "attn.qkv.",
    "attn.out_proj.": "attn.proj.",
    "ln_1.": "norm1.",
    "ln_2.": "norm2.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}
"""The same of what follows the number of a block."""

_THEIR_BLOCKS, _OUR_BLOCKS = "transformer.resblocks.", "blocks."

_RENAME = (
    *((rf"^visual\.{re.escape(theirs)}{'' if theirs[-1] == '.' else '$'}", ours) for theirs, ours in _NAMES.items()),
    (rf"^visual\.{re.escape(_THEIR_BLOCKS)}", _OUR_BLOCKS),
    *((rf"^(blocks\.\d+)\.{re.escape(theirs)}", rf"\1.{ours}") for theirs, ours in _IN_BLOCKS.items()),
)


def published_name(key: str) -> str | None:
    """RET-CLIP's name, after `visual.`, for a tensor of timm's vision transformer; None when it has none."""
    block = re.match(r"blocks\.(\d+\.)", key)
    names, before = (_IN_BLOCKS, _THEIR_BLOCKS + block[1]) if block else (_NAMES, "")
    rest = key[block.end() :] if block else key
    for theirs, ours in names.items():
        if rest == ours:
            return before + theirs
        if ours[-1] == "." and rest in (f"{ours}weight", f"{ours}bias"):
            return before + theirs + rest.removeprefix(ours)
    return None


def clip_spec(shape: VisionShape) -> BackboneSpec:
    """RET-CLIP's image tower in another size: ViT-B/32, ViT-L/14, …"""
    if shape == _PUBLISHED or shape == replace(_PUBLISHED, pixels=shape.pixels):
        return RET_CLIP  # its position embedding is resized
    return replace(
        RET_CLIP,
        architecture=f"CLIP ViT/{shape.patch}, {shape.depth} blocks, QuickGELU, projected to {shape.out}",
        parameters=0,
        pools={"projected": shape.out},
        preprocess=replace(RET_CLIP.preprocess, pixels=shape.pixels),
        patch=shape.patch,
        build=lambda pixels, pool: _network(shape, pixels),
    )


RET_CLIP = BACKBONES.add(
    "ret-clip",
    BackboneSpec(
        name="ret-clip",
        title="RET-CLIP (image tower)",
        architecture="CLIP ViT-B/16, QuickGELU, projected to 512",
        parameters=86_192_640,
        pools={"projected": 512},
        pool="projected",
        preprocess=Preprocess(224, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), "pad"),
        patch=16,
        licence="not stated by its authors: ask before any use beyond research",
        source="https://github.com/sStonemason/RET-CLIP (link to ret-clip.pt)",
        build=_build,
        layout=KeyLayout(
            containers=("state_dict", "model"),
            rename=_RENAME,
            transpose=("projection.weight",),
            dropped=(
                (r"bert\.", "text tower: the image backbone does not read; load the whole model with `load_clip`"),
                (r"text_projection", "text projection: belongs to the whole model"),
                (
                    r"(global|left|right)_feature_mapping\.",
                    "fusion of two eyes: belongs to the whole model (`load_clip`)",
                ),
                (r"logit_scale", "temperature of the contrastive loss: only training needs it"),
            ),
        ),
        file_names=(r"ret-?clip\.pt",),
    ),
)
