"""Batches of prepared photographs: the same for the same seed, epoch and index, whatever the workers do."""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import signal
import sys
import traceback
import weakref
from collections.abc import Iterator, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any, Literal

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from eyetune.data.cache import Cache, file_digest
from eyetune.data.config import AugmentConfig
from eyetune.data.fundus import FundusSettings, load_square
from eyetune.data.on_device import CarryOut, DrawOnly, check_on_device
from eyetune.data.order import EpochBatches, mix, seeded
from eyetune.data.readable import Workers, choose_workers
from eyetune.data.record import Record
from eyetune.data.records import Manifest
from eyetune.data.transforms import eval_transform, train_transform
from eyetune.errors import DataError, UserError

if TYPE_CHECKING:
    from eyetune.backbones.backbone import Preprocess

Batch = dict[str, torch.Tensor]
"""image float32[B, 3, H, W] normalised; target int64[B], -1 when unknown (of labels float32[B, L], of a number
float32[B], NaN when unknown); index int64[B] into the manifest. Where the device augments: image uint8[B, 3, H, W] and
draws float32[B, ·], which :meth:`Loader.finish` turns into that."""

_SHARED = "/dev/shm"  # noqa: S108 - where Linux keeps shared memory


class FundusDataset(Dataset[dict[str, Any]]):
    """Prepared, augmented photographs of a manifest, indexed by (epoch, index).

    Args:
        manifest: the records.
        settings: how a photograph becomes a square.
        transform: uint8[3, P, P] to float32[3, P, P]; its draws depend on (seed, epoch, index) only.
        seed: of the augmentation.
        cache: where prepared squares are kept; None decodes them every time.

    Attributes:
        augment: what `transform` does, where its draws count.
        targets: of every record, as :func:`target_tensor` has them.
        by_content: draw from the file's content in place of (seed, index): the same view whatever table it stands in.
    """

    augment: AugmentConfig = "none"
    by_content: bool = False

    def __init__(
        self,
        manifest: Manifest,
        settings: FundusSettings,
        transform: Any,
        *,
        seed: int = 0,
        cache: Cache | None = None,
    ) -> None:
        self.records: Sequence[Record] = manifest.records
        self.targets = target_tensor(manifest)
        self.settings = settings
        self.transform = transform
        self.seed = seed
        self.cache = cache

    def __len__(self) -> int:
        return len(self.records)

    def square(self, index: int) -> torch.Tensor:
        """uint8[3, P, P] of one record, a view of uint8[P, P, 3]. Raises DataError naming file and row."""
        record = self.records[index]
        load = load_square if self.cache is None else self.cache.square
        try:
            photo = load(record.image, self.settings)
        except DataError as error:
            raise DataError(f"{record.row}: {error}") from None
        return torch.from_numpy(photo).permute(2, 0, 1)

    def _draw(self, epoch: int, index: int) -> int:
        """The seed of one augmentation."""
        if not self.by_content:
            return mix(self.seed, epoch, index)
        path = self.records[index].image
        digest = file_digest(path) if self.cache is None else self.cache.digest(path)
        return mix(epoch, *np.frombuffer(digest, np.uint32).tolist())

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        try:
            square = self.square(index)
        except DataError as error:
            # An exception would reach the other process wrapped in a traceback; the text alone is what helps.
            return {"error": str(error)}
        image, *draws = _listed(seeded(self._draw(epoch, index), self.transform, square))
        sample = {"image": image, "target": self.targets[index], "index": index}
        return sample | ({"draws": draws[0]} if draws else {})


def target_tensor(manifest: Manifest) -> torch.Tensor:
    """By index: int64[N], -1 when unknown; of labels float32[N, L], of a number float32[N], NaN when unknown."""
    targets = torch.from_numpy(manifest.targets())
    return targets if manifest.kind == "classes" else targets.float()


def _listed(image: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return image if isinstance(image, tuple) else (image,)


_WORKERS: weakref.WeakSet[Any] = weakref.WeakSet()


@atexit.register
def _end_workers() -> None:
    """End what is left of the workers when the program ends. Python would do it with a SIGTERM, which they ignore."""
    with contextlib.suppress(AttributeError, ValueError):  # Windows; not the main thread
        # Else PyTorch's own handler takes their end for an accident, and raises.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in _WORKERS:
        with contextlib.suppress(ValueError):  # closed already
            worker.kill()


class Loader(DataLoader[Batch]):
    """A DataLoader of :class:`FundusDataset`; damaged images surface as DataError with file and row."""

    dataset: FundusDataset
    batches: EpochBatches
    carry_out: CarryOut | None = None
    """What is left to do to a batch on the device."""

    def finish(self, batch: Batch) -> Batch:
        """A batch on the device, as the network takes it."""
        if self.carry_out is None:
            return batch
        image = self.carry_out(batch["image"], batch["draws"])
        return {name: values for name, values in batch.items() if name != "draws"} | {"image": image}

    def __init__(self, *args: Any, **options: Any) -> None:
        # DataLoader draws from a generator at every start; without one of its own, from that of the training.
        super().__init__(*args, **{"generator": torch.Generator(), **options})

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """Which epoch the next iteration is (its order and its augmentation), and from which of its batches on."""
        self.batches.set_epoch(epoch, first)

    def __iter__(self) -> Any:
        batches = super().__iter__()
        workers = getattr(batches, "_workers", ())
        _WORKERS.update(workers)
        refused = None
        try:
            while refused is None:
                with _one_thread() if self.num_workers == 0 else contextlib.nullcontext():
                    batch = next(batches, None)
                if batch is None:
                    return
                refused = batch.get("error")
                if refused is None:
                    yield {name: torch.as_tensor(values) for name, values in batch.items()}
        except (OSError, EOFError) as error:
            # A batch was on its way from a process that is just dying.
            ended = wait([worker.sentinel for worker in workers], timeout=2)
            for worker in workers:
                if worker.sentinel in ended:
                    worker.join()
            if not _a_death(workers):
                raise
            raise ReaderDied(error) from error
        finally:
            # End the workers now: left to the collector, in any order, they are waited for in vain for seconds. Where
            # one has died, the others are of no use.
            if refused is not None or _a_death(workers):
                self._iterator = None
                del batches
        raise DataError(refused)


class ReaderDied(UserError):
    """A process that reads images is gone; `error` is how that was found out.

    The other readers end here, too, however long somebody keeps the error: a loader's processes end when nobody has its
    iterator any more, and the traceback has it (a notebook keeps the last one).
    """

    def __init__(self, error: BaseException) -> None:
        said = str(error).split(". ", maxsplit=1)[0].rstrip(".")
        super().__init__(
            "a process that reads images has died, most often because memory ran out. Use fewer of them "
            f"(--workers 2, or 0), or a machine with more memory.\n  ({said})"
        )
        link: BaseException | None = error
        while link is not None:
            traceback.clear_frames(link.__traceback__)
            link = link.__context__


def _a_death(workers: Sequence[BaseProcess]) -> bool:
    """Whether one of the processes has ended otherwise than it should."""
    return any(worker.exitcode for worker in workers)


def _collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Tensors stacked, numbers as int64[B]; the samples' errors, where they have any."""
    failed = [sample["error"] for sample in samples if "error" in sample]
    if failed:
        return {"error": "\n".join(failed)}
    return {
        name: torch.stack([sample[name] for sample in samples])
        if isinstance(value, torch.Tensor)
        else torch.tensor([sample[name] for sample in samples], dtype=torch.int64)
        for name, value in samples[0].items()
    }


def _collate_for_pipes(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """As :func:`_collate`, in arrays: tensors would travel through shared memory."""
    batch = _collate(samples)
    return {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def shared_memory(batch_bytes: int, workers: int, prefetch: int = 2) -> tuple[int, int | None]:
    """Bytes wanted for the batches on their way from the workers, twice over, and those there are; None: no limit.

    Containers often have 64 MiB, and going over that kills a worker with a bus error.
    """
    need = 2 * batch_bytes * workers * (prefetch + 1)
    return need, shutil.disk_usage(_SHARED).free if os.path.isdir(_SHARED) else None


def _fits_shared_memory(batch_bytes: int, workers: int, prefetch: int) -> bool:
    """Whether the batches on their way fit into what is left of the shared memory; if not, that is said, once."""
    need, free = shared_memory(batch_bytes, workers, prefetch)
    if not workers or free is None or need <= free:
        return True
    _say_once(
        f"{_SHARED} is too small for the batches on their way: they go through pipes, a little slower. In a container "
        "more can be had, as with docker run --shm-size=1g."
    )
    return False


_said: set[str] = set()


def _say_once(line: str) -> None:
    if line not in _said:
        _said.add(line)
        print(f"eyetune: {line}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Small operations by one thread: on a busy machine, waiting for a second one makes them a hundred times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _start_worker(_: int) -> None:
    # One process a core already: threads inside each would only fight. (torch's own are limited by DataLoader.)
    cv2.setNumThreads(0)
    # Ctrl-C, and a cluster's SIGTERM to all processes of a job, are for the main process, which needs its workers to
    # come to a good end, and then ends them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def make_dataset(
    manifest: Manifest,
    preprocess: Preprocess,
    settings: FundusSettings,
    *,
    training: bool,
    augment: AugmentConfig = "none",
    seed: int = 0,
    cache: Cache | None = None,
) -> FundusDataset:
    """What a loader reads, by (epoch, index); arguments as for :func:`make_loader`."""
    transform = eval_transform(preprocess)
    if training:
        transform = train_transform(preprocess, augment, surround=settings.surround)
    dataset = FundusDataset(manifest, settings, transform, seed=seed, cache=cache)
    dataset.augment = augment if training else "none"
    return dataset


def make_loader(
    manifest: Manifest,
    preprocess: Preprocess,
    settings: FundusSettings,
    *,
    batch_size: int,
    training: bool,
    augment: AugmentConfig = "none",
    balance: str = "none",
    workers: Workers = "auto",
    seed: int = 0,
    cache: Cache | None = None,
    shard: tuple[int, int] = (0, 1),
    on_device: bool = False,
    prefetch: int = 2,
    pin_memory: bool | Literal["auto"] = "auto",
) -> Loader:
    """Batches for training (shuffled, augmented) or evaluation (in order, every record exactly once).

    The last batch of an epoch may be shorter in both; it is never padded. It is left out in one case only: in training
    with several processes, when it has fewer images than there are processes; the next epoch's order brings others to
    its place. (A last batch of one image is the loop's concern where a network has BatchNorm in training mode.)

    Args:
        manifest: the records, all of one split.
        preprocess: the backbone's normalisation.
        settings: how a photograph becomes a square.
        batch_size: images a batch and process, >= 1.
        training: shuffle and augment.
        augment: a level or a list of transforms; ignored in evaluation.
        balance: "sampler" draws as many of each class in training; any other word leaves the classes as they are.
        workers: loading processes, or "auto".
        seed: of order and augmentation.
        cache: where prepared squares are kept, so that no photograph is decoded twice; None decodes in every epoch.
        shard: (this process, number of processes).
        on_device: in training, leave augmentation and normalisation to :meth:`Loader.finish`; for levels only.
        prefetch: batches that each loading process has ready in advance.
        pin_memory: whether batches wait where a GPU copies from directly; "auto" = when there is a CUDA device.

    Raises UserError when `batch_size` exceeds the number of training images.
    """
    if training and batch_size * shard[1] > len(manifest):
        most = max(1, len(manifest) // shard[1])
        raise UserError(
            f"train.batch_size is {batch_size} but there are only {len(manifest)} images to train on: use at most "
            f"{most}."
        )
    count = choose_workers(workers, len(manifest), processes=shard[1])
    batch_bytes = min(batch_size, len(manifest)) * 3 * settings.pixels**2 * torch.float32.itemsize
    dataset = make_dataset(manifest, preprocess, settings, training=training, augment=augment, seed=seed, cache=cache)
    batches = EpochBatches(
        manifest.labels,
        batch_size,
        shuffle=training,
        balanced=training and balance == "sampler",
        seed=seed,
        shard=shard,
    )
    loader = serve(
        dataset,
        batches,
        batch_bytes=batch_bytes,
        count=count,
        processes=shard[1],
        prefetch=prefetch,
        pin_memory=pin_memory,
    )
    if training and on_device:
        check_on_device(augment)
        dataset.transform = DrawOnly(str(augment), settings.surround)
        loader.carry_out = CarryOut(preprocess, str(augment), settings.surround)
    return loader


def serve(
    dataset: Any,
    batches: EpochBatches,
    *,
    batch_bytes: int,
    count: int,
    processes: int,
    prefetch: int = 2,
    pin_memory: bool | Literal["auto"] = "auto",
) -> Loader:
    """A loader of `dataset` in the order of `batches`.

    Args:
        dataset: by (epoch, index), a dict of tensors and numbers, or {"error": text}.
        batches: the order.
        batch_bytes: how large a batch is.
        count: loading processes.
        processes: training processes on this machine, each with as many.
        prefetch, pin_memory: as for :func:`make_loader`.
    """
    loader = Loader(
        dataset,
        batch_sampler=batches,
        num_workers=count,
        collate_fn=_collate if _fits_shared_memory(batch_bytes, count * processes, prefetch) else _collate_for_pipes,
        worker_init_fn=_start_worker,
        persistent_workers=count > 0,
        prefetch_factor=prefetch if count > 0 else None,
        pin_memory=torch.cuda.is_available() if pin_memory == "auto" else pin_memory,
    )
    loader.batches = batches
    return loader
