"""Classes in words and by few photographs, with a model that knows colours; the prompts that come with EyeTune."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from clip_kit import colour_run, colour_table

from eyetune.cli import main
from eyetune.clip import run as runs
from eyetune.clip.fewshot import Shots, draw, few_shot, linear_probe, tip_adapter
from eyetune.clip.prompts import PLACE, class_vectors, read_prompts, shipped
from eyetune.clip.zeroshot import look, subjects
from eyetune.data.cache import file_digest, photograph_id
from eyetune.data.records import Manifest
from eyetune.errors import ConfigError, DataError
from eyetune.metrics.predictions import Predictions
from eyetune.train.leaks import overlap
from eyetune.train.rundir import RunDir

PROMPTS = """
title: Which colour
templates: ["the eye is {}", "{}"]
classes: {warm: red, cold: [blue, a blue fundus]}
"""


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    found = colour_run(tmp_path / "run")
    monkeypatch.setattr(runs, "open_clip_run", lambda path, **_: replace(found, path=Path(path)))
    return found


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "colours.yaml"
    path.write_text(PROMPTS)
    return path


# -- prompts -----------------------------------------------------------------------------------------------------------


def test_what_is_shipped_is_whole() -> None:
    wanted = {"dr", "glaucoma", "amd", "cataract", "myopia", "hypertension"}
    assert set(shipped()) == wanted | {f"{name}-zh" for name in wanted}
    for name in shipped():
        found = read_prompts(name)
        assert found.source
        assert list(found.classes) == [str(k) for k in range(5 if name.startswith("dr") else 2)]
        assert found.ordered == name.startswith("dr")
        sentences = [text for label in found.classes for text in found.texts(label)]
        assert len(set(sentences)) == len(sentences), "two classes would be called the same"
        assert not any(PLACE in text for text in sentences)
        chinese = [any("一" <= letter <= "鿿" for letter in text) for text in sentences]
        assert all(chinese) if name.endswith("-zh") else not any(chinese)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("classes: [a, b]", "classes: a mapping of two classes or more"),
        ("classes: {a: x}", "classes: a mapping of two classes or more"),
        ("classes: {a: x, b: ''}", "classes.b: an empty text"),
        ("classes: {a: x, b: []}", "classes.b: a text or a list of texts"),
        ("classes: {a: x, b: [y, 3]}", "classes.b: 3 is no text"),
        ("classes: {no: x, yes: y}", "put quotes around such a name"),
        ("classes: {a: x, b: y}\ntemplates: ['the eye']", "'the eye' needs {} once"),
        ("classes: {a: x, b: y}\ntemplates: ['{} or {}']", "needs {} once"),
        ("classes: {a: x, b: y}\ntemplates: ['']", "templates: an empty text"),
        ("classes: {a: x, b: y}\ntemplates: []", "templates: a text or a list"),
        ("classes: {a: x, b: y}\ntemplate: ['{}']", "template: no such field. Did you mean 'templates'?"),
        ("classes: {1: x, '1': y}", "one class is named twice"),
        ("- a\n- b", "a mapping with `classes`"),
        ("a: [", "not YAML"),
        ("classes: {a: x, b: y}\nordered: perhaps", "ordered: true or false"),
    ],
)
def test_prompts_that_make_no_sense_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError) as raised:
        read_prompts(str(path))
    assert message in str(raised.value)


def test_a_set_that_is_not_there_is_guessed() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'glaucoma'"):
        read_prompts("glaukoma")


def test_a_class_is_the_mean_of_its_sentences(prompts: Path, tmp_path: Path) -> None:
    found = class_vectors(colour_run(tmp_path / "run"), read_prompts(str(prompts)))
    assert found.norm(dim=1).tolist() == pytest.approx([1, 1])
    assert found.argmax(dim=1).tolist() == [0, 2]


@pytest.mark.parametrize(
    ("phrase", "message"),
    [("the eye is red a a a a a a", "longer than the 8 tokens"), ("rouge et noir", "unknown to it")],
)
def test_prompts_that_the_model_cannot_read_are_refused(tmp_path: Path, phrase: str, message: str) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(f"classes: {{a: {phrase}, b: blue}}")
    with pytest.raises(DataError, match=message):
        class_vectors(colour_run(tmp_path / "run"), read_prompts(str(path)))


# -- rows --------------------------------------------------------------------------------------------------------------


def both_eyes(folder: Path) -> Manifest:
    """a: a red and a blue eye of two classes; b: two photographs of the left eye, one of the right; c: one eye."""
    rows = [
        ("red", "warm", "a", "left"),
        ("blue", "cold", "a", "right"),
        ("red", "warm", "b", "left"),
        ("red", "warm", "b", "left"),
        ("red", "warm", "b", "right"),
        ("blue", "cold", "c", "right"),
    ]
    names = ("colour", "label", "patient", "eye")
    table = colour_table(folder, [dict(zip(names, row, strict=True)) for row in rows])
    return Manifest.from_table(table, classes=["warm", "cold"])


def test_both_eyes_are_seen_together(tmp_path: Path) -> None:
    manifest = both_eyes(tmp_path / "eyes")
    rows, left_out = subjects(manifest, "patient", ordered=True)
    assert [(row.name, row.target, len(row.looks)) for row in rows] == [("a", 1, 1), ("b", 0, 2), ("c", 1, 1)]
    assert not left_out
    left, right = (tuple(path.name if path else None for path in look) for look in rows[1].looks)
    assert {left, right} == {("2.png", "4.png"), ("3.png", "4.png")}
    assert rows[2].looks[0][1] is None
    rows, left_out = subjects(manifest, "patient", ordered=False)
    assert [row.name for row in rows] == ["b", "c"]
    assert left_out[0][1] == 1
    run = colour_run(tmp_path / "run")
    found = look(run, subjects(manifest, "patient", ordered=True)[0])
    assert found.argmax(dim=1).tolist()[1:] == [0, 2]
    assert abs(float(found[0, 0] - found[0, 2])) < 0.1, "a red and a blue eye make both"
    rows, _ = subjects(manifest, "image", ordered=True)
    assert look(run, rows).argmax(dim=1).tolist() == [0, 2, 0, 0, 0, 2]


def test_patients_need_to_be_known(tmp_path: Path) -> None:
    table = colour_table(tmp_path / "eyes", [{"colour": "red", "label": "warm"}, {"colour": "blue", "label": "cold"}])
    with pytest.raises(DataError, match="--per patient needs to know whose eye"):
        subjects(Manifest.from_table(table), "patient", ordered=False)


def test_features_are_computed_again_when_a_photograph_changes(tmp_path: Path) -> None:
    manifest, run, store = both_eyes(tmp_path / "eyes"), colour_run(tmp_path / "run"), tmp_path / "f.safetensors"
    rows, _ = subjects(manifest, "image", ordered=False)
    first = look(run, rows, store=store)
    seen = run.model.seen
    assert np.array_equal(look(run, rows, store=store), first)
    assert run.model.seen == seen
    (tmp_path / "eyes" / "0.png").write_bytes((tmp_path / "eyes" / "1.png").read_bytes())
    assert look(run, rows, store=store)[0].argmax() == 2
    store.write_bytes(b"no features")
    assert look(run, rows, store=store)[0].argmax() == 2


# -- few shots ---------------------------------------------------------------------------------------------------------


def test_tip_adapter_is_its_formula() -> None:
    rng = np.random.default_rng(0)
    unit = [one / np.linalg.norm(one, axis=1, keepdims=True) for one in rng.normal(size=(3, 6, 4))]
    shots, test, classes = unit[0], unit[1], unit[2][:2]
    labels = np.array([0, 1, 0, 1, 1, 0])
    logits = tip_adapter(classes, 10.0, alpha=2.0, beta=3.0)(Shots(shots, labels, 2), test)
    for n, k in np.ndindex(6, 2):
        kept = sum(np.exp(-3 * (1 - test[n] @ shots[m])) for m in range(6) if labels[m] == k)
        assert logits[n, k] == pytest.approx(2 * kept + 10 * test[n] @ classes[k])


def test_shots_are_of_different_patients_where_there_are_enough() -> None:
    labels = np.array([0] * 6 + [1] * 4 + [-1])
    patients = ["a", "a", "a", "a", "b", "c", None, None, "d", "d", "e"]
    for seed in range(20):
        rows = draw(labels, patients, 2, 3, np.random.default_rng(seed))
        assert labels[rows].tolist() == [0, 0, 0, 1, 1, 1]
        assert {patients[row] for row in rows[:3]} == {"a", "b", "c"}
        assert len({patients[row] or row for row in rows[3:].tolist()}) == 3
    with pytest.raises(DataError, match="class 1 has 4 photographs"):
        draw(labels, patients, 2, 5, np.random.default_rng(0))


def table(targets: Any, patients: Any) -> Predictions:
    names = [str(n) for n in range(len(targets))]
    return Predictions(names, patients, [None] * len(names), targets, np.zeros((len(names), 2)), ("0", "1"))


def test_few_shot_means_over_draws_and_covers_them() -> None:
    rng = np.random.default_rng(1)
    targets = np.arange(80) % 2
    features = rng.normal(size=(80, 8)) + 1.2 * targets[:, None] * np.array([1, -1, 0, 0, 0, 0, 0, 0])
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    both = table(targets[:40], [f"a{n}" for n in range(40)]), table(targets[40:], [f"b{n // 2}" for n in range(40)])
    methods = {"linear": linear_probe, "tip_adapter": tip_adapter(None, 1.0)}
    found = few_shot(
        both[0], features[:40], both[1], features[40:], methods, metrics=["accuracy", "auroc_macro"],
        shots=(1, 8, 50), draws=4, resamples=60,
    )  # fmt: skip
    assert found["left_out"] == [50]
    for shots in ("1", "8"):
        for entry in (one["accuracy"] for one in found["shots"][shots].values()):
            assert len(entry["draws"]) == 4
            assert entry["value"] == pytest.approx(np.mean(entry["draws"]))
            assert entry["ci"][0] < entry["value"] < entry["ci"][1]
    assert found["shots"]["8"]["linear"]["auroc_macro"]["value"] > 0.7
    with pytest.raises(DataError, match="the class 0 has 20 photographs"):
        few_shot(both[0], features[:40], both[1], features[40:], methods, metrics=["accuracy"], shots=(30,))


# -- the verb ----------------------------------------------------------------------------------------------------------


def coloured(folder: Path, splits: bool = False) -> Path:
    rows = []
    for number in range(16):
        colour, label = (("red", "warm"), ("blue", "cold"))[number % 2]
        row = {"colour": colour, "label": label, "patient": f"p{number // 2}"}
        rows.append(row | ({"split": "train" if number < 8 else "test"} if splits else {}))
    return colour_table(folder, rows)


@pytest.mark.slow
def test_zeroshot_writes_what_evaluate_writes(
    opened: Any, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = coloured(tmp_path / "eyes", splits=True)
    # Photographs 9 and, of no matter here, 2, which is none of those that are scored.
    known = [photograph_id(file_digest(data.parent / f"{number}.png")) for number in (2, 9)]
    RunDir(opened.path).update_data(photographs=known)
    words = ["clip", "zeroshot", str(opened.path), "--data", f"eyes={data}", "--prompts", str(prompts)]
    assert main([*words, "--shots", "1,2", "--draws", "2"]) == 0
    shown = capsys.readouterr().out
    assert "words alone" in shown
    assert "2 a class, Tip-Adapter" in shown
    assert "WARNING, eyes: 1 of its 8 photographs were among those the run was trained or chosen on" in shown
    place = opened.path / "zeroshot" / "colours"
    content = json.loads((place / "metrics.json").read_text())["datasets"]["eyes"]
    assert content["n"] == sum(content["seen_as"].values()) == 8
    assert content["metrics"]["accuracy"]["value"] == 1
    assert content["metrics"]["accuracy"]["ci"][0] is not None
    assert content["prompts"] == str(prompts)
    assert content["few_shot"]["shots"]["2"]["linear"]["accuracy"]["value"] == 1
    written = Predictions.from_csv(place / "predictions" / "eyes.csv")
    assert written.classes == ("warm", "cold")
    assert len(written) == 8
    assert (place / "plots" / "confusion_matrix_eyes.png").is_file()
    seen = opened.model.seen
    assert main([*words, "--shots", "1", "--draws", "1"]) == 0
    assert opened.model.seen == seen, "features are kept"
    old = json.loads((place / "metrics.json").read_text())
    old["datasets"]["stale"] = old["datasets"]["eyes"] | {"model": "before it was trained further"}
    (place / "metrics.json").write_text(json.dumps(old))
    assert main(words) == 0
    content = json.loads((place / "metrics.json").read_text())["datasets"]
    assert list(content) == ["eyes"]
    assert content["eyes"]["n"] == 16
    assert content["eyes"]["warnings"][0].startswith("2 of its 16 photographs")


def test_what_a_run_has_seen_is_noted_with_what_it_started_from(tmp_path: Path) -> None:
    def pairs(*photographs: str) -> Any:
        return SimpleNamespace(photographs=frozenset(photographs))

    unknown = SimpleNamespace(photographs=None)
    splits = {"train": pairs("c", "b"), "val": pairs("d"), "test": pairs("t")}
    assert runs.seen_in_training(splits, None) == ["b", "c", "d"]
    earlier = RunDir(tmp_path)
    assert runs.seen_in_training(splits, tmp_path) == ["b", "c", "d"]
    earlier.update_data(photographs=["a", "b"])
    assert runs.seen_in_training(splits, tmp_path) == ["a", "b", "c", "d"]
    assert runs.seen_in_training(splits | {"train": unknown}, tmp_path) is None
    assert runs.seen_in_training({"train": pairs("a"), "test": unknown}, None) == ["a"]


def test_that_nothing_is_known_of_the_training_is_said(tmp_path: Path) -> None:
    run = colour_run(tmp_path / "run")
    said = overlap([], runs.learnt_from(run))
    assert len(said) == 1
    assert "which photographs the model was trained on is not noted" in said[0]
    RunDir(run.path).update_data(photographs=["0" * 16])
    assert overlap([], runs.learnt_from(run)) == []


def test_zeroshot_bad_input_is_one_message(
    opened: Any, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = coloured(tmp_path / "eyes")
    asked = ["--data", f"eyes={data}", "--prompts", str(prompts)]
    cases = [
        (["--prompts", str(prompts)], "name each dataset once"),
        ([*asked, "--data", f"eyes={data}"], "name each dataset once"),
        ([*asked, "--split", "test"], "has no such split. It has none: its table has no split column"),
        ([*asked, "--shots", "0"], "whole numbers from 1"),
        ([*asked, "--shots", "few"], "whole numbers from 1"),
        ([*asked, "--shots", "1", "--split", "test"], "leave --split out"),
        ([*asked, "--shots", "100"], "fewer than the fewest asked for (100)"),
        ([*asked, "--per", "patient"], "whose eye each photograph shows"),
        ([*asked, "--map", "eyes=warm:hot,cold:cold"], "no class of the run"),
        (["--data", f"eyes={data}", "--prompts", "dr"], "cold"),
    ]
    for words, message in cases:
        assert main(["clip", "zeroshot", str(opened.path), *words]) == 2, words
        said = capsys.readouterr().err
        assert message in said, said
