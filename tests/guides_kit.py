"""RETFound and RETFound-Green in small, for tests of what the older guides name: as many blocks, the same layouts."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from eyetune.backbones.backbone import BACKBONES
from eyetune.backbones.vit import vision_transformer

# The networks are tiny: a second thread only waits for the first.
torch.set_num_threads(1)

ROOT = Path(__file__).parent.parent
WIDTH = 16
LARGE, GREEN = "models/RETFound_cfp_weights.pth", "models/retfoundgreen_statedict.pth"


def importable(patch: pytest.MonkeyPatch) -> None:
    """`from scripts.model import …` works, as it does from the root of a checkout."""
    patch.setattr(sys, "path", [str(ROOT), *sys.path])


def _large(pixels: int, pool: str) -> nn.Module:
    pooling: dict[str, Any] = {"global_pool": "token"} if pool == "cls" else {"global_pool": "avg", "fc_norm": True}
    return vision_transformer(pixels, patch=16, width=WIDTH, depth=24, heads=2, **pooling)


def _green(pixels: int, pool: str) -> nn.Module:
    options: dict[str, Any] = {"reg_tokens": 4, "no_embed_class": True, "global_pool": "avg", "fc_norm": False}
    return vision_transformer(pixels, patch=14, width=WIDTH, depth=12, heads=2, init_values=1e-5, **options)


def miniatures(patch: pytest.MonkeyPatch) -> None:
    """In place of the two published networks, ones of the same blocks that are 16 numbers wide."""
    large, green = BACKBONES.get("retfound"), BACKBONES.get("retfound-green")
    patch.setitem(BACKBONES._entries, "retfound", replace(large, build=_large, pools={"cls": WIDTH, "avg": WIDTH}))
    patch.setitem(BACKBONES._entries, "retfound-green", replace(green, build=_green, pools={"avg": WIDTH}))


def write_miniatures(folder: Path, seed: int = 0) -> None:
    """Their weights under the published names and in the published layouts, every tensor its own."""
    torch.manual_seed(seed)
    (folder / "models").mkdir(exist_ok=True)
    for file, network in ((LARGE, _large(224, "cls")), (GREEN, _green(392, "avg"))):
        with torch.no_grad():
            state = {name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in network.state_dict().items()}
        large = {"model": {**state, "mask_token": torch.zeros(1, 1, 8), "decoder_embed.bias": torch.zeros(8)}}
        torch.save(large | {"epoch": 799} if file == LARGE else state, folder / file)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder to stand in, with weights of the miniatures in `models/`, and `scripts` to import."""
    folder = tmp_path_factory.mktemp("checkout")
    with pytest.MonkeyPatch.context() as patch:
        importable(patch)
        miniatures(patch)
        write_miniatures(folder)
        patch.chdir(folder)
        yield folder
