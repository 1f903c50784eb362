"""What a command line of `compare` asks for: cells, rates, budgets, names; and what it must refuse."""

from __future__ import annotations

from pathlib import Path

import pytest

from eyetune.comparison.plan import Plan, differing, read_plan
from eyetune.errors import ConfigError


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "labels.csv"
    path.write_text("image,label\na.png,0\n", encoding="utf-8")
    return path


def plan(table: Path, *words: str, yaml: str | None = None) -> Plan:
    start = ["--data.table", str(table)]
    if yaml is not None:
        file = table.parent / "config.yaml"
        file.write_text(f"data: {{table: {table}}}\n{yaml}", encoding="utf-8")
        start = [str(file)]
    return read_plan([*start, *words])


def rates(found: Plan) -> dict[str, float]:
    return {arm.name: found.config(arm).learning_rate for arm in found.arms}


def test_every_strategy_on_every_backbone_with_every_seed(table: Path) -> None:
    found = plan(table, "--strategies", "linear,lora", "--backbones", "nano,test_vit=random", "--seeds", "3,5")
    assert [cell.name for cell in found.cells] == [
        f"{backbone}-{strategy}-seed{seed}"
        for seed in (3, 5)
        for backbone in ("nano", "test_vit")
        for strategy in ("linear", "lora")
    ]
    assert [arm.name for arm in found.arms] == ["nano linear", "nano lora", "test_vit linear", "test_vit lora"]
    cell = found.cells[-1]
    assert (cell.config.model.backbone, cell.config.model.weights, cell.config.seed) == ("test_vit", "random", 5)
    assert cell.config.out == Path("runs/comparison/test_vit-lora-seed5")


def test_the_splits_are_the_same_whatever_the_seed(table: Path) -> None:
    found = plan(table, "--strategies", "linear", "--seeds", "3,5", "--seed", "9")
    assert {cell.config.split_seed for cell in found.cells} == {9}
    own = plan(table, "--strategies", "linear", "--seeds", "3,5", "--data.split-seed", "4")
    assert {cell.config.split_seed for cell in own.cells} == {4}


def test_a_rate_belongs_to_the_strategy_it_was_written_for(table: Path) -> None:
    usual = {"linear": 1e-3, "lora": 5e-4, "full": 1e-4}
    words = ("--strategies", "linear,lora,full")
    assert rates(plan(table, *words)) == usual
    filed = "adapt: {kind: lora, r: 4}\ntrain: {lr: 2e-3}\n"
    found = plan(table, *words, yaml=filed)
    assert rates(found) == usual | {"lora": 2e-3}
    assert [found.config(arm).adapt.model_dump().get("r") for arm in found.arms] == [None, 4, None]
    assert rates(plan(table, *words, yaml="train: {lr: 2e-3}\n")) == dict.fromkeys(usual, 2e-3)
    assert rates(plan(table, *words, "--train.lr", "3e-3", yaml=filed)) == dict.fromkeys(usual, 3e-3)
    assert rates(plan(table, *words, "--full.train.lr", "7e-5", yaml=filed)) == usual | {"lora": 2e-3, "full": 7e-5}


def test_several_of_a_kind(table: Path) -> None:
    found = plan(table, "--strategies", "small=lora,large-r=lora", "--small.r", "2", "--large-r.r", "32")
    assert [(arm.name, found.config(arm).adapt.model_dump()["r"]) for arm in found.arms] == [
        ("small", 2),
        ("large-r", 32),
    ]


def test_the_file_may_say_it_all(table: Path) -> None:
    yaml = """
train: {epochs: 6}
compare:
  strategies:
    linear: {train: {epochs: 15}, augment: none}
    deep: {adapt: {kind: full, layer_decay: 0.8}}
    lora: {r: 16}
  backbones: {nano: , test_vit: {weights: random, pixels: 32}}
  seeds: [0, 1]
  budget: own
  datasets: {other: other.csv}
  maps: {other: {ours: referable}}
"""
    found = plan(table, yaml=yaml)
    arms = {arm.name: found.config(arm) for arm in found.arms}
    assert arms["nano linear"].train.epochs == 15
    assert arms["nano linear"].augment == "none"
    assert arms["nano linear"].adapt.model_dump()["max_epochs"] == 10, "each its own"
    assert arms["nano deep"].adapt.model_dump()["layer_decay"] == 0.8
    assert arms["test_vit lora"].adapt.model_dump()["r"] == 16
    assert (arms["test_vit lora"].model.pixels, arms["nano lora"].model.pixels) == (32, None)
    assert (found.seeds, found.budget, found.datasets) == ((0, 1), "own", {"other": "other.csv"})
    assert found.maps == {"other": {"ours": "referable"}}
    assert "not equal" in found.budget_text()
    chosen = plan(table, "--strategies", "lora", "--seeds", "7", "--lora.r", "3", yaml=yaml)
    assert [(cell.name, cell.config.adapt.model_dump()["r"]) for cell in chosen.cells] == [
        ("nano-lora-seed7", 3),
        ("test_vit-lora-seed7", 3),
    ]


def test_an_equal_budget_is_equal(table: Path) -> None:
    found = plan(table, "--strategies", "linear,lora", "--train.epochs", "17")
    assert {cell.config.adapt.build().epochs(cell.config.train.epochs) for cell in found.cells} == {17}
    assert "at most 17 epochs" in found.budget_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "which strategies"),
        (["--strategies", "lora,ful"], "Did you mean 'full'"),
        (["--strategies", "lora,lora"], "stands twice"),
        (["--strategies", "train=lora"], "section of the configuration"),
        (["--strategies", "lora", "--strategies", "full"], "stands twice"),
        (["--strategies", "lora", "--seeds", "0,0"], "every seed once"),
        (["--strategies", "lora", "--seeds", "a"], "whole numbers"),
        (["--strategies", "lora", "--budget", "time"], "epochs"),
        (["--strategies", "lora", "--lora.data.test", "0.2"], "the same for all"),
        (["--strategies", "lora", "--lora.seed", "2"], "the same for all"),
        (["--strategies", "lora", "--adapt.r", "3"], "--lora.r"),
        (["--strategies", "lora", "--lora.train.epochs", "3"], "--budget own"),
        (["--strategies", "linear", "--linear.max_epochs", "3"], "--budget own"),
        (["--strategies", "lora,full", "--full.r", "3"], "belongs to lora, not to full"),
        (["--strategies", "lora", "--model.weights", "x.pth"], "--backbones"),
        (["--strategies", "lora", "--backbones", "nano=nowhere.pth"], "no file at nowhere.pth"),
        (["--strategies", "lora", "--data", "elsewhere"], "--data elsewhere=other.csv"),
        (["--strategies", "lora", "--data", "a=a.csv", "--data", "a=b.csv"], "two of them are for a"),
        (["--strategies", "lora", "--data", "there=a.csv", "--map", "their=any-dr"], "Did you mean 'there'"),
        (["--strategies"], "needs a value"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_refused(table: Path, words: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(table, *words)
    assert said in str(caught.value)


def test_the_example_is_the_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = Path(__file__).parent.parent / "examples" / "strategies.yaml"
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    for name in ("labels.csv", "models/VFM_Fundus_weights.pth"):
        Path(name).touch()
    found = read_plan([str(example)])
    arms = {arm.name: found.config(arm) for arm in found.arms}
    epochs = {name: one.adapt.build().epochs(one.train.epochs) for name, one in arms.items()}
    assert epochs == {"linear": 15, "gradual": 45, "full": 30}
    assert arms["gradual"].adapt.model_dump()["patience"] == 5
    assert arms["full"].adapt.model_dump()["layer_decay"] == 0.85
    assert {(one.model.backbone, str(one.model.weights)) for one in arms.values()} == {
        ("visionfm", "models/VFM_Fundus_weights.pth")
    }
    assert (found.seeds, found.budget) == ((0, 1, 2), "own")
    drawn = read_plan([str(example), "--backbones", "nano"])
    assert {(cell.config.model.backbone, cell.config.model.weights) for cell in drawn.cells} == {("nano", None)}


def test_an_unknown_word_in_the_file_is_refused(table: Path) -> None:
    with pytest.raises(ConfigError, match=r"compare\.strategy: unknown.*strategies"):
        plan(table, yaml="compare: {strategy: [lora]}\n")


def test_what_may_change_when_it_goes_on(table: Path) -> None:
    first, second = (plan(table, "--strategies", "lora", *more).cells[0].config for more in ((), ("--workers", "1")))
    assert differing(first, second) == []
    other = plan(table, "--strategies", "lora", "--lora.r", "16", "--augment", "none").cells[0].config
    assert differing(first, other) == ["adapt.r: was 8, now 16", "augment: was medium, now none"]
