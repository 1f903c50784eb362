"""Splits: grouped by patient, stratified, seeded, independent of the order of rows, written and read back."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from data_kit import manifest, records
from hypothesis import given, settings
from hypothesis import strategies as st

from eyetune.data.records import Manifest
from eyetune.data.splits import read_splits, split, write_splits
from eyetune.errors import DataError


def by_name(made: Manifest) -> dict[str, str | None]:
    return {record.name: record.split for record in made}


def cohort(sizes: list[int], labels: list[int], classes: int) -> Manifest:
    """Patients with `sizes` images each; an image's label is its patient's, or one above for every third image."""
    patients = [f"P{p}" for p, size in enumerate(sizes) for _ in range(size)]
    grades = [(labels[p] + (i % 3 == 2)) % classes for p, size in enumerate(sizes) for i in range(size)]
    return manifest(records(grades, patients), classes)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=30, max_size=120),
    classes=st.integers(2, 5),
    val=st.sampled_from([0.0, 0.1, 0.15, 0.25]),
    test=st.sampled_from([0.1, 0.2, 0.33]),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_what_holds_of_every_split(
    sizes: list[int], classes: int, val: float, test: float, seed: int, data: st.DataObject
) -> None:
    grades = data.draw(st.lists(st.integers(0, classes - 1), min_size=len(sizes), max_size=len(sizes)))
    grades[: 3 * classes] = [index % classes for index in range(min(len(sizes), 3 * classes))]
    made = cohort(sizes, grades, classes)
    cut = split(made, val, test, seed)
    # Every record exactly once, in its place, and unchanged but for the split.
    assert [replace(record, split=None) for record in cut] == list(made)
    # No patient on two sides.
    sides: dict[str | None, set[str | None]] = {}
    for record in cut:
        sides.setdefault(record.patient, set()).add(record.split)
    assert all(len(found) == 1 for found in sides.values())
    # Shares near what was asked: a class of few patients gets one in each part, so a class may weigh one patient more.
    for name, share in (("val", val), ("test", test)):
        got = sum(record.split == name for record in cut)
        assert abs(got - share * len(made)) <= classes + max(sizes)
        assert (got > 0) == (share > 0)
    # The same whatever the order of the rows.
    shuffled = list(made)
    random.Random(seed).shuffle(shuffled)
    assert by_name(split(manifest(shuffled, classes), val, test, seed)) == by_name(cut)


@pytest.mark.parametrize("share", [0.05, 0.1, 0.125, 0.15, 0.3])
def test_shares_come_out_as_asked(share: float) -> None:
    rng = random.Random(0)
    grades = rng.choices([0, 1, 2, 3, 4], weights=[49, 10, 27, 5, 8], k=1000)
    cut = split(cohort([2] * 1000, grades, 5), share, share, 7)
    everything = cut.class_counts()
    for name in ("val", "test"):
        part = cut.select(name)
        assert len(part) / len(cut) == pytest.approx(share, abs=0.004)
        for got, all_of_it in zip(part.class_counts(), everything, strict=True):
            assert got == pytest.approx(share * all_of_it, abs=3)


def test_a_rare_class_reaches_every_split() -> None:
    cut = split(manifest(records([0] * 200 + [1] * 3)), 0.1, 0.1, 0)
    assert [cut.select(name).class_counts()[1] for name in ("train", "val", "test")] == [1, 1, 1]


def test_another_seed_cuts_otherwise() -> None:
    made = manifest(records([0, 1] * 50))
    assert by_name(split(made, 0.2, 0.2, 0)) == by_name(split(made, 0.2, 0.2, 0))
    assert by_name(split(made, 0.2, 0.2, 0)) != by_name(split(made, 0.2, 0.2, 1))


def test_existing_splits_stay_and_what_lacks_is_cut_from_train() -> None:
    found = [replace(record, split="test" if i < 30 else "train") for i, record in enumerate(records([0, 1] * 65))]
    cut = split(manifest(found), 0.1, 0.5, 0)
    assert [record.split for record in cut][:30] == ["test"] * 30
    assert len(cut.select("val")) == 10
    assert len(cut.select("train")) == 90
    whole = [
        replace(record, split=("train", "val", "test")[i % 3]) for i, record in enumerate(records([0, 0, 0, 1, 1, 1]))
    ]
    assert list(split(manifest(whole), 0.3, 0.3, 0)) == whole


def test_zero_cuts_nothing() -> None:
    assert split(manifest(records([0, 1] * 5)), 0.0, 0.0, 0).splits == ("train",)


def test_absent_from_validation_is_said() -> None:
    cut = split(manifest(records([0] * 40 + [1] * 2)), 0.1, 0.1, 0)
    assert cut.class_counts() == (40, 2)
    assert any("the val split has no image of 1" in note for note in cut.notes)


@pytest.mark.parametrize(
    ("labels", "patients", "said"),
    [
        ([0, 1], None, "2 images cannot be cut into train, val, test"),
        ([0, 1] * 20, ["A", "B"] * 20, "2 patients cannot be cut"),
        ([0] * 40, None, "every image to train on has the label '0'"),
    ],
)
def test_too_little_to_cut(labels: list[int | None], patients: list[str | None] | None, said: str) -> None:
    with pytest.raises(DataError, match=said):
        split(manifest(records(labels, patients)), 0.1, 0.1, 0)


def test_no_train_split() -> None:
    found = [replace(record, split="test") for record in records([0, 1])]
    with pytest.raises(DataError, match="has test but no train split"):
        split(manifest(found), 0.1, 0.1, 0)


def test_splits_are_written_and_read_back(tmp_path: Path) -> None:
    made = manifest(records([0, 1] * 20, ["P, 1", None] * 20))
    cut = split(made, 0.2, 0.2, 0)
    write_splits(cut, tmp_path / "splits.csv")
    lines = (tmp_path / "splits.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "image,split,patient,eye,target"
    assert lines[1] == f'0.jpg,{cut[0].split},"P, 1",,0'
    assert by_name(read_splits(tmp_path / "splits.csv", made)) == by_name(cut)


def test_splits_of_other_images_are_refused(tmp_path: Path) -> None:
    cut = split(manifest(records([0, 1] * 20)), 0.2, 0.2, 0)
    write_splits(cut, tmp_path / "splits.csv")
    with pytest.raises(DataError, match=r"2 images of t.csv are not in it:\n  40.jpg"):
        read_splits(tmp_path / "splits.csv", manifest(records([0, 1] * 21)))
    with pytest.raises(DataError, match=r"2 images in it are not in t.csv:\n  38.jpg"):
        read_splits(tmp_path / "splits.csv", manifest(records([0, 1] * 19)))
    (tmp_path / "splits.csv").write_text("image,split\n0.jpg,perhaps\n")
    with pytest.raises(DataError, match="1 rows do not say train, val, test"):
        read_splits(tmp_path / "splits.csv", manifest(records([0])))
