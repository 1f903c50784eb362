"""Photographs to image-text pairs: how many a second, from files to LMDB, against the usual script.

python benchmarks/clip_prepare.py [--photographs 48] [--size 2592x1944] [--table labels.csv] [--rounds 3]

With --table it takes real photographs (the first of the table, up to --photographs). The usual script opens each with
Pillow, makes it RGB and 256 px, saves it as JPEG (quality 95), writes base64 to a TSV, and that to LMDB. EyeTune also
finds the field of view and keeps a journal, so that it can go on after a kill. Seconds of processor time count where
the machine is not idle: two cores give at most 2 / (seconds of one photograph).
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import csv
import io
import os
import pickle
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from common import machine, markdown
from PIL import Image


def by_hand(paths: Sequence[Path], out: Path) -> None:
    """As people write it: one after another."""
    import lmdb

    out.mkdir()
    with open(out / "imgs.tsv", "w", encoding="ascii") as stream:
        for number, path in enumerate(paths):
            content = io.BytesIO()
            with Image.open(path) as image:
                image.convert("RGB").resize((256, 256), Image.Resampling.BICUBIC).save(content, "JPEG", quality=95)
            cell = base64.b64encode(content.getvalue()).decode()
            stream.write(f"{number}\t{cell}\t{cell}\n")
    with lmdb.open(str(out / "imgs"), map_size=2**34) as environment, environment.begin(write=True) as transaction:
        for line in (out / "imgs.tsv").read_text("ascii").splitlines():
            number, left, right = line.split("\t")
            transaction.put(number.encode(), pickle.dumps((left, right)))
        transaction.put(b"num_images", str(len(paths)).encode())


def with_eyetune(paths: Sequence[Path], out: Path) -> None:
    """`eyetune clip prepare`, a row an image."""
    from eyetune.verbs.clip_prepare import Cutting, command

    table = out.with_suffix(".csv")
    with open(table, "w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([["image", "text"], *([path, f"photograph {path.stem}"] for path in paths)])
    with contextlib.redirect_stdout(io.StringIO()):
        command(table, out=out, cutting=Cutting(val_share=0, test_share=0))


def timed(run: Callable[[Sequence[Path], Path], None], paths: Sequence[Path], out: Path) -> tuple[float, float]:
    """Seconds of the clock and of the processors."""
    start, before = time.perf_counter(), time.process_time()
    run(paths, out)
    return time.perf_counter() - start, time.process_time() - before


def draw(folder: Path, count: int, size: tuple[int, int]) -> list[Path]:
    from eyetune.data.phantom import write_cohort

    write_cohort(folder, patients=-(-count // 2), size=size, workers=len(os.sched_getaffinity(0)))
    return sorted((folder / "images").iterdir())[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photographs", type=int, default=48)
    parser.add_argument("--size", default="2592x1944")
    parser.add_argument("--table", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if asked.table is None:
            width, height = (int(side) for side in asked.size.split("x"))
            paths = draw(folder / "eyes", asked.photographs, (width, height))
        else:
            from eyetune.data.records import Manifest

            found = Manifest.from_table(asked.table, labels_required=False)
            paths = [record.image for record in found][: asked.photographs]
        ways = {"the usual script": by_hand, "eyetune clip prepare": with_eyetune}
        for way in ways.values():  # what is imported and read for the first time
            way(paths[:2], folder / f"warm {way.__name__}")
        times: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        for number in range(asked.rounds):
            for way, run in ways.items():
                times[way].append(timed(run, paths, folder / f"{run.__name__} {number}"))
        megabytes = sum(path.stat().st_size for path in paths) / 1e6 / len(paths)
    print(f"{machine()}; load {os.getloadavg()[0]:.1f}")
    print(f"{len(paths)} photographs of {megabytes:.2f} MB on average\n")
    rows = []
    for way, measured in times.items():
        clock, processor = (statistics.median(values) for values in zip(*measured, strict=True))
        each = processor / len(paths)
        rows.append([way, len(paths) / clock, 1000 * each, 2 / each])
    print(
        markdown(["", "photographs/s, by the clock", "ms of processor a photograph", "two idle cores: at most"], rows)
    )


if __name__ == "__main__":
    main()
