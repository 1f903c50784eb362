"""A command of the older guides: its options are put into the words of `eyetune`, shown, and carried out."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from eyetune import processes
from eyetune.cli import app, main
from eyetune.config import Config, flags
from eyetune.errors import ConfigError, UserError, did_you_mean
from eyetune.flags import SHORT, read_value
from eyetune.older_config import KEYS

Given = Mapping[str, Any]
"""The options of a command by name, None where one is not given; those that are keys of the YAML by the key's name."""


class Meant(NamedTuple):
    """What a command of the guides comes to."""

    words: list[str]
    """Behind `eyetune`."""
    notes: Sequence[str] = ()
    """What the user should know of the translation, a line each."""


class Parser(argparse.ArgumentParser):
    """Options in the guides' spelling; what is wrong is a ConfigError."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse found."""
        raise ConfigError(f"{message}. See --help.")

    def names(self) -> list[str]:
        """Every option, without its dashes."""
        return [option.lstrip("-") for option in self._option_string_actions]

    def add_keys(self, shown: Mapping[str, str]) -> None:
        """Every key of the guides' YAML as an option in each of its spellings: `--lora_r 16`.

        `shown`: those that the help lists, in the spelling to be listed -> what it says.
        """
        for key in KEYS:
            if key.gone:
                continue
            kind: dict[str, Any] = {"nargs": "?", "const": True} if isinstance(key.default, bool) else {}
            for name in dict.fromkeys(name for name in (key.name, *key.others) if name != "wandb.enabled"):
                option = f"--{name.rpartition('.')[2]}"
                if option.lstrip("-") not in self.names():
                    said: dict[str, Any] = {
                        "help": shown.get(name, argparse.SUPPRESS),
                        "metavar": "VALUE",
                        "type": read_value,
                    }
                    self.add_argument(option, dest=key.name, **said, **kind)


@dataclass(frozen=True)
class Door:
    """One command of the guides.

    Args:
        script: its file, as the guides name it.
        about: what it does.
        verb: where it leads, behind `eyetune`.
        declare: adds its options to a parser.
        meaning: the options, and words that belong to the verb itself -> what it comes to. Raises UserError.
        passed: names of the verb's own options, which may be added.
    """

    script: str
    about: str
    verb: str
    declare: Callable[[Parser], None]
    meaning: Callable[[Given, list[str]], Meant]
    passed: Callable[[], Iterable[str]]

    def enter(self, arguments: Sequence[str] | None = None) -> int:
        """Translate, say once what it comes to, carry that out; returns the exit code of `eyetune`."""
        given = list(sys.argv[1:] if arguments is None else arguments)
        traced = [word for word in given if word == "--traceback"]
        try:
            meant = self.translate([word for word in given if word != "--traceback"])
        except UserError as error:
            return processes.fail(f"{Path(self.script).name}: {error}", error.exit_code)
        if processes.rank() == 0:
            for note in meant.notes:
                print(note, file=sys.stderr)
            print(f"In EyeTune's own words:\n  eyetune {shlex.join(meant.words)}", flush=True)
        return main([*meant.words, *traced])

    def translate(self, arguments: Sequence[str]) -> Meant:
        """What a command line comes to. Raises UserError for what cannot be understood; leaves after `--help`."""
        parser = self.parser()
        own = parser.names()
        passed = {_plain(name) for name in self.passed()}
        for word in arguments:
            name = _plain(word.partition("=")[0])
            if word.startswith("--") and not {name, name.removeprefix("no_")} & {*own, *passed}:
                raise ConfigError(f"{word}: unknown.{did_you_mean(name, [*own, *passed])} See --help.")
        known, rest = parser.parse_known_args([_spelled(word, own) for word in arguments])
        for before, word in zip(["", *rest], rest, strict=False):
            if not word.startswith("-") and not before.startswith("--"):
                raise ConfigError(f"did not expect {word!r}. See --help.")
        return self.meaning(vars(known), rest)

    def parser(self) -> Parser:
        """The options."""
        parser = Parser(
            prog=f"python {self.script}",
            usage="%(prog)s [options]",
            allow_abbrev=False,
            formatter_class=_Help,
            description=f"{self.about}\n\nLeads to: eyetune {self.verb}, which is shown and carried out.",
            epilog=f"Options of eyetune {self.verb} may be added as they are (eyetune {self.verb} --help).\n"
            "Dashes in names of options may be underscores. For research; not a medical device.",
        )
        self.declare(parser)
        return parser


class _Help(argparse.RawDescriptionHelpFormatter):
    """An option and what it means on one line, where they fit."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=120)


def fields() -> set[str]:
    """Every field of the configuration as a flag: what the verbs that take a configuration understand."""
    return {flag.path for flag in flags(Config)} | set(SHORT)


def options_of(*verb: str) -> Callable[[], set[str]]:
    """The options of a verb that takes no configuration."""

    def found() -> set[str]:
        command = app
        for name in verb:
            command = command[name]
        return {name for argument in command.assemble_argument_collection() for name in argument.names}

    return found


def spoken(options: Mapping[str, Any]) -> list[str]:
    """Options of a verb and their values as its words; those without a value (None) are not said."""
    return [word for option, value in options.items() if value is not None for word in (option, str(value))]


def _plain(name: str) -> str:
    """`--Batch-size` as options are compared: `batch_size`."""
    return name.lstrip("-").replace("-", "_")


def _spelled(word: str, own: Sequence[str]) -> str:
    """An option of our own with dashes or underscores, as it is declared; other words as they are."""
    name, equals, value = word.partition("=")
    if word.startswith("--") and _plain(name) in own:
        return f"--{_plain(name)}{equals}{value}"
    return word
