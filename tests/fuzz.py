"""Fuzzing with atheris: mutated files through every door, guided by the branches they reach.

    pip install atheris
    python tests/fuzz.py image -max_total_time=300        # table jsonl image dicom config checkpoint

Not part of the suite. What follows the target goes to libFuzzer. Whatever is no UserError, takes more than ten seconds
or more than 2 GB stops it, and the input is left in the current folder as crash-…, timeout-… or oom-…; give that file
in place of the flags to see it again.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris
import torch  # noqa: F401 - before the instrumentation, which is for our code and the decoders in Python

with atheris.instrument_imports(include=["eyetune", "PIL", "pydicom", "yaml"]):
    from fuzz_kit import TARGETS, room


def main() -> None:
    """One target, until libFuzzer's flags or a finding end it."""
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"usage: python tests/fuzz.py {{{','.join(TARGETS)}}} [libFuzzer flags]")
    target = TARGETS[sys.argv[1]]
    with room() as folder, tempfile.TemporaryDirectory() as corpus:
        for number, content in enumerate(target.seeds()):
            (Path(corpus) / str(number)).write_bytes(content)
        flags = ["-timeout=10", "-rss_limit_mb=2048", "-max_len=20000", *sys.argv[2:]]
        again = any(not flag.startswith("-") for flag in sys.argv[2:])
        atheris.Setup(
            [sys.argv[0], *flags, *([] if again else [corpus])], lambda content: target.run(content, folder) and None
        )
        atheris.Fuzz()


if __name__ == "__main__":
    main()
