"""Augmentation: what it returns, what it draws from, what it refuses."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from data_kit import PREPROCESS, fundus

from eyetune.data.fundus import FundusSettings, prepare
from eyetune.data.transforms import batch_mixing, eval_transform, train_transform
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
