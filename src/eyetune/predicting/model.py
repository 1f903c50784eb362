"""What a trained model is to those who only want its predictions: a run folder, or a file exported from one.

Importing this module needs no PyTorch, and an exported model never does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from eyetune.errors import ConfigError, RunError, UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from eyetune.data.cache import Cache
    from eyetune.data.fundus import FundusSettings
    from eyetune.data.readable import Workers
    from eyetune.data.record import Kind, Record
    from eyetune.data.records import Manifest
    from eyetune.heatmaps import HeatMap
    from eyetune.metrics.fitted import Fitted
    from eyetune.metrics.table import Table
    from eyetune.train.run import Run

T = TypeVar("T")


class Processes(Protocol):
    """The processes that work together on one command; most often there is one."""

    @property
    def is_main(self) -> bool:
        """Whether this one writes files and speaks."""

    @property
    def processes(self) -> int:
        """How many there are."""

    @property
    def rank(self) -> int:
        """This one's number, from 0."""

    def gather(self, value: T) -> list[T]:
        """What each holds, in order of their ranks, in every one."""


class TrainedModel(Protocol):
    """A model that has learnt: what it tells apart, how photographs reach it, what it says of them.

    :class:`eyetune.train.run.Run` is one, :class:`eyetune.predicting.onnx_model.OnnxModel` another.
    """

    @property
    def name(self) -> str:
        """Where it lies, for messages."""

    @property
    def backbone(self) -> str:
        """The name of the network it was adapted from."""

    @property
    def licence(self) -> str:
        """Of that network's weights, in a line for people; what was made from them is bound by it."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes in the order of its numbers, the labels, or the one name of the number."""

    @property
    def reads(self) -> Kind:
        """What it tells of a photograph: a class, labels, or a value."""

    @property
    def settings(self) -> FundusSettings:
        """How a photograph becomes the square it sees."""

    @property
    def runtime(self) -> Processes:
        """The processes that share the work."""

    @property
    def cache(self) -> Cache | None:
        """Where prepared squares are kept; None for nowhere."""

    @property
    def calibration(self) -> Fitted | None:
        """What was fitted on validation; None for a model without. Its `ood` says what is out of distribution."""

    @property
    def digest(self) -> str | None:
        """SHA-256 of what was learnt; None where nothing says it."""

    def calibration_for(self, site: str | None) -> Fitted | None:
        """The calibration fitted on a site's images; of None, the model's own. Raises RunError where there is none."""

    def nothing(self) -> Table:
        """The table of no photograph: it has the columns of all."""

    def unlabelled(self, records: Sequence[Record], source: str = "images") -> Manifest:
        """A manifest of photographs to predict, of which nothing else is known."""

    def table(
        self, manifest: Manifest, *, workers: Workers = "auto", batch_size: int = 32, mirrored: bool = False
    ) -> Table:
        """What it says of every record of a manifest, in its order, not yet calibrated; with `mirrored`, of each and
        its mirror image together. Raises DataError for an image that cannot be read."""

    def table_of(
        self,
        names: Sequence[str],
        squares: Sequence[NDArray[np.uint8]],
        *,
        batch_size: int = 32,
        mirrored: bool = False,
    ) -> Table:
        """As :meth:`table`, of photographs that are squares uint8[P, P, 3] already, as :attr:`settings` makes them
        (:func:`eyetune.data.fundus.decode_square`); in this process alone."""

    def as_run(self) -> Run | None:
        """The run itself, with its network, which heat maps look into; None for an exported model."""


def open_model(
    path: str | Path,
    *,
    device: str = "auto",
    precision: str | None = None,
    weights: str | None = None,
    cache: bool = True,
) -> TrainedModel:
    """What lies at `path`, ready to predict: a model exported to ONNX (a file NAME.onnx), or a run.

    Arguments and errors as of :func:`eyetune.train.run.load_run`. An exported model computes in the precision it was
    exported in, holds all its weights, and keeps nothing on disk. Raises ConfigError where it is asked for another.
    """
    if Path(path).suffix.lower() == ".onnx" and not Path(path).is_dir():
        from eyetune.predicting.onnx_model import OnnxModel

        if precision not in (None, "auto") or weights is not None:
            what = "--weights" if weights is not None else f"--precision {precision}"
            raise ConfigError(f"{what}: {path} is an exported model, which holds its weights and its precision.")
        return OnnxModel(path, device=device)
    try:
        from eyetune.train.run import load_run
    except ImportError as error:
        raise UserError(
            f"{path}: a run needs PyTorch, and {error.name} is not installed: pip install eyetune."
        ) from error
    return load_run(path, device=device, precision=precision, weights=weights, cache=cache)


def why_no_heat_maps(model: TrainedModel) -> str | None:
    """Why there are no heat maps of a model's predictions, in a sentence; None where there are."""
    run = model.as_run()
    if run is None:
        return f"{model.name}: heat maps look into the network, which an exported model hides. Use its run."
    from eyetune.heatmaps import choose_method

    try:
        choose_method(run.model)
    except UserError as error:
        return str(error)
    return None


def heat_map(model: TrainedModel, square: NDArray[np.uint8], *, target: str | None = None) -> HeatMap:
    """Where a model looked in a square uint8[P, P, 3], for the class `target` (None: the one it says is likeliest).

    Raises UserError where :func:`why_no_heat_maps` has something to say.
    """
    run = model.as_run()
    if run is None:
        raise RunError(str(why_no_heat_maps(model)))
    from eyetune.heatmaps import explain_square

    return explain_square(run, square, target=target)
