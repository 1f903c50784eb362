"""Augmentation: what it returns, what it draws from, what it refuses."""

from __future__ import annotations

import random

import cv2
import numpy as np
import pytest
import torch
from data_kit import PREPROCESS, fundus
from torchvision.transforms import v2

from eyetune.data.fundus import FundusSettings, prepare
from eyetune.data.transforms import Fused, batch_mixing, eval_transform, level_steps, train_transform
from eyetune.errors import UserError

SQUARE = torch.from_numpy(prepare(fundus(), FundusSettings(32))).permute(2, 0, 1).contiguous()
LEVELS = ("none", "light", "medium", "strong")


def test_evaluation_only_normalises() -> None:
    before = SQUARE.clone()
    made = eval_transform(PREPROCESS)(SQUARE)
    mean, std = torch.tensor(PREPROCESS.mean)[:, None, None], torch.tensor(PREPROCESS.std)[:, None, None]
    torch.testing.assert_close(made, (before / 255 - mean) / std)
    assert made.dtype == torch.float32
    assert torch.equal(SQUARE, before)
    assert torch.equal(train_transform(PREPROCESS, "none")(SQUARE), made)


@pytest.mark.parametrize("level", LEVELS[1:])
def test_levels_change_the_picture_by_torchs_generator_alone(level: str) -> None:
    transform = train_transform(PREPROCESS, level)  # type: ignore[arg-type]
    torch.manual_seed(0)
    first = [transform(SQUARE) for _ in range(8)]
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(0)
    second = [transform(SQUARE) for _ in range(8)]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(image.shape == (3, 32, 32) and image.dtype == torch.float32 for image in first)
    assert all(torch.isfinite(image).all() for image in first)
    assert len({tuple(image.flatten()[::37].tolist()) for image in first}) == 8


def test_levels_grow() -> None:
    plain = eval_transform(PREPROCESS)(SQUARE)
    change = []
    for level in LEVELS:
        transform = train_transform(PREPROCESS, level)  # type: ignore[arg-type]
        torch.manual_seed(0)
        change.append(float(torch.stack([(transform(SQUARE) - plain).abs().mean() for _ in range(100)]).mean()))
    assert change == sorted(change)


@pytest.mark.parametrize("level", LEVELS[1:])
def test_what_turns_in_is_black(level: str) -> None:
    black = eval_transform(PREPROCESS)(torch.zeros((3, 32, 32), dtype=torch.uint8))
    made = [train_transform(PREPROCESS, level)(SQUARE)[:, :2, :2] for _ in range(20)]  # type: ignore[arg-type]
    corner = torch.stack(made).median(dim=0).values
    torch.testing.assert_close(corner, black[:, :2, :2], atol=0.3, rtol=0)


def test_a_list_of_transforms() -> None:
    chosen = (
        "RandomHorizontalFlip",
        {"RandomRotation": {"degrees": 20, "interpolation": "bilinear"}},
        {"RandomApply": {"transforms": [{"GaussianBlur": {"kernel_size": 3}}], "p": 0.5}},
    )
    assert train_transform(PREPROCESS, chosen)(SQUARE).shape == (3, 32, 32)
    names = [type(step).__name__ for step in train_transform(PREPROCESS, chosen).transforms]
    assert names == ["RandomHorizontalFlip", "RandomRotation", "RandomApply", "ToDtype", "Normalize"]


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        (("RandomHorizontalFlop",), "no transform 'RandomHorizontalFlop'. Did you mean 'RandomHorizontalFlip'?"),
        (({"os.system": {"command": "true"}},), "no transform 'os.system'"),
        (("functional",), "no transform 'functional'"),
        (({"RandomRotation": {"degree": 20}},), "RandomRotation does not take {'degree': 20}"),
        (({"RandomRotation": {"degrees": 20, "interpolation": "best"}},), "RandomRotation does not take"),
        (({"Resize": {"size": 20}},), "32 x 32 pixels into 20 x 20"),
        (("MixUp",), "cannot be applied to a photograph"),
    ],
)
def test_lists_that_cannot_work(chosen: tuple[str | dict[str, dict[str, object]], ...], said: str) -> None:
    with pytest.raises(UserError) as caught:
        train_transform(PREPROCESS, chosen)
    assert said in str(caught.value)


def test_an_unknown_level() -> None:
    with pytest.raises(UserError, match="Did you mean 'medium'"):
        train_transform(PREPROCESS, "medum")  # type: ignore[arg-type]


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.4, 0.0), (0.0, 1.0), (0.4, 1.0)])
def test_mixing(mixup: float, cutmix: float) -> None:
    mixing = batch_mixing(mixup, cutmix, 4)
    assert mixing is not None
    images, targets = torch.rand(6, 3, 16, 16), torch.tensor([0, 1, 2, 3, 0, 1])
    torch.manual_seed(0)
    mixed, soft = mixing(images, targets)
    assert mixed.shape == images.shape
    assert soft.shape == (6, 4)
    torch.testing.assert_close(soft.sum(dim=1), torch.ones(6))
    assert not torch.equal(mixed, images)
    assert ((soft > 0).sum(dim=1) <= 2).all()


def test_no_mixing() -> None:
    assert batch_mixing(0.0, 0.0, 4) is None


# The levels against torchvision's own, the slow and obvious way.


def steps(level: str, fill: float) -> list[v2.Transform]:
    """A level without noise, whose draws follow the order in memory."""

    def noise(step: v2.Transform) -> bool:
        return isinstance(step, v2.RandomApply) and isinstance(step.transforms[0], v2.GaussianNoise)

    return [step for step in level_steps(level, fill) if not noise(step)]


@pytest.mark.parametrize("shape", [(96, 96), (97, 97), (60, 91)], ids=str)
@pytest.mark.parametrize(("level", "fill"), [("light", 0), ("medium", 0), ("medium", 128), ("strong", 0)])
def test_a_level_is_what_torchvision_makes_of_it(level: str, fill: int, shape: tuple[int, int]) -> None:
    """On a picture in the middle of the range, where nothing is clipped between two changes of colour."""
    smooth = cv2.GaussianBlur(np.random.default_rng(0).normal(0, 1, (*shape, 3)), (0, 0), 4)
    picture = torch.from_numpy((100 + 25 * smooth / smooth.std()).clip(70, 130).astype(np.uint8)).permute(2, 0, 1)
    if level == "medium" and not fill:
        picture[:, 20:40, 10:50] = 75  # an edge, so that a shift by half a pixel would show
    fused, reference = Fused(steps(level, fill)), v2.Compose(steps(level, fill / 255))
    white = torch.full((*shape, 3), 255, dtype=torch.uint8).permute(2, 0, 1)
    for seed in range(40):
        torch.manual_seed(seed)
        # Where the picture ends within a pixel torchvision fades it twice: that rim is left out.
        cover = Fused(steps(level, 0)[:3])(white)[0].numpy()
        rim = torch.from_numpy(cv2.dilate(((cover > 0) & (cover < 255)).astype(np.uint8), np.ones((7, 7))) > 0)
        torch.manual_seed(seed)
        made = fused(picture).float()
        drawn = torch.rand(1)
        torch.manual_seed(seed)
        # In floating point: on bytes the reference cuts off what is behind the point in each of its steps.
        expected = reference(picture.float() / 255) * 255
        assert torch.equal(torch.rand(1), drawn)  # as many draws
        difference = (made - expected).abs()[:, ~rim]
        assert difference.mean() < 0.6
        assert difference.max() < 4


def test_a_level_changes_neither_its_input_nor_needs_its_layout() -> None:
    view = torch.from_numpy(prepare(fundus(), FundusSettings(32))).permute(2, 0, 1)
    before = view.clone()
    transform = train_transform(PREPROCESS, "strong")
    for seed in range(8):
        torch.manual_seed(seed)
        one = transform(view)
        torch.manual_seed(seed)
        two = transform(view.contiguous())
        assert torch.equal(one, two)
        assert one.is_contiguous()
    assert torch.equal(view, before)


def test_what_a_level_cannot_carry_out_is_refused() -> None:
    with pytest.raises(ValueError, match="hue"):
        Fused([v2.ColorJitter(hue=0.2)])(SQUARE)
    with pytest.raises(ValueError, match="shear"):
        Fused([v2.RandomAffine(0, shear=(5, 6))])(SQUARE)
