"""Photographs told into classes that are given in words, as the same table every other prediction is."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from eyetune.clip.features import Eye, embed_eyes
from eyetune.data.readable import Workers
from eyetune.data.record import Record
from eyetune.errors import DataError
from eyetune.files import atomic
from eyetune.metrics.predictions import UNKNOWN, Predictions

if TYPE_CHECKING:
    from eyetune.clip.run import ClipRun
    from eyetune.data.records import Manifest

Per = Literal["image", "patient"]
"""A row a photograph, which then stands for both eyes; or a row a patient, both eyes seen together."""


@dataclass(frozen=True)
class Subject:
    """What one row is about.

    Attributes:
        name, patient, eye, split: as in the manifest; of a patient's row the name is the patient's.
        target: class, -1 where not known.
        looks: photographs seen together, (left, right) or (only, None); several are averaged.
    """

    name: str
    patient: str | None
    eye: str | None
    split: str | None
    target: int
    looks: tuple[tuple[Path, Path | None], ...]


def subjects(manifest: Manifest, per: Per, *, ordered: bool) -> tuple[list[Subject], list[tuple[str, int]]]:
    """The rows of a manifest, and what was left out: (why, how many patients).

    Args:
        manifest: labels index its classes.
        per: "image", or "patient": the k-th photograph of the left eye is seen with the k-th of the right.
        ordered: of two labels of a patient the higher counts; without an order such patients are left out.

    Raises DataError for "patient" where the table does not say whose photographs they are, and of which eye.
    """
    if per == "image":
        return [
            Subject(one.name, one.patient, one.eye, one.split, _target(one), ((one.image, None),)) for one in manifest
        ], []
    lacking = [one for one in manifest if one.patient is None or one.eye not in ("left", "right")]
    if lacking:
        raise DataError(
            f"{manifest.source}: --per patient needs to know whose eye each photograph shows, left or right; "
            f"{len(lacking)} of {len(manifest)} rows do not say ({lacking[0].row}). Name the columns with "
            "--patient-column and --eye-column, or take --per image."
        )
    by_patient: dict[str, list[Record]] = {}
    for record in manifest:
        by_patient.setdefault(str(record.patient), []).append(record)
    found, conflicting = [], 0
    for patient, records in by_patient.items():
        targets = {_target(one) for one in records} - {UNKNOWN}
        if len(targets) > 1 and not ordered:
            conflicting += 1
            continue
        sides = [[one.image for one in records if one.eye == side] for side in ("left", "right")]
        found.append(Subject(patient, patient, None, records[0].split, max(targets, default=UNKNOWN), _looks(*sides)))
    why = "have eyes of different classes, and the classes have no order that says which counts"
    return found, [(why, conflicting)] if conflicting else []


def _target(record: Record) -> int:
    return UNKNOWN if record.label is None else record.label


def _looks(left: Sequence[Path], right: Sequence[Path]) -> tuple[tuple[Path, Path | None], ...]:
    if not (left and right):
        return tuple((one, None) for one in (*left, *right))
    count = max(len(left), len(right))
    return tuple(zip(islice(cycle(left), count), islice(cycle(right), count), strict=True))


def look(
    run: ClipRun,
    rows: Sequence[Subject],
    *,
    store: Path | None = None,
    batch_size: int = 32,
    workers: Workers = "auto",
) -> Tensor:
    """The features of each row as a patient's: float32[N, D], of unit length, on the CPU.

    Args:
        run: the model.
        rows: N.
        store: a file that keeps them: read where it was written for these photographs and this model.
        batch_size, workers: as for :func:`eyetune.clip.features.embed_eyes`.
    """
    key = _key(run, rows)
    known = _stored(store, key, len(rows)) if store is not None else None
    if run.runtime.gather(known is not None) == [True] * run.runtime.processes:
        assert known is not None
        return known
    looks: list[tuple[Eye, Eye | None]] = [one for row in rows for one in row.looks]
    names = [row.name for row in rows for _ in row.looks]
    seen = embed_eyes(run, len(looks), looks.__getitem__, names=names, batch_size=batch_size, workers=workers)["image"]
    means = [part.mean(dim=0) for part in seen.split([len(row.looks) for row in rows])]
    found = functional.normalize(torch.stack(means), dim=1)
    if store is not None and run.runtime.is_main:
        from safetensors.torch import save_file

        with atomic(store) as temporary:
            save_file({"image": found}, str(temporary), metadata={"key": key})
    return found


def _key(run: ClipRun, rows: Sequence[Subject]) -> str:
    """What decides the features: the model, how photographs are prepared, and which files they are."""
    files = [[(str(path), *_state(path)) for path in look if path is not None] for row in rows for look in row.looks]
    return json.dumps([run.fingerprint, run.runtime.precision, asdict(run.settings), files])


def _state(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError:  # whoever reads it says what is wrong
        return 0, 0
    return stat.st_size, stat.st_mtime_ns


def _stored(path: Path, key: str, count: int) -> Tensor | None:
    """The features in a file written under this key; None where there is none, or it cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as stream:
            if (stream.metadata() or {}).get("key") != key:
                return None
            found: Tensor = stream.get_tensor("image")
    except (SafetensorError, OSError, ValueError):
        return None
    return found if found.ndim == 2 and len(found) == count else None


def predictions(
    rows: Sequence[Subject],
    features: Tensor,
    classes: Sequence[str],
    vectors: Tensor,
    *,
    scale: float,
    ordered: bool | None,
) -> Predictions:
    """The table of a zero-shot classifier: logits are similarities times the model's own scale.

    Args:
        rows: N.
        features: float[N, D], as :func:`look` gave them.
        classes: K names.
        vectors: float[K, D], as :func:`eyetune.clip.prompts.class_vectors` gave them.
        scale: the model's logit scale.
        ordered: whether the order of the classes means something; None: as their names say.
    """
    return Predictions(
        images=[row.name for row in rows],
        patients=[row.patient for row in rows],
        eyes=[row.eye for row in rows],
        targets=np.array([row.target for row in rows], dtype=np.int64),
        logits=(scale * features.double() @ vectors.double().T).numpy(),
        classes=tuple(classes),
        ordered=ordered,
    )


def about(rows: Sequence[Subject], per: Per, left_out: Sequence[tuple[str, int]]) -> dict[str, Any]:
    """What metrics.json says of a dataset beside its scores."""
    eyes = Counter("both eyes" if look[1] is not None else "one eye" for row in rows for look in row.looks)
    return {
        "per": per,
        "seen_as": dict(eyes),
        "left_out": [{"why": why, "patients": count} for why, count in left_out],
    }
