"""A perceptual hash that knows flips and cropped borders, and for every picture the nearest others among many.

The hash is 126 low cosine frequencies of the view, after what is smooth (illumination, the dark rim) was subtracted:
pHash (Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010) before its signs are taken,
for a picture whose coarse structure all eyes share. Mirroring a picture changes the sign of every odd frequency along
that axis, so the hash of a flipped copy is the same hash with known signs; a cropped copy is met by hashing the whole
picture once more without its borders.

Eyes resemble each other: a few patterns (where the disc lies, how the arcades run) make up most of every hash, so that
strangers are as alike as copies. The hashes are therefore seen in the collection's own principal components, each
divided by its size (whitening), and what is too weak to be told from noise is left out. There two eyes have next to
nothing in common, and a copy still has. Components never mix frequencies that a flip treats differently, so that a flip
stays a change of signs.

Up to EXACT pictures are compared all with all. More are looked up in a graph of near neighbours (HNSW: Malkov and
Yashunin, "Efficient and robust approximate nearest neighbor search using Hierarchical Navigable Small World graphs",
TPAMI 2020; Spotify's voyager), in which a look-up takes about log n steps (docs/benchmarks.md has time and recall).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from eyetune.data.audit.looks import SIDE, View

Vectors = npt.NDArray[np.float32]
"""float32[N, KEPT], of unit length: hashes in the collection's own components."""

SIZE = 126
"""Frequencies of a hash."""

KEPT = 64
"""Components that are compared. Altered copies differ most in those that are weak."""

FLIPS = ("", "left to right", "top to bottom", "both ways")
CROPS = (0.0, 0.03, 0.06, 0.09)
"""Shares of the view taken off each border: the views of cropped copies lie between these."""

LEAST, MOST = 0.6, 8
"""Cosine from which two pictures could be copies, and how many such pairs a picture may have."""

EXACT = 2000
"""Pictures up to which all are compared with all."""

_PRIOR, _FLOOR = 200, 0.05
"""What is not known of the components: as if so many pictures more had been seen in which all are of one size, and how
much of the mean size each has at least. Both keep a weak component from being blown up by noise."""

_LINKS, _BUILT, _TRIED = 16, 100, 32
"""The graph: neighbours that a picture is linked with, and how many are held in view when it is built and asked."""

_ALIKE = 12
"""Components, the largest, by whose signs pictures are put in order."""

_FREQUENCIES = 16
_SMALL = 64
"""Pixels of the views that are hashed."""

_BLOCK = 2_000_000
"""Likenesses held at a time, which bounds memory."""


def _chosen() -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows and columns of the lowest 126 frequencies but the very lowest."""
    rows, columns = np.mgrid[:_FREQUENCIES, :_FREQUENCIES]
    order = np.lexsort((np.abs(rows - columns).ravel(), (rows + columns).ravel()))
    order = order[(rows + columns).ravel()[order] >= 2][:SIZE]
    return rows.ravel()[order], columns.ravel()[order]


_ROWS, _COLUMNS = _chosen()
SIGNS = np.stack([np.ones(SIZE), (-1.0) ** _COLUMNS, (-1.0) ** _ROWS, (-1.0) ** (_ROWS + _COLUMNS)]).astype(np.float32)
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
    found = np.empty((len(CROPS), SIZE), np.float32)
    for index, crop in enumerate(CROPS):
        found[index] = cv2.dct(local_contrast(cut(view, crop, _SMALL), _SMALL / 8))[_ROWS, _COLUMNS]
    return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-6)


class Components:
    """What the hashes of a collection are seen in: its principal components, of one size and apart by parity.

    Second moments, not variances: what all pictures share (a round field, a dark fovea) is a component as well, and
    divided down with the others. A collection and its flipped copies have the same components.

    Args:
        whole: the hashes of all pictures, float32[N, 126].

    Attributes:
        basis: float32[126, KEPT].
        signs: float32[len(FLIPS), KEPT]: what a flip does to the components.
    """

    def __init__(self, whole: npt.NDArray[np.float32]) -> None:
        basis, sizes, signs = np.zeros((SIZE, SIZE)), np.empty(SIZE), np.empty((len(FLIPS), SIZE), np.float32)
        start = 0
        for parity in np.unique(SIGNS, axis=1).T:
            alike = np.flatnonzero((parity == SIGNS.T).all(axis=1))
            part = whole[:, alike].astype(np.float64)
            here = slice(start, start := start + len(alike))
            sizes[here], basis[alike, here] = np.linalg.eigh(part.T @ part / len(whole))
            signs[:, here] = parity[:, None]
        largest = np.argsort(-sizes, kind="stable")[:KEPT]
        least = (_FLOOR + _PRIOR / len(whole)) * sizes.mean()
        self.basis = (basis / np.sqrt(np.maximum(sizes, 0) + max(least, 1e-12)))[:, largest].astype(np.float32)
        self.signs = signs[:, largest]

    def __call__(self, values: npt.NDArray[np.float32]) -> Vectors:
        """Hashes as vectors whose product is their likeness: float32[N, 126] -> float32[N, KEPT]."""
        seen = values @ self.basis
        return np.asarray(seen / np.maximum(np.linalg.norm(seen, axis=1, keepdims=True), 1e-6), np.float32)


Neighbours = tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]
"""Of each query: positions of its nearest members, int64[N, most], and their likeness, float32[N, most]."""


def exactly(members: Vectors, queries: Vectors, most: int) -> Neighbours:
    """The nearest members of each query, by comparing all with all."""
    most = min(most, len(members))
    found = np.empty((len(queries), most), np.int64), np.empty((len(queries), most), np.float32)
    step = max(1, _BLOCK // len(members))
    for start in range(0, len(queries), step):
        here = slice(start, start + step)
        like = queries[here] @ members.T
        found[0][here] = np.argpartition(-like, most - 1, axis=1)[:, :most]
        found[1][here] = np.take_along_axis(like, found[0][here], axis=1)
    return found


class Graph:
    """Vectors to be looked up in about log n steps each, nearly always as :func:`exactly` would.

    Built by one thread, in an order drawn with a fixed seed (equal pictures that come one after the other would make
    islands): one collection gives one graph, and one answer.

    Args:
        members: the vectors.
        threads: look-ups at a time.
    """

    def __init__(self, members: Vectors, threads: int) -> None:
        import voyager

        order = np.random.default_rng(0).permutation(len(members))
        self.threads = threads
        self._index = voyager.Index(
            voyager.Space.InnerProduct, members.shape[1], M=_LINKS, ef_construction=_BUILT, random_seed=0
        )
        self._index.add_items(members[order], order, num_threads=1)

    def nearest(self, queries: Vectors, most: int) -> Neighbours:
        """The nearest members of each query."""
        most = min(most, len(self._index))
        found, distance = self._index.query(queries, most, num_threads=self.threads, query_ef=max(_TRIED, most))
        return found.astype(np.int64), np.asarray(1 - distance, np.float32)


class Candidates(NamedTuple):
    """Pairs of pictures that could be copies: `second`, flipped, resembles `first` without its borders.

    Attributes:
        first, second: int64[P], positions of the pictures.
        flip: int64[P], indexes into FLIPS.
        crop: int64[P], indexes into CROPS.
        likeness: float32[P], cosine of their hashes in the components of the collection.
    """

    first: npt.NDArray[np.int64]
    second: npt.NDArray[np.int64]
    flip: npt.NDArray[np.int64]
    crop: npt.NDArray[np.int64]
    likeness: npt.NDArray[np.float32]

    def take(self, which: npt.NDArray[Any]) -> Candidates:
        """Some of them, in that order."""
        return Candidates(*(column[which] for column in self))


def candidates(
    values: npt.NDArray[np.float32], least: float = LEAST, most: int = MOST, *, threads: int = 1, exact: int = EXACT
) -> Candidates:
    """Pairs of pictures that could be copies, each once, as the flip and crop that fit best.

    Args:
        values: what :func:`frequencies` gives, float32[N, len(CROPS), 126].
        least: likeness below which a pair is dropped.
        most: a pair stays when it is among so many best pairs of one of its pictures; so the number of pairs grows
            with the number of pictures, however many of them look alike.
        threads: look-ups at a time; the answer does not depend on it.
        exact: pictures up to which all are compared with all.
    """
    count = len(values)
    components = Components(values[:, 0])
    whole = components(values[:, 0])
    graph = None if count <= exact else Graph(whole, threads)
    # What is alike is asked for one after the other: most of the graph that it meets is in the processor's cache then.
    order = np.lexsort((whole[:, :_ALIKE] > 0).T)
    seen = components(values[order].reshape(-1, SIZE))
    first, crop = np.repeat(order, len(CROPS)), np.tile(np.arange(len(CROPS)), count)
    found = []
    for flip in range(len(FLIPS)):
        queries = seen * components.signs[flip]
        # One more than is wanted: a picture may meet itself.
        second, like = graph.nearest(queries, most + 1) if graph else exactly(whole, queries, most + 1)
        query, rank = np.nonzero((like >= least) & (first[:, None] != second))
        ways = np.full(len(query), flip), crop[query]
        found.append(Candidates(first[query], second[query, rank], *ways, like[query, rank]))
    return _best(found, count, most)


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
