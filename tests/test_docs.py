"""README and docs: every field, link, command and configuration they show is one that exists.

`python tests/test_docs.py --write` writes anew what the code knows: the tables of fields, the commands with their
flags, the metrics, the licences.
"""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from docs_kit import DOCS, GENERATED, PAGES, ROOT, WRITE, Block, blocks, commands, prose, write, written

from eyetune.adapt import STRATEGIES
from eyetune.backbones import BACKBONES
from eyetune.clip.config import ClipConfig
from eyetune.comparison.plan import read_plan
from eyetune.config import Config
from eyetune.flags import parse
from eyetune.searching.plan import read_plan as read_search

# -- what the code writes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", GENERATED)
def test_a_page_is_what_the_code_says(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    assert written(page) == text, f"docs/{page} is not what the code says. Write it anew: {WRITE}"


def test_only_the_table_is_required() -> None:
    config = Config.parse({"data": {"table": "labels.csv"}}, check_files=False)
    assert config.data.table == "labels.csv"


# -- what the pages show -----------------------------------------------------------------------------------------------


def test_pages_were_found() -> None:
    assert {"README.md", "quickstart.md", "backbones.md", "strategies.md", "configuration.md"} <= {
        page.name for page in PAGES
    }
    assert len(list(commands())) > 10
    assert len(blocks("yaml")) > 5


def test_every_page_is_in_the_site() -> None:
    front = (DOCS / "index.md").read_text(encoding="utf-8")
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


def addresses() -> dict[str, list[str]]:
    """Every address outside, and the pages that name it."""
    found: dict[str, list[str]] = {}
    for page in [*PAGES, *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "src/eyetune/weights/nano.md"))]:
        for address in re.findall(r"\bhttps?://[^\s)>\"'`|\\]+", prose(page)):
            found.setdefault(address.rstrip(".,;"), []).append(page.name)
    return found


def test_addresses_are_well_formed() -> None:
    """`make linkcheck` asks whether they are there; this can be told without a network."""
    assert len(addresses()) > 20
    for address, pages in addresses().items():
        parts = urlsplit(address)
        if parts.hostname == "127.0.0.1":
            continue
        assert parts.scheme == "https", f"{pages}: {address}"
        assert re.fullmatch(r"([a-z0-9-]+\.)+[a-z]{2,}", parts.netloc), f"{pages}: {address}"
        assert not re.search(r"//|\.\.|%[^0-9A-F]", parts.path), f"{pages}: {address}"
        forms = {
            "doi.org": r"/10\.\d{4,}/\S+",
            "arxiv.org": r"/abs/\d{4}\.\d{4,5}",
            "github.com": r"/[\w-]+/[\w-]+(/.+)?",
        }
        assert re.fullmatch(forms.get(parts.netloc, r".*"), parts.path), f"{pages}: {address}"


def test_one_address_a_thing() -> None:
    """Spelt the same everywhere: no www here and none there, no slash at the end of one of two, no other capitals."""
    seen: dict[str, str] = {}
    for address, pages in addresses().items():
        plain = address.lower().removeprefix("https://").removeprefix("www.").rstrip("/")
        assert seen.setdefault(plain, address) == address, f"{pages}: {address}, elsewhere {seen[plain]}"
    for name, spec in BACKBONES:
        known = re.search(r"https://[^\s)]+", spec.source)
        assert known is None or known[0] in addresses(), f"{name}: {spec.source}"


def test_a_paper_is_linked_where_its_label_says() -> None:
    """[doi:X](…) and [arXiv:X](…) lead to X."""
    labels = [found for page in PAGES for found in re.findall(r"\[(doi|arXiv):([^]]+)\]\(([^)]+)\)", prose(page))]
    assert labels
    for kind, name, address in labels:
        assert address == {"doi": f"https://doi.org/{name}", "arXiv": f"https://arxiv.org/abs/{name}"}[kind]


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

    if words[0] == "search":
        flags = [word for word in words[1:] if not word.endswith(".yaml")]
        assert read_search(["--data.table", __file__, *flags]).space.fields
        return
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
    if "\nsearch:" in block.text:
        monkeypatch.chdir(tmp_path)
        for name in ("labels.csv", "models/retfoundgreen_statedict.pth"):
            Path(name).parent.mkdir(exist_ok=True)
            Path(name).touch()
        Path("photos").mkdir()
        assert read_search([str(path)]).space.fields
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
    page = (DOCS / "backbones.md").read_text(encoding="utf-8")
    for name, spec in BACKBONES:
        row = next(line for line in page.splitlines() if line.startswith(f"| `{name}`"))
        assert f"| {spec.parameters:,} | {spec.pixels} | {spec.preprocess.fit} |" in row
        assert all(f"`{pool}`: {width}" in row for pool, width in spec.pools.items())
        assert spec.licence in page
        assert spec.download is None or spec.download.filename in (ROOT / "README.md").read_text(encoding="utf-8")
        norm = (", ".join(map(str, values)) for values in (spec.preprocess.mean, spec.preprocess.std))
        assert all(values in page for values in norm)


def test_every_public_name_is_in_the_reference() -> None:
    import eyetune

    page = (DOCS / "api.md").read_text(encoding="utf-8")
    missing = [name for name in eyetune.__all__ if name != "__version__" and f":: eyetune.{name}\n" not in page]
    assert missing == []


def test_strategies_page_agrees_with_the_rates() -> None:
    page = (DOCS / "strategies.md").read_text(encoding="utf-8")
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
    print(f"changed: {', '.join(write()) or 'nothing'}")
