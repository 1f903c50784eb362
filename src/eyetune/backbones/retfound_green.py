"""RETFound-Green (Engelmann and Bernabeu, 2024): DINOv2 ViT-S/14 with registers, token reconstruction.

Layout: https://github.com/justinengelmann/RETFound_Green.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from eyetune.backbones.spec import BACKBONES, BackboneSpec, Download, KeyLayout, Preprocess, TimmCall

if TYPE_CHECKING:
    from torch import nn


def _build(pixels: int, pool: str) -> nn.Module:
    from eyetune.backbones.vit import vision_transformer

    return vision_transformer(
        pixels,
        patch=14,
        width=384,
        depth=12,
        heads=6,
        init_values=1e-5,
        reg_tokens=4,
        no_embed_class=True,
        global_pool="avg",
        fc_norm=False,
    )


RETFOUND_GREEN = BACKBONES.add(
    "retfound-green",
    BackboneSpec(
        name="retfound-green",
        title="RETFound-Green",
        architecture="ViT-S/14, 4 registers (timm vit_small_patch14_reg4_dinov2)",
        parameters=21_832_704,
        pools={"avg": 384},
        pool="avg",
        preprocess=Preprocess(392, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "squash"),
        patch=14,
        licence="custom non-commercial research licence (CNCRL), no industry projects",
        source="https://github.com/justinengelmann/RETFound_Green/releases",
        build=_build,
        layout=KeyLayout(dropped=((r"head\.", "classification head of an earlier fine-tuning: a new one is trained"),)),
        file_names=(r"retfoundgreen_statedict.*\.pth",),
        download=Download(
            "retfoundgreen_statedict.pth",
            url="https://github.com/justinengelmann/RETFound_Green/releases/download/v0.1/retfoundgreen_statedict.pth",
        ),
        plain={
            "avg": TimmCall("vit_small_patch14_reg4_dinov2", {"img_size": 392, "global_pool": "avg", "fc_norm": False}),
        },
    ),
    aliases=("green",),
)
