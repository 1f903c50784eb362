"""VisionFM (Qiu et al., NEJM AI 2024): ViT-B/16 trained by iBOT, one encoder a modality; here colour fundus.

Layout: https://github.com/ABILab-CUHK/VisionFM (`models/vision_transformer.py`, `evaluation`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from eyetune.backbones.spec import BACKBONES, BackboneSpec, KeyLayout, Preprocess, TimmCall

if TYPE_CHECKING:
    from torch import nn


def _build(pixels: int, pool: str) -> nn.Module:
    from eyetune.backbones.vit import last_four_tokens, vision_transformer

    build = last_four_tokens if pool == "last4" else vision_transformer
    return build(pixels, patch=16, width=768, depth=12, heads=12, global_pool="token")


VISIONFM = BACKBONES.add(
    "visionfm",
    BackboneSpec(
        name="visionfm",
        title="VisionFM (fundus)",
        architecture="ViT-B/16, iBOT",
        parameters=85_798_656,
        pools={"cls": 768, "last4": 3072},
        pool="cls",
        preprocess=Preprocess(224, (0.4237, 0.2609, 0.1284), (0.2948, 0.2017, 0.1367), "pad"),
        patch=16,
        licence="research and education only, no commercial use",
        source="https://github.com/ABILab-CUHK/VisionFM (link to the fundus encoder)",
        build=_build,
        layout=KeyLayout(
            containers=("teacher", "visionfm_state_dict", "model", "state_dict", "student"),
            dropped=(
                (r"head\.", "self-supervised projection head: only pretraining needs it"),
                (r"masked_embed|mask_token", "stands for masked patches: only pretraining needs it"),
                (r"fc_norm\.", "norm of average pooling: the CLS token does not pass it"),
            ),
        ),
        file_names=(r"VFM_Fundus_weights\.pth",),
        plain={"cls": TimmCall("vit_base_patch16_224")},
    ),
)
