"""Named things that one file adds: backbones, strategies, metrics. Outside packages register by entry point."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Generic, TypeVar

from eyetune.errors import UserError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """A mapping from name to entry, in order of registration.

    Args:
        kind: what an entry is called in messages ("backbone", "strategy", "metric").
        group: the entry-point group (for example `eyetune.backbones`) through which other installed packages add
            entries: each entry point names a module or object whose import registers.
    """

    def __init__(self, kind: str, group: str) -> None:
        self.kind = kind
        self.group = group
        self._entries: dict[str, T] = {}
        self._aliases: dict[str, str] = {}
        self._outside_loaded = False

    def add(self, name: str, entry: T, *, aliases: tuple[str, ...] = ()) -> T:
        """Register `entry`. A name that is taken already is a programming error (ValueError)."""
        for taken in (name, *aliases):
            if taken in self._entries or taken in self._aliases:
                raise ValueError(f"{self.kind} {taken!r} is registered twice")
        self._entries[name] = entry
        self._aliases.update(dict.fromkeys(aliases, name))
        return entry

    def register(self, name: str, *, aliases: tuple[str, ...] = ()) -> Callable[[T], T]:
        """Decorator form of :meth:`add`."""
        return lambda entry: self.add(name, entry, aliases=aliases)

    def canonical(self, name: str) -> str:
        """The registered name behind `name`. Raises UserError, with the nearest known name, when there is none."""
        self._load_outside()
        resolved = self._aliases.get(name, name)
        if resolved not in self._entries:
            known = [*self._entries, *self._aliases]
            raise UserError(
                f"unknown {self.kind} {name!r}.{did_you_mean(name, known)} Known: {', '.join(self._entries)}."
            )
        return resolved

    def get(self, name: str) -> T:
        """The entry called `name` (or an alias of it). Raises UserError as :meth:`canonical` does."""
        return self._entries[self.canonical(name)]

    def names(self) -> tuple[str, ...]:
        """Every registered name, without aliases."""
        self._load_outside()
        return tuple(self._entries)

    def aliases(self, name: str) -> tuple[str, ...]:
        """The other names of the entry registered as `name`."""
        return tuple(alias for alias, entry in self._aliases.items() if entry == name)

    def __contains__(self, name: object) -> bool:
        self._load_outside()
        return name in self._entries or name in self._aliases

    def __iter__(self) -> Iterator[tuple[str, T]]:
        self._load_outside()
        return iter(self._entries.items())

    def _load_outside(self) -> None:
        if not self._outside_loaded:
            self._outside_loaded = True
            for point in metadata.entry_points(group=self.group):
                point.load()
