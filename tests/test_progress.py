"""Progress in a pipe and on a terminal."""

from __future__ import annotations

import io
import sys

import pytest

from eyetune import progress
from eyetune.progress import duration, meter, track


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_items_pass_unchanged_and_a_quick_job_says_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track(range(500), description="Counting", unit="sheep")) == list(range(500))
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    assert said.err.startswith("Counting: 500/500 sheep (100%), ")
    assert "sheep/s" in said.err


def test_a_long_job_says_ten_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10_000))  # a second a step
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    list(track(range(100), description="Counting", unit="sheep"))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("(")[1].split("%")[0] for line in lines] == [str(10 * tenth) for tenth in range(1, 11)]
    assert lines[0] == "Counting: 10/100 sheep (10%), 1.0 sheep/s, 1 min 30 s left"


def test_a_slow_job_speaks_up_and_an_unknown_total_is_no_obstacle(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 10_000, 20))  # twenty seconds a step
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    assert list(track(iter("abcd"), description="Reading", unit="files")) == list("abcd")
    assert capsys.readouterr().err.splitlines() == ["Reading: 2 files, 0.1 files/s", "Reading: 4 files, 0.1 files/s"]


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with meter(4, "Drawing") as update:
        update(2)
        update(4)
    assert "Drawing" in screen.getvalue()
    assert "4/4" in screen.getvalue()
    assert "images/s" in screen.getvalue()


def test_a_failure_passes_through() -> None:
    with pytest.raises(ZeroDivisionError):
        for _ in track([1, 2, 3]):
            raise ZeroDivisionError


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.4, "0 s"), (59.7, "1 min 00 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")]
)
def test_duration(seconds: float, said: str) -> None:
    assert duration(seconds) == said
