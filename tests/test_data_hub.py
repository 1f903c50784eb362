"""Hugging Face datasets kept in a local folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from data_kit import fundus, save

from eyetune.data.config import DataConfig
from eyetune.data.photo import read_image
from eyetune.data.records import Manifest, open_manifest
from eyetune.errors import DataError, MissingExtra

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EYETUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def made(folder: Path, count: int, first: int = 0, *, embed: bool = True) -> Any:
    paths = [save(folder / f"{i}.png", fundus(24, 24, radius=10, seed=i)) for i in range(first, first + count)]
    features = datasets.Features(
        {
            "photo": datasets.Image(),
            "label": datasets.ClassLabel(names=["well", "sick", "very sick"]),
            "patient_id": datasets.Value("string"),
            "age": datasets.Value("int64"),
        }
    )
    return datasets.Dataset.from_dict(
        {
            "photo": [{"bytes": p.read_bytes() if embed else None, "path": p.name if embed else str(p)} for p in paths],
            "label": [i % 3 for i in range(count)],
            "patient_id": [f"P{path.stem}" for path in paths],
            "age": [40 + i for i in range(count)],
        },
        features=features,
    )


def test_a_saved_dataset_with_splits(tmp_path: Path) -> None:
    parts = datasets.DatasetDict({"train": made(tmp_path, 6), "test": made(tmp_path, 3, first=6)})
    parts.save_to_disk(str(tmp_path / "saved"))
    read = open_manifest(DataConfig(table=f"hf:{tmp_path}/saved"))
    # The order is the dataset's own, not the alphabet's.
    assert read.classes == ("well", "sick", "very sick")
    assert read.labels == (0, 1, 2) * 3
    assert read.splits == ("train", "test")
    assert (read[7].patient, read[7].split, read[7].extra["age"]) == ("P7", "test", "41")
    assert len({record.name for record in read}) == 9
    # The images are copies, byte for byte.
    assert read[7].image.read_bytes() == (tmp_path / "7.png").read_bytes()
    assert read_image(read[7].image).shape == (24, 24, 3)


def test_the_copy_is_used_again_until_the_dataset_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path, 4).save_to_disk(str(tmp_path / "saved"))
    first = Manifest.from_huggingface(str(tmp_path / "saved"))
    with monkeypatch.context() as patch:
        patch.setattr("eyetune.data.hub.open_dataset", lambda *_: pytest.fail("read again"))
        again = Manifest.from_huggingface(str(tmp_path / "saved"))
    assert again.records == first.records
    assert again.classes == first.classes
    assert "read from the copy" in again.notes[0]
    made(tmp_path, 5).save_to_disk(str(tmp_path / "saved"))
    assert len(Manifest.from_huggingface(str(tmp_path / "saved"))) == 5


def test_a_copy_cut_short_is_completed(tmp_path: Path) -> None:
    made(tmp_path, 4).save_to_disk(str(tmp_path / "saved"))
    first = Manifest.from_huggingface(str(tmp_path / "saved"))
    folder = first[0].image.parents[1]
    (folder / "index.json").unlink()
    first[2].image.write_bytes(b"half")
    Manifest.from_huggingface(str(tmp_path / "saved"))
    assert first[2].image.read_bytes() == (tmp_path / "2.png").read_bytes()


def test_parquet_without_splits_and_files_on_disk(tmp_path: Path) -> None:
    (tmp_path / "parquet").mkdir()
    made(tmp_path, 6).to_parquet(str(tmp_path / "parquet" / "train-0.parquet"))
    read = Manifest.from_huggingface(str(tmp_path / "parquet"))
    assert (len(read), read.splits, read.classes) == (6, (), ("well", "sick", "very sick"))


def test_columns_and_classes_can_be_named(tmp_path: Path) -> None:
    made(tmp_path, 6).save_to_disk(str(tmp_path / "saved"))
    name = str(tmp_path / "saved")
    assert Manifest.from_huggingface(name, classes=("sick", "very sick", "well")).labels == (2, 0, 1) * 2
    aged = Manifest.from_huggingface(
        name, image_column="photo", label_column="age", classes=[str(40 + i) for i in range(6)]
    )
    assert aged.labels == (0, 1, 2, 3, 4, 5)
    with pytest.raises(DataError, match="Did you mean 'photo'"):
        Manifest.from_huggingface(name, image_column="foto")
    with pytest.raises(DataError, match=r"no column 'ages' .*Did you mean 'age'"):
        Manifest.from_huggingface(name, label_column="ages")


def test_what_is_no_dataset(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="not a dataset saved with save_to_disk"):
        Manifest.from_huggingface(str(tmp_path / "empty"))
    datasets.Dataset.from_dict({"text": ["a"], "label": [0]}).save_to_disk(str(tmp_path / "words"))
    with pytest.raises(DataError, match="no column holds images; it has text, label"):
        Manifest.from_huggingface(str(tmp_path / "words"))


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"pip install 'eyetune\[hub\]'"):
        Manifest.from_huggingface("somebody/something")
