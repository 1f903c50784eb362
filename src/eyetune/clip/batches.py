"""Batches of pairs: both eyes, the text, and who they are about; or the frozen towers' features in their place."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from eyetune.clip.model import Standard
from eyetune.data.cache import Cache
from eyetune.data.fundus import FundusSettings, find_field, prepare
from eyetune.data.loader import Loader, serve
from eyetune.data.order import EpochBatches, mix, seeded
from eyetune.data.photo import decode_image
from eyetune.data.readable import Workers, choose_workers
from eyetune.data.transforms import Fused, Normalise, upright_steps
from eyetune.errors import DataError
from eyetune.progress import meter
from eyetune.train.task import SMALLER_FORWARD, Batch, enough_memory

if TYPE_CHECKING:
    from eyetune.backbones.backbone import Preprocess
    from eyetune.clip.model import RetClip
    from eyetune.clip.tokens import Tokenizer
    from eyetune.data.pairs import PairSet
    from eyetune.data.photo import Photo
    from eyetune.runtime import Runtime

SENTENCE = re.compile(r"(?<=[.!?;。！？；])\s*")
"""Where a report is cut into sentences."""


class Wordings:
    """The texts of a split as token ids, whole or in part.

    With `sample` > 0 a training sample sees, with that probability, a random choice of its text's sentences in their
    order. (ConVIRT trains on one random sentence of each report: Zhang et al., "Contrastive Learning of Medical Visual
    Representations from Paired Images and Text", 2020.) Reading is then cheaper, and a short prompt no stranger.

    Args:
        texts: of the split.
        tokenizer: its vocabulary.
        length: tokens a text may have.
        sample: probability of a choice of sentences.
    """

    def __init__(self, texts: Sequence[str], tokenizer: Tokenizer, length: int, sample: float = 0.0) -> None:
        self.ids = torch.from_numpy(tokenizer.encode(texts, length))
        self.length = length
        self.sample = sample
        self.frame = tokenizer.cls, tokenizer.sep
        self.sentences: list[list[list[int]]] = []
        if sample:
            cut = [[part for part in SENTENCE.split(text) if part.strip()] for text in texts]
            rows = iter(tokenizer.encode([part for parts in cut for part in parts], length))
            self.sentences = [[[i for i in next(rows).tolist() if i][1:-1] for _ in parts] for parts in cut]

    def draw(self, place: int, seed: int) -> Tensor:
        """int64[length]: the text at `place`, or some of its sentences, as `seed` has it."""
        if not self.sample or len(self.sentences[place]) < 2:
            return self.ids[place]
        rng = np.random.default_rng(seed)
        if rng.random() >= self.sample:
            return self.ids[place]
        parts = self.sentences[place]
        chosen = np.sort(rng.choice(len(parts), size=rng.integers(1, len(parts) + 1), replace=False))
        tokens = [token for number in chosen for token in parts[number]][: self.length - 2]
        row = torch.zeros(self.length, dtype=torch.int64)
        row[: len(tokens) + 2] = torch.tensor([self.frame[0], *tokens, self.frame[1]])
        return row


def wording(ids: Tensor) -> int:
    """A number for what a text says: the same tokens, the same number."""
    return int.from_bytes(hashlib.blake2b(ids.numpy().tobytes(), digest_size=7).digest(), "little")


class PairDataset(Dataset[dict[str, Any]]):
    """Samples of a split by (epoch, index): an index is a pair that belongs together.

    Each is `left`, `right` float32[3, P, P] (or features float32[W]), `ids` int64[L] (or features float32[H]),
    `patient`, `wording`, `single` and `index`, numbers; `single` is 1 where `left` is the only eye.

    Args:
        pairs: the split.
        wordings: its texts.
        settings: how a photograph becomes a square.
        preprocess: the image tower's normalisation.
        augment: a level, for training; the eyes are drawn for apart from each other.
        seed: of augmentation and sentences.
        cache: where prepared squares are kept; None decodes in every epoch.
    """

    def __init__(
        self,
        pairs: PairSet,
        wordings: Wordings,
        settings: FundusSettings,
        preprocess: Preprocess,
        *,
        augment: str = "none",
        seed: int = 0,
        cache: Cache | None = None,
    ) -> None:
        self.pairs = pairs
        self.wordings = wordings
        self.settings = settings
        steps = upright_steps(augment, settings.surround)
        self.transform = nn.Sequential(Fused(steps), Normalise(preprocess)) if steps else Normalise(preprocess)
        self.seed = seed
        self.cache = cache
        self.single = np.asarray(pairs.single, dtype=bool)
        persons = {name: number for number, name in enumerate(dict.fromkeys(pairs.groups))}
        self.persons = [persons[name] for name in pairs.groups]

    def __len__(self) -> int:
        return len(self.pairs.links)

    def squares(self, place: int) -> tuple[Photo, Photo]:
        """Both eyes of the patient at `place`, uint8[P, P, 3] each. Raises DataError, with the place."""
        left, right = self.pairs.eyes(place)
        where = f"{self.pairs.split}, patient {place}"
        first = self._square(left, f"{where}, left")
        return first, first if self.single[place] else self._square(right, f"{where}, right")

    def _square(self, content: bytes, where: str) -> Photo:
        def make() -> Photo:
            image = decode_image(content, where)
            return prepare(image, self.settings, find_field(image) if self.settings.crop else None)

        return make() if self.cache is None else self.cache.square_of(content, self.settings, make)

    def eyes(self, place: int, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        """Both eyes of the patient at `place` as the network gets them, float32[3, P, P], drawn for (epoch, index)."""
        left, right = self.squares(place)
        drawn = [
            seeded(mix(self.seed, epoch, index, side), self.transform, torch.from_numpy(square).permute(2, 0, 1))
            for side, square in enumerate((left,) if self.single[place] else (left, right))
        ]
        return drawn[0], drawn[-1]

    def ids(self, epoch: int, index: int) -> Tensor:
        """int64[L]: the sample's text, or what is read of it in this epoch."""
        return self.wordings.draw(self.pairs.links[index][1], mix(self.seed, epoch, index, 2))

    def who(self, index: int, ids: Tensor) -> dict[str, Any]:
        """What a sample says of itself beside eyes and text."""
        patient, _ = self.pairs.links[index]
        return {
            "patient": self.persons[patient],
            "wording": wording(ids),
            "single": int(self.single[patient]),
            "index": index,
        }

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        patient, _ = self.pairs.links[index]
        try:
            left, right = self.eyes(patient, epoch, index)
        except DataError as error:
            return {"error": str(error)}  # an exception would come wrapped in another process's traceback
        ids = self.ids(epoch, index)
        return {"left": left, "right": right, "ids": ids, **self.who(index, ids)}

    def names(self, indices: Sequence[int]) -> list[str]:
        """What to call samples in a message: no text, no name of a patient."""
        return [f"{self.pairs.split}, pair {index} (patient {self.pairs.links[index][0]})" for index in indices]


def pair_loader(
    dataset: PairDataset,
    *,
    batch_size: int,
    training: bool,
    workers: Workers = "auto",
    shard: tuple[int, int] = (0, 1),
    prefetch: int = 2,
    pin_memory: Any = "auto",
) -> Loader:
    """Batches of pairs, shuffled for training, else in order. Arguments as for :func:`make_loader`."""
    if training and batch_size * shard[1] > len(dataset):
        raise DataError(
            f"train.batch_size is {batch_size}{f' in each of {shard[1]} processes' if shard[1] > 1 else ''}, and there "
            f"are only {len(dataset)} pairs to train on: use at most {len(dataset) // shard[1]}."
        )
    return serve(
        dataset,
        EpochBatches([None] * len(dataset), batch_size, shuffle=training, seed=dataset.seed, shard=shard),
        batch_bytes=batch_size * 2 * 3 * dataset.settings.pixels**2 * torch.float32.itemsize,
        count=choose_workers(workers, len(dataset), processes=shard[1]),
        processes=shard[1],
        prefetch=prefetch,
        pin_memory=pin_memory,
    )


class PairFeatures:
    """The batches of another loader, in its order, with a frozen tower's features in place of what it looks at.

    Args:
        dataset: the other loader's.
        batches: its order.
        left, right: float32[P, W], of every patient.
        text: float32[T, H], of every text; None where the text tower trains: then the texts themselves.
    """

    def __init__(
        self, dataset: PairDataset, batches: EpochBatches, left: Tensor, right: Tensor, text: Tensor | None
    ) -> None:
        self.dataset, self.batches = dataset, batches
        self.left, self.right, self.text = left, right, text

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """Which epoch the next iteration is, and from which batch on."""
        self.batches.set_epoch(epoch, first)

    def finish(self, batch: Batch) -> Batch:
        """There is nothing left to do on the device."""
        return batch

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        links = self.dataset.pairs.links
        for keys in self.batches:
            ids = [self.dataset.ids(epoch, index) for epoch, index in keys]
            said = [self.dataset.who(index, row) for (_, index), row in zip(keys, ids, strict=True)]
            patients = torch.tensor([links[index][0] for _, index in keys], dtype=torch.int64)
            texts = torch.tensor([links[index][1] for _, index in keys], dtype=torch.int64)
            yield {
                "left": self.left[patients],
                "right": self.right[patients],
                "ids": torch.stack(ids) if self.text is None else self.text[texts],
                **{name: torch.tensor([one[name] for one in said], dtype=torch.int64) for name in said[0]},
            }


def features_once(model: RetClip, loader: Loader, runtime: Runtime, description: str, *, text: bool) -> PairFeatures:
    """The loader over the features of the frozen image tower: every photograph is looked at once.

    With several processes each computes a part and all have the whole. Raises UserError as :func:`enough_memory` does,
    DataError for a photograph that cannot be read.

    Args:
        model: on the device.
        loader: gives the pairs, whatever order it trains in.
        runtime: where to compute.
        description: for the progress display.
        text: whether the text tower is frozen too: its features then stand in the texts' place.
    """
    model.eval()
    dataset: Any = loader.dataset
    size = loader.batches.batch_size
    own: list[list[Any]] = [[], [], []]
    with enough_memory(SMALLER_FORWARD), torch.no_grad():
        with meter(len(dataset.pairs.patients), description, "patients") as update:
            for part in _shares(len(dataset.pairs.patients), size, runtime):
                for kept, features in zip(own, _seen(model, dataset, part, runtime), strict=False):
                    kept.append(features)
                update(min(len(dataset.pairs.patients), len(own[0]) * size * runtime.processes))
        for part in _shares(len(dataset.pairs.texts), size, runtime) if text else ():
            ids = runtime.to_device(trimmed(dataset.wordings.ids[part]))
            with runtime.autocast():
                own[2].append(model.read(ids).float().cpu().numpy())
    # In order of the processes, whose parts follow each other.
    every = runtime.gather(own)
    left, right, read = ([rows for share in every for rows in share[kind]] for kind in range(3))
    whole = [torch.from_numpy(np.concatenate(rows)) if rows else None for rows in (left, right, read)]
    assert whole[0] is not None
    assert whole[1] is not None
    return PairFeatures(dataset, loader.batches, whole[0], whole[1], whole[2])


SAMPLE = 256
"""Patients whose eyes say what features of a tower are usual."""


def fit_standard(model: RetClip, loader: Loader | PairFeatures, runtime: Runtime) -> None:
    """Standardise the features of an image tower that gets a new projection, by those of (at most 256) training eyes.

    The same in every process. Raises as :func:`features_once`.
    """
    if not isinstance(model.visual_standard, Standard):
        return
    if isinstance(loader, PairFeatures):
        features = torch.cat([loader.left, loader.right])
    else:
        model.eval()
        dataset: Any = loader.dataset
        count, size = len(dataset.pairs.patients), loader.batches.batch_size
        chosen = np.unique(np.linspace(0, count - 1, min(count, SAMPLE)).astype(int)).tolist()
        with enough_memory(SMALLER_FORWARD), torch.no_grad():
            starts = range(0, len(chosen), size)
            seen = [_seen(model, dataset, chosen[start : start + size], runtime) for start in starts]
        features = torch.from_numpy(np.concatenate([eyes for both in seen for eyes in both]))
    if len(features) > 1:
        model.visual_standard.fit(features)
    for name in ("mean", "scale"):  # as the main process has it, to the last bit
        buffer = model.visual_standard.get_buffer(name)
        buffer.copy_(torch.from_numpy(runtime.gather(buffer.cpu().numpy())[0]))


def _seen(model: RetClip, dataset: PairDataset, part: list[int], runtime: Runtime) -> tuple[Any, Any]:
    """The tower's features of both eyes of some patients: float32[B, W] each."""
    eyes = [dataset.eyes(place, 0, place) for place in part]
    pairs = [number for number, place in enumerate(part) if not dataset.single[place]]
    images = torch.stack([left for left, _ in eyes] + [eyes[number][1] for number in pairs])
    with runtime.autocast():
        found = model.visual.features(runtime.to_device(images)).float().cpu().numpy()
    left, right = found[: len(part)], found[: len(part)].copy()
    right[pairs] = found[len(part) :]
    return left, right


def _shares(count: int, size: int, runtime: Runtime) -> list[list[int]]:
    """This process's part of 0..count-1, in batches; the processes' parts follow each other."""
    mine: list[int] = np.array_split(np.arange(count), runtime.processes)[runtime.rank].tolist()
    return [mine[start : start + size] for start in range(0, len(mine), size)]


def trimmed(ids: Tensor) -> Tensor:
    """int64[B, L] without the columns that are [PAD] in every row; features as they are."""
    if ids.is_floating_point() or not len(ids):
        return ids
    return ids[:, : int(ids.ne(0).sum(dim=1).max())]
