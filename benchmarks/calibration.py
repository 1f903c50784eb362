"""How many images a calibration needs, what a site's sample is best used for, and whether conformal sets cover.

All by simulation, with truths that are known: the classes are normal clouds, the model's logits are the exact posterior
of its own clinic times a factor (2: twice too sure).

    python benchmarks/calibration.py [--studies 400]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
from common import machine, markdown

from eyetune.metrics.calibration import fit_calibration, trust
from eyetune.metrics.conformal import LEVEL, fit_conformal
from eyetune.metrics.intervals import Clusters
from eyetune.metrics.outcomes import Floats, Outcomes
from eyetune.metrics.predictions import Predictions
from eyetune.metrics.temperature import fit_shift, fit_temperature

HOME = np.array([0.50, 0.10, 0.25, 0.08, 0.07])
AWAY = np.array([0.20, 0.15, 0.30, 0.20, 0.15])
MEANS = 1.1 * np.random.default_rng(0).normal(size=(5, 4))


def clinic(
    n: int, rng: np.random.Generator, shares: Floats, sharpness: float, signal: float = 1.0
) -> tuple[Floats, Floats]:
    """Logits float64[n, 5] and targets int64[n]; `signal` below 1: a camera that shows less."""
    targets = rng.choice(5, size=n, p=shares)
    seen = signal * MEANS[targets] + rng.normal(size=(n, 4))
    return sharpness * (np.log(HOME) + seen @ MEANS.T - (MEANS**2).sum(axis=1) / 2), targets


def nll(logits: Floats, targets: Floats) -> float:
    top = logits.max(axis=1)
    return float(
        (np.log(np.exp(logits - top[:, None]).sum(axis=1)) + top - logits[np.arange(len(targets)), targets]).mean()
    )


def temperatures(studies: int) -> list[list[str]]:
    """What a temperature from n images does to the loss on new ones."""
    rows = []
    for n in (25, 50, 100, 200, 400):
        row = [str(n)]
        for sharpness in (1.0, 1.5, 2.0):
            rng = np.random.default_rng(n)
            test, truth = clinic(20_000, rng, HOME, sharpness)
            before = nll(test, truth)
            gains = [
                nll(test / fit_temperature(*clinic(n, rng, HOME, sharpness))[0], truth) - before for _ in range(studies)
            ]
            row.append(f"{np.mean(gains):+.3f} ({np.mean(np.array(gains) > 0):.0%} worse)")
        rows.append(row)
    return rows


def sites(studies: int) -> list[list[str]]:
    """A site with other shares of the classes and a worse camera: the loss there, by how the sample is used."""
    home = fit_temperature(*clinic(1000, np.random.default_rng(1), HOME, 1.5))[0]

    def tempered(logits: Floats, targets: Floats) -> tuple[float, Floats]:
        return fit_temperature(logits, targets)[0], np.zeros(5)

    ways: dict[str, Callable[[Floats, Floats], tuple[float, Floats]]] = {
        "the run's own": lambda logits, targets: (home, np.zeros(5)),
        "temperature": tempered,
        "and shifts, free": lambda logits, targets: fit_shift(logits, targets, width=100.0),
        "and shifts, held back": fit_shift,
    }
    rows = []
    for shares, name in ((HOME, "same shares"), (AWAY, "other shares")):
        rng = np.random.default_rng(2)
        test, truth = clinic(20_000, rng, shares, 1.5, signal=0.8)
        for n in (20, 50, 100, 200, 500):
            samples = [clinic(n, rng, shares, 1.5, signal=0.8) for _ in range(studies // 2)]
            row = [name, str(n)]
            for way in ways.values():
                losses = [nll(test / t + shift, truth) for t, shift in (way(*sample) for sample in samples)]
                row.append(f"{np.mean(losses):.3f}")
            rows.append(row)
    return rows


def shares_of(logits: Floats) -> Floats:
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shares / shares.sum(axis=1, keepdims=True)


def coverage(studies: int) -> list[list[str]]:
    """Mean coverage of conformal sets whose validation images also chose the best of 20 epochs and the temperature."""
    rows = []
    for n in (20, 50, 100, 400):
        found: dict[str, list[float]] = {"fresh": [], "temperature": [], "epoch and temperature": []}
        for study in range(studies):
            rng = np.random.default_rng(study)
            logits, targets = clinic(n, rng, HOME, 2.0)
            test, truth = clinic(1000, rng, HOME, 2.0)
            epochs = rng.normal(size=(20, *logits.shape)), rng.normal(size=(20, *test.shape))
            noisy = [(logits + 1.5 * a, test + 1.5 * b) for a, b in zip(*epochs, strict=True)]
            best = int(np.argmax([(one.argmax(axis=1) == targets).mean() for one, _ in noisy]))
            for name, covered in found.items():
                here, there = noisy[best if name.startswith("epoch") else 0]
                t = 2.0 if name == "fresh" else fit_temperature(here, targets)[0]
                outcomes = Outcomes(targets, shares_of(here / t))
                fitted, _ = fit_conformal(outcomes, Clusters.of([None] * n, targets), "val")
                inside = fitted.sets(shares_of(there / t))
                covered.append(float(inside[np.arange(1000), truth].mean()))
        rows.append([str(n), *(f"{np.mean(values):.1%} ± {np.std(values):.1%}" for values in found.values())])
    return rows


def cost(images: int) -> tuple[float, float]:
    """Processor seconds to fit on `images`, and to say what comes of it on as many."""
    rng = np.random.default_rng(0)
    tables = []
    for _ in range(2):
        logits, targets = clinic(images, rng, HOME, 2.0)
        names = [str(i) for i in range(images)]
        tables.append(
            Predictions(names, [str(i // 2) for i in range(images)], [None] * images, targets, logits, "01234")
        )
    start = time.process_time()
    fitted = fit_calibration(tables[0], "val")
    between = time.process_time()
    trust(tables[1], fitted)
    return between - start, time.process_time() - between


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=400)
    studies = parser.parse_args().studies
    print(machine())
    print(
        markdown(
            ["validation images", "calibrated model", "1.5 times too sure", "twice too sure"], temperatures(studies)
        )
    )
    print(
        markdown(
            ["site", "images", "the run's own", "temperature", "and shifts, free", "and shifts, held back"],
            sites(studies),
        )
    )
    print(markdown(["validation images", "fresh", "temperature", "epoch and temperature"], coverage(studies)))
    fitting, scoring = cost(10_000)
    print(f"level {LEVEL}; 10,000 predictions: {fitting:.1f} s to fit, {scoring:.1f} s to score (processor time)")


if __name__ == "__main__":
    main()
