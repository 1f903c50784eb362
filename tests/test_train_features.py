"""Stored features: the same as computed ones, never of other weights, images or settings; each computed once ever."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from train_kit import PIXELS, PREPROCESS, fit_tiny, photographs, tiny_model

from eyetune.adapt.classifier import Classifier
from eyetune.config import TrainConfig
from eyetune.data.cache import Cache
from eyetune.data.fundus import FundusSettings
from eyetune.data.loader import Loader, make_loader
from eyetune.data.records import Manifest
from eyetune.data.store import Kind
from eyetune.runtime import Runtime
from eyetune.train.features import backbone_features, can_compute_once, compute_once
from eyetune.train.rundir import RunDir
from eyetune.train.task import predict

SETTINGS = FundusSettings(pixels=PIXELS, crop=False)


class Counted:
    """A classifier whose backbone counts the images it sees."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seed: int = 0) -> None:
        self.model: Classifier = tiny_model("linear", seed)[0]
        self.seen = 0
        real = self.model.backbone.features

        def features(images: torch.Tensor) -> torch.Tensor:
            self.seen += len(images)
            return real(images)

        monkeypatch.setattr(self.model.backbone, "features", features)


@pytest.fixture
def images(tmp_path: Path) -> Manifest:
    return photographs(tmp_path / "images", 10)


@pytest.fixture
def runtime() -> Runtime:
    return Runtime("cpu", "fp32", seed=0)


def loading(images: Manifest, cache: Cache | None, settings: FundusSettings = SETTINGS, **options: Any) -> Loader:
    chosen = {"batch_size": 4, "training": True, "augment": "none", "workers": 0, "cache": cache} | options
    return make_loader(images, PREPROCESS, settings, **chosen)  # type: ignore[arg-type]


def test_each_image_is_passed_through_once_ever(
    tmp_path: Path, images: Manifest, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct = predict(tiny_model("linear")[0].backbone, loading(images, None, training=False), runtime).raw
    first, again, other = (Counted(monkeypatch, seed) for seed in (0, 0, 1))
    found = compute_once(first.model, loading(images, Cache(tmp_path / "cache", 1)), runtime, "")
    assert torch.equal(found.features[0], direct)
    part = images.with_records([*images.records[3:], *images.records[:3]])
    second = compute_once(
        again.model, loading(part, Cache(tmp_path / "cache", 1), training=False, batch_size=2, seed=9), runtime, ""
    )
    assert torch.equal(second.features[0], torch.cat([direct[3:], direct[:3]]))
    assert (first.seen, again.seen) == (10, 0)
    compute_once(other.model, loading(images, Cache(tmp_path / "cache", 1)), runtime, "")
    assert other.seen == 10


@pytest.mark.parametrize("change", ["settings", "image", "precision", "pool", "normalisation", "fingerprint"])
def test_whatever_decides_a_feature_is_in_its_key(
    tmp_path: Path, images: Manifest, runtime: Runtime, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(tmp_path / "cache", 1)
    counted = Counted(monkeypatch)
    compute_once(counted.model, loading(images, cache), runtime, "")
    assert counted.seen == 10
    settings, expected = SETTINGS, 10
    backbone = counted.model.backbone
    if change == "settings":
        settings = replace(SETTINGS, contrast="clahe")
    elif change == "image":
        images[0].image.write_bytes(images[1].image.read_bytes())
        images[2].image.write_bytes(images[2].image.read_bytes() + b"\0")
        expected = 1  # the other is now a photograph that is known
        cache = Cache(tmp_path / "cache", 1)
    elif change == "precision":
        runtime = Runtime("cpu", "bf16", seed=0)
    elif change == "pool":
        monkeypatch.setattr(backbone, "pool", "avg")
    elif change == "normalisation":
        monkeypatch.setattr(backbone, "preprocess", replace(PREPROCESS, mean=(0.4, 0.5, 0.5)))
    else:
        monkeypatch.setattr(counted.model, "_base_fingerprint", "other")
    compute_once(counted.model, loading(images, cache, settings), runtime, "")
    assert counted.seen == 10 + expected


def test_what_another_process_stored_meanwhile_is_seen(
    tmp_path: Path, images: Manifest, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(monkeypatch)
    early = Cache(tmp_path / "cache", 1)
    compute_once(counted.model, loading(images, Cache(tmp_path / "cache", 1)), runtime, "")
    compute_once(counted.model, loading(images, early), runtime, "")
    assert counted.seen == 10


def test_damaged_features_are_computed_again(
    tmp_path: Path, images: Manifest, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(monkeypatch)
    expected = compute_once(counted.model, loading(images, Cache(tmp_path / "cache", 1)), runtime, "").features
    (pack,) = (tmp_path / "cache").rglob("*.pack")
    content = bytearray(pack.read_bytes())
    content[-5] ^= 8
    pack.write_bytes(content)
    found = compute_once(counted.model, loading(images, Cache(tmp_path / "cache", 1)), runtime, "").features
    assert counted.seen == 11
    torch.testing.assert_close(found, expected)


def test_stored_views_are_augmented_and_the_same_in_every_run(
    tmp_path: Path, images: Manifest, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(tmp_path / "cache", 1)
    counted = Counted(monkeypatch)

    def features(manifest: Manifest, cache: Cache | None, augment: str = "medium", seed: int = 0) -> torch.Tensor:
        loader = loading(manifest, cache, augment=augment, seed=seed)
        return compute_once(counted.model, loader, runtime, "", views=3).features

    found = features(images, cache)
    assert found.shape == (3, 10, 32)
    assert counted.seen == 30
    assert not torch.equal(found[0], found[1])
    moved = images.with_records(images.records[::-1])
    assert torch.equal(features(moved, cache, seed=5), found.flip(1))  # neither place nor seed count
    assert counted.seen == 30
    torch.testing.assert_close(features(images, None, seed=7), found)
    assert not torch.equal(features(images, cache, "strong")[0], found[0])
    assert features(images, cache, "none").shape == (1, 10, 32)


def test_epochs_take_turns_among_the_views(images: Manifest, runtime: Runtime) -> None:
    model = tiny_model("linear")[0]
    loader = compute_once(model, loading(images, None, augment="medium"), runtime, "", views=2)
    for epoch in range(5):
        loader.set_epoch(epoch)
        for batch in loader:
            assert torch.equal(batch["features"], loader.features[epoch % 2][batch["index"]])


def test_when_features_can_be_computed_once() -> None:
    def once(adapt: dict[str, Any] | str, augment: Any, **train: Any) -> bool:
        return can_compute_once(tiny_model(adapt)[1], TrainConfig(**train), augment)

    viewed = {"kind": "linear", "views": 4}
    assert once("linear", "none")
    assert once("linear", ())
    assert not once("linear", "light")
    assert once(viewed, "light")
    assert once(viewed, "none")
    assert not once(viewed, "light", mixup=0.2)
    assert not once("full", "none")


def test_a_run_on_stored_features_is_the_run_on_computed_ones(tmp_path: Path, images: Manifest) -> None:
    """With an empty cache, with a full one and without: the same weights and history, bit for bit."""
    made = []
    for number, cache in enumerate((None, Cache(tmp_path / "cache", 1), Cache(tmp_path / "cache", 1))):
        run = RunDir.create(tmp_path / str(number), True)
        adapt = {"kind": "linear", "views": 2}
        model, result = fit_tiny(run, images, images, adapt=adapt, augment="light", features_once=True, cache=cache)
        history = [{k: v for k, v in row.items() if "second" not in k and "images" not in k} for row in result.history]
        made.append((history, model.head.state_dict()))
    for history, head in made[1:]:
        assert history == made[0][0]
        assert all(torch.equal(tensor, made[0][1][name]) for name, tensor in head.items())
    assert cache is not None
    assert cache.info().counts[Kind.FEATURES] == 2 * 10 + 10


def test_several_processes_compute_a_part_each(tmp_path: Path, images: Manifest) -> None:
    """Two ranks, told by hand what the other has."""
    backbone = tiny_model("linear")[0].backbone

    class Rank(Runtime):
        number = 0
        shares: dict[int, list[Any]] = {}  # noqa: RUF012

        @property
        def rank(self) -> int:
            return self.number

        @property
        def processes(self) -> int:
            return 2

        def gather(self, value: Any) -> list[Any]:
            if isinstance(value, list):
                return [value, [8, 9]]  # the other lacks these two as well
            places, features = value
            assert len(places) == len(features) == 5
            return [value, ([place for place in range(10) if place not in places], np.ones((5, 32), np.float32))]

    runtime = Rank("cpu", "fp32", seed=0)
    found = backbone_features(backbone, loading(images, None), runtime, fingerprint="f", description="")[0]
    assert torch.equal(found[5:], torch.ones(5, 32))
    expected = predict(backbone, loading(images, None, training=False), Runtime("cpu", "fp32")).raw
    torch.testing.assert_close(found[:5], expected[:5])
