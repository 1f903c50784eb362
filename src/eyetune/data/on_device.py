"""The levels of augmentation carried out on the device, a batch at a time, so that few processor cores can feed a GPU.

A loading process only reads the square and draws what is to become of it (:class:`DrawOnly`), from the same seeds as
ever; the device moves, colours, blurs and normalises (:class:`CarryOut`). The pictures are those of
:class:`eyetune.data.transforms.Fused` but for rounding, and the noise, which is another of the same kind.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from eyetune.data.config import AugmentConfig
from eyetune.data.transforms import BLUR_TAPS, Drawn, Fused, Normalise, level_steps
from eyetune.errors import UserError

if TYPE_CHECKING:
    from eyetune.backbones.backbone import Preprocess

DRAWS = 28
"""Numbers that say what becomes of an image: 6 of the warp, 19 of the colours, blur, noise, seed of the noise."""


def check_on_device(augment: AugmentConfig) -> None:
    """Raise UserError for an augmentation that only the processor can carry out: a list of transforms."""
    if not isinstance(augment, str):
        raise UserError(
            "augment_on: device carries out the levels none, light, medium and strong; a list of transforms needs "
            "augment_on: cpu."
        )


class DrawOnly(nn.Module):
    """uint8[3, H, W] -> the same in memory of its own, and float32[DRAWS]. Draws from torch's generator as Fused does.

    Args:
        level: of augmentation.
        fill: 0..255, where the picture is moved away.
    """

    def __init__(self, level: str, fill: float) -> None:
        super().__init__()
        self.fused = Fused(level_steps(level, fill))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """The image, and what to do with it."""
        drawn = self.fused.draw(image)
        seed = float(torch.randint(2**24, (1,))) if drawn.noise else 0.0
        return image.contiguous(), encode(drawn, seed)


def encode(drawn: Drawn, seed: float) -> Tensor:
    """float32[DRAWS] of one image (Apple's GPUs have no float64); `seed` 0..2**24 - 1, of the noise."""
    colour = drawn.colour
    parts = [drawn.warp[:2], colour.matrix, colour.shift, colour.middle]
    numbers = [*(number for part in parts for number in part.ravel().tolist()), drawn.blur, drawn.noise, seed]
    return torch.tensor(numbers, dtype=torch.float32)


class CarryOut(nn.Module):
    """uint8[B, 3, H, W] and float32[B, DRAWS], both on the device, to float32[B, 3, H, W], normalised.

    Nothing in it waits for the device.

    Args:
        preprocess: the backbone's normalisation.
        level: of augmentation.
        fill: 0..255, where the picture is moved away.
    """

    def __init__(self, preprocess: Preprocess, level: str, fill: float) -> None:
        super().__init__()
        self.normalise = Normalise(preprocess)
        self.fill = fill
        self.moves, self.colours, self.disturbs = (level in of for of in (_MOVE, _COLOUR, _DISTURB))

    @torch.no_grad()
    def forward(self, images: Tensor, draws: Tensor) -> Tensor:
        """The augmented, normalised images."""
        warp, matrix, shift, middle, blur, noise, seed = draws.split([6, 12, 3, 4, 1, 1, 1], dim=1)
        pixels = images.float()
        if self.moves:
            pixels = _warp(pixels, warp.reshape(-1, 2, 3), self.fill)
        if self.colours:
            pixels = _colour(pixels, matrix.reshape(-1, 3, 4), shift, middle)
        if self.disturbs:
            pixels = _blur(pixels, blur)
            pixels = pixels + 255 * noise[..., None, None] * standard_normal(pixels.shape, seed)
        scale, offset = (part.to(pixels.device) for part in (self.normalise.scale, self.normalise.offset))
        return pixels.clamp_(0, 255).mul_(scale).add_(offset)


_MOVE, _COLOUR, _DISTURB = ("light", "medium", "strong"), ("medium", "strong"), ("strong",)


def _warp(pixels: Tensor, warp: Tensor, fill: float) -> Tensor:
    """Bilinear; `warp` float32[B, 2, 3] from pixels of the result to pixels of the source, centres at whole numbers."""
    height, width = pixels.shape[2:]
    # torch's grids run from -1 to 1 between the centres of the outermost pixels.
    half = torch.tensor([(width - 1) / 2, (height - 1) / 2], device=pixels.device)
    turn, move = warp[:, :, :2], warp[:, :, 2]
    centred = (turn @ half + move - half) / half
    theta = torch.cat([turn * half / half[:, None], centred[..., None]], dim=2)
    grid = functional.affine_grid(theta, list(pixels.shape), align_corners=True)
    return functional.grid_sample(pixels - fill, grid, mode="bilinear", align_corners=True) + fill


def _colour(pixels: Tensor, matrix: Tensor, shift: Tensor, middle: Tensor) -> Tensor:
    mean = pixels.mean(dim=(2, 3))
    gray = (middle[:, :3] * mean).sum(dim=1, keepdim=True) + middle[:, 3:]
    offset = matrix[:, :, 3] + gray * shift
    mixed = torch.einsum("brc,bchw->brhw", matrix[:, :, :3], pixels)
    return (mixed + offset[..., None, None]).clamp_(0, 255)


def _blur(pixels: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian of BLUR_TAPS pixels a side; `sigma` float32[B, 1], 0 leaves the image as it is."""
    reach = BLUR_TAPS // 2
    distance = torch.arange(-reach, reach + 1, device=pixels.device)
    weights = torch.exp(-0.5 * (distance / sigma.clamp(min=1e-3)) ** 2)  # so narrow that only the middle one is left
    weights = (weights / weights.sum(dim=1, keepdim=True)).repeat_interleave(3, dim=0)
    batch, channels, height, width = pixels.shape
    rows = functional.pad(pixels, [reach] * 4, mode="reflect").reshape(1, batch * channels, height + 2 * reach, -1)
    rows = functional.conv2d(rows, weights[:, None, None, :], groups=batch * channels)
    rows = functional.conv2d(rows, weights[:, None, :, None], groups=batch * channels)
    return rows.reshape(batch, channels, height, width)


def standard_normal(shape: torch.Size, seeds: Tensor) -> Tensor:
    """float32[shape] of normal noise, image b a function of `seeds[b]` alone, float32[B, 1] of 0..2**24 - 1.

    A generator would have to be seeded on the processor, image by image. Here every pixel's place is hashed twice with
    the seed (lowbias32 of C. Wellons, "Prospecting for hash functions", 2018) and the two made normal (Box and Muller,
    1958).
    """
    place = torch.arange(shape[1:].numel(), device=seeds.device)
    base = place[None, :] * 2 + (seeds.long() * 0x9E3779B1)
    first, second = ((_hash(base + part) + 0.5) / 2**32 for part in (0, 1))
    normal = torch.sqrt(-2 * torch.log(first)) * torch.cos(2 * torch.pi * second)
    return normal.reshape(shape)


def _hash(words: Tensor) -> Tensor:
    """int64 -> 0..2**32 - 1, as float32's 24 bits need no more."""
    words = words & 0xFFFFFFFF
    words = (words ^ (words >> 16)) * 0x21F0AAAD & 0xFFFFFFFF
    words = (words ^ (words >> 15)) * 0x735A2D97 & 0xFFFFFFFF
    return (words ^ (words >> 15)).float()
