"""Command-line words to overrides, and the help they come with."""

from __future__ import annotations

import pytest

from eyetune.config import flags
from eyetune.errors import ConfigError
from eyetune.flags import help_text, parse


def test_words_become_overrides() -> None:
    found = parse(["a.yaml", "--train.lr", "1e-3", "--train.epochs=7", "--adapt.targets", "[qkv, proj]"])
    assert found.positional == "a.yaml"
    assert found.overrides == {"train.lr": "1e-3", "train.epochs": 7, "adapt.targets": ["qkv", "proj"]}


def test_switches_take_no_value_unless_it_is_one() -> None:
    assert parse(["--data.skip-unreadable", "a.yaml"]).positional == "a.yaml"
    assert parse(["--data.skip_unreadable", "false"]).overrides == {"data.skip_unreadable": False}
    assert parse(["--no-data.crop", "--skip-unreadable"]).overrides == {
        "data.crop": False,
        "data.skip_unreadable": True,
    }


def test_a_flag_without_its_value_is_refused() -> None:
    for words in (["--train.lr", "--seed", "1"], ["--seed"]):
        with pytest.raises(ConfigError, match="needs a value"):
            parse(words)


def test_a_negated_switch_leaves_the_next_word_alone() -> None:
    found = parse(["--no-data.crop", "a.yaml"])
    assert found.positional == "a.yaml"
    assert found.overrides == {"data.crop": False}


def test_negative_numbers_are_values() -> None:
    assert parse(["--train.lr", "-0.1"]).overrides == {"train.lr": -0.1}


@pytest.mark.parametrize("words", [["a.yaml", "b.yaml"], ["-x"], ["a.yaml", "--seed", "1", "b.yaml"]])
def test_what_is_no_flag_is_refused(words: list[str]) -> None:
    with pytest.raises(ConfigError, match="did not expect"):
        parse(words)


def test_the_help_names_every_field() -> None:
    text = help_text()
    for flag in flags():
        assert f"--{flag.path} {flag.type}" in text
        assert flag.help, f"{flag.path} has no docstring"
