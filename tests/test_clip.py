"""The binocular image-text model: its wiring, its inputs, and whether the published weights arrive whole."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eyetune.clip.model import RetClip
from eyetune.clip.text import PUBLISHED, TextShape, shape_in, shape_of, text_config
from eyetune.errors import MissingExtra, UserError

transformers = pytest.importorskip("transformers")

EYES = ("image", "left", "right")
TEXTS = ("text", "text_left", "text_right")
TINY = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 12,
}


class TinyTower(nn.Module):
    """Stands in for the ViT: what the model asks of a Backbone, and no more."""

    width = 6
    preprocess = SimpleNamespace(pixels=8)

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 8 * 8, self.width)

    def features(self, images: Tensor) -> Tensor:
        return self.linear(images.flatten(1))


@pytest.fixture
def tiny() -> RetClip:
    torch.manual_seed(0)
    bert = transformers.BertModel(transformers.BertConfig(**TINY), add_pooling_layer=False)
    return RetClip(TinyTower(), bert).eval()  # type: ignore[arg-type]


@pytest.fixture
def eyes() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(3, 3, 8, 8), torch.randn(3, 3, 8, 8)


def test_every_embedding_has_unit_length(tiny: RetClip, eyes: tuple[Tensor, Tensor]) -> None:
    out = tiny(*eyes, torch.tensor([[1, 5, 2], [1, 6, 2], [1, 2, 0]]))
    for name in (*EYES, *TEXTS):
        assert out[name].shape == (3, 6)
        torch.testing.assert_close(out[name].norm(dim=1), torch.ones(3))
    assert set(out) == {*EYES, *TEXTS, "logit_scale", "logit_scale_left", "logit_scale_right"}


def test_the_patient_is_the_projection_of_left_beside_right(tiny: RetClip, eyes: tuple[Tensor, Tensor]) -> None:
    left, right = eyes
    out = tiny.encode_eyes(left, right)
    swapped = tiny.encode_eyes(right, left)
    weight = tiny.global_feature_mapping.weight
    by_hand = tiny.visual.features(left) @ weight[:, :6].T + tiny.visual.features(right) @ weight[:, 6:].T
    torch.testing.assert_close(out["image"], by_hand / by_hand.norm(dim=1, keepdim=True))
    assert not torch.allclose(out["image"], swapped["image"], atol=1e-3)
    assert not torch.allclose(out["left"], swapped["right"], atol=1e-3), "each eye has a mapping of its own"


def test_an_eye_does_not_see_the_other(tiny: RetClip, eyes: tuple[Tensor, Tensor]) -> None:
    left, right = eyes
    out, other = tiny.encode_eyes(left, right), tiny.encode_eyes(left, right + 1)
    torch.testing.assert_close(out["left"], other["left"])
    assert not torch.allclose(out["right"], other["right"], atol=1e-3)


def test_a_single_eye_stands_for_both(tiny: RetClip, eyes: tuple[Tensor, Tensor]) -> None:
    left, _ = eyes
    both = tiny.encode_eyes(left, left)
    for single in (tiny.encode_eyes(left), tiny.encode_eyes(left, None), tiny.encode_eyes(None, left)):
        for name in EYES:
            torch.testing.assert_close(single[name], both[name])


@pytest.mark.parametrize(
    ("left", "right", "message"),
    [
        (None, None, "at least one eye"),
        (torch.zeros(2, 3, 8, 8), torch.zeros(1, 3, 8, 8), "same order"),
    ],
)
def test_eyes_that_do_not_pair(tiny: RetClip, left: Tensor | None, right: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.encode_eyes(left, right)


def test_padding_is_not_read(tiny: RetClip) -> None:
    bare = tiny.encode_text(torch.tensor([[1, 5, 7, 2]]))
    padded = tiny.encode_text(torch.tensor([[1, 5, 7, 2, 0, 0, 0], [1, 9, 9, 9, 9, 9, 2]]))
    for name in TEXTS:
        torch.testing.assert_close(bare[name][0], padded[name][0])
    changed = tiny.encode_text(torch.tensor([[1, 5, 8, 2]]))
    assert not torch.allclose(bare["text"], changed["text"], atol=1e-4), "the words must matter"


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(2, 3), r"int\[B, L\]"),
        (torch.zeros(4, dtype=torch.long), r"int\[B, L\]"),
        (torch.zeros(2, 0, dtype=torch.long), r"int\[B, L\]"),
        (torch.ones(1, 13, dtype=torch.long), "reads 12"),
        (torch.tensor([[1, 40]]), r"knows 0\.\.39"),
        (torch.tensor([[1, -1]]), r"knows 0\.\.39"),
    ],
)
def test_ids_that_are_not_a_report(tiny: RetClip, ids: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.encode_text(ids)


def test_scales_start_where_the_published_training_did_and_learn(tiny: RetClip) -> None:
    scales = tiny.logit_scales()
    assert set(scales) == {"logit_scale", "logit_scale_left", "logit_scale_right"}
    for name, scale in scales.items():
        assert scale.item() == pytest.approx(90, rel=1e-5)
        scale.backward()
        assert getattr(tiny, name).grad is not None


# --- which text encoder ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "layers", "width"),
    [
        (None, 12, 768),
        ("RBT3-chinese", 3, 768),
        ("hfl/rbt3", 3, 768),
        ("chinese-roberta-wwm-ext", 12, 768),
        ("hfl/chinese-roberta-wwm-ext-large", 24, 1024),
        ({"num_hidden_layers": 5, "hidden_size": 128, "num_attention_heads": 2}, 5, 128),
        (transformers.BertConfig(num_hidden_layers=7), 7, 768),
    ],
)
def test_encoders_known_without_the_network(text: Any, layers: int, width: int) -> None:
    config = text_config(text)
    assert (config.num_hidden_layers, config.hidden_size) == (layers, width)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_encoder(name: str) -> None:
    shape, heads = PUBLISHED[name]
    config = text_config(name)
    assert (shape_of(config), config.num_attention_heads) == (shape, heads)
    assert shape.published == name


def test_an_encoder_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", **TINY}))
    assert shape_of(text_config(tmp_path)) == shape_of(text_config(str(tmp_path))) == TextShape(2, 16, 24, 40, 12)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no readable config.json"),
        ("{", "has no readable config.json"),
        ('{"model_type": "gpt2"}', "is a 'gpt2' model"),
    ],
)
def test_a_folder_without_a_bert(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=message):
        text_config(tmp_path)


def test_a_name_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.BertConfig, "get_config_dict", _not_found)
    with pytest.raises(UserError, match="RBT3-chinese"):
        text_config("no/such-encoder")
    with pytest.raises(UserError, match="text is int"):
        text_config(3)


def _not_found(*_: object, **__: object) -> None:
    raise OSError("404")


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtra, match=r"eyetune\[clip\]"):
        text_config(None)


def test_a_checkpoints_shapes_tell_its_encoder(tiny: RetClip) -> None:
    tensors = {f"bert.{key}": value for key, value in tiny.bert.state_dict().items()}
    assert shape_in(tensors) == TextShape(2, 16, 24, 40, 12)
    assert shape_in({"visual.proj": torch.zeros(768, 512)}) is None
