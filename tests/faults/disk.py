"""What the disk can do to a run: errors at every call, no room, power cuts. Afterwards the run goes on, bit for bit.

    python tests/faults/disk.py errors --codes EIO ENOSPC EROFS EACCES     # strace: each call fails once
    python tests/faults/disk.py full                                       # tmpfs too small (root)
    python tests/faults/disk.py power --tries 100                          # ext4 image copied while mounted (root)

An error has to end the run with exit code 2 and a message that names a path, or to do no harm at all. A power cut is
the image of a mounted file system, copied while the run stands still between two instructions: what was not synced is
not in it. Prints a Markdown table and leaves with 1 when anything was lost or came out otherwise.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from kill import aftermath, injecting, points, traced
from toy import Toy, is_row

Row = tuple[str, int, str, list[str]]


def errors(toy: Toy, codes: list[str], save: int, every: int) -> Iterator[Row]:
    """Let each call that changes the run folder fail once, from a save (0: from the start) to the end of the run."""
    out = toy.folder / "errors"
    places = points(toy, out, save)
    print(f"{toy.kind}: {len(places)} calls, every {every} is tried", flush=True)
    for code in codes:
        faults: list[str] = []
        ends: Counter[int] = Counter()
        for call, nth in places[::every]:
            left = traced(toy, out, save, injecting(call, nth, f"error={code}"))
            ends[left] += 1
            said = out.with_suffix(".log").read_text()
            last = said.rpartition("eyetune: ")[2]
            if left not in (0, 2) or (left == 2 and str(out) not in last) or "Traceback" in said:
                faults.append(f"{code} at {call} {nth}: left with {left}, said {last[-300:]!r}")
            if left == 0:
                # What the disk does not let go of stays, until the next command on the run (`aftermath`).
                known = {"files differs"} if call.startswith("unlink") else set()
                faults += [f"{code} at {call} {nth}: {fault}" for fault in toy.faults(out) if fault not in known]
            faults += [f"{code} at {call} {nth}: {fault}" for fault in aftermath(toy, out)]
        yield f"{code} at a call ({toy.kind})", sum(ends.values()), f"exit 2: {ends[2]}, no harm: {ends[0]}", faults


def full(toy: Toy) -> Iterator[Row]:
    """File systems from too small for anything to large enough."""
    place = toy.folder / "small"
    faults: list[str] = []
    ends: Counter[int] = Counter()
    size = 100
    while not ends[0]:
        size = size * 3 // 2
        with mounted(["-t", "tmpfs", "-o", f"size={size}k", "tmpfs"], place):
            out = place / "run"
            log = toy.folder / "small.log"
            log.unlink(missing_ok=True)
            code = toy.start(out, log=log).wait()
            ends[code] += 1
            said = log.read_text().rpartition("eyetune: ")[2]
            if code not in (0, 2) or (code == 2 and ("full" not in said or str(out) not in said)):
                faults.append(f"{size} KiB: left with {code}, said {said!r}")
            if code == 2:
                subprocess.run(["mount", "-o", "remount,size=64m", str(place)], check=True)
                faults += [f"{size} KiB: {fault}" for fault in aftermath(toy, out)]
    yield f"no room ({toy.kind})", sum(ends.values()), f"exit 2: {ends[2]}, enough room: {ends[0]}", faults


def power(toy: Toy, tries: int, seed: int) -> Iterator[Row]:
    """Cut the power once in each of `tries` runs, in a phase drawn from those of its story, at a moment drawn from its
    length: what comes after the first save is as likely as what comes before."""
    rng = random.Random(seed)
    image, cut = toy.folder / "disk.img", toy.folder / "cut.img"
    here, there = toy.folder / "disk", toy.folder / "cut"
    faults: list[str] = []
    states: Counter[str] = Counter()
    for number in range(tries):
        with open(image, "wb") as stream:
            stream.truncate(48 << 20)
        subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
        with mounted(["-o", "loop", str(image)], here):
            log = toy.folder / "power.log"
            log.unlink(missing_ok=True)
            place = rng.randrange(len(toy.stretches))
            phase, seconds = toy.stretches[place]
            nth = sum(name == phase for name, _ in toy.stretches[:place])
            aim = phase, nth, rng.random() * seconds
            child = toy.start(here / "run", log=log, aim=aim, signum=signal.SIGSTOP)
            if child.stopped():
                announced = log.read_text() if log.is_file() else ""
                shutil.copyfile(image, cut)
            code = child.kill()
        if code != -signal.SIGKILL:
            continue  # it had ended before the moment drawn
        with mounted(["-o", "loop", str(cut)], there):
            out = there / "run"
            out.with_suffix(".log").write_text(announced)
            states[f"{sum(is_row(line) for line in announced.splitlines())} epochs"] += 1
            faults += [f"cut {number}, {phase}: {fault}" for fault in aftermath(toy, out)]
        if number % 10 == 9:  # it takes long: how far it is
            print(f"{toy.kind}: {number + 1} of {tries}, {len(faults)} faults", flush=True)
    came = ", ".join(f"after {name}: {often}" for name, often in sorted(states.items()))
    yield f"power cut ({toy.kind})", states.total(), came, faults


@contextmanager
def mounted(what: list[str], place: Path) -> Iterator[None]:
    """A file system at `place`."""
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", *what, str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


def run() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("errors", "full", "power"))
    parser.add_argument("--strategy", default="full")
    parser.add_argument("--codes", nargs="+", default=["EIO", "ENOSPC", "EROFS", "EACCES"])
    parser.add_argument("--save", type=int, default=1, help="errors: from which save on (0: from the start)")
    parser.add_argument("--every", type=int, default=1, help="errors: only every so many calls")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--tries", type=int, default=100, help="power: how many cuts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path)
    chosen = parser.parse_args()
    work = chosen.work or Path(tempfile.mkdtemp(prefix="eyetune-disk-"))
    toy = Toy(work, chosen.strategy, epochs=chosen.epochs)
    if chosen.what == "errors":
        rows = errors(toy, chosen.codes, chosen.save, chosen.every)
    elif chosen.what == "full":
        rows = full(toy)
    else:
        rows = power(toy, chosen.tries, chosen.seed)
    wrong = []
    print("| what | how often | what came of it | faults |\n|---|---|---|---|")
    for name, often, came, faults in rows:
        print(f"| {name} | {often} | {came} | {len(faults)} |", flush=True)
        wrong += faults
    print("\n".join(wrong))
    if not wrong and chosen.work is None:
        shutil.rmtree(work)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(run())
