"""Image-text models of the retina: both eyes of a patient and the report about them, in one space.

The names below are imported when first used: the command line reads this room's configuration without PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eyetune.clip.loading import load_clip
    from eyetune.clip.model import RetClip
    from eyetune.clip.run import ClipRun, open_clip_run

_HOMES = {
    "ClipRun": "eyetune.clip.run",
    "RetClip": "eyetune.clip.model",
    "load_clip": "eyetune.clip.loading",
    "open_clip_run": "eyetune.clip.run",
}

__all__ = ["ClipRun", "RetClip", "load_clip", "open_clip_run"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'eyetune.clip' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
