"""A whole run of `eyetune finetune` in about a second: a tiny network, drawn eyes, a forked child for every try.

The parent imports everything and computes nothing; each child begins where the parent is, so that a try costs a run and
not the imports. Children are killed without ceremony: nothing in them may matter to the parent.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import signal
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import matplotlib.figure
import peft  # noqa: F401 - imported once, for all children
import sklearn.metrics  # noqa: F401
import timm
import torch
import yaml
from torch.utils.tensorboard import SummaryWriter  # noqa: F401

from eyetune.cli import main
from eyetune.data.phantom import write_cohort
from eyetune.metrics import plots, scores  # noqa: F401
from eyetune.train import loop, results
from eyetune.train.rundir import RunDir
from eyetune.train.task import ClassificationTask
from eyetune.verbs import finetune

torch.set_num_threads(1)
timm.create_model("test_vit", img_size=32)
# Drawing is four fifths of so small a run, and its bytes are not compared: a plot is a file of the right name here.
matplotlib.figure.Figure.savefig = lambda self, path, **_: Path(path).write_bytes(b"plot")  # type: ignore[method-assign,assignment]

STRATEGIES: dict[str, dict[str, Any]] = {
    "linear": {"adapt": {"kind": "linear"}, "augment": "none"},
    "gradual": {"adapt": {"kind": "gradual", "phases": [0, 1, "all"], "patience": 1}},
    "full": {"adapt": {"kind": "full"}, "train": {"accumulate": 2}},
    "lora": {"adapt": {"kind": "lora", "r": 2}},
}

#: The story of a run, in the order in which it is told. What is not inside one of the others is "between".
PHASES = ("between", "reading", "describing", "training", "validating", "saving", "predicting", "scoring", "writing")


class Child:
    """A forked child that runs one command line; its output goes to `log`."""

    def __init__(self, words: list[str], log: Path, prepare: Callable[[], None] = lambda: None) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            code = 99
            try:
                handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
                os.dup2(handle, 1)
                os.dup2(handle, 2)
                prepare()
                code = main(words)
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)

    def wait(self) -> int:
        """The exit code; minus the signal's number when one ended it."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None

    def kill(self, signum: int = signal.SIGKILL) -> int:
        """Send a signal and wait for the end."""
        os.kill(self.pid, signum)
        return self.wait()


class Watcher:
    """What phase a child is in, and how often it was there: shared memory that the child's wrapped functions write."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, len(PHASES) + 1)
        self.seconds = mmap.mmap(-1, 8 * len(PHASES))

    @contextmanager
    def inside(self, phase: str) -> Iterator[None]:
        """In the child: the phase while the block runs."""
        before = self.memory[0]
        number = PHASES.index(phase)
        self.memory[0] = number
        self.memory[1 + number] = (self.memory[1 + number] + 1) % 256
        start = time.monotonic()
        try:
            yield
        finally:
            self.memory[0] = before
            self.seconds[8 * number : 8 * number + 8] = struct.pack("d", time.monotonic() - start)

    def wrap(self) -> None:
        """In the child: note the phases of the run to come."""
        for owner, name, phase in (
            (finetune, "prepare_data", "reading"),
            (finetune._Job, "describe", "describing"),
            (loop, "train_epoch", "training"),
            (ClassificationTask, "validate", "validating"),
            (loop._Trainer, "_commit", "saving"),
            (finetune._Job, "score", "predicting"),
            (results, "add_scores", "scoring"),
            (plots, "learning_curves", "writing"),
        ):
            setattr(owner, name, self._noting(getattr(owner, name), phase))

    def _noting(self, function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            with self.inside(phase):
                return function(*arguments, **options)

        return call

    @property
    def phase(self) -> str:
        """Where the child is, or was when it died."""
        return PHASES[self.memory[0]]

    def entries(self, phase: str) -> int:
        """How often it came to a phase."""
        return self.memory[1 + PHASES.index(phase)]

    def duration(self, phase: str) -> float:
        """Seconds the child was in a phase the last time."""
        place = 8 * PHASES.index(phase)
        return float(struct.unpack("d", self.seconds[place : place + 8])[0])

    def reset(self) -> None:
        """Before another child."""
        self.memory[:] = bytes(len(self.memory))


class Toy:
    """One strategy's configuration, its uninterrupted run, and tries at it in folders of their own."""

    def __init__(self, folder: Path, kind: str, *, epochs: int = 3) -> None:
        self.folder = folder / kind
        self.folder.mkdir(parents=True, exist_ok=True)
        eyes = folder / "eyes"
        if not eyes.is_dir():
            write_cohort(eyes, patients=12, size=64, seed=3, workers=1)
        settings = STRATEGIES[kind]
        content = {
            "model": {"backbone": "test_vit", "weights": "random", "pixels": 32},
            "data": {
                "table": str(eyes / "labels.csv"),
                "label_column": "dr_grade",
                "val": 0.25,
                "test": 0.25,
                "cache": str(folder / "cache"),
            },
            "adapt": settings["adapt"],
            "train": {"epochs": epochs, "batch_size": 4, "warmup_epochs": 0, **settings.get("train", {})},
            "augment": settings.get("augment", "light"),
            "workers": 0,
            "precision": "fp32",
            "device": "cpu",
            "seed": 5,
        }
        self.config = self.folder / "config.yaml"
        self.config.write_text(yaml.safe_dump(content))
        self.watcher = Watcher()
        self.whole = self.folder / "whole"
        started = time.monotonic()
        code = self.start(self.whole).wait()
        self.seconds = time.monotonic() - started
        assert code == 0, (self.folder / "whole.log").read_text()
        self.entries = {phase: self.watcher.entries(phase) for phase in PHASES}
        self.durations = {phase: self.watcher.duration(phase) for phase in PHASES}
        self.expected = digest(self.whole)

    def start(self, out: Path, prepare: Callable[[], None] = lambda: None, log: Path | None = None) -> Child:
        """Begin a run in a child."""

        def both() -> None:
            self.watcher.wrap()
            prepare()

        self.watcher.reset()
        return Child(["finetune", str(self.config), "--out", str(out)], log or out.with_suffix(".log"), both)

    def go_on(self, out: Path) -> int:
        """Resume a run that ended too early, or begin it anew where it says that nothing was begun; the exit code."""
        log = out.with_suffix(".resumed.log")
        if not (out / "config.yaml").is_file():
            return Child(["finetune", str(self.config), "--out", str(out)], log).wait()
        return Child(["finetune", "--resume", str(out)], log).wait()

    def faults(self, out: Path) -> list[str]:
        """What differs from the uninterrupted run; empty when nothing does."""
        try:
            found = digest(out)
        except Exception as error:
            return [f"cannot be read: {error!r}"]
        names = sorted(found.keys() | self.expected.keys())
        return [f"{name} differs" for name in names if found.get(name) != self.expected.get(name)]

    def lost(self, out: Path) -> str | None:
        """An epoch that was announced and is not in the last checkpoint; None when there is none."""
        log = out.with_suffix(".log").read_text() if out.with_suffix(".log").is_file() else ""
        announced = max([int(line.split("/")[0].split()[1]) for line in log.splitlines() if is_row(line)], default=0)
        last = RunDir(out).load_last()
        saved = last.state["epochs_done"] if last is not None else 0
        return (
            f"epoch {announced} was announced, the last checkpoint is of epoch {saved}" if saved < announced else None
        )


def is_row(line: str) -> bool:
    """Whether a line of the log is the one that follows a saved epoch."""
    return line.startswith("epoch ") and "train loss" in line


def digest(out: Path) -> dict[str, Any]:
    """All that a run is, but for times: checksums of tensors and predictions, history, metrics, the files there are."""
    run = RunDir(out)
    last = run.load_last()
    assert last is not None
    timing = ("seconds", "images_per_second")
    state = {name: value for name, value in last.state.items() if name != "history"}
    files = sorted(
        str(path.relative_to(out))
        for path in out.rglob("*")
        if path.is_file() and path.relative_to(out).parts[0] != "tensorboard"
    )
    return {
        "files": files,
        "best": tensors(run.load_best().tensors),
        "best card": run.load_best().card,
        "last": tensors(last.tensors),
        "optimizer": tensors(last.optimizer),
        "state": state,
        "history": [{key: value for key, value in row.items() if key not in timing} for row in run.read_history()],
        "metrics": json.loads(run.metrics_file.read_text()),
        "splits": run.splits_file.read_bytes(),
        **{f"predictions {name}": file.read_bytes() for name, file in run.predictions().items()},
        **{f"adapter {file.name}": file.read_bytes() for file in sorted(run.adapter.glob("*"))},
    }


def tensors(content: dict[str, torch.Tensor]) -> str:
    """One checksum of names, types and bits."""
    whole = hashlib.sha256()
    for name in sorted(content):
        tensor = content[name].contiguous().reshape(-1)
        whole.update(f"{name}{tensor.dtype}{tuple(content[name].shape)}".encode())
        whole.update(tensor.view(torch.uint8).numpy().data)
    return whole.hexdigest()
