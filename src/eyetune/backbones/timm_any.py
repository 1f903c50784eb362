"""Any timm name as a backbone. Importing this module needs neither torch nor timm."""

from __future__ import annotations

import contextlib
import inspect
import re
import urllib.error
import urllib.request
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eyetune.backbones.spec import BACKBONES, BackboneSpec, KeyLayout, Preprocess, TimmCall
from eyetune.errors import UserError, WeightsError, did_you_mean

if TYPE_CHECKING:
    from torch import nn

    from eyetune.backbones.weights import LoadReport

_TIMEOUT = 15.0
"""Seconds to wait for the server of timm's weights to answer at all."""

_PLAIN = Preprocess(224, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # where timm states no normalisation


@lru_cache(maxsize=64)
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
        tags = timm.list_pretrained(f"{architecture}.*")
        raise UserError(
            f"model.backbone: timm has no weights called {name!r}.{did_you_mean(name, tags)} "
            f"Known: {', '.join(tags) or architecture}."
        ) from error
    network = _skeleton(name)
    pools = _pools(network)
    return BackboneSpec(
        name=name,
        title=name,
        architecture=type(network).__name__,
        parameters=sum(p.numel() for p in network.parameters()),
        pools=dict.fromkeys(pools, int(network.head_hidden_size)),
        pool=pools[0],
        preprocess=Preprocess(config.input_size[-1], tuple(config.mean), tuple(config.std)) if config else _PLAIN,
        patch=_patch(network),
        licence=(config.license if config else None) or "see its timm model card",
        source=f"https://huggingface.co/timm/{name}",
        build=lambda pixels, pool: build(name, pixels, pool),
        layout=_layout(config),
        plain={pool: _call(architecture, pool, pools[0]) for pool in pools},
        kind="timm",
    )


def _call(architecture: str, pool: str, own: str) -> TimmCall:
    """The call that builds what :func:`build` builds: another pooling without the norm that timm would add for it."""
    return TimmCall(architecture, {} if pool == own else {"global_pool": pool, "fc_norm": False})


def build(name: str, pixels: int, pool: str, *, pretrained: bool = False) -> nn.Module:
    """The headless timm network `name` for images of `pixels`: float[B, 3, pixels, pixels] -> float[B, width]."""
    import timm

    skeleton = _skeleton(name)
    size = {"img_size": pixels} if "img_size" in inspect.signature(type(skeleton).__init__).parameters else {}
    try:
        network: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=0, **size)
    except AssertionError as error:
        raise UserError(f"model.pixels: timm cannot build {name} for {pixels} pixels ({error}).") from error
    if pool != _pools(skeleton)[0]:
        # Set after construction: given to the constructor, timm would swap the pretrained norm for a fresh one.
        network.global_pool = "avg"  # type: ignore[assignment]
    return network


def pretrained(spec: BackboneSpec, pixels: int, pool: str) -> tuple[nn.Module, LoadReport]:
    """timm's own pretrained weights, fetched by timm, which takes all of the network or fails.

    Raises WeightsError when there are none, or no connection.
    """
    from eyetune.backbones.weights import LoadReport

    try:
        check_connection(spec.name)
        network = build(spec.name, pixels, pool, pretrained=True)
    except RuntimeError as error:
        raise WeightsError(
            f"model.weights: timm has no pretrained weights for {spec.name} ({error}). Use weights: random, or a file."
        ) from error
    except UserError:
        raise
    except Exception as error:  # whatever the network libraries behind timm raise
        raise WeightsError(
            f"cannot download timm's weights for {spec.name} ({error}). Check the connection, or download the file on "
            f"another machine from {spec.source} and set model.weights to it."
        ) from error
    names = tuple((name, name) for name in network.state_dict())
    return network, LoadReport(spec.source, "", spec.name, "fetched and matched by timm", "", (), names)


def check_connection(name: str) -> None:
    """Raise OSError where timm's weights are not on this machine and their server cannot be reached.

    Asked first, it answers at once; the library behind timm would knock twelve times, for most of a minute.
    """
    import timm
    import torch
    from huggingface_hub import constants, try_to_load_from_cache

    config = timm.get_pretrained_cfg(name)
    if config is None or not config.hf_hub_id or constants.HF_HUB_OFFLINE:
        return
    kept = (try_to_load_from_cache(config.hf_hub_id, file) for file in ("model.safetensors", "pytorch_model.bin"))
    older = Path(torch.hub.get_dir()) / "checkpoints" / (config.url or "").rpartition("/")[2]
    if any(isinstance(path, str) for path in kept) or older.is_file():
        return
    with contextlib.suppress(urllib.error.HTTPError):  # any answer is a connection
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=_TIMEOUT)  # noqa: S310


@lru_cache(maxsize=64)
def _skeleton(name: str) -> Any:
    """The network without memory for its numbers, to read its properties."""
    import timm
    import torch

    try:
        with torch.device("meta"):
            return timm.create_model(name, num_classes=0)
    except (RuntimeError, NotImplementedError, AttributeError):  # a few architectures compute while they are built
        return timm.create_model(name, num_classes=0)


def _pools(network: Any) -> tuple[str, ...]:
    """The poolings on offer, the network's own first."""
    from timm.models.vision_transformer import VisionTransformer
    from torch import nn

    own = getattr(network, "global_pool", "avg")
    own = {"token": "cls"}.get(own, own) if isinstance(own, str) and own else "avg"
    if type(network) is VisionTransformer and own == "cls" and not isinstance(network.norm, nn.Identity):
        return ("cls", "avg")
    return (own,)


def _patch(network: Any) -> int:
    """What the side of the image must be a multiple of: the patch size, where patches do not overlap."""
    embed = getattr(network, "patch_embed", None)
    sizes = getattr(embed, "patch_size", 1) if hasattr(embed, "grid_size") else 1
    return int(sizes if isinstance(sizes, int) else max(sizes))


def _layout(config: Any) -> KeyLayout:
    heads = config.classifier if config else None
    heads = (heads,) if isinstance(heads, str) else tuple(heads or ("head", "fc", "classifier"))
    named = "|".join(rf"{re.escape(head)}\." for head in heads)
    return KeyLayout(
        dropped=(
            (named, "classification head: a new one is trained"),
            (r".*(relative_position_index|attn_mask)$", "a constant that the network computes for itself"),
        ),
    )
