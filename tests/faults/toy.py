"""A whole run of `eyetune finetune` in about a second: a tiny network, drawn eyes, a forked child for every try.

The parent imports everything and computes nothing; each child begins where the parent is, so that a try costs a run and
not the imports. Children are killed without ceremony: nothing in them may matter to the parent.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import hashlib
import io
import json
import mmap
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import peft  # noqa: F401 - imported once, for all children
import sklearn.covariance  # noqa: F401
import torch
import yaml
from PIL import Image
from torch.utils.tensorboard import SummaryWriter  # noqa: F401

import eyetune.backbones.inspection
import eyetune.backbones.loading
import eyetune.data.identical
import eyetune.data.images
import eyetune.data.splits
import eyetune.data.summary
import eyetune.data.tables
import eyetune.memory
import eyetune.report.page
import eyetune.train.cost
import eyetune.train.leaks
import eyetune.train.run  # noqa: F401
from eyetune.adapt.lora import Lora
from eyetune.backbones import find_spec
from eyetune.cli import main
from eyetune.data.phantom import write_cohort
from eyetune.errors import UserError
from eyetune.files import atomic
from eyetune.metrics import plots
from eyetune.metrics.calibration import fit_calibration, trust
from eyetune.metrics.patients import patient_level
from eyetune.metrics.scores import score
from eyetune.pages import page
from eyetune.report import mistakes
from eyetune.train import loop, results
from eyetune.train.rundir import RunDir
from eyetune.train.task import SupervisedTask
from eyetune.verbs import finetune

torch.set_num_threads(1)
find_spec("test_vit").preprocess_at(32)
Image.init()
for template in page._environment().list_templates(["j2"]):
    page._environment().get_template(template)
gc.freeze()  # the children would go through all of it, and copy it
atexit.register(gc.unfreeze)


with io.BytesIO() as _stream:
    Image.new("RGB", (100, 100)).save(_stream, "PNG")
    BLANK = _stream.getvalue()


def blank(*given: Any, **_: Any) -> None:
    """A plot of the right name, with nothing on it: drawing would be most of so small a run."""
    path = next(one for one in given if isinstance(one, Path))
    with atomic(path) as temporary:
        temporary.write_bytes(BLANK)


# Of resampling a kill sees nothing but the time it takes.
for function in (fit_calibration, patient_level, score, trust):
    function.__kwdefaults__["resamples"] = 2  # type: ignore[attr-defined]
for owner, drawings in (
    (plots, ("confusion_matrix", "roc", "learning_curves")),
    (results, ("reliability", "risk_coverage")),
):
    for drawing in drawings:
        setattr(owner, drawing, blank)

STRATEGIES: dict[str, dict[str, Any]] = {
    "linear": {"adapt": {"kind": "linear"}, "augment": "none"},
    "gradual": {"adapt": {"kind": "gradual", "phases": [0, 1, "all"], "patience": 1}},
    "full": {"adapt": {"kind": "full"}, "train": {"accumulate": 2}},
    "lora": {"adapt": {"kind": "lora", "r": 2}},
}

#: The story of a run, in the order in which it is told; "computing" (features, once) exists for linear only. What is
#: not inside one of the others is "between".
PHASES = ("between", "reading", "building", "describing", "computing", "training", "validating", "saving")
PHASES += ("predicting", "scoring", "writing")

#: Changes of phase that a watcher has room for.
CHANGES = 512


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

    def stopped(self) -> bool:
        """Wait until it is stopped (SIGSTOP) and return True; False where it ended before."""
        while (state := Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]) not in "TZ":
            time.sleep(0.001)
        return state == "T"

    def kill(self, signum: int = signal.SIGKILL) -> int:
        """Send a signal and wait for the end."""
        os.kill(self.pid, signum)
        return self.wait()


def signal_me_in(seconds: float, signum: int) -> None:
    """Have the kernel send a signal to this process: to the microsecond, however busy the machine is."""

    class Event(ctypes.Structure):  # sigevent of signal.h
        _fields_ = (
            ("value", ctypes.c_void_p),
            ("signal", ctypes.c_int),
            ("notify", ctypes.c_int),
            ("_", 12 * ctypes.c_int),
        )

    class Timing(ctypes.Structure):  # itimerspec of time.h
        _fields_ = (("every", 2 * ctypes.c_long), ("after", 2 * ctypes.c_long))

    libc, timer = ctypes.CDLL(None, use_errno=True), ctypes.c_void_p()
    event = Event(None, signum, 0)  # SIGEV_SIGNAL
    timing = Timing((0, 0), (int(seconds), max(1, int(seconds % 1 * 1e9))))
    if libc.timer_create(time.CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(timer)) or libc.timer_settime(
        timer, 0, ctypes.byref(timing), None
    ):
        raise OSError(ctypes.get_errno(), "no timer")


class Watcher:
    """What phase a child is in, and how it came there: shared memory that the child's wrapped functions write."""

    def __init__(self) -> None:
        memory = mmap.mmap(-1, 8 * (1 + 2 * CHANGES))
        #: How often the phase changed; then of every change the new phase and the time.
        self.count = np.frombuffer(memory, np.int64, 1)
        self.story = np.frombuffer(memory, np.float64, 2 * CHANGES, offset=8).reshape(CHANGES, 2)
        self.reset()

    def reset(self, aim: tuple[str, int, float] | None = None, signum: int = signal.SIGKILL) -> None:
        """Before another child; with an `aim`, it is killed in a phase (or gets another signal), the nth time (from 0)
        it comes there, some seconds later."""
        self.aim = aim
        self.signum = signum
        self.count[0] = 0

    def _change(self, phase: int) -> None:
        place = self.entries(PHASES[phase])
        self.story[self.count[0]] = phase, time.monotonic()
        self.count[0] += 1
        if self.aim is not None and self.aim[:2] == (PHASES[phase], place):
            signal_me_in(self.aim[2], self.signum)

    @contextmanager
    def inside(self, phase: str) -> Iterator[None]:
        """In the child: the phase while the block runs."""
        before = PHASES.index(self.phase)
        self._change(PHASES.index(phase))
        try:
            yield
        finally:
            self._change(before)

    def wrap(self) -> None:
        """In the child: note the phases of the run to come."""
        self._change(PHASES.index("between"))
        for owner, name, phase in (
            (finetune, "prepare_data", "reading"),
            (finetune, "build_model", "building"),
            (finetune.Job, "describe", "describing"),
            (loop, "compute_once", "computing"),
            (loop, "train_epoch", "training"),
            (SupervisedTask, "validate", "validating"),
            (loop._Trainer, "_commit", "saving"),
            (finetune.Job, "score", "predicting"),
            (results, "add_scores", "scoring"),
            (mistakes, "remember", "writing"),
            (Lora, "write_artifacts", "writing"),
            (plots, "learning_curves", "writing"),
            (finetune.Job, "report", "writing"),
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
        return PHASES[int(self.story[self.count[0] - 1, 0])]

    def entries(self, phase: str) -> int:
        """How often it came to a phase, or back to it."""
        return int((self.story[: self.count[0], 0] == PHASES.index(phase)).sum())

    def stretches(self, end: float) -> list[tuple[str, float]]:
        """After a run that ended at `end`: every phase it went through, one after the other, and its seconds."""
        phases, times = self.story[: self.count[0]].T
        seconds = np.diff(np.append(times, end))
        return [(PHASES[int(phase)], float(length)) for phase, length in zip(phases, seconds, strict=True)]


class Toy:
    """One strategy's configuration, its uninterrupted run, and tries at it in folders of their own."""

    def __init__(self, folder: Path, kind: str, *, epochs: int = 3) -> None:
        self.kind = kind
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
        #: What a run goes through, see Watcher.stretches.
        self.stretches = self.watcher.stretches(started + self.seconds)
        self.expected = digest(self.whole)

    def words(self, out: Path) -> list[str]:
        """The command line of a run, which has a cache of its own: all is done as if for the first time."""
        return ["finetune", str(self.config), "--out", str(out), "--data.cache", f"{out}.cache"]

    def start(
        self,
        out: Path,
        prepare: Callable[[], None] = lambda: None,
        log: Path | None = None,
        aim: tuple[str, int, float] | None = None,
        signum: int = signal.SIGKILL,
    ) -> Child:
        """Begin a run in a child; for `aim` and `signum` see Watcher.reset."""
        self.watcher.reset(aim, signum)
        return self._child(self.words(out), log or out.with_suffix(".log"), prepare)

    def _child(self, words: list[str], log: Path, prepare: Callable[[], None]) -> Child:
        def both() -> None:
            self.watcher.wrap()
            prepare()

        return Child(words, log, both)

    def clear(self, out: Path) -> None:
        """Remove a run and what lies beside it."""
        for folder in (out, Path(f"{out}.cache")):
            shutil.rmtree(folder, ignore_errors=True)
        for log in out.parent.glob(f"{out.name}.*log"):
            log.unlink()

    def go_on(self, out: Path, aim: tuple[str, int, float] | None = None) -> Child:
        """Resume a run that ended too early, or begin it anew where it says that nothing was begun."""
        begun = (out / "config.yaml").is_file()
        words = ["finetune", "--resume", str(out)] if begun else self.words(out)
        self.watcher.reset(aim)
        return self._child(words, out.with_suffix(".log"), lambda: None)

    def faults(self, out: Path) -> list[str]:
        """What differs from the uninterrupted run; empty when nothing does."""
        try:
            found = digest(out)
        except Exception as error:
            return [f"cannot be read: {error!r}"]
        names = sorted(found.keys() | self.expected.keys())
        return [f"{name} differs" for name in names if found.get(name) != self.expected.get(name)]

    def lost(self, out: Path) -> str | None:
        """An epoch that was announced and is not in the last checkpoint; None when all is there."""
        log = out.with_suffix(".log").read_text() if out.with_suffix(".log").is_file() else ""
        announced = max([int(line.split("/")[0].split()[1]) for line in log.splitlines() if is_row(line)], default=0)
        saved = self.saved(out)
        return (
            f"epoch {announced} was announced, the last checkpoint is of epoch {saved}" if saved < announced else None
        )

    def saved(self, out: Path) -> int:
        """How many epochs the last checkpoint has; -1 where it cannot be read."""
        try:
            last = RunDir(out).load_last()
        except UserError:
            return -1
        return last.state["epochs_done"] if last is not None else 0


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
        "calibration": run.calibration_file().read_bytes(),  # with the checksum of its tensors
        "data": run.read_data(),
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
