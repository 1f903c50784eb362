"""What is compared: every strategy on every backbone with every seed, each an ordinary run of its own.

What all share comes from the configuration file and the flags. The rate and whatever else belongs to a strategy are its
own unless it is given by name:

- `train.lr` in a file that names an `adapt.kind` is that strategy's; the others keep their own usual rate, as does the
  rest of the file's `adapt` section. `--train.lr` on the command line is for all.
- `--lora.r 16` is `adapt.r` of the strategy lora, `--lora.train.lr 1e-3` its rate; so in the file under
  `compare.strategies.lora`. Data, seed and folder cannot differ: the splits are the same for all.

Importable without torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

from eyetune.adapt.strategy import STRATEGIES
from eyetune.config import SECTIONS, Config, flattened, override
from eyetune.errors import ConfigError, did_you_mean, listing
from eyetune.flags import own_words, parse

Budget = Literal["epochs", "own"]

FILED = {"data": "datasets", "map": "maps"}
"""Options that may be repeated, NAME=VALUE each, and what the section in the file calls them: a mapping."""

OPTIONS = ("strategies", "backbones", "seeds", "budget", *FILED)
"""The verb's own words."""

OUT = "runs/comparison"
"""Where a comparison goes when nobody says."""

SHARED = ("data", "task", "seed", "out", "device", "precision")
"""What no strategy can have for itself: the runs would not be comparable."""

MOVABLE = ("out", "device", "workers", "prefetch", "pin_memory", "data.cache", "data.cache_limit")
"""What may be another when a comparison goes on: it does not change what a run learns."""


@dataclass(frozen=True)
class Arm:
    """One strategy on one backbone.

    Args:
        name: what tables call it.
        strategy: the strategy's name here; several may be of one kind with other settings.
        backbone: as in the configuration.
    """

    name: str
    strategy: str
    backbone: str


@dataclass(frozen=True)
class Cell:
    """One run: an arm with a seed. Its run folder is named `name`."""

    name: str
    arm: Arm
    seed: int
    config: Config


@dataclass(frozen=True)
class Plan:
    """All cells of a comparison, in the order in which they are run: seed by seed, so that a comparison that is cut
    short has every arm."""

    cells: tuple[Cell, ...]
    out: Path
    seeds: tuple[int, ...]
    budget: Budget
    datasets: dict[str, str] = field(default_factory=dict)
    """External ones: name -> TABLE[:IMAGES]."""
    maps: dict[str, Any] = field(default_factory=dict)
    """What their labels mean, where they are not the classes by name: see eyetune.metrics.labelmap.parse."""

    @property
    def arms(self) -> list[Arm]:
        """The arms, in the order given."""
        return list(dict.fromkeys(cell.arm for cell in self.cells))

    def config(self, arm: Arm) -> Config:
        """The configuration of an arm, with its first seed."""
        return next(cell.config for cell in self.cells if cell.arm == arm)

    def budget_text(self) -> str:
        """The budget in words."""
        epochs = {arm.name: self.config(arm).train.epochs for arm in self.arms}
        if self.budget == "epochs":
            return (
                f"equal: at most {next(iter(epochs.values()))} epochs each over the same training images; each may "
                "stop earlier by its own patience"
            )
        return f"each its own, not equal: at most {', '.join(f'{n} epochs for {name}' for name, n in epochs.items())}"


def read_plan(words: Sequence[str]) -> Plan:
    """The plan that a command line asks for: `[CONFIG.yaml] --strategies a,b … [--section.field v] [--a.field v]`.

    Raises ConfigError with every fault of every cell.
    """
    own, rest = _own_words(words)
    given = parse(rest)
    content = {} if given.positional is None else Config.read(Path(given.positional))
    section = content.pop("compare", None) or {}
    known = [FILED.get(name, name) for name in OPTIONS]
    if not isinstance(section, Mapping):
        raise ConfigError(f"compare: must be a section with {', '.join(known)}, got {section!r}")
    if unknown := [name for name in section if name not in known]:
        hint = did_you_mean(str(unknown[0]), known)
        raise ConfigError(f"compare.{unknown[0]}: unknown.{hint}")
    strategies = _strategies(own.get("strategies", section.get("strategies")), section.get("strategies"))
    backbones = _backbones(own.get("backbones", section.get("backbones")), content)
    flags, named = _by_strategy(given.overrides, strategies)
    for name, path in ((name, path) for name, values in named.items() for path in values):
        strategies[name] = override(strategies[name], {_placed(path): named[name][path]})
    base = override(content, flags)
    seeds = _seeds(own.get("seeds", section.get("seeds")), base)
    budget = str(own.get("budget", section.get("budget", "epochs")))
    if budget not in get_args(Budget):
        raise ConfigError(f"--budget {budget}: epochs (the same for all) or own (each strategy's).")
    datasets, maps = _outside(own, section)
    request = _Request(content, flags, cast(Budget, budget), given.positional or "the flags")
    cells = []
    faults: dict[str, None] = {}
    for seed in seeds:
        for backbone, model in backbones.items():
            for name, settings in strategies.items():
                arm = Arm(name if len(backbones) == 1 else f"{backbone} {name}", name, backbone)
                try:
                    cells.append(request.cell(arm, seed, settings, model))
                except ConfigError as error:
                    faults[f"{arm.name}: {error}"] = None
    if faults:
        raise ConfigError("\n".join(faults))
    out = Path(str(base.get("out", OUT)))
    if doubled := [name for name in {cell.name for cell in cells} if [c.name for c in cells].count(name) > 1]:
        raise ConfigError(f"two runs would have the folder {doubled[0]}: give one of them another name.")
    return Plan(tuple(cells), out, seeds, cast(Budget, budget), datasets, maps)


def differing(before: Config, now: Config) -> list[str]:
    """What differs between two configurations in a way that changes what is learnt: "adapt.r: was 8, now 16"."""
    first, second = flattened(before.model_dump(mode="json")), flattened(now.model_dump(mode="json"))
    return [
        f"{path}: was {first.get(path)}, now {second.get(path)}"
        for path in dict.fromkeys([*first, *second])
        if path not in MOVABLE and first.get(path) != second.get(path)
    ]


# -- pieces ------------------------------------------------------------------------------------------------------------


def _own_words(words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The verb's own options as text, and the words that are left."""
    given, rest = own_words(words, _EXAMPLES)
    own: dict[str, Any] = {}
    for name, text in given:
        if name in FILED:
            dataset, equals, value = text.partition("=")
            if not (dataset and equals and value):
                more = "" if name == "map" else "; the data to train on is --data.table TABLE"
                raise ConfigError(f"--{name} {text}: write NAME=…, as in --{name} {_EXAMPLES[name]}{more}.")
            if dataset in own.setdefault(name, {}):
                raise ConfigError(f"--{name}: two of them are for {dataset}.")
            own[name][dataset] = value
        elif name in own:
            raise ConfigError(f"--{name} stands twice: put its values into one list, --{name} {_EXAMPLES[name]}.")
        else:
            own[name] = text
    return own, rest


_EXAMPLES = {
    "strategies": "linear,lora,full",
    "backbones": "nano,retfound=models/RETFound_cfp_weights.pth",
    "seeds": "0,1,2",
    "budget": "epochs",
    "data": "elsewhere=other.csv:photos",
    "map": "elsewhere=referable",
}


def _outside(own: Mapping[str, Any], section: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, Any]]:
    """The external datasets, and what their labels mean: the command line's, or else the file's."""
    found = []
    for option, filed in FILED.items():
        value = own.get(option, section.get(filed)) or {}
        if not isinstance(value, Mapping):
            raise ConfigError(f"compare.{filed}: a mapping, a line NAME: VALUE for each dataset, got {value!r}.")
        found.append({str(name): one for name, one in value.items()})
    tables, maps = found
    if unknown := [name for name in maps if name not in tables]:
        raise ConfigError(f"--map {unknown[0]}: no --data is called so.{did_you_mean(unknown[0], tables)}")
    return {name: str(table) for name, table in tables.items()}, maps


def _items(value: Any, what: str) -> dict[str, Any]:
    """`a,b=x` or a list of such, or a mapping -> name to what stands behind the sign (None for nothing)."""
    if isinstance(value, Mapping):
        return {str(name): inner for name, inner in value.items()}
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, (list, tuple)):
        raise ConfigError(f"{what}: a list of names was expected, got {value!r}.")
    found: dict[str, Any] = {}
    for part in parts:
        name, _, inner = str(part).strip().partition("=")
        if not name or name in found:
            raise ConfigError(f"{what}: {'an empty name' if not name else f'{name} stands twice'} in {value!r}.")
        found[name] = inner or None
    return found


def _strategies(value: Any, section: Any) -> dict[str, dict[str, Any]]:
    """Name -> the settings of its own, `adapt.kind` among them. What the file says of a strategy holds for one that is
    chosen by name on the command line, too."""
    if not value:
        raise ConfigError("which strategies? --strategies linear,lora,full, or compare.strategies in the file.")
    kinds = STRATEGIES.names()
    filed = _items(section, "compare.strategies") if section else {}
    found: dict[str, dict[str, Any]] = {}
    for name, inner in _items(value, "--strategies").items():
        own = inner if isinstance(inner, Mapping) else filed.get(name) or {}
        if not isinstance(own, Mapping):
            own = {"adapt": {"kind": own}}
        inside = own.get("adapt")
        kind = inner if isinstance(inner, str) else inside.get("kind", name) if isinstance(inside, Mapping) else name
        if kind not in STRATEGIES:
            hint = did_you_mean(str(kind), kinds)
            raise ConfigError(f"--strategies: unknown {kind!r}.{hint} Known: {', '.join(kinds)}.")
        if name in (*SECTIONS, *Config.model_fields, "compare"):
            raise ConfigError(f"--strategies: {name!r} is a section of the configuration: choose another name.")
        if forbidden := [key for key in own if key in SHARED]:
            raise ConfigError(f"{name}.{forbidden[0]}: the same for all strategies; give it without the name.")
        found[name] = {"adapt": {"kind": STRATEGIES.canonical(str(kind))}}
        for key, setting in own.items():
            within = isinstance(setting, Mapping) and key in SECTIONS
            values = {f"{key}.{k}": v for k, v in setting.items()} if within else {_placed(str(key)): setting}
            values.pop("adapt.kind", None)
            found[name] = override(found[name], values)
    return found


def _backbones(value: Any, content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Name -> its `model` settings. The file's weights, pool and pixels are those of the backbone it names."""
    model = content.get("model") or {}
    filed = str(model.get("backbone", "nano")) if isinstance(model, Mapping) else "nano"
    found: dict[str, dict[str, Any]] = {}
    for name, inner in _items(value or filed, "--backbones").items():
        own = dict(inner) if isinstance(inner, Mapping) else {} if inner is None else {"weights": inner}
        own = {**({"weights": None, "pool": None, "pixels": None} if name != filed else {}), **own}
        found[name] = {"backbone": name, **own}
    return found


def _seeds(value: Any, base: Mapping[str, Any]) -> tuple[int, ...]:
    if value is None:
        value = base.get("seed", 0)
    parts = str(value).split(",") if isinstance(value, (str, int)) else value
    try:
        found = tuple(int(str(part)) for part in parts)
    except (TypeError, ValueError):
        raise ConfigError(f"--seeds {value}: whole numbers, as in --seeds 0,1,2.") from None
    if not found or len(set(found)) < len(found):
        raise ConfigError(f"--seeds {value}: every seed once.")
    return found


def _by_strategy(
    overrides: Mapping[str, Any], strategies: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The flags for all, and those of each strategy (`--lora.r`, `--lora.train.lr`)."""
    shared: dict[str, Any] = {}
    named: dict[str, dict[str, Any]] = {}
    plain = {name.replace("-", "_"): name for name in strategies}
    for path, value in overrides.items():
        first, dot, rest = path.partition(".")
        if dot and first in plain:
            top = rest.partition(".")[0]
            if top in SHARED:
                raise ConfigError(f"--{path}: {top} is the same for all strategies; give it without {plain[first]}.")
            named.setdefault(plain[first], {})[rest] = value
        elif first == "adapt":
            example = f"--{next(iter(strategies))}.{rest or 'field'}"
            raise ConfigError(f"--{path}: of which strategy? Say it by name, {example}.")
        elif path in ("model.backbone", "model.weights"):
            raise ConfigError(f"--{path}: name it in --backbones, as in --backbones {_EXAMPLES['backbones']}.")
        else:
            shared[path] = value
    return shared, named


def _placed(path: str) -> str:
    """`r` -> `adapt.r`; `train.lr` and `augment` stay."""
    return path if path.partition(".")[0] in (*SECTIONS, *Config.model_fields) else f"adapt.{path}"


@dataclass(frozen=True)
class _Request:
    """What all cells share.

    Args:
        content: the file, without its section `compare`.
        flags: what the command line says for all, by dotted path.
        source: what to call it in messages.
    """

    content: Mapping[str, Any]
    flags: Mapping[str, Any]
    budget: Budget
    source: str

    def cell(self, arm: Arm, seed: int, settings: Mapping[str, Any], model: Mapping[str, Any]) -> Cell:
        """The cell of an arm, whose strategy has these settings of its own, on a backbone with its `model` settings."""
        kind = settings["adapt"]["kind"]
        filed = self.content.get("adapt")
        filed_kind = filed.get("kind", "lora") if isinstance(filed, Mapping) else filed
        merged = override(self.content, {"adapt.kind": kind} if filed is not None else {"adapt": {"kind": kind}})
        train = merged.get("train")
        if filed_kind is not None and filed_kind != kind and isinstance(train, dict):
            train.pop("lr", None)
        merged = override(merged, self.flags)
        merged = override(merged, {f"model.{key}": value for key, value in model.items()})
        for name, value in settings.items():
            inner = {f"{name}.{key}": one for key, one in value.items()} if isinstance(value, dict) else {name: value}
            merged = override(merged, inner)
        base = Config.parse(merged, source=self.source)
        _check_budget(settings, self.budget)
        changes: dict[str, Any] = {"data.split_seed": base.split_seed, "seed": seed}
        if self.budget == "epochs" and "max_epochs" in type(base.adapt).model_fields:
            changes["adapt.max_epochs"] = base.train.epochs
        name = re.sub(r"[^\w.-]+", "_", f"{arm.backbone}-{arm.strategy}-seed{seed}")
        changes["out"] = str(Path(str(merged.get("out", OUT))) / name)
        return Cell(name, arm, seed, Config.parse(override(merged, changes), source=self.source))


def _check_budget(settings: Mapping[str, Any], budget: Budget) -> None:
    """Raise ConfigError where a strategy's own number of epochs contradicts an equal budget."""
    own = [
        f"{section}.{key}"
        for section, key in (("train", "epochs"), ("adapt", "max_epochs"))
        if isinstance(settings.get(section), Mapping) and key in settings[section]
    ]
    if budget == "epochs" and own:
        raise ConfigError(
            f"{own[0]}: with --budget epochs all may train as long. Give --train.epochs for all, or --budget own."
        )


def describe(plan: Plan) -> str:
    """What will be run, a line an arm, before it begins."""
    lines = []
    for arm in plan.arms:
        config = plan.config(arm)
        rate = f"lr {config.learning_rate:g}{'' if config.train.lr is not None else ' (its own)'}"
        weights = f", weights {config.model.weights}" if config.model.weights else ""
        size = config.train.batch_size * config.train.accumulate
        lines.append(f"{arm.name}: {config.adapt.kind}, {rate}, {size} images a step{weights}")
    return listing(lines, limit=len(lines))
