"""Command-line words to configuration overrides: every field of the configuration is also a flag.

`--train.lr 1e-3`, `--train.lr=1e-3`, `--data.skip-unreadable` (true), `--no-data.crop` (false). Values are read as
YAML, so a flag means what the same text means in the configuration file.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from cyclopts import Parameter
from cyclopts.validators import Number

from eyetune.config import Config, RunConfig, flags
from eyetune.errors import ConfigError, did_you_mean

#: Options that several verbs share, outside the configuration.
Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Workers = Annotated[int, Parameter(validator=Number(gte=0))] | Literal["auto"]
BatchSize = Annotated[int, Parameter(validator=Number(gte=1))]
Switch = Annotated[bool, Parameter(negative=())]
Several = Annotated[list[str] | None, Parameter(negative=())]


@Parameter(name="*")
@dataclass(frozen=True)
class Computing:
    """The options of every verb that passes images through a trained network."""

    device: Device = "auto"
    """auto, cpu, cuda or mps."""
    precision: Precision | None = None
    """auto, fp32, bf16 or fp16 (default: as in training)."""
    workers: Workers = "auto"
    """Processes that read images; auto chooses by the number of processors."""
    batch_size: BatchSize = 32
    """Images in one forward pass."""
    weights: str | None = None
    """Where the base weights are now, when they moved since training."""
    no_cache: Switch = False
    """Keep no prepared images or features on disk, and use none."""

    def loading(self) -> dict[str, Any]:
        """Those that decide how the network is loaded, as `load_run` takes them."""
        return {
            "device": self.device,
            "precision": self.precision,
            "weights": self.weights,
            "cache": not self.no_cache,
        }


#: When nothing is said.
USUAL = Computing()


@Parameter(name="*")
@dataclass(frozen=True)
class Reading:
    """The options of every verb that passes photographs and texts through an image-text model."""

    device: Device = "auto"
    """auto, cpu, cuda or mps."""
    precision: Precision | None = None
    """auto, fp32, bf16 or fp16 (default: as in training)."""
    workers: Workers = "auto"
    """Threads that read photographs; auto chooses by the number of processors."""
    batch_size: BatchSize = 32
    """Patients in one forward pass."""
    text: str | None = None
    """For a RET-CLIP file as RUN: its text encoder's folder with the vocabulary, or the encoder's name on the hub."""

    def loading(self) -> dict[str, Any]:
        """Those that decide how the model is loaded, as `open_clip_run` takes them."""
        return {"text": self.text, "device": self.device, "precision": self.precision}


#: When nothing is said.
READING = Reading()

#: Short names for what people type most.
SHORT = {
    "skip_unreadable": "data.skip_unreadable",
    "cache": "data.cache",
    "skip_nonfinite": "train.skip_nonfinite",
}

_NUMBER = re.compile(r"-(\d|\.\d)")


def table_and_images(word: str) -> tuple[str, Path | None]:
    """`TABLE[:IMAGES]` -> (table, images)."""
    if not Path(word).exists() and not word.startswith("hf:"):
        table, colon, images = word.rpartition(":")
        if colon and table:
            return table, Path(images)
    return word, None


def parse_dataset(word: str) -> tuple[str, tuple[str, Path | None]]:
    """`NAME=TABLE[:IMAGES]` -> (name, (table, images)). Raises ConfigError."""
    name, equals, rest = word.partition("=")
    if not (name and equals and rest):
        raise ConfigError(f"--data {word}: write NAME=TABLE or NAME=TABLE:IMAGES, as in --data messidor=messidor.csv.")
    return name, table_and_images(rest)


def parse_maps(words: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """`NAME=MAP` words -> map by name. Raises ConfigError for a name that no --data has, or has twice."""
    found: dict[str, str] = {}
    for word in words:
        name, equals, rest = word.partition("=")
        if not (name and equals and rest):
            raise ConfigError(f"--map {word}: write NAME=MAP, as in --map messidor=referable.")
        if name not in names:
            raise ConfigError(f"--map {word}: no --data is called {name!r}.{did_you_mean(name, names)}")
        if name in found:
            raise ConfigError(f"--map: two of them are for {name}.")
        found[name] = rest
    return found


@dataclass(frozen=True)
class Words:
    """What a command line said: at most one positional word, and overrides by dotted path."""

    positional: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)


def parse(words: Sequence[str], config: type[RunConfig] = Config) -> Words:
    """Read `[POSITIONAL] [--section.field value]…`. Raises ConfigError for a second positional word or a short flag.

    `config` says which fields are true or false. Whether the fields exist and the values fit is for it to say, too: it
    reports all faults together.
    """
    positional: str | None = None
    overrides: dict[str, Any] = {}
    waiting = list(words)
    switches = {flag.path for flag in flags(config) if flag.type == "true|false"}
    negatable = switches | {flag.path for flag in flags(config) if "true|false" in flag.type.split("|", 1)[-1]}
    while waiting:
        word = waiting.pop(0)
        if not word.startswith("--"):
            if positional is not None or word.startswith("-"):
                raise ConfigError(f"did not expect {word!r}: flags look like --train.lr 1e-3, and there is one CONFIG.")
            positional = word
            continue
        name, equals, text = word[2:].partition("=")
        path = name.replace("-", "_")
        path = SHORT.get(path, path)
        negated = SHORT.get(path.removeprefix("no_"), path.removeprefix("no_"))
        if (path in switches or (path != negated and negated in negatable)) and not equals:
            overrides[negated] = path == negated
            if path == negated and waiting and isinstance(read_value(waiting[0]), bool):
                overrides[negated] = read_value(waiting.pop(0))
            continue
        if equals:
            overrides[path] = read_value(text)
        elif waiting and (not waiting[0].startswith("-") or _NUMBER.match(waiting[0])):
            overrides[path] = read_value(waiting.pop(0))
        else:
            raise ConfigError(f"--{name} needs a value, as in --{name} VALUE.{did_you_mean(path, switches)}")
    return Words(positional, overrides)


def own_words(
    words: Sequence[str], examples: Mapping[str, str], *, switches: Collection[str] = ()
) -> tuple[list[tuple[str, str]], list[str]]:
    """A verb's own options as (name, text), in order, and the words that are left for :func:`parse`.

    Args:
        words: the command line.
        examples: option -> a value, for messages. Dashes in the words are underscores in the names.
        switches: options that may stand alone, which then say "true".

    Raises ConfigError for an option without its value, and for one that is nearer to these than to any field.
    """
    own: list[tuple[str, str]] = []
    rest: list[str] = []
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        shown, equals, text = word.removeprefix("--").partition("=")
        name = shown.replace("-", "_")
        if not word.startswith("--") or name not in {*examples, *switches}:
            if word.startswith("--"):
                _check_spelling(shown, name, {*examples, *switches})
            rest.append(word)
            continue
        if not equals and name in switches:
            text = "true"
        elif not equals:
            if not waiting or waiting[0].startswith("--"):
                raise ConfigError(f"--{shown} needs a value, as in --{shown} {examples[name]}.")
            text = waiting.pop(0)
        own.append((name, text))
    return own, rest


def _check_spelling(shown: str, name: str, own: set[str]) -> None:
    """Raise ConfigError for `--trails`, where `trials` is one of the verb's own options and no field is nearer."""
    fields = {path.partition(".")[0] for path in (flag.path for flag in flags(Config))} | set(SHORT)
    if "." not in name and name.removeprefix("no_") not in fields:
        hint = did_you_mean(name, sorted(own | fields))
        if any(f"'{one}'" in hint for one in own):
            raise ConfigError(f"--{shown}: unknown.{hint}")


def to_resume(given: Words) -> tuple[str, bool] | None:
    """The run folder behind `--resume`, and whether `--from previous` stood there too; None without `--resume`.

    Raises ConfigError when something else was said as well.
    """
    if "resume" not in given.overrides:
        return None
    overrides = dict(given.overrides)
    folder, start = overrides.pop("resume"), overrides.pop("from", "last")
    if not isinstance(folder, str) or given.positional or overrides:
        raise ConfigError(
            "--resume RUN takes a run folder, and at most --from previous: the run has its own configuration."
        )
    if start not in ("last", "previous"):
        raise ConfigError(f"--from {start}: a run goes on from its last checkpoint, or from the previous one.")
    return folder, start == "previous"


def help_text(config: type[RunConfig] = Config, width: int = 76) -> str:
    """How configuration and flags go together, then every field as a flag: its type, default and meaning."""
    lines = [
        f"CONFIG.yaml and flags may be mixed; flags win. {config.EXAMPLE[0]}:",
        f"  {config.EXAMPLE[1]}",
        "With --resume RUN an interrupted run goes on exactly where it stopped;",
        "with --from previous behind it, from the checkpoint before the last.",
    ]
    section = None
    for path, kind, default, meaning in flags(config):
        if path.rpartition(".")[0] != section:
            section = path.rpartition(".")[0]
            lines += ["", f"{section}:" if section else "run:"]
        shown = "" if default is None else f" [default: {_text(default)}]"
        lines.append(f"  --{path} {kind}{shown}")
        lines += textwrap.wrap(meaning, width, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def read_value(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: 2026-99-99 looks like a day
        return text
