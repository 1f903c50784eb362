"""The tutorials run as they stand: every command, every block of Python, and what they say comes out.

A page is run top to bottom in one folder that all share, with its shell, Python and YAML blocks:

- a line of a shell block is `eyetune …`, and leaves with the exit code that `# exit code N` behind it names, else 0;
  what has `# until Ctrl-C` behind it is not run (tests/test_docs.py looks at its flags);
- a YAML block whose first line is `# NAME.yaml` is saved under that name;
- the lines of a `text` block come out of the blocks since the last one, in that order: words are the same, `…` stands
  for anything, decimals may differ by a little. `text example` is shown only.

A command that another page has run already is not run again.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from docs_kit import DOCS, ROOT, SHELL, Block, blocks_of, prose

from eyetune.cli import main
from eyetune.metrics import paired
from eyetune.train import results

pytestmark = pytest.mark.slow

TUTORIALS = sorted(DOCS.glob("tutorial-*.md"))
NEEDS = {
    "tutorial-strategies": ["tutorial-own-csv"],
    "tutorial-hospitals": ["tutorial-own-csv"],
    "tutorial-clinic": ["tutorial-own-csv", "tutorial-hospitals"],
}
"""The pages that have to be gone through first, as their second paragraph says."""

RESAMPLES = 50
"""For intervals, in place of 2,000: they take most of the time, and their ends move by less than what is compared."""

LITTLE = 0.12
"""Decimals of another machine may differ by so much: another bf16, another best epoch."""


class Reader:
    """Somebody who goes through the pages in one folder."""

    def __init__(self) -> None:
        self.done: set[str] = set()
        self.said = ""
        self.answers: dict[str, str] = {}

    def go_through(self, page: str) -> None:
        if page in self.done:
            return
        for other in NEEDS.get(page, []):
            self.go_through(other)
        names: dict[str, Any] = {"__name__": page}
        for block in blocks_of(DOCS / f"{page}.md"):
            self.follow(block, names)
        self.done.add(page)

    def follow(self, block: Block, names: dict[str, Any]) -> None:
        if block.language in SHELL:
            for line in block.text.replace("\\\n", " ").splitlines():
                self.said += self.command(line, str(block))
        elif block.language == "python":
            with heard() as said:
                exec(compile(block.text, str(block), "exec"), names)
            self.said += said()
        elif block.language == "yaml" and (name := re.match(r"# ([\w-]+\.yaml)\n", block.text)):
            Path(name[1]).write_text(block.text, encoding="utf-8")
        elif block.language == "text" and not block.example:
            missing = unlike(block.text, self.said)
            assert missing is None, f"{block}: this did not come out:\n{missing}\n\nwhat came out:\n{self.said}"
            self.said = ""

    def command(self, line: str, where: str) -> str:
        if line in self.answers:
            return self.answers[line]
        if line.endswith("# until Ctrl-C"):
            return ""
        [words] = Block(DOCS, 0, "bash", line).commands()
        assert words[0] == "eyetune", f"{where}: only eyetune is run: {line}"
        expected = re.search(r"# exit code (\d)", line)
        with heard() as said:
            code = main(words[1:])
        assert code == int(expected[1] if expected else 0), f"{where}: {line}\nleft with {code}:\n{said()}"
        self.answers[line] = said()
        return self.answers[line]


@contextlib.contextmanager
def heard() -> Iterator[Any]:
    """What goes to stdout and stderr, as text."""
    into = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)

    def said() -> str:
        return into.buffer.getvalue().decode()  # type: ignore[attr-defined]

    with contextlib.redirect_stdout(into), contextlib.redirect_stderr(into):
        yield said


def unlike(shown: str, said: str) -> str | None:
    """The first shown line that is not among what was said, behind those before it; None when all are."""
    lines = iter(said.splitlines())
    for line in filter(str.strip, shown.splitlines()):
        if line.strip() != "…" and not any(alike(line, other) for other in lines):
            return line
    return None


def alike(shown: str, said: str) -> bool:
    """Whether a line says what another shows: the same words, decimals nearly the same, anything at `…`."""
    words, others = shown.split(), said.split()
    while words and others and "…" not in words[0]:
        if not same(words.pop(0), others.pop(0)):
            return False
    if not words or not others:
        return words == others or words == ["…"]
    return any(alike(" ".join(words[1:]), " ".join(others[start:])) for start in range(len(others) + 1))


def same(shown: str, said: str) -> bool:
    pattern = r"-?\d+\.\d+"
    if re.sub(pattern, "0.0", shown) != re.sub(pattern, "0.0", said):
        return False
    pairs = zip(re.findall(pattern, shown), re.findall(pattern, said), strict=True)
    return all(abs(float(one) - float(other)) <= LITTLE for one, other in pairs)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("reader"))
        for function in (results.score, results.trust, results.patient_level, paired.resampled_means):
            assert function.__kwdefaults__["resamples"] == 2000
            patch.setitem(function.__kwdefaults__, "resamples", RESAMPLES)
        patch.setattr(sys, "argv", ["eyetune"])
        # Plots take as long as all the rest, and no page shows one: tests of their own draw them.
        patch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **how: Path(path).touch())
        yield Reader()


def test_every_tutorial_is_in_order() -> None:
    assert {page.stem for page in TUTORIALS} >= {*NEEDS, "tutorial-image-text"}
    for page, needed in NEEDS.items():
        text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
        assert all(f"({other}.md)" in text for other in needed)


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_a_tutorial_runs(reader: Reader, page: Path) -> None:
    reader.go_through(page.stem)


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (
            "new_site.py runs/first elsewhere/labels.csv elsewhere/images",
            "grade >= 2 at 95% specificity: positive from",
        ),
        ("own_csv.py elsewhere/labels.csv elsewhere/images runs/own", "Read runs/own/report.html"),
    ],
    ids=["new_site", "own_csv"],
)
def test_an_example_runs(reader: Reader, words: str, answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reader.go_through("tutorial-hospitals")
    monkeypatch.setattr(sys, "argv", words.split())
    with heard() as said:
        runpy.run_path(str(ROOT / "examples" / words.split(maxsplit=1)[0]), run_name="__main__")
    assert answer in said()


def test_every_number_is_explained(reader: Reader) -> None:
    """Whatever stands as a number in what the tutorials wrote has its place in docs/metrics.md, or configuration.md."""
    for page in TUTORIALS:
        reader.go_through(page.stem)
    words: set[str] = {"schema", "batch", "grade_at_least"}  # no results
    for name in ("metrics.md", "configuration.md"):
        words |= set(re.findall(r"[\w-]+", " ".join(re.findall(r"`([^`\n]+)`", prose(DOCS / name)))))
    files = [file for file in Path("runs").glob("*/*.json") if file.name in RESULTS]
    files.append(Path("runs/first/calibration/handheld.json"))
    seen = {name for file in files for name in numbers(json.loads(file.read_text("utf-8")))}
    assert len(seen) > 60
    assert sorted(name for name in seen - words if not re.fullmatch(r"[\d.]+", name)) == []


RESULTS = ("metrics.json", "calibration.json", "comparison.json")


def numbers(content: Any, name: str = "") -> Iterator[str]:
    """The names of what is a number, or {"value": …}, at any depth."""
    if isinstance(content, dict):
        if "value" in content and name:
            yield name
        for key, value in content.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                yield key
            yield from numbers(value, key)
    elif isinstance(content, list):
        for value in content:
            yield from numbers(value)


def test_what_did_not_come_out_is_missed() -> None:
    said = "one 0.50 two\nthree 240 images, 7 s.\nend"
    assert unlike("one 0.55 two\nend", said) is None
    assert unlike("three 240 images, …\n", said) is None
    assert unlike("… images, 7 s.", said) is None
    assert unlike("one 0.80 two", said) == "one 0.80 two"
    assert unlike("three 241 images, …", said) == "three 241 images, …"
    assert unlike("end\none 0.50 two", said) == "one 0.50 two"
