"""Augmentation and normalisation with torchvision.transforms.v2, on uint8 tensors for as long as possible."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torchvision.transforms import InterpolationMode, v2  # type: ignore[import-untyped]

from eyetune.data.config import AugmentConfig
from eyetune.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from eyetune.backbones.backbone import Preprocess

Mixing = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def eval_transform(preprocess: Preprocess) -> v2.Transform:
    """uint8[3, H, W] to float32[3, H, W], normalised by the backbone's mean and deviation."""
    return v2.Compose(_normalise(preprocess))


def train_transform(preprocess: Preprocess, augment: AugmentConfig, *, surround: int = 0) -> v2.Transform:
    """Augmentation, then as :func:`eval_transform`. Draws from torch's generator only.

    Args:
        preprocess: the backbone's normalisation.
        augment: a level, or a list of transforms.
        surround: 0..255, what a level fills in where it moves the picture away: the surround of the prepared squares.

    Raises UserError for a transform that torchvision.transforms.v2 does not have, or does not take these arguments.
    """
    chosen = _level(augment, surround) if isinstance(augment, str) else _listed(augment)
    whole = v2.Compose([*chosen, *_normalise(preprocess)])
    if not isinstance(augment, str):
        _try(whole, preprocess.pixels)
    return whole


def _normalise(preprocess: Preprocess) -> list[v2.Transform]:
    return [
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(list(preprocess.mean), list(preprocess.std), inplace=True),
    ]


def _level(level: str, fill: int) -> list[v2.Transform]:
    flips: list[v2.Transform] = [v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()]
    bilinear = InterpolationMode.BILINEAR
    if level == "none":
        return []
    if level == "light":
        return [*flips, v2.RandomAffine(10, interpolation=bilinear, fill=fill)]
    if level == "medium":
        return [
            *flips,
            v2.RandomAffine(30, translate=(0.03, 0.03), scale=(0.9, 1.1), interpolation=bilinear, fill=fill),
            v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.1),
        ]
    if level == "strong":
        return [
            *flips,
            v2.RandomAffine(180, translate=(0.06, 0.06), scale=(0.8, 1.2), interpolation=bilinear, fill=fill),
            v2.ColorJitter(brightness=0.35, contrast=0.35, saturation=0.25),
            v2.RandomApply([v2.GaussianBlur(5, (0.1, 1.5))], p=0.3),
            # (Noise, not v2.JPEG: torchvision's encoder is deprecated.)
            v2.RandomApply([v2.GaussianNoise(0, 0.03)], p=0.3),
        ]
    raise UserError(f"unknown augment {level!r}.{did_you_mean(level, ('none', 'light', 'medium', 'strong'))}")


def _known() -> dict[str, type[v2.Transform]]:
    return {
        name: entry
        for name, entry in vars(v2).items()
        if inspect.isclass(entry) and issubclass(entry, torch.nn.Module) and not name.startswith("_")
    }


def _listed(entries: Sequence[str | dict[str, dict[str, Any]]]) -> list[v2.Transform]:
    known = _known()
    built: list[v2.Transform] = []
    for entry in entries:
        pairs = {entry: {}} if isinstance(entry, str) else entry
        for name, arguments in pairs.items():
            if name not in known:
                raise UserError(
                    f"augment: torchvision.transforms.v2 has no transform {name!r}.{did_you_mean(name, known)}"
                )
            try:
                built.append(known[name](**_arguments(arguments or {})))
            except (TypeError, ValueError) as error:
                raise UserError(f"augment: {name} does not take {arguments}: {error}.") from None
    return built


def _arguments(given: dict[str, Any]) -> dict[str, Any]:
    """What YAML cannot say itself: interpolation by its name, and transforms inside a transform."""
    arguments = dict(given)
    if isinstance(arguments.get("interpolation"), str):
        arguments["interpolation"] = InterpolationMode(arguments["interpolation"])
    if isinstance(arguments.get("transforms"), list | tuple):
        arguments["transforms"] = _listed(arguments["transforms"])
    return arguments


def _try(whole: v2.Transform, pixels: int) -> None:
    """Run a list of transforms once, so that one that cannot work says so now and not in the middle of an epoch."""
    state = torch.get_rng_state()
    try:
        result = whole(torch.zeros((3, pixels, pixels), dtype=torch.uint8))
    # The transforms are the user's choice among dozens; what each raises on a wrong input is not documented.
    except Exception as error:
        raise UserError(f"augment: the transforms cannot be applied to a photograph ({error}).") from error
    finally:
        torch.set_rng_state(state)
    if tuple(result.shape) != (3, pixels, pixels):
        raise UserError(
            f"augment: the transforms turn a photograph of {pixels} x {pixels} pixels into "
            f"{' x '.join(str(side) for side in result.shape[1:])}; the backbone needs the size kept."
        )


def batch_mixing(mixup: float, cutmix: float, num_classes: int) -> Mixing | None:
    """Mixup and CutMix on whole batches; None when both strengths are 0.

    The function takes images float[B, 3, H, W] and targets int64[B], and returns images of the same shape and soft
    targets float[B, num_classes] whose rows sum to 1. With both strengths above 0 each batch gets one of the two, by
    chance. It draws from torch's generator.
    """
    choices: list[v2.Transform] = []
    if mixup > 0:
        choices.append(v2.MixUp(alpha=mixup, num_classes=num_classes))
    if cutmix > 0:
        choices.append(v2.CutMix(alpha=cutmix, num_classes=num_classes))
    if not choices:
        return None
    mixing: Mixing = choices[0] if len(choices) == 1 else v2.RandomChoice(choices)
    return mixing
