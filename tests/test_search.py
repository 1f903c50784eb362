"""`eyetune search` from a table to best.yaml, on drawn eyes and an untrained tiny network."""

from __future__ import annotations

import csv
import gc
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from eyetune.cli import main
from eyetune.data import cache as data_cache
from eyetune.data.phantom import write_cohort
from eyetune.errors import UserError
from eyetune.metrics import plots
from eyetune.report import page
from eyetune.searching import ledger, storage, workers
from eyetune.searching.ledger import Ledger, Taken
from eyetune.searching.plan import Objective, Plan, read_plan
from eyetune.searching.results import outcome
from eyetune.searching.storage import StorageError, find_place
from eyetune.train import results as run_results
from eyetune.train.run import Run
from eyetune.verbs.finetune import Job

FAULTS = Path(__file__).parent / "faults" / "search.py"

SETTINGS = """
data: {{table: {table}, label_column: dr_grade, cache: {cache}}}
model: {{backbone: test_vit, weights: random, pixels: 32}}
adapt: linear
train: {{epochs: 3, batch_size: 8, warmup_epochs: 0, tensorboard: false, lr: 3.0e-3}}
augment: none
workers: 0
precision: fp32
seed: 5
search:
  space: {{train.lr: 1e-4..1e-2 log, train.batch_size: [4, 8, 12, 16]}}
  trials: 4
  pruner: none
"""


PATIENTS = 12


def draw(folder: Path) -> Path:
    """Photographs, and a table with splits and grades of its own: of so few eyes, every split has every grade."""
    write_cohort(folder, patients=PATIENTS, size=64, seed=3, workers=1)
    table = folder / "labels.csv"
    with open(table, encoding="utf-8", newline="") as stream:
        known = list(csv.DictReader(stream))
    with open(table, "w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image", "patient", "dr_grade", "split"])
        for number, row in enumerate(known):
            split = "train" if number < PATIENTS else "val" if number < 2 * PATIENTS - 6 else "test"
            writer.writerow([row["image"], row["patient"], number % 5, split])
    return table


@pytest.fixture(scope="module", autouse=True)
def no_cleaning() -> Iterator[None]:
    """Small networks may lie about for a while."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "collect", lambda *generation: 0)
        yield


@pytest.fixture(scope="module")
def configuration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Splits are in the table, and no photograph of the test can be read."""
    folder = tmp_path_factory.mktemp("cohort")
    table = draw(folder / "eyes")
    tests = [line.split(",")[0] for line in table.read_text(encoding="utf-8").splitlines() if line.endswith("test")]
    assert len(tests) == 6
    for name in tests:
        (folder / "eyes" / "images" / name).write_bytes(b"no photograph")
    file = folder / "config.yaml"
    file.write_text(SETTINGS.format(table=table, cache=folder / "cache"), encoding="utf-8")
    return file


def run(configuration: Path, out: Path, *words: str) -> int:
    return main(["search", str(configuration), "--out", str(out), *words])


@pytest.fixture(scope="module")
def searched(configuration: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A finished search, and the photographs that were decoded for it, each as often as it was."""
    out = tmp_path_factory.mktemp("searched") / "out"
    decoded: list[str] = []
    load = data_cache.load_square

    def counted(path: Path, settings: Any) -> Any:
        decoded.append(path.name)
        return load(path, settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_cache, "load_square", counted)
        assert run(configuration, out) == 0
    return out, decoded


def rows(out: Path) -> list[dict[str, str]]:
    with open(out / "trials.csv", encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def content(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "search.json").read_text(encoding="utf-8"))
    return found


def test_every_photograph_is_decoded_once_and_none_of_the_test(searched: tuple[Path, list[str]]) -> None:
    out, decoded = searched
    with open(out / "splits.csv", encoding="utf-8", newline="") as stream:
        splits = {row["image"]: row["split"] for row in csv.DictReader(stream)}
    learning = sorted(Path(name).name for name, split in splits.items() if split != "test")
    assert len(learning) < len(splits)
    assert sorted(decoded) == learning


def test_what_a_search_leaves(searched: tuple[Path, list[str]]) -> None:
    out, _ = searched
    found = rows(out)
    assert [row["state"] for row in found] == ["complete"] * 4
    assert (found[0]["train.lr"], found[0]["train.batch_size"]) == ("0.003", "8")  # as configured
    assert len({row["train.lr"] for row in found}) == 4
    best = max(found, key=lambda row: float(row["qwk"]))
    assert float(best["qwk"]) == content(out)["best"][0]["values"][0]
    for row in found:
        folder = out / "trials" / f"{int(row['trial']):04d}"
        assert sorted(file.name for file in folder.iterdir()) == ["config.yaml", "cost.json", "history.csv"]
        with open(folder / "history.csv", encoding="utf-8", newline="") as stream:
            scores = [float(epoch["val_qwk"]) for epoch in csv.DictReader(stream)]
        assert float(row["qwk"]) == pytest.approx(max(scores), abs=1e-12)
    assert content(out)["space"]["train.batch_size"] == "4,8,12"  # there are 12 images to train on
    assert list((out / workers.FOLDER).iterdir()) == []
    text = (out / "search.html").read_text(encoding="utf-8")
    assert "The best of 4 validation scores is optimistic" in text
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", text)
    assert not list(out.rglob("*test*"))


@pytest.mark.slow
def test_finetune_reproduces_the_best_trial(
    searched: tuple[Path, list[str]], configuration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the photographs as they were drawn: those of the test can be read again."""
    out, _ = searched
    table = draw(tmp_path / "eyes")
    monkeypatch.setattr(plots, "learning_curves", lambda *arguments, **more: None)
    monkeypatch.setattr(Run, "fit_novelty", lambda *arguments, **more: None)
    monkeypatch.setattr(run_results, "_draw", lambda *arguments: None)
    monkeypatch.setattr(page, "write_report", lambda *arguments, **more: None)
    words = ["--data.table", str(table), "--out", str(tmp_path / "best")]
    assert main(["finetune", str(out / "best.yaml"), *words]) == 0
    metrics = json.loads((tmp_path / "best" / "metrics.json").read_text())["datasets"]
    assert metrics["val"]["metrics"]["qwk"]["value"] == pytest.approx(content(out)["best"][0]["values"][0], abs=1e-9)
    assert metrics["test"]["n"] > 0


def test_the_same_command_goes_on_and_another_is_refused(
    searched: tuple[Path, list[str]], configuration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(searched[0], out)
    before = rows(out)
    for words, complaint in (
        (["--train.weight_decay", "0.5"], "configuration.train.weight_decay: was 0.01, now 0.5"),
        (["--space.model.dropout", "0..0.5"], "space.model.dropout: was not there, now 0..0.5"),
        (["--objectives", "accuracy"], "objectives: was ['qwk'], now ['accuracy']"),
        (["--adapt", "full"], "configuration.adapt.kind: was linear, now full"),
    ):
        assert run(configuration, out, *words) == 2
        assert complaint in capsys.readouterr().err
    assert run(configuration, out, "--trials", "5") == 0
    after = rows(out)
    assert len(after) == 5
    assert [row["qwk"] for row in after[:4]] == [row["qwk"] for row in before]


def test_something_else_is_not_overwritten(
    configuration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "letter.txt").write_text("dear", encoding="utf-8")
    assert run(configuration, tmp_path) == 2
    assert "holds something that is not a search" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["letter.txt"]


# -- trials that fail, are stopped, are interrupted --------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], Any]], None]:
    """Replace the training of the nth trial (from 0)."""
    fit, seen = Job.fit, iter(range(100))

    def replace(act: Callable[[int], Any]) -> None:
        def instead(job: Job, lesson: Any, **more: Any) -> Any:
            act(next(seen))
            return fit(job, lesson, **more)

        monkeypatch.setattr(Job, "fit", instead)

    return replace


def test_what_fails_is_noted_and_the_search_goes_on(
    configuration: Path, tmp_path: Path, quick: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def act(trial: int) -> None:
        if trial == 0:
            raise UserError("the device has not enough memory for a batch. Take fewer.\nSecond line")
        if trial == 1:
            raise ZeroDivisionError("a defect")

    quick(act)
    out = tmp_path / "out"
    assert run(configuration, out, "--trials", "3", "--train.epochs", "1") == 0
    assert "trial 0 failed: the device has not enough memory" in capsys.readouterr().err
    found = rows(out)
    assert [row["state"] for row in found] == ["failed", "failed", "complete"]
    assert found[0]["reason"] == "the device has not enough memory for a batch. Take fewer."
    assert found[1]["reason"] == "ZeroDivisionError: a defect"
    assert "2 trials failed" in "".join(content(out)["warnings"])


def test_when_all_fail_it_stops_and_says_why(
    configuration: Path, tmp_path: Path, quick: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def act(trial: int) -> None:
        raise UserError("training diverged: the loss is not finite.")

    quick(act)
    assert run(configuration, tmp_path / "out", "--trials", "20") == 2
    said = capsys.readouterr().err
    assert "the first 3 trials failed, and none came through" in said
    assert "training diverged" in said.partition("none came through")[2]
    assert len(rows(tmp_path / "out")) == 3


def test_ctrl_c_keeps_everything_and_the_trial_is_done_again(
    configuration: Path, tmp_path: Path, quick: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    quick(lambda trial: os.kill(os.getpid(), signal.SIGINT) if trial == 1 else None)
    out = tmp_path / "out"
    assert run(configuration, out, "--trials", "2", "--train.epochs", "1") == 130
    said = capsys.readouterr().err
    assert ": 1 of 2 trials. The one under way will be done again." in said
    assert "Go on with the same command" in said
    found = rows(out)
    assert [row["state"] for row in found] == ["complete", "lost", "waiting"]
    assert run(configuration, out, "--trials", "2", "--train.epochs", "1") == 0
    after = rows(out)
    assert [row["state"] for row in after] == ["complete", "lost", "complete"]
    assert after[2]["train.lr"] == found[1]["train.lr"]
    assert not (out / "trials" / "0001").exists()


def test_a_full_disk_ends_the_search_and_not_the_trial(
    configuration: Path, tmp_path: Path, quick: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def act(trial: int) -> None:
        raise UserError("cannot write x: the disk is full") from OSError(28, "No space left on device")

    quick(act)
    assert run(configuration, tmp_path / "out") == 2
    assert "the disk is full" in capsys.readouterr().err
    with sqlite3.connect(tmp_path / "out" / "search.db") as database:
        assert database.execute("SELECT state FROM trials ORDER BY number").fetchall() == [("FAIL",), ("WAITING",)]


def test_a_launcher_is_refused(
    configuration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("eyetune.processes.count", lambda: 2)
    monkeypatch.setattr("eyetune.processes.fail", lambda message, code: print(message, file=sys.stderr) or code)
    assert run(configuration, tmp_path / "out") == 2
    assert "without torchrun" in capsys.readouterr().err


@pytest.mark.slow
def test_several_objectives_give_a_front(
    configuration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["--objectives", "qwk,trainable_parameters", "--space.adapt.kind", "linear,lora", "--space.adapt.r", "2,4"]
    words += ["--train.epochs", "1", "--trials", "6", "--pruner", "none", "--space.train.lr", "1e-3,1e-4"]
    words += ["--space.train.batch_size", "fixed"]
    assert run(configuration, out, *words) == 0
    assert "several objectives: no trial is stopped early" in capsys.readouterr().out
    found = rows(out)
    for row in found:
        same = [other for other in found if all(other[path] == row[path] for path in ("train.lr", "adapt.r"))]
        assert all(other["qwk"] == row["qwk"] for other in same)
        assert ("not trained again" in row["reason"]) == (row["trial"] != same[0]["trial"])
    scores = [(float(row["qwk"]), -float(row["trainable_parameters"])) for row in found]
    # The slow reference: every pair.
    beaten = [any(b != a and b[0] >= a[0] and b[1] >= a[1] for b in scores) for a in scores]
    assert {score for score, one in zip(scores, beaten, strict=True) if not one} == {
        score for score, row in zip(scores, found, strict=True) if row["best"]
    }
    assert all((row["adapt.r"] != "") == (row["adapt.kind"] == "lora") for row in found)
    files = sorted(file.name for file in (out / "pareto").iterdir())
    assert files == [f"trial-{int(row['trial']):04d}.yaml" for row in found if row["best"]]
    assert "What a better score costs" in (out / "search.html").read_text(encoding="utf-8")


# -- the shared list of trials -----------------------------------------------------------------------------------------

ONE = (Objective("qwk", higher=True),)


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ledger, "POLL", 0.01)
    Path("t.csv").touch()
    space = ["--space.train.lr", "1e-5..1e-3 log", "--space.adapt.r", "4,8,16"]
    found = read_plan(["--data.table", "t.csv", "--out", "out", "--train.epochs", "10", *space])
    (tmp_path / "out").mkdir()
    return found


def book(plan: Plan, worker: str = "me", url: str | None = None) -> Ledger:
    return Ledger(plan, find_place(url, plan.out), ONE, worker)


def take(book: Ledger, limit: int = 100) -> Taken:
    taken = book.take(limit, lambda running: None, lambda: False)
    assert taken is not None
    return taken


def state(book: Ledger) -> list[str]:
    return [trial.state.name for trial in book.trials()]


def test_scores_that_are_all_the_same_choose_nothing(plan: Plan) -> None:
    mine = book(plan)
    for value in (0.0, 0.0, 0.5):
        mine.finish(take(mine), [value], {})
        said = "\n".join(outcome(plan, ONE, mine.study).warnings)
        complete = len(mine.trials())
        assert ("tells no settings apart" in said) == (complete == 2), complete


@pytest.fixture
def dead_worker(plan: Plan) -> Callable[[Callable[[str], None]], None]:
    """Do something as a worker that is then killed."""

    def die(act: Callable[[str], None]) -> None:
        pid = os.fork()
        if pid == 0:
            with workers.at_work(plan.out) as name:
                act(name)
                os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(pid, 0)

    return die


def test_a_killed_workers_trial_is_done_again_with_the_same_values(plan: Plan, dead_worker: Any) -> None:
    first = take(book(plan, "earlier"))
    book(plan, "earlier").finish(first, [0.5], {})
    dead_worker(lambda name: take(book(plan, name)))
    mine = book(plan)
    again = take(mine)
    lost = mine.trials()[1]
    assert state(mine) == ["COMPLETE", "FAIL", "RUNNING"]
    assert (again.number, again.trial.params) == (2, lost.params)
    assert list((plan.out / workers.FOLDER).iterdir()) == []


def test_one_that_kills_every_worker_is_given_up(plan: Plan, dead_worker: Any) -> None:
    for _ in range(ledger.RETRIES + 1):
        dead_worker(lambda name: take(book(plan, name)))
    mine = book(plan)
    fresh = take(mine)
    assert fresh.number == ledger.RETRIES + 1
    assert "retry_of" not in fresh.trial.user_attrs
    assert ledger.count(mine.trials()).failed == 1


def test_a_worker_elsewhere_is_known_to_be_dead_by_its_silence(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    gone, mine = book(plan, "elsewhere"), book(plan)
    taken = take(gone)
    assert take(mine).number == 1  # it may still be alive
    with sqlite3.connect(plan.out / "search.db") as database:
        database.execute("UPDATE trial_heartbeats SET heartbeat = '2020-01-01 00:00:00' WHERE trial_id = 1")
    assert take(mine).trial.params == taken.trial.params
    assert state(mine) == ["FAIL", "RUNNING", "RUNNING"]
    gone.finish(taken, [0.9], {})  # it was only slow, and hears that it comes too late
    assert state(mine) == ["FAIL", "RUNNING", "RUNNING"]


@pytest.mark.filterwarnings("ignore:Heartbeat of storage")
def test_one_killed_before_its_first_sign_of_life_is_found_too(plan: Plan) -> None:
    mine = book(plan)
    mine.study.ask()  # and no more
    assert take(mine).number == 1
    assert take(book(plan, "another")).number == 2
    with sqlite3.connect(plan.out / "search.db") as database:
        assert database.execute("SELECT count(*) FROM trial_heartbeats WHERE trial_id = 1").fetchone() == (1,)
        database.execute("UPDATE trial_heartbeats SET heartbeat = '2020-01-01 00:00:00' WHERE trial_id = 1")
    assert take(book(plan, "a third")).trial.user_attrs["retry_of"] == 0


def test_no_more_trials_are_begun_than_were_asked_for(plan: Plan) -> None:
    one, two = book(plan, "one"), book(plan, "two")
    first, second = take(one, 2), take(two, 2)
    told: list[int] = []
    late = iter([False, False, True])
    assert one.take(2, told.append, lambda: next(late)) is None
    assert told == [2]
    assert two._ask(2, 0) is None  # as if both had looked at the same moment
    one.finish(first, [0.1], {})
    two.fail(second, "no")
    assert one.take(2, told.append, lambda: False) is None
    assert ledger.count(one.trials()).finished == 2


def test_who_is_killed_while_putting_right_leaves_no_double(plan: Plan) -> None:
    mine = book(plan)
    mine.hand_back(take(mine))
    mine._give_out_again(mine.trials()[0])  # another worker did the same at the same moment
    assert state(mine) == ["FAIL", "WAITING", "WAITING"]
    assert take(mine).number == 1
    assert state(mine) == ["FAIL", "RUNNING", "FAIL"]
    assert take(mine).number == 3


@pytest.mark.slow
def test_interrupted_or_not_the_same_trials_are_drawn(plan: Plan, tmp_path: Path) -> None:
    def drawn(out: str, interrupted: bool) -> list[Any]:
        mine = book(plan, url=f"sqlite:///{tmp_path / out}.db")
        while ledger.count(mine.trials()).finished < 12:
            taken = take(mine)
            if interrupted and taken.number % 3 == 1:
                mine.hand_back(taken)
                mine = book(plan, url=f"sqlite:///{tmp_path / out}.db")
            else:
                mine.finish(taken, [1 - abs(taken.values["train.lr"] - 2e-4) * 1000], {})
        return [(trial.params, trial.values) for trial in mine.trials() if trial.state.name == "COMPLETE"]

    assert drawn("calm", False) == drawn("interrupted", True)


@pytest.mark.slow
def test_what_does_badly_is_stopped(plan: Plan) -> None:
    mine = book(plan)
    for value in (0.5, 0.6, 0.7, 0.8, 0.9):
        taken = take(mine)
        assert not any(mine.report(taken, epoch, value) for epoch in range(1, 11))
        mine.finish(taken, [value], {})
    bad, good = take(mine), take(mine)
    assert [mine.report(bad, epoch, 0.1) for epoch in range(1, 5)] == [False, False, True, True]
    assert not any(mine.report(good, epoch, 0.75) for epoch in range(1, 11))


# -- databases ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("search.db", "A SQLite file is sqlite:///search.db"),
        ("journal.log", "torn line"),
        ("journal:///x", "torn line"),
        ("redis://me:hunter2@host/0", "SQLite or a database server"),
        ("sqlite://", "in memory is gone"),
        ("postgresql//me:hunter2@host/db", "not the URL of a database"),
        ("postgresql://me:hunt@hunter2@host/db", "In a password write @ as %40"),
        ("oracel://me:hunter2@host/db", "no such kind of database"),
        ("mysql://me:hunter2@host/db", "is not installed"),
    ],
)
def test_what_is_no_database_is_said_without_the_password(plan: Plan, url: str, complaint: str) -> None:
    with pytest.raises(UserError) as caught:
        book(plan, url=url)
    assert complaint in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_a_password_is_written_nowhere(plan: Plan) -> None:
    url = "postgresql+psycopg://me:hunter2@host/db?sslpassword=hunter2&a=b"
    place = find_place(url, plan.out)
    assert place.shown == "postgresql+psycopg://me:***@host/db?a=b&sslpassword=***"
    words = ["eyetune", "search", "--storage", url, f"--storage={url}"]
    assert "hunter2" not in " ".join(place.command(words, url))
    assert "hunter2" not in place.clean(f"cannot connect to {url}")


def test_a_damaged_database_is_said_and_left_alone(plan: Plan) -> None:
    file = plan.out / "search.db"
    file.write_bytes(b"not a database at all" * 100)
    with pytest.raises(StorageError, match="damaged, or no SQLite database"):
        book(plan)
    assert file.read_bytes() == b"not a database at all" * 100


def test_a_locked_database_is_waited_for_and_then_said(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "WAIT", 0.1)
    mine = book(plan)
    database = sqlite3.connect(plan.out / "search.db")
    database.execute("BEGIN EXCLUSIVE")
    with pytest.raises(StorageError, match="was locked by another program"):
        mine.trials()
    database.close()
    assert mine.trials() == []


def test_a_folder_that_cannot_be_written(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = plan.out / "file"
    blocked.touch()
    with pytest.raises(UserError, match="cannot write"):
        book(plan, url=f"sqlite:///{blocked}/search.db")


def test_a_study_of_another_program_is_left_alone(plan: Plan) -> None:
    mine = book(plan)
    take(mine)
    with pytest.raises(UserError, match="not one of eyetune search"):
        mine.agree({"space": {}})


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks after torch was imported")
def test_killed_at_random_moments_no_finished_trial_is_lost() -> None:
    done = subprocess.run(
        [sys.executable, str(FAULTS), "--kills", "1", "--trials", "2", "--workers", "2"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
