"""From images and texts to RET-CLIP's databases, written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eyetune.data.pairs.layout import IMAGES_KEY, NOTES, SAMPLES_KEY, database_folder, images_file, texts_file
from eyetune.data.pairs.texts import Images, Text, read_images, write_images, write_texts
from eyetune.data.pairs.values import pack
from eyetune.errors import MissingExtra
from eyetune.files import make_folder, sync, write_json, writing_failed

_COMMIT = 1000
"""Entries in a transaction."""

_ROOM = 2**26
"""Bytes of a database beyond twice its entries."""


def write_split(
    folder: Path,
    split: str,
    images: Iterable[Images],
    texts: Sequence[Text],
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Write `{split}_imgs.tsv`, `{split}_texts.jsonl` and `lmdb/{split}` into `folder`; the last of them last.

    Args:
        images: a row a patient; consumed once.
        texts: every patient they name has images.
        notes: the content of pairs.json:
            {"patients": {name: {"group", "single", "label"}}, "labels": {text_id: label}, "photographs": [id]}.

    Raises MissingExtra without lmdb; UserError when the disk is full or not ours to write.
    """
    require_lmdb()
    tsv = images_file(folder, split)
    write_images(tsv, images)
    write_texts(texts_file(folder, split), texts)
    write_database(database_folder(folder, split), tsv, texts, notes)


def write_database(folder: Path, tsv: Path, texts: Sequence[Text], notes: Mapping[str, Any] | None = None) -> None:
    """Write `imgs`, `pairs` and pairs.json into `folder`, which appears when all of it is there."""
    half = folder.with_name(f".{folder.name}~")
    shutil.rmtree(half, ignore_errors=True)
    try:
        make_folder(half)
        size = tsv.stat().st_size
        pairs = [(patient, text.number, text.text) for text in texts for patient in text.patients]
        _fill(
            half / "pairs",
            ((b"%d" % number, pack(pair)) for number, pair in enumerate(pairs)),
            SAMPLES_KEY,
            sum(len(text) * 4 + 600 for _, _, text in pairs),
        )
        _fill(half / "imgs", (_image_entry(row) for row in read_images(tsv)), IMAGES_KEY, size)
        if notes is not None:
            write_json(half / NOTES, notes)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(half, folder)
        sync(folder.parent)
    except OSError as error:
        raise writing_failed(folder, error) from error
    finally:
        shutil.rmtree(half, ignore_errors=True)


def require_lmdb() -> Any:
    """The package `lmdb`. Raises MissingExtra without it."""
    try:
        import lmdb
    except ImportError:
        raise MissingExtra("writing image-text pairs as LMDB", "clip") from None
    return lmdb


def _image_entry(row: Images) -> tuple[bytes, bytes]:
    # One object for one image: pickle then writes it once, and RET-CLIP's loader gets it twice.
    right = row.left if row.right == row.left else row.right
    return row.patient.encode(), pack((row.left, right))


def _fill(folder: Path, entries: Iterable[tuple[bytes, bytes]], count_key: bytes, size: int) -> None:
    """A new database of `entries`, and how many they are under `count_key`."""
    lmdb = require_lmdb()
    make_folder(folder)
    try:
        # Nobody reads it before it is renamed, so it is synced once, at the end.
        with lmdb.open(str(folder), map_size=2 * size + _ROOM, sync=False, metasync=False, max_dbs=0) as environment:
            count = 0
            transaction = environment.begin(write=True)
            for key, value in entries:
                transaction.put(key, value)
                count += 1
                if count % _COMMIT == 0:
                    transaction.commit()
                    transaction = environment.begin(write=True)
            transaction.put(count_key, b"%d" % count)
            transaction.commit()
            environment.sync(True)
    except lmdb.Error as error:
        # lmdb passes on what the system said as text only.
        raise OSError(None, f"LMDB: {error}", str(folder)) from error
    with contextlib.suppress(OSError):
        (folder / "lock.mdb").unlink()
