"""`eyetune check data`: a sound cohort passes, and each planted defect is found."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from eyetune.checks import data as checks
from eyetune.cli import main
from eyetune.data.audit import judge
from eyetune.data.audit.rows import entries_of_manifest
from eyetune.data.phantom import write_cohort
from eyetune.data.record import Record
from eyetune.data.records import Manifest
from eyetune.findings import Finding, Status


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EYETUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cohort") / "eyes"
    write_cohort(folder, patients=30, size=64, seed=3, splits={"train": 0.6, "val": 0.2, "test": 0.2})
    return folder


def check(folder: Path, out: Path, *flags: str) -> int:
    words = ["--data.table", str(folder / "labels.csv"), "--data.label_column", "glaucoma", "--model.pixels", "64"]
    return main(["check", "data", *words, "--workers", "0", "--out", str(out), *flags])


def verdicts(out: Path) -> dict[str, str]:
    return {found["name"]: found["status"] for found in json.loads((out / "data.json").read_text())["findings"]}


def test_a_sound_cohort_passes(sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(sound, tmp_path / "out") == 0
    assert "fail" not in verdicts(tmp_path / "out").values()
    assert "check data passed" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "data.json").read_text())
    assert sum(sum(counts) for counts in found["counts"].values()) == 60
    for name in found["pictures"]:
        with Image.open(tmp_path / "out" / name) as picture:
            assert min(picture.size) > 400


def test_planted_defects_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "eyes"
    shares = {"train": 0.6, "val": 0.2, "test": 0.2}
    planted = {"duplicates": 2, "truncated": 1, "patient_leaks": 1}
    write_cohort(folder, patients=30, size=64, seed=3, splits=shares, defects=planted)
    assert check(folder, tmp_path / "out") == 1
    found = verdicts(tmp_path / "out")
    assert found["readable"] == "fail"
    assert found["patients"] == "fail"
    assert found["identical"] in ("fail", "warn")
    said = capsys.readouterr().out
    assert "1 of 62 images cannot be read" in said
    assert "--skip-unreadable" in said
    assert "in more than one split" in said
    assert "2 x the same file" in said
    with open(folder / "labels.csv", encoding="utf-8", newline="") as stream:
        patients = {row["patient"] for row in csv.DictReader(stream)}
    assert not [name for name in patients if f" {name}" in said.replace(",", " ")], "patients are not named"
    assert check(folder, tmp_path / "out", "--skip-unreadable") == 1
    assert verdicts(tmp_path / "out")["readable"] == "warn"


def manifest(*rows: tuple[int | None, str, str | None], folder: Path = Path()) -> Manifest:
    """Records of (label, split, patient)."""
    records = tuple(
        Record(folder / f"{n}.png", label, f"{n}.png", f"t.csv row {n + 2}", patient=patient, split=split)
        for n, (label, split, patient) in enumerate(rows)
    )
    return Manifest(records, ("no", "yes"), "t.csv")


def test_imbalance_fails_unless_it_is_answered() -> None:
    found = manifest(*[(0, "train", None)] * 121, *[(1, "train", None)] * 11)
    finding = checks.classes(found, "none")
    assert finding.status == Status.FAIL
    assert "11.0 times" in finding.why
    assert "train.balance: weighted" in finding.advice
    assert checks.classes(found, "weighted").status == Status.PASS
    assert checks.classes(manifest(*[(0, "train", None)] * 20, *[(1, "train", None)] * 9), "none").status == Status.WARN
    assert checks.classes(manifest((0, "train", None)), "none").status == Status.FAIL


def test_splits_that_cannot_do_their_work() -> None:
    whole = manifest(*[(label, split, None) for split in ("train", "val", "test") for label in (0, 1)])
    assert checks.splits(whole).status == Status.PASS
    part = checks.splits(manifest((0, "train", None), (1, "train", None), (1, "val", None)))
    assert part.status == Status.WARN
    assert "the val split shows no no" in part.why
    assert "no test split" in part.why
    assert checks.splits(manifest((None, "train", None), (1, "train", None))).status == Status.FAIL


def test_patients_in_two_splits() -> None:
    def judged(*rows: tuple[int | None, str, str | None]) -> Finding:
        return judge.patients(entries_of_manifest(manifest(*rows)))

    assert judged((0, "train", None)).status == Status.WARN
    assert judged((0, "train", "a"), (1, "train", "a"), (1, "test", "b")).status == Status.PASS
    finding = judged((0, "train", "Ann"), (1, "test", "Ann"), (1, "test", "Ben"))
    assert finding.status == Status.FAIL
    assert "1 of 2 patients" in finding.why
    assert "t.csv row 2 (train), t.csv row 3 (test)" in finding.why
    assert "Ann" not in finding.why


@pytest.mark.parametrize(
    ("second", "status", "word"),
    [
        ((0, "test", None), Status.FAIL, "in different splits"),
        ((1, "train", None), Status.FAIL, "with different labels"),
        ((0, "train", None), Status.WARN, "in one split"),
    ],
)
def test_identical_files(tmp_path: Path, second: tuple[int, str, None], status: Status, word: str) -> None:
    found = manifest((0, "train", None), second, (1, "val", None), folder=tmp_path)
    for record, content in zip(found, (b"same", b"same", b"else"), strict=True):
        record.image.write_bytes(content)
    finding = checks.identical(found)
    assert finding.status == status
    assert word in finding.why
    assert "row 2" in finding.why
    assert "row 4" not in finding.why
    found[1].image.write_bytes(b"diff")
    assert checks.identical(found).status == Status.PASS


def test_small_images_are_a_warning(tmp_path: Path) -> None:
    found = manifest((0, "train", None), (1, "train", None), folder=tmp_path)
    for record in found:
        Image.new("RGB", (100, 80)).save(record.image)
    assert checks._sizes(found, 64).status == Status.PASS
    assert checks._sizes(found, 224).status == Status.WARN


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda rows: [], "labels.csv"),
        (lambda rows: [row | {"image": "gone.png"} for row in rows], "gone.png"),
        (lambda rows: [row | {"glaucoma": ""} for row in rows], "60 rows have no label"),
        (lambda rows: [*rows, rows[3]], "row 5"),
    ],
    ids=["empty", "no image", "no label", "twice"],
)
def test_what_the_reader_refuses_ends_the_check(
    sound: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[list[dict[str, str]]], list[dict[str, str]]],
    said: str,
) -> None:
    folder = tmp_path / "eyes"
    shutil.copytree(sound, folder)
    with open(folder / "labels.csv", encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    with open(folder / "labels.csv", "w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(spoil(rows))
    assert check(folder, tmp_path / "out") == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nothing_readable_ends_the_check(sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "eyes"
    shutil.copytree(sound, folder)
    for image in (folder / "images").iterdir():
        image.write_bytes(b"")
    assert check(folder, tmp_path / "out") == 2
    assert "none of the 60 images can be read" in capsys.readouterr().err


def test_a_leak_is_shown_beside_the_rest(sound: Path) -> None:
    """The reader refuses a patient in two splits; for this check it is one finding among others."""
    from eyetune.config import Config

    config = Config.parse({"data": {"table": str(sound / "labels.csv"), "label_column": "glaucoma"}})
    apart, whole = checks._with_leaks(config.data), checks.open_for_checking(config)
    assert [(r.name, r.split, r.patient) for r in apart] == [(r.name, r.split, r.patient) for r in whole]
