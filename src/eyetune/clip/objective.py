"""What image-text training minimises: three symmetric contrasts, in which nothing is called wrong that is not.

A batch of N pairs gives, for patient, left and right eye each, an N x N table of cosines times a temperature; every
image has to find its text among all texts, and every text its image (InfoNCE: van den Oord et al., 2018; both ways:
Radford et al., ICML 2021; the three of them, summed: Du et al., MICCAI 2024).

Published code calls everything off the diagonal wrong. Reports repeat, and one patient may have several texts: here
all pairs of a batch that share the patient or the wording of the text are right answers, and the target is even among
them (Yang et al., "Unified Contrastive Learning in Image-Text-Label Space", CVPR 2022; Khosla et al., "Supervised
Contrastive Learning", NeurIPS 2020, "L_out"). Without repetitions this is InfoNCE to the last bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

CONTRASTS = (
    ("image", "text", "logit_scale"),
    ("left", "text_left", "logit_scale_left"),
    ("right", "text_right", "logit_scale_right"),
)
"""Names of the images' embeddings, the texts', and the scale between them, as RetClip gives them."""

EMBEDDINGS = tuple(name for images, texts, _ in CONTRASTS for name in (images, texts))
SCALES = tuple(scale for *_, scale in CONTRASTS)

LARGEST_SCALE = 100.0
"""A temperature below 1/100 is not used (Radford et al.: it keeps training stable). Beyond it the scale has no
gradient."""


def right_answers(mine: tuple[Tensor, Tensor], everyone: tuple[Tensor, Tensor]) -> Tensor:
    """Which of all pairs are right answers to which of mine.

    Args:
        mine: patients int64[B], wordings int64[B].
        everyone: patients int64[N], wordings int64[N].

    Returns bool[B, N]: the same patient, or the same wording.
    """
    return (mine[0][:, None] == everyone[0]) | (mine[1][:, None] == everyone[1])


def contrast(
    mine: Mapping[str, Tensor], everyone: Mapping[str, Tensor], right: Tensor, *, each: bool = False
) -> Tensor:
    """The loss of my pairs among all pairs.

    Args:
        mine: embeddings float[B, D] by the names of :data:`CONTRASTS`, each row of unit length, and scales float[].
        everyone: embeddings float[N, D] of all processes' pairs, mine among them.
        right: bool[B, N] as :func:`right_answers` gives it; a row has at least one.
        each: for every pair, not their mean.

    Returns the mean over my pairs of the three losses' sum, float[] (or float[B]), computed in float32. The mean over
    all processes' pairs is that of one process with all of them.
    """
    share = right.float() / right.sum(dim=1, keepdim=True)
    total = torch.zeros(len(right), device=right.device)
    with torch.autocast(right.device.type, enabled=False):
        for image, text, scale in CONTRASTS:
            factor = mine[scale].float().clamp(max=LARGEST_SCALE)
            images, texts = mine[image].float(), mine[text].float()
            total = (
                total
                + (
                    _cross_entropy(factor * images @ everyone[text].float().T, share)
                    + _cross_entropy(factor * texts @ everyone[image].float().T, share)
                )
                / 2
            )
    return total if each else total.mean()


def _cross_entropy(logits: Tensor, share: Tensor) -> Tensor:
    """logits float[B, N], target shares float[B, N] whose rows sum to 1 -> float[B]."""
    return logits.logsumexp(dim=1) - (logits * share).sum(dim=1)


class _Gather(torch.autograd.Function):
    """Rows of all processes, in order of their ranks; gradients come back to whose rows they are, summed."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int], rank: int) -> Tensor:
        ctx.counts, ctx.rank = counts, rank
        # Collectives want rows alike in number: the last batch of an epoch may be shorter in some process.
        padded = rows.new_zeros((max(counts), *rows.shape[1:]))
        padded[: len(rows)] = rows
        found = [torch.empty_like(padded) for _ in counts]
        torch.distributed.all_gather(found, padded)
        return torch.cat([part[:count] for part, count in zip(found, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        gradient = gradients[0].contiguous()
        torch.distributed.all_reduce(gradient)
        start = sum(ctx.counts[: ctx.rank])
        return gradient[start : start + ctx.counts[ctx.rank]], None, None


def gather(rows: Tensor, counts: list[int], rank: int) -> Tensor:
    """The rows of all processes, in order of their ranks: any[B, …] -> any[N, …], with gradients.

    What a process makes of another's rows flows back into the other's gradients (as `--gather-with-grad` of open_clip).

    Args:
        rows: mine; of one dtype and width everywhere.
        counts: how many each process has.
        rank: which of them is this one.
    """
    if len(counts) == 1:
        return rows
    found: Tensor = _Gather.apply(rows, counts, rank)
    return found
