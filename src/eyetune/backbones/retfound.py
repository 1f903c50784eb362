"""RETFound (Zhou et al., Nature 2023): ViT-L/16 trained as a masked autoencoder, and its DINOv2 successor.

Layout: https://github.com/rmaphoh/RETFound (`models_vit.py`, `util/pos_embed.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from eyetune.backbones.spec import (
    BACKBONES,
    IMAGENET_MEAN,
    IMAGENET_STD,
    BackboneSpec,
    Download,
    KeyLayout,
    Preprocess,
    TimmCall,
)

if TYPE_CHECKING:
    from torch import nn

_HEAD = (r"head\.", "classification head of an earlier fine-tuning: a new one is trained")


def _build_mae(pixels: int, pool: str) -> nn.Module:
    from eyetune.backbones.vit import vision_transformer

    # As published, average pooling leaves `norm` out and puts a LayerNorm of its own after the mean.
    pooling = {"global_pool": "token"} if pool == "cls" else {"global_pool": "avg", "fc_norm": True}
    return vision_transformer(pixels, patch=16, width=1024, depth=24, heads=16, **pooling)


def _build_dinov2(pixels: int, pool: str) -> nn.Module:
    from eyetune.backbones.vit import vision_transformer

    return vision_transformer(pixels, patch=14, width=1024, depth=24, heads=16, init_values=1e-5, global_pool="token")


RETFOUND = BACKBONES.add(
    "retfound",
    BackboneSpec(
        name="retfound",
        title="RETFound (MAE)",
        architecture="ViT-L/16",
        parameters=303_301_632,
        pools={"cls": 1024, "avg": 1024},
        pool="cls",
        preprocess=Preprocess(224, IMAGENET_MEAN, IMAGENET_STD, "pad"),
        patch=16,
        licence="CC BY-NC 4.0",
        source="https://huggingface.co/YukunZhou/RETFound_mae_natureCFP (terms to accept)",
        build=_build_mae,
        layout=KeyLayout(
            dropped=(
                (r"decoder_|mask_token", "decoder of the masked autoencoder: only pretraining needs it"),
                (r"norm\.", "final norm: average pooling uses a norm of its own, as published"),
                (r"fc_norm\.", "norm of average pooling: the CLS token does not pass it"),
                _HEAD,
            ),
            fresh=((r"fc_norm\.", "norm after average pooling: starts fresh, as published"),),
        ),
        file_names=(r"RETFound_(cfp|oct)_weights\.pth", r"RETFound_mae_.*\.pth"),
        download=Download("RETFound_mae_natureCFP.pth", repo="YukunZhou/RETFound_mae_natureCFP", gated=True),
        plain={
            "cls": TimmCall("vit_large_patch16_224"),
            "avg": TimmCall("vit_large_patch16_224", {"global_pool": "avg", "fc_norm": True}),
        },
    ),
    aliases=("large",),
)

RETFOUND_DINOV2 = BACKBONES.add(
    "retfound-dinov2",
    BackboneSpec(
        name="retfound-dinov2",
        title="RETFound (DINOv2)",
        architecture="ViT-L/14, layer scale",
        parameters=303_227_904,
        pools={"cls": 1024},
        pool="cls",
        preprocess=Preprocess(224, IMAGENET_MEAN, IMAGENET_STD, "pad"),
        patch=14,
        licence="CC BY-NC 4.0",
        source="https://huggingface.co/YukunZhou/RETFound_dinov2_meh (terms to accept)",
        build=_build_dinov2,
        layout=KeyLayout(
            containers=("teacher", "model", "state_dict", "student"),
            # DINOv2's sharded training numbers blocks by chunk as well: blocks.2.17.norm1 is block 17.
            rename=((r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),),
            dropped=(
                (r"dino_head\.|ibot_head\.", "self-supervised projection head: only pretraining needs it"),
                (r"mask_token", "stands for masked patches: only pretraining needs it"),
                (r"fc_norm\.", "norm of average pooling: the CLS token does not pass it"),
                _HEAD,
            ),
        ),
        file_names=(r"RETFound_dinov2_.*\.pth",),
        download=Download("RETFound_dinov2_meh.pth", repo="YukunZhou/RETFound_dinov2_meh", gated=True),
        plain={"cls": TimmCall("vit_large_patch14_dinov2", {"img_size": 224})},
    ),
)
