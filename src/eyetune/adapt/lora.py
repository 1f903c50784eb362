"""Low-rank adapters on a frozen backbone, by PEFT: train, save, load, switch, merge.

LoRA: Hu et al., ICLR 2022. DoRA: Liu et al., ICML 2024. rsLoRA: Kalajdzievski, 2023.

PEFT's layers go into the network in place, so everything else keeps its name. A saved adapter is PEFT's own folder:

    adapter_config.json            which layers, rank, alpha, …
    adapter_model.safetensors      the low-rank matrices, and the head under the name of timm's classifier
    eyetune_adapter.json           the fingerprint of the base weights, the head's shape; written last

``peft.PeftModel.from_pretrained(timm_network, folder)`` reads it without EyeTune: with the classifier of a network
created with K classes, or its features alone when it was created without.
"""

from __future__ import annotations

import copy
import json
import re
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator

from eyetune.adapt.strategy import STRATEGIES, Strategy, StrategyConfig, load_audited
from eyetune.errors import ConfigError, RunError, did_you_mean
from eyetune.files import write_json, write_text
from eyetune.tensors import read_tensors, write_tensors

if TYPE_CHECKING:
    from torch import Tensor, nn

    from eyetune.adapt.classifier import Classifier, SharedLinear
    from eyetune.backbones.backbone import Backbone, LayerGroup

PEFT_PREFIX = "base_model.model."
"""What PEFT puts before every name in its files."""

CARD = "eyetune_adapter.json"

DEFAULT_TARGETS = (
    ("qkv",),  # ViT, DeiT, DINOv2, Swin, CLIP as timm builds it
    ("query", "key", "value"),  # BERT
    ("q_proj", "k_proj", "v_proj"),  # EVA
    ("mlp.fc1", "mlp.fc2"),  # ConvNeXt; Swin v2, whose attention uses the weight of qkv without calling the layer
    ("conv_pw", "conv_pwl"),  # EfficientNet, MobileNet: the depthwise convolutions have no low rank to exploit
    ("conv1", "conv2", "conv3"),  # ResNet: the convolutions of the residual blocks
)
"""What is adapted when no targets are given: those of the first row of which the network has any."""


@STRATEGIES.register("lora")
class LoraConfig(StrategyConfig):
    """Train low-rank additions to a few layers, and the head; the backbone stays as published. Small files."""

    kind: Literal["lora"] = "lora"
    """Strategy: low-rank adapters and the head."""

    r: int = Field(default=8, ge=1)
    """Rank of the adapters."""

    alpha: float = Field(default=32.0, gt=0)
    """Weight of the adapters: their output counts alpha / r times (with rslora, alpha / sqrt(r))."""

    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of an adapter's inputs dropped in training."""

    targets: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Layers to adapt, by name: qkv, proj, fc1, fc2. None = the architecture's default (qkv in transformers)."""

    dora: bool = False
    """Learn the magnitude of each weight column apart from its direction (DoRA)."""

    rslora: bool = False
    """Scale by alpha / sqrt(r) rather than alpha / r, so that high ranks learn as fast (rsLoRA)."""

    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Learning rate of each layer's adapters over that of the layer above. 1 = the same everywhere."""

    default_lr: ClassVar[float] = 5e-4

    @field_validator("targets", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        """Accept `qkv` and `qkv,proj` for the list."""
        return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value

    def build(self) -> Lora:
        """The strategy with these settings."""
        return Lora(self)


class Lora(Strategy):
    """Adapters and head train; the backbone is frozen and in eval mode, except for the dropout of the adapters."""

    shardable = True

    def __init__(self, config: LoraConfig) -> None:
        self.config = config
        self.layer_decay = config.layer_decay
        self._layers: list[LayerGroup] = []

    def apply(self, model: Classifier) -> Classifier:
        """Freeze the backbone and put adapters into it.

        Raises ConfigError when a target is not a layer that can be adapted, with the list of those that can.
        """
        if model.heads:
            raise ValueError("the model carries adapters already: start from a fresh one")
        model.base_fingerprint()
        self._layers = model.backbone.layer_groups()
        targets = resolve_targets(model.backbone, self.config.targets)
        classifier = peft_classifier(model.backbone)
        _inject(
            model.backbone.network,
            {
                "r": self.config.r,
                "lora_alpha": self.config.alpha,
                "lora_dropout": self.config.dropout,
                "use_dora": self.config.dora,
                "use_rslora": self.config.rslora,
                "target_modules": targets,
                "modules_to_save": None if classifier is None else [classifier],
            },
            "default",
        )
        model.heads["default"] = model.head
        use_adapter(model, "default")
        return model

    def layers(self, model: Classifier) -> list[LayerGroup]:
        """The adapters in the layer groups of the weights they adapt, which were noted before wrapping."""
        home = {id(parameter): index for index, group in enumerate(self._layers) for _, parameter in group.parameters}
        members: list[list[tuple[str, nn.Parameter]]] = [[] for _ in self._layers]
        for name, layer in _lora_layers(model.backbone.network):
            index = home[id(layer.get_base_layer().weight)]
            members[index] += [
                (f"{name}.{own}", p) for own, p in layer.named_parameters() if not own.startswith("base_layer.")
            ]
        return [replace(group, parameters=tuple(members[index])) for index, group in enumerate(self._layers)]

    def set_mode(self, model: Classifier, training: bool) -> None:
        """Train mode for the adapters' dropout and the head; eval mode for everything else, always."""
        model.eval()
        if training:
            model.training = True
            model.head.train()
            for _, layer in _lora_layers(model.backbone.network):
                # The layer too: DoRA looks at its own mode to know whether dropout acts.
                layer.training = True
                layer.lora_dropout.train()

    def saved(self, model: Classifier, name: str) -> bool:
        """The adapter in use and the head."""
        return name.startswith("head.") or _belongs_to(name, str(model.adapter))

    def write_artifacts(self, model: Classifier, folder: Path) -> None:
        """`adapter/`: the adapter in use and the head, in PEFT's layout."""
        save_adapter(model, folder / "adapter")


def resolve_targets(backbone: Backbone, targets: tuple[str, ...] | None) -> list[str]:
    """The full names, inside the network, of the layers that `targets` mean.

    A target is the last part of a layer's name (`qkv`, `attn.proj`), in every block, or a full name. The stem (patch
    embedding, first convolutions) is only meant by its full name: `proj` is the attention's projection, not the
    patch embedding's. None takes the first row of :data:`DEFAULT_TARGETS` that the network has, or every layer that
    can be adapted.

    Raises ConfigError, with the valid names, for a target that is none of them.
    """
    eligible = adaptable_layers(backbone)
    body = [name for name, in_stem in eligible.items() if not in_stem]
    short = list(dict.fromkeys(_short_name(name) for name in body))
    if targets is None:
        rows = [tuple(target for target in row if _ending(body, target)) for row in DEFAULT_TARGETS]
        targets = next((row for row in rows if row), tuple(short))
    chosen: dict[str, None] = {}
    for target in targets:
        found = _ending(body, target) or [name for name in eligible if name == target]
        if not found:
            raise ConfigError(
                f"adapt.targets: {target!r} is not a layer of {backbone.spec.name} that LoRA can adapt."
                f"{did_you_mean(target, short)} Valid: {', '.join(short) or 'none'}."
            )
        chosen.update(dict.fromkeys(found))
    if not chosen:
        raise ConfigError(f"adapt.kind: {backbone.spec.name} has no layer that LoRA can adapt. Use gradual or full.")
    return list(chosen)


def adaptable_layers(backbone: Backbone) -> dict[str, bool]:
    """The full names of the layers LoRA can adapt, and whether each is in the stem.

    Plain linear layers and plain convolutions that the network calls when it computes features. Left out: grouped
    and dilated convolutions (PEFT cannot merge the first and ignores the dilation of the second), subclasses that
    change their weight before they use it, and layers whose weight the network uses without calling them (the
    attention of EVA, BEiT and Swin v2, ``nn.MultiheadAttention``): an adapter there would do nothing, silently.
    """
    from torch import nn

    plain: dict[str, nn.Module] = {}
    for name, module in backbone.network.named_modules():
        if type(module) is nn.Linear or (
            type(module) is nn.Conv2d and module.groups == 1 and set(module.dilation) == {1}
        ):
            plain[name] = module
    called: set[str] = set()
    hooks = [
        module.register_forward_pre_hook(lambda _module, _inputs, name=name: called.add(name))
        for name, module in plain.items()
    ]
    try:
        _dry_run(backbone)
    finally:
        for hook in hooks:
            hook.remove()
    stem = {id(p) for group in backbone.layer_groups() if group.kind == "stem" for _, p in group.parameters}
    return {name: id(module.weight) in stem for name, module in plain.items() if name in called}


def _dry_run(backbone: Backbone) -> None:
    """Compute the features of one input for the sake of hooks: by shapes alone, or in earnest where that fails."""
    import torch
    from torch.func import functional_call

    parameter = next(backbone.parameters())
    tensors = [*backbone.named_parameters(), *backbone.named_buffers()]
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors}
    modes = {module: module.training for module in backbone.modules()}
    try:
        backbone.eval()
        with torch.no_grad():
            try:
                functional_call(backbone, shapes, (backbone.example(parameter.dtype).to("meta"),))
            except (NotImplementedError, RuntimeError):
                # The network looks at values or keeps tensors that are not registered: it needs real numbers.
                backbone(backbone.example(parameter.dtype).to(parameter.device))
    finally:
        for module, mode in modes.items():
            module.training = mode


def peft_classifier(backbone: Backbone) -> str | None:
    """The name of the layer that a plain timm network of this architecture classifies with: `head`, `fc`, `head.fc`.

    None when the backbone's feature is not what that layer takes (a projection, several blocks joined): then a plain
    PEFT user gets the adapted features, and only EyeTune the head.
    """
    name = (getattr(backbone.network, "pretrained_cfg", None) or {}).get("classifier", "head")
    same_width = getattr(backbone.network, "head_hidden_size", None) == backbone.width
    modules = {module for module, _ in backbone.network.named_modules()}
    return name if isinstance(name, str) and same_width and name in modules else None


def save_adapter(model: Classifier, folder: Path) -> None:
    """Write the adapter in use and its head to `folder`, in PEFT's layout (see the top of this file).

    Raises UserError when the folder cannot be written, RunError when the head is more than one linear layer (the norm
    of some programs' checkpoints would be lost), and ValueError when the model has no adapter.
    """
    folder = Path(folder)
    from eyetune.adapt.classifier import SharedLinear

    name = _active(model)
    if len([module for module in model.head.modules() if any(True for _ in module.parameters(recurse=False))]) != 1:
        raise RunError(
            "the head is more than one linear layer (a norm stands before it), which PEFT's layout has no place for: "
            "eyetune export --to onnx keeps it."
        )
    config = _configs(model.backbone.network)[name]
    classifier = (config.modules_to_save or ["head"])[0]
    tensors = {f"{PEFT_PREFIX}{key}": tensor for key, tensor in _adapter_tensors(model.backbone.network, name).items()}
    linear = _linear(model.head)
    for key, tensor in linear.state_dict().items():
        # Other programs know no shared weights: the one row is written once for each output.
        whole = tensor.expand(model.outputs, -1).contiguous() if key == "weight" else tensor
        tensors[f"{PEFT_PREFIX}{classifier}.{key}"] = whole
    write_tensors(folder / "adapter_model.safetensors", tensors)
    with tempfile.TemporaryDirectory() as scratch:
        saved = copy.copy(config)
        saved.inference_mode = True
        saved.target_modules = sorted(config.target_modules)  # PEFT keeps a set: without order, without the same bytes
        saved.save_pretrained(scratch)
        write_text(folder / "adapter_config.json", (Path(scratch) / "adapter_config.json").read_text("utf-8") + "\n")
    write_json(
        folder / CARD,
        {
            "schema": 1,
            "backbone": model.backbone.spec.name,
            "pool": model.backbone.pool,
            "pixels": model.backbone.preprocess.pixels,
            "fingerprint": model.base_fingerprint(),
            "width": model.backbone.width,
            "num_classes": model.outputs,
            "shared_weights": isinstance(linear, SharedLinear),
            "head": classifier,
            "head_dropout": _dropout(model.head),
        },
    )


def load_adapter(model: Classifier, folder: Path, name: str) -> None:
    """Load the adapter in `folder` over the model's base, call it `name`, and use it.

    The model may carry other adapters already; :func:`use_adapter` switches between them. The new head replaces the
    one in use and may have another number of classes.

    Raises:
        RunError: the folder is not a whole adapter, the tensors do not fit, or the adapter was trained over other
            base weights (the text says which).
        ValueError: the name is taken, or has a dot in it.
    """
    from eyetune.adapt.classifier import make_head

    if name in model.heads or not name or "." in name:
        raise ValueError(f"{name!r} cannot be the name of another adapter: it is taken, empty, or has a dot")
    folder = Path(folder)
    card = read_card(folder)
    _check_base(model, card, folder)
    config = _read_peft_config(folder)
    tensors = read_tensors(folder / "adapter_model.safetensors")
    network = model.backbone.network
    device = next(network.parameters()).device
    shared = bool(card.get("shared_weights"))
    head = make_head(model.backbone.width, card["num_classes"], card["head_dropout"], shared=shared).to(device)
    if shared:
        tensors = _one_row(tensors, f"{PEFT_PREFIX}{card['head']}.weight", folder)
    _inject(network, config, name)
    own = {f"{PEFT_PREFIX}{key}": tensor for key, tensor in _adapter_tensors(network, name).items()}
    own |= {f"{PEFT_PREFIX}{card['head']}.{key}": tensor for key, tensor in _linear(head).state_dict().items()}
    try:
        load_audited(own, tensors, f"the adapter in {folder}")
    except RunError:
        if model.adapter is not None:
            use_adapter(model, model.adapter)
        _remove(network, name)
        raise
    model.heads[name] = head
    use_adapter(model, name)


def _one_row(tensors: Mapping[str, Tensor], name: str, folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter whose outputs share their weights, these as one row again.

    Raises RunError when the rows differ: then another program has trained them.
    """
    weight = tensors.get(name)
    if weight is None or weight.ndim != 2 or len(weight) == 0:
        return dict(tensors)  # what is missing is said with everything else that does not fit
    if not bool((weight == weight[:1]).all()):
        raise RunError(f"the adapter in {folder} has a head of shared weights (CORAL), and its rows differ.")
    return {**tensors, name: weight[:1].contiguous()}


def use_adapter(model: Classifier, name: str) -> None:
    """Switch to the adapter `name`, its head included; only they train. Raises RunError when there is none."""
    from torch import nn

    if name not in model.heads:
        raise RunError(f"no adapter called {name!r}. Loaded: {', '.join(model.heads) or 'none'}.")
    head = model.heads[name].to(next(model.backbone.parameters()).device)
    head.train(model.head.training)
    for _, layer in _lora_layers(model.backbone.network):
        layer.set_adapter(name)
    model.head, model.adapter = head, name
    model.outputs = 0 if isinstance(head, nn.Identity) else _linear(head).out_features
    model.backbone.requires_grad_(False)
    for own, parameter in model.backbone.named_parameters():
        if _belongs_to(own, name):
            parameter.requires_grad_(True)
    model.head.requires_grad_(True)


def merge(model: Classifier) -> Classifier:
    """A plain copy of `model` with the adapter in use added into the weights; `model` stays as it is.

    Raises RunError when the adapter's values are not finite, ValueError when the model has no adapter.
    """
    _active(model)
    merged = copy.deepcopy(model)
    merge_in_place(merged)
    return merged


def merge_in_place(model: Classifier) -> None:
    """Add the adapter in use into the weights of `model`, which becomes a plain network, all of which trains.

    Without a second copy of a large network, and without a way back. Raises as :func:`merge`: values that are not
    finite are found before anything changes.
    """
    import torch

    name = _active(model)
    network = model.backbone.network
    for own, parameter in network.named_parameters():
        if _belongs_to(own, name) and not torch.isfinite(parameter).all():
            raise RunError(f"the adapter {name!r} cannot be merged: {own} holds NaN or infinity.")
    for path, layer in _lora_layers(network):
        try:
            layer.merge(safe_merge=True, adapter_names=[name])
        except ValueError as error:
            raise RunError(f"the adapter {name!r} cannot be merged: {error}.") from error
        _replace(network, path, layer.get_base_layer())
    _unwrap_classifier(network)
    del network.peft_config
    model.heads, model.adapter, model._base_fingerprint = {}, None, None
    model.requires_grad_(True)


def read_card(folder: Path) -> dict[str, Any]:
    """What :func:`save_adapter` noted beside the adapter. Raises RunError when it is missing or damaged."""
    path = Path(folder) / CARD
    try:
        card = json.loads(path.read_text("utf-8"))
        whole = {key: card[key] for key in ("backbone", "fingerprint", "width", "num_classes", "head", "head_dropout")}
    except FileNotFoundError as error:
        raise RunError(f"{folder} is not a whole EyeTune adapter: {CARD} is missing.") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is damaged ({error}).") from error
    return {**card, **whole}


def _check_base(model: Classifier, card: Mapping[str, Any], folder: Path) -> None:
    ours = model.base_fingerprint()
    if card["fingerprint"] != ours or card["width"] != model.backbone.width:
        raise RunError(
            f"the adapter in {folder} was trained over other weights: {card['backbone']} "
            f"(fingerprint {card['fingerprint'][:12]}, width {card['width']}); this base is "
            f"{model.backbone.spec.name} (fingerprint {ours[:12]}, width {model.backbone.width}). "
            "Load the weights it was trained over."
        )


def _read_peft_config(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
        if config["peft_type"] != "LORA":
            raise ValueError(f"it is of the type {config['peft_type']}")
    except FileNotFoundError as error:
        raise RunError(f"{folder} is not a PEFT adapter: adapter_config.json is missing.") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is not the configuration of a LoRA adapter ({error}).") from error
    fields = ("r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora", "target_modules", "modules_to_save")
    missing = [name for name in fields if name not in config]
    if missing:
        raise RunError(f"{path} lacks {', '.join(missing)}.")
    return {name: config[name] for name in fields}


def _inject(network: nn.Module, settings: Mapping[str, Any], name: str) -> None:
    """Put PEFT's LoRA layers into `network`, in place, for an adapter called `name`."""
    import peft

    with warnings.catch_warnings():
        # A second adapter on one network is what is wanted, not an oversight.
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        peft.inject_adapter_in_model(peft.LoraConfig(**settings), network, adapter_name=name)
    for _, layer in _lora_layers(network):
        # Autocast chooses the precision; PEFT's own cast would take a half-precision input back to float32.
        layer.cast_input_dtype_enabled = False


def _remove(network: nn.Module, name: str) -> None:
    """Take the adapter `name` out again; without any left, the network is as it was."""
    del _configs(network)[name]
    for path, layer in _lora_layers(network):
        layer.delete_adapter(name)
        if not _configs(network):
            _replace(network, path, layer.get_base_layer())
    if not _configs(network):
        _unwrap_classifier(network)
        del network.peft_config


def _unwrap_classifier(network: nn.Module) -> None:
    """Put back the layer that PEFT wrapped because it is in `modules_to_save`. It never trained: the head is ours."""
    from peft.utils import ModulesToSaveWrapper

    for path, module in list(network.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            _replace(network, path, module.original_module)


def _replace(network: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(network.get_submodule(parent), child, module)


def _lora_layers(network: nn.Module) -> list[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return [(name, module) for name, module in network.named_modules() if isinstance(module, LoraLayer)]


def _belongs_to(parameter: str, name: str) -> bool:
    """Whether a parameter of the wrapped network is one of the adapter `name`."""
    return re.search(rf"\.lora_\w+\.{re.escape(name)}(\.|$)", parameter) is not None


def _adapter_tensors(network: nn.Module, name: str) -> dict[str, Tensor]:
    """The live tensors of an adapter, under the names PEFT saves them with (without its prefix)."""
    import peft

    tensors: dict[str, Tensor] = peft.get_peft_model_state_dict(network, adapter_name=name)
    return tensors


def _configs(network: nn.Module) -> dict[str, Any]:
    """PEFT's configuration of every adapter in `network`, by name."""
    configs: Any = network.peft_config
    found: dict[str, Any] = configs
    return found


def _active(model: Classifier) -> str:
    if model.adapter is None:
        raise ValueError("the model has no LoRA adapter")
    return model.adapter


def _linear(head: nn.Module) -> nn.Linear | SharedLinear:
    from torch import nn

    from eyetune.adapt.classifier import SharedLinear

    return next(module for module in head.modules() if isinstance(module, (nn.Linear, SharedLinear)))


def _dropout(head: nn.Module) -> float:
    from torch import nn

    return next((module.p for module in head.modules() if isinstance(module, nn.Dropout)), 0.0)


def _ending(names: list[str], target: str) -> list[str]:
    return [name for name in names if name.endswith(f".{target}")]


def _short_name(name: str) -> str:
    """The last part of a layer's name that says what it is: `qkv`, `downsample.1`."""
    match = re.search(r"[^.\d][^.]*(?:\.\d+)*$", name)
    return match.group(0) if match else name
