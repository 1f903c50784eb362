"""Image-text models on their way into and out of a run folder: built as configured, and found again as trained."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from eyetune.backbones import Preprocess, load_backbone
from eyetune.clip.config import CLIP, SMALL, ClipConfig
from eyetune.clip.encoder import load_encoder, small_encoder
from eyetune.clip.loading import bert_model, load_clip
from eyetune.clip.model import SCALES, RetClip
from eyetune.clip.text import text_config
from eyetune.clip.tokens import Tokenizer
from eyetune.clip.towers import BothTowers, merged_tower
from eyetune.data.fundus import FundusSettings
from eyetune.errors import ConfigError, RunError, UserError
from eyetune.files import make_folder, sha256, write_json
from eyetune.runtime import Runtime, choose_device, choose_precision, seed_everything
from eyetune.train.leaks import LEARNT_FROM, Seen
from eyetune.train.rundir import Checkpoint, ModelCard, RunDir

if TYPE_CHECKING:
    from eyetune.data.pairs import PairSet

INITIAL_SCALE = 1 / 0.07
"""Where the logit scales of a model start that is not RET-CLIP's (Radford et al., ICML 2021)."""

LENGTH = 128
"""Tokens of a text that a file without a configuration reads."""


@dataclass(frozen=True)
class ClipRun:
    """A trained image-text model with all it takes to use it.

    Attributes:
        path: the run folder, or the file.
        model: in eval mode, on the device of `runtime`.
        tokenizer: its vocabulary.
        preprocess: what its images must have gone through.
        settings: how a photograph becomes the square before that.
        config: of the run; None for a file.
        length: tokens of a text that it reads.
        fingerprint: of the trained weights and the vocabulary: features of another one are not comparable.
        runtime: where and how it computes.
    """

    path: Path
    model: RetClip
    tokenizer: Tokenizer
    preprocess: Preprocess
    settings: FundusSettings
    config: ClipConfig | None
    length: int
    fingerprint: str
    runtime: Runtime


@dataclass(frozen=True)
class Built:
    """A model before training: with its vocabulary, and what trains in it."""

    model: RetClip
    tokenizer: Tokenizer
    strategy: BothTowers


def build(config: ClipConfig, texts: Sequence[str]) -> Built:
    """The model that a configuration describes, its towers adapted; on the CPU.

    Args:
        config: the configuration.
        texts: of the training split: the vocabulary of encoder small is made of them.

    Raises UserError, WeightsError, ConfigError for what cannot be loaded or does not go together.
    """
    seed_everything(config.seed)  # the first weights of everything that is not loaded
    if config.model.start is not None:
        model, tokenizer = _started(config)
    else:
        if config.text.encoder == SMALL:
            tokenizer = Tokenizer.from_texts(texts, config.text.vocabulary)
        else:
            tokenizer = Tokenizer.from_folder_or_name(config.text.encoder)
        model = _new_model(config, len(tokenizer))
    _check_vocabulary(model, tokenizer, config.text.length)
    strategy = BothTowers(config.adapt_image, config.adapt_text)
    return Built(strategy.apply(model), tokenizer, strategy)


def _new_model(config: ClipConfig, tokens: int) -> RetClip:
    vision = config.model
    backbone = load_backbone(vision.backbone, vision.weights, pixels=vision.pixels, pool=vision.pool)
    bert = small_encoder(config.text, tokens) if config.text.encoder == SMALL else load_encoder(config.text.encoder)[0]
    scale = INITIAL_SCALE if vision.scale is None else vision.scale
    return RetClip(backbone, bert, None if backbone.pool == "projected" else vision.width, scale)


def _started(config: ClipConfig) -> tuple[RetClip, Tokenizer]:
    """The model that `model.start` names, its adapters merged, and its vocabulary."""
    start = config.model.start
    assert start is not None
    if start.is_dir():
        found = open_clip_run(start, device="cpu", precision="fp32")
        model, tokenizer = plain(found.model), found.tokenizer
    else:
        if config.text.encoder == SMALL:
            raise ConfigError(
                f"text.encoder: {start} does not hold the vocabulary it reads. Give the folder of its text encoder, or "
                "the encoder's name on the hub (the published one's is hfl/chinese-roberta-wwm-ext)."
            )
        model = load_clip("ret-clip", weights=start)
        tokenizer = Tokenizer.from_folder_or_name(config.text.encoder)
    if config.model.scale is not None:
        for name in SCALES:
            model.get_parameter(name).data.fill_(math.log(config.model.scale))
    return model, tokenizer


def plain(model: RetClip) -> RetClip:
    """`model` without the marks of training: adapters merged into the weights, everything trainable."""
    model.visual = merged_tower(model.visual)
    model.bert = merged_tower(model.towers()["bert"]).network
    model.requires_grad_(True)
    return model


def _check_vocabulary(model: RetClip, tokenizer: Tokenizer, length: int) -> None:
    """Raise ConfigError unless the text tower knows every token, and reads texts of this length."""
    known = int(model.text_config.vocab_size)
    if len(tokenizer) > known:
        raise ConfigError(
            f"text.encoder: the vocabulary ({tokenizer.source}) has {len(tokenizer)} tokens; the text encoder knows "
            f"{known}. They do not belong together: take the vocabulary of this encoder."
        )
    most = int(model.text_config.max_position_embeddings)
    if length > most:
        raise ConfigError(f"text.length: {length} is more than the text encoder reads ({most}).")


# -- into the run folder and out of it ---------------------------------------------------------------------------------

PHOTOGRAPHS = "photographs"
"""Where data.json says which photographs the run has seen."""

TEXT = "text"
"""Where in a run folder the vocabulary and the text encoder's configuration are."""


def model_card(config: ClipConfig, built: Built) -> ModelCard:
    """All it takes to rebuild the model around its checkpoint, with what `RUN/text` holds."""
    visual = built.model.visual
    towers = {name: built.strategy.fingerprint(name) for name in ("visual", "bert")}
    return ModelCard(
        backbone=config.model.backbone if config.model.start is None else visual.spec.name,
        weights=config.model.weights if config.model.start is None else str(config.model.start),
        pool=visual.pool,
        pixels=visual.preprocess.pixels,
        dropout=0.0,
        fingerprint=":".join(towers.values()),
        preprocess=visual.preprocess.to_dict(),
        fundus=FundusSettings.of(config.data, visual.preprocess).to_dict(),
        classes=(),
        adapt={name: getattr(config, f"adapt_{name}").model_dump(mode="json") for name in ("image", "text")},
        seed=config.seed,
        task={"kind": CLIP, "width": built.model.width, "vocabulary": built.tokenizer.fingerprint},
    )


def save_text(folder: RunDir, built: Built) -> None:
    """Write `RUN/text`: vocabulary and configuration of the text encoder, as transformers reads them."""
    if not folder.main:
        return
    place = folder.path / TEXT
    make_folder(place)
    built.tokenizer.save(place)
    write_json(place / "config.json", {"model_type": "bert", **built.model.text_config.to_diff_dict()})


def open_clip_run(
    path: str | Path,
    *,
    text: str | Path | None = None,
    device: str = "auto",
    precision: str | None = None,
    epoch: int | None = None,
) -> ClipRun:
    """A run of `eyetune clip train`, as of its best epoch; or a file of RET-CLIP's or its trainer's.

    Args:
        path: the run folder; or the file.
        text: for a file: the folder, or the name on the hub, of the text encoder whose vocabulary it reads.
        device: auto, cpu, cuda or mps.
        precision: auto, fp32, bf16 or fp16; None = as the run was trained, where the device can.
        epoch: from 1: of a checkpoint kept by train.save_every, in place of the best one.

    Raises RunError when the folder is another kind of run, has no checkpoint or is damaged, or the base weights are no
    longer those that it was trained on; UserError for a file without its vocabulary; WeightsError as `load_clip`.
    """
    path = Path(path)
    if path.is_file():
        return _open_file(path, text, device, precision)
    folder = RunDir.open(path, kind=CLIP)
    config = folder.read_config_as(ClipConfig)
    checkpoint = folder.load_best() if epoch is None else folder.load_epoch(epoch)
    runtime = Runtime(device, precision or trained_precision(config.precision, device), seed=config.seed)
    folder.main = runtime.is_main
    tokenizer = Tokenizer.from_folder_or_name(folder.path / TEXT)
    if tokenizer.fingerprint != checkpoint.card.task.get("vocabulary"):
        raise RunError(f"{folder.path / TEXT} does not hold the vocabulary that the run was trained with.")
    model, _ = rebuild(checkpoint, config, folder)
    return ClipRun(
        path=folder.path,
        model=runtime.place(model),
        tokenizer=tokenizer,
        preprocess=model.preprocess,
        settings=FundusSettings.from_dict(checkpoint.card.fundus),
        config=config,
        length=config.text.length,
        fingerprint=f"{checkpoint.digest}:{tokenizer.fingerprint}",
        runtime=runtime,
    )


def seen_in_training(splits: Mapping[str, PairSet], start: Path | None) -> list[str] | None:
    """The ids of the photographs that a run is trained and chosen on, for its data.json; None where it is not known.

    Args:
        splits: its pairs by "train", "val" and "test".
        start: the run or file it starts from (`model.start`); what is known of a run's training counts too.
    """
    known = [splits[name].photographs for name in LEARNT_FROM if name in splits]
    before: list[str] = []
    if start is not None and start.is_dir():
        before = RunDir(start, main=False).read_data().get(PHOTOGRAPHS) or []
    return None if None in known else sorted({*before, *(one for ids in known for one in ids or ())})


def learnt_from(run: ClipRun) -> Seen:
    """What :func:`seen_in_training` noted of a run."""
    known = RunDir(run.path, main=False).read_data().get(PHOTOGRAPHS) if run.path.is_dir() else None
    if not known:
        return Seen(unknown="which photographs the model was trained on is not noted")
    return Seen(photographs=frozenset(known))


def trained_precision(precision: str, device: str) -> str:
    """The precision asked for in training; auto where the device cannot."""
    try:
        choose_precision(precision, choose_device(device))
    except UserError:
        return "auto"
    return precision


def rebuild(checkpoint: Checkpoint, config: ClipConfig, folder: RunDir) -> tuple[RetClip, BothTowers]:
    """The trained model of a checkpoint, on the CPU in eval mode. Raises as :func:`open_clip_run`.

    Of a tower that was trained whole the checkpoint has everything: its base weights need not be there any more.
    """
    card = checkpoint.card
    seed_everything(config.seed)
    if config.model.start is not None:
        if not config.model.start.exists():
            raise RunError(f"{folder.path} began from {config.model.start}, which is no longer there. Put it back.")
        model, _ = _started(config)
    else:
        model = _like_trained(checkpoint, config, folder)
    model.preprocess = model.visual.preprocess = Preprocess.from_dict(card.preprocess)
    strategy = BothTowers(config.adapt_image, config.adapt_text)
    strategy.apply(model)
    known = dict(zip(("visual", "bert"), card.fingerprint.split(":"), strict=True))
    for name, config_of in strategy.configs.items():
        if config_of.kind != "full" and strategy.fingerprint(name) != known[name]:
            base = config.model.weights or config.model.backbone if name == "visual" else config.text.encoder
            raise RunError(f"{folder.path} was trained on other base weights than {base} holds now.")
    strategy.load_checkpoint(model, checkpoint.tensors)
    strategy.set_mode(model, training=False)
    return model, strategy


def _like_trained(checkpoint: Checkpoint, config: ClipConfig, folder: RunDir) -> RetClip:
    """A model of the checkpoint's shape; towers that it does not hold whole with their base weights."""
    card = checkpoint.card
    weights = card.weights
    if config.adapt_image.kind == "full":
        weights = "random"
    elif weights not in (None, "hub", "random") and not Path(weights).is_file():
        raise RunError(
            f"{folder.path} was trained on the base weights {weights}, which are no longer there. A run keeps only "
            "what training changed: put the file back."
        )
    backbone = load_backbone(card.backbone, weights, pixels=card.pixels, pool=card.pool)
    bert: nn.Module
    if config.adapt_text.kind == "full":
        bert = bert_model(text_config(folder.path / TEXT))
    else:
        bert = load_encoder(config.text.encoder)[0]
    return RetClip(backbone, bert, None if backbone.pool == "projected" else config.model.width)


def _open_file(path: Path, text: str | Path | None, device: str, precision: str | None) -> ClipRun:
    if text is None:
        raise UserError(
            f"{path} does not hold the vocabulary it reads. Say whose it is: the folder of its text encoder, or the "
            "encoder's name on the hub (of the published ret-clip.pt hfl/chinese-roberta-wwm-ext)."
        )
    runtime = Runtime(device, precision or "auto")
    model = load_clip("ret-clip", weights=path)
    tokenizer = Tokenizer.from_folder_or_name(text)
    length = min(LENGTH, int(model.text_config.max_position_embeddings))
    _check_vocabulary(model, tokenizer, length)
    preprocess = model.preprocess
    return ClipRun(
        path=path,
        model=runtime.place(model),
        tokenizer=tokenizer,
        preprocess=preprocess,
        settings=FundusSettings(preprocess.pixels, preprocess.fit),
        config=None,
        length=length,
        fingerprint=f"{sha256(path)}:{tokenizer.fingerprint}",
        runtime=runtime,
    )
