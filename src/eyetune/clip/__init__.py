"""Image-text models of the retina: both eyes of a patient and the report about them, in one space."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eyetune.clip.loading import load_clip
    from eyetune.clip.model import RetClip

__all__ = ["RetClip", "load_clip"]

# Imported when first used: preparing pairs and looking at vocabularies needs no PyTorch.
_HOMES = {"RetClip": "eyetune.clip.model", "load_clip": "eyetune.clip.loading"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'eyetune.clip' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
