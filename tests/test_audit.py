"""`eyetune data audit` and `data split`: every planted defect is found, and what is written passes the audit."""

from __future__ import annotations

import csv
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from browser_kit import needs_browser, screenshot
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eyetune.cli import main
from eyetune.data.audit import judge
from eyetune.data.audit.reading import read_sheet
from eyetune.data.audit.rows import Entry, make_group
from eyetune.data.config import DataConfig
from eyetune.data.phantom import write_cohort
from eyetune.data.record import Record
from eyetune.data.records import Manifest
from eyetune.data.splits import split
from eyetune.findings import Status

SHARES = {"train": 0.6, "val": 0.2, "test": 0.2}
PLANTED = {
    "duplicates": 3, "near_duplicates": 8, "patient_leaks": 2, "truncated": 1, "reencoded": 2, "conflicts": 2,
    "blank": 1, "missing": 1, "out_of_range": 1,
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EYETUNE_CACHE", str(tmp_path_factory.getbasetemp() / "audit-cache"))


@pytest.fixture(scope="module")
def dirty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cohort") / "dirty"
    write_cohort(folder, patients=24, size=128, seed=9, splits=SHARES, defects=PLANTED)
    return folder


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cohort") / "clean"
    write_cohort(folder, patients=12, size=96, seed=2)
    rows = rows_of(folder / "labels.csv")
    write_rows(folder / "labels.csv", [dict(row, sick=str(int(row["patient"][1:]) % 2)) for row in rows])
    return folder


def run(*words: object) -> int:
    return main(["data", *map(str, words), "--workers", "1"])


def report(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "audit.json").read_text(encoding="utf-8"))
    return content


def statuses(out: Path) -> dict[str, str]:
    return {found["name"]: found["status"] for found in report(out)["findings"]}


def counted(groups: Iterable[frozenset[str]]) -> Counter[frozenset[str]]:
    return Counter(groups)


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    with open(path, "w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


# -- the whole of it ---------------------------------------------------------------------------------------------------


def test_every_planted_defect_is_found_and_nothing_else(
    dirty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = tmp_path / "fixed.csv"
    words = ("--label-column", "dr_grade", "--out", tmp_path / "out")
    assert run("audit", dirty / "labels.csv", *words, "--fix", fixed) == 1
    said = capsys.readouterr().out
    truth = json.loads((dirty / "defects.json").read_text())["defects"]
    listed = {kind: [frozenset(d["images"]) for d in truth if d["kind"] == kind] for kind in PLANTED}
    found = report(tmp_path / "out")
    groups = {
        kind: counted(frozenset(row["image"] for row in g["rows"]) for g in found["groups"] if g["kind"] == kind)
        for kind in ("bytes", "pixels", "near")
    }
    assert groups["bytes"] == counted([*listed["duplicates"], *listed["conflicts"]])
    assert groups["pixels"] == counted(listed["reencoded"])
    assert groups["near"] == counted(listed["near_duplicates"])
    values = {finding["name"]: finding["values"] for finding in found["findings"]}
    assert len(values["files"]["faults"]) == 2
    assert len(values["blank"]["blank"]) == 1
    assert len(values["labels"]["wrong"]) == 1
    assert values["conflicts"]["conflicts"] == 2
    assert values["patients"]["in_two_splits"] == 2
    assert values["patients"]["fellow_eyes_apart"] == 2
    failing = {"files", "blank", "labels", "conflicts", "patients", "identical", "re-encoded", "near copies"}
    assert {name for name, status in statuses(tmp_path / "out").items() if status == "fail"} == failing
    people = {row["patient"] for row in rows_of(dirty / "labels.csv")}
    assert not [name for name in people if f" {name} " in said.replace(",", " ").replace(":", " ")]

    before, after = rows_of(dirty / "labels.csv"), rows_of(fixed)
    gone = [row for row in before if row not in after]
    assert [row for row in before if row in after] == after, "the same rows, in their order"
    written = rows_of(tmp_path / "fixed-dropped.csv")
    assert [row["image"] for row in written] == [row["image"] for row in gone]
    assert all(row["why"] for row in written)
    for row in written:
        assert f"({row['image']}): {row['why']}" in said, "every dropped row is said"
    assert run("audit", f"{fixed}:{dirty / 'images'}", *words[:2], "--out", tmp_path / "again") == 0
    assert "fail" not in statuses(tmp_path / "again").values()
    page = (tmp_path / "out" / "audit.html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg") >= 2 * (3 + 8 + 2 + 2) + 1
    assert "<script" not in page


def test_a_sound_table_passes_and_is_written_as_it_is(
    clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("audit", clean / "labels.csv", "--label-column", "sick", "--fix", "fixed.csv") == 0
    assert (tmp_path / "fixed.csv").read_bytes() == (clean / "labels.csv").read_bytes()
    assert "no row had to go" in capsys.readouterr().out
    assert (tmp_path / "clean-audit" / "audit.html").is_file()


@pytest.mark.slow
def test_recall_and_precision_on_many_alterations(tmp_path: Path) -> None:
    write_cohort(tmp_path / "eyes", patients=160, size=160, seed=11, defects={"near_duplicates": 120, "reencoded": 20})
    run("audit", tmp_path / "eyes" / "labels.csv", "--label-column", "dr_grade", "--out", tmp_path / "out")
    truth = {frozenset(d["images"]) for d in json.loads((tmp_path / "eyes" / "defects.json").read_text())["defects"]}
    found = {frozenset(row["image"] for row in group["rows"]) for group in report(tmp_path / "out")["groups"]}
    assert len(found & truth) >= 0.99 * len(truth)
    assert len(found & truth) >= 0.95 * len(found)


@needs_browser
@pytest.mark.slow
def test_the_page_shows_pictures(dirty: Path, tmp_path: Path) -> None:
    run("audit", dirty / "labels.csv", "--label-column", "dr_grade", "--out", tmp_path)
    shot = cv2.imread(str(screenshot(tmp_path / "audit.html", tmp_path / "page.png", height=6000)))
    orange = (shot[..., 2].astype(int) - shot[..., 0] > 60) & (shot[..., 1] > 20) & (shot[..., 1] < 140)
    assert orange.mean() > 0.01


# -- several tables ----------------------------------------------------------------------------------------------------


def two_tables(clean: Path, folder: Path) -> tuple[Path, Path]:
    """A train and a test table: one file is in both, and a patient has an eye in each."""
    rows = rows_of(clean / "labels.csv")
    train, test = rows[:15], rows[15:]
    copy = dict(train[0], image="copy.jpg", patient="somebody")
    folder.mkdir(exist_ok=True)
    shutil.copytree(clean / "images", folder / "images")
    shutil.copy(clean / "images" / train[0]["image"], folder / "images" / "copy.jpg")
    return write_rows(folder / "train.csv", train), write_rows(folder / "test.csv", [*test, copy])


def test_tables_are_compared_with_each_other(clean: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, test = two_tables(clean, tmp_path / "data")
    words = ("--label-column", "sick", "--out", tmp_path / "out")
    assert run("audit", train, f"{test}:{tmp_path / 'data' / 'images'}", *words, "--fix", tmp_path / "fixed") == 1
    found = {finding["name"]: finding for finding in report(tmp_path / "out")["findings"]}
    assert found["identical"]["values"]["in_different_splits"] == 1
    assert found["patients"]["values"]["in_two_tables"] == 1
    assert "train.csv row 2 (train.csv" in found["identical"]["why"]
    cleaned = rows_of(tmp_path / "fixed" / "test.csv")
    assert len(cleaned) == len(rows_of(test)), "what is held out stays"
    assert len(rows_of(tmp_path / "fixed" / "train.csv")) == len(rows_of(train)) - 2
    images = tmp_path / "data" / "images"
    again = [f"{tmp_path / 'fixed' / name}:{images}" for name in ("train.csv", "test.csv")]
    assert run("audit", *again, *words) == 0
    capsys.readouterr()
    assert run("audit", train, test, *words, "--patients-apart") == 1
    assert statuses(tmp_path / "out")["patients"] == "pass"


def test_class_folders_are_audited_and_cleaned(clean: Path, tmp_path: Path) -> None:
    for number, row in enumerate(rows_of(clean / "labels.csv")):
        place = tmp_path / "eyes" / ("train", "test")[number % 2] / ("no", "yes")[int(row["sick"])]
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(clean / "images" / row["image"], place)
    one = next(iter(sorted((tmp_path / "eyes" / "train" / "no").iterdir())))
    shutil.copy(one, tmp_path / "eyes" / "test" / "yes" / "other.jpg")
    fixed = tmp_path / "fixed.csv"
    assert run("audit", tmp_path / "eyes", "--out", tmp_path / "out", "--fix", fixed) == 1
    values = {finding["name"]: finding["values"] for finding in report(tmp_path / "out")["findings"]}
    assert values["conflicts"]["conflicts"] == 1
    assert values["identical"]["in_different_splits"] == 1
    assert len(rows_of(fixed)) == len(rows_of(clean / "labels.csv")) + 1 - 2
    assert run("audit", f"{fixed}:{tmp_path / 'eyes'}", "--out", tmp_path / "again") == 0


def test_lines_of_json_stay_as_they_were(clean: Path, tmp_path: Path) -> None:
    rows = [
        {"image": row["image"], "label": int(row["sick"]), "more": {"a": [1]}} for row in rows_of(clean / "labels.csv")
    ]
    lines = [json.dumps(row) for row in rows]
    lines.insert(3, json.dumps({"image": "gone.jpg", "label": 1}))
    (tmp_path / "eyes.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    fixed = tmp_path / "fixed.jsonl"
    words = ("--images", clean / "images", "--out", tmp_path / "out")
    assert run("audit", tmp_path / "eyes.jsonl", *words, "--fix", fixed) == 1
    assert fixed.read_text(encoding="utf-8").splitlines() == lines[:3] + lines[4:]
    assert run("split", tmp_path / "eyes.jsonl", "--images", clean / "images", "--val", "0", "--out", fixed) == 0
    assert {json.loads(line)["split"] for line in fixed.read_text().splitlines()} == {"train", "test"}
    assert json.loads(fixed.read_text().splitlines()[0])["more"] == {"a": [1]}


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "nothing to look at"),
        (["TABLE", "TABLE"], "named twice"),
        (["TABLE", "--fix", "TABLE"], "never overwritten"),
        (["TABLE", "--fix", "LINK"], "never overwritten"),
        (["TABLE", "--fix", "HERE"], "is a folder"),
        (["TABLE", "--out", "TABLE"], "is a file"),
        (["nowhere.csv"], "no table at nowhere.csv"),
        (["TABLE", "--label-column", "dr_grad"], "Did you mean 'dr_grade'"),
        (["TABLE", "--images", "nowhere"], "no image folder"),
        (["TABLE", "--classes", "a,a"], "two names or more"),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(
    clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    words: list[str], said: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    table = tmp_path / "labels.csv"
    shutil.copy(clean / "labels.csv", table)
    shutil.copytree(clean / "images", tmp_path / "images")
    (tmp_path / "link.csv").hardlink_to(table)
    before = table.read_bytes()
    names = {"TABLE": str(table), "LINK": str(tmp_path / "link.csv"), "HERE": str(tmp_path)}
    assert run("audit", *(names.get(word, word) for word in words)) == 2
    assert said in capsys.readouterr().err
    assert table.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "labels.csv", "link.csv"]


def test_a_table_of_nothing_but_faults_is_not_written(
    clean: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_of(clean / "labels.csv")[:2]
    (tmp_path / "images").mkdir()
    for row in rows:
        (tmp_path / "images" / row["image"]).write_bytes(b"")
    table = write_rows(tmp_path / "table.csv", rows)
    assert (
        run("audit", table, "--label-column", "dr_grade", "--fix", tmp_path / "fixed.csv", "--out", tmp_path / "o") == 2
    )
    assert "no row is left" in capsys.readouterr().err
    assert not (tmp_path / "fixed.csv").exists()


# -- reading with mistakes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cells", "bad"),
    [
        (["0", "1", "2", "-1"], {3: "below 0"}),
        (["0", "1", "2", "1.5"], {3: "fractions"}),
        (["0", "1", "2", "mild"], {3: "words where the others are numbers"}),
        (["no", "yes", "no", "3"], {3: "numbers where the others are words"}),
        (["0", "1", "2", "9"], {3: "the others run 0..2"}),
        (["0", "1", "2", "999"], {3: "highest label is 999"}),
        (["0", "1", "2", ""], {3: "no label"}),
        (["0", "1", "3", "1"], {}),
        (["", "", "", ""], {}),
    ],
)
def test_labels_that_make_no_sense_are_named_and_the_rest_is_read(
    tmp_path: Path, cells: list[str], bad: dict[int, str]
) -> None:
    table = tmp_path / "t.csv"
    for name in "abcd":
        (tmp_path / f"{name}.jpg").write_bytes(b"-")
    table.write_text(
        "image,label\n" + "".join(f"{name}.jpg,{cell}\n" for name, cell in zip("abcd", cells, strict=True))
    )
    sheet = read_sheet(DataConfig(table=str(table)), "t.csv")
    assert set(sheet.faults) == set(bad)
    for index, words in bad.items():
        assert words in sheet.faults[index][0].said
    for index, (record, cell) in enumerate(zip(sheet.records, cells, strict=True)):
        if index not in bad and cell:
            assert record.label is not None
            assert sheet.classes[record.label] == cell


def test_rows_without_a_file_or_a_split_are_named(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.png", "b.jpg"):
        (tmp_path / name).write_bytes(b"-")
    table = tmp_path / "t.csv"
    table.write_text("image,split\nb.jpg,train\n,train\ngone.jpg,test\na,test\nb.jpg,maybe\n")
    sheet = read_sheet(DataConfig(table=str(table)), "t.csv")
    assert {index: [fault.kind for fault in found] for index, found in sheet.faults.items()} == {
        1: ["unnamed"], 2: ["missing"], 3: ["ambiguous"], 4: ["split"],
    }  # fmt: skip


# -- judgements --------------------------------------------------------------------------------------------------------


def entry(part: str, split_: str | None, label: str | None = "0", patient: str | None = None, sheet: int = 0) -> Entry:
    record = Record(Path("a.jpg"), 0, "a.jpg", "t row 2", patient=patient, split=split_)
    return Entry(record, part, split_, label, sheet)


@pytest.mark.parametrize(
    ("one", "other", "flags", "said"),
    [
        (entry("train", "train"), entry("test", "test"), (False, True, False), "in different splits"),
        (entry("train", "train", "0"), entry("train", "train", "1"), (True, False, False), "in one split, with diff"),
        (entry("train", "train"), entry("train", "train"), (False, False, False), "in one split"),
        (entry("", None), entry("", None), (False, False, True), "that a random split would part"),
        (entry("", None, patient="P"), entry("", None, patient="P"), (False, False, False), "of one patient"),
        (entry("", None, patient="P"), entry("", None, patient="Q"), (False, False, True), "that a random split"),
        (entry("a", None), entry("b", None, sheet=1), (False, True, False), "in different tables"),
        (entry("a", "train"), entry("b", "train", sheet=1), (False, False, False), "in one split"),
        (entry("a", "train", None), entry("b", "test", "1", sheet=1), (False, True, False), "in different tables"),
    ],
)
def test_what_two_copies_mean(one: Entry, other: Entry, flags: tuple[bool, bool, bool], said: str) -> None:
    group = make_group([one, one, other, other], [0, 1, 2, 3], "bytes", "", lambda a, b: True)
    assert (group.conflicting, group.crossing, group.unsplit) == flags
    assert group.said.startswith(f"the same file {said}")


def test_labels_of_other_columns_are_not_compared() -> None:
    group = make_group(
        [entry("a", None, "0"), entry("b", None, "1", sheet=1)], [0, 1], "bytes", "", lambda a, b: a == b
    )
    assert not group.conflicting


def test_imbalance_is_advised_on_and_fails_nothing() -> None:
    finding = judge.classes({"train": {"no": 111, "yes": 10}, "test": {"no": 20, "yes": 0}})
    assert finding.status == Status.WARN
    assert "11.1 times" in finding.why
    assert "train.balance" in finding.advice
    assert "say nothing of yes" in finding.advice
    assert judge.classes({"train": {"no": 100, "yes": 10}}).status == Status.PASS


# -- splits ------------------------------------------------------------------------------------------------------------


def test_splits_pass_the_audit(dirty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "cut.csv"
    words = ("--label-column", "dr_grade", "--split-column", "none")
    shares = ("--val", "0.2", "--test", "0.25", "--seed", "3")
    assert run("split", dirty / "labels.csv", *words, *shares, "--out", out) == 0
    said = capsys.readouterr().out
    assert "groups of copies kept on one side" in said
    assert "different labels" in said, "conflicts are said"
    rows = {row["image"]: row for row in rows_of(out)}
    truth = json.loads((dirty / "defects.json").read_text())["defects"]
    for defect in truth:
        if defect["kind"] in ("duplicates", "near_duplicates", "reencoded"):
            assert len({rows[name]["split"] for name in defect["images"]}) == 1
        elif defect["kind"] in ("conflicts", "truncated", "blank", "missing", "out_of_range"):
            assert not [name for name in defect["images"] if name in rows]
    assert {row["split"] for row in rows.values()} == {"train", "val", "test"}
    again = (f"{out}:{dirty / 'images'}", "--label-column", "dr_grade", "--out", tmp_path / "audit")
    assert run("audit", *again) == 0
    other = tmp_path / "other.csv"
    assert run("split", dirty / "labels.csv", *words, *shares[:4], "--seed", "4", "--out", other) == 0
    assert rows_of(other) != rows_of(out)
    assert run("split", dirty / "labels.csv", *words, *shares, "--out", other) == 0
    assert other.read_bytes() == out.read_bytes()


def test_splits_that_are_there_stay(clean: Path, tmp_path: Path) -> None:
    rows = [dict(row, set="test" if n >= 18 else "train") for n, row in enumerate(rows_of(clean / "labels.csv"))]
    table, out = write_rows(tmp_path / "t.csv", rows), tmp_path / "cut.csv"
    words = ("--images", clean / "images", "--label-column", "sick", "--split-column", "set", "--val", "0.3")
    assert run("split", table, *words, "--out", out) == 0
    cut = rows_of(out)
    assert list(cut[0]) == list(rows[0]), "the column of the splits is set, none is added"
    assert [row["set"] == "test" for row in cut] == [row["set"] == "test" for row in rows]
    assert "val" in {row["set"] for row in cut}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--val", "0.5", "--test", "0.5"], "leave something to train on"),
        (["--label-column", "none"], "no labels to split by"),
        (["--out", "TABLE"], "never overwritten"),
    ],
)
def test_splits_that_cannot_be_made(
    clean: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    table = tmp_path / "t.csv"
    shutil.copy(clean / "labels.csv", table)
    usual = {"--images": str(clean / "images"), "--out": str(tmp_path / "cut.csv"), "--label-column": "sick"}
    usual |= dict(zip(words[::2], (str(table) if word == "TABLE" else word for word in words[1::2]), strict=True))
    assert run("split", table, *(word for pair in usual.items() for word in pair)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "cut.csv").exists()


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9) | st.none()), min_size=30, max_size=60),
    st.lists(st.lists(st.integers(0, 29), min_size=2, max_size=4), max_size=6),
    st.integers(0, 99),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
def test_what_belongs_together_is_never_parted(
    rows: list[tuple[int, int | None]], together: list[list[int]], seed: int
) -> None:
    from eyetune.errors import DataError

    records = [
        Record(Path(f"{n}.jpg"), label, f"{n}.jpg", f"row {n}", patient=None if patient is None else f"P{patient}")
        for n, (label, patient) in enumerate(rows)
    ]
    manifest = Manifest(tuple(records), ("a", "b", "c"), "t.csv")
    try:
        found = split(manifest, 0.2, 0.2, seed, together=together)
    except DataError:  # too few groups to cut, or a class that train does not get
        return
    for group in together:
        assert len({found[index].split for index in group}) == 1
    by_patient: dict[str | None, set[str | None]] = {}
    for record in found:
        by_patient.setdefault(record.patient, set()).add(record.split)
    assert all(len(splits) == 1 for patient, splits in by_patient.items() if patient is not None)


def test_without_copies_the_cut_is_as_it_was() -> None:
    records = [Record(Path(f"{n}.jpg"), n % 3, f"{n}.jpg", f"row {n}", patient=f"P{n // 2}") for n in range(60)]
    manifest = Manifest(tuple(records), ("a", "b", "c"), "t.csv")
    plain = split(manifest, 0.2, 0.2, 0)
    assert [r.split for r in plain] == [r.split for r in split(manifest, 0.2, 0.2, 0, together=[[0, 1], [4, 5]])]


# -- what finetune says ------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(clean: Path, tmp_path: Path) -> Callable[[str, str], Path]:
    """A table with splits in which one file is there twice, under another split or label."""

    def make(split_: str, label: str) -> Path:
        shutil.copytree(clean / "images", tmp_path / "images", dirs_exist_ok=True)
        rows = [
            dict(row, split=("train", "val", "test")[n // 2 % 3]) for n, row in enumerate(rows_of(clean / "labels.csv"))
        ]
        shutil.copy(tmp_path / "images" / rows[0]["image"], tmp_path / "images" / "copy.jpg")
        rows.append(dict(rows[0], image="copy.jpg", patient="Q", split=split_ or "train", sick=label))
        if not split_:
            rows = [{key: cell for key, cell in row.items() if key != "split"} for row in rows]
        return write_rows(tmp_path / "t.csv", rows)

    return make


def notes(table: Path) -> tuple[Manifest, str]:
    from eyetune.config import Config
    from eyetune.verbs.finetune import prepare_data

    content = {"data": {"table": str(table), "label_column": "sick"}, "model": {"pixels": 32}, "workers": 0}
    manifest = prepare_data(Config.parse(content), None)
    return manifest, "\n".join(manifest.notes)


def test_finetune_notices_identical_files(clean: Path, copied: Callable[[str, str], Path]) -> None:
    first = rows_of(clean / "labels.csv")[0]["sick"]
    manifest, said = notes(copied("test", first))
    assert "1 photographs are in more than one split" in said
    assert "eyetune data audit" in said
    assert "different labels" not in said
    manifest, said = notes(copied("train", str(1 - int(first))))
    assert "more than one split" not in said
    assert "1 photographs are there twice with different labels" in said
    manifest, said = notes(copied("", first))
    assert "more than one split" not in said
    by_name = {record.name: record.split for record in manifest}
    assert by_name["copy.jpg"] == by_name[rows_of(clean / "labels.csv")[0]["image"]]


def test_a_blank_picture_is_nobodys_copy(clean: Path, tmp_path: Path) -> None:
    rows = rows_of(clean / "labels.csv")
    shutil.copytree(clean / "images", tmp_path / "images")
    for name in ("x.png", "y.png"):
        cv2.imwrite(str(tmp_path / "images" / name), np.zeros((96, 96, 3), np.uint8))
        rows.append(dict(rows[0], image=name, patient=name))
    run("audit", write_rows(tmp_path / "t.csv", rows), "--label-column", "sick", "--out", tmp_path / "out")
    assert statuses(tmp_path / "out")["blank"] == "fail"
    assert statuses(tmp_path / "out")["identical"] == "pass"
