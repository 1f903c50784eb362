"""The configuration of `eyetune clip train`: two towers, prepared pairs, and the training section of fine-tuning.

Importable without torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from eyetune.config import LoopConfig, RunConfig, missing_file
from eyetune.data.config import PhotoConfig
from eyetune.section import Section

#: The kind of run, as its configuration says it. Runs of `finetune` say nothing.
CLIP: Literal["clip"] = "clip"

#: `text.encoder` that is not a folder nor a name: a small BERT of its own, from scratch.
SMALL = "small"

METRICS = ("mean_recall", "recall_at_1", "recall_at_5", "recall_at_10", "mrr", "loss")


class ImageConfig(Section):
    """The image tower."""

    start: Path | None = None
    """A whole image-text model to go on from: ret-clip.pt, a file of its trainer, or a run folder of clip train. Its
    towers and projections then take the place of backbone, weights and width."""
    backbone: str = Field(default="nano", min_length=1)
    """Image tower: a name from `eyetune models list`, or any timm name (vit_base_patch16_clip_quickgelu_224, …)."""
    weights: str | None = None
    """Its checkpoint file; hub downloads the published file; random is untrained; not given: the embedded nano."""
    pool: str | None = None
    """How its tokens become one feature. Not given: as the backbone was published."""
    pixels: int | None = Field(default=None, ge=14, le=4096)
    """Side of the square image the network gets. Not given: the backbone's own."""
    width: int = Field(default=512, ge=1, le=8192)
    """Length of every embedding. A tower that ends in a projection (ret-clip) brings its own."""
    scale: float | None = Field(default=None, gt=0, le=100)
    """What cosines are multiplied by at first, one over the temperature. Not given: 1/0.07, or as in `start`."""


class TextConfig(Section):
    """The text tower and its vocabulary."""

    encoder: str = Field(default=SMALL, min_length=1)
    """Text tower: a folder of a BERT (config.json, weights, vocab.txt), its name on the Hugging Face hub, or small: a
    little one from scratch, its vocabulary made from the training texts. With model.start: whose vocabulary that
    model reads (its weights come from model.start); a run folder brings its own."""
    length: int = Field(default=128, ge=8, le=8192)
    """Tokens of a text that are read; longer ones are cut."""
    sample: float = Field(default=0.0, ge=0, lt=1)
    """Share of the training texts of which only some sentences, drawn anew in every epoch, are read."""
    vocabulary: int = Field(default=1000, ge=100, le=200_000)
    """Tokens of the vocabulary of encoder small."""
    layers: int = Field(default=2, ge=1, le=48)
    """Layers of encoder small."""
    width: int = Field(default=128, ge=16, le=4096)
    """Width of encoder small; a multiple of 64, or one attention head."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Dropout of encoder small."""


class TowerConfig(Section):
    """What becomes of one tower in training."""

    kind: Literal["frozen", "lora", "full"] = "full"
    """The tower stays as it is (frozen), gets low-rank adapters (lora), or trains whole (full). The projections above
    the towers always train."""
    rate: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """The tower's learning rate over that of the projections, which is train.lr."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Learning rate of each layer over that of the layer above it."""
    r: int = Field(default=8, ge=1)
    """Rank of the adapters (lora)."""
    alpha: float = Field(default=32.0, gt=0)
    """Weight of the adapters: their output counts alpha / r times (lora)."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of an adapter's inputs dropped in training (lora)."""
    targets: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Layers to adapt, by name (lora). Not given: qkv, or query, key and value."""

    @field_validator("targets", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        """Accept `query,value` for the list."""
        return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value


class _Pairs(Section):
    """The prepared pairs."""

    folder: Path
    """What `eyetune clip prepare` made, or a folder with databases of RET-CLIP's layout."""
    train: str = Field(default="train", min_length=1)
    """The split to train on."""
    val: str | None = "val"
    """The split that chooses the best epoch; null trains without."""
    test: str | None = "test"
    """The split scored at the end, where there is one; null scores none."""


class PairsConfig(PhotoConfig, _Pairs):
    """The prepared pairs, and how their photographs become squares."""


class ClipTrainConfig(LoopConfig):
    """How long, how fast and in which batches the pairs are trained on."""

    batch_size: int = Field(default=64, ge=2)
    """Pairs that are contrasted with each other, in one process; with several, those of all processes are."""
    micro_batch: int | None = Field(default=None, ge=1)
    """Pairs in one forward pass: a batch is computed in parts of this size, with the gradients of the whole
    (GradCache), in little memory and a third more time. Not given: all at once."""
    metric: Literal["mean_recall", "recall_at_1", "recall_at_5", "recall_at_10", "mrr", "loss"] = "mean_recall"
    """Validation metric that chooses the best epoch: recall at 1, 5 and 10 in both directions, its mean, mean
    reciprocal rank, or the loss."""
    ret_clip_file: bool = False
    """At the end, write ret-clip.pt too, as RET-CLIP's own trainer saves it (image towers of CLIP only)."""


class _Clip(Section):
    """Two towers, the pairs they learn from, and how."""

    kind: Literal["clip"] = CLIP
    """That this is an image-text run."""
    data: PairsConfig
    model: ImageConfig = ImageConfig()
    text: TextConfig = TextConfig()
    adapt_image: TowerConfig = TowerConfig()
    adapt_text: TowerConfig = TowerConfig()
    train: ClipTrainConfig = ClipTrainConfig()
    augment: Literal["none", "light", "medium", "strong"] | None = None
    """Changes to the training images. Never mirrored and never turned by more than 15 degrees: the texts speak of left
    and right, above and below. Not given: light, or none where the image tower is frozen, whose features are then
    computed once."""
    out: Path = Path("runs/clip")
    """The run folder, new or empty."""


class ClipConfig(RunConfig, _Clip):
    """Everything that defines an image-text run."""

    SECTIONS: ClassVar[tuple[str, ...]] = ("data", "model", "text", "adapt_image", "adapt_text", "train")
    REQUIRED: ClassVar[str] = "data.folder"
    EXAMPLE: ClassVar[tuple[str, str]] = (
        "Prepared pairs are enough",
        "eyetune clip train --data.folder pairs --out runs/clip",
    )

    @property
    def learning_rate(self) -> float:
        """`train.lr`, or 5e-4."""
        return 5e-4 if self.train.lr is None else self.train.lr

    @property
    def changes(self) -> str:
        """`augment`, settled."""
        return self.augment or ("none" if self.adapt_image.kind == "frozen" else "light")

    @property
    def seen_once(self) -> bool:
        """Whether what the image tower gives for a pair is the same in every epoch."""
        return self.adapt_image.kind == "frozen" and self.changes == "none"

    @property
    def read_once(self) -> bool:
        """Whether what the text tower gives for a pair is the same in every epoch."""
        return self.adapt_text.kind == "frozen" and not self.text.sample

    def misfits(self) -> Iterator[tuple[str, str]]:
        """Settings that cannot go together: dotted path and what is wrong."""
        if self.train.accumulate != 1:
            yield "train.accumulate", "pairs of different batches are not contrasted: use train.micro_batch"
        if self.train.fsdp:
            yield "train.fsdp", "is for fine-tuning only"
        if self.text.width > 64 and self.text.width % 64:
            yield "text.width", f"must be a multiple of 64, or at most 64, got {self.text.width}"
        if self.model.start is None and self.text.encoder == SMALL and self.adapt_text.kind != "full":
            yield "adapt_text.kind", f"text.encoder {SMALL} has learnt nothing yet: full, or name another encoder"
        if self.train.micro_batch is not None and self.train.micro_batch > self.train.batch_size:
            yield "train.micro_batch", f"is more than train.batch_size ({self.train.batch_size})"

    @classmethod
    def missing_files(cls, content: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """Files and folders that the configuration names and that are not there."""
        data, model = content.get("data"), content.get("model")
        if isinstance(data, Mapping):
            yield from missing_file("data.folder", data.get("folder"), folder=True)
        if isinstance(model, Mapping):
            if model.get("weights") not in ("hub", "random", None):
                yield from missing_file("model.weights", model["weights"])
            yield from missing_file("model.start", model.get("start"), either=True)
