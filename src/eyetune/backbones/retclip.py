"""RET-CLIP (Du et al., MICCAI 2024): the image tower as a backbone. The whole model is `eyetune.clip`.

Layout: https://github.com/sStonemason/RET-CLIP (OpenAI CLIP ViT-B/16, QuickGELU, LayerNorm eps 1e-5).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from eyetune.backbones.spec import BACKBONES, BackboneSpec, KeyLayout, Preprocess

if TYPE_CHECKING:
    from torch import nn


def _build(pixels: int, pool: str) -> nn.Module:
    from functools import partial

    from timm.layers import LayerNorm

    from eyetune.backbones.vit import projected

    return projected(
        pixels,
        patch=16,
        width=768,
        depth=12,
        heads=12,
        out=512,
        pre_norm=True,
        norm_layer=partial(LayerNorm, eps=1e-5),
        act_layer="quick_gelu",
        global_pool="token",
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
            rename=(
                (r"^visual\.class_embedding$", "cls_token"),
                (r"^visual\.positional_embedding$", "pos_embed"),
                (r"^visual\.proj$", "projection.weight"),
                (r"^visual\.conv1\.", "patch_embed.proj."),
                (r"^visual\.ln_pre\.", "norm_pre."),
                (r"^visual\.ln_post\.", "norm."),
                (r"^visual\.transformer\.resblocks\.", "blocks."),
                (r"^(blocks\.\d+)\.attn\.in_proj_", r"\1.attn.qkv."),
                (r"^(blocks\.\d+)\.attn\.out_proj\.", r"\1.attn.proj."),
                (r"^(blocks\.\d+)\.ln_([12])\.", r"\1.norm\2."),
                (r"^(blocks\.\d+)\.mlp\.c_fc\.", r"\1.mlp.fc1."),
                (r"^(blocks\.\d+)\.mlp\.c_proj\.", r"\1.mlp.fc2."),
            ),
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
