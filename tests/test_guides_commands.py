"""The commands and the YAML of the older guides lead to what they say."""

from __future__ import annotations

import contextlib
import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from docs_kit import blocks_of
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_house import HEAVY
from train_kit import photographs

from eyetune.cli import main
from eyetune.comparison.plan import read_plan
from eyetune.config import Config
from eyetune.errors import ConfigError
from eyetune.flags import parse
from eyetune.guides.door import Door
from eyetune.guides.settings import GuideConfig, as_flags, read_guide_config, to_words
from eyetune.older_config import BY_NAME, KEYS, is_older, read_keys, translate
from eyetune.searching.plan import read_plan as read_search

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
        ("model: {type: lora, num_classes: five}", "must be a whole number from 2 to 1000, got 'five'"),
        ("model: {type: lora, num_classes: 1000000000}", "from 2 to 1000, got 1000000000"),
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


PRINTABLE = st.text(st.characters(exclude_categories=("Cc", "Cs", "Co", "Cn", "Zl", "Zp")))


@settings(max_examples=200, deadline=None)
@given(st.one_of(PRINTABLE, st.integers(), st.lists(PRINTABLE, min_size=1, max_size=3), st.booleans()))
@example("1e-3")
@example("--train.lr")
@example("it's")
@example(["qkv", "proj"])
@example(["a,b"])
def test_flags_are_read_back_as_they_were(value: Any) -> None:
    name = "train.wandb" if isinstance(value, bool) else "x"
    found = parse(
        shlex.split(shlex.join(as_flags({"train": {"wandb": value}} if isinstance(value, bool) else {"x": value})))
    )
    said = found.overrides[name]
    # A plain list is written with commas, which the fields that take lists read.
    assert (said.split(",") if isinstance(value, list) and isinstance(said, str) else said) == value


# -- the commands ------------------------------------------------------------------------------------------------------

SCRIPTS = [
    *(
        ROOT / "scripts" / f"{name}.py"
        for name in (
            "train_baseline",
            "train_retfound_lora",
            "evaluate_cross_dataset",
            "hyperparameter_search",
            "run_fine_tuning_comparison",
            "prepare_retclip_data_streaming",
            "validate_data",
        )
    ),
    ROOT / "train_classification.py",
]


def door(name: str) -> Door:
    """The door that a script opens."""
    text = next(path for path in SCRIPTS if path.stem == name).read_text(encoding="utf-8")
    module, constant = re.search(r"from (eyetune\.guides\.\w+) import ([A-Z_]+)", text).groups()  # type: ignore[union-attr]
    return getattr(importlib.import_module(module), constant)


def words(name: str, line: str, root: Path = ROOT) -> str:
    """What a command line of the guides comes to."""
    with contextlib.chdir(root):
        return shlex.join(door(name).translate(shlex.split(line)).words)


def flag(said: str, name: str) -> str:
    """The value behind a flag."""
    parts = shlex.split(said)
    return parts[parts.index(f"--{name}") + 1]


def flag_names(words: list[str]) -> list[str]:
    return [word.removeprefix("--") for word in words if word.startswith("--")]


def test_scripts_are_thin() -> None:
    files = [*(ROOT / "scripts").glob("*.py"), ROOT / "train_classification.py"]
    assert set(SCRIPTS) <= set(files)
    assert {path.name: length for path in files if (length := len(path.read_text().splitlines())) > 40} == {}


def test_help_is_quick_and_says_where_it_leads() -> None:
    """All in one process, which loads nothing heavy."""
    program = (
        "import runpy, sys\n"
        "for path in sys.argv[1:]:\n"
        "    sys.argv = [path, '--help']\n"
        "    try: runpy.run_path(path, run_name='__main__')\n"
        "    except SystemExit as end: assert not end.code, end.code\n"
        f"sys.exit(str([name for name in {HEAVY!r} if name in sys.modules] or ''))"
    )
    done = subprocess.run([sys.executable, "-c", program, *map(str, SCRIPTS)], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr  # with an empty text
    assert done.stderr.strip() == ""
    assert done.stdout.count("usage: python ") == done.stdout.count("Leads to: eyetune ") == len(SCRIPTS)


def test_train_baseline() -> None:
    said = words("train_baseline", "--config configs/default_config.yaml")
    assert said.startswith("finetune ")
    assert flag(said, "model.backbone") == "resnet50"
    assert flag(said, "out") == "results/baseline"


def test_train_retfound_lora_large_and_green() -> None:
    large = words(
        "train_retfound_lora",
        "--checkpoint_path models/RETFound_cfp_weights.pth --config configs/retfound_lora_config.yaml --wandb",
    )
    assert flag(large, "model.backbone") == "retfound"
    assert "--train.wandb" in large
    green = words(
        "train_retfound_lora",
        "--checkpoint_path elsewhere/green.pth --config configs/retfound_green_lora_config.yaml --model_variant green",
    )
    assert flag(green, "model.backbone") == "retfound-green"
    assert flag(green, "model.weights") == "elsewhere/green.pth"
    assert flag(green, "out") == "results/retfound_green_lora"


def test_options_win_over_the_file_and_our_flags_over_both() -> None:
    said = words(
        "train_retfound_lora", "--num-epochs 3 --lora_r=16 --no-data.crop --train.epochs 4 --pretrained --seed 7"
    )
    assert (flag(said, "train.epochs"), flag(said, "adapt.r"), flag(said, "seed")) == ("4", "16", "7")
    assert said.count("--train.epochs") == 1
    assert "--no-data.crop" in said


@pytest.mark.parametrize(
    ("line", "wanted", "left_out"),
    [
        ("--ft_strategy linear --linear_probe_epochs 15", "--adapt.kind linear --adapt.max_epochs 15", ""),
        ("--ft_strategy linear --llrd_decay 0.8", "--adapt.kind linear --adapt.max_epochs 10", "--llrd_decay"),
        ("--ft_strategy gradual --gradual_patience 5 --num_epochs 45", "--adapt.kind gradual --adapt.patience 5", ""),
        ("--ft_strategy full --llrd_decay 0.85 --num_epochs 30", "--adapt.kind full --adapt.layer_decay 0.85", ""),
        ("--ft_strategy full --gradual_patience 5", "--adapt.kind full", "--gradual_patience"),
        ("--ft_strategy full --checkpoint_key teacher", "--adapt.kind full", "--checkpoint_key"),
    ],
)
def test_train_classification(line: str, wanted: str, left_out: str) -> None:
    meant = door("train_classification").translate(shlex.split(f"{line} --experiment_tag tag"))
    said = shlex.join(meant.words)
    assert wanted in said
    assert (flag(said, "out"), flag(said, "data.table")) == ("results/tag", "data/aptos/train.csv")
    assert flag(said, "model.backbone") == "vit_base_patch16_224"
    assert len(meant.notes) == bool(left_out)
    assert left_out in "".join(meant.notes)
    assert parse(meant.words[1:]).overrides  # flags that finetune takes


def test_a_published_file_is_trained_as_the_network_it_is_of() -> None:
    meant = door("train_classification").translate(
        shlex.split("--model_name vit_base_patch16_224 --custom_weights_path models/VFM_Fundus_weights.pth")
    )
    assert flag(shlex.join(meant.words), "model.backbone") == "visionfm"
    assert "what visionfm publishes" in meant.notes[0]
    meant = door("train_classification").translate(["--custom_weights_path", "own.pth"])
    assert flag(shlex.join(meant.words), "model.backbone") == "vit_base_patch16_224"


def test_comparison_is_one_that_compare_takes(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("image,label\na.png,0\n", encoding="utf-8")
    meant = door("run_fine_tuning_comparison").translate(
        [
            "--model_name",
            "nano",
            "--data_csv",
            str(tmp_path / "labels.csv"),
            "--seeds",
            "0,1",
            "--full.train.lr",
            "5e-5",
        ]
    )
    plan = read_plan(meant.words[1:])
    assert {arm.name: plan.config(arm).train.epochs for arm in plan.arms} == {"linear": 15, "gradual": 45, "full": 30}
    full = next(plan.config(arm) for arm in plan.arms if arm.name == "full")
    assert (full.train.lr, full.adapt.layer_decay, plan.seeds) == (5e-5, 0.85, (0, 1))


def test_hyperparameter_search() -> None:
    said = words(
        "hyperparameter_search",
        "--checkpoint-path models/RETFound_cfp_weights.pth --data-csv data/aptos/train.csv "
        "--data-img-dir data/aptos/train_images --n-trials 50 --wandb --storage sqlite:///x.db",
    )
    assert said.startswith("search --trials 50 ")
    assert (flag(said, "model.backbone"), flag(said, "adapt.kind")) == ("retfound", "lora")
    assert (flag(said, "data.table"), flag(said, "storage")) == ("data/aptos/train.csv", "sqlite:///x.db")
    assert "--train.wandb" in said


def test_validate_data() -> None:
    said = words("validate_data", "--csv-file data/aptos/train.csv --img_dir data/aptos/train_images --workers 2")
    assert said == "data audit data/aptos/train.csv --images data/aptos/train_images --workers 2"
    said = words("validate_data", "--config configs/default_config.yaml --csv_file other.csv")
    assert said == (
        "data audit other.csv --images data/aptos/train_images --image-column id_code --label-column diagnosis"
    )
    with pytest.raises(ConfigError, match="--csv_file: which table"):
        words("validate_data", "")


def test_a_search_leaves_open_what_only_the_file_says(tmp_path: Path) -> None:
    table = tmp_path / "labels.csv"
    table.write_text("image,label\na.png,0\n", encoding="utf-8")
    weights = tmp_path / "green.pth"
    weights.touch()
    line = f"--config configs/retfound_green_lora_config.yaml --checkpoint_path {weights} --data_csv {table}"
    with contextlib.chdir(ROOT):
        meant = door("hyperparameter_search").translate(
            shlex.split(f"{line} --data_img_dir {tmp_path} --n_trials 3 --lora_alpha 16")
        )
        plan = read_search(meant.words[1:])
    assert meant.words[1] == "configs/retfound_green_lora_config.yaml"
    assert set(flag_names(meant.words)) == {
        "trials",
        "model.weights",
        "data.table",
        "data.images",
        "out",
        "adapt.alpha",
    }
    assert (plan.trials, plan.base.model.backbone, plan.base.train.epochs) == (3, "retfound-green", 20)
    assert "adapt.r" in plan.space.fields
    assert "adapt.alpha" not in plan.space.fields


def test_prepare_pairs() -> None:
    line = "--csv_path train.csv --hf_dataset_name Peacein/color-fundus-eye --output_dir data --resume"
    said = words("prepare_retclip_data_streaming", f"{line} --split train")
    assert said == "clip prepare train.csv --dataset Peacein/color-fundus-eye --out data --test-share 0"
    assert words("prepare_retclip_data_streaming", f"{line} --test_csv_path test.csv").endswith("--test test.csv")
    said = words("prepare_retclip_data_streaming", f"{line} --split test --repeats each")
    assert said.endswith("--split test --out data/test --repeats each")
    assert "secret" not in words("prepare_retclip_data_streaming", f"{line} --hf_token secret")


def make_run(root: Path) -> Path:
    run = root / "results" / "retfound_lora"
    (run / "checkpoints" / "best").mkdir(parents=True)
    config = Config.from_yaml(ROOT / "configs" / "retfound_lora_config.yaml", check_files=False)
    (run / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    (run / "checkpoints" / "best" / "model.safetensors").touch()
    return run


def test_a_checkpoint_in_a_run_folder_leads_to_the_run(tmp_path: Path) -> None:
    make_run(tmp_path)
    for inside in ("checkpoints/best_model.pth", "checkpoints/best/model.safetensors", "checkpoints", ""):
        said = words(
            "evaluate_cross_dataset",
            f"--checkpoint results/retfound_lora/{inside} --model_type lora "
            "--datasets APTOS:data/aptos/test.csv:data/aptos/images Other:hf:name",
            tmp_path,
        )
        assert said == (
            "evaluate results/retfound_lora --data APTOS=data/aptos/test.csv:data/aptos/images --data Other=hf:name"
        )


def test_what_the_run_knows_better_is_said(tmp_path: Path) -> None:
    make_run(tmp_path)
    with contextlib.chdir(tmp_path):
        meant = door("evaluate_cross_dataset").translate(
            shlex.split(
                "--checkpoint results/retfound_lora --model_type baseline --model_variant green --datasets a:b:c"
            )
        )
    assert ["was trained by lora" in meant.notes[0], "is of retfound;" in meant.notes[1]] == [True, True]
    assert "--backbone" not in meant.words


def test_a_file_of_another_program_is_evaluated_itself(tmp_path: Path) -> None:
    (make_run(tmp_path) / "checkpoints" / "best_model.pth").touch()
    said = words(
        "evaluate_cross_dataset",
        "--checkpoint results/retfound_lora/checkpoints/best_model.pth --datasets a:b:c --model_variant green "
        "--checkpoint_path base.pth --output_dir runs/old --by sex",
        tmp_path,
    )
    assert said == (
        "evaluate results/retfound_lora/checkpoints/best_model.pth --data a=b:c --backbone retfound-green "
        "--out runs/old --weights base.pth --by sex"
    )


def test_the_commands_that_the_page_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    shown = [words for block in blocks_of(ROOT / "docs" / "older-guides.md") for words in block.commands()]
    ran = [door(Path(words[1]).stem).translate(words[2:]) for words in shown if words[0] == "python"]
    assert len(ran) > 10
    for meant in ran:
        assert meant.notes == [] or "what visionfm publishes" in meant.notes[0] or meant.words[0] == "clip"


@pytest.mark.parametrize(
    ("name", "line", "said"),
    [
        ("train_baseline", "--num_epoch 3", "--num_epoch: unknown. Did you mean 'num_epochs'? See --help."),
        ("train_baseline", "stray", "did not expect 'stray'. See --help."),
        ("train_baseline", "--train.epochs 3 4", "did not expect '4'. See --help."),
        (
            "train_baseline",
            "--config configs/retfound_lora_config.yaml",
            "is trained by scripts/train_retfound_lora.py.",
        ),
        ("train_baseline", "--config examples/strategies.yaml", "is a configuration of EyeTune itself"),
        ("train_baseline", "--config configs/defalt_config.yaml", "Did you mean 'default_config.yaml'?"),
        ("train_retfound_lora", "--model_variant gren", "Did you mean 'green'?"),
        ("train_retfound_lora", "--checkpoint_path", "expected one argument. See --help."),
        ("train_classification", "--ft_strategy linar", "invalid choice: 'linar'"),
        ("train_classification", "--linear_probe_epochs x", "invalid int value: 'x'"),
        ("evaluate_cross_dataset", "--datasets a:b:c", "required: --checkpoint"),
        ("evaluate_cross_dataset", "--checkpoint x --datset a:b:c", "Did you mean 'datasets'?"),
        ("evaluate_cross_dataset", "--checkpoint x --datasets a", "--datasets a: write NAME:CSV:IMAGES, as in "),
        ("evaluate_cross_dataset", "--checkpoint x --model_type lor --datasets a:b:c", "Did you mean 'lora'?"),
        ("prepare_retclip_data_streaming", "--csv_path a", "required: --output_dir"),
        ("hyperparameter_search", "--n-trials many", "invalid int value: 'many'"),
    ],
)
def test_a_mistake_is_one_message_and_two(
    name: str, line: str, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert door(name).enter(shlex.split(line)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"{name}.py: ")
    assert said in err
    assert "Traceback" not in err


def test_traceback_is_handed_on(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert door("train_baseline").enter(["--data_csv", "nowhere.csv", "--traceback"]) == 2
    assert "ConfigError" in capsys.readouterr().err


def test_a_command_shows_what_it_comes_to_and_does_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Down to eyetune's own message, here about a table whose name the shell has to quote."""
    monkeypatch.chdir(ROOT)
    line = ["--data_csv", str(tmp_path / "my labels.csv"), "--data_img_dir", str(tmp_path)]
    assert door("train_baseline").enter(line) == 2
    out, err = capsys.readouterr()
    assert out.startswith("In EyeTune's own words:\n  eyetune finetune ")
    assert f"--data.table '{tmp_path}/my labels.csv'" in out
    assert main(shlex.split(out.splitlines()[1])[1:]) == 2
    assert capsys.readouterr().err == err


@pytest.mark.slow
def test_from_training_to_evaluation_in_the_words_of_the_guides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is trained is found again under the name that the guides' evaluation gives it."""
    monkeypatch.chdir(tmp_path)
    photographs(tmp_path / "data" / "aptos" / "train_images", 24)
    rows = ["id_code,diagnosis", *(f"{number},{number % 2}" for number in range(24))]
    (tmp_path / "data" / "aptos" / "train.csv").write_text("\n".join(rows), encoding="utf-8")
    train = (
        "--ft_strategy linear --linear_probe_epochs 1 --model_name nano --img_size 32 --batch_size 8 --num_workers 0"
    )
    assert door("train_classification").enter([*shlex.split(train), "--experiment_tag", "probe"]) == 0
    table = "data/aptos/train.csv:data/aptos/train_images"
    line = (
        "--checkpoint results/probe/checkpoints/best_model.pth --model_type baseline --num_workers 0 "
        f"--datasets A:{table} --datasets B:{table}"
    )
    assert door("evaluate_cross_dataset").enter(shlex.split(line)) == 0
    datasets = json.loads((tmp_path / "results" / "probe" / "metrics.json").read_text(encoding="utf-8"))["datasets"]
    assert datasets["A"]["n"] == datasets["B"]["n"] == 24
    assert datasets["A"]["metrics"] == datasets["B"]["metrics"]
