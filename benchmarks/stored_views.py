"""A linear probe on stored augmented views against true augmentation: agreement on unseen patients, and time.

python benchmarks/stored_views.py [--patients 200] [--augment medium] [--epochs 12] [--seeds 3] [--pixels 112]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from common import machine, markdown

KINDS: dict[str, dict[str, Any]] = {
    "no augmentation": {"augment": "none"},
    **{f"{views} stored views": {"adapt": {"views": views}} for views in (2, 4, 16)},
    "true augmentation": {},
}


def run(table: Path, out: Path, seed: int, options: argparse.Namespace, kind: dict[str, Any]) -> tuple[float, float]:
    """QWK on the test split, and seconds of the whole run."""
    from eyetune.config import Config
    from eyetune.train.rundir import RunDir
    from eyetune.verbs.finetune import finetune

    epochs = options.epochs
    content = {
        "model": {"pixels": options.pixels},
        "data": {"table": str(table), "label_column": "dr_grade", "val": 0.15, "test": 0.35},
        "adapt": {"kind": "linear", "max_epochs": epochs, "patience": epochs, **kind.get("adapt", {})},
        "train": {"epochs": epochs, "patience": 0, "lr": 3e-3, "tensorboard": False},
        "augment": kind.get("augment", options.augment),
        "seed": seed,
        "out": str(out),
    }
    start = time.perf_counter()
    finetune(Config.parse(content))
    seconds = time.perf_counter() - start
    return RunDir.open(out).read_metrics()["datasets"]["test"]["metrics"]["qwk"]["value"], seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patients", type=int, default=200)
    parser.add_argument("--augment", default="medium")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pixels", type=int, default=112)
    options = parser.parse_args()
    from eyetune.data.phantom import write_cohort

    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["EYETUNE_CACHE"] = f"{scratch}/cache"
        write_cohort(
            Path(scratch) / "eyes", patients=options.patients, size=256, cameras=("clinic",), seed=11, workers=2
        )
        for name, kind in KINDS.items():
            found = [
                run(Path(scratch) / "eyes" / "labels.csv", Path(scratch) / f"{name} {seed}", seed, options, kind)
                for seed in range(options.seeds)
            ]
            values, seconds = zip(*found, strict=True)
            spread = f"{min(values):.3f} to {max(values):.3f}"
            later = statistics.mean(seconds[1:]) if options.seeds > 1 else float("nan")
            rows.append([name, f"{statistics.mean(values):.3f}", spread, seconds[0], later])
    print(machine())
    head = f"linear probe, {2 * options.patients} eyes, augment: {options.augment}, {options.epochs} epochs"
    print(
        markdown([head, "QWK, mean", f"of {options.seeds} seeds", "seconds, first seed", "seconds, later seeds"], rows)
    )


if __name__ == "__main__":
    main()
