"""Linear, gradual, full: phases, modes and rates on networks small enough to read."""

from __future__ import annotations

import re

import pytest
import torch
from adapt_kit import backbone
from pydantic import ValidationError
from torch import nn

from eyetune.adapt import Step, parse_adapt
from eyetune.adapt.classifier import HEAD_STD, Classifier
from eyetune.adapt.freezing import Full, FullConfig, Gradual, GradualConfig, Linear, LinearConfig, top_layers
from eyetune.backbones import load_backbone
from eyetune.errors import ConfigError, RunError


def classifier(name: str = "test_vit", dropout: float = 0.0) -> Classifier:
    torch.manual_seed(0)
    return Classifier(backbone(name), 5, dropout=dropout)


def trainable_groups(model: Classifier) -> list[str]:
    """The layer groups that train, each all or nothing."""
    names = []
    for group in model.backbone.layer_groups():
        flags = {parameter.requires_grad for _, parameter in group.parameters}
        assert len(flags) == 1
        names += [group.name] if flags == {True} else []
    return names


# Classifier


def test_the_head_starts_near_indifference_yet_passes_a_gradient_to_the_backbone() -> None:
    model = classifier()
    linear = model.head[1]

    assert linear.bias.abs().max() == 0
    assert linear.weight.std().item() == pytest.approx(HEAD_STD, rel=0.2)
    model(torch.randn(2, 3, 32, 32)).logsumexp(1).sum().backward()
    assert model.backbone.network.patch_embed.proj.weight.grad.abs().max() > 0


def test_logits_come_from_features() -> None:
    model = classifier().eval()
    images = torch.randn(2, 3, 32, 32)

    assert model(images).shape == (2, 5)
    assert torch.equal(model(images), model.logits_from(model.backbone.features(images)))


def test_the_base_keeps_its_fingerprint_when_training_changes_it() -> None:
    model = Full(FullConfig()).apply(classifier())
    before = model.base_fingerprint()
    with torch.no_grad():
        model.backbone.network.cls_token.add_(1)

    assert model.backbone.fingerprint() != before
    assert model.base_fingerprint() == before


# Linear


def test_linear_features_stay_the_same_while_training() -> None:
    model = Linear(LinearConfig()).apply(classifier("test_resnet", dropout=0.5))
    model.backbone.network.act1 = nn.Dropout(0.5)
    images = torch.randn(4, 3, 32, 32)

    Linear(LinearConfig()).set_mode(model, True)

    assert torch.equal(model.backbone.features(images), model.backbone.features(images))
    assert not torch.equal(model(images), model(images)), "the head's own dropout does act"


def test_linear_trains_ten_epochs_at_most_and_stops_at_a_plateau() -> None:
    strategy = Linear(LinearConfig(patience=2))
    model = strategy.apply(classifier())

    assert (strategy.epochs(50), strategy.epochs(4)) == (10, 4)
    steps = [strategy.after_epoch(model, epoch, score).step for epoch, score in enumerate([0.5, 0.6, 0.6, 0.55])]
    assert steps == [Step.CONTINUE, Step.CONTINUE, Step.CONTINUE, Step.STOP]


def test_linear_without_validation_runs_to_the_end() -> None:
    strategy = Linear(LinearConfig(patience=1))

    assert {strategy.after_epoch(classifier(), epoch, None).step for epoch in range(5)} == {Step.CONTINUE}


# Full


def test_full_gives_each_layer_the_share_of_the_one_above() -> None:
    strategy = Full(FullConfig(layer_decay=0.5))
    model = strategy.apply(classifier())

    scales = {group.name.removesuffix(" (no decay)"): group.scale for group in strategy.groups(model)}

    expected = ["head", "backbone.norm", *(f"backbone.blocks.{i}" for i in range(5, -1, -1)), "backbone.embeddings"]
    assert scales == {name: 0.5**depth for depth, name in enumerate(expected)}


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext", "vit_small_patch14_reg4_dinov2"])
def test_biases_norms_tokens_and_layer_scales_take_no_weight_decay(name: str) -> None:
    model = classifier(name)
    strategy = Full(FullConfig())
    strategy.apply(model)
    names = {id(parameter): own for own, parameter in model.named_parameters()}

    decayed = {names[id(p)] for group in strategy.groups(model) if group.decay for p in group.parameters}

    spared = set(names.values()) - decayed
    assert all(own.endswith(".weight") for own in decayed)
    assert not any(re.search(r"norm|bn\d|token|pos_embed|gamma|bias", own) for own in decayed)
    matrices = (nn.Linear, nn.Conv2d)
    weights = {f"{own}.weight" for own, module in model.named_modules() if isinstance(module, matrices)}
    assert weights == decayed
    assert spared


def test_a_parameter_without_a_group_is_a_defect_that_shows() -> None:
    model = classifier()
    model.backbone.extra = nn.Parameter(torch.zeros(3))
    strategy = Full(FullConfig())
    strategy.apply(model)

    with pytest.raises(AssertionError, match="extra"):
        strategy.groups(model)


# Gradual


def test_gradual_moves_from_the_head_to_the_top_blocks_to_everything() -> None:
    strategy = Gradual(GradualConfig(patience=2))
    model = strategy.apply(classifier())
    everything = [group.name for group in model.backbone.layer_groups()]
    seen = [(trainable_groups(model), strategy.last_phase())]

    steps = []
    for epoch, score in enumerate([0.5, 0.4, 0.4, 0.6, 0.5, 0.5, 0.5, 0.5, 0.5]):
        steps.append(strategy.after_epoch(model, epoch, score).step)
        seen += [(trainable_groups(model), strategy.last_phase())] if steps[-1] is Step.NEXT_PHASE else []

    assert [epoch for epoch, step in enumerate(steps) if step is Step.NEXT_PHASE] == [2, 5]
    assert set(steps) == {Step.CONTINUE, Step.NEXT_PHASE}, "stopping the last phase is the loop's"
    assert seen == [([], False), (["blocks.4", "blocks.5", "norm"], False), (everything, True)]


def test_a_layer_keeps_its_rate_from_phase_to_phase() -> None:
    strategy = Gradual(GradualConfig(phases=(2, "all")))
    model = strategy.apply(classifier())
    before = {group.name: (group.scale, [id(p) for p in group.parameters]) for group in strategy.groups(model)}

    strategy.load_state(model, {"phase": 1, "best": None, "stale": 0})

    after = {group.name: (group.scale, [id(p) for p in group.parameters]) for group in strategy.groups(model)}
    assert before.items() <= after.items()
    assert len(after) > len(before)


def test_without_validation_a_phase_lasts_patience_epochs() -> None:
    strategy = Gradual(GradualConfig(patience=2))
    model = strategy.apply(classifier())

    steps = [strategy.after_epoch(model, epoch, None).step for epoch in range(6)]

    assert [epoch for epoch, step in enumerate(steps) if step is Step.NEXT_PHASE] == [1, 3]


def test_the_message_of_a_move_says_why_and_what_trains_now() -> None:
    strategy = Gradual(GradualConfig(patience=1))
    model = strategy.apply(classifier())
    strategy.after_epoch(model, 0, 0.5)

    message = strategy.after_epoch(model, 1, 0.5).message

    assert message.startswith("no better validation score for 1 epoch: phase 2 of 3")
    assert "last 2 blocks" in message


def test_the_message_of_a_move_claims_no_score_where_there_is_none() -> None:
    strategy = Gradual(GradualConfig(patience=1))

    message = strategy.after_epoch(strategy.apply(classifier()), 0, None).message

    assert message.startswith("1 epoch without a validation score to go by: phase 2 of 3")


def test_a_frozen_stage_keeps_its_batch_statistics_while_a_trained_one_learns_its_own() -> None:
    strategy = Gradual(GradualConfig(phases=(1, "all")))
    model = strategy.apply(classifier("test_resnet"))
    strategy.set_mode(model, True)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}

    model(torch.randn(4, 3, 32, 32))

    moved = {name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])}
    assert moved == {name for name in before if name.startswith("backbone.network.layer4.")}


def test_dropout_of_frozen_blocks_is_off_and_of_trained_blocks_on() -> None:
    strategy = Gradual(GradualConfig(phases=(1, "all")))
    model = strategy.apply(classifier())
    blocks = model.backbone.network.blocks

    strategy.set_mode(model, True)

    assert [block.mlp.drop1.training for block in blocks] == [False] * 5 + [True]
    assert not model.backbone.network.pos_drop.training
    strategy.load_state(model, {"phase": 1, "best": None, "stale": 0})
    strategy.set_mode(model, True)
    assert all(module.training for module in model.modules())


def test_a_phase_can_be_a_pattern_on_names() -> None:
    strategy = Gradual(GradualConfig(phases=(0, r"norm|blocks\.[45]", "all")))
    model = strategy.apply(classifier())

    strategy.load_state(model, {"phase": 1, "best": None, "stale": 0})

    trained = {name for name, p in model.backbone.network.named_parameters() if p.requires_grad}
    assert {"norm.weight", "blocks.0.norm1.weight", "blocks.5.attn.qkv.weight"} <= trained
    assert not any(name.startswith(("patch_embed", "cls_token")) or "blocks.3.attn" in name for name in trained)


@pytest.mark.parametrize(
    ("name", "pixels", "expected"),
    [
        ("vit_tiny_patch16_224", 32, ["blocks.10", "blocks.11", "norm"]),
        ("resnet18", 32, ["layer4.0", "layer4.1"]),
        ("resnet50", 32, ["layer4.0", "layer4.1", "layer4.2"]),
        ("convnext_atto", 32, ["stages.3.blocks.0", "stages.3.blocks.1", "norm"]),
        pytest.param(
            "swin_tiny_patch4_window7_224",
            64,
            ["layers.3.blocks.0", "layers.3.blocks.1", "norm"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_two_blocks_are_the_top_of_each_architecture(name: str, pixels: int, expected: list[str]) -> None:
    layers = load_backbone(name, weights="random", pixels=pixels).layer_groups()

    assert [layer.name for layer in layers[-top_layers(layers, 2) :]] == expected


def test_two_blocks_of_a_network_of_24_are_22_and_23() -> None:
    """Not 10 and 11, as the pattern of the guides has it."""
    with torch.device("meta"):
        layers = load_backbone("retfound", weights="random").layer_groups()

    assert [layer.name for layer in layers[-top_layers(layers, 2) :]] == ["blocks.22", "blocks.23", "norm"]


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ((0, 7, "all"), "7 blocks are asked for, the network has 6"),
        ((0, r"layer4", "all"), "'layer4' matches no parameter"),
        ((2, 2, "all"), "2 trains nothing beyond"),
        (("all", 0), "0 trains nothing beyond"),
    ],
)
def test_phases_that_do_not_fit_the_network_are_refused(phases: tuple[int | str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Gradual(GradualConfig(phases=phases)).apply(classifier())


@pytest.mark.parametrize("phases", [(-1, "all"), ("[", "all"), ()])
def test_phases_that_mean_nothing_are_refused(phases: tuple[int | str, ...]) -> None:
    with pytest.raises(ValidationError, match="phases"):
        GradualConfig(phases=phases)


def test_phases_from_a_command_line_are_numbers_where_they_look_like_it() -> None:
    assert parse_adapt({"kind": "gradual", "phases": ["0", "2", "all"]}) == GradualConfig()


@pytest.mark.parametrize("phase", [3, -1, "1", None])
def test_a_state_of_other_phases_is_refused(phase: object) -> None:
    strategy = Gradual(GradualConfig())
    model = strategy.apply(classifier())

    with pytest.raises(RunError, match="damaged"):
        strategy.load_state(model, {"phase": phase, "best": None, "stale": 0})
