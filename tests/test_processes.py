"""`torchrun … -m eyetune`: two processes are one run, with one voice and one end."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from train_kit import photographs

from eyetune import processes
from eyetune.cli import main
from eyetune.config import Config
from eyetune.errors import ConfigError, RunError
from eyetune.runtime import ANSWER_WITHIN, Runtime
from eyetune.verbs.finetune import check_split, share_batch

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
#: The folders of a command under test hold nothing but what it wrote.
TABLE = "t.csv"


def eyetune(folder: Path, *words: str, count: int = 1, script: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`eyetune WORDS` in `folder`, by `count` processes (one: this one); `script` calls the command line in its own
    way."""
    if count == 1:
        said, warned = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
        with contextlib.chdir(folder), contextlib.redirect_stdout(said), contextlib.redirect_stderr(warned):
            code = main(words)
        texts = [stream.buffer.getvalue().decode() for stream in (said, warned)]
        return subprocess.CompletedProcess(words, code, *texts)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    target = ["-m", "eyetune"] if script is None else [str(script)]
    return subprocess.run(
        [sys.executable, *launcher, *target, *words],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=ANSWER_WITHIN.total_seconds(),
    )


@pytest.fixture(scope="module")
def eyes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven images to train on, five to validate, three to test: odd numbers, to be shared by two."""
    folder = tmp_path_factory.mktemp("eyes")
    manifest = photographs(folder / "images", 19)
    splits = ["train"] * 11 + ["val"] * 5 + ["test"] * 3
    with open(folder / TABLE, "w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image", "label", "split"])
        writer.writerows((r.name, ["no", "yes"][r.label or 0], s) for r, s in zip(manifest, splits, strict=True))
    return folder


def options(out: str, **more: object) -> list[str]:
    """A run of the embedded network, without anything random."""
    chosen = {
        "out": out,
        "data.table": TABLE,
        "data.images": "images",
        "model.backbone": "nano",
        "model.dropout": 0,
        "augment": "none",
        "precision": "fp32",
        "workers": 0,
        "train.epochs": 2,
        "train.warmup_epochs": 0,
        "train.tensorboard": "false",
    } | more
    return ["finetune", *(f"--{name}={value}" for name, value in chosen.items())]


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "linear", "gradual"])
def test_two_processes_are_one_run(eyes: Path, kind: str) -> None:
    more: dict[str, object] = {"adapt.kind": kind, "train.accumulate": 2}
    if kind == "lora":
        more["adapt.dropout"] = 0
    if kind == "gradual":
        more |= {"adapt.phases": '[0, "all"]', "adapt.patience": 1}
    one = eyetune(eyes, *options(f"{kind}-1", **more, **{"train.batch_size": 4}))
    two = eyetune(eyes, *options(f"{kind}-2", **more, **{"train.batch_size": 2}), count=2)
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    assert two.stdout.replace(f"{kind}-2", f"{kind}-1") == one.stdout
    # One voice.
    assert two.stderr.count("epoch 1/2") == 1

    histories = [rows(eyes / f"{kind}-{n}" / "history.csv") for n in (1, 2)]
    assert len(histories[0]) == len(histories[1]) == 2
    for first, second in zip(*histories, strict=True):
        for column in set(first) - {"seconds", "images_per_second"}:
            assert float(second[column] or -1) == pytest.approx(float(first[column] or -1), abs=2e-5), column
    for name, count in (("val", 5), ("test", 3)):
        tables = [rows(eyes / f"{kind}-{n}" / "predictions" / f"{name}.csv") for n in (1, 2)]
        assert [row["image"] for row in tables[1]] == [row["image"] for row in tables[0]]
        assert len(tables[1]) == count
        for first, second in zip(*tables, strict=True):
            assert float(second["logit_yes"]) == pytest.approx(float(first["logit_yes"]), abs=1e-4)
    files = [{p.relative_to(eyes / f"{kind}-{n}") for p in (eyes / f"{kind}-{n}").rglob("*")} for n in (1, 2)]
    assert files[0] == files[1]


@pytest.mark.slow
def test_evaluating_and_predicting_by_two(eyes: Path) -> None:
    """Nineteen images by two: everyone once, in the table's order; an unreadable one is a row, not a gap."""
    made = eyetune(eyes, *options("run", **{"train.epochs": 1, "train.batch_size": 4, "adapt.kind": "linear"}))
    assert made.returncode == 0, made.stderr
    found = []
    for count in (1, 2):
        done = eyetune(eyes, "evaluate", "run", "--data", f"again={TABLE}:images", count=count)
        assert done.returncode == 0, done.stderr
        metrics = json.loads((eyes / "run" / "metrics.json").read_text())["datasets"]["again"]
        found.append((rows(eyes / "run" / "predictions" / "again.csv"), metrics["n"], done.stdout))
    assert [row["image"] for row in found[1][0]] == [row["image"] for row in rows(eyes / TABLE)]
    assert found[0] == found[1]

    (eyes / "images" / "bad.png").write_bytes(b"no image")
    outputs = [eyetune(eyes, "predict", "run", "images", "--batch-size", "4", count=count) for count in (1, 2)]
    (eyes / "images" / "bad.png").unlink()
    assert [done.returncode for done in outputs] == [0, 0], outputs[1].stderr
    assert len(outputs[1].stdout.splitlines()) == 1 + 20
    tables = [list(csv.DictReader(done.stdout.splitlines())) for done in outputs]
    for first, second in zip(*tables, strict=True):
        assert [first[name] for name in ("image", "predicted", "error")] == [
            second[name] for name in ("image", "predicted", "error")
        ]
        assert float(second["prob_yes"] or 0) == pytest.approx(float(first["prob_yes"] or 0), abs=1e-5)
    assert outputs[1].stderr.count("19 predicted, 1 refused") == 1


WORKER = """
import os, signal, sys, time
from datetime import timedelta
from eyetune import cli, runtime
from eyetune.errors import UserError
from eyetune.train import task
from eyetune.train.task import SupervisedTask

fault, last = os.environ.get("FAULT", ""), os.environ["RANK"] == "1"
original, calls = SupervisedTask.loss, 0

def loss(*arguments):
    global calls
    calls += 1
    if last and calls == int(os.environ.get("CALL", "2")):
        if fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "crashed":
            raise ZeroDivisionError("planted")
        if fault == "refused":
            raise UserError("planted in one process")
        if fault == "silent":
            time.sleep(3600)
        if fault == "stopped":
            os.kill(os.getppid(), signal.SIGTERM)  # the launcher, which tells all
            time.sleep(2)
    return original(*arguments)

def predict(*arguments, original=task.predict, **options):
    if fault == "stopped in validation" and not last:  # the other one waits for this one
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(2)
    return original(*arguments, **options)

SupervisedTask.loss, task.predict = loss, predict
if fault == "silent":
    runtime.ANSWER_WITHIN = timedelta(seconds=10)
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["killed", "crashed", "refused", "silent"])
def test_one_process_that_ends_takes_the_run_down_and_says_why(
    eyes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    monkeypatch.setitem(ENVIRONMENT, "FAULT", fault)
    start = time.monotonic()
    done = eyetune(eyes, *options(str(tmp_path / "run"), **{"train.batch_size": 2}), count=2, script=script)
    assert time.monotonic() - start < ANSWER_WITHIN.total_seconds() / 2  # nobody waits for an answer
    assert done.returncode != 0
    said, _, summary = done.stderr.partition("eyetune FAILED" if "eyetune FAILED" in done.stderr else "FAILED")
    if fault == "killed":
        assert "SIGKILL" in summary
    if fault == "crashed":
        assert said.count("ZeroDivisionError: planted") == 1
        assert "ZeroDivisionError: planted" in summary  # torchrun's own report names the cause
    if fault == "refused":
        assert said.count("planted in one process") == 1
        assert "exitcode  : 2 " in summary
    if fault == "silent":
        assert "did not answer" in said, said
    # Of other tracebacks there is only the launcher's.
    assert said.count("Traceback") == (2 if fault == "crashed" else 1)


@pytest.mark.slow
def test_a_mistake_is_said_once_and_all_leave_with_two(eyes: Path, tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine")
    for words, message in (
        (["finetune", "none.yaml"], "eyetune: no configuration file at none.yaml"),
        (options(str(tmp_path / "full")), "is not empty, and a run never overwrites"),
    ):
        done = eyetune(eyes, *words, count=2, script=script)
        assert done.stderr.count(message) == 1, done.stderr
        codes = re.findall(r"exitcode  : (-?\d+) ", done.stderr)
        # On a busy machine a process may still be starting when the launcher ends it.
        assert "2" in codes
        assert set(codes) <= {"2", "-15"}, done.stderr


@pytest.fixture(scope="module")
def whole(eyes: Path) -> Path:
    """Two processes that nobody stops."""
    done = eyetune(eyes, *options("whole-of-two", **FULL), count=2)
    assert done.returncode == 0, done.stderr
    return eyes / "whole-of-two"


FULL = {"train.batch_size": 2, "adapt.kind": "full"}


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(
    eyes: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in its second epoch, begun by two and finished by one: the weights are those of a run that was not."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    for name, value in {"FAULT": "killed", "CALL": "5"}.items():
        monkeypatch.setitem(ENVIRONMENT, name, value)
    assert eyetune(eyes, *options("begun", **FULL), count=2, script=script).returncode != 0
    assert len(rows(eyes / "begun" / "history.csv")) == 1
    resumed = eyetune(eyes, "finetune", "--resume", "begun")
    assert resumed.returncode == 0, resumed.stderr
    assert "begun by 2 processes, goes on with 1: train.batch_size 2, train.accumulate 2" in resumed.stdout
    for first, second in zip(*(rows(run / "history.csv") for run in (whole, eyes / "begun")), strict=True):
        for column in ("train_loss", "val_loss"):
            assert float(second[column]) == pytest.approx(float(first[column]), abs=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "fsdp", "kept"),
    [
        ("stopped", False, "0 of 2 epochs and 2 of 3 batches of epoch 1 are kept"),
        ("stopped", True, "0 of 2 epochs and 2 of 3 batches of epoch 1 are kept"),
        ("stopped in validation", True, "0 of 2 epochs and the training of epoch 1 are kept"),
    ],
    ids=["training", "training, split", "validation, split"],
)
def test_a_launcher_that_is_told_to_stop_saves_what_all_have_done(
    eyes: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    fsdp: bool,
    kept: str,
) -> None:
    """SIGTERM to torchrun in the middle of an epoch; resumed, the run ends as if nothing had been."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    run = tmp_path / "run"
    monkeypatch.setitem(ENVIRONMENT, "FAULT", where)
    chosen = FULL | ({"train.fsdp": "true"} if fsdp else {})
    stopped = eyetune(eyes, *options(str(run), **chosen), count=2, script=script)
    assert stopped.returncode != 0
    assert stopped.stderr.count(kept) == 1, stopped.stderr
    assert "mismatch" not in stopped.stderr
    part = json.loads((run / "checkpoints" / "last" / "state.json").read_text())["part"]
    if where == "stopped":
        assert [one["batches"] for one in part["done"]] == [2, 2]
    monkeypatch.setitem(ENVIRONMENT, "FAULT", "")
    resumed = eyetune(eyes, "finetune", "--resume", str(run), count=2)
    assert resumed.returncode == 0, resumed.stderr
    # Split, sums are made in another order.
    away = 2e-4 if fsdp else 0.0
    for name in ("model", "optimizer"):
        mine, theirs = (load_file(one / "checkpoints" / "last" / f"{name}.safetensors") for one in (run, whole))
        assert mine.keys() == theirs.keys()
        for key, tensor in theirs.items():
            torch.testing.assert_close(mine[key], tensor, atol=away, rtol=0, msg=key)
    histories = [rows(one / "history.csv") for one in (run, whole)]
    assert len(histories[0]) == 2
    for first, second in zip(*histories, strict=True):
        for column in ("train_loss", "val_loss"):
            assert float(first[column]) == pytest.approx(float(second[column]), abs=max(away, 1e-12))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_split_over_processes_it_trains_to_the_same(
    eyes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """FSDP, killed and resumed, against one process that holds everything and was left alone."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    chosen: dict[str, object] = {"adapt.kind": kind, "train.accumulate": 2}
    if kind == "lora":
        chosen["adapt.dropout"] = 0
    whole = eyetune(eyes, *options(f"whole-{kind}", **chosen, **{"train.batch_size": 4}))
    assert whole.returncode == 0, whole.stderr
    split = options(f"split-{kind}", **chosen, **{"train.batch_size": 2, "train.fsdp": "true"})
    for name, value in {"FAULT": "killed", "CALL": "5"}.items():
        monkeypatch.setitem(ENVIRONMENT, name, value)
    killed = eyetune(eyes, *split, count=2, script=script)
    assert killed.returncode != 0
    assert killed.stderr.count("epoch 1/2") == 1, killed.stderr
    monkeypatch.setitem(ENVIRONMENT, "FAULT", "")
    resumed = eyetune(eyes, "finetune", "--resume", f"split-{kind}", count=2)
    assert resumed.returncode == 0, resumed.stderr
    folders = [eyes / f"{name}-{kind}" for name in ("whole", "split")]
    for first, second in zip(*(rows(folder / "history.csv") for folder in folders), strict=True):
        for column in ("train_loss", "val_loss"):
            assert float(second[column]) == pytest.approx(float(first[column]), abs=2e-5)
    for name in ("model", "optimizer"):
        kept = [load_file(folder / "checkpoints" / "last" / f"{name}.safetensors") for folder in folders]
        assert kept[0].keys() == kept[1].keys()
        for key, tensor in kept[0].items():
            torch.testing.assert_close(kept[1][key], tensor, atol=2e-4, rtol=0, msg=key)
    scores = [rows(folder / "predictions" / "test.csv") for folder in folders]
    assert [row["image"] for row in scores[1]] == [row["image"] for row in scores[0]]
    # What one process wrote, another reads: the run is one like any other.
    assert eyetune(eyes, "predict", f"split-{kind}", "images/1.png").returncode == 0
    adapters = [{p.name for p in (folder / "adapter").rglob("*")} for folder in folders]
    assert adapters[0] == adapters[1]


@pytest.mark.parametrize(
    ("more", "processes", "message"),
    [
        ({}, 1, "this is one. Start them with torchrun"),
        ({"adapt": {"kind": "gradual"}}, 2, "not with adapt.kind gradual"),
        ({"adapt": {"kind": "linear"}}, 2, "not with adapt.kind linear"),
        ({"train": {"fsdp": True, "compile": True}}, 2, "not with train.compile"),
    ],
)
def test_what_cannot_be_split_is_refused(more: dict[str, object], processes: int, message: str) -> None:
    content = {"data": {"table": "t.csv"}, "adapt": {"kind": "full"}, "train": {"fsdp": True}} | more
    config = Config.parse(content, check_files=False)
    with pytest.raises(ConfigError, match=message):
        check_split(config, config.adapt.build(), Here(processes))


class Here(Runtime):
    """One of several processes, of which nothing else is real."""

    def __init__(self, processes: int) -> None:
        self.count = processes
        self.precision = "fp32"

    processes = property(lambda self: self.count)  # type: ignore[assignment]
    is_main = property(lambda self: False)  # type: ignore[assignment]


def test_a_step_keeps_its_images_whoever_shares_them() -> None:
    config = Config.parse({"data": {"table": "t.csv"}, "train": {"batch_size": 6, "accumulate": 2}}, check_files=False)
    for before in (1, 2, 3):
        for now in (1, 2, 3, 4):
            after = share_batch(config, before, Here(now)).train
            assert after.batch_size * after.accumulate * now == 12 * before
            assert after.batch_size <= 6
    assert share_batch(config, 2, Here(2)) is config
    with pytest.raises(RunError, match="another number that divides 12"):
        share_batch(config, 1, Here(5))


def test_without_a_launcher_there_is_one_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (processes.rank(), processes.count()) == (0, 1)
    assert processes.fail("once", 2) == 2
    assert capsys.readouterr().err == "once\n"
    assert processes.crash(ZeroDivisionError()) is None


def test_only_the_first_process_shows_progress(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from eyetune.progress import meter

    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        with meter(1, "Counting") as update:
            update(1)
        assert capsys.readouterr().err.count("Counting") == lines
