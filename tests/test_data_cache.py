"""The image cache: to the byte what decoding gives, never stale, and unharmed by whatever happens to its files."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_kit import PREPROCESS, fundus, photographs, save

from eyetune.data import cache as room
from eyetune.data import store as ground
from eyetune.data.cache import Cache
from eyetune.data.config import DataConfig
from eyetune.data.fundus import FundusSettings, load_square
from eyetune.data.loader import make_loader
from eyetune.data.readable import check_readable
from eyetune.data.store import Item, Kind, Store
from eyetune.errors import DataError

SETTINGS = FundusSettings(32)


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    return [record.image for record in photographs(tmp_path / "photos", 12)]


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are decoded from here on, through the cache."""
    seen: list[Path] = []

    def load(path: Path, settings: FundusSettings) -> Any:
        seen.append(path)
        return load_square(path, settings)

    monkeypatch.setattr(room, "load_square", load)
    return seen


def opened(tmp_path: Path, limit: float = 1.0) -> Cache:
    return Cache(tmp_path / "cache", limit)


def packs(tmp_path: Path, suffix: str = "pack") -> list[Path]:
    return sorted((tmp_path / "cache").rglob(f"*.{suffix}"))


def check_all(cache: Cache, photos: list[Path]) -> None:
    for path in photos:
        assert np.array_equal(cache.square(path, SETTINGS), load_square(path, SETTINGS))


# Right


@pytest.mark.parametrize(
    "settings",
    [
        SETTINGS,
        replace(SETTINGS, fit="squash"),
        replace(SETTINGS, crop=False, pixels=40),
        replace(SETTINGS, contrast="clahe"),
        replace(SETTINGS, contrast="ben-graham"),
    ],
    ids=str,
)
def test_squares_are_those_of_decoding_to_the_byte(
    tmp_path: Path, settings: FundusSettings, decoded: list[Path]
) -> None:
    wide = save(tmp_path / "wide.jpg", fundus(200, 300))
    direct = load_square(wide, settings)
    cache = opened(tmp_path)
    for found in (cache.square(wide, settings), cache.square(wide, settings), opened(tmp_path).square(wide, settings)):
        assert found.dtype == np.uint8
        assert np.array_equal(found, direct)
        found += 1  # the caller's own copy
    assert decoded == [wide]


def test_every_setting_and_the_code_have_squares_of_their_own(
    tmp_path: Path, photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = opened(tmp_path)
    others = {"pixels": 48, "fit": "squash", "crop": False, "contrast": "clahe", "bits": 12}
    assert set(others) == set(SETTINGS.to_dict())
    keys = {cache.square_key(photos[0], replace(SETTINGS, **{name: value})) for name, value in others.items()}
    keys |= {cache.square_key(path, SETTINGS) for path in photos}
    monkeypatch.setattr(room, "VERSION", room.VERSION + 1)
    keys.add(cache.square_key(photos[0], SETTINGS))
    monkeypatch.setattr(room, "pillow_version", "0")
    keys.add(cache.square_key(photos[0], SETTINGS))
    assert len(keys) == len(others) + len(photos) + 2


def test_a_changed_file_is_never_served_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_SETTLED", -1.0)  # trust the times at once: the strictest case
    photo = tmp_path / "a.png"
    size = 0
    for seed in range(4):
        save(photo, fundus(64, 64, radius=28, seed=seed))
        size = max(size, photo.stat().st_size)
        with open(photo, "ab") as stream:
            stream.write(bytes(20_000 - photo.stat().st_size))  # the same size each time
        os.utime(photo, (1, 1))  # and the same time of change, as some copying programs leave it
        assert np.array_equal(opened(tmp_path).square(photo, SETTINGS), load_square(photo, SETTINGS))
    assert size < 20_000
    assert opened(tmp_path).info().counts[Kind.SQUARE] == 4


def test_a_file_replaced_while_it_is_read_is_not_kept_under_the_old_content(
    tmp_path: Path, photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = photos[0].read_bytes()

    def load(path: Path, settings: FundusSettings) -> Any:
        path.write_bytes(photos[1].read_bytes())
        return load_square(path, settings)

    with monkeypatch.context() as patch:
        patch.setattr(room, "load_square", load)
        opened(tmp_path).square(photos[0], SETTINGS)
    photos[0].write_bytes(first)
    check_all(opened(tmp_path), photos)


def test_the_same_photograph_is_kept_once(tmp_path: Path, photos: list[Path], decoded: list[Path]) -> None:
    copy = tmp_path / "elsewhere" / "other name.png"
    copy.parent.mkdir()
    shutil.copy(photos[0], copy)
    cache = opened(tmp_path)
    assert cache.fill([photos[0], copy], SETTINGS, threads=1) == [None, None]
    assert len(decoded) == 1
    assert cache.info().counts[Kind.SQUARE] == 1
    assert np.array_equal(opened(tmp_path).square(copy, SETTINGS), load_square(photos[0], SETTINGS))


def test_unchanged_files_are_neither_decoded_nor_read_again(
    tmp_path: Path, photos: list[Path], decoded: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "_SETTLED", -1.0)
    assert opened(tmp_path).fill(photos, SETTINGS, threads=2) == [None] * 12
    assert sorted(decoded) == sorted(photos)
    monkeypatch.setattr(room, "file_digest", lambda path: pytest.fail(f"{path} was read"))
    again = opened(tmp_path)
    assert again.fill(photos, SETTINGS, threads=2) == [None] * 12
    for path in photos:
        again.square(path, SETTINGS)
    assert len(decoded) == 12


def test_times_that_may_still_change_are_not_trusted(tmp_path: Path, photos: list[Path]) -> None:
    cache = opened(tmp_path)
    cache.fill(photos, SETTINGS, threads=1)
    assert cache.info().counts[Kind.FILE] == 0


def test_unreadable_files_are_named_with_their_rows(tmp_path: Path) -> None:
    found = photographs(tmp_path / "photos", 8)
    found[2].image.write_bytes(b"")
    found[5].image.unlink()
    cache = opened(tmp_path)
    with pytest.raises(DataError) as caught:
        check_readable(found, False, cache=cache, settings=SETTINGS)
    said = str(caught.value)
    assert f"t.csv row 4: {found[2].image}: an empty file" in said
    assert f"t.csv row 7: {found[5].image}: no such file" in said
    assert len(check_readable(found, True, cache=cache, settings=SETTINGS)) == 6
    with pytest.raises(DataError, match="empty file"):
        cache.square(found[2].image, SETTINGS)


def test_checking_and_an_epoch_decode_once_in_all(tmp_path: Path, decoded: list[Path]) -> None:
    found = photographs(tmp_path / "photos", 6)
    cache = opened(tmp_path)
    check_readable(found, False, cache=cache, settings=SETTINGS)
    for _ in range(2):
        loader = make_loader(
            found, PREPROCESS, SETTINGS, batch_size=2, training=True, augment="medium", workers=0, cache=cache
        )
        assert sum(len(batch["index"]) for batch in loader) == 6
    assert len(decoded) == 6


@pytest.mark.parametrize("method", [pytest.param("spawn", marks=pytest.mark.slow), "fork"])
def test_loading_processes_of_either_kind_give_the_same(tmp_path: Path, method: str) -> None:
    """macOS starts processes by `spawn`: everything a worker needs is pickled."""
    found = photographs(tmp_path / "photos", 6)
    cache = opened(tmp_path)
    check_readable(found, False, cache=cache, settings=SETTINGS)
    for record in found:
        record.image.unlink()  # what comes now comes from the cache
    options: dict[str, Any] = {"batch_size": 4, "training": True, "augment": "strong", "seed": 3, "cache": cache}
    alone = make_loader(found, PREPROCESS, SETTINGS, workers=0, **options)
    helped = make_loader(found, PREPROCESS, SETTINGS, workers=1, **options)
    helped.multiprocessing_context = method
    for one, two in zip(alone, helped, strict=True):
        assert one["index"].tolist() == two["index"].tolist()
        assert np.array_equal(one["image"].numpy(), two["image"].numpy())


def test_configuration_decides_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EYETUNE_CACHE", str(tmp_path / "own"))
    of = lambda **fields: Cache.of(DataConfig(table="t.csv", **fields))  # noqa: E731
    chosen, default = of(cache=tmp_path / "there", cache_limit=2), of()
    assert of(cache=False) is None
    assert chosen is not None
    assert default is not None
    assert chosen.store.folder.parent == tmp_path / "there"
    assert chosen.store.limit == 2 * 2**30
    assert default.store.folder.parent == tmp_path / "own"
    assert not list(tmp_path.iterdir())  # nothing is made before there is something to keep
    photo = save(tmp_path / "a.png", fundus(64, 64, radius=28))
    for cache in (default, chosen):
        cache.square(photo, SETTINGS)
    assert default.store.folder.stat().st_mode & 0o077 == 0  # photographs of patients
    assert chosen.store.folder.stat().st_mode == photo.parent.joinpath("there").stat().st_mode


# Whatever happens


def mutate(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    kind = rng.choice(["cut", "flip", "zero", "grow", "empty"])
    at = rng.randrange(len(content))
    if kind == "cut":
        del content[at:]
    elif kind == "flip":
        content[at] ^= 1 << rng.randrange(8)
    elif kind == "zero":
        content[at : at + 500] = bytes(len(content[at : at + 500]))
    elif kind == "grow":
        content[at:at] = rng.randbytes(rng.randrange(1, 200))
    else:
        content.clear()
    path.write_bytes(content)


@pytest.mark.parametrize("suffix", ["pack", "idx"])
def test_damage_is_noticed_and_mended(tmp_path: Path, photos: list[Path], suffix: str) -> None:
    cache = opened(tmp_path)
    cache.fill(photos, SETTINGS, threads=1)
    (path,) = packs(tmp_path, suffix)
    whole = path.read_bytes()
    (other,) = packs(tmp_path, "idx" if suffix == "pack" else "pack")
    other_whole = other.read_bytes()
    for seed in range(40):
        path.write_bytes(whole)
        other.write_bytes(other_whole)
        for extra in packs(tmp_path):
            if extra not in (path, other):
                extra.unlink()
        mutate(path, random.Random(seed))
        damaged = opened(tmp_path)
        check_all(damaged, photos)
        damaged.store.close()
        check_all(opened(tmp_path), photos)


def test_damage_under_an_open_store(tmp_path: Path, photos: list[Path], decoded: list[Path]) -> None:
    """Cut, flipped or deleted while it is in use: no SIGBUS, no wrong pixel."""
    cache = opened(tmp_path)
    cache.fill(photos, SETTINGS, threads=1)
    check_all(cache, photos)
    (path,) = packs(tmp_path)
    os.truncate(path, path.stat().st_size // 2)
    decoded.clear()
    check_all(cache, photos)
    assert 0 < len(decoded) < 12
    check_all(opened(tmp_path), photos)
    for entry in (tmp_path / "cache").rglob("*.*"):
        entry.unlink()
    check_all(cache, photos)
    check_all(opened(tmp_path), photos)


def test_every_flipped_bit_of_an_index_entry_is_noticed(tmp_path: Path) -> None:
    store = Store(tmp_path, 2**30, pytest.fail)
    key = bytes(range(16))
    store.put([Item(key, Kind.SQUARE, b"value")])
    store.close()
    (index,) = tmp_path.glob("*.idx")
    entry = index.read_bytes()
    assert len(entry) == ground._ENTRY.itemsize
    for bit in range(8 * len(entry)):
        flipped = bytearray(entry)
        flipped[bit // 8] ^= 1 << bit % 8
        index.write_bytes(flipped)
        assert not Store(tmp_path, 2**30, pytest.fail).has(key), bit
    index.write_bytes(bytes(len(entry)))
    assert not Store(tmp_path, 2**30, pytest.fail).has(bytes(16))


def _fill(folder: Path, paths: list[Path]) -> None:
    Cache(folder, 1).fill(paths, SETTINGS, threads=2)


def test_several_processes_fill_one_store(tmp_path: Path) -> None:
    photos = [record.image for record in photographs(tmp_path / "photos", 60)]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_fill, args=(tmp_path / "cache", photos)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    cache = opened(tmp_path)
    assert cache.info().counts[Kind.SQUARE] == 60
    assert 1 <= len(packs(tmp_path)) <= 3
    for path in photos:
        assert cache.store.has(cache.square_key(path, SETTINGS))
    check_all(cache, photos)


FILL = """
import sys
from pathlib import Path
from eyetune.data.cache import Cache
from eyetune.data.fundus import FundusSettings
print("ready", flush=True)
while True:
    cache = Cache(Path(sys.argv[1]), 1)
    cache.clear()
    cache.fill(sorted(Path(sys.argv[2]).iterdir()), FundusSettings(32), threads=2)
"""


def test_killed_at_any_moment(tmp_path: Path, photos: list[Path]) -> None:
    rng = random.Random(0)
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", FILL, str(tmp_path / "cache"), str(photos[0].parent)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(rng.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        cache = opened(tmp_path)
        check_all(cache, photos)
        assert cache.fill(photos, SETTINGS, threads=1) == [None] * 12
        assert cache.info().counts[Kind.SQUARE] == 12


def test_half_an_index_entry_is_written_over(tmp_path: Path, photos: list[Path]) -> None:
    cache = opened(tmp_path)
    cache.fill(photos[:6], SETTINGS, threads=1)
    with open(packs(tmp_path, "idx")[0], "ab") as stream:
        stream.write(b"half an entry")
    opened(tmp_path).fill(photos, SETTINGS, threads=1)
    assert len(packs(tmp_path)) == 1
    assert opened(tmp_path).info().counts[Kind.SQUARE] == 12


# No room


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("call", ["pwrite", "open", "mkdir"])
def test_a_disk_that_takes_nothing_is_said_once(
    tmp_path: Path,
    photos: list[Path],
    code: int,
    call: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    opened(tmp_path).fill(photos[:5], SETTINGS, threads=1)
    cache = opened(tmp_path)
    real = getattr(os, call)

    def refuse(*arguments: Any, **options: Any) -> Any:
        if call == "open" and not arguments[1] & (os.O_RDWR | os.O_CREAT):
            return real(*arguments, **options)
        raise OSError(code, os.strerror(code))

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        if call == "mkdir":
            shutil.rmtree(tmp_path / "cache")
        assert cache.fill(photos, SETTINGS, threads=2) == [None] * 12
        check_all(cache, photos)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("eyetune:")]
    assert len(said) == 1
    assert "Going on without" in said[0]
    assert str(tmp_path / "cache") in said[0]
    check_all(opened(tmp_path), photos)


def test_a_value_that_did_not_fit_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    store = Store(tmp_path, 2**30, said.append)
    store.put([Item(b"a" * 16, Kind.SQUARE, b"first")])
    real = os.pwrite

    def half(handle: int, data: Any, offset: int) -> int:
        if len(data) <= 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle, bytes(data[:-2]), offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", half)
        store.put([Item(b"b" * 16, Kind.SQUARE, b"second")])
    assert len(said) == 1
    assert "the disk is full" in said[0]
    (pack,) = tmp_path.glob("*.pack")
    assert pack.read_bytes() == b"first"
    again = Store(tmp_path, 2**30, said.append)
    assert again.get(b"a" * 16) is not None
    assert again.get(b"b" * 16) is None


def test_a_nearly_full_disk_is_left_alone(tmp_path: Path, photos: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ground.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**40, 2**40 - 2**29, 2**29))  # type: ignore[attr-defined]
    cache = opened(tmp_path)
    assert cache.fill(photos, SETTINGS, threads=1) == [None] * 12
    assert cache.store.stopped
    assert not packs(tmp_path)


def values(*names: str) -> list[Item]:
    return [Item(name.encode() * 16, Kind.SQUARE, name.encode() * 1000) for name in names]


def test_what_was_not_used_for_longest_makes_room(tmp_path: Path) -> None:
    said: list[str] = []
    limit = 12_000  # packs of 3,000
    for n, name in enumerate("abcd"):
        store = Store(tmp_path, limit, said.append)
        store.put(values(name) + values(name.upper()))
        store.close()
        (own,) = [path for path in tmp_path.glob("*.idx") if path.stat().st_mtime > 10**6]
        os.utime(own, (n + 1, n + 1))
    assert len(list(tmp_path.glob("*.pack"))) == 4
    used = Store(tmp_path, limit, said.append)
    assert used.get(b"a" * 16) is not None  # the oldest, but used
    writer = Store(tmp_path, limit, said.append)
    writer.put(values("x", "y", "z"))
    writer.put(values("v", "w"))
    left = Store(tmp_path, limit, said.append)
    there = "".join(name for name in "abcdxyzvw" if left.has(name.encode() * 16))
    assert there == "acdxyzvw"
    assert sum(path.stat().st_size for path in tmp_path.glob("*.pack")) <= limit
    assert not said
    assert used.get(b"A" * 16) is not None


def test_what_a_process_uses_itself_is_not_pushed_out(tmp_path: Path) -> None:
    said: list[str] = []
    store = Store(tmp_path, 4_000, said.append)
    for name in "abcdefgh":
        store.put(values(name))
    assert "".join(name for name in "abcdefgh" if store.has(name.encode() * 16)) == "abcd"
    assert len(said) == 1
    assert "limit" in said[0]
    assert "data.cache_limit" in said[0]


def test_clearing(tmp_path: Path, photos: list[Path]) -> None:
    cache = opened(tmp_path)
    assert cache.info().packs == 0
    cache.fill(photos, SETTINGS, threads=1)
    found = cache.info()
    assert found.sizes[Kind.SQUARE] == 12 * 32 * 32 * 3
    assert cache.clear() == found.bytes
    assert cache.info().packs == 0
    check_all(cache, photos)
    assert cache.info().counts[Kind.SQUARE] == 12


def test_a_pack_in_use_is_not_cleared(tmp_path: Path) -> None:
    said: list[str] = []
    writer = Store(tmp_path, 2**30, said.append)
    writer.put(values("a"))
    Store(tmp_path, 2**30, said.append).clear()
    writer.put(values("b"))
    assert Store(tmp_path, 2**30, said.append).get(b"b" * 16) is not None


def test_pickled_and_forked(tmp_path: Path, photos: list[Path]) -> None:
    cache = opened(tmp_path)
    cache.square(photos[0], SETTINGS)  # holds a pack open for writing
    copy: Cache = pickle.loads(pickle.dumps(cache))
    check_all(copy, photos)
    child = os.fork()
    if child == 0:
        try:
            check_all(cache, photos)
            os._exit(0)
        finally:
            os._exit(1)
    check_all(cache, photos)
    assert os.waitpid(child, 0)[1] == 0
    check_all(opened(tmp_path), photos)
