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
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from toy import PHASES, STRATEGIES, Toy

#: What changes names or contents on the disk.
CALLS = ["write", "pwrite64", "writev", "fsync", "fdatasync", "ftruncate"]
CALLS += ["rename", "renameat", "renameat2", "link", "unlink", "unlinkat", "mkdir", "mkdirat", "rmdir"]
#: Opened to be written.
OPENING = "openat"


def moments(toy: Toy, tries: int, seed: int = 0) -> tuple[Counter[str], list[str]]:
    """Kill at random moments, as many in each phase; returns kills a phase, and what was wrong afterwards."""
    rng = random.Random(seed)
    killed: Counter[str] = Counter()
    faults: list[str] = []
    phases = [phase for phase in PHASES if phase != "between"]
    for number in range(tries):
        out = toy.folder / f"moment{number}"
        wanted = phases[number % len(phases)]
        entry = rng.randint(1, toy.entries[wanted])
        child = toy.start(out)
        code = None
        while code is None and toy.watcher.entries(wanted) < entry:
            code = child.poll()
            time.sleep(0.0005)
        if code is None:
            time.sleep(rng.random() * toy.durations[wanted])
            code = child.kill()
            where = toy.watcher.phase
        if code == -signal.SIGKILL:
            killed[where] += 1
        faults += [f"{number}: {fault}" for fault in aftermath(toy, out)]
    return killed, faults


def aftermath(toy: Toy, out: Path) -> list[str]:
    """Go on with a run that was killed, and say what is wrong; the folder is removed where nothing is."""
    lost = toy.lost(out) if (out / "config.yaml").is_file() else None
    code = toy.go_on(out)
    faults = [lost] if lost else []
    faults += toy.faults(out) if code == 0 else [f"resuming left with {code}, see {out}.resumed.log"]
    if not faults:
        shutil.rmtree(out)
        for log in out.parent.glob(f"{out.name}.*log"):
            log.unlink()
    return faults


def calls(toy: Toy, commit: int, only: Callable[[int], bool] = lambda number: True) -> tuple[int, list[str]]:
    """Kill before every system call that changes the disk, from the `commit`th save (from 1) to the end of the run.

    Returns how many kills there were, and what was wrong afterwards.
    """
    out = toy.folder / f"save{commit}"
    kills, faults = 0, []
    for number, (call, nth) in enumerate(points(toy, out, commit)):
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
    shutil.rmtree(out)
    seen: Counter[str] = Counter()
    found = []
    for line in trace.read_text().splitlines():
        match = re.match(r"(?:\d+ +)?(\w+)\(", line)
        if match is None:
            continue
        seen[match[1]] += 1
        # A folder is opened to be synced.
        changes = match[1] != OPENING or re.search("O_CREAT|O_WRONLY|O_RDWR", line) or line.endswith(f"<{out}>")
        if changes and f"{out}/" in line:
            found.append((match[1], seen[match[1]]))
    return found


def injecting(call: str, nth: int, what: str) -> list[str]:
    """Options of strace: let something happen at the `nth` call."""
    return ["-o", "/dev/null", "-e", f"trace={call}", "-e", f"inject={call}:{what}:when={nth}"]


def traced(toy: Toy, out: Path, commit: int, options: list[str]) -> int:
    """A run that strace follows from the beginning of its `commit`th save; its exit code."""

    def pause() -> None:
        from eyetune.train import loop

        original = loop._Trainer._commit
        done = 0

        def paused(*arguments: object) -> None:
            nonlocal done
            done += 1
            if done == commit:
                os.kill(os.getpid(), signal.SIGSTOP)
            original(*arguments)  # type: ignore[arg-type]

        loop._Trainer._commit = paused  # type: ignore[method-assign,assignment]

    shutil.rmtree(out, ignore_errors=True)
    for log in out.parent.glob(f"{out.name}.*log"):
        log.unlink()
    child = toy.start(out, pause)
    while Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.001)
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
    parser.add_argument("--tries", type=int, default=100, help="moments a strategy")
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=list(STRATEGIES))
    parser.add_argument("--saves", nargs="+", type=int, default=[1, 2, 3], help="calls: from which save on")
    parser.add_argument("--every", type=int, default=1, help="calls: only every so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path)
    chosen = parser.parse_args()
    work = chosen.work or Path(tempfile.mkdtemp(prefix="eyetune-kill-"))
    wrong: list[str] = []
    rows = []
    for kind in chosen.strategies:
        toy = Toy(work, kind)
        start = time.monotonic()
        if chosen.what == "moments":
            killed, faults = moments(toy, chosen.tries, chosen.seed)
            where = ", ".join(f"{phase} {killed[phase]}" for phase in PHASES if killed[phase])
            rows.append((kind, sum(killed.values()), where, len(faults), time.monotonic() - start))
        else:
            for save in chosen.saves:
                kills, faults = calls(toy, save, lambda number: number % chosen.every == 0)
                rows.append((kind, kills, f"from save {save} on", len(faults), time.monotonic() - start))
                wrong += [f"{kind}: {fault}" for fault in faults]
            faults = []
        wrong += [f"{kind}: {fault}" for fault in faults]
        print("\n".join(wrong), flush=True)
    print("| strategy | kills | where | faults | seconds |\n|---|---|---|---|---|")
    for kind, kills, where, count_, seconds in rows:
        print(f"| {kind} | {kills} | {where} | {count_} | {seconds:.0f} |")
    if not wrong and chosen.work is None:
        shutil.rmtree(work)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(run())
