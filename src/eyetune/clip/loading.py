"""From a ret-clip.pt, or from nothing, to a :class:`RetClip`; and back. The vision side of the layout is the backbone's
own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from eyetune.backbones import load_backbone
from eyetune.backbones.loading import load, where_to_get
from eyetune.backbones.opening import Checkpoint, open_checkpoint
from eyetune.backbones.retclip import RET_CLIP, VisionShape, clip_spec
from eyetune.backbones.spec import BackboneSpec
from eyetune.backbones.weights import fill, plan
from eyetune.clip.model import RetClip
from eyetune.clip.text import TextShape, shape_in, shape_of, text_config
from eyetune.errors import UserError, WeightsError, did_you_mean

if TYPE_CHECKING:
    from transformers import BertConfig

# What is not the image tower is called the same in the file and in RetClip; the tower's keys are renamed by the
# backbone's rules and then put where RetClip keeps its tower.
_TOWER = "visual.network."
_NOT_TOWER = r"bert\.|text_projection|(?:global|left|right)_feature_mapping\.|logit_scale"
_LAYOUT = replace(
    RET_CLIP.layout,
    rename=(*RET_CLIP.layout.rename, (rf"^(?!{_NOT_TOWER})", _TOWER)),
    transpose=tuple(_TOWER + name for name in RET_CLIP.layout.transpose),
    dropped=(
        (r"bert\.embeddings\.(position|token_type)_ids$", "counters that older transformers saved; made anew"),
        (r"bert\.pooler\.", "BERT's pooler: the projections read the [CLS] token itself"),
    ),
)
_SPEC = replace(RET_CLIP, title="RET-CLIP", layout=_LAYOUT)


def load_clip(
    name: str = "ret-clip",
    weights: str | Path | None = None,
    text: str | Path | Mapping[str, Any] | BertConfig | None = None,
) -> RetClip:
    """An image-text model, on the CPU, in float32 and eval mode.

    Args:
        name: `ret-clip`, the only one there is.
        weights: the whole model as published (ret-clip.pt) or as its trainer saves it; None or `"random"` is an
            untrained network.
        text: the text encoder's configuration: `RoBERTa-wwm-ext-base-chinese` (the published one) or `RBT3-chinese`,
            a folder with a config.json, a name on the Hugging Face hub (its config.json is fetched), a transformers
            BertConfig or a dict of its fields. None: what the file holds, or the published one for an untrained
            network. The encoder's weights always come from `weights`.

    Raises:
        MissingExtra: transformers is not installed.
        WeightsError: the file is missing, unreadable, of another family, holds another text encoder than `text`, or
            would not arrive whole.
        UserError: unknown name or text encoder.
    """
    if name != _SPEC.name:
        raise UserError(f"unknown image-text model {name!r}.{did_you_mean(name, [_SPEC.name])} Known: {_SPEC.name}.")
    if weights is None or weights == "random":
        bert = bert_model(text_config(text))
        return RetClip(load_backbone(RET_CLIP.name, "random"), bert).eval()
    checkpoint = open_checkpoint(weights, where=where_to_get(_SPEC))
    found = _encoder_in(checkpoint)
    # Tensors do not show the number of heads, and a wrong one would go unnoticed: only known ones are assumed.
    if text is None and not found.published:
        raise WeightsError(f"{checkpoint.path} holds the text encoder {found}, none of the published. {found.remedy}")
    config = text_config(found.published if text is None else text)
    if shape_of(config) != found:
        raise WeightsError(
            f"{checkpoint.path} holds the text encoder {found}; the one given as text is {shape_of(config)}. "
            f"{found.remedy}"
        )
    # The tower's numbers all come from the file: on the meta device, drawing 86 million of them first is saved.
    with torch.device("meta"):
        tower = load(_tower_in(checkpoint), "random")
    model = RetClip(tower.to_empty(device="cpu"), bert_model(config))
    made = plan(_SPEC, model, checkpoint)
    if not made.report.whole:
        raise WeightsError(f"{checkpoint.path} does not load whole into {_SPEC.name}.\n{made.report.faults()}")
    fill(model, made, checkpoint)
    model.report = made.report
    return model.eval()


def bert_model(config: BertConfig) -> nn.Module:
    """An untrained BERT without a pooler. Raises UserError when its configuration contradicts itself."""
    from transformers import BertModel

    try:
        bert: nn.Module = BertModel(config, add_pooling_layer=False)
    except (ValueError, KeyError) as error:  # heads that do not divide the width, an unknown activation
        raise UserError(f"text is no usable BERT configuration: {error}") from error
    return bert


def _encoder_in(checkpoint: Checkpoint) -> TextShape:
    """The text encoder in the file. Raises WeightsError when there is none."""
    for tensors in checkpoint.containers().values():
        stripped = {_LAYOUT.strip(key): tensor for key, tensor in tensors.items()}
        if found := shape_in(stripped):
            return found
    raise WeightsError(
        f"{checkpoint.path} holds no text encoder (bert.embeddings, bert.encoder.layer.0): an image-text model needs "
        f"the whole {_SPEC.name}.pt. For an image tower alone use load_backbone."
    )


def _tower_in(checkpoint: Checkpoint) -> BackboneSpec:
    """The image tower in the file: RET-CLIP's, or one of the other sizes that its trainer offers."""
    for tensors in checkpoint.containers().values():
        stripped = {_LAYOUT.strip(key): tensor for key, tensor in tensors.items()}
        if found := VisionShape.of(stripped):
            return clip_spec(found)
    return RET_CLIP
