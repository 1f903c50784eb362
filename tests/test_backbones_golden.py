"""Full-size networks give the features that each family's own code gives, to 1e-4 absolute, from the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import regenerate
import torch
from regenerate import TOLERANCE, difference, golden, images

from eyetune.backbones import BACKBONES, load_backbone

Make = Callable[[], dict[str, Any]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """make -> the file it makes; one at a time, because they are large."""
    folder = tmp_path_factory.mktemp("golden")
    held: dict[str, Path] = {}

    def save(make: Make, name: str) -> Path:
        if name not in held:
            for path in held.values():
                path.unlink()
            held.clear()
            held[name] = folder / name
            torch.save(make(), held[name])
        return held[name]

    yield save
    for path in held.values():
        path.unlink()


def check(backbone_name: str, path: Path, figures: Any, *, seed: str = "image", **options: Any) -> None:
    backbone = load_backbone(backbone_name, path, **options)
    with torch.no_grad():
        features = backbone.features(images(backbone.preprocess.pixels, seed))
    assert difference(features, figures) <= TOLERANCE
    assert backbone.report is not None
    assert backbone.report.whole


def test_green(saved: Any) -> None:
    path = saved(regenerate.retfound_green, "retfoundgreen_statedict.pth")
    check("green", path, golden("retfound_green")["features_avg_392"])


@pytest.mark.slow
@pytest.mark.parametrize(("pool", "pixels"), [("cls", 224), ("avg", 224), ("cls", 384), ("avg", 384)])
def test_retfound(saved: Any, pool: str, pixels: int) -> None:
    path = saved(regenerate.retfound_mae, "RETFound_cfp_weights.pth")
    check("retfound", path, golden("retfound_mae")[f"features_{pool}_{pixels}"], pool=pool, pixels=pixels)


@pytest.mark.slow
def test_retfound_dinov2(saved: Any) -> None:
    path = saved(regenerate.retfound_dinov2, "RETFound_dinov2_meh.pth")
    check("retfound-dinov2", path, golden("retfound_dinov2")["features_cls_224"])


@pytest.mark.slow
@pytest.mark.parametrize("module", [False, True])
@pytest.mark.parametrize(("pool", "figures"), [("cls", "features_cls_224"), ("last4", "features_last4_cls_224")])
def test_visionfm(saved: Any, module: bool, pool: str, figures: str) -> None:
    path = saved(lambda: regenerate.visionfm(module=module), f"VFM_Fundus_weights{module}.pth")
    check("visionfm", path, golden("visionfm")[figures], pool=pool)


@pytest.mark.slow
@pytest.mark.parametrize("make", [regenerate.retclip, regenerate.retclip_trainer])
def test_the_image_tower_of_retclip(saved: Any, make: Make) -> None:
    path = saved(make, f"{make.__name__}.pt")
    figures = golden("retclip")["RoBERTa-wwm-ext-base-chinese"]["single_eye_backbone"]
    check("ret-clip", path, figures, seed="leftimage")


def test_published_parameter_counts() -> None:
    counts = {name: spec.parameters for name, spec in BACKBONES}
    assert counts["retfound-green"] == 21_832_704
    assert counts["retfound"] == 303_301_632
    with torch.device("meta"):
        for name, spec in BACKBONES:
            network = spec.build(spec.pixels, spec.pool)
            assert sum(p.numel() for p in network.parameters()) == counts[name], name
    stored = sum(t.numel() for t in regenerate.retfound_green().values())
    assert stored == counts["retfound-green"]
