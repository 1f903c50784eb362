"""`eyetune models list` and `eyetune models inspect`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from eyetune.backbones import BACKBONES, load_backbone
from eyetune.cli import main


def test_list_names_everything_a_user_needs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "220")
    assert main(["models", "list"]) == 0
    printed = capsys.readouterr().out
    for name, spec in BACKBONES:
        assert name in printed
        assert spec.title in printed
        assert str(spec.pixels) in printed
        assert spec.licence.split()[0] in printed
    for word in ("303.3 M", "21.8 M", ".485 .456 .406", "last4: 3072", "large", "green", "392*"):
        assert word in printed, word


def test_listing_needs_neither_torch_nor_timm() -> None:
    code = (
        "import sys; from eyetune.verbs.models import list_models; import eyetune.backbones.config; list_models();"
        "sys.exit(any(name in sys.modules for name in ('torch', 'timm', 'numpy', 'safetensors')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.pth"
    state = load_backbone("nano", "random").network.state_dict()
    torch.save({"model": {**state, "head.weight": torch.ones(5, 192)}, "epoch": 3}, path)
    assert main(["models", "inspect", str(path)]) == 0
    printed = capsys.readouterr().out
    for word in ("backbone: nano", "model: ", "epoch", "head.weight", "classification head", "sha256"):
        assert word in printed, word
    del state["norm.bias"]
    torch.save(state, path)
    assert main(["models", "inspect", str(path)]) == 1
    assert "norm.bias" in capsys.readouterr().out
    assert main(["models", "inspect", str(path), "--as", "resnet18"]) == 1
    assert "resnet18" in capsys.readouterr().out


def test_inspect_what_cannot_be_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "page.pth"
    path.write_text("<!doctype html>")
    assert main(["models", "inspect", str(path)]) == 2
    assert "web page" in capsys.readouterr().err
    assert main(["models", "inspect", str(path), "--as", "retfund"]) == 2
    assert "Did you mean 'retfound'" in capsys.readouterr().err
