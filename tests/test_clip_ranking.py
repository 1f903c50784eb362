"""Retrieval in blocks against the full matrix, item by item; measures against their definitions."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eyetune.clip import ranking
from eyetune.clip.ranking import Answers, Ranks, rank, top
from eyetune.clip.scoring import image_labels, measured, measures, retrieval
from eyetune.errors import DataError


def slow(images: torch.Tensor, texts: torch.Tensor, links: Any, patients: Any, words: Any) -> Any:
    """(above, wrong tied, right tied, answers) of every query with an answer, from the whole matrix in float64."""
    first = {word: place for place, word in reversed(list(enumerate(words)))}
    similarity = images.double() @ texts[[first[word] for word in words]].double().T
    linked = {(patients[row], words[text]) for row, text in links}
    right = np.array([[(patient, word) in linked for word in words] for patient in patients])
    found = []
    for values, correct in ((similarity.numpy(), right), (similarity.numpy().T, right.T)):
        rows = []
        for value, ok in zip(values, correct, strict=True):
            if ok.any():
                best = value[ok].max()
                tied = np.abs(value - best) < 1e-9
                rows.append(((value > best + 1e-9).sum(), (tied & ~ok).sum(), (tied & ok).sum(), ok.sum()))
        found.append(rows)
    return found


def seen(ranks: Ranks) -> list[tuple[int, ...]]:
    return list(zip(*(one.tolist() for one in (ranks.above, ranks.wrong, ranks.right, ranks.answers)), strict=True))


@st.composite
def cases(draw: Any) -> Any:
    rows, texts, width = draw(st.integers(1, 9)), draw(st.integers(1, 12)), draw(st.integers(1, 4))
    # Small whole numbers tie often and exactly; thirds are not exact in float32 and come close.
    numbers = st.sampled_from([-1.0, 0.0, 1.0, 1 / 3, 2 / 3, 1 / 3 + 2**-25])
    image = draw(st.lists(numbers, min_size=rows * width, max_size=rows * width))
    text = draw(st.lists(numbers, min_size=texts * width, max_size=texts * width))
    patients = [f"p{draw(st.integers(0, rows))}" for _ in range(rows)]
    words = [f"w{draw(st.integers(0, 5))}" for _ in range(texts)]
    pair = st.tuples(st.integers(0, rows - 1), st.integers(0, texts - 1))
    links = draw(st.lists(pair, min_size=1, max_size=15))
    return torch.tensor(image).view(rows, width), torch.tensor(text).view(texts, width), links, patients, words


@settings(max_examples=40, deadline=None)
@given(cases(), st.integers(1, 5), st.integers(1, 5))
def test_blocks_give_what_the_full_matrix_gives(case: Any, rows: int, columns: int) -> None:
    images, texts, links, patients, words = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "ROWS", rows)
        patch.setattr(ranking, "COLUMNS", columns)
        found = rank(images, texts, Answers.of(links, patients, words))
    assert [seen(found.images), seen(found.texts)] == slow(images, texts, links, patients, words)


@pytest.mark.parametrize("spread", [1.0, 1e-6], ids=["usual", "all but alike"])
def test_what_rounding_could_turn_is_computed_again(spread: float) -> None:
    torch.manual_seed(0)
    middle = torch.nn.functional.normalize(torch.randn(1, 64), dim=1)
    images = torch.nn.functional.normalize(middle + spread * torch.randn(70, 64), dim=1)
    texts = torch.nn.functional.normalize(middle + spread * torch.randn(90, 64), dim=1)
    links = [(i, j) for i in range(70) for j in (i, (i * 7) % 90)]
    names, words = [str(i) for i in range(70)], [str(j) for j in range(90)]
    found = rank(images, texts, Answers.of(links, 70, 90))
    assert [seen(found.images), seen(found.texts)] == slow(images, texts, links, names, words)


@pytest.mark.parametrize(
    ("above", "wrong", "right"), [(0, 0, 1), (2, 3, 1), (0, 4, 2), (4, 2, 3), (1, 0, 2), (9, 1, 1)]
)
def test_ties_are_the_mean_over_their_orders(above: int, wrong: int, right: int) -> None:
    one = Ranks(*(np.array([n]) for n in (above, wrong, right, right)), gallery=20)
    # Which of the tied places are right ones: every choice is as likely.
    firsts = [above + 1 + min(places) for places in itertools.combinations(range(wrong + right), right)]
    assert one.expected()[0] == pytest.approx(np.mean(firsts))
    assert one.reciprocal()[0] == pytest.approx(np.mean([1 / first for first in firsts]))
    for k in (1, 2, 5, 10):
        assert one.recall(k)[0] == pytest.approx(np.mean([first <= k for first in firsts]))


def test_chance_is_what_a_blind_model_reaches() -> None:
    rng = np.random.default_rng(0)
    answers, size = rng.integers(1, 9, 40), 60
    zeros = np.zeros(40, dtype=np.int64)
    blind = Ranks(zeros, size - answers, answers, answers, size)
    found = measures(blind, [str(i) for i in range(40)], resamples=0)
    assert found["recall_at_5"]["value"] == pytest.approx(found["recall_at_5"]["chance"])
    assert found["recall_at_5"]["chance"] == pytest.approx(
        np.mean([1 - math.comb(size - r, 5) / math.comb(size, 5) for r in answers])
    )
    drawn = [min(rng.permutation(size)[:r]) + 1 for _ in range(1000) for r in answers]
    assert found["mrr"]["chance"] == pytest.approx(np.mean(1 / np.array(drawn)), abs=0.005)
    assert abs(found["median_rank"]["chance"] - np.median(drawn)) <= 1


def test_median_rank_and_weights_by_hand() -> None:
    ranks = Ranks(np.array([0, 4, 9, 2]), *(np.array([n] * 4) for n in (0, 1, 1)), gallery=20)
    found = measures(ranks, ["a", "b", "c", "d"], resamples=0)
    assert found["median_rank"]["value"] == 3
    assert found["recall_at_5"]["value"] == 0.75
    assert found["mrr"]["value"] == pytest.approx((1 + 1 / 5 + 1 / 10 + 1 / 3) / 4)
    assert found["recall_at_1"]["ci"] == [None, None]
    assert "recall_at_10" in found
    assert "recall_at_50" not in measures(ranks, list("abcd"), cutoffs=(1, 50), resamples=0)


def test_intervals_draw_patients_not_rows() -> None:
    rng = np.random.default_rng(1)
    good = np.repeat(rng.random(30) < 0.5, 8)
    zeros, ones = np.zeros(240, dtype=np.int64), np.ones(240, dtype=np.int64)
    ranks = Ranks(np.where(good, 0, 50), zeros, ones, ones, 100)
    by_patient = measures(ranks, [str(i // 8) for i in range(240)], resamples=300)["recall_at_1"]["ci"]
    by_row = measures(ranks, [str(i) for i in range(240)], resamples=300)["recall_at_1"]["ci"]
    assert by_patient[1] - by_patient[0] > 2 * (by_row[1] - by_row[0])
    perfect = measures(ranks.take(good), [str(i // 8) for i in np.flatnonzero(good)], resamples=300)
    assert perfect["recall_at_1"]["value"] == 1
    assert perfect["recall_at_1"]["ci"][0] < 0.95, "all of some fifteen patients is no proof of all"
    few = measures(ranks.take(np.arange(40)), [str(i // 10) for i in range(40)], resamples=50)
    assert few["mrr"]["ci"] == few["median_rank"]["ci"] == [None, None], "four patients are too few to resample"
    assert few["recall_at_1"]["ci"][1] - few["recall_at_1"]["ci"][0] > 0.4


def test_a_class_is_searched_for_in_the_whole_gallery() -> None:
    images, texts = torch.eye(4), torch.eye(4)[[1, 0, 2, 3]]
    links = [(i, i) for i in range(4)]
    found = retrieval(images, texts, links, labels=["a", "b", "b", None], resamples=20)
    side = found["image_to_text"]
    assert side["gallery"] == 4
    assert {name: one["metrics"]["recall_at_1"]["value"] for name, one in side["per_class"].items()} == {
        "a": 0.0,
        "b": 0.5,
    }
    # In a gallery of its own class alone the one text of "a" would have been found.
    assert side["per_class"]["a"]["metrics"]["recall_at_1"]["chance"] == 0.25
    assert side["metrics"]["recall_at_1"]["value"] == 0.5
    assert found["text_to_image"]["per_class"]["b"]["queries"] == 2


def test_same_words_and_same_patient_are_right() -> None:
    # Rows 0 and 3 are one patient; texts 0 and 2 have the same words; text 3 belongs to nobody.
    answers = Answers.of([(0, 0), (1, 1), (2, 2), (2, 2)], ["a", "b", "c", "a"], ["x", "y", "x", "z"])
    found = rank(torch.eye(4), torch.eye(4), answers)
    assert found.image_rows.tolist() == [0, 1, 2, 3]
    assert found.images.answers.tolist() == [2, 1, 2, 2]
    assert found.text_rows.tolist() == [0, 1, 2]
    assert found.texts.answers.tolist() == [3, 1, 3]
    assert image_labels(answers, ["x", "y", "x", "z"]) == ["x", "y", "x", "x"]
    assert measured(found, answers, resamples=0)["text_to_image"]["without_answer"] == 1


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(DataError, match="photographs 2 go with text 0; there are 2 and 1"):
        Answers.of([(2, 0)], 2, 1)
    answers = Answers.of([(0, 0)], 2, 1)
    with pytest.raises(DataError, match=r"photographs are \[2, 3\], of texts \[1, 4\]"):
        rank(torch.zeros(2, 3), torch.zeros(1, 4), answers)
    with pytest.raises(DataError, match="3 and 1 features came for 2"):
        rank(torch.zeros(3, 3), torch.zeros(1, 3), answers)
    with pytest.raises(DataError, match="NaN"):
        rank(torch.full((2, 3), math.nan), torch.zeros(1, 3), answers)


def test_top_is_the_sorted_matrix() -> None:
    torch.manual_seed(1)
    queries, gallery = torch.randn(3, 5), torch.randn(7, 5)[[0, 1, 2, 3, 4, 5, 0]]
    values, places = top(queries, gallery, 4)
    whole = queries.double() @ gallery.double().T
    for row in range(3):
        order = sorted(range(7), key=lambda place: (-float(whole[row, place]), place))[:4]
        assert places[row].tolist() == order
        assert values[row].tolist() == pytest.approx(whole[row, order].tolist())
