"""Opening checkpoint files: nothing in them is ever executed, and each kind of wrong file is called by its name."""

from __future__ import annotations

import argparse
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from eyetune.backbones import load_backbone
from eyetune.backbones.opening import open_checkpoint
from eyetune.errors import WeightsError

TENSORS = {"a.weight": torch.arange(6000.0).reshape(60, 100), "a.bias": torch.ones(3)}


class RunsCode:
    """A pickle of this makes a folder when it is opened carelessly."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (self.path,)


def save(content: Any, path: Path, *, old: bool = False) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=not old)
    return path


@pytest.mark.parametrize("old", [False, True])
def test_torch_files(tmp_path: Path, old: bool) -> None:
    args = argparse.Namespace(lr=1e-3)
    path = save({"model": TENSORS, "epoch": 3, "args": args, "best_auc": np.float64(0.5)}, tmp_path / "a.pth", old=old)
    checkpoint = open_checkpoint(path)
    assert set(checkpoint.containers()) == {"model"}
    for key, tensor in checkpoint.containers()["model"].items():
        assert torch.equal(tensor, TENSORS[key])
    assert checkpoint.content["args"] == args
    assert checkpoint.content["best_auc"] == 0.5
    assert checkpoint.format == ("torch (before 1.6)" if old else "torch")
    assert len(checkpoint.sha256) == 64


def test_safetensors(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "a.safetensors")
    checkpoint = open_checkpoint(tmp_path / "a.safetensors")
    assert checkpoint.format == "safetensors"
    assert torch.equal(checkpoint.containers()[""]["a.weight"], TENSORS["a.weight"])


def refused(path: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert str(path) in message
    return message


@pytest.mark.parametrize("old", [False, True])
def test_a_pickle_that_would_run_code_is_named_and_not_run(tmp_path: Path, old: bool) -> None:
    path = save({"model": TENSORS, "x": RunsCode(tmp_path / "harm")}, tmp_path / "evil.pth", old=old)
    message = refused(path)
    assert "would run code" in message
    assert f"{os.mkdir.__module__}.mkdir" in message
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_bare_pickle_that_would_run_code(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "evil.pth"
    path.write_bytes(pickle.dumps(RunsCode(tmp_path / "harm"), protocol=protocol))
    assert f"{os.mkdir.__module__}.mkdir" in refused(path)
    assert not (tmp_path / "harm").exists()


def test_a_pickled_model_is_not_unpickled(tmp_path: Path) -> None:
    assert "torch.nn.modules.linear.Linear" in refused(save(torch.nn.Linear(2, 2), tmp_path / "m.pth"))


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.98, 0.9999])
def test_a_truncated_torch_file(tmp_path: Path, old: bool, share: float) -> None:
    path = save({"model": TENSORS}, tmp_path / "a.pth", old=old)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert "cut short" in refused(path)


@pytest.mark.parametrize("kept", [40, 1000, 20_000])
def test_a_truncated_safetensors_file(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "a.safetensors"
    save_file(TENSORS, path)
    path.write_bytes(path.read_bytes()[:kept])
    assert "cut short" in refused(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "0 bytes"),
        (b"\n <!DOCTYPE html><html><head><title>Sign in</title>", "web page"),
        (b"<html>" + b"x" * 5000, "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "git lfs pull"),
        (json.dumps({"error": "rate limit"}).encode(), "JSON"),
        (b"\x89PNG\r\n\x1a\n" + b"0" * 100, "not a checkpoint"),
        (b"PK\x03\x04" + b"0" * 100, "cut short"),
        (b"just some text", "not a checkpoint"),
        (pickle.dumps({"a": 1}), "not a torch checkpoint"),
        (b"\x80", "cut short"),
    ],
)
def test_what_is_no_checkpoint(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "RETFound_cfp_weights.pth"
    path.write_bytes(content)
    assert said in refused(path)


def test_torchscript(tmp_path: Path) -> None:
    import zipfile

    path = tmp_path / "scripted.pt"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            archive.writestr(f"scripted/{name}", b"\x80\x02}.")
    assert "TorchScript" in refused(path)


def test_a_plain_zip_archive(tmp_path: Path) -> None:
    import zipfile

    path = tmp_path / "weights.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("weights/readme.txt", "hello")
    assert "zip archive" in refused(path)


def test_a_folder_a_tensor_and_a_list(tmp_path: Path) -> None:
    assert "folder" in refused(tmp_path)
    assert "Tensor" in refused(save(torch.ones(2), tmp_path / "t.pth"))
    assert "list" in refused(save([torch.ones(2)], tmp_path / "l.pth"))


def test_a_missing_file_says_where_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"huggingface\.co/YukunZhou.*CC BY-NC"):
        load_backbone("retfound", tmp_path / "RETFound_cfp_weights.pth")


@pytest.mark.parametrize("name", ["retfound", "retfound-dinov2", "green", "visionfm", "ret-clip"])
def test_no_weights_says_which_where_and_on_what_terms(name: str) -> None:
    with pytest.raises(WeightsError, match=r"needs its weights.*https://.*licence: .*set model.weights"):
        load_backbone(name)


def test_a_timm_name_without_weights_says_what_to_type() -> None:
    with pytest.raises(WeightsError, match=r"weights: hub .* random"):
        load_backbone("resnet18")
