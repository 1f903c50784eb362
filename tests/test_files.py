"""Writing: whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from eyetune.errors import UserError
from eyetune.files import atomic, sha256, write_json, write_text


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    target = tmp_path / "metrics.json"
    write_text(target, "old")
    with pytest.raises(RuntimeError), atomic(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["metrics.json"]


def test_colleagues_can_read_what_is_written(tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        write_text(tmp_path / "a.txt", "x")
    finally:
        os.umask(mask)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(("code", "words"), [(errno.ENOSPC, "disk is full"), (errno.EACCES, "no permission")])
def test_the_message_names_the_path_and_the_remedy(tmp_path: Path, code: int, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught, atomic(tmp_path / "x.bin"):
        raise OSError(code, os.strerror(code))
    assert str(tmp_path / "x.bin") in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_json_refuses_what_json_cannot_say(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range"):
        write_json(tmp_path / "m.json", {"auroc": float("nan")})
    assert os.listdir(tmp_path) == []


def test_sha256(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "abc")
    assert sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
