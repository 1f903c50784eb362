"""What a user can mend, said in one message.

Every error that a user's input can cause is a :class:`UserError`: the command line prints its text without a
traceback and leaves with :attr:`UserError.exit_code`. Anything else that escapes is a defect of EyeTune.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can mend. The text says what was wrong, where, and what to do."""

    exit_code = 2


class ConfigError(UserError):
    """The configuration does not hold together: every fault is listed, by dotted path."""


class DataError(UserError):
    """A table, an image or a split is not what it should be."""


class WeightsError(UserError):
    """A checkpoint cannot be read, is of another family, or would not arrive whole."""


class RunError(UserError):
    """A run folder is missing something, damaged, or in the way."""


class MissingExtra(UserError):
    """An optional dependency is needed; the text names the extra to install."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} needs an optional package. Install it with: pip install 'eyetune[{extra}]'")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the nearest of `known`, or an empty string when nothing is near."""
    # Its time grows with the square of the lengths: nobody mistypes a page of text.
    candidates = [other for other in itertools.islice(known, 1000) if len(other) < 100]
    near = difflib.get_close_matches(str(name)[:100], candidates, n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


def plural(count: int, noun: str) -> str:
    """`1 patient`, `2 patients`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def listing(items: Iterable[object], limit: int = 5) -> str:
    """The first `limit` items on indented lines of their own, and how many more there are."""
    items = list(items)
    lines = [f"  {item}" for item in items[:limit]]
    if len(items) > limit:
        lines.append(f"  … and {len(items) - limit} more")
    return "\n".join(lines)
