"""The Backbone: a network that turns photographs into features, and what is needed to adapt it."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from eyetune.backbones.spec import BACKBONES, BackboneSpec, Preprocess
from eyetune.errors import UserError

if TYPE_CHECKING:
    from eyetune.backbones.weights import LoadReport

__all__ = ["BACKBONES", "Backbone", "BackboneSpec", "LayerGroup", "Preprocess"]


@dataclass(frozen=True)
class LayerGroup:
    """A run of parameters that are frozen, released and given a learning rate together.

    Args:
        name: `embeddings`, `blocks.3`, `layer4.1`, `norm`, …
        parameters: (name inside the network, parameter), in the network's order.
        kind: `stem` (embeddings, first convolutions), `block` (one residual or transformer block), or `tail` (final
            norm, last convolution, projection).
    """

    name: str
    parameters: tuple[tuple[str, nn.Parameter], ...]
    kind: Literal["stem", "block", "tail"]


class Backbone(nn.Module):
    """A network without a head, its preprocessing, and the report of how its weights arrived.

    Args:
        spec: the family, or what timm says of the architecture.
        network: forward takes float[B, 3, pixels, pixels], normalised, to float[B, width].
        preprocess: of the images it expects.
        pool: the pooling in force.
        width: numbers in a feature.
        report: how the weights were loaded; None for an untrained network.
    """

    def __init__(
        self,
        spec: BackboneSpec,
        network: nn.Module,
        *,
        preprocess: Preprocess,
        pool: str,
        width: int,
        report: LoadReport | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.network = network
        self.preprocess = preprocess
        self.pool = pool
        self.width = width
        self.report = report

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """float[B, 3, pixels, pixels], normalised by :attr:`preprocess` -> float[B, width].

        The result has the dtype the network computes in: float32, or the autocast dtype of its last operation.
        """
        features: torch.Tensor = self.network(images)
        return features

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """As :meth:`features`."""
        return self.features(images)

    def example(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The smallest input there is, for whoever wants to see the network at work: zeros, on the CPU."""
        return torch.zeros(1, 3, self.preprocess.pixels, self.preprocess.pixels, dtype=dtype)

    def layer_groups(self) -> list[LayerGroup]:
        """Every parameter of the network in exactly one group, input side first.

        Call it before PEFT wraps the network: wrapping renames the parameters.
        """
        return layer_groups(self.network)

    def blocks(self) -> list[nn.Module]:
        """The repeated blocks of the network, in its order: what is compiled once for all, and split block by block.
        Empty for a network that repeats nothing."""
        return _blocks(self.network)

    def fingerprint(self) -> str:
        """SHA-256 over the names, dtypes, shapes and bytes of the network's tensors, in order of name.

        It is the same whatever file or container the weights came from, and on whatever device they are.
        """
        digest = hashlib.sha256()
        for name, tensor in sorted(self.network.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def set_grad_checkpointing(self, on: bool) -> None:
        """Recompute activations in the backward pass instead of keeping them. Raises UserError if it cannot."""
        switch = getattr(self.network, "set_grad_checkpointing", None)
        try:
            if switch is None:
                raise AssertionError
            switch(enable=on)
        except AssertionError as error:
            if on:
                raise UserError(
                    f"{self.spec.name} cannot recompute its activations. Leave gradient checkpointing off, "
                    "or use a smaller batch with more accumulation."
                ) from error

    def extra_repr(self) -> str:
        """What `print(backbone)` says before the network."""
        return f"{self.spec.name}, pool={self.pool}, width={self.width}, pixels={self.preprocess.pixels}"


def _blocks(module: nn.Module) -> list[nn.Module]:
    """The children of sequences of two or more modules of one class with layers of their own; the innermost such."""
    children = list(module.children())
    inner = [block for child in children for block in _blocks(child)]
    if inner or not isinstance(module, nn.Sequential | nn.ModuleList) or len(children) < 2:
        return inner
    alike = len({type(child) for child in children}) == 1
    return children if alike and all(any(child.children()) for child in children) else []


def layer_groups(network: nn.Module) -> list[LayerGroup]:
    """The ordered partition behind :meth:`Backbone.layer_groups`.

    timm's own `group_matcher` says which parameters belong to which depth. Its final norm, which it folds into the
    last block, is a group of its own here. Where timm says nothing, the network's children are the groups.
    """
    parameters = dict(network.named_parameters())
    depths = _timm_depths(network, list(parameters)) or _depths_by_children(network, list(parameters))
    order = {name: position for position, name in enumerate(parameters)}
    groups = []
    for kind, name, members in depths:
        names = sorted(members, key=order.__getitem__)
        groups.append(LayerGroup(name or _name(kind, names), tuple((n, parameters[n]) for n in names), kind))
    return groups


_Depth = tuple[Literal["stem", "block", "tail"], str, list[str]]
_WITH_PREVIOUS = 99999.0  # timm's mark for "belongs to the block before"


def _timm_depths(network: nn.Module, names: list[str]) -> list[_Depth]:
    """(kind, name, parameter names) by timm's patterns, input side first; empty when timm has no usable patterns.

    A pattern is a regular expression whose numbers are the depth, and a suffix that refines it.
    """
    matcher = getattr(network, "group_matcher", None)
    try:
        patterns = matcher(coarse=False) if matcher else None
    except (NotImplementedError, AttributeError, TypeError):
        patterns = None
    if not isinstance(patterns, dict) or set(patterns) != {"stem", "blocks"}:
        return []
    stem_patterns, block_patterns = (_as_pairs(patterns[key]) for key in ("stem", "blocks"))
    stem: list[str] = []
    tail: list[str] = []
    blocks: dict[tuple[float, ...], list[str]] = {}
    block_names: dict[tuple[float, ...], str] = {}
    for name in names:
        found = next(((m, suffix) for p, suffix in block_patterns if (m := re.match(p, name))), None)
        if any(re.match(pattern, name) for pattern, _ in stem_patterns):
            stem.append(name)
        elif found is None or not any(found[0].groups()):
            tail.append(name)
        else:
            match, suffix = found
            depth = (*(float(number) for number in match.groups() if number is not None), *suffix)
            blocks.setdefault(depth, []).append(name)
            block_names[depth] = match.group(0)
    merged: list[_Depth] = []
    for depth in sorted(blocks):
        if depth[-1] == _WITH_PREVIOUS and merged:
            merged[-1][2].extend(blocks[depth])
        else:
            merged.append(("block", block_names[depth], blocks[depth]))
    if not merged:
        return []
    ends: list[_Depth] = [("stem", "", stem), ("tail", "", tail)]
    return [group for group in (ends[0], *merged, ends[1]) if group[2]]


def _as_pairs(patterns: Any) -> list[tuple[str, tuple[float, ...]]]:
    if isinstance(patterns, str):
        return [(patterns, ())]
    return [(pattern, tuple(suffix or ())) for pattern, suffix in patterns]


def _depths_by_children(network: nn.Module, names: list[str]) -> list[_Depth]:
    """What a child that is a sequence holds counts block by block; what comes before and after are stem and tail.

    Without a sequence, every child is a block.
    """
    sequences = {name for name, child in network.named_children() if isinstance(child, nn.Sequential | nn.ModuleList)}
    blocks: dict[str, list[str]] = {}
    before: list[str] = []
    after: list[str] = []
    for name in names:
        top, _, rest = name.partition(".")
        if top in sequences:
            # Whatever stood between two sequences belongs to the block before it.
            if blocks:
                blocks[next(reversed(blocks))].extend(after)
                after = []
            blocks.setdefault(f"{top}.{rest.partition('.')[0]}", []).append(name)
        elif sequences:
            (after if blocks else before).append(name)
        else:
            blocks.setdefault(top if rest else "parameters", []).append(name)
    groups: list[_Depth] = [("block", key, members) for key, members in blocks.items()]
    ends: list[_Depth] = [("stem", "", before), ("tail", "", after)]
    return [group for group in (ends[0], *groups, ends[1]) if group[2]]


def _name(kind: str, names: list[str]) -> str:
    """What to call the stem or the tail made of the parameters `names`."""
    if kind == "stem":
        return "embeddings" if any(name.startswith("patch_embed.") for name in names) else "stem"
    first = names[0].rpartition(".")[0] or names[0]
    return "norm" if "norm" in first else first
