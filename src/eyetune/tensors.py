"""Tensors on disk: safetensors files, written whole with their checksum, read without running anything.

The file is written here rather than by the library's `save_file`, which writes to a temporary file of its own naming
(a killed process leaves it behind), readable by its owner alone, hides the system's error in text, and cannot tell the
checksum, so that gigabytes would be read again. The format is eight bytes with the length of a JSON header, the header,
and the tensors' bytes (https://github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eyetune.errors import RunError
from eyetune.files import atomic

if TYPE_CHECKING:
    from torch import Tensor


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write `tensors` to `path`, atomically and synced; returns its `size` in bytes and its `sha256`.

    On top of what is in memory this takes the memory of one tensor. Raises UserError, naming the path, when it cannot
    be written.
    """
    return write_chunks(path, _chunks(tensors))


def write_chunks(path: Path, chunks: Iterator[bytes | memoryview]) -> dict[str, Any]:
    """Write bytes to `path`, atomically and synced; returns their `size` and `sha256`. Raises as `files.atomic`."""
    digest, size = hashlib.sha256(), 0
    with atomic(path) as temporary, open(temporary, "wb") as stream:
        for chunk in chunks:
            stream.write(chunk)
            digest.update(chunk)
            size += len(chunk)
    return {"size": size, "sha256": digest.hexdigest()}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    The library compares the header with the size of the file before it makes room for anything: a small file that
    claims gigabytes is refused. Raises RunError when the file is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise RunError(f"{path} is missing: the checkpoint is not whole.")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise RunError(f"{path} is damaged ({error}).") from error


def _chunks(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    import torch

    kinds = {
        torch.float64: "F64",
        torch.float32: "F32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.int64: "I64",
        torch.int32: "I32",
        torch.int16: "I16",
        torch.int8: "I8",
        torch.uint8: "U8",
        torch.bool: "BOOL",
    }
    # Wide types first, as the library does: every tensor then begins at a multiple of its element's size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": kinds[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text))
    yield text
    for name in names:
        flat = tensors[name].detach().cpu().contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().data
