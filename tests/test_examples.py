"""The examples, and what docs/extending.md shows. (tests/test_tutorials.py runs own_csv.py and new_site.py.)"""

from __future__ import annotations

import ast
import importlib
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from docs_kit import DOCS, ROOT, blocks_of

import eyetune as et
from eyetune.adapt.classifier import Classifier
from eyetune.backbones import BACKBONES
from eyetune.metrics.metric import METRICS, Undefined
from eyetune.metrics.outcomes import Outcomes

EXAMPLES = ROOT / "examples"
PLUGIN = EXAMPLES / "plugin"
SCRIPTS = sorted(EXAMPLES.rglob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_an_example_is_short_and_says_what_it_shows(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text))
    assert len(text.splitlines()) < 60


@pytest.fixture
def installed(tmp_path: Path) -> str:
    """A folder in which the plugin is as pip leaves it: its modules, and the entry points that pyproject.toml names."""
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    about = tmp_path / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = project["entry-points"].items()
    lines = [f"[{group}]\n" + "".join(f"{key} = {name}\n" for key, name in points.items()) for group, points in groups]
    (about / "entry_points.txt").write_text("\n".join(lines))
    return f"{tmp_path}:{PLUGIN}"


def test_a_package_of_your_own_is_found(installed: str) -> None:
    """By the command line, in a process of its own; and without PyTorch."""
    program = (
        "import sys; from eyetune.cli import main\n"
        "from eyetune.metrics.metric import METRICS\n"
        "code = main(['models', 'list'])\n"
        "assert 'within_one' in METRICS\n"
        "sys.exit(f'torch was loaded, {code}' if code or 'torch' in sys.modules else 0)"
    )
    path = f"{installed}:{ROOT / 'src'}"
    words = [sys.executable, "-c", program]
    done = subprocess.run(words, capture_output=True, text=True, env={"PYTHONPATH": path, "PATH": "", "COLUMNS": "200"})
    assert done.returncode == 0, done.stderr
    assert "pico" in done.stdout
    assert "Pico" in done.stdout or "strided" in done.stdout


@pytest.mark.slow
def test_the_plugin_works(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(PLUGIN))
    monkeypatch.setattr(BACKBONES, "_entries", dict(BACKBONES._entries))  # forgotten again afterwards
    monkeypatch.setattr(METRICS, "_entries", dict(METRICS._entries))
    try:
        importlib.import_module("eyetune_pico.backbone")
        importlib.import_module("eyetune_pico.metric")

        backbone = et.load_backbone("pico", weights="random")
        assert backbone.features(torch.zeros(2, 3, 64, 64)).shape == (2, 32)
        assert sum(parameter.numel() for parameter in backbone.network.parameters()) == backbone.spec.parameters
        assert [group.name for group in backbone.layer_groups()]
        for kind in ("linear", "full", "lora"):
            config = et.Config.parse(
                {"data": {"table": "a.csv"}, "model": {"backbone": "pico"}, "adapt": kind}, check_files=False
            )
            strategy = config.adapt.build()
            assert strategy.groups(strategy.apply(Classifier(et.load_backbone("pico", weights="random"), outputs=5)))

        from safetensors.torch import save_file

        weights = {key: tensor + 1 for key, tensor in backbone.network.state_dict().items()}
        save_file(weights | {"head.weight": torch.zeros(5, 32)}, tmp_path / "pico.safetensors")
        loaded = et.load_backbone("pico", weights=tmp_path / "pico.safetensors")
        assert loaded.report is not None
        assert [key for key, _ in loaded.report.dropped] == ["head.weight"]
        assert all(torch.equal(loaded.network.state_dict()[key], weights[key]) for key in weights)

        metric = METRICS.get("within_one")
        outcomes = Outcomes(np.array([0, 1, 2, 2]), np.eye(3)[[0, 2, 0, 2]])
        assert metric(outcomes) == 0.75
        with pytest.raises(Undefined):
            metric(Outcomes(np.array([0, 1]), np.eye(2)))
    finally:
        for name in [name for name in sys.modules if name.startswith("eyetune_pico")]:
            sys.modules.pop(name)


def test_a_layout_of_your_own_becomes_a_table(tmp_path: Path) -> None:
    from PIL import Image

    [block] = [block for block in blocks_of(DOCS / "extending.md") if block.language == "python"]
    names: dict[str, object] = {}
    exec(compile(block.text, str(block), "exec"), names)
    for patient, grade in (("P1", 0), ("P2", 3)):
        folder = tmp_path / "visits" / patient
        folder.mkdir(parents=True)
        (folder / "grade.txt").write_text(f"{grade}\n")
        for eye in ("OD", "OS"):
            Image.new("RGB", (8, 8)).save(folder / f"{eye}.jpg")
    assert names["table_of"](tmp_path / "visits", tmp_path / "visits.csv") == 4  # type: ignore[operator]
    manifest = et.Manifest.from_csv(tmp_path / "visits.csv", images=tmp_path / "visits")
    assert [(record.label, record.patient, record.eye) for record in manifest] == [
        (0, "P1", "right"),
        (3, "P2", "right"),
        (0, "P1", "left"),
        (3, "P2", "left"),
    ]


def test_an_example_without_words_says_how_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for script in (EXAMPLES / "own_csv.py", EXAMPLES / "new_site.py"):
        monkeypatch.setattr(sys, "argv", [str(script)])
        with pytest.raises(SystemExit, match=f"python examples/{script.name} "):
            runpy.run_path(str(script), run_name="__main__")
