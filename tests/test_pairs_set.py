"""Image-text pairs on disk: the layout of RET-CLIP, read without running or mapping anything."""

from __future__ import annotations

import json
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pairs_kit import contents, encoded, images, jpeg, published, text

from eyetune.data.pairs import PairSet
from eyetune.data.pairs.database import Database
from eyetune.data.pairs.texts import Images
from eyetune.data.pairs.values import Refused, pack, unpack
from eyetune.data.pairs.write import write_split
from eyetune.errors import DataError, MissingExtra

TEXTS = [text(0, "No lesions.", "b", "a", label="0"), text(1, "眼底呈橘红色", "a", label="1")]


@pytest.fixture
def made(tmp_path: Path) -> Path:
    eye = encoded(9)
    write_split(tmp_path, "train", [*images("b", "a"), Images("one", eye, eye)], TEXTS, None)
    return tmp_path


# -- values ------------------------------------------------------------------------------------------------------------

# (A busy machine draws slowly; that is no fault of what is tested.)
QUICK = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
FLAT = st.one_of(st.text(), st.integers(-(2**80), 2**80))


@QUICK
@given(st.tuples() | st.lists(FLAT | st.tuples(FLAT, FLAT), max_size=5).map(tuple) | FLAT, st.integers(2, 5))
def test_values_are_what_pickle_reads(value: Any, protocol: int) -> None:
    assert unpack(pickle.dumps(value, protocol=protocol)) == value
    assert pickle.loads(pack(value)) == value


def test_a_value_that_stands_twice_is_written_once() -> None:
    eye = "x" * 10_000
    assert len(pack((eye, eye))) < 10_100
    assert unpack(pack((eye, eye))) == (eye, eye)


class Harm:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("/tmp/never"),)


@pytest.mark.parametrize(
    "value", [Harm(), [1], {"a": 1}, b"bytes", 1.5, None, True, ("a", [1]), {1}, print], ids=lambda v: type(v).__name__
)
@pytest.mark.parametrize("protocol", range(2, 6))
def test_any_other_object_is_refused(value: Any, protocol: int) -> None:
    with pytest.raises(Refused, match="something else than tuples, strings and whole numbers"):
        unpack(pickle.dumps(value, protocol=protocol))


@QUICK
@given(st.binary(max_size=60), st.integers(0, 200))
def test_damaged_values_are_refused_and_nothing_else(junk: bytes, cut: int) -> None:
    whole = pack(("left" * 5, "right"))
    for data in (junk, b"\x80\x04" + junk, whole[: min(cut, len(whole) - 1)], whole[:cut] + junk):
        try:
            unpack(data)
        except Refused:
            continue


# -- the database ------------------------------------------------------------------------------------------------------


def test_every_entry_is_read_as_the_library_reads_it(tmp_path: Path) -> None:
    rng = random.Random(0)
    entries = {
        str(number).encode(): rng.randbytes(rng.choice([0, 3, 500, 2000, 3000, 30_000] if number % 10 == 0 else [40]))
        for number in range(3000)
    }
    environment = lmdb.open(str(tmp_path), map_size=2**28)
    for _ in range(2):  # a second time, so that freed pages lie between
        with environment.begin(write=True) as transaction:
            for key, value in entries.items():
                transaction.put(key, value)
    environment.close()
    database = pickle.loads(pickle.dumps(Database(tmp_path)))
    items = list(database.items())
    assert [item.key for item in items] == sorted(entries)
    assert all(database.value(item) == entries[item.key] for item in items)
    assert all(database.get(key) == value for key, value in entries.items())
    assert database.get(b"") is database.get(b"none") is database.get(b"zz") is None


def test_an_empty_database(tmp_path: Path) -> None:
    lmdb.open(str(tmp_path), map_size=2**20).close()
    database = Database(tmp_path)
    assert (list(database.items()), database.get(b"a")) == ([], None)


def test_a_database_cut_anywhere_is_said_to_be(made: Path) -> None:
    file = made / "lmdb/train/imgs/data.mdb"
    whole = file.read_bytes()
    for size in [*range(0, 20_000, 611), *range(4096, len(whole), 4096)]:
        file.write_bytes(whole[: min(size, len(whole) - 4096)])
        with pytest.raises(DataError, match=r"cut short|damaged|not an LMDB"):
            PairSet.open(made, "train")


def test_a_database_with_damaged_bytes_is_an_error_or_reads(made: Path) -> None:
    rng = random.Random(1)
    for name in ("imgs", "pairs"):
        file = made / "lmdb/train" / name / "data.mdb"
        whole = file.read_bytes()
        for _ in range(60):
            broken = bytearray(whole)
            for _ in range(rng.choice([1, 3, 30])):
                broken[rng.randrange(min(len(whole), 5 * 4096))] = rng.randrange(256)
            file.write_bytes(broken)
            try:
                opened = PairSet.open(made, "train")
                for place in range(len(opened.patients)):
                    opened.eyes(place)
            except DataError:
                continue
        file.write_bytes(whole)


# -- the set -----------------------------------------------------------------------------------------------------------


def test_what_was_written_is_read(made: Path) -> None:
    read = PairSet.open(made, "train")
    assert read.patients == ["a", "b", "one"]  # LMDB's order
    assert (read.texts, read.text_ids, read.links) == (
        ["No lesions.", "眼底呈橘红色"],
        [0, 1],
        [(1, 0), (0, 0), (0, 1)],
    )
    assert read.eyes(0) == (jpeg(2), jpeg(3))
    assert read.single.tolist() == [False, False, True]
    assert (read.labels, read.groups, len(read)) == ([None, None], read.patients, 3)
    left, right = read.photos(1)
    assert left.shape == right.shape == (32, 32, 3)
    assert not np.array_equal(left, right)
    again = pickle.loads(pickle.dumps(read))
    assert (again.eyes(2), again.fingerprint) == (read.eyes(2), read.fingerprint)


def test_the_layout_is_that_of_ret_clip(made: Path) -> None:
    """The keys, and what its loader does with them (RET_CLIP/training/data.py)."""
    pairs, eyes = contents(made / "lmdb/train/pairs"), contents(made / "lmdb/train/imgs")
    assert pairs == {
        b"0": ("b", 0, "No lesions."),
        b"1": ("a", 0, "No lesions."),
        b"2": ("a", 1, "眼底呈橘红色"),
        b"num_samples": b"3",
    }
    assert eyes == {row.patient.encode(): (row.left, row.right) for row in images("b", "a")} | {
        b"one": (encoded(9), encoded(9)), b"num_images": b"3",
    }  # fmt: skip
    assert (made / "train_imgs.tsv").read_text() == "".join(
        f"{row.patient}\t{row.left}\t{row.right}\n"
        for row in [*images("b", "a"), Images("one", encoded(9), encoded(9))]
    )
    assert [json.loads(line) for line in (made / "train_texts.jsonl").read_text().splitlines()] == [
        {"text_id": 0, "text": "No lesions.", "image_ids": ["b", "a"], "label": "0"},
        {"text_id": 1, "text": "眼底呈橘红色", "image_ids": ["a"], "label": "1"},
    ]


def test_databases_of_the_published_converter_are_read(tmp_path: Path) -> None:
    published(tmp_path / "train/imgs", {"17": (encoded(1), encoded(2)), "x": (encoded(3), encoded(3))}, "num_images")
    published(tmp_path / "train/pairs", {"0": (17, 5, "one"), "1": ("x", "7", "two")}, "num_samples")
    read = PairSet.open(tmp_path, "train")
    assert (read.patients, read.texts, read.text_ids, read.links) == (
        ["17", "x"],
        ["one", "two"],
        [5, 7],
        [(0, 0), (1, 1)],
    )
    assert read.single.tolist() == [False, True]


def test_the_fingerprint_knows_texts_links_and_patients(tmp_path: Path) -> None:
    prints = set()
    for number, (texts, rows) in enumerate(
        [
            (TEXTS, images("b", "a")),
            ([TEXTS[0], text(1, "other", "a")], images("b", "a")),
            ([TEXTS[0], text(1, "眼底呈橘红色", "b")], images("b", "a")),
            (TEXTS, images("b", "a", "c")),
        ]
    ):
        write_split(tmp_path / str(number), "train", rows, texts)
        prints.add(PairSet.open(tmp_path / str(number), "train").fingerprint)
    assert len(prints) == 4


@pytest.mark.parametrize(
    ("name", "entries", "count", "said"),
    [
        ("pairs", {"0": ("a", 0, "t"), "1": Harm()}, 2, "something else than tuples"),
        ("pairs", {"0": ["a", 0, "t"]}, 1, "something else than tuples"),
        ("pairs", {"0": ("a", 0)}, 1, "is not .patient, number"),
        ("pairs", {"0": ("a", "one", "t")}, 1, "is not .patient, number"),
        ("pairs", {"0": ("nobody", 0, "t")}, 1, "names a patient without images"),
        ("pairs", {"0": ("a", 0, "t"), "1": ("a", 0, "u")}, 2, "another text than before"),
        ("pairs", {"0": ("a", 0, "t")}, 2, "not finished"),
        ("pairs", {"7": ("a", 0, "t")}, 1, "not finished"),
        ("imgs", {"a": Harm()}, 1, "something else than tuples"),
        ("imgs", {"a": "text"}, 1, "no pair of images"),
        ("imgs", {"a": ("AAAA", "!")}, 1, "right image is no base64"),
        ("imgs", {"a": (encoded(), encoded())}, 3, "not finished"),
        ("imgs", {"a": ("AAAA", "AAAA")}, 1, "not an image"),
    ],
)
def test_what_is_wrong_inside_is_said(tmp_path: Path, name: str, entries: Any, count: int, said: str) -> None:
    write_split(tmp_path, "train", images("a"), [text(0, "t", "a")])
    shutil.rmtree(tmp_path / "lmdb/train" / name)
    published(tmp_path / "lmdb/train" / name, entries, {"pairs": "num_samples", "imgs": "num_images"}[name], count)
    with pytest.raises(DataError, match=said):
        PairSet.open(tmp_path, "train").photos(0)
    assert not Path("/tmp/never").exists()


@pytest.mark.parametrize(
    "notes", [{"photographs": "0123"}, {"photographs": [5]}, {"labels": []}, {"patients": {"a": {"group": 5}}}]
)
def test_notes_that_do_not_say_what_they_should(tmp_path: Path, notes: Any) -> None:
    write_split(tmp_path, "train", images("a"), [text(0, "t", "a")], notes)
    with pytest.raises(DataError, match=r"pairs\.json does not say what it should"):
        PairSet.open(tmp_path, "train")


def test_a_split_that_is_not_there(made: Path) -> None:
    with pytest.raises(DataError, match=r"no tarin pairs .* It has train\. Did you mean 'train'\?"):
        PairSet.open(made, "tarin")
    with pytest.raises(DataError, match="eyetune clip prepare"):
        PairSet.open(made / "nowhere", "train")


def test_validating_on_test_opens_test_and_warns(made: Path) -> None:
    (made / "lmdb/train").rename(made / "lmdb/test")
    (made / "prepare.json").write_text(json.dumps({"validation": "test", "warnings": ["chosen on test"]}))
    read = PairSet.open(made, "val")
    assert (read.split, read.warnings) == ("test", ("chosen on test",))


def test_without_lmdb_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lmdb", None)
    with pytest.raises(MissingExtra, match=r"eyetune\[clip\]"):
        write_split(tmp_path, "train", images("a"), TEXTS)
