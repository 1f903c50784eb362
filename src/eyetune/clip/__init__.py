"""Image-text models of the retina: both eyes of a patient and the report about them, in one space."""

from __future__ import annotations

from eyetune.clip.loading import load_clip
from eyetune.clip.model import RetClip

__all__ = ["RetClip", "load_clip"]
