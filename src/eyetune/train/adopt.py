"""A run folder from a checkpoint of another program, so that every verb works on it as on any run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from eyetune.adapt.classifier import Classifier, put_norm_before
from eyetune.adapt.strategy import parse_adapt
from eyetune.backbones import load_backbone
from eyetune.backbones.older import Older, describe, read_older
from eyetune.data.fundus import FundusSettings
from eyetune.errors import ConfigError, RunError, UserError, WeightsError
from eyetune.runtime import Runtime, seed_everything
from eyetune.tensors import write_tensors
from eyetune.train.rundir import ModelCard, RunDir, is_free

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eyetune.adapt.strategy import Strategy
    from eyetune.backbones.backbone import Backbone
    from eyetune.config import Config

UNKNOWN_TABLE = "(not known: made from a checkpoint of another program)"
"""`data.table` of such a run."""

BASE = "base.safetensors"
"""The backbone's tensors under plain names, where the file itself could not be read as weights."""

ALPHA_OVER_RANK = 4.0
"""alpha / r where a file does not say alpha: the guides' 32 for r = 8."""


def adopt(
    path: str | Path,
    out: str | Path | None = None,
    *,
    backbone: str | None = None,
    pool: str | None = None,
    classes: Sequence[str] | None = None,
    alpha: float | None = None,
    weights: str | None = None,
    fit: str | None = None,
    crop: bool = True,
    device: str = "auto",
) -> RunDir:
    """Make a run folder from a checkpoint file, or a folder that PEFT wrote; what was made before is taken again.

    Args:
        path: the file: a network with its head, or LoRA adapters with the head.
        out: the run folder to make; None: `runs/NAME`, after the file.
        backbone, pool: where the file does not say them; see :func:`eyetune.backbones.older.read_older`.
        classes: names of the classes, in the order of the head's outputs; None: as the file says, else 0, 1, ….
        alpha: of LoRA; None: as the file says, else four times the rank, which is said.
        weights: the base weights, for adapters.
        fit, crop: how photographs were prepared; None, True: as for the backbone.
        device: only for what environment.json says.

    The file (or the base weights) must stay where it is: the run refers to it. Returns the run folder; what was assumed
    stands in its load_report.json. Raises as read_older, and UserError when `out` holds anything else already.
    """
    from eyetune.config import Config

    path = Path(path)
    target = Path("runs") / path.name.partition(".")[0] if out is None else Path(out)
    runtime = Runtime(device, "fp32", 0)
    older = read_older(path, backbone=backbone, pool=pool, base=weights)
    names = _class_names(older, classes)
    assumed = [*older.assumptions, *([] if classes or older.classes else [f"classes called {', '.join(names)}"])]
    adapt: dict[str, Any] = {"kind": "linear"}
    if older.adapters:
        rank = int(next(iter(older.adapters.values()))[0].shape[0])
        known = alpha if alpha is not None else older.alpha
        if known is None:
            known = ALPHA_OVER_RANK * rank
            assumed.append(f"alpha {known:g}, four times the rank, as in the guides (--alpha says otherwise)")
        adapt = {"kind": "lora", "r": rank, "alpha": known, "dropout": 0.0, "targets": list(older.adapters)}
    elif alpha is not None:
        raise ConfigError(f"--alpha: {path} holds no LoRA adapters.")
    if fit is None and crop:
        assumed.append(
            "photographs cropped to their field and fitted as its network wants (--no-crop, --fit say otherwise)"
        )
    config = Config.parse(
        {
            "model": {
                "backbone": older.spec.name,
                "weights": _base(older, target, weights),
                "pool": older.pool,
                "pixels": older.pixels,
                "dropout": 0.0,
            },
            "data": {"table": UNKNOWN_TABLE, "classes": names, "crop": crop, "fit": fit},
            "adapt": adapt,
            "out": str(target),
        },
        check_files=False,
    )
    made = not is_free(target) and _is_of(target, older, config)
    if not made:
        RunDir.check_free(target)
    runtime.wait()  # all have looked before one makes it
    if made:
        return RunDir.open(target, runtime.is_main)
    folder = RunDir.create(target, runtime.is_main)
    with folder.in_use():
        with runtime.main_first():
            if folder.main and target / BASE == Path(config.model.weights or ""):
                write_tensors(target / BASE, {name: tensor.contiguous().clone() for name, tensor in older.body.items()})
        _write(folder, config, older, runtime, assumed)
    runtime.wait()
    return folder


def _is_of(target: Path, older: Older, config: Config) -> bool:
    """Whether a run folder was made from the same file, read in the same way."""
    try:
        folder = RunDir.open(target)
        same = folder.read_config() == config and folder.read_load_report().get("sha256") == older.report.sha256
        return same and folder.has_checkpoint()
    except UserError:
        return False


def _class_names(older: Older, given: Sequence[str] | None) -> tuple[str, ...]:
    count = len(older.head.weight)
    names = tuple(given) if given is not None else older.classes or tuple(map(str, range(count)))
    if len(names) != count or len(set(names)) < count or "" in names:
        raise ConfigError(f"--classes: the head of {older.path} tells {count} classes apart; name each of them once.")
    return names


def _base(older: Older, target: Path, weights: str | None) -> str | None:
    """Where the backbone's weights are: the file itself, the base of the adapters, or a file to write into the run."""
    if not older.body:
        return weights
    return str(older.path if older.native else target / BASE)


def _write(folder: RunDir, config: Config, older: Older, runtime: Runtime, assumed: Sequence[str]) -> None:
    names = config.data.classes or ()
    seed_everything(config.seed)
    backbone = load_backbone(
        config.model.backbone, config.model.weights, pixels=config.model.pixels, pool=config.model.pool
    )
    model, strategy = _trained(older, backbone, config)
    card = ModelCard(
        backbone=config.model.backbone,
        weights=config.model.weights,
        pool=backbone.pool,
        pixels=backbone.preprocess.pixels,
        dropout=0.0,
        fingerprint=model.base_fingerprint(),
        preprocess=backbone.preprocess.to_dict(),
        fundus=FundusSettings.of(config.data, backbone.preprocess).to_dict(),
        classes=names,
        adapt=config.adapt.model_dump(mode="json"),
        head_norm=older.head.norm is not None,
    )
    report = older.report.to_dict() | {"assumed": list(assumed)}
    if not older.body and backbone.report is not None:
        report["base"] = backbone.report.to_dict()
    folder.write_config(config)
    folder.write_environment(runtime.describe())
    folder.write_load_report(report)
    folder.save_best(strategy.checkpoint(model), card)
    folder.settle(card.epoch)
    if folder.main:
        print(f"{older.path}: {describe(older, names)}")
        print(older.report.summary())
        if not older.body and backbone.report is not None:
            print(f"base: {backbone.report.summary()}")
        for one in assumed:
            print(f"assumed: {one}")


def _trained(older: Older, backbone: Backbone, config: Config) -> tuple[Classifier, Strategy]:
    """The classifier with the file's head and adapters in it, and the strategy that keeps them."""
    import torch

    model = Classifier(backbone, len(older.head.weight), 0.0)
    if older.head.norm is not None:
        put_norm_before(model)
    strategy = parse_adapt(config.adapt).build()
    model = strategy.apply(model)
    head = dict(model.head.named_parameters())
    linear = max(head, key=lambda name: (head[name].ndim, name)).removesuffix("weight")
    wanted: dict[str, torch.Tensor] = {f"{linear}weight": older.head.weight, f"{linear}bias": older.head.bias}
    if older.head.norm is not None:
        wanted |= {"0.weight": older.head.norm[0], "0.bias": older.head.norm[1]}
    targets = {f"head.{name}": parameter for name, parameter in head.items()}
    values = {f"head.{name}": tensor for name, tensor in wanted.items()}
    for layer, (a, b) in older.adapters.items():
        for side, tensor in (("A", a), ("B", b)):
            name = f"backbone.network.{layer}.lora_{side}.default.weight"
            targets[name], values[name] = model.get_parameter(name), tensor
    if set(targets) != set(values):
        raise RunError(f"{older.path}: its head has other tensors than the network's: {', '.join(sorted(values))}.")
    with torch.no_grad():
        for name, target in targets.items():
            if not torch.isfinite(values[name]).all():
                raise WeightsError(f"{older.path} is damaged: {name} holds NaN or infinity.")
            target.copy_(values[name])
    return model, strategy
