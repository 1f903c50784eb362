"""Whose eye, and which, as a file name says it: `IMG_12_left.jpg`, `12-OD.png`, `Image_01L.jpg`, `P7/right.tif`.

A guess, shown as one, for a person to correct. Where a name says it twice, or not plainly, there is none: two eyes that
are wrongly put side by side look like a pair.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from eyetune.data.tables import EYE_WORDS

_PLAIN = {"left", "right", "l", "r", "od", "os"}
"""Words that mean an eye wherever they stand; `le` and `re` do only where a name begins or ends."""

_GLUED = re.compile(r"(?P<rest>\d+)(?P<eye>left|right|od|os|l|r)", re.IGNORECASE)


@dataclass(frozen=True)
class Eye:
    """What a name says.

    Attributes:
        patient: what is left of it without the eye and the suffix; photographs with the same one are of one patient.
        eye: "left" or "right".
        word: what says so, as it stands there.
    """

    patient: str
    eye: str
    word: str


def guess(name: str) -> Eye | None:
    """Whose eye a photograph shows by its path with forward slashes; None where it does not say so plainly."""
    *folders, file = [part for part in name.split("/") if part] or [""]
    stem = file.rpartition(".")[0] or file
    pieces = re.split(r"([\W_]+)", stem)  # words at even places, what parts them at odd ones
    words = pieces[::2]
    found = [place for place, word in enumerate(words) if _is_eye(word, place in (0, len(words) - 1))]
    if len(found) == 1:
        rest = _without(pieces, 2 * found[0])
        return _eye([*folders, rest] if rest else folders, words[found[0]])
    if not found and (glued := _GLUED.fullmatch(words[-1])):
        return _eye([*folders, "".join(pieces[:-1]) + glued["rest"]], glued["eye"])
    if not found and folders and len(folders[-1]) > 1 and folders[-1].lower() in _PLAIN:
        return _eye([*folders[:-1], stem], folders[-1])
    return None


def _is_eye(word: str, at_an_end: bool) -> bool:
    return word.lower() in _PLAIN or (at_an_end and word.lower() in EYE_WORDS)


def _without(pieces: list[str], place: int) -> str:
    """The stem without one word and what parted it from its neighbour."""
    left, right = "".join(pieces[:place]), "".join(pieces[place + 1 :])
    return left + right[len(pieces[place + 1]) :] if left and right else re.sub(r"^[\W_]+|[\W_]+$", "", left + right)


def _eye(parts: list[str], word: str) -> Eye | None:
    patient = "/".join(parts)
    return Eye(patient, EYE_WORDS[word.lower()], word) if patient else None
