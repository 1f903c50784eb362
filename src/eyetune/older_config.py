"""The YAML of the older guides (`model.type`, `lora_r`, `training.num_epochs`, …), read as it stands.

:data:`KEYS` lists every key that the guides and the programs around them know, and the field that means the same here.
A key that means nothing here any more is named, with the reason; one that nobody knows is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from eyetune.errors import ConfigError, did_you_mean


class Key(NamedTuple):
    """One key of the guides."""

    name: str
    """Dotted path."""
    to: str | None = None
    """The field that it sets here; None where :func:`translate` decides, or where it means nothing any more."""
    default: Any = None
    """What holds where it is not given."""
    others: tuple[str, ...] = ()
    """Other spellings of it."""
    gone: str = ""
    """Why it means nothing here."""
    means: str = ""
    """What it sets here, in words, where :func:`translate` decides."""
    read: Callable[[Any], Any] = lambda value: value
    """From the guides' value to ours."""


def _one_of(values: Mapping[str, str]) -> Callable[[Any], Any]:
    """Their word to ours; another value stays as it is, for the configuration to refuse."""
    return lambda value: values.get(str(value).lower().replace("_", ""), value)


_SCHEDULES = {
    "cosine": "cosine",
    "cosineannealing": "cosine",
    "cosineannealinglr": "cosine",
    "plateau": "plateau",
    "reducelronplateau": "plateau",
    "none": "constant",
    "constant": "constant",
}
_OWN_SPLITS = "there is one table: its split column, or data.val_split, cuts it; score others with eyetune evaluate"
_OWN_NUMBERS = "every backbone brings its own normalisation"

KEYS = (
    Key(
        "model.type",
        means="retfound_lora: `adapt.kind lora`; baseline and retfound: `adapt.kind full`, all layers at one rate",
    ),
    Key(
        "model.name",
        default="resnet50",
        others=("model.model_name", "model.architecture"),
        means="`model.backbone` of a baseline",
    ),
    Key("model.pretrained", default=True, means="`model.weights hub` of a baseline; false: `random`"),
    Key(
        "model.num_classes",
        default=5,
        others=("data.num_classes", "num_classes"),
        means="`data.classes`: 0, 1, … as many as it says; where it is not given, as the table has them",
    ),
    Key("model.dropout", "model.dropout", 0.3, ("model.dropout_rate",)),
    Key("model.freeze_backbone", default=False, means="true: `adapt.kind linear`"),
    Key("model.checkpoint_path", "model.weights", others=("model.weights_path", "checkpoint_path")),
    Key(
        "model.model_variant",
        default="large",
        others=("model.variant", "model_variant"),
        means="`model.backbone`: large is retfound, green is retfound-green",
    ),
    Key("model.global_pool", default=False, means="`model.pool` of RETFound: true is avg, false is cls"),
    Key(
        "model.img_size",
        "model.pixels",
        others=("model.input_size", "model.image_size", "data.img_size", "data.image_size", "data.input_size"),
    ),
    Key("model.lora_r", "adapt.r", 8, ("model.lora_rank",)),
    Key("model.lora_alpha", "adapt.alpha", 32),
    Key("model.lora_dropout", "adapt.dropout", 0.1),
    Key("model.head_dropout", "model.dropout", 0.3),
    Key("model.target_modules", "adapt.targets", ["qkv"], ("model.lora_target_modules",)),
    Key("data.train_csv", "data.table", others=("data.csv_file", "data.csv_path", "data.data_csv")),
    Key(
        "data.train_img_dir",
        "data.images",
        others=("data.img_dir", "data.image_dir", "data.data_img_dir", "data.train_image_dir"),
    ),
    Key("data.image_column", "data.image_column", others=("data.image_col", "data.id_column")),
    Key("data.label_column", "data.label_column", others=("data.label_col", "data.target_column")),
    Key("data.patient_column", "data.patient_column", others=("data.patient_col",)),
    Key("data.val_split", "data.val", 0.1, ("data.val_size", "data.validation_split")),
    Key("data.test_split", "data.test", 0.1, ("data.test_size",)),
    Key("data.val_csv", gone=_OWN_SPLITS),
    Key("data.val_img_dir", gone=_OWN_SPLITS),
    Key("data.test_csv", gone=_OWN_SPLITS),
    Key("data.test_img_dir", gone=_OWN_SPLITS),
    Key("data.mean", gone=_OWN_NUMBERS, others=("data.normalize_mean",)),
    Key("data.std", gone=_OWN_NUMBERS, others=("data.normalize_std",)),
    Key("training.num_epochs", "train.epochs", 20, ("training.epochs",)),
    Key("training.learning_rate", "train.lr", others=("training.lr",)),
    Key("training.batch_size", "train.batch_size", 32, ("data.batch_size",)),
    Key("training.weight_decay", "train.weight_decay", 0.01),
    Key("training.early_stopping_patience", "train.patience", 5, ("training.patience",)),
    Key("training.warmup_epochs", "train.warmup_epochs", 1),
    Key(
        "training.scheduler",
        "train.schedule",
        "cosine",
        ("training.lr_scheduler", "training.scheduler_type"),
        read=_one_of(_SCHEDULES),
    ),
    Key("training.optimizer", default="adamw", means="nothing: it is always AdamW"),
    Key(
        "training.augmentation",
        "augment",
        "medium",
        ("data.augmentation", "augmentation", "training.augmentation_level"),
        read=_one_of({"true": "medium", "false": "none"}),
    ),
    Key("training.label_smoothing", "train.label_smoothing", 0.0),
    Key("training.mixup", "train.mixup", 0.0, ("training.mixup_alpha",)),
    Key("training.cutmix", "train.cutmix", 0.0, ("training.cutmix_alpha",)),
    Key(
        "training.gradient_clip",
        "train.clip_norm",
        1.0,
        ("training.grad_clip", "training.max_grad_norm", "training.gradient_clip_norm"),
    ),
    Key("training.accumulation_steps", "train.accumulate", 1, ("training.gradient_accumulation_steps",)),
    Key(
        "training.mixed_precision",
        "precision",
        True,
        ("training.use_amp", "training.amp"),
        read=_one_of({"true": "auto", "false": "fp32"}),
    ),
    Key(
        "training.use_class_weights",
        "train.balance",
        False,
        ("training.class_weights", "training.weighted_loss"),
        read=_one_of({"true": "weighted", "false": "none"}),
    ),
    Key(
        "training.wandb",
        "train.wandb",
        False,
        ("training.use_wandb", "use_wandb", "wandb", "wandb.enabled", "logging.use_wandb"),
    ),
    Key("seed", "seed", 0, ("training.seed", "training.random_seed", "random_seed", "system.seed", "data.seed")),
    Key("device", "device", "auto", ("training.device", "system.device")),
    Key(
        "num_workers",
        "workers",
        "auto",
        ("data.num_workers", "training.num_workers", "system.num_workers"),
    ),
    Key(
        "output_dir",
        "out",
        None,
        ("training.output_dir", "paths.output_dir", "paths.results_dir", "results_dir", "training.save_dir"),
    ),
    Key("paths.checkpoint_dir", gone="checkpoints are in the run folder, output_dir"),
    Key("paths.log_dir", gone="logs are in the run folder, output_dir"),
    Key("wandb.project", gone="Weights & Biases reads WANDB_PROJECT", others=("logging.wandb_project",)),
    Key("wandb.entity", gone="Weights & Biases reads WANDB_ENTITY", others=("logging.wandb_entity",)),
    Key("data.pin_memory", "pin_memory", "auto", ("training.pin_memory", "system.pin_memory")),
)
"""Every key of the guides. Those of one group mean nothing in another: `lora_r` is of LoRA."""

BY_NAME = {name: key for key in KEYS for name in (key.name, *key.others)}

SECTIONS = tuple(dict.fromkeys(name.partition(".")[0] for name in BY_NAME if "." in name))

TYPES = {
    "baseline": "baseline",
    "timm": "baseline",
    "classifier": "baseline",
    "drclassifier": "baseline",
    "retfound": "retfound",
    "retfound_full": "retfound",
    "retfound_lora": "retfound_lora",
    "lora": "retfound_lora",
}
"""`model.type` in the guides' spellings -> which of their three models."""

VARIANTS = {"large": "retfound", "green": "retfound-green"}
"""`model_variant` -> the backbone."""

MOST_CLASSES = 1000

EMBEDDED = "nano"
"""The backbone whose weights are in the package: nothing is downloaded for it."""

_OF_LORA = ("model.lora_r", "model.lora_alpha", "model.lora_dropout", "model.target_modules")
_OURS = ("adapt", "train", "task", "compare", "search", "model.backbone", "model.weights", "data.table")


@dataclass(frozen=True)
class Translation:
    """A configuration of the guides in our words.

    Args:
        content: nested sections, as :meth:`eyetune.config.Config.parse` takes them.
        unused: keys of it that mean nothing here -> why.
    """

    content: dict[str, Any]
    unused: dict[str, str] = field(default_factory=dict)

    def warning(self, source: str) -> str:
        """One line that names every key that means nothing; empty without one."""
        if not self.unused:
            return ""
        named = "; ".join(f"{name} ({why})" for name, why in self.unused.items())
        return f"{source}: means nothing here, left out: {named}"


def is_older(content: Mapping[str, Any]) -> bool:
    """Whether this is a configuration of the guides: it has keys of theirs, and none that only ours have."""
    given = {*content, *(name for name, _ in flat(content))}
    # What is called alike here (model.dropout, data.image_column) tells nothing.
    theirs = {name for name, key in BY_NAME.items() if "." in name and key.to != name} | {"training"}
    return bool(given & theirs) and not given & set(_OURS)


def flat(content: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Dotted path and value of every key; a section of the guides is one level deep."""
    for name, value in content.items():
        if name in SECTIONS and isinstance(value, Mapping):
            yield from ((f"{name}.{inner}", one) for inner, one in value.items())
        else:
            yield str(name), value


def read_keys(content: Mapping[str, Any], source: str) -> dict[str, Any]:
    """What a configuration of the guides says, by the name of the key in :data:`KEYS`.

    Raises ConfigError that names every unknown key with the nearest known one, and a key that stands twice.
    """
    said: dict[str, Any] = {}
    faults = []
    spelled: dict[str, str] = {}
    for name, value in flat(content):
        key = BY_NAME.get(name)
        if name in SECTIONS and value is None:
            continue  # a section with nothing in it
        if key is None and name in SECTIONS:
            faults.append(f"{name}: must be a section with keys of its own, got {value!r}")
        elif key is None:
            faults.append(f"{name}: unknown.{did_you_mean(name, [*BY_NAME, *SECTIONS])}")
        elif key.name in said and said[key.name] != value:
            faults.append(f"{name}: {spelled[key.name]} says {said[key.name]!r}, this {value!r}")
        else:
            said[key.name] = value
            spelled[key.name] = name
    if faults:
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise ConfigError("\n".join([f"{count} in {source}:", *(f"  {one}" for one in faults)]))
    return said


def translate(said: Mapping[str, Any], source: str) -> Translation:
    """The same in our words.

    Args:
        said: by the name of the key in :data:`KEYS`, as :func:`read_keys` gives it.
        source: what a message calls it.

    Raises ConfigError for a type or a variant of model that there is not.
    """
    kind = _kind(said, source)
    unused = {name: BY_NAME[name].gone for name in said if BY_NAME[name].gone}
    ours: dict[str, Any] = {"out": f"results/{kind}"} | _model(said, kind, source, unused) | _adapt(said, kind, unused)
    for name, value in said.items():
        key = BY_NAME[name]
        if key.to is not None and value is not None and name not in unused:
            ours[key.to] = key.read(value)
    optimizer = said.get("training.optimizer")
    if optimizer is not None and str(optimizer).lower() != "adamw":
        unused["training.optimizer"] = "it is always AdamW"
    content: dict[str, Any] = {}
    for path, value in ours.items():
        section, dot, name = path.rpartition(".")
        (content.setdefault(section, {}) if dot else content)[name] = value
    return Translation(content, unused)


def _kind(said: Mapping[str, Any], source: str) -> str:
    """Which of the guides' three models: as `model.type` says, or as the keys that are there suggest."""
    given = said.get("model.type")
    if given is not None:
        kind = TYPES.get(str(given).lower())
        if kind is None:
            known = ", ".join(TYPES)
            raise ConfigError(
                f"{source}: model.type: unknown {given!r}.{did_you_mean(str(given), TYPES)} Known: {known}."
            )
        return kind
    if any(name in said for name in (*_OF_LORA, "model.head_dropout")):
        return "retfound_lora"
    if "model.name" not in said and ("model.checkpoint_path" in said or "model.model_variant" in said):
        return "retfound"
    return "baseline"


def _model(said: Mapping[str, Any], kind: str, source: str, unused: dict[str, str]) -> dict[str, Any]:
    """The network, its weights, its pooling and its classes; what does not belong to such a model goes to `unused`."""
    ours: dict[str, Any] = {}
    if kind != "baseline":
        ours = _retfound(said, kind, source, unused)
    else:
        ours["model.backbone"] = said.get("model.name", BY_NAME["model.name"].default)
        pretrained = said.get("model.pretrained", True)
        if ours["model.backbone"] != EMBEDDED or not pretrained:
            ours["model.weights"] = "hub" if pretrained else "random"
        unused |= {name: "of RETFound" for name in ("model.model_variant", "model.global_pool") if name in said}
    classes = said.get("model.num_classes")
    if isinstance(classes, int) and not isinstance(classes, bool) and 2 <= classes <= MOST_CLASSES:
        ours["data.classes"] = [str(number) for number in range(classes)]
    elif classes is not None:
        raise ConfigError(
            f"{source}: model.num_classes: must be a whole number from 2 to {MOST_CLASSES}, got {classes!r}."
        )
    return ours


def _retfound(said: Mapping[str, Any], kind: str, source: str, unused: dict[str, str]) -> dict[str, Any]:
    variant = str(said.get("model.model_variant") or "large").lower()
    if variant not in VARIANTS:
        hint = did_you_mean(variant, VARIANTS)
        raise ConfigError(f"{source}: model.model_variant: unknown {variant!r}.{hint} Known: {', '.join(VARIANTS)}.")
    ours = {"model.backbone": VARIANTS[variant]}
    if variant == "green":
        ours["out"] = f"results/{kind.replace('retfound', 'retfound_green')}"
    if "model.global_pool" in said and variant == "green":
        unused["model.global_pool"] = "RETFound-Green has one pooling, the mean of its patches"
    elif "model.global_pool" in said:
        ours["model.pool"] = "avg" if said["model.global_pool"] else "cls"
    if "model.name" in said:
        unused["model.name"] = "the variant says which network"
    if said.get("model.pretrained") is False:
        unused["model.pretrained"] = "without its weights it is no RETFound; --model.weights random begins untrained"
    return ours


def _adapt(said: Mapping[str, Any], kind: str, unused: dict[str, str]) -> dict[str, Any]:
    """What trains: adapters, the head, or all layers at one rate, as the guides' programs did."""
    if kind == "retfound_lora":
        if "model.dropout" in said and "model.head_dropout" in said:
            unused["model.dropout"] = "model.head_dropout says it"
        if said.get("model.freeze_backbone") is False:
            unused["model.freeze_backbone"] = "LoRA leaves the backbone as it is"
        return {"adapt.kind": "lora"}
    for name in (*_OF_LORA, "model.head_dropout"):
        if name in said:
            unused[name] = "of LoRA"
    if not said.get("model.freeze_backbone"):
        return {"adapt.kind": "full", "adapt.layer_decay": 1.0}
    epochs = said.get("training.num_epochs", BY_NAME["training.num_epochs"].default)
    patience = said.get("training.early_stopping_patience")
    return {"adapt.kind": "linear", "adapt.max_epochs": epochs} | ({"adapt.patience": patience} if patience else {})
