"""From photographs to the small JPEG files that image-text training reads, several at a time, into a journal."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from eyetune.data.cache import content_digest, file_digest, photograph_id
from eyetune.data.config import Contrast
from eyetune.data.pairs.dataset import PhotoDataset
from eyetune.data.pairs.journal import Journal
from eyetune.data.pairs.layout import decode_base64, encode_base64
from eyetune.data.pairs.sample import InDataset, InTable, Source
from eyetune.errors import DataError
from eyetune.progress import meter

if TYPE_CHECKING:
    from eyetune.data.photo import Photo

_AHEAD = 4
"""Photographs read ahead for every one being prepared."""


@dataclass(frozen=True)
class ImageSettings:
    """How a photograph becomes an image of the databases.

    Attributes:
        pixels: side of the square. 256 leaves a network of 224 a random crop of three quarters of the area before
            anything has to be enlarged.
        quality: of the JPEG, 1..100, with colour at full resolution: small red lesions are colour and little else.
        crop: crop to the field of view first.
        contrast: none, clahe or ben-graham.
        bits: how many bits deep gray images use; None where the file or its format says.
    """

    pixels: int = 256
    quality: int = 95
    crop: bool = True
    contrast: Contrast = "none"
    bits: int | None = None


class Encoded(NamedTuple):
    """A prepared photograph: the JPEG, and the :func:`~eyetune.data.cache.photograph_id` of the file it was made of."""

    jpeg: bytes
    photograph: str


class Encoder:
    """Prepares photographs: decode, EXIF, field of view, square, JPEG.

    Args:
        settings: how.
        dataset: what sources inside a dataset belong to.
        as_they_are: images of TSV tables, which somebody prepared already, are checked and taken as they are.
    """

    def __init__(
        self, settings: ImageSettings, dataset: PhotoDataset | None = None, *, as_they_are: bool = False
    ) -> None:
        from eyetune.data.fundus import VERSION, FundusSettings

        self.settings = settings
        self.dataset = dataset
        self.as_they_are = as_they_are
        self.fundus = FundusSettings(settings.pixels, "pad", settings.crop, settings.contrast, settings.bits)
        self._how = json.dumps([VERSION, asdict(settings)])
        self._dataset = dataset.identity() if dataset is not None else ""
        self._files: dict[Path, str] = {}

    def key(self, source: Source) -> str:
        """What a prepared photograph is kept under: another file, another content or other settings, another key."""
        if isinstance(source, InDataset):
            identity = f"{self._dataset}\0{source.split}\0{source.index}"
        elif isinstance(source, InTable):
            if source.file not in self._files:  # thousands of images, one file
                self._files[source.file] = _identity(source.file)
            identity = f"{self._files[source.file]}\0{source.offset}\0{source.length}\0{self.as_they_are}"
        else:
            identity = _identity(source)
        return hashlib.sha256(f"{self._how}\0{identity}".encode(errors="surrogateescape")).hexdigest()[:32]

    def keys(self, sources: Iterable[Source]) -> dict[Source, str]:
        """The key of each, once."""
        return {source: self.key(source) for source in dict.fromkeys(sources)}

    def stored(self, source: InTable) -> Encoded:
        """An image of a TSV table. Raises DataError for what is no base64 or no image."""
        from eyetune.data.photo import decode_image

        try:
            with open(source.file, "rb") as stream:
                stream.seek(source.offset)
                text = stream.read(source.length)
        except OSError as error:
            raise DataError(f"cannot read {source.file}: {error.strerror}.") from None
        data = decode_base64(text.decode("ascii", errors="replace"))
        if data is None:
            raise DataError(f"{source.where}: no base64, or cut short")
        if not self.as_they_are:
            return self.content(data, source.where)
        decode_image(data, source.where)
        return Encoded(data, photograph_id(content_digest(data)))

    def inside(self, stored: Any, where: str) -> Encoded:
        """An image of the dataset."""
        assert self.dataset is not None
        return self.content(self.dataset.content(stored, where), where)

    def file(self, path: Path) -> Encoded:
        """A photograph of a file as JPEG. Raises DataError for one that cannot be read."""
        from eyetune.data.fundus import load_square

        jpeg = self._jpeg(load_square(path, self.fundus))
        try:
            return Encoded(jpeg, photograph_id(file_digest(path)))
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}.") from None

    def content(self, data: bytes, where: str) -> Encoded:
        """The same of the bytes of a file."""
        from eyetune.data.fundus import decode_square

        return Encoded(self._jpeg(decode_square(data, where, self.fundus)), photograph_id(content_digest(data)))

    def _jpeg(self, square: Photo) -> bytes:
        import cv2

        flags = [cv2.IMWRITE_JPEG_QUALITY, self.settings.quality]
        flags += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
        done, data = cv2.imencode(".jpg", cv2.cvtColor(square, cv2.COLOR_RGB2BGR), flags)
        assert done
        return data.tobytes()


OUTSIDE = "beyond the end of the dataset"
"""The fault of an index that a dataset turns out not to have when its end is reached."""

Job = tuple[Source, Callable[[], Encoded]]


def encode(
    sources: Sequence[Source], encoder: Encoder, journal: Journal, workers: int
) -> tuple[dict[Source, str], dict[Source, str]]:
    """Prepare the photographs that the journal does not have yet.

    Args:
        sources: the photographs; repeats are prepared once.
        workers: threads; decoding leaves Python's lock to the others.

    Returns:
        The key of every photograph, and the fault of every one that cannot be prepared.

    An interruption leaves what is done in the journal.
    """
    keys = encoder.keys(sources)
    waiting = [source for source, key in keys.items() if key not in journal]
    faults: dict[Source, str] = {}
    if not waiting:
        return keys, faults
    with meter(len(waiting), "Preparing", "photographs") as update, ThreadPoolExecutor(workers) as pool:
        try:
            for done, (source, future) in enumerate(
                _in_order(_jobs(waiting, encoder), pool, _AHEAD * workers), start=1
            ):
                try:
                    made = future.result()
                    journal.add(keys[source], encode_base64(made.jpeg), made.photograph)
                except DataError as fault:
                    faults[source] = str(fault)
                update(done)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    missing = {source: OUTSIDE for source in waiting if keys[source] not in journal}
    return keys, missing | faults


def _jobs(waiting: Sequence[Source], encoder: Encoder) -> Iterator[Job]:
    """What is to be done for every photograph: files as they come, then each split of the dataset in its order."""
    inside: dict[str, list[int]] = {}
    for source in waiting:
        if isinstance(source, InDataset):
            inside.setdefault(source.split, []).append(source.index)
        elif isinstance(source, InTable):
            yield source, partial(encoder.stored, source)
        else:
            yield source, partial(encoder.file, source)
    for split, indexes in inside.items():
        assert encoder.dataset is not None
        for index, stored in encoder.dataset.images(split, indexes):
            where = f"{encoder.dataset.source} {split} row {index}"
            yield InDataset(split, index), partial(encoder.inside, stored, where)


def _identity(path: Path) -> str:
    try:
        state = path.stat()
        return f"{path.resolve()}\0{state.st_size}\0{state.st_mtime_ns}"
    except (OSError, ValueError):  # that it is missing will be said when it is read
        return str(path)


def _in_order(jobs: Iterable[Job], pool: ThreadPoolExecutor, ahead: int) -> Iterator[tuple[Source, Future[Encoded]]]:
    """Every job and its result, in order, with at most `ahead` of them begun."""
    begun: deque[tuple[Source, Future[Encoded]]] = deque()
    for source, job in jobs:
        begun.append((source, pool.submit(job)))
        if len(begun) >= ahead:
            yield begun.popleft()
    yield from begun
