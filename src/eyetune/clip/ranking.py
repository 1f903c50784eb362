"""Where the first right answer stands, for every patient among all texts and every text among all patients.

Exact, in bounded memory: similarities are computed block by block in float32, and only those so close to the best right
answer that rounding could turn them around are computed again in float64. The bound on the rounding is the usual one
of a sum of D products (Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., section 3.1), so nothing is
left to luck, and the result does not depend on how the matrix was cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eyetune.errors import DataError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

TIE = 1e-9
"""Similarities of unit vectors that differ by no more are equal: float32 features tell no finer."""

ROUNDING = 2.0**-24
"""Half the distance from 1 to the next float32: the relative error of one operation."""

NOTHING = 1e-30
"""A distance that float32 can still tell from none, and no similarity has."""

ROWS, COLUMNS = 1024, 2048
"""Patients and texts of one block: 8 MiB of similarities, which stay in the processor's cache."""

PAIRS = 8192
"""Pairs computed again in float64 at a time: 64 MiB at 512 dimensions."""


@dataclass(frozen=True, eq=False)
class Ranks:
    """Where the right answers of Q queries stand among the `gallery` items that each is compared with.

    Equal similarities have no order of their own: every measure here is its expectation over all orders of the tied.

    Args:
        above: int64[Q]: wrong items that are more alike than the best right answer.
        wrong: int64[Q]: wrong items exactly as alike as it.
        right: int64[Q]: right answers exactly as alike as the best of them, itself included; >= 1.
        answers: int64[Q]: all right answers; >= 1.
        gallery: how many items are searched.
    """

    above: Ints
    wrong: Ints
    right: Ints
    answers: Ints
    gallery: int

    def __len__(self) -> int:
        return len(self.above)

    def take(self, rows: Ints | NDArray[np.bool_]) -> Ranks:
        """The ranks of these queries (int64[M] or bool[Q]), in the same gallery."""
        return Ranks(self.above[rows], self.wrong[rows], self.right[rows], self.answers[rows], self.gallery)

    def expected(self) -> Floats:
        """float64[Q], >= 1: the rank of the first right answer; 1 + above + wrong / (right + 1)."""
        return 1 + self.above + self.wrong / (self.right + 1)

    def recall(self, k: int) -> Floats:
        """float64[Q], 0..1: the probability that a right answer is among the first `k`; 0 or 1 where nothing ties."""
        missed = (self.above < k).astype(np.float64)
        for place in range(k):
            # The `place`-th of the tied places that are among the first k: was a wrong one drawn there, too?
            inside = self.above + place < k
            share = np.clip((self.wrong - place) / np.maximum(self.wrong + self.right - place, 1), 0, 1)
            missed = np.where(inside, missed * share, missed)
        return np.where(self.above < k, 1 - missed, 0.0)

    def reciprocal(self) -> Floats:
        """float64[Q], 0..1: the expected 1 / rank of the first right answer."""
        found = 1 / (1.0 + self.above)
        tied = np.flatnonzero(self.wrong > 0)
        kinds, kind = np.unique(
            np.stack([self.above[tied], self.wrong[tied], self.right[tied]], axis=1), axis=0, return_inverse=True
        )
        values = [_expected_reciprocal(*map(int, one)) for one in kinds.tolist()]
        found[tied] = np.array(values, dtype=np.float64)[kind.reshape(-1)]
        return found

    def chance(self) -> Ranks:
        """The same queries where similarity says nothing: everything ties with everything."""
        none = np.zeros_like(self.above)
        return Ranks(none, self.gallery - self.answers, self.answers, self.answers, self.gallery)


def _expected_reciprocal(above: int, wrong: int, right: int) -> float:
    """The mean of 1 / (above + place), `place` 1..wrong+1 being that of the first right one among the tied."""
    places = np.arange(wrong + 1)
    # P(the first `place` tied are all wrong), place = 0..wrong, and what is lost at each step.
    waiting = np.concatenate([[1.0], np.cumprod((wrong - places[:-1]) / (wrong + right - places[:-1]))])
    found = waiting * right / (wrong + right - places)
    return float((found / (above + places + 1)).sum())


@dataclass(frozen=True, eq=False)
class Answers:
    """Which texts are right for which patient's photographs.

    Texts of the same words are one text: every one of them is right where one is. A row of photographs of the same
    patient is the same patient: what is right for one row is right for all.

    Args:
        patients: int64[P], 0..: which rows of photographs are of one patient.
        texts: int64[T], 0..U-1: which texts have the same words.
        rows, columns: int64[L]: pairs (row of photographs 0..P-1, different text 0..U-1) that are right, each once.
        owners: for each of the T texts the patients (numbers of `patients`) it was written of, sorted.
    """

    patients: Ints
    texts: Ints
    rows: Ints
    columns: Ints
    owners: Sequence[tuple[int, ...]]

    @classmethod
    def of(
        cls,
        links: Sequence[tuple[int, int]],
        patients: Sequence[str] | int,
        texts: Sequence[str] | int,
    ) -> Answers:
        """From links (place of the photographs, place of the text).

        Args:
            links: as in the data; repeated ones count once.
            patients: P identifiers, or P when each row is a patient of its own.
            texts: the T texts, or T when each is different.

        Raises DataError for a link outside the rows or texts.
        """
        persons, words = _numbered(patients), _numbered(texts)
        pairs = np.array(links, dtype=np.int64).reshape(-1, 2)
        outside = ((pairs < 0) | (pairs >= [len(persons), len(words)])).any(axis=1)
        if outside.any():
            row, text = pairs[np.flatnonzero(outside)[0]].tolist()
            raise DataError(
                f"a link says photographs {row} go with text {text}; there are {len(persons)} and {len(words)}."
            )
        owners: list[set[int]] = [set() for _ in range(len(words))]
        for row, text in pairs.tolist():
            owners[text].add(int(persons[row]))
        of_person = np.unique(np.stack([persons[pairs[:, 0]], words[pairs[:, 1]]], axis=1), axis=0)
        order = np.argsort(persons, kind="stable")
        starts = np.searchsorted(persons[order], of_person[:, 0], side="left")
        sizes = np.searchsorted(persons[order], of_person[:, 0], side="right") - starts
        within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        rows = order[np.repeat(starts, sizes) + within]
        return cls(persons, words, rows, np.repeat(of_person[:, 1], sizes), [tuple(sorted(one)) for one in owners])


def _numbered(names: Sequence[str] | int) -> Ints:
    """Names -> numbers in the order in which they first come; equal names have equal numbers."""
    if isinstance(names, int):
        return np.arange(names)
    number = {name: place for place, name in enumerate(dict.fromkeys(names))}
    return np.array([number[name] for name in names], dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Ranking:
    """Both directions: `images` holds the queries of `image_rows` (photographs with a right text), `texts` those of
    `text_rows` (texts with right photographs); both int64[·], places in the data."""

    images: Ranks
    image_rows: Ints
    texts: Ranks
    text_rows: Ints


def rank(images: Tensor, texts: Tensor, answers: Answers, *, device: torch.device | str = "cpu") -> Ranking:
    """Rank all T texts for each of P patients and all P patients for each of T texts, by the dot product.

    Args:
        images: float[P, D].
        texts: float[T, D]; texts of the same words count with the first one's features.
        answers: what is right.
        device: where the blocks are computed. What has to be computed again is, on the CPU.

    Memory beyond the features: some 100 MiB, whatever P and T. Raises DataError for features that are not finite or
    do not fit together.
    """
    different, first, copies = np.unique(answers.texts, return_index=True, return_counts=True)
    if images.ndim != 2 or texts.ndim != 2 or images.shape[1] != texts.shape[1]:
        raise DataError(f"features of photographs are {list(images.shape)}, of texts {list(texts.shape)}.")
    if (len(images), len(texts)) != (len(answers.patients), len(answers.texts)):
        raise DataError(
            f"{len(images)} and {len(texts)} features came for {len(answers.patients)} rows of photographs and "
            f"{len(answers.texts)} texts."
        )
    left = images.detach().float().cpu()
    right = texts.detach().float().cpu()
    if len(first) < len(right):
        right = right[torch.from_numpy(first)]
    if not (left.isfinite().all() and right.isfinite().all()):
        raise DataError("the features hold NaN or infinite numbers: training has diverged, or the file is damaged.")
    number = np.zeros(int(different.max(initial=-1)) + 1, dtype=np.int64)
    number[different] = np.arange(len(different))
    columns = number[answers.columns]
    of_images = _Side(left, right, copies, answers.rows, columns)
    of_texts = _Side(right, left, np.ones(len(left), dtype=np.int64), columns, answers.rows)
    _count(of_images, of_texts, torch.device(device))
    by_image, by_text = of_images.ranks(), of_texts.ranks()
    image_rows = np.flatnonzero(by_image.answers > 0)
    text_rows = np.flatnonzero(by_text.answers[number[answers.texts]] > 0)
    return Ranking(by_image.take(image_rows), image_rows, by_text.take(number[answers.texts][text_rows]), text_rows)


class _Side:
    """One direction of the search: N queries of `own` among the items of `other`, item i standing for `copies[i]`."""

    def __init__(self, own: Tensor, other: Tensor, copies: Ints, mine: Ints, theirs: Ints) -> None:
        self.own, self.other = own, other
        self.copies = copies.astype(np.float64)
        count = len(own)
        # Not `.double()` first: that would be a second copy of everything.
        lengths = [torch.linalg.vector_norm(one, dim=1, dtype=torch.float64).numpy() for one in (own, other)]
        reach = lengths[0] * lengths[1].max(initial=0.0)
        similarity = self._similar(mine, theirs)
        self.best = np.full(count, np.inf)
        known = np.unique(mine)
        self.best[known] = -np.inf
        np.maximum.at(self.best, mine, similarity)
        self.tie = np.broadcast_to(TIE * reach, count)
        self.answers = np.bincount(mine, self.copies[theirs], count)
        tied = similarity >= (self.best - self.tie)[mine]
        self.right = np.bincount(mine[tied], self.copies[theirs[tied]], count)
        # Beyond this distance float32 cannot be wrong about which of two is larger: D products and sums, and the
        # bounds rounded to float32 themselves. Of nothing but zeros, too, what is alike lies between the bounds.
        band = 1.01 * (own.shape[1] + 8) * ROUNDING * np.broadcast_to(reach, count) + self.tie + NOTHING
        self.low = torch.from_numpy((self.best - band).astype(np.float32))
        self.high = torch.from_numpy((self.best + band).astype(np.float32))
        self.above, self.tied = np.zeros(count), np.zeros(count)

    def _similar(self, mine: Ints, theirs: Ints) -> Floats:
        """float64[M]: the dot products of these pairs."""
        found = np.empty(len(mine))
        queries, items = (np.unique(one, return_inverse=True) for one in (mine, theirs))
        # Most of a block (a network that calls everything alike): the block again is quicker than pair by pair.
        if 16 * len(mine) > len(queries[0]) * len(items[0]):
            others = self.other[torch.from_numpy(items[0])].double().T
            for start in range(0, len(queries[0]), ROWS):
                own = self.own[torch.from_numpy(queries[0][start : start + ROWS])].double()
                part = (queries[1] >= start) & (queries[1] < start + ROWS)
                found[part] = (own @ others).numpy()[queries[1][part] - start, items[1][part]]
            return found
        for start in range(0, len(mine), PAIRS):
            some = slice(start, start + PAIRS)
            own = self.own[torch.from_numpy(mine[some])].double()
            found[some] = (own * self.other[torch.from_numpy(theirs[some])].double()).sum(dim=1).numpy()
        return found

    def add(self, above: Tensor, perhaps: Tensor, unsure: Callable[[], tuple[Ints, Ints]], rows: slice) -> None:
        """Count one block, of the queries `rows`.

        Args:
            above, perhaps: float32[B]: the items above the upper bound of each query, and above its lower one.
            unsure: gives the pairs between the two bounds, (query, item), int64[M] each; asked if there are any.
            rows: of the queries.
        """
        self.above[rows] += above.cpu().numpy()
        if torch.equal(above, perhaps):
            return
        mine, theirs = unsure()
        distance, tie = self._similar(mine, theirs) - self.best[mine], self.tie[mine]
        count = len(self.above)
        for counted, which in ((self.above, distance > tie), (self.tied, np.abs(distance) <= tie)):
            np.add(counted, np.bincount(mine[which], self.copies[theirs[which]], count), out=counted)

    def ranks(self) -> Ranks:
        """What was counted, queries without a right answer included (`answers` 0)."""
        above, wrong, right, answers = (
            np.rint(one).astype(np.int64) for one in (self.above, self.tied - self.right, self.right, self.answers)
        )
        return Ranks(above, wrong, right, answers, int(self.copies.sum()))


def _count(images: _Side, texts: _Side, device: torch.device) -> None:
    """Go through all similarities once, for both directions."""
    left, right = images.own, texts.own
    weights = torch.from_numpy(images.copies.astype(np.float32)).to(device)
    ones = torch.ones(ROWS, device=device)
    # The same memory for every block: fetching it anew from the system would take longer than counting.
    room = [torch.empty(ROWS * COLUMNS, device=device) for _ in range(3)]
    fast = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False  # its products are rounded to ten bits: the bound would not hold
    try:
        for row in range(0, len(left), ROWS):
            across = slice(row, min(row + ROWS, len(left)))
            own = left[across].to(device)
            bounds = [one[across, None].to(device) for one in (images.high, images.low)]
            for column in range(0, len(right), COLUMNS):
                down = slice(column, min(column + COLUMNS, len(right)))
                shape = (len(own), down.stop - down.start)
                block, above, perhaps = (one[: shape[0] * shape[1]].view(shape) for one in room)
                torch.mm(own, right[down].to(device).T, out=block)
                pairs = partial(_different, above, perhaps, across.start, down.start)
                for bound, into in zip(bounds, (above, perhaps), strict=True):
                    torch.gt(block, bound, out=into)
                images.add(above @ weights[down], perhaps @ weights[down], pairs, across)
                for limit, into in zip((texts.high, texts.low), (above, perhaps), strict=True):
                    torch.gt(block, limit[down].to(device), out=into)
                own_ones = ones[: len(own)]
                texts.add(own_ones @ above, own_ones @ perhaps, partial(_turned, pairs), down)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = fast


def _turned(pairs: Callable[[], tuple[Ints, Ints]]) -> tuple[Ints, Ints]:
    first, second = pairs()
    return second, first


def _different(first: Tensor, second: Tensor, row: int, column: int) -> tuple[Ints, Ints]:
    """Where two matrices differ: rows counted from `row`, columns from `column`, int64[M] each."""
    differs = (first != second).contiguous()
    if differs.device.type == "cpu":  # numpy finds few among many ten times as fast
        flat = np.flatnonzero(differs.numpy())
    else:
        flat = differs.view(-1).nonzero().view(-1).cpu().numpy()
    return row + flat // differs.shape[1], column + flat % differs.shape[1]


def top(queries: Tensor, gallery: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` most alike of the gallery for each query, best first; equals in the order of the gallery.

    Args:
        queries: float[Q, D].
        gallery: float[N, D].
        k: at most N.

    Returns similarities float64[Q, k] and places int64[Q, k].
    """
    scores, places = [], []
    for part in queries.detach().cpu().split(ROWS):
        # float64: a rounding of float32 would order equals by where the block was cut.
        values = part.double() @ gallery.detach().cpu().double().T
        order = torch.sort(values, dim=1, descending=True, stable=True)
        scores.append(order.values[:, :k])
        places.append(order.indices[:, :k])
    return torch.cat(scores), torch.cat(places)
