"""The embedded backbone: small, whole, and worth more than an untrained one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from eyetune.backbones import load_backbone
from eyetune.backbones.nano import NANO, WEIGHTS


def test_file_is_small_and_loads_whole() -> None:
    assert WEIGHTS.stat().st_size <= 8_000_000
    backbone = load_backbone("nano")
    assert backbone.report is not None
    assert not backbone.report.unexplained
    assert not backbone.report.left_initial
    assert not backbone.report.dropped
    assert {name for _, name in backbone.report.loaded} == set(backbone.network.state_dict())


def test_parameters_are_few_and_as_the_spec_says() -> None:
    count = sum(p.numel() for p in load_backbone("nano", weights="random").network.parameters())
    assert count == NANO.parameters
    assert count <= 6_000_000


@pytest.mark.parametrize("pool", list(NANO.pools))
@pytest.mark.parametrize("pixels", [224, 320])
def test_features_are_finite_sane_and_tell_images_apart(pool: str, pixels: int) -> None:
    backbone = load_backbone("nano", pixels=pixels, pool=pool).eval()
    images = torch.randn(3, 3, pixels, pixels, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = backbone.features(images)
    assert features.shape == (3, NANO.pools[pool])
    assert torch.isfinite(features).all()
    assert 0.05 < features.std() < 20  # a head with the usual learning rates can use them as they are
    assert (features[0] - features[1]).abs().max() > 1e-3


def test_recipe_refuses_the_seeds_of_the_demo(tmp_path: Path) -> None:
    recipe = _recipe()
    with pytest.raises(SystemExit, match="demo"):
        recipe.cohort(tmp_path, 9_999, 2, 1)


def test_recipe_moves_targets_with_the_picture() -> None:
    """The disc drawn on an augmented map lies where the augmented facts say it does."""
    recipe = _recipe()
    image, maps, facts = recipe.photographed(30_000, 1, "R", "clinic", 320)
    images = torch.from_numpy(image).permute(2, 0, 1).float().div(255).expand(12, -1, -1, -1)
    shapes = torch.from_numpy(maps).float().div(255).expand(12, -1, -1, -1)
    known = torch.from_numpy(facts).expand(12, -1)
    _, moved, said = recipe.augment(images, shapes, known, torch.Generator().manual_seed(3))
    disc = list(recipe.AREAS).index("disc")
    for shape, fact in zip(moved, said, strict=True):
        found = recipe._centre((shape[disc] * 255).byte().numpy())
        assert found == pytest.approx(fact[:2].numpy(), abs=0.02)
    assert said[:, 0].std() > 0.1  # and it does move


def _recipe():  # type: ignore[no-untyped-def]  # a script, not a module of the package
    import importlib.util
    import sys

    path = Path(__file__).parents[1] / "recipes" / "pretrain_nano.py"
    spec = importlib.util.spec_from_file_location("pretrain_nano", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_probe_reads_grades_that_random_weights_do_not_show(tmp_path: Path) -> None:
    from eyetune.config import Config
    from eyetune.data.phantom import write_cohort
    from eyetune.verbs.evaluate import evaluate
    from eyetune.verbs.finetune import finetune

    write_cohort(tmp_path / "eyes", patients=320, seed=8_888, size=320, workers=2)
    qwk = {}
    for weights in (None, "random"):
        config = Config.parse(
            {
                "model": {"backbone": "nano", "weights": weights},
                "data": {"table": str(tmp_path / "eyes" / "labels.csv"), "label_column": "dr_grade", "test": 0.35},
                "adapt": {"kind": "linear"},
                "augment": "none",
                "train": {"epochs": 10, "lr": 3e-3},
                "workers": 0,
                "out": str(tmp_path / str(weights)),
            }
        )
        scores = evaluate(finetune(config), {})
        qwk[weights] = scores["datasets"]["test"]["metrics"]["qwk"]["value"]
    assert qwk[None] >= 0.75
    assert qwk["random"] <= qwk[None] - 0.25
