"""Label maps: what other people's labels mean, never guessed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import data_kit
import numpy as np
import pytest

from eyetune.data.records import Manifest
from eyetune.errors import ConfigError, DataError
from eyetune.metrics.labelmap import LabelMap, merging, parse, remarks, unstated
from eyetune.metrics.predictions import Predictions

GRADES = ("0", "1", "2", "3", "4")


def manifest(*labels: str | None) -> Manifest:
    """A dataset with these labels, as they stand."""
    names = tuple(sorted({label for label in labels if label is not None}))
    records = data_kit.records([None if label is None else names.index(label) for label in labels])
    return Manifest(tuple(records), names, "other.csv")


def meanings(found: LabelMap, data: Manifest) -> list[str | None]:
    return [None if one.label is None else found.classes[one.label] for one in found.apply(data)]


@pytest.mark.parametrize(
    ("word", "labels", "expected", "classes"),
    [
        ("a:2,b:4", "aba", ["2", "4", "2"], GRADES),
        ("a: 2 , b:null", "ab", ["2"], GRADES),
        ("as-is", "03", ["0", "3"], GRADES),
        ("referable", "0124", ["not referable", "not referable", "referable", "referable"], None),
        ("any-dr", "014", ["no DR", "any DR", "any DR"], None),
        ("referable,n:not referable,y:referable,u:null", "nyu", ["not referable", "referable"], None),
        ("any-dr,n:0,y:3", "ny", ["no DR", "any DR"], None),
        ({"n": 0, "y": 1, "u": None}, "nyu", ["0", "1"], GRADES),
        ({"ours": "any-dr", "theirs": {"h": "no DR", "d": "any DR"}}, "hd", ["no DR", "any DR"], None),
        ({"ours": dict(zip(GRADES, "aabbb", strict=True))}, "0124", ["a", "a", "b", "b"], ("a", "b")),
    ],
)
def test_what_a_map_says(word: Any, labels: str, expected: list[str], classes: tuple[str, ...] | None) -> None:
    found = parse(word, GRADES)
    assert meanings(found, manifest(*labels)) == expected
    if classes is not None:
        assert found.classes == classes
    assert found.stated


def test_a_file_keeps_its_words(tmp_path: Path) -> None:
    """YAML would read no, on and 01 as false, true and 1."""
    file = tmp_path / "map.yaml"
    file.write_text("no: healthy\non: glaucoma\n01: healthy\n1.0: null\n")
    assert parse(str(file), ("healthy", "glaucoma")).theirs == {
        **{"no": "healthy", "on": "glaucoma", "01": "healthy"},
        "1.0": None,
    }


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("referabel", "Did you mean 'referable'"),
        ("a", "is no map"),
        ("a:2,b", "'b' is not theirs:ours"),
        ("a:2,a:3", "stands there twice"),
        ("a:7", r"no class of the run; there are 0, 1(?s:.)*a: 7"),
        ("nowhere.yaml", "no file at nowhere.yaml"),
        ({"ours": "grades"}, "no way to join"),
        ({"ours": {"0": "a"}}, "Missing: 1, 2, 3, 4"),
        ({"ours": dict.fromkeys(GRADES, "a")}, "into one"),
        ({"ours": dict.fromkeys((*GRADES, "5"), "a")}, "No classes of the run: 5"),
        ({"a": ["0"]}, "one class, or null"),
        ({"a": {"b": "0"}}, "one class, or null"),
        ("any-dr,a:some DR", "a: some DR Did you mean"),
    ],
)
def test_maps_that_do_not_hold_together(word: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(word, GRADES)


@pytest.mark.parametrize(
    "text", ["- a\n", "a: [\n", "", "a: 1\na: 2\n", "!!python/object/apply:os.getcwd []\n", "a: &x [*x]\n"]
)
def test_files_that_are_no_map(text: str, tmp_path: Path) -> None:
    (tmp_path / "m.yml").write_text(text)
    with pytest.raises(ConfigError, match="--map"):
        parse(str(tmp_path / "m.yml"), GRADES)


def test_grades_are_joined_for_graded_runs_only() -> None:
    with pytest.raises(ConfigError, match="joins the five grades"):
        parse("referable", ("healthy", "glaucoma"))


def test_labels_without_a_meaning_are_refused_all_together() -> None:
    with pytest.raises(DataError, match=r"2 of its labels(?s:.)*'x'(?s:.)*'y'"):
        parse("a:0", GRADES).apply(manifest("a", "x", "y", "x"))
    with pytest.raises(DataError, match="leaves no image"):
        parse("a:null", GRADES).apply(manifest("a"))


def test_left_out_images_are_counted() -> None:
    data = parse("a:0,b:null", GRADES).apply(manifest("a", "b", "b"))
    assert data.left_out == (("left out by the label map", 2),)
    assert data.notes == ("left out by the label map: 2 of 'b'",)


def test_joined_grades_of_zero_and_one_must_be_written_out() -> None:
    """A table of yes and no joined to referable would have become all no."""
    with pytest.raises(DataError, match="only 0 and 1"):
        parse("referable", GRADES).apply(manifest("0", "1"))
    found = parse("referable,0:not referable,1:referable", GRADES)
    assert meanings(found, manifest("0", "1")) == ["not referable", "referable"]


# --- nothing said -------------------------------------------------------------------------------------------------


def test_equal_names_need_no_saying() -> None:
    found = unstated(manifest("0", "2", "3"), GRADES, name="messidor")
    assert (found.ours, found.stated, remarks(found)) == (None, False, [])
    assert meanings(found, manifest("0", "2", "3")) == ["0", "2", "3"]


@pytest.mark.parametrize("classes", [GRADES, ("no DR", "mild", "severe")])
def test_zero_and_one_are_another_question(classes: tuple[str, ...]) -> None:
    """Grades 0 to 4 met with glaucoma 0 and 1: it was scored without a word."""
    with pytest.raises(DataError, match=r"only 0 and 1(?s:.)*--map acrima="):
        unstated(manifest("0", "1", "1"), classes, name="acrima")
    assert unstated(manifest("0", "1"), ("0", "1"), name="acrima").classes == ("0", "1")


@pytest.mark.parametrize(
    ("ours", "theirs", "refused"),
    [
        ("dr_grade", "dme_risk", True),
        ("Retinopathy grade", "Risk of macular edema", True),
        ("diagnosis", "glaucoma", False),
        ("level", "diagnosis", False),
        ("dr", "adjudicated_dr_grade", False),
        ("Glaucoma", "cataract", True),
        (None, "glaucoma", False),
    ],
)
def test_columns_of_two_diseases_are_two_questions(ours: str | None, theirs: str, refused: bool) -> None:
    data = manifest("0", "1", "2")
    if refused:
        with pytest.raises(DataError, match="as-is"):
            unstated(data, GRADES, name="x", columns=(ours, theirs))
    else:
        assert unstated(data, GRADES, name="x", columns=(ours, theirs)).theirs["2"] == "2"


def test_numbers_for_names_are_said() -> None:
    found = unstated(manifest("0", "1"), ("healthy", "glaucoma"), name="x")
    assert meanings(found, manifest("0", "1")) == ["healthy", "glaucoma"]
    assert "0 = healthy, 1 = glaucoma" in remarks(found)[0]


def test_unknown_words_are_refused_with_what_to_type() -> None:
    with pytest.raises(DataError, match=r"'glaucom' Did you mean 'glaucoma'\?|'glaucom'(?s:.)*Did you mean"):
        unstated(manifest("healthy", "glaucom"), ("healthy", "glaucoma"), name="x")


# --- the run's side -----------------------------------------------------------------------------------------------


def predictions(n: int = 40) -> Predictions:
    rng = np.random.default_rng(0)
    return Predictions(
        images=[str(i) for i in range(n)],
        patients=[None] * n,
        eyes=[None] * n,
        targets=rng.integers(-1, 5, n),
        logits=3 * rng.normal(size=(n, 5)),
        classes=GRADES,
        traits={"camera": ["a"] * n},
    )


def test_probabilities_of_joined_classes_are_added() -> None:
    before = predictions()
    after = parse("referable", GRADES).merge(before)
    np.testing.assert_allclose(after.probabilities[:, 1], before.probabilities[:, 2:].sum(axis=1), rtol=1e-12)
    assert after.classes == ("not referable", "referable")
    np.testing.assert_array_equal(after.targets, np.where(before.targets < 0, -1, before.targets >= 2))
    assert after.traits == before.traits


def test_classes_join_in_their_own_order() -> None:
    """Not in the order in which the user wrote them."""
    found = merging(GRADES, {"4": "bad", "3": "bad", "0": "good", "1": "good", "2": "good"})
    assert found.classes == ("good", "bad")
    before = predictions()
    np.testing.assert_allclose(
        found.merge(before).probabilities[:, 0], before.probabilities[:, :3].sum(axis=1), rtol=1e-12
    )
    with pytest.raises(DataError, match="not about the classes"):
        merging(GRADES, {"healthy": "good"})


def test_without_joining_the_table_stays() -> None:
    before = predictions()
    assert parse("as-is", GRADES).merge(before) is before
