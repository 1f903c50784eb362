"""`eyetune clip prepare`: tables, datasets and RET-CLIP's own tables to pairs; what is amiss; going on after a kill."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from data_kit import fundus, save
from pairs_kit import contents, encoded, jpeg

from eyetune.cli import main
from eyetune.clip.tokens import Tokenizer
from eyetune.data.pairs import PairSet
from eyetune.data.pairs.dataset import PhotoDataset, patiently
from eyetune.data.pairs.journal import NAME, Journal
from eyetune.data.pairs.layout import decode_base64, encode_base64
from eyetune.data.photo import decode_image
from eyetune.errors import DataError, RunError
from eyetune.interrupt import Interrupted

SMALL = ("--pixels", "32", "--workers", "1")
UNCUT = ("--val-share", "0", "--test-share", "0")


def table(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, names)
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """P1_L.png, P1_R.png, … of six patients, and one that is no image."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(6):
        for side in "LR":
            save(folder / f"P{number}_{side}.png", fundus(48, 64, radius=20, seed=2 * number + (side == "R")))
    (folder / "broken.png").write_bytes(b"no image")
    return folder


def eyes(*patients: int) -> list[dict[str, Any]]:
    """Rows of a table with a row an eye."""
    return [
        {"image": f"P{n}_{side}.png", "patient": f"P{n}", "eye": side, "caption": f"eye {n}{side}", "grade": n % 3}
        for n in patients
        for side in "LR"
    ]


class Prepared:
    """The outcome of one command."""

    def __init__(self, code: int, out: Path, said: str) -> None:
        self.code, self.out, self.said = code, out, said

    def __getitem__(self, split: str) -> PairSet:
        return PairSet.open(self.out, split)

    def texts(self, split: str = "train") -> dict[str, list[str]]:
        """The texts of each patient."""
        read = self[split]
        return {name: [read.texts[t] for p, t in read.links if p == n] for n, name in enumerate(read.patients)}

    @property
    def report(self) -> Any:
        return json.loads((self.out / "prepare.json").read_text())


@pytest.fixture
def prepare(tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Prepared]:
    def run(source: Path | Sequence[dict[str, Any]], *flags: str, out: str = "out", images: bool = True) -> Prepared:
        path = source if isinstance(source, Path) else table(tmp_path / "t.csv", source)
        beside = ["--images", str(photos)] if images else []
        code = main(["clip", "prepare", str(path), "--out", str(tmp_path / out), *beside, *SMALL, *flags])
        said = capsys.readouterr()
        return Prepared(code, tmp_path / out, said.out + said.err)

    return run


# -- tables ------------------------------------------------------------------------------------------------------------


def test_a_row_an_eye(prepare: Callable[..., Prepared], photos: Path) -> None:
    rows = eyes(0, 1) + eyes(2)[:1]
    made = prepare(rows, *UNCUT, "--label-column", "grade")
    assert made.code == 0, made.said
    assert made.texts() == {
        "P0": ["Left eye: eye 0L Right eye: eye 0R"],
        "P1": ["Left eye: eye 1L Right eye: eye 1R"],
        "P2": ["eye 2L"],
    }
    read = made["train"]
    assert read.single.tolist() == [False, False, True]
    assert (read.labels, read.patient_labels) == (["0", "1", "2"], ["0", "1", "2"])
    # The images: left before right, the whole field of view, squares of the size asked for.
    left, right = read.photos(0)
    assert left.shape == (32, 32, 3)
    assert abs(left.astype(int) - fundus_square(photos / "P0_L.png")).mean() < 3
    assert abs(right.astype(int) - fundus_square(photos / "P0_R.png")).mean() < 3
    notes = json.loads((made.out / "lmdb/train/pairs.json").read_text())
    assert notes["patients"]["P2"] == {"group": "P2", "single": "left", "label": "2"}
    assert contents(made.out / "lmdb/train/imgs")[b"P2"][0] == contents(made.out / "lmdb/train/imgs")[b"P2"][1]
    assert made.report["splits"]["train"]["single_eyes"] == 1
    assert read.photographs == {
        known_again(photos / f"{name}.png") for name in ("P0_L", "P0_R", "P1_L", "P1_R", "P2_L")
    }


def known_again(file: Path | bytes) -> str:
    return hashlib.sha256(file if isinstance(file, bytes) else file.read_bytes()).hexdigest()[:16]


def fundus_square(path: Path) -> Any:
    from eyetune.data.fundus import FundusSettings, load_square

    return load_square(path, FundusSettings(32)).astype(int)


def test_texts_about_one_eye_may_stand_alone(prepare: Callable[..., Prepared]) -> None:
    each = prepare(eyes(0), *UNCUT, "--eye-texts", "each", out="each")
    assert each.texts() == {"P0": ["eye 0L", "eye 0R"]}
    apart = prepare(eyes(0), *UNCUT, "--eye-texts", "apart", out="apart")
    assert apart.texts() == {"P0": ["eye 0L"], "P0-2": ["eye 0R"]}
    assert apart["train"].groups == ["P0", "P0"]
    assert apart["train"].single.tolist() == [True, True]


def test_what_is_joined_names_its_side_once(prepare: Callable[..., Prepared]) -> None:
    rows = eyes(0, 1, 2)
    for row, caption in zip(rows, ["the left eye", "drusen", "正常", "左右正常", "same", "same"], strict=True):
        row["caption"] = caption
    made = prepare(rows, *UNCUT)
    assert list(made.texts().values()) == [["the left eye Right eye: drusen"], ["左眼：正常 左右正常"], ["same"]]


def test_a_row_a_patient(prepare: Callable[..., Prepared]) -> None:
    rows = [
        {"id": "a", "Left_Image": "P0_L", "right_image": "P0_R.png", "text_1": "one", "text_2": "two", "text_left": ""},
        {"id": "b", "Left_Image": "", "right_image": "P1_R", "text_1": "one", "text_2": "nan", "text_left": "lost"},
        {"id": "c", "Left_Image": "P2_L", "right_image": "P2_R", "text_left": "l", "text_right": "r"},
    ]
    made = prepare(rows, *UNCUT, "--patient-column", "id")
    assert made.code == 0, made.said
    # (The text about an eye that is not there is not used.)
    assert made.texts() == {"a": ["one", "two"], "b": ["one"], "c": ["Left eye: l Right eye: r"]}
    assert made["train"].single.tolist() == [False, True, False]
    assert made.report["splits"]["train"] | {"texts": 3, "pairs": 4} == made.report["splits"]["train"]


def test_synthetic_eyes_with_their_own_captions_and_splits(tmp_path: Path, prepare: Callable[..., Prepared]) -> None:
    drawn = tmp_path / "eyes"
    arguments = ["--patients", "4", "--size", "64", "--splits", "train=0.5,val=0.25,test=0.25", "--workers", "0"]
    assert main(["data", "synth", str(drawn), *arguments]) == 0
    made = prepare(drawn / "labels.csv", images=False)
    assert made.code == 0, made.said
    assert {split: len(made[split].patients) for split in ("train", "val", "test")} == {"train": 2, "val": 1, "test": 1}
    assert all("left eye" in text and "right eye" in text for [text] in made.texts().values())


def test_a_validation_split_is_cut_by_patient(prepare: Callable[..., Prepared]) -> None:
    made = prepare(eyes(*range(6)), "--val-share", "0.2", "--test-share", "0.3", "--eye-texts", "apart")
    parts = [set(made[split].groups) for split in ("train", "val", "test")]
    assert [len(part) for part in parts] == [3, 1, 2]
    assert len(set().union(*parts)) == 6
    again = prepare(eyes(*range(6))[::-1], "--val-share", "0.2", "--test-share", "0.3", out="other order")
    assert [set(again[split].groups) for split in ("train", "val", "test")] == parts
    other = prepare(eyes(*range(6)), "--val-share", "0.2", "--test-share", "0.3", "--seed", "1", out="other seed")
    assert [set(other[split].groups) for split in ("train", "val", "test")] != parts


def test_validating_on_test_is_possible_with_a_warning(
    tmp_path: Path, prepare: Callable[..., Prepared], photos: Path
) -> None:
    table(tmp_path / "test.csv", eyes(4))
    made = prepare(eyes(0, 1), "--test", str(tmp_path / "test.csv"), "--validate-on-test")
    assert (made.code, made.report["validation"]) == (0, "test")
    assert "scores are too good" in made.said
    assert made["val"].patients == made["test"].patients == ["P4"]
    assert "scores are too good" in made["val"].warnings[0]
    assert made["train"].patients == ["P0", "P1"]
    refused = prepare(eyes(0, 1), "--validate-on-test", "--test-share", "0", out="no test")
    assert (refused.code, "no test split to validate on" in refused.said) == (2, True)


def test_one_split_alone(tmp_path: Path, prepare: Callable[..., Prepared]) -> None:
    made = prepare([{**row, "split": "train"} for row in eyes(0, 1)], "--split", "test")
    assert (made.code, list(made.report["splits"])) == (0, ["test"])
    assert made["test"].patients == ["P0", "P1"]
    table(tmp_path / "test.csv", eyes(4))
    for flags in (["--test", str(tmp_path / "test.csv")], ["--validate-on-test"]):
        refused = prepare(eyes(0, 1), "--split", "test", *flags, out="refused")
        assert (refused.code, "all of one table is of this split" in refused.said) == (2, True)


def test_files_with_the_same_bytes_stay_together_or_are_warned_of(
    tmp_path: Path, prepare: Callable[..., Prepared], photos: Path
) -> None:
    copy = tmp_path / "copy.png"
    copy.write_bytes((photos / "P0_L.png").read_bytes())
    rows = [*eyes(0, 1), {"image": str(copy), "patient": "other", "eye": "L", "caption": "copy"}]
    for seed in "0123":
        made = prepare(rows, "--val-share", "0.4", "--test-share", "0", "--seed", seed, out=f"seed {seed}")
        assert made.code == 0, made.said
        assert {"P0", "other"} in [set(made[split].groups) & {"P0", "other"} for split in ("train", "val")]
    for row, split in zip(rows, ["train"] * 4 + ["test"], strict=True):
        row["split"] = split
    crossing = prepare(rows, "--val-share", "0", out="crossing")
    assert "in two splits under different patients" in crossing["test"].warnings[0]


# -- what is amiss -----------------------------------------------------------------------------------------------------


def test_everything_amiss_is_listed_and_refused_or_skipped(prepare: Callable[..., Prepared]) -> None:
    rows = [
        *eyes(0),
        {"image": "nowhere.png", "patient": "P7", "eye": "L", "caption": "text without an image"},
        {"image": "P3_L.png", "patient": "P3", "eye": "L", "caption": "  "},
        {"image": "", "patient": "P4", "eye": "L", "caption": "no image named"},
        {"image": "P5_L.png", "patient": "num_images", "eye": "L", "caption": "the database's own word"},
    ]
    refused = prepare(rows, *UNCUT)
    assert refused.code == 2
    for said in (
        "2 texts without their image:\n  t.csv row 4: no file nowhere.png\n  t.csv row 6: no image is named",
        "1 images without a text:\n  t.csv row 5",
        "1 patients without a usable name:\n  t.csv row 7: has a name that RET-CLIP's database keeps",
        "--skip-broken",
    ):
        assert said in refused.said
    assert not (refused.out / "lmdb").exists()
    skipped = prepare(rows, *UNCUT, "--skip-broken")
    assert (skipped.code, skipped["train"].patients) == (0, ["P0"])
    assert skipped.report["left_out"] == {"text_missing": 1, "image_missing": 2, "name": 1}
    listed = list(csv.DictReader((skipped.out / "problems.csv").open()))
    assert [(row["kind"], row["where"]) for row in listed][:2] == [
        ("text_missing", "t.csv row 5"),
        ("image_missing", "t.csv row 4"),
    ]


def test_broken_images_are_refused_at_the_end_with_all_else_kept(
    prepare: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"image": "broken.png", "patient": "P9", "eye": "L", "caption": "broken"}, *eyes(0, 1)]
    refused = prepare(rows, *UNCUT)
    assert refused.code == 2
    assert re.search(r"1 images that cannot be read:\n  t.csv row 2: .*broken\.png: not an image", refused.said)
    assert not (refused.out / "prepare.json").exists()
    # What could be read is not read again.
    monkeypatch.setattr("eyetune.data.fundus.prepare", lambda *_: pytest.fail("prepared again"))
    skipped = prepare(rows, *UNCUT, "--skip-broken")
    assert (skipped.code, skipped["train"].patients, skipped.report["left_out"]) == (0, ["P0", "P1"], {"broken": 1})
    assert not (skipped.out / NAME).exists()


def test_nothing_left_of_a_split(prepare: Callable[..., Prepared]) -> None:
    rows = [{"image": "broken.png", "patient": "P9", "eye": "L", "caption": "broken", "split": "test"}]
    rows += [row | {"split": "train"} for row in eyes(0)]
    found = prepare(rows, *UNCUT, "--skip-broken")
    assert (found.code, "nothing is left of test" in found.said) == (2, True)


def test_further_photographs_of_a_patient(prepare: Callable[..., Prepared]) -> None:
    rows = [*eyes(0), {"image": "P1_L.png", "patient": "P0", "eye": "L", "caption": "later"}, *eyes(0)[:1]]
    refused = prepare(rows, *UNCUT)
    assert (refused.code, "t.csv row 4: the same patient as t.csv row 2" in refused.said) == (2, True)
    first = prepare(rows, *UNCUT, "--repeats", "first", out="first")
    assert (first["train"].patients, first.report["left_out"]) == (["P0"], {"repeated": 1})
    each = prepare(rows, *UNCUT, "--repeats", "each", out="each")
    assert (each["train"].patients, each["train"].groups) == (["P0", "P0-2"], ["P0", "P0"])
    assert each["train"].single.tolist() == [False, True]


def test_one_photograph_with_several_texts_is_one_entry(prepare: Callable[..., Prepared]) -> None:
    rows = [{"image": "P0_L.png", "text": text} for text in ("one", "two", "one")]
    made = prepare(rows, *UNCUT)
    assert made.texts() == {"P0_L": ["one", "two"]}
    assert "every row counts as a patient" in made.said
    assert json.loads((made.out / "lmdb/train/pairs.json").read_text())["patients"]["P0_L"]["single"] == "unknown"


@pytest.mark.parametrize(
    ("rows", "flags", "said"),
    [
        ([{"image": "P0_L.png", "words": "x"}], (), "name it with --text-column"),
        ([{"image": "P0_L.png", "words": "x"}], ("--text-column", "worsd"), r"no column 'worsd'.*Did you mean 'words'"),
        ([{"photo": "P0_L.png", "text": "x"}], (), "name it with --image-column"),
        ([{"left": "P0_L.png", "text": "x"}], ("--left-column", "left"), "go together"),
        ([{"dataset_index": 3, "prompt": "x"}], (), "name that with --dataset"),
        ([{"image": "P0_L.png", "text": "x", "split": "somewhere"}], (), "not train, val or test"),
        ([{"image": "P0_L.png", "text": "x"}], (), "1 patient cannot be cut into train, test, val"),
        ([{"image": "none.png", "text": "x"}], (), "none of its 1 images was found"),
        ([row | {"split": s} for row, s in zip(eyes(0), ("train", "test"), strict=True)], (), "more than one split"),
    ],
)
def test_tables_that_cannot_be_read(
    prepare: Callable[..., Prepared], rows: list[dict[str, Any]], flags: tuple[str, ...], said: str
) -> None:
    found = prepare(rows, *flags)
    assert found.code == 2
    assert re.search(said, found.said, re.DOTALL), found.said
    assert not (found.out / NAME).exists()


# -- vocabularies ------------------------------------------------------------------------------------------------------


def test_a_vocabulary_of_another_language_stops_before_any_image_is_read(
    tmp_path: Path, prepare: Callable[..., Prepared]
) -> None:
    Tokenizer.from_texts(["眼底呈橘红色，色彩略暗淡"], 30).save(tmp_path / "chinese")
    Tokenizer.from_texts(["Left eye: eye 0L Right eye: eye 0R"], 60).save(tmp_path / "english")
    refused = prepare(eyes(0), *UNCUT, "--text-encoder", str(tmp_path / "chinese"))
    assert refused.code == 2
    assert "seems to be Chinese, the texts English" in refused.said
    assert not refused.out.exists()
    assert (
        prepare(eyes(0), *UNCUT, "--text-encoder", str(tmp_path / "chinese"), "--any-vocabulary", out="any").code == 0
    )
    good = prepare(eyes(0), *UNCUT, "--text-encoder", str(tmp_path / "english"), "--length", "5", out="good")
    assert good.code == 0, good.said
    coverage = good.report["coverage"]
    assert (coverage["unknown_share"], coverage["truncated_share"], coverage["length"]) == (0, 1, 5)
    assert "lose their end" in good["train"].warnings[0]
    missing = prepare(eyes(0), *UNCUT, "--text-encoder", str(tmp_path), out="missing")
    assert (missing.code, "has no vocabulary" in missing.said) == (2, True)


# -- RET-CLIP's own tables ---------------------------------------------------------------------------------------------


def older(
    folder: Path, lines: Sequence[str] | None = None, texts: Sequence[Any] | None = None, split: str = "train"
) -> Path:
    """A folder as the older script wrote it."""
    folder.mkdir(exist_ok=True)
    lines = lines if lines is not None else [f"{n}\t{encoded(2 * n)}\t{encoded(2 * n + 1)}" for n in range(3)]
    texts = texts if texts is not None else [{"text_id": n, "text": f"t {n}", "image_ids": [n]} for n in range(3)]
    (folder / f"{split}_imgs.tsv").write_text("".join(line + "\n" for line in lines))
    said = (text if isinstance(text, str) else json.dumps(text) for text in texts)
    (folder / f"{split}_texts.jsonl").write_text("".join(line + "\n" for line in said))
    return folder


def test_older_tables_become_databases_with_their_images_as_they_are(
    tmp_path: Path, prepare: Callable[..., Prepared]
) -> None:
    older(tmp_path / "old", split="test")
    url_safe = encoded(8).replace("+", "-").replace("/", "_")
    source = older(
        tmp_path / "old",
        [*(f"{n}\t{encoded(n)}\t{encoded(n)}" for n in range(2)), f"x\t{encoded(7)}\t{url_safe}"],
        [
            {"text_id": 0, "text": "both", "image_ids": ["0", 1]},
            {"text_id": "9", "text": "x", "image_ids": ["x"]},
        ],
    )
    code = main(["clip", "prepare", str(source), "--out", str(tmp_path / "new"), "--val-share", "0"])
    made = Prepared(code, tmp_path / "new", "")
    assert code == 0
    assert made.texts() == {"0": ["both"], "1": ["both"], "x": ["x"]}
    assert made["train"].eyes(2) == (jpeg(7), jpeg(8))
    assert made["train"].single.tolist() == [True, True, False]
    assert made["train"].photographs == {known_again(jpeg(number)) for number in (0, 1, 7, 8)}
    assert (made["test"].patients, made["test"].groups) == (["0", "1", "2"], ["test/0", "test/1", "2"])
    # (The first photograph of train's 0 and of test's 0 is the same.)
    assert "in two splits" in made["test"].warnings[0]
    # At another size they are prepared anew.
    small = prepare(source, "--val-share", "0", out="small", images=False)
    assert small["train"].photos(0)[0].shape == (32, 32, 3)
    assert small["train"].photographs == made["train"].photographs


def test_left_and_right_of_another_size_are_taken(tmp_path: Path, prepare: Callable[..., Prepared]) -> None:
    line = f"a\t{encode_base64(jpeg(1, 32))}\t{encode_base64(jpeg(2, 48))}"
    source = older(tmp_path / "old", [line], [{"text_id": 0, "text": "t", "image_ids": ["a"]}])
    assert main(["clip", "prepare", str(source), "--out", str(tmp_path / "new"), *UNCUT]) == 0
    left, right = PairSet.open(tmp_path / "new", "train").photos(0)
    assert (left.shape[0], right.shape[0]) == (32, 48)


EYES = f"a\t{encoded(1)}\t{encoded(2)}"
TEXT = {"text_id": 0, "text": "t", "image_ids": ["a"]}
OTHER = TEXT | {"text_id": 1, "image_ids": ["b"]}
SECOND = "\n  train_imgs.tsv line 2"


@pytest.mark.parametrize(
    ("lines", "texts", "said", "kept"),
    [
        ([EYES, f"b\t{encoded(3)}"], [TEXT], "train_imgs.tsv line 2: has two columns, so one image. It takes", ["a"]),
        ([EYES, f"b\t{encoded(3)[:-3]}!\t{encoded(3)}"], [TEXT, OTHER], f"{SECOND}, left: no base64", ["a"]),
        ([EYES, "b\tAAAA\tAAAA"], [TEXT, OTHER], f"{SECOND}, left: not an image", ["a"]),
        ([EYES, EYES], [TEXT], "line 2: the same patient as train_imgs.tsv line 1", None),
        ([EYES], [TEXT, "{nonsense"], "train_texts.jsonl line 2 is not JSON", None),
        ([EYES], [TEXT, {"text_id": 1, "text": "t"}], "line 2 lacks the field image_ids", None),
        ([EYES], [TEXT, [1]], "line 2 is not a JSON object", None),
        ([EYES], [TEXT | {"text": 5}], "text must be a string", None),
        ([EYES], [TEXT | {"image_ids": "a"}], "image_ids must be a list", None),
        ([EYES], [TEXT | {"text_id": True}], "text_id must be a whole number", None),
        ([EYES], [TEXT, TEXT], "text_id 0 was given to line 1 already", None),
        ([EYES], [TEXT | {"image_ids": ["a", "nobody"]}], "image_ids names a patient who has no images", ["a"]),
        ([EYES, f"b\t{encoded(3)}\t{encoded(4)}"], [TEXT], "1 images without a text", ["a"]),
        ([EYES], [TEXT, {"text_id": 1, "text": " ", "image_ids": ["a"]}], "line 2: the text is empty", ["a"]),
        (["\udcff"], [TEXT], "not UTF-8", None),
        ([], [TEXT], "image_ids names a patient", None),
    ],
)  # fmt: skip
def test_older_tables_that_are_damaged(
    tmp_path: Path,
    prepare: Callable[..., Prepared],
    lines: list[str],
    texts: list[Any],
    said: str,
    kept: list[str] | None,
) -> None:
    source = older(tmp_path / "old", ["x"], texts)
    (source / "train_imgs.tsv").write_bytes("".join(f"{line}\n" for line in lines).encode(errors="surrogateescape"))
    refused = prepare(source, *UNCUT, images=False)
    assert refused.code == 2
    assert said in refused.said
    if kept is not None:
        skipped = prepare(source, *UNCUT, "--skip-broken", images=False)
        assert (skipped.code, skipped["train"].patients) == (0, kept)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--test", "x.csv"), "leave out --test"),
        (("--dataset", "x"), "leave out --dataset"),
    ],
)
def test_a_folder_of_tables_takes_no_other_source(
    tmp_path: Path, prepare: Callable[..., Prepared], flags: tuple[str, ...], said: str
) -> None:
    (tmp_path / "x").mkdir()
    found = prepare(older(tmp_path / "old"), *flags, images=False)
    assert found.code == 2
    assert said in found.said or "hf:x" in found.said


def test_a_folder_without_tables(tmp_path: Path, prepare: Callable[..., Prepared]) -> None:
    (tmp_path / "empty").mkdir()
    assert "holds no train_imgs.tsv" in prepare(tmp_path / "empty", images=False).said
    assert "is the folder that is read" in prepare(older(tmp_path / "old"), out="old", images=False).said


# -- going on ----------------------------------------------------------------------------------------------------------


def everything(out: Path) -> dict[str, Any]:
    """All that was written: tables and notes by their bytes, databases by what is in them."""
    found: dict[str, Any] = {}
    for path in sorted(out.rglob("*")):
        if path.is_file() and path.name != "data.mdb":
            found[str(path.relative_to(out))] = path.read_bytes()
        elif path.name in ("imgs", "pairs"):
            found[str(path.relative_to(out))] = contents(path)
    return found


def killed_at(moment: int, command: list[str]) -> bool:
    """Run a command in a process that ends itself, as kill -9 does, at the moment-th change of the disk.

    Whether that moment came.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    moments = 0

    def count(half: Callable[[], object] = lambda: None) -> None:
        nonlocal moments
        moments += 1
        if moments == moment:
            half()
            os.kill(os.getpid(), signal.SIGKILL)

    replace, add = os.replace, Journal.add

    def replacing(source: Any, target: Any) -> None:
        count()
        replace(source, target)

    def adding(self: Journal, *words: str) -> None:
        count(lambda: (add(self, *words), os.truncate(self.path, self._end - 5)))
        add(self, *words)

    os.replace, Journal.add = replacing, adding  # type: ignore[method-assign]
    os.close(1), os.close(2)
    os.open(os.devnull, os.O_WRONLY), os.open(os.devnull, os.O_WRONLY)
    os._exit(main(command))


def test_killed_anywhere_it_goes_on_and_ends_the_same(tmp_path: Path, photos: Path) -> None:
    path = table(tmp_path / "t.csv", eyes(0, 1, 2))

    def command(out: str) -> list[str]:
        flags = ["--out", str(tmp_path / out), "--images", str(photos), "--val-share", "0.3", "--test-share", "0"]
        return ["clip", "prepare", str(path), *flags, *SMALL]

    assert main(command("whole")) == 0
    whole = everything(tmp_path / "whole")
    assert {"prepare.json", "train_imgs.tsv", "val_texts.jsonl", "lmdb/train/imgs", "lmdb/val/pairs"} <= whole.keys()
    moment = 2  # in the middle of writing the second photograph
    while killed_at(moment, command(f"killed {moment}")):
        assert main(command(f"killed {moment}")) == 0
        assert everything(tmp_path / f"killed {moment}") == whole, f"killed at moment {moment}"
        moment += 4 if moment == 2 else 1
    # Six photographs; of each split two tables, the notes and the databases; the report.
    assert moment == 6 + 2 * 4 + 1 + 1


def test_a_kill_costs_only_what_was_being_prepared(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = table(tmp_path / "t.csv", eyes(0, 1, 2))
    command = ["clip", "prepare", str(path), "--out", str(tmp_path / "out"), "--images", str(photos), *UNCUT, *SMALL]
    assert killed_at(5, command)
    prepared: list[Any] = []
    import eyetune.data.fundus as room

    real = room.prepare
    monkeypatch.setattr(room, "prepare", lambda *inputs: prepared.append(1) or real(*inputs))
    assert main(command) == 0
    assert len(prepared) == 2  # four of six were whole


def test_interrupted_it_says_what_is_kept(prepare: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch) -> None:
    real = Journal.add

    def add(self: Journal, *words: str) -> None:
        if len(self) == 2:
            raise Interrupted("", signal.SIGTERM)
        real(self, *words)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", add)
        stopped = prepare(eyes(0, 1), *UNCUT)
    assert stopped.code == 143
    assert re.search(r"2 photographs are prepared in .*out; the same command goes on there", stopped.said)
    assert prepare(eyes(0, 1), *UNCUT)["train"].patients == ["P0", "P1"]


def test_prepared_again_is_nothing_to_do_and_otherwise_another_folder(prepare: Callable[..., Prepared]) -> None:
    first = prepare(eyes(0), *UNCUT)
    again = prepare(eyes(0), *UNCUT)
    assert (again.code, "prepared already" in again.said) == (0, True)
    other = prepare(eyes(1), *UNCUT)
    assert (other.code, "holds another preparation" in other.said) == (2, True)
    # A database that was damaged since is made anew.
    (first.out / "lmdb/train/imgs/data.mdb").write_bytes(b"")
    assert prepare(eyes(0), *UNCUT).code == 0
    assert prepare(eyes(0), *UNCUT)["train"].patients == ["P0"]
    (first.out / "prepare.json").unlink()
    foreign = prepare(eyes(0), *UNCUT)
    assert (foreign.code, "which nobody finished here" in foreign.said) == (2, True)


def test_two_at_a_time_in_one_folder(tmp_path: Path) -> None:
    with Journal.open(tmp_path), pytest.raises(RunError, match="by another process"), Journal.open(tmp_path):
        pass


def test_a_journal_keeps_what_is_whole(tmp_path: Path) -> None:
    with Journal.open(tmp_path) as journal:
        for number in range(3):
            journal.add(f"key{number}", "x" * number, f"photograph{number}")
    whole = (tmp_path / NAME).read_bytes()
    for cut in range(len(whole)):
        (tmp_path / NAME).write_bytes(whole[:cut] + b"\0" * 7)
        with Journal.open(tmp_path) as journal:
            assert len(journal) == whole[:cut].count(b"\n")
            for number in range(len(journal)):
                assert journal.get(f"key{number}") == "x" * number
                assert journal.photograph(f"key{number}") == f"photograph{number}"


# -- datasets ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("hf")
    features = datasets.Features({"image": datasets.Image(), "code": datasets.Value("int64")})

    def part(first: int, count: int) -> Any:
        images = [{"bytes": jpeg(n), "path": f"{n}.jpg"} for n in range(first, first + count)]
        images[-1]["bytes"] = b"broken" if first else images[-1]["bytes"]
        return datasets.Dataset.from_dict({"image": images, "code": list(range(count))}, features=features)

    datasets.DatasetDict({"train": part(0, 5), "test": part(10, 3)}).save_to_disk(str(folder / "saved"))
    (folder / "parquet").mkdir()
    part(0, 5).to_parquet(str(folder / "parquet" / "train.parquet"))
    return folder


PROMPTS = [{"dataset_index": n, "label": "AMD", "prompt": f"p {n}"} for n in (3, 0, 3, 1)]


def test_indexes_into_a_dataset(tmp_path: Path, dataset: Path, prepare: Callable[..., Prepared]) -> None:
    tests = table(tmp_path / "test.csv", [{"dataset_index": 0, "label": "AMD", "prompt": "p"}])
    made = prepare(PROMPTS, "--test", str(tests), "--dataset", str(dataset / "saved"), "--val-share", "0", images=False)
    assert made.code == 0, made.said
    assert made.texts() == {"0": ["p 0"], "1": ["p 1"], "3": ["p 3"]}
    assert (made["train"].groups, made["test"].groups) == (["train/0", "train/1", "train/3"], ["test/0"])
    assert made["train"].labels == ["AMD"] * 3
    assert made["train"].single.all()
    source = decode_image(jpeg(10), "the dataset's own")
    assert abs(made["test"].photos(0)[0].astype(int).mean() - source.mean()) < 25


def test_a_dataset_that_is_streamed_gives_the_same(dataset: Path, prepare: Callable[..., Prepared]) -> None:
    streamed = prepare(PROMPTS, "--dataset", str(dataset / "parquet"), *UNCUT, images=False)
    assert streamed.code == 0, streamed.said
    saved = prepare(PROMPTS, "--dataset", str(dataset / "saved"), *UNCUT, out="saved", images=False)
    assert streamed["train"].eyes(2) == saved["train"].eyes(2)
    assert streamed["train"].photographs == saved["train"].photographs == {known_again(jpeg(n)) for n in (0, 1, 3)}
    # Where the number of rows is not known before the end, a wrong index is found there.
    beyond = [*PROMPTS, {"dataset_index": 77, "prompt": "p"}]
    refused = prepare(beyond, "--dataset", str(dataset / "parquet"), *UNCUT, out="beyond", images=False)
    assert (refused.code, "1 indexes that the dataset does not have:\n  t.csv row 6" in refused.said) == (2, True)


def test_indexes_outside_and_broken_images_of_a_dataset(dataset: Path, prepare: Callable[..., Prepared]) -> None:
    rows = [*PROMPTS, *({"dataset_index": index, "prompt": "p"} for index in (5, -1, "x", ""))]
    refused = prepare(rows, "--dataset", str(dataset / "saved"), *UNCUT, images=False)
    assert refused.code == 2
    assert "4 indexes that the dataset does not have:\n  t.csv row 6: index 5, but train has 5 images" in refused.said
    rows = [{"dataset_index": index, "prompt": "p"} for index in (0, 2)]
    flags = ("--dataset", str(dataset / "saved"), "--dataset-split", "test", *UNCUT)
    refused = prepare(rows, *flags, out="broken", images=False)
    assert (refused.code, "test row 2: not an image" in refused.said) == (2, True)
    skipped = prepare(rows, *flags, "--skip-broken", out="broken", images=False)
    assert skipped["train"].patients == ["0"]


def test_datasets_that_are_not_there_or_leave_it_open(
    tmp_path: Path, dataset: Path, prepare: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert (
        "has no split 'trian'"
        in prepare(PROMPTS, "--dataset", str(dataset / "saved"), "--dataset-split", "trian", images=False).said
    )
    assert (
        "no column 'photo'"
        in prepare(PROMPTS, "--dataset", str(dataset / "saved"), "--image-column", "photo", images=False).said
    )
    (tmp_path / "empty").mkdir()
    assert prepare(PROMPTS, "--dataset", str(tmp_path / "empty"), images=False).code == 2
    with pytest.raises(DataError, match="say with --dataset-split"):
        PhotoDataset(str(dataset / "saved")).split_for("val")


class Answer(Exception):
    """An error as the HTTP libraries raise them."""

    def __init__(self, status: int, after: str = "") -> None:
        self.response = type("Response", (), {"status_code": status, "headers": {"Retry-After": after}})()


def test_a_stream_that_breaks_off_goes_on_where_it_was() -> None:
    errors: Iterator[Exception | None] = iter([Answer(429, "7"), ConnectionResetError(), Answer(503), None])
    waits: list[float | None] = []

    def open_at(start: int) -> Iterator[int]:
        yield from range(start, start + 2)
        if (error := next(errors)) is not None:
            raise RuntimeError from error
        yield from range(start + 2, 9)

    assert list(patiently(open_at, lambda _, seconds: waits.append(seconds))) == list(range(9))
    assert waits == [7.0, 1.0, 1.0]


@pytest.mark.parametrize(("error", "attempts"), [(Answer(429), 9), (Answer(404), 1), (ValueError(), 1)])
def test_there_is_an_end_to_patience(error: Exception, attempts: int) -> None:
    calls = 0

    def wait(raised: Exception, seconds: float | None) -> None:
        nonlocal calls
        calls += 1
        if seconds is None:
            raise raised

    def open_at(start: int) -> Iterator[int]:
        raise error
        yield

    with pytest.raises(type(error)):
        list(patiently(open_at, wait))
    assert calls == attempts


def test_plain_files_on_the_hub_are_fetched_one_by_one(monkeypatch: pytest.MonkeyPatch, dataset: Path) -> None:
    answers: list[bytes | Exception] = [Answer(429), b"the file"]
    waits: list[float] = []

    def fetch(address: str, mode: str) -> io.BytesIO:
        assert (address, mode) == ("hf://datasets/a/b@main/1.jpg", "rb")
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return io.BytesIO(answer)

    monkeypatch.setattr("fsspec.open", fetch)
    monkeypatch.setattr("time.sleep", waits.append)
    opened = PhotoDataset(str(dataset / "saved"))
    assert opened.content({"bytes": None, "path": "hf://datasets/a/b@main/1.jpg"}, "row 1") == b"the file"
    assert waits == [1.0]
    with pytest.raises(DataError, match="row 2: neither the image itself nor a file"):
        opened.content({"bytes": None, "path": "nowhere.jpg"}, "row 2")


def test_base64_of_both_alphabets() -> None:
    assert decode_base64("-_8=") == decode_base64("+/8=") == b"\xfb\xff"
    assert [decode_base64(text) for text in ("", "!", "AAA", "é", "A A=")] == [None] * 5
