"""What each head learns and says, against slow obvious references."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from eyetune.adapt.task import TaskConfig
from eyetune.data.record import Record
from eyetune.data.records import Manifest
from eyetune.errors import RunError
from eyetune.metrics.predictions import LabelPredictions, Predictions, ValuePredictions
from eyetune.train.answers import (
    Answer,
    Classes,
    Coral,
    Corn,
    Grades,
    Labels,
    Number,
    Objective,
    Ranked,
    Rows,
    answer_to,
    read_answer,
)

GRADES = ("none", "mild", "moderate", "severe", "worst")
K = len(GRADES)
RANKED = Ranked(GRADES, mean=1.7, std=1.3, thresholds=(0.4, 1.1, 2.6, 3.3), cuts=(0.5, 1.4, 2.5, 3.6), sigma=0.6)
HEADS: tuple[Grades, ...] = (Corn(GRADES), Coral(GRADES), RANKED)
ANSWERS: tuple[Answer, ...] = (*HEADS, Classes(GRADES), Labels(("a", "b", "c")), Number(("age",), mean=60.0, std=9.0))

every_head = pytest.mark.parametrize("head", HEADS, ids=lambda one: one.head)
every_answer = pytest.mark.parametrize("answer", ANSWERS, ids=lambda one: f"{one.kind}-{one.head}")


def numbers(rows: int, columns: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def rows(count: int) -> Rows:
    return Rows([str(n) for n in range(count)], [None] * count, [None] * count)


def manifest(truths: list[Any], kind: str, names: tuple[str, ...]) -> Manifest:
    records = [
        Record(Path(f"{n}.jpg"), one if kind == "classes" else None, f"{n}", f"row {n}",
               values=() if kind == "classes" else one)
        for n, one in enumerate(truths)
    ]  # fmt: skip
    return Manifest(tuple(records), names, "t.csv", kind=kind)  # type: ignore[arg-type]


# --- the losses of ordered classes ------------------------------------------------------------------------------------


def corn_reference(raw: Tensor, grades: list[int]) -> Tensor:
    """Shi, Cao and Raschka (2023), equation 4: task k is trained on the images above grade k - 1 alone, on whether they
    are above k. The sum over all tasks and images, not yet divided."""
    total = torch.zeros((), dtype=raw.dtype)
    for k in range(K - 1):
        for row, grade in enumerate(grades):
            if grade >= k:  # the conditional training subset S_k
                p = 1 / (1 + torch.exp(-raw[row, k]))
                total = total - (torch.log(p) if grade > k else torch.log(1 - p))
    return total


def coral_reference(raw: Tensor, grades: list[int]) -> Tensor:
    """Cao, Mirjalili and Raschka (2020), equation 4 with equal task weights, summed over the images."""
    total = torch.zeros((), dtype=raw.dtype)
    for row, grade in enumerate(grades):
        for k in range(K - 1):
            p = 1 / (1 + torch.exp(-raw[row, k]))
            total = total - (torch.log(p) if grade > k else torch.log(1 - p))
    return total


def ranked_reference(raw: Tensor, grades: list[int]) -> Tensor:
    """Squared errors of standardised grades, summed over the images."""
    return sum(((raw[n, 0] - (g - 1.7) / 1.3) ** 2 for n, g in enumerate(grades)), torch.zeros((), dtype=raw.dtype))


REFERENCES = {"corn": corn_reference, "coral": coral_reference, "regression": ranked_reference}


@every_head
def test_loss_and_gradient_are_those_of_the_paper(head: Grades) -> None:
    grades = [0, 1, 2, 3, 4, 4, 0, 2, 2]
    raw = numbers(len(grades), head.outputs).requires_grad_()
    mine = head.losses(raw, torch.tensor(grades), Objective())
    theirs = REFERENCES[head.head](raw, grades)
    torch.testing.assert_close(mine.sum().double(), theirs, rtol=1e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad(mine.double().sum(), raw)
    (expected,) = torch.autograd.grad(theirs, raw)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


@every_head
def test_losses_of_very_sure_heads_are_finite(head: Grades) -> None:
    raw = (torch.tensor([[1e4], [-1e4]]) * torch.ones(2, head.outputs)).requires_grad_()
    losses = head.losses(raw, torch.tensor([0, 4]), Objective())
    losses.sum().backward()
    assert bool(losses.isfinite().all())
    assert bool(raw.grad.isfinite().all())


@every_head
def test_weights_smoothing_and_soft_targets_are_means_over_classes(head: Grades) -> None:
    raw = numbers(6, head.outputs, seed=1).float()
    of_class = torch.stack([head.losses(raw, torch.full((6,), k), Objective()) for k in range(K)], dim=1)
    soft = torch.softmax(numbers(6, K, seed=2), dim=1).float()
    torch.testing.assert_close(head.losses(raw, soft, Objective()), (soft * of_class).sum(dim=1))
    weights = torch.tensor([0.5, 1.0, 1.5, 2.0, 0.1])
    target = torch.tensor([0, 1, 2, 3, 4, 0])
    expected = weights[target] * of_class[torch.arange(6), target]
    torch.testing.assert_close(head.losses(raw, target, Objective(weights=weights)), expected)
    smoothed = 0.8 * of_class[torch.arange(6), target] + 0.2 * of_class.mean(dim=1)
    torch.testing.assert_close(head.losses(raw, target, Objective(smoothing=0.2)), smoothed)


def test_corn_learns_the_shares_of_the_grades() -> None:
    """Without features the best CORN can do is to say how frequent each grade is: conditions lose nothing."""
    grades = torch.tensor([0] * 5 + [1] * 1 + [2] * 8 + [3] * 2 + [4] * 4)
    free = torch.zeros(1, K - 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([free], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = Corn(GRADES).losses(free.expand(len(grades), -1), grades, Objective()).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    shares = Corn(GRADES).evidence(free.detach()).exp()[0]
    torch.testing.assert_close(shares.float(), torch.bincount(grades).float() / len(grades), atol=1e-3, rtol=0)


# --- what they say ----------------------------------------------------------------------------------------------------


def above_reference(head: Grades, raw: list[float]) -> list[float]:
    """P(y > k), one k after the other."""
    found: list[float] = []
    for k in range(K - 1):
        if isinstance(head, Ranked):
            assert head.cuts is not None
            distance = (head.mean + head.std * raw[0] - head.cuts[k]) / head.sigma
            found.append(0.5 * (1 + math.erf(distance / math.sqrt(2))))
            continue
        p = 1 / (1 + math.exp(-raw[k]))
        before = found[-1] if found else 1.0
        found.append(before * p if isinstance(head, Corn) else min(before, p))
    return found


@every_head
def test_probabilities_of_the_grades_add_up_and_follow_the_questions(head: Grades) -> None:
    raw = numbers(40, head.outputs, seed=3)
    table = head.table(raw, np.full(40, -1), rows(40))
    assert isinstance(table, Predictions)
    shares = np.exp(table.logits)
    np.testing.assert_allclose(shares.sum(axis=1), 1, atol=1e-9)
    np.testing.assert_allclose(table.probabilities, shares, atol=1e-9)
    for row in range(40):
        above = [1.0, *above_reference(head, raw[row].tolist()), 0.0]
        expected = [above[k] - above[k + 1] for k in range(K)]
        np.testing.assert_allclose(shares[row], expected, atol=1e-9)
    assert table.ordered is True


@pytest.mark.parametrize("head", HEADS[:2], ids=lambda one: one.head)
def test_corn_and_coral_call_the_grade_where_the_answer_becomes_no(head: Grades) -> None:
    raw = numbers(200, head.outputs, seed=4, scale=1.5)
    table = head.table(raw, np.full(200, -1), rows(200))
    expected = [sum(p > 0.5 for p in above_reference(head, one)) for one in raw.tolist()]
    assert table.predicted.tolist() == expected
    assert (table.predicted != table.probabilities.argmax(axis=1)).any(), "else calls would say nothing new"


def test_regression_calls_by_its_thresholds_not_by_its_cuts() -> None:
    raw = torch.tensor([[(value - 1.7) / 1.3] for value in (-3.0, 0.39, 0.41, 1.2, 2.59, 2.61, 3.2, 9.0)])
    assert RANKED.calls(raw).tolist() == [0, 0, 1, 2, 2, 3, 3, 4]
    untuned = Ranked(GRADES, mean=1.7, std=1.3)
    assert untuned.calls(raw).tolist() == [0, 0, 0, 1, 3, 3, 3, 4]


def test_a_table_of_grades_comes_back_from_its_file_with_its_calls(tmp_path: Path) -> None:
    table = RANKED.table(numbers(30, 1), np.arange(30) % K, rows(30))
    table.to_csv(tmp_path / "t.csv")
    after = Predictions.from_csv(tmp_path / "t.csv")
    assert after.predicted.tolist() == table.predicted.tolist()
    np.testing.assert_array_equal(after.logits, table.logits)


@every_head
def test_more_evidence_for_a_grade_reaches_the_head(head: Grades) -> None:
    """Heat maps follow the gradient of a grade's evidence: it must not vanish where the head is not sure."""
    raw = numbers(5, head.outputs, scale=0.5).sort(dim=1, descending=True).values.requires_grad_()
    (gradient,) = torch.autograd.grad(head.evidence(raw)[:, 2].sum(), raw)
    assert bool((gradient.abs().sum(dim=1) > 1e-4).all())


# --- labels and numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [None, 2.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_of_labels_is_a_sum_over_what_is_known(gamma: float | None, weighted: bool) -> None:
    answer = Labels(("a", "b", "c"))
    raw = numbers(4, 3)
    nan = math.nan
    target = torch.tensor([[1, 0, 1], [0, nan, 1], [nan, nan, 0], [1, 1, nan]], dtype=torch.float64)
    weights = torch.tensor([[0.5, 1.0, 2.0], [1.5, 1.0, 0.7]]) if weighted else None
    mine = answer.losses(raw, target, Objective(smoothing=0.1, gamma=gamma, weights=weights))
    for row in range(4):
        expected = 0.0
        for k in range(3):
            truth = float(target[row, k])
            if math.isnan(truth):
                continue
            p = 1 / (1 + math.exp(-float(raw[row, k])))
            share = truth * 0.9 + 0.05
            yes, no = -math.log(p), -math.log(1 - p)
            if gamma is not None:
                yes, no = yes * (1 - p) ** gamma, no * p**gamma
            if weights is not None:
                yes, no = yes * float(weights[1, k]), no * float(weights[0, k])
            expected += (share * yes + (1 - share) * no) / 3
        assert float(mine[row]) == pytest.approx(expected, rel=1e-5)


def test_a_label_that_is_not_known_moves_nothing() -> None:
    raw = numbers(2, 3).requires_grad_()
    target = torch.tensor([[1.0, math.nan, 0.0], [math.nan, math.nan, 1.0]])
    Labels(("a", "b", "c")).losses(raw, target, Objective()).sum().backward()
    assert raw.grad is not None
    assert ((raw.grad == 0) == target.isnan()).all()


def test_weights_of_labels_make_having_and_lacking_equal() -> None:
    none, yes, no = (None,), (1.0,), (0.0,)
    weights = Labels(("a",)).weights(manifest([yes, no, no, no, none], "labels", ("a",)))
    assert weights.flatten().tolist() == pytest.approx([4 / 6, 4 / 2])


def test_labels_are_said_with_their_gaps() -> None:
    raw = numbers(3, 2)
    targets = np.array([[1, 0], [math.nan, 1], [math.nan, math.nan]])
    table = Labels(("a", "b")).table(raw, targets, rows(3))
    assert isinstance(table, LabelPredictions)
    assert table.targets.tolist() == [[1, 0], [-1, 1], [-1, -1]]
    np.testing.assert_array_equal(table.logits, raw.numpy())


def test_a_number_is_learnt_in_standard_deviations_and_said_in_its_own_units() -> None:
    found = answer_to(TaskConfig(kind="regression"), ["age"]).learnt_from(
        manifest([(40.0,), (60.0,), (None,), (80.0,)], "value", ("age",))
    )
    assert isinstance(found, Number)
    assert (found.mean, found.std) == (60.0, pytest.approx(np.std([40, 60, 80])))
    raw = torch.tensor([[0.0], [1.0], [-2.0]])
    table = found.table(raw, np.array([50.0, math.nan, 30.0]), rows(3))
    assert isinstance(table, ValuePredictions)
    np.testing.assert_allclose(table.predicted, 60 + found.std * raw[:, 0].numpy())
    target = torch.tensor([50.0, 60.0, 30.0])
    expected = ((torch.tensor(table.predicted).float() - target) / found.std) ** 2
    torch.testing.assert_close(found.losses(raw, target, Objective()), expected)


def test_numbers_that_are_all_alike_do_not_divide_by_zero() -> None:
    found = Number(("age",)).learnt_from(manifest([(5.0,), (5.0,)], "value", ("age",)))
    assert isinstance(found, Number)
    assert found.std == 1


@pytest.mark.parametrize("answer", [Labels(("a", "b")), Number(("x",))], ids=["labels", "number"])
def test_blended_images_have_blended_targets_and_none_where_a_part_is_not_known(answer: Answer) -> None:
    shares = torch.tensor([[0.7, 0.3, 0.0], [0.0, 1.0, 0.0], [0.0, 0.4, 0.6]])
    target = torch.tensor([1.0, 3.0, math.nan])
    if isinstance(answer, Labels):
        target = torch.stack([target, torch.tensor([0.0, 1.0, 1.0])], dim=1)
    mixed = answer.blended(shares, target)
    expected = torch.tensor([0.7 + 0.9, 3.0, math.nan])
    torch.testing.assert_close(mixed[:, 0] if mixed.ndim == 2 else mixed, expected, equal_nan=True)
    if mixed.ndim == 2:
        torch.testing.assert_close(mixed[:, 1], torch.tensor([0.3, 1.0, 1.0]))


# --- cards ------------------------------------------------------------------------------------------------------------


@every_answer
def test_an_answer_comes_back_from_its_card(answer: Answer) -> None:
    assert read_answer(json.loads(json.dumps(answer.card())), answer.names) == answer


def test_an_older_card_is_of_plain_classes() -> None:
    assert read_answer({}, ("no", "yes")) == Classes(("no", "yes"))


@pytest.mark.parametrize(
    "card",
    [
        {"kind": "telepathy"},
        {"kind": "ordinal", "head": "corn", "sigma": 1.0},
        {"kind": "ordinal", "head": "regression", "thresholds": ["a"]},
        {"kind": "ordinal", "head": "regression", "thresholds": 3},
    ],
)
def test_a_damaged_card_is_refused(card: dict[str, Any]) -> None:
    with pytest.raises(RunError, match="cannot be read"):
        read_answer(card, GRADES)


@every_answer
def test_what_is_right_counts(answer: Answer) -> None:
    raw = numbers(50, answer.outputs)
    if isinstance(answer, Classes):
        target = torch.arange(50) % K
        said = answer.table(raw, target.numpy(), rows(50)).predicted
        expected = float((said == target.numpy()).mean())
    elif isinstance(answer, Labels):
        target = (numbers(50, 3, seed=9) > 0).float()
        target[:10, 1] = math.nan
        known = ~target.isnan()
        expected = float(((raw > 0) == (target == 1))[known].double().mean())
    else:
        target = torch.linspace(40, 80, 50)
        expected = float(
            np.mean([abs(60 + 9 * r - t) < 4.5 for (r,), t in zip(raw.tolist(), target.tolist(), strict=True)])
        )
    assert answer.right(raw, target) == pytest.approx(expected)
    assert 0 < expected < 1
