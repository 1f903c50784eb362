"""Measure `nano` as a user would use it, on drawn eyes that pretraining never saw: the figures in `weights/nano.md`.

    PYTHONPATH=src python recipes/probe_nano.py --out build/probe

Draws a cohort of the clinic camera and one each of the others, trains every strategy with `eyetune finetune` on the
first (its patients split into training, validation and test), the linear probe also on the same network with random
weights, and scores each on unseen patients of every camera. Prints a table and writes ``OUT/figures.json``.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

from eyetune.config import Config
from eyetune.data.phantom import write_cohort
from eyetune.files import write_json
from eyetune.verbs.evaluate import evaluate, open_dataset
from eyetune.verbs.finetune import finetune

SEED = 4_001
"""Below 10 000: pretraining begins at 20 001."""
HOME, AWAY = "clinic", ("legacy", "handheld")
PROBE: dict[str, Any] = {"adapt": {"kind": "linear"}, "augment": "none"}
LONG: dict[str, Any] = {"adapt": {"kind": "linear", "max_epochs": 60, "patience": 60}, "augment": "none"}
TUNED: dict[str, Any] = {"augment": "light"}
RUNS: dict[str, dict[str, Any]] = {
    "random linear": {**LONG, "train": {"epochs": 60, "lr": 5e-3, "patience": 0}},
    "linear": {**PROBE, "train": {"epochs": 10}},
    "linear long": {**LONG, "train": {"epochs": 60, "lr": 5e-3, "patience": 0}},
    "lora": {**TUNED, "adapt": {"kind": "lora"}, "train": {"epochs": 8, "lr": 2e-3, "batch_size": 16}},
    "full": {**TUNED, "adapt": {"kind": "full"}, "train": {"epochs": 20, "lr": 1e-3, "batch_size": 16}},
    "gradual": {**TUNED, "adapt": {"kind": "gradual", "patience": 1}, "train": {"epochs": 12, "lr": 1e-3}},
}
"""`linear` has the strategy's own settings; the long ones go on until nothing changes any more."""


def measure(name: str, cohorts: Path, out: Path, *, pool: str | None, weights: str | None) -> dict[str, Any]:
    """Train one row of :data:`RUNS` and score it on every camera: QWK by camera, and seconds."""
    settings, started = RUNS[name], time.monotonic()
    shutil.rmtree(out, ignore_errors=True)
    config = Config.parse(
        {
            **settings,
            "model": {"backbone": "nano", "weights": "random" if name.startswith("random") else weights, "pool": pool},
            "data": {
                "table": str(cohorts / HOME / "labels.csv"),
                "label_column": "dr_grade",
                "val": 0.1,
                "test": 0.4,
            },
            "out": str(out),
            "workers": 0,
        }
    )
    run = finetune(config)
    trained = time.monotonic() - started
    away = {camera: open_dataset(run, str(cohorts / camera / "labels.csv"), None, {}) for camera in AWAY}
    found = evaluate(run, away)["datasets"]
    qwk = {HOME if key == "test" else key: one["metrics"]["qwk"]["value"] for key, one in found.items() if key != "val"}
    return {"qwk": qwk, "seconds": round(trained, 1), "test_images": found["test"]["n"]}


def main() -> None:
    """Draw, train, score, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for cohorts, runs and figures.json")
    parser.add_argument("--patients", type=int, default=600, help="of the clinic camera, two eyes each (default 600)")
    parser.add_argument("--away", type=int, default=100, help="patients of each other camera (default 100)")
    parser.add_argument("--pixels", type=int, default=320, help="side of the photographs (default 320)")
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS), help="which rows (default all)")
    parser.add_argument("--pool", default=None, help="pooling of nano (default: its own)")
    parser.add_argument("--weights", default=None, help="weights file (default: the shipped one)")
    parser.add_argument("--workers", type=int, default=2, help="processes that draw (default 2)")
    options = parser.parse_args()
    cohorts, figures = options.out / "cohorts", {}
    for number, camera in enumerate((HOME, *AWAY)):
        if not (cohorts / camera / "labels.csv").exists():
            patients = options.patients if camera == HOME else options.away
            write_cohort(
                cohorts / camera,
                patients=patients,
                seed=SEED + number,
                size=options.pixels,
                cameras=[camera],
                workers=options.workers,
            )
    for name in options.runs:
        folder = options.out / name.replace(" ", "-")
        figures[name] = measure(name, cohorts, folder, pool=options.pool, weights=options.weights)
        write_json(options.out / "figures.json", figures)
    print(f"\n{'QWK':<16}" + "".join(f"{camera:>10}" for camera in (HOME, *AWAY)) + f"{'seconds':>10}")
    for name, row in figures.items():
        print(f"{name:<16}" + "".join(f"{row['qwk'][c]:>10.3f}" for c in (HOME, *AWAY)) + f"{row['seconds']:>10.0f}")


if __name__ == "__main__":
    main()
