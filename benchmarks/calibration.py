"""How many images a calibration needs, what a site's sample is best used for, and whether sets and intervals hold.

All by simulation, with truths that are known: the classes are normal clouds, the model's logits are the exact posterior
of its own clinic times a factor (2: twice too sure). The studies behind the intervals are those of intervals.py:
patients with two eyes that resemble each other.

    python benchmarks/calibration.py [--studies 400]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from statistics import NormalDist
from typing import Any

import numpy as np
from common import machine, markdown
from intervals import study

from eyetune.metrics.calibration import fit_calibration, fit_site, trust
from eyetune.metrics.conformal import LEVEL, fit_conformal
from eyetune.metrics.intervals import Clusters
from eyetune.metrics.outcomes import Floats, Outcomes
from eyetune.metrics.predictions import Predictions
from eyetune.metrics.site import fit_scaling, unseen
from eyetune.metrics.strangeness import Strangeness, strangeness_scores
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


def table_of(logits: Floats, targets: Floats, patients: list[str] | None = None, **more: Any) -> Predictions:
    """The table of predictions of grades 0 to 4."""
    names = [str(i) for i in range(len(targets))]
    none = [None] * len(names)
    return Predictions(names, patients or none, none, targets, logits, "01234", **more)


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

    def decided(logits: Floats, targets: Floats) -> tuple[float, Floats]:
        found = fit_scaling(table_of(logits, targets))
        return found.temperature, np.zeros(5) if found.bias is None else found.bias

    ways: dict[str, Callable[[Floats, Floats], tuple[float, Floats]]] = {
        "the run's own": lambda logits, targets: (home, np.zeros(5)),
        "temperature": tempered,
        "and shifts, free": lambda logits, targets: fit_shift(logits, targets, width=100.0),
        "and shifts, held back": fit_shift,
        "decided by cross-validation": decided,
    }
    rows = []
    for shares, name in ((HOME, "same shares"), (AWAY, "other shares")):
        rng = np.random.default_rng(2)
        test, truth = clinic(20_000, rng, shares, 1.5, signal=0.8)
        for n in (20, 30, 50, 100, 200, 500):
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
        for seed in range(studies):
            rng = np.random.default_rng(seed)
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


def site_sets(studies: int) -> list[list[str]]:
    """Mean coverage, on new images of the site, of conformal sets whose quantile comes from the images that the
    temperature and shifts were fitted on, as fitted and as cross-validation gives them."""
    rows = []
    for shares, name in ((HOME, "same shares"), (AWAY, "other shares")):
        for n in (30, 50, 100, 200):
            rng = np.random.default_rng(n)
            test, truth = clinic(5000, rng, shares, 1.5, signal=0.8)
            covered: tuple[list[float], list[float]] = ([], [])
            for _ in range(studies // 4):
                logits, targets = clinic(n, rng, shares, 1.5, signal=0.8)
                sample = table_of(logits, targets)
                scaling = fit_scaling(sample)
                there = shares_of(scaling(test))
                for values, here in zip(covered, (scaling(logits), unseen(sample)), strict=True):
                    clusters = Clusters.of([None] * n, targets)
                    fitted, _ = fit_conformal(Outcomes(targets, shares_of(here)), clusters, "site")
                    values.append(float(fitted.sets(there)[np.arange(len(truth)), truth].mean()))
            rows.append([name, str(n), *(f"{np.mean(values):.1%} ± {np.std(values):.1%}" for values in covered)])
    return rows


def gains(studies: int) -> list[list[str]]:
    """What `eyetune calibrate` says a site's calibration brings, against what it brings to new images of the site."""
    own = fit_calibration(table_of(*clinic(1000, np.random.default_rng(1), HOME, 1.5)), "val", resamples=1)
    rows = []
    for shares, name in ((HOME, "same shares"), (AWAY, "other shares")):
        for n in (50, 100, 200):
            rng = np.random.default_rng(n)
            test = table_of(*clinic(5000, rng, shares, 1.5, signal=0.8))
            before = trust(test, own, resamples=0)["calibrated_metrics"]
            found: dict[str, list[tuple[float, float, bool]]] = {"nll": [], "brier": [], "ece": []}
            for _ in range(studies // 4):
                fitted = fit_site(table_of(*clinic(n, rng, shares, 1.5, signal=0.8)), own, "site", resamples=200)
                after = trust(test, fitted, resamples=0)["calibrated_metrics"]
                for metric, values in found.items():
                    said = fitted.brought.difference[metric]
                    true = after[metric]["value"] - before[metric]["value"]
                    values.append((said.value, true, said.ci[0] <= true <= said.ci[1]))
            for metric, values in found.items():
                said, true, held = np.mean(values, axis=0)
                rows.append([name, str(n), metric, f"{true:+.3f}", f"{said:+.3f}", f"{held:.0%}"])
    return rows


def figures(found: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every value with an interval in what `trust` says."""
    for key, value in found.items():
        if isinstance(value, dict) and set(value) >= {"value", "ci"}:
            yield f"{prefix}{key}", value
        elif isinstance(value, dict):
            yield from figures(value, f"{prefix}{key}: ")
    for point in found.get("operating_points", ()):
        yield from figures(point, f"{point['name']}: ")


def held(studies: int) -> list[list[str]]:
    """How often the 95% intervals of `trust` and of the temperature hold the true value: 150 patients, two eyes each,
    everything fixed on another 400."""

    def patients_of(count: int, seed: int) -> Predictions:
        outcomes, names = study(count, seed)
        return table_of(2 * np.log(outcomes.probabilities), outcomes.targets, names)

    calibration = fit_calibration(patients_of(400, 10**6), "val", resamples=1)
    large = patients_of(100_000, 10**6 + 1)
    truth = {name: entry["value"] for name, entry in figures(trust(large, calibration, resamples=0))}
    truth["temperature"] = fit_temperature(large.logits, large.targets)[0]
    wanted = [name for name in truth if "grade >= " not in name or "grade >= 2" in name]
    counts: dict[str, list[bool]] = {name: [] for name in wanted}
    for seed in range(studies):
        table = patients_of(150, seed)
        found = dict(figures(trust(table, calibration, resamples=500, seed=seed)))
        fitted = fit_calibration(table, "val", resamples=500, seed=seed)
        found["temperature"] = {"ci": fitted.temperature.ci}
        for name in wanted:
            low, high = found[name]["ci"]
            if low is not None:
                counts[name].append(low <= truth[name] <= high)
    rows = [[name, f"{truth[name]:.3f}", f"{np.mean(counts[name]):.1%}", str(len(counts[name]))] for name in wanted]
    return [*rows, ["ood: auroc_against_val", *strange_held(studies)]]


def strange_held(studies: int) -> list[str]:
    """As :func:`held`, for scores of 60 validation patients and 100 others, two eyes each: normal, 0.7 apart."""

    def scored(patients: int, rng: np.random.Generator, middle: float) -> Predictions:
        own = np.repeat(rng.normal(size=patients), 2) * 0.8 + 0.6 * rng.normal(size=2 * patients)
        names = [str(i // 2) for i in range(2 * patients)]
        zeros = np.zeros(2 * patients, dtype=np.int64)
        return table_of(np.zeros((2 * patients, 5)), zeros, names, ood=10 + middle + own)

    rule = Strangeness(score="mahalanobis", threshold=10, chosen_on="val", fitted_on=100, tensors="")
    true = NormalDist().cdf(0.7 / np.sqrt(2))
    counts = []
    for seed in range(studies):
        rng = np.random.default_rng(seed)
        found = strangeness_scores(rule, scored(100, rng, 0.7), scored(60, rng, 0.0), resamples=500)
        low, high = found["auroc_against_val"]["ci"]
        counts.append(low <= true <= high)
    return [f"{true:.3f}", f"{np.mean(counts):.1%}", str(studies)]


def cost(images: int) -> tuple[float, float]:
    """Processor seconds to fit on `images`, and to say what comes of it on as many."""
    rng = np.random.default_rng(0)
    names = [str(i // 2) for i in range(images)]
    tables = [table_of(*clinic(images, rng, HOME, 2.0), names) for _ in range(2)]
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
    ways = ["the run's own", "temperature", "and shifts, free", "and shifts, held back", "decided by cross-validation"]
    print(markdown(["site", "images", *ways], sites(studies)))
    print(markdown(["validation images", "fresh", "temperature", "epoch and temperature"], coverage(studies)))
    print(markdown(["site", "images", "as fitted", "by cross-validation"], site_sets(studies)))
    print(markdown(["site", "images", "measure", "true gain", "told, mean", "interval held it"], gains(studies)))
    print(markdown(["value", "true value", "held", "studies"], held(studies)))
    fitting, scoring = cost(10_000)
    print(f"level {LEVEL}; 10,000 predictions: {fitting:.1f} s to fit, {scoring:.1f} s to score (processor time)")


if __name__ == "__main__":
    main()
