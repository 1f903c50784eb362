"""README and docs: every field, link, command and configuration they show is one that exists.

`python tests/test_docs.py --write` writes the tables of docs/configuration.md anew.
"""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from eyetune.adapt import STRATEGIES
from eyetune.backbones import BACKBONES
from eyetune.clip.config import ClipConfig
from eyetune.comparison.plan import read_plan
from eyetune.config import Config, Flag, RunConfig, flags
from eyetune.flags import parse

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CONFIGURATION = ROOT / "docs" / "configuration.md"
WRITE = "python tests/test_docs.py --write"
FIELDS = re.compile(r"(<!-- fields:[^\n]*-->\n).*?(<!-- /fields -->)", re.DOTALL)
CLIP_FIELDS = re.compile(r"(<!-- clip fields:[^\n]*-->\n).*?(<!-- /clip fields -->)", re.DOTALL)
SHELL = ("bash", "sh", "console")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its language, its text, and where it starts."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(*languages: str) -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            if match[1] in languages:
                found.append(Block(page, text.count("\n", 0, match.start()) + 1, match[1], match[2]))
    return found


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def commands() -> Iterator[tuple[str, list[str]]]:
    """(where, words after `eyetune`) of every command in a shell block."""
    for block in blocks(*SHELL):
        for line in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["eyetune"]:
                yield f"{block}: {line}", words[1:]


# -- the fields --------------------------------------------------------------------------------------------------------


def field_tables(config: type[RunConfig] = Config) -> str:
    """Every field of a configuration as Markdown: a table a section, and one a strategy."""
    tables: dict[str, list[Flag]] = {}
    for flag in flags(config):
        kind = re.match(r"\((\w[\w-]*)\) ", flag.help)
        section = flag.path.rpartition(".")[0]
        title = f"`{section}`" if section else "The run"
        if section == "adapt" and kind:
            title, flag = f"`adapt` with `kind: {kind[1]}`", flag._replace(help=flag.help[kind.end() :])
        tables.setdefault(title, []).append(flag)
    lines: list[str] = []
    for title, rows in tables.items():
        lines += [f"### {title}", "", "| field | type | default | meaning |", "|---|---|---|---|"]
        lines += [f"| `{row.path}` | `{_cell(row.type)}` | {_default(row)} | {_cell(row.help)} |" for row in rows]
        lines.append("")
    return "\n".join(lines)


def _default(flag: Flag) -> str:
    if flag.default is None:
        return "**required**" if flag.path in (Config.REQUIRED, ClipConfig.REQUIRED) else "–"
    value = flag.default
    text = f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)
    return f"`{text.lower() if isinstance(value, bool) else text}`"


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


def with_fields(text: str) -> str:
    assert FIELDS.search(text), "docs/configuration.md has lost its <!-- fields --> markers"
    text = FIELDS.sub(lambda match: f"{match[1]}\n{field_tables()}\n{match[2]}", text)
    assert CLIP_FIELDS.search(text), "docs/configuration.md has lost its <!-- clip fields --> markers"
    of_clip = re.sub(r"^(### .*)", r"\1 of `kind: clip`", field_tables(ClipConfig), flags=re.MULTILINE)
    return CLIP_FIELDS.sub(lambda match: f"{match[1]}\n{of_clip}\n{match[2]}", text)


def test_configuration_lists_every_field() -> None:
    text = CONFIGURATION.read_text(encoding="utf-8")
    assert with_fields(text) == text, f"docs/configuration.md is not what the code says. Write it anew: {WRITE}"


def test_only_the_table_is_required() -> None:
    config = Config.parse({"data": {"table": "labels.csv"}}, check_files=False)
    assert config.data.table == "labels.csv"


def test_configuration_names_every_metric() -> None:
    from eyetune.metrics.scores import METRICS

    text = CONFIGURATION.read_text(encoding="utf-8")
    assert [name for name in METRICS.names() if f"`{name}`" not in text] == []


# -- what the pages show -----------------------------------------------------------------------------------------------


def test_pages_were_found() -> None:
    assert {"README.md", "quickstart.md", "backbones.md", "strategies.md", "configuration.md"} <= {
        page.name for page in PAGES
    }
    assert len(list(commands())) > 10
    assert len(blocks("yaml")) > 5


def test_every_page_is_in_the_site() -> None:
    front = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    listed = re.findall(
        r"^(?:.*<)?([\w./-]+)>?$", "".join(re.findall(r"```{toctree}\n(.*?)```", front, re.DOTALL)), re.M
    )
    for page in PAGES[1:]:
        if page.stem != "index":
            assert page.stem in listed, (
                f"docs/{page.name} is in none of the lists (toctree) of docs/index.md: add it there"
            )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"\w+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken, f"{page.name} links to what is not there: {', '.join(broken)}"


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_nothing_is_left_to_fill_in(page: Path) -> None:
    assert re.findall(r"@@\w+@@", page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_even(page: Path) -> None:
    """As many cells in a row as in the head of its table: a stray | would shift them."""
    width = 0
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        cells = len(re.findall(r"(?<!\\)\|", line)) - 1 if line.startswith("|") else 0
        assert not (width and cells) or cells == width, f"{page.name}:{number} has {cells} cells, its table {width}"
        width = cells


def test_commands_parse() -> None:
    for where, words in commands():
        try:
            check_command(words)
        except Exception as error:
            pytest.fail(f"{where}\n{error}")


def test_commands_in_the_text_parse() -> None:
    """`eyetune …` between backticks: whole commands parse; bare verbs exist."""
    from eyetune.cli import app

    seen = 0
    for page in PAGES:
        for span in re.findall(r"`eyetune ([^`]+)`", prose(page)):
            words = shlex.split(span)
            seen += 1
            if "…" in span or all(re.fullmatch(r"[a-z]+", word) for word in words):
                verbs = [word for word in words if re.fullmatch(r"[a-z]+", word)]
                assert app.parse_commands(verbs)[2] == [], f"{page.name}: eyetune {span}"
            else:
                check_command(words)
    assert seen > 5


def check_command(words: list[str]) -> None:
    """Raise unless the verb exists and takes these flags; nothing is run."""
    from eyetune.cli import app

    if words[0] != "finetune" or "--help" in words:
        app.parse_args(words, exit_on_error=False, print_error=False)
        return
    given = parse(words[1:])
    if "resume" in given.overrides:
        assert given.positional is None
        assert list(given.overrides) == ["resume"]
        return
    assert given.positional or "data.table" in given.overrides, "nothing to train on"
    Config.from_yaml(None, {"data.table": "labels.csv", **given.overrides}, check_files=False)


def test_a_wrong_command_would_be_noticed() -> None:
    for words in (["fine"], ["finetune", "a.yaml", "--train.epoch", "3"], ["demo", "--dat", "a"]):
        with pytest.raises(Exception, match=r"(?i)unknown"):
            check_command(words)


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_yaml_is_a_configuration(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(block.text, encoding="utf-8")
    if "\ncompare:" in block.text:
        monkeypatch.chdir(tmp_path)
        Path("labels.csv").touch()
        assert read_plan([str(path)]).cells
        return
    if "\nkind: clip" in f"\n{block.text}":
        ClipConfig.from_yaml(path, check_files=False)
        return
    config = Config.from_yaml(path, check_files=False)
    if not isinstance(config.augment, str):
        from eyetune.backbones import find_spec
        from eyetune.data.transforms import train_transform

        train_transform(find_spec("nano").preprocess, config.augment)


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_names_exist(block: Block) -> None:
    """It compiles, and what it takes from eyetune is there. (Most examples need weights that cannot be shipped.)"""
    import eyetune

    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("eyetune"):
            module = importlib.import_module(str(node.module))
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "et":
            assert node.attr in eyetune.__all__


@pytest.mark.parametrize("block", blocks("json"), ids=str)
def test_json_is_json(block: Block) -> None:
    import json

    json.loads(block.text)


# -- figures that the code knows ---------------------------------------------------------------------------------------


def test_backbones_page_agrees_with_the_specs() -> None:
    page = (ROOT / "docs" / "backbones.md").read_text(encoding="utf-8")
    for name, spec in BACKBONES:
        row = next(line for line in page.splitlines() if line.startswith(f"| `{name}`"))
        assert f"| {spec.parameters:,} | {spec.pixels} | {spec.preprocess.fit} |" in row
        assert all(f"`{pool}`: {width}" in row for pool, width in spec.pools.items())
        assert spec.licence in page
        assert spec.download is None or spec.download.filename in (ROOT / "README.md").read_text(encoding="utf-8")
        norm = (", ".join(map(str, values)) for values in (spec.preprocess.mean, spec.preprocess.std))
        assert all(values in page for values in norm)


def test_strategies_page_agrees_with_the_rates() -> None:
    page = (ROOT / "docs" / "strategies.md").read_text(encoding="utf-8")
    for name, config in STRATEGIES:
        row = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
        assert float(row.split("|")[3]) == config.default_lr


def test_the_worked_strategy_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    import eyetune as et
    from eyetune.adapt.classifier import Classifier

    block = next(block for block in blocks("python") if "@STRATEGIES.register" in block.text)
    (tmp_path / "worked_strategy.py").write_text(block.text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(STRATEGIES, "_entries", dict(STRATEGIES._entries))  # forgotten again afterwards
    importlib.import_module("worked_strategy")
    try:
        config = Config.parse({"data": {"table": "labels.csv"}, "adapt": {"kind": "biases"}}, check_files=False)
        assert config.learning_rate == 1e-3
        strategy = config.adapt.build()
        model = strategy.apply(Classifier(et.load_backbone("nano", weights="random"), outputs=5))
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trained
        assert all(name.endswith(".bias") or name.startswith("head.") for name in trained)
        assert sum(len(group.parameters) for group in strategy.groups(model)) == len(trained)
        tensors: dict[str, Any] = strategy.checkpoint(model)
        assert set(tensors) == trained
        before = {name: tensor.clone() for name, tensor in tensors.items()}
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in trained:
                    parameter.add_(1)
        strategy.load_checkpoint(model, tensors)
        after = strategy.checkpoint(model)
        assert all(torch.equal(after[name], before[name]) for name in before)
    finally:
        sys.modules.pop("worked_strategy", None)


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(f"usage: {WRITE}")
    CONFIGURATION.write_text(with_fields(CONFIGURATION.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote the fields of the configuration into {CONFIGURATION.relative_to(ROOT)}")
