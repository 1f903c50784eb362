"""A perceptual hash that knows flips and cropped borders, and all near pairs among many of them.

The hash is the signs of 126 low cosine frequencies of the view, after what is smooth (illumination, the dark rim) was
subtracted: pHash (Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010) for a picture
whose coarse structure all eyes share. Mirroring a picture changes the sign of every odd frequency along that axis, so
the hash of a flipped copy is the same hash with a fixed mask; a cropped copy is met by hashing the whole picture once
more without its borders.

Pairs are found by multi-index hashing (Norouzi, Punjani, Fleet, "Fast Exact Search in Hamming Space with Multi-Index
Hashing", TPAMI 2014): 126 bits in 6 parts of 21. Two hashes that differ in at most 11 bits have a part in which they
differ in at most one bit, so looking up each part, and each part with one bit changed, meets every such pair. The
number of look-ups grows with the number of pictures; what each meets grows as well, for eyes resemble each other
(docs/benchmarks.md has the measurement).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from eyetune.data.audit.looks import SIDE, View

Codes = npt.NDArray[np.uint64]
"""uint64[N, 2]: 126 bits, part p of 21 bits in word p // 3."""

PARTS, PART_BITS = 6, 21
BITS = PARTS * PART_BITS
SURE = 2 * PARTS - 1
"""Pairs that differ in at most this many bits are all found."""

FAR = 36
"""Pairs that differ in more bits are not passed on. Copies differ in up to 20, two eyes by 45 in the middle."""

DOUBTFUL = 5
"""Bits of a part, those of the weakest frequencies, that are also tried changed together: noise changes these."""

FLIPS = ("", "left to right", "top to bottom", "both ways")
CROPS = (0.0, 0.03, 0.06, 0.09)
"""Shares of the view taken off each border: the views of cropped copies lie between these."""

LEAST, MOST = 0.8, 16
"""Cosine of two pictures' frequencies from which they could be copies, and how many such pairs a picture may have."""

_FREQUENCIES = 16
_SMALL = 64
"""Pixels of the views that are hashed."""

_BLOCK = 2_000_000
"""Pairs looked at at a time, which bounds memory."""


def _chosen() -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows and columns of the lowest 126 frequencies but the very lowest, dealt out to the parts in turn."""
    rows, columns = np.mgrid[:_FREQUENCIES, :_FREQUENCIES]
    order = np.lexsort((np.abs(rows - columns).ravel(), (rows + columns).ravel()))
    order = order[(rows + columns).ravel()[order] >= 2][:BITS]
    dealt = np.concatenate([order[part::PARTS] for part in range(PARTS)])
    return rows.ravel()[dealt], columns.ravel()[dealt]


_ROWS, _COLUMNS = _chosen()
_SIGNS = np.stack([np.ones(BITS), (-1.0) ** _COLUMNS, (-1.0) ** _ROWS, (-1.0) ** (_ROWS + _COLUMNS)]).astype(np.float32)
"""float32[4, 126]: what a flip does to the frequencies."""


def local_contrast(view: View, sigma: float) -> npt.NDArray[np.float32]:
    """The view without its illumination: difference from the local mean, in local standard deviations; 0 outside.

    Args:
        view: uint8[H, W]; what is nearly black counts as outside the field of view.
        sigma: pixels; what is smoother than that goes.

    Returns:
        float32[H, W].
    """
    pixels = view.astype(np.float32)
    inside = (pixels > 12).astype(np.float32)
    weight = cv2.GaussianBlur(inside, (0, 0), sigma) + 1e-3
    difference = (pixels - cv2.GaussianBlur(pixels * inside, (0, 0), sigma) / weight) * inside
    wide = 1.5 * sigma
    variance = cv2.GaussianBlur(difference**2, (0, 0), wide) / (cv2.GaussianBlur(inside, (0, 0), wide) + 1e-3)
    contrast: npt.NDArray[np.float32] = difference / np.sqrt(variance + 4) * inside
    return contrast


def cut(view: View, crop: float, side: int) -> View:
    """A smaller view, without a share of it along each border: uint8[SIDE, SIDE] -> uint8[side, side]."""
    scale = side / (SIDE * (1 - 2 * crop))
    shift = (scale - 1) / 2 - crop * SIDE * scale
    warp = np.array([[scale, 0, shift], [0, scale, shift]])
    return np.asarray(cv2.warpAffine(cv2.GaussianBlur(view, (0, 0), 0.7), warp, (side, side)), np.uint8)


def frequencies(view: View) -> npt.NDArray[np.float32]:
    """The low frequencies of a view and of the view without its borders, float32[len(CROPS), 126], of unit length."""
    found = np.empty((len(CROPS), BITS), np.float32)
    for index, crop in enumerate(CROPS):
        found[index] = cv2.dct(local_contrast(cut(view, crop, _SMALL), _SMALL / 8))[_ROWS, _COLUMNS]
    return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-6)


def pack(values: npt.NDArray[np.float32]) -> Codes:
    """Signs as bits: float32[N, 126] -> uint64[N, 2]."""
    bits = values > 0
    codes = np.zeros((len(values), 2), np.uint64)
    for bit in range(BITS):
        part, place = divmod(bit, PART_BITS)
        word, shift = divmod(part, PARTS // 2)
        codes[:, word] |= bits[:, bit].astype(np.uint64) << np.uint64(shift * PART_BITS + place)
    return codes


_MASKS = pack(-_SIGNS) & pack(np.ones((1, BITS), np.float32))
"""uint64[4, 2]: the bits that a flip turns over."""


def flipped(codes: Codes, flip: int) -> Codes:
    """The hashes of the same pictures flipped; `flip` is an index into FLIPS."""
    return codes ^ _MASKS[flip]


def distance(one: Codes, other: Codes) -> npt.NDArray[np.int64]:
    """In how many bits hashes differ, row by row, int64[N]."""
    counted: npt.NDArray[np.int64] = _count_bits(one ^ other).sum(axis=1, dtype=np.int64)
    return counted


def _count_slowly(words: Codes) -> npt.NDArray[np.uint64]:
    """The bits of each word by halves: for numpy before 2.0, which does not count bits itself."""
    odd, pairs, fours = (np.uint64(mask) for mask in (0x5555555555555555, 0x3333333333333333, 0x0F0F0F0F0F0F0F0F))
    words = words - ((words >> np.uint64(1)) & odd)
    words = (words & pairs) + ((words >> np.uint64(2)) & pairs)
    words = (words + (words >> np.uint64(4))) & fours
    counted: npt.NDArray[np.uint64] = (words * np.uint64(0x0101010101010101)) >> np.uint64(56)
    return counted


_count_bits = getattr(np, "bitwise_count", _count_slowly)


class Index:
    """Hashes to be looked up by parts.

    Args:
        codes: uint64[N, 2].
    """

    def __init__(self, codes: Codes) -> None:
        self.codes = codes
        self._starts, self._order = [], []
        for part in range(PARTS):
            keys = _keys(codes, part)
            self._order.append(np.argsort(keys, kind="stable"))
            counts = np.bincount(keys, minlength=2**PART_BITS)
            self._starts.append(np.concatenate([[0], np.cumsum(counts)]))

    def near(
        self, codes: Codes, doubtful: npt.NDArray[np.int64] | None = None, *, ordered: bool = False
    ) -> Iterator[npt.NDArray[np.int64]]:
        """Blocks of pairs (query, member) at most FAR bits apart; all that are at most SURE apart are among them.

        A pair may come several times, once for every part that is nearly equal.

        Args:
            codes: the queries, uint64[M, 2].
            doubtful: the bits of each part that are most easily the other way round, as keys of one bit,
                int64[PARTS, D, M]: parts that differ in any of them meet, too.
            ordered: only pairs with query < member, where both are the same hashes.

        Yields:
            int64[P, 2].
        """
        for part in range(PARTS):
            keys = _keys(codes, part)
            for looked_up in (*_changed(keys), *(_doubted(keys, doubtful[part]) if doubtful is not None else ())):
                first = self._starts[part][looked_up]
                counts = self._starts[part][looked_up + 1] - first
                for block in _blocks(counts):
                    query = np.repeat(block, counts[block])
                    within = np.arange(len(query)) - np.repeat(np.cumsum(counts[block]) - counts[block], counts[block])
                    member = self._order[part][first[query] + within]
                    if ordered:
                        query, member = query[query < member], member[query < member]
                    close = distance(codes[query], self.codes[member]) <= FAR
                    if close.any():
                        yield np.stack([query[close], member[close]], axis=1)


def _keys(codes: Codes, part: int) -> npt.NDArray[np.int64]:
    word, shift = divmod(part, PARTS // 2)
    mask = np.uint64(2**PART_BITS - 1)
    return ((codes[:, word] >> np.uint64(shift * PART_BITS)) & mask).astype(np.int64)


def _changed(keys: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.int64]]:
    """The keys, and the keys with each one bit changed."""
    yield keys
    for bit in range(PART_BITS):
        yield keys ^ (1 << bit)


def _doubted(keys: npt.NDArray[np.int64], bits: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.int64]]:
    """The keys with two and more of the doubtful bits changed."""
    for size in range(2, len(bits) + 1):
        for chosen in itertools.combinations(bits, size):
            yield keys ^ np.bitwise_or.reduce(chosen)


def doubtful_bits(values: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """The DOUBTFUL bits of each part whose frequencies are nearest to 0: float32[N, 126] -> int64[PARTS, D, N]."""
    size = np.abs(values).reshape(len(values), PARTS, PART_BITS)
    least = np.argpartition(size, DOUBTFUL, axis=2)[..., :DOUBTFUL]
    return np.left_shift(1, least.transpose(1, 2, 0))


def _blocks(counts: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.int64]]:
    """Positions with a count above 0, in blocks whose counts add up to about _BLOCK at most."""
    some = np.flatnonzero(counts)
    total = np.cumsum(counts[some])
    start = 0
    while start < len(some):
        reached = total[start - 1] if start else 0
        end = max(start + 1, int(np.searchsorted(total, reached + _BLOCK, side="right")))
        yield some[start:end]
        start = end


class Candidates(NamedTuple):
    """Pairs of pictures that could be copies: `second`, flipped, resembles `first` without its borders.

    Attributes:
        first, second: int64[P], positions of the pictures.
        flip: int64[P], indexes into FLIPS.
        crop: int64[P], indexes into CROPS.
        likeness: float32[P], cosine of their frequencies.
    """

    first: npt.NDArray[np.int64]
    second: npt.NDArray[np.int64]
    flip: npt.NDArray[np.int64]
    crop: npt.NDArray[np.int64]
    likeness: npt.NDArray[np.float32]

    def take(self, which: npt.NDArray[Any]) -> Candidates:
        """Some of them, in that order."""
        return Candidates(*(column[which] for column in self))


def candidates(values: npt.NDArray[np.float32], least: float = LEAST, most: int = MOST) -> Candidates:
    """Pairs of pictures that could be copies, each once, as the flip and crop that fit best.

    Args:
        values: what :func:`frequencies` gives, float32[N, len(CROPS), 126].
        least: cosine below which a pair is dropped.
        most: a pair stays when it is among so many best pairs of one of its pictures; so the number of pairs grows
            with the number of pictures, however many of them look alike.
    """
    whole = values[:, 0]
    index = Index(pack(whole))
    nothing = np.empty(0, np.int64)
    fresh = [Candidates(nothing, nothing, nothing, nothing, np.empty(0, np.float32))]
    waiting = 0
    for number in range(len(CROPS)):
        codes, doubtful = pack(values[:, number]), doubtful_bits(values[:, number])
        for flip in range(len(FLIPS)):
            for pairs in index.near(flipped(codes, flip), doubtful, ordered=number == 0):
                first, second = pairs[pairs[:, 0] != pairs[:, 1]].T
                like = np.einsum("nd,nd->n", values[first, number] * _SIGNS[flip], whole[second])
                good = like >= least
                ways = np.full(int(good.sum()), flip), np.full(int(good.sum()), number)
                fresh.append(Candidates(first[good], second[good], *ways, like[good]))
                waiting += len(ways[0])
                if waiting > _BLOCK:
                    fresh, waiting = [_best(fresh, len(values), most)], 0
    return _best(fresh, len(values), most)


def _best(parts: list[Candidates], count: int, most: int) -> Candidates:
    """Each pair once, with its greatest likeness, and only those among the `most` best of one of their pictures."""
    pairs = Candidates(*(np.concatenate(column) for column in zip(*parts, strict=True)))
    if not len(pairs.first):
        return pairs
    key = np.minimum(pairs.first, pairs.second) * count + np.maximum(pairs.first, pairs.second)
    order = np.lexsort((-pairs.likeness, key))
    pairs = pairs.take(order[np.diff(key[order], prepend=-1) > 0])
    picture = np.concatenate([pairs.first, pairs.second])
    order = np.lexsort((-np.tile(pairs.likeness, 2), picture))
    starts = np.flatnonzero(np.diff(picture[order], prepend=-1))
    rank = np.arange(len(order)) - np.repeat(starts, np.diff(starts, append=len(order)))
    return pairs.take(np.unique(order[rank < most] % len(pairs.first)))
