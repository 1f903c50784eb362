"""`scripts.retfound_lora`: RETFound under low-rank adapters, and the adapters as one small file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from eyetune.adapt.classifier import put_norm_before
from eyetune.adapt.lora import Lora, LoraConfig, merge_in_place
from eyetune.adapt.strategy import count_parameters
from eyetune.backbones.opening import open_checkpoint
from eyetune.errors import ConfigError, RunError, listing
from eyetune.files import atomic
from eyetune.guides.network import GuideNetwork, check_count, check_share
from eyetune.guides.retfound import load_variant

TENSORS = "lora_state_dict"
"""Where in the file of adapters the tensors are."""


class RETFoundLoRA(GuideNetwork):
    """RETFound or RETFound-Green, frozen, with low-rank adapters, under a LayerNorm, dropout and a linear layer.

    Args:
        checkpoint_path: the published file; `random` for an untrained network.
        num_classes: logits an image.
        lora_r: rank of the adapters.
        lora_alpha: their output counts lora_alpha / lora_r times.
        lora_dropout: share of an adapter's inputs dropped in training.
        head_dropout: share of the features dropped before the linear layer in training.
        target_modules: layers that get adapters, by name; None: `["qkv"]`.
        model_variant: `large` or `green`.
        device: where to; None stays on the CPU (`model.to(device)` moves it later).

    Only parameters with `lora_` or `head` in their names train. Raises WeightsError when the file does not load
    whole, ConfigError for values out of range and unknown layers.
    """

    def __init__(
        self,
        checkpoint_path: str | Path | None,
        num_classes: int = 5,
        lora_r: int = 8,
        lora_alpha: float = 32,
        *,
        lora_dropout: float = 0.1,
        head_dropout: float = 0.3,
        target_modules: str | Sequence[str] | None = None,
        model_variant: str = "large",
        device: torch.device | str | None = None,
    ) -> None:
        check_count("num_classes", num_classes, least=1)
        check_share("head_dropout", head_dropout)
        targets = ("qkv",) if target_modules is None else target_modules
        config = _settings(lora_r, lora_alpha, lora_dropout, targets)
        super().__init__(load_variant(model_variant, checkpoint_path), num_classes, 0.0)
        self.head[1].p = head_dropout  # type: ignore[index]
        put_norm_before(self)
        self.model_variant = model_variant
        self.lora_r, self.lora_alpha, self.target_modules = config.r, config.alpha, list(config.targets or ())
        self.strategy: Lora = config.build()
        self.strategy.apply(self)
        self.to(device)
        self.train()

    def print_trainable_parameters(self) -> None:
        """Print the line that PEFT prints."""
        trainable, total = count_parameters(self)
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.2f}%")

    def described(self) -> dict[str, Any]:
        """The variant, and what the adapters are."""
        return super().described() | {
            "variant": self.model_variant,
            "lora_r": self.lora_r,
            "lora_alpha": self.lora_alpha,
            "target_modules": self.target_modules,
        }

    def save_lora_adapters(self, save_path: str | Path) -> None:
        """Write adapters and head, and what they fit, to one file. Raises UserError when it cannot be written."""
        self._check_adapters("save")
        tensors = {name: tensor.cpu() for name, tensor in self.strategy.checkpoint(self).items()}
        content = self.described() | {"fingerprint": self.base_fingerprint(), TENSORS: tensors}
        # Through a stream the archive has no name inside: the same adapters give the same bytes.
        with atomic(Path(save_path)) as temporary, open(temporary, "wb") as stream:
            torch.save(content, stream)

    def load_lora_adapters(self, path: str | Path) -> None:
        """Replace adapters and head by those that :meth:`save_lora_adapters` wrote. Nothing in the file is executed.

        Raises WeightsError when the file cannot be opened safely, RunError when it holds no adapters, or those of
        another base, rank, weight, choice of layers or number of classes: nothing is changed then.
        """
        self._check_adapters("load")
        content = open_checkpoint(path).content
        tensors = content.get(TENSORS)
        if not isinstance(tensors, Mapping) or "fingerprint" not in content:
            raise RunError(f"{path} holds no adapters that save_lora_adapters wrote.")
        other = self.differences(content)
        if other:
            raise RunError(
                f"the adapters in {path} are of another model:\n{listing(other)}\n"
                "Build RETFoundLoRA with what the file says, or load other adapters."
            )
        theirs, ours = str(content["fingerprint"]), self.base_fingerprint()
        if theirs != ours:
            raise RunError(
                f"the adapters in {path} were trained over other base weights (fingerprint {theirs[:12]}; this base: "
                f"{ours[:12]}). Build RETFoundLoRA from the file they were trained over."
            )
        self.strategy.load_checkpoint(self, tensors)

    def merge_and_unload(self) -> RETFoundLoRA:
        """Add the adapters into the weights, for good, and return this very model: a plain network, all of it trains.

        Raises RunError when a value of the adapters is not finite: nothing is changed then.
        """
        self._check_adapters("merge")
        merge_in_place(self)
        del self.strategy
        self.strategy = None  # type: ignore[assignment]
        self.train(self.training)
        return self

    def _check_adapters(self, verb: str) -> None:
        if self.adapter is None:
            raise RunError(f"there are no adapters to {verb}: they were merged into the weights. Build the model anew.")


def _settings(r: Any, alpha: Any, dropout: Any, targets: Any) -> LoraConfig:
    names = {"r": "lora_r", "alpha": "lora_alpha", "dropout": "lora_dropout", "targets": "target_modules"}
    try:
        return LoraConfig(r=r, alpha=alpha, dropout=dropout, targets=targets)
    except ValidationError as error:
        faults = [f"{names.get(str(one['loc'][0]), one['loc'][0])}: {one['msg']}" for one in error.errors()]
        raise ConfigError(f"RETFoundLoRA:\n{listing(faults)}") from error
