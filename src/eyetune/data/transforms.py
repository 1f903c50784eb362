"""Augmentation and normalisation, on uint8 for as long as possible.

The levels are written as torchvision.transforms.v2 and carried out by OpenCV: what v2 draws, in its order, becomes one
warp, one colour matrix and one blur (docs/benchmarks.md: several times as fast). Lists of transforms go through v2.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torchvision.transforms import InterpolationMode, v2  # type: ignore[import-untyped]

from eyetune.data.config import AugmentConfig
from eyetune.data.photo import Photo
from eyetune.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from eyetune.backbones.backbone import Preprocess

Mixing = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def eval_transform(preprocess: Preprocess) -> nn.Module:
    """uint8[3, H, W] to float32[3, H, W], normalised by the backbone's mean and deviation."""
    return Normalise(preprocess)


def train_transform(preprocess: Preprocess, augment: AugmentConfig, *, surround: int = 0) -> nn.Module:
    """Augmentation, then as :func:`eval_transform`. Draws from torch's generator only.

    Args:
        preprocess: the backbone's normalisation.
        augment: a level, or a list of transforms.
        surround: 0..255, what a level fills in where it moves the picture away: the surround of the prepared squares.

    Raises UserError for a transform that torchvision.transforms.v2 does not have, or does not take these arguments.
    """
    if isinstance(augment, str):
        return nn.Sequential(Fused(level_steps(augment, surround)), Normalise(preprocess))
    whole = v2.Compose(
        [
            *listed_steps(augment),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(preprocess.mean), list(preprocess.std), inplace=True),
        ]
    )
    _try(whole, preprocess.pixels)
    return whole


class Normalise(nn.Module):
    """uint8[3, H, W], contiguous or a view of [H, W, 3], to contiguous float32: (image / 255 - mean) / std."""

    def __init__(self, preprocess: Preprocess) -> None:
        super().__init__()
        mean, std = (torch.tensor(values, dtype=torch.float64) for values in (preprocess.mean, preprocess.std))
        self.scale = (1 / (255 * std)).float()[:, None, None]
        self.offset = (-mean / std).float()[:, None, None]

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """The normalised image, in new memory."""
        return torch.empty(image.shape, dtype=torch.float32).copy_(image).mul_(self.scale).add_(self.offset)


class Drawn(NamedTuple):
    """What a level does to one picture, in this order: warp, colours, blur, noise."""

    warp: npt.NDArray[np.float64]
    """float[3, 3], from pixels of the result (column, row, 1) to pixels of the source."""
    colour: Colour
    blur: float
    """Standard deviation in pixels; 0 for none."""
    noise: float
    """Standard deviation, of 0..1; 0 for none."""


class Colour(NamedTuple):
    """Brightness, contrast and saturation as one affine map of (red, green, blue), 0..255.

    Contrast pulls towards the picture's middle gray, known only when the picture is there: what the map adds is
    `shift[:, None] * (middle @ (mean red, green, blue, 1))`.
    """

    matrix: npt.NDArray[np.float64]
    """float[3, 4]"""
    shift: npt.NDArray[np.float64]
    """float[3]"""
    middle: npt.NDArray[np.float64]
    """float[4]"""


_SAME_COLOUR = Colour(np.eye(3, 4), np.zeros(3), np.zeros(4))


class Fused(nn.Module):
    """The transforms of a level, carried out in as few passes over the image as possible.

    The draws are v2's own: the same seed gives the same picture as `v2.Compose(steps)`, but for rounding (flips and
    affine in one interpolation to 1/32 pixel; brightness, contrast and saturation without rounding and clipping between
    them). Takes and gives uint8[3, H, W], views of [H, W, 3].

    Args:
        steps: RandomHorizontalFlip, RandomVerticalFlip, RandomAffine (bilinear), then ColorJitter without hue, then
            RandomApply of one GaussianBlur, then of one GaussianNoise; each may be missing.
    """

    def __init__(self, steps: Sequence[v2.Transform]) -> None:
        super().__init__()
        self.steps = tuple(steps)
        self.fill = next((float(step.fill) for step in self.steps if isinstance(step, v2.RandomAffine)), 0.0)

    def draw(self, image: torch.Tensor) -> Drawn:
        """Draw from torch's generator for an image [3, H, W]. (The noise itself is drawn where it is added.)"""
        height, width = image.shape[1:]
        warp, colour, blur, noise = np.eye(3), _SAME_COLOUR, 0.0, 0.0
        for step in self.steps:
            if isinstance(step, v2.RandomHorizontalFlip | v2.RandomVerticalFlip):
                if torch.rand(1) < step.p:
                    warp = warp @ _flip(height, width, horizontal=isinstance(step, v2.RandomHorizontalFlip))
            elif isinstance(step, v2.RandomAffine):
                warp = warp @ _affine(height, width, **step.make_params([image]))
            elif isinstance(step, v2.ColorJitter):
                colour = _colour(**step.make_params([image]))
            elif torch.rand(1) < step.p:
                disturbing = step.transforms[0]
                if isinstance(disturbing, v2.GaussianBlur):
                    blur = float(disturbing.make_params([])["sigma"][0])
                else:
                    noise = float(disturbing.sigma)
        return Drawn(warp, colour, blur, noise)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """The augmented image."""
        drawn = self.draw(image)
        pixels = _warp(np.ascontiguousarray(image.permute(1, 2, 0).numpy()), drawn.warp, self.fill)
        if drawn.colour is not _SAME_COLOUR:
            matrix, shift, middle = drawn.colour
            gray = float(middle @ [*cv2.mean(pixels)[:3], 1.0])
            pixels = cv2.transform(pixels, np.column_stack([matrix[:, :3], matrix[:, 3] + gray * shift]))
        if drawn.blur:
            pixels = cv2.GaussianBlur(pixels, (BLUR_TAPS, BLUR_TAPS), drawn.blur, borderType=cv2.BORDER_REFLECT_101)
        if drawn.noise:
            pixels = v2.functional.gaussian_noise(torch.from_numpy(pixels), 0, drawn.noise).numpy()
        return torch.from_numpy(pixels).permute(2, 0, 1)


def _flip(height: int, width: int, *, horizontal: bool) -> npt.NDArray[np.float64]:
    """From pixels of the result to pixels of the source, float[3, 3]."""
    if horizontal:
        return np.array([[-1.0, 0, width - 1], [0, 1, 0], [0, 0, 1]])
    return np.array([[1.0, 0, 0], [0, -1, height - 1], [0, 0, 1]])


def _affine(
    height: int, width: int, *, angle: float, translate: Sequence[float], scale: float, shear: Sequence[float]
) -> npt.NDArray[np.float64]:
    """From pixels of the result to pixels of the source, float[3, 3]: v2's turn about the centre, then shift."""
    if any(shear):
        raise ValueError("shear is not carried out here")
    across, down = (width - 1) / 2, (height - 1) / 2
    turn = np.deg2rad(angle)
    cosine, sine = np.cos(turn) / scale, np.sin(turn) / scale
    back = np.array([[1, 0, -across - translate[0]], [0, 1, -down - translate[1]], [0, 0, 1.0]])
    around = np.array([[cosine, sine, across], [-sine, cosine, down], [0, 0, 1.0]])
    return around @ back


def _warp(pixels: Photo, whole: npt.NDArray[np.float64], fill: float) -> Photo:
    if np.array_equal(whole, np.eye(3)):
        return pixels
    height, width = pixels.shape[:2]
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(pixels, whole[:2], (width, height), flags=flags, borderValue=(fill, fill, fill))


BLUR_TAPS = 5
"""Side of a level's blur, in pixels."""

_GRAY = np.array([0.2989, 0.587, 0.114])
"""Weights of red, green and blue in torchvision's gray."""


def _colour(
    *,
    fn_idx: torch.Tensor,
    brightness_factor: float | None,
    contrast_factor: float | None,
    saturation_factor: float | None,
    hue_factor: float | None,
) -> Colour:
    """Brightness, contrast and saturation in the order drawn, as one map."""
    if hue_factor is not None:
        raise ValueError("hue is not carried out here")
    factors = (brightness_factor, contrast_factor, saturation_factor)
    matrix, shift, middle = np.eye(3, 4), np.zeros(3), np.zeros(4)
    for kind in fn_idx.tolist():
        factor = factors[kind] if kind < len(factors) else None
        if factor is None:
            continue
        if kind == 1:
            middle = _GRAY @ matrix
            matrix, shift = factor * matrix, np.full(3, 1 - factor)
            continue
        step = factor * np.eye(3) + ((1 - factor) * _GRAY if kind == 2 else 0.0)
        matrix, shift = step @ matrix, step @ shift
    return Colour(matrix, shift, middle)


def level_steps(level: str, fill: float) -> list[v2.Transform]:
    """What a level does, as torchvision.transforms.v2; `fill` 0..255 where the picture is moved away."""
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
            v2.RandomApply([v2.GaussianBlur(BLUR_TAPS, (0.1, 1.5))], p=0.3),
            # (Noise, not v2.JPEG: torchvision's encoder is deprecated.)
            v2.RandomApply([v2.GaussianNoise(0, 0.03)], p=0.3),
        ]
    raise UserError(f"unknown augment {level!r}.{did_you_mean(level, ('none', 'light', 'medium', 'strong'))}")


UPRIGHT = 15.0
"""Degrees: the most an upright picture is turned."""


def upright_steps(level: str, fill: float) -> list[v2.Transform]:
    """As :func:`level_steps` where the sides mean something: never mirrored, turned by no more than 15 degrees.

    A mirrored left eye looks like a right one, and upside down a finding above the macula is below it: beside a text
    that says so, either would teach the opposite.
    """
    steps: list[v2.Transform] = []
    for step in level_steps(level, fill):
        if isinstance(step, v2.RandomHorizontalFlip | v2.RandomVerticalFlip):
            continue
        if isinstance(step, v2.RandomAffine):
            turned = v2.RandomAffine(
                min(UPRIGHT, step.degrees[1]),
                translate=step.translate,
                scale=step.scale,
                interpolation=step.interpolation,
                fill=fill,
            )
            steps.append(turned)
        else:
            steps.append(step)
    return steps


def _known() -> dict[str, type[v2.Transform]]:
    return {
        name: entry
        for name, entry in vars(v2).items()
        if inspect.isclass(entry) and issubclass(entry, torch.nn.Module) and not name.startswith("_")
    }


def listed_steps(entries: Sequence[str | dict[str, dict[str, Any]]]) -> list[v2.Transform]:
    """The transforms of a list in the configuration. Raises UserError for one that v2 does not have or take."""
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
        arguments["transforms"] = listed_steps(arguments["transforms"])
    return arguments


def _try(whole: nn.Module, pixels: int) -> None:
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
