"""The `model:` section of the configuration. Importing this module needs neither torch nor timm."""

from __future__ import annotations

from pydantic import Field

from eyetune.section import Section


class ModelConfig(Section):
    """Which network looks at the photographs, and with which weights."""

    backbone: str = Field(default="nano", min_length=1)
    """Network: a name from `eyetune models list`, or any timm name (resnet50, vit_base_patch16_224, …)."""

    weights: str | None = None
    """Checkpoint file; `hub` downloads the published file (timm names: timm's pretrained weights); `random` is an
    untrained network; left out, only the embedded `nano` loads."""

    pool: str | None = None
    """How tokens become one feature (cls, avg, last4, …). Left out: as the backbone was published."""

    pixels: int | None = Field(default=None, ge=14, le=4096)
    """Side of the square image the network gets, in pixels. Left out: the backbone's own."""

    dropout: float = Field(default=0.3, ge=0.0, lt=1.0)
    """Dropout between the pooled feature and the classification head, 0 <= p < 1."""
