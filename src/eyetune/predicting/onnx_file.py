"""What an ONNX file is, before anything is made of it: its parts, its metadata, whether it is whole.

ONNX is a protocol-buffer message (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto). Its skeleton is read here
without the package `onnx`, and without holding the file in memory. Refused are what EyeTune never writes and what a
file from outside could do harm with: weights in other files, operators that are not standard, graphs inside graphs.
"""

from __future__ import annotations

import hashlib
import mmap
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from eyetune.errors import RunError

SHEET = "eyetune"
"""The metadata property with the :class:`eyetune.predicting.sheet.Sheet`."""

CHECKSUM = "eyetune_sha256"
"""The metadata property with the file's SHA-256, computed with zeros in its place."""

NO_CHECKSUM = "0" * 64

LARGEST = 2**31 - 1
"""Bytes: protocol buffers go no further."""

DOMAINS = ("", "ai.onnx")
"""Of standard operators."""

_MOST_PROPERTIES = 1000
_LONGEST_NAME = 1000
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

# Numbers of the fields of onnx.proto.
_MODEL_GRAPH, _MODEL_OPSETS, _MODEL_PROPERTIES, _MODEL_TRAINING, _MODEL_FUNCTIONS = 7, 8, 14, 20, 25
_GRAPH_NODE, _GRAPH_TENSOR, _GRAPH_SPARSE = 1, 5, 15
_NODE_OPERATOR, _NODE_ATTRIBUTE, _NODE_DOMAIN = 4, 5, 7
_ATTRIBUTE_TENSOR, _ATTRIBUTE_GRAPH, _ATTRIBUTE_TENSORS, _ATTRIBUTE_GRAPHS = 5, 6, 10, 11
_ATTRIBUTE_SPARSE = (22, 23)
_TENSOR_EXTERNAL, _TENSOR_LOCATION = 13, 14


class _Refused(Exception):
    """Why a file is not taken, without its name."""


@dataclass
class Outline:
    """The skeleton of a model.

    Attributes:
        properties: its metadata.
        checksum_at: where in the file the 64 signs of the checksum are; None without one.
        operators: every operator in it.
    """

    properties: dict[str, str] = field(default_factory=dict)
    checksum_at: int | None = None
    operators: set[str] = field(default_factory=set)
    graphs: int = 0


@dataclass(frozen=True)
class _Message:
    """A message inside the file: bytes first <= i < last."""

    content: mmap.mmap
    first: int
    last: int

    def fields(self) -> Iterator[tuple[int, int | _Message]]:
        """(number, value) of each field: a whole number, or bytes (a text or a message) by where they are."""
        at = self.first
        while at < self.last:
            key, at = self._varint(at)
            number, kind = key >> 3, key & 7
            if kind == _VARINT:
                value, at = self._varint(at)
                yield number, value
            elif kind == _BYTES:
                length, at = self._varint(at)
                if length > self.last - at:
                    raise _Refused("damaged or cut short")
                yield number, _Message(self.content, at, at + length)
                at += length
            elif kind in (_FIXED32, _FIXED64):
                at += 4 if kind == _FIXED32 else 8
            else:
                raise _Refused("damaged, or no ONNX file")
        if at != self.last:
            raise _Refused("damaged or cut short")

    def parts(self, *numbers: int) -> Iterator[tuple[int, _Message]]:
        """The fields of these numbers, all of which hold bytes."""
        for number, value in self.fields():
            if number in numbers:
                if not isinstance(value, _Message):
                    raise _Refused("damaged, or no ONNX file")
                yield number, value

    def text(self, longest: int = _LONGEST_NAME) -> str:
        """What is in it, as UTF-8."""
        if self.last - self.first > longest:
            raise _Refused("damaged: a name of many thousand signs")
        try:
            return self.content[self.first : self.last].decode("utf-8")
        except UnicodeDecodeError as error:
            raise _Refused("damaged, or no ONNX file") from error

    def _varint(self, at: int) -> tuple[int, int]:
        value = 0
        for shift in range(0, 70, 7):
            if at >= self.last:
                raise _Refused("damaged or cut short")
            byte = self.content[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, at
        raise _Refused("damaged, or no ONNX file")


def read_outline(path: Path) -> Outline:
    """The skeleton of the ONNX file at `path`, its checksum compared.

    Raises RunError, naming the file, when it is missing, damaged, not one that EyeTune exported, or holds what such a
    file never does.
    """
    try:
        with open(path, "rb") as stream:
            size = path.stat().st_size
            if not 0 < size <= LARGEST:
                raise _Refused("empty" if not size else "larger than an ONNX file can be")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
                found = _model(_Message(content, 0, size))
                _compare(content, found)
                return found
    except _Refused as refused:
        raise RunError(f"{path} is not a model that EyeTune exported, or not any more: {refused}.") from None
    except FileNotFoundError:
        raise RunError(f"no file at {path}.") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error}).") from error


def _model(message: _Message) -> Outline:
    found = Outline()
    wanted = (_MODEL_GRAPH, _MODEL_OPSETS, _MODEL_PROPERTIES, _MODEL_TRAINING, _MODEL_FUNCTIONS)
    for number, part in message.parts(*wanted):
        if number == _MODEL_GRAPH:
            found.graphs += 1
            _graph(part, found)
        elif number == _MODEL_OPSETS:
            _check_domain(next((value.text() for _, value in part.parts(1)), ""))
        elif number == _MODEL_PROPERTIES:
            _property(part, found)
        else:
            raise _Refused("it holds functions or training code of its own")
    if found.graphs != 1:
        raise _Refused("no ONNX file")
    if SHEET not in found.properties:
        raise _Refused("an ONNX file of another program, without EyeTune's metadata")
    return found


def _property(message: _Message, found: Outline) -> None:
    key, value = "", None
    for number, part in message.parts(1, 2):
        if number == 1:
            key = part.text()
        else:
            value = part
    if value is None:
        return
    if key in found.properties or len(found.properties) >= _MOST_PROPERTIES:
        raise _Refused("metadata that stands there twice")
    found.properties[key] = value.text(longest=LARGEST)
    if key == CHECKSUM and re.fullmatch("[0-9a-f]{64}", found.properties[key]):
        found.checksum_at = value.first


def _graph(message: _Message, found: Outline) -> None:
    for number, part in message.parts(_GRAPH_NODE, _GRAPH_TENSOR, _GRAPH_SPARSE):
        if number == _GRAPH_TENSOR:
            _check_tensor(part)
        elif number == _GRAPH_SPARSE:
            raise _Refused("it holds sparse tensors")
        else:
            _node(part, found)


def _node(message: _Message, found: Outline) -> None:
    for number, part in message.parts(_NODE_OPERATOR, _NODE_ATTRIBUTE, _NODE_DOMAIN):
        if number == _NODE_OPERATOR:
            found.operators.add(part.text())
        elif number == _NODE_DOMAIN:
            _check_domain(part.text())
        else:
            graphs = (_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS, *_ATTRIBUTE_SPARSE)
            for kind, value in part.parts(_ATTRIBUTE_TENSOR, _ATTRIBUTE_TENSORS, *graphs):
                if kind in graphs:
                    raise _Refused("it holds graphs inside its graph")
                _check_tensor(value)


def _check_tensor(message: _Message) -> None:
    for number, value in message.fields():
        if number == _TENSOR_EXTERNAL or (number == _TENSOR_LOCATION and value != 0):
            raise _Refused("its weights lie in another file, which could be any")


def _check_domain(domain: str) -> None:
    if domain not in DOMAINS:
        raise _Refused("it uses operators that are not standard ONNX")


def _compare(content: mmap.mmap, found: Outline) -> None:
    if found.checksum_at is None:
        raise _Refused("its checksum is missing")
    if found.properties[CHECKSUM] != _digest(content, found.checksum_at):
        raise _Refused("its checksum does not fit: damaged, or changed since it was exported")


def _digest(content: mmap.mmap, at: int) -> str:
    with memoryview(content) as view:
        digest = hashlib.sha256(view[:at])
        digest.update(NO_CHECKSUM.encode())
        digest.update(view[at + len(NO_CHECKSUM) :])
    return digest.hexdigest()


def seal(path: Path) -> None:
    """Put the checksum of an ONNX file, whose property CHECKSUM is NO_CHECKSUM, into it."""
    with open(path, "r+b") as stream, mmap.mmap(stream.fileno(), 0) as content:
        at = _model(_Message(content, 0, len(content))).checksum_at
        assert at is not None
        digest = _digest(content, at)
        content[at : at + len(NO_CHECKSUM)] = digest.encode()
