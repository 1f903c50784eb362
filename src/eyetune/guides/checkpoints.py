"""`scripts.utils.save_checkpoint` and `load_checkpoint`: files that say of what network they are.

`eyetune evaluate` and `eyetune predict` read them too, as checkpoints of another program (docs/evaluation.md).
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from eyetune.adapt.strategy import load_audited
from eyetune.backbones.older_keys import HEAD, main_container, plain_name
from eyetune.backbones.opening import open_checkpoint
from eyetune.errors import RunError, UserError, listing
from eyetune.files import atomic
from eyetune.guides import TICK
from eyetune.guides.network import GuideNetwork

BEST = "best_model.pth"
_MODEL, _OPTIMIZER = "model_state_dict", "optimizer_state_dict"
OLD_VARIANT = "large"
"""The variant of files from before the guides' programs wrote one."""


def save_checkpoint(
    model: nn.Module,
    optimizer: Optimizer | None,
    epoch: int,
    metrics: Mapping[str, Any],
    path: str | Path,
    *,
    is_best: bool = False,
    **more: Any,
) -> None:
    """Write a model, what it is of, and where its training stands, to one file.

    Args:
        model: its whole state goes into the file; of the guides' networks also variant, rank, classes, …
        optimizer: its state goes with it; None for none.
        epoch, metrics, more: plain values: numbers, text, lists and mappings of them, tensors.
        path: the file.
        is_best: also write it as `best_model.pth` beside `path`.

    Raises UserError for a value that only a program could read back, and when the file cannot be written.
    """
    content: dict[str, Any] = {
        "epoch": epoch,
        _MODEL: model.state_dict(),
        "metrics": dict(metrics),
        "model_class": type(model).__name__,
    }
    if isinstance(model, GuideNetwork):
        content |= model.described()
    if optimizer is not None:
        content[_OPTIMIZER] = optimizer.state_dict()
    taken = sorted(set(content) & set(more))
    if taken:
        raise UserError(f"save_checkpoint: {', '.join(taken)} is written by itself; leave it out.")
    content |= more
    path = Path(path)
    with atomic(path) as temporary, open(temporary, "wb") as stream:
        torch.save({name: _plain(value, name) for name, value in content.items()}, stream)
    print(f"{TICK} Checkpoint saved: {path}")
    if is_best:
        with atomic(path.with_name(BEST)) as temporary:
            shutil.copyfile(path, temporary)
        print(f"{TICK} Best model saved: {path.with_name(BEST)}")


def load_checkpoint(
    path: str | Path,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    map_location: Any = None,
    strict: bool = True,
) -> dict[str, Any]:
    """Load a file of :func:`save_checkpoint`, or one of the guides' programs; nothing in it is executed.

    Args:
        path: the file.
        model: takes its tensors: all of them, or none when one does not fit. On whatever device it is.
        optimizer: takes its state.
        map_location: not needed: tensors go where the model is.
        strict: must be true: what does not fit is never left out silently.

    Returns what else the file says: epoch, metrics, variant (`large` where a file of RETFound says none), ….
    Raises WeightsError when the file cannot be opened safely, RunError when it is of another model.
    """
    if not strict:
        raise UserError(
            "load_checkpoint: strict=False would leave out silently what does not fit. What fits a network, key by "
            f"key: eyetune models inspect {path}"
        )
    checkpoint = open_checkpoint(path)
    content = checkpoint.content
    container, tensors = main_container(checkpoint)
    if isinstance(model, GuideNetwork):
        other = model.differences(content)
        if other:
            raise RunError(f"the checkpoint {path} is of another model:\n{listing(other)}")
    if optimizer is not None and not isinstance(content.get(_OPTIMIZER), Mapping):
        raise RunError(f"the checkpoint {path} holds no state of an optimizer: load it without.")
    own = model.state_dict()
    if set(tensors) != set(own) and isinstance(model, GuideNetwork):
        tensors = _by_our_names(tensors, own)
    load_audited(own, tensors, f"the checkpoint {path}")
    if optimizer is not None:
        try:
            # A copy: the file's tensors lie in the file, which the next checkpoint may replace.
            optimizer.load_state_dict(copy.deepcopy(dict(content[_OPTIMIZER])))
        except (ValueError, KeyError) as error:
            raise RunError(f"the optimizer's state in {path} does not fit: {error}.") from error
    top = container.partition(".")[0]
    said = {name: value for name, value in content.items() if name not in (top, _OPTIMIZER) and not _is_tensor(value)}
    if hasattr(model, "model_variant"):
        said.setdefault("variant", OLD_VARIANT)
    print(f"{TICK} Checkpoint loaded: {path}" + (f" (epoch {said['epoch']})" if "epoch" in said else ""))
    return said


def _by_our_names(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of another program's file under our names, where one of ours means the same; else as they are."""
    ours = {_meaning(name): name for name in own}
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = ours.get(_meaning(key), key)
        found[key if name in found else name] = tensor
    return found


def _meaning(key: str) -> str:
    return HEAD.sub("head.", plain_name(key), count=1)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _plain(value: Any, where: str) -> Any:
    """The value as something that can be read back without running code. Raises UserError where it is none."""
    if value is None or isinstance(value, (bool, int, float, str, Tensor)):
        return value.detach() if isinstance(value, Tensor) else value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return {
            key if isinstance(key, (str, int)) else str(key): _plain(one, f"{where}.{key}")
            for key, one in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_plain(one, f"{where}[{number}]") for number, one in enumerate(value)]
    if isinstance(value, Path):
        return str(value)
    raise UserError(
        f"save_checkpoint: {where} is a {type(value).__name__}, which only a program could read back. Give plain "
        "values: numbers, text, tensors, lists and mappings of them."
    )
