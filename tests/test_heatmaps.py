"""Heat maps against slow references, their geometry, their pictures, and the check that they show the network."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import adapt_kit
import cv2
import numpy as np
import numpy.typing as npt
import pytest
import timm
import torch
from data_kit import fundus, save

from eyetune.adapt import parse_adapt
from eyetune.adapt.classifier import Classifier
from eyetune.backbones import load_backbone
from eyetune.backbones.backbone import BACKBONES, Backbone, Preprocess
from eyetune.data.fundus import FundusSettings, load_square, prepare
from eyetune.data.phantom import sample
from eyetune.data.photo import read_image
from eyetune.errors import DataError, UserError
from eyetune.heatmaps import HeatMap, explain, heat_map, on_photograph, overlay, sanity_check, save_png, side_by_side
from eyetune.heatmaps import sanity as sanity_module
from eyetune.heatmaps.explain import smooth
from eyetune.heatmaps.maps import choose_method, grid_maps
from eyetune.heatmaps.sanity import rank_correlation, shuffle_weights
from eyetune.runtime import Runtime
from eyetune.train.run import Run
from eyetune.train.rundir import ModelCard


def transformer(pool: str = "cls", registers: int = 2, adapt: str = "linear") -> Classifier:
    """Two blocks of two heads over four patches of 8 pixels, a class token and registers; every parameter counts."""
    torch.manual_seed(1)
    network = timm.models.VisionTransformer(
        img_size=16,
        patch_size=8,
        embed_dim=8,
        depth=2,
        num_heads=2,
        num_classes=0,
        reg_tokens=registers,
        global_pool="token" if pool == "cls" else "avg",
        fc_norm=False,
    )
    return _finished(network, pool, 8, 16, adapt)


def convolutional() -> Classifier:
    """timm's miniature ResNet, with a last feature map of 2 by 2."""
    built = adapt_kit.backbone("test_resnet")
    return _finished(built.network, "avg", built.width, 64, "linear")


def _finished(network: Any, pool: str, width: int, pixels: int, adapt: str) -> Classifier:
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    preprocess = Preprocess(pixels, (0.5,) * 3, (0.5,) * 3)
    model = Classifier(Backbone(BACKBONES.get("nano"), network, preprocess=preprocess, pool=pool, width=width), 3)
    torch.nn.init.normal_(model.head[1].weight)
    return parse_adapt(adapt).build().apply(model).eval()


def inputs(model: Classifier, count: int = 2) -> torch.Tensor:
    side = model.backbone.preprocess.pixels
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(3))


def attention_by_hand(model: Classifier, images: torch.Tensor) -> list[npt.NDArray[np.float64]]:
    """float64[B, heads, N, N] of each block, from the queries and keys that its `qkv` gives."""
    found: list[npt.NDArray[np.float64]] = []

    def look(module: Any, given: Any, out: torch.Tensor) -> None:
        b, n, width = out.shape
        q, k, _ = out.detach().double().reshape(b, n, 3, 2, width // 6).permute(2, 0, 3, 1, 4)
        weights = np.exp((q @ k.transpose(-2, -1)).numpy() / np.sqrt(width // 6))
        found.append(weights / weights.sum(axis=-1, keepdims=True))

    hooks = [block.attn.qkv.register_forward_hook(look) for block in model.backbone.network.blocks]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("pool", ["cls", "avg"])
@pytest.mark.parametrize("registers", [0, 2])
def test_rollout_is_the_sum_over_all_paths(pool: str, registers: int) -> None:
    model = transformer(pool, registers)
    images = inputs(model)
    blocks = [attention.mean(axis=1) for attention in attention_by_hand(model, images)]
    prefix, tokens = 1 + registers, blocks[0].shape[-1]
    readers = [0] if pool == "cls" else range(prefix, tokens)
    expected = np.zeros((2, 4))
    for image in range(2):
        for end in readers:
            for patch in range(4):
                # From the patch to a token between the blocks to the token that is read, each step half residual.
                for between in range(tokens):
                    steps = ((end, between, 1), (between, prefix + patch, 0))
                    shares = [0.5 * blocks[at][image, to, come] + 0.5 * (to == come) for to, come, at in steps]
                    expected[image, patch] += shares[0] * shares[1] / len(readers)
    found = grid_maps(model, images, method="rollout").numpy()
    assert found.shape == (2, 2, 2)
    np.testing.assert_allclose(found.reshape(2, 4), expected, rtol=1e-5)
    assert (found.sum(axis=(1, 2)) < 1).all(), "the class and register tokens keep their share"


@pytest.mark.parametrize("pool", ["cls", "avg"])
def test_relevance_follows_gradients_that_were_measured(pool: str) -> None:
    model = transformer(pool).double()
    images = inputs(model, 1).double()
    wanted = torch.tensor([2])
    attentions = [attention[0] for attention in attention_by_hand(model, images)]
    blocks = model.backbone.network.blocks
    for block in blocks:
        block.attn.fused_attn = False

    def score(depth: int, place: tuple[int, int, int], change: float) -> float:
        def nudge(module: Any, given: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            changed = given[0].clone()
            changed[(0, *place)] += change
            return (changed,)

        hook = blocks[depth].attn.attn_drop.register_forward_pre_hook(nudge)
        with torch.no_grad():
            value = float(model(images)[0, 2])
        hook.remove()
        return value

    tokens = attentions[0].shape[-1]
    reached = np.eye(tokens)
    for depth, attention in enumerate(attentions):
        gradient = np.zeros_like(attention)
        for place in np.ndindex(*attention.shape):
            gradient[place] = (score(depth, place, 1e-5) - score(depth, place, -1e-5)) / 2e-5
        reached = reached + np.maximum(gradient * attention, 0).mean(axis=0) @ reached
    reached -= np.eye(tokens)
    read = reached[0] if pool == "cls" else reached[3:].mean(axis=0)
    model.float()
    found = grid_maps(model, images.float(), wanted, "relevance")[0].numpy()
    assert found.max() > 0
    np.testing.assert_allclose(found.ravel(), read[3:], rtol=2e-3, atol=1e-5 * found.max())


def test_gradcam_follows_gradients_that_were_measured() -> None:
    model = convolutional().double()
    images = inputs(model, 1).double()
    with torch.no_grad():
        features = model.backbone.network.forward_features(images)

    def score(change: torch.Tensor) -> float:
        with torch.no_grad():
            pooled = model.backbone.network.forward_head(features + change, pre_logits=True)
            return float(model.head(pooled)[0, 1])

    gradient = torch.zeros_like(features)
    for place in np.ndindex(*features.shape):
        step = torch.zeros_like(features)
        step[place] = 1e-5
        gradient[place] = (score(step) - score(-step)) / 2e-5
    expected = (gradient.mean(dim=(2, 3), keepdim=True) * features).sum(dim=1).clamp_min(0)
    found = grid_maps(model.float(), images.float(), torch.tensor([1]), "gradcam")
    assert found.shape == (1, 2, 2)
    assert found.max() > 0
    np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=1e-3, atol=1e-5 * float(expected.max()))


@pytest.mark.parametrize(
    "model", [transformer(), transformer("avg", adapt="lora"), convolutional()], ids=["cls", "avg, LoRA", "ResNet"]
)
def test_looking_changes_nothing(model: Classifier) -> None:
    images = inputs(model)
    state = copy.deepcopy(model.state_dict())
    flags = [getattr(module, "fused_attn", None) for module in model.modules()]
    with torch.no_grad():
        before = model(images)
    grid_maps(model, images, method=choose_method(model))
    with torch.no_grad():
        assert torch.equal(model(images), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert flags == [getattr(module, "fused_attn", None) for module in model.modules()]
    assert not any(module._forward_hooks for module in model.modules())
    assert "forward_features" not in vars(model.backbone.network)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_images_of_a_batch_do_not_mix_and_the_class_counts() -> None:
    for model in (transformer(), convolutional()):
        images, method = inputs(model, 3), choose_method(model)
        together = grid_maps(model, images, torch.tensor([0, 1, 2]), method)
        alone = [grid_maps(model, images[i : i + 1], torch.tensor([i]), method)[0] for i in range(3)]
        torch.testing.assert_close(together, torch.stack(alone), rtol=1e-4, atol=1e-5 * float(together.max()))
        other = grid_maps(model, images, torch.tensor([1, 2, 0]), method)
        assert not torch.allclose(together, other, rtol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "grid"),
    [
        ("nano", {"pool": "avg"}, 14),
        ("retfound-green", {}, 28),
        ("visionfm", {"pool": "last4"}, 14),
        ("ret-clip", {}, 14),
        ("resnet50", {}, 7),
        ("efficientnet_b0", {}, 7),
        ("swin_tiny_patch4_window7_224", {}, 7),
        ("convnext_atto", {}, 7),
    ],
)
def test_every_family_has_a_map_with_adapters_inside(name: str, options: dict[str, Any], grid: int) -> None:
    backbone = load_backbone(name, weights=None if name == "nano" else "random", **options)
    model = parse_adapt("lora").build().apply(Classifier(backbone, 5)).eval()
    pixels = backbone.preprocess.pixels
    images = torch.randn(1, 3, pixels, pixels, generator=torch.Generator().manual_seed(0))
    found = grid_maps(model, images, None, choose_method(model))
    assert found.shape == (1, grid, grid)
    assert found.min() >= 0
    assert found.max() > found.min()


def test_what_has_no_map_says_so() -> None:
    model = transformer()
    with pytest.raises(UserError, match="Did you mean 'rollout'"):
        choose_method(model, "rolout")
    with pytest.raises(UserError, match="use relevance or rollout"):
        choose_method(model, "gradcam")
    with pytest.raises(UserError, match="use gradcam"):
        choose_method(convolutional(), "rollout")
    model.backbone.pool = "map"
    with pytest.raises(UserError, match="pooling map"):
        choose_method(model)
    bare = Classifier(
        Backbone(
            BACKBONES.get("nano"), torch.nn.Flatten(), preprocess=model.backbone.preprocess, pool="avg", width=768
        ),
        2,
    )
    with pytest.raises(UserError, match="neither a vision transformer"):
        choose_method(bare)
    # Attention over channels (XCiT) does not go from patch to patch.
    network = load_backbone("xcit_nano_12_p16_224", weights="random")
    with pytest.raises(UserError, match="every patch look at every other"):
        grid_maps(Classifier(network, 2).eval(), torch.zeros(1, 3, 224, 224))


# On photographs.


@pytest.fixture(scope="module")
def nano() -> Run:
    """A run of the shipped weights with a head that has seen nothing."""
    backbone = load_backbone("nano")
    torch.manual_seed(0)
    strategy = parse_adapt("linear").build()
    model = strategy.apply(Classifier(backbone, 5)).eval()
    card = ModelCard(
        backbone="nano",
        weights=None,
        pool="cls",
        pixels=224,
        dropout=0.0,
        fingerprint="",
        preprocess=backbone.preprocess.to_dict(),
        fundus=FundusSettings(224).to_dict(),
        classes=("0", "1", "2", "3", "4"),
        adapt={"kind": "linear"},
    )
    return Run(None, model, strategy, card, Runtime("cpu", "fp32"))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def eyes(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("eyes")
    return [save(folder / f"{patient}.png", sample(1, patient, "R", "clinic", 256).image) for patient in range(1, 7)]


def test_a_photograph_becomes_a_map_of_the_square_the_network_saw(nano: Run, eyes: list[Path]) -> None:
    found = explain(nano, eyes[0])
    np.testing.assert_array_equal(found.square, load_square(eyes[0], nano.settings))
    assert found.values.shape == (224, 224)
    assert found.values.dtype == np.float32
    assert 0 <= found.values.min() < 0.05
    assert 0.9 < found.values.max() <= 1
    likely = nano.classes[int(_logits(nano, eyes[0]).argmax())]
    assert (found.method, found.target) == ("relevance", likely)
    np.testing.assert_array_equal(heat_map(nano, eyes[0], target=likely), found.values)
    other = next(name for name in nano.classes if name != likely)
    assert not np.allclose(heat_map(nano, eyes[0], target=other), found.values, atol=0.05)
    assert explain(nano, eyes[0], method="rollout").target is None
    with pytest.raises(UserError, match="no class 'mild' in this run"):
        heat_map(nano, eyes[0], target="mild")
    with pytest.raises(DataError, match=r"gone\.png"):
        heat_map(nano, eyes[0].parent / "gone.png")


def _logits(run: Run, path: Path) -> torch.Tensor:
    from eyetune.heatmaps.explain import normalised, read_square

    with torch.no_grad():
        return run.model(normalised(run, [read_square(run, path)]))


def test_a_map_is_stretched_between_the_centres_of_its_cells() -> None:
    grid = np.array([[0, 2], [4, 8]], np.float32)
    large = smooth(grid, 64)
    assert large[:16, :16].max() == 0
    assert large[48:, 48:].min() == 1
    np.testing.assert_allclose(large[48:, :16], 0.5)
    np.testing.assert_allclose(large[32, 0], 0.5 * (0.5 + 1 / 64), atol=1e-6)
    assert not smooth(np.full((2, 2), 0.3, np.float32), 8).any(), "the same everywhere says nothing"
    assert smooth(np.float32(1e-12) * grid, 64).max() == 1, "small gradients count like large ones"


@pytest.mark.parametrize("fit", ["pad", "squash"])
@pytest.mark.parametrize("crop", [True, False])
@pytest.mark.parametrize("shape", [(240, 320), (320, 200)])
def test_a_map_lies_on_the_photograph_where_it_lay_on_the_square(
    fit: Any, crop: bool, shape: tuple[int, int], tmp_path: Path
) -> None:
    photo = fundus(*shape, radius=90, seed=2)
    ys, xs = np.mgrid[: shape[0], : shape[1]]
    # A bright spot, and where it lands on the square, as the map.
    spot = np.exp(-((ys - shape[0] // 2 - 30) ** 2 + (xs - shape[1] // 2 + 25) ** 2) / (2 * 12**2))
    settings = FundusSettings(112, fit, crop)
    path = save(tmp_path / "eye.png", photo)
    from eyetune.data.fundus import find_field

    marked = np.repeat((255 * spot)[..., None], 3, axis=2).astype(np.uint8)
    values = prepare(marked, settings, find_field(photo) if crop else None)[..., 0] / np.float32(255)
    back = on_photograph(values, read_image(path), settings)
    assert back.shape == shape
    assert np.hypot(*(np.array(np.unravel_index(back.argmax(), shape)) - np.unravel_index(spot.argmax(), shape))) < 4
    assert np.abs(back - spot).max() < 0.12


def test_the_map_over_the_photograph_reads_without_colours(tmp_path: Path) -> None:
    square = np.full((56, 56, 3), 90, np.uint8)
    values = np.tile(np.linspace(0, 1, 56, dtype=np.float32), (56, 1))
    away = np.abs(overlay(square, values)[0].astype(int) - 90).sum(axis=1)
    assert away[0] < 15, "where the map is 0, the photograph is seen"
    assert (np.diff(away) >= -3).all(), "more is further from the photograph"
    assert away[-1] > 150

    found = side_by_side(HeatMap(values, square, "relevance", "2"))
    scale = cv2.cvtColor(found[:, -1:], cv2.COLOR_RGB2LAB)[::-1, 0, 0].astype(int)
    assert (np.diff(scale) >= -1).all(), "the colours are in the order of their brightness, for every eye"
    assert scale[-1] - scale[0] > 150
    assert found.shape[0] == 56
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found[:, :56], square)
    save_png(tmp_path / "é" / "map.png", found)
    read = cv2.imdecode(np.fromfile(tmp_path / "é" / "map.png", np.uint8), cv2.IMREAD_COLOR)
    np.testing.assert_array_equal(read[..., ::-1], found)


# Does it show the network?


def test_maps_of_what_was_learnt_differ_from_those_of_shuffled_weights(nano: Run, eyes: list[Path]) -> None:
    found = sanity_check(nano, eyes)
    assert found.method == "relevance"
    assert len(found.correlations) == len(eyes)
    assert found.correlation == pytest.approx(np.mean(found.correlations))
    assert -1 <= found.correlation < found.threshold
    assert found.passed
    with pytest.raises(UserError, match="at least one photograph"):
        sanity_check(nano, [])


def test_maps_that_do_not_depend_on_the_weights_are_found_out(
    nano: Run, eyes: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def by_brightness(model: Any, images: torch.Tensor, *_: Any) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(images.mean(dim=1, keepdim=True), 16)[:, 0]

    monkeypatch.setattr(sanity_module, "grid_maps", by_brightness)
    found = sanity_check(nano, eyes[:2])
    assert found.correlation == pytest.approx(1)
    assert not found.passed


def test_shuffling_keeps_the_numbers_and_leaves_the_original_alone() -> None:
    model = transformer()
    before = copy.deepcopy(model.state_dict())
    shuffled = shuffle_weights(model)
    for name, tensor in shuffled.state_dict().items():
        assert torch.equal(model.state_dict()[name], before[name])
        assert torch.equal(tensor.flatten().sort().values, before[name].flatten().sort().values), name
    assert not torch.equal(shuffled.head[1].weight, model.head[1].weight)


def test_rank_correlation() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 50)).round(1).astype(np.float32)
    from scipy.stats import spearmanr

    assert rank_correlation(first, second) == pytest.approx(spearmanr(first, second).statistic)
    assert rank_correlation(first, np.zeros(50, np.float32)) == 0
