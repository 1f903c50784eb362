"""Augmentation on the device against the processor's, with the same draws."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from data_kit import PREPROCESS, fundus, save
from torchvision.transforms import v2

from eyetune.config import Config
from eyetune.data.fundus import FundusSettings
from eyetune.data.loader import make_loader
from eyetune.data.on_device import DRAWS, CarryOut, DrawOnly, check_on_device, standard_normal
from eyetune.data.record import Record
from eyetune.data.records import Manifest
from eyetune.data.transforms import Fused, Normalise, level_steps
from eyetune.errors import UserError
from eyetune.verbs.finetune import check_settings


def without_noise(level: str, fill: float) -> list[v2.Transform]:
    steps = level_steps(level, fill)
    return steps[:-1] if level == "strong" else steps


@pytest.mark.parametrize("shape", [(96, 96), (61, 90)], ids=str)
@pytest.mark.parametrize(("level", "fill"), [("none", 0), ("light", 0), ("medium", 128), ("strong", 0)])
def test_a_batch_becomes_what_the_processor_makes_of_each_image(level: str, fill: int, shape: tuple[int, int]) -> None:
    smooth = cv2.GaussianBlur(np.random.default_rng(0).normal(0, 1, (*shape, 3)), (0, 0), 2)
    picture = torch.from_numpy((110 + 60 * smooth / smooth.std()).clip(0, 255).astype(np.uint8)).permute(2, 0, 1)
    picture[:, 20:40, 10:50] = 75  # an edge, so that a shift by half a pixel would show
    before = picture.clone()
    draw, fused, normalise = DrawOnly(level, fill), Fused(without_noise(level, fill)), Normalise(PREPROCESS)
    drawn, expected = [], []
    for seed in range(24):
        torch.manual_seed(seed)
        drawn.append(draw(picture))
        torch.manual_seed(seed)
        expected.append(normalise(fused(picture)))
    images, draws = (torch.stack(part) for part in zip(*drawn, strict=True))
    assert draws.shape == (24, DRAWS)
    draws[:, -2] = 0  # the noise is another one
    made = CarryOut(PREPROCESS, level, fill)(images, draws)
    assert made.dtype == torch.float32
    assert torch.equal(images[0], before)
    levels = (made - torch.stack(expected)).abs() * 255 * torch.tensor(PREPROCESS.std)[:, None, None]
    if level == "none":
        assert levels.max() < 1e-3
    assert levels.mean(dim=(1, 2, 3)).max() < 1.2  # of 255: rounding, twice on the processor
    assert levels.flatten(1).quantile(0.999, dim=1).max() < 8  # the edge, moved by 1/32 of a pixel


def test_noise_is_normal_and_belongs_to_the_image() -> None:
    seeds = torch.tensor([[5.0], [6.0], [5.0], [16_777_215.0]])
    noise = standard_normal(torch.Size((4, 3, 200, 200)), seeds)
    assert torch.equal(noise[0], noise[2])
    flat = noise.flatten(1).double()
    assert flat.mean(dim=1).abs().max() < 0.01
    assert (flat.std(dim=1) - 1).abs().max() < 0.01
    assert (flat**4).mean(dim=1).sub(3).abs().max() < 0.1
    assert torch.corrcoef(flat[[0, 1, 3]]).fill_diagonal_(0).abs().max() < 0.01
    for shift in (1, 2, 200):  # neighbours do not resemble each other
        assert abs(float(torch.corrcoef(torch.stack([flat[0, shift:], flat[0, :-shift]]))[0, 1])) < 0.01
    assert torch.equal(standard_normal(torch.Size((1, 3, 200, 200)), seeds[1:2])[0], noise[1])


def test_strong_adds_noise_to_some() -> None:
    gray = torch.full((3, 64, 64), 128, dtype=torch.uint8)
    torch.manual_seed(0)
    images, draws = (
        torch.stack(part) for part in zip(*(DrawOnly("strong", 128)(gray) for _ in range(40)), strict=True)
    )
    made = CarryOut(PREPROCESS, "strong", 128)(images, draws)
    rough = (made[:, :, 20:44, 20:44] * torch.tensor(PREPROCESS.std)[:, None, None]).std(dim=(2, 3))[:, 0] > 0.02
    assert torch.equal(rough, draws[:, -2] > 0)
    assert 4 < int(rough.sum()) < 24


def make_manifest(folder: Path, count: int) -> Manifest:
    files = [save(folder / f"{n}.png", fundus(seed=n)) for n in range(count)]
    records = [Record(file, n % 2, file.name, f"row {n}") for n, file in enumerate(files)]
    return Manifest(tuple(records), ("a", "b"), "made here")


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_leaves_the_work_to_the_device(tmp_path: Path, workers: int) -> None:
    manifest, settings = make_manifest(tmp_path, 6), FundusSettings(32)

    def batches(on_device: bool, epoch: int) -> list[dict[str, torch.Tensor]]:
        loader = make_loader(
            manifest,
            PREPROCESS,
            settings,
            batch_size=4,
            training=True,
            augment="medium",
            workers=workers,
            on_device=on_device,
        )
        loader.set_epoch(epoch)
        raw = list(loader)
        assert all((batch["image"].dtype == torch.uint8) is on_device for batch in raw)
        return [loader.finish(batch) for batch in raw]

    for epoch in (0, 1):
        for there, here in zip(batches(True, epoch), batches(False, epoch), strict=True):
            assert there.keys() == here.keys()
            assert torch.equal(there["index"], here["index"])
            assert (there["image"] - here["image"]).abs().mean() < 0.03
    assert not torch.equal(batches(True, 0)[0]["image"], batches(True, 1)[0]["image"])


def test_a_list_of_transforms_stays_on_the_processor() -> None:
    check_on_device("strong")
    with pytest.raises(UserError, match="augment_on: cpu"):
        check_on_device(("RandomHorizontalFlip",))
    settings = {"data": {"table": "t.csv"}, "augment": ["RandomHorizontalFlip"], "augment_on": "device"}
    with pytest.raises(UserError, match="augment_on: cpu"):
        check_settings(Config.parse(settings, check_files=False))
