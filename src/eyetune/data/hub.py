"""Reading a Hugging Face dataset: a folder on disk, or a name on the hub, streamed.

Everything after reading works on image files, so images that a dataset keeps inside its Arrow or Parquet files are
copied out once, byte for byte, into a cache folder (EYETUNE_CACHE, else ~/.cache/eyetune); a second run reads nothing
from the network.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from eyetune import files
from eyetune.data import tables
from eyetune.data.config import IGNORE
from eyetune.data.record import Kind, Reading
from eyetune.errors import DataError, MissingExtra, did_you_mean
from eyetune.progress import track

if TYPE_CHECKING:
    import datasets

_SPLIT = "hf split"
"""The column in which the dataset's own splits are kept among its others."""

_SUFFIX_OF = {b"\xff\xd8": ".jpg", b"\x89P": ".png", b"II": ".tif", b"MM": ".tif", b"BM": ".bmp", b"RI": ".webp"}

_ON_HUB = "hf://"
"""In the address of a file on the hub, possibly one inside an archive (`zip://a.jpg::hf://…`)."""

_INDEX = "index.json"
"""Written last: a cache folder without it is incomplete and read again."""


@dataclass(frozen=True)
class _Copy:
    """What is remembered of a dataset: its rows as text, the file of each image, the classes in their order."""

    columns: list[str]
    rows: list[dict[str, str]]
    files: list[str]
    roles: dict[str, str]
    classes: list[str] | None


def read(
    name: str,
    *,
    columns: tables.Columns,
    classes: Sequence[str] | None,
    labels_required: bool,
    kind: Kind = "classes",
) -> Reading:
    """The photographs of a dataset; see :meth:`Manifest.from_huggingface`.

    `name` is a folder (saved with save_to_disk, or holding Parquet files), or NAME, NAME@REVISION, NAME:CONFIGURATION
    on the hub. A dataset with a single split counts as not split.

    Raises MissingExtra without the package `datasets`; DataError for what the tables' reader raises, for a dataset that
    is not there or needs a login, and for columns without images.
    """
    source = f"hf:{name}"
    local = Path(name).expanduser()
    folder = _cache_folder(name, local, columns)
    index = folder / _INDEX
    if index.is_file():
        copy = _Copy(**json.loads(index.read_text(encoding="utf-8")))
        notes = [f"read from the copy in {folder}; delete it to read the dataset again"]
    else:
        try:
            copy = _read(local if local.is_dir() else name, columns, folder, source)
        except (DataError, MissingExtra):
            raise
        # The libraries below raise their own, requests' and pyarrow's errors.
        except Exception as error:
            raise DataError(f"{source}: {explain(error, local)}") from error
        files.write_json(index, vars(copy))
        notes = [f"images copied to {folder}"] if any(Path(file).is_relative_to(folder) for file in copy.files) else []
    wanted = {part: column or copy.roles.get(part) for part, column in columns.items() if part != "image"}
    chosen, found = tables.choose_columns(
        copy.columns, {**wanted, "image": copy.roles["image"]}, source, labels_required=labels_required
    )
    known = chosen.get("label") == copy.roles.get("label") and kind == "classes"
    if copy.classes is not None and known and classes is None:
        classes = copy.classes
    rows = [(row, f"{source} {row[chosen['image']]}") for row in copy.rows]
    return tables.build(
        rows=rows,
        files=[Path(file) for file in copy.files],
        names=[row[chosen["image"]] for row, _ in rows],
        chosen=chosen,
        source=source,
        classes=classes,
        labels_required=labels_required,
        notes=[*notes, *found],
        kind=kind,
    )


def _cache_folder(name: str, local: Path, columns: tables.Columns) -> Path:
    """Where the copy of this dataset, as it is now and with these columns, lies."""
    identity = [name, str(columns)]
    if local.is_dir():
        for path in sorted(local.rglob("*")):
            if path.is_file():
                state = path.stat()
                identity.append(f"{path.relative_to(local)} {state.st_size} {state.st_mtime_ns}")
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-")[-60:]
    return files.cache_folder() / "hf" / f"{readable}-{hashlib.sha256(chr(0).join(identity).encode()).hexdigest()[:12]}"


def _read(name: str | Path, columns: tables.Columns, folder: Path, source: str) -> _Copy:
    parts = open_dataset(name)
    features = next(iter(parts.values())).features or {}
    roles = _roles(features, columns, source)
    class_names = getattr(features.get(roles.get("label", "")), "names", None)
    rows: list[dict[str, str]] = []
    paths: list[str] = []
    for split, part in parts.items():
        examples = undecoded(part, roles["image"])
        for number, example in enumerate(track(examples, getattr(part, "num_rows", None), f"Reading {source} {split}")):
            image = example.pop(roles["image"])
            where = f"{source} {split} row {number}"
            path = _materialise(image, folder / split, number, name, where)
            row = {key: _cell(features.get(key), value) for key, value in example.items()}
            # The name that tables and predictions show: short, unique, the same on every machine.
            row[roles["image"]] = f"{split}/{path.name}"
            row[_SPLIT] = split
            rows.append(row)
            paths.append(str(path))
    if not rows:
        raise DataError(f"{source} has no rows.")
    if "split" not in roles and len(parts) > 1:
        roles["split"] = _SPLIT
    return _Copy([*features, _SPLIT], rows, paths, roles, class_names)


def open_dataset(name: str | Path) -> dict[str, datasets.Dataset | datasets.IterableDataset]:
    """The parts of a dataset by name: of a folder (a Path), or of a name on the hub, streamed."""
    try:
        import datasets
    except ImportError:
        raise MissingExtra("reading Hugging Face datasets", "hub") from None
    if isinstance(name, Path) and ((name / "dataset_dict.json").exists() or (name / "state.json").exists()):
        opened = datasets.load_from_disk(str(name))
    elif isinstance(name, Path):
        opened = datasets.load_dataset(str(name), streaming=True)
    else:
        bare, _, revision = name.partition("@")
        bare, _, configuration = bare.partition(":")
        opened = datasets.load_dataset(bare, configuration or None, revision=revision or None, streaming=True)
    return dict(opened) if isinstance(opened, dict) else {"all": opened}


def _roles(features: Mapping[str, Any], columns: tables.Columns, source: str) -> dict[str, str]:
    """The columns whose type says what they are: the images, and the labels that carry class names."""
    wanted = columns.get("image")
    assert wanted is None or isinstance(wanted, str)  # only labels may be several
    roles = {"image": image_column(features, wanted, source)}
    label = columns.get("label")
    named = [key for key, feature in features.items() if type(feature).__name__ == "ClassLabel"]
    standard = [key for key in named if key.lower() in tables.STANDARD["label"]]
    if isinstance(label, str) and label.lower() != IGNORE:
        roles["label"] = label
    elif label is None and named:
        roles["label"] = (standard or named)[0]
    if columns.get("split") is not None:
        roles["split"] = str(columns["split"])
    return roles


def image_column(features: Mapping[str, Any], wanted: str | None, source: str) -> str:
    """The column that holds the images: the one asked for, else the first that does. Raises DataError without one."""
    if wanted is not None and wanted not in features:
        raise DataError(
            f"{source}: no column {wanted!r}.{did_you_mean(wanted, features)} It has {', '.join(features)}."
        )
    images = [key for key, feature in features.items() if _holds_images(feature)]
    if wanted is None and not images:
        raise DataError(f"{source}: no column holds images; it has {', '.join(features)}.")
    return wanted or images[0]


def _holds_images(feature: object) -> bool:
    return type(feature).__name__ == "Image" or (isinstance(feature, Mapping) and {"bytes", "path"} <= feature.keys())


def undecoded(part: Any, image: str) -> Any:
    """A part of a dataset whose images come as they are stored."""
    import datasets

    if type((part.features or {}).get(image)).__name__ == "Image":
        part = part.cast_column(image, datasets.Image(decode=False))
    return part


def image_bytes(image: Any, folder: Path, where: str) -> bytes:
    """The bytes of an image as a dataset stores it; of a folder, possibly beside it. Raises DataError without one."""
    data, original = (image.get("bytes"), image.get("path")) if isinstance(image, Mapping) else (None, image)
    if data is not None:
        return bytes(data)
    if isinstance(original, str) and _ON_HUB in original:  # a dataset of plain files, streamed
        import fsspec

        with fsspec.open(original, "rb") as stream:
            fetched: bytes = stream.read()
        return fetched
    path = Path(str(original))
    if folder.is_dir() and not path.is_absolute():
        path = folder / path
    try:
        if original and path.is_file():
            return path.read_bytes()
    except OSError as error:
        raise DataError(f"{where}: cannot read {path}: {error.strerror}.") from None
    raise DataError(f"{where}: neither the image itself nor a file at {original!r}.")


def _materialise(image: Any, folder: Path, number: int, name: str | Path, where: str) -> Path:
    """The file of an image: the one it has already, or its bytes written to the cache folder."""
    content, original = (image.get("bytes"), image.get("path")) if isinstance(image, Mapping) else (None, image)
    if content is None and _ON_HUB in str(original):
        content, original = image_bytes(image, folder, where), PurePosixPath(str(original)).name
    if content is None:
        path = Path(str(original))
        if isinstance(name, Path) and not path.is_absolute():
            path = name / path
        if original and path.is_file():
            return path.resolve()
        raise DataError(f"{where}: neither the image itself nor a file at {original!r}.")
    stem = re.sub(r"[^A-Za-z0-9._-]+", "_", Path(original).stem)[:60] if original else ""
    suffix = _SUFFIX_OF.get(bytes(content[:2]), ".img")
    path = folder / f"{number:06d}{'_' if stem else ''}{stem}{suffix}"
    if not path.is_file() or path.stat().st_size != len(content):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        except OSError as error:
            raise files.writing_failed(path, error) from error
    return path


def _cell(feature: object, value: object) -> str:
    names = getattr(feature, "names", None)
    if names is not None and isinstance(value, int):
        return str(names[value]) if value >= 0 else ""
    if isinstance(value, bytes):
        return ""
    return "" if value is None else value if isinstance(value, str) else json.dumps(value, default=str)


def explain(error: Exception, local: Path) -> str:
    """What went wrong with a dataset, in words that follow its name."""
    kind = type(error).__name__
    said = str(error).split("\n", 1)[0]
    if "Gated" in kind or "gated" in said:
        return "access has to be asked for on its page at huggingface.co; then run: hf auth login"
    if local.is_dir():
        return f"not a dataset saved with save_to_disk, nor a folder of Parquet files ({said})."
    if "NotFound" in kind or "doesn't exist" in said:
        return "no such dataset on the hub, nor such a folder here. (A private one needs: hf auth login)"
    return f"cannot be read from the hub ({kind}: {said})."
