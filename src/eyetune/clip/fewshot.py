"""Few labelled photographs a class: a linear probe and Tip-Adapter, over many draws of which ones.

Which photographs are drawn matters as much as the method when there are few. So each number is the mean over draws,
and its interval is where single draws lie on other samples of such patients. Nothing is chosen on the test data: the
settings of both methods are the published ones or fixed beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eyetune.errors import DataError
from eyetune.metrics.intervals import FEWEST_DEFINED, Clusters
from eyetune.metrics.outcomes import Outcomes
from eyetune.metrics.predictions import Predictions
from eyetune.metrics.scores import METRICS
from eyetune.progress import track

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

SHOTS = (1, 2, 4, 8, 16)
"""Photographs a class."""

DRAWS = 10
"""How often they are drawn."""

RESAMPLES = 500
"""Of draws and patients, for each interval."""

ALPHA, BETA = 1.0, 5.5
"""Tip-Adapter's weight of the photographs against the prompts, and their sharpness: what its authors start from (Zhang
et al., ECCV 2022, section 4.1)."""

STRENGTH = 1.0
"""C of the linear probe: scikit-learn's default, on features of mean 0 and length 1 on average over the shots."""


@dataclass(frozen=True, eq=False)
class Shots:
    """The labelled photographs of one draw.

    Args:
        features: float64[M, D], unit length.
        labels: int64[M], 0..K-1.
        classes: K.
    """

    features: Floats
    labels: Ints
    classes: int


Method = Callable[[Shots, Floats], Floats]
"""Shots, and test features float64[N, D] -> logits float64[N, K]."""


def linear_probe(shots: Shots, features: Floats) -> Floats:
    """Logistic regression with an L2 penalty on the features; logits float64[N, K]."""
    from sklearn.linear_model import LogisticRegression

    middle = shots.features.mean(axis=0)
    spread = float(np.sqrt(((shots.features - middle) ** 2).sum(axis=1).mean())) or 1.0
    model = LogisticRegression(C=STRENGTH, max_iter=1000)
    model.fit((shots.features - middle) / spread, shots.labels)
    scores: Floats = model.decision_function((features - middle) / spread)
    return np.stack([np.zeros_like(scores), scores], axis=1) if scores.ndim == 1 else scores


def tip_adapter(classes: Floats | None, scale: float, *, alpha: float = ALPHA, beta: float = BETA) -> Method:
    """Tip-Adapter without training (Zhang et al., "Tip-Adapter: Training-Free Adaption of CLIP for Few-Shot
    Classification", ECCV 2022): the prompts' logits plus, for each shot, its class weighted by exp(-beta (1 - cosine)).

    Args:
        classes: float64[K, D], unit length, of the prompts; None: the shots alone.
        scale: what the prompts' similarities are multiplied by.
        alpha: weight of the shots.
        beta: their sharpness.
    """

    def method(shots: Shots, features: Floats) -> Floats:
        kept = np.exp(-beta * (1 - features @ shots.features.T)) @ np.eye(shots.classes)[shots.labels]
        return alpha * kept if classes is None else alpha * kept + scale * features @ classes.T

    return method


def draw(labels: Ints, patients: Sequence[str | None], classes: int, shots: int, rng: np.random.Generator) -> Ints:
    """`shots` rows of each class, int64[K * shots]: of different patients as far as there are enough.

    Args:
        labels: int64[N], 0..K-1, -1 where not known.
        patients: N identifiers, None where not known (then each row counts as a patient).
        classes: K.
        shots: rows a class.
        rng: where chance comes from.

    Raises DataError where a class has fewer rows.
    """
    chosen: list[int] = []
    for label in range(classes):
        rows = rng.permutation(np.flatnonzero(labels == label)).tolist()
        if len(rows) < shots:
            raise DataError(f"class {label} has {len(rows)} photographs to draw from, and {shots} were asked for.")
        turn: dict[Any, int] = {}
        order = []
        for row in rows:
            key = patients[row] if patients[row] is not None else ("", row)
            order.append(turn.get(key, 0))  # a second photograph of a patient comes after the first of everybody
            turn[key] = turn.get(key, 0) + 1
        chosen += [rows[place] for place in np.argsort(order, kind="stable")[:shots]]
    return np.array(chosen, dtype=np.int64)


def few_shot(
    support: Predictions,
    known: Floats,
    test: Predictions,
    features: Floats,
    methods: Mapping[str, Method],
    *,
    metrics: Sequence[str],
    shots: Sequence[int] = SHOTS,
    draws: int = DRAWS,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Score methods on a test set, from a few labelled photographs of other patients.

    Args:
        support: what the shots are drawn from: targets and patients; its logits are not looked at.
        known: float64[M, D]: its features.
        test: the photographs to tell; its logits are not looked at either.
        features: float64[N, D]: theirs.
        methods: by name.
        metrics: names of metrics.
        shots: photographs a class; those that a class does not have are left out.
        draws: how often they are drawn.
        resamples: of draws and patients, for the intervals.
        seed: of everything drawn.

    Returns `shots` -> method -> metric -> {"value": mean over the draws, "ci": where 95% of single draws lie on other
    samples of such patients, "draws": the value of each}, and `left_out`, the numbers of shots that a class did not
    have. Raises DataError when no number of shots can be drawn.
    """
    classes = len(test.classes)
    support, known = support.labelled(), known[support.known]
    test, features = test.labelled(), features[test.known]
    counts = np.bincount(support.targets, minlength=classes)
    possible = [number for number in shots if number <= counts.min()]
    if not possible:
        rare = test.classes[int(counts.argmin())]
        raise DataError(
            f"--shots: the class {rare} has {counts.min()} photographs to draw from, fewer than the fewest asked for "
            f"({min(shots)})."
        )
    found: dict[str, Any] = {}
    steps = [(number, name) for number in possible for name in methods]
    for number, name in track(steps, description="Few-shot probes", unit="probes"):
        tables = []
        for turn in range(draws):
            rng = np.random.default_rng([seed, number, turn])  # the same shots for every method
            rows = draw(support.targets, support.patients, classes, number, rng)
            logits = methods[name](Shots(known[rows], support.targets[rows], classes), features)
            tables.append(replace(test, logits=logits, calls=None))
        found.setdefault(str(number), {})[name] = _over_draws(tables, metrics, resamples, seed)
    return {
        "shots": found,
        "draws": draws,
        "resamples": resamples,
        "seed": seed,
        "left_out": [number for number in shots if number not in possible],
        "support": {name: int(count) for name, count in zip(test.classes, counts, strict=True)},
        "test": len(test),
    }


def _over_draws(tables: Sequence[Predictions], metrics: Sequence[str], resamples: int, seed: int) -> dict[str, Any]:
    """Each metric's mean over the draws, and its interval over draws and patients."""
    outcomes = [Outcomes.of_table(table) for table in tables]
    clusters = Clusters.of(tables[0].patients, tables[0].targets)
    functions = {name: METRICS.get(name) for name in metrics}
    values = {name: [one.or_none(each) for each in outcomes] for name, one in functions.items()}
    usable = {name: found for name, found in values.items() if None not in found}
    rng = np.random.default_rng(seed)
    resampled: dict[str, list[float]] = {name: [] for name in usable}
    for counts in clusters.draws(resamples, seed):
        chosen = outcomes[int(rng.integers(len(outcomes)))].drawn(counts)
        for name in usable:
            value = functions[name].or_none(chosen)
            resampled[name].append(np.nan if value is None else value)
    result: dict[str, Any] = {}
    for name, found in values.items():
        if name not in usable:
            result[name] = {"value": None, "ci": [None, None], "draws": found}
            continue
        result[name] = _middle(np.array(resampled[name]), float(np.mean([one for one in found if one is not None])))
        result[name]["draws"] = found
    return result


def _middle(values: Floats, estimate: float) -> dict[str, Any]:
    """A mean over draws and the middle 95% of its resamples, which scatter by the draw as well: a shift of their median
    is no bias here."""
    defined = values[~np.isnan(values)]
    if not len(defined) or len(defined) < FEWEST_DEFINED * len(values):
        return {"value": estimate, "ci": [None, None]}
    return {"value": estimate, "ci": [float(end) for end in np.percentile(defined, [2.5, 97.5])]}
