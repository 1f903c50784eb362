"""A BERT in the clothes of a backbone, so that freezing, LoRA and layer-wise rates work on it as on an image tower."""

from __future__ import annotations

import re
from typing import Any, cast

import torch
from torch import Tensor, nn

from eyetune.backbones.backbone import Backbone, LayerGroup
from eyetune.backbones.spec import BackboneSpec, Preprocess


class TextTower(Backbone):
    """A BERT as strategies see a backbone: ids int[B, L] -> features float[B, H] of the first token.

    What belongs to images (`preprocess`) means nothing here.
    """

    def __init__(self, bert: nn.Module) -> None:
        width = int(cast(Any, bert).config.hidden_size)
        nothing = Preprocess(1, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        spec = BackboneSpec(
            name="the text encoder",
            title="text encoder",
            architecture="BERT",
            parameters=0,
            pools={"cls": width},
            pool="cls",
            preprocess=nothing,
            licence="see its model card",
            source="",
            build=lambda pixels, pool: bert,
        )
        super().__init__(spec, bert, preprocess=nothing, pool="cls", width=width)

    def features(self, images: Tensor) -> Tensor:
        """ids int[B, L] -> float[B, H]."""
        first: Tensor = self.network(images).last_hidden_state[:, 0]
        return first

    def example(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """One token."""
        return torch.zeros(1, 1, dtype=torch.int64)

    def layer_groups(self) -> list[LayerGroup]:
        """Embeddings, then layer by layer."""
        groups: dict[str, list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in self.network.named_parameters():
            layer = re.match(r"encoder\.layer\.\d+", name)
            groups.setdefault(layer.group() if layer else name.partition(".")[0], []).append((name, parameter))
        return [
            LayerGroup(name, tuple(members), "block" if name.startswith("encoder.") else "stem")
            for name, members in groups.items()
        ]

    def blocks(self) -> list[nn.Module]:
        """The encoder's layers."""
        return list(cast(Any, self.network).encoder.layer)

    def set_grad_checkpointing(self, on: bool) -> None:
        """Recompute activations in the backward pass instead of keeping them."""
        bert = cast(Any, self.network)
        kind = "activation" if hasattr(bert, "activation_checkpointing_enable") else "gradient"  # its older name
        if on:
            getattr(bert, f"{kind}_checkpointing_enable")({"use_reentrant": False})
        else:
            getattr(bert, f"{kind}_checkpointing_disable")()
