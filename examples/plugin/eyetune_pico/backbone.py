"""A backbone from outside: a small convolutional network of your own, and how photographs reach it.

    eyetune finetune --data.table labels.csv --model.backbone pico --model.weights pico.safetensors

PyTorch is imported when the network is built, not before: `eyetune --help` reads this file, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from eyetune.backbones.spec import BACKBONES, BackboneSpec, KeyLayout, Preprocess

if TYPE_CHECKING:
    from torch import nn


def _build(pixels: int, pool: str) -> nn.Module:
    """float[B, 3, pixels, pixels] -> float[B, 32]: the network without a head."""
    from torch import nn

    def stage(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.GroupNorm(4, outputs), nn.GELU())

    stages = nn.Sequential(stage(3, 8), stage(8, 16), stage(16, 32))
    return nn.Sequential(stages, nn.AdaptiveAvgPool2d(1), nn.Flatten())


PICO = BACKBONES.add(
    "pico",
    BackboneSpec(
        name="pico",
        title="Pico",
        architecture="3 strided convolutions",
        parameters=6_144,
        pools={"avg": 32},  # pooling -> numbers in a feature
        pool="avg",
        preprocess=Preprocess(pixels=64, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), fit="pad"),
        patch=8,  # pixels must be a multiple of it
        licence="yours",
        source="wherever you put the weights",
        build=_build,
        # Every key of a weights file is loaded, or dropped for a reason that is said here.
        layout=KeyLayout(dropped=((r"head\.", "classification head: a new one is trained"),)),
        file_names=(r"pico\.safetensors",),
    ),
)
