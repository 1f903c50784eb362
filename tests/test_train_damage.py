"""Damage is found: a thousand mutations and none accepted; other versions; the disk's errors; a run in use."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor
from train_kit import card, fit_tiny, photographs, tiny_model

from eyetune.data.records import Manifest
from eyetune.errors import RunError, UserError
from eyetune.files import atomic
from eyetune.runtime import Runtime, check_torch
from eyetune.tensors import read_tensors, write_tensors
from eyetune.train import optim, sealed
from eyetune.train.lock import LOCK
from eyetune.train.run import load_run
from eyetune.train.rundir import RunDir

MUTATIONS = 1000


@pytest.fixture(scope="module")
def train_images(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return photographs(tmp_path_factory.mktemp("train"), 10)


@pytest.fixture(scope="module")
def val_images(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return photographs(tmp_path_factory.mktemp("val"), 6, start=100)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, train_images: Manifest, val_images: Manifest) -> RunDir:
    """A run of two epochs, not finished: with a previous checkpoint."""
    run = RunDir.create(tmp_path_factory.mktemp("trained") / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunDir, "drop_previous", lambda self: None)
        fit_tiny(run, train_images, val_images, epochs=2, adapt={"kind": "gradual", "phases": [0], "patience": 9})
    return run


@pytest.fixture
def run(tmp_path: Path, trained: RunDir) -> RunDir:
    shutil.copytree(trained.path, tmp_path / "run")
    return RunDir(tmp_path / "run")


# -- mutations ---------------------------------------------------------------------------------------------------------


def flip_a_bit(file: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def change_a_byte(file: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    place = rng.randrange(len(content))
    content[place] = rng.choice([byte for byte in range(256) if byte != content[place]])
    file.write_bytes(content)


def cut(file: Path, rng: random.Random) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: rng.randrange(len(content))])


def lengthen(file: Path, rng: random.Random) -> None:
    file.write_bytes(file.read_bytes() + rng.randbytes(rng.randint(1, 64)))


def remove(file: Path, rng: random.Random) -> None:
    file.unlink()


def zero_a_block(file: Path, rng: random.Random) -> None:
    """What a file system may leave of a block it never wrote."""
    content = bytearray(file.read_bytes())
    start = rng.randrange(len(content))
    block = content[start : start + 512]
    if not any(block):
        return flip_a_bit(file, rng)
    content[start : start + 512] = bytes(len(block))
    file.write_bytes(content)
    return None


def of_tensors(change: Callable[[dict[str, Tensor], random.Random], None]) -> Callable[[Path, random.Random], None]:
    """A file of tensors written anew, whole in itself, with other tensors in it."""

    def mutate(file: Path, rng: random.Random) -> None:
        if file.suffix != ".safetensors":
            return flip_a_bit(file, rng)
        content = safetensors.torch.load_file(file)
        change(content, rng)
        write_tensors(file, content)
        return None

    mutate.__name__ = change.__name__
    return mutate


def a_tensor_more(content: dict[str, Tensor], rng: random.Random) -> None:
    content["extra.weight"] = torch.zeros(rng.randint(1, 5))


def a_tensor_less(content: dict[str, Tensor], rng: random.Random) -> None:
    del content[rng.choice(sorted(content))]


def another_shape(content: dict[str, Tensor], rng: random.Random) -> None:
    name = rng.choice(sorted(name for name in content if content[name].ndim > 0))
    content[name] = rng.choice(
        [content[name][None], content[name].flatten()[:-1], content[name].repeat(2, *[1] * (content[name].ndim - 1))]
    )


def not_a_number(content: dict[str, Tensor], rng: random.Random) -> None:
    name = rng.choice(sorted(content))
    flat = content[name].clone().reshape(-1)
    flat[rng.randrange(len(flat))] = rng.choice([float("nan"), float("inf"), -float("inf")])
    content[name] = flat.reshape(content[name].shape)


def another_type(content: dict[str, Tensor], rng: random.Random) -> None:
    name = rng.choice(sorted(content))
    content[name] = content[name].to(rng.choice([torch.float16, torch.float64, torch.bfloat16]))


def another_name(content: dict[str, Tensor], rng: random.Random) -> None:
    name = rng.choice(sorted(content))
    content[f"{name}x"] = content.pop(name)


TENSOR_CHANGES = [a_tensor_more, a_tensor_less, another_shape, not_a_number, another_type, another_name]
CHANGES = [flip_a_bit, change_a_byte, cut, lengthen, remove, zero_a_block, *map(of_tensors, TENSOR_CHANGES)]


def restored(folder: Path, original: dict[str, bytes]) -> None:
    for name, content in original.items():
        (folder / name).write_bytes(content)


@pytest.mark.slow
def test_of_a_thousand_mutations_none_is_accepted(run: RunDir) -> None:
    rng = random.Random(0)
    original = {file.name: file.read_bytes() for file in run.last.iterdir()}
    accepted, offered = [], 0
    for number in range(MUTATIONS):
        change, name = CHANGES[number % len(CHANGES)], rng.choice(sorted(original))
        change(run.last / name, rng)
        try:
            run.load_last()
            accepted.append(f"{number}: {change.__name__} of {name}")
        except RunError as error:
            offered += "--from previous" in str(error)
        restored(run.last, original)
    assert accepted == []
    assert offered == MUTATIONS, "the checkpoint before it is whole"
    assert run.load_last() is not None


def test_tensors_sealed_anew_are_compared_with_the_network(run: RunDir) -> None:
    """Whoever writes the marker anew too, by mistake or on purpose: names, shapes, types and values still count."""
    model, strategy = tiny_model({"kind": "gradual", "phases": [0], "patience": 9})
    good = run.load_last()
    assert good is not None
    rng = random.Random(1)
    checked = 0
    for number in range(240):
        change, part = TENSOR_CHANGES[number % len(TENSOR_CHANGES)], number // len(TENSOR_CHANGES) % 2
        parts = [dict(good.tensors), dict(good.optimizer)]
        change(parts[part], rng)
        if part == 1 and change is a_tensor_less:
            names = {key.rpartition("|")[0] for key in parts[1]}
            assert any(
                f"{name}|{entry}" not in parts[1] for name in names for entry in ("step", "exp_avg", "exp_avg_sq")
            )
        optimizer = optim.build_optimizer(strategy.groups(model), 1e-3, 0.0)
        with pytest.raises((RunError, ValueError)):  # the loop makes a RunError of the optimizer's
            strategy.load_checkpoint(model, parts[0])
            optim.load_state_tensors(optimizer, model, parts[1])
        checked += 1
    assert checked == 240
    strategy.load_checkpoint(model, good.tensors)


def test_a_state_that_is_not_finite_is_not_saved(run: RunDir) -> None:
    with pytest.raises(UserError, match=r"training diverged.*1 tensors hold NaN"):
        run.save_last({"head.weight": torch.tensor([1.0, float("nan")])}, card(), {}, {})
    last = run.load_last()
    assert last is not None
    assert last.card.epoch == 1


def test_the_checkpoint_before_the_last_can_be_gone_on_from(
    tmp_path: Path, run: RunDir, train_images: Manifest, val_images: Manifest
) -> None:
    options: dict[str, Any] = {"epochs": 2, "adapt": {"kind": "gradual", "phases": [0], "patience": 9}}
    flip_a_bit(run.last / "optimizer.safetensors", random.Random(0))
    with pytest.raises(RunError, match=f"--resume {run.path} --from previous"):
        fit_tiny(run, train_images, val_images, resume=True, **options)
    run.back_to_previous()
    last = run.load_last()
    assert last is not None
    assert last.card.epoch == 0
    _, again = fit_tiny(run, train_images, val_images, resume=True, **options)
    assert again.epochs == 2
    whole, _ = fit_tiny(RunDir.create(tmp_path / "whole"), train_images, val_images, **options)
    found = run.load_last()
    assert found is not None
    state = whole.state_dict()
    best = run.load_best().tensors
    assert all(torch.equal(tensor, state[name]) for name, tensor in best.items())
    with pytest.raises(RunError, match="no checkpoint before"):
        run.back_to_previous()


def test_a_damaged_best_is_known_when_the_run_goes_on(
    run: RunDir, train_images: Manifest, val_images: Manifest
) -> None:
    flip_a_bit(run.best / "model.safetensors", random.Random(0))
    with pytest.raises(RunError, match=r"best.*(?s:.)*last is whole \(up to epoch 2\)"):
        fit_tiny(run, train_images, val_images, resume=True, adapt={"kind": "gradual", "phases": [0], "patience": 9})


# -- sizes, versions ---------------------------------------------------------------------------------------------------


def test_small_files_that_claim_gigabytes_are_refused_before_room_is_made(tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [1 << 30], "data_offsets": [0, 4 << 30]}}).encode()
    file = tmp_path / "model.safetensors"
    for length in (len(header), 1 << 40):
        file.write_bytes(length.to_bytes(8, "little") + header)
        with pytest.raises(RunError, match="damaged"):
            read_tensors(file)


def test_a_file_of_another_size_is_refused_before_it_is_read(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    os.truncate(run.last / "model.safetensors", 1 << 40)  # sparse: a terabyte that takes no room
    os.truncate(run.best / "model.json", 1 << 40)
    start = time.monotonic()
    with pytest.raises(RunError, match="1099511627776 bytes"):
        run.load_last()
    with pytest.raises(RunError, match="larger"):
        run.load_best()
    assert time.monotonic() - start < 5


STORED = Path(__file__).parent / "data_run"


def test_a_run_stored_by_the_first_version_opens(tmp_path: Path) -> None:
    """Schema 1: no list of files, no seal. A linear probe of `nano`, as EyeTune wrote it at commit 343594b."""
    shutil.copytree(STORED, tmp_path / "run")
    run = RunDir.open(tmp_path / "run")
    expected = json.loads((STORED / "expected.json").read_text())
    last, best = run.load_last(), run.load_best()
    assert last is not None
    assert "seal" not in json.loads((run.last / "model.json").read_text())
    assert last.state["epochs_done"] == expected["epochs_done"]
    assert best.card.classes == tuple(expected["classes"])
    assert best.card.value == expected["value"]
    assert {name: float(tensor.double().sum()) for name, tensor in best.tensors.items()} == pytest.approx(
        expected["sums"]
    )
    assert last.optimizer
    assert run.read_config().seed == expected["seed"]
    rows, columns = np.mgrid[:96, :96]
    Image.fromarray(np.stack([rows + columns, 2 * rows, 2 * columns], -1).astype(np.uint8)).save(tmp_path / "a.png")
    probabilities = load_run(run.path, device="cpu").predict([tmp_path / "a.png"])[0]
    np.testing.assert_allclose(probabilities, expected["probabilities"], atol=1e-3)


def test_an_old_pytorch_is_refused() -> None:
    for version in ("2.10.0", "2.15.0+cu132", "3.0.1"):
        check_torch(version)
    for version in ("2.9.1", "2.4.0+cpu", "1.13.1"):
        with pytest.raises(UserError, match="too old"):
            check_torch(version)


# -- the disk's errors -------------------------------------------------------------------------------------------------

CALLS = ("open", "fsync", "replace", "rename", "mkdir")


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EROFS, errno.EACCES], ids=errno.errorcode.get)
def test_an_error_at_any_call_names_the_path_and_keeps_the_last_checkpoint(
    tmp_path: Path, trained: RunDir, code: int
) -> None:
    """As tests/faults/disk.py does it with system calls, here with Python's functions."""
    failed = 0
    for number in range(100):
        shutil.copytree(trained.path, tmp_path / str(number))
        run = RunDir(tmp_path / str(number))
        last = run.load_last()
        assert last is not None
        calls = 0

        def failing(original: Callable[..., Any], number: int = number) -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == number + 1:
                    raise OSError(code, os.strerror(code), str(arguments[0]))
                return original(*arguments, **options)

            return call

        with pytest.MonkeyPatch.context() as patch:
            for name in CALLS:
                patch.setattr(os, name, failing(getattr(os, name)))
            try:
                run.save_best(last.tensors, last.card.at(2, "qwk", 1.0))
                run.save_last(
                    last.tensors, last.card.at(2, "qwk", 1.0), last.optimizer, {**last.state, "best_epoch": 2}
                )
            except UserError as error:
                failed += str(run.path) in str(error)
        found = run.load_last()
        assert found is not None
        assert all(torch.equal(tensor, last.tensors[name]) for name, tensor in found.tensors.items())
        run.load_best(found.state["best_epoch"])
        shutil.rmtree(run.path)
        if calls < number + 1:
            break
    # Fewer would mean that the calls no longer go through the patched names. (A folder that cannot be synced, for want
    # of permission, is no error.)
    assert 10 < failed <= number


# -- a run in use ------------------------------------------------------------------------------------------------------


def holding(run: RunDir) -> tuple[int, int]:
    """A child that works on `run` until it is killed, and the pipe that says it does."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with run.in_use():
            os.write(writing, b"!")
            time.sleep(60)
        os._exit(0)
    os.read(reading, 1)
    return child, reading


def test_a_run_in_use_is_refused_until_the_process_dies(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run")
    child, _ = holding(run)
    try:
        with pytest.raises(RunError, match=f"in use by another process .number {child}"), run.in_use():
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert (run.path / LOCK).exists()
    with run.in_use(), run.in_use():
        assert (run.path / LOCK).exists()
    assert not (run.path / LOCK).exists()
    RunDir.create(run.path)


def test_no_two_processes_ever_hold_a_run(tmp_path: Path) -> None:
    """The lock's file is removed at the end: whoever opened it just before must not hold a lock on nothing."""
    run = RunDir.create(tmp_path / "run")
    inside = tmp_path / "inside"
    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            code, end = 0, time.monotonic() + 1.0
            while time.monotonic() < end:
                try:
                    with run.in_use():
                        handle = os.open(inside, os.O_CREAT | os.O_EXCL)
                        os.close(handle)
                        inside.unlink()
                except RunError:
                    continue
                except BaseException:
                    code = 1
                    break
            os._exit(code)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4


def test_a_disk_that_takes_no_lock_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run = RunDir.create(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr("os.ftruncate", full)
        with (
            pytest.raises(UserError, match=re.escape(f"cannot write {run.path / LOCK}: the disk is full")),
            run.in_use(),
        ):
            pass
    with run.in_use():  # nobody holds it
        pass


def test_a_process_that_does_not_write_needs_no_lock(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "nowhere", main=False)
    with run.in_use():
        assert not run.path.exists()


# -- the generators ----------------------------------------------------------------------------------------------------


def test_the_generators_go_on_from_what_was_kept(tmp_path: Path) -> None:
    def draw() -> Any:
        return random.gauss(0, 1), random.random(), np.random.standard_normal(), torch.rand(3).tolist()  # noqa: NPY002

    runtime = Runtime("cpu", "fp32", seed=4)
    runtime.seed_epoch(2)
    random.gauss(0, 1)  # leaves a second one in waiting
    np.random.standard_normal()  # noqa: NPY002
    write_tensors(tmp_path / "r.safetensors", runtime.random_state())
    first = [draw() for _ in range(3)]
    runtime.set_random_state(read_tensors(tmp_path / "r.safetensors"))
    assert [draw() for _ in range(3)] == first
    with pytest.raises(RunError, match="random state"):
        runtime.set_random_state({"torch": torch.zeros(3, dtype=torch.uint8)})


def test_tensors_come_back_as_the_library_reads_them(tmp_path: Path) -> None:
    content = {
        "b": torch.randn(3, 5),
        "a": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "bf": torch.randn(7).bfloat16(),
        "bool": torch.tensor([True, False, True]),
        "i": torch.arange(5),
        "u": torch.arange(9, dtype=torch.uint8),
        "t": torch.randn(4, 6).T,
        "h": torch.randn(3).half(),
    }
    said = write_tensors(tmp_path / "x.safetensors", content)
    assert said["size"] == (tmp_path / "x.safetensors").stat().st_size
    found = read_tensors(tmp_path / "x.safetensors")
    assert found.keys() == content.keys()
    assert all(
        torch.equal(tensor, content[name]) and tensor.dtype == content[name].dtype for name, tensor in found.items()
    )
    assert sealed.SCHEMA == 2


def test_what_a_killed_process_half_wrote_is_swept_away_when_the_run_goes_on(run: RunDir) -> None:
    with pytest.raises(ZeroDivisionError), atomic(run.path / "metrics.json") as temporary:
        left = temporary.name
        raise ZeroDivisionError
    (run.path / left).write_text("half")
    (run.path / ".mine.csv").write_text("mine")
    with run.in_use():
        assert not (run.path / left).exists()
        assert (run.path / ".mine.csv").exists()
    (tmp := run.path.parent / "fresh").mkdir()
    (tmp / left).write_text("half")
    RunDir.check_free(tmp)
