"""What the tests of the strategies share: small networks of every architecture, all of whose parameters count."""

from __future__ import annotations

import copy
from functools import cache

import torch

from eyetune.backbones import Backbone, load_backbone

# Networks this small only lose time to the threads of a busy machine.
torch.set_num_threads(1)

SMALL = ("test_vit", "test_resnet", "test_efficientnet", "test_convnext")
"""timm's own miniatures: 0.1 to 0.4 million parameters, the real blocks."""

REAL = (
    "resnet18",
    "efficientnet_b0",
    "convnext_atto",
    "swin_tiny_patch4_window7_224",
    "deit_tiny_patch16_224",
    "vit_tiny_patch16_224",
    "vit_small_patch14_reg4_dinov2",
)


def pixels(name: str) -> int:
    """A small input that the architecture takes."""
    if "patch14" in name:
        return 56
    return 64 if "swin" in name else 32


def backbone(name: str = "test_vit", seed: int = 0) -> Backbone:
    """An untrained network in which every parameter has an effect, fresh at each call, the same for the same seed."""
    return copy.deepcopy(_prototype(name, seed))


@cache
def _prototype(name: str, seed: int) -> Backbone:
    torch.manual_seed(seed)
    built = load_backbone(name, weights="random", pixels=pixels(name))
    # timm starts some branches at zero (the last batch norm of a residual block, layer scales, tokens): a parameter
    # behind them would get no gradient, and a test of it would prove nothing.
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        for own, buffer in built.named_buffers():
            if own.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    return built


def images(name: str = "test_vit", count: int = 4) -> torch.Tensor:
    """float[count, 3, pixels, pixels], always the same."""
    side = pixels(name)
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(2))
