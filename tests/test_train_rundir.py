"""The run folder: whole files or none, a process killed at any moment, damage that is called damage."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from train_kit import card

from eyetune.config import Config
from eyetune.errors import RunError, UserError
from eyetune.runtime import Runtime
from eyetune.train import sealed
from eyetune.train.cost import Cost
from eyetune.train.rundir import RunDir


def save_epoch(run: RunDir, epoch: int, best: bool) -> None:
    """What the loop writes after an epoch; every tensor holds the epoch's number."""
    tensors = {"head.weight": torch.full((3,), float(epoch))}
    if best:
        run.save_best(tensors, card().at(epoch, "qwk", 0.5))
    run.save_last(
        tensors,
        card().at(epoch, "qwk", 0.5),
        {"head.weight|exp_avg": torch.full((3,), float(epoch))},
        {"epochs_done": epoch + 1, "best_epoch": epoch if best else 0},
    )


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir.create(tmp_path / "run")


def test_checkpoints_come_back(run: RunDir) -> None:
    save_epoch(run, 0, best=True)
    save_epoch(run, 1, best=False)
    last, best = run.load_last(), run.load_best()
    assert last is not None
    assert (last.card.epoch, best.card.epoch) == (1, 0)
    assert torch.equal(last.tensors["head.weight"], torch.ones(3))
    assert torch.equal(last.optimizer["head.weight|exp_avg"], torch.ones(3))
    assert last.state == {"epochs_done": 2, "best_epoch": 0}
    assert best.card == card().at(0, "qwk", 0.5)
    assert {path.name for path in (run.path / "checkpoints").iterdir()} == {"best", "last", "previous"}
    assert {path.name for path in run.best.iterdir()} == {"model.safetensors", "model.json"}


def test_nothing_in_the_folder_is_a_pickle(run: RunDir) -> None:
    save_epoch(run, 0, best=True)
    assert {path.suffix for path in run.path.rglob("*") if path.is_file()} == {".safetensors", ".json"}


def test_before_the_first_epoch_there_is_nothing_to_resume(run: RunDir) -> None:
    assert run.load_last() is None
    with pytest.raises(RunError, match="did not finish an epoch"):
        run.load_best()


KILLING_CALLS = ("replace", "rename", "unlink", "rmdir", "mkdir", "fsync")


def killed_at(number: int, work: Callable[[], None]) -> bool:
    """Run `work` in a child that dies, without any clean-up, before its `number`th change to the disk."""
    child = os.fork()
    if child == 0:
        calls = 0

        def dying(original: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls
                if calls == number:
                    os._exit(9)
                calls += 1
                return original(*args, **kwargs)

            return call

        for name in KILLING_CALLS:
            setattr(os, name, dying(getattr(os, name)))
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("best", [True, False], ids=["a better epoch", "a worse epoch"])
@pytest.mark.slow
def test_killed_at_any_moment_last_and_best_belong_together(tmp_path: Path, best: bool) -> None:
    survived = 0
    for number in range(100):
        run = RunDir.create(tmp_path / str(number))
        save_epoch(run, 0, best=True)
        killed = killed_at(number, lambda run=run: save_epoch(run, 1, best=best))
        last = run.load_last()
        assert last is not None
        epoch = last.card.epoch
        assert torch.equal(last.tensors["head.weight"], torch.full((3,), float(epoch)))
        assert torch.equal(last.optimizer["head.weight|exp_avg"], torch.full((3,), float(epoch)))
        assert last.state["epochs_done"] == epoch + 1
        # The best one that `last` speaks of can be had at once, and after settling, by name.
        wanted = last.state["best_epoch"]
        assert torch.equal(run.load_best(wanted).tensors["head.weight"], torch.full((3,), float(wanted)))
        run.settle(wanted)
        assert run.load_best().card.epoch == wanted
        settled = run.load_last()
        assert settled is not None
        assert settled.card.epoch == epoch
        assert {path.name for path in (run.path / "checkpoints").iterdir()} <= {"best", "last", "previous"}
        if not killed:
            assert epoch == 1
            break
        survived += 1
    # Fewer would mean that the calls no longer go through the patched names.
    assert 10 < survived < 100


def left_behind(run: RunDir) -> frozenset[tuple[str, bytes]]:
    """All that is in a run folder: the random part of temporary names aside, names and contents."""
    files = [path for path in run.path.rglob("*") if path.name != ".lock"]
    return frozenset(
        (re.sub(r"[0-9a-f]{12}~", "~", str(path.relative_to(run.path))), path.read_bytes() if path.is_file() else b"")
        for path in files
    )


@pytest.mark.slow
def test_killed_while_settling_nothing_is_lost(tmp_path: Path) -> None:
    """Killed in every state that a killed save leaves behind, once each: a sync, say, leaves what was there before."""
    begun = RunDir.create(tmp_path / "begun")
    save_epoch(begun, 0, best=True)

    def copied(run: RunDir, name: str) -> RunDir:
        shutil.copytree(run.path, tmp_path / name)
        return RunDir(tmp_path / name)

    states: set[frozenset[tuple[str, bytes]]] = set()
    kills = 0
    for write in range(1, 100):
        left = copied(begun, str(write))
        if not killed_at(write, lambda left=left: save_epoch(left, 1, best=True)):
            break
        if (state := left_behind(left)) in states:
            continue
        states.add(state)
        last = left.load_last()
        assert last is not None
        wanted = last.state["best_epoch"]
        for settle in range(50):
            run = copied(left, f"{write}-{settle}")
            killed = killed_at(settle, lambda run=run, wanted=wanted: run.settle(wanted))
            again = run.load_last()
            assert again is not None
            assert again.card.epoch == last.card.epoch
            run.settle(wanted)
            assert run.load_best().card.epoch == wanted
            if not killed:
                break
            kills += 1
        else:
            pytest.fail("settling does not end")
    else:
        pytest.fail("the save does not end")
    assert len(states) > 10
    assert kills > 20


def test_a_full_disk_is_called_so_and_the_last_checkpoint_stays(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    save_epoch(run, 0, best=True)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("eyetune.files.sync", full)
    with pytest.raises(UserError, match="disk is full") as caught:
        save_epoch(run, 1, best=False)
    assert str(run.path) in str(caught.value)
    monkeypatch.undo()
    last = run.load_last()
    assert last is not None
    assert last.card.epoch == 0
    assert {path.name for path in (run.path / "checkpoints").iterdir()} == {"best", "last"}


def test_a_folder_that_holds_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty") as caught:
        RunDir.create(tmp_path)
    assert "--resume" not in str(caught.value)
    (tmp_path / "config.yaml").write_text("{}")
    with pytest.raises(UserError, match="--resume"):
        RunDir.create(tmp_path)
    with pytest.raises(UserError, match="is a file"):
        RunDir.create(tmp_path / "notes.txt")
    (tmp_path / "empty").mkdir()
    RunDir.create(tmp_path / "empty")


def test_a_run_that_wrote_nothing_leaves_its_folder_free(run: RunDir) -> None:
    """Its first file could not be written: the same command begins again, and there is no cost of nothing."""
    with pytest.raises(UserError, match="planted"), Cost(run, Runtime("cpu", "fp32")):
        raise UserError("planted")
    RunDir.check_free(run.path)
    run.write_config(Config.parse({"data": {"table": "t.csv"}}, check_files=False))
    with pytest.raises(UserError, match="planted"), Cost(run, Runtime("cpu", "fp32")):
        raise UserError("planted")
    assert run.read_cost()["finished"] is False


def test_a_missing_run_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "aptos-lora").mkdir()
    with pytest.raises(RunError, match="Did you mean 'aptos-lora'"):
        RunDir.open(tmp_path / "aptos-loar")
    with pytest.raises(RunError, match=r"no config\.yaml"):
        RunDir.open(tmp_path / "aptos-lora")


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "model.json"])
@pytest.mark.parametrize("damage", ["cut", "gone", "empty"])
def test_damage_is_called_damage(run: RunDir, name: str, damage: str) -> None:
    save_epoch(run, 0, best=True)
    file = run.last / name
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    with pytest.raises(RunError, match=name.replace(".", r"\.")):
        run.load_last()


def test_a_newer_schema_and_missing_fields_are_refused(run: RunDir) -> None:
    save_epoch(run, 0, best=True)
    marker = run.best / "model.json"
    content = json.loads(marker.read_text())
    del content["seal"]
    for change, message in (({"schema": 99}, "schema 99"), ({"new": 1}, "does not know: new")):
        sealed.seal(run.best, {}, {}, content | change)
        with pytest.raises(RunError, match=message):
            run.load_best()
    del content["fingerprint"]
    sealed.seal(run.best, {}, {}, content)
    with pytest.raises(RunError, match="lacks fingerprint"):
        run.load_best()


def test_history_comes_back_with_its_gaps(run: RunDir) -> None:
    run.write_history([{"epoch": 1, "loss": 0.5, "qwk": None}, {"epoch": 2, "loss": float("nan"), "qwk": 0.25}])
    assert run.history_file.read_text() == "epoch,loss,qwk\n1,0.5,\n2,,0.25\n"
    assert run.read_history() == [{"epoch": 1, "loss": 0.5, "qwk": None}, {"epoch": 2, "loss": None, "qwk": 0.25}]
    assert RunDir(run.path / "other").read_history() == []


def test_configuration_and_metrics_come_back(run: RunDir) -> None:
    config = Config.parse({"data": {"table": "gone.csv"}, "adapt": "linear", "train": {"lr": 5e-4}}, check_files=False)
    run.write_config(config)
    assert RunDir.open(run.path).read_config() == config
    run.write_metrics({"datasets": {"test": {"metrics": {"qwk": {"value": float("nan"), "ci": (None, None)}}}}})
    assert run.read_metrics()["datasets"]["test"]["metrics"]["qwk"] == {"value": None, "ci": [None, None]}
    run.config_file.write_text("data: [")
    with pytest.raises(RunError, match="not YAML"):
        run.read_config()


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", main=False)
    save_epoch(run, 0, best=True)
    run.write_environment({})
    run.write_history([{"epoch": 1}])
    assert not run.path.exists()


def test_names_of_datasets_cannot_leave_the_folder(run: RunDir) -> None:
    assert run.predictions_file("messidor-2") == run.path / "predictions" / "messidor-2.csv"
    for name in ("../x", "a/b", "", ".hidden"):
        with pytest.raises(UserError, match="name of a file"):
            run.predictions_file(name)
