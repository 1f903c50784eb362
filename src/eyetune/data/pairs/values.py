"""The values in RET-CLIP's databases: tuples of strings and whole numbers, as Python's pickle writes them.

Reading never touches `pickle`, which runs what a file tells it to run. :func:`unpack` knows only the instructions that
tuples, strings and whole numbers need, and refuses every other by name.
"""

from __future__ import annotations

from pickle import dumps
from typing import Any

from eyetune.errors import DataError

Value = str | int | tuple[Any, ...]
"""A string, a whole number, or a tuple of these."""

_PROTOCOL = 4
"""What `pickle.dumps` wrote by default from Python 3.8 to 3.13, RET-CLIP's own among them."""

_STOP, _PROTO, _MARK = 0x2E, 0x80, 0x28
_SKIPPED = {0x80: 1, 0x95: 8}
"""The protocol and the length of a frame, by the bytes that say which."""
_WORDS = {  # instruction: bytes of its number, whether signed
    0x4A: (4, True),  # BININT
    0x4B: (1, False),  # BININT1
    0x4D: (2, False),  # BININT2
}
_TEXTS = {0x8C: 1, 0x58: 4, 0x8D: 8}
"""Strings, by the bytes of their length: SHORT_BINUNICODE, BINUNICODE, BINUNICODE8."""
_LONG = 0x8A
_TUPLES = {0x29: 0, 0x85: 1, 0x86: 2, 0x87: 3}
_TUPLE = 0x74
_KEEP = {0x71: 1, 0x72: 4}
"""Remember what is on top, under a number of so many bytes: BINPUT, LONG_BINPUT."""
_MEMOIZE = 0x94
_RECALL = {0x68: 1, 0x6A: 4}
"""BINGET, LONG_BINGET."""

_MOST_STEPS = 1000
"""Instructions in one value. A pair of images takes 8, and each may stand for a string of any length."""


class Refused(DataError):
    """A value that holds something else than tuples, strings and whole numbers; the text says what."""


def pack(value: Value) -> bytes:
    """`value` as RET-CLIP's loader reads it. Strings that are equal are written once where they are one object."""
    return dumps(value, protocol=_PROTOCOL)


def unpack(data: bytes) -> Value:
    """The value in `data`, which may come from anywhere: nothing in it runs.

    Raises Refused for any other kind of object, and for data that is damaged or cut short.
    """
    try:
        return _run(data)
    except (IndexError, KeyError, UnicodeDecodeError):
        raise Refused("is damaged or cut short") from None


def _run(data: bytes) -> Value:
    """As :func:`unpack`; raises IndexError, KeyError or UnicodeDecodeError for what is damaged."""
    if data[:1] != bytes([_PROTO]):
        raise Refused("is no value of RET-CLIP's layout")
    machine = _Machine(data)
    for _ in range(_MOST_STEPS):
        code = machine.number(1)
        if code == _STOP:
            return machine.result()
        if not (machine.adds(code) or machine.builds(code)):
            raise Refused(f"holds something else than tuples, strings and whole numbers (instruction {code:#04x})")
    raise Refused("holds far more than two images or a text")


class _Machine:
    """The stack machine that a pickle is a program of, with the few instructions of :func:`unpack`."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def take(self, size: int) -> bytes:
        if self.at + size > len(self.data):
            raise IndexError
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, size: int, signed: bool = False) -> int:
        return int.from_bytes(self.take(size), "little", signed=signed)

    def adds(self, code: int) -> bool:
        """Carry out an instruction that puts something on the stack; False when it is none."""
        if code in _TEXTS:
            self.stack.append(self.take(self.number(_TEXTS[code])).decode())
        elif code in _WORDS:
            self.stack.append(self.number(*_WORDS[code]))
        elif code == _LONG:
            self.stack.append(self.number(self.number(1), signed=True))
        elif code in _RECALL:
            self.stack.append(self.memo[self.number(_RECALL[code])])
        else:
            return False
        return True

    def builds(self, code: int) -> bool:
        """Carry out an instruction that works on what is on the stack, or does nothing; False when it is none."""
        if code in _SKIPPED:
            self.take(_SKIPPED[code])
        elif code == _MARK:
            self.marks.append(len(self.stack))
        elif code == _TUPLE or code in _TUPLES:
            first = self.marks.pop() if code == _TUPLE else len(self.stack) - _TUPLES[code]
            if first < 0:
                raise IndexError
            self.stack[first:] = [tuple(self.stack[first:])]
        elif code == _MEMOIZE:
            self.memo[len(self.memo)] = self.stack[-1]
        elif code in _KEEP:
            self.memo[self.number(_KEEP[code])] = self.stack[-1]
        else:
            return False
        return True

    def result(self) -> Value:
        if len(self.stack) != 1 or self.marks:
            raise IndexError
        found: Value = self.stack[0]
        return found
