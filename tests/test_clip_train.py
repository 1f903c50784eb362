"""`eyetune clip train` on a few tiny pairs: what it leaves, that it resumes to the bit, and what others make of it."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from clip_train_kit import clip_config, write_pairs
from safetensors.torch import load_file, save_file
from test_clip_towers import TINY_BERT
from timm.layers import LayerNorm

from eyetune.backbones import load_backbone
from eyetune.backbones.backbone import Backbone
from eyetune.backbones.loading import load
from eyetune.backbones.retclip import RET_CLIP, VisionShape, clip_spec
from eyetune.backbones.vit import vision_transformer
from eyetune.cli import main
from eyetune.clip import ClipRun, load_clip, open_clip_run
from eyetune.clip.batches import PairDataset, Wordings
from eyetune.clip.config import ClipConfig
from eyetune.clip.encoder import load_encoder
from eyetune.clip.export import save_ret_clip
from eyetune.clip.model import RetClip, Standard
from eyetune.clip.tokens import Tokenizer
from eyetune.data.fundus import FundusSettings
from eyetune.data.pairs import PairSet
from eyetune.errors import ConfigError, DataError, RunError, UserError, WeightsError
from eyetune.interrupt import Interrupted
from eyetune.runtime import Runtime
from eyetune.train.loop import _Trainer
from eyetune.verbs import clip_demo, clip_train
from eyetune.verbs.clip_train import resume, share_batch, train

transformers = pytest.importorskip("transformers")

IDS = torch.tensor([[2, 5, 7, 3, 0], [2, 9, 6, 8, 3]])


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def finished(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> ClipRun:
    """Both towers trained, in parts, every epoch kept, some sentences left out."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    return train(clip_config(pairs, out, train__micro_batch=4, train__save_every=1, text__sample=0.5))


def history(path: Path) -> list[dict[str, str]]:
    with open(path / "history.csv", encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


# -- the run folder ----------------------------------------------------------------------------------------------------


def test_the_run_folder(finished: ClipRun) -> None:
    rows = history(finished.path)
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert float(rows[1]["train_loss"]) < float(rows[0]["train_loss"])
    assert all(0 <= float(row["val_mean_recall"]) <= 1 for row in rows)
    metrics = json.loads((finished.path / "metrics.json").read_text())
    assert set(metrics["datasets"]) == {"val", "test"}
    found = metrics["datasets"]["test"]["image_to_text"]
    assert (found["queries"], found["gallery"]) == (5, 5)
    assert found["metrics"]["recall_at_1"]["ci"][0] <= found["metrics"]["recall_at_1"]["value"]
    assert {file.name for file in (finished.path / "text").iterdir()} == {
        "config.json",
        "tokenizer_config.json",
        "vocab.txt",
    }
    assert {folder.name for folder in (finished.path / "checkpoints").iterdir()} == {
        "best",
        "last",
        "epoch-0001",
        "epoch-0002",
    }
    assert "image" in json.loads((finished.path / "checkpoints" / "best" / "model.json").read_text())["adapt"]


def test_opened_again_it_is_the_same_model(finished: ClipRun) -> None:
    again = open_clip_run(finished.path, device="cpu")
    assert again.fingerprint == finished.fingerprint
    assert (again.length, again.preprocess.pixels) == (24, 32)
    image = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        expected, found = finished.model(image, image.flip(0), IDS), again.model(image, image.flip(0), IDS)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])
    earlier = open_clip_run(finished.path, device="cpu", epoch=1)
    assert earlier.fingerprint != open_clip_run(finished.path, device="cpu", epoch=2).fingerprint
    with pytest.raises(RunError, match=r"no checkpoint of epoch 7. Kept: 1, 2"):
        open_clip_run(finished.path, epoch=7)


def test_the_towers_features_arrive_standardised(finished: ClipRun) -> None:
    """By the eyes that were trained on, and kept with the run."""
    standard = open_clip_run(finished.path, device="cpu").model.visual_standard
    assert isinstance(standard, Standard)
    assert not torch.equal(standard.get_buffer("scale"), torch.ones(192))
    features = torch.randn(40, 5) * torch.tensor([1.0, 10.0, 0.1, 0.0, 3.0]) + 7
    fresh = Standard(5)
    torch.testing.assert_close(fresh(features), features)
    fresh.fit(features)
    found = fresh(features)
    torch.testing.assert_close(found.mean(dim=0), torch.zeros(5), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.std(dim=0)[[0, 1, 2, 4]], torch.ones(4), atol=1e-4, rtol=0)
    assert (found[:, 3].abs() < 1e-4).all(), "a place that never differs is not blown up"


def test_the_tower_is_a_backbone_of_its_own(finished: ClipRun) -> None:
    tower = load_backbone("nano", finished.path / "vision.safetensors", pixels=32)
    assert tower.report is not None
    assert tower.report.whole
    assert tower.fingerprint() == finished.model.visual.fingerprint()
    assert tower.fingerprint() != load_backbone("nano", pixels=32).fingerprint()


# -- resume ------------------------------------------------------------------------------------------------------------


def stop_after(epochs: int) -> Callable[..., None]:
    whole = _Trainer._epoch

    def epoch(self: Any, number: int, logs: Any) -> None:
        whole(self, number, logs)
        if number + 1 == epochs:
            raise KeyboardInterrupt

    return epoch


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"text__dropout": 0.2, "text__sample": 0.5, "augment": "medium", "train__micro_batch": 3},
        {"adapt_image__kind": "frozen", "augment": None},
    ],
    ids=["whole", "frozen"],
)
def test_resumed_to_the_bit(
    pairs: Path, tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = train(clip_config(pairs, tmp_path / "straight", data__test=None, **settings))
    with monkeypatch.context() as patch:
        patch.setattr(_Trainer, "_epoch", stop_after(1))
        with pytest.raises(Interrupted, match="eyetune clip train --resume"):
            train(clip_config(pairs, tmp_path / "broken", data__test=None, **settings))
    again = resume(tmp_path / "broken")
    for checkpoint in ("best", "last"):
        one, other = (
            load_file(run.path / "checkpoints" / checkpoint / "model.safetensors") for run in (straight, again)
        )
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    losses = [[row["train_loss"] for row in history(run.path)] for run in (straight, again)]
    assert losses[0] == losses[1]


def test_as_many_pairs_are_contrasted_by_another_number_of_processes(pairs: Path, tmp_path: Path) -> None:
    config, alone = clip_config(pairs, tmp_path, train__micro_batch=4), Runtime("cpu", "fp32")
    assert share_batch(config, 1, alone) is config
    shared = share_batch(config, 3, alone).train
    assert (shared.batch_size, shared.micro_batch) == (18, 4)
    assert share_batch(clip_config(pairs, tmp_path), 2, alone).train.micro_batch == 6, "no part larger than what fitted"


def test_patients_in_two_splits_are_said(pairs: Path) -> None:
    train_pairs, val = PairSet.open(pairs, "train"), PairSet.open(pairs, "val")
    told = SimpleNamespace(splits={"train": train_pairs, "val": train_pairs, "test": train_pairs})
    found = clip_train._Job.warnings(told)  # type: ignore[arg-type]
    assert [text.split(":")[0] for text in found] == [
        "12 patients of val are in train too",
        "12 patients of test are in train too",
        "val is the test split",
    ]
    assert clip_train._Job.warnings(SimpleNamespace(splits={"train": train_pairs, "val": val})) == []  # type: ignore[arg-type]


def test_other_pairs_are_not_gone_on_with(finished: ClipRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PairSet, "fingerprint", "another")
    with pytest.raises(RunError, match="begun with other pairs"):
        resume(finished.path)


# -- frozen ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_features_computed_once_train_as_photographs_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: ClipRun
) -> None:
    pairs = write_pairs(tmp_path / "pairs", single=True)
    settings = {"model__start": str(finished.path), "adapt_image__kind": "frozen", "adapt_text__kind": "frozen"}
    looks: list[int] = []
    inner = PairDataset.eyes
    monkeypatch.setattr(PairDataset, "eyes", lambda self, *a: looks.append(1) or inner(self, *a))  # type: ignore[func-returns-value]
    once = train(clip_config(pairs, tmp_path / "once", data__test=None, **settings))
    assert len(looks) == 12 + 5 + 5, "each patient once, and validation again for the scores"
    monkeypatch.setattr(ClipConfig, "seen_once", False)
    anew = train(clip_config(pairs, tmp_path / "anew", data__test=None, **settings))
    for one, other in zip(history(once.path), history(anew.path), strict=True):
        assert float(one["train_loss"]) == pytest.approx(float(other["train_loss"]), abs=1e-4)
        assert float(one["val_loss"]) == pytest.approx(float(other["val_loss"]), abs=1e-4)
    kept = load_file(once.path / "checkpoints" / "best" / "model.safetensors")
    assert not any(name.startswith(("visual.", "bert.")) for name in kept)
    again = open_clip_run(once.path, device="cpu")
    torch.testing.assert_close(again.model.encode_text(IDS)["text"], once.model.encode_text(IDS)["text"])


# -- sentences ---------------------------------------------------------------------------------------------------------


def test_some_sentences_of_a_text_in_their_order() -> None:
    texts = ["one two. three four. five six.", "alone", "一二。三四。"]
    tokenizer = Tokenizer.from_texts(texts * 3, 100)
    wordings = Wordings(texts, tokenizer, 16, sample=0.9)
    parts = [tokenizer.encode([part], 16)[0] for part in ("one two.", "three four.", "five six.")]
    parts = [[int(token) for token in row if token][1:-1] for row in parts]
    seen = set()
    for seed in range(60):
        ids = [int(token) for token in wordings.draw(0, seed) if token]
        assert (ids[0], ids[-1]) == (tokenizer.cls, tokenizer.sep)
        inner = ids[1:-1]
        chosen = tuple(number for number, part in enumerate(parts) if str(part)[1:-1] in str(inner)[1:-1])
        assert inner == [token for number in chosen for token in parts[number]]
        seen.add(chosen)
        torch.testing.assert_close(wordings.draw(0, seed), wordings.draw(0, seed))
    assert len(seen) == 7, "every choice of three sentences but none"
    assert torch.equal(wordings.draw(1, 0), wordings.ids[1])
    assert len({tuple(wordings.draw(2, seed).tolist()) for seed in range(30)}) == 3


def test_eyes_stay_on_their_side(pairs: Path) -> None:
    found = PairSet.open(pairs, "train")
    wordings = Wordings(found.texts, Tokenizer.from_texts(found.texts, 100), 16)
    settings = FundusSettings(32)
    for augment in ("none", "medium"):
        data = PairDataset(found, wordings, settings, RET_CLIP.preprocess, augment=augment, seed=1)
        plain = PairDataset(found, wordings, settings, RET_CLIP.preprocess)
        sample, other = data[0, 3], plain[0, 3]
        for side, fellow in (("left", "right"), ("right", "left")):
            own = (sample[side] - other[side]).abs().mean()
            assert own <= (sample[side] - other[fellow]).abs().mean()
            assert own <= (sample[side] - other[side].flip(2)).abs().mean()
        torch.testing.assert_close(data[0, 3]["left"], sample["left"])
        assert augment == "none" or not torch.equal(data[1, 3]["left"], sample["left"])


# -- RET-CLIP's own layout ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["projected", "timm"])
def test_ret_clip_reads_what_is_written_for_it(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    visual = load(clip_spec(VisionShape(patch=16, width=64, depth=2, out=12, pixels=32)), "random")
    width = None
    if kind == "timm":  # CLIP's tower as timm has it: the projection is ours
        network = vision_transformer(
            32,
            patch=16,
            width=64,
            depth=2,
            heads=1,
            pre_norm=True,
            norm_layer=partial(LayerNorm, eps=1e-5),
            act_layer="quick_gelu",
            global_pool="token",
        ).eval()
        visual, width = Backbone(visual.spec, network, preprocess=visual.preprocess, pool="cls", width=64), 12
    bert = transformers.BertModel(transformers.BertConfig(**TINY_BERT), add_pooling_layer=False)
    model = RetClip(visual, bert, width).eval()
    if isinstance(model.visual_standard, Standard):
        model.visual_standard.fit(torch.randn(50, 64) * torch.rand(64) + torch.randn(64))
    path = tmp_path / "ret-clip.pt"
    save_ret_clip(model, path, epoch=3, step=40, name="run")
    content = torch.load(path, weights_only=True)
    assert {name: content[name] for name in ("epoch", "step", "name")} == {"epoch": 3, "step": 40, "name": "run"}
    assert content["state_dict"]["module.visual.proj"].shape == (64, 12)
    assert content["state_dict"]["module.visual.class_embedding"].shape == (64,)
    again = load_clip("ret-clip", weights=path, text=TINY_BERT)
    assert again.report is not None
    assert again.report.whole
    assert (again.report.unexplained, again.report.left_initial) == ((), ())
    image = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        for name, value in model(image, image.flip(0), IDS).items():
            torch.testing.assert_close(again(image, image.flip(0), IDS)[name], value, atol=1e-5, rtol=1e-5)


def test_only_towers_of_clip_fit_its_layout(finished: ClipRun, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no image tower like nano.*vit_base_patch16_clip_quickgelu_224"):
        save_ret_clip(finished.model, tmp_path / "no.pt")


# -- text encoders -----------------------------------------------------------------------------------------------------


def encoder_folder(folder: Path, *, old: bool = False, **left_out: bool) -> Path:
    folder.mkdir()
    torch.manual_seed(5)
    bert = transformers.BertModel(transformers.BertConfig(**TINY_BERT))
    state = {f"bert.{name}": value for name, value in bert.state_dict().items()}
    state["cls.predictions.bias"] = torch.zeros(40)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", **TINY_BERT}))
    if not left_out.get("vocabulary"):
        words = "[PAD] [UNK] [CLS] [SEP] mild severe no retinopathy . exudates in the left eye right spots"
        pieces = [*"0123456789", *(f"##{n}" for n in range(10))]
        (folder / "vocab.txt").write_text("\n".join([*words.split(" "), *pieces]))
    if old:
        renamed = {n.replace("LayerNorm.weight", "LayerNorm.gamma"): v for n, v in state.items()}
        torch.save(renamed, folder / "pytorch_model.bin")
    else:
        save_file(state, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("old", [False, True])
def test_an_encoder_arrives_whole(tmp_path: Path, old: bool) -> None:
    folder = encoder_folder(tmp_path / "encoder", old=old)
    bert, report = load_encoder(folder)
    assert report.whole
    assert {".".join(key.split(".")[:2]) for key, _ in report.dropped} == {"bert.pooler", "cls.predictions"}
    torch.manual_seed(5)
    expected = transformers.BertModel(transformers.BertConfig(**TINY_BERT)).eval()
    torch.testing.assert_close(bert(IDS).last_hidden_state, expected(IDS).last_hidden_state)


def test_an_encoder_that_is_not_whole(tmp_path: Path) -> None:
    folder = encoder_folder(tmp_path / "encoder")
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", **TINY_BERT, "num_hidden_layers": 3}))
    with pytest.raises(WeightsError, match="network tensors the file does not bring"):
        load_encoder(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"no weights: neither model.safetensors nor pytorch_model.bin"):
        load_encoder(folder)


@pytest.mark.slow
def test_a_frozen_encoder_of_a_folder_is_found_again(pairs: Path, tmp_path: Path) -> None:
    folder = encoder_folder(tmp_path / "encoder")
    settings = {"text__encoder": str(folder), "text__length": 12, "adapt_text__kind": "lora", "train__epochs": 1}
    run = train(clip_config(pairs, tmp_path / "run", data__test=None, **settings))
    again = open_clip_run(run.path, device="cpu")
    torch.testing.assert_close(again.model.encode_text(IDS)["text"], run.model.encode_text(IDS)["text"])
    (folder / "model.safetensors").unlink()
    encoder_folder(tmp_path / "other")
    state = load_file(tmp_path / "other" / "model.safetensors")
    state["bert.embeddings.word_embeddings.weight"] += 1
    save_file(state, folder / "model.safetensors")
    with pytest.raises(RunError, match="trained on other base weights"):
        open_clip_run(run.path)


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def test_an_encoder_without_its_vocabulary(pairs: Path, tmp_path: Path) -> None:
    folder = encoder_folder(tmp_path / "encoder", vocabulary=True)
    with pytest.raises(UserError, match=r"has no vocabulary \(vocab.txt\)"):
        train(clip_config(pairs, tmp_path / "run", text__encoder=str(folder)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"train__ret_clip_file": True}, ConfigError, "RET-CLIP's code has no image tower like nano"),
        ({"train__batch_size": 500}, DataError, "there are only 12 pairs to train on: use at most 12"),
        ({"data__val": "nowhere"}, DataError, "has no nowhere pairs"),
        ({"train__accumulate": 2}, ConfigError, "train.accumulate: pairs of different batches are not contrasted"),
        ({"adapt_text__kind": "frozen"}, ConfigError, "text.encoder small has learnt nothing yet"),
        ({"train__micro_batch": 50}, ConfigError, "train.micro_batch: is more than train.batch_size"),
        ({"adapt_image__kind": "lora", "adapt_image__targets": ["qvk"]}, ConfigError, "Did you mean 'qkv'"),
        ({"trian__epochs": 2}, ConfigError, "trian: unknown. Did you mean 'train'"),
        ({"model__start": "/nowhere/ret-clip.pt"}, ConfigError, "model.start: no file or folder at"),
        ({"data__folder": "/nowhere"}, ConfigError, "data.folder: no folder at /nowhere"),
    ],
)
def test_settings_that_cannot_be(
    pairs: Path, tmp_path: Path, settings: dict[str, Any], error: type[UserError], message: str
) -> None:
    with pytest.raises(error, match=message):
        train(clip_config(pairs, tmp_path / "run", **settings))
    assert not list(tmp_path.rglob("*.yaml")), "the mended command wants this folder"


def test_runs_of_another_kind(finished: ClipRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["finetune", "--resume"], ["evaluate"], ["report"]):
        more = ["--data", "x=nowhere.csv"] if words == ["evaluate"] else []
        assert main([*words, str(finished.path), *more]) == 2
        said = capsys.readouterr().err
        assert "is an image-text run (eyetune clip train), and this takes a run of eyetune finetune" in said, words
        assert "vision.safetensors" in said
    other = tmp_path / "finetuned"
    other.mkdir()
    (other / "config.yaml").write_text("data: {table: x.csv}\nadapt:\n  kind: lora\n")
    assert main(["clip", "train", "--resume", str(other)]) == 2
    assert "is a run of eyetune finetune, and this takes an image-text run" in capsys.readouterr().err


def test_a_file_without_its_vocabulary(tmp_path: Path) -> None:
    path = tmp_path / "ret-clip.pt"
    path.touch()
    with pytest.raises(UserError, match=r"does not hold the vocabulary it reads.*hfl/chinese-roberta-wwm-ext"):
        open_clip_run(path)


# -- the demo ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_demo_goes_the_whole_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In miniature: that it learns is what the demo itself shows (docs/benchmarks.md)."""
    monkeypatch.setattr(clip_demo, "PATIENTS", {"train": 12, "val": 4, "test": 6})
    monkeypatch.setattr(clip_demo, "PIXELS", 64)
    train = {**clip_demo.RECIPE["train"], "epochs": 1, "batch_size": 6}
    monkeypatch.setitem(clip_demo.RECIPE, "train", train)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "demo"
    clip_demo.command(out=out, device="cpu", precision="fp32")
    said = capsys.readouterr().out
    assert "[5/5]" in said
    assert "image to text: the first answer is right (R@1)" in said
    found = json.loads((out / clip_demo.MARKER).read_text())
    assert found["gallery"] == 6
    assert set(found["recall_at_1"]) == {"image_to_text", "text_to_image"}
    assert (out / "run" / "retrieval" / "retrieval.html").is_file()
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.txt").touch()
    with pytest.raises(UserError, match="not an earlier demo"):
        clip_demo.command(out=other)
