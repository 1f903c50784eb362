"""A sealed folder: tensors and JSON with a marker that lists every file's size and SHA-256, and vouches for itself.

The marker is written last and says in `seal` the SHA-256 of the rest of itself: any bit that changes in any file, and
a file that is gone, cut or replaced, is found before the content is used. Folders of schema 1 (the first EyeTune) have
no list; they are read with the checks the formats themselves have.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eyetune.errors import RunError, UserError, listing
from eyetune.files import sha256, sync, writing_failed
from eyetune.tensors import read_tensors, write_chunks, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

#: Version of the marker; raised when a reader of the old form would misunderstand the new one.
SCHEMA = 2

MARKER = "model.json"

#: No JSON of a run comes near: a larger file is not ours, and is not read into memory.
_LARGEST_JSON = 64 << 20


def seal(
    folder: Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    texts: Mapping[str, Mapping[str, Any]],
    card: Mapping[str, Any],
) -> None:
    """Write files of tensors, files of JSON, and the marker with the content `card`; on the disk when it returns.

    Raises UserError when they cannot be written, or a tensor holds NaN or infinity: such a state is not worth keeping.
    """
    for name, content in tensors.items():
        _refuse_not_finite(folder / name, content)
    files = {name: write_tensors(folder / name, content) for name, content in tensors.items()}
    files |= {name: write_chunks(folder / name, iter([_text(content)])) for name, content in texts.items()}
    content = plain({**card, "files": files})
    write_chunks(folder / MARKER, iter([_text({**content, "seal": _seal(content)})]))
    try:
        sync(folder.parent)
    except OSError as error:
        raise writing_failed(folder, error) from error


def read_marker(folder: Path) -> dict[str, Any]:
    """The content of a folder's marker, without its seal. Raises RunError when it is missing, damaged or too new."""
    path = folder / MARKER
    data = _read_bytes(path)
    content = _parse(data, path)
    schema = content.get("schema")
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        raise RunError(f"{path} is damaged: it has no schema number.")
    if schema > SCHEMA:
        raise RunError(f"{path} has schema {schema!r}; this EyeTune reads {SCHEMA}. Use the version that wrote it.")
    if schema == 1:
        return content
    found = content.pop("seal", None)
    # The very bytes: what JSON calls the same (1.0 and 1.00, a key that stands twice) was not written by us.
    if found != _seal(content) or data != _text({**content, "seal": found}):
        raise RunError(f"{path} is damaged: its content is not what was written.")
    return content


def verify(folder: Path, marker: Mapping[str, Any]) -> None:
    """Compare every file with the marker's list. Raises RunError, naming the files that are missing or damaged.

    Sizes come first: a file that was replaced by gigabytes is refused before a byte of it is read.
    """
    faults = []
    for name, expected in marker.get("files", {}).items():
        path = folder / name
        if not path.is_file():
            faults.append(f"{path} is missing")
        elif path.stat().st_size != expected["size"]:
            faults.append(f"{path} has {path.stat().st_size} bytes, not {expected['size']}")
        else:
            try:
                same = sha256(path) == expected["sha256"]
            except OSError as error:
                faults.append(f"{path} cannot be read ({error.strerror})")
                continue
            if not same:
                faults.append(f"{path} has changed since it was written (SHA-256)")
    if faults:
        raise RunError(f"the checkpoint {folder.name} is damaged:\n{listing(faults)}")


def read_sealed_tensors(folder: Path, name: str, marker: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a file of a verified folder; none when the folder was written without that file."""
    if "files" in marker and name not in marker["files"]:
        return {}
    return read_tensors(folder / name)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises RunError when it is missing, damaged or larger than any of ours."""
    return _parse(_read_bytes(path), path)


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: paths as text, tuples as lists, NaN and infinity as null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def _refuse_not_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    bad = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not bool(tensor.isfinite().all())]
    if bad:
        raise UserError(
            f"{path} was not written: training diverged, {len(bad)} tensors hold NaN or infinity. Lower train.lr, or "
            f"use --precision fp32.\n{listing(bad)}"
        )


def _text(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(plain(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(_text(content)).hexdigest()


def _read_bytes(path: Path) -> bytes:
    if not path.is_file():
        raise RunError(f"{path} is missing.")
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise RunError(f"{path} is damaged: it is larger ({path.stat().st_size} bytes) than any that is written.")
        return path.read_bytes()
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror}).") from error


def _parse(data: bytes, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is damaged ({error}).") from error
    if not isinstance(content, dict):
        raise RunError(f"{path} is damaged (not a JSON object).")
    return content
