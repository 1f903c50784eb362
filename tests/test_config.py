"""The configuration: read, overridden, written, and every fault told at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from eyetune.adapt import STRATEGIES
from eyetune.config import Config, TrainConfig, flags
from eyetune.errors import ConfigError


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "labels.csv"
    path.write_text("image,label\n")
    return path


def faults(content: dict[str, Any], **options: Any) -> dict[str, str]:
    """The faults of a configuration, by dotted path."""
    with pytest.raises(ConfigError) as caught:
        Config.parse(content, **options)
    first, *lines = str(caught.value).splitlines()
    assert first.startswith("1 fault in" if len(lines) == 1 else f"{len(lines)} faults in")
    return dict(line.strip().split(": ", 1) for line in lines)


def test_the_contracts_example(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        """
model:   {backbone: retfound-green, weights: models/green.pth, dropout: 0.3}
data:    {table: data/aptos/train.csv, images: data/aptos/train_images, image_column: id_code, label_column: diagnosis,
          patient_column: null, eye_column: null, split_column: null, val: 0.1, test: 0.1}
adapt:   {kind: lora, r: 8, alpha: 32, dropout: 0.1, targets: [qkv]}
train:   {epochs: 20, batch_size: 48, lr: 5e-4, weight_decay: 0.01, warmup_epochs: 1, patience: 5, accumulate: 1,
          mixup: 0.0, cutmix: 0.0, label_smoothing: 0.0, balance: none}
augment: medium
seed: 42
out: runs/aptos-green-lora
""",
    )
    config = Config.from_yaml(path, check_files=False)
    assert config.train.lr == 5e-4
    assert config.learning_rate == 5e-4
    assert (config.adapt.kind, config.adapt.r) == ("lora", 8)
    assert config.out == Path("runs/aptos-green-lora")
    assert set(faults_of_files(path)) == {"data.table", "data.images", "model.weights"}


def faults_of_files(path: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        Config.from_yaml(path)
    return [line.strip().partition(":")[0] for line in str(caught.value).splitlines()[1:]]


def test_a_table_is_all_it_takes(table: Path) -> None:
    config = Config.from_yaml(None, {"data.table": str(table)})
    assert (config.model.backbone, config.adapt.kind) == ("nano", "lora")
    assert config.learning_rate == STRATEGIES.get("lora").default_lr


def test_every_fault_is_told_at_once(tmp_path: Path) -> None:
    found = faults(
        {
            "model": {"weights": "nowhere.pth", "pixels": 2},
            "data": {"table": "nowhere.csv", "images": "nowhere", "val": 1.5},
            "adapt": {"kind": "lora", "rr": 4, "alpha": "big"},
            "train": {"epoch": 3, "lr": -1, "batch_size": "x", "schedule": "cosin", "clip_norm": float("nan")},
            "augment": "strongg",
            "workers": -1,
            "epochs": 5,
        }
    )
    assert set(found) == {
        *("model.weights", "model.pixels", "data.table", "data.images", "data.val", "adapt.rr", "adapt.alpha"),
        *("train.epoch", "train.lr", "train.batch_size", "train.schedule", "train.clip_norm", "augment", "workers"),
        "epochs",
    }
    assert found["train.epoch"] == "unknown. Did you mean 'train.epochs'?"
    assert found["epochs"] == "unknown. Did you mean 'train.epochs'?"
    assert found["adapt.rr"] == "unknown. Did you mean 'adapt.r'?"
    assert found["train.schedule"].endswith("got 'cosin'. Did you mean 'cosine'?")
    assert found["train.lr"] == "must be greater than 0, got -1"


def test_an_unknown_strategy_brings_the_nearest(table: Path) -> None:
    assert "Did you mean 'lora'" in faults({"data": {"table": str(table)}, "adapt": {"kind": "lor"}})["adapt.kind"]


def test_a_field_of_another_strategy_is_not_of_this_one(table: Path) -> None:
    found = faults({"data": {"table": str(table)}, "adapt": {"kind": "linear", "targets": ["qkv"]}})
    assert found["adapt.targets"] == "belongs to lora, not to linear"


def test_a_section_of_another_command_is_known_as_its_own(table: Path) -> None:
    found = faults({"data": {"table": str(table)}, "search": {"trials": 5}})
    assert found["search"].startswith("is a section of eyetune search alone")


@pytest.mark.parametrize(
    ("content", "path", "message"),
    [
        ({}, "data.table", "is missing"),
        ({"data": {"images": None}}, "data.table", "is missing"),
        ({"data": 5}, "data", "must be a section"),
        ({"data": {"table": "x"}, "train": [1]}, "train", "must be a section"),
        ({"data": {"table": "x"}, "train": {"epochs": 3, "warmup_epochs": 4}}, "train", "warmup_epochs (4) is more"),
        ({"data": {"table": "x", "val": 0.5, "test": 0.5}}, "data", "leave something to train on"),
    ],
)
def test_faults_of_form(content: dict[str, Any], path: str, message: str) -> None:
    assert message in faults(content, check_files=False)[path]


def test_a_missing_file_names_its_neighbour(tmp_path: Path, table: Path) -> None:
    found = faults({"data": {"table": str(tmp_path / "lables.csv"), "images": str(tmp_path / "no" / "where")}})
    assert "Did you mean 'labels.csv'" in found["data.table"]
    assert "There is no folder" in found["data.images"]


def test_names_that_are_not_files_are_not_looked_for(table: Path) -> None:
    for weights in ("hub", "random", None):
        Config.parse({"data": {"table": str(table)}, "model": {"weights": weights}})
    Config.parse({"data": {"table": "hf:someone/fundus"}})
    Config.parse({"data": {"table": str(table.parent)}})


def test_overrides_win_and_reach_every_depth(tmp_path: Path, table: Path) -> None:
    path = written(tmp_path, f"data: {{table: {table}}}\ntrain: {{epochs: 3, lr: 1e-3}}\nadapt: {{kind: lora, r: 4}}")
    config = Config.from_yaml(
        path, {"train.lr": "5e-4", "seed": 7, "adapt.alpha": 16, "model.dropout": 0, "train.epochs": "8"}
    )
    assert (config.train.lr, config.train.epochs, config.seed, config.model.dropout) == (5e-4, 8, 7, 0.0)
    assert (config.adapt.r, config.adapt.alpha) == (4, 16)


def test_another_strategy_drops_the_first_ones_fields(tmp_path: Path, table: Path) -> None:
    path = written(tmp_path, f"data: {{table: {table}}}\nadapt: {{kind: lora, r: 4, dropout: 0.5}}")
    assert Config.from_yaml(path, {"adapt.kind": "linear"}).adapt == STRATEGIES.get("linear")()
    config = Config.from_yaml(path, {"adapt.kind": "full", "adapt.layer_decay": 0.75})
    assert (config.adapt.kind, config.adapt.layer_decay) == ("full", 0.75)
    assert Config.from_yaml(path, {"adapt.kind": "lora"}).adapt.r == 4


def test_a_strategy_may_be_named_bare(tmp_path: Path, table: Path) -> None:
    path = written(tmp_path, f"data: {{table: {table}}}\nadapt: gradual")
    assert Config.from_yaml(path).adapt == STRATEGIES.get("gradual")()
    assert Config.from_yaml(path, {"adapt.patience": 7}).adapt.patience == 7
    assert Config.from_yaml(None, {"data.table": str(table), "adapt.r": 2}).adapt.r == 2
    assert Config.from_yaml(None, {"data.table": str(table), "adapt": "full"}).adapt.kind == "full"


@pytest.mark.parametrize("kind", ["linear", "gradual", "full", "lora"])
def test_written_and_read_it_is_the_same(tmp_path: Path, table: Path, kind: str) -> None:
    config = Config.parse(
        {
            "data": {"table": str(table), "classes": ["no", "on", "5e-4"]},
            "adapt": {"kind": kind},
            "train": {"lr": 1e-5, "warmup_epochs": 0.5},
            "augment": ["RandomHorizontalFlip", {"RandomRotation": {"degrees": 1e1}}],
            "out": str(tmp_path / "o"),
        }
    )
    assert Config.from_yaml(written(tmp_path, config.to_yaml())) == config


def test_numbers_as_people_write_them(tmp_path: Path, table: Path) -> None:
    path = written(
        tmp_path,
        f"data: {{table: {table}}}\ntrain: {{lr: 5e-4, weight_decay: 1E-2}}\n"
        "augment: [{RandomErasing: {p: 5e-1, value: 1.e+1}}]",
    )
    config = Config.from_yaml(path)
    assert (config.train.lr, config.train.weight_decay) == (5e-4, 1e-2)
    assert config.augment == ({"RandomErasing": {"p": 0.5, "value": 10.0}},)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: [", "line 1 is not YAML"),
        ("train: {epochs: 3}\nseed: 1\ntrain: {epochs: 4}", "line 3 is not YAML: 'train' stands twice"),
        ("- a\n- b", "must hold sections"),
        ("data: !!python/object/apply:os.system ['true']", "is not YAML"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config.from_yaml(written(tmp_path, text))


def test_a_missing_configuration_names_its_neighbour(tmp_path: Path) -> None:
    written(tmp_path, "seed: 1")
    with pytest.raises(ConfigError, match=r"Did you mean 'run\.yaml'"):
        Config.from_yaml(tmp_path / "rum.yaml")


def test_it_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        TrainConfig().epochs = 3  # type: ignore[misc]


def test_every_field_is_a_flag_with_help_and_a_default_that_fits() -> None:
    found = list(flags())
    assert all(flag.help and flag.type for flag in found)
    shown = {flag.path: flag for flag in found}
    assert shown["train.lr"].type == "float"
    assert shown["train.schedule"].type == "cosine|plateau|constant"
    assert shown["train.schedule"].default == "cosine"
    assert shown["data.images"].type == "path"
    assert shown["adapt.kind"].type == "linear|gradual|full|lora"
    assert shown["adapt.r"].help.startswith("(lora)")
    assert {f"train.{name}" for name in TrainConfig.model_fields} <= set(shown)
    for _, section in STRATEGIES:
        assert {f"adapt.{name}" for name in section.model_fields} <= set(shown)
    given = {f.path: f.default for f in found if f.default is not None and not f.path.startswith("adapt.")}
    assert Config.from_yaml(None, given | {"data.table": "x"}, check_files=False) == Config.from_yaml(
        None, {"data.table": "x"}, check_files=False
    )


def test_it_needs_no_torch() -> None:
    code = "import eyetune.config, sys; print([m for m in ('torch', 'numpy', 'pandas', 'peft') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}; {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"
