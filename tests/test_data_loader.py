"""Batches: each record once, the same for the same seed and epoch, errors that name file and row."""

from __future__ import annotations

import os
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from data_kit import PREPROCESS, manifest, photographs, records, save, touch

from eyetune.data import loader as room
from eyetune.data import readable
from eyetune.data.cache import Cache
from eyetune.data.config import DataConfig
from eyetune.data.fundus import FundusSettings, load_square
from eyetune.data.loader import Loader, make_loader
from eyetune.data.order import EpochBatches
from eyetune.data.readable import check_readable, choose_workers, find_faults
from eyetune.data.records import Manifest
from eyetune.data.transforms import eval_transform
from eyetune.errors import DataError, UserError

SETTINGS = FundusSettings.of(DataConfig(table="t.csv"), PREPROCESS)


def loading(found: Manifest, **options: Any) -> Loader:
    chosen: dict[str, Any] = {"batch_size": 4, "training": True, "augment": "strong", "workers": 0, "seed": 5}
    return make_loader(found, PREPROCESS, SETTINGS, **(chosen | options))


def epoch(loader: Loader, number: int) -> tuple[list[int], torch.Tensor]:
    loader.set_epoch(number)
    batches = list(loader)
    return torch.cat([batch["index"] for batch in batches]).tolist(), torch.cat([batch["image"] for batch in batches])


def test_evaluation_is_in_order_and_complete(tmp_path: Path) -> None:
    found = photographs(tmp_path, 10)
    found = found.with_records(replace(r, label=None) if i == 7 else r for i, r in enumerate(found))
    loader = loading(found, training=False, augment="strong")
    batches = list(loader)
    assert [len(batch["index"]) for batch in batches] == [4, 4, 2]
    assert len(loader) == 3
    assert torch.cat([batch["index"] for batch in batches]).tolist() == list(range(10))
    assert torch.cat([batch["target"] for batch in batches]).tolist() == [0, 1, 0, 1, 0, 1, 0, -1, 0, 1]
    image = batches[0]["image"]
    assert image.shape == (4, 3, 32, 32)
    assert image.dtype == torch.float32
    square = torch.from_numpy(load_square(found[2].image, SETTINGS)).permute(2, 0, 1)
    torch.testing.assert_close(image[2], eval_transform(PREPROCESS)(square))
    assert torch.equal(epoch(loader, 0)[1], epoch(loader, 9)[1])


def test_training_visits_everything_and_changes_with_the_epoch(tmp_path: Path) -> None:
    loader = loading(photographs(tmp_path, 10))
    first, second = epoch(loader, 0), epoch(loader, 1)
    assert sorted(first[0]) == sorted(second[0]) == list(range(10))
    assert first[0] != second[0]
    # The same record is augmented otherwise in the next epoch.
    assert not torch.equal(first[1][first[0].index(3)], second[1][second[0].index(3)])


def test_a_run_can_be_taken_up_at_any_epoch(tmp_path: Path) -> None:
    found = photographs(tmp_path, 10)
    going = loading(found)
    whole = [epoch(going, number) for number in range(3)]
    torch.manual_seed(99)
    resumed = epoch(loading(found, cache=Cache(tmp_path / "cache", 1)), 2)
    assert resumed[0] == whole[2][0]
    assert torch.equal(resumed[1], whole[2][1])
    assert not torch.equal(epoch(loading(found, seed=6), 2)[1], whole[2][1])


def test_an_image_does_not_depend_on_its_batch(tmp_path: Path) -> None:
    found = photographs(tmp_path, 10)
    few, many = epoch(loading(found, batch_size=3), 1), epoch(loading(found, batch_size=10), 1)
    assert few[0] == many[0]
    assert torch.equal(few[1], many[1])


def test_readers_that_are_left_over_end_with_the_program_and_in_silence(tmp_path: Path) -> None:
    """As where an unfinished iteration is still held when Python ends: in a process of its own, the way it ends."""
    child = os.fork()
    if not child:
        held = iter(loading(photographs(tmp_path, 4), workers=1, batch_size=1))
        next(held)
        left = list(room._WORKERS)
        room._end_workers()
        try:
            for worker in left:
                worker.join(timeout=30)  # as multiprocessing does next; PyTorch's handler would raise here
            os._exit(len(left) - 1 if all(worker.exitcode == -signal.SIGKILL for worker in left) else 3)
        except BaseException:
            os._exit(4)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("kept", [True, False])
def test_workers_change_nothing(tmp_path: Path, kept: bool) -> None:
    found = photographs(tmp_path, 10)
    cache = Cache(tmp_path / "cache", 1) if kept else None
    alone, helped = loading(found, cache=cache), loading(found, cache=cache, workers=2)
    for number in (0, 3):
        one, two = epoch(alone, number), epoch(helped, number)
        assert one[0] == two[0]
        assert torch.equal(one[1], two[1])


def test_the_training_process_keeps_its_generator_and_its_threads(tmp_path: Path) -> None:
    loader = loading(photographs(tmp_path, 6))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    threads = torch.get_num_threads()
    list(loader)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("workers", [0, 2])
def test_cached_squares_are_decoded_once(tmp_path: Path, workers: int) -> None:
    found = photographs(tmp_path, 8)
    cache = Cache(tmp_path / "cache", 1)
    check_readable(found, False, cache=cache, settings=SETTINGS)
    loader = loading(found, cache=cache, workers=workers)
    first = epoch(loader, 0)
    for record in found:
        record.image.write_bytes(b"gone")
    second = epoch(loader, 1)
    assert sorted(second[0]) == list(range(8))
    assert not torch.equal(first[1], second[1])


def test_processes_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readable.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(readable.sys, "platform", "linux")
    assert [choose_workers("auto", 1000, processes) for processes in (1, 4, 16)] == [8, 2, 1]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_one_message(tmp_path: Path, workers: int) -> None:
    found = photographs(tmp_path, 6)
    found[3].image.write_bytes(b"")
    with pytest.raises(DataError) as caught:
        list(loading(found, training=False, workers=workers))
    said = str(caught.value)
    assert said.startswith(f"t.csv row 5: {found[3].image}: an empty file (0 bytes).")
    assert "Traceback" not in said


def test_a_batch_larger_than_the_data() -> None:
    found = manifest(records([0, 1, 0]))
    with pytest.raises(
        UserError, match=r"train.batch_size is 4 but there are only 3 images to train on: use at most 3"
    ):
        loading(found)
    with pytest.raises(UserError, match="use at most 1"):
        loading(found, batch_size=2, shard=(0, 2))
    assert len(loading(found, training=False)) == 1


# Order


def order(labels: list[int | None], number: int = 0, **options: Any) -> list[list[int]]:
    batches = EpochBatches(labels, options.pop("batch_size", 4), seed=1, **options)
    batches.set_epoch(number)
    found = list(batches)
    assert len(found) == len(batches)
    assert all(epoch == number for batch in found for epoch, _ in batch)
    return [[index for _, index in batch] for batch in found]


def test_the_balanced_sampler_draws_every_class_alike() -> None:
    labels: list[int | None] = [0] * 80 + [1] * 15 + [2] * 5
    drawn = [index for batch in order(labels, shuffle=True, balanced=True) for index in batch]
    assert len(drawn) == 100
    counts = Counter(labels[index] for index in drawn)
    assert all(count in (32, 33, 34) for count in counts.values())
    often = Counter(drawn)
    # Evenly within a class: none of the common one twice, the rare ones all about as often.
    assert max(often[i] for i in range(80)) == 1
    assert {often[i] for i in range(95, 100)} <= {6, 7}
    assert drawn != [index for batch in order(labels, 1, shuffle=True, balanced=True) for index in batch]


@pytest.mark.parametrize("count", [16, 17, 18, 19, 23])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("shuffle", [False, True])
def test_processes_share_the_epoch(count: int, world: int, shuffle: bool) -> None:
    parts = [order([0] * count, shuffle=shuffle, shard=(rank, world)) for rank in range(world)]
    everything = [index for part in parts for batch in part for index in batch]
    assert len(set(everything)) == len(everything)
    assert all(batch for part in parts for batch in part)
    if shuffle:
        # As many steps in every process; fewer records than processes at the end are left for the next epoch.
        assert len({len(part) for part in parts}) == 1
        rest = count % (4 * world)
        assert len(everything) == (count if rest == 0 or rest >= world else count - rest)
    else:
        assert sorted(everything) == list(range(count))


def test_workers_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readable.os, "sched_getaffinity", lambda _: set(range(32)), raising=False)
    monkeypatch.setattr(readable.sys, "platform", "linux")
    assert [choose_workers("auto", count) for count in (10, 1000)] == [0, 8]
    assert choose_workers(3, 10) == 3
    monkeypatch.setattr(readable.sys, "platform", "darwin")
    assert choose_workers("auto", 1000) == 0


# Checking


def test_readable_images_pass(tmp_path: Path) -> None:
    found = photographs(tmp_path, 3)
    assert check_readable(found, False) is found
    assert find_faults(found) == [None, None, None]


def test_unreadable_images_are_named_or_left_out(tmp_path: Path) -> None:
    found = photographs(tmp_path, 8)
    found[1].image.write_bytes(b"")
    found[6].image.write_bytes(b"<html>")
    cut = save(tmp_path / "7.jpg", np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8))
    cut.write_bytes(cut.read_bytes()[:-200])
    found = found.with_records([*found.records[:7], replace(found[7], image=cut)])
    with pytest.raises(DataError) as caught:
        check_readable(found, False)
    said = str(caught.value)
    assert "3 of 8 images cannot be read" in said
    for row, why in ((3, "1.png: an empty file"), (8, "6.png: a web page"), (9, "7.jpg: damaged or cut short")):
        assert f"t.csv row {row}: {tmp_path}/{why}" in said
    assert "--skip-unreadable" in said
    kept = check_readable(found, True)
    assert [record.name for record in kept] == ["0.png", "2.png", "3.png", "4.png", "5.png"]
    assert kept.notes[-1].startswith("skipped: 3 of 8 images cannot be read:\n  t.csv row 3")


def test_nothing_readable_is_an_error_in_any_case(tmp_path: Path) -> None:
    touch(tmp_path, ["0.jpg", "1.jpg"])
    found = manifest([replace(record, image=tmp_path / record.name) for record in records([0, 1])])
    with pytest.raises(DataError, match="none of the 2 images can be read"):
        check_readable(found, True)


def test_batches_go_through_pipes_where_shared_memory_is_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = photographs(tmp_path, 10)
    usual = loading(found, workers=2)
    need = 2 * 2 * 3 * (4 * 3 * 32 * 32 * 4)
    for free, expected in ((need, usual.collate_fn), (need - 1, room._collate_for_pipes)):
        monkeypatch.setattr(room.shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        assert loading(found, workers=2).collate_fn is expected
        assert loading(found, workers=0).collate_fn is usual.collate_fn
    small = loading(found, workers=2)
    assert capsys.readouterr().err.count("--shm-size") == 1
    for number in (0, 1):
        one, two = epoch(usual, number), epoch(small, number)
        assert one[0] == two[0]
        assert torch.equal(one[1], two[1])
    found[3].image.write_bytes(b"")
    with pytest.raises(DataError, match="an empty file"):
        list(loading(found, workers=2, training=False))
