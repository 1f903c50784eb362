"""What EyeTune says of real photographs: IDRiD with its leak and without, ACRIMA, HRF from outside, two drawn cameras.

python benchmarks/real_photographs.py --out DIR --idrid labels.csv --acrima labels.csv --hrf labels.csv

Each table is TABLE or TABLE:IMAGES as everywhere: IDRiD with grades 0 to 4 and its official split (train, test), ACRIMA
with 0 (normal) and 1 (glaucoma), HRF with healthy, diabetic_retinopathy and glaucoma. What is not given is left out; a
run that is there already is not made again. Prints the commands it runs and, at the end, tables in Markdown.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import machine, markdown

#: The linear probe sees every photograph once and is quick; LoRA learns from changed copies, epoch after epoch.
STRATEGIES = {
    "linear": ["--adapt.kind", "linear", "--augment", "none", "--train.epochs", "20", "--train.lr", "3e-3"],
    "lora": ["--adapt.kind", "lora", "--augment", "light", "--train.lr", "2e-3"],
}

HRF_ANY_DR = "hrf=any-dr,healthy:no DR,diabetic_retinopathy:any DR,glaucoma:null"
HRF_GLAUCOMA = "hrf=healthy:0,glaucoma:1,diabetic_retinopathy:null"


def eyetune(*words: str, allowed: Sequence[int] = (0,)) -> None:
    """Run one command of EyeTune and show it."""
    from eyetune.cli import main

    print(f"\n$ eyetune {shlex.join(words)}", flush=True)
    if (code := main(list(words))) not in allowed:
        raise SystemExit(code)


class Study:
    """The runs in one folder, and the rows of the table that they fill."""

    def __init__(self, out: Path, strategies: Sequence[str], epochs: int, device: str) -> None:
        self.out = out
        self.strategies = strategies
        self.epochs = epochs
        self.common = ["--device", device]
        self.rows: list[list[str]] = []

    def train(self, name: str, strategy: str, table: str, seed: int, *words: str) -> Path:
        """A run of nano on a table; the splits are the same for every seed."""
        run = self.out / f"{name}-{strategy}-{seed}"
        few = ["--train.epochs", str(self.epochs)] if strategy != "linear" else []
        if not (run / "metrics.json").is_file():
            table, images = split_table(table)
            where = ["--data.table", table, *(["--data.images", images] if images else [])]
            fixed = ["--data.split-seed", "0", "--seed", str(seed), "--out", str(run), *self.common]
            eyetune("finetune", *where, *STRATEGIES[strategy], *few, *fixed, *words)
        return run

    def outside(self, run: Path, name: str, table: str, *words: str) -> None:
        if name not in metrics(run):
            eyetune("evaluate", str(run), "--data", f"{name}={table}", *words, *self.common)

    def row(self, what: str, strategy: str, run: Path, dataset: str, metric: str) -> None:
        """What one run reaches on one dataset by one metric, and what it loses there."""
        found = metrics(run)[dataset]
        content = json.loads((run / "metrics.json").read_text())
        gap = content.get("generalization", {}).get("external", {}).get(dataset, {}).get(metric)
        lost = "" if gap is None else interval(gap["value"], gap["ci"])
        one = found["metrics"][metric]
        self.rows.append([what, strategy, str(found["n"]), metric, interval(one["value"], one["ci"]), lost])


def split_table(word: str) -> tuple[str, str]:
    from eyetune.flags import table_and_images

    table, images = table_and_images(word)
    return table, str(images or "")


def metrics(run: Path) -> dict[str, Any]:
    """dataset -> its scores."""
    content: dict[str, Any] = json.loads((run / "metrics.json").read_text())["datasets"]
    return content


def interval(value: float | None, ends: Sequence[float | None] | None) -> str:
    if value is None:
        return "not defined"
    if not ends or ends[0] is None:
        return f"{value:.3f}"
    return f"{value:.3f} ({ends[0]:.3f} to {ends[1]:.3f})"


def idrid(study: Study, table: str, hrf: str | None, seeds: Sequence[int]) -> list[list[str]]:
    """The official split, and the table that `eyetune data audit --fix` leaves; returns the rows of the difference."""
    plain, images = split_table(table)
    fixed = study.out / "idrid-fixed.csv"
    if not fixed.is_file():
        audit = ["--fix", str(fixed), "--out", str(study.out / "idrid-audit")]
        eyetune("data", "audit", table, *audit, allowed=(1,))  # 1: it found what it should
    cleaned = f"{fixed}:{images or Path(plain).parent}"
    differences = []
    for strategy in study.strategies:
        chosen = seeds if strategy == "linear" else seeds[:1]
        words = ["--data.val", "0.15"]
        official = [study.train("idrid-official", strategy, table, seed, *words) for seed in chosen]
        clean = [study.train("idrid-clean", strategy, cleaned, seed, *words) for seed in chosen]
        study.row("IDRiD, official split", strategy, official[0], "test", "qwk")
        study.row("IDRiD, leak and copies removed", strategy, clean[0], "test", "qwk")
        if hrf:
            study.outside(clean[0], "hrf", hrf, "--map", HRF_ANY_DR)
            study.row("…, on HRF: any DR or none", strategy, clean[0], "hrf", "auroc_macro")
        differences += difference(strategy, official, clean)
    return differences


def difference(strategy: str, official: Sequence[Path], clean: Sequence[Path]) -> list[list[str]]:
    """Official minus clean, of the means over seeds: as published, and on the test photographs that both have."""
    import numpy as np

    from eyetune.metrics.intervals import Clusters, bias_corrected
    from eyetune.metrics.outcomes import Outcomes
    from eyetune.metrics.paired import permutation, resampled_means
    from eyetune.metrics.predictions import Predictions
    from eyetune.metrics.scores import METRICS

    tables = {
        name: [Predictions.from_csv(run / "predictions" / "test.csv") for run in runs]
        for name, runs in (("official", official), ("clean", clean))
    }
    shared = set(tables["official"][0].images) & set(tables["clean"][0].images)
    rows = []
    for name in ("qwk", "auroc_macro"):
        metric = METRICS.get(name)
        whole = {kind: np.mean([metric(Outcomes.of_table(table)) for table in found]) for kind, found in tables.items()}
        # Rows in the order of their names, so that those of all runs stand beside each other.
        same = {kind: [Outcomes.of_table(ordered(table, shared)) for table in found] for kind, found in tables.items()}
        one = ordered(tables["official"][0], shared)
        clusters = Clusters.of(one.patients, one.targets)
        means = {kind: np.mean([metric(outcomes) for outcomes in found]) for kind, found in same.items()}
        drawn = resampled_means(same, clusters, metric)
        change = float(means["official"] - means["clean"])
        ends = bias_corrected(drawn["official"] - drawn["clean"], change)
        p = permutation(same["official"], same["clean"], metric, clusters).p
        rows.append(
            [
                f"{strategy}, {len(official)} seed{'s' if len(official) > 1 else ''}",
                name,
                f"{whole['official']:.3f} on {len(tables['official'][0])}",
                f"{means['official']:.3f}",
                f"{means['clean']:.3f}",
                interval(change, ends),
                "" if p is None else f"{p:.2f}",
            ]
        )
    return rows


def ordered(table: Any, images: set[str]) -> Any:
    """The rows of these images, by name."""
    return table.take(
        sorted((n for n, name in enumerate(table.images) if name in images), key=table.images.__getitem__)
    )


def acrima(study: Study, table: str, hrf: str | None) -> None:
    """Glaucoma on crops of the optic disc, without patients; and what is left of it on whole photographs."""
    for strategy in study.strategies:
        run = study.train("acrima", strategy, table, 0, "--data.val", "0.15", "--data.test", "0.25")
        study.row("ACRIMA: glaucoma on disc crops", strategy, run, "test", "auroc_macro")
        if hrf:
            study.outside(run, "hrf", hrf, "--map", HRF_GLAUCOMA)
            study.row("…, on HRF: whole photographs", strategy, run, "hrf", "auroc_macro")


def cameras(study: Study) -> None:
    """Drawn eyes: trained on one camera, tested on unseen patients of it and on another camera."""
    for camera, patients, first in (("clinic", 150, 1), ("handheld", 50, 151)):
        folder = study.out / camera
        if not (folder / "labels.csv").is_file():
            drawn = ["--patients", str(patients), "--first-patient", str(first), "--size", "256", "--seed", "7"]
            eyetune("data", "synth", str(folder), "--cameras", camera, *drawn)
    table, away = (str(study.out / camera / "labels.csv") for camera in ("clinic", "handheld"))
    for strategy in study.strategies:
        words = ["--data.label-column", "dr_grade", "--data.val", "0.15", "--data.test", "0.25"]
        run = study.train("clinic", strategy, table, 0, *words)
        study.outside(run, "handheld", away)
        study.row("Drawn eyes, clinic camera", strategy, run, "test", "qwk")
        study.row("…, on the handheld camera", strategy, run, "handheld", "qwk")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--idrid", help="TABLE[:IMAGES]")
    parser.add_argument("--acrima", help="TABLE[:IMAGES]")
    parser.add_argument("--hrf", help="TABLE[:IMAGES]")
    parser.add_argument("--strategies", default="linear,lora")
    parser.add_argument("--epochs", type=int, default=8, help="of every strategy but linear, which has 20")
    parser.add_argument("--seeds", type=int, default=3, help="of the linear probes on IDRiD")
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    study = Study(given.out, given.strategies.split(","), given.epochs, given.device)
    differences: list[list[str]] = []
    if given.idrid:
        differences = idrid(study, given.idrid, given.hrf, range(given.seeds))
    if given.acrima:
        acrima(study, given.acrima, given.hrf)
    cameras(study)
    print(f"\n{machine()}\n")
    print(
        markdown(["trained on, scored on", "strategy", "images", "metric", "score (95% interval)", "lost"], study.rows)
    )
    head = ["nano", "metric", "official run, its test split", "official run, shared", "clean run, shared"]
    if differences:
        print(f"\n{markdown([*head, 'difference (95% interval)', 'p'], differences)}")


if __name__ == "__main__":
    main()
