"""What a search is told: ranges and values of any field, checked against the configuration; the plan as a whole."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eyetune.config import Config
from eyetune.errors import ConfigError
from eyetune.searching.plan import Plan, read_plan
from eyetune.searching.space import BASELINE, USUAL_SPACES, Choices, Range, Space, extension, read_space

CONTENT: dict[str, Any] = {"data": {"table": "t.csv"}, "train": {"epochs": 5}}


def space(given: dict[str, Any], content: dict[str, Any] = CONTENT, pinned: tuple[str, ...] = ()) -> Space:
    base = Config.parse(content, check_files=False)
    return read_space(given, content, base, pinned=pinned)


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "t.csv"
    path.touch()
    return path


def plan(*words: str) -> Plan:
    return read_plan(["--data.table", "t.csv", *words])


@pytest.mark.parametrize(
    ("path", "said", "meant"),
    [
        ("train.lr", "1e-5..1e-3 log", Range(1e-5, 1e-3, log=True)),
        ("model.dropout", "0..0.5", Range(0, 0.5)),
        ("model.dropout", " 0 .. 0.3 step 0.1 ", Range(0, 0.3, step=0.1)),
        ("adapt.r", "4..32", Range(4, 32, whole=True)),
        ("adapt.r", "4..32 log", Range(4, 32, log=True, whole=True)),
        ("adapt.r", "4,8,16", Choices((4, 8, 16))),
        ("adapt.r", [4, 8], Choices((4, 8))),
        ("train.lr", "1e-4,5e-4", Choices((1e-4, 5e-4))),
        ("augment", "none,light", Choices(("none", "light"))),
        ("adapt.dora", "true,false", Choices((True, False))),
        ("adapt.targets", [["qkv"], ["qkv", "proj"]], Choices((("qkv",), ("qkv", "proj")))),
        ("adapt.kind", "lora,full", Choices(("lora", "full"))),
        ("data.contrast", "none,clahe", Choices(("none", "clahe"))),
    ],
)
def test_what_is_said_is_meant(path: str, said: Any, meant: Range | Choices) -> None:
    assert space({path: said}).fields == {path: meant}


@pytest.mark.parametrize(
    ("path", "said", "complaint"),
    [
        ("train.lrr", "1..2", "unknown. Did you mean 'train.lr'?"),
        ("adapt.layers", "1..2", "unknown. Did you mean 'adapt."),
        ("adapt.max_epochs", "1..2", "belongs to linear, not to lora"),
        ("train.lr", "1e-3..1e-5 log", "is empty"),
        ("train.lr", "1e-3..1e-3", "is empty"),
        ("train.lr", "0..1e-3 log", "log needs a low end above 0"),
        ("train.lr", "1e-5…1e-3", "leaves nothing to choose"),
        ("train.lr", "a..b", "is no number"),
        ("train.lr", "1e-5..inf", "is no end of a range"),
        ("train.lr", "1e-5..1e-3 logg", "is no range"),
        ("train.lr", "0..1 step 2", "the step has to be"),
        ("train.lr", "0..1", "must be greater than 0"),
        ("model.dropout", "0..1", "must be less than 1"),
        ("train.epochs", "2..5.5", "takes whole numbers"),
        ("train.warmup_epochs", "1,9", "more than epochs"),
        ("adapt.r", "4,x", "must be a valid integer"),
        ("adapt.r", "8", "leaves nothing to choose"),
        ("adapt.r", "8,8", "stands twice"),
        ("augment", "light..strong", "of which there is no range"),
        ("augment", "light,stronger", "must be"),
        ("adapt.kind", "lora,lara", "lara"),
        ("seed", "1,2", "is luck, not a setting"),
        ("data.val", "0.1,0.2", "the same for all trials"),
        ("task.kind", "classification,ordinal", "cannot be compared"),
        ("out", "a,b", "does not change what is learnt"),
        ("train.metric", "qwk,accuracy", "--objectives"),
    ],
)
def test_what_cannot_be_searched_is_said_by_path(path: str, said: Any, complaint: str) -> None:
    with pytest.raises(ConfigError, match="1 fault in the space") as caught:
        space({path: said})
    assert f"  {path}: " in str(caught.value)
    assert complaint in str(caught.value)


def test_all_faults_are_told_together() -> None:
    with pytest.raises(ConfigError, match="2 faults in the space"):
        space({"train.lrr": "1..2", "seed": "1,2", "train.lr": "1e-5..1e-3"})


def test_the_usual_space_follows_the_strategy() -> None:
    assert set(space({}).fields) == set(USUAL_SPACES["lora"])
    linear = {**CONTENT, "adapt": {"kind": "linear"}}
    assert set(space({}, linear).fields) == set(BASELINE)
    mixed = space({"": "usual", "adapt.kind": "lora,full"})
    assert str(mixed.fields["train.batch_size"]) == "8,16,32,48,64"
    assert str(mixed.fields["model.dropout"]) == "0..0.5"
    assert "adapt.r" in mixed.of("lora")
    assert "adapt.r" not in mixed.of("full")
    assert "train.lr" in mixed.of("full")


def test_own_fields_replace_the_usual_space_or_join_it() -> None:
    assert set(space({"train.lr": "1e-5..1e-3"}).fields) == {"train.lr"}
    joined = space({"": "usual", "adapt.dropout": "0..0.3", "train.lr": "fixed"})
    assert set(joined.fields) == set(USUAL_SPACES["lora"]) - {"train.lr"} | {"adapt.dropout"}
    assert "train.batch_size" not in space({}, pinned=("train.batch_size",)).fields
    with pytest.raises(ConfigError, match="nothing to search"):
        space({"train.lr": "fixed"})


@given(st.floats(0, 1), st.booleans())
def test_a_range_knows_what_it_holds(share: float, log: bool) -> None:
    found = Range(1e-5, 1e-1, log=log)
    value = 10 ** (-5 + 4 * share) if log else 1e-5 + share * (1e-1 - 1e-5)
    value = min(max(value, found.low), found.high)
    assert found.holds(value)
    assert found.share(value) == pytest.approx(share, abs=1e-6)
    assert not found.holds(0.2)
    assert not found.holds(True)


def test_a_step_is_held_to() -> None:
    found = Range(0, 0.3, step=0.1)
    assert all(found.holds(value) for value in (0, 0.1, 0.2, 0.3))
    assert not any(found.holds(value) for value in (0.15, 0.30000000000000004))


@pytest.mark.parametrize(
    ("path", "said", "value", "side", "wider"),
    [
        ("train.lr", "1e-5..1e-3 log", 9.8e-4, "upper", "1e-05..0.01 log"),
        ("train.lr", "1e-5..1e-3 log", 1.01e-5, "lower", "1e-06..0.001 log"),
        ("train.lr", "1e-5..1e-3 log", 1e-4, None, None),
        ("model.dropout", "0.1..0.5", 0.497, "upper", "0.1..0.7"),
        ("model.dropout", "0.1..0.5", 0.1, "lower", "0..0.5"),
        ("model.dropout", "0..0.5", 0.0, None, None),  # none below: the field takes no less
        ("adapt.r", "4,8,16,32", 32, "upper", "4,8,16,32,64"),
        ("adapt.r", "4,8,16,32", 4, "lower", "2,4,8,16,32"),
        ("adapt.r", "1,2,4", 1, None, None),
        ("adapt.r", "4..32 log", 4, "lower", "1..32 log"),
        ("train.weight_decay", "0,0.01,0.05", 0, None, None),
        ("augment", "none,light,medium", "none", None, None),
    ],
)
def test_the_edge_is_told_where_there_is_more_beyond(
    path: str, said: str, value: Any, side: str | None, wider: str | None
) -> None:
    found = extension(path, space({path: said}).fields[path], value, CONTENT, "lora")
    if side is None:
        assert found is None
    else:
        assert found is not None
        assert f"lies on the {side} edge" in found
        assert f'--space.{path} "{wider}"' in found
        space({path: str(wider)})  # what is advised can be typed


@given(st.integers(1, 50), st.integers(51, 500), st.booleans(), st.sampled_from(["lower", "upper"]))
def test_a_wider_range_is_wider_on_that_side_alone(low: int, high: int, log: bool, side: str) -> None:
    before = Range(low, high, log=log, whole=True)
    for after in before.wider(side):
        assert (after.low < low, after.high > high) == (side == "lower", side == "upper")
        assert after.low == int(after.low)
        assert not log or math.log(after.low) < math.log(after.high)


def test_a_trial_is_the_configuration_with_its_values(table: Path) -> None:
    found = plan("--space", "usual", "--space.adapt.kind", "lora,full", "--train.epochs", "7", "--train.lr", "2e-4")
    lora = found.config({"adapt.kind": "lora", "adapt.r": 16}, Path("x"))
    assert (lora.adapt.kind, lora.adapt.r, lora.train.epochs, lora.out) == ("lora", 16, 7, Path("x"))  # type: ignore[attr-defined]
    full = found.config({"adapt.kind": "full", "train.lr": 1e-4}, Path("x"))
    assert (full.adapt.kind, full.learning_rate, full.data.split_seed) == ("full", 1e-4, 0)
    assert found.config({"adapt.kind": "full"}, Path("x")).learning_rate == full.adapt.default_lr


def test_file_and_flags_say_the_same(table: Path) -> None:
    Path("c.yaml").write_text(
        "data: {table: t.csv}\nout: o\nsearch:\n  trials: 7\n  objectives: [qwk, seconds]\n"
        "  space: {train: {lr: 1e-5..1e-3 log}, adapt.r: [4, 8]}\n",
        encoding="utf-8",
    )
    filed = read_plan(["c.yaml", "--space.adapt.r", "8,16", "--trials", "9"])
    assert filed.space.texts() == {"train.lr": "1e-05..0.001 log", "adapt.r": "8,16"}
    assert (filed.trials, filed.objectives, filed.pruner, filed.out) == (9, ("qwk", "seconds"), "none", Path("o"))
    flagged = plan("--out", "o", "--trials", "9", "--objectives", "qwk,seconds", "--space.train.lr", "1e-5..1e-3 log")
    assert (flagged.trials, flagged.objectives, flagged.study) == (9, ("qwk", "seconds"), "search")
    assert plan("--out", "x/o", "--storage", "postgresql://host/db").study == "o"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--trials", "0"], "--trials 0: a whole number above 0"),
        (["--trials", "2.5"], "whole number"),
        (["--trials"], "needs a value"),
        (["--timeout", "soon"], "--timeout soon: a number of seconds"),
        (["--pruner", "medain"], "Did you mean 'median'?"),
        (["--pruner", "median", "--objectives", "qwk,seconds"], "cannot be pruned"),
        (["--objectives", "seconds"], "one has to be a score"),
        (["--objectives", "qwk,qwk"], "every one once"),
        (["--objectives", "qwk,,"], "names with commas"),
        (["--space", "everything"], "the usual space is 'usual'"),
        (["--trails", "5"], "--trails: unknown. Did you mean 'trials'?"),
        (["--trian.lr", "5"], "trian"),
        (["--sed", "5"], "Did you mean 'seed'?"),
        (["--trials", "1", "--trials", "2"], "stands twice"),
    ],
)
def test_faults_of_the_verbs_own_words(table: Path, words: list[str], complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(*words)
    assert complaint in str(caught.value)


def test_directions_come_from_the_metrics(table: Path) -> None:
    found = plan("--objectives", "qwk,nll,trainable_parameters").judged("f1_macro", "classification")
    assert [one.direction for one in found] == ["maximize", "minimize", "minimize"]
    assert [one.name for one in plan().judged("f1_macro", "classification")] == ["f1_macro"]
    with pytest.raises(ConfigError, match="Did you mean 'qwk'"):
        plan("--objectives", "qvk").judged("qwk", "classification")
    with pytest.raises(ConfigError, match="'qwk' judges no regression trial"):
        plan("--objectives", "qwk").judged("mae", "regression")
