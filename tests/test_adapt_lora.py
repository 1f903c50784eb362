"""LoRA: what is adapted, how many numbers train, and that an adapter survives the disk, PEFT, switching, merging."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import timm
import torch
from adapt_kit import REAL, SMALL, backbone, images, pixels
from torch import nn
from torch.nn import functional as F

from eyetune.adapt import count_parameters, describe_parameters
from eyetune.adapt.classifier import Classifier, put_norm_before
from eyetune.adapt.lora import (
    Lora,
    LoraConfig,
    adaptable_layers,
    load_adapter,
    merge,
    peft_classifier,
    resolve_targets,
    save_adapter,
    use_adapter,
)
from eyetune.backbones import load_backbone
from eyetune.errors import ConfigError, RunError

ARCHITECTURES = [*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in REAL)]


def trained(name: str = "test_vit", classes: int = 5, seed: int = 0, **settings: Any) -> Classifier:
    """A classifier with an adapter that was trained for three steps, in eval mode."""
    base = backbone(name)
    torch.manual_seed(seed)
    strategy = Lora(LoraConfig(**settings))
    model = strategy.apply(Classifier(base, classes, dropout=0.25))
    optimizer = torch.optim.AdamW([{"params": g.parameters} for g in strategy.groups(model)], lr=0.01)
    strategy.set_mode(model, True)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(images(name)), torch.tensor([0, 1, 2, 0]) % classes).backward()
        optimizer.step()
    strategy.set_mode(model, False)
    return model


@torch.no_grad()
def outputs(model: nn.Module, name: str = "test_vit") -> torch.Tensor:
    return model(images(name))


# What is adapted


def test_retfound_trains_786432_numbers_and_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        base = load_backbone("retfound", weights="random")
        monkeypatch.setattr(base, "fingerprint", lambda: "none: the network has no numbers")
        model = Lora(LoraConfig()).apply(Classifier(base, 5))

    trainable, total = count_parameters(model)

    assert trainable == 24 * (8 * 1024 + 3072 * 8) + (1024 * 5 + 5) == 791_557
    assert total == 303_301_632 + trainable
    assert describe_parameters(model) == "trains 791,557 of 304,093,189 parameters (0.26%)"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("test_vit", {f"blocks.{i}.attn.qkv" for i in range(6)}),
        ("test_convnext", {"stages.0.blocks.0.mlp.fc1", "stages.3.blocks.1.mlp.fc2"}),
        ("test_efficientnet", {"blocks.3.0.conv_pw", "blocks.1.0.conv_pwl"}),
        ("test_resnet", {"layer1.0.conv1", "layer4.0.conv2"}),
    ],
)
def test_each_architecture_has_its_default(name: str, expected: set[str]) -> None:
    base = backbone(name)
    found = set(resolve_targets(base, None))

    assert expected <= found
    stem = {own for group in base.layer_groups() if group.kind == "stem" for own, _ in group.parameters}
    assert not {f"{layer}.weight" for layer in found} & stem


def test_proj_means_the_attention_not_the_patch_embedding() -> None:
    base = backbone()

    assert resolve_targets(base, ("proj",)) == [f"blocks.{i}.attn.proj" for i in range(6)]
    assert resolve_targets(base, ("patch_embed.proj",)) == ["patch_embed.proj"]


def test_an_unknown_target_is_refused_with_the_valid_ones() -> None:
    with pytest.raises(ConfigError, match=r"'qvk'.*test_vit.*Did you mean 'qkv'\?.*Valid: qkv, proj, fc1, fc2\."):
        Lora(LoraConfig(targets=("qvk",))).apply(Classifier(backbone(), 5))


def test_depthwise_convolutions_are_refused() -> None:
    base = backbone("test_efficientnet")
    depthwise = {own for own, module in base.network.named_modules() if getattr(module, "groups", 1) > 1}

    assert depthwise
    assert not depthwise & set(adaptable_layers(base))
    with pytest.raises(ConfigError, match="conv_dw"):
        resolve_targets(base, ("conv_dw",))


class _FusedAttention(nn.Module):
    """A network as CLIP writes it: attention with one in_proj weight, its output layer used without a call."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(2).transpose(1, 2)[..., :1].expand(-1, 4, 8)
        return self.fc(self.attn(tokens, tokens, tokens)[0].mean(1))


@pytest.mark.parametrize("target", ["in_proj", "out_proj", "attn"])
def test_fused_attention_is_refused_rather_than_adapted_without_effect(target: str) -> None:
    base = backbone()
    base.network = nn.Sequential(nn.AdaptiveAvgPool2d(2), _FusedAttention())

    with pytest.raises(ConfigError, match=rf"'{target}' is not a layer .* Valid: fc\."):
        resolve_targets(base, (target,))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["swinv2_tiny_window8_256", "eva02_tiny_patch14_224"])
def test_attention_that_uses_its_weight_without_a_call_is_not_a_default(name: str) -> None:
    base = load_backbone(name, weights="random")

    assert not any("qkv" in layer or layer.endswith("q_proj") for layer in resolve_targets(base, None))
    with pytest.raises(ConfigError, match="qkv"):
        resolve_targets(base, ("qkv",))


def test_looking_for_layers_leaves_the_network_as_it_was() -> None:
    base = backbone("test_resnet").train()
    before = {own: tensor.clone() for own, tensor in base.state_dict().items()}

    adaptable_layers(base)

    assert all(module.training for module in base.modules())
    assert all(torch.equal(tensor, before[own]) for own, tensor in base.state_dict().items())
    assert not any(module._forward_pre_hooks for module in base.modules())


class _LooksAtValues(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if x.abs().max().item() >= 0 else x


def test_layers_are_found_in_a_network_that_looks_at_values() -> None:
    base = backbone()
    base.network = _LooksAtValues(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))

    assert list(adaptable_layers(base)) == ["2"]


# Training


def test_a_new_adapter_changes_nothing() -> None:
    base = backbone()
    before = outputs(base.eval())

    model = Lora(LoraConfig()).apply(Classifier(base, 5)).eval()

    assert torch.equal(outputs(model.backbone), before)


def test_only_the_dropout_of_adapters_and_head_is_in_train_mode() -> None:
    strategy = Lora(LoraConfig())
    model = strategy.apply(Classifier(backbone(), 5, dropout=0.2))

    strategy.set_mode(model, True)

    acting = {name for name, module in model.named_modules() if isinstance(module, nn.Dropout) and module.training}
    adapters = {f"backbone.network.blocks.{i}.attn.qkv.lora_dropout.default" for i in range(6)}
    assert acting == adapters | {"head.0"}
    assert not model.backbone.network.blocks[0].norm1.training


def test_batch_norm_statistics_of_the_frozen_network_stay() -> None:
    strategy = Lora(LoraConfig())
    model = strategy.apply(Classifier(backbone("test_resnet"), 5))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    strategy.set_mode(model, True)

    model(images())

    assert before
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_adapters_take_the_layer_groups_of_the_weights_they_adapt() -> None:
    strategy = Lora(LoraConfig(targets=("qkv", "fc1"), layer_decay=0.5))
    model = strategy.apply(Classifier(backbone(), 5))

    groups = {group.name: group for group in strategy.groups(model)}

    assert [name for name in groups if "head" not in name] == [f"backbone.blocks.{i}" for i in range(6)]
    top = groups["backbone.blocks.5"]
    assert top.scale == 0.25, "the final norm, between it and the head, has a step of its own"
    assert {id(p) for p in top.parameters} == {
        id(p) for name, p in model.backbone.network.blocks[5].named_parameters() if ".lora_" in name
    }


def test_layers_are_the_adapters_only() -> None:
    strategy = Lora(LoraConfig(targets=("qkv", "fc1"), dora=True))
    model = strategy.apply(Classifier(backbone(), 5))

    found = [(name, p) for group in strategy.layers(model) for name, p in group.parameters]

    assert len(found) == 6 * 2 * 3
    assert all(".lora_" in name and parameter.requires_grad for name, parameter in found)


def test_the_adapter_trains_with_recomputed_activations() -> None:
    strategy = Lora(LoraConfig(dropout=0.0))
    model = strategy.apply(Classifier(backbone(), 5))
    strategy.set_mode(model, True)
    gradients = []
    for on in (False, True):
        model.zero_grad()
        model.backbone.set_grad_checkpointing(on)
        model(images()).sum().backward()
        gradients.append(model.backbone.network.blocks[0].attn.qkv.lora_B["default"].weight.grad.clone())

    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("settings", [{"dora": True}, {"rslora": True}, {"dora": True, "rslora": True}])
def test_dora_and_rslora_train_all_they_add_and_merge(name: str, settings: dict[str, bool]) -> None:
    base = backbone(name)
    strategy = Lora(LoraConfig(dropout=0.0, **settings))
    torch.manual_seed(0)
    start = {n: p.clone() for n, p in strategy.apply(Classifier(base, 5)).named_parameters() if p.requires_grad}
    model = trained(name, dropout=0.0, **settings)

    assert any("magnitude" in own for own in start) == settings.get("dora", False)
    same = {own for own, p in model.named_parameters() if p.requires_grad and torch.equal(p, start[own])}
    assert same == set()
    torch.testing.assert_close(outputs(merge(model).eval(), name), outputs(model, name), atol=1e-5, rtol=1e-5)


def test_rslora_scales_by_the_root_of_the_rank() -> None:
    plain, stable = (
        Lora(LoraConfig(r=16, alpha=32, rslora=on)).apply(Classifier(backbone(), 5)) for on in (False, True)
    )

    scales = [model.backbone.network.blocks[0].attn.qkv.scaling["default"] for model in (plain, stable)]
    assert scales == [2, 8]


# Saving, loading, switching, merging


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_saved_adapter_gives_the_same_outputs_again(name: str, tmp_path: Path) -> None:
    model = trained(name)
    save_adapter(model, tmp_path)

    other = Classifier(backbone(name), 2)
    load_adapter(other, tmp_path, "again")

    torch.testing.assert_close(outputs(other.eval(), name), outputs(model, name), atol=1e-5, rtol=0)
    assert other.outputs == 5
    assert other.head[0].p == 0.25
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_plain_peft_reads_the_adapter_over_the_plain_timm_network(name: str, tmp_path: Path) -> None:
    model = trained(name)
    save_adapter(model, tmp_path)
    size = {"img_size": pixels(name)} if name.startswith(("test_vit", "vit", "swin", "deit")) else {}
    weights = backbone(name).network.state_dict()

    whole = timm.create_model(name, num_classes=5, **size)
    whole.load_state_dict(weights, strict=False)
    whole = peft.PeftModel.from_pretrained(whole, tmp_path).eval()
    headless = timm.create_model(name, num_classes=0, **size)
    headless.load_state_dict(weights)
    headless = peft.PeftModel.from_pretrained(headless, tmp_path).eval()

    torch.testing.assert_close(outputs(whole, name), outputs(model, name), atol=1e-5, rtol=0)
    torch.testing.assert_close(outputs(headless, name), outputs(model.backbone, name), atol=1e-5, rtol=0)


def test_plain_peft_reads_the_features_where_timm_has_no_head_of_that_width(tmp_path: Path) -> None:
    base = backbone()
    base.network.head_hidden_size = 7
    assert peft_classifier(base) is None
    model = Lora(LoraConfig()).apply(Classifier(base, 5)).eval()
    nn.init.normal_(model.backbone.network.blocks[0].attn.qkv.lora_B["default"].weight)
    save_adapter(model, tmp_path)

    plain = timm.create_model("test_vit", num_classes=0, img_size=32)
    plain.load_state_dict(backbone().network.state_dict())
    plain = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    again = Classifier(backbone(), 5)
    load_adapter(again, tmp_path, "again")

    torch.testing.assert_close(outputs(plain), outputs(model.backbone), atol=1e-5, rtol=0)
    torch.testing.assert_close(outputs(again.eval()), outputs(model), atol=1e-5, rtol=0)


def test_the_same_adapter_gives_the_same_bytes(tmp_path: Path) -> None:
    model = trained(targets=("qkv", "fc1", "fc2"))

    for folder in ("a", "b"):
        save_adapter(model, tmp_path / folder)

    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_several_adapters_on_one_base_are_switched_with_their_heads(tmp_path: Path) -> None:
    models = {"dr": trained(classes=5), "glaucoma": trained(classes=2, seed=1, r=4, targets=("proj",), dora=True)}
    base = Classifier(backbone(), 3)
    for name, model in models.items():
        save_adapter(model, tmp_path / name)
        load_adapter(base, tmp_path / name, name)
    base.eval()

    for name in ("dr", "glaucoma", "dr"):
        use_adapter(base, name)
        torch.testing.assert_close(outputs(base), outputs(models[name]), atol=1e-5, rtol=0)
        torch.testing.assert_close(outputs(merge(base).eval()), outputs(models[name]), atol=1e-5, rtol=1e-5)
        assert base.outputs == models[name].outputs
        assert count_parameters(base)[0] == count_parameters(models[name])[0]
    save_adapter(base, tmp_path / "copy")
    assert (tmp_path / "copy/adapter_model.safetensors").read_bytes() == (
        tmp_path / "dr/adapter_model.safetensors"
    ).read_bytes()


def test_switching_to_an_adapter_that_is_not_loaded_says_which_are() -> None:
    with pytest.raises(RunError, match=r"'messidor'.*Loaded: default"):
        use_adapter(trained(), "messidor")


def assert_plain(model: Classifier, name: str) -> None:
    """The network is built of the same modules as a fresh one: nothing of PEFT's is left."""
    modules = {own: type(module) for own, module in model.backbone.network.named_modules()}
    assert modules == {own: type(module) for own, module in backbone(name).network.named_modules()}
    assert not hasattr(model.backbone.network, "peft_config")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_merging_gives_a_plain_classifier_and_leaves_the_original(name: str) -> None:
    model = trained(name)
    before = outputs(model, name)

    plain = merge(model)

    torch.testing.assert_close(outputs(plain.eval(), name), before, atol=1e-5, rtol=1e-5)
    assert torch.equal(outputs(model, name), before)
    assert {own for own, _ in plain.named_parameters()} == {
        own for own, _ in Classifier(backbone(name), 5).named_parameters()
    }
    assert list(plain.backbone.network.state_dict()) == list(backbone(name).network.state_dict())
    assert_plain(plain, name)
    assert plain.base_fingerprint() != model.base_fingerprint()
    Lora(LoraConfig()).apply(plain)


def test_another_base_is_refused_by_name(tmp_path: Path) -> None:
    model = trained()
    save_adapter(model, tmp_path)
    other = Classifier(backbone(seed=1), 5)
    before = outputs(other.eval())

    with pytest.raises(RunError, match=f"trained over other weights: test_vit.*{model.base_fingerprint()[:12]}"):
        load_adapter(other, tmp_path, "dr")

    assert torch.equal(outputs(other), before)
    assert other.heads == {}


def _break(folder: Path, damage: str) -> None:
    if damage == "no card":
        (folder / "eyetune_adapter.json").unlink()
    elif damage == "half a card":
        (folder / "eyetune_adapter.json").write_text('{"schema": 1')
    elif damage == "no config":
        (folder / "adapter_config.json").unlink()
    elif damage == "other method":
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    elif damage == "half the weights":
        path = folder / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "other rank":
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 4}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no card", "not a whole EyeTune adapter"),
        ("half a card", "eyetune_adapter.json is damaged"),
        ("no config", "adapter_config.json is missing"),
        ("other method", "not the configuration of a LoRA adapter"),
        ("half the weights", "is damaged"),
        ("other rank", r"does not fit this model .*\n.*shape \(8, 64\), expected \(4, 64\)"),
    ],
)
def test_a_damaged_adapter_is_refused_and_the_model_stays_plain(damage: str, message: str, tmp_path: Path) -> None:
    save_adapter(trained(), tmp_path)
    _break(tmp_path, damage)
    model = Classifier(backbone(), 5)
    names = [name for name, _ in model.named_parameters()]

    with pytest.raises(RunError, match=message):
        load_adapter(model, tmp_path, "dr")

    assert [name for name, _ in model.named_parameters()] == names
    assert_plain(model, "test_vit")


def test_a_broken_second_adapter_leaves_the_first_in_use(tmp_path: Path) -> None:
    save_adapter(trained(), tmp_path)
    _break(tmp_path, "other rank")
    model = trained(classes=2)
    before = outputs(model)

    with pytest.raises(RunError, match="does not fit"):
        load_adapter(model, tmp_path, "second")

    assert torch.equal(outputs(model), before)
    assert count_parameters(model)[0] == count_parameters(trained(classes=2))[0]


@pytest.mark.parametrize("name", ["default", "a.b", ""])
def test_a_name_that_cannot_be_used_is_a_programming_error(name: str, tmp_path: Path) -> None:
    model = trained()
    save_adapter(model, tmp_path)

    with pytest.raises(ValueError, match="cannot be the name"):
        load_adapter(model, tmp_path, name)


def test_a_model_without_adapter_has_none_to_save_or_merge(tmp_path: Path) -> None:
    model = Classifier(backbone(), 5)

    with pytest.raises(ValueError, match="no LoRA adapter"):
        save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="no LoRA adapter"):
        merge(model)


def test_a_head_with_a_norm_is_not_saved_without_it(tmp_path: Path) -> None:
    model = trained()
    put_norm_before(model)

    with pytest.raises(RunError, match="a norm stands before it"):
        save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())
