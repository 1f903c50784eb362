"""`nano`: the small vision transformer that ships with the package, pretrained on drawn eyes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from eyetune.backbones.spec import BACKBONES, IMAGENET_MEAN, IMAGENET_STD, BackboneSpec, KeyLayout, Preprocess, TimmCall

if TYPE_CHECKING:
    from torch import nn

WEIGHTS = Path(__file__).parent.parent / "weights" / "nano.safetensors"


def _build(pixels: int, pool: str) -> nn.Module:
    from eyetune.backbones.vit import vision_transformer

    pooling = {"global_pool": "token"} if pool == "cls" else {"global_pool": "avg", "fc_norm": False}
    return vision_transformer(pixels, patch=16, width=192, depth=6, heads=3, **pooling)


NANO = BACKBONES.add(
    "nano",
    BackboneSpec(
        name="nano",
        title="EyeTune nano",
        architecture="ViT, 6 blocks, patch 16, width 192",
        parameters=2_855_232,
        pools={"cls": 192, "avg": 192},
        pool="cls",
        preprocess=Preprocess(224, IMAGENET_MEAN, IMAGENET_STD, "pad"),
        patch=16,
        licence="Apache-2.0",
        source="shipped with EyeTune",
        build=_build,
        layout=KeyLayout(dropped=((r"head\.", "classification head: a new one is trained"),)),
        file_names=(r"nano\.safetensors",),
        embedded=WEIGHTS,
        plain={
            "cls": TimmCall("vit_tiny_patch16_224", {"depth": 6}),
            "avg": TimmCall("vit_tiny_patch16_224", {"depth": 6, "global_pool": "avg", "fc_norm": False}),
        },
    ),
)
