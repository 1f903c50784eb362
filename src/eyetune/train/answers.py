"""What is asked of a head, and how its numbers are learnt and read: one class per kind of answer.

An answer turns the raw numbers a head gives into a loss against the truth, and into the table of predictions. What it
needs for that beyond the names of the classes (the scale of a number, thresholds tuned on validation) stands in the
model card under `task`, so that a trained model reads its own numbers the same way for good.

Where the classes have an order, K - 1 questions "is it above grade k?" say more than K scores:

* corn: each question is asked only of those above the grade before (Shi, Cao and Raschka, Pattern Analysis and
  Applications 26, 2023; arXiv:2111.08851). The loss is the negative log-likelihood of the grade.
* coral: one weighted sum of the features, and a bias a question (Cao, Mirjalili and Raschka, Pattern Recognition
  Letters 140, 2020; arXiv:1901.07884).
* regression: the grade is learnt as a number. Thresholds tuned on validation for QWK say which grade is called; how
  likely each grade is, an ordered probit fitted there too (McCullagh, JRSS B 42, 1980).

corn and coral call the grade that has as many grades below as questions are answered with yes, P(y > k) > 0.5.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from eyetune.adapt.task import TaskConfig
from eyetune.errors import RunError
from eyetune.metrics.heads import TINY, Head, midpoints
from eyetune.metrics.scores import primary_metric
from eyetune.train.thresholds import ordered_probit, tune

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from eyetune.data.records import Manifest
    from eyetune.metrics.table import Table


class Rows(NamedTuple):
    """Which images a table is of: names, patients, eyes."""

    images: Sequence[str]
    patients: Sequence[str | None]
    eyes: Sequence[str | None]


@dataclass(frozen=True)
class Objective:
    """How the losses of single images are weighed.

    Args:
        smoothing: share of every label spread evenly over all classes.
        gamma: of focal loss; None for none.
        weights: of classes float[K], or of labels float[2, L], for not having and for having it; None for none.
    """

    smoothing: float = 0.0
    gamma: float | None = None
    weights: Tensor | None = None


@dataclass(frozen=True)
class Answer(ABC):
    """What a head is asked.

    Args:
        names: the classes in their order, the labels, or the one name of the number.
    """

    names: tuple[str, ...]

    kind: ClassVar[str]
    """The kind of task, as in `task.kind`."""
    head: ClassVar[str] = "softmax"
    """As in `task.head`."""
    shared: ClassVar[bool] = False
    """Whether all outputs of the head share their weights."""
    needs_validation: ClassVar[bool] = False
    """Whether something is fitted on validation without which nothing is called."""

    @property
    @abstractmethod
    def outputs(self) -> int:
        """How many numbers the head gives."""

    @property
    @abstractmethod
    def metric(self) -> str:
        """The metric that chooses the best epoch when the user names none."""

    @property
    def task(self) -> str:
        """What its tables are: "classification", "multilabel" or "regression"."""
        return "classification"

    @abstractmethod
    def losses(self, raw: Tensor, target: Tensor, objective: Objective) -> Tensor:
        """raw float[B, outputs], target as the loader gives it (or blended) -> float32[B]."""

    @property
    def reading(self) -> Head:
        """How its numbers are read, by whoever has them and no PyTorch."""
        return Head.model_validate(self.card())

    def table(self, raw: Tensor, targets: NDArray[Any], rows: Rows) -> Table:
        """What was said of N images: raw float[N, outputs], targets as :meth:`Manifest.targets` has them."""
        return self.reading.tell(raw.numpy(), self.names, targets=targets, **rows._asdict())

    @abstractmethod
    def evidence(self, raw: Tensor) -> Tensor:
        """raw float[B, outputs] -> float[B, ·] that rises with what each class, label, or the number is believed to
        be; differentiable."""

    @abstractmethod
    def right(self, raw: Tensor, target: Tensor) -> float:
        """Share of images (of labels: of known cells) that raw float[N, outputs] answers right; of a number, of those
        it is nearer to than half a standard deviation of the training images."""

    def learnt_from(self, train: Manifest) -> Answer:
        """With what the training images say of its scale."""
        return self

    def fitted(self, raw: Tensor, target: Tensor) -> Answer:
        """With what is fitted on validation: raw float[N, outputs], target as the loader gives it, all known."""
        return self

    def weights(self, train: Manifest) -> Tensor:
        """For balance "weighted": inverse to how often a class is, 1 on average over the training images."""
        return torch.tensor(train.class_weights(), dtype=torch.float32)

    def blended(self, shares: Tensor, target: Tensor) -> Tensor:
        """The targets of blended images: shares float[B, B] of each image in each, rows sum to 1; NaN where a part is
        not known."""
        known = ~target.isnan()
        mixed = torch.tensordot(shares, target.nan_to_num(), dims=1)
        unknown = torch.tensordot(shares, (~known).float(), dims=1) > 0
        return mixed.masked_fill(unknown, math.nan)

    def card(self) -> dict[str, Any]:
        """What the model card says of it, for :func:`read_answer`."""
        return {"kind": self.kind, "head": self.head}


# -- one class an image ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Classes(Answer):
    """One of K classes, by cross-entropy over K scores.

    Args:
        ordered: the order of the classes means something; None: as their names say.
    """

    ordered: bool | None = None

    kind: ClassVar[str] = "classification"

    @property
    def outputs(self) -> int:
        """K."""
        return len(self.names)

    @property
    def metric(self) -> str:
        """qwk for ordered classes, else as their names say."""
        return "qwk" if self.ordered else primary_metric(self.names)

    def losses(self, raw: Tensor, target: Tensor, objective: Objective) -> Tensor:
        """target int64[B] or soft float[B, K].

        Cross-entropy with label smoothing and class weights; or focal loss (Lin et al., 2017), for soft targets
        sum over classes of target * (1 - p)^gamma * -log p.
        """
        logits = raw.float()
        if objective.gamma is not None:
            log_p = logits.log_softmax(dim=-1)
            shares = _soft(target, len(self.names), objective.smoothing)
            return -(shares * (1.0 - log_p.exp()).clamp_min(0.0).pow(objective.gamma) * log_p).sum(dim=-1)
        weights = None if objective.weights is None else objective.weights.to(logits.device)
        smoothing = objective.smoothing
        return F.cross_entropy(logits, target, weight=weights, label_smoothing=smoothing, reduction="none")

    def calls(self, raw: Tensor) -> NDArray[np.int64] | None:
        """int64[N]: the class called; None: the most probable one."""
        return self.reading.calls(raw.double().numpy(), len(self.names))

    def right(self, raw: Tensor, target: Tensor) -> float:
        """Share of images whose class is called right."""
        calls = self.calls(raw)
        called = raw.argmax(dim=1).numpy() if calls is None else calls
        return float((called == target.numpy()).mean())

    def evidence(self, raw: Tensor) -> Tensor:
        """float[B, K]: the logits."""
        return raw

    def card(self) -> dict[str, Any]:
        """The kind says whether the classes are ordered."""
        return super().card() | {"kind": "ordinal" if self.ordered else self.kind}


@dataclass(frozen=True)
class Grades(Classes):
    """One of K ordered classes, by a head that knows their order."""

    ordered: bool | None = True

    kind: ClassVar[str] = "ordinal"

    @property
    def outputs(self) -> int:
        """A question between each two neighbours."""
        return len(self.names) - 1

    @abstractmethod
    def by_class(self, raw: Tensor) -> Tensor:
        """raw float[B, outputs] -> float32[B, K]: the loss if that class were the true one."""

    @abstractmethod
    def above(self, raw: Tensor) -> Tensor:
        """raw float64[B, outputs] -> float64[B, K - 1]: P(y > k), falling with k."""

    def losses(self, raw: Tensor, target: Tensor, objective: Objective) -> Tensor:
        """target int64[B] or soft float[B, K]: the expected loss under it, weighted by class."""
        shares = _soft(target, len(self.names), objective.smoothing)
        if objective.weights is not None:
            shares = shares * objective.weights.to(shares.device)
        return (shares * self.by_class(raw.float())).sum(dim=-1)

    def evidence(self, raw: Tensor) -> Tensor:
        """float64[B, K]: the logarithms of the probabilities of the classes, from those of being above each."""
        above = self.above(_double(raw))
        ones, zeros = above.new_ones(len(above), 1), above.new_zeros(len(above), 1)
        return (torch.cat([ones, above], 1) - torch.cat([above, zeros], 1)).clamp_min(TINY).log()


@dataclass(frozen=True)
class Corn(Grades):
    """Is it above grade k, given that it is above grade k - 1?"""

    head: ClassVar[str] = "corn"

    def by_class(self, raw: Tensor) -> Tensor:
        """The negative log-likelihood: yes to every question below the class, no to its own."""
        return _chain(raw)

    def above(self, raw: Tensor) -> Tensor:
        """The product of the answers so far."""
        return F.logsigmoid(raw).cumsum(dim=1).exp()

    def evidence(self, raw: Tensor) -> Tensor:
        """float64[B, K]: the log-likelihoods, exactly."""
        return -_chain(_double(raw))


@dataclass(frozen=True)
class Coral(Grades):
    """Is it above grade k? Every question looks at the same weighted sum of the features."""

    head: ClassVar[str] = "coral"
    shared: ClassVar[bool] = True

    def by_class(self, raw: Tensor) -> Tensor:
        """The sum of the binary cross-entropies of all questions."""
        zeros = raw.new_zeros(len(raw), 1)
        yes, no = F.softplus(-raw), F.softplus(raw)
        above = no.flip(1).cumsum(dim=1).flip(1)
        return torch.cat([zeros, yes.cumsum(dim=1)], 1) + torch.cat([above, zeros], 1)

    def above(self, raw: Tensor) -> Tensor:
        """A question's probability, or that of one before it where that is lower: the biases fall at the optimum
        (the paper's theorem 1), on the way there they need not."""
        return torch.sigmoid(raw).cummin(dim=1).values


@dataclass(frozen=True)
class Ranked(Grades):
    """The grade as a number, and thresholds between the grades.

    Args:
        mean, std: of the training grades.
        thresholds: K - 1, not falling: which grade is called; None: half-way between the grades.
        cuts: K - 1, rising: how likely each grade is; None: half-way between the grades.
        sigma: spread of the number about the true grade's place.
    """

    mean: float = 0.0
    std: float = 1.0
    thresholds: tuple[float, ...] | None = None
    cuts: tuple[float, ...] | None = None
    sigma: float = 0.5

    head: ClassVar[str] = "regression"
    needs_validation: ClassVar[bool] = True

    @property
    def outputs(self) -> int:
        """One number."""
        return 1

    def by_class(self, raw: Tensor) -> Tensor:
        """The squared error, in standard deviations of the training grades."""
        grades = torch.arange(len(self.names), dtype=raw.dtype, device=raw.device)
        return (raw - (grades - self.mean) / self.std) ** 2

    def above(self, raw: Tensor) -> Tensor:
        """The share of a normal distribution about the number that lies above each cut."""
        cuts = midpoints(len(self.names)) if self.cuts is None else np.array(self.cuts)
        distance = self.number(raw) - torch.from_numpy(cuts).to(raw)
        return torch.special.ndtr(distance / self.sigma)

    def number(self, raw: Tensor) -> Tensor:
        """raw float[B, 1] -> the same in grades."""
        return self.mean + self.std * raw

    def learnt_from(self, train: Manifest) -> Ranked:
        """With the mean and the spread of the training grades."""
        grades = train.targets()
        grades = grades[grades >= 0]
        return replace(self, mean=float(grades.mean()), std=float(grades.std()) or 1.0)

    def fitted(self, raw: Tensor, target: Tensor) -> Ranked:
        """With the thresholds of the best QWK on these images, and the cuts that make their grades most likely."""
        numbers, grades = self.number(raw[:, 0].double()).numpy(), target.numpy()
        thresholds = tune(numbers, grades, len(self.names))
        cuts, sigma = ordered_probit(numbers, grades, len(self.names))
        return replace(self, thresholds=tuple(thresholds.tolist()), cuts=tuple(cuts.tolist()), sigma=sigma)

    def card(self) -> dict[str, Any]:
        """The scale, the thresholds, the cuts and the spread."""
        places = {"thresholds": self.thresholds, "cuts": self.cuts}
        fitted = {name: None if of is None else list(of) for name, of in places.items()}
        return super().card() | {"mean": self.mean, "std": self.std, **fitted, "sigma": self.sigma}


# -- several labels, a number ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Labels(Answer):
    """Which of L labels an image has, each by a binary cross-entropy of its own; what is not known counts nowhere."""

    kind: ClassVar[str] = "multilabel"

    @property
    def outputs(self) -> int:
        """L."""
        return len(self.names)

    @property
    def metric(self) -> str:
        """The mean over labels of the area under the ROC curve."""
        return "auroc_macro"

    @property
    def task(self) -> str:
        """Several labels."""
        return "multilabel"

    def losses(self, raw: Tensor, target: Tensor, objective: Objective) -> Tensor:
        """target float[B, L] in 0..1, NaN where not known: the sum over known labels, divided by L."""
        logits, known = raw.float(), ~target.isnan()
        truth = target.nan_to_num().to(logits.dtype)
        smooth = truth * (1 - objective.smoothing) + objective.smoothing / 2
        yes, no = F.softplus(-logits), F.softplus(logits)
        if objective.gamma is not None:
            yes, no = yes * torch.sigmoid(-logits).pow(objective.gamma), no * torch.sigmoid(logits).pow(objective.gamma)
        if objective.weights is not None:
            lacking, having = objective.weights.to(logits.device)
            yes, no = yes * having, no * lacking
        return ((smooth * yes + (1 - smooth) * no) * known).sum(dim=-1) / len(self.names)

    def weights(self, train: Manifest) -> Tensor:
        """float[2, L]: n / 2 n_without and n / 2 n_with, over the images where the label is known."""
        targets = train.targets()
        having, lacking = (targets == 1).sum(axis=0), (targets == 0).sum(axis=0)
        both = having + lacking
        return torch.tensor(np.stack([both / (2 * lacking), both / (2 * having)]), dtype=torch.float32)

    def evidence(self, raw: Tensor) -> Tensor:
        """float[B, L]: the logits."""
        return raw

    def right(self, raw: Tensor, target: Tensor) -> float:
        """Share of the known cells."""
        return float(((raw > 0) == (target == 1))[~target.isnan()].float().mean())


@dataclass(frozen=True)
class Number(Answer):
    """A number, by squared error in standard deviations of the training images; said in the units of the table.

    Args:
        mean, std: of the training images.
    """

    mean: float = 0.0
    std: float = 1.0

    kind: ClassVar[str] = "regression"

    @property
    def outputs(self) -> int:
        """One."""
        return 1

    @property
    def metric(self) -> str:
        """The mean absolute error."""
        return "mae"

    @property
    def task(self) -> str:
        """A number."""
        return "regression"

    def losses(self, raw: Tensor, target: Tensor, objective: Objective) -> Tensor:
        """target float[B], known."""
        return (raw[:, 0].float() - (target - self.mean) / self.std) ** 2

    def weights(self, train: Manifest) -> Tensor:
        """There are no classes to weigh."""
        raise ValueError("a number has no classes to weigh")

    def evidence(self, raw: Tensor) -> Tensor:
        """float[B, 1]: the number itself."""
        return self.mean + self.std * raw

    def right(self, raw: Tensor, target: Tensor) -> float:
        """Share that is off by less than half a standard deviation."""
        return float((((target - self.mean) / self.std - raw[:, 0]).abs() < 0.5).float().mean())

    def learnt_from(self, train: Manifest) -> Number:
        """With the mean and the spread of the training images."""
        numbers = train.targets()
        numbers = numbers[~np.isnan(numbers)]
        return replace(self, mean=float(numbers.mean()), std=float(numbers.std()) or 1.0)

    def card(self) -> dict[str, Any]:
        """The scale."""
        return super().card() | {"mean": self.mean, "std": self.std}


# -- which one ---------------------------------------------------------------------------------------------------------

HEADS: Mapping[str, type[Grades]] = {one.head: one for one in (Corn, Coral, Ranked)}
"""The heads that know the order of the classes, by `task.head`."""


def answer_to(asked: TaskConfig, names: Sequence[str]) -> Answer:
    """What a task asks of a head.

    Args:
        asked: the task, its kind settled (`Config.asked`).
        names: the manifest's classes: classes, labels, or the name of the number.
    """
    names = tuple(names)
    if asked.kind == "multilabel":
        return Labels(names)
    if asked.kind == "regression":
        return Number(names)
    if asked.head in HEADS:
        return HEADS[asked.head](names)
    return Classes(names, ordered=True if asked.kind == "ordinal" else None)


def read_answer(card: Mapping[str, Any], names: Sequence[str]) -> Answer:
    """The answer of a trained model, from the `task` of its card; an empty one is of a plain classification.

    Raises RunError when the card is damaged, or of a newer EyeTune.
    """
    content = {"kind": "classification", "head": "softmax"} | dict(card)
    try:
        asked = TaskConfig(kind=content.pop("kind"), head=content.pop("head"))
        found = answer_to(asked.settled(several_labels=False), names)
        for name in {"thresholds", "cuts"} & {name for name, of in content.items() if of is not None}:
            content[name] = tuple(float(cut) for cut in content[name])
        return replace(found, **content)
    except (TypeError, ValueError) as error:
        raise RunError(f"what the run says of its task cannot be read ({error}).") from error


def _soft(target: Tensor, classes: int, smoothing: float) -> Tensor:
    """float[B, K]: the target as shares of the classes, some of each spread evenly over all."""
    shares = target if target.is_floating_point() else F.one_hot(target, classes).float()
    return shares * (1.0 - smoothing) + smoothing / classes


def _chain(raw: Tensor) -> Tensor:
    """float[B, K - 1] -> float[B, K]: -log of yes to every question below a class, and no to its own."""
    zeros = raw.new_zeros(len(raw), 1)
    yes = torch.cat([zeros, F.softplus(-raw).cumsum(dim=1)], 1)
    return yes + torch.cat([F.softplus(raw), zeros], 1)


def _double(raw: Tensor) -> Tensor:
    """In float64 where the device has it (Apple's has not)."""
    return raw.float() if raw.device.type == "mps" else raw.double()
