"""How often the paired tests call two equally good models different, by simulation, how often they find a true
difference, and what they cost.

A study is a sample of patients with two eyes each, as in intervals.py. Models see it; what each gets wrong, it gets
wrong in both eyes of a patient more often than chance would have it, and some eyes are hard for all. Where all models
are of the same skill no difference is real, so a test at 5% should find one in 5 of 100 studies; of four models, six
pairs, Holm's correction should let no more than 5 of 100 studies find any.

    python benchmarks/paired.py [--studies 2000]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import combinations

import numpy as np
from common import machine, markdown

from eyetune.metrics.intervals import Clusters, bias_corrected
from eyetune.metrics.outcomes import Outcomes
from eyetune.metrics.paired import areas, delong, holm, permutation, resampled_means
from eyetune.metrics.scores import METRICS

SHARES = (0.45, 0.15, 0.2, 0.1, 0.1)
"""Of the patients, by their worse eye."""

TESTS = ("DeLong, referable AUROC", "permutation, QWK", "bootstrap interval, QWK")

GAIN = 0.5
"""By how much the better model's evidence is stronger where power is looked at."""

ALPHA = 0.05

EXCHANGES, RESAMPLES = 199, 200
"""Fewer than in use, for thousands of studies: a permutation test of n exchanges has the same level where ALPHA times
n + 1 is a whole number; it only has less power."""


def study(patients: int, seed: int, models: int = 2, gain: float = 0.0) -> tuple[list[Outcomes], list[str]]:
    """What `models` models say of `patients` patients, two eyes each, and who they are. All are of the same skill but
    for the last one, whose evidence is `gain` stronger."""
    rng = np.random.default_rng(seed)
    worse = rng.choice(5, size=patients, p=SHARES)
    better = np.maximum(worse - (rng.random(patients) < 0.3), 0)
    grades = np.stack([worse, better], axis=1).reshape(-1)
    skill = -0.5 * (np.arange(5)[None, :] - grades[:, None]) ** 2
    hard = rng.normal(size=(patients, 2, 5))
    found = []
    for model in range(models):
        own = rng.normal(size=(patients, 2, 5)) + 1.5 * rng.normal(size=(patients, 1, 5)) + hard
        logits = skill * (1 + gain * (model == models - 1)) + own.reshape(-1, 5)
        shares = np.exp(logits)
        found.append(Outcomes(grades, shares / shares.sum(axis=1, keepdims=True)))
    return found, [str(i // 2) for i in range(len(grades))]


def rejected(patients: int, seed: int, by_patient: bool, gain: float = 0.0) -> list[bool]:
    """Whether each of the tests finds a difference at 5% between two models."""
    (first, second), names = study(patients, seed, gain=gain)
    clusters = Clusters.of(names if by_patient else [None] * len(names), first.targets)
    qwk = METRICS.get("qwk")
    by_area = delong([first], [second], "referable_auroc", clusters).p
    by_exchange = permutation([first], [second], qwk, clusters, exchanges=EXCHANGES, seed=seed).p
    drawn = resampled_means({"a": [first], "b": [second]}, clusters, qwk, resamples=RESAMPLES, seed=seed)
    interval = bias_corrected(drawn["a"] - drawn["b"], qwk(first) - qwk(second))
    outside = interval is not None and not interval[0] <= 0 <= interval[1]
    return [by_area is not None and by_area <= ALPHA, by_exchange is not None and by_exchange <= ALPHA, outside]


def any_rejected(patients: int, seed: int) -> list[bool]:
    """Whether any of the six pairs of four equally good models is found to differ: by DeLong and by permutation, each
    without correction and with Holm's."""
    models, names = study(patients, seed, models=4)
    clusters = Clusters.of(names, models[0].targets)
    qwk = METRICS.get("qwk")
    pairs = list(combinations(models, 2))
    by_area = [delong([a], [b], "referable_auroc", clusters).p for a, b in pairs]
    by_exchange = [permutation([a], [b], qwk, clusters, exchanges=EXCHANGES, seed=seed).p for a, b in pairs]
    found = []
    for values in (by_area, by_exchange):
        found += [any(p is not None and p <= ALPHA for p in ps) for ps in (values, holm(values))]
    return found


def true_gain() -> tuple[float, float]:
    """(AUROC, QWK) that the better model is better by, from 200,000 patients."""
    (first, second), _ = study(200_000, 0, gain=GAIN)
    return tuple(METRICS.get(name)(second) - METRICS.get(name)(first) for name in ("referable_auroc", "qwk"))


def costs() -> list[list[object]]:
    """CPU seconds of each test on 10,000 images."""
    (first, second), names = study(5_000, 0)
    clusters = Clusters.of(names, first.targets)
    steps = {
        "DeLong covariance of 2 models": lambda: areas(
            np.stack([first.targets >= 2] * 2),
            np.stack([one.probabilities[:, 2:].sum(axis=1) for one in (first, second)]),
            clusters.of_image,
        ),
        "permutation, QWK, 9,999 exchanges": lambda: permutation([first], [second], METRICS.get("qwk"), clusters),
    }
    rows: list[list[object]] = []
    for name, step in steps.items():
        start = time.process_time()
        step()
        rows.append([name, time.process_time() - start])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=2000)
    parser.add_argument("--processes", type=int, default=None)
    options = parser.parse_args()
    print(machine())
    with ProcessPoolExecutor(options.processes) as pool:

        def shares(trial: Callable[..., list[bool]], *arguments: object) -> list[str]:
            """How often each test found something, over the studies."""
            wait = [pool.submit(trial, arguments[0], seed, *arguments[1:]) for seed in range(options.studies)]
            return [f"{share:.1%}" for share in np.mean([one.result() for one in wait], axis=0)]

        sizes = (30, 80, 200)
        print("\nTwo equally good models:\n")
        rows = [
            [str(n), "patient" if by_patient else "image", *shares(rejected, n, by_patient)]
            for n in sizes
            for by_patient in (True, False)
        ]
        print(markdown(["patients", "unit", *TESTS], rows), flush=True)
        print("\nFour equally good models, any of six pairs:\n")
        kinds = [f"{test}, {how}" for test in ("DeLong", "permutation") for how in ("uncorrected", "Holm")]
        print(markdown(["patients", *kinds], [[str(n), *shares(any_rejected, n)] for n in sizes]), flush=True)
        area, kappa = true_gain()
        print(f"\nOne is better, by {area:.3f} (AUROC) and {kappa:.3f} (QWK):\n")
        print(markdown(["patients", *TESTS], [[str(n), *shares(rejected, n, True, GAIN)] for n in sizes]), flush=True)
    print()
    print(markdown(["10,000 images", "CPU seconds"], costs()))


if __name__ == "__main__":
    main()
