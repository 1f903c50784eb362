"""`python scripts/model.py`, `retfound_model.py`, `retfound_lora.py`: what the networks do here, checked and said."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from eyetune.backbones import BACKBONES
from eyetune.errors import UserError
from eyetune.guides import CROSS, TICK
from eyetune.guides.baseline import DRClassifier
from eyetune.guides.lora import RETFoundLoRA
from eyetune.guides.network import GuideNetwork
from eyetune.guides.retfound import VisionTransformer, backbone_of
from eyetune.runtime import seed_everything

PUBLISHED = {
    "large": Path("models/RETFound_cfp_weights.pth"),
    "green": Path("models/retfoundgreen_statedict.pth"),
}
"""Where the guides put the files."""

MERGED = 1e-4
"""Largest difference of logits that merging may make, in float32."""


class CheckFailed(Exception):
    """A check found something else than it should have."""


def main(which: str, words: Sequence[str] | None = None) -> int:
    """Carry out the checks of `model`, `retfound_model` or `retfound_lora`; print each; 0, or 1 when one failed.

    Args:
        which: the script.
        words: of the command line, a weights file at most; None: those of this process.
    """
    words = sys.argv[1:] if words is None else words
    if [word for word in words if word.startswith("-")] or len(words) > (which != "model"):
        print(f"usage: python scripts/{which}.py" + ("" if which == "model" else " [WEIGHTS]"))
        return 0 if set(words) <= {"-h", "--help"} else 2
    checks = {"model": _baseline, "retfound_model": _retfound, "retfound_lora": _lora}[which](*map(Path, words))
    failed = 0
    for name, check in checks:
        seed_everything(0)
        try:
            print(f"{TICK} {name}: {check()}", flush=True)
        except (UserError, CheckFailed) as error:
            failed += 1
            print(f"{CROSS} {name}: {error}", flush=True)
    print(f"{len(checks) - failed} of {len(checks)} checks passed")
    return 1 if failed else 0


Checks = list[tuple[str, Callable[[], str]]]


def _baseline() -> Checks:
    made: list[DRClassifier] = []

    def build() -> str:
        made.append(DRClassifier("resnet50", num_classes=5, pretrained=False))
        return f"resnet50, {_count(made[0], 23_518_277)} parameters, untrained: nothing is downloaded here"

    def forward() -> str:
        return _shape(made[0].eval(), (2, 5))

    def freeze() -> str:
        model = made[0].train()
        model.freeze_backbone()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        _step(model)
        changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
        _expect(all(name.startswith("head.") for name in changed) and changed, f"a step changed {changed[:3]}")
        trainable = model.get_num_params()[1]
        model.unfreeze_backbone()
        return f"frozen, {trainable:,} parameters train, and only they change; batch statistics stay"

    def refuse() -> str:
        for wrong in ({"model_name": "resnet_50"}, {"dropout_rate": 1.5}, {"num_classes": -1}):
            try:
                DRClassifier(**{"pretrained": False, **wrong})  # type: ignore[arg-type]
            except UserError:
                continue
            raise CheckFailed(f"{wrong} was accepted")
        return "an unknown name, a dropout of 1.5 and -1 classes, each with one message"

    return [("builds", build), ("logits", forward), ("freezes", freeze), ("refuses", refuse)]


def _retfound(file: Path | None = None) -> Checks:
    def network(variant: str) -> str:
        spec = BACKBONES.get(backbone_of(variant))
        weights = _weights(variant, file)
        model = VisionTransformer(num_classes=5, model_variant=variant, checkpoint_path=weights).eval()
        width = {"large": 1024, "green": 384}[variant]
        _count(model, spec.parameters + 5 * width + 5)
        _expect(model.get_feature_dim() == width, f"{model.get_feature_dim()} numbers an image")
        _shape(model, (1, 5), batch=1)
        said = model.backbone.report.summary() if model.backbone.report else f"random weights. {_where(variant)}"
        return f"{spec.parameters:,} parameters and the head, {width} numbers an image; {said}"

    return [(variant, partial(network, variant)) for variant in ("green", "large")]


def _lora(file: Path | None = None) -> Checks:
    def adapted(variant: str, trainable: int) -> str:
        weights = _weights(variant, file)
        model = RETFoundLoRA(weights, model_variant=variant)
        found = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        _expect(all("lora_" in name or "head" in name for name in found), f"more than adapters and head: {found[:3]}")
        _expect(model.get_num_params()[1] == trainable, f"{model.get_num_params()[1]:,} train, not {trainable:,}")
        _step(model, batch=1)
        without = [name for name, one in model.named_parameters() if one.requires_grad and one.grad is None]
        _expect(not without, f"no gradient for {without[:3]}")
        model.eval()
        images = _images(model, 1)
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            adapters = Path(folder) / "adapters.pth"
            model.save_lora_adapters(adapters)
            size = adapters.stat().st_size
            logits = model(images)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.zero_()
            model.load_lora_adapters(adapters)
            _expect(torch.equal(model(images), logits), "adapters read back give other logits")
            apart = float((model.merge_and_unload()(images) - logits).abs().max())
        _expect(apart < MERGED, f"merging changed the logits by {apart:.2g}")
        said = "from its file" if isinstance(weights, Path) else "on random weights (python scripts/retfound_model.py)"
        return (
            f"{said}: {trainable:,} parameters train (adapters and head), all get a gradient; adapters of "
            f"{size / 1e6:.1f} MB read back to the same logits; merged, they differ by {apart:.1g}"
        )

    def trained(variant: str) -> int:
        depth, width = {"large": (24, 1024), "green": (12, 384)}[variant]
        return depth * (8 * width + 8 * 3 * width) + 2 * width + 5 * width + 5

    return [(variant, partial(adapted, variant, trained(variant))) for variant in ("green", "large")]


def _weights(variant: str, file: Path | None) -> Path | str:
    """The file given, where it is of this variant by its name, else the usual place; `random` when nothing is there."""
    if file is not None and ("green" in file.name.lower()) == (variant == "green"):
        return file
    return PUBLISHED[variant] if PUBLISHED[variant].is_file() else "random"


def _where(variant: str) -> str:
    """Where to get the weights, and where to put them."""
    spec = BACKBONES.get(backbone_of(variant))
    return f"Get them from {spec.source}, licence: {spec.licence}, and put them at {PUBLISHED[variant]}."


def _images(model: GuideNetwork, batch: int) -> Tensor:
    pixels = model.backbone.preprocess.pixels
    return torch.randn(batch, 3, pixels, pixels)


def _shape(model: GuideNetwork, wanted: tuple[int, int], batch: int = 2) -> str:
    with torch.no_grad():
        logits = model(_images(model, batch))
    _expect(tuple(logits.shape) == wanted, f"logits of the shape {tuple(logits.shape)}, not {wanted}")
    _expect(bool(torch.isfinite(logits).all()), "logits that are not finite")
    return f"float{list(wanted)}, finite"


def _step(model: GuideNetwork, batch: int = 2) -> None:
    """One step of training on noise."""
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-3)
    targets = torch.arange(batch) % max(1, model.num_classes)
    torch.nn.functional.cross_entropy(model(_images(model, batch)), targets).backward()
    optimizer.step()


def _count(model: GuideNetwork, wanted: int) -> str:
    found = model.get_num_params()[0]
    _expect(found == wanted, f"{found:,} parameters, not {wanted:,}")
    return f"{found:,}"


def _expect(holds: object, otherwise: str) -> None:
    if not holds:
        raise CheckFailed(otherwise)
