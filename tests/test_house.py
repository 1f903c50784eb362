"""The house holds: imports run one way, there is no circle, and `--help` stays light."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

import eyetune

PACKAGE = Path(eyetune.__file__).parent

# Floor by floor, from the ground up. A room may import from lower floors only, and from itself.
FLOORS = [
    {"errors", "processes"},
    {"files", "interrupt", "progress", "terminal"},
    {"findings", "memory", "older_config", "pages", "registry", "runtime", "section", "tensors"},
    {"backbones"},
    {"data", "adapt"},
    {"metrics", "config"},
    {"train", "flags"},
    {"clip", "checks", "comparison", "heatmaps"},
    {"report", "predicting", "searching"},
    {"serving", "exporting"},
    {"verbs"},
    {"cli"},
    {"guides"},
]
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
# A verb is a story of its own; only these are told with other verbs (`check` tries what `finetune` would build).
STORYTELLERS = {
    "demo": {"finetune", "evaluate", "data"},
    "search": {"finetune"},
    "check": {"finetune"},
    "compare": {"finetune", "evaluate"},
    "clip_demo": {"data", "clip_prepare", "clip_train", "clip_retrieve", "clip_zeroshot"},
}

HEAVY = ("torch", "numpy", "pandas", "timm", "peft", "cv2", "sklearn", "matplotlib", "transformers", "PIL", "uvicorn")


def modules() -> list[Path]:
    return sorted(
        path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem not in ("__init__", "__main__")
    )


def dotted(path: Path) -> list[str]:
    parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
    return parts[:-1] if parts[-1] == "__init__" else parts


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def imports(path: Path) -> frozenset[str]:
    """Every `eyetune.…` module that a file names in an import statement, at any depth of the code."""
    found: set[str] = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the whole name"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(name.removeprefix("eyetune.") for name in found if name.startswith("eyetune."))


@pytest.mark.parametrize("path", modules(), ids=lambda path: "/".join(dotted(path)))
def test_imports_run_one_way(path: Path) -> None:
    here = dotted(path)
    for name in imports(path):
        room = name.split(".")[0]
        if room not in LEVEL:
            assert room.startswith("__") or room == "eyetune", (
                f"{'.'.join(here)} imports {name}, a room without a floor"
            )
            continue
        if room == here[0]:
            continue
        assert LEVEL[room] < LEVEL[here[0]], f"{'.'.join(here)} must not import {name}: arrows run downstairs"


@pytest.mark.parametrize("path", sorted((PACKAGE / "verbs").glob("*.py")), ids=lambda path: path.stem)
def test_no_verb_tells_another_verbs_story(path: Path) -> None:
    verbs = {other.stem for other in (PACKAGE / "verbs").glob("*.py")} - {path.stem, "__init__"}
    told = {name.split(".")[1] for name in imports(path) if name.startswith("verbs.")} & verbs
    assert told <= STORYTELLERS.get(path.stem, set())


def test_no_import_circle_between_files() -> None:
    graph = {".".join(dotted(path)): imports(path) for path in modules()}
    state: dict[str, int] = {}

    def visit(name: str, trail: tuple[str, ...]) -> None:
        if state.get(name) == 2 or name not in graph:
            return
        assert state.get(name) != 1, "import circle: " + " -> ".join((*trail[trail.index(name) :], name))
        state[name] = 1
        for other in graph[name]:
            if other != name:
                visit(other, (*trail, name))
        state[name] = 2

    for name in graph:
        visit(name, ())


def test_no_function_beyond_a_hundred_lines() -> None:
    for path in modules():
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                assert length <= 100, f"{path.name}: {node.name} has {length} lines"


VERBS = """
finetune
evaluate
calibrate
predict
serve
demo
data
data audit
data split
data synth
data table
data cache
embed
compare
search
report
clip prepare
models
models inspect
models list
check
check model
check memory
check data
check loader
clip
clip demo
clip train
clip retrieve
clip search
clip zeroshot
""".splitlines()
"""Every command that answers `--help`; the first, empty one is eyetune itself."""


def test_help_loads_nothing_heavy() -> None:
    """In one process: what a verb before loaded is not there to be blamed on the next."""
    program = (
        "import sys; from eyetune.cli import main\n"
        "for verb in sys.argv[1:]:\n"
        "    print(f'== {verb}')\n"
        "    code = main([*verb.split(), '--help'])\n"
        f"    heavy = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "    if heavy or code: sys.exit(f'eyetune {verb} --help left with {code} and loaded {heavy}')"
    )
    done = subprocess.run([sys.executable, "-c", program, *VERBS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answers = done.stdout.split("== ")[1:]
    assert len(answers) == len(VERBS)
    assert all(f"Usage: eyetune {verb}".rstrip() in said for verb, said in zip(VERBS, answers, strict=True))


def test_public_names_are_there() -> None:
    for name in eyetune.__all__:
        assert getattr(eyetune, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = eyetune.no_such_name
