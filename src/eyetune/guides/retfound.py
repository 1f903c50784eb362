"""`scripts.retfound_model`: RETFound and RETFound-Green with a linear layer on top, as the guides load them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from eyetune.backbones import BACKBONES, load_backbone
from eyetune.errors import ConfigError, UserError, WeightsError, did_you_mean
from eyetune.guides.network import GuideNetwork, file_or_word
from eyetune.older_config import VARIANTS

if TYPE_CHECKING:
    from eyetune.backbones.backbone import Backbone

GREEN_PIXELS = 392


def backbone_of(variant: str) -> str:
    """The backbone behind `large` or `green`. Raises ConfigError for any other word."""
    if variant not in VARIANTS:
        raise ConfigError(
            f"model_variant: {variant!r} is not a variant.{did_you_mean(variant, VARIANTS)} Known: large (RETFound), "
            "green (RETFound-Green)."
        )
    return VARIANTS[variant]


def load_variant(
    variant: str, checkpoint_path: str | Path | None, *, pixels: int | None = None, pool: str | None = None
) -> Backbone:
    """The backbone behind `large` or `green` with its weights. Raises as `load_backbone`, in the guides' words too."""
    name = backbone_of(variant)
    try:
        return load_backbone(name, file_or_word(checkpoint_path), pixels=pixels, pool=pool)
    except WeightsError as error:
        raise WeightsError(
            f"{str(error).rstrip()}\nHere model.weights is checkpoint_path, and model.backbone is model_variant: large "
            "(retfound) or green (retfound-green)."
        ) from error


class VisionTransformer(GuideNetwork):
    """RETFound or RETFound-Green, dropout, a linear layer: float[B, 3, H, W], normalised -> logits float[B, K].

    Args:
        num_classes: logits an image; 0 gives the features, 1024 or 384 numbers.
        global_pool: the mean of the patch tokens under a norm of its own in place of the CLS token (RETFound; Green
            knows the mean only).
        dropout: share of the features dropped before the linear layer in training.
        model_variant: `large` or `green`.
        checkpoint_path: the published file; `random` for an untrained network.
        img_size: side of the images; None as published. Position embeddings are resized.

    Raises WeightsError when the file does not load whole, ConfigError for values out of range.
    """

    def __init__(
        self,
        num_classes: int = 5,
        global_pool: bool = False,
        dropout: float = 0.3,
        *,
        model_variant: str = "large",
        checkpoint_path: str | Path | None = "random",
        img_size: int | None = None,
    ) -> None:
        pool = "avg" if global_pool or "cls" not in BACKBONES.get(backbone_of(model_variant)).pools else "cls"
        backbone = load_variant(model_variant, checkpoint_path, pixels=img_size, pool=pool)
        super().__init__(backbone, num_classes, dropout)
        self.model_variant = model_variant
        self.train()

    def described(self) -> dict[str, Any]:
        """The variant, by which the guides' programs tell the two networks apart."""
        return super().described() | {"variant": self.model_variant}


def load_retfound_model(
    checkpoint_path: str | Path | None, num_classes: int = 5, global_pool: bool = False, dropout: float = 0.3
) -> VisionTransformer:
    """RETFound from its published file, every key of which is accounted for (`model.backbone.report`).

    Arguments and errors as for :class:`VisionTransformer`.
    """
    return VisionTransformer(num_classes, global_pool, dropout, checkpoint_path=checkpoint_path)


def get_retfound_green(
    pretrained: bool = False, num_classes: int = 0, img_size: int = GREEN_PIXELS, dropout: float = 0.0
) -> VisionTransformer:
    """RETFound-Green without its weights: float[B, 3, img_size, img_size] -> features float[B, 384].

    Raises UserError for `pretrained=True`: timm has no such weights; :func:`load_retfound_green_model` reads the file.
    """
    if pretrained:
        raise UserError(
            "get_retfound_green(pretrained=True): timm has no weights of RETFound-Green. Download "
            "retfoundgreen_statedict.pth and use load_retfound_green_model(FILE)."
        )
    return VisionTransformer(num_classes, True, dropout, model_variant="green", img_size=img_size)


def load_retfound_green_model(
    checkpoint_path: str | Path | None, num_classes: int = 5, img_size: int = GREEN_PIXELS, dropout: float = 0.3
) -> VisionTransformer:
    """RETFound-Green from its published file; otherwise as :func:`load_retfound_model`, without the choice of pool."""
    return VisionTransformer(
        num_classes, True, dropout, model_variant="green", checkpoint_path=checkpoint_path, img_size=img_size
    )
