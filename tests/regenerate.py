"""Checkpoints and inputs that anyone can regenerate, laid out as the families publish them.

The figures in `tests/golden/` were computed by each family's own code from exactly these tensors. A key written
`blocks.{24}.norm1.weight` stands for the keys of blocks 0 to 23.
"""

from __future__ import annotations

import argparse
import json
import re
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 1e-4

Shapes = Mapping[str, Iterable[int]]


def golden(name: str) -> dict[str, Any]:
    """The figures of `tests/golden/NAME.json`."""
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


def expand(keys: Shapes) -> dict[str, tuple[int, ...]]:
    """Key -> shape with every `{n}` written out as 0 … n-1."""
    written: dict[str, tuple[int, ...]] = {}
    for key, shape in keys.items():
        repeat = re.search(r"\{(\d+)\}", key)
        names = [key.replace(repeat[0], str(i)) for i in range(int(repeat[1]))] if repeat else [key]
        written.update((name, tuple(shape)) for name in names)
    return written


def tensor(key: str, shape: Iterable[int]) -> torch.Tensor:
    """float32 of `shape`, a function of the key alone; norm weights near 1, everything else small."""
    shape = tuple(shape)
    if not shape:
        return torch.tensor(4.5)
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode())))
    values = generator.standard_normal(shape, dtype=np.float32) * np.float32(0.02)
    if len(shape) == 1 and key.endswith(("weight", "gamma")):
        values += 1
    return torch.from_numpy(values)


def tensors(keys: Shapes) -> dict[str, torch.Tensor]:
    """A tensor for each of `keys`."""
    return {key: tensor(key, shape) for key, shape in expand(keys).items()}


def images(pixels: int, seed: str = "image", batch: int = 2) -> torch.Tensor:
    """float32[batch, 3, pixels, pixels], standard normal: fed to networks as if normalised already."""
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(seed.encode())))
    return torch.from_numpy(generator.standard_normal((batch, 3, pixels, pixels), dtype=np.float32))


def difference(features: torch.Tensor, figures: Mapping[str, Any]) -> float:
    """The largest absolute difference between `features` and golden `figures` (first values and L2 of each row)."""
    assert list(features.shape) == figures["shape"]
    head = torch.tensor(figures["head"], dtype=torch.float64)
    values = (features.double()[:, : head.shape[1]] - head).abs().max()
    norms = (features.double().norm(dim=1) - torch.tensor(figures["l2"], dtype=torch.float64)).abs().max()
    return max(values.item(), norms.item())


def optimizer_state() -> dict[str, Any]:
    """The shape of what AdamW saves; small, because nothing may read it."""
    moments = {"step": torch.tensor(3.0), "exp_avg": torch.zeros(4, 4), "exp_avg_sq": torch.zeros(4, 4)}
    return {"state": {0: moments}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.95), "params": [0]}]}


def retfound_mae() -> dict[str, Any]:
    """As `RETFound_cfp_weights.pth`: encoder and decoder under `model`, and the state of the pretraining."""
    figures = golden("retfound_mae")
    return {
        "model": tensors({**figures["checkpoint_keys"], **figures["decoder_keys"]}),
        "optimizer": optimizer_state(),
        "epoch": 799,
        "scaler": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 7},
        "args": argparse.Namespace(model="mae_vit_large_patch16", mask_ratio=0.75, norm_pix_loss=False, blr=1e-3),
    }


def retfound_dinov2() -> dict[str, Any]:
    """As `RETFound_dinov2_meh.pth`: the teacher with its two projection heads."""
    keys = golden("retfound_dinov2")["checkpoint_keys"]
    heads = {
        f"{head}.{key}": shape
        for head in ("dino_head", "ibot_head")
        for key, shape in {"mlp.0.weight": (64, 1024), "mlp.0.bias": (64,), "last_layer.weight_g": (32, 1)}.items()
    }
    return {"teacher": tensors({**keys, "backbone.mask_token": (1, 1024), **heads})}


def retfound_green() -> dict[str, Any]:
    """As `retfoundgreen_statedict.pth`: flat, timm's own names."""
    return tensors(golden("retfound_green")["checkpoint_keys"])


def visionfm(*, module: bool = False) -> dict[str, Any]:
    """As `VFM_Fundus_weights.pth`: student and teacher; `module` for the copies that carry DDP's prefix."""
    keys = golden("visionfm")["checkpoint_keys"]
    teacher = tensors(
        {**keys, "head.mlp.0.weight": (64, 768), "head.mlp.0.bias": (64,), "head.last_layer.weight_g": (8, 1)}
    )
    student = {f"module.{key}": value + 1 for key, value in teacher.items()}
    student["module.backbone.masked_embed"] = torch.zeros(1, 768)
    return {
        "student": student,
        "teacher": {f"module.{key}": value for key, value in teacher.items()} if module else teacher,
        "optimizer": optimizer_state(),
        "epoch": 400,
        "args": argparse.Namespace(arch="vit_base", patch_size=16, out_dim=8192),
        "fp16_scaler": {"scale": 65536.0},
        "ibot_loss": {"center": torch.zeros(1, 8), "center2": torch.zeros(1, 1, 8)},
    }


def retclip(*, text_layers: int = 12) -> dict[str, Any]:
    """As `ret-clip.pt`: flat, with DDP's prefix. Three text layers give the small RBT3 text tower."""
    keys = expand(golden("retclip")["checkpoint_keys"])
    kept = {
        k: s for k, s in keys.items() if not (m := re.search(r"encoder\.layer\.(\d+)\.", k)) or int(m[1]) < text_layers
    }
    return tensors(kept)


def retclip_trainer(**options: Any) -> dict[str, Any]:
    """As RET-CLIP's own trainer saves: the same keys under `state_dict`."""
    return {"epoch": 10, "step": 1234, "name": "run", "state_dict": retclip(**options), "optimizer": optimizer_state()}
