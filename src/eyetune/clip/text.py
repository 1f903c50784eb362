"""The text tower's shape: which BERT a name, a folder, a configuration or a checkpoint means.

RET-CLIP keeps every text weight in its own file, so only the *configuration* of the encoder has to come from
elsewhere, and the checkpoint itself gives nearly all of it. Nothing here downloads weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eyetune.errors import MissingExtra, UserError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TextShape:
    """What a checkpoint's shapes tell of a BERT encoder.

    `layers` blocks of `width` channels with `hidden` channels in their MLP, for `tokens` ids and `positions` places.
    """

    layers: int
    width: int
    hidden: int
    tokens: int
    positions: int

    @property
    def published(self) -> str | None:
        """The name of the published encoder that has this shape, if any."""
        return next((name for name, (shape, _) in PUBLISHED.items() if shape == self), None)

    def __str__(self) -> str:
        size = (
            f"{self.layers} layers, {self.width} wide ({self.hidden} in the MLP), "
            f"{self.tokens} tokens, {self.positions} positions"
        )
        return f"{self.published} ({size})" if self.published else size

    @property
    def remedy(self) -> str:
        """What to give as `text` for this encoder, in a sentence."""
        if self.published:
            return f"Pass text={self.published!r}, or leave text out: the file tells its encoder."
        return (
            "Pass the configuration it was trained with: the folder of its config.json, or a dict with "
            f"num_hidden_layers={self.layers}, hidden_size={self.width}, intermediate_size={self.hidden}, "
            f"vocab_size={self.tokens}, max_position_embeddings={self.positions} and its num_attention_heads, "
            "which the file does not tell."
        )


PUBLISHED = {
    "RoBERTa-wwm-ext-base-chinese": (TextShape(12, 768, 3072, 21128, 512), 12),
    "RoBERTa-wwm-ext-large-chinese": (TextShape(24, 1024, 4096, 21128, 512), 16),
    "RBT3-chinese": (TextShape(3, 768, 3072, 21128, 512), 12),
}
"""The encoders RET-CLIP's code offers, each with its number of attention heads."""

RELEASED = "RoBERTa-wwm-ext-base-chinese"
"""The one in the released ret-clip.pt."""

_TELLING = (
    "bert.embeddings.word_embeddings.weight",
    "bert.embeddings.position_embeddings.weight",
    "bert.encoder.layer.0.intermediate.dense.weight",
)

_HUB_NAMES = {
    "chinese-roberta-wwm-ext": "RoBERTa-wwm-ext-base-chinese",
    "chinese-roberta-wwm-ext-large": "RoBERTa-wwm-ext-large-chinese",
    "rbt3": "RBT3-chinese",
}


def shape_in(tensors: Mapping[str, torch.Tensor]) -> TextShape | None:
    """The encoder whose tensors these are (keys `bert.…`, without a trainer's prefix), or None if there is none."""
    layers = [int(key.split(".")[3]) for key in tensors if key.startswith("bert.encoder.layer.")]
    matrices = [tensors.get(key) for key in _TELLING]
    if not layers or any(matrix is None or matrix.ndim != 2 for matrix in matrices):
        return None
    (tokens, width), (positions, _), (hidden, _) = (matrix.shape for matrix in matrices if matrix is not None)
    return TextShape(max(layers) + 1, width, hidden, tokens, positions)


def shape_of(config: Any) -> TextShape:
    """The :class:`TextShape` of a transformers BertConfig."""
    return TextShape(
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        hidden=config.intermediate_size,
        tokens=config.vocab_size,
        positions=config.max_position_embeddings,
    )


def text_config(text: str | Path | Mapping[str, Any] | Any | None) -> Any:
    """The transformers BertConfig that `text` means.

    Args:
        text: a published encoder's name, a folder with a config.json, a name on the Hugging Face hub (its config.json
            is fetched), a BertConfig, or a dict of its fields. None: the released model's.

    Raises:
        MissingExtra: transformers is not installed.
        UserError: no such folder or hub name, or it is not a BERT.
    """
    try:
        from transformers import BertConfig
    except ImportError as error:
        raise MissingExtra("The text tower of an image-text model", "clip") from error
    if isinstance(text, BertConfig):
        return text
    if text is None:
        return _config(BertConfig, RELEASED)
    if isinstance(text, Mapping):
        return BertConfig(**_bert_only(dict(text), "the given dict"))
    if not isinstance(text, (str, Path)):
        raise UserError(
            f"text is {type(text).__name__}: give a folder, a hub name, a BertConfig or a dict of its fields."
        )
    if not Path(text).is_dir():
        name = str(text).removeprefix("hfl/")
        name = _HUB_NAMES.get(name, name)
        if name in PUBLISHED:
            return _config(BertConfig, name)
    return _fetch(BertConfig, text)


def _config(bert_config: Any, name: str) -> Any:
    shape, heads = PUBLISHED[name]
    return bert_config(
        num_hidden_layers=shape.layers,
        hidden_size=shape.width,
        num_attention_heads=heads,
        intermediate_size=shape.hidden,
        vocab_size=shape.tokens,
        max_position_embeddings=shape.positions,
    )


def _fetch(bert_config: Any, text: str | Path) -> Any:
    local = Path(text).is_dir()
    cause: Exception | None = None
    fields: dict[str, Any] = {}
    try:
        fields, _ = bert_config.get_config_dict(str(text), local_files_only=local)
    except (OSError, ValueError) as error:
        cause = error
    # For a folder without a config.json transformers answers with nothing at all, which would mean its default BERT.
    if not fields:
        fault = "has no readable config.json" if local else "is neither a folder nor a name the hub gives us"
        raise UserError(
            f"text encoder {str(text)!r} {fault}. Give the encoder's folder (with config.json), its name on the hub, "
            f"or one of {', '.join(PUBLISHED)}."
        ) from cause
    return bert_config(**_bert_only(fields, repr(str(text))))


def _bert_only(fields: dict[str, Any], source: str) -> dict[str, Any]:
    kind = fields.pop("model_type", "bert")
    if kind != "bert":
        raise UserError(f"text encoder {source} is a {kind!r} model; RET-CLIP's text tower is a BERT.")
    return fields
