"""A run's network as it is exported: adapters added into the weights, the way from a square to probabilities in it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from eyetune.adapt.lora import merge
from eyetune.metrics.calibration import Calibration, LabelCalibration
from eyetune.metrics.heads import TINY, Head, midpoints

if TYPE_CHECKING:
    from eyetune.adapt.classifier import Classifier
    from eyetune.train.run import Run


def plain(run: Run) -> Classifier:
    """The run's classifier without adapters, in eval mode: a copy with them merged, or the run's own."""
    return merge(run.model).eval() if run.model.adapter is not None else run.model


class Served(nn.Module):
    """From squares to everything that is said of them, in operators that ONNX Runtime has.

    Args:
        run: the run.
        model: its classifier, as :func:`plain` gives it.
    """

    scale: Tensor
    offset: Tensor
    mean: Tensor
    whitening: Tensor
    divisors: Tensor

    def __init__(self, run: Run, model: Classifier) -> None:
        super().__init__()
        self.model = model
        preprocess = model.backbone.preprocess
        mean, std = (torch.tensor(values, dtype=torch.float64) for values in (preprocess.mean, preprocess.std))
        self.register_buffer("scale", (1 / (255 * std)).float()[:, None, None])
        self.register_buffer("offset", (-mean / std).float()[:, None, None])
        self.classes = run.classes
        self.task = run.answer.reading
        self.novelty = run.novelty is not None
        if run.novelty is not None:
            self.register_buffer("mean", run.novelty.mean.clone())
            self.register_buffer("whitening", run.novelty.whitening.clone())
        self.register_buffer("divisors", _temperatures(run))

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """uint8[N, P, P, 3] -> logits float32[N, outputs]; probabilities float32[N, K], calibrated, or the value
        float32[N]; and, where the run has the score, ood float32[N]."""
        features = self.model.backbone.features(image.permute(0, 3, 1, 2).float() * self.scale + self.offset)
        logits = self.model.head(features)
        said = [logits, self._told(logits)]
        if self.novelty:
            said.append(((features - self.mean) @ self.whitening).norm(dim=1))
        return tuple(said)

    def _told(self, logits: Tensor) -> Tensor:
        if self.task.kind == "regression":
            return self.task.mean + self.task.std * logits[:, 0]
        scaled = log_shares(self.task, logits, len(self.classes)) / self.divisors
        return torch.sigmoid(scaled) if self.task.kind == "multilabel" else torch.softmax(scaled, dim=1)


def _temperatures(run: Run) -> Tensor:
    """float32[K] or [1]: what calibration divides logits by."""
    fitted = run.calibration
    if isinstance(fitted, LabelCalibration):
        known = fitted.labels
        return torch.tensor([known[name].temperature.value if name in known else 1.0 for name in run.classes])
    return torch.tensor([fitted.temperature.value if isinstance(fitted, Calibration) else 1.0])


def log_shares(head: Head, raw: Tensor, count: int) -> Tensor:
    """As :meth:`eyetune.metrics.heads.Head.logits`, raw float32[N, outputs] -> float32[N, K], with what ONNX Runtime
    computes: no softplus, error function or running minimum in float64, and float32 where it loses nothing."""
    if head.head == "softmax":
        return raw
    zeros = raw[:, :1] * 0
    if head.head == "corn":
        yes = nn.functional.softplus(-raw).cumsum(dim=1)
        return -(torch.cat([zeros, yes], 1) + torch.cat([nn.functional.softplus(raw), zeros], 1))
    if head.head == "coral":
        questions = list(torch.sigmoid(raw.double()).split(1, dim=1))
        for place in range(1, len(questions)):
            questions[place] = torch.minimum(questions[place], questions[place - 1])
        above = torch.cat([zeros.double() + 1, *questions, zeros.double()], 1)
        shares = above[:, :-1] - above[:, 1:]
    else:
        cuts = torch.from_numpy(midpoints(count)) if head.cuts is None else torch.tensor(head.cuts, dtype=torch.float64)
        shares = _between((head.mean + head.std * raw.double() - cuts) / head.sigma)
    return shares.clamp_min(TINY).log().float()


def _between(distances: Tensor) -> Tensor:
    """float64[N, K - 1], falling, how far a number lies above each cut, in standard deviations -> float64[N, K]: the
    share of a normal distribution about it between each two cuts."""
    # Of two tails the smaller is computed: what is close to 1 would leave no digits for the difference.
    upper, lower = _tail(-distances), _tail(distances)
    first, last = lower[:, :1], upper[:, -1:]
    left, right = distances[:, :-1], distances[:, 1:]
    inner = torch.where(left + right > 0, lower[:, 1:] - lower[:, :-1], upper[:, :-1] - upper[:, 1:])
    return torch.cat([first, inner, last], 1)


def _tail(z: Tensor) -> Tensor:
    """The share of a standard normal distribution above z, to a relative 1.2e-7: the Chebyshev fit `erfcc` of Press et
    al., Numerical Recipes in C, 2nd edition, section 6.2."""
    x = z.abs() / math.sqrt(2)
    t = 1 / (1 + x / 2)
    total = torch.zeros_like(t) + _ERFCC[-1]
    for coefficient in reversed(_ERFCC[:-1]):
        total = coefficient + t * total
    half = t * torch.exp(-x * x + total) / 2
    return torch.where(z >= 0, half, 1 - half)


_ERFCC = (
    -1.26551223,
    1.00002368,
    0.37409196,
    0.09678418,
    -0.18628806,
    0.27886807,
    -1.13520398,
    1.48851587,
    -0.82215223,
    0.17087277,
)
