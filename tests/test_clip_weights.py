"""RET-CLIP's published files arrive whole, and give what the published code gives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import regenerate
import torch

import eyetune
from eyetune.backbones import load_backbone
from eyetune.backbones.retclip import RET_CLIP, published_name
from eyetune.backbones.weights import empty_network
from eyetune.clip import RetClip, load_clip
from eyetune.errors import UserError, WeightsError

transformers = pytest.importorskip("transformers")

IDS = torch.tensor([[101, 5679, 3767, 5628, 4567, 102, 0, 0], [101, 4638, 2145, 1062, 5125, 2523, 3241, 102]])
SCALES = ("logit_scale", "logit_scale_left", "logit_scale_right")
COUNTERS = {"module.bert.embeddings.position_ids": torch.arange(512)[None]}


def save(content: dict[str, Any], folder: Path) -> Path:
    path = folder / "ret-clip.pt"
    torch.save(content, path)
    return path


def small_text(layers: int = 2, width: int = 128) -> dict[str, torch.Tensor]:
    """A text tower's keys without the rest: enough for every message about the encoder."""
    config = transformers.BertConfig(
        vocab_size=30,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=10,
    )
    bert = transformers.BertModel(config, add_pooling_layer=False)
    return {f"module.bert.{key}": value for key, value in bert.state_dict().items()}


# --- what the published code computes ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The flat file with the 12-layer encoder: 750 MB, so it is made once."""
    path = save(regenerate.retclip(), tmp_path_factory.mktemp("retclip"))
    yield path
    path.unlink()


@pytest.fixture(scope="module")
def model(published: Path) -> RetClip:
    return eyetune.load_clip("ret-clip", weights=str(published), text="chinese-roberta-wwm-ext")


def check_figures(model: RetClip, encoder: str) -> None:
    figures = regenerate.golden("retclip")[encoder]
    left, right = regenerate.images(224, "leftimage"), regenerate.images(224, "rightimage")
    with torch.inference_mode():
        out = model(left, right, IDS)
        out["single_eye_backbone"] = model.visual.features(left)
    for name, figure in figures.items():
        if name in SCALES:
            assert out[name].item() == pytest.approx(figure, abs=regenerate.TOLERANCE)
        else:
            assert regenerate.difference(out[name], figure) < regenerate.TOLERANCE, name
    assert set(figures) == set(out)


@pytest.mark.slow
def test_published_file(model: RetClip) -> None:
    check_figures(model, "RoBERTa-wwm-ext-base-chinese")
    assert not model.training
    assert (model.width, model.preprocess.pixels) == (512, 224)


@pytest.mark.slow
def test_every_key_is_explained_and_nothing_left_initial(model: RetClip, published: Path) -> None:
    report = model.report
    assert report is not None
    assert report.whole
    assert (report.container, report.dropped, report.left_initial) == ("", (), ())
    keys = {key for key, _ in (*report.loaded, *report.converted)}
    assert keys == set(regenerate.expand(regenerate.golden("retclip")["checkpoint_keys"]))
    assert report.matched == len(model.state_dict())
    tower = load_backbone("ret-clip", published)
    assert tower.fingerprint() == model.visual.fingerprint(), "the tower alone and the tower in the model are one"


@pytest.mark.slow
def test_trainers_file_with_the_small_encoder_and_old_counters(tmp_path: Path) -> None:
    content = regenerate.retclip_trainer(text_layers=3)
    content["state_dict"].update(COUNTERS)
    path = save(content, tmp_path)
    model = load_clip(weights=path)  # the file tells its encoder
    check_figures(model, "RBT3-chinese")
    assert model.report is not None
    assert model.report.container == "state_dict"
    assert model.report.matched == regenerate.golden("retclip")["checkpoint_keys_rbt3_count"]
    assert {key for key, _ in model.report.dropped} == {*COUNTERS, "epoch", "step", "name", "optimizer"}
    assert all(reason for _, reason in model.report.dropped)
    with pytest.raises(WeightsError, match=r"RBT3-chinese.*leave text out"):
        load_clip("ret-clip", weights=path, text="RoBERTa-wwm-ext-base-chinese")


@pytest.mark.slow
def test_a_key_nobody_knows_or_one_that_is_missing(tmp_path: Path) -> None:
    content = regenerate.retclip(text_layers=3)
    del content["module.left_feature_mapping.weight"]
    content["module.visual.adapter.weight"] = torch.zeros(3)
    content["module.visual.positional_embedding"] = torch.zeros(577, 768)
    with pytest.raises(WeightsError) as caught:
        load_clip(weights=save(content, tmp_path))
    assert "left_feature_mapping.weight" in str(caught.value)
    assert "module.visual.adapter.weight" in str(caught.value)
    assert "577×768" in str(caught.value)


@pytest.mark.slow
def test_untrained_network() -> None:
    model = load_clip("ret-clip", text={**TINY_BERT})
    assert model.report is None
    with torch.inference_mode():
        out = model(torch.randn(1, 3, 224, 224), None, torch.tensor([[1, 2, 3]]))
    assert out["image"].shape == out["text"].shape == (1, 512)
    assert out["image"].isfinite().all()


TINY_BERT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "vocab_size": 9,
}


# --- what does not fit -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "RoBERTa-wwm-ext-base-chinese",
        {"num_hidden_layers": 3, "hidden_size": 128, "intermediate_size": 24, "vocab_size": 30},
        {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 1, "intermediate_size": 24},
    ],
)
def test_another_encoder_than_the_files(tmp_path: Path, text: Any) -> None:
    path = save({"epoch": 1, "step": 2, "name": "run", "state_dict": small_text(), "optimizer": {}}, tmp_path)
    with pytest.raises(WeightsError) as caught:
        load_clip(weights=path, text=text)
    message = str(caught.value)
    assert str(path) in message
    assert "2 layers, 128 wide" in message
    assert "num_hidden_layers=2, hidden_size=128, intermediate_size=24, vocab_size=30" in message


def test_the_named_encoder_is_what_to_pass(tmp_path: Path) -> None:
    text = {
        "module.bert.embeddings.word_embeddings.weight": torch.zeros(21128, 768, dtype=torch.uint8),
        "module.bert.embeddings.position_embeddings.weight": torch.zeros(512, 768, dtype=torch.uint8),
        **{f"module.bert.encoder.layer.{i}.intermediate.dense.weight": torch.zeros(3072, 768) for i in (0, 1, 2)},
    }
    with pytest.raises(WeightsError, match=r"holds the text encoder RBT3-chinese.*Pass text='RBT3-chinese'"):
        load_clip(weights=save(text, tmp_path), text="chinese-roberta-wwm-ext")


def test_an_unknown_encoder_must_be_told(tmp_path: Path) -> None:
    """128 channels may be 2 heads or 4: guessing would give wrong features without a word."""
    with pytest.raises(WeightsError, match=r"none of the published.*hidden_size=128.*num_attention_heads"):
        load_clip(weights=save(small_text(), tmp_path))


def test_a_configuration_that_is_no_bert() -> None:
    with pytest.raises(UserError, match="no usable BERT"):
        load_clip(text={**TINY_BERT, "num_attention_heads": 3})


def test_a_file_without_a_text_encoder(tmp_path: Path) -> None:
    path = save({"model": {"cls_token": torch.zeros(1, 1, 8)}}, tmp_path)
    with pytest.raises(WeightsError, match=r"no text encoder.*load_backbone"):
        load_clip(weights=path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="RET-CLIP"):
        load_clip(weights=tmp_path / "ret-clip.pt")


def test_another_name() -> None:
    with pytest.raises(UserError, match=r"unknown image-text model 'retclip'\. Did you mean 'ret-clip'\?"):
        load_clip("retclip")


def test_names_go_there_and_back() -> None:
    keys = list(empty_network(RET_CLIP, 224, "projected").state_dict())
    theirs = [published_name(key) for key in keys]
    assert len({*theirs}) == len(keys)
    assert {"conv1.weight", "proj", "transformer.resblocks.11.attn.in_proj_bias"} < {*theirs}
    assert [RET_CLIP.layout.target(f"visual.{name}") for name in theirs] == keys
    assert {published_name(key) for key in ("blocks.0.ls1.gamma", "patch_embed.proj.bias", "reg_token")} == {None}
