"""Retrieval, search and their files, with a model that knows colours: what must be found is known."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from clip_kit import PIXELS, colour_pairs, colour_run, eye

from eyetune.cli import main
from eyetune.clip import run as runs
from eyetune.clip.features import Features, compute, embed_eyes, reuse
from eyetune.clip.gallery import search
from eyetune.data.pairs import PairSet
from eyetune.errors import DataError, RunError
from eyetune.verbs.clip_retrieve import NO_CLASS


@pytest.fixture
def pairs(tmp_path: Path) -> PairSet:
    return PairSet.open(colour_pairs(tmp_path / "pairs"), "test")


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The run that every verb opens."""
    found = colour_run(tmp_path / "run")
    monkeypatch.setattr(runs, "open_clip_run", lambda path, **_: replace(found, path=Path(path)))
    return found


def test_features_are_kept_and_come_back(pairs: PairSet, tmp_path: Path) -> None:
    run, file = colour_run(tmp_path / "run"), tmp_path / "sub" / "f.safetensors"
    made, there = reuse(file, run, pairs, batch_size=2)
    assert not there
    assert run.model.seen == 9, "five patients, one of them with one eye, which is looked at once"
    read, there = reuse(file, run, pairs)
    assert there
    assert run.model.seen == 9
    assert read.about == made.about
    assert read.links == made.links == pairs.links
    for name, values in made.vectors.items():
        assert torch.equal(values, read.vectors[name])
        assert values.norm(dim=1).tolist() == pytest.approx([1] * 5)
    assert read.single.tolist() == [False] * 4 + [True]


def test_order_and_batches_change_nothing(pairs: PairSet, tmp_path: Path) -> None:
    run = colour_run(tmp_path / "run")
    whole = compute(run, pairs, batch_size=32, workers=0)
    small = compute(run, pairs, batch_size=1, workers=3)
    assert all(torch.equal(values, small.vectors[name]) for name, values in whole.vectors.items())
    # Each text has the features of its own words, whatever the order in which texts were read.
    assert whole.vectors["text"].argmax(dim=1).tolist() == [0, 1, 2, whole.vectors["text"][3].argmax(), 0]


def test_features_of_another_model_or_data_are_refused(pairs: PairSet, tmp_path: Path) -> None:
    run, file = colour_run(tmp_path / "run"), tmp_path / "f.safetensors"
    reuse(file, run, pairs)
    with pytest.raises(RunError, match="holds features of another model"):
        reuse(file, replace(run, fingerprint="other"), pairs)
    file.write_bytes(file.read_bytes()[:-5])
    assert not reuse(file, run, pairs, anew=True)[1]
    others = PairSet.open(colour_pairs(tmp_path / "others", ("blue", "red")), "test")
    with pytest.raises(DataError, match="holds features of other pairs"):
        reuse(file, run, others)


def damage_header(data: bytes) -> bytes:
    return data.replace(b"patient_labels", b"patient_labelz")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[: len(data) // 2], "damaged or cut short"),
        (lambda data: data[:3], "damaged or cut short"),
        (lambda data: b"", "damaged or cut short"),
        (damage_header, "its header cannot be read"),
        (lambda data: data.replace(b'"single"', b'"singel"'), "not one a patient and text"),
        (lambda data: data.replace(b"version 1", b"version 9"), "holds no features of photographs and texts"),
    ],
    ids=["half", "three bytes", "empty", "header", "names", "version"],
)
def test_damaged_features_are_refused(pairs: PairSet, tmp_path: Path, damage: Any, message: str) -> None:
    file = tmp_path / "f.safetensors"
    reuse(file, colour_run(tmp_path / "run"), pairs)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DataError, match=message):
        Features.load(file)


def test_search_finds_the_like(pairs: PairSet, tmp_path: Path) -> None:
    run = colour_run(tmp_path / "run")
    gallery = compute(run, pairs)
    hits = search(gallery, gallery.vectors["text"][2], 5)
    assert hits[0].patient == "p2"
    assert [hit.similarity for hit in hits] == sorted((hit.similarity for hit in hits), reverse=True)
    assert {hit.patient for hit in search(gallery, gallery.vectors["text"][0], 2)} == {"p0", "p4"}
    assert [hit.patient for hit in search(gallery, gallery.vectors["text"][0], 1, what="blue")] == ["p2"]
    with pytest.raises(DataError, match="the gallery has 5 patients"):
        search(gallery, gallery.vectors["text"][0], 6)
    with pytest.raises(DataError, match="There are: blue, green, red, white"):
        search(gallery, gallery.vectors["text"][0], 1, what="pink")


def test_one_eye_stands_for_both(tmp_path: Path) -> None:
    run = colour_run(tmp_path / "run")
    path, other = tmp_path / "a.png", tmp_path / "b.png"
    eye("red").save(path)
    eye("blue").save(other)
    alone = embed_eyes(run, 1, lambda _: (path, None), names=["a"])
    twice = embed_eyes(run, 1, lambda _: (path, path), names=["a"])
    assert all(torch.allclose(alone[name], twice[name]) for name in alone)
    both = embed_eyes(run, 1, lambda _: (path, other), names=["a"])
    assert not torch.allclose(both["image"], alone["image"])
    with pytest.raises(DataError, match="missing"):
        embed_eyes(run, 1, lambda _: (tmp_path / "missing.png", None), names=["a"])


# -- the verbs ---------------------------------------------------------------------------------------------------------


def test_retrieve_writes_measures_page_and_features(
    opened: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = colour_pairs(tmp_path / "pairs")
    words = ["clip", "retrieve", str(opened.path), "--data", str(folder), "--resamples", "50"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "by chance" in shown
    place = opened.path / "retrieval" / "pairs-test"
    content = json.loads((place / "retrieval.json").read_text())
    for direction in ("image_to_text", "text_to_image"):
        assert content[direction]["metrics"]["recall_at_1"]["value"] == 1
        assert content[direction]["gallery"] == 5
    # Two of five say "red": of five queries two have two right answers.
    assert content["image_to_text"]["metrics"]["recall_at_1"]["chance"] == pytest.approx((3 + 2 * 2) / 5 / 5)
    assert content["different_texts"] == 4
    assert content["one_eye"] == 1
    assert content["warnings"] == []
    assert set(content["image_to_text"]["per_class"]) == {"red", "green", "blue", "white"}
    assert content["image_to_text"]["without_class"] == content["text_to_image"]["without_class"] == 0
    assert NO_CLASS not in shown
    page = (place / "retrieval.html").read_text()
    assert "Research use only" in page
    assert page.count("<img") >= 9
    assert "the fundus is blue" in page
    seen = opened.model.seen
    assert main([*words, "--features", str(place / "features.safetensors"), "--by", "left"]) == 0
    assert "features read from" in capsys.readouterr().out
    assert opened.model.seen == seen


def test_queries_of_no_class_are_counted(opened: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One text has no label, and so has its patient."""
    folder = colour_pairs(tmp_path / "pairs")
    notes = folder / "lmdb/test/pairs.json"
    said = json.loads(notes.read_text())
    del said["labels"]["2"]
    notes.write_text(json.dumps(said))
    assert main(["clip", "retrieve", str(opened.path), "--data", str(folder), "--resamples", "0"]) == 0
    shown = capsys.readouterr().out
    assert re.search(rf"{NO_CLASS} +1\b", shown)
    place = opened.path / "retrieval" / "pairs-test"
    assert json.loads((place / "retrieval.json").read_text())["image_to_text"]["without_class"] == 1
    assert "1 of the 5 queries are in no class" in (place / "retrieval.html").read_text()


def test_texts_that_the_model_cannot_read_are_a_warning(
    opened: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    short = replace(opened, length=4)
    monkeypatch.setattr(runs, "open_clip_run", lambda path, **_: short)
    folder = colour_pairs(tmp_path / "pairs", ("red", "blue"))
    assert main(["clip", "retrieve", str(opened.path), "--data", str(folder), "--resamples", "0"]) == 0
    assert "100% of the texts are longer than the 4 tokens" in capsys.readouterr().out
    assert "their end was not seen" in (opened.path / "retrieval" / "pairs-test" / "retrieval.html").read_text()
    content = json.loads((opened.path / "retrieval" / "pairs-test" / "retrieval.json").read_text())
    # Cut to "the fundus" both texts are the same to the model: what ties is found half of the time.
    assert content["image_to_text"]["metrics"]["recall_at_1"]["value"] == 0.5


@pytest.fixture
def kept(opened: Any, tmp_path: Path) -> Path:
    file = tmp_path / "f.safetensors"
    compute(opened, PairSet.open(colour_pairs(tmp_path / "pairs"), "test")).save(file)
    return file


def test_search_by_words_and_by_photograph(
    kept: Path, opened: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, photo = tmp_path / "page.html", tmp_path / "a.png"
    assert main(["clip", "search", "a green eye", "--in", str(kept), "--top", "3", "--out", str(page)]) == 0
    assert capsys.readouterr().out.index("p1") < 200, "the first of the three"
    assert page.read_text().count("<img") == 5, "one of the three has one eye"
    eye("blue").resize((PIXELS * 3, PIXELS * 3)).save(photo)
    words = ["clip", "search", "--image", str(photo), "--in", str(kept), "--top", "2", "--json", "--out", str(page)]
    assert main(words) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0]["patient"] == "p2"
    assert lines[0]["text"] == "the fundus is blue"
    assert page.read_text().count("<img") == 5  # the one asked with, and two eyes each


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "say what to look for"),
        (["a red eye", "--image", "a.png"], "say what to look for"),
        (["a red eye", "--fellow", "b.png"], "--fellow is the right eye beside --image"),
        ([""], "the query: the text is empty"),
        ([" "], "the query: the text is empty"),
        (["red red red red red red red red red"], "longer than the 8 tokens"),
        (["ein rotes Auge"], "unknown to it"),
        (["a red eye", "--top", "6"], "the gallery has 5 patients"),
        (["a red eye", "--label", "pink"], "no patient of the gallery has it"),
        (["--image", "missing.png"], "missing.png"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_searched_is_one_message(
    kept: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["clip", "search", *words, "--in", str(kept)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said


def test_a_gallery_of_another_model_or_none(
    kept: Path, opened: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runs, "open_clip_run", lambda path, **_: replace(opened, fingerprint="other"))
    assert main(["clip", "search", "a red eye", "--in", str(kept)]) == 2
    assert "features of another model" in capsys.readouterr().err
    opened.path.rmdir()
    assert main(["clip", "search", "a red eye", "--in", str(kept)]) == 2
    assert "say where it is with --run" in capsys.readouterr().err
    assert main(["clip", "search", "a red eye", "--in", str(tmp_path / "none")]) == 2
    assert "no features at" in capsys.readouterr().err
    assert main(["clip", "retrieve", str(opened.path), "--data", f"{tmp_path / 'pairs'}:val"]) == 2
    assert "has no val pairs" in capsys.readouterr().err


def test_a_page_without_its_photographs_says_so(kept: Path, opened: Any, tmp_path: Path) -> None:
    (tmp_path / "pairs").rename(tmp_path / "elsewhere")
    page = tmp_path / "page.html"
    assert main(["clip", "search", "a green eye", "--in", str(kept), "--top", "3", "--out", str(page)]) == 0
    assert "no longer where they were" in page.read_text()
    assert "<img" not in page.read_text()
