"""The network of a run as timm itself builds it: the call, its names for the tensors, its configuration file."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import timm
import torch
from torch import Tensor, nn

from eyetune.adapt.classifier import SharedLinear
from eyetune.adapt.lora import peft_classifier
from eyetune.errors import RunError
from eyetune.runtime import seed_everything

if TYPE_CHECKING:
    from eyetune.adapt.classifier import Classifier
    from eyetune.backbones.backbone import Backbone
    from eyetune.predicting.sheet import Sheet


@dataclass(frozen=True)
class TimmNetwork:
    """How timm builds a backbone with its head.

    Attributes:
        architecture: timm's name.
        arguments: for `timm.create_model`, `num_classes` among them.
        classifier: name of the layer that is the head.
    """

    architecture: str
    arguments: dict[str, Any]
    classifier: str

    @classmethod
    def of(cls, backbone: Backbone, outputs: int) -> TimmNetwork | None:
        """For a backbone and a head of so many outputs; None where no call of timm builds the same."""
        call, classifier = backbone.spec.plain.get(backbone.pool), peft_classifier(backbone)
        if call is None or classifier is None:
            return None
        arguments = dict(call.arguments)
        pixels = backbone.preprocess.pixels
        if "img_size" in arguments or (pixels != backbone.spec.pixels and _takes_size(backbone.network)):
            arguments["img_size"] = pixels
        return cls(call.architecture, {"num_classes": outputs, **arguments}, classifier)

    def build(self) -> nn.Module:
        """The network, untrained, in eval mode."""
        network: nn.Module = timm.create_model(self.architecture, pretrained=False, **self.arguments)
        return network.eval()

    def __str__(self) -> str:
        """The call, to be typed."""
        given = "".join(f", {name}={value!r}" for name, value in self.arguments.items())
        return f'timm.create_model("{self.architecture}"{given})'

    def config(self, sheet: Sheet) -> dict[str, Any]:
        """`config.json`, as timm writes it for the Hugging Face hub and reads it from there or from a folder."""
        side = sheet.squares.pixels
        outputs = self.arguments["num_classes"]
        found = {
            "architecture": self.architecture,
            "num_classes": outputs,
            "model_args": {name: value for name, value in self.arguments.items() if name != "num_classes"},
            "pretrained_cfg": {
                "num_classes": outputs,
                "input_size": [3, side, side],
                "fixed_input_size": "img_size" in self.arguments,
                "pool_size": None,
                "crop_pct": 1.0,
                "crop_mode": "squash" if sheet.squares.fit == "squash" else "border",
                "interpolation": "bicubic",
                "mean": list(sheet.normalisation.mean),
                "std": list(sheet.normalisation.std),
                "classifier": self.classifier,
                "license": sheet.licence,
            },
        }
        if "global_pool" in self.arguments:
            found["global_pool"] = self.arguments["global_pool"]
        if outputs == len(sheet.classes):
            found["label_names"] = list(sheet.classes)
        return found


def _takes_size(network: nn.Module) -> bool:
    return "img_size" in inspect.signature(type(network).__init__).parameters


def tensors_of(model: Classifier, layout: TimmNetwork) -> dict[str, Tensor]:
    """All tensors of a plain classifier under timm's names, its head among them.

    Raises RunError when the head is more than one layer.
    """
    layers = [module for module in model.head.modules() if any(True for _ in module.parameters(recurse=False))]
    if len(layers) != 1 or not isinstance(layers[0], (nn.Linear, SharedLinear)):
        raise RunError(
            "the head is more than one linear layer, which timm's networks have no place for: use --to onnx."
        )
    body = model.backbone.network.state_dict().items()
    found = {name: tensor for name, tensor in body if not name.startswith(f"{layout.classifier}.")}
    weight = layers[0].weight
    found[f"{layout.classifier}.weight"] = weight.expand(model.outputs, -1).contiguous()
    found[f"{layout.classifier}.bias"] = layers[0].bias
    return {name: tensor.detach().contiguous().clone() for name, tensor in found.items()}


def without_head(layout: TimmNetwork, backbone: Backbone, seed: int) -> nn.Module:
    """timm's network with a backbone's weights and a fresh head. Raises RunError where they do not fit."""
    seed_everything(seed)
    network = layout.build()
    missing, unexpected = network.load_state_dict(backbone.network.state_dict(), strict=False)
    own = {f"{layout.classifier}.weight", f"{layout.classifier}.bias"}
    if set(missing) - own or set(unexpected) - own:
        raise RunError(f"{layout} is not the network of {backbone.spec.name}: {[*missing, *unexpected][:5]}.")
    return network


def logits(network: nn.Module, images: list[Tensor]) -> Tensor:
    """float32[N, outputs]: what a network gives for normalised images float32[3, P, P], a few at a time."""
    with torch.no_grad():
        parts = [network(torch.stack(images[first : first + 8])) for first in range(0, len(images), 8)]
    return torch.cat(parts).float()
