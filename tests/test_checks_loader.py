"""`eyetune check loader`: who waits for whom, what is recommended, and a loader that is too slow fails."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from eyetune.checks import loader as checks
from eyetune.checks.loader import Cost
from eyetune.checks.rates import DECODE, READ, Rate
from eyetune.cli import main
from eyetune.data import loader as loading
from eyetune.data.fundus import FundusSettings
from eyetune.data.phantom import write_cohort
from eyetune.data.transforms import Normalise
from eyetune.findings import Status


def rate(workers: int, images: float | None, *, prefetch: int = 2, pinned: bool = False, source: str = READ) -> Rate:
    return Rate(workers, source, prefetch, pinned, images, 0.1, "" if images else "killed by signal: Bus error")


def test_who_waits() -> None:
    assert checks.waiting(0, 300, 100) == 0.25, "without workers the network waits for every image"
    assert checks.waiting(2, 300, 100) == 0.0
    assert checks.waiting(2, 60, 100) == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("possible", "need", "chosen"),
    [
        ({0: 3000, 1: 2900, 2: 5000}, 100, 0),
        ({0: 300, 1: 290, 2: 500}, 100, 1),
        ({0: 300, 1: 110, 2: 500}, 100, 2),
        ({0: 30, 1: 29, 2: 50, 4: 51}, 100, 2),
        ({0: 30}, 100, 0),
    ],
)
def test_what_is_recommended(possible: dict[int, float], need: float, chosen: int) -> None:
    assert checks.recommend(possible, need) == chosen


def test_verdicts() -> None:
    rates = [rate(0, 300), rate(1, 290), rate(2, 500), rate(0, 30, source=DECODE), rate(2, 50, source=DECODE)]
    costs = [Cost("augment: ColorJitter", 1.0), Cost("augment: ElasticTransform", 30.0), Cost("normalise", 99.0)]

    def verdict(own: int, need: float, cached: bool = True) -> tuple[Status, str]:
        finding = checks.feeds(rates, own, need, cached=cached, costs=costs)
        return finding.status, f"{finding.why} {finding.advice}"

    assert verdict(1, 100)[0] == Status.PASS
    status, said = verdict(0, 100)
    assert status == Status.FAIL
    assert "--workers 1 (290 images/s" in said
    status, said = verdict(1, 1000)
    assert status == Status.FAIL
    assert "waits 71%" in said
    assert "--workers 2" in said
    assert "ElasticTransform, 30.0 ms" in said
    assert "data.cache" not in said
    assert "data.cache true" in verdict(2, 100, cached=False)[1]
    assert "Fewer processes do: --workers 1" in verdict(2, 100)[1]


def test_prefetch_and_pinning_are_recommended_where_they_help() -> None:
    rates = [rate(2, 100), rate(2, 150, prefetch=4), rate(2, 105, pinned=True)]
    assert checks.extra_flags(rates, READ, 2) == ["--prefetch 4"]
    assert checks.extra_flags([*rates[:1], rate(2, 130, pinned=True)], READ, 2) == ["--pin_memory true"]
    assert checks.extra_flags(rates, READ, 0) == []


def test_a_setting_that_cannot_run_fails() -> None:
    finding = checks.feeds([rate(0, 900), rate(2, None)], 2, 10, cached=True, costs=[])
    assert finding.status == Status.FAIL
    assert "Bus error" in finding.why
    assert "--workers 0" in finding.advice
    assert checks.feeds([rate(2, None)], 2, 10, cached=True, costs=[]).status == Status.FAIL


def bench(workers: Any = "auto", size: int = 32) -> Any:
    config = SimpleNamespace(prefetch=2, workers=workers)
    return SimpleNamespace(config=config, preprocess=SimpleNamespace(pixels=224), batch_size=size)


def test_small_shared_memory_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_SHARED", "/")
    monkeypatch.setattr(loading.shutil, "disk_usage", lambda path: SimpleNamespace(free=64 * 2**20))
    finding = checks.shared_memory(bench(), 2)
    assert finding.status == Status.WARN
    assert "there are 64 MiB" in finding.why
    assert "pipes" in finding.why
    assert "--shm-size=1g" in finding.advice
    assert checks.shared_memory(bench(size=4), 2).status == Status.PASS
    monkeypatch.setattr(loading, "_SHARED", "/nowhere")
    assert checks.shared_memory(bench(), 2).status == Status.PASS


def test_why_there_are_no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "few images" in checks.shared_memory(bench(), 0).why
    assert "--workers 0" in checks.shared_memory(bench(0), 0).why
    monkeypatch.setattr(checks.sys, "platform", "darwin")
    assert "macOS" in checks.shared_memory(bench(), 0).why


def test_every_step_of_the_augmentation_is_timed_apart() -> None:
    settings = FundusSettings(pixels=32)
    names = [name for name, _ in checks.augmentation_steps("strong", settings)]
    assert names == [
        *("RandomHorizontalFlip", "RandomVerticalFlip", "RandomAffine", "ColorJitter"),
        *("GaussianBlur (for 30% of the images)", "GaussianNoise (for 30% of the images)"),
    ]
    listed: Any = ({"RandomRotation": {"degrees": 20}}, "RandomHorizontalFlip")
    assert [name for name, _ in checks.augmentation_steps(listed, settings)] == ["RandomRotation", listed[1]]
    assert checks.augmentation_steps("none", settings) == []
    square = torch.zeros(32, 32, 3, dtype=torch.uint8).permute(2, 0, 1)
    assert all(step(square).shape == (3, 32, 32) for _, step in checks.augmentation_steps("strong", settings))


@pytest.fixture(scope="module")
def eyes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cohort") / "eyes"
    write_cohort(folder, patients=12, size=64, seed=3)
    return folder


def run(eyes: Path, out: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> int:
    monkeypatch.setenv("EYETUNE_CACHE", str(out / "cache"))
    monkeypatch.setattr(checks, "SECONDS", 0.2)
    words = ["--data.table", str(eyes / "labels.csv"), "--data.label_column", "dr_grade", "--data.val", "0.2"]
    words += ["--model.weights", "random", "--model.pixels", "32", "--train.batch_size", "4", "--precision", "fp32"]
    return main(["check", "loader", *words, "--workers", "0", "--out", str(out), *flags])


@pytest.mark.slow
def test_the_whole_check(
    eyes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checks, "worker_counts", lambda own: [0, 1])
    assert run(eyes, tmp_path, monkeypatch) in (0, 1)
    found = json.loads((tmp_path / "loader.json").read_text())
    assert [one["name"] for one in found["findings"]] == ["loader", "shared memory", "preparation"]
    assert {(one["workers"], one["source"]) for one in found["rates"]} == {
        *((0, READ), (1, READ), (0, DECODE), (1, DECODE))
    }
    assert all(one["images"] > 0 for one in found["rates"])
    assert found["milliseconds"]["from the file"] > 0
    assert any(name.startswith("augment") for name in found["milliseconds"])
    with Image.open(tmp_path / "loader.png") as picture:
        assert min(picture.size) > 400
    said = capsys.readouterr().out
    assert "network waits" in said
    assert "one image, one thread" in said


@pytest.mark.slow
def test_a_slow_loader_fails(
    eyes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checks, "worker_counts", lambda own: [0])
    real = Normalise.forward

    def slow(self: Normalise, image: torch.Tensor) -> torch.Tensor:
        time.sleep(0.05)
        return real(self, image)

    monkeypatch.setattr(Normalise, "forward", slow)
    assert run(eyes, tmp_path, monkeypatch, "--no-cache") == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "FAIL loader" in said
    assert "data.cache true" in said
    assert "warn preparation" in said


def test_wrong_input(
    eyes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(eyes, tmp_path, monkeypatch, "--seconds", "0") == 2
    assert "--seconds must be a whole number of at least 1" in capsys.readouterr().err
    copy = tmp_path / "copy"
    shutil.copytree(eyes, copy)
    next(iter((copy / "images").iterdir())).write_bytes(b"")
    assert run(copy, tmp_path / "out", monkeypatch, "--data.val", "0", "--data.test", "0") == 2
    assert "empty file" in capsys.readouterr().err
    assert not (tmp_path / "out" / "loader.json").exists()
