"""The guides' configuration as their programs use it: read from YAML, read and set by attribute, said in our words."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from eyetune import older_config
from eyetune.config import read_yaml
from eyetune.errors import did_you_mean
from eyetune.flags import read_value
from eyetune.older_config import BY_NAME, KEYS, Translation, read_keys, translate


class Group:
    """The keys of one section as attributes: `config.training.batch_size`.

    Where the file does not give a key, its default stands. A name that there is not raises AttributeError
    with the nearest one. Other spellings of a key (`training.epochs`) are that key.
    """

    def __init__(self, section: str, said: dict[str, Any]) -> None:
        self.__dict__.update(_section=section, _said=said)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        key = self._key(name)
        return self._said.get(key.name, key.default)

    def __setattr__(self, name: str, value: Any) -> None:
        self._said[self._key(name).name] = value

    def __dir__(self) -> list[str]:
        return list(self._names())

    def __repr__(self) -> str:
        return f"{self._section or 'config'}({', '.join(f'{name}={getattr(self, name)!r}' for name in self._names())})"

    def to_dict(self) -> dict[str, Any]:
        """Every key of the section, defaults where nothing is said."""
        return {name: getattr(self, name) for name in self._names()}

    def _key(self, name: str) -> older_config.Key:
        path = f"{self._section}.{name}" if self._section else name
        if path not in BY_NAME:
            hint = did_you_mean(name, self._names())
            raise AttributeError(f"the guides' configuration has no {path}.{hint}")
        return BY_NAME[path]

    def _names(self) -> Iterator[str]:
        """Keys of the section under their first spelling, those without a meaning left out."""
        for key in KEYS:
            section, _, name = key.name.rpartition(".")
            if section == self._section and not key.gone:
                yield name


class GuideConfig(Group):
    """A configuration of the guides: sections `model`, `data` and `training`, and `seed`, `device`, `output_dir`, …"""

    model: Group
    data: Group
    training: Group

    def __init__(self, said: Mapping[str, Any] | None = None, source: str = "the configuration") -> None:
        """`said`: values by the name of the key, `{"model.lora_r": 8}`; `source`: what messages call it."""
        own = dict(said or {})
        super().__init__("", own)
        self.__dict__.update({name: Group(name, own) for name in ("model", "data", "training")}, source=source)

    @classmethod
    def from_yaml(cls, path: str | Path) -> GuideConfig:
        """As :func:`read_guide_config`."""
        return read_guide_config(path)

    @property
    def said(self) -> Mapping[str, Any]:
        """What was given or set, by the name of the key."""
        return dict(self.__dict__["_said"])

    def to_dict(self) -> dict[str, Any]:
        """All of it as nested sections."""
        return super().to_dict() | {name: self.__dict__[name].to_dict() for name in ("model", "data", "training")}

    def translation(self) -> Translation:
        """The same in our words. Raises ConfigError for a type or variant of model that there is not."""
        return translate(self.said, self.__dict__["source"])


def read_guide_config(path: str | Path) -> GuideConfig:
    """Read a YAML file of the guides.

    Raises ConfigError when it cannot be read, or has keys that nobody knows, with the nearest known ones.
    """
    content = read_yaml(Path(path))
    return GuideConfig(read_keys(content, str(path)), str(path))


def to_words(config: GuideConfig) -> list[str]:
    """The flags of `eyetune finetune` that say the same: `["--model.backbone", "retfound", …]`.

    Raises ConfigError for a type or variant of model that there is not.
    """
    return as_flags(config.translation().content)


def as_flags(content: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Nested sections as flags that :func:`eyetune.flags.parse` reads back to the same values."""
    words: list[str] = []
    for name, value in content.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            words += as_flags(value, f"{path}.")
        elif isinstance(value, bool):
            words.append(f"--{path}" if value else f"--no-{path}")
        elif value is not None:
            text = _text(value)
            words += [f"--{path}={text}"] if text.startswith("-") else [f"--{path}", text]
    return words


def _text(value: Any) -> str:
    """A value as YAML reads it back; text of which YAML would make something else stands between quotes."""
    if isinstance(value, (list, tuple)):
        joined = ",".join(map(str, value))
        plain = all(isinstance(one, str) and one and "," not in one for one in value) and read_value(joined) == joined
        return joined if plain else json.dumps(list(value), ensure_ascii=False)
    return (
        json.dumps(value, ensure_ascii=False) if isinstance(value, str) and read_value(value) != value else str(value)
    )
