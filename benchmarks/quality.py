"""What the quality flags say of folders of photographs, and at which blur `blurred` comes.

python benchmarks/quality.py FOLDER… [--every 1] [--blur FOLDER]
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
from common import machine, markdown

from eyetune.data.fundus import find_field
from eyetune.data.images import is_image_name
from eyetune.data.photo import read_image
from eyetune.data.quality import SHARPNESS, SHORT_SIDE, SIDE, WORDS, quality
from eyetune.errors import DataError

BLURS = (0.0, 1.0, 1.5, 2.0, 3.0, 4.0)


def photographs(folder: Path, every: int) -> list[Path]:
    """Every n-th image of a folder and those below it."""
    return sorted(path for path in folder.rglob("*") if is_image_name(path.name))[::every]


def flags(folder: Path, every: int) -> tuple[list[str], float]:
    """A row of the table: how many photographs have each flag; and CPU milliseconds a photograph."""
    said: Counter[str] = Counter()
    none = read = 0
    start = time.process_time()
    for path in photographs(folder, every):
        try:
            found = quality(read_image(path, short_side=SHORT_SIDE)).flags
        except DataError:
            continue
        read += 1
        none += not found
        said.update(found)
    row = [folder.name, str(read), str(none), *(str(said[word]) for word in WORDS)]
    return row, 1000 * (time.process_time() - start) / max(read, 1)


def blurs(folder: Path, every: int) -> list[list[str]]:
    """Sharpness of photographs that were blurred by a Gaussian, sigma in pixels of a field of SIDE."""
    rows = []
    for blur in BLURS:
        found = []
        for path in photographs(folder, every):
            photo = read_image(path, short_side=SHORT_SIDE)
            field = find_field(photo)
            sigma = blur * max(field.width, field.height) / SIDE
            measured = quality(cv2.GaussianBlur(photo, (0, 0), sigma) if sigma else photo).sharpness
            found.append(0.0 if measured is None else measured)
        low, middle, high = np.quantile(found, [0, 0.5, 1])
        share = float((np.array(found) < SHARPNESS).mean())
        rows.append([f"{blur:g}", f"{middle:.2f} ({low:.2f} to {high:.2f})", f"{share:.0%}"])
    return rows


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--blur", type=Path)
    given = parser.parse_args()
    cv2.setNumThreads(1)
    rows = [flags(folder, given.every) for folder in given.folders]
    print(machine())
    print(markdown(["photographs", "read", "no flag", *WORDS], [row for row, _ in rows]))
    print(f"CPU ms a photograph: {', '.join(f'{seconds:.0f}' for _, seconds in rows)}")
    if given.blur is not None:
        print(markdown(["sigma", "sharpness: median (least to most)", "`blurred`"], blurs(given.blur, given.every)))


if __name__ == "__main__":
    main()
