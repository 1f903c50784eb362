"""Both eyes of patients and the texts about them: from tables to RET-CLIP's layout, and from there to a reader."""

from __future__ import annotations

from eyetune.data.pairs.pairset import PairSet

__all__ = ["PairSet"]
