"""Kill the workers of a search with SIGKILL, at random moments and several at once: no finished trial may be lost.

    python tests/faults/search.py --kills 100                 # one worker
    python tests/faults/search.py --kills 100 --workers 2     # two, each killed at a moment of its own

Each study is killed again and again until it is finished. After every kill the trials that were finished before have to
be there still, with the same values; at the end as many as were asked for are finished, each lost one was done again,
nothing is left over, and one worker has drawn the same trials as one that nobody disturbed. Prints a Markdown row and
leaves with 1 when anything was wrong.
"""

from __future__ import annotations

import argparse
import gc
import random
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import optuna  # noqa: F401 - imported once, for all children
import yaml
from sqlalchemy.dialects import sqlite  # noqa: F401
from toy import Child, signal_me_in

import eyetune.searching.folder
import eyetune.searching.ledger
import eyetune.searching.storage
import eyetune.searching.workers
import eyetune.verbs.search
from eyetune.data.phantom import write_cohort

gc.freeze()  # as in toy.py, for what was imported here
eyetune.searching.ledger.RETRIES = 1000  # here it is not the trial that kills its workers
eyetune.searching.ledger.HEARTBEAT = eyetune.searching.storage.HEARTBEAT = 2
eyetune.searching.storage.GRACE = 10

STATES = "SELECT number, state, trial_id FROM trials ORDER BY number"
ENDED = ("COMPLETE", "PRUNED")


class Search:
    """One study, killed until it is finished.

    Args:
        folder: for everything.
        trials: how many are to be finished.
        workers: how many work on it at once.
    """

    def __init__(self, folder: Path, trials: int, workers: int, seed: int) -> None:
        self.folder, self.trials, self.workers = folder, trials, workers
        self.rng = random.Random(seed)
        eyes = folder / "eyes"
        if not eyes.is_dir():
            write_cohort(eyes, patients=12, size=64, seed=3, workers=1)
        content = {
            "model": {"backbone": "test_vit", "weights": "random", "pixels": 32},
            "data": {"table": str(eyes / "labels.csv"), "label_column": "dr_grade", "val": 0.25, "test": 0.25},
            "adapt": "linear",
            "train": {"epochs": 2, "batch_size": 4, "warmup_epochs": 0, "tensorboard": False},
            "augment": "none",
            "workers": 0,
            "precision": "fp32",
            "device": "cpu",
            "seed": seed,
            "search": {"space": {"train.lr": "1e-4..1e-2 log", "model.dropout": "0..0.5"}, "trials": trials},
        }
        self.config = folder / f"config{seed}.yaml"
        self.config.write_text(yaml.safe_dump(content))
        self.out = folder / f"search{seed}"
        self.log = folder / f"search{seed}.log"
        self.kills = 0
        self.faults: list[str] = []

    def start(self, out: Path, seconds: float | None) -> Child:
        """One worker, killed so many seconds after its start."""

        def prepare() -> None:
            if seconds is not None:
                signal_me_in(seconds, signal.SIGKILL)

        words = ["search", str(self.config), "--out", str(out), "--data.cache", str(self.folder / "cache")]
        return Child(words, self.log, prepare)

    def run(self) -> None:
        """Kill until all is finished."""
        calm = self.folder / f"calm{self.rng.random()}"
        began = time.monotonic()
        assert self.start(calm, None).wait() == 0, self.log.read_text()
        length = time.monotonic() - began
        known: dict[int, Any] = {}
        while True:
            # Mostly within a trial or two, so that a study takes many kills.
            aims = [self.rng.random() * length * 3 / self.trials for _ in range(self.workers)]
            codes = [child.wait() for child in [self.start(self.out, aim) for aim in aims]]
            self.kills += codes.count(-signal.SIGKILL)
            if wrong := [code for code in codes if code not in (0, -signal.SIGKILL)]:
                self.faults.append(f"left with {wrong}: {self.log.read_text()[-600:]}")
                return
            now = read(self.out)
            self.faults += [f"lost: trial {number}" for number, one in known.items() if now.get(number) != one]
            known = {number: one for number, one in now.items() if one[0] in ENDED}
            if 0 in codes:
                break
        self.check(calm)
        if not self.faults:
            shutil.rmtree(self.out)
        shutil.rmtree(calm)

    def check(self, calm: Path) -> None:
        """What has to be true of a finished study."""
        found = read(self.out)
        ended = [one for one in found.values() if one[0] in ENDED]
        if len(ended) != self.trials:
            self.faults.append(f"{len(ended)} finished, {self.trials} were asked for")
        # One that was killed before its first sign of life is done again a minute later, after others.
        if self.workers == 1 and sorted(one[1:3] for one in ended) != sorted(one[1:3] for one in read(calm).values()):
            self.faults.append("drew or found other values than without kills")
        again = {one[3] for one in found.values()}
        lost = [n for n, one in found.items() if one[0] == "FAIL" and one[1] and n not in again and not one[4]]
        self.faults += [f"trial {number} was lost and not done again" for number in lost]
        left = [path for path in self.out.rglob("*") if path.name == "checkpoints" or path.suffix == ".db-journal"]
        if self.workers == 1:  # of several, one may be killed when the others are through
            left += list((self.out / "workers").iterdir())
        self.faults += [f"left over: {path}" for path in left]


def read(out: Path) -> dict[int, Any]:
    """Number -> (state, parameters, values, the trial whose place it takes, whether it is surplus)."""
    if not (out / "search.db").is_file():
        return {}
    with sqlite3.connect(out / "search.db") as database:
        database.execute("PRAGMA busy_timeout = 60000")
        if not database.execute("SELECT name FROM sqlite_master WHERE name = 'trials'").fetchall():
            return {}
        found = {}
        for number, state, key in database.execute(STATES).fetchall():
            of = f"WHERE trial_id = {key} ORDER BY"
            values = database.execute(f"SELECT value FROM trial_values {of} objective").fetchall()
            given = database.execute(f"SELECT param_name, param_value FROM trial_params {of} param_name").fetchall()
            attributes = dict(
                database.execute(f"SELECT key, value_json FROM trial_user_attributes {of} key").fetchall()
            )
            retry = attributes.get("retry_of")
            found[number] = state, given, values, None if retry is None else int(retry), "surplus" in attributes
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    return found


def run() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--trials", type=int, default=8, help="of a study")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path)
    chosen = parser.parse_args()
    work = chosen.work or Path(tempfile.mkdtemp(prefix="eyetune-search-"))
    work.mkdir(parents=True, exist_ok=True)
    kills, studies, faults = 0, 0, []
    while kills < chosen.kills:
        one = Search(work, chosen.trials, chosen.workers, chosen.seed + studies)
        one.run()
        kills, studies = kills + one.kills, studies + 1
        faults += [f"study {one.out.name}: {fault}" for fault in one.faults]
        print(f"{studies} studies, {kills} kills, {len(faults)} faults", *one.faults, sep="\n  ", flush=True)
    lost = sum(": lost: " in fault for fault in faults)
    print("| workers | studies | kills | finished trials lost | other faults |\n|---|---|---|---|---|")
    print(f"| {chosen.workers} | {studies} | {kills} | {lost} | {len(faults) - lost} |", *faults, sep="\n")
    if not faults and chosen.work is None:
        shutil.rmtree(work)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(run())
