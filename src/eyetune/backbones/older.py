"""Checkpoints of other programs: a network with its head, or LoRA matrices, under whatever names; nothing says which.

The files that `torch.save(model.state_dict())`, `{"model": …}` and PEFT leave behind are told apart by keys and shapes.
Every key ends in the backbone, the head or the adapters, or is left out for a stated reason; anything else is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from eyetune.backbones import find_spec
from eyetune.backbones.older_keys import ADAPTER_CONFIG, HEAD, Parts, class_names, named, read_parts
from eyetune.backbones.opening import Checkpoint, open_checkpoint
from eyetune.backbones.spec import BACKBONES, BackboneSpec
from eyetune.backbones.weights import LoadReport, empty_network, plan
from eyetune.errors import WeightsError, listing

if TYPE_CHECKING:
    from torch import Tensor

ASSUMED = "retfound"
"""What a file is taken for that fits it and says nothing: the guides' `large`."""

TIMM: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "cls_token",
        (
            *("vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224", "vit_large_patch16_224"),
            *("deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224"),
        ),
    ),
    ("layer4.0.conv1.weight", ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")),
    ("bn2.weight", ("efficientnet_b0", "efficientnet_b3", "efficientnet_b7")),
    ("conv_head.bias", ("mobilenetv3_small_100", "mobilenetv3_large_100")),
    ("stages.0.blocks.0.conv_dw.weight", ("convnext_tiny",)),
    ("s1.b1.conv1.conv.weight", ("regnetx_032",)),
    ("features.conv0.weight", ("densenet121",)),
    (
        "layers.0.blocks.0.attn.relative_position_bias_table",
        ("swin_tiny_patch4_window7_224", "swin_small_patch4_window7_224", "swin_base_patch4_window7_224"),
    ),
)
"""Telltale tensor -> the timm networks that have it: what a file without a name is tried on, beside EyeTune's own."""


@dataclass(frozen=True)
class Head:
    """The layers behind the feature: an optional norm, then one linear layer.

    Args:
        weight, bias: float[K, width], float[K].
        norm: weight and bias of a LayerNorm before it, float[width] each; None without one.
        keys: (key in the file, what it became).
    """

    weight: Tensor
    bias: Tensor
    norm: tuple[Tensor, Tensor] | None
    keys: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Older:
    """A file as it was understood.

    Args:
        path: the file.
        spec, pool, pixels: the network it fits.
        body: the backbone's tensors by plain name; empty when the file holds adapters only.
        head: its head.
        adapters: layer -> (A float[r, in], B float[out, r]); empty without LoRA.
        alpha: of LoRA, where the file says it.
        classes: their names, where the file says them.
        report: what became of every key (of the backbone only, until the base of adapters is loaded).
        native: the file itself loads as the backbone's weights; else its tensors have to be written under plain names.
        assumptions: what was taken without the file saying it.
    """

    path: Path
    spec: BackboneSpec
    pool: str
    pixels: int
    body: Mapping[str, Tensor]
    head: Head
    adapters: Mapping[str, tuple[Tensor, Tensor]]
    alpha: float | None
    classes: tuple[str, ...] | None
    report: LoadReport
    native: bool
    assumptions: tuple[str, ...] = ()


def is_older(path: Path) -> bool:
    """Whether this is a checkpoint file, or a folder that PEFT wrote, rather than a run folder.

    Raises WeightsError for an exported model, which only predict and serve take.
    """
    if path.suffix.lower() == ".onnx" and path.is_file():
        raise WeightsError(f"{path} is an exported model, for predict and serve: all else needs the run folder.")
    return path.is_file() or ((path / ADAPTER_CONFIG).is_file() and not (path / "config.yaml").exists())


def read_older(
    path: Path, *, backbone: str | None = None, pool: str | None = None, base: str | Path | None = None
) -> Older:
    """Understand a checkpoint file, or a PEFT folder. Nothing in it is executed.

    Args:
        path: the file or the folder.
        backbone: the network it is of, where the file does not say and several would fit.
        pool: the pooling, likewise.
        base: the base weights, for a file of adapters.

    Raises WeightsError when the file cannot be opened safely, a key has no place or shape, no network or several fit,
    or a head or adapter is of a kind that is not known; UserError for an unknown backbone or pool.
    """
    parts = read_parts(path)
    name = backbone or named(parts.said)
    said = parts.said.get("pool")
    if pool is None and name is not None and isinstance(said, str) and said in find_spec(name).pools:
        pool = said
    alone = all(HEAD.match(key) for key in parts.body)
    if alone and not parts.lora:
        raise WeightsError(f"{parts.file} holds a head at most: no backbone and no adapters.")
    if not any(HEAD.match(key) and tensor.ndim == 2 for key, tensor in parts.body.items()):
        raise WeightsError(
            f"{parts.file} has no classification head: nothing in it tells classes apart. (A layer called head, fc, "
            "classifier or the like was looked for. For features alone: eyetune models inspect.)"
        )
    fit = _fit_adapters if alone else _fit_network
    found = fit(parts, name, pool, base)
    head = _head(parts, found)
    adapters = {layer: (pair["A"], pair["B"]) for layer, pair in parts.lora.items()}
    own = tuple((key, layer) for layer, key in parts.lora_keys.items())
    report = replace(
        found.report,
        checkpoint=str(parts.file),
        sha256=parts.checkpoint.sha256,
        container=parts.container,
        loaded=(*found.report.loaded, *head.keys, *own),
        dropped=(*found.report.dropped, *parts.dropped),
    )
    body = {key: tensor for key, tensor in parts.body.items() if key not in found.behind}
    native = bool(body) and not parts.lora and _loads_itself(found, parts.checkpoint)
    alpha = parts.said.get("lora_alpha", parts.said.get("alpha"))
    return Older(
        parts.file,
        found.spec,
        found.pool,
        found.pixels,
        body,
        head,
        adapters,
        float(alpha) if isinstance(alpha, (int, float)) and not isinstance(alpha, bool) else None,
        class_names(parts.said, len(head.weight)),
        report,
        native,
        found.assumptions,
    )


# --- which network it is ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Fit:
    """A network that the file fits; `behind` are the plain names of the tensors behind its feature."""

    spec: BackboneSpec
    pool: str
    pixels: int
    report: LoadReport
    behind: frozenset[str]
    assumptions: tuple[str, ...] = ()


def _fit_network(parts: Parts, name: str | None, pool: str | None, base: str | Path | None) -> _Fit:
    """The spec, pooling and pixels that the backbone's tensors fill whole."""
    file = parts.file
    if base is not None:
        raise WeightsError(f"{file} holds a whole network. --weights is for files of adapters alone; leave it out.")
    specs = [find_spec(name)] if name else _worth_trying(parts)
    found: dict[str, tuple[int, int, _Fit]] = {}
    nearest: LoadReport | None = None
    for spec in specs:
        for rank, one in enumerate([pool] if pool else [spec.pool, *(p for p in spec.pools if p != spec.pool)]):
            if one not in spec.pools:
                continue
            fit = _planned(parts, spec, one)
            report = fit.report
            if nearest is None or report.matched > nearest.matched:
                nearest = report
            # What was trained has every tensor: a norm that would start fresh is a norm of another pooling.
            if report.whole and not report.left_initial and _fits_head(parts, fit):
                candidate = (len(report.dropped), rank, fit)
                if spec.name not in found or candidate[:2] < found[spec.name][:2]:
                    found[spec.name] = candidate
    if not found:
        raise WeightsError(f"{file} {_no_fit(nearest, name)}")
    chosen = find_spec(name).name if name else ASSUMED if ASSUMED in found else None
    if chosen is None and len(found) > 1:
        raise WeightsError(
            f"{file} says nothing of its network, and fits {', '.join(found)}. They differ in how an image is "
            f"normalised: name it with --backbone, as in --backbone {next(iter(found))}."
        )
    fit = found[chosen or next(iter(found))][-1]
    if name:
        return fit
    said = f"the file does not say its network: {fit.spec.name} assumed, which its keys and shapes fit"
    return replace(fit, assumptions=(said,))


def _planned(parts: Parts, spec: BackboneSpec, pool: str) -> _Fit:
    """How the file's tensors would fill a network, which is built for the pixels of the file's position embedding."""
    pixels = spec.pixels
    network = empty_network(spec, pixels, pool)
    table = parts.body.get("pos_embed")
    own = getattr(network, "pos_embed", None)
    if table is not None and own is not None and table.ndim == 3 and table.shape != own.shape and spec.patch > 1:
        grid = network.patch_embed.grid_size  # type: ignore[union-attr]
        prefix = own.shape[1] - grid[0] * grid[1]  # type: ignore[index]
        side = math.isqrt(max(0, table.shape[1] - prefix))
        if side and side * side == table.shape[1] - prefix:
            pixels = side * spec.patch
            network = empty_network(spec, pixels, pool)
    expected = network.state_dict()
    behind = frozenset(key for key in parts.body if HEAD.match(key) and spec.layout.target(key) not in expected)
    opened = replace(parts.checkpoint, content={k: tensor for k, tensor in parts.body.items() if k not in behind})
    return _Fit(spec, pool, pixels, _as_in_the_file(plan(spec, network, opened).report, parts.keys), behind)


def _as_in_the_file(report: LoadReport, keys: Mapping[str, str]) -> LoadReport:
    """The report with the keys of the file in place of their plain names."""

    def renamed(pairs: Sequence[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
        return tuple((keys.get(key, key), value) for key, value in pairs)

    return replace(
        report,
        loaded=renamed(report.loaded),
        converted=renamed(report.converted),
        dropped=renamed(report.dropped),
        mismatched=renamed(report.mismatched),
        unexplained=tuple(keys.get(key, key) for key in report.unexplained),
    )


def _worth_trying(parts: Parts) -> list[BackboneSpec]:
    """EyeTune's own families, and those of :data:`TIMM` whose telltale tensor is there; the head's width must be one
    of theirs. (Building a network to compare with takes up to a second.)"""
    names = [name for telltale, alike in TIMM if telltale in parts.body for name in alike]
    specs = [*(spec for _, spec in BACKBONES), *map(find_spec, names)]
    widths = {tensor.shape[-1] for key, tensor in parts.body.items() if HEAD.match(key) and tensor.ndim == 2}
    return [spec for spec in specs if widths & set(spec.pools.values())]


def _no_fit(nearest: LoadReport | None, name: str | None) -> str:
    """Why no network was found, in the words of the one that came nearest."""
    if nearest is None or not nearest.matched:
        return "is of no network that is known: not one of its tensors is. Name its network with --backbone NAME."
    if name:
        return f"is not of {name}:\n{nearest.faults()}"
    return (
        f"is of no network that is known. It comes nearest to {nearest.family}:\n{nearest.faults()}\n"
        "If it is of another, name that with --backbone NAME."
    )


def _fits_head(parts: Parts, fit: _Fit) -> bool:
    """Whether a layer of the head starts from the feature's width."""
    widths = {parts.body[key].shape[1] for key in fit.behind if parts.body[key].ndim == 2}
    return fit.spec.pools[fit.pool] in widths


def _fit_adapters(parts: Parts, name: str | None, pool: str | None, base: str | Path | None) -> _Fit:
    """The spec whose layers the adapters fit, and the base weights load into."""
    file = parts.file
    specs = [find_spec(name)] if name else [spec for _, spec in BACKBONES]
    fitting = [spec for spec in specs if _fits_adapters(parts, spec, pool)]
    if not fitting:
        layers = [f"{layer}: {pair['A'].shape[1]} -> {pair['B'].shape[0]}" for layer, pair in parts.lora.items()]
        raise WeightsError(
            f"{file} holds adapters that fit {'no network that is known' if name is None else name}. Name the network "
            f"with --backbone NAME.\n{listing(layers)}"
        )
    if base is None:
        fitting = [spec for spec in fitting if spec.embedded is not None]
        if not fitting:
            raise WeightsError(
                f"{file} holds LoRA adapters only ({len(parts.lora)} layers). Say which base weights they were trained "
                "over: --weights models/RETFound_cfp_weights.pth."
            )
    else:
        opened = open_checkpoint(Path(base)) if base not in ("hub", "random") else None
        whole = [
            spec
            for spec in fitting
            if opened is None or plan(spec, empty_network(spec, spec.pixels, pool or spec.pool), opened).report.whole
        ]
        if not whole:
            raise WeightsError(
                f"the base weights {base} are of another network than the adapters in {file}, which fit "
                f"{', '.join(spec.name for spec in fitting)}."
            )
        fitting = whole
    spec = next((one for one in fitting if one.name == ASSUMED), fitting[0])
    said = [] if name else [f"the file does not say its network: {spec.name} assumed, which the layers and base fit"]
    if pool is None and len(spec.pools) > 1:
        said.append(f"the file does not say its pooling: {spec.pool} assumed (--pool says otherwise)")
    report = LoadReport(str(file), parts.checkpoint.sha256, spec.name, parts.checkpoint.format, "")
    return _Fit(spec, spec.check_pool(pool), spec.pixels, report, frozenset(parts.body), tuple(said))


def _fits_adapters(parts: Parts, spec: BackboneSpec, pool: str | None) -> bool:
    if pool is not None and pool not in spec.pools:
        return False
    modules = dict(empty_network(spec, spec.pixels, pool or spec.pool).named_modules())
    return all(
        getattr(getattr(modules.get(layer), "weight", None), "shape", None) == (pair["B"].shape[0], pair["A"].shape[1])
        for layer, pair in parts.lora.items()
    )


def _loads_itself(fit: _Fit, checkpoint: Checkpoint) -> bool:
    return plan(fit.spec, empty_network(fit.spec, fit.pixels, fit.pool), checkpoint).report.whole


# --- the head -----------------------------------------------------------------------------------------------------


def _head(parts: Parts, fit: _Fit) -> Head:
    """The head's layers. Raises WeightsError unless they are a linear layer, with a LayerNorm before it at most."""
    import torch

    file = parts.file
    width = fit.spec.pools[fit.pool]
    names = sorted(fit.behind)
    weights = [name for name in names if parts.body[name].ndim == 2 and name.endswith("weight")]
    vectors = [name for name in names if parts.body[name].ndim == 1]
    biases = [name for name in vectors if weights and name == f"{weights[0].removesuffix('weight')}bias"]
    norms = [name for name in vectors if name not in biases]
    shaped = [name.rpartition(".")[2] for name in norms] in ([], ["bias", "weight"]) and all(
        parts.body[name].shape == (width,) for name in norms
    )
    known = {*weights, *biases, *norms}
    if len(weights) != 1 or not shaped or known != set(names) or parts.body[weights[0]].shape[1] != width:
        shapes = [f"{parts.keys[name]}: {tuple(parts.body[name].shape)}" for name in names]
        raise WeightsError(
            f"{file}: its head is more than a LayerNorm and a linear layer from {width} numbers, which is what can be "
            f"read:\n{listing(shapes, 8)}"
        )
    weight = parts.body[weights[0]].float()
    bias = parts.body[biases[0]].float() if biases else torch.zeros(len(weight))
    keys = [(parts.keys[weights[0]], "head (linear)"), *((parts.keys[name], "head (linear)") for name in biases)]
    if len(weight) == 1:
        # softmax of (0, z) is the sigmoid of z.
        weight, bias = (torch.cat([torch.zeros_like(one), one]) for one in (weight, bias))
        keys = [(key, "head (linear): one output for yes, and 0 for no") for key, _ in keys]
    norm = None
    if norms:
        norm = parts.body[norms[1]].float(), parts.body[norms[0]].float()
        keys += [(parts.keys[name], "head (norm)") for name in norms]
    for name in known:
        if not torch.isfinite(parts.body[name]).all():
            raise WeightsError(f"{file} is damaged: {parts.keys[name]} holds NaN or infinity.")
    return Head(weight, bias, norm, tuple(keys))


def describe(older: Older, classes: Sequence[str]) -> str:
    """One line for a person: which network, which head, which adapters."""
    ranks = {a.shape[0] for a, _ in older.adapters.values()}
    adapters = f", LoRA of rank {ranks.pop()} in {len(older.adapters)} layers" if ranks else ""
    norm = "LayerNorm and linear layer" if older.head.norm else "linear layer"
    return f"{older.spec.name}, pool {older.pool}, {older.pixels} pixels{adapters}; {norm} to {len(classes)} classes"
