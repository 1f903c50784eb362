"""Device, precision and seeds."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from train_kit import PREPROCESS

from eyetune import config, runtime
from eyetune.backbones import load_backbone
from eyetune.backbones.backbone import BACKBONES, Backbone
from eyetune.errors import UserError
from eyetune.runtime import Runtime, choose_device, choose_precision, seed_everything


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002


def test_an_epoch_is_a_function_of_seed_and_epoch() -> None:
    first = Runtime("cpu", "fp32", seed=7)
    first.seed_epoch(3)
    drawn = draw()
    draw()
    Runtime("cpu", "fp32", seed=7).seed_epoch(3)
    assert draw() == drawn
    others = []
    for seed, epoch, rank in ((7, 4, 0), (8, 3, 0), (7, 3, 1), (3, 7, 0)):
        seed_everything(seed, epoch, rank)
        others.append(draw())
    for place in range(3):
        assert len({values[place] for values in [drawn, *others]}) == 5


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_auto_takes_the_fastest_device(monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert choose_device("auto") == expected


@pytest.mark.parametrize(
    ("device", "cuda_bf16", "cpu_bf16", "expected"),
    [
        ("cuda", True, False, "bf16"),
        ("cuda", False, True, "fp16"),
        ("cpu", True, True, "bf16"),
        ("cpu", True, False, "fp32"),
        ("mps", True, True, "fp32"),
    ],
)
def test_auto_takes_the_precision_the_hardware_multiplies(
    monkeypatch: pytest.MonkeyPatch, device: str, cuda_bf16: bool, cpu_bf16: bool, expected: str
) -> None:
    monkeypatch.setattr(runtime, "_cuda_multiplies_bf16", lambda: cuda_bf16)
    monkeypatch.setattr(runtime, "cpu_multiplies_bf16", lambda: cpu_bf16)
    assert choose_precision("auto", device) == expected


def test_what_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(runtime, "_cuda_multiplies_bf16", lambda: False)
    with pytest.raises(UserError, match=r"--device cuda: .* Use --device cpu"):
        Runtime("cuda")
    with pytest.raises(UserError, match="Did you mean 'cuda'"):
        Runtime("cude")
    with pytest.raises(UserError, match="needs a GPU"):
        Runtime("cpu", "fp16")
    with pytest.raises(UserError, match="Did you mean 'bf16'"):
        Runtime("cpu", "bf61")
    with pytest.raises(UserError, match="no bfloat16 arithmetic"):
        choose_precision("bf16", "cuda")


def test_precision_is_that_of_matrix_products_and_may_change_from_run_to_run() -> None:
    """Accelerate itself refuses a second precision in one process."""
    for precision, expected in (("bf16", torch.bfloat16), ("fp32", torch.float32), ("bf16", torch.bfloat16)):
        here = Runtime("cpu", precision)
        with here.autocast():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == expected
        assert here.precision == precision


def test_the_configuration_knows_the_same_words() -> None:
    """config.py cannot import runtime.py, which needs torch."""
    for name, words in (("device", runtime.DeviceName), ("precision", runtime.PrecisionName)):
        assert get_args(config.Config.model_fields[name].annotation) == get_args(words)


def test_the_environment_says_what_decides_a_number_and_nobodys_name(monkeypatch: pytest.MonkeyPatch) -> None:
    home = str(Path.home())
    monkeypatch.setattr(sys, "argv", ["/opt/bin/eyetune", "finetune", f"{home}/data dir/x.yaml", "--train.lr", "1e-3"])
    found = Runtime("cpu", "fp32", seed=5).describe()
    assert found["command"] == "eyetune finetune '~/data dir/x.yaml' --train.lr 1e-3"
    assert (found["precision"], found["seed"], found["processes"]) == ("fp32", 5, 1)
    assert found["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert {"eyetune", "timm", "numpy"} <= set(found["versions"])
    assert set(found) == {
        *("date", "command", "commit", "python", "system", "device", "precision", "processes", "threads", "seed"),
        *("versions", "cuda"),
    }
    json.dumps(found, allow_nan=False)


def test_batches_move_whole() -> None:
    here = Runtime("cpu", "fp32")
    batch = {"image": torch.ones(2), "nested": [torch.zeros(1)], "name": "x"}
    moved = here.to_device(batch)
    assert moved["name"] == "x"
    assert moved["image"].device.type == "cpu"
    assert isinstance(moved["nested"], list)


@pytest.mark.parametrize(("name", "expected"), [("nano", False), ("resnet26", True), ("convnext_atto", True)])
def test_which_networks_convolve(name: str, expected: bool) -> None:
    assert runtime.convolves(load_backbone(name, "random")) == expected


@pytest.mark.parametrize(
    ("name", "count", "kind"),
    [
        ("nano", 6, "Block"),
        ("resnet26", 8, "Bottleneck"),
        ("swin_tiny_patch4_window7_224", 12, "SwinTransformerBlock"),
        ("convnext_atto", 12, "ConvNeXtBlock"),
        ("efficientnet_lite0", 14, "InvertedResidual"),
    ],
)
def test_blocks_are_what_a_network_repeats(name: str, count: int, kind: str) -> None:
    blocks = load_backbone(name, "random").blocks()
    assert len(blocks) >= count, len(blocks)
    assert {type(block).__name__ for block in blocks} == {kind}


def test_a_network_that_repeats_nothing_has_no_blocks() -> None:
    plain = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten())
    assert Backbone(BACKBONES.get("nano"), plain, preprocess=PREPROCESS, pool="cls", width=4).blocks() == []
