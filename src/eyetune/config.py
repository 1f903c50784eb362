"""The whole configuration: the sections that live beside what they configure, and the training section. No logic.

Importable without torch, so that `--help` stays quick. Relative paths are relative to the current folder.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, Self, Union, get_args, get_origin

import yaml
from pydantic import Field, ValidationError, model_validator
from pydantic_core import PydanticUndefined

import eyetune.adapt  # noqa: F401 - its strategies register themselves
from eyetune import processes
from eyetune.adapt.strategy import STRATEGIES, StrategyConfig, adapt_union, parse_adapt
from eyetune.adapt.task import READS, TaskConfig
from eyetune.backbones.config import ModelConfig
from eyetune.data.config import AugmentConfig, DataConfig
from eyetune.data.record import Kind
from eyetune.data.records import kind_of
from eyetune.errors import ConfigError, did_you_mean
from eyetune.older_config import is_older, read_keys, translate
from eyetune.section import Section

if TYPE_CHECKING:
    AdaptConfig = StrategyConfig
else:
    AdaptConfig = adapt_union()

#: The fields of :class:`Config` that have fields of their own.
SECTIONS = ("model", "data", "task", "adapt", "train")

#: Values of `model.weights` that are not files.
NOT_FILES = ("hub", "random")


class LoopConfig(Section):
    """What the training loop is told, whatever is trained."""

    epochs: int = Field(default=20, ge=1)
    """Passes over the training images, at most."""
    batch_size: int = Field(default=32, ge=1)
    """Images in one forward pass of one process; a step learns from this times `accumulate` times the processes."""
    lr: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Highest learning rate, the head's. Not given: the strategy's own."""
    weight_decay: float = Field(default=0.01, ge=0, allow_inf_nan=False)
    """AdamW's decoupled weight decay (never on biases, norms and tokens)."""
    warmup_epochs: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Epochs, or parts of one, in which the rate rises linearly to its height."""
    schedule: Literal["cosine", "plateau", "constant"] = "cosine"
    """After warm-up: half a cosine to zero, halving when the metric stops improving for 2 epochs, or constant."""
    patience: int = Field(default=5, ge=0)
    """Stop after this many epochs without a better metric; 0 never stops early."""
    accumulate: int = Field(default=1, ge=1)
    """Batches whose gradients make one optimizer step: the gradient is that of one batch this many times as large."""
    clip_norm: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Largest norm of the gradient, longer ones are shortened to it; 0 leaves them alone."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """torch.compile the network, block by block: slower to start, faster afterwards."""
    skip_nonfinite: bool = False
    """Leave out and count steps whose loss or gradient is NaN or infinite, as happens in fp16, instead of stopping."""
    fsdp: bool = False
    """Split parameters, gradients and optimizer state over the processes of torchrun: for networks too large for one
    device (full and lora)."""
    save_every: int = Field(default=0, ge=0)
    """Keep the checkpoint of every so many epochs, beside the best and the last one; 0 keeps no others."""
    tensorboard: bool = True
    """Write TensorBoard events into the run folder."""
    wandb: bool = False
    """Log to Weights & Biases too (extra: wandb)."""

    @model_validator(mode="after")
    def _coherent(self) -> LoopConfig:
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"warmup_epochs ({self.warmup_epochs:g}) is more than epochs ({self.epochs})")
        return self


class TrainConfig(LoopConfig):
    """How long, how fast and against what the network is trained."""

    mixup: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Alpha of mixup: pairs of images are blended, their labels too; 0 is off."""
    cutmix: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Alpha of cutmix: a patch of one image is put into another; 0 is off. With mixup, each batch gets one of them."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of every label spread evenly over all classes."""
    balance: Literal["none", "weighted", "sampler", "focal"] = "none"
    """Against imbalance: loss weighted by inverse class frequency, every class drawn equally often, or focal loss."""
    focal_gamma: float = Field(default=2.0, ge=0, allow_inf_nan=False)
    """How strongly focal loss turns to the hard images (balance: focal)."""
    metric: str | None = None
    """Validation metric that chooses the best epoch. Not given: qwk for DR grades, auroc_macro for two classes, else
    f1_macro."""


class RunConfig(Section):
    """What every run is told, and how its configuration is read."""

    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of splits (unless data.split_seed is given), weights, order, augmentation and dropout."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; auto takes a GPU when there is one."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of matrix products; auto takes bf16 where the hardware multiplies it."""
    workers: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """Processes that read images; auto goes by the number of processors, 0 reads in the main process."""
    prefetch: int = Field(default=2, ge=1)
    """Batches that each reading process has ready in advance."""
    pin_memory: bool | Literal["auto"] = "auto"
    """Whether batches wait in memory that a GPU copies from directly; auto: when there is a CUDA device."""

    SECTIONS: ClassVar[tuple[str, ...]] = ()
    """Fields that have fields of their own."""
    REQUIRED: ClassVar[str] = ""
    """The field, by dotted path, without which there is no run."""
    EXAMPLE: ClassVar[tuple[str, str]] = ("", "")
    """What is enough to start, in words, and what to type then."""

    def misfits(self) -> Iterator[tuple[str, str]]:
        """Settings that cannot go together: dotted path and what is wrong."""
        return iter(())

    @classmethod
    def missing_files(cls, content: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """Files and folders that the configuration names and that are not there: dotted path and what is wrong."""
        return iter(())

    @classmethod
    def from_yaml(
        cls, path: Path | str | None, overrides: Mapping[str, Any] | None = None, *, check_files: bool = True
    ) -> Self:
        """Read a YAML file.

        Args:
            path: the file; None for no file: the overrides and the defaults are everything.
            overrides: values by dotted path ("train.lr": 1e-3) that replace the file's. Another `adapt.kind` than the
                file's drops the rest of the file's `adapt` section, which belongs to that kind.
            check_files: whether the table, image folder and weights that it names have to exist.

        Raises ConfigError with every fault, by dotted path.
        """
        content = {} if path is None else cls.read(Path(path))
        source = "the flags" if path is None else str(path)
        return cls.parse(override(content, overrides or {}), check_files=check_files, source=source)

    @classmethod
    def read(cls, path: Path) -> dict[str, Any]:
        """The sections of a configuration file, unchecked. Raises ConfigError when it is no YAML of sections."""
        return read_yaml(path)

    @classmethod
    def parse(cls, content: Mapping[str, Any], *, check_files: bool = True, source: str = "the configuration") -> Self:
        """Build a configuration from nested mappings. Raises ConfigError with every fault, by dotted path."""
        faults: dict[str, str] = {}
        config: Self | None = None
        try:
            config = cls.model_validate(content)
        except ValidationError as error:
            for path, message in _messages(cls, error, content):
                faults.setdefault(path, message)
        if config is not None:
            faults |= dict(config.misfits())
        if check_files:
            for path, message in cls.missing_files(content):
                faults.setdefault(path, message)
        if faults or config is None:
            lines = [f"  {path}: {message}" for path, message in faults.items()]
            count = "1 fault" if len(lines) == 1 else f"{len(lines)} faults"
            raise ConfigError("\n".join([f"{count} in {source}:", *lines]))
        return config

    def to_yaml(self) -> str:
        """The whole configuration, defaults included, as YAML that :meth:`from_yaml` reads back to an equal one."""
        content = self.model_dump(mode="json")
        return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Finetune(Section):
    """What is fine-tuned, on what, and how."""

    model: ModelConfig = ModelConfig()
    data: DataConfig
    task: TaskConfig = TaskConfig()
    adapt: AdaptConfig = Field(default_factory=lambda: parse_adapt("lora"), validate_default=False)
    train: TrainConfig = TrainConfig()
    augment: AugmentConfig = "medium"
    """Changes to the training images: none, light, medium, strong, or a list of torchvision transforms."""
    augment_on: Literal["cpu", "device"] = "cpu"
    """Where the levels of augment are carried out: by the processes that load (cpu), or on the device by the batch."""
    out: Path = Path("runs/eyetune")
    """The run folder, new or empty."""


class Config(RunConfig, _Finetune):
    """Everything that defines a run."""

    SECTIONS: ClassVar[tuple[str, ...]] = SECTIONS
    REQUIRED: ClassVar[str] = "data.table"
    EXAMPLE: ClassVar[tuple[str, str]] = (
        "A table of your own is enough",
        "eyetune finetune --data.table labels.csv --out runs/first",
    )

    @property
    def learning_rate(self) -> float:
        """`train.lr`, or the strategy's own."""
        return self.train.lr if self.train.lr is not None else self.adapt.default_lr

    @property
    def split_seed(self) -> int:
        """`data.split_seed`, or the run's seed."""
        return self.seed if self.data.split_seed is None else self.data.split_seed

    @property
    def asked(self) -> TaskConfig:
        """The task with its kind settled: by the label columns and the head, where it is auto."""
        return self.task.settled(several_labels=kind_of(self.data.label_column) == "labels")

    @property
    def reads(self) -> Kind:
        """What the label column holds: classes, labels or a value."""
        return READS[self.asked.kind]

    @classmethod
    def read(cls, path: Path) -> dict[str, Any]:
        """The sections of a configuration file; one of the older guides is put into our words, and what of it means
        nothing here is named on stderr. Raises ConfigError for a key that neither knows."""
        content = read_yaml(path)
        if not is_older(content):
            return content
        translation = translate(read_keys(content, str(path)), str(path))
        if processes.rank() == 0 and (warning := translation.warning(str(path))):
            print(warning, file=sys.stderr)
        return translation.content

    def misfits(self) -> Iterator[tuple[str, str]]:
        """Settings that cannot go with the task: dotted path and what is wrong."""
        return self.task.misfits(
            several_labels=kind_of(self.data.label_column) == "labels",
            named_classes=self.data.classes is not None,
            balance=self.train.balance,
            smoothing=self.train.label_smoothing,
        )

    @classmethod
    def missing_files(cls, content: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """The table, the folder of images and the weights."""
        data, model = content.get("data"), content.get("model")
        if isinstance(data, Mapping):
            if not str(data.get("table")).startswith("hf:"):
                yield from missing_file("data.table", data.get("table"), either=True)
            yield from missing_file("data.images", data.get("images"), folder=True)
        if isinstance(model, Mapping) and model.get("weights") not in NOT_FILES:
            yield from missing_file("model.weights", model.get("weights"))


class Flag(NamedTuple):
    """One field of the configuration, as the command line shows it."""

    path: str
    """Dotted path: train.lr."""
    type: str
    """What may stand there: int, a|b|c, path, …"""
    default: Any
    """As YAML would say it; None when there is none."""
    help: str


def flags(config: type[RunConfig] = Config) -> Iterator[Flag]:
    """Every field of a configuration, in order; the fields of the strategies follow `adapt.kind`, kind by kind."""
    for name, info in config.model_fields.items():
        section = info.annotation
        if name == "adapt":
            kinds = STRATEGIES.names()
            yield Flag("adapt.kind", "|".join(kinds), "lora", "How the network is adapted.")
            for kind, strategy in STRATEGIES:
                for flag in _fields("adapt", strategy):
                    if flag.path != "adapt.kind":
                        yield flag._replace(help=f"({kind}) {flag.help}")
        elif isinstance(section, type) and issubclass(section, Section):
            yield from _fields(name, section)
        else:
            yield Flag(name, _type_text(section), _plain(info.default), _one_line(info.description))


def _fields(prefix: str, section: type[Section]) -> Iterator[Flag]:
    for name, info in section.model_fields.items():
        default = info.get_default(call_default_factory=True, validated_data={})
        yield Flag(f"{prefix}.{name}", _type_text(info.annotation), _plain(default), _one_line(info.description))


def _one_line(text: str | None) -> str:
    return re.sub(r"\s+", " ", text or "").strip()


def _plain(value: Any) -> Any:
    if value is PydanticUndefined:
        return None
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _type_text(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_text(arguments[0])
    if origin is Literal:
        return "|".join(str(value) for value in arguments)
    if origin in (Union, UnionType):
        return "|".join(dict.fromkeys(_type_text(member) for member in arguments if member is not NoneType))
    if origin in (tuple, list):
        return f"[{_type_text(arguments[0])}, …]"
    if origin is dict or annotation is dict:
        return "{name: value}"
    names = {Path: "path", str: "text", int: "int", float: "float", bool: "true|false"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


# -- reading -----------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 5e-4 is a number, and a key that stands twice is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.MarkedYAMLError(problem=f"{key!r} stands twice", problem_mark=key_node.start_mark)
            seen.add(str(key))
        result: dict[Any, Any] = super().construct_mapping(node, deep)
        return result


class _Dumper(yaml.SafeDumper):
    """Puts text that :class:`_Loader` would take for a number between quotes."""


for _side in (_Loader, _Dumper):
    # PyYAML follows YAML 1.1, in which a float needs a dot: 5e-4 would be text.
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$"),
        list("-+.0123456789"),
    )


_LONGEST = 200_000
"""Characters of a configuration file; ours have five thousand at most."""

_MOST_VALUES = 20_000


def _construct(text: str) -> Any:
    """The content of a YAML text; refused when its aliases (`*name`) repeat it to more than a few thousand values."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _values(node, {}) > _MOST_VALUES:
            raise yaml.YAMLError(f"it unfolds to more than {_MOST_VALUES} values")
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _values(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node stands for when every alias is written out; one that holds itself, endlessly many."""
    if id(node) not in known:
        known[id(node)] = _MOST_VALUES + 1  # as long as we are inside it
        inner: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            inner = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            inner = node.value
        known[id(node)] = 1 + sum(_values(part, known) for part in inner)
    return known[id(node)]


def read_yaml(path: Path) -> dict[str, Any]:
    """The sections of a configuration file, unchecked. Raises ConfigError when it is no YAML of sections."""
    try:
        if path.exists() and not path.is_file():
            raise ConfigError(f"{path} is not a configuration file.")
        with open(path, encoding="utf-8-sig") as stream:
            text = stream.read(_LONGEST + 1)
        if len(text) > _LONGEST:
            raise ConfigError(f"{path} is longer than any configuration: {_LONGEST} characters are read.")
    except FileNotFoundError:
        raise ConfigError(f"no configuration file at {path}.{_near(path)}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the configuration file {path}: {error}.") from error
    try:
        content = _construct(text)
    except yaml.MarkedYAMLError as error:
        where = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{where} is not YAML: {error.problem or error}.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}.") from error
    except (ValueError, RecursionError, TypeError) as error:  # a day that no month has; brackets thousands deep
        raise ConfigError(f"{path} cannot be read as YAML ({type(error).__name__}: {error}).") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold sections (model:, data:, …), not {type(content).__name__}.")
    return content


def override(content: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `content` with values by dotted path put in, as :meth:`Config.from_yaml` does."""
    merged = {key: dict(value) if isinstance(value, Mapping) else value for key, value in content.items()}
    if isinstance(merged.get("adapt"), str):
        merged["adapt"] = {"kind": merged["adapt"]}
    kind = overrides.get("adapt.kind")
    adapt = merged.get("adapt")
    if kind is not None and isinstance(adapt, dict) and adapt.get("kind") != kind:
        merged["adapt"] = {}
    # Whole sections first, so that `adapt` and `adapt.r` may both be given.
    for path, value in sorted(overrides.items(), key=lambda item: item[0].count(".")):
        *sections, name = path.split(".")
        target = merged
        for section in sections:
            inner = target.get(section)
            if not isinstance(inner, dict):
                inner = {"kind": inner} if section == "adapt" and isinstance(inner, str) else {}
                target[section] = inner
            target = inner
        target[name] = value
    if isinstance(adapt := merged.get("adapt"), dict) and adapt and "kind" not in adapt and "adapt" not in content:
        adapt["kind"] = "lora"  # the default kind, with some of its fields given
    return merged


def flattened(content: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted path -> value, of nested sections (`train: {lr: …}`) and of what is written flat (`train.lr: …`) alike."""
    found: dict[str, Any] = {}
    for name, value in content.items():
        path = f"{prefix}{name}"
        found |= flattened(value, f"{path}.") if isinstance(value, Mapping) else {path: value}
    return found


# -- faults ------------------------------------------------------------------------------------------------------------


def _messages(config: type[RunConfig], error: ValidationError, content: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    adapt = content.get("adapt")
    kind = adapt.get("kind") if isinstance(adapt, Mapping) else adapt
    known = _known_paths(config, kind)
    for fault in error.errors():
        path = _path(config, fault["loc"])
        if fault["type"] == "extra_forbidden":
            owners = [name for name, section in STRATEGIES if path.removeprefix("adapt.") in section.model_fields]
            if path.startswith("adapt.") and owners:
                yield path, f"belongs to {' and '.join(owners)}, not to {kind}"
            elif path in ("compare", "search"):
                yield path, f"is a section of eyetune {path} alone: this command needs a file without it"
            else:
                yield path, f"unknown.{did_you_mean(path, known)}"
        elif fault["type"] == "missing":
            yield config.REQUIRED if config.REQUIRED.startswith(f"{path}.") else path, "is missing"
        elif fault["type"] in ("model_type", "model_attributes_type", "dict_type"):
            yield path, f"must be a section with fields of its own, got {fault['input']!r}"
        else:
            text = fault["msg"].replace("Input should be", "must be").removeprefix("Value error, ")
            expected = (fault.get("ctx") or {}).get("expected")
            hint = ""
            if fault["type"] == "literal_error" and isinstance(fault["input"], str):
                hint = did_you_mean(fault["input"], re.findall(r"'([^']*)'", str(expected)))
            given = "" if fault["type"] in ("value_error", "strategy") else f", got {fault['input']!r}"
            yield path, f"{text}{given}{hint and '.' + hint}"


def _known_paths(config: type[RunConfig], kind: Any) -> list[str]:
    """Dotted names; of the strategies' fields only those of `kind`, when there is such a kind."""
    mine = isinstance(kind, str) and kind in STRATEGIES
    names = [flag.path for flag in flags(config) if not (mine and flag.path.startswith("adapt."))]
    if mine:
        names += [f"adapt.{name}" for name in STRATEGIES.get(str(kind)).model_fields]
    return list(dict.fromkeys([*names, *config.model_fields]))


def _path(config: type[RunConfig], location: Sequence[int | str]) -> str:
    """Dotted path of a fault: section and field. Pydantic goes on with members of a union and places in a list."""
    parts = [str(part) for part in location]
    return ".".join(parts[:2] if parts[0] in config.SECTIONS else parts[:1])


def missing_file(path: str, value: Any, *, folder: bool = False, either: bool = False) -> Iterator[tuple[str, str]]:
    """The fault of the setting `path` when `value` names a file (`folder`: a folder; `either`) that is not there."""
    if not isinstance(value, (str, Path)):
        return
    found = Path(_expanded(str(value)))
    there = found.exists() if either else found.is_dir() if folder else found.is_file()
    if not there:
        yield path, f"no {'file or folder' if either else 'folder' if folder else 'file'} at {found}.{_near(found)}"


def _expanded(value: Any) -> Any:
    return os.path.expanduser(value) if isinstance(value, str) else value


def _near(path: Path) -> str:
    """The nearest name that is there; or how far the path leads."""
    parent = path.parent
    try:
        if parent.is_dir():
            return did_you_mean(path.name, [entry.name for entry in parent.iterdir()])
    except OSError:
        return ""
    while not parent.is_dir() and parent != parent.parent:
        parent = parent.parent
    return f" There is no folder {path.parent} either." if parent != path.parent else ""
