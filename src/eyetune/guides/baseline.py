"""`scripts.model`: the guides' `DRClassifier`, any backbone with dropout and a linear layer on top."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from eyetune.adapt import parse_adapt
from eyetune.backbones import find_spec, load_backbone
from eyetune.errors import ConfigError, WeightsError
from eyetune.guides import TICK
from eyetune.guides.network import GuideNetwork, file_or_word
from eyetune.guides.settings import Group, GuideConfig
from eyetune.older_config import TYPES, read_keys


class DRClassifier(GuideNetwork):
    """A backbone by name, dropout, a linear layer: float[B, 3, H, W], normalised -> logits float[B, num_classes].

    Args:
        model_name: any timm name, or a backbone of EyeTune.
        num_classes: 5 for the grades of diabetic retinopathy; 0 gives the features.
        pretrained: fetch the published weights (this asks the network for them, once; timm keeps them).
        dropout_rate: share of the features dropped before the linear layer in training.
        freeze_backbone: train the linear layer only.
        checkpoint_path: a file of backbone weights in place of a download.

    Raises UserError for an unknown name, WeightsError when the weights cannot be had or do not fit whole, ConfigError
    for values out of range.
    """

    def __init__(
        self,
        model_name: str = "resnet50",
        num_classes: int = 5,
        pretrained: bool = True,
        dropout_rate: float = 0.3,
        *,
        freeze_backbone: bool = False,
        checkpoint_path: str | Path | None = None,
    ) -> None:
        spec = find_spec(model_name)
        if checkpoint_path is not None:
            weights: str | Path | None = file_or_word(checkpoint_path)
        elif pretrained:
            weights = None if spec.embedded else "hub"
        else:
            weights = "random"
        try:
            backbone = load_backbone(model_name, weights)
        except WeightsError as error:
            if weights != "hub":
                raise
            raise WeightsError(
                f"{error} Here: DRClassifier({model_name!r}, checkpoint_path=FILE); pretrained=False begins with "
                "random weights."
            ) from error
        super().__init__(backbone, num_classes, dropout_rate)
        self.model_name, self.dropout_rate = model_name, dropout_rate
        self.pretrained = weights != "random"
        self.train()
        if freeze_backbone:
            self.freeze_backbone()

    @classmethod
    def from_config(cls, config: Any) -> Self:
        """As the `model` section of a guide's configuration says.

        Args:
            config: `Config.from_yaml(…).model`, a mapping, or any object with such attributes.

        Raises ConfigError for the section of another kind of model, and for a key that there is not.
        """
        if not isinstance(config, Group):
            section = config if isinstance(config, Mapping) else vars(config)
            config = GuideConfig(read_keys({"model": dict(section)}, "the model section")).model
        if TYPES.get(str(config.type).lower(), config.type) not in (None, "baseline"):
            raise ConfigError(
                f"model.type is {config.type!r}: DRClassifier is for timm's networks. Use RETFoundLoRA (retfound_lora) "
                "or load_retfound_model (retfound)."
            )
        return cls(
            config.name,
            config.num_classes,
            config.pretrained,
            config.dropout,
            freeze_backbone=config.freeze_backbone,
            checkpoint_path=config.checkpoint_path,
        )

    def freeze_backbone(self) -> None:
        """Only the linear layer trains; the backbone stays in eval mode, its batch statistics too."""
        self._train_by("linear")

    def unfreeze_backbone(self) -> None:
        """Everything trains."""
        self._train_by("full")

    def _train_by(self, kind: str) -> None:
        self.strategy = parse_adapt(kind).build()
        self.strategy.apply(self)
        self.train(self.training)

    def summary(self) -> None:
        """Print what the network is made of."""
        total, trainable = self.get_num_params()
        print(f"{TICK} Created DRClassifier with backbone: {self.model_name}")
        print(f"  - Feature dimension: {self.get_feature_dim()}")
        print(f"  - Output classes: {self.num_classes}")
        print(f"  - Dropout rate: {self.dropout_rate}")
        print(f"  - Pretrained: {self.pretrained}")
        print(f"  - Parameters: {total:,}, of which train: {trainable:,}")

    def described(self) -> dict[str, Any]:
        """The name of the backbone, also under the name that the guides' programs give it."""
        return super().described() | {"model_name": self.model_name}
