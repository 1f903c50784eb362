"""What the pages are read with, and the parts of them that the code writes."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eyetune.backbones import BACKBONES
from eyetune.clip.config import ClipConfig
from eyetune.config import Config, Flag, RunConfig, flags

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
WRITE = "python tests/test_docs.py --write"
SHELL = ("bash", "sh", "console")


# -- reading -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its language, its text, where it starts; whether it says that it is an example only."""

    page: Path
    line: int
    language: str
    text: str
    example: bool = False

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"

    def commands(self) -> Iterator[list[str]]:
        """The words of each line of a shell block, continued lines joined."""
        for line in self.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield words


def blocks_of(page: Path) -> list[Block]:
    """Every fenced block of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, match.start()) + 1, match[1], match[3], match[2] == " example")
        for match in re.finditer(r"^```(\S*)( example)?\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    ]


def blocks(*languages: str) -> list[Block]:
    """The blocks of all pages in these languages."""
    return [block for page in PAGES for block in blocks_of(page) if block.language in languages]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def commands() -> Iterator[tuple[str, list[str]]]:
    """(where, words after `eyetune`) of every command in a shell block."""
    for block in blocks(*SHELL):
        for words in block.commands():
            if words[0] == "eyetune":
                yield f"{block}: {shlex.join(words)}", words[1:]


# -- the fields of the configuration -----------------------------------------------------------------------------------


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
        lines += [
            f"| `{row.path}` | `{_cell(row.type)}` | {_default(row)} | {_flagged(_cell(row.help))} |" for row in rows
        ]
        lines.append("")
    return "\n".join(lines)


def clip_field_tables() -> str:
    """The same of image-text runs."""
    return re.sub(r"^(### .*)", r"\1 of `kind: clip`", field_tables(ClipConfig), flags=re.MULTILINE)


def _default(flag: Flag) -> str:
    if flag.default is None:
        return "**required**" if flag.path in (Config.REQUIRED, ClipConfig.REQUIRED) else "–"
    value = flag.default
    text = f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)
    return f"`{text.lower() if isinstance(value, bool) else text}`"


def _flagged(text: str) -> str:
    """With its flags as code: two dashes in prose become one long one."""
    return re.sub(r"(?<![`\w-])--[a-z][\w-]*", r"`\g<0>`", text)


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


# -- the commands ------------------------------------------------------------------------------------------------------


def command_reference() -> str:
    """Every command: how it is called, what it is for, its flags; all of it from the commands' own help."""
    from eyetune.cli import app

    made = app.generate_docs(flatten_commands=True, include_hidden=False)
    parts = re.split(r"^# (eyetune .+)$", made, flags=re.MULTILINE)[1:]
    lines: list[str] = []
    for title, text in zip(parts[::2], parts[1::2], strict=True):
        verbs = title.split()[1:]
        one = app
        for verb in verbs:
            one = one[verb]
        usage = re.search(r"```console\n(.*?)\n```(.*?)(?=\n\*\*|\Z)", text, re.DOTALL)
        if usage is None or "**Commands**" in text:  # a group: its commands follow, each by itself
            continue
        shown = one.usage.removeprefix("Usage: ") if isinstance(one.usage, str) else usage[1]
        lines += [f"## `{title}`", "", usage[2].strip(), "", "```text", shown, "```", ""]
        if isinstance(one.help_epilogue, str) and one.help_epilogue != app.help_epilogue:
            # The fields of the configuration are listed on a page of their own.
            lines += ["```text", re.split(r"\n\n(?:model|run):\n", one.help_epilogue)[0].strip(), "```", ""]
        lines += _parameters(text)
    return "\n".join(lines)


def _parameters(text: str) -> list[str]:
    """The flags of a command as a list; values that may be chosen stand beside the flag."""
    items = re.findall(r"^\* (`.+?`)(?:: )?(.*(?:\n    .*)*)", text, re.MULTILINE)
    lines = []
    for name, said in items:
        meaning = " ".join(said.split())
        choices = re.search(r"\s*\*\[choices: (.*?)\]\*", meaning)
        meaning = meaning.replace(choices[0], "") if choices else meaning
        default = re.search(r"\s*\*\[default: (.*?)\]\*", meaning)
        meaning = meaning.replace(default[0], "") if default else meaning
        required = "**[required]**" in meaning
        meaning = meaning.replace("**[required]**", "").strip().replace("<", r"\<")
        words = name.strip("`")
        if choices:
            words = words.replace("CHOICE", choices[1].replace(", ", "|"))
        words = re.sub(r"^([A-Z][A-Z-]*), --[a-z-]+$", r"\1", words)
        notes = ["required"] * required
        if default and default[1] not in ("False", "()"):
            notes.append("default: on" if default[1] == "True" else f"default: `{default[1]}`")
        lines.append(f"- `{words}`: {_flagged(meaning)}" + (f" *({', '.join(notes)})*" if notes else ""))
    return [*lines, ""] if lines else []


# -- the metrics -------------------------------------------------------------------------------------------------------

DIRECTION = {True: "High", False: "Low"}
SOURCE = "Source: {}."
SCOPES = {
    "any": "Classes",
    "ordered": "Classes with an order",
    "graded": "The five grades of diabetic retinopathy",
    "labels": "Several labels",
    "values": "A number",
}


def metric_list() -> str:
    """Every registered metric: what its function says it is, direction, range, when it has no value, its source."""
    from eyetune.metrics.scores import METRICS
    from eyetune.report.glossary import source

    lines: list[str] = []
    for scope, title in SCOPES.items():
        lines += [f"### {title}", ""]
        for name, entry in METRICS:
            if entry.scope != scope:
                continue
            first = " ".join((entry.function.__doc__ or "").strip().split("\n\n")[0].split())
            best = "Describes, ranks nothing" if entry.descriptive else f"{DIRECTION[entry.higher_is_better]} is best"
            said = f"- **`{name}`**: {first} *{best}; {_bound(entry.low)} to {_bound(entry.high)}.*"
            if entry.labels and scope != "labels":
                said += " Of several labels the same mean over labels."
            if why := reasons(entry):
                said += f" No value: {'; '.join(why)}."
            lines.append(f"{said} {SOURCE.format(source(name)) if source(name) else ''}".rstrip())
        lines.append("")
    return "\n".join(lines)


def _bound(value: float) -> str:
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    return f"{value:g}"


def reasons(entry: Any) -> list[str]:
    """Why a metric has no value, found by asking for it where there may be none."""
    from eyetune.metrics.metric import Undefined

    found: dict[str, None] = {}
    for outcomes in poor_outcomes(entry.scope):
        try:
            entry(outcomes)
        except Undefined as reason:
            found[str(reason)] = None
    return list(found)


def poor_outcomes(scope: str) -> list[Any]:
    """Outcomes in which something is missing: a class, a difference, a second image."""
    from eyetune.metrics.labels import LabelOutcomes
    from eyetune.metrics.outcomes import Outcomes
    from eyetune.metrics.values import ValueOutcomes

    sure = np.full((6, 5), 0.05) + 0.75 * np.eye(5)[[0, 1, 2, 3, 4, 0]]
    if scope == "values":
        rising = np.arange(4.0)
        return [
            ValueOutcomes(np.ones(4), rising),
            ValueOutcomes(rising, np.ones(4)),
            ValueOutcomes(np.ones(4), np.ones(4)),
            ValueOutcomes(rising[:1], rising[:1]),
        ]
    if scope == "labels":
        likely = np.full((6, 2), 0.7)
        partly = np.array([[0, -1], [1, -1], [-1, 0], [-1, 1]])
        return [
            LabelOutcomes(np.zeros((6, 2), dtype=np.int64), likely),
            LabelOutcomes(np.ones((6, 2), dtype=np.int64), likely),
            LabelOutcomes(np.zeros((6, 2), dtype=np.int64), 1 - likely),
            LabelOutcomes(partly, likely[:4]),
        ]
    return [
        Outcomes(np.full(6, grade), probabilities)
        for grade in (0, 2)
        for probabilities in (sure, np.full((6, 5), 0.05) + 0.75 * np.eye(5)[[grade] * 6])
    ]


# -- the licences ------------------------------------------------------------------------------------------------------


def licence_table() -> str:
    """The licence of every backbone's weights, and where it stands."""
    lines = ["| backbone | licence of the weights | source | fetched by `--model.weights hub` |", "|---|---|---|---|"]
    for name, spec in BACKBONES:
        names = ", ".join(f"`{one}`" for one in (name, *BACKBONES.aliases(name)))
        fetched = f"`{spec.download.filename}`" if spec.download else ("in the package" if name == "nano" else "no")
        lines.append(f"| {names} | {spec.licence} | {_address(spec.source)} | {fetched} |")
    return "\n".join([*lines, ""])


def _address(source: str) -> str:
    return re.sub(r"https://\S+[^\s,.;)]", lambda found: f"<{found[0]}>", source)


# -- the keys of the older guides --------------------------------------------------------------------------------------


def guide_keys() -> str:
    """Every key of the guides' YAML, what it sets here, and its other spellings."""
    from eyetune.older_config import KEYS

    lines = ["| key | sets here | also written |", "|---|---|---|"]
    for key in KEYS:
        others = ", ".join(f"`{name}`" for name in key.others)
        sets = f"nothing: {key.gone}" if key.gone else key.means or f"`{key.to}`"
        lines.append(f"| `{key.name}` | {_cell(sets)} | {others} |")
    return "\n".join([*lines, ""])


# -- writing -----------------------------------------------------------------------------------------------------------

GENERATED: Mapping[str, Mapping[str, Callable[[], str]]] = {
    "configuration.md": {"fields": field_tables, "clip fields": clip_field_tables},
    "commands.md": {"commands": command_reference},
    "metrics.md": {"metrics": metric_list},
    "licences.md": {"licences": licence_table},
    "older-guides.md": {"keys": guide_keys},
}
"""The parts of the pages that the code writes: page -> name of the part, as in `<!-- NAME: … -->` -> how."""


def written(page: str) -> str:
    """The page with its generated parts as the code says today."""
    text = (DOCS / page).read_text(encoding="utf-8")
    for name, make in GENERATED[page].items():
        part = re.compile(rf"(<!-- {name}:[^\n]*-->\n).*?(<!-- /{name} -->)", re.DOTALL)
        assert part.search(text), f"docs/{page} has lost its <!-- {name} --> markers"
        made = make()
        text = part.sub(lambda match, made=made: f"{match[1]}\n{made}\n{match[2]}", text)  # type: ignore[misc]
    return text


def write() -> list[str]:
    """Write the generated parts anew; returns the pages that changed."""
    changed = []
    for page in GENERATED:
        text = written(page)
        if text != (DOCS / page).read_text(encoding="utf-8"):
            (DOCS / page).write_text(text, encoding="utf-8")
            changed.append(page)
    return changed
