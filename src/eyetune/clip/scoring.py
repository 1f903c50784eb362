"""How well photographs find their texts and texts their photographs: recall, rank, chance, intervals, by class.

Captions repeat and patients have several texts, so a query may have several right answers: texts of the same words,
texts and photographs of the same patient. The gallery is the whole of the data, for each class, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eyetune.clip.ranking import Answers, Floats, Ints, Ranking, Ranks, rank
from eyetune.metrics.intervals import LEVEL, RESAMPLES, Clusters, interval_entry, share_entry

CUTOFFS = (1, 5, 10)
"""The k of recall at k: what people look through."""

FEWEST = 5
"""Patients below which resampling them says nothing about a mean or a median. (Wilson's interval says something.)"""

DIRECTIONS = ("image_to_text", "text_to_image")


def retrieval(
    images: Tensor,
    texts: Tensor,
    links: Sequence[tuple[int, int]],
    *,
    patients: Sequence[str] | None = None,
    words: Sequence[str] | None = None,
    labels: Sequence[str | None] | None = None,
    cutoffs: Sequence[int] = CUTOFFS,
    resamples: int = RESAMPLES,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Retrieval in both directions, each query against the whole gallery.

    Args:
        images: float[P, D], a row a patient's photographs, of unit length.
        texts: float[T, D], likewise.
        links: (place of photographs, place of text) that belong together.
        patients: P identifiers; None: each row is a patient of its own.
        words: the T texts; None: each is different.
        labels: the T texts' classes, None where not known.
        cutoffs: the k of recall at k; those above the gallery are left out.
        resamples: of patients, for the intervals; 0 for no intervals.
        seed: of the resampling.
        device: where similarities are computed.

    Returns per direction (`image_to_text`, `text_to_image`): `queries`, `patients`, `without_answer` (left out),
    `gallery`, `right_answers` (the mean per query), `metrics`, `per_class` and `without_class` (queries in none of
    these: their texts have no label, or different ones); each metric is {"value", "ci", "chance"}: `recall_at_K`,
    `mrr`, `median_rank`. Raises DataError as :func:`eyetune.clip.ranking.rank`.
    """
    answers = Answers.of(links, len(images) if patients is None else patients, len(texts) if words is None else words)
    ranking = rank(images, texts, answers, device=device)
    return measured(ranking, answers, labels=labels, cutoffs=cutoffs, resamples=resamples, seed=seed)


def measured(
    ranking: Ranking,
    answers: Answers,
    *,
    labels: Sequence[str | None] | None = None,
    cutoffs: Sequence[int] = CUTOFFS,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """The measures of a ranking; arguments and result as for :func:`retrieval`."""
    of_text = list(labels) if labels is not None else [None] * len(answers.texts)
    of_image = image_labels(answers, of_text)
    sides: dict[str, tuple[Ranks, Ints, Sequence[str | None], list[Any]]] = {
        "image_to_text": (ranking.images, ranking.image_rows, of_image, answers.patients.tolist()),
        "text_to_image": (ranking.texts, ranking.text_rows, of_text, list(answers.owners)),
    }
    found: dict[str, Any] = {
        "patients": len(np.unique(answers.patients)),
        "images": len(answers.patients),
        "texts": len(answers.texts),
        "different_texts": len(np.unique(answers.texts)),
    }
    for direction, (ranks, rows, classes, owners) in sides.items():
        units = [str(owners[row]) for row in rows.tolist()]
        kinds = [classes[row] for row in rows.tolist()]
        found[direction] = {
            "queries": len(ranks),
            "patients": len(set(units)),
            "without_answer": len(owners) - len(ranks),
            "gallery": ranks.gallery,
            "right_answers": float(ranks.answers.mean()) if len(ranks) else None,
            "metrics": measures(ranks, units, kinds, cutoffs=cutoffs, resamples=resamples, seed=seed),
            "per_class": {
                name: _of_class(name, ranks, units, kinds, cutoffs=cutoffs, resamples=resamples, seed=seed)
                for name in sorted({kind for kind in kinds if kind is not None})
            },
            "without_class": kinds.count(None),
        }
    found["intervals"] = {
        "level": LEVEL,
        "unit": "patient",
        "resamples": resamples,
        "seed": seed,
        "method": "bootstrap of the querying patients, stratified by class, in the whole gallery; recall by Wilson's "
        "interval with the design effect of the resamples",
    }
    return found


def image_labels(answers: Answers, labels: Sequence[str | None]) -> list[str | None]:
    """The class of each row of photographs: that of its own texts where they agree, else None."""
    said: dict[int, set[str | None]] = {}
    for owners, label in zip(answers.owners, labels, strict=True):
        for patient in owners:
            said.setdefault(patient, set()).add(label)
    agreed = {patient: next(iter(classes)) for patient, classes in said.items() if len(classes) == 1}
    return [agreed.get(patient) for patient in answers.patients.tolist()]


def _of_class(name: str, ranks: Ranks, units: Sequence[str], kinds: Sequence[str | None], **how: Any) -> dict[str, Any]:
    """What `per_class` says of the queries of one class; `how` as for :func:`measures`."""
    rows = np.array([kind == name for kind in kinds])
    own = [unit for unit, kind in zip(units, kinds, strict=True) if kind == name]
    return {"queries": len(own), "patients": len(set(own)), "metrics": measures(ranks.take(rows), own, **how)}


def measures(
    ranks: Ranks,
    units: Sequence[str],
    kinds: Sequence[str | None] | None = None,
    *,
    cutoffs: Sequence[int] = CUTOFFS,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Recall at each cutoff, mean reciprocal rank and median rank of Q queries.

    Args:
        ranks: where their right answers stand.
        units: Q names: queries of the same name are drawn together.
        kinds: Q classes, the strata of the draws; None: one stratum.
        cutoffs, resamples, seed: as for :func:`retrieval`.

    Of fewer than five names only recall has an interval. `median_rank` is the lower median of the expected ranks; its
    chance level is the median rank in random order.
    """
    if not len(ranks):
        return {}
    chance = ranks.chance()
    shares = {f"recall_at_{k}": (ranks.recall(k), chance.recall(k)) for k in cutoffs if k <= ranks.gallery}
    shares["mrr"] = (ranks.reciprocal(), chance.reciprocal())
    names = list(shares)
    values = np.stack([value for value, _ in shares.values()], axis=1)
    expected = ranks.expected()
    order = np.argsort(expected, kind="stable")

    def statistics(counts: NDArray[np.int64]) -> Floats:
        means = counts @ values / counts.sum()
        return np.append(means, _lower_median(expected, order, counts))

    drawn = np.empty((resamples, len(names) + 1))
    if resamples:
        strata = np.unique([str(kind) for kind in kinds or [""] * len(ranks)], return_inverse=True)[1]
        clusters = Clusters.of(list(units), strata.reshape(-1).astype(np.int64))
        for place, counts in enumerate(clusters.draws(resamples, seed)):
            drawn[place] = statistics(counts)
    estimates = statistics(np.ones(len(ranks), dtype=np.int64)).tolist()
    found = {}
    for place, (name, value) in enumerate(zip([*names, "median_rank"], estimates, strict=True)):
        if name.startswith("recall") and resamples:
            entry = share_entry(drawn[:, place], value, len(ranks), len(set(units)))
        else:
            enough = len(set(units)) >= FEWEST
            entry = interval_entry(drawn[:, place] if enough else drawn[:0, place], value)
        level = float(shares[name][1].mean()) if name in shares else _median_by_chance(ranks)
        found[name] = entry | {"chance": level}
    return found


def _lower_median(values: Floats, order: Ints, counts: Ints) -> float:
    """The lower median of values float64[Q], `order` being that of their size, each counted `counts` times."""
    below = np.cumsum(counts[order])
    return float(values[order[np.searchsorted(below, (below[-1] + 1) // 2)]])


def _median_by_chance(ranks: Ranks) -> float:
    """The lower median rank of the first right answer where the galleries are in random order."""
    answers, queries = np.unique(ranks.answers, return_counts=True)
    size = ranks.gallery

    def missed(place: int) -> float:
        """The share of queries without a right answer among the first `place`: the hypergeometric distribution."""
        shares = [math.exp(_log_choose(size - right, place) - _log_choose(size, place)) for right in answers.tolist()]
        return float(np.average(shares, weights=queries))

    # The margin: a share of exactly one half may come out a rounding below it.
    return float(_first(lambda place: missed(place) <= 0.5 + 1e-9, size))


def _log_choose(n: int, k: int) -> float:
    """The logarithm of the number of ways to choose `k` of `n`; minus infinity where there are none."""
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) if k <= n else -math.inf


def _first(holds: Callable[[int], bool], high: int) -> int:
    """The smallest place in 1..high where `holds`, which stays true once it is and is true of `high`."""
    low = 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low
