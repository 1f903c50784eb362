"""Rows to a file that is there when it is whole, in CSV or JSON lines; what an interruption leaves is gone on with.

While it grows, `rows.csv` is called `rows.partial.csv`; `rows.partial.state.json` beside it says how much is sure.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from eyetune import files
from eyetune.errors import RunError, UserError
from eyetune.interrupt import Interrupted

FORMATS = ("csv", "jsonl")

SCHEMA = 1

Cell = str | float | bool | tuple[str, ...] | None
"""What a row holds: None where nothing is known, a tuple of words."""

Row = Mapping[str, Cell]

_JSON_SUFFIXES = (".jsonl", ".ndjson")


def choose_format(out: Path | None, given: str | None) -> str:
    """`csv` or `jsonl`: what was asked for, else by the file's suffix, else CSV. Raises UserError for `.json` alone."""
    if given is None and out is not None and out.suffix.lower() == ".json":
        raise UserError(f"{out}: rows are written as CSV or JSON lines: call it .jsonl, or add --format jsonl.")
    return given or ("jsonl" if out is not None and out.suffix.lower() in _JSON_SUFFIXES else "csv")


def encode(row: Row, columns: Sequence[str], form: str) -> bytes:
    """One line of the file. Every column stands in every row.

    CSV: empty for None, `yes` and `no`, words with spaces between them and `ok` for none. JSON lines: null, true and
    false, lists. Numbers are written so that reading gives the same float64. A file name that is not valid UTF-8 keeps
    its bytes in CSV and is escaped (`\\udcff`) in JSON, as Python reads it back. Names are never changed: a cell that
    begins with `=` is a name, and a spreadsheet that takes it for a formula has to be told so.
    """
    if form == "jsonl":
        cells = {name: list(cell) if isinstance(cell := row[name], tuple) else cell for name in columns}
        try:
            return (json.dumps(cells, ensure_ascii=False, allow_nan=False) + "\n").encode()
        except UnicodeEncodeError:
            return (json.dumps(cells, allow_nan=False) + "\n").encode()
    return _csv_line([_text(row[name]) for name in columns])


def _text(cell: Cell) -> str:
    if cell is None:
        return ""
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, tuple):
        return " ".join(cell) or "ok"
    return repr(cell) if isinstance(cell, (int, float)) else cell


def _csv_line(cells: Sequence[str]) -> bytes:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue().encode("utf-8", "surrogateescape")


class Rows:
    """A growing file of rows.

    Args:
        stream: takes bytes.
        columns: of every row, in order.
        form: one of :data:`FORMATS`.
        save: called with itself whenever rows were added.

    Attributes:
        count: rows so far.
        refused: those of them with an error.
    """

    def __init__(self, stream: BinaryIO, columns: Sequence[str], form: str, save: Callable[[Rows], None]) -> None:
        self.stream = stream
        self.columns = columns
        self.form = form
        self.count = 0
        self.refused = 0
        self._names = hashlib.sha256()
        self._save = save

    def state(self) -> dict[str, Any]:
        """What is sure, as JSON."""
        names = self._names.hexdigest()
        return {"rows": self.count, "refused": self.refused, "bytes": self.stream.tell(), "names": names}

    def go_on(self, state: Mapping[str, Any], names: Iterator[str]) -> None:
        """Take up where :meth:`state` was: `names` gives the photographs from the first one on, and those that have
        rows are passed over. Raises RunError when they are not the same."""
        for name in itertools.islice(names, state["rows"]):
            self._seen(name)
            self.count += 1
        self.refused = state["refused"]
        if self._names.hexdigest() != state["names"]:
            raise RunError(
                f"the first {state['rows']} photographs are not those that have rows already: go on with the same "
                "paths, or delete the partial file."
            )

    def begin(self) -> None:
        """Write the header, where there is one."""
        if self.form == "csv":
            self.stream.write(_csv_line(self.columns))

    def add(self, rows: Sequence[Row]) -> None:
        """Write rows, and make sure of them."""
        for row in rows:
            self.stream.write(encode(row, self.columns, self.form))
            self._seen(str(row["image"]))
            self.refused += bool(row["error"])
        self.count += len(rows)
        self.stream.flush()
        self._save(self)

    def _seen(self, name: str) -> None:
        self._names.update(os.fsencode(name) + b"\0")


@contextlib.contextmanager
def writer(
    out: Path | None,
    columns: Sequence[str],
    form: str,
    names: Iterator[str],
    *,
    made_by: Mapping[str, Any],
    resume: bool = False,
) -> Iterator[Rows]:
    """Rows to `out`, or to standard output when it is None.

    Args:
        out: is there when the block ends well; what was there before stays until then.
        columns: of every row, in order.
        form: one of :data:`FORMATS`.
        names: of the photographs, from the first one on; those that have rows already are taken from it.
        made_by: what the rows depend on beside the photographs, as JSON; to go on needs the same.
        resume: go on with what an interruption left.

    Raises UserError when the file cannot be written, when something is left and `resume` is not set, or the reverse,
    and when it was begun otherwise.
    """
    if resume and (out is None or not _is_file(out)):
        raise UserError("--resume goes on with a file: it needs --out FILE.")
    if out is None or not _is_file(out):
        with _unkept(out, columns, form) as rows:
            yield rows
        return
    partial, marker = out.with_name(f"{out.stem}.partial{out.suffix}"), out.with_name(f"{out.stem}.partial.state.json")
    began = {"schema": SCHEMA, "columns": list(columns), "format": form, **made_by}

    def save(rows: Rows) -> None:
        os.fsync(rows.stream.fileno())
        files.write_json(marker, began | rows.state())

    state = _state(partial, marker, began, resume)
    kept, created = 0, False
    try:
        files.make_folder(out.parent)
        with open(partial, "r+b" if state else "xb") as stream:
            created = state is None
            rows = Rows(stream, columns, form, save)
            try:
                if state:
                    kept = state["rows"]
                    rows.go_on(state, names)
                    stream.truncate(state["bytes"])
                    stream.seek(0, os.SEEK_END)
                else:
                    rows.begin()
                    save(rows)
                yield rows
                save(rows)
            finally:
                kept = max(kept, rows.count)
        os.replace(partial, out)
        marker.unlink()
        files.sync(out.parent)
    except OSError as error:
        raise files.writing_failed(out, error) from error
    except KeyboardInterrupt as interrupt:
        raise _kept(interrupt, kept, partial) from None
    finally:
        if created and not kept:  # nothing to go on with
            partial.unlink(missing_ok=True)
            marker.unlink(missing_ok=True)


@contextlib.contextmanager
def _unkept(out: Path | None, columns: Sequence[str], form: str) -> Iterator[Rows]:
    """Rows to standard output (None), a pipe or a device: what is written is gone."""
    try:
        with contextlib.nullcontext(sys.stdout.buffer) if out is None else open(out, "wb") as stream:
            rows = Rows(stream, columns, form, lambda _: None)
            rows.begin()
            yield rows
            stream.flush()
    except BrokenPipeError:
        # Who reads has enough, as `head` does: no fault. Python would still try to write what is left at its end.
        if out is None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise Interrupted("the reader of the rows has gone.") from None
    except OSError as error:
        raise files.writing_failed(out or Path("standard output"), error) from error


def _is_file(out: Path) -> bool:
    """Whether `out` is, or would be, a plain file. Raises UserError for a folder."""
    if out.is_dir():
        raise UserError(f"{out} is a folder: --out takes a file.")
    return out.is_file() or not out.exists()


def _kept(interrupt: KeyboardInterrupt, rows: int, partial: Path) -> Interrupted:
    """The interruption, with what is kept of the work."""
    said = f"{rows} rows are in {partial}: the same command with --resume goes on behind them." if rows else ""
    return Interrupted(said, getattr(interrupt, "signum", signal.SIGINT))


def _state(partial: Path, marker: Path, began: Mapping[str, Any], resume: bool) -> dict[str, Any] | None:
    """What is known of an interrupted file; None where there is none. Raises UserError as :func:`writer` says."""
    if not partial.is_file():
        if resume:
            raise UserError(f"nothing to go on with: there is no {partial}. Leave --resume out to begin.")
        return None
    if not resume:
        raise UserError(
            f"{partial} is there: from a run that was interrupted, or one that goes on still. Add --resume to go on "
            "with it, or delete it."
        )
    try:
        found = json.loads(marker.read_text(encoding="utf-8"))
        numbers = [found[name] for name in ("rows", "refused", "bytes")]
        whole = all(isinstance(number, int) and number >= 0 for number in numbers) and isinstance(found["names"], str)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{marker} is missing or damaged, so {partial} cannot be gone on with: delete both.") from error
    if not whole or found["bytes"] > partial.stat().st_size:
        raise RunError(f"{marker} and {partial} do not fit together: delete both and begin again.")
    changed = sorted(name for name, value in began.items() if found.get(name) != value)
    if changed:
        raise RunError(
            f"{partial} was begun otherwise ({', '.join(changed)} differ): go on with the same run and options, or "
            "delete it."
        )
    return dict(found)
