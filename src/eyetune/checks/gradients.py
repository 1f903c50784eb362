"""Which parameters a gradient reaches, phase by phase: the measure behind the gradient-flow plot."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from eyetune.checks.bench import Bench
from eyetune.checks.subject import phases
from eyetune.errors import UserError
from eyetune.train.optim import build_optimizer

if TYPE_CHECKING:
    from eyetune.adapt.classifier import Classifier
    from eyetune.adapt.strategy import Strategy

STEPS = 3
"""Steps watched. One is not enough: LoRA's first matrix, layer scales and the last norm of a residual block stand
behind a factor that starts at zero, and get their first gradient once it has moved."""

_MOST_TRIED = 24
"""Tensors without gradient of which it is found out, each by a forward pass, whether the output depends on them."""


@dataclass(frozen=True)
class Layer:
    """One layer group in one phase.

    Attributes:
        name: as in the strategy's groups.
        trained: numbers in it that train.
        rms: root mean square of their gradients, the largest of the steps; None when nothing trains or none came.
    """

    name: str
    trained: int
    rms: float | None


@dataclass(frozen=True)
class Flow:
    """What reached what in one phase.

    Attributes:
        phase: from 1.
        layers: input side first, the head last.
        trained: names of the trained tensors.
        frozen: how many tensors are frozen.
        faults: a line for each tensor that is not as it should be.
        unused: trained tensors without gradient that the output does not depend on.
        hint: where the gradient is lost, when that can be said.
    """

    phase: int
    layers: tuple[Layer, ...]
    trained: tuple[str, ...]
    frozen: int
    faults: tuple[str, ...]
    unused: tuple[str, ...]
    hint: str


def gradient_flow(bench: Bench, model: Classifier, strategy: Strategy) -> list[Flow]:
    """Take a few steps in every phase of a strategy and note what gets a gradient, what moves, and what does not."""
    return [_flow(bench, model, strategy, phase) for phase in phases(model, strategy)]


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The SHA-256 of the bytes of each tensor."""
    return {
        name: hashlib.sha256(
            tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()  # type: ignore[arg-type]
        ).hexdigest()
        for name, tensor in tensors.items()
    }


def _flow(bench: Bench, model: Classifier, strategy: Strategy, phase: int) -> Flow:
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    frozen = {name: parameter for name, parameter in model.named_parameters() if not parameter.requires_grad}
    head = [name for name in trained if name.startswith("head.")]
    layers = [(layer.name, tuple(p for _, p in layer.parameters)) for layer in strategy.layers(model)]
    layers.append(("head", tuple(model.head.parameters())))
    if not head:
        fault = "head: frozen, but a new head knows nothing and has to learn"
        parts = tuple(Layer(name, sum(p.numel() for p in ps if p.requires_grad), None) for name, ps in layers)
        hint = "The strategy must leave the head trainable."
        return Flow(phase, parts, tuple(trained), len(frozen), (fault,), (), hint)
    sizes: dict[str, float] = {}
    astray: dict[str, None] = {}

    def note(*_: Any) -> None:
        for name, parameter in model.named_parameters():
            if parameter.grad is None:
                continue
            if name in frozen:
                astray[name] = None
            size = float(parameter.grad.float().pow(2).mean().sqrt())
            sizes[name] = max(sizes.get(name, 0.0), size) if math.isfinite(size) else math.nan

    still = _all_frozen_tensors(model, frozen)
    before = digests({**trained, **still})
    optimizer = build_optimizer(strategy.groups(model), bench.config.learning_rate, bench.config.train.weight_decay)
    optimizer.register_step_pre_hook(note)
    try:
        bench.train(model, strategy, [bench.batch] * STEPS, lr=bench.config.learning_rate, optimizer=optimizer)
    except UserError:  # the loss is no number any more
        if all(map(math.isfinite, sizes.values())):
            raise
    after = digests({**trained, **still})
    moved = {name for name in before if before[name] != after[name]}
    silent = [name for name in trained if not sizes.get(name)]  # None and 0; NaN is no silence
    unused = _without_effect(bench, model, strategy, silent)
    lost = [name for name in silent if name not in unused]
    faults = [f"{name}: trained, gets no gradient" for name in lost]
    faults += [f"{name}: its gradient is not finite" for name in trained if math.isnan(sizes.get(name, 0.0))]
    faults += [
        f"{name}: gets a gradient, but does not move" for name in trained if sizes.get(name) and name not in moved
    ]
    faults += [f"{name}: frozen, gets a gradient" for name in astray]
    faults += [f"{name}: frozen, but it changes in training" for name in still if name in moved]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parts = tuple(_layer(name, parameters, names, sizes) for name, parameters in layers)
    return Flow(phase, parts, tuple(trained), len(frozen), tuple(faults), tuple(unused), _hint(lost, sizes, trained))


def _layer(name: str, parameters: Sequence[nn.Parameter], names: dict[int, str], sizes: dict[str, float]) -> Layer:
    training = [parameter for parameter in parameters if parameter.requires_grad]
    count = sum(parameter.numel() for parameter in training)
    squares = sum(sizes.get(names[id(p)], 0.0) ** 2 * p.numel() for p in training)
    rms = math.sqrt(squares / count) if count else 0.0
    return Layer(name, count, rms if rms > 0 else None)


def _all_frozen_tensors(model: nn.Module, frozen: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The frozen parameters, and the buffers (batch statistics) of modules all of whose parameters are frozen."""
    tensors: dict[str, Tensor] = dict(frozen)
    for path, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if own and not any(parameter.requires_grad for parameter in own):
            for name, buffer in module.named_buffers(prefix=path, recurse=False):
                tensors[name] = buffer
    return tensors


def _without_effect(bench: Bench, model: Classifier, strategy: Strategy, names: Sequence[str]) -> list[str]:
    """Those of `names` that may be anything without any change of the output: the network does not use them."""
    if not names:
        return []
    strategy.set_mode(model, False)
    images = bench.batch["image"][:2]
    parameters = dict(model.named_parameters())

    def matters(some: Sequence[str]) -> bool:
        kept = [parameters[name].clone() for name in some]
        for name in some:
            parameters[name].add_(torch.randn_like(parameters[name]))
        changed = not torch.equal(model(images), before)
        for name, values in zip(some, kept, strict=True):
            parameters[name].copy_(values)
        return changed

    with torch.no_grad():
        before = model(images)
        # All at once first: whole branches may be without effect, and a first adapter matrix is without the second.
        found = [name for name in names[:_MOST_TRIED] if not matters([name])] if matters(names) else list(names)
    strategy.set_mode(model, True)
    return found


def _hint(lost: Sequence[str], sizes: Mapping[str, float], trained: Mapping[str, nn.Parameter]) -> str:
    """Where the gradient is lost: behind the last tensor without one, seen from the input."""
    if not lost:
        return ""
    order = list(trained)
    after = [name for name in order[order.index(lost[-1]) + 1 :] if sizes.get(name)]
    where = f" between {lost[-1]} and {after[0]}" if after else f" above {lost[-1]}"
    return f"The gradient is lost{where}: look there for .detach(), .data, .item() or torch.no_grad."
