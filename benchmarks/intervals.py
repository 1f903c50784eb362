"""How often the 95% intervals of the scores hold the true value, by simulation, and what they cost.

A study is a sample of patients with two eyes each: a patient has a grade, its eyes mostly the same one, and logits that
share a part (fellow eyes resemble each other). Every study has the same number of patients of each highest grade, as
the stratified resampling assumes. The true value is that of a very large study.

    python benchmarks/intervals.py [--patients 150] [--studies 1000]
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ProcessPoolExecutor

import numpy as np
from common import machine, markdown

from eyetune.metrics.intervals import RESAMPLES, Clusters, intervals
from eyetune.metrics.metric import of_task
from eyetune.metrics.outcomes import Outcomes
from eyetune.metrics.predictions import Predictions
from eyetune.metrics.scores import METRICS, score

SHARES = (0.45, 0.15, 0.2, 0.1, 0.1)
"""Of the patients, by their worse eye."""


def study(patients: int, seed: int) -> tuple[Outcomes, list[str]]:
    """`patients` patients, two eyes each, and who they are."""
    rng = np.random.default_rng(seed)
    counts = np.round(np.array(SHARES) * patients).astype(int)
    worse = np.repeat(np.arange(5), counts)
    better = np.maximum(worse - (rng.random(len(worse)) < 0.3), 0)
    grades = np.stack([worse, better], axis=1).reshape(-1)
    skill = -0.5 * (np.arange(5)[None, :] - grades[:, None]) ** 2
    own = rng.normal(size=(len(worse), 2, 5)) + 1.2 * rng.normal(size=(len(worse), 1, 5))
    logits = skill + own.reshape(-1, 5)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return Outcomes(grades, probabilities), [str(i // 2) for i in range(len(grades))]


def held(patients: int, seed: int, truth: dict[str, float], by_patient: bool) -> dict[str, bool]:
    """Whether the interval of each metric in one study holds the true value."""
    outcomes, names = study(patients, seed)
    clusters = Clusters.of(names if by_patient else [None] * len(names), outcomes.targets)
    functions = {name: METRICS.get(name) for name in truth}
    ends = {name: metric.interval for name, metric in functions.items()}
    found = intervals(outcomes, clusters, functions, ends=ends, resamples=500, seed=seed)
    return {name: ci is not None and ci[0] <= truth[name] <= ci[1] for name, ci in found.items()}


def cost(images: int) -> float:
    """Seconds of a processor for a table of `images` predictions with every metric and its interval."""
    outcomes, names = study(images // 2, 0)
    table = Predictions(
        images=[str(i) for i in range(len(names))],
        patients=names,
        eyes=[None] * len(names),
        targets=outcomes.targets,
        logits=np.log(outcomes.probabilities),
        classes=("0", "1", "2", "3", "4"),
    )
    start = time.process_time()
    score(table)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patients", type=int, default=150)
    parser.add_argument("--studies", type=int, default=1000)
    options = parser.parse_args()
    print(machine())
    large, _ = study(200_000, seed=10**6)
    truth = {name: entry(large) for name, entry in of_task("classification").items()}
    with ProcessPoolExecutor() as pool:
        runs = [
            [pool.submit(held, options.patients, seed, truth, by_patient) for seed in range(options.studies)]
            for by_patient in (True, False)
        ]
        shares = [{name: float(np.mean([one.result()[name] for one in side])) for name in truth} for side in runs]
    rows = [[name, f"{truth[name]:.3f}", f"{shares[0][name]:.1%}", f"{shares[1][name]:.1%}"] for name in truth]
    print(markdown(["metric", "true value", "held, by patient", "held, by image"], rows))
    print(f"{RESAMPLES} resamples, every metric: {cost(10_000):.1f} s of 10,000 predictions, {cost(200):.1f} s of 200")


if __name__ == "__main__":
    main()
