"""What the keys of another program's checkpoint say: plain names, adapters apart, and what else stands in the file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eyetune.backbones import find_spec
from eyetune.backbones.opening import Checkpoint, open_checkpoint
from eyetune.errors import UserError, WeightsError, listing

if TYPE_CHECKING:
    from torch import Tensor

ADAPTER_CONFIG = "adapter_config.json"

_WRAPPERS = ("module.", "_orig_mod.", "base_model.model.", "base_model.", "backbone.", "model.", "encoder.", "network.")
HEAD = re.compile(r"(?:head|fc|classifier|classification_head|cls_head|linear)(?:\.|$)")
_LORA = re.compile(r"(.+)\.lora_([AB])(?:\.[^.]+)?(?:\.weight)?$")
_CONTAINERS = ("model", "state_dict", "model_state_dict", "net", "network", "lora_state_dict", "adapters", "")
_BEFORE_PEFT = "the head as it was before training, which PEFT keeps beside the trained one"


@dataclass
class Parts:
    """The tensors of a file by what they are.

    Args:
        file, checkpoint, container: where they came from.
        said: plain values that stand beside them, by name.
        body: plain name -> tensor of the backbone or the head.
        lora: layer -> {"A": float[r, in], "B": float[out, r]}.
        keys, lora_keys: plain name -> key in the file.
        dropped: (key, why).
    """

    file: Path
    checkpoint: Checkpoint
    container: str
    said: Mapping[str, Any]
    body: dict[str, Tensor] = field(default_factory=dict)
    lora: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    lora_keys: dict[str, str] = field(default_factory=dict)
    dropped: list[tuple[str, str]] = field(default_factory=list)


def read_parts(path: Path) -> Parts:
    """Open a checkpoint file, or a folder that PEFT wrote, and sort its tensors.

    Raises WeightsError when it cannot be opened safely, two keys mean the same tensor, or an adapter is not whole.
    """
    file = _file_of(path)
    checkpoint = open_checkpoint(file)
    container, tensors = main_container(checkpoint)
    parts = Parts(file, checkpoint, container, dict(_said(checkpoint.content)) | _peft_config(file))
    parts.dropped += [
        (one or "(flat)", f"weights are read from {container!r}") for one in checkpoint.containers() if one != container
    ]
    _sort(parts, tensors)
    return parts


def _file_of(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (path / name).is_file():
            return path / name
    raise WeightsError(f"{path} has an {ADAPTER_CONFIG}, but no adapter_model.safetensors beside it.")


def _peft_config(file: Path) -> dict[str, Any]:
    """What PEFT wrote beside an adapter; empty when there is nothing."""
    path = file.with_name(ADAPTER_CONFIG)
    if not (file.name.startswith("adapter_model") and path.is_file()):
        return {}
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} is damaged ({error}).") from error
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path} is not the configuration of an adapter.")
    if content.get("use_dora") or content.get("use_rslora"):
        raise WeightsError(f"{path}: adapters with DoRA or rsLoRA are not read. Merge them where they were made.")
    return dict(content)


def _said(content: Any, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Plain values a file holds beside its tensors, by their last name: options of the training, a variant."""
    if isinstance(content, Mapping):
        items = dict(content)
    else:
        items = dict(vars(content)) if hasattr(content, "__dict__") else {}
    for key, value in items.items():
        words = isinstance(value, (list, tuple)) and bool(value) and all(isinstance(one, str) for one in value)
        index = str(key) == "class_to_idx" and isinstance(value, Mapping)
        if words or index or isinstance(value, (str, int, float, bool)):
            yield str(key), value
        elif depth < 3 and not hasattr(value, "shape"):
            yield from _said(value, depth + 1)


def named(said: Mapping[str, Any]) -> str | None:
    """The backbone that the file names, where the name is one that is known."""
    for key in ("variant", "model_variant", "backbone", "model_name", "arch", "architecture"):
        value = said.get(key)
        if isinstance(value, str):
            try:
                return find_spec(value).name
            except UserError:
                continue
    return None


def class_names(said: Mapping[str, Any], count: int) -> tuple[str, ...] | None:
    for key in ("class_names", "classes", "labels"):
        value = said.get(key)
        if isinstance(value, (list, tuple)) and len(value) == count and len(set(value)) == count and "" not in value:
            return tuple(value)
    index = said.get("class_to_idx")
    if isinstance(index, Mapping) and sorted(map(str, index.values())) == sorted(map(str, range(count))):
        return tuple(str(name) for name, _ in sorted(index.items(), key=lambda pair: int(pair[1])))
    return None


def main_container(checkpoint: Checkpoint) -> tuple[str, dict[str, Tensor]]:
    """The mapping with the most tensors; of equals the one with the more usual name."""
    found = checkpoint.containers()
    if not found:
        raise WeightsError(f"{checkpoint.path} holds no named tensors.")
    rank = {name: place for place, name in enumerate(_CONTAINERS)}
    name = min(found, key=lambda one: (-len(found[one]), rank.get(one, len(rank))))
    return name, found[name]


def _sort(parts: Parts, tensors: Mapping[str, Tensor]) -> None:
    """Every tensor under its plain name, adapters apart. Raises WeightsError where two keys mean the same."""
    file = parts.file
    twice = []
    for key, tensor in tensors.items():
        if ".original_module." in key:
            parts.dropped.append((key, _BEFORE_PEFT))
            continue
        name = plain_name(key)
        if match := _LORA.match(name):
            layer, side = match.groups()
            if side in parts.lora.setdefault(layer, {}):
                twice.append(key)
            parts.lora[layer][side] = tensor
            parts.lora_keys[f"{layer}.lora_{side}"] = key
        elif "lora_" in name:
            raise WeightsError(f"{file}: {key} belongs to a kind of adapter that is not read (DoRA, embeddings).")
        elif name in parts.keys:
            twice.append(key)
        else:
            parts.body[name], parts.keys[name] = tensor, key
    if twice:
        raise WeightsError(f"{file}: {len(twice)} keys mean a tensor that another key means too:\n{listing(twice)}")
    halves = [layer for layer, pair in parts.lora.items() if set(pair) != {"A", "B"}]
    ranks = {int(pair["A"].shape[0]) for pair in parts.lora.values() if "A" in pair}
    if halves or len(ranks) > 1:
        what = f"half an adapter:\n{listing(halves)}" if halves else f"adapters of several ranks: {sorted(ranks)}"
        raise WeightsError(f"{file} holds {what}.")


def plain_name(key: str) -> str:
    """The name of a tensor without what wrappers (PEFT, DataParallel, a classifier around it) put before it."""
    key = key.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".").replace(".modules_to_save.", ".")
    while prefix := next((one for one in _WRAPPERS if key.startswith(one) and len(key) > len(one)), None):
        key = key[len(prefix) :]
    return key
