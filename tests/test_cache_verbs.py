"""The cache as users meet it: `data cache`, `--no-cache`, `embed`."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

import eyetune as et
from eyetune.cli import main
from eyetune.data.phantom import write_cohort
from eyetune.data.transforms import eval_transform


@pytest.fixture(scope="module")
def eyes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eyes")
    write_cohort(folder / "eyes", patients=15, size=96, workers=0, splits={"train": 0.6, "val": 0.2, "test": 0.2})
    return folder / "eyes"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EYETUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_config(folder: Path, eyes: Path, **more: object) -> Path:
    content = {
        "model": {"backbone": "nano", "pixels": 64},
        "data": {"table": str(eyes / "labels.csv"), "label_column": "glaucoma"},
        "adapt": {"kind": "linear"},
        "train": {"epochs": 2, "batch_size": 8, "tensorboard": False},
        "augment": "none",
        "workers": 0,
        "precision": "fp32",
        **more,
    }
    path = folder / "config.yaml"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def predictions(run: Path) -> str:
    return (run / "predictions" / "test.csv").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_runs_with_and_without_the_cache_are_the_same(tmp_path: Path, eyes: Path, own_cache: Path) -> None:
    config = str(write_config(tmp_path, eyes))
    assert main(["finetune", config, "--no-cache", "--out", str(tmp_path / "without")]) == 0
    assert not own_cache.exists()
    for name in ("empty", "full"):
        assert main(["finetune", config, "--out", str(tmp_path / name)]) == 0
        assert predictions(tmp_path / name) == predictions(tmp_path / "without")
    assert list(own_cache.rglob("*.pack"))
    elsewhere = tmp_path / "elsewhere"
    assert main(["finetune", config, "--data.cache", str(elsewhere), "--out", str(tmp_path / "other")]) == 0
    assert list(elsewhere.rglob("*.pack"))
    made = []
    for flags in (["--no-cache"], [], []):
        out = tmp_path / "rows.csv"
        words = ["predict", str(tmp_path / "other"), str(eyes / "images"), "--workers", "0", "--out", str(out)]
        assert main([*words, *flags]) == 0
        made.append(out.read_text(encoding="utf-8"))
    assert made[0] == made[1] == made[2]


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_a_second_run_computes_no_feature(tmp_path: Path, eyes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = str(write_config(tmp_path, eyes))
    assert main(["finetune", config, "--out", str(tmp_path / "first")]) == 0
    monkeypatch.setattr(
        "eyetune.backbones.backbone.Backbone.features", lambda self, images: pytest.fail("a forward pass")
    )
    assert main(["finetune", config, "--train.lr", "1e-2", "--out", str(tmp_path / "second")]) == 0
    assert main(["evaluate", str(tmp_path / "second"), "--data", f"again={eyes / 'labels.csv'}"]) == 0
    assert main(["embed", config, "--out", str(tmp_path / "f.safetensors")]) == 0


def test_filling_showing_clearing(tmp_path: Path, eyes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = str(eyes / "labels.csv")
    assert main(["data", "cache", table, "--pixels", "64", "--workers", "1"]) == 0
    assert "30 of 30 images prepared, 64 px" in capsys.readouterr().out
    assert main(["data", "cache", "--info"]) == 0
    assert "prepared images: 30" in capsys.readouterr().out
    broken = tmp_path / "photos"
    broken.mkdir()
    (broken / "a.jpg").write_bytes(b"")
    assert main(["data", "cache", str(broken), "--folder", str(tmp_path / "there")]) == 1
    assert "a.jpg: an empty file" in capsys.readouterr().out.replace(str(broken) + "/", "")
    assert main(["data", "cache", table, "--clear"]) == 2
    capsys.readouterr()
    assert main(["data", "cache", "--clear"]) == 0
    assert capsys.readouterr().out.startswith("deleted 0.")
    assert main(["data", "cache"]) == 0
    assert "prepared images: 0 (0.0 MiB)" in capsys.readouterr().out


def test_filling_for_deep_gray(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What --bits prepares is what a run with data.bits reads; and a wrong number is a mistake like any other."""
    import cv2

    from eyetune.config import Config
    from eyetune.data.cache import Cache
    from eyetune.verbs.finetune import prepare_data

    photos = tmp_path / "photos"
    for number, label in enumerate("abab"):
        (photos / label).mkdir(parents=True, exist_ok=True)
        gray = np.linspace(0, 4095, 64 * 64).reshape(64, 64) * (1 - number / 10)
        cv2.imwrite(str(photos / label / f"{number}.png"), gray.astype(np.uint16))
    assert main(["data", "cache", str(photos), "--workers", "0"]) == 1  # refused until the bits are said
    assert "data.bits" in capsys.readouterr().out
    assert main(["data", "cache", str(photos), "--workers", "0", "--bits", "12"]) == 0
    config = Config.parse({"data": {"table": str(photos), "bits": 12, "val": 0.25, "test": 0.25}, "workers": 0})
    cache = Cache.of(config.data)
    assert cache is not None
    before = cache.info().counts
    prepare_data(config, cache)
    assert cache.info().counts == before
    for flags in (["--bits", "8"], ["--limit", "0"], ["--limit", "nan"]):
        assert main(["data", "cache", *flags]) == 2
        assert "Invalid value" in capsys.readouterr().err


def test_embedding_a_configuration(tmp_path: Path, eyes: Path) -> None:
    config = write_config(tmp_path, eyes)
    out = tmp_path / "features.safetensors"
    assert main(["embed", str(config), "--out", str(out), "--workers", "0"]) == 0
    backbone = et.load_backbone("nano", pixels=64)
    with safe_open(str(out), "np") as stream:
        features = stream.get_tensor("features")
        said = json.loads(stream.metadata()["eyetune"])
    with open(out.with_suffix(".csv"), encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert features.shape == (len(rows), backbone.width) == (30, 192)
    assert features.dtype == np.float32
    assert said["backbone"] == "nano"
    assert said["fingerprint"] == backbone.fingerprint()
    assert {row["split"] for row in rows} == {"train", "val", "test"}
    manifest = et.Manifest.from_csv(eyes / "labels.csv", label_column="glaucoma")
    assert [row["image"] for row in rows] == [record.name for record in manifest]
    assert [row["label"] for row in rows] == [manifest.classes[record.label or 0] for record in manifest]
    from eyetune.data.fundus import FundusSettings, load_square

    square = load_square(manifest[7].image, FundusSettings(backbone.preprocess.pixels, backbone.preprocess.fit))
    image = eval_transform(backbone.preprocess)(torch.from_numpy(square).permute(2, 0, 1))
    with torch.no_grad():
        np.testing.assert_allclose(features[7], backbone.features(image[None])[0].numpy(), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_embedding_a_run_takes_the_adapted_backbone(tmp_path: Path, eyes: Path) -> None:
    config = write_config(tmp_path, eyes, adapt={"kind": "full"}, train={"epochs": 1, "lr": 1e-2, "batch_size": 8})
    run, out = tmp_path / "run", tmp_path / "f.safetensors"
    assert main(["finetune", str(config), "--out", str(run)]) == 0
    found = []
    for source, data in ((config, []), (run, []), (run, ["--data", f"{eyes / 'labels.csv'}:{eyes / 'images'}"])):
        assert main(["embed", str(source), "--out", str(out), "--workers", "0", *data]) == 0
        with safe_open(str(out), "np") as stream:
            found.append(stream.get_tensor("features"))
    assert not np.allclose(found[0], found[1], atol=1e-2)
    np.testing.assert_array_equal(found[1], found[2])
    assert main(["embed", str(run), "--out", str(tmp_path / "f.npy")]) == 2
    assert main(["embed", str(config), "--out", str(out), "--weights", "x"]) == 2
