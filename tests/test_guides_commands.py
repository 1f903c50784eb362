"""The commands and the YAML of the older guides lead to what they say."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from eyetune.config import Config
from eyetune.errors import ConfigError
from eyetune.flags import parse
from eyetune.guides.settings import GuideConfig, as_flags, read_guide_config, to_words
from eyetune.older_config import BY_NAME, KEYS, is_older, read_keys, translate

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def ours(said: dict[str, Any]) -> Config:
    """What the guides' keys come to."""
    return Config.parse(translate({"data.train_csv": "x.csv"} | said, "x.yaml").content, check_files=False)


def write(folder: Path, text: str) -> Path:
    path = folder / "guide.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# -- the YAML ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_file_and_words_come_to_the_same(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(shlex.join(to_words(read_guide_config(path))))
    from_words = Config.from_yaml(None, parse(words).overrides, check_files=False)
    assert from_words == Config.from_yaml(path, check_files=False)
    assert from_words.data.classes == ("0", "1", "2", "3", "4")
    assert capsys.readouterr().err == ""  # every key of our own files means something


def test_the_recommended_setting_of_the_guides() -> None:
    config = Config.from_yaml(ROOT / "configs" / "retfound_lora_config.yaml", check_files=False)
    assert (config.model.backbone, config.model.pool, config.adapt.kind) == ("retfound", "cls", "lora")
    assert config.adapt.model_dump(include={"r", "alpha", "dropout", "targets"}) == {
        "r": 8,
        "alpha": 32,
        "dropout": 0.1,
        "targets": ("qkv",),
    }
    assert (config.train.lr, config.train.batch_size, config.out) == (5e-4, 48, Path("results/retfound_lora"))


@pytest.mark.parametrize("kind", ["baseline", "retfound", "retfound_lora"])
def test_defaults_are_what_holds_when_nothing_is_said(kind: str) -> None:
    meant = {key.name: key.default for key in KEYS if not key.gone and key.default is not None}
    # Said, these settle what else the data or the network would: the classes, the pooling, the layers.
    settled = {name: meant[name] for name in ("model.num_classes", "model.global_pool", "model.target_modules")}
    assert ours(meant | {"model.type": kind}) == ours(settled | {"model.type": kind})


@pytest.mark.parametrize(
    ("said", "field", "value"),
    [
        ({"model.name": "vit_base_patch16_224"}, "model.backbone", "vit_base_patch16_224"),
        ({"model.name": "resnet18", "model.pretrained": False}, "model.weights", "random"),
        ({"model.name": "resnet18", "model.pretrained": True}, "model.weights", "hub"),
        ({"model.name": "resnet18"}, "adapt.layer_decay", 1.0),
        ({"model.name": "resnet18", "model.freeze_backbone": True}, "adapt.kind", "linear"),
        ({"model.freeze_backbone": True, "training.num_epochs": 33}, "adapt.max_epochs", 33),
        ({"model.type": "retfound"}, "adapt.kind", "full"),
        ({"model.type": "retfound", "model.global_pool": True}, "model.pool", "avg"),
        ({"model.type": "lora", "model.model_variant": "green"}, "model.backbone", "retfound-green"),
        ({"model.type": "lora", "model.model_variant": "green"}, "out", Path("results/retfound_green_lora")),
        ({"model.lora_r": 16}, "adapt.r", 16),
        ({"model.checkpoint_path": "x.pth"}, "adapt.kind", "full"),
        ({"training.scheduler": "ReduceLROnPlateau"}, "train.schedule", "plateau"),
        ({"training.scheduler": "CosineAnnealingLR"}, "train.schedule", "cosine"),
        ({"training.mixed_precision": False}, "precision", "fp32"),
        ({"training.use_class_weights": True}, "train.balance", "weighted"),
        ({"training.augmentation": "strong"}, "augment", "strong"),
        ({"model.num_classes": 2}, "data.classes", ("0", "1")),
    ],
)
def test_what_a_key_comes_to(said: dict[str, Any], field: str, value: Any) -> None:
    config: Any = ours(said)
    for name in field.split("."):
        config = getattr(config, name)
    assert config == value


def test_a_key_without_a_meaning_is_named_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(
        tmp_path,
        "model: {type: retfound, lora_r: 8}\ntraining: {optimizer: sgd, epochs: 3}\n"
        "data: {train_csv: x.csv, val_csv: y.csv}\nwandb: {enabled: false, project: eyes}\n",
    )
    assert Config.from_yaml(path, check_files=False).train.epochs == 3
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    for key in ("model.lora_r", "training.optimizer", "data.val_csv", "wandb.project"):
        assert said.count(key) == 1
    assert "train_csv" not in said


def test_what_nobody_knows_is_an_error_with_the_nearest_name(tmp_path: Path) -> None:
    path = write(
        tmp_path, "model: {type: lora, lora_rr: 3}\ntrainig: {epochs: 3}\ntraining: {lr: 1, learning_rate: 2}\n"
    )
    with pytest.raises(ConfigError) as caught:
        Config.from_yaml(path)
    said = str(caught.value)
    assert said.startswith(f"3 faults in {path}:")
    assert "model.lora_rr: unknown. Did you mean 'model.lora_r'?" in said
    assert "trainig: unknown. Did you mean 'training'?" in said
    assert "training.lr says 1, this 2" in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: {type: retfond_lora}", "Did you mean 'retfound_lora'?"),
        ("model: {type: lora, model_variant: gren}", "Did you mean 'green'?"),
        ("model: {type: lora, num_classes: five}", "must be a whole number above 1, got 'five'"),
        ("training: 3", "training: must be a section with keys of its own, got 3"),
    ],
)
def test_a_wrong_value_is_an_error(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.from_yaml(write(tmp_path, text))
    assert said in str(caught.value)


@pytest.mark.parametrize("content", [{}, {"model": {"dropout": 0.1}}, {"data": {"table": "x"}, "training": {}}])
def test_our_own_configuration_is_not_taken_for_theirs(content: dict[str, Any]) -> None:
    assert not is_older(content)


def test_every_spelling_is_of_one_key() -> None:
    spellings = [name for key in KEYS for name in (key.name, *key.others)]
    assert len(spellings) == len(set(spellings)) == len(BY_NAME)
    assert {key.to for key in KEYS if key.to and "." in key.to} <= {
        f"{section}.{name}"
        for section in ("model", "data", "train", "adapt")
        for name in (*Config.parse({"data": {"table": "x"}}, check_files=False).model_dump()[section],)
    }


def test_attributes_are_read_set_and_checked() -> None:
    config = GuideConfig(read_keys({"model": {"type": "lora"}, "training": {"lr": 1e-5}}, "x.yaml"))
    assert (config.training.learning_rate, config.training.lr, config.training.batch_size) == (1e-5, 1e-5, 32)
    assert config.model.checkpoint_path is None
    config.training.batch_size = 7
    config.model.checkpoint_path = "it's.pth"
    words = to_words(config)
    assert words[words.index("--train.batch_size") + 1] == "7"
    assert parse(words).overrides["model.weights"] == "it's.pth"
    assert config.to_dict()["training"]["batch_size"] == 7
    with pytest.raises(AttributeError, match=r"no training\.batchsize\. Did you mean 'batch_size'"):
        config.training.batchsize = 3


@pytest.mark.parametrize("value", ["plain", "1e-3", "yes", "a: b", "null", "x,y", True, False, 3, 0.25, ["a", "b,c"]])
def test_flags_are_read_back_as_they_were(value: Any) -> None:
    words = as_flags(
        {"train": {"wandb": value}, "model": {"weights": "w"}} if isinstance(value, bool) else {"x": value}
    )
    assert (
        parse(shlex.split(shlex.join(words))).overrides.get("train.wandb" if isinstance(value, bool) else "x") == value
    )
