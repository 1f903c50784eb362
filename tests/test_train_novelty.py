"""The out-of-distribution score against the formula written out, and what is made of it on a dataset."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from sklearn.covariance import LedoitWolf
from sklearn.metrics import roc_auc_score

from eyetune.errors import DataError
from eyetune.metrics.predictions import Predictions
from eyetune.metrics.strangeness import Strangeness, choose_threshold, strangeness_scores
from eyetune.train.novelty import MOST_IMAGES, Novelty, sample_places


def features(n: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(0).normal(size=(6, 6))
    return torch.from_numpy(rng.normal(size=(n, 6)) @ mixing + shift).float()


def table(scores: np.ndarray | None, patients: list[str | None] | None = None, n: int = 0) -> Predictions:
    n = n if scores is None else len(scores)
    none: list[str | None] = [None] * n
    return Predictions(
        [str(i) for i in range(n)], patients or none, none, np.full(n, -1), np.zeros((n, 2)), ("a", "b"), ood=scores
    )


def test_the_score_is_the_shrunk_mahalanobis_distance() -> None:
    known, new = features(40, 1), features(10, 2, shift=1.0)
    found = Novelty.fit(known)
    assert found is not None
    cloud = LedoitWolf().fit(known.double().numpy())
    by_hand = np.sqrt(cloud.mahalanobis(new.double().numpy()) / 6)
    assert found.score(new).numpy() == pytest.approx(by_hand, rel=1e-3)
    assert found.score(known).mean() < found.score(new).mean()
    again = Novelty.of_tensors(found.tensors(), 6, found.images, "x")
    assert torch.equal(again.score(new), found.score(new))


def test_more_features_than_images_and_a_dead_one() -> None:
    given = torch.cat([features(12, 1).repeat(1, 5), torch.zeros(12, 1)], dim=1)
    found = Novelty.fit(given)
    assert found is not None
    assert bool(found.score(given).isfinite().all())


def test_too_little_gives_no_score() -> None:
    assert Novelty.fit(features(9, 0)) is None
    assert Novelty.fit(torch.ones(20, 3)) is None
    assert Novelty.fit(features(20, 0) * math.nan) is None


def test_other_tensors_are_refused() -> None:
    found = Novelty.fit(features(20, 0))
    assert found is not None
    with pytest.raises(ValueError, match="7 features"):
        Novelty.of_tensors(found.tensors(), 7, 20, "")
    with pytest.raises(ValueError, match="not finite"):
        Novelty.of_tensors(found.tensors() | {"mean": torch.full((6,), math.inf)}, 6, 20, "")


def test_the_sample_of_training_images_is_bounded_and_repeats() -> None:
    assert sample_places(5, 0) == [0, 1, 2, 3, 4]
    many = sample_places(3000, 1)
    assert len(many) == len(set(many)) == MOST_IMAGES
    assert many == sorted(many) == sample_places(3000, 1)
    assert many != sample_places(3000, 2)


def test_the_threshold_leaves_five_percent_of_patients_above() -> None:
    scores = np.random.default_rng(0).permutation(np.arange(1.0, 101.0))
    assert choose_threshold(table(scores)) == 96.0  # 96 of 101 are 95%
    assert choose_threshold(table(scores[:10])) == scores[:10].max()
    assert choose_threshold(table(None, n=3)) is None


def test_a_dataset_is_held_against_validation() -> None:
    rng = np.random.default_rng(1)
    val, other = rng.normal(1, 0.1, 80), rng.normal(1.15, 0.1, 60)
    rule = Strangeness(score="mahalanobis", threshold=1.1, chosen_on="val", fitted_on=100, tensors="x")
    found = strangeness_scores(rule, table(other), table(val), resamples=200)
    json.dumps(found, allow_nan=False)
    assert found["share_above"] == (other > 1.1).mean()
    expected = roc_auc_score(np.repeat([0, 1], [80, 60]), np.concatenate([val, other]))
    assert found["auroc_against_val"]["value"] == pytest.approx(expected)
    low, high = found["auroc_against_val"]["ci"]
    assert low < expected < high
    assert found["quantiles"][2] == {"share": 0.5, "score": pytest.approx(np.median(other))}
    assert "auroc_against_val" not in strangeness_scores(rule, table(other), None)
    assert strangeness_scores(rule, table(None, n=3), table(val)) == {}


def test_scores_are_kept_in_the_table(tmp_path: object) -> None:
    from pathlib import Path

    path = Path(str(tmp_path)) / "p.csv"
    before = table(np.array([0.1, 1 / 3, 7.0]))
    before.take([2, 0]).to_csv(path)
    after = Predictions.from_csv(path)
    assert after.ood is not None
    assert after.ood.tolist() == [7.0, 0.1]
    assert after.calibrated(2.0).ood is not None
    with pytest.raises(DataError, match="one number an image"):
        table(np.zeros((2, 2)))
    path.write_text("image,target,logit_a,logit_b,ood\nx,a,0,1,far\n")
    with pytest.raises(DataError, match="row 2: an ood score"):
        Predictions.from_csv(path)
