"""Photographs inside a Hugging Face dataset, by number: of a local folder, or streamed from the hub.

Only what is asked for is kept, and nothing but its prepared square: a dataset of many gigabytes needs no disk. The hub
takes its token from the environment (HF_TOKEN). When it asks for patience, or does not answer, we wait and go on where
we were.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from eyetune.data import hub
from eyetune.errors import DataError, MissingExtra, did_you_mean

WAITS = (1.0, 2.0, 5.0, 15.0, 30.0, 60.0, 120.0, 300.0)
"""Seconds before each new attempt; an answer in between starts them anew. Together nine minutes, then it is over."""

_LONGEST_WAIT = 600.0
"""The hub may ask for more (Retry-After); nobody waits for longer."""

_PATIENCE = (408, 425, 429, 500, 502, 503, 504)
"""HTTP answers that mean: later."""


class PhotoDataset:
    """A dataset and which of its columns holds the images.

    Args:
        name: a folder, or NAME, NAME@REVISION, NAME:CONFIGURATION on the hub, with or without `hf:` before it.
        column: of the images; None for the first that holds some.
        split: the dataset's split that all indexes count in; None: see :meth:`split_for`.

    Raises MissingExtra without the package `datasets`; DataError for a dataset that is not there or needs a login.
    """

    def __init__(self, name: str, *, column: str | None = None, split: str | None = None) -> None:
        self.name = name.removeprefix("hf:")
        self.source = f"hf:{self.name}"
        self.local = Path(self.name).expanduser()
        try:
            self._parts = hub.open_dataset(self.local if self.local.is_dir() else self.name)
            features = next(iter(self._parts.values())).features or {}
            self.column = hub.image_column(features, column, self.source)
        except (DataError, MissingExtra):
            raise
        except Exception as error:  # the libraries below raise their own, requests' and pyarrow's errors
            raise DataError(f"{self.source}: {hub.explain(error, self.local)}") from error
        if split is not None and split not in self._parts:
            raise DataError(
                f"{self.source} has no split {split!r} (--dataset-split); it has {', '.join(self._parts)}."
                + did_you_mean(split, self._parts)
            )
        self._fixed = split

    def split_for(self, split: str | None) -> str:
        """The dataset's split that the rows of our train, val or test count in: its namesake, or its only one.

        Rows without a split count in train. Raises DataError when that leaves it open.
        """
        if self._fixed is not None:
            return self._fixed
        if len(self._parts) == 1:
            return next(iter(self._parts))
        names = {"val": ("val", "validation", "valid", "dev")}.get(split or "train", (split or "train",))
        found = next((name for name in names if name in self._parts), None)
        if found is None:
            raise DataError(
                f"{self.source} has the splits {', '.join(self._parts)}: say with --dataset-split in which of them the "
                "indexes count."
            )
        return found

    def count(self, split: str) -> int | None:
        """Images in a split; None where nobody says before the end."""
        part = self._parts[split]
        if hasattr(part, "__len__"):
            return len(part)
        splits = getattr(getattr(part, "info", None), "splits", None)
        known = splits.get(split) if isinstance(splits, Mapping) else None
        number = getattr(known, "num_examples", None)
        return number if isinstance(number, int) and number > 0 else None

    def identity(self) -> str:
        """Changes when the dataset's files do (of a folder), or its name (on the hub)."""
        if not self.local.is_dir():
            return f"{self.source} {self.column}"
        digest = hashlib.sha256(str(self.column).encode())
        for path in sorted(self.local.rglob("*")):
            if path.is_file():
                state = path.stat()
                digest.update(f"{path.relative_to(self.local)} {state.st_size} {state.st_mtime_ns}".encode())
        return digest.hexdigest()

    def images(self, split: str, indexes: Iterable[int]) -> Iterator[tuple[int, Any]]:
        """Number and stored image (for :meth:`content`) of the rows asked for, in rising order.

        Those beyond the end do not come. Raises DataError when the hub gives no answer for minutes.
        """
        wanted = sorted(set(indexes))
        part = hub.undecoded(self._parts[split], self.column)
        if hasattr(part, "__len__"):
            count = len(part)
            for index in wanted:
                if index < count:
                    yield index, part[index][self.column]
            return
        numbers = iter(wanted)
        number = next(numbers, None)
        for index, row in enumerate(self._patiently(part, wanted[-1] + 1 if wanted else 0)):
            if index == number:
                yield index, row[self.column]
                number = next(numbers, None)

    def content(self, stored: Any, where: str) -> bytes:
        """The file of an image as :meth:`images` gave it. Raises DataError, beginning with `where`, without one."""
        return next(patiently(lambda _: iter([hub.image_bytes(stored, self.local, where)]), self._wait))

    def _patiently(self, part: Any, count: int) -> Iterator[Mapping[str, Any]]:
        """The first `count` rows of a stream, which is opened anew where it broke off."""
        return patiently(lambda start: itertools.islice(part.skip(start) if start else part, count - start), self._wait)

    def _wait(self, error: Exception, seconds: float | None) -> None:
        if seconds is None:
            raise DataError(f"{self.source}: {hub.explain(error, self.local)}") from error
        time.sleep(seconds)


def patiently(
    open_at: Callable[[int], Iterator[Any]], wait: Callable[[Exception, float | None], None]
) -> Iterator[Any]:
    """The items of a stream that may break off; `open_at` gives it from a position on.

    `wait` is called with what was raised and how many seconds to wait, or None when there is nothing to wait for: then
    it raises.
    """
    done = attempt = 0
    while True:
        try:
            for item in open_at(done):
                done, attempt = done + 1, 0
                yield item
            return
        except (GeneratorExit, DataError):
            raise
        except Exception as error:  # the libraries below raise their own, requests' and httpx's errors
            seconds = _seconds(error, attempt)
            attempt += 1
            wait(error, seconds)


def _seconds(error: Exception, attempt: int) -> float | None:
    """How long to wait after an error; None when waiting does not help, or was tried often enough."""
    if attempt >= len(WAITS):
        return None
    for cause in _causes(error):
        response = getattr(cause, "response", None)
        status = getattr(response, "status_code", None) or getattr(cause, "status", None)
        if status in _PATIENCE:
            asked = str((getattr(response, "headers", None) or {}).get("Retry-After", ""))
            seconds = float(asked) if asked.isdigit() and len(asked) < 9 else 0.0
            return min(max(seconds, WAITS[attempt]), _LONGEST_WAIT)
        if status is not None:
            return None
        if isinstance(cause, (ConnectionError, TimeoutError)) or type(cause).__name__ in _UNANSWERED:
            return WAITS[attempt]
    return None


_UNANSWERED = (
    "ConnectError",
    "ConnectTimeout",
    "ReadError",
    "ReadTimeout",
    "RemoteProtocolError",
    "ChunkedEncodingError",
    "ClientPayloadError",
    "ServerDisconnectedError",
    "ClientConnectorError",
    "IncompleteRead",
)
"""Errors of the HTTP libraries that mean a connection that broke; they are no ConnectionError."""


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    for _ in range(10):
        if error is None:
            return
        yield error
        error = error.__cause__ or error.__context__
