"""How often the paired tests call two equally good models different, by simulation, and what they cost.

A study is a sample of patients with two eyes each, as in intervals.py. Two models of the same skill see it; what each
gets wrong, it gets wrong in both eyes of a patient more often than chance would have it, and some eyes are hard for
both. No difference is real, so a test at 5% should find one in 5 of 100 studies.

    python benchmarks/paired.py [--studies 2000]
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ProcessPoolExecutor

import numpy as np
from common import machine, markdown

from eyetune.metrics.intervals import Clusters, bias_corrected
from eyetune.metrics.outcomes import Outcomes
from eyetune.metrics.paired import areas, delong, permutation, resampled_means
from eyetune.metrics.scores import METRICS

SHARES = (0.45, 0.15, 0.2, 0.1, 0.1)
"""Of the patients, by their worse eye."""

TESTS = ("DeLong, referable AUROC", "permutation, QWK", "bootstrap interval, QWK")


def study(patients: int, seed: int, models: int = 2) -> tuple[list[Outcomes], list[str]]:
    """What `models` models of the same skill say of `patients` patients, two eyes each, and who they are."""
    rng = np.random.default_rng(seed)
    worse = rng.choice(5, size=patients, p=SHARES)
    better = np.maximum(worse - (rng.random(patients) < 0.3), 0)
    grades = np.stack([worse, better], axis=1).reshape(-1)
    skill = -0.5 * (np.arange(5)[None, :] - grades[:, None]) ** 2
    hard = rng.normal(size=(patients, 2, 5))
    found = []
    for _ in range(models):
        own = rng.normal(size=(patients, 2, 5)) + 1.5 * rng.normal(size=(patients, 1, 5)) + hard
        logits = skill + own.reshape(-1, 5)
        shares = np.exp(logits)
        found.append(Outcomes(grades, shares / shares.sum(axis=1, keepdims=True)))
    return found, [str(i // 2) for i in range(len(grades))]


def rejected(patients: int, seed: int, by_patient: bool) -> list[bool]:
    """Whether each of the tests finds a difference at 5% where there is none."""
    (first, second), names = study(patients, seed)
    clusters = Clusters.of(names if by_patient else [None] * len(names), first.targets)
    qwk = METRICS.get("qwk")
    by_area = delong([first], [second], "referable_auroc", clusters).p
    by_exchange = permutation([first], [second], qwk, clusters, exchanges=999, seed=seed).p
    drawn = resampled_means({"a": [first], "b": [second]}, clusters, qwk, resamples=500, seed=seed)
    interval = bias_corrected(drawn["a"] - drawn["b"], qwk(first) - qwk(second))
    outside = interval is not None and not interval[0] <= 0 <= interval[1]
    return [by_area is not None and by_area <= 0.05, by_exchange is not None and by_exchange <= 0.05, outside]


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
    rows = []
    with ProcessPoolExecutor(options.processes) as pool:
        for patients in (30, 80, 200):
            for by_patient in (True, False):
                wait = [pool.submit(rejected, patients, seed, by_patient) for seed in range(options.studies)]
                shares = np.mean([one.result() for one in wait], axis=0)
                unit = "patient" if by_patient else "image"
                rows.append([str(patients), unit, *(f"{share:.1%}" for share in shares)])
    print(markdown(["patients", "unit", *TESTS], rows))
    print()
    print(markdown(["10,000 images", "CPU seconds"], costs()))


if __name__ == "__main__":
    main()
