"""What a comparison comes to, in plain sentences: what differs, and what was not found to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eyetune.metrics.scores import METRICS

_SHORT = {"qwk": "QWK", "auroc_macro": "AUROC", "referable_auroc": "referable AUROC", "f1_macro": "macro F1"}


def sentences(test: Mapping[str, Any]) -> list[str]:
    """What differs and what does not, by one test of `tests`: a sentence for each arm that others beat, then what no
    difference was found between, then what answered alike throughout, then what could not be tested."""
    higher = METRICS.get(test["metric"]).higher_is_better
    beaten: dict[str, list[str]] = {}
    alike, same, untold = [], [], []
    for pair in test["pairs"]:
        if pair["p_holm"] is None:
            untold.append(f"{pair['first']} and {pair['second']} could not be compared: {pair['reason']}.")
        elif pair["differs"]:
            first_wins = (pair["difference"] > 0) == higher
            better, worse = (pair["first"], pair["second"]) if first_wins else (pair["second"], pair["first"])
            beaten.setdefault(worse, []).append(f"{better} (by {_by(pair, positive=True)}{_not_every(pair)})")
        elif pair["difference"] == 0 and pair["ci"] in ([0, 0], [None, None]):
            same.append(f"{pair['first']} and {pair['second']}")
        else:
            alike.append(f"{pair['first']} and {pair['second']} ({_by(pair)})")
    found = [
        f"{listed(better)} {'are' if len(better) > 1 else 'is'} better than {worse}."
        for worse, better in beaten.items()
    ]
    if alike:
        found.append(
            f"No difference was found between {listed(alike)}. That does not show that they are equal: differences as "
            "large as the ends of these intervals fit the data."
        )
    found += [f"{pair} answered alike, image by image: there was nothing to tell them apart by." for pair in same]
    return found + untold


def heading(test: Mapping[str, Any]) -> str:
    """What the sentences are about."""
    unit = "patients" if test["unit"] == "patient" else "images, each counted as a patient"
    images = (
        f"{test['images']} images of {test['clusters']} {unit}"
        if test["unit"] == "patient"
        else (f"{test['images']} {unit}")
    )
    count = len(test["pairs"])
    corrected = f", p corrected for {count} comparisons (Holm), the intervals not" if count > 1 else ""
    return f"{label(test['metric'])} on the {test['dataset']} split, {images}; {test['method']}{corrected}:"


def label(metric: str) -> str:
    """A metric as tables call it."""
    return _SHORT.get(metric, metric.replace("_", " "))


def _by(pair: Mapping[str, Any], *, positive: bool = False) -> str:
    sign = -1 if positive and pair["difference"] < 0 else 1
    ends = [None if end is None else sign * end for end in pair["ci"]]
    low, high = sorted(end for end in ends if end is not None) if None not in ends else (None, None)
    interval = "" if low is None else f" [{low:.3f}, {high:.3f}]"
    p = pair["p_holm"]
    return f"{sign * pair['difference']:.3f}{interval}, p {'< 0.001' if p < 0.001 else f'= {p:.3f}'}"


def _not_every(pair: Mapping[str, Any]) -> str:
    count = len(pair["seeds"])
    return "" if pair["same_direction"] == count else f", though in {pair['same_direction']} of {count} seeds only"


def listed(parts: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
