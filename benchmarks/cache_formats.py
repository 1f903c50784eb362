"""Ways to keep prepared squares on disk: bytes, speed of writing and of reading in random order, fidelity.

python benchmarks/cache_formats.py [--photographs 48] [--size 2592x1944] [--pixels 224] [--table labels.csv]

With --table it takes real photographs (the first of the table, up to --photographs) in place of drawn ones. "Cold" is
after the system was told to forget the file's pages; nothing but the disk's own cache is left then.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from common import machine, markdown

Squares = list[np.ndarray[Any, np.dtype[np.uint8]]]
Reader = Callable[[int], Any]

CODECS: dict[str, tuple[str, list[int]]] = {
    "PNG": (".png", [cv2.IMWRITE_PNG_COMPRESSION, 1]),
    "WebP, lossless": (".webp", [cv2.IMWRITE_WEBP_QUALITY, 101]),
    "JPEG, quality 95": (".jpg", [cv2.IMWRITE_JPEG_QUALITY, 95]),
}


def decode(data: Any) -> Any:
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)


def key(index: int) -> bytes:
    return index.to_bytes(16, "little")


OPENED: list[Any] = []
"""LMDB opens a folder once a process, and the system forgets no page that is mapped."""


def close_all() -> None:
    while OPENED:
        OPENED.pop().close()


def in_store(folder: Path, squares: Squares) -> Callable[[], Reader]:
    """EyeTune's own: raw pixels in a flat file, read by `pread`, every value checked."""
    from eyetune.data.store import Item, Kind, Store

    store = Store(folder, 2**40, print)
    for index, square in enumerate(squares):
        store.put([Item(key(index), Kind.SQUARE, square.tobytes())])
    store.close()
    shape = squares[0].shape

    def reader() -> Reader:
        opened = Store(folder, 2**40, print)
        return lambda index: opened.get(key(index)).reshape(shape)  # type: ignore[union-attr]

    return reader


def in_map(folder: Path, squares: Squares) -> Callable[[], Reader]:
    """One raw array, mapped into memory; nothing is checked, and a file cut short ends the process."""
    path = folder / "squares.npy"
    np.save(path, np.stack(squares))

    def reader() -> Reader:
        array = np.load(path, mmap_mode="r")
        return lambda index: np.array(array[index])

    return reader


def in_lmdb(folder: Path, values: Sequence[bytes], read: Callable[[Any], Any]) -> Callable[[], Reader]:
    """LMDB, mapped as well."""
    import lmdb

    with lmdb.open(str(folder), map_size=2**36) as environment:
        for index, value in enumerate(values):
            with environment.begin(write=True) as transaction:
                transaction.put(key(index), value)

    def reader() -> Reader:
        close_all()
        OPENED.append(lmdb.open(str(folder), map_size=2**36, readonly=True, readahead=False))
        transaction = OPENED[0].begin(buffers=True)
        return lambda index: read(transaction.get(key(index)))

    return reader


def in_arrow(folder: Path, squares: Squares) -> Callable[[], Reader]:
    """An Arrow file of binary values, a record batch each, mapped."""
    import pyarrow as pa

    shape = squares[0].shape
    path = folder / "squares.arrow"
    schema = pa.schema([("square", pa.binary())])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for square in squares:
            writer.write_batch(pa.record_batch([pa.array([square.tobytes()], pa.binary())], schema=schema))

    def reader() -> Reader:
        opened = pa.ipc.open_file(pa.memory_map(str(path)))
        return lambda index: np.array(np.frombuffer(opened.get_batch(index)[0][0].as_buffer(), np.uint8)).reshape(shape)

    return reader


def in_safetensors(folder: Path, squares: Squares) -> Callable[[], Reader]:
    """One safetensors file, mapped; cannot grow."""
    from safetensors import safe_open
    from safetensors.numpy import save_file

    path = folder / "squares.safetensors"
    save_file({str(index): square for index, square in enumerate(squares)}, str(path))

    def reader() -> Reader:
        opened = safe_open(str(path), "np").__enter__()
        return lambda index: opened.get_tensor(str(index))

    return reader


def forget(folder: Path) -> None:
    """Have the system drop the pages of every file."""
    close_all()
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def rate(reader: Callable[[], Reader], order: Sequence[int], before: Callable[[], None], rounds: int = 5) -> float:
    """Images a second, median of several rounds over `order`."""
    rates = []
    for _ in range(rounds):
        before()
        read: Reader | None = reader()
        start = time.perf_counter()
        for index in order:
            read(index)  # type: ignore[misc]
        read = None
        rates.append(len(order) / (time.perf_counter() - start))
    return statistics.median(rates)


def probabilities(squares: Squares) -> torch.Tensor:
    """What a fixed network (nano with a fixed head) says of squares: float32[N, 5]."""
    from eyetune.adapt.classifier import Classifier
    from eyetune.backbones import load_backbone
    from eyetune.data.transforms import eval_transform

    torch.manual_seed(0)
    pixels = squares[0].shape[0] // 16 * 16  # nano's patches
    backbone = load_backbone("nano", pixels=pixels)
    model = Classifier(backbone, 5).eval()
    with torch.no_grad():
        model.head[1].weight.mul_(20)  # type: ignore[index, union-attr, operator]  # else all would be near 1/5
        transform = eval_transform(backbone.preprocess)
        images = [transform(torch.from_numpy(square[:pixels, :pixels]).permute(2, 0, 1)) for square in squares]
        return torch.cat([model(image[None]).softmax(1) for image in images])


def photographs(scratch: Path, options: argparse.Namespace) -> list[Path]:
    from eyetune.data.phantom import write_cohort
    from eyetune.data.records import Manifest

    table = options.table
    if table is None:
        width, height = (int(side) for side in options.size.split("x"))
        write_cohort(scratch / "eyes", patients=options.photographs // 2, size=(width, height), workers=2)
        table = scratch / "eyes" / "labels.csv"
    return [record.image for record in Manifest.from_table(table, labels_required=False, label_column="none")][
        : options.photographs
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=int, default=48)
    parser.add_argument("--size", default="2592x1944")
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--table", type=Path)
    options = parser.parse_args()
    import lmdb  # noqa: F401 - not within the time of the first to use it
    import pyarrow as pa  # noqa: F401

    from eyetune.data.fundus import FundusSettings, load_square

    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=".") as name:
        scratch = Path(name)
        settings = FundusSettings(options.pixels)
        squares = [load_square(path, settings) for path in photographs(scratch, options)]
        encoded = {
            codec: lambda suffix=suffix, flags=flags: [
                cv2.imencode(suffix, square, flags)[1].tobytes() for square in squares
            ]
            for codec, (suffix, flags) in CODECS.items()
        }
        ways: dict[str, Callable[[Path], Callable[[], Reader]]] = {
            "raw, flat file, checked (EyeTune)": lambda folder: in_store(folder, squares),
            "raw, memory map": lambda folder: in_map(folder, squares),
            "raw, Arrow": lambda folder: in_arrow(folder, squares),
            "raw, safetensors": lambda folder: in_safetensors(folder, squares),
            "raw, LMDB": lambda folder: in_lmdb(
                folder,
                [square.tobytes() for square in squares],
                lambda data: np.array(np.frombuffer(data, np.uint8)).reshape(squares[0].shape),
            ),
        }
        for codec, encode in encoded.items():
            ways[f"{codec}, LMDB"] = lambda folder, encode=encode: in_lmdb(folder, encode(), decode)
        order = random.Random(0).sample(range(len(squares)), len(squares))
        expected = probabilities(squares)
        rows = []
        for number, (way, write) in enumerate(ways.items()):
            folder = scratch / str(number)
            folder.mkdir()
            start = time.perf_counter()
            reader = write(folder)
            written = len(squares) / (time.perf_counter() - start)
            size = sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file()) / len(squares)
            read = reader()
            found = [read(index) for index in range(len(squares))]
            differences = [np.abs(a.astype(int) - b).mean() for a, b in zip(found, squares, strict=True)]
            moved = float((probabilities(found) - expected).abs().max())
            warm = rate(reader, order, lambda: None)
            del read
            cold = rate(reader, order, lambda folder=folder: forget(folder))
            rates = (f"{value:,.0f}" for value in (written, cold, warm))
            rows.append([way, f"{size / 1024:.0f}", *rates, float(np.mean(differences)), moved])
    print(machine())
    head = [f"{len(squares)} squares of {options.pixels} px", "KiB an image", "written/s", "read/s cold", "read/s warm"]
    print(markdown([*head, "mean abs. difference", "largest difference in probability"], rows))


if __name__ == "__main__":
    main()
