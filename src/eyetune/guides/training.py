"""The guides' commands that train: one network, three strategies side by side, a search."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from eyetune.config import flattened, override, read_yaml
from eyetune.errors import ConfigError
from eyetune.flags import parse
from eyetune.guides.door import Door, Given, Meant, Parser, fields
from eyetune.guides.settings import as_flags
from eyetune.older_config import BY_NAME, TYPES, is_older, read_keys, translate

TABLE, IMAGES = "data/aptos/train.csv", "data/aptos/train_images"
"""The data set of the guides, where a command names none."""

VIT = "vit_base_patch16_224"
"""The network of the fine-tuning guide."""

_DATA = {
    "data.data_csv": f"table with image names and labels (guides: {TABLE})",
    "data.data_img_dir": "folder of the images",
}
_USUAL = {
    "training.num_epochs": "epochs at most",
    "training.batch_size": "images a step",
    "training.learning_rate": "highest learning rate (default: the strategy's own)",
    "training.wandb": "log to Weights & Biases too",
    "seed": "seed of splits, weights and order",
    "output_dir": "the run folder",
}


def given_keys(given: Given) -> dict[str, Any]:
    """Those options that are keys of the guides' YAML, by the key's name."""
    return {name: value for name, value in given.items() if name in BY_NAME and value is not None}


def read_file(path: str) -> dict[str, Any]:
    """The keys that a YAML file of the guides sets. Raises ConfigError for any other file, and unknown keys."""
    content = read_yaml(Path(path))
    if content and not is_older(content):
        raise ConfigError(f"{path} is a configuration of EyeTune itself: eyetune finetune {path}")
    return read_keys(content, path)


def put(
    said: Mapping[str, Any], source: str, rest: list[str], adapt: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], list[str]]:
    """The guides' keys and flags of ours, which win, as nested sections, and notes.

    `adapt` stands in place of what the keys say of it. Raises ConfigError for what is unknown.
    """
    translation = translate(said, source)
    content = translation.content | ({} if adapt is None else {"adapt": dict(adapt)})
    warning = translation.warning(source)
    return override(content, parse(rest).overrides), [warning] if warning else []


# -- one network -------------------------------------------------------------------------------------------------------


def _with_config(parser: Parser, default: str, shown: Mapping[str, str]) -> None:
    parser.add_argument(
        "--config",
        default=default,
        metavar="FILE",
        help="YAML of the guides, each key of it an option too (%(default)s)",
    )
    parser.add_keys({**shown, **_DATA, **_USUAL})


def _declare_baseline(parser: Parser) -> None:
    shown = {"model.model_name": "any timm name", "model.pretrained": "false: an untrained network"}
    _with_config(parser, "configs/default_config.yaml", shown)


def _declare_lora(parser: Parser) -> None:
    shown = {
        "model.checkpoint_path": "the published weights",
        "model.model_variant": "large (RETFound) or green (RETFound-Green)",
        "model.lora_r": "rank of the adapters",
        "model.lora_alpha": "weight of the adapters",
    }
    _with_config(parser, "configs/retfound_lora_config.yaml", shown)


def _trains(kinds: tuple[str, ...], otherwise: str) -> Callable[[Given, list[str]], Meant]:
    """The meaning of a script that trains a model of one of `kinds`, as its YAML says; the first, where it does not."""

    def meaning(given: Given, rest: list[str]) -> Meant:
        said = {"model.type": kinds[0]} | read_file(given["config"]) | given_keys(given)
        if TYPES.get(str(said["model.type"]).lower(), kinds[0]) not in kinds:
            raise ConfigError(f"{given['config']}: model.type {said['model.type']} is trained by {otherwise}.")
        content, notes = put(said, given["config"], rest)
        return Meant(["finetune", *as_flags(content)], notes)

    return meaning


TRAIN_BASELINE = Door(
    script="scripts/train_baseline.py",
    about="Train an ordinary vision network (any timm name) on graded photographs: the baseline of the guides.",
    verb="finetune",
    declare=_declare_baseline,
    meaning=_trains(("baseline",), "scripts/train_retfound_lora.py"),
    passed=fields,
)

TRAIN_RETFOUND_LORA = Door(
    script="scripts/train_retfound_lora.py",
    about="Adapt RETFound or RETFound-Green to graded photographs by LoRA.",
    verb="finetune",
    declare=_declare_lora,
    meaning=_trains(("retfound_lora", "retfound"), "scripts/train_baseline.py"),
    passed=fields,
)


# -- one strategy of three ---------------------------------------------------------------------------------------------


def _declare_strategies(parser: Parser, epochs: str, patience: str, decay: str) -> None:
    parser.add_argument("--linear_probe_epochs", type=int, metavar="N", help=f"epochs of linear probing ({epochs})")
    parser.add_argument("--gradual_patience", type=int, metavar="N", help=f"epochs without a gain a phase ({patience})")
    parser.add_argument("--llrd_decay", type=float, metavar="X", help=f"rate of a layer over the one above ({decay})")
    parser.add_argument("--custom_weights_path", metavar="FILE", help="weights of the network (default: timm's)")
    parser.add_argument("--checkpoint_key", metavar="NAME", help="not needed: the entry of FILE is found by itself")
    parser.add_argument("--experiment_tag", metavar="TAG", help="the run folder is results/TAG")
    parser.add_keys({"model.model_name": f"any timm name, or a backbone of EyeTune ({VIT})", **_DATA, **_USUAL})


def _declare_classification(parser: Parser) -> None:
    parser.add_argument("--ft_strategy", choices=("linear", "gradual", "full"), default="full", help="(%(default)s)")
    _declare_strategies(parser, "10", "3", "0.9")


def network(given: Given, said: dict[str, Any]) -> list[str]:
    """Set network, weights, data and folder in `said`, as the fine-tuning guide has them; returns notes.

    The guide loads VisionFM's file into timm's vit_base_patch16_224. A file that a backbone publishes is loaded as that
    backbone, with its own normalisation and pooling.
    """
    said.setdefault("model.type", "baseline")
    said.setdefault("model.name", VIT)
    said.setdefault("data.train_csv", TABLE)
    if said["data.train_csv"] == TABLE:
        said.setdefault("data.train_img_dir", IMAGES)
    if given["experiment_tag"] is not None:
        said.setdefault("output_dir", f"results/{given['experiment_tag']}")
    notes = []
    if (path := given["custom_weights_path"]) is not None:
        from eyetune.backbones.spec import BACKBONES

        said["model.checkpoint_path"] = path
        published = next((name for name, spec in BACKBONES if spec.publishes(Path(path))), None)
        if published not in (None, said["model.name"]):
            notes.append(
                f"{path} is what {published} publishes: it is trained as {published}, with its own normalisation and "
                f"pooling, not as {said['model.name']}."
            )
            said["model.name"] = published
    if given["checkpoint_key"] is not None:
        notes.append("--checkpoint_key: means nothing here, the entry is found by itself (load_report.json says which)")
    return notes


def _classification(given: Given, rest: list[str]) -> Meant:
    said, strategy = given_keys(given), given["ft_strategy"]
    notes = network(given, said)
    adapt: dict[str, Any] = {"kind": strategy}
    belongs = {"linear_probe_epochs": ("linear",), "gradual_patience": ("gradual",), "llrd_decay": ("gradual", "full")}
    unused = [f"--{name}" for name, owners in belongs.items() if given[name] is not None and strategy not in owners]
    if strategy == "linear":
        if "training.num_epochs" in said:
            unused.append("--num_epochs (--linear_probe_epochs says it)")
        epochs = 10 if given["linear_probe_epochs"] is None else given["linear_probe_epochs"]
        said["training.num_epochs"] = adapt["max_epochs"] = epochs
    elif given["llrd_decay"] is not None:
        adapt["layer_decay"] = given["llrd_decay"]
    if strategy == "gradual" and given["gradual_patience"] is not None:
        adapt["patience"] = given["gradual_patience"]
    if unused:
        notes.append(f"--ft_strategy {strategy}: means nothing here, left out: {', '.join(unused)}")
    content, more = put(said, "the command line", rest, adapt)
    return Meant(["finetune", *as_flags(content)], [*notes, *more])


TRAIN_CLASSIFICATION = Door(
    script="train_classification.py",
    about="Fine-tune a network by linear probing, gradual unfreezing, or all layers at rates that fall with depth.",
    verb="finetune",
    declare=_declare_classification,
    meaning=_classification,
    passed=fields,
)


# -- all three ---------------------------------------------------------------------------------------------------------

STRATEGIES = ("linear", "gradual", "full")


def _declare_comparison(parser: Parser) -> None:
    parser.add_argument("--strategies", default=",".join(STRATEGIES), metavar="A,B,…", help="which (%(default)s)")
    _declare_strategies(parser, "15", "5", "0.85")


def _comparison(given: Given, rest: list[str]) -> Meant:
    """Each strategy with the epochs that the guide gives it: linear 15, gradual 45, full 30."""
    said = {"output_dir": "results/fine_tuning_comparison"} | given_keys(given)
    epochs = said.pop("training.num_epochs", None)
    notes = network(given, said)
    content, more = put(said, "the command line", [])
    model = content["model"]
    backbone = "=".join(filter(None, (model.pop("backbone"), model.pop("weights", None))))
    del content["adapt"]
    probe = given["linear_probe_epochs"] or 15
    decay = given["llrd_decay"] or 0.85
    own: dict[str, dict[str, Any]] = {
        "linear": {"max_epochs": probe, "train": {"epochs": probe}},
        "gradual": {"patience": given["gradual_patience"] or 5, "train": {"epochs": epochs or 45}},
        "full": {"layer_decay": decay, "train": {"epochs": epochs or 30}},
    }
    chosen = {name: own[name] for name in given["strategies"].split(",") if name in own}
    words = ["compare", "--strategies", given["strategies"], "--budget", "own", "--backbones", backbone]
    return Meant([*words, *as_flags(chosen), *as_flags(content), *rest], [*notes, *more])


def _of_compare() -> set[str]:
    from eyetune.adapt.strategy import STRATEGIES as KINDS

    own = {f"{name}.{field}" for name, kind in KINDS for field in (*kind.model_fields, *fields())}
    return {"seeds", "data", "map"} | fields() | own


FINE_TUNING_COMPARISON = Door(
    script="scripts/run_fine_tuning_comparison.py",
    about="Train the same network by linear probing, gradual unfreezing and full fine-tuning, and compare the results.",
    verb="compare",
    declare=_declare_comparison,
    meaning=_comparison,
    passed=_of_compare,
)


# -- a search ----------------------------------------------------------------------------------------------------------


def _declare_search(parser: Parser) -> None:
    parser.add_argument("--config", metavar="FILE", help="YAML of the guides, for what is not searched")
    parser.add_argument(
        "--n_trials", type=int, default=50, metavar="N", help="how many settings are tried (%(default)s)"
    )
    parser.add_argument("--study_name", metavar="NAME", help="the study is kept in results/NAME")
    shown = {"model.checkpoint_path": "the published weights", "model.model_variant": "large or green"}
    parser.add_keys({**shown, **_DATA, **_USUAL})


def _search(given: Given, rest: list[str]) -> Meant:
    """What a flag says is not searched. So the file goes along as it is, and flags say only what is said beside it."""
    filed = read_file(given["config"]) if given["config"] else {}
    said = filed | {"output_dir": f"results/{given['study_name'] or 'hyperparameter_search'}"} | given_keys(given)
    if given["config"] is None:
        said.setdefault("model.type", "retfound_lora" if "model.checkpoint_path" in said else "baseline")
    before = flattened(translate(filed, given["config"]).content) if given["config"] else {}
    content, notes = put(said, given["config"] or "the command line", [])
    flags = as_flags({path: value for path, value in flattened(content).items() if before.get(path, _NEW) != value})
    if given["config"] is None:
        return Meant(["search", "--trials", str(given["n_trials"]), *flags, *rest], notes)
    # What of the file means nothing is named by the search when it reads the file.
    return Meant(["search", given["config"], "--trials", str(given["n_trials"]), *flags, *rest])


_NEW = object()


def _of_search() -> set[str]:
    from eyetune.searching.plan import OPTIONS

    return {*OPTIONS} | fields() | {f"space.{name}" for name in fields()}


HYPERPARAMETER_SEARCH = Door(
    script="scripts/hyperparameter_search.py",
    about="Look for good settings with Optuna: rank and weight of LoRA, learning rate, batch size, dropout.",
    verb="search",
    declare=_declare_search,
    meaning=_search,
    passed=_of_search,
)
