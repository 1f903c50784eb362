"""What is searched: fields of the configuration by dotted path, each with a range or a list of values.

In the file under `search.space`, or as flags::

    search: {space: {train.lr: 1e-5..1e-3 log, adapt.r: [4, 8, 16, 32]}}
    --space.train.lr "1e-5..1e-3 log" --space.adapt.r 4,8,16,32

A range is `LOW..HIGH`, with `log` behind it where factors count and not differences, or with `step S`; of a field that
takes whole numbers it has whole numbers. Everything else is a list of values. Importable without torch and Optuna.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import yaml

from eyetune.adapt.strategy import STRATEGIES
from eyetune.config import Config, Flag, flags, override
from eyetune.errors import ConfigError, did_you_mean

USUAL = "usual"
"""`--space usual`: the strategy's usual space, beside what is given by field."""

FIXED = "fixed"
"""`--space.train.lr fixed`: not searched, though it is in the usual space."""

_RANGE = re.compile(r"(?P<low>\S+?)\s*\.\.\s*(?P<high>\S+?)(?:\s+(?P<log>log)|\s+step\s+(?P<step>\S+))?")

_FORM = 'write LOW..HIGH, "LOW..HIGH log", "LOW..HIGH step S", or values with commas between them'

NEAR_END = 0.02
"""A value is on the edge of a range when it is this close to an end, as a share of the range."""

_SAME = "the data and its splits are the same for all trials"
_SCORES = "scores of different tasks cannot be compared"
_NO_MATTER = "it does not change what is learnt"
#: Fields, or sections, that cannot be searched, and why.
BARRED = {
    "seed": "the best of several seeds is luck, not a setting",
    "data.table": _SAME,
    "data.images": _SAME,
    "data.image_column": _SAME,
    "data.label_column": _SAME,
    "data.patient_column": _SAME,
    "data.eye_column": _SAME,
    "data.split_column": _SAME,
    "data.classes": _SAME,
    "data.val": _SAME,
    "data.test": _SAME,
    "data.split_seed": _SAME,
    "data.skip_unreadable": _SAME,
    "task": _SCORES,
    "train.metric": "it is what trials are judged by: name it in --objectives",
    "train.fsdp": "a worker is one process",
    "train.tensorboard": _NO_MATTER,
    "train.wandb": _NO_MATTER,
    "train.save_every": _NO_MATTER,
    "data.cache": _NO_MATTER,
    "data.cache_limit": _NO_MATTER,
    "out": _NO_MATTER,
    "device": _NO_MATTER,
    "workers": _NO_MATTER,
    "prefetch": _NO_MATTER,
    "pin_memory": _NO_MATTER,
}

#: The ranges of the guides, by strategy; every other strategy has that of the baselines.
_RATE = "1e-5..1e-3 log"
_DECAY = "0..0.05"
BASELINE = {"train.lr": _RATE, "train.batch_size": "16,32,64", "model.dropout": "0..0.5", "train.weight_decay": _DECAY}
USUAL_SPACES: dict[str, dict[str, str]] = {
    "lora": {
        "adapt.r": "4,8,16,32",
        "adapt.alpha": "16,32,64",
        "train.lr": _RATE,
        "train.batch_size": "8,16,32,48",
        "model.dropout": "0.1..0.5",
        "train.weight_decay": _DECAY,
    },
    # A head on fixed features learns at ten times the rate: its own usual one, 1e-3, would lie on the edge.
    "linear": BASELINE | {"train.lr": "1e-4..1e-2 log"},
}


@dataclass(frozen=True)
class Range:
    """From `low` to `high`, both included: evenly by factors (`log`) or differences, in steps where there is a `step`;
    `whole` numbers only."""

    low: float
    high: float
    log: bool = False
    step: float | None = None
    whole: bool = False

    def __str__(self) -> str:
        how = " log" if self.log else f" step {self.step:g}" if self.step is not None else ""
        return f"{self.low:g}..{self.high:g}{how}"

    def holds(self, value: Any) -> bool:
        """Whether a value of the configuration lies in it."""
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not self.low <= value <= self.high:
            return False
        steps = 0.0 if self.step is None else (value - self.low) / self.step
        return abs(steps - round(steps)) < 1e-9

    def ends(self) -> tuple[Any, Any]:
        """The lowest and the highest value."""
        return (int(self.low), int(self.high)) if self.whole else (self.low, self.high)

    def up_to(self, most: int) -> Range | None:
        """What of it is not above `most`; None where that is less than two values."""
        return replace(self, high=min(self.high, most)) if self.low < most else None

    def share(self, value: float) -> float:
        """How far from the low end to the high one `value` is, 0..1, as the range is searched."""
        low, high, at = (math.log(one) if self.log else one for one in (self.low, self.high, value))
        return (at - low) / (high - low)

    def edge(self, value: Any) -> str | None:
        """On which edge `value` is, "lower" or "upper"; None in between."""
        share = self.share(value)
        return "lower" if share <= NEAR_END else "upper" if share >= 1 - NEAR_END else None

    def wider(self, side: str) -> list[Range]:
        """The range drawn out on the "lower" or "upper" side, far first: what the field takes is for it to say."""
        low, high, width = self.low, self.high, self.high - self.low
        if self.log:
            factors = (4, 2) if self.whole else (10, 3)
            ends = [low / factor if side == "lower" else high * factor for factor in factors]
        else:
            ends = [low - width / part if side == "lower" else high + width / part for part in (2, 4, 8)]
        ends = [math.floor(end) if self.whole else float(f"{end:.3g}") for end in ends]
        if side == "lower":
            return [replace(self, low=end) for end in ends if end < low and not (self.log and end <= 0)]
        return [replace(self, high=end) for end in ends if end > high]


@dataclass(frozen=True)
class Choices:
    """One of several values; of numbers those at the ends are edges."""

    values: tuple[Any, ...]

    def __str__(self) -> str:
        return ",".join(self.label(value) for value in self.values)

    @staticmethod
    def label(value: Any) -> str:
        """A value in a few characters."""
        if isinstance(value, (list, tuple)):
            return json.dumps(value, ensure_ascii=False)
        if isinstance(value, bool) or value is None:
            return json.dumps(value)
        return f"{value:g}" if isinstance(value, float) else str(value)

    @property
    def categories(self) -> list[Any]:
        """What Optuna is given: the values, or their text where it would not keep them (lists)."""
        plain = all(value is None or isinstance(value, (bool, int, float, str)) for value in self.values)
        return list(self.values) if plain else [self.label(value) for value in self.values]

    def value(self, category: Any) -> Any:
        """The value behind what Optuna gives back."""
        return self.values[self.categories.index(category)]

    def category(self, value: Any) -> Any:
        """What Optuna calls a value."""
        wanted = list(value) if isinstance(value, tuple) else value
        return self.categories[[list(v) if isinstance(v, tuple) else v for v in self.values].index(wanted)]

    def holds(self, value: Any) -> bool:
        """Whether a value of the configuration is one of them."""
        wanted = list(value) if isinstance(value, tuple) else value
        return any((list(v) if isinstance(v, tuple) else v) == wanted for v in self.values)

    @property
    def numbers(self) -> list[float] | None:
        """The values in order where all are numbers, else None."""
        if any(isinstance(value, bool) or not isinstance(value, (int, float)) for value in self.values):
            return None
        return sorted(self.values)

    def ends(self) -> tuple[Any, Any]:
        """The lowest and the highest value; the first and the last where they are no numbers."""
        numbers = self.numbers or self.values
        return numbers[0], numbers[-1]

    def up_to(self, most: int) -> Choices | None:
        """What of it is not above `most`; None where that is less than two values."""
        kept = tuple(value for value in self.values if value <= most)
        return Choices(kept) if len(kept) > 1 else None

    def edge(self, value: Any) -> str | None:
        """On which edge `value` is, "lower" or "upper", of three and more numbers; None in between."""
        numbers = self.numbers
        if numbers is None or len(numbers) < 3:
            return None
        return "lower" if value == numbers[0] else "upper" if value == numbers[-1] else None

    def wider(self, side: str) -> list[Choices]:
        """The list with the number that would come next on the "lower" or "upper" side."""
        numbers = self.numbers or []
        inner, end = (numbers[1], numbers[0]) if side == "lower" else (numbers[-2], numbers[-1])
        found = end * end / inner if inner > 0 and end > 0 else 2 * end - inner
        new = math.floor(found) if all(isinstance(one, int) for one in numbers) else float(f"{found:.3g}")
        if new in numbers:
            return []
        return [Choices((new, *self.values) if side == "lower" else (*self.values, new))]

    def new(self, before: Choices) -> Any:
        """The value that `before` does not have."""
        return next(value for value in self.values if not before.holds(value))


Dimension = Range | Choices


@dataclass(frozen=True)
class Space:
    """The fields that are searched, in order."""

    fields: dict[str, Dimension]
    kind: str
    """The strategy of the configuration."""

    def kinds(self) -> list[str]:
        """The strategies that a trial may have."""
        dimension = self.fields.get("adapt.kind")
        return [str(value) for value in dimension.values] if isinstance(dimension, Choices) else [self.kind]

    def of(self, kind: str) -> dict[str, Dimension]:
        """The fields of a trial with the strategy `kind`: those of other strategies are left out."""
        own = STRATEGIES.get(kind).model_fields
        return {
            path: dimension
            for path, dimension in self.fields.items()
            if not path.startswith("adapt.") or path == "adapt.kind" or path.removeprefix("adapt.") in own
        }

    def texts(self) -> dict[str, str]:
        """Every field with its dimension as text."""
        return {path: str(dimension) for path, dimension in self.fields.items()}


def read_space(
    given: Mapping[str, Any], content: Mapping[str, Any], base: Config, *, pinned: Sequence[str] = ()
) -> Space:
    """The space that is asked for, checked against the configuration.

    Args:
        given: dotted path -> range or values, as text or list; `{"": "usual"}` beside them or nothing at all: the
            usual space of the strategy.
        content: the configuration, as nested mappings.
        base: the same, parsed.
        pinned: fields that were given a value by flag: the usual space leaves them alone.

    Raises ConfigError with every fault, by dotted path and with the nearest known name.
    """
    asked = dict(given)
    usual = asked.pop("", None) == USUAL or not asked
    kind = base.adapt.kind
    kinds = _kinds(asked.get("adapt.kind"), kind)
    texts: dict[str, Any] = {}
    if usual:
        for one in kinds:
            for path, text in USUAL_SPACES.get(one, BASELINE).items():
                texts[path] = _joined(texts.get(path), text)
        texts = {path: text for path, text in texts.items() if path not in pinned}
    texts |= asked
    known = {flag.path: flag for flag in flags(Config)}
    faults: list[str] = []
    fields: dict[str, Dimension] = {}
    for path, said in texts.items():
        if said == FIXED:
            continue
        try:
            fields[path] = _dimension(path, said, known, kinds)
            _check_values(path, fields[path], content, kinds)
        except ConfigError as error:
            faults.append(f"  {path}: {error}")
    if faults:
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise ConfigError("\n".join([f"{count} in the space:", *faults]))
    if not fields:
        raise ConfigError('nothing to search: every field is fixed. Name one, as in --space.train.lr "1e-5..1e-3 log".')
    return Space(fields, kind)


def extension(path: str, dimension: Dimension, value: Any, content: Mapping[str, Any], kind: str) -> str | None:
    """Where the best value lies on an edge of what was searched, and the field takes values beyond it: what to search
    next, in words; None where that is not so.

    Args:
        path, dimension: the field.
        value: its best value.
        content: the configuration, as nested mappings.
        kind: the strategy of the best trial.
    """
    side = dimension.edge(value)
    if side is None:
        return None
    for wide in dimension.wider(side):
        if isinstance(wide, Range):
            end = wide.ends()[0 if side == "lower" else 1]
        else:
            end = wide.new(dimension) if isinstance(dimension, Choices) else None
        if refusal(path, end, content, [kind]) is None:
            return (
                f"{path}: the best value, {Choices.label(value)}, lies on the {side} edge of what was searched "
                f"({dimension}). Better ones may lie {'below' if side == 'lower' else 'above'}: search again with "
                f'--space.{path} "{wide}".'
            )
    return None


def suggest(trial: Any, path: str, dimension: Dimension) -> Any:
    """The value that an Optuna trial has for a field, as the configuration takes it."""
    if isinstance(dimension, Choices):
        return dimension.value(trial.suggest_categorical(path, dimension.categories))
    low, high = dimension.ends()
    if dimension.whole:
        return trial.suggest_int(path, low, high, step=int(dimension.step or 1), log=dimension.log)
    return trial.suggest_float(path, low, high, step=dimension.step, log=dimension.log)


# -- pieces ------------------------------------------------------------------------------------------------------------


def _kinds(said: Any, kind: str) -> list[str]:
    """The strategies a trial may have; those that do not exist are found later, with all other faults."""
    found = [str(value) for value in _values(said)] if said not in (None, FIXED) else [kind]
    return [STRATEGIES.canonical(one) for one in found if one in STRATEGIES] or [kind]


def _joined(before: str | None, text: str) -> str:
    """Two usual ranges of one field, where strategies are searched together: from the lowest to the highest value."""
    if before is None or before == text:
        return text
    if ".." not in text:
        return ",".join(str(n) for n in sorted({int(n) for n in (before + "," + text).split(",")}))
    ranges = [match for one in (before, text) if (match := _RANGE.fullmatch(one))]
    low, high = min(ranges, key=lambda m: float(m["low"]))["low"], max(ranges, key=lambda m: float(m["high"]))["high"]
    return f"{low}..{high}{' log' if ranges[0]['log'] else ''}"


def _dimension(path: str, said: Any, known: Mapping[str, Flag], kinds: Sequence[str]) -> Dimension:
    section = path.partition(".")[0]
    if reason := BARRED.get(path) or BARRED.get(section):
        raise ConfigError(f"cannot be searched: {reason}.")
    if path not in known:
        raise ConfigError(f"unknown.{did_you_mean(path, known)}")
    owners = [name for name, strategy in STRATEGIES if path.removeprefix("adapt.") in strategy.model_fields]
    if section == "adapt" and path != "adapt.kind" and not set(owners) & set(kinds):
        raise ConfigError(f"belongs to {' and '.join(owners)}, not to {' or '.join(kinds)}")
    if isinstance(said, str) and ".." in said:
        return _range(said, known[path].type)
    values = _values(said)
    if len({json.dumps(value) for value in values}) < len(values):
        raise ConfigError(f"a value stands twice in {said}.")
    if len(values) < 2:
        raise ConfigError(f"one value, {said}, leaves nothing to choose: {_FORM}; or fix it with --{path} {said}.")
    return Choices(tuple(tuple(value) if isinstance(value, list) else value for value in values))


def _range(said: str, kind: str) -> Range:
    match = _RANGE.fullmatch(said.strip())
    if match is None:
        raise ConfigError(f"{said!r} is no range: {_FORM}.")
    whole, real = "int" in kind.split("|"), "float" in kind.split("|")
    if not whole and not real:
        raise ConfigError(f"takes {kind}, of which there is no range: give values with commas between them.")
    low, high = _number(match["low"], whole and not real), _number(match["high"], whole and not real)
    if not low < high:
        raise ConfigError(f"{said!r} is empty: the low end has to come first, and be below the other.")
    if match["log"] and low <= 0:
        raise ConfigError(f"{said!r}: log needs a low end above 0.")
    step = _number(match["step"], whole and not real) if match["step"] else None
    if step is not None and not 0 < step <= high - low:
        raise ConfigError(f"{said!r}: the step has to be above 0 and within the range.")
    return Range(low, high, bool(match["log"]), step, whole and not real)


def _number(text: str, whole: bool) -> float:
    try:
        found = float(text)
    except ValueError:
        raise ConfigError(f"{text!r} is no number: {_FORM}.") from None
    if not math.isfinite(found):
        raise ConfigError(f"{text} is no end of a range: {_FORM}.")
    if whole and found != int(found):
        raise ConfigError(f"takes whole numbers, got {text}.")
    return int(found) if whole else found


def _values(said: Any) -> list[Any]:
    """`4,8,16` or a list -> the values, each read as YAML reads it."""
    if isinstance(said, (list, tuple)):
        return list(said)
    if not isinstance(said, str):
        return [said]
    return [_value(part.strip()) for part in said.split(",") if part.strip()]


def _value(text: str) -> Any:
    if re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", text):  # which YAML 1.1 takes for text
        return float(text)
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _check_values(path: str, dimension: Dimension, content: Mapping[str, Any], kinds: Sequence[str]) -> None:
    """Raise ConfigError where the configuration does not take a value (of a range, an end)."""
    values = dimension.ends() if isinstance(dimension, Range) else dimension.values
    for value in values:
        if (fault := refusal(path, value, content, kinds)) is not None:
            raise ConfigError(fault)


def refusal(path: str, value: Any, content: Mapping[str, Any], kinds: Sequence[str]) -> str | None:
    """What is wrong with `value` for the field `path` of a configuration; None where it is taken."""
    own = path.removeprefix("adapt.")
    for kind in kinds:
        if path.startswith("adapt.") and path != "adapt.kind" and own not in STRATEGIES.get(kind).model_fields:
            continue
        changes = {path: value} if path == "adapt.kind" else {"adapt.kind": kind, path: value}
        try:
            Config.parse(override(content, changes), check_files=path == "model.weights")
        except ConfigError as error:
            return "; ".join(dict.fromkeys(_own_faults(str(error), path)))
    return None


def _own_faults(text: str, path: str) -> Iterator[str]:
    """The faults of a field among those of a configuration, or all of them where none is its own."""
    lines = [line.strip() for line in text.splitlines()[1:]]
    mine = [line.removeprefix(f"{path}: ") for line in lines if line.startswith(f"{path}: ")]
    yield from mine or lines
