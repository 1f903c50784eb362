"""Features of photographs and texts, computed once: what retrieval, search and few-shot probes read.

One safetensors file holds the vectors, and in its header whose they are: a model's fingerprint, the data's, patients,
texts and links. Features of two models are numbers of two languages: they are never compared.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from eyetune.clip.model import TEXTS
from eyetune.clip.ranking import Answers, Ranking, rank
from eyetune.data.fundus import prepare
from eyetune.data.photo import Photo
from eyetune.data.readable import Workers, choose_workers
from eyetune.data.transforms import eval_transform
from eyetune.errors import DataError, RunError, UserError
from eyetune.files import atomic
from eyetune.progress import meter
from eyetune.train.task import SMALLER_FORWARD, enough_memory

if TYPE_CHECKING:
    from eyetune.clip.run import ClipRun
    from eyetune.data.pairs import PairSet

By = Literal["patient", "left", "right"]
"""What is compared: both eyes with the text about the patient, or one eye with the text about it."""

SPACES: dict[str, tuple[str, str]] = {
    "patient": ("image", "text"),
    "left": ("left", "text_left"),
    "right": ("right", "text_right"),
}
"""What is compared -> the features of photographs, and of texts."""

EYES, WORDS = tuple(pair[0] for pair in SPACES.values()), tuple(TEXTS)

KIND = "eyetune image-text features, version 1"


@dataclass(frozen=True)
class About:
    """Whose features they are; what stands as JSON in the file's header.

    Args:
        model: the fingerprint of the model, its vocabulary included.
        run: where the model was, as given.
        length: tokens of a text that were read.
        scale: what the patient's similarities are multiplied by before a softmax.
        data: the fingerprint of the pairs.
        folder, split: where the pairs were, for their pictures.
        patients: P names; `groups` says which of them are one person.
        patient_labels, labels: classes of the P patients and T texts, None where not known.
        texts, text_ids: T.
    """

    model: str
    run: str
    length: int
    scale: float
    data: str
    folder: str
    split: str
    patients: list[str]
    groups: list[str]
    patient_labels: list[str | None]
    texts: list[str]
    text_ids: list[int]
    labels: list[str | None]


@dataclass(frozen=True, eq=False)
class Features:
    """The features of one split of pairs.

    Args:
        vectors: "image", "left", "right": float32[P, D]; "text", "text_left", "text_right": float32[T, D]; each row of
            unit length.
        links: the (patient, text) places that belong together.
        single: bool[P]: one eye stands for both.
        about: whose they are.
    """

    vectors: dict[str, Tensor]
    links: list[tuple[int, int]]
    single: Tensor
    about: About

    def ranking(self, by: By = "patient", *, device: torch.device | str = "cpu") -> tuple[Answers, Ranking]:
        """Which answers are right, and where they stand; `device` computes."""
        image, text = SPACES[by]
        answers = Answers.of(self.links, self.about.groups, self.about.texts)
        return answers, rank(self.vectors[image], self.vectors[text], answers, device=device)

    def check_model(self, run: ClipRun, source: Path) -> None:
        """Raise RunError, naming the file `source`, unless `run` is the model that computed them."""
        if self.about.model != run.fingerprint:
            raise RunError(
                f"{source} holds features of another model ({self.about.run}) than {run.path}, or of it before it was "
                "trained further: they cannot be compared. Compute them anew, into another file or after deleting "
                "this one."
            )

    def check_data(self, pairs: PairSet, source: Path) -> None:
        """Raise DataError, naming the file `source`, unless they were computed from `pairs`."""
        if self.about.data != pairs.fingerprint:
            raise DataError(
                f"{source} holds features of other pairs ({self.about.folder}, {self.about.split}) than "
                f"{pairs.folder}. Name another --features, or delete the file and they are computed anew."
            )

    def save(self, path: Path) -> None:
        """Write the file, atomically. Raises UserError when it cannot be written."""
        from safetensors.torch import save_file

        tensors = self.vectors | {
            "links": torch.tensor(self.links, dtype=torch.int64).reshape(-1, 2),
            "single": self.single,
        }
        said = {one.name: getattr(self.about, one.name) for one in fields(About)}
        with atomic(path) as temporary:
            save_file(
                {name: tensor.contiguous() for name, tensor in tensors.items()},
                str(temporary),
                metadata={"format": KIND, "eyetune": json.dumps(said)},
            )

    @classmethod
    def load(cls, path: Path) -> Features:
        """Read a file that :meth:`save` wrote. Raises DataError when it is missing, damaged, cut short or another."""
        tensors, said = _read(Path(path))
        about = _about(said, path)
        try:
            links, single = tensors.pop("links"), tensors.pop("single")
            rows = dict.fromkeys(EYES, len(about.patients)) | dict.fromkeys(WORDS, len(about.texts))
            width = tensors[EYES[0]].shape[1]
            fits = (
                all(tensors[name].shape == (count, width) for name, count in rows.items())
                and links.shape == (len(links), 2)
                and single.shape == (len(about.patients),)
                and all(tensors[name].isfinite().all() for name in rows)
            )
        except (KeyError, IndexError):
            fits = False
        if not fits:
            raise DataError(f"{path} is damaged: its features are not one a patient and text. Compute them anew.")
        return cls(tensors, [(row, text) for row, text in links.tolist()], single.bool(), about)


def _read(path: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors of a file of features, and what its header says. Raises DataError."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise DataError(
            f"no features at {path}. eyetune clip retrieve RUN --data FOLDER --features {path} writes them there."
        )
    try:
        with safe_open(str(path), framework="pt") as stream:
            metadata = stream.metadata() or {}
            if metadata.get("format") != KIND:
                raise DataError(
                    f"{path} holds no features of photographs and texts (of eyetune clip). Give the file that "
                    "eyetune clip retrieve wrote."
                )
            return {name: stream.get_tensor(name) for name in stream.keys()}, metadata.get("eyetune", "")  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(
            f"{path} is damaged or cut short ({error}). Delete it and compute the features anew."
        ) from error


def _about(text: str, path: Path) -> About:
    try:
        said = json.loads(text)
        about = About(**said)
        counts = [len(getattr(about, one)) for one in ("patients", "groups", "patient_labels")]
        lengths = [len(getattr(about, one)) for one in ("texts", "text_ids", "labels")]
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{path} is damaged: its header cannot be read. Compute the features anew.") from error
    if len(set(counts)) > 1 or len(set(lengths)) > 1:
        raise DataError(f"{path} is damaged: its header contradicts itself. Compute the features anew.")
    return about


def compute(run: ClipRun, pairs: PairSet, *, batch_size: int = 32, workers: Workers = "auto") -> Features:
    """The features of all photographs and texts of `pairs`; with several processes each computes a part.

    Raises DataError for a photograph that cannot be decoded, UserError when the memory does not suffice.
    """
    single = torch.from_numpy(np.array(pairs.single, dtype=bool))

    def photos(place: int) -> tuple[bytes, bytes | None]:
        left, right = pairs.eyes(place)
        return left, None if bool(single[place]) else right

    vectors = embed_eyes(
        run,
        len(pairs.patients),
        photos,
        names=[f"{pairs.folder / 'imgs'}, entry {place}" for place in range(len(pairs.patients))],
        batch_size=batch_size,
        workers=workers,
    )
    vectors |= embed_texts(run, pairs.texts, batch_size=batch_size)
    about = About(
        model=run.fingerprint,
        run=str(run.path),
        length=run.length,
        scale=scale_of(run),
        data=pairs.fingerprint,
        folder=str(pairs.folder.resolve()),
        split=pairs.split,
        patients=list(pairs.patients),
        groups=list(pairs.groups),
        patient_labels=list(pairs.patient_labels),
        texts=list(pairs.texts),
        text_ids=list(pairs.text_ids),
        labels=list(pairs.labels),
    )
    return Features(vectors, [(int(row), int(text)) for row, text in pairs.links], single, about)


def scale_of(run: ClipRun) -> float:
    """What the patient's similarities are multiplied by before a softmax, as trained."""
    return float(run.model.logit_scales()["logit_scale"].detach())


def results_of(run: Path) -> Path:
    """Where results of a model go: its run folder; of a file NAME.pt, the folder NAME beside it."""
    return run if run.is_dir() else run.with_suffix("")


Eye = bytes | Path
"""A photograph: a file's content, or the file."""


def embed_eyes(
    run: ClipRun,
    count: int,
    photos: Callable[[int], tuple[Eye, Eye | None]],
    *,
    names: Sequence[str],
    batch_size: int = 32,
    workers: Workers = "auto",
    description: str = "Features of photographs",
) -> dict[str, Tensor]:
    """ "image", "left", "right" of `count` patients: float32[count, D] each, of unit length, on the CPU.

    Args:
        run: the model.
        count: how many.
        photos: place -> (left, right) or (only, None): one eye goes through the trained mappings as both.
        names: what messages call each.
        batch_size: patients in one forward pass.
        workers: threads that decode, or "auto".
        description: for the progress display.
    """
    model, runtime = run.model.eval(), run.runtime
    normalise = eval_transform(run.preprocess)
    mine = np.array_split(np.arange(count), runtime.processes)[runtime.rank].tolist()
    found: dict[str, list[Tensor]] = {name: [] for name in EYES}

    def square(eye: Eye, where: str) -> Tensor:
        pixels = prepare(_decoded(eye, where), run.settings)
        image: Tensor = normalise(torch.from_numpy(pixels).permute(2, 0, 1))
        return image

    def squares_of(place: int, left: Eye, right: Eye | None) -> tuple[Tensor, Tensor | None]:
        return square(left, names[place]), None if right is None else square(right, names[place])

    def job(place: int) -> Callable[[], tuple[Tensor, Tensor | None]]:
        left, right = photos(place)  # read here, one after the other; decoded in the threads
        return lambda: squares_of(place, left, right)

    batches = (mine[start : start + batch_size] for start in range(0, len(mine), batch_size))
    threads = max(1, choose_workers(workers, len(mine), runtime.processes))
    done = 0
    with enough_memory(SMALLER_FORWARD), meter(count, description, "patients") as update:
        for squares in _ahead(batches, job, threads):
            left = torch.stack([one for one, _ in squares])
            alone = torch.tensor([other is None for _, other in squares])
            right = torch.stack([one if other is None else other for one, other in squares])
            with torch.no_grad(), runtime.autocast():
                out = model.encode_eyes(
                    runtime.to_device(left), runtime.to_device(right), single=runtime.to_device(alone)
                )
            for name in EYES:
                found[name].append(_unit(out[name]))
            done += len(squares)
            update(done * runtime.processes)
    return _gathered(run, found)


def _ahead(batches: Iterable[list[int]], job: Callable[[int], Callable[[], Any]], threads: int) -> Iterator[list[Any]]:
    """The results of each batch, the next one being worked on meanwhile."""
    waiting: deque[list[Future[Any]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for batch in batches:
            waiting.append([pool.submit(job(place)) for place in batch])
            if len(waiting) > 1:
                yield [future.result() for future in waiting.popleft()]
        while waiting:
            yield [future.result() for future in waiting.popleft()]


def _decoded(eye: Eye, where: str) -> Photo:
    from eyetune.data.photo import decode_image, read_image

    return decode_image(eye, where) if isinstance(eye, bytes) else read_image(eye)


def embed_texts(run: ClipRun, texts: Sequence[str], *, batch_size: int = 32) -> dict[str, Tensor]:
    """ "text", "text_left", "text_right" of N texts: float32[N, D] each, of unit length, on the CPU.

    Texts of the same words are read once; what is longer than the model reads is cut, as in training.
    """
    model, runtime = run.model.eval(), run.runtime
    different = list(dict.fromkeys(texts))
    ids = torch.from_numpy(run.tokenizer.encode(different, run.length)) if different else torch.zeros(0, 3).long()
    lengths = ids.ne(0).sum(dim=1)
    # Texts of like length side by side: little is computed for what only fills up.
    order = torch.argsort(lengths, stable=True)
    mine = torch.tensor(np.array_split(order.numpy(), runtime.processes)[runtime.rank])
    found: dict[str, list[Tensor]] = {name: [] for name in WORDS}
    with enough_memory(SMALLER_FORWARD), meter(len(different), "Features of texts", "texts") as update:
        for start in range(0, len(mine), batch_size):
            part = mine[start : start + batch_size]
            with torch.no_grad(), runtime.autocast():
                out = model.encode_text(runtime.to_device(ids[part, : int(lengths[part].max())]))
            for name in WORDS:
                found[name].append(_unit(out[name]))
            update((start + len(part)) * runtime.processes)
    place = {text: number for number, text in enumerate(different)}
    back = torch.argsort(order)[torch.tensor([place[text] for text in texts], dtype=torch.int64)]
    return {name: values[back] for name, values in _gathered(run, found).items()}


def _unit(features: Tensor) -> Tensor:
    return functional.normalize(features.float(), dim=-1).cpu()


def _gathered(run: ClipRun, found: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    """What all processes have found, in their order."""
    empty = torch.zeros(0, run.model.width)
    own = {name: torch.cat([empty, *parts]) for name, parts in found.items()}
    return {name: torch.cat([one[name] for one in run.runtime.gather(own)]) for name in found}


def reuse(
    path: Path, run: ClipRun, pairs: PairSet, *, anew: bool = False, batch_size: int = 32, workers: Workers = "auto"
) -> tuple[Features, bool]:
    """The features at `path`, or, where there is no such file, computed and written there; and whether they were there.

    Args:
        path: the file.
        run, pairs: whose features.
        anew: write over features of another model, of other pairs, and a damaged file.
        batch_size, workers: as for :func:`embed_eyes`.

    Without `anew` raises RunError for features of another model, DataError for those of other pairs or a damaged file.
    """
    if run.runtime.gather(path.is_file())[0]:
        try:
            return _fitting(path, run, pairs), True
        except UserError:
            if not anew:
                raise
    found = compute(run, pairs, batch_size=batch_size, workers=workers)
    if run.runtime.is_main:
        found.save(path)
    return found, False


def _fitting(path: Path, run: ClipRun, pairs: PairSet) -> Features:
    found = Features.load(path)
    found.check_model(run, path)
    found.check_data(pairs, path)
    # Where data and run lie may have changed; whose features they are has not.
    about = replace(found.about, folder=str(pairs.folder.resolve()), run=str(run.path))
    return replace(found, about=about)
