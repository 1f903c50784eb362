"""Checkpoints: opened without executing anything, matched key by key, and loaded whole or not at all."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from eyetune import files
from eyetune.backbones.spec import BackboneSpec
from eyetune.errors import WeightsError, listing

_ZIP, _PICKLE, _GIT_LFS = b"PK\x03\x04", b"\x80", b"version https://git-lfs"
_HEAD_BYTES = 4096
_LARGEST_INDEX = 10_000_000
"""Bytes of what describes the tensors, the pickle or the header of safetensors: a thousand tensors take 200,000. Larger
ones would take minutes to work through."""
_MOST_OPERATIONS = 1_000_000
_POSITION = "pos_embed"


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


@dataclass(frozen=True)
class LoadReport:
    """What became of every key of a checkpoint, and where every tensor of the network came from.

    Args:
        checkpoint: the file.
        sha256: of the file.
        family: the backbone it was loaded into.
        format: how the file is written.
        container: the mapping inside the file that was read; `""` when the keys lie flat.
        stored_as: dtypes of the tensors read.
        loaded: (checkpoint key, network name) taken as they are.
        converted: (checkpoint key, what was done) taken after a change, such as a resized position embedding.
        dropped: (checkpoint key, why) deliberately left out.
        unexplained: checkpoint keys without a place or a reason: empty after a successful load.
        mismatched: (checkpoint key, the two shapes): empty after a successful load.
        left_initial: (network name, why) that the file does not bring, and need not.
        missing: network names that the file should have brought: empty after a successful load.
    """

    checkpoint: str
    sha256: str
    family: str
    format: str
    container: str
    stored_as: tuple[str, ...] = ()
    loaded: tuple[tuple[str, str], ...] = ()
    converted: tuple[tuple[str, str], ...] = ()
    dropped: tuple[tuple[str, str], ...] = ()
    unexplained: tuple[str, ...] = ()
    mismatched: tuple[tuple[str, str], ...] = ()
    left_initial: tuple[tuple[str, str], ...] = ()
    missing: tuple[str, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether everything is explained and nothing of the network is left out."""
        return not (self.unexplained or self.mismatched or self.missing) and bool(self.loaded or self.converted)

    @property
    def matched(self) -> int:
        """Number of network tensors the file brings."""
        return len(self.loaded) + len(self.converted)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, for `load_report.json`."""
        pairs = ("loaded", "converted", "dropped", "mismatched", "left_initial")
        return {
            "checkpoint": self.checkpoint,
            "sha256": self.sha256,
            "family": self.family,
            "format": self.format,
            "container": self.container,
            "stored_as": list(self.stored_as),
            "counts": {name: len(getattr(self, name)) for name in (*pairs, "unexplained", "missing")},
            **{name: dict(getattr(self, name)) for name in pairs},
            "unexplained": list(self.unexplained),
            "missing": list(self.missing),
        }

    def summary(self) -> str:
        """A few lines for a person."""
        inside = f", under {self.container!r}" if self.container else ""
        lines = [f"{Path(self.checkpoint).name} ({self.format}{inside}) -> {self.family}"]
        wanted = self.matched + len(self.mismatched) + len(self.missing)
        lines.append(f"  loaded        {self.matched} of {wanted} tensors ({', '.join(self.stored_as) or 'none'})")
        lines += [f"  converted     {key}: {how}" for key, how in self.converted]
        lines += [f"  dropped       {what}" for what in _by_reason(self.dropped)]
        lines += [f"  left initial  {what}" for what in _by_reason(self.left_initial)]
        lines += self._faults()
        return "\n".join(lines)

    def faults(self) -> str:
        """Everything that keeps the file from loading whole, with the names; empty when nothing does."""
        return "\n".join(self._faults(limit=8))

    def _faults(self, limit: int = 3) -> list[str]:
        lines = []
        for what, names in (
            ("keys without a place in the network", self.unexplained),
            ("shapes that differ", [f"{key}: {shapes}" for key, shapes in self.mismatched]),
            ("network tensors the file does not bring", self.missing),
        ):
            if names:
                lines.append(f"  {len(names)} {what}:\n" + _indented(listing(names, limit)))
        return lines


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
        raise WeightsError(f"{path} is not a checkpoint: neither a torch file nor safetensors. {_AGAIN}")
    if isinstance(content, torch.Tensor) or not isinstance(content, Mapping):
        raise WeightsError(
            f"{path} holds a {type(content).__name__}, not a checkpoint. Save the state_dict: "
            "torch.save(model.state_dict(), …)."
        )
    return Checkpoint(path, kind, content, files.sha256(path))


_AGAIN = "Download it again, and compare its size with the publisher's."


def _refuse_impostors(path: Path, head: bytes) -> None:
    """Raise WeightsError for what is often saved under a checkpoint's name."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        raise WeightsError(f"{path} is empty (0 bytes): the download did not happen. {_AGAIN}")
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
        raise WeightsError(f"{path} is JSON text, not weights. {_AGAIN}")


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
        raise WeightsError(f"{path} is cut short: a torch file whose end is missing. {_AGAIN}") from error
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
            raise WeightsError(f"{path} is cut short or damaged, or not a torch checkpoint. {_AGAIN}") from error
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
        raise WeightsError(f"{path} is cut short or damaged, or not a torch checkpoint. {_AGAIN}") from error
    # Besides its own, what Python raises for operations that do not fit each other or their values.
    except Exception as error:
        raise WeightsError(f"{path} is cut short or damaged ({_first_line(error)}). {_AGAIN}") from error


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
        raise WeightsError(f"{path} is cut short: its header alone should be {header} bytes. {_AGAIN}")
    try:
        with safe_open(path, framework="pt", device="cpu") as archive:
            return {key: archive.get_tensor(key) for key in archive.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise WeightsError(f"{path} is cut short or damaged ({_first_line(error)}). {_AGAIN}") from error


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


@dataclass(frozen=True)
class _Step:
    """One tensor on its way: checkpoint key -> network name."""

    key: str
    name: str
    transpose: bool = False
    grid: tuple[int, int] | None = None
    done: str = ""


@dataclass
class LoadPlan:
    """How one container of a checkpoint would load into one network: :func:`plan` makes it, :func:`fill` does it."""

    container: str
    report: LoadReport
    steps: list[_Step]


class _WithoutNumbers(TorchFunctionMode):
    """Leaves out what initialises tensors in place where these have no memory: deriving what would come of it takes
    longer than all the rest of building a network."""

    CALLS = ("uniform_", "normal_", "trunc_normal_", "erfinv_", "clamp_", "mul_", "add_", "div_", "fill_", "zero_")

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if args and getattr(func, "__name__", "") in self.CALLS and isinstance(args[0], Tensor) and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


def empty_network(spec: BackboneSpec, pixels: int, pool: str) -> nn.Module:
    """The network without memory for its parameters (meta device), where it can be filled entirely from a file.

    Building it there saves initialising hundreds of millions of numbers only to overwrite them.
    """
    with torch.device("meta"), _WithoutNumbers():
        network = spec.build(pixels, pool)
    computed = {name for name, _ in network.named_buffers()} - set(network.state_dict())
    return spec.build(pixels, pool) if computed else network


def plan(spec: BackboneSpec, network: nn.Module, checkpoint: Checkpoint) -> LoadPlan:
    """Match every key of `checkpoint` with `network` (which may lie on the meta device); nothing is read or copied.

    Of several containers the one that brings most is taken; of equals, the first in the family's own order.
    """
    containers = checkpoint.containers()
    order = {name: rank for rank, name in enumerate(("", *spec.layout.containers))}
    plans = [_plan_container(spec, network, checkpoint, path, tensors) for path, tensors in containers.items()]
    if not plans:
        raise WeightsError(f"{checkpoint.path} holds no named tensors: {_contents(checkpoint.content)}.")
    best = min(plans, key=lambda p: (-p.report.matched, order.get(p.container.rpartition(".")[2], len(order))))
    others = tuple(
        (path or "(flat)", f"weights are read from {best.container!r}") for path in containers if path != best.container
    )
    state = tuple(
        (str(key), "not weights: state or options of the earlier training")
        for key, value in checkpoint.content.items()
        if not isinstance(value, torch.Tensor) and not any(p == key or p.startswith(f"{key}.") for p in containers)
    )
    dropped = best.report.dropped + others + state
    return LoadPlan(best.container, replace(best.report, dropped=dropped), best.steps)


def _plan_container(
    spec: BackboneSpec, network: nn.Module, checkpoint: Checkpoint, container: str, tensors: Mapping[str, Tensor]
) -> LoadPlan:
    layout, expected = spec.layout, network.state_dict()
    steps: dict[str, _Step] = {}
    dropped, unexplained, mismatched = [], [], []
    for key, tensor in tensors.items():
        name = key if key in expected else layout.target(key)
        if name in steps:  # a second key for the same place: neither can be trusted
            unexplained.append(key)
        elif name in expected:
            step = _step(spec, network, key, tensor, name=name, wanted=tuple(expected[name].shape))
            if step is None:
                shapes = f"{_text(tensor.shape)} in the file, {_text(expected[name].shape)} in the network"
                mismatched.append((key, shapes))
            else:
                steps[name] = step
        elif reason := layout.why_dropped(key):
            dropped.append((key, reason))
        else:
            unexplained.append(key)
    wrong = {key if key in expected else layout.target(key) for key, _ in mismatched}
    absent = [name for name in expected if name not in steps and name not in wrong]
    report = LoadReport(
        checkpoint=str(checkpoint.path),
        sha256=checkpoint.sha256,
        family=spec.name,
        format=checkpoint.format,
        container=container,
        stored_as=tuple(sorted({str(tensors[s.key].dtype).removeprefix("torch.") for s in steps.values()})),
        loaded=tuple((s.key, s.name) for s in steps.values() if not s.done),
        converted=tuple((s.key, s.done) for s in steps.values() if s.done),
        dropped=tuple(dropped),
        unexplained=tuple(unexplained),
        mismatched=tuple(mismatched),
        left_initial=tuple((name, reason) for name in absent if (reason := layout.why_fresh(name))),
        missing=tuple(name for name in absent if not layout.why_fresh(name)),
    )
    return LoadPlan(container, report, list(steps.values()))


def _step(
    spec: BackboneSpec, network: nn.Module, key: str, tensor: Tensor, *, name: str, wanted: tuple[int, ...]
) -> _Step | None:
    """How `tensor` becomes the network's `name` of shape `wanted`, or None when it cannot."""
    transpose = name in spec.layout.transpose and tensor.ndim == 2 and tuple(tensor.shape) != wanted
    shape = tuple(reversed(tensor.shape)) if transpose else tuple(tensor.shape)
    if shape == wanted:
        return _Step(key, name, transpose, None, "transposed" if transpose else "")
    if _bare(shape) == _bare(wanted):
        return _Step(key, name, transpose, None, f"shape {_text(tensor.shape)} → {_text(wanted)}")
    grid = getattr(getattr(network, "patch_embed", None), "grid_size", None)
    if name != _POSITION or grid is None or len(_bare(shape)) != 2 or shape[-1] != wanted[-1]:
        return None
    prefix = _embedded_prefix(network)
    side = math.isqrt(max(0, shape[-2] - prefix))
    if side * side != shape[-2] - prefix or grid[0] * grid[1] != wanted[-2] - prefix:
        return None
    return _Step(key, name, transpose, grid, f"resized from {side}×{side} to {_text(grid)} patches, bicubic")


def _embedded_prefix(network: nn.Module) -> int:
    """How many entries of the position table belong to CLS and register tokens rather than patches."""
    return 0 if getattr(network, "no_embed_class", False) else int(getattr(network, "num_prefix_tokens", 0))


def resize_position_embedding(table: Tensor, grid: tuple[int, int], prefix: int) -> Tensor:
    """Bicubic (align_corners=False, no antialiasing), as the RETFound and DINOv2 code does; `prefix` entries stay.

    Computed in float64 and rounded once: the result, and so the fingerprint, then does not depend on which vector
    instructions a machine has.

    Args:
        table: float[1, prefix + side * side, width].
        grid: (rows, columns) of patches wanted.
        prefix: leading entries that belong to no patch.

    Returns:
        float32[1, prefix + rows * columns, width].
    """
    side = math.isqrt(table.shape[1] - prefix)
    patches = table[:, prefix:].double().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    patches = nn.functional.interpolate(patches, size=grid, mode="bicubic", align_corners=False)
    return torch.cat([table[:, :prefix].double(), patches.flatten(2).transpose(1, 2)], dim=1).float()


def fill(network: nn.Module, made: LoadPlan, checkpoint: Checkpoint) -> None:
    """Copy the planned tensors into `network`, in place.

    Raises:
        WeightsError: a tensor holds NaN or infinity, or a whole weight matrix is zero (an interrupted download).
    """
    tensors, targets = checkpoint.containers()[made.container], network.state_dict()
    prefix = _embedded_prefix(network)
    damaged = []
    with torch.no_grad():
        for step in made.steps:
            tensor, target = tensors[step.key], targets[step.name]
            tensor = tensor.T if step.transpose else tensor
            if step.grid:
                tensor = resize_position_embedding(tensor.reshape(1, *tensor.shape[-2:]), step.grid, prefix)
            target.copy_(tensor.reshape(target.shape))
            if target.is_floating_point() and not torch.isfinite(target).all():
                damaged.append(f"{step.key}: NaN or infinity")
            elif target.is_floating_point() and target.ndim == 2 and not target.any():
                damaged.append(f"{step.key}: zero throughout")
    if damaged:
        raise WeightsError(
            f"{checkpoint.path} is damaged: {len(damaged)} tensors are not usable.\n{listing(damaged)}\n{_AGAIN}"
        )


def _contents(content: Mapping[str, Any]) -> str:
    return "it holds " + (", ".join(str(key) for key in list(content)[:8]) or "nothing")


def _text(shape: Iterable[int]) -> str:
    return "×".join(str(n) for n in shape) or "scalar"


def _bare(shape: tuple[int, ...]) -> tuple[int, ...]:
    """`shape` without leading ones."""
    first = next((i for i, n in enumerate(shape) if n != 1), len(shape))
    return shape[first:]


def _by_reason(pairs: Iterable[tuple[str, str]]) -> list[str]:
    """One line a reason: the first name, how many more, and the reason."""
    reasons: dict[str, list[str]] = {}
    for name, reason in pairs:
        reasons.setdefault(reason, []).append(name)
    return [
        f"{names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}: {reason}" for reason, names in reasons.items()
    ]


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
