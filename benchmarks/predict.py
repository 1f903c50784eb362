"""Does `eyetune predict` need more memory for more files? Tiny photographs under many names, each count in a process of
its own, which does all that the command does.

    python benchmarks/predict.py [--counts 1000,10000,100000] [--given folder,-] [--quality] [--workers 0]
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
from common import in_process, machine, markdown, own_peak

DISTINCT = 50


def draw(folder: Path, count: int) -> None:
    """`count` files of 32x32 pixels: 50 pictures, and hard links to them; one in fifty is no picture."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for number in range(count):
        path = folder / f"{number:06d}.png"
        if number >= DISTINCT:
            os.link(folder / f"{number % DISTINCT:06d}.png", path)
        elif number == DISTINCT - 1:
            path.write_bytes(b"no picture")
        else:
            cv2.imwrite(str(path), rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))


def train(folder: Path) -> Path:
    """The run folder of a network that takes 32 pixels."""
    from eyetune.cli import main
    from eyetune.data.phantom import write_cohort

    write_cohort(folder / "eyes", patients=10, size=64)
    words = ["--data.table", str(folder / "eyes" / "labels.csv"), "--data.label_column", "dr_grade", "--out"]
    words += [str(folder / "run"), "--model.weights", "random", "--model.pixels", "32", "--adapt.kind", "linear"]
    words += [
        "--augment",
        "none",
        "--train.epochs",
        "1",
        "--train.batch_size",
        "4",
        "--train.tensorboard",
        "false",
        "--no-data.cache",
    ]
    if main(["finetune", *words, "--data.val", "0.3", "--data.test", "0.2", "--workers", "0"]):
        raise SystemExit("the run failed")
    return folder / "run"


def measured(run: str, folder: str, given: str, rows: str, options: list[str]) -> dict[str, float]:
    """CPU seconds of one command over all files, named by their folder or on standard input."""
    import io
    import sys

    from eyetune.cli import main

    words = ["--out", rows, "--no-cache", *options]
    if given == "-":
        names = "\n".join(entry.path for entry in os.scandir(folder)).encode()
        sys.stdin = io.TextIOWrapper(io.BytesIO(names))
    start = time.process_time()
    code = main(["predict", run, given if given == "-" else folder, *words])
    with open(rows, "rb") as stream:
        lines = sum(1 for _ in stream) - 1
    return {"code": code, "rows": lines, "seconds": time.process_time() - start, "peak_mib": own_peak() / 2**20}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--counts", default="1000,10000,100000")
    parser.add_argument("--given", default="folder,-")
    parser.add_argument("--quality", action="store_true")
    parser.add_argument("--workers", default="0")
    given = parser.parse_args()
    options = ["--workers", given.workers, *([] if given.quality else ["--no-quality"])]
    table = []
    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        run = train(home)
        for count in map(int, given.counts.split(",")):
            folder = home / str(count)
            draw(folder, count)
            for source in given.given.split(","):
                rows = str(home / "rows.csv")
                found = in_process(measured, str(run), str(folder), source, rows, options)
                if found["code"] or found["rows"] != count:
                    raise SystemExit(f"{found['rows']} rows of {count} files, exit code {found['code']}")
                name = "paths on standard input" if source == "-" else "a folder"
                table.append([f"{count:,}", name, f"{found['peak_mib']:.0f}", 1000 * found["seconds"] / count])
                print(*table[-1], flush=True)
    print(machine())
    print(markdown(["files", "given as", "peak MiB", "CPU ms a file"], table))


if __name__ == "__main__":
    main()
