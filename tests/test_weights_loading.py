"""Every key of a checkpoint is accounted for, or nothing loads. Miniature networks of each family's own layout."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import eyetune.backbones.vit as vit
from eyetune.backbones import BACKBONES, Backbone, inspect_checkpoint
from eyetune.backbones.loading import load
from eyetune.backbones.weights import resize_position_embedding
from eyetune.errors import UserError, WeightsError

Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def miniature(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same networks, 1/16 as wide (nano: 1/12) and with five blocks."""
    build = vit._vit

    def small(kind: Any, pixels: int, *, patch: int, width: int, depth: int, heads: int, **options: Any) -> nn.Module:
        options = {**options, "out": options["out"] // 16} if "out" in options else options
        width = 16 if width == 192 else width // 16
        return build(kind, pixels, patch=patch, width=width, depth=5, heads=2, **options)

    monkeypatch.setattr(vit, "_vit", small)


def weights_of(name: str, pool: str | None = None, pixels: int | None = None) -> Tensors:
    """What a trained miniature of `name` would hold, under timm's names."""
    spec = BACKBONES.get(name)
    torch.manual_seed(7)
    state = spec.build(pixels or spec.pixels, spec.check_pool(pool)).state_dict()
    return {key: torch.randn_like(value) for key, value in state.items()}


def load_mini(name: str, content: Any, path: Path, **options: Any) -> Backbone:
    torch.save(content, path)
    return load(BACKBONES.get(name), path, **options)


def as_published(name: str) -> tuple[Any, Tensors]:
    """(a file's content in the family's published layout, what must arrive in the network)."""
    state = weights_of(name)
    junk = torch.ones(2, 3)
    if name == "retfound":
        decoder = {"mask_token": junk, "decoder_pos_embed": junk, "decoder_blocks.0.norm1.weight": junk}
        return {"model": {**state, **decoder}, "optimizer": {"state": {0: {"exp_avg": junk}}}, "epoch": 3}, state
    if name == "retfound-dinov2":
        heads = {"dino_head.mlp.0.weight": junk, "ibot_head.last_layer.weight_g": junk, "backbone.mask_token": junk}
        return {"teacher": {**{f"backbone.{k}": v for k, v in state.items()}, **heads}}, state
    if name == "visionfm":
        teacher = {f"module.backbone.{k}": v for k, v in state.items()} | {"module.head.mlp.0.weight": junk}
        return {"student": {k: v + 1 for k, v in teacher.items()}, "teacher": teacher, "epoch": 3}, state
    if name == "ret-clip":
        return {f"module.{k}": v for k, v in openai_names(state).items()} | {
            "module.bert.embeddings.word_embeddings.weight": junk,
            "module.text_projection_left.0.weight": junk,
            "module.global_feature_mapping.weight": junk,
            "module.logit_scale": torch.tensor(4.6),
        }, state
    return state, state


def openai_names(state: Tensors) -> Tensors:
    """timm's names -> the names and shapes of OpenAI's CLIP, written out the other way round."""
    single = {"cls_token": "class_embedding", "pos_embed": "positional_embedding", "projection.weight": "proj"}
    parts = {
        "patch_embed.proj": "conv1",
        "norm_pre": "ln_pre",
        "norm": "ln_post",
        "attn.qkv": "attn.in_proj",
        "attn.proj": "attn.out_proj",
        "norm1": "ln_1",
        "norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    renamed: Tensors = {}
    for key, value in state.items():
        if key in single:
            shaped = value.T if key == "projection.weight" else value.reshape(value.shape[-2:]).squeeze(0)
            renamed[f"visual.{single[key]}"] = shaped.contiguous()
            continue
        block, inner = re.fullmatch(r"(blocks\.\d+\.)?(.*)", key).groups()
        module, _, kind = inner.rpartition(".")
        joined = f"{parts[module]}_{kind}" if module == "attn.qkv" else f"{parts[module]}.{kind}"
        renamed["visual." + (block or "").replace("blocks.", "transformer.resblocks.") + joined] = value
    return renamed


FAMILIES = BACKBONES.names()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_tensor_of_the_published_layout_arrives(name: str, tmp_path: Path) -> None:
    content, expected = as_published(name)
    backbone = load_mini(name, content, tmp_path / "a.pth")
    arrived = backbone.network.state_dict()
    assert set(arrived) == set(expected)
    for key, value in expected.items():
        assert torch.equal(arrived[key], value.reshape(arrived[key].shape)), key
    report = backbone.report
    assert report is not None
    assert report.whole
    assert report.matched == len(expected)
    assert not (report.unexplained)
    assert not (report.missing)
    assert not (report.mismatched)
    assert not (report.left_initial)
    written = json.loads(json.dumps(report.to_dict()))
    assert written["counts"]["loaded"] + written["counts"]["converted"] == len(expected)
    assert all(reason for reason in written["dropped"].values())


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("wrap", ["module.", "_orig_mod.", "backbone.", "model.module.backbone."])
def test_prefixes_and_wrappers(name: str, wrap: str, tmp_path: Path) -> None:
    state = weights_of(name)
    backbone = load_mini(name, {"state_dict": {f"{wrap}{k}": v for k, v in state.items()}}, tmp_path / "a.pth")
    assert backbone.report is not None
    assert backbone.report.container == "state_dict"
    assert all(torch.equal(backbone.network.state_dict()[k], v) for k, v in state.items())


def test_the_teacher_is_read_and_the_student_explained(tmp_path: Path) -> None:
    content, expected = as_published("visionfm")
    backbone = load_mini("visionfm", content, tmp_path / "a.pth")
    assert torch.equal(backbone.network.state_dict()["norm.bias"], expected["norm.bias"])
    assert backbone.report is not None
    assert backbone.report.container == "teacher"
    dropped = dict(backbone.report.dropped)
    assert "teacher" in dropped["student"]
    assert "projection head" in dropped["module.head.mlp.0.weight"]
    assert "earlier training" in dropped["epoch"]
    summary = backbone.report.summary()
    assert "under 'teacher'" in summary
    assert "student" in summary


def test_a_student_alone_is_used(tmp_path: Path) -> None:
    content, _ = as_published("visionfm")
    del content["teacher"]
    assert load_mini("visionfm", content, tmp_path / "a.pth").report.container == "student"


def test_blocks_numbered_by_chunk(tmp_path: Path) -> None:
    state = weights_of("retfound-dinov2")
    chunked = {re.sub(r"^blocks\.(\d+)", lambda m: f"blocks.{int(m[1]) // 3}.{m[1]}", k): v for k, v in state.items()}
    backbone = load_mini("retfound-dinov2", {"teacher": chunked}, tmp_path / "a.pth")
    assert all(torch.equal(backbone.network.state_dict()[k], v) for k, v in state.items())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_class_head_of_an_earlier_fine_tuning_is_dropped_with_its_reason(name: str, tmp_path: Path) -> None:
    if name == "ret-clip":
        pytest.skip("published as a whole model, without a class head")
    state = weights_of(name) | {"head.weight": torch.ones(5, 4), "head.bias": torch.ones(5)}
    report = load_mini(name, {"model": state}, tmp_path / "a.pth").report
    assert {key for key, reason in report.dropped if reason} == {"head.weight", "head.bias"}


def refusal(name: str, content: Any, path: Path, **options: Any) -> str:
    with pytest.raises(WeightsError) as caught:
        load_mini(name, content, path, **options)
    return str(caught.value)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_unexplained_key_is_an_error(name: str, tmp_path: Path) -> None:
    message = refusal(name, weights_of(name) | {"blocks.0.attn.extra": torch.ones(3)}, tmp_path / "a.pth")
    assert "blocks.0.attn.extra" in message
    assert "without a place" in message


@pytest.mark.parametrize("name", FAMILIES)
def test_a_weight_left_at_its_initial_value_is_an_error(name: str, tmp_path: Path) -> None:
    state = weights_of(name)
    del state["blocks.3.mlp.fc1.bias"]
    message = refusal(name, state, tmp_path / "a.pth")
    assert "1 network tensors the file does not bring" in message
    assert "blocks.3.mlp.fc1.bias" in message


def test_a_wrong_prefix_loads_nothing_and_says_so(tmp_path: Path) -> None:
    state = {f"trunk.{k}": v for k, v in weights_of("retfound").items()}
    assert "without a place" in refusal("retfound", state, tmp_path / "a.pth")


def test_the_same_tensor_twice_is_an_error(tmp_path: Path) -> None:
    state = weights_of("retfound")
    assert "backbone.norm.bias" in refusal(
        "retfound", state | {"backbone.norm.bias": state["norm.bias"] + 1}, tmp_path / "a.pth"
    )


def test_a_wrong_shape_is_an_error(tmp_path: Path) -> None:
    message = refusal("retfound", weights_of("retfound") | {"norm.bias": torch.ones(7)}, tmp_path / "a.pth")
    assert "norm.bias: 7 in the file, 64 in the network" in message


def test_a_file_of_no_tensors_is_an_error(tmp_path: Path) -> None:
    assert "no named tensors" in refusal("retfound", {"epoch": 3}, tmp_path / "a.pth")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused(value: float, tmp_path: Path) -> None:
    state = weights_of("retfound")
    state["blocks.1.norm1.weight"][2] = value
    assert "blocks.1.norm1.weight: NaN or infinity" in refusal("retfound", state, tmp_path / "a.pth")


def test_a_matrix_of_zeros_is_refused(tmp_path: Path) -> None:
    """What a download leaves that reserved its space and was interrupted."""
    state = weights_of("retfound")
    state["blocks.1.mlp.fc1.weight"].zero_()
    assert "blocks.1.mlp.fc1.weight: zero throughout" in refusal("retfound", state, tmp_path / "a.pth")


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("asked", FAMILIES)
def test_another_family_is_recognised(name: str, asked: str, tmp_path: Path) -> None:
    if name == asked:
        return
    message = refusal(asked, as_published(name)[0], tmp_path / "weights.pth")
    assert f"use model.backbone: {name}." in message


def test_the_name_of_the_file_helps_when_its_content_does_not(tmp_path: Path) -> None:
    state = weights_of("retfound-green")
    del state["reg_token"]
    message = refusal("visionfm", state, tmp_path / "retfoundgreen_statedict.pth")
    assert "retfound-green" in message


def test_average_pooling_of_retfound_explains_its_norms(tmp_path: Path) -> None:
    content, expected = as_published("retfound")
    backbone = load_mini("retfound", content, tmp_path / "a.pth", pool="avg")
    report = backbone.report
    assert "pooling" in dict(report.dropped)["norm.weight"]
    assert {name for name, _ in report.left_initial} == {"fc_norm.weight", "fc_norm.bias"}
    state = backbone.network.state_dict()
    assert torch.equal(state["fc_norm.weight"], torch.ones(64))
    assert torch.equal(state["fc_norm.bias"], torch.zeros(64))
    assert torch.equal(state["blocks.4.norm1.bias"], expected["blocks.4.norm1.bias"])


def test_a_model_fine_tuned_with_average_pooling_asks_for_it(tmp_path: Path) -> None:
    state = weights_of("retfound", "avg") | {"head.weight": torch.ones(5, 64)}
    path = tmp_path / "checkpoint-best.pth"
    assert "model.pool: avg" in refusal("retfound", {"model": state}, path)
    backbone = load_mini("retfound", {"model": state}, path, pool="avg")
    assert torch.equal(backbone.network.state_dict()["fc_norm.bias"], state["fc_norm.bias"])
    assert not backbone.report.left_initial


@pytest.mark.parametrize("name", FAMILIES)
def test_other_sizes_resize_the_position_embedding(name: str, tmp_path: Path) -> None:
    content, _ = as_published(name)
    patch, pixels = BACKBONES.get(name).patch, BACKBONES.get(name).patch * 10
    backbone = load_mini(name, content, tmp_path / "a.pth", pixels=pixels)
    assert backbone.preprocess.pixels == pixels
    assert backbone.network.pos_embed.shape[1] - backbone.network.num_prefix_tokens in (100, 100 - 5)
    [how] = [how for key, how in backbone.report.converted if "pos" in key]
    side = BACKBONES.get(name).pixels // patch
    assert f"resized from {side}×{side} to 10×10" in how
    with torch.no_grad():
        assert torch.isfinite(backbone.features(torch.randn(1, 3, pixels, pixels))).all()


def test_resizing_is_bicubic_without_antialiasing_and_spares_the_tokens() -> None:
    torch.manual_seed(0)
    table = torch.randn(1, 1 + 14 * 14, 8)
    for side in (24, 7, 14):
        resized = resize_position_embedding(table, (side, side), 1)
        grid = table[:, 1:].reshape(1, 14, 14, 8).permute(0, 3, 1, 2)
        expected = nn.functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
        assert torch.equal(resized[:, :1], table[:, :1])
        torch.testing.assert_close(resized[:, 1:], expected.flatten(2).transpose(1, 2), atol=1e-5, rtol=0)


def test_half_precision_files_load_in_float32_and_say_so(tmp_path: Path) -> None:
    state = weights_of("nano")
    backbone = load_mini("nano", {k: v.half() for k, v in state.items()}, tmp_path / "a.pth")
    assert all(p.dtype == torch.float32 for p in backbone.parameters())
    assert backbone.report.stored_as == ("float16",)


def test_the_fingerprint_does_not_depend_on_the_container(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    content, state = as_published("visionfm")
    first = load_mini("visionfm", content, tmp_path / "a.pth")
    save_file(state, tmp_path / "b.safetensors")
    second = load(BACKBONES.get("visionfm"), tmp_path / "b.safetensors")
    assert first.fingerprint() == second.fingerprint()
    assert first.report.sha256 != second.report.sha256
    other = load_mini("visionfm", weights_of("visionfm", pixels=160), tmp_path / "c.pth")
    assert other.fingerprint() != first.fingerprint()


def test_last4_is_the_cls_tokens_of_the_last_four_blocks(tmp_path: Path) -> None:
    content, _ = as_published("visionfm")
    whole = load_mini("visionfm", content, tmp_path / "a.pth", pool="last4")
    last = load_mini("visionfm", content, tmp_path / "a.pth")
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        features = whole.features(images)
        assert features.shape == (2, 4 * 48)
        torch.testing.assert_close(features[:, -48:], last.features(images))
        last.network.blocks = last.network.blocks[:2]
        torch.testing.assert_close(features[:, :48], last.features(images))


@pytest.mark.parametrize(("pixels", "near"), [(230, "224 or 240"), (8, "16 or 32"), (0, "16 or 32")])
def test_pixels_that_patches_do_not_tile(pixels: int, near: str) -> None:
    with pytest.raises(UserError, match=near):
        load(BACKBONES.get("retfound"), "random", pixels=pixels)


def test_unknown_pooling_and_backbone() -> None:
    from eyetune.backbones import load_backbone

    with pytest.raises(UserError, match=r"no pooling 'cIs'.* Did you mean 'cls'.*cls, avg"):
        load_backbone("large", "random", pool="cIs")
    with pytest.raises(UserError, match="Did you mean 'retfound-green'"):
        load_backbone("retfound_gren", "random")
    with pytest.raises(UserError, match="Did you mean 'resnet50'"):
        load_backbone("resnet-50", "random")


def test_missing_embedded_weights_say_so(tmp_path: Path) -> None:
    spec = replace(BACKBONES.get("nano"), embedded=tmp_path / "nano.safetensors")
    with pytest.raises(WeightsError, match="shipped with the package"):
        load(spec, None)


@pytest.mark.parametrize("name", FAMILIES)
def test_inspection_recognises_every_family(name: str, tmp_path: Path) -> None:
    content, expected = as_published(name)
    torch.save(content, tmp_path / "weights.pth")
    found = inspect_checkpoint(tmp_path / "weights.pth")
    assert (found.family, found.whole, found.needs_pool) == (name, True, False)
    assert found.report.matched == len(expected)


def test_inspection_of_parts_and_names(tmp_path: Path) -> None:
    content, _ = as_published("retfound")
    path = tmp_path / "RETFound_dinov2_meh.pth"
    torch.save(content, path)
    found = inspect_checkpoint(path)
    assert (found.family, found.named_as) == ("retfound", "retfound-dinov2")
    assert set(found.containers) == {"model"}
    assert found.other == ("optimizer", "epoch")
    judged = inspect_checkpoint(path, "green")
    assert (judged.family, judged.whole) == ("retfound-green", False)
    torch.save({"conv.weight": torch.ones(3, 3)}, path)
    assert inspect_checkpoint(path).family is None


PUBLISHED: dict[str, str] = {
    "RETFound_cfp_weights.pth": "retfound",
    "RETFound_oct_weights.pth": "retfound",
    "RETFound_mae_natureCFP.pth": "retfound",
    "RETFound_mae_meh.pth": "retfound",
    "RETFound_dinov2_meh.pth": "retfound-dinov2",
    "retfoundgreen_statedict.pth": "retfound-green",
    "VFM_Fundus_weights.pth": "visionfm",
    "ret-clip.pt": "ret-clip",
}


@pytest.mark.parametrize(("file", "name"), PUBLISHED.items())
def test_published_file_names(file: str, name: str) -> None:
    match: Callable[[str], list[str]] = lambda path: [n for n, spec in BACKBONES if spec.publishes(path)]  # noqa: E731
    assert match(f"/models/{file}") == match(file.upper()) == [name]
    assert match(f"my_{file}") == []


def test_timm_checkpoints_load_whole_and_lose_only_their_head(tmp_path: Path) -> None:
    from eyetune.backbones import load_backbone

    source = load_backbone("resnet18", "random")
    state = {f"module.{k}": v for k, v in source.network.state_dict().items()}
    path = tmp_path / "resnet.pth"
    torch.save({"state_dict": {**state, "module.fc.weight": torch.ones(3, 512)}, "arch": "resnet18"}, path)
    loaded = load_backbone("resnet18", path)
    assert loaded.fingerprint() == source.fingerprint()
    assert dict(loaded.report.dropped)["module.fc.weight"] == "classification head: a new one is trained"
    with pytest.raises(WeightsError, match="does not load whole into resnet34"):
        load_backbone("resnet34", path)
