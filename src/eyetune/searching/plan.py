"""What `eyetune search` is told: the configuration that all trials share, the space, what they are judged by.

The section `search:` of the file and the flags say the same; flags win. Importable without torch and Optuna.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

from eyetune.config import Config, flattened, override
from eyetune.errors import ConfigError, did_you_mean
from eyetune.flags import own_words, parse
from eyetune.searching.space import FIXED, USUAL, Space, read_space

Pruner = Literal["median", "hyperband", "none"]

OPTIONS = ("trials", "objectives", "pruner", "storage", "study", "timeout", "keep_checkpoints", "space")
"""The verb's own words, and the fields of the section `search:`."""

OUT = "runs/search"
"""Where a search goes when nobody says."""

TRIALS = 50

COSTS = {
    "trainable_parameters": "numbers that training changes",
    "seconds": "seconds of training, validation included",
    "peak_memory": "most bytes of memory while it ran",
}
"""What a trial may be judged by besides the metrics: less is better."""

_EXAMPLES = {
    "trials": "50",
    "objectives": "qwk,trainable_parameters",
    "pruner": "median",
    "storage": "sqlite:///search.db",
    "study": "lora",
    "timeout": "3600",
    "space": USUAL,
}


@dataclass(frozen=True)
class Objective:
    """What trials are judged by: a metric on the validation split, or a cost."""

    name: str
    higher: bool

    @property
    def direction(self) -> str:
        """As Optuna says it."""
        return "maximize" if self.higher else "minimize"

    @property
    def cost(self) -> bool:
        """Whether it is a cost, and no score."""
        return self.name in COSTS


@dataclass(frozen=True)
class Plan:
    """One search, as it is asked for."""

    content: Mapping[str, Any]
    """The configuration of the file and the flags, without the section `search`."""
    source: str
    base: Config
    """The same, parsed: what holds for every trial but for the space."""
    space: Space
    out: Path
    objectives: tuple[str, ...] = ()
    """By name; none: the metric that chooses the best epoch."""
    pruner: Pruner = "median"
    trials: int = TRIALS
    timeout: float | None = None
    storage: str | None = None
    study: str = "search"
    keep_checkpoints: bool = False
    notes: tuple[str, ...] = ()

    def config(self, parameters: Mapping[str, Any], out: Path) -> Config:
        """The configuration of a trial with these values of the searched fields, by dotted path.

        Raises ConfigError when they do not go together.
        """
        kind = str(parameters.get("adapt.kind", self.base.adapt.kind))
        content = override(self.content, {"adapt.kind": kind})
        if kind != self.base.adapt.kind:  # a rate in the file is that of its strategy
            content = override(content, {"train.lr": None})
        fixed: dict[str, Any] = {"out": str(out), "data.split_seed": self.base.split_seed}
        if scores := [name for name in self.objectives if name not in COSTS]:
            fixed["train.metric"] = scores[0]
        return Config.parse(override(content, fixed | dict(parameters)), check_files=False, source="the trial")

    def judged(self, metric: str, task: str) -> tuple[Objective, ...]:
        """The objectives with their directions.

        Args:
            metric: chooses the best epoch, and is meant where none is named.
            task: whose metrics can be asked for: "classification", "multilabel" or "regression".

        Raises ConfigError for a name that is neither a metric of the task nor a cost.
        """
        from eyetune.metrics.metric import of_task
        from eyetune.metrics.scores import METRICS

        known = [name for name, entry in of_task(task).items() if not entry.descriptive]

        found = []
        for name in self.objectives or (metric,):
            if name in COSTS:
                found.append(Objective(name, higher=False))
            elif name in METRICS and METRICS.canonical(name) in known:
                found.append(Objective(METRICS.canonical(name), METRICS.get(name).higher_is_better))
            else:
                raise ConfigError(
                    f"--objectives: {name!r} judges no {task} trial.{did_you_mean(name, [*known, *COSTS])} "
                    f"These do: {', '.join([*known, *COSTS])}."
                )
        return tuple(found)


def read_plan(words: Sequence[str]) -> Plan:
    """The search that a command line asks for: `[CONFIG.yaml] [--trials N] [--space.FIELD …] [--section.field v]`.

    Raises ConfigError with what is wrong.
    """
    own, rest = _own_words(words)
    given = parse(rest)
    content = {} if given.positional is None else Config.read(Path(given.positional))
    section = content.pop("search", None) or {}
    if not isinstance(section, Mapping):
        raise ConfigError(f"search: must be a section with {', '.join(OPTIONS)}, got {section!r}.")
    if unknown := [str(name) for name in section if name not in OPTIONS]:
        raise ConfigError(f"search.{unknown[0]}: unknown.{did_you_mean(unknown[0], OPTIONS)}")
    spaced = {path: value for path, value in given.overrides.items() if path.startswith("space.")}
    plain = {path: value for path, value in given.overrides.items() if path not in spaced}
    content = override(content, plain)
    source = given.positional or "the flags"
    base = Config.parse(content, source=source)
    said: dict[str, Any] = dict(section) | own
    asked = _asked_space(section.get("space"), own.get("space"), spaced)
    space = read_space(asked, content, base, pinned=list(plain))
    objectives = _objectives(said.get("objectives"))
    pruner, notes = _pruner(said.get("pruner"), objectives)
    timeout = said.get("timeout")
    out = Path(str(content.get("out", OUT)))
    return Plan(
        content=content,
        source=source,
        base=base,
        space=space,
        out=out,
        objectives=objectives,
        pruner=pruner,
        trials=int(_number("trials", said.get("trials", TRIALS), whole=True)),
        timeout=None if timeout is None else _number("timeout", timeout),
        storage=None if said.get("storage") is None else str(said["storage"]),
        study=str(said.get("study") or (said.get("storage") and out.name) or "search"),
        keep_checkpoints=_truth(said.get("keep_checkpoints", False)),
        notes=notes,
    )


def settled(plan: Plan, objectives: Sequence[Objective]) -> Plan:
    """The plan with its objectives by their registered names."""
    return replace(plan, objectives=tuple(one.name for one in objectives))


def fitting(plan: Plan, images: int) -> Plan:
    """The plan without batch sizes beyond the number of images to train on: such trials can only fail.

    Raises ConfigError when fewer than two sizes are left.
    """
    path = "train.batch_size"
    before = plan.space.fields.get(path)
    if before is None or before.ends()[1] <= images:
        return plan
    after = before.up_to(images)
    if after is None:
        raise ConfigError(
            f"{path}: {before} leaves nothing to choose, for there are {images} images to train on. Search smaller "
            f"ones, or none (--space.{path} fixed)."
        )
    space = replace(plan.space, fields=plan.space.fields | {path: after})
    note = f"{path}: {after} in place of {before}, for there are {images} images to train on"
    return replace(plan, space=space, notes=(*plan.notes, note))


# -- pieces ------------------------------------------------------------------------------------------------------------


def _own_words(words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The verb's own options as text, and the words that are left."""
    given, rest = own_words(words, _EXAMPLES, switches=("keep_checkpoints",))
    own: dict[str, Any] = {}
    for name, text in given:
        if name in own:
            raise ConfigError(f"--{name.replace('_', '-')} stands twice.")
        own[name] = text
    return own, rest


def _asked_space(filed: Any, word: Any, flagged: Mapping[str, Any]) -> dict[str, Any]:
    """What the file and the flags say of the space, by dotted path; under "" whether the usual one is meant, too."""
    asked: dict[str, Any] = {}
    if isinstance(filed, Mapping):
        asked = flattened(filed)
    elif filed is not None:
        asked[""] = filed
    if word is not None:
        asked[""] = word
    if asked.get("") not in (None, USUAL):
        raise ConfigError(f"--space {asked['']}: the usual space is {USUAL!r}; a field is --space.train.lr RANGE.")
    fields = {path.removeprefix("space."): value for path, value in flagged.items()}
    if fields and all(value == FIXED for value in fields.values()) and not asked:
        asked[""] = USUAL
    return asked | fields


def _objectives(said: Any) -> tuple[str, ...]:
    if said is None:
        return ()
    parts = said.split(",") if isinstance(said, str) else said
    if not isinstance(parts, (list, tuple)) or not all(isinstance(part, str) and part.strip() for part in parts):
        raise ConfigError(f"--objectives {said}: names with commas between them, as in {_EXAMPLES['objectives']}.")
    names = tuple(part.strip() for part in parts)
    if len(set(names)) < len(names):
        raise ConfigError(f"--objectives {said}: every one once.")
    if all(name in COSTS for name in names):
        raise ConfigError(f"--objectives {said}: one has to be a score, or the cheapest always wins: qwk,{said}")
    return names


def _pruner(said: Any, objectives: Sequence[str]) -> tuple[Pruner, tuple[str, ...]]:
    """The pruner, and what there is to say of it."""
    if said is not None and said not in get_args(Pruner):
        raise ConfigError(f"--pruner {said}: {', '.join(get_args(Pruner))}.{did_you_mean(said, get_args(Pruner))}")
    if len(objectives) > 1:
        if said not in (None, "none"):
            raise ConfigError(
                f"--pruner {said}: trials with several objectives cannot be pruned (Optuna has no rule for it). Leave "
                "it out, or search one objective."
            )
        return "none", ("several objectives: no trial is stopped early (Optuna cannot prune then)",)
    return cast(Pruner, said or "median"), ()


def _number(name: str, said: Any, *, whole: bool = False) -> float:
    try:
        found = float(said)
    except (TypeError, ValueError):
        found = -1.0
    if isinstance(said, bool) or found <= 0 or found == float("inf") or (whole and found != int(found)):
        what = "a whole number above 0" if whole else "a number of seconds above 0"
        raise ConfigError(f"--{name} {said}: {what}, as in --{name} {_EXAMPLES[name]}.")
    return found


def _truth(said: Any) -> bool:
    found = {"true": True, "false": False}.get(str(said).lower())
    if found is None:
        raise ConfigError(f"--keep-checkpoints {said}: true or false.")
    return found
