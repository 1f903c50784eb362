"""The Python names of the older guides: real modules on the house's parts, audited loads, one message a mistake."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from guides_kit import GREEN, LARGE, WIDTH, checkout, importable, write_miniatures
from test_weights_files import RunsCode
from torch import Tensor, nn

from eyetune.adapt.strategy import count_parameters as ours
from eyetune.errors import ConfigError, RunError, UserError, WeightsError
from eyetune.guides.baseline import DRClassifier
from eyetune.guides.lora import RETFoundLoRA
from eyetune.guides.retfound import (
    VisionTransformer,
    get_retfound_green,
    load_retfound_green_model,
    load_retfound_model,
)
from eyetune.guides.settings import GuideConfig

__all__ = ["checkout"]  # a fixture

NAMES = {
    "model": ["DRClassifier"],
    "retfound_model": [
        "VisionTransformer",
        "get_retfound_green",
        "load_retfound_green_model",
        "load_retfound_model",
    ],
    "retfound_lora": ["RETFoundLoRA"],
    "config": ["Config", "load_config"],
    "utils": [
        "calculate_metrics",
        "count_parameters",
        "create_data_loaders",
        "load_checkpoint",
        "plot_confusion_matrix",
        "save_checkpoint",
        "set_seed",
    ],
    "validate_data": ["DataValidator"],
}


def images(pixels: int = 224, batch: int = 1) -> Tensor:
    return torch.randn(batch, 3, pixels, pixels, generator=torch.Generator().manual_seed(2))


def disturb(model: nn.Module) -> None:
    """Adapters and head as if they had been trained: every value its own."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("module", NAMES)
def test_every_name_is_there_and_documented(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    importable(monkeypatch)
    found = importlib.import_module(f"scripts.{module}")
    assert sorted(found.__all__) == NAMES[module]
    assert all(inspect.getdoc(getattr(found, name)) for name in NAMES[module])


# -- DRClassifier ------------------------------------------------------------------------------------------------------


def small(**options: Any) -> DRClassifier:
    return DRClassifier("test_resnet", pretrained=False, **options)


def test_classifier_gives_logits_and_counts_itself(capsys: pytest.CaptureFixture[str]) -> None:
    model = small()
    assert model.training
    assert model(images(32, 2))[:1].shape == (1, 5)
    assert model.get_num_params() == ours(model)[::-1] == (sum(p.numel() for p in model.parameters()),) * 2
    assert model.eval().forward_features(images(32)).shape == (1, model.get_feature_dim())
    model.summary()
    said = capsys.readouterr().out
    assert said.startswith("✓ Created DRClassifier with backbone: test_resnet\n  - Feature dimension: ")
    assert "  - Output classes: 5\n  - Dropout rate: 0.3\n  - Pretrained: False\n" in said
    assert small(num_classes=0).eval()(images(32)).shape == (1, model.get_feature_dim())


def test_a_frozen_backbone_does_not_move(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither its parameters nor its batch statistics, which plain PyTorch would go on counting."""
    model = small(freeze_backbone=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    model(images(32, 2)).square().sum().backward()
    optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"head.1.weight", "head.1.bias"}
    model.unfreeze_backbone()
    assert model.get_num_params()[0] == model.get_num_params()[1]
    model(images(32, 2))
    moved = "backbone.network.bn1.running_mean"
    assert not torch.equal(model.state_dict()[moved], before[moved])
    assert not model.eval().backbone.training


def test_classifier_from_a_configuration() -> None:
    section = {"name": "test_resnet", "num_classes": 3, "pretrained": False, "dropout": 0.2, "freeze_backbone": True}
    for config in (
        section,
        SimpleNamespace(**section),
        GuideConfig({f"model.{name}": value for name, value in section.items()}).model,
    ):
        model = DRClassifier.from_config(config)
        assert (model.model_name, model.num_classes, model.dropout_rate) == ("test_resnet", 3, 0.2)
        assert model.get_num_params()[1] == 3 * model.get_feature_dim() + 3
    with pytest.raises(ConfigError, match=r"DRClassifier is for timm's networks. Use RETFoundLoRA"):
        DRClassifier.from_config({"type": "retfound_lora"})
    with pytest.raises(ConfigError, match=r"model.dropuot: unknown. Did you mean 'model.dropout'"):
        DRClassifier.from_config(section | {"dropuot": 0.1})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_name": "resnet_50"}, "unknown backbone 'resnet_50'. Did you mean 'resnet50'"),
        ({"dropout_rate": 1.0}, "dropout: must be at least 0 and below 1, got 1.0"),
        ({"num_classes": -1}, "num_classes: must be a whole number, 0 or more, got -1"),
        ({"num_classes": True}, "num_classes: must be a whole number"),
        ({"checkpoint_path": "no.pth"}, "no weights at no.pth"),
    ],
)
def test_classifier_says_what_is_wrong(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DRClassifier(**{"model_name": "test_resnet", "pretrained": False, **options})


def test_pretrained_weights_are_asked_for_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def unreachable(name: str) -> None:
        asked.append(name)
        raise OSError("Name or service not known")

    monkeypatch.setattr("eyetune.backbones.timm_any.check_connection", unreachable)
    with pytest.raises(WeightsError, match=r"not known.*DRClassifier\('test_resnet', checkpoint_path=FILE\).*=False"):
        DRClassifier("test_resnet")
    small()
    assert asked == ["test_resnet"]
    assert DRClassifier("nano").pretrained  # its weights come with EyeTune


# -- RETFound ----------------------------------------------------------------------------------------------------------


def test_retfound_from_its_file(checkout: Path) -> None:
    model = load_retfound_model(checkpoint_path=LARGE, num_classes=5, global_pool=False)
    assert isinstance(model, VisionTransformer)
    assert model(images()).shape == (1, 5)
    assert model.backbone.report is not None
    assert model.backbone.report.whole
    assert {key for key, _ in model.backbone.report.dropped} == {"mask_token", "decoder_embed.bias", "epoch"}
    features = load_retfound_model(LARGE, num_classes=0)
    torch.testing.assert_close(features(images()), model.forward_features(images()))
    assert features(images()).shape == (1, features.get_feature_dim()) == (1, WIDTH)
    assert load_retfound_model(LARGE, global_pool=True).backbone.pool == "avg"
    assert get_retfound_green()(images(392)).shape == (1, WIDTH)
    assert load_retfound_green_model(GREEN)(images(392)).shape == (1, 5)


def test_retfound_says_what_is_wrong(checkout: Path) -> None:
    with pytest.raises(WeightsError, match=r"no weights at models/none.pth. Get them from https://huggingface.co"):
        load_retfound_model("models/none.pth")
    with pytest.raises(WeightsError, match=r"(?s)does not load whole into retfound-green.*Here .* is model_variant"):
        load_retfound_green_model(LARGE)
    with pytest.raises(WeightsError, match="retfound needs its weights"):
        RETFoundLoRA(None)
    with pytest.raises(UserError, match=r"timm has no weights of RETFound-Green. Download"):
        get_retfound_green(pretrained=True)
    with pytest.raises(ConfigError, match=r"'greeen' is not a variant\. Did you mean 'green'"):
        RETFoundLoRA(LARGE, model_variant="greeen")
    torch.save(RunsCode("ran"), checkout / "evil.pth")
    with pytest.raises(WeightsError, match="would run code"):
        RETFoundLoRA("evil.pth")


# -- RETFoundLoRA ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("file", "variant", "depth", "pixels"), [(LARGE, "large", 24, 224), (GREEN, "green", 12, 392)])
def test_only_adapters_and_head_train(
    file: str, variant: str, depth: int, pixels: int, checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = RETFoundLoRA(file, lora_r=4, lora_alpha=16, target_modules="qkv", model_variant=variant)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name or "head" in name for name in trainable)
    head = 2 * WIDTH + 5 * WIDTH + 5
    assert model.get_num_params()[1] == depth * (4 * WIDTH + 4 * 3 * WIDTH) + head
    model.print_trainable_parameters()
    total, trains = model.get_num_params()
    assert capsys.readouterr().out == (
        f"trainable params: {trains:,} || all params: {total:,} || trainable%: {100 * trains / total:.2f}%\n"
    )
    model(images(pixels)).square().sum().backward()
    gradients = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert gradients == set(trainable)
    # Dropout of adapters and head acts in training, and nothing else does.
    training = {type(module).__name__ for module in model.modules() if module.training}
    assert {"Dropout", "LayerNorm"} <= training
    assert not model.backbone.network.blocks[0].mlp.training  # type: ignore[index, union-attr]


def test_adapters_are_read_back(checkout: Path) -> None:
    model = RETFoundLoRA(LARGE).eval()
    fresh = model(images())
    disturb(model)
    model.save_lora_adapters("adapters/aptos.pth")
    logits = model(images())
    assert not torch.allclose(logits, fresh, atol=1e-3)
    disturb(model)
    assert not torch.equal(model(images()), logits)
    model.load_lora_adapters("adapters/aptos.pth")
    assert torch.equal(model(images()), logits)
    first = Path("adapters/aptos.pth").read_bytes()
    model.save_lora_adapters("adapters/again.pth")
    assert Path("adapters/again.pth").read_bytes() == first
    assert len(first) < 120_000  # adapters and head; the network has ten times as much


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_r": 4}, "lora_r: 8 in the file, 4 here"),
        ({"lora_alpha": 16}, r"lora_alpha: 32.0 in the file, 16.0 here"),
        ({"num_classes": 3}, "num_classes: 5 in the file, 3 here"),
        ({"target_modules": ["qkv", "proj"]}, r"target_modules: \['qkv'\] in the file, \['qkv', 'proj'\] here"),
        ({"checkpoint_path": LARGE, "model_variant": "large"}, "variant: 'green' in the file, 'large' here"),
        ({"checkpoint_path": "other/" + GREEN}, "trained over other base weights"),
    ],
)
def test_adapters_of_another_model_are_refused(options: dict[str, Any], message: str, checkout: Path) -> None:
    if not Path("a.pth").exists():
        RETFoundLoRA(GREEN, model_variant="green").save_lora_adapters("a.pth")
        Path("other").mkdir()
        write_miniatures(Path("other"), seed=1)
    model = RETFoundLoRA(**{"checkpoint_path": GREEN, "model_variant": "green", **options})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RunError, match=message):
        model.load_lora_adapters("a.pth")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_files_that_are_no_adapters(checkout: Path) -> None:
    model = RETFoundLoRA(GREEN, model_variant="green")
    with pytest.raises(RunError, match="holds no adapters"):
        model.load_lora_adapters(LARGE)
    with pytest.raises(WeightsError, match=r"no weights at none\.pth"):
        model.load_lora_adapters("none.pth")
    model.save_lora_adapters("whole.pth")
    content = torch.load("whole.pth", weights_only=True)
    name = next(iter(content["lora_state_dict"]))
    content["lora_state_dict"][name][0] = float("nan")
    torch.save(content, "nan.pth")
    with pytest.raises(RunError, match=r"holds NaN or infinity"):
        model.load_lora_adapters("nan.pth")
    Path("cut.pth").write_bytes(Path("whole.pth").read_bytes()[:5000])
    with pytest.raises(WeightsError, match="cut short"):
        model.load_lora_adapters("cut.pth")


def test_merged_for_good_and_the_same(checkout: Path) -> None:
    model = RETFoundLoRA(LARGE).eval()
    disturb(model)
    with torch.no_grad():
        before = model(images())
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(images()), before, atol=1e-5, rtol=1e-5)
    assert merged is model
    assert not [name for name in model.state_dict() if "lora_" in name or "base_layer" in name]
    total, trainable = model.get_num_params()
    assert total == trainable
    for act in (model.merge_and_unload, lambda: model.save_lora_adapters("x"), lambda: model.load_lora_adapters("x")):
        with pytest.raises(RunError, match="there are no adapters to"):
            act()


def test_broken_adapters_are_not_merged(checkout: Path) -> None:
    model = RETFoundLoRA(LARGE).eval()
    name, parameter = next((n, p) for n, p in model.named_parameters() if "blocks.23" in n and "lora_B" in n)
    with torch.no_grad():
        parameter[0, 0] = float("inf")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(RunError, match=r"cannot be merged: .*blocks\.23.* NaN or infinity"):
        model.merge_and_unload()
    assert name in model.state_dict()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_r": 0}, "lora_r: "),
        ({"lora_alpha": -1}, "lora_alpha: "),
        ({"target_modules": []}, "target_modules: "),
        ({"lora_dropout": 1}, "lora_dropout: "),
        ({"head_dropout": "much"}, "head_dropout: must be at least 0"),
        ({"num_classes": 0}, "num_classes: must be a whole number, 1 or more"),
        ({"target_modules": ["qk"]}, "'qk' is not a layer of retfound.* Did you mean 'qkv'"),
    ],
)
def test_lora_says_what_is_wrong(options: dict[str, Any], message: str, checkout: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        RETFoundLoRA(GREEN, model_variant="green", **options)
