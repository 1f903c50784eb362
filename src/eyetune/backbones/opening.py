"""Checkpoints opened without executing anything in them: torch files old and new, and safetensors."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eyetune import files
from eyetune.errors import WeightsError

_ZIP, _PICKLE, _GIT_LFS = b"PK\x03\x04", b"\x80", b"version https://git-lfs"
_HEAD_BYTES = 4096
_LARGEST_INDEX = 10_000_000
"""Bytes of what describes the tensors, the pickle or the header of safetensors: a thousand tensors take 200,000. Larger
ones would take minutes to work through."""
_MOST_OPERATIONS = 1_000_000


@dataclass(frozen=True)
class Checkpoint:
    """An opened file.

    Args:
        path: where it lies.
        format: `torch`, `torch (before 1.6)` or `safetensors`.
        content: what it holds; tensors of zip and safetensors files stay on disk until they are read.
        sha256: of the whole file.
    """

    path: Path
    format: str
    content: Mapping[str, Any]
    sha256: str

    def containers(self) -> dict[str, dict[str, Tensor]]:
        """Every mapping of tensors in the file, by dotted path; the file itself is the path `""`."""
        return dict(_find_containers(self.content, "", set()))


def open_checkpoint(path: Path | str, *, where: str = "") -> Checkpoint:
    """Open a checkpoint without executing anything in it.

    Args:
        path: a `.pth`/`.pt` file of `torch.save`, or a `.safetensors` file.
        where: added to the message about a missing file: where to get it.

    Raises:
        WeightsError: the file is missing, empty, cut short, a web page, a git-LFS pointer, a TorchScript archive, not a
            checkpoint at all, or a pickle that would run code.
    """
    path = Path(path)
    if path.is_dir():
        raise WeightsError(f"{path} is a folder. Give the checkpoint file inside it.")
    if path.exists() and not path.is_file():
        raise WeightsError(f"{path} is a pipe or a device, not a file.")
    try:
        with open(path, "rb") as stream:
            head = stream.read(_HEAD_BYTES)
    except FileNotFoundError as error:
        raise WeightsError(f"no weights at {path}.{' ' + where if where else ' Check the path.'}") from error
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror or error}.") from error
    _refuse_impostors(path, head)
    if head.startswith(_ZIP):
        content, kind = _open_zip(path), "torch"
    elif _starts_safetensors(head):
        content, kind = _open_safetensors(path), "safetensors"
    elif head.startswith(_PICKLE):
        _refuse_bombs(path, _leading_pickles(path))
        content, kind = _torch_load(path, mmap=False), "torch (before 1.6)"
    else:
        raise WeightsError(f"{path} is not a checkpoint: neither a torch file nor safetensors. {AGAIN}")
    if isinstance(content, torch.Tensor) or not isinstance(content, Mapping):
        raise WeightsError(
            f"{path} holds a {type(content).__name__}, not a checkpoint. Save the state_dict: "
            "torch.save(model.state_dict(), …)."
        )
    return Checkpoint(path, kind, content, files.sha256(path))


AGAIN = "Download it again, and compare its size with the publisher's."


def _refuse_impostors(path: Path, head: bytes) -> None:
    """Raise WeightsError for what is often saved under a checkpoint's name."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        raise WeightsError(f"{path} is empty (0 bytes): the download did not happen. {AGAIN}")
    if head.startswith(_GIT_LFS):
        raise WeightsError(
            f"{path} is a git-LFS pointer, not the weights themselves. Run `git lfs pull` there, or download the file."
        )
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<!--")):
        raise WeightsError(
            f"{path} is a web page, not weights: the address led to a page (a sign-in or a consent, perhaps). "
            "Open it in a browser and download the file itself."
        )
    if text.startswith((b"{", b"[")) and not _starts_safetensors(head):
        raise WeightsError(f"{path} is JSON text, not weights. {AGAIN}")


def _starts_safetensors(head: bytes) -> bool:
    """Eight bytes that give a plausible length, then the JSON header."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _LARGEST_INDEX


def _open_zip(path: Path) -> Any:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            names = [entry.filename for entry in entries]
            # torch.save never compresses. A compressed entry may unpack to a thousand times the file; so may entries
            # that share their bytes.
            unpacks = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
            if unpacks or sum(entry.file_size for entry in entries) > path.stat().st_size:
                raise WeightsError(
                    f"{path} was not opened: it is packed, and could unpack to any size. Unpack it first."
                )
            pickles = [entry for entry in entries if entry.filename.endswith("data.pkl")]
            if sum(entry.file_size for entry in pickles) > _LARGEST_INDEX:
                raise WeightsError(f"{path} was not opened: it describes its tensors in far too many words.")
            described = b"".join(archive.read(entry) for entry in pickles)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError) as error:
        raise WeightsError(f"{path} is cut short: a torch file whose end is missing. {AGAIN}") from error
    if any(name.endswith("/constants.pkl") or name == "constants.pkl" for name in names):
        raise WeightsError(
            f"{path} is a TorchScript archive: it holds a program, not only weights. Get the plain checkpoint, or save "
            "one: torch.save(model.state_dict(), …)."
        )
    if not any(name.endswith("data.pkl") for name in names):
        raise WeightsError(f"{path} is a zip archive without a torch checkpoint inside. Unpack it first.")
    _refuse_bombs(path, described)
    return _torch_load(path, mmap=True)


def _refuse_bombs(path: Path, pickles: bytes) -> None:
    """Refuse pickles that ask for memory or time without measure by means that run no code, so that torch allows them:
    `bytearray(10**12)`, a codec whose time grows with the square of the text, marks without end."""
    named = b"bytearray" in pickles or (b"_codecs" in pickles and (b"punycode" in pickles or b"idna" in pickles))
    operations = 0
    if not named and len(pickles) > _MOST_OPERATIONS:
        with contextlib.suppress(Exception):  # damaged: said when it is loaded
            operations = sum(1 for _ in itertools.islice(pickletools.genops(pickles), _MOST_OPERATIONS + 1))
    if named or operations > _MOST_OPERATIONS:
        raise WeightsError(
            f"{path} was not opened: it is a pickle that asks for memory or time without measure. Weights need none "
            "of that."
        )


def _leading_pickles(path: Path) -> bytes:
    """The pickles at the start of a file from before torch 1.6 (its head, its content, its keys), or of a bare pickle.

    Raises WeightsError when they do not end within bounds.
    """
    with open(path, "rb") as stream:
        try:
            for _ in range(5):
                start = stream.tell()
                if not stream.read(1):
                    break
                stream.seek(start)
                for number, _ in enumerate(pickletools.genops(stream)):
                    if number > _MOST_OPERATIONS or stream.tell() > _LARGEST_INDEX:
                        raise WeightsError(f"{path} was not opened: it describes its tensors in far too many words.")
            end = stream.tell()
        except (ValueError, IndexError, UnicodeDecodeError, OverflowError, MemoryError) as error:
            raise WeightsError(f"{path} is cut short or damaged, or not a torch checkpoint. {AGAIN}") from error
        stream.seek(0)
        return stream.read(end)


def _torch_load(path: Path, *, mmap: bool) -> Any:
    try:
        with torch.serialization.safe_globals(_harmless_globals()), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about pickle protocols: what is refused is said below
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        name = refused[1] if refused else _foreign_global(path)
        if name:
            raise WeightsError(
                f"{path} was not opened: it is a pickle that would run code (it asks for {name}). "
                "Weights need none of that. If you trust where it came from, save only its tensors there: "
                "torch.save(model.state_dict(), …)."
            ) from error
        raise WeightsError(f"{path} is cut short or damaged, or not a torch checkpoint. {AGAIN}") from error
    # Besides its own, what Python raises for operations that do not fit each other or their values.
    except Exception as error:
        raise WeightsError(f"{path} is cut short or damaged ({_first_line(error)}). {AGAIN}") from error


def _harmless_globals() -> list[Any]:
    """What published files hold besides tensors and is only data.

    `Namespace`: the options of the training (RETFound, VisionFM). NumPy scalars: a best score (VisionFM's fine-tuned
    files); `scalar` builds a number from its bytes, under the module's old and new name.
    """
    dtypes = [type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64, np.bool_)]
    scalar = np.float64(0).__reduce__()[0]  # the function itself: its module is private and has moved
    named = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    return [argparse.Namespace, np.dtype, *dtypes, *named]


def _foreign_global(path: Path) -> str | None:
    """The first name that a bare pickle would import from outside torch, read without running it; None if none."""
    strings: list[str] = []
    try:
        with open(path, "rb") as stream:
            for operation, argument, _ in pickletools.genops(stream):
                name = None
                if operation.name == "GLOBAL":
                    name = str(argument).replace(" ", ".")
                elif operation.name == "STACK_GLOBAL":
                    name = ".".join(strings[-2:])
                elif isinstance(argument, str):
                    strings.append(argument)
                if name and name.partition(".")[0] not in ("torch", "collections"):
                    return name
    except (ValueError, OSError, IndexError, UnicodeDecodeError):
        return None
    return None


def _open_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    size = path.stat().st_size
    with open(path, "rb") as stream:
        header = int.from_bytes(stream.read(8), "little")
    if header > size - 8:
        raise WeightsError(f"{path} is cut short: its header alone should be {header} bytes. {AGAIN}")
    try:
        with safe_open(path, framework="pt", device="cpu") as archive:
            return {key: archive.get_tensor(key) for key in archive.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise WeightsError(f"{path} is cut short or damaged ({_first_line(error)}). {AGAIN}") from error


def _find_containers(
    content: Mapping[str, Any], path: str, seen: set[int], depth: int = 0
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(dotted path, tensors) of every mapping that holds tensors under names; optimizer state has none."""
    if id(content) in seen:  # a small file may hold one mapping a million times
        return
    seen.add(id(content))
    here = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, torch.Tensor)}
    if here:
        yield path, here
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, Mapping) and depth < 2 and not _TRAINING_STATE.match(key):
            yield from _find_containers(value, f"{path}.{key}" if path else key, seen, depth + 1)


_TRAINING_STATE = re.compile(r"optim|sched|scaler|lr_|loss|amp|args|config|hyper|callbacks|loops", re.IGNORECASE)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
