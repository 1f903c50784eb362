"""Any timm name as a backbone. Importing this module needs neither torch nor timm."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from eyetune.backbones.spec import BACKBONES, BackboneSpec, KeyLayout, Preprocess
from eyetune.errors import UserError, WeightsError, did_you_mean

if TYPE_CHECKING:
    from torch import nn


def timm_spec(name: str) -> BackboneSpec:
    """The spec of the timm architecture `name` (with or without a pretrained tag).

    Raises:
        UserError: neither EyeTune nor timm knows the name; the nearest known one is given.
    """
    import timm

    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        known = [*BACKBONES.names(), "large", "green", *timm.list_models()]
        raise UserError(
            f"model.backbone: unknown backbone {name!r}.{did_you_mean(name, known)} "
            f"Known: {', '.join(BACKBONES.names())}, and every timm name."
        )
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        tags = timm.list_pretrained(f"{architecture}*")
        raise UserError(f"model.backbone: {name!r} has no such pretrained tag.{did_you_mean(name, tags)}") from error
    network = _on_meta(name)
    pools = _pools(network)
    pixels = config.input_size[-1] if config else 224
    return BackboneSpec(
        name=name,
        title=name,
        architecture=type(network).__name__,
        parameters=sum(p.numel() for p in network.parameters()),
        pools=dict.fromkeys(pools, int(network.head_hidden_size)),
        pool=pools[0],
        preprocess=Preprocess(pixels, tuple(config.mean), tuple(config.std)) if config else _IMAGENET_STANDARD,
        patch=_patch(network),
        licence=(config.license if config else None) or "see the timm model card",
        source=f"https://huggingface.co/timm/{name}",
        build=lambda pixels, pool: build(name, pixels, pool),
        layout=_layout(config),
        kind="timm",
    )


_IMAGENET_STANDARD = Preprocess(224, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def build(name: str, pixels: int, pool: str, *, pretrained: bool = False) -> nn.Module:
    """The headless timm network `name` for images of `pixels`: float[B, 3, pixels, pixels] -> float[B, width]."""
    import timm

    size = {"img_size": pixels} if _takes_size(name) else {}
    network: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=0, **size)
    if pool != _pools(network)[0]:
        # Set after construction: given to the constructor, timm would swap the pretrained norm for a fresh one.
        network.global_pool = {"cls": "token"}.get(pool, pool)  # type: ignore[assignment]
    return network


def _on_meta(name: str, **options: Any) -> Any:
    import timm
    import torch

    with torch.device("meta"):
        return timm.create_model(name, num_classes=0, **options)


def _takes_size(name: str) -> bool:
    """Whether the architecture is built for one input size (transformers) rather than any (most CNNs)."""
    import inspect as python

    import timm

    try:
        network = _on_meta(name)
    except (RuntimeError, NotImplementedError):
        network = timm.create_model(name, num_classes=0)
    return "img_size" in python.signature(type(network).__init__).parameters


def _pools(network: Any) -> tuple[str, ...]:
    """The poolings on offer, the network's own first."""
    own = getattr(network, "global_pool", "avg")
    own = {"token": "cls"}.get(own, own) if isinstance(own, str) and own else "avg"
    from timm.models.vision_transformer import VisionTransformer
    from torch import nn

    if type(network) is VisionTransformer and own == "cls" and not isinstance(network.norm, nn.Identity):
        return ("cls", "avg")
    return (own,)


def _patch(network: Any) -> int:
    sizes = getattr(getattr(network, "patch_embed", None), "patch_size", 1)
    return int(sizes if isinstance(sizes, int) else max(sizes))


def _layout(config: Any) -> KeyLayout:
    heads = config.classifier if config else None
    heads = (heads,) if isinstance(heads, str) else tuple(heads or ("head", "fc", "classifier"))
    named = "|".join(rf"{re.escape(head)}\." for head in heads)
    return KeyLayout(
        dropped=(
            (named, "classification head: a new one is trained"),
            (r".*relative_position_index$|.*attn_mask$", "a constant that the network computes for itself"),
        ),
    )


def pretrained(spec: BackboneSpec, pixels: int, pool: str) -> nn.Module:
    """timm's own pretrained weights, downloaded by timm. Raises WeightsError when there are none or no network."""
    try:
        return build(spec.name, pixels, pool, pretrained=True)
    except RuntimeError as error:
        raise WeightsError(f"timm has no pretrained weights for {spec.name} ({error}). Use weights: random.") from error
    except OSError as error:
        raise WeightsError(
            f"cannot download timm's weights for {spec.name}: {error}. Check the connection, or give a file: "
            "weights: PATH."
        ) from error
