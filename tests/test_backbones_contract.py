"""What every backbone owes the rest of the program, whether a family, `nano`, or a timm name."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch

from eyetune.backbones import BACKBONES, Backbone, Preprocess, load_backbone
from eyetune.backbones.backbone import layer_groups
from eyetune.errors import UserError

# Architectures of every kind that a strategy must serve, at the smallest size they allow.
TIMM = {
    "resnet18": 64,
    "efficientnet_b0": 64,
    "convnext_atto": 64,
    "swin_tiny_patch4_window7_224": 224,
    "deit_tiny_patch16_224": 64,
    "vit_tiny_patch16_224": 64,
    "vit_small_patch14_reg4_dinov2": 70,
}
# Only their layer groups are looked at.
MORE = ("deit_tiny_distilled_patch16_224", "mobilenetv3_small_050", "densenet121", "regnetx_002", "maxvit_pico_rw_256")
FULL_SIZE = [name for name in BACKBONES.names() if name != "nano"]
CASES = [
    pytest.param(("nano", 96), id="nano"),
    *(pytest.param((name, pixels), id=name) for name, pixels in TIMM.items()),
    # Full-size networks, but small images: at their own size the golden features see them.
    *(pytest.param((name, 112), id=name, marks=pytest.mark.slow) for name in FULL_SIZE),
]


@pytest.fixture(scope="module", params=CASES)
def backbone(request: pytest.FixtureRequest) -> Backbone:
    name, pixels = request.param
    torch.manual_seed(0)
    return load_backbone(name, "random", pixels=pixels)


@pytest.fixture(scope="module")
def images(backbone: Backbone) -> torch.Tensor:
    side = backbone.preprocess.pixels
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


def test_features_are_as_wide_as_promised(backbone: Backbone, images: torch.Tensor) -> None:
    with torch.no_grad():
        features = backbone.features(images)
        assert features.shape == (2, backbone.width)
        assert features.dtype == torch.float32
        assert torch.isfinite(features).all()
        assert not torch.allclose(features[0], features[1])
        assert torch.equal(backbone(images), features), "forward, or a second pass in eval mode, differs"
    assert backbone.width == backbone.spec.pools[backbone.pool]


def test_every_parameter_is_in_one_layer_group(backbone: Backbone) -> None:
    groups = backbone.layer_groups()
    named = [pair for group in groups for pair in group.parameters]
    expected = dict(backbone.network.named_parameters())
    assert len(named) == len(expected)
    assert {name: id(parameter) for name, parameter in named} == {n: id(p) for n, p in expected.items()}
    assert all(group.parameters for group in groups)
    assert len({group.name for group in groups}) == len(groups)


def test_layer_groups_run_from_input_to_output(backbone: Backbone) -> None:
    kinds = [group.kind for group in backbone.layer_groups()]
    assert kinds == sorted(kinds, key=["stem", "block", "tail"].index)
    assert kinds.count("stem") == 1
    assert kinds.count("tail") <= 1
    assert kinds.count("block") >= 4


def test_gradient_reaches_every_group(backbone: Backbone, images: torch.Tensor) -> None:
    backbone.zero_grad()
    backbone.features(images).square().sum().backward()
    for group in backbone.layer_groups():
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for _, p in group.parameters), group.name
    backbone.zero_grad()


def test_fingerprint_is_stable_and_sees_one_flipped_weight(backbone: Backbone) -> None:
    before = backbone.fingerprint()
    assert before == backbone.fingerprint()
    parameter = next(p for p in reversed(list(backbone.network.parameters())) if p.ndim > 1)
    with torch.no_grad():
        old = parameter.view(-1)[3].clone()
        parameter.view(-1)[3] = old + 1
        assert backbone.fingerprint() != before
        parameter.view(-1)[3] = old
    assert backbone.fingerprint() == before


def test_preprocess_is_sane(backbone: Backbone) -> None:
    image = backbone.preprocess
    assert image.pixels % backbone.spec.patch == 0
    assert all(0 <= value <= 1 for value in image.mean)
    assert all(0 < value <= 1 for value in image.std)
    assert image.fit in ("pad", "squash")
    assert Preprocess.from_dict(image.to_dict()) == image


def test_bf16_autocast(backbone: Backbone, images: torch.Tensor) -> None:
    with torch.no_grad():
        exact = backbone.features(images)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = backbone.features(images).float()
    assert rounded.shape == exact.shape
    assert torch.nn.functional.cosine_similarity(rounded, exact).min() > 0.98


def test_checkpointed_gradients_change_nothing(backbone: Backbone, images: torch.Tensor) -> None:
    plain = backbone.features(images)
    plain.sum().backward()
    first = backbone.layer_groups()[0].parameters[0][1]
    expected = first.grad.clone()
    backbone.zero_grad()
    backbone.set_grad_checkpointing(True)
    try:
        again = backbone.features(images)
        again.sum().backward()
    finally:
        backbone.set_grad_checkpointing(False)
    torch.testing.assert_close(again, plain)
    torch.testing.assert_close(first.grad, expected)
    backbone.zero_grad()


@pytest.mark.parametrize("name", BACKBONES.names())
def test_spec_counts_its_parameters(name: str) -> None:
    with torch.device("meta"):
        backbone = load_backbone(name, "random")
    assert backbone.preprocess.pixels == backbone.spec.pixels
    assert sum(p.numel() for p in backbone.network.parameters()) == backbone.spec.parameters


@pytest.mark.parametrize("pool", list(BACKBONES.get("nano").pools))
def test_poolings_of_nano_differ(pool: str) -> None:
    torch.manual_seed(0)
    other = load_backbone("nano", "random", pixels=64, pool=pool)
    default = load_backbone("nano", "random", pixels=64)
    default.network.load_state_dict(other.network.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(other.features(images), default.features(images)) == (pool == default.pool)


def test_average_pooling_of_a_timm_vit_keeps_the_pretrained_norm() -> None:
    """Given to timm's constructor, `avg` would swap `norm` for an untrained `fc_norm`."""
    backbone = load_backbone("vit_tiny_patch16_224", "random", pixels=64, pool="avg")
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        tokens = backbone.network.forward_features(images)
        torch.testing.assert_close(backbone.features(images), tokens[:, 1:].mean(dim=1))
    assert "norm.weight" in backbone.network.state_dict()


def test_layer_groups_have_the_names_of_the_network() -> None:
    names = {}
    with torch.device("meta"):
        for name in (*TIMM, *MORE):
            network = timm.create_model(name, num_classes=0)
            groups = layer_groups(network)
            names[name] = [group.name for group in groups]
            found = sorted(n for group in groups for n, _ in group.parameters)
            assert found == sorted(n for n, _ in network.named_parameters()), name
    assert names["vit_tiny_patch16_224"] == ["embeddings", *(f"blocks.{i}" for i in range(12)), "norm"]
    assert names["resnet18"] == ["stem", *(f"layer{i}.{j}" for i in range(1, 5) for j in range(2))]
    assert (names["efficientnet_b0"][0], names["efficientnet_b0"][-1]) == ("stem", "conv_head")
    assert names["convnext_atto"][-2:] == ["stages.3.blocks.1", "norm"]
    assert names["swin_tiny_patch4_window7_224"][-2:] == ["layers.3.blocks.1", "norm"]
    assert names["densenet121"][-1] == "norm"
    assert names["regnetx_002"][-1] == "s4.b7"


@pytest.mark.parametrize("depth", [3, 24])
def test_blocks_are_counted_on_the_network(depth: int) -> None:
    from eyetune.backbones.vit import vision_transformer

    groups = layer_groups(vision_transformer(32, patch=16, width=24, depth=depth, heads=2))
    assert [g.name for g in groups if g.kind == "block"] == [f"blocks.{i}" for i in range(depth)]


def test_a_network_unknown_to_timm_is_grouped_by_its_children() -> None:
    class Own(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(1))
            self.first = torch.nn.Conv2d(3, 4, 1)
            self.layers = torch.nn.Sequential(*(torch.nn.Conv2d(4, 4, 1) for _ in range(3)))
            self.norm = torch.nn.GroupNorm(1, 4)

    groups = layer_groups(Own())
    assert [g.kind for g in groups] == ["stem", "block", "block", "block", "tail"]
    assert [g.name for g in groups] == ["stem", "layers.0", "layers.1", "layers.2", "norm"]
    assert sum(len(g.parameters) for g in groups) == len(list(Own().parameters()))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_a_size_that_timm_cannot_build_is_the_users_to_mend(name: str) -> None:
    with pytest.raises(UserError, match=r"model\.pixels"):
        load_backbone(name, "random", pixels=225)


def test_a_timm_file_of_another_size_is_resized(tmp_path: Path) -> None:
    source = load_backbone("vit_tiny_patch16_224", "random")
    torch.save(source.network.state_dict(), tmp_path / "vit.pth")
    other = load_backbone("vit_tiny_patch16_224", tmp_path / "vit.pth", pixels=64)
    assert other.network.pos_embed.shape[1] == 1 + 16
    assert [key for key, _ in other.report.converted] == ["pos_embed"]


def test_features_compile() -> None:
    backbone = load_backbone("nano", "random", pixels=32)
    images = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(backbone.features, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), backbone.features(images))
