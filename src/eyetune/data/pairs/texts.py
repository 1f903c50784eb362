"""RET-CLIP's tables: `{split}_imgs.tsv`, a patient a line, and `{split}_texts.jsonl`, a text a line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from eyetune.data.pairs.layout import IMAGES_KEY, SAMPLES_KEY
from eyetune.data.pairs.sample import InTable, Problems
from eyetune.data.tables import is_unicode
from eyetune.errors import DataError
from eyetune.files import atomic

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

_LONGEST_LINE = 2**28
"""Bytes of a line: two images of 100 million bytes each. A file without line ends is not read into memory."""


@dataclass(frozen=True)
class Text:
    """A text and the patients it is about.

    Attributes:
        number: `text_id`, unique in a split.
        text: as written.
        patients: `image_ids`, the names under which their images are stored.
        label: what came with it, if anything.
        where: the line, for messages.
    """

    number: int
    text: str
    patients: tuple[str, ...]
    label: str | None = None
    where: str = ""


class Images(NamedTuple):
    """A patient's images as base64, and the line, for messages."""

    patient: str
    left: str
    right: str
    where: str = ""


def write_images(path: Path, rows: Iterable[Images]) -> int:
    """Write a TSV of images, atomically; how many rows."""
    count = 0
    with atomic(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as stream:
        for row in rows:
            stream.write(f"{row.patient}\t{row.left}\t{row.right}\n")
            count += 1
    return count


def write_texts(path: Path, texts: Iterable[Text]) -> None:
    """Write a JSONL of texts, atomically. The label is a field of its own, which RET-CLIP's converter passes over."""
    with atomic(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as stream:
        for text in texts:
            content: dict[str, Any] = {
                "text_id": text.number,
                "text": text.text,
                "image_ids": list(text.patients),
            }
            if text.label is not None:
                content["label"] = text.label
            stream.write(json.dumps(content, ensure_ascii=False) + "\n")


def read_images(path: Path) -> Iterator[Images]:
    """The lines of a TSV of images, one at a time. (Whether a cell is base64, and of an image, is not looked at.)

    Raises DataError, naming the line, for one that has not three columns or names nobody.
    """
    for number, _, line in _lines(path):
        cells = line.split("\t")
        if fault := line_fault(cells):
            raise DataError(f"{path} line {number} {fault}.")
        yield Images(cells[0].strip(), cells[1].strip(), cells[2].strip(), f"{path.name} line {number}")


def line_fault(cells: Sequence[str]) -> str | None:
    """What is wrong with the cells of a line of images, in the words after "line 7"; None if nothing."""
    if len(cells) != 3:
        said = "two columns, so one image" if len(cells) == 2 else f"{len(cells)} columns"
        return (
            f"has {said}. It takes three, with tabs between them: patient, left image, right image (for one eye, the "
            "same image twice)"
        )
    fault = name_fault(cells[0].strip())
    return f"is of a patient that {fault}" if fault else None


def scan_images(path: Path, problems: Problems) -> dict[str, dict[str, InTable]]:
    """Where the images of every patient of a TSV are: {patient: {"left", "right"}}, or {"": one image} used for both.

    Lines that are wrong go into `problems`, and so do further lines of a patient. Raises DataError when the file is
    missing or not text.
    """
    found: dict[str, dict[str, InTable]] = {}
    first: dict[str, str] = {}
    for number, begin, line in _lines(path):
        where = f"{path.name} line {number}"
        cells = line.split("\t")
        if fault := line_fault(cells):
            problems.add("broken", where, fault)
            continue
        patient = cells[0].strip()
        if patient in found:
            problems.add("repeated", where, f"the same patient as {first[patient]}")
            continue
        sizes = [len(cell.encode()) for cell in cells]
        places = begin + sizes[0] + 1, begin + sizes[0] + sizes[1] + 2
        eyes = {
            side: InTable(path, place, size, f"{where}, {side}", _digest(cell))
            for side, place, size, cell in zip(("left", "right"), places, sizes[1:], cells[1:], strict=True)
        }
        first[patient] = where
        found[patient] = {"": eyes["left"]} if eyes["left"].digest == eyes["right"].digest else eyes
    return found


def _digest(cell: str) -> bytes:
    return hashlib.sha256(cell.strip().encode()).digest()[:16]


def read_texts(path: Path) -> list[Text]:
    """The lines of a JSONL of texts.

    Raises DataError, naming the line, for one that is not JSON, lacks a field or has it of another kind, and for a
    `text_id` given twice. Empty texts are given back: whether they are skipped is the caller's to say.
    """
    found: list[Text] = []
    seen: dict[int, int] = {}
    for number, _, line in _lines(path):
        try:
            content = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path} line {number} is not JSON: {error.msg} at column {error.colno}.") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} line {number} cannot be read as JSON ({type(error).__name__}).") from None
        text = _text(content, path, number)
        if text.number in seen:
            raise DataError(
                f"{path} line {number}: text_id {text.number} was given to line {seen[text.number]} already."
            )
        seen[text.number] = number
        found.append(text)
    if not found:
        raise DataError(f"{path} is empty.")
    return found


def name_fault(name: str) -> str | None:
    """What is wrong with a patient's name as the key of an image, in the words after "the patient"; None if nothing."""
    if not name:
        return "has no name"
    if name.encode(errors="replace") in (IMAGES_KEY, SAMPLES_KEY):
        return "has a name that RET-CLIP's database keeps for itself"
    if any(letter in name for letter in "\t\r\n\0") or not name.isprintable():
        return "has a name with a tab, a line end or another character that cannot be printed"
    if len(name.encode(errors="replace")) > _LONGEST_NAME:
        return f"has a name longer than {_LONGEST_NAME} bytes"
    return None


_LONGEST_NAME = 400
"""LMDB takes keys of 511 bytes; what is added to tell visits apart fits too."""


def _text(content: Any, path: Path, number: int) -> Text:
    where = f"{path} line {number}"
    if not isinstance(content, dict):
        raise DataError(f'{where} is not a JSON object ({{"text_id": …, "text": …, "image_ids": […]}}).')
    for field in ("text_id", "text", "image_ids"):
        if field not in content:
            raise DataError(f"{where} lacks the field {field}; it has {', '.join(map(str, content)) or 'none'}.")
    text_id, text, patients = (content[field] for field in ("text_id", "text", "image_ids"))
    if isinstance(text_id, str) and text_id.isascii() and text_id.isdigit() and len(text_id) < 19:
        text_id = int(text_id)
    if not isinstance(text_id, int) or isinstance(text_id, bool) or not -(2**63) <= text_id < 2**63:
        raise DataError(f"{where}: text_id must be a whole number.")
    if not isinstance(text, str) or not is_unicode(text):
        raise DataError(f"{where}: text must be a string.")
    if not isinstance(patients, list) or any(isinstance(p, bool) or not isinstance(p, (str, int)) for p in patients):
        raise DataError(f"{where}: image_ids must be a list of patients.")
    label = content.get("label")
    return Text(text_id, text, tuple(map(str, patients)), None if label is None else str(label), where)


def _lines(path: Path) -> Iterator[tuple[int, int, str]]:
    """Number, place of the first byte, and text of every line that is not empty.

    Raises DataError for a missing file and for what is not UTF-8.
    """
    try:
        with open(path, "rb") as stream:
            number = offset = 0
            while line := stream.readline(_LONGEST_LINE + 1):
                number += 1
                if len(line) > _LONGEST_LINE:
                    raise DataError(f"{path} line {number} is longer than any pair of images.")
                mark = len(_BYTE_ORDER_MARK) if number == 1 and line.startswith(_BYTE_ORDER_MARK) else 0
                if line.strip():
                    yield number, offset + mark, line[mark:].decode().rstrip("\r\n")
                offset += len(line)
    except FileNotFoundError:
        raise DataError(f"no file at {path}.") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} line {number} is not UTF-8 text.") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}.") from None
