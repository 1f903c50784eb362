"""A model exported to ONNX, ready to predict: ONNX Runtime in place of PyTorch, everything else as for a run.

Photographs become squares by the very code that training used; the network's numbers become a table, calibrated
probabilities and calls by the same code that reads a run's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import numpy as np

from eyetune.adapt.task import READS
from eyetune.data.fundus import FundusSettings, load_square
from eyetune.data.readable import Workers, choose_workers
from eyetune.data.record import Kind, Record
from eyetune.data.records import Manifest
from eyetune.errors import DataError, MissingExtra, RunError, UserError, did_you_mean
from eyetune.interrupt import obey, pending
from eyetune.metrics.fitted import Fitted
from eyetune.metrics.table import Table
from eyetune.predicting.onnx_file import SHEET, read_outline
from eyetune.predicting.sheet import Sheet, read_sheet
from eyetune.processes import rank
from eyetune.progress import meter

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from eyetune.metrics.strangeness import Strangeness
    from eyetune.train.run import Run

T = TypeVar("T")

INPUT = "image"
"""uint8[N, P, P, 3], RGB: squares as :attr:`Sheet.squares` says."""

LOGITS, PROBABILITIES, VALUE, STRANGE = "logits", "probabilities", "value", "ood"
"""float32[N, outputs], what the head gave; float32[N, K], calibrated; or float32[N], the number; float32[N], how unlike
the training images each is."""


class Alone:
    """One process that does all; any others that torchrun has started have nothing to do."""

    processes = 1
    rank = 0

    @property
    def is_main(self) -> bool:
        """Whether this is the one."""
        return rank() == 0

    def gather(self, value: T) -> list[T]:
        """The one value."""
        return [value]


class OnnxModel:
    """An exported model; see :class:`eyetune.predicting.model.TrainedModel`.

    Args:
        path: the file.
        device: auto, cpu or cuda, the last with the package onnxruntime-gpu.
        threads: of the processor; 0: one a core.

    Attributes:
        sheet: what the file says of itself.

    Raises RunError for a file that EyeTune did not export, is damaged or newer than this EyeTune; UserError for a
    device that is not there; MissingExtra without onnxruntime.
    """

    def __init__(self, path: str | Path, *, device: str = "auto", threads: int = 0) -> None:
        self.path = Path(path)
        text = read_outline(self.path).properties[SHEET]
        try:
            self.sheet: Sheet = read_sheet(text)
        except ValueError as error:
            raise RunError(f"{path}: what the file says of itself cannot be read: {error}.") from error
        if self.sheet.form != "onnx":
            self._refuse(f"it says that it is {self.sheet.form}")
        self.runtime = Alone()
        self.cache = None
        self._session = _session(self.path, device, threads)
        self._check_ends()

    def _refuse(self, why: str) -> NoReturn:
        raise RunError(f"{self.path} is not a model that EyeTune exported, or not any more: {why}.")

    def _check_ends(self) -> None:
        """Refuse a network whose inputs and outputs are not those that its sheet promises."""
        side, session = self.settings.pixels, self._session
        given = [(one.name, one.type, list(one.shape[1:])) for one in session.get_inputs()]
        if given != [(INPUT, "tensor(uint8)", [side, side, 3])]:
            self._refuse(f"its input is {given}")
        shapes = {one.name: list(one.shape[1:]) for one in session.get_outputs() if one.type == "tensor(float)"}
        wanted = {LOGITS: [self.sheet.task.outputs(self.classes)]} | ({STRANGE: []} if self._rule else {})
        if any(shapes.get(name) != shape for name, shape in wanted.items()):
            self._refuse(f"its outputs are {shapes}")

    @property
    def name(self) -> str:
        """The file."""
        return str(self.path)

    @property
    def backbone(self) -> str:
        """The name of the network it was adapted from."""
        return self.sheet.backbone

    @property
    def licence(self) -> str:
        """Of the weights it was adapted from."""
        return self.sheet.licence

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes, the labels, or the name of the number, in the order of its outputs."""
        return self.sheet.classes

    @property
    def reads(self) -> Kind:
        """What it tells of a photograph: a class, labels, or a value."""
        return READS[self.sheet.task.kind]

    @cached_property
    def settings(self) -> FundusSettings:
        """How a photograph becomes the square it sees."""
        return self.sheet.squares.settings

    @cached_property
    def calibration(self) -> Fitted | None:
        """What was fitted on the run's validation split."""
        return self.sheet.fitted()

    @property
    def digest(self) -> str | None:
        """SHA-256 of what the run's training changed, marked where other numbers came of it."""
        digest, numbers = self.sheet.digest, self.sheet.numbers
        return digest if digest is None or numbers == "float32" else f"{digest} {numbers}"

    def calibration_for(self, site: str | None) -> Fitted | None:
        """The calibration of a site, by its name; of None, the model's own. Raises RunError where there is none."""
        try:
            return self.calibration if site is None else self.sheet.fitted(site)
        except KeyError:
            known = ", ".join(self.sheet.sites) or "none"
            raise RunError(
                f"{self.path} holds no calibration for {site!r}.{did_you_mean(str(site), self.sheet.sites)} It has: "
                f"{known}. A site's own is fitted on the run (eyetune calibrate), and exported with it."
            ) from None

    def nothing(self) -> Table:
        """The table of no photograph."""
        return self._table([], [])

    def unlabelled(self, records: Sequence[Record], source: str = "images") -> Manifest:
        """A manifest of photographs to predict, of which nothing else is known."""
        return Manifest(tuple(records), self.classes, source, kind=self.reads)

    def as_run(self) -> Run | None:
        """None: a run this is not."""
        return None

    def table(
        self, manifest: Manifest, *, workers: Workers = "auto", batch_size: int = 32, mirrored: bool = False
    ) -> Table:
        """What it says of every record, in order, not yet calibrated. Raises DataError, naming file and row, for an
        image that cannot be read, and for a manifest of another kind of task."""
        if manifest.kind != self.reads:
            raise DataError(f"{manifest.source} holds {manifest.kind}; {self.path} learnt {self.reads}.")
        records = manifest.records
        threads = max(1, choose_workers(workers, len(records)))
        found: list[_Answer] = []
        with ThreadPoolExecutor(threads) as pool, meter(len(records), "Predicting") as update:
            parts = (records[first : first + batch_size] for first in range(0, len(records), batch_size))
            for squares in _ahead(pool, self._square, parts):
                found.append(self._ask(squares, mirrored))
                update(sum(len(one.logits) for one in found))
                if pending():
                    raise obey("")
        return self._table([record.name for record in records], found, manifest)

    def table_of(
        self,
        names: Sequence[str],
        squares: Sequence[NDArray[np.uint8]],
        *,
        batch_size: int = 32,
        mirrored: bool = False,
    ) -> Table:
        """As :meth:`table`, of photographs that are squares uint8[P, P, 3] already."""
        parts = (squares[first : first + batch_size] for first in range(0, len(squares), batch_size))
        return self._table(names, [self._ask(part, mirrored) for part in parts])

    def _square(self, record: Record) -> NDArray[np.uint8]:
        try:
            return load_square(record.image, self.settings)
        except DataError as error:
            raise DataError(f"{record.row}: {error}") from None

    @property
    def _rule(self) -> Strangeness | None:
        return None if self.calibration is None else self.calibration.ood

    def _ask(self, squares: Sequence[NDArray[np.uint8]], mirrored: bool) -> _Answer:
        """What the network says of a batch; of each and its mirror image, the mean of the head's numbers."""
        images = np.stack(squares)
        answer = self._run(images)
        if not mirrored:
            return answer
        other = self._run(np.ascontiguousarray(images[:, :, ::-1]))
        return _Answer(np.float32(0.5) * (answer.logits + other.logits), answer.ood)

    def _run(self, images: NDArray[np.uint8]) -> _Answer:
        wanted = [LOGITS] if self._rule is None else [LOGITS, STRANGE]
        logits, *ood = self.outputs(wanted, images)
        return _Answer(logits, ood[0] if ood else None)

    def outputs(self, names: Sequence[str], images: NDArray[np.uint8]) -> list[NDArray[Any]]:
        """These outputs of the network for a batch of squares uint8[N, P, P, 3]."""
        try:
            found: list[NDArray[Any]] = self._session.run(list(names), {INPUT: images})
        except Exception as error:  # ONNX Runtime has exceptions of its own for each of its states
            raise UserError(
                f"{self.path}: ONNX Runtime cannot compute a batch of {len(images)} images; where memory is short, try "
                f"a smaller --batch-size.\n  ({_first_line(error)})"
            ) from error
        return found

    def _table(self, names: Sequence[str], answers: Sequence[_Answer], manifest: Manifest | None = None) -> Table:
        head, width = self.sheet.task, self.sheet.task.outputs(self.classes)
        raw = np.concatenate([np.zeros((0, width), np.float32), *(one.logits for one in answers)])
        patients = eyes = targets = ood = None
        if manifest is not None:
            patients = [record.patient for record in manifest]
            eyes, targets = [record.eye for record in manifest], manifest.targets()
        table = head.tell(raw, self.classes, images=names, patients=patients, eyes=eyes, targets=targets)
        if self._rule is not None and answers:
            ood = np.concatenate([one.ood for one in answers if one.ood is not None]).astype(np.float64)
        return table if ood is None else replace(table, ood=ood)


@dataclass(frozen=True, eq=False)
class _Answer:
    """logits float32[N, outputs] and, where the model has the score, ood float32[N]."""

    logits: NDArray[np.float32]
    ood: NDArray[np.float32] | None


def _ahead(
    pool: ThreadPoolExecutor, read: Callable[[Record], T], parts: Iterator[Sequence[Record]]
) -> Iterator[list[T]]:
    """What `read` makes of each part, the next one being read meanwhile: no more than two are in memory."""
    waiting = None
    for part in parts:
        begun = [pool.submit(read, record) for record in part]
        if waiting is not None:
            yield [one.result() for one in waiting]
        waiting = begun
    if waiting is not None:
        yield [one.result() for one in waiting]


def _session(path: Path, device: str, threads: int) -> Any:
    """An ONNX Runtime session of the file."""
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtra("Predicting with an ONNX model", "onnx") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # what goes wrong is said once, below
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=_providers(onnxruntime, device))
    except UserError:
        raise
    except Exception as error:  # ONNX Runtime has exceptions of its own for each of its states
        raise RunError(
            f"{path}: ONNX Runtime {onnxruntime.__version__} cannot load it ({_first_line(error)})."
        ) from error


def _providers(onnxruntime: Any, device: str) -> list[str]:
    """Where ONNX Runtime computes. Raises UserError for what is not there."""
    cuda, cpu = "CUDAExecutionProvider", "CPUExecutionProvider"
    there = onnxruntime.get_available_providers()
    if device == "cuda" and cuda not in there:
        raise UserError("--device cuda: this ONNX Runtime has no CUDA: pip install onnxruntime-gpu, or --device cpu.")
    if device == "mps":
        raise UserError("--device mps: an ONNX model runs on the processor or on CUDA: --device cpu.")
    return [cuda, cpu] if device in ("auto", "cuda") and cuda in there else [cpu]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
