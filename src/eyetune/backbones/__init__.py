"""Backbones: networks that turn photographs into features, and their published weights.

Importing the package needs neither torch nor timm; building a network does.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eyetune.backbones import nano, retclip, retfound, retfound_green, visionfm  # noqa: F401 - importing registers
from eyetune.backbones.config import ModelConfig
from eyetune.backbones.spec import BACKBONES, BackboneSpec, Preprocess

if TYPE_CHECKING:
    from eyetune.backbones.backbone import Backbone, LayerGroup
    from eyetune.backbones.inspection import Inspection
    from eyetune.backbones.weights import LoadReport

__all__ = [
    "BACKBONES",
    "Backbone",
    "BackboneSpec",
    "Inspection",
    "LayerGroup",
    "LoadReport",
    "ModelConfig",
    "Preprocess",
    "find_spec",
    "inspect_checkpoint",
    "load_backbone",
]

_NEEDS_TORCH = {"Backbone": "backbone", "LayerGroup": "backbone", "Inspection": "inspection", "LoadReport": "weights"}


def __getattr__(name: str) -> Any:
    """The classes whose modules import torch, on first use."""
    if name in _NEEDS_TORCH:
        return getattr(importlib.import_module(f"{__name__}.{_NEEDS_TORCH[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def find_spec(name: str) -> BackboneSpec:
    """The spec behind a registered name, an alias, or any timm name (this last imports timm). Raises UserError."""
    if name in BACKBONES:
        return BACKBONES.get(name)
    from eyetune.backbones.timm_any import timm_spec

    return timm_spec(name)


def load_backbone(
    name: str, weights: str | Path | None = None, *, pixels: int | None = None, pool: str | None = None
) -> Backbone:
    """A backbone with its weights, on the CPU, in float32 and eval mode.

    Args:
        name: registered name or alias (`retfound`, `green`, …), or any timm name.
        weights: a checkpoint file; `"hub"` downloads the published file (timm names: timm's pretrained weights);
            `"random"` is an untrained network; None takes the weights shipped with the package (`nano` only).
        pixels: side of the input; None as published. Position embeddings are resized.
        pool: how tokens become one feature; None as published.

    Raises:
        WeightsError: the file is missing, unreadable, of another family, or would not arrive whole.
        UserError: unknown name, pooling, or size.
    """
    from eyetune.backbones.loading import load

    return load(find_spec(name), weights, pixels=pixels, pool=pool)


def inspect_checkpoint(path: str | Path, as_backbone: str | None = None) -> Inspection:
    """What a checkpoint file is, what is inside, and how much of it would load (into `as_backbone`, if given).

    Raises:
        WeightsError: the file cannot be opened safely.
        UserError: `as_backbone` is unknown.
    """
    from eyetune.backbones.inspection import inspect

    return inspect(Path(path), find_spec(as_backbone) if as_backbone else None)
