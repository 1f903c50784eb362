"""Scores by a column of the table (sex, camera, age): a score may be high on average and low for some of the people.

All groups share one resampling of patients: who is drawn, is drawn with all images, whatever groups they fall into. A
gap between groups that share patients (left and right eyes) so gets the interval of a paired comparison, and one
between separate patients that of an unpaired one.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eyetune.data.labels import is_missing, natural
from eyetune.errors import ConfigError, DataError
from eyetune.metrics.intervals import RESAMPLES
from eyetune.metrics.metric import METRICS
from eyetune.metrics.outcomes import Floats
from eyetune.metrics.predictions import Predictions
from eyetune.metrics.scores import sample, score
from eyetune.metrics.table import Table

FEWEST = 10
"""Images a group needs for its scores to be shown."""

MOST_GROUPS = 20
"""Different values of a column that are groups still; beyond them it is an identifier, or a number to bin."""

UNKNOWN = "(not stated)"
"""The group of the images whose cell is empty."""

AGES = (40.0, 50.0, 60.0, 70.0, 80.0)
"""Where a column called age is cut, when nobody says."""

_MOST_PLAIN_NUMBERS = 6


@dataclass(frozen=True)
class Grouping:
    """A column to score by.

    Args:
        column: its name.
        edges: where its numbers are cut, rising; empty: as :func:`groups` finds them.
    """

    column: str
    edges: tuple[float, ...] = ()

    @classmethod
    def parse(cls, words: Sequence[str]) -> list[Grouping]:
        """`sex,camera` and `age:40:60` -> groupings. Raises ConfigError for edges that are no rising numbers."""
        found = []
        for word in (part.strip() for given in words for part in given.split(",")):
            column, *edges = (part.strip() for part in word.split(":"))
            try:
                numbers = tuple(float(edge) for edge in edges)
            except ValueError:
                numbers = (math.nan,)
            if not column or any(not math.isfinite(n) for n in numbers) or list(numbers) != sorted(set(numbers)):
                raise ConfigError(
                    f"--by {word!r}: write a column, or COLUMN:EDGE:EDGE with rising numbers (age:40:60)."
                )
            found.append(cls(column, numbers))
        if twice := [one.column for one in found if [other.column for other in found].count(one.column) > 1]:
            raise ConfigError(f"--by names the column {twice[0]!r} twice.")
        return found


def groups(grouping: Grouping, cells: Sequence[str | None]) -> tuple[list[str], dict[str, str] | None]:
    """The group of each of N cells; for a column of numbers that was cut also {group: "low <= column < high"}.

    Numbers are cut at the edges given; else ages at 40, 50, … 80; else numbers with more than six different values
    into four groups of about equal size, at rounded edges. Whatever else stands in a cell is its group.

    Raises DataError when edges are given for what is no number, and for more than 20 groups.
    """
    texts = ["" if cell is None or is_missing(cell) else cell.strip() for cell in cells]
    numbers = [_number(text) for text in texts if text]
    numeric = bool(numbers) and None not in numbers
    if grouping.edges and not numeric:
        raise DataError(f"--by {grouping.column}: it cannot be cut, not all of its values are numbers.")
    values = np.array([number for number in numbers if number is not None])
    edges = grouping.edges
    if numeric and not edges and len(set(numbers)) > _MOST_PLAIN_NUMBERS:
        aged = re.search(r"\bage\b", re.sub(r"[\W_]+", " ", grouping.column.lower()))
        edges = AGES if aged and (values < 130).all() else _quartiles(values)
    if edges:
        names = _bins(edges)
        found = [names[int(np.searchsorted(edges, float(text), side="right"))] if text else UNKNOWN for text in texts]
        used = [name for name in names if name in found]
        bins = {name: _words(grouping.column, edges, names.index(name)) for name in used}
        return found, bins
    found = [text or UNKNOWN for text in texts]
    if len(set(found)) > MOST_GROUPS:
        raise DataError(
            f"--by {grouping.column}: it has {len(set(found))} different values; at most {MOST_GROUPS} can be groups. "
            f"A column of numbers can be cut: --by {grouping.column}:EDGE:EDGE."
        )
    return found, None


def subgroups(
    predictions: Table,
    grouping: Grouping,
    cells: Sequence[str | None],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Every metric in every group of a column, and the largest gap, as it stands in metrics.json.

    Args:
        predictions: N images; those with an unknown target are left out.
        grouping: the column.
        cells: N cells of it, as text; None or empty where not known.
        resamples: how many the intervals rest on.
        seed: of the resampling.

    Returns:
        `groups` {group: {"n", "patients", "metrics", and "too_small": why, for one with fewer than 10 images or with
        images of one class only: it has no metrics and no part in the gap}}; `gap` {metric: {"value": largest minus
        smallest, "ci", "between": [group with the largest, with the smallest]}} where two groups or more have a value;
        and `bins` for numbers that were cut. The interval is of the difference between those two groups.
    """
    known = predictions.labelled()
    names, bins = groups(grouping, [cell for cell, kept in zip(cells, predictions.known, strict=True) if kept])
    order = list(bins) if bins else sorted(set(names) - {UNKNOWN}, key=natural)
    order += [UNKNOWN] * (UNKNOWN in names)
    rows = {name: np.flatnonzero(np.array([one == name for one in names])) for name in order}
    found: dict[str, dict[str, Any]] = {}
    for name in order:
        part = known.take(rows[name])
        scores = score(part, resamples=0)
        found[name] = {"n": scores["n"], "patients": scores["patients"], "metrics": scores["metrics"]}
        if reason := _too_small(part):
            found[name] |= {"metrics": {}, "too_small": reason}
    values = _resampled(known, rows, found, resamples, seed)
    for name, entry in found.items():
        for key, metric in entry["metrics"].items():
            if metric["value"] is not None:
                ends = METRICS.get(key).interval(values[name][key], metric["value"])
                metric["ci"] = [None, None] if ends is None else ends
    result: dict[str, Any] = {"groups": found, "gap": _gaps(found, values)}
    return result | ({"bins": bins} if bins else {})


def _too_small(part: Table) -> str | None:
    if len(part) < FEWEST:
        return f"fewer than {FEWEST} images"
    if isinstance(part, Predictions) and len(set(part.targets.tolist())) == 1:
        return f"all images are of class {part.classes[part.targets[0]]}"
    return None


def _resampled(
    known: Table, rows: Mapping[str, Any], found: Mapping[str, Any], resamples: int, seed: int
) -> dict[str, dict[str, Floats]]:
    """float64[resamples] of each metric in each group, NaN where it has no value; the same draws in every group."""
    whole, clusters = sample(known)
    parts = {name: whole.take(rows[name]) for name, entry in found.items() if entry["metrics"]}
    defined = {
        name: [key for key, metric in found[name]["metrics"].items() if metric["value"] is not None] for name in parts
    }
    values = {name: {key: np.full(resamples, np.nan) for key in defined[name]} for name in parts}
    if not parts:
        return values
    for place, counts in enumerate(clusters.draws(resamples, seed)):
        for name, part in parts.items():
            own = counts[rows[name]]
            if own.any():
                drawn = part.drawn(own)
                for key in defined[name]:
                    value = METRICS.get(key).or_none(drawn)
                    if value is not None:
                        values[name][key][place] = value
    return values


def _gaps(found: Mapping[str, Any], values: Mapping[str, Mapping[str, Floats]]) -> dict[str, Any]:
    gaps = {}
    for key in dict.fromkeys(key for entry in found.values() for key in entry["metrics"]):
        here = {name: entry["metrics"].get(key, {}).get("value") for name, entry in found.items()}
        defined = {name: value for name, value in here.items() if value is not None}
        if len(defined) < 2 or METRICS.get(key).descriptive:
            continue
        high, low = max(defined, key=defined.__getitem__), min(reversed(defined), key=defined.__getitem__)
        value = defined[high] - defined[low]
        ends = METRICS.get(key).gap_interval(values[high][key] - values[low][key], value)
        gaps[key] = {"value": value, "ci": [None, None] if ends is None else ends, "between": [high, low]}
    return gaps


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _quartiles(values: Floats) -> tuple[float, ...]:
    """Quartiles, rounded as far as they stay apart."""
    cuts = np.quantile(values, [0.25, 0.5, 0.75])
    spread = float(values.max() - values.min())
    digits = 2 - math.ceil(math.log10(spread)) if spread > 0 else 0
    return tuple(float(cut) for cut in np.unique(np.round(cuts, digits)))


def _bins(edges: Sequence[float]) -> list[str]:
    inner = [f"{low:g} to < {high:g}" for low, high in itertools.pairwise(edges)]
    return [f"< {edges[0]:g}", *inner, f">= {edges[-1]:g}"]


def _words(column: str, edges: Sequence[float], place: int) -> str:
    low = f"{edges[place - 1]:g} <= " if place else ""
    return f"{low}{column}" + (f" < {edges[place]:g}" if place < len(edges) else "")
