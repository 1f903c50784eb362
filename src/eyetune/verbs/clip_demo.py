"""`eyetune clip demo`: image-text training on built-in synthetic eyes and their captions, offline, in minutes."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eyetune.clip.config import ClipConfig
from eyetune.errors import UserError
from eyetune.files import write_json
from eyetune.flags import Device, Precision, Reading
from eyetune.progress import duration
from eyetune.terminal import show
from eyetune.verbs import clip_prepare, clip_retrieve, clip_zeroshot
from eyetune.verbs.clip_train import train
from eyetune.verbs.data import synth

#: Written first: what lies in a folder with this file was made by a demo, and the next demo may replace it.
MARKER = "clip-demo.json"

#: Below 10,000: `nano` was pretrained on other seeds (recipes/pretrain_nano.py).
SEED = 7
PIXELS = 256
PATIENTS = {"train": 1300, "val": 100, "test": 200}
"""Two eyes each."""

PARTS = ("eyes", "pairs", "run")

#: `nano` looks at every eye once; a small text encoder learns to read from nothing, half of the time single sentences.
RECIPE: dict[str, Any] = {
    "model": {"backbone": "nano", "width": 128, "scale": 25.0},
    "text": {"width": 64, "length": 224, "vocabulary": 600, "dropout": 0.0, "sample": 0.5},
    "adapt_image": {"kind": "frozen"},
    "train": {"epochs": 18, "batch_size": 64, "lr": 2e-3, "weight_decay": 0.05, "patience": 0},
}


def command(
    *,
    out: Path = Path("clip-demo"),
    seed: int = SEED,
    device: Device = "auto",
    precision: Precision = "auto",
) -> None:
    """Teach nano and a text encoder from scratch which caption is about which eyes, and grade eyes by words alone.

    Draws patients with two eyes each and a caption about both, prepares them, trains, searches among 200 unseen
    patients, grades their eyes by prompts, and says what to type next. Nothing is downloaded.

    Args:
        out: Folder for everything the demo makes; an earlier demo in it is replaced.
        seed: Decides the eyes, the splits and the training.
        device: auto, cpu, cuda or mps.
        precision: auto, fp32, bf16 or fp16.
    """
    start = time.monotonic()
    _make_room(out, seed)
    eyes, pairs, run = (out / name for name in PARTS)
    _step(1, f"Drawing {2 * sum(PATIENTS.values())} eyes, and saying what was drawn")
    shares = ",".join(f"{name}={count}" for name, count in PATIENTS.items())
    synth(eyes, patients=sum(PATIENTS.values()), size=str(PIXELS), seed=seed, splits=shares)
    _step(2, "Preparing pairs: both eyes of a patient, and one text about them")
    clip_prepare.command(eyes / "labels.csv", out=pairs, length=RECIPE["text"]["length"])
    _step(3, "Training: nano frozen, a small text encoder and the projections from nothing")
    given = {"data": {"folder": str(pairs)}, "seed": seed, "out": str(run), "device": device, "precision": precision}
    train(ClipConfig.parse({**RECIPE, **given}))
    reading = Reading(device=device, precision=precision)
    _step(4, f"Searching among {PATIENTS['test']} unseen patients")
    clip_retrieve.command(run, data=f"{pairs}:test", out=run / "retrieval", reading=reading)
    _step(5, "Grading diabetic retinopathy of their eyes by words alone")
    clip_zeroshot.command(
        run,
        data=[f"drawn={eyes / 'labels.csv'}"],
        prompts="dr",
        split="test",
        out=run / "zeroshot",
        columns=clip_zeroshot.Columns(label_column="dr_grade"),
        reading=reading,
    )
    found = _collect(run)
    write_json(out / MARKER, {"seed": seed, **found})
    _show(found)
    _say_what_next(out, time.monotonic() - start)


def _make_room(out: Path, seed: int) -> None:
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / MARKER).is_file())):
        raise UserError(f"{out} holds something that is not an earlier demo: choose another --out.")
    for name in PARTS:
        shutil.rmtree(out / name, ignore_errors=True)
    write_json(out / MARKER, {"seed": seed})


def _step(number: int, text: str) -> None:
    print(f"\n[{number}/5] {text}", flush=True)


def _collect(run: Path) -> dict[str, Any]:
    """The figures of the table, from what the verbs wrote."""
    from eyetune.clip.scoring import DIRECTIONS
    from eyetune.train.sealed import read_json

    retrieval = read_json(run / "retrieval" / "retrieval.json")
    qwk = read_json(run / "zeroshot" / "metrics.json")["datasets"]["drawn"]["metrics"]["qwk"]
    recalls = {name: retrieval[name]["metrics"]["recall_at_1"] for name in DIRECTIONS}
    return {"gallery": retrieval[DIRECTIONS[0]]["gallery"], "recall_at_1": recalls, "qwk": qwk}


def _show(found: Mapping[str, Any]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column(f"unseen patients, {found['gallery']} of them")
    for column in ("found", "95% interval", "chance", "times chance"):
        table.add_column(column, justify="right")
    for name, metric in found["recall_at_1"].items():
        times = "–" if not metric["chance"] else f"{metric['value'] / metric['chance']:.0f}"
        words = f"{name.replace('_', ' ')}: the first answer is right (R@1)"
        table.add_row(words, *_numbers(metric), f"{metric['chance']:.3f}", times)
    table.add_row("DR grade by words alone (QWK)", *_numbers(found["qwk"]), "0.000", "")
    print()
    show(table)


def _numbers(metric: Mapping[str, Any]) -> tuple[str, str]:
    low, high = metric["ci"]
    return f"{metric['value']:.3f}", "–" if low is None else f"{low:.3f} to {high:.3f}"


def _say_what_next(out: Path, seconds: float) -> None:
    print(f"""
Done in {duration(seconds)}. Look at
  {out}/run/retrieval/retrieval.html   the best and the worst searches, with pictures
  {out}/run/                           a run folder: metrics.json, checkpoints/, text/, vision.safetensors

Try
  eyetune clip search "many hard exudates" --in {out}/run/retrieval/features.safetensors
Now with your own photographs and reports: a table with left and right image and text is enough.
  eyetune clip prepare reports.csv --out pairs
  eyetune clip train --data.folder pairs --out runs/clip
  eyetune clip retrieve runs/clip --data pairs
For real photographs take a real image tower and a text encoder that reads your language.
For research; not a medical device.""")
