"""Rate groups to AdamW and a schedule, with the real learning rate in every group.

timm labels groups with `lr_scale`, which only its own schedulers apply; with a torch scheduler every rate then stays
equal. Here the rate itself is in the group: `group["lr"] = train.lr * scale * factor(step)`, always.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from eyetune.runtime import alike, whole

if TYPE_CHECKING:
    from eyetune.adapt.strategy import RateGroup
    from eyetune.config import LoopConfig

#: Reduce-on-plateau: after this many epochs in a row without a better metric, the rate is multiplied by the factor.
PLATEAU_EPOCHS = 2
PLATEAU_FACTOR = 0.5

#: What AdamW keeps of every parameter it has moved.
_ENTRIES = ("step", "exp_avg", "exp_avg_sq")


def build_optimizer(groups: Sequence[RateGroup], lr: float, weight_decay: float) -> AdamW:
    """AdamW over `groups`: rate `lr * scale` each, weight decay (decoupled) where the group asks for it.

    Each parameter group also holds `name` (unique), `base_lr` (`lr * scale`) and `scale`. One fused kernel a group on
    CPU, CUDA and MPS for floating-point parameters.

    Raises ValueError when a parameter stands in two groups, does not require a gradient, or no group has any.
    """
    seen: set[int] = set()
    names: Counter[str] = Counter()
    built: list[dict[str, Any]] = []
    for group in groups:
        if not group.parameters:
            continue
        for parameter in group.parameters:
            if id(parameter) in seen:
                raise ValueError(f"a parameter of group {group.name!r} stands in two groups")
            if not parameter.requires_grad:
                raise ValueError(f"a parameter of group {group.name!r} is frozen")
            seen.add(id(parameter))
        names[group.name] += 1
        name = group.name if names[group.name] == 1 else f"{group.name}#{names[group.name]}"
        rate = lr * group.scale
        built.append(
            {
                "params": list(group.parameters),
                "lr": rate,
                "base_lr": rate,
                "scale": group.scale,
                "name": name,
                "weight_decay": weight_decay if group.decay else 0.0,
            }
        )
    if not built:
        raise ValueError("nothing to train: the strategy gave no parameters")
    parameters = [parameter for group in built for parameter in group["params"]]
    return AdamW(built, lr=lr, fused=all(_fusible(parameter) for parameter in parameters))


def rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The actual learning rate of every group, by the group's name."""
    return {group["name"]: float(group["lr"]) for group in optimizer.param_groups}


def layer_rates(rates: Mapping[str, float]) -> dict[str, float]:
    """The rates of :func:`rates`, one a layer: a layer's groups with and without weight decay have the same rate."""
    return {name.removesuffix(" (no decay)"): rate for name, rate in rates.items()}


def carry_over(old: torch.optim.Optimizer, new: torch.optim.Optimizer) -> int:
    """Give `new` the state (moments and step counts) of every parameter that `old` trained, by identity.

    Returns how many parameters kept their state; the others start fresh.
    """
    kept = 0
    for group in new.param_groups:
        for parameter in group["params"]:
            if parameter in old.state:
                new.state[parameter] = old.state[parameter]
                kept += 1
    return kept


class Schedule:
    """Sets every group's rate, before each optimizer step, to `base_lr` times one common factor.

    - Warm-up: over the first `warmup_steps` steps the factor rises linearly, 1/w, 2/w, … 1.
    - "cosine": then half a cosine from 1 towards 0 (never reached: the last step still learns).
    - "constant": then 1.
    - "plateau": then 1, halved each time the metric has not improved for two epochs in a row; epochs in which it is
      not defined do not count.

    Args:
        optimizer: as made by :func:`build_optimizer`; replace it with :meth:`attach` when the groups change.
        kind: "cosine", "plateau" or "constant".
        total_steps: optimizer steps in the whole run.
        warmup_steps: of these, how many warm up.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, kind: str, total_steps: int, warmup_steps: int) -> None:
        if kind not in ("cosine", "plateau", "constant"):
            raise ValueError(f"unknown schedule {kind!r}")
        self.kind = kind
        self.total_steps = total_steps
        self.warmup_steps = warmup_steps
        self.step_number = 0
        self.scale = 1.0
        self.best = -math.inf
        self.waited = 0
        self.attach(optimizer)

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Steer `optimizer` from now on (its groups get the rate of the coming step)."""
        self.optimizer = optimizer
        self._apply()

    def factor(self, step: int) -> float:
        """The common factor of optimizer step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.scale * (step + 1) / self.warmup_steps
        if self.kind != "cosine":
            return self.scale
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))

    def advance(self) -> None:
        """After an optimizer step: set the rates of the next."""
        self.step_number += 1
        self._apply()

    def end_epoch(self, metric: float | None) -> None:
        """After validation: on a plateau (higher `metric` is better; None and NaN change nothing) lower the rates."""
        if self.kind != "plateau" or self.step_number < self.warmup_steps:
            return
        if metric is None or math.isnan(metric):
            return
        if metric > self.best:
            self.best, self.waited = metric, 0
            return
        self.waited += 1
        if self.waited >= PLATEAU_EPOCHS:
            self.scale, self.waited = self.scale * PLATEAU_FACTOR, 0
            self._apply()

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON."""
        best = self.best if math.isfinite(self.best) else None
        return {"step": self.step_number, "scale": self.scale, "best": best, "waited": self.waited}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state`."""
        self.step_number = int(state["step"])
        self.scale = float(state["scale"])
        self.best = -math.inf if state["best"] is None else float(state["best"])
        self.waited = int(state["waited"])
        self._apply()

    def _apply(self) -> None:
        factor = self.factor(self.step_number)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor


def build_schedule(
    optimizer: torch.optim.Optimizer, train: LoopConfig, *, epochs: int, steps_per_epoch: int
) -> Schedule:
    """The schedule of a run of `epochs` epochs with `steps_per_epoch` optimizer steps each."""
    return Schedule(
        optimizer,
        train.schedule,
        total_steps=epochs * steps_per_epoch,
        warmup_steps=round(min(train.warmup_epochs, epochs) * steps_per_epoch),
    )


def state_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state as flat, whole tensors, `<parameter name>|<entry>`: no pickle is needed. All processes must
    ask where `model` is split over them."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}|{entry}": whole(torch.as_tensor(value).detach()).cpu().contiguous()
        for parameter, entries in optimizer.state.items()
        for entry, value in entries.items()
    }


def load_state_tensors(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Undo :func:`state_tensors`.

    Raises ValueError when a name, a shape or a type does not fit the optimizer's parameters, a value is not finite, or
    an entry of a parameter is missing.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    parameters = {names[parameter]: parameter for group in optimizer.param_groups for parameter in group["params"]}
    optimizer.state.clear()
    entries: Counter[str] = Counter()
    for key, tensor in tensors.items():
        name, _, entry = key.rpartition("|")
        if name not in parameters:
            raise ValueError(f"optimizer state for {name!r}, which is not trained")
        parameter = parameters[name]
        if entry != "step" and tensor.shape != parameter.shape:
            raise ValueError(f"optimizer state {key!r} has shape {list(tensor.shape)}, not {list(parameter.shape)}")
        if entry not in _ENTRIES or tensor.dtype != torch.float32 or not bool(tensor.isfinite().all()):
            raise ValueError(f"optimizer state {key!r} is not what AdamW keeps")
        entries[name] += 1
        # AdamW keeps the step count in float32: on the parameter's device when fused, else on the CPU.
        fused = any(group.get("fused") for group in optimizer.param_groups)
        if entry == "step":
            kept = tensor.to(parameter.device if fused else "cpu", copy=True)
        else:
            # Laid out in memory as the parameter is: the fused kernel goes through both in step.
            kept = torch.empty_like(parameter.detach())
            kept.copy_(alike(tensor, kept))
        optimizer.state[parameter][entry] = kept
    if cut := [name for name, count in entries.items() if count < len(_ENTRIES)]:
        raise ValueError(f"optimizer state of {cut[0]!r} is not whole")


def _fusible(parameter: nn.Parameter) -> bool:
    return parameter.is_floating_point() and parameter.device.type in ("cpu", "cuda", "mps")
