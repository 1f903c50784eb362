"""Checkpoints matched with networks key by key, and loaded whole or not at all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from eyetune.backbones.opening import AGAIN, Checkpoint
from eyetune.backbones.spec import BackboneSpec
from eyetune.errors import WeightsError, listing

_POSITION = "pos_embed"


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
            f"{checkpoint.path} is damaged: {len(damaged)} tensors are not usable.\n{listing(damaged)}\n{AGAIN}"
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
