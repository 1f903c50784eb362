"""Two eyes and a report in one space: RET-CLIP's network around any image tower and any BERT.

The network of Du et al., "RET-CLIP: A Retinal Image Foundation Model Pre-trained with Clinical Diagnostic Reports"
(MICCAI 2024): one image tower sees each eye (there a CLIP ViT-B/16), one BERT reads the report of both; three pairs of
embeddings (patient, left eye, right eye) are compared. The wiring here is pinned by what the published implementation
computes (tests/golden/retclip.json).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from eyetune.clip.text_tower import TextTower

if TYPE_CHECKING:
    from eyetune.backbones.backbone import Backbone
    from eyetune.backbones.weights import LoadReport

PAD = 0
"""The id of [PAD] in BERT's vocabularies: masked out of the attention."""

INITIAL_SCALE = 90.0
"""The logit scales an untrained network starts from, as RET-CLIP's does."""

HEADS = (
    "visual_projection",
    "text_projection",
    "text_projection_left",
    "text_projection_right",
    "global_feature_mapping",
    "left_feature_mapping",
    "right_feature_mapping",
)
"""The layers on top of the two towers; with the logit scales, what trains when both towers are frozen."""

TEXTS = {"text": "text_projection", "text_left": "text_projection_left", "text_right": "text_projection_right"}
SCALES = ("logit_scale", "logit_scale_left", "logit_scale_right")


class RetClip(nn.Module):
    """A binocular image-text model.

    Args:
        visual: the tower both eyes go through: float[B, 3, H, W] -> float[B, W], not normalised.
        bert: a transformers BertModel without a pooler.
        width: D, the length of every embedding. None: the tower's own, W, as of a tower that ends in a projection
            (CLIP's); else :class:`Standard` and a linear projection W -> D without bias stand behind the tower.
        scale: the logit scales to start from.

    Attributes:
        width: D, the length of every embedding (512 in RET-CLIP).
        preprocess: what images must have gone through (the visual tower's).
        text_config: the encoder's BertConfig.
        report: how a checkpoint arrived, key by key; None for a random network.
    """

    def __init__(
        self, visual: Backbone, bert: nn.Module, width: int | None = None, scale: float = INITIAL_SCALE
    ) -> None:
        super().__init__()
        self.visual = visual
        self.bert = bert
        self.visual_standard: nn.Module = nn.Identity()
        self.visual_projection: nn.Module = nn.Identity()
        if width is not None:
            self.visual_standard = Standard(visual.width)
            self.visual_projection = nn.Linear(visual.width, width, bias=False)
            nn.init.normal_(self.visual_projection.weight, std=visual.width**-0.5)
        self.width = width = visual.width if width is None else width
        self.preprocess = visual.preprocess
        self.report: LoadReport | None = None
        config: Any = bert.config
        self.text_config = config
        for name in TEXTS.values():
            setattr(self, name, _projection(config.hidden_size, width))
        # Both eyes' features lie side by side, left first, for the patient's embedding.
        self.global_feature_mapping = nn.Linear(2 * width, width, bias=False)
        self.left_feature_mapping = nn.Linear(width, width, bias=False)
        self.right_feature_mapping = nn.Linear(width, width, bias=False)
        for name in SCALES:
            setattr(self, name, nn.Parameter(torch.tensor(scale).log()))

    def forward(
        self, left: Tensor | None, right: Tensor | None, ids: Tensor, single: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Everything a contrastive loss needs, in one call (so that DistributedDataParallel sees every parameter).

        Args and results are those of :meth:`encode_eyes`, :meth:`encode_text` and :meth:`logit_scales` together.
        """
        return {**self.encode_eyes(left, right, single), **self.encode_text(ids), **self.logit_scales()}

    def towers(self) -> dict[str, Backbone]:
        """Both towers as adaptation knows them, by their names in the model: "visual" and "bert"."""
        return {"visual": self.visual, "bert": TextTower(self.bert)}

    def see(self, images: Tensor) -> Tensor:
        """One eye each, float[B, 3, H, W] -> float[B, D]: the tower and, where there is one, its projection.

        float[B, W] are features that the tower gave before (it is frozen): only projected.
        """
        features = images if images.ndim == 2 else self.visual.features(images)
        seen: Tensor = self.visual_projection(self.visual_standard(features))
        return seen

    def encode_eyes(
        self, left: Tensor | None, right: Tensor | None = None, single: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Embed patients by their photographs.

        A patient with one photograph: the single eye stands for both. It is given to the trained mappings as left and
        as right eye, so that the result lies in the same space as everybody else's. (The published code returns the
        tower's bare output instead, which was never trained to meet a text: that is `visual.features(left)`.)

        Args:
            left: float[B, 3, 224, 224], normalised by `preprocess`; None when there are only right eyes.
            right: the fellow eyes, same shape and order; None when there are only left eyes.
            single: bool[B]: patients of whom `left` is the only eye; their row of `right` is not looked at.

        Either may be the tower's features float[B, W] of those eyes, computed before.

        Returns:
            "image" (the patient), "left", "right": float[B, D], each row of unit length.

        Raises:
            ValueError: neither eye, or the two batches differ in shape.
        """
        if left is not None and right is not None:
            if left.shape != right.shape:
                raise ValueError(
                    f"left is {list(left.shape)}, right {list(right.shape)}: give one row a patient, in the same order."
                )
            if single is None or not bool(single.any()):
                left_features, right_features = self.see(torch.cat([left, right])).chunk(2)
            else:  # an eye that stands for both is looked at once
                pairs = (~single).nonzero()[:, 0].to(left.device)
                seen = self.see(torch.cat([left, right[pairs]]))
                left_features, fellows = seen[: len(left)], seen[len(left) :]
                right_features = left_features.index_copy(0, pairs, fellows)
        else:
            only = left if left is not None else right
            if only is None:
                raise ValueError("encode_eyes needs at least one eye: left and right are both None.")
            left_features = right_features = self.see(only)
        return {
            "image": _unit(self.global_feature_mapping(torch.cat([left_features, right_features], dim=1))),
            "left": _unit(self.left_feature_mapping(left_features)),
            "right": _unit(self.right_feature_mapping(right_features)),
        }

    def encode_text(self, ids: Tensor) -> dict[str, Tensor]:
        """Embed reports: the encoder's output for the first token, [CLS], through three projections.

        Args:
            ids: int[B, L], [CLS] … [SEP], filled up with [PAD] = 0, which the attention does not see; or float[B, H],
                what :meth:`read` gave for them before (the encoder is frozen).

        Returns:
            "text" (the patient), "text_left", "text_right": float[B, D], each row of unit length.

        Raises:
            ValueError: not a matrix of integers, longer than the encoder reads, or ids of another vocabulary.
        """
        known = ids.is_floating_point() and ids.ndim == 2 and ids.shape[1] == self.text_config.hidden_size
        first = ids if known else self.read(ids)
        return {name: _unit(getattr(self, projection)(first)) for name, projection in TEXTS.items()}

    def read(self, ids: Tensor) -> Tensor:
        """The text encoder's output for [CLS], the first token: int[B, L] -> float[B, H]. Raises as
        :meth:`encode_text`."""
        config = self.text_config
        if ids.ndim != 2 or ids.is_floating_point() or ids.is_complex() or ids.shape[1] == 0:
            raise ValueError(f"ids is {ids.dtype}{list(ids.shape)}: give token ids, int[B, L].")
        if ids.shape[1] > config.max_position_embeddings:
            raise ValueError(
                f"ids has {ids.shape[1]} tokens a row; the text encoder reads {config.max_position_embeddings}. "
                "Truncate when tokenising."
            )
        # Looking at values would make an accelerator wait; there the embedding's own check has to do.
        if ids.device.type == "cpu" and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < config.vocab_size:
            raise ValueError(
                f"ids run from {int(ids.min())} to {int(ids.max())}; the text encoder knows "
                f"0..{config.vocab_size - 1}. Tokenise with the vocabulary of this encoder."
            )
        first: Tensor = self.bert(ids, attention_mask=ids.ne(PAD).long()).last_hidden_state[:, 0]
        return first

    def logit_scales(self) -> dict[str, Tensor]:
        """What cosines are multiplied by before the softmax, for patient, left and right: float[], each > 0."""
        return {name: getattr(self, name).exp() for name in SCALES}


class Standard(nn.Module):
    """Features with mean 0 and deviation 1 in every place, by figures that do not train: float[B, W] -> float[B, W].

    A tower that never met a text may give features that are nearly the same for all eyes but for a few places, and a
    projection then learns those few first. (Linear probes standardise for the same reason: He et al., "Masked
    Autoencoders Are Scalable Vision Learners", CVPR 2022, appendix A.) Until :meth:`fit` it changes nothing.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))

    def fit(self, features: Tensor) -> None:
        """Take the figures from features float[N, W] of training eyes; places that never differ stay as they are."""
        deviation, mean = torch.std_mean(features.double(), dim=0)
        smallest = 1e-3 * deviation.max()
        self.get_buffer("mean").copy_(mean.float())
        self.get_buffer("scale").copy_(torch.where(deviation > smallest, 1 / deviation.clamp(min=1e-30), 1.0).float())

    def forward(self, features: Tensor) -> Tensor:
        """The standardised features, in float32."""
        return (features.float() - self.mean) * self.scale  # type: ignore[operator]


def _projection(text_width: int, width: int) -> nn.Sequential:
    hidden, out = nn.Linear(text_width, text_width), nn.Linear(text_width, width)
    for layer in (hidden, out):
        nn.init.normal_(layer.weight, std=text_width**-0.5)
    return nn.Sequential(hidden, nn.ReLU(), out)


def _unit(features: Tensor) -> Tensor:
    return functional.normalize(features, dim=-1)
