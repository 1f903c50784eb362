"""Arbitrary bytes through every door: a value or a UserError; no crash, no hang, no code run, memory within bounds.

The fuzzer `fuzz.py` goes further through the same doors, by hand.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz_kit import TARGETS, room
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eyetune.backbones.opening import open_checkpoint
from eyetune.config import Config
from eyetune.data.records import Manifest
from eyetune.errors import ConfigError, DataError, UserError, WeightsError

# The same examples every time, and as many as a fast suite can bear; fuzz.py is for more.
FIXED = settings(derandomize=True, max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with room() as place:
        yield place


@st.composite
def mutated(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A small valid file with bytes changed, cut out, repeated, or another file's in their place."""
    content = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, max(0, len(content) - 1)))
        length = draw(st.integers(0, 16))
        part = draw(
            st.one_of(
                st.binary(max_size=16),
                st.just(b""),
                st.just(bytes(content[start : start + length]) * 50),
                st.sampled_from([b"\xff\xff\xff\x7f", b"\0\0\0\0", b"\xff" * 8, b"-1", b"9" * 5000, b"[" * 5000]),
                st.sampled_from(seeds).map(lambda other: other[:200]),
            )
        )
        content[start : start + length] = part
    return bytes(content[: draw(st.integers(len(content) // 2, len(content)))])


@pytest.mark.parametrize("name", TARGETS)
def test_the_seeds_are_valid(name: str, folder: Path) -> None:
    target = TARGETS[name]
    assert target.run(target.seeds()[0], folder) is None


@pytest.mark.parametrize("name", TARGETS)
def test_arbitrary_bytes(name: str, folder: Path) -> None:
    @FIXED
    @given(st.binary(max_size=300))
    def check(content: bytes) -> None:
        TARGETS[name].run(content, folder)

    check()


@pytest.mark.parametrize("name", TARGETS)
def test_mutated_files(name: str, folder: Path) -> None:
    said: set[bool] = set()

    @FIXED
    @given(mutated(TARGETS[name].seeds()))
    def check(content: bytes) -> None:
        said.add(TARGETS[name].run(content, folder) is None)

    check()
    assert False in said


CELLS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    [
        "a.png",
        "../a.png",
        "/",
        "0",
        "1",
        "-0",
        "1e999",
        "٣",
        "²",
        "9" * 5000,
        "nan",
        "none",
        "left",
        "test",
        "\x00",
        "CON",
    ]
)


def test_any_cells_in_a_table(folder: Path) -> None:
    @FIXED
    @given(st.lists(st.lists(CELLS, min_size=3, max_size=3), max_size=6), st.booleans())
    def check(rows: list[list[str]], required: bool) -> None:
        lines = "\n".join(json.dumps(dict(zip(("image", "label", "patient"), row, strict=True))) for row in rows)
        (folder / "t.jsonl").write_text(lines, encoding="utf-8")
        try:
            found = Manifest.from_table(folder / "t.jsonl", labels_required=required)
        except UserError:
            return
        assert len(found) == len(rows)
        assert all(label is None or 0 <= label < len(found.classes) for label in found.labels)

    check()


@pytest.mark.parametrize(
    "line",
    ['{"image": ' + "[" * 100_000, '{"image": ' + "9" * 5000 + "}", '{"image": "\\ud800"}', '{"image": "a\\u0000"}'],
    ids=["deep", "digits", "half a pair", "zero"],
)
def test_lines_that_python_chokes_on(tmp_path: Path, line: str) -> None:
    (tmp_path / "t.jsonl").write_text(line)
    with pytest.raises(DataError, match="line 1"):
        Manifest.from_table(tmp_path / "t.jsonl")


def test_utf_16_and_very_wide_tables(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("image,label\na.png,1\n", encoding="utf-16-le")
    with pytest.raises(DataError, match="UTF-16"):
        Manifest.from_table(tmp_path / "t.csv")
    names = ",".join(f"column {number}" for number in range(20_000))
    (tmp_path / "t.csv").write_text(f"{names}\n1\n")
    with pytest.raises(DataError, match="image") as caught:
        Manifest.from_table(tmp_path / "t.csv", image_column="x" * 100_000, labels_required=False)
    assert len(str(caught.value)) < 110_000


# Configurations


def laughs(levels: int) -> str:
    lines = ["a0: &a0 [1, 1]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, levels))]
    return "\n".join([*lines, f"data: {{table: t.csv, classes: *a{levels - 1}}}"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (laughs(40), "unfolds"),
        ("data: &d {table: *d}", "unfolds"),
        ("data: {table: " + "[" * 2000, "cannot be read|not YAML"),
        ("seed: " + "9" * 5000, "cannot be read"),
        ("out: 2026-99-99", "cannot be read"),
        ("x: " + "y" * 300_000, "longer than any"),
        ("!!python/object/apply:os.system [touch harm]", "not YAML"),
        ("? {a: 1}\n: 2", "not YAML|cannot be read"),
    ],
    ids=["laughs", "itself", "deep", "digits", "day", "long", "code", "key"],
)
def test_configurations_that_are_traps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, said: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        Config.from_yaml(tmp_path / "c.yaml", check_files=False)
    assert os.listdir(tmp_path) == ["c.yaml"]


def test_aliases_as_people_use_them(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("data: {table: &t t.csv, images: *t}\ntrain: {epochs: 3}\n")
    assert Config.from_yaml(tmp_path / "c.yaml", check_files=False).data.images == Path("t.csv")


# Weights


class Calls:
    """Pickles as a call of `function`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def archive(described: bytes, *, compression: int = zipfile.ZIP_STORED, stored: bytes = bytes(16)) -> bytes:
    """A torch file of a pickle and one storage."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as made:
        for name, content in (("data.pkl", described), ("version", b"3\n"), ("data/0", stored)):
            made.writestr(f"archive/{name}", content)
    return stream.getvalue()


def described() -> bytes:
    stream = io.BytesIO()
    torch.save({"w": torch.zeros(4)}, stream)
    with zipfile.ZipFile(stream) as made:
        return made.read("archive/data.pkl")


def legacy(described: bytes) -> bytes:
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    head = [pickle.dumps(part, protocol=2) for part in (0x1950A86A20F9469CFC6C, 1001, system)]
    return b"".join([*head, described])


def safetensors(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header


def asks(function: Callable[..., Any], *arguments: Any) -> bytes:
    return pickle.dumps({str(n): Calls(function, *arguments) for n in range(20)}, protocol=2)


def claim(shape: list[int], end: int) -> bytes:
    return safetensors(json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}).encode())


BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "packed storage": (lambda: archive(described(), compression=zipfile.ZIP_DEFLATED, stored=bytes(1 << 26)), "packed"),
    "packed pickle": (lambda: archive(described() + bytes(1 << 26), compression=zipfile.ZIP_DEFLATED), "packed"),
    "bytearray": (lambda: archive(asks(bytearray, 10**10)), "without measure"),
    "bytearray, old": (lambda: legacy(asks(bytearray, 10**10)), "without measure"),
    "tensor": (lambda: archive(asks(torch.Tensor, 10**13)), "cut short or damaged"),
    "marks": (lambda: archive(b"\x80\x02" + b"(" * 1_200_000 + b"}."), "without measure"),
    "many words": (lambda: archive(b"\x80\x02" + b"}0" * 6_000_000 + b"}."), "too many words"),
    "slow codec": (lambda: archive(asks(__import__("_codecs").encode, "ä" * 1000, "punycode")), "without measure"),
    "a terabyte": (lambda: claim([1 << 38], 1 << 40), "cut short"),
    "overflow": (lambda: claim([1 << 40, 1 << 40], 0), "cut short"),
    "a long header": (lambda: struct.pack("<Q", 1 << 40) + b'{"a":', "not a checkpoint"),
    "a deep header": (lambda: safetensors(b'{"a":' + b"[" * 1_000_000), "cut short"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_small_weights_that_would_unpack_to_gigabytes(tmp_path: Path, name: str) -> None:
    make, said = BOMBS[name]
    path = tmp_path / "weights.pth"
    path.write_bytes(make())
    with pytest.raises(WeightsError, match=said) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)


def test_one_mapping_a_hundred_thousand_times(tmp_path: Path) -> None:
    inner = {str(number): torch.zeros(1) for number in range(100)}
    torch.save({str(number): inner for number in range(30_000)}, tmp_path / "a.pth")
    assert len(open_checkpoint(tmp_path / "a.pth").containers()) == 1


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.pth")
    with pytest.raises(WeightsError, match="a pipe"):
        open_checkpoint(tmp_path / "a.pth")
    os.mkfifo(tmp_path / "c.yaml")
    with pytest.raises(ConfigError, match="not a configuration"):
        Config.from_yaml(tmp_path / "c.yaml")
