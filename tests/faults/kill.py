"""Kill a run with SIGKILL, go on with it, and compare it with one that nobody disturbed: bit for bit, in float32.

    python tests/faults/kill.py moments --tries 100      # random moments in every phase of every strategy
    python tests/faults/kill.py calls                    # before every system call of a save that changes the disk

The second needs strace. `--work` names a folder for the runs (a fresh one in /tmp by default). Prints a Markdown table
and leaves with 1 when anything was lost or came out otherwise. tests/test_faults.py does a little of the first.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from toy import PHASES, STRATEGIES, Toy

from eyetune.train import loop

#: What changes names or contents on the disk.
CALLS = ["write", "pwrite64", "writev", "fsync", "fdatasync", "ftruncate"]
CALLS += ["rename", "renameat", "renameat2", "link", "unlink", "unlinkat", "mkdir", "mkdirat", "rmdir"]
#: Opened to be written.
OPENING = "openat"


class Moments:
    """Kills at random moments of every phase of one strategy's run.

    A run is killed once in each phase, in the order of the story, going on in between; then it has to end like one that
    was never disturbed. An epoch is drawn for training, validating and saving, and which of them comes first.
    """

    def __init__(self, toy: Toy, quota: int, seed: int = 0, phases: Sequence[str] = PHASES) -> None:
        self.toy = toy
        self.quota = quota
        self.rng = random.Random(seed)
        #: For every phase the seconds that a run spends in it, each time it comes there.
        self.stretches: dict[str, list[float]] = {}
        for phase, seconds in toy.stretches:
            self.stretches.setdefault(phase, []).append(seconds)
        #: The phases to be killed in.
        self.aims = [phase for phase in phases if phase in self.stretches]
        self.killed: Counter[str] = Counter()
        self.runs = 0
        self.faults: list[str] = []

    def step(self) -> bool:
        """One run with all its kills; False when every phase has its quota.

        A phase may last a millisecond: a kill that comes too late counts where it fell, and there are up to three times
        as many runs as the quota to make up for it.
        """
        if self.runs == 3 * self.quota or all(self.killed[phase] >= self.quota for phase in self.aims):
            return False
        out = self.toy.folder / f"moments{self.runs}"
        self.runs += 1
        go_on = self.toy.start
        for phase, epoch in self._plan():
            place = self._draw(phase) if epoch is None else max(0, epoch - self.toy.saved(out))
            seconds = self.stretches[phase]
            known = min(place, len(seconds) - 1)
            code = go_on(out, aim=(phase, place, self.rng.random() * seconds[known])).wait()
            fell = self.toy.watcher.phase if code == -signal.SIGKILL else None
            lasted = [length for name, length in self.toy.watcher.stretches(time.monotonic()) if name == phase]
            if fell != phase and place < len(lasted):  # too late: other work made the first measurement a long one
                seconds[known] = min(seconds[known], lasted[place])
            if fell is not None:
                self.killed[fell] += 1
            elif code:
                self.faults.append(f"{out.name}, {phase}: going on left with {code}, see {out}.log")
            if lost := self.toy.lost(out):
                self.faults.append(f"{out.name}, {phase}: {lost}")
            go_on = self.toy.go_on
        self.faults += [f"{out.name}: {fault}" for fault in aftermath(self.toy, out)]
        return True

    def _plan(self) -> list[tuple[str, int | None]]:
        """The phases to be killed in, and the epoch (from 0) where there is one for each."""
        early, late = ["reading", "building", "describing", "computing"], ["predicting", "scoring", "writing"]
        middle = self.rng.sample(["training", "validating", "saving"], 3)
        epochs = sorted(self.rng.randrange(len(self.stretches["training"])) for _ in middle)
        plan: list[tuple[str, int | None]] = [(phase, None) for phase in early]
        plan += [*zip(middle, epochs, strict=True), *((phase, None) for phase in late)]
        plan.insert(self.rng.randint(0, len(plan)), ("between", None))
        return [(phase, epoch) for phase, epoch in plan if self.killed[phase] < self.quota and phase in self.aims]

    def _draw(self, phase: str) -> int:
        """The how manieth time in `phase` (from 0) a random moment of it falls into."""
        seconds = self.stretches[phase]
        return self.rng.choices(range(len(seconds)), seconds)[0]

    def row(self) -> str:
        """What was done, as a row of a table."""
        where = ", ".join(f"{phase} {self.killed[phase]}" for phase in PHASES if phase in self.stretches)
        return f"| {self.toy.kind} | {self.runs} | {self.killed.total()}: {where} | {len(self.faults)} |"


def aftermath(toy: Toy, out: Path) -> list[str]:
    """Go on with a run that was killed, and say what is wrong; the folder is removed where nothing is."""
    lost = toy.lost(out)
    code = toy.go_on(out).wait()
    faults = [lost] if lost else []
    faults += toy.faults(out) if code == 0 else [f"resuming left with {code}, see {out}.log"]
    if not faults:
        toy.clear(out)
    return faults


def calls(toy: Toy, commit: int, only: Callable[[int], bool] = lambda number: True) -> tuple[int, list[str]]:
    """Kill before every system call that changes the disk, from the `commit`th save (0: the start) to the end of a run.

    Returns how many kills there were, and what was wrong afterwards.
    """
    out = toy.folder / f"save{commit}"
    kills, faults = 0, []
    places = points(toy, out, commit)
    for number, (call, nth) in enumerate(places):
        if number % 50 == 0:  # it takes long: how far it is
            print(f"{toy.kind}: {number} of {len(places)} calls, {kills} kills, {len(faults)} faults", flush=True)
        if only(number):
            kills += traced(toy, out, commit, injecting(call, nth, "signal=KILL")) == -signal.SIGKILL
            faults += [f"save {commit}, {call} {nth}: {fault}" for fault in aftermath(toy, out)]
    return kills, faults


def points(toy: Toy, out: Path, commit: int) -> list[tuple[str, int]]:
    """Every system call that changes the run folder `out`, from the `commit`th save on: its name, and the how manieth
    of this name it is."""
    trace = toy.folder / "trace.txt"
    code = traced(toy, out, commit, ["-y", "-o", str(trace), "-e", f"trace={','.join([OPENING, *CALLS])}"])
    assert code == 0, f"the traced run left with {code}"
    assert not toy.faults(out)
    toy.clear(out)
    seen: Counter[str] = Counter()
    found = []
    inside = re.compile(re.escape(str(out)) + '[/>"]')
    lines = trace.read_text().splitlines()
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        match = re.match(r"(?:\d+ +)?(\w+)\(", line)
        if match is None:
            continue
        seen[match[1]] += 1
        opened = line.rpartition("= ")[2]  # a file or a folder may be opened only to be synced
        changes = match[1] != OPENING or re.search("O_CREAT|O_WRONLY|O_RDWR", line) or f"fsync({opened})" in following
        if changes and inside.search(line):
            found.append((match[1], seen[match[1]]))
    return found


def injecting(call: str, nth: int, what: str) -> list[str]:
    """Options of strace: let something happen at the `nth` call."""
    return ["-o", "/dev/null", "-e", f"trace={call}", "-e", f"inject={call}:{what}:when={nth}"]


def traced(toy: Toy, out: Path, commit: int, options: list[str]) -> int:
    """A run that strace follows from the beginning of its `commit`th save, or from its own (0); its exit code."""

    def pause() -> None:
        if commit == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
        original = loop._Trainer._commit
        done = 0

        def paused(*arguments: object) -> None:
            nonlocal done
            done += 1
            if done == commit:
                os.kill(os.getpid(), signal.SIGSTOP)
            original(*arguments)  # type: ignore[arg-type]

        loop._Trainer._commit = paused  # type: ignore[method-assign,assignment]

    toy.clear(out)
    child = toy.start(out, pause)
    assert child.stopped()
    # Only the main thread: TensorBoard writes from its own, and counts would differ from run to run.
    strace = subprocess.Popen(["strace", "-p", str(child.pid), *options], stderr=subprocess.PIPE, text=True)
    assert strace.stderr is not None
    select.select([strace.stderr], [], [], 10)
    said = strace.stderr.readline()
    assert "attached" in said, said
    os.kill(child.pid, signal.SIGCONT)
    code = child.wait()
    strace.communicate()
    return code


def run() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("moments", "calls"))
    parser.add_argument("--tries", type=int, default=100, help="moments: how many in each phase of a strategy")
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=list(STRATEGIES))
    parser.add_argument("--phases", nargs="+", default=list(PHASES), choices=PHASES, help="moments: only in these")
    parser.add_argument("--saves", nargs="+", type=int, default=[1], help="calls: from which save on (0: the start)")
    parser.add_argument("--every", type=int, default=1, help="calls: only every so many")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path)
    chosen = parser.parse_args()
    work = chosen.work or Path(tempfile.mkdtemp(prefix="eyetune-kill-"))
    toys = [Toy(work, kind, epochs=chosen.epochs) for kind in chosen.strategies]
    wrong: list[str] = []
    rows = []
    if chosen.what == "moments":
        under_way = everything = [Moments(toy, chosen.tries, chosen.seed, chosen.phases) for toy in toys]
        tries = 0
        while under_way:
            under_way = [moments for moments in under_way if moments.step()]
            tries += 1
            if tries % 5 == 0:  # it takes an hour: what is known so far
                print("\n".join(moments.row() for moments in everything), flush=True)
        wrong = [f"{moments.toy.kind} {fault}" for moments in everything for fault in moments.faults]
        head = "| strategy | runs | kills | faults |\n|---|---|---|---|"
        rows = [moments.row() for moments in everything]
    else:
        head = "| strategy | before every call from save | kills | faults |\n|---|---|---|---|"
        for toy in toys:
            for save in chosen.saves:
                kills, faults = calls(toy, save, lambda number: number % chosen.every == 0)
                rows.append(f"| {toy.kind} | {save} | {kills} | {len(faults)} |")
                print(rows[-1], *faults, sep="\n", flush=True)
                wrong += [f"{toy.kind}: {fault}" for fault in faults]
    print(head, *rows, *wrong, sep="\n")
    if not wrong and chosen.work is None:
        shutil.rmtree(work)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(run())
