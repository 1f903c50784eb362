"""The code blocks of the five older guides run: as printed, except for what `guides_sessions` says of them."""

from __future__ import annotations

import copy
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import regenerate
import torch
from data_kit import fundus, save
from guides_kit import LARGE, ROOT, importable, miniatures, write_miniatures
from guides_sessions import BLOCKS, EDITS, NOT_RUN, SESSIONS, Session
from test_docs import check_command
from test_guides_commands import door

from eyetune.backbones import load_backbone, timm_any
from eyetune.config import Config
from eyetune.guides import retfound as guide_retfound
from eyetune.guides import selftest
from eyetune.guides.settings import read_guide_config
from eyetune.older_config import read_keys

IN_FULL = [session for session in SESSIONS if session.networks in ("both", "full")]
SELF_TESTS = ("model", "retfound_model", "retfound_lora")


def furnish(folder: Path) -> None:
    """What the guides take for granted in the folder they stand in: configurations and a table of drawn eyes."""
    shutil.copytree(ROOT / "configs", folder / "configs")
    rows = ["id_code,diagnosis"]
    for number in range(10):
        save(folder / "data" / "aptos" / "train_images" / f"{number}.png", fundus(96, 96, radius=40, seed=number))
        rows.append(f"{number},{number % 5}")
    (folder / "data" / "aptos" / "train.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    """Blocks switch anomaly detection and deterministic cuDNN on, for the whole process: not for the tests behind."""
    cudnn = torch.backends.cudnn
    before = torch.is_anomaly_enabled(), cudnn.deterministic, cudnn.benchmark
    yield
    torch.autograd.set_detect_anomaly(before[0])
    cudnn.deterministic, cudnn.benchmark = before[1:]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with all that, and weights of the miniatures."""
    folder = tmp_path_factory.mktemp("small")
    with pytest.MonkeyPatch.context() as patch:
        importable(patch)
        furnish(folder)
        write_miniatures(folder)
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The same with weights of the published size, which are read once: later loads are copies of the first."""
    folder = tmp_path_factory.mktemp("full")
    torch.manual_seed(0)
    read: dict[Any, Any] = {}

    def once(name: str, weights: Any, **options: Any) -> Any:
        key = (name, str(weights))
        if key not in read:
            read[key] = load_backbone(name, weights, **options)
        assert options["pool"] in (None, read[key].pool)
        return copy.deepcopy(read[key])

    with pytest.MonkeyPatch.context() as patch:
        importable(patch)
        furnish(folder)
        (folder / "models").mkdir()
        torch.save(regenerate.retfound_mae(), folder / LARGE)
        patch.setattr(guide_retfound, "load_backbone", once)
        patch.chdir(folder)
        yield folder
    shutil.rmtree(folder)  # gigabytes that nobody needs again


def run(session: Session, full: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Paste the blocks into one session each time, and check after each."""
    for over in session.again:
        names = {"__name__": "session", **session.before(full), **over}
        capsys.readouterr()
        for key in session.blocks:
            text = BLOCKS[key].text
            for printed, ours, _ in EDITS.get(key, []):
                text = text.replace(printed, ours)
            exec(compile(text, f"{key[0]}: {key[1]}", "exec"), names)
            out = capsys.readouterr().out
            if key[1] in session.after:
                session.after[key[1]](names, out, full)


def _marked(session: Session) -> Any:
    slow = session.networks in ("timm", "slow")
    return pytest.param(session, id=session.name, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize("session", [_marked(session) for session in SESSIONS if session.networks != "full"])
def test_blocks_run(
    session: Session, checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build = timm_any.build
    # Nothing is downloaded here: "pretrained" timm networks have random weights.
    monkeypatch.setattr(timm_any, "check_connection", lambda name: None)
    monkeypatch.setattr(timm_any, "build", lambda name, pixels, pool, pretrained=False: build(name, pixels, pool))
    if session.networks in ("both", "small", "slow"):
        miniatures(monkeypatch)
    run(session, False, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("session", IN_FULL, ids=lambda session: session.name)
def test_blocks_run_at_full_size(session: Session, published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(session, True, capsys)


def test_every_block_is_run_or_said_not_to_be() -> None:
    run_here = [key for session in SESSIONS for key in session.blocks]
    assert len(run_here) == len(set(run_here))
    python = {key for key, block in BLOCKS.items() if block.language == "python"}
    assert {block.language for block in BLOCKS.values()} == {"python", "bash", "yaml"}
    left = set(NOT_RUN) & python
    assert set(run_here) | left == python
    assert not set(run_here) & left
    assert set(NOT_RUN) <= set(BLOCKS)
    assert len(BLOCKS) == 67
    for key, edits in EDITS.items():
        text = BLOCKS[key].text
        assert key in run_here
        for printed, ours, why in edits:
            assert printed in text, f"{key}: {printed!r} is not in the block"
            assert why
            text = text.replace(printed, ours)
    for session in SESSIONS:
        assert set(session.after) <= {name for _, name in session.blocks}


@pytest.mark.parametrize(
    "key", [key for key, block in BLOCKS.items() if block.language == "yaml" and key not in NOT_RUN], ids=str
)
def test_yaml_is_read_as_it_stands(key: tuple[str, str], tmp_path: Path) -> None:
    import yaml

    text = BLOCKS[key].text
    content = yaml.safe_load(text)
    if "model" not in content:  # a part of the section
        text = yaml.safe_dump({"model": {"type": "retfound_lora", **content}})
    file = tmp_path / "guide.yaml"
    file.write_text(text, encoding="utf-8")
    guide = read_guide_config(file)
    assert guide.said == read_keys(yaml.safe_load(text), "the block")
    translation = guide.translation()
    assert not translation.unused
    config = Config.parse({**translation.content, "data": {"table": "labels.csv"}}, check_files=False)
    kind = {"baseline": "full", "retfound": "full", "retfound_lora": "lora"}[guide.model.type or "baseline"]
    assert config.adapt.kind == kind
    if kind == "lora":
        assert (config.adapt.r, config.adapt.alpha, config.adapt.targets[0]) == (8, 32, "qkv")  # type: ignore[attr-defined]


def command_lines() -> list[str]:
    lines = []
    for key, block in BLOCKS.items():
        if block.language == "bash" and key not in NOT_RUN:
            lines += [line for line in block.text.replace("\\\n", " ").splitlines() if shlex.split(line, comments=True)]
    return lines


@pytest.mark.parametrize("line", command_lines(), ids=lambda line: " ".join(line.split())[:60])
def test_commands_mean_something(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a script of ours, and what it comes to is a command that exists."""
    python, script, *words = shlex.split(line, comments=True)
    assert python in ("python", "python3")
    assert (ROOT / script).is_file()
    name = Path(script).stem
    if name in SELF_TESTS:
        assert not words
        return
    monkeypatch.chdir(ROOT)
    meant = door(name).translate(words)
    assert meant.words
    if meant.words[0] in ("finetune", "evaluate"):
        check_command(meant.words)


@pytest.mark.slow  # the networks as published, on random weights
@pytest.mark.parametrize(("script", "checks"), [("model", 4), ("retfound_model", 2)])
def test_self_tests_pass(
    script: str, checks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert selftest.main(script, []) == 0
    out = capsys.readouterr().out
    assert out.count("✓ ") == checks
    assert "✗" not in out
    if script == "retfound_model":
        assert "21,832,704 parameters" in out
        assert "303,301,632 parameters" in out
        assert "put them at models/RETFound_cfp_weights.pth" in out
