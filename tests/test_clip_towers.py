"""Two towers, each frozen, adapted or trained whole: what trains, at which rate, and what a checkpoint holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from train_kit import tiny_backbone

from eyetune.clip.config import TowerConfig
from eyetune.clip.model import HEADS, SCALES, RetClip
from eyetune.clip.towers import BothTowers, merged_tower
from eyetune.data.transforms import level_steps, upright_steps
from eyetune.errors import ConfigError

transformers = pytest.importorskip("transformers")

TINY_BERT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 12,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
IDS = torch.tensor([[1, 5, 2, 0], [1, 6, 7, 2]])


def tiny_clip(**text: Any) -> RetClip:
    torch.manual_seed(0)
    bert = transformers.BertModel(transformers.BertConfig(**TINY_BERT | text), add_pooling_layer=False)
    return RetClip(tiny_backbone(), bert, 12, 10.0)


def adapted(image: str = "full", text: str = "full", **settings: Any) -> tuple[RetClip, BothTowers]:
    strategy = BothTowers(TowerConfig(kind=image, **settings), TowerConfig(kind=text, **settings))  # type: ignore[arg-type]
    return strategy.apply(tiny_clip()), strategy


KINDS = ("frozen", "lora", "full")


@pytest.mark.parametrize("image", KINDS)
@pytest.mark.parametrize("text", KINDS)
def test_each_tower_trains_as_told(image: str, text: str) -> None:
    model, strategy = adapted(image, text)
    trained = {id(p) for group in strategy.groups(model) for p in group.parameters}
    for tower, kind in (("visual.", image), ("bert.", text)):
        own = {name: p for name, p in model.named_parameters() if name.startswith(tower)}
        trains = {name for name, p in own.items() if id(p) in trained}
        assert trains == {name for name in own if kind == "full" or (kind == "lora" and "lora_" in name)}
        assert bool(trains) == (kind != "frozen")
    heads = [p for name, p in model.named_parameters() if name.split(".")[0] in (*HEADS, *SCALES)]
    assert heads
    assert all(id(p) in trained for p in heads)
    assert strategy.frozen_backbone == (image == text == "frozen")


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_brings_back_what_was_trained(kind: str) -> None:
    model, strategy = adapted(kind, kind)
    with torch.no_grad():
        for group in strategy.groups(model):
            for parameter in group.parameters:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    kept = strategy.checkpoint(model)
    again, other = adapted(kind, kind)
    other.load_checkpoint(again, kept)
    model.eval(), again.eval()
    image = torch.randn(2, 3, 32, 32)
    for name, expected in model(image, image.flip(0), IDS).items():
        torch.testing.assert_close(again(image, image.flip(0), IDS)[name], expected)
    frozen = {name for name in kept if name.split(".")[0] in ("visual", "bert")}
    assert (kind == "frozen") == (not frozen), "a frozen tower is the published one, and is not kept"


def test_rates_fall_within_a_tower_and_by_its_own_factor() -> None:
    strategy = BothTowers(TowerConfig(rate=0.1, layer_decay=0.5), TowerConfig(rate=0.2))
    scales = {group.name: group.scale for group in strategy.groups(strategy.apply(tiny_clip()))}
    assert scales["heads"] == 1.0
    assert scales["image.norm (no decay)"] == pytest.approx(0.1 * 0.5)
    assert scales["image.blocks.1"] == pytest.approx(0.1 * 0.25)
    assert scales["text.encoder.layer.0"] == scales["text.embeddings"] == pytest.approx(0.2)


def test_a_frozen_tower_stays_in_eval_mode() -> None:
    model, strategy = adapted("frozen", "full")
    strategy.set_mode(model, training=True)
    assert not any(module.training for module in model.visual.modules())
    assert all(module.training for module in model.bert.modules())
    assert model.text_projection.training


def test_lora_targets_of_a_bert() -> None:
    model, _ = adapted("frozen", "lora", targets=("query", "dense"))
    adapted_layers = {name.split(".lora_")[0] for name, _ in model.bert.named_parameters() if "lora_" in name}
    assert any(name.endswith("attention.self.query") for name in adapted_layers)
    assert any(name.endswith("intermediate.dense") for name in adapted_layers)
    with pytest.raises(ConfigError, match=r"'qurey' is not a layer of the text encoder.*Did you mean 'query'"):
        adapted("frozen", "lora", targets=("qurey",))


def test_merged_is_the_same_network_without_adapters() -> None:
    model, _ = adapted("lora", "full")
    with torch.no_grad():
        for name, parameter in model.visual.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.eval()
    merged = merged_tower(model.visual)
    assert not any("lora" in name for name in merged.network.state_dict())
    image = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(merged.features(image), model.visual.features(image), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(merged.features(image), tiny_backbone().eval().features(image), atol=1e-3)


def test_gradient_checkpointing_changes_nothing_but_memory() -> None:
    model = tiny_clip().train()
    model.visual.eval()  # drop-path
    image = torch.randn(2, 3, 32, 32)
    gradients = []
    for switch in (False, True):
        for tower in model.towers().values():
            tower.set_grad_checkpointing(switch)
        model.zero_grad()
        model(image, image.flip(0), IDS)["text"].sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.bert.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize("level", ["none", "light", "medium", "strong"])
def test_upright_pictures_are_never_mirrored_nor_upside_down(level: str, tmp_path: Path) -> None:
    steps = upright_steps(level, 0)
    assert not any("Flip" in type(step).__name__ for step in steps)
    assert all(step.degrees[1] <= 15 for step in steps if hasattr(step, "degrees"))
    others = [type(step) for step in level_steps(level, 0) if "Flip" not in type(step).__name__]
    assert [type(step) for step in steps] == others
