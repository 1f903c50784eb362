"""`eyetune demo`: the whole way on built-in synthetic eyes, offline, in minutes on two cores."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eyetune.config import Config
from eyetune.errors import UserError
from eyetune.files import atomic, write_json
from eyetune.flags import Device, Precision, Switch
from eyetune.progress import duration
from eyetune.terminal import show
from eyetune.train.elsewhere import open_dataset
from eyetune.verbs.data import synth
from eyetune.verbs.evaluate import evaluate
from eyetune.verbs.finetune import finetune

if TYPE_CHECKING:
    from eyetune.train.run import Run

#: Written first: what lies in a folder with this file was made by a demo, and the next demo may replace it.
MARKER = "demo.json"

#: Below 10,000: `nano` was pretrained on other seeds (recipes/pretrain_nano.py).
SEED = 7
PIXELS = 256
HOME, AWAY = "clinic", "handheld"
PATIENTS = {HOME: 400, AWAY: 100}  # two eyes each

#: The probe sees every image once; LoRA learns from changed copies, epoch after epoch.
STRATEGIES: dict[str, dict[str, Any]] = {
    "linear": {"adapt": {"kind": "linear"}, "augment": "none", "train": {"epochs": 10, "lr": 3e-3}},
    "lora": {"adapt": {"kind": "lora"}, "augment": "light", "train": {"epochs": 8, "lr": 2e-3}},
}


def command(
    *,
    out: Path = Path("demo"),
    seed: int = SEED,
    device: Device = "auto",
    precision: Precision = "auto",
    no_cache: Switch = False,
) -> None:
    """Adapt a small retinal model to DR grades on drawn eyes, and see how much of it another camera takes away.

    Draws two cameras, trains a linear probe and LoRA on the first, scores both on unseen patients of the first and
    on the second, and says where to look and what to type next. Nothing is downloaded.

    Args:
        out: Folder for everything the demo makes; an earlier demo in it is replaced.
        seed: Decides the eyes, the splits and the training.
        device: auto, cpu, cuda or mps.
        precision: auto, fp32, bf16 or fp16.
        no_cache: Keep no prepared images on disk, and use none.
    """
    start = time.monotonic()
    _make_room(out, seed)
    for number, (camera, patients) in enumerate(PATIENTS.items(), 1):
        _step(number, f"Drawing {2 * patients} eyes as the {camera} camera sees them")
        first = 1 + (0 if camera == HOME else PATIENTS[HOME])
        synth(out / camera, patients=patients, size=str(PIXELS), seed=seed, cameras=camera, first_patient=first)
    runs: dict[str, Run] = {}
    scores: dict[str, dict[str, Any]] = {}
    for number, (name, settings) in enumerate(STRATEGIES.items(), len(PATIENTS) + 1):
        _step(number, f"Adapting nano with {name}, then scoring unseen patients and the other camera")
        table = str(out / HOME / "labels.csv")
        common = {"seed": seed, "out": str(out / name), "device": device, "precision": precision}
        data = {"table": table, "label_column": "dr_grade", "val": 0.1, "test": 0.25, "cache": not no_cache}
        runs[name] = finetune(Config.parse({"data": data, **settings, **common}))
        away, labels = open_dataset(runs[name], str(out / AWAY / "labels.csv"), None, {}, name=AWAY)
        scores[name] = evaluate(runs[name], {AWAY: away}, maps={AWAY: labels})
    _step(len(PATIENTS) + len(STRATEGIES) + 1, "What came of it")
    _show(runs, scores)
    _picture(out, runs["lora"], scores)
    _write_summary(out, seed, scores)
    _say_where_to_look(out, time.monotonic() - start)


def _make_room(out: Path, seed: int) -> None:
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / MARKER).is_file())):
        raise UserError(f"{out} holds something that is not an earlier demo: choose another --out.")
    for name in (*PATIENTS, *STRATEGIES):
        shutil.rmtree(out / name, ignore_errors=True)
    write_json(out / MARKER, {"seed": seed})


def _step(number: int, text: str) -> None:
    total = len(PATIENTS) + len(STRATEGIES) + 1
    print(f"\n[{number}/{total}] {text}", flush=True)


def _show(runs: Mapping[str, Run], scores: Mapping[str, dict[str, Any]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from eyetune.adapt.strategy import count_parameters

    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("strategy")
    for column in ("parameters trained", f"QWK {HOME} (unseen patients)", f"QWK {AWAY}", "lost"):
        table.add_column(column, justify="right")
    for name, found in scores.items():
        home, away = (_qwk(found, dataset) for dataset in ("test", AWAY))
        table.add_row(name, f"{count_parameters(runs[name].model)[0]:,}", *map(_text, (home, away, home - away)))
    show(table)
    print("QWK: agreement with the true grades, quadratic-weighted kappa; 1 is perfect, 0 is chance.")


def _qwk(found: Mapping[str, Any], dataset: str) -> float:
    value = found["datasets"][dataset]["metrics"]["qwk"]["value"]
    return float("nan") if value is None else float(value)


def _text(value: float) -> str:
    return f"{value:.3f}"


def _write_summary(out: Path, seed: int, scores: Mapping[str, dict[str, Any]]) -> None:
    found = {name: {"clinic": _qwk(one, "test"), AWAY: _qwk(one, AWAY)} for name, one in scores.items()}
    write_json(out / MARKER, {"seed": seed, "qwk": found})


def _picture(out: Path, run: Run, scores: Mapping[str, dict[str, Any]]) -> None:
    """`overview.png`: eyes of both cameras with true and predicted grade, and what each strategy reaches on each."""
    from matplotlib.figure import Figure
    from PIL import Image

    from eyetune.metrics.plots import COLOURS, INK
    from eyetune.metrics.predictions import Predictions

    figure = Figure(figsize=(12, 4.6), layout="constrained")
    parts: Any = figure.subfigures(1, 2, width_ratios=(2.3, 1))
    photos, bars = parts
    axes = photos.subplots(2, 5)
    for row, (dataset, camera) in enumerate((("test", HOME), (AWAY, AWAY))):
        table = Predictions.from_csv(run.folder.predictions_file(dataset))
        for grade in range(5):
            place = axes[row, grade]
            place.set_axis_off()
            found = [index for index in range(len(table)) if table.targets[index] == grade]
            if not found:
                continue
            with Image.open(out / camera / "images" / table.images[found[0]]) as photo:
                place.imshow(photo)
            place.set_title(f"grade {grade}, predicted {table.predicted[found[0]]}", fontsize=9, color=INK)
    photos.suptitle(f"Unseen patients: {HOME} camera above, {AWAY} camera below", fontsize=10, color=INK)
    chart = bars.subplots()
    for place, (dataset, label) in enumerate((("test", HOME), (AWAY, AWAY))):
        values = [_qwk(found, dataset) for found in scores.values()]
        drawn = chart.bar(
            [n + 0.38 * place for n in range(len(values))], values, 0.36, color=COLOURS[place], label=label
        )
        chart.bar_label(drawn, fmt="%.2f", fontsize=9)
    chart.set_xticks([n + 0.19 for n in range(len(scores))], list(scores))
    chart.set(ylim=(min(0.0, chart.get_ylim()[0]), 1.0), ylabel="QWK on unseen patients")
    chart.legend(frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, 1.12))
    chart.spines[["top", "right"]].set_visible(False)
    with atomic(out / "overview.png") as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def _activation() -> str:
    """What makes the shell find `eyetune`, where it does not: `make demo` installs it into .venv."""
    activate = Path(sys.executable).parent / "activate"
    if shutil.which("eyetune") or not activate.is_file():
        return ""
    return f"\n  source {os.path.relpath(activate)}"


def _say_where_to_look(out: Path, seconds: float) -> None:
    print(f"""
Done in {duration(seconds)}. Look at
  {out}/overview.png          eyes of both cameras, and what each strategy reaches on them
  {out}/lora/                 a run folder: metrics.json, predictions/, plots/, adapter/, load_report.json

Now with your own photographs: a CSV with a column of image names and one of labels is enough.{_activation()}
  eyetune finetune --data.table labels.csv --data.images photos/ --out runs/first
  eyetune evaluate runs/first --data elsewhere=other.csv:other_photos/
  eyetune predict runs/first new_photos/ --out predictions.csv
For real photographs take a real backbone: eyetune models list says where to get the weights.
For research; not a medical device.""")
