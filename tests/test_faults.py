"""A little of tests/faults: runs killed at random moments, and stopped by the disk, go on to the same bits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

KILL = Path(__file__).parent / "faults" / "kill.py"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks after torch was imported")
def test_runs_killed_at_random_moments_go_on_to_the_same_bits() -> None:
    done = subprocess.run(
        [sys.executable, str(KILL), "moments", "--tries", "1", "--strategies", "full", "--epochs", "2"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    kills = [line.split("|")[3].split(":")[0] for line in done.stdout.splitlines() if line.startswith("| full |")]
    assert int(kills[-1]) >= 4
