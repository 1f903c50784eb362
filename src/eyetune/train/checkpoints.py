"""The checkpoints of a run folder: what training changed and all it takes to go on, written so that they survive.

A checkpoint is built in a folder of its own beside the old one and sealed (see ``sealed.py``); then the old one becomes
`previous` and the new one takes its place, by renaming; a new best epoch takes its place only once the `last`
checkpoint that knows of it is there. Killed at any moment, or cut off from power, a run so has a `last` and a `best`
that belong together. Nothing is pickled.
"""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eyetune.errors import RunError
from eyetune.files import sync, writing_failed
from eyetune.train.sealed import MARKER, SCHEMA, read_json, read_marker, read_sealed_tensors, seal, verify

if TYPE_CHECKING:
    from torch import Tensor

MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
RANDOM = "random.safetensors"
GRADIENTS = "gradients.safetensors"
STATE = "state.json"


@dataclass(frozen=True)
class ModelCard:
    """Content of `model.json`: all it takes to rebuild a trained model around its weights.

    The base is built from `backbone`, `weights`, `pool` and `pixels`, its fingerprint compared, the strategy `adapt`
    applied, and `model.safetensors` (what training changed) loaded.
    """

    backbone: str
    """Name as in the configuration."""
    weights: str | None
    """The base weights: file, "hub", "random", or None for the embedded ones."""
    pool: str
    pixels: int
    dropout: float
    fingerprint: str
    """Of the untrained backbone's tensors: another base is refused."""
    preprocess: dict[str, Any]
    fundus: dict[str, Any]
    """Preprocessing of the photographs, for prediction to repeat."""
    classes: tuple[str, ...]
    """In the order of the logits."""
    adapt: dict[str, Any]
    """The strategy's section of the configuration."""
    epoch: int = -1
    """Epoch (from 0) whose weights these are; -1 before any."""
    metric: str | None = None
    """Name of the metric that chose the best epoch."""
    value: float | None = None
    """That metric on the validation split, when defined."""
    seed: int = 0
    """Of the run: with it, `random` weights come out the same again."""
    head_norm: bool = False
    """A LayerNorm stands before the linear layer: runs made from checkpoints of other programs."""
    task: dict[str, Any] = field(default_factory=dict)
    """How the head's numbers are read (see answers.py); empty: the logits of one class an image."""
    schema: int = SCHEMA

    def at(self, epoch: int, metric: str | None, value: float | None) -> ModelCard:
        """The same card for the weights of `epoch`."""
        return replace(self, epoch=epoch, metric=metric, value=value)

    def to_dict(self) -> dict[str, Any]:
        """JSON content."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], where: Path) -> ModelCard:
        """Read JSON content. Raises RunError, naming the file `where`, when fields are missing or unknown."""
        known = {one.name for one in fields(cls)}
        needed = {"backbone", "weights", "pool", "pixels", "fingerprint", "preprocess", "fundus", "classes", "adapt"}
        if missing := sorted(needed - set(content)):
            raise RunError(f"{where} is damaged: it lacks {', '.join(missing)}.")
        if extra := sorted(set(content) - known):
            raise RunError(f"{where} has fields this EyeTune does not know: {', '.join(extra)}.")
        values = {"dropout": 0.0} | dict(content) | {"schema": SCHEMA}
        values["classes"] = tuple(values["classes"])
        return cls(**values)


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint read back: the trained tensors and their card; for `last` also what resuming needs."""

    tensors: dict[str, Tensor]
    card: ModelCard
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    random: dict[str, Tensor] = field(default_factory=dict)
    """The generators' states, when the run stopped inside an epoch."""
    gradients: dict[str, Tensor] = field(default_factory=dict)
    """When it stopped between the batches of one optimizer step: their gradients so far."""
    digest: str = ""
    """SHA-256 of the file of the trained tensors; empty where the marker does not say."""


class Checkpoints(ABC):
    """The folder `checkpoints` of a run folder; see :class:`eyetune.train.rundir.RunDir`.

    Args:
        path: the run folder.
        main: whether this process writes; in others, writing does nothing.
    """

    def __init__(self, path: Path, main: bool = True) -> None:
        self.path = Path(path)
        self.main = main

    @abstractmethod
    def resume_command(self) -> str:
        """What to type to go on with the run."""

    @property
    def best(self) -> Path:
        """Folder of the best epoch's checkpoint."""
        return self.path / "checkpoints" / "best"

    @property
    def last(self) -> Path:
        """Folder of the checkpoint that a run is resumed from."""
        return self.path / "checkpoints" / "last"

    @property
    def previous(self) -> Path:
        """Folder of the checkpoint before the last; inside it, `best` is the best one of then, if it was another."""
        return self.path / "checkpoints" / "previous"

    def save_best(self, tensors: Mapping[str, Tensor], card: ModelCard) -> None:
        """Write the best epoch's checkpoint beside the old one; the next :meth:`save_last` puts it in place."""
        if self.main:
            self._build(self.best, {MODEL: tensors}, {}, card)

    def save_last(
        self,
        tensors: Mapping[str, Tensor],
        card: ModelCard,
        optimizer: Mapping[str, Tensor],
        state: Mapping[str, Any],
        *,
        random: Mapping[str, Tensor] | None = None,
        gradients: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write the checkpoint to resume from, put it in place, then the best one that waits.

        Raises UserError when the disk is full or not ours to write, or a tensor is not finite; the checkpoint before
        then stays as it was.
        """
        if not self.main:
            return
        # Only now: with the new one there are never more than three on the disk, nor fewer than one.
        shutil.rmtree(self.previous, ignore_errors=True)
        files = {MODEL: tensors, OPTIMIZER: optimizer}
        files |= {name: content for name, content in ((RANDOM, random), (GRADIENTS, gradients)) if content}
        self._build(self.last, files, {STATE: state}, card)
        if self.last.exists():
            _rename(self.last, self.previous)
        _rename(_new(self.last), self.last)
        if (_new(self.best) / MARKER).is_file():
            self._promote_best()

    def load_best(self, epoch: int | None = None) -> Checkpoint:
        """The best epoch's checkpoint. Raises RunError when there is none, or it is damaged.

        Args:
            epoch: the epoch it has to be of (a run killed between two renames has it in waiting still); None takes
                what is in place.
        """
        folder = self._settled(self.best)
        if folder is None:
            raise RunError(
                f"no checkpoint at {self.best}: the run did not finish an epoch. "
                f"Run it again, or go on with: {self.resume_command()}"
            )
        try:
            if epoch is not None and read_marker(folder).get("epoch") != epoch:
                folder = _new(self.best)
                if not (folder / MARKER).is_file() or read_marker(folder).get("epoch") != epoch:
                    raise RunError(f"{self.best} is not the checkpoint of epoch {epoch + 1}, which was the best.")
            marker = read_marker(folder)
            return _read_trained(folder, marker)
        except RunError as error:
            raise RunError(f"{error}\n{self._others(self.best)}") from error

    def epoch_folder(self, epoch: int) -> Path:
        """Where the checkpoint of an epoch, counted from 1, is kept that `train.save_every` asked for."""
        return self.path / "checkpoints" / f"epoch-{epoch:04d}"

    def save_epoch(self, tensors: Mapping[str, Tensor], card: ModelCard) -> None:
        """Keep the trained tensors of `card.epoch`, whatever comes later. Raises as :meth:`save_last`."""
        folder = self.epoch_folder(card.epoch + 1)
        if self.main and not (folder / MARKER).is_file():  # there already: the epoch is run again after a resume
            shutil.rmtree(folder, ignore_errors=True)
            self._build(folder, {MODEL: tensors}, {}, card)
            _rename(_new(folder), folder)

    def load_epoch(self, epoch: int) -> Checkpoint:
        """What :meth:`save_epoch` kept of an epoch, counted from 1. Raises RunError when there is none, or damaged."""
        folder = self.epoch_folder(epoch)
        if not (folder / MARKER).is_file():
            kept = sorted(int(found.name[6:]) for found in folder.parent.glob("epoch-*") if found.name[6:].isdigit())
            raise RunError(
                f"{self.path} keeps no checkpoint of epoch {epoch}. Kept: {', '.join(map(str, kept)) or 'none'} "
                "(train.save_every)."
            )
        return _read_trained(folder, read_marker(folder))

    def load_last(self) -> Checkpoint | None:
        """The checkpoint to resume from, or None when nothing was saved yet.

        Raises RunError when it is damaged; the text says which checkpoint is whole, and how to go on from it.
        """
        folder = self._settled(self.last)
        if folder is None:
            return None
        try:
            return _read_last(folder)
        except RunError as error:
            raise RunError(f"{error}\n{self._others(self.last)}") from error

    def has_checkpoint(self) -> bool:
        """Whether anything was trained and saved, whole or not."""
        return any(self._settled(folder) is not None for folder in (self.last, self.best, self.previous))

    def back_to_previous(self) -> None:
        """Put the checkpoint before the last in the last one's place, for good.

        Raises RunError when there is none, or it is damaged.
        """
        if not self.main:
            return
        if not (self.previous / MARKER).is_file():
            raise RunError(
                f"there is no checkpoint before {self.last}: {self.previous} is not there. Run it again, or go on "
                f"with: {self.resume_command()}"
            )
        _read_last(self.previous)
        older = self.previous / self.best.name
        if older.is_dir():
            verify(older, read_marker(older))
            shutil.rmtree(_new(self.best), ignore_errors=True)
            if self.best.exists():
                _rename(self.best, _new(self.best))  # without its epoch, a best in waiting is dropped
            _rename(older, self.best)
        shutil.rmtree(_new(self.last), ignore_errors=True)
        shutil.rmtree(self.last, ignore_errors=True)
        _rename(self.previous, self.last)

    def settle(self, best_epoch: int | None) -> None:
        """Before going on with a run: finish or undo what a killed process left half done.

        Args:
            best_epoch: what the `last` checkpoint says the best epoch is; a waiting checkpoint of that epoch takes its
                place, any other is dropped (its epoch will be run again).
        """
        if not self.main:
            return
        for folder in (self.last, self.best):
            if (found := self._settled(folder)) is not None and found != folder:
                _rename(found, folder)
        waiting = _new(self.best)
        if (waiting / MARKER).is_file() and read_marker(waiting).get("epoch") == best_epoch:
            self._promote_best()
        for folder in (self.last, self.best):
            shutil.rmtree(_new(folder), ignore_errors=True)

    def drop_previous(self) -> None:
        """After training: the checkpoint before the last is not needed any more."""
        if self.main:
            shutil.rmtree(self.previous, ignore_errors=True)

    def read_card(self) -> ModelCard | None:
        """The card of the best epoch's checkpoint, its tensors not looked at; None when there is no checkpoint.

        Raises RunError when it is damaged.
        """
        folder = self._settled(self.best)
        return None if folder is None else _card(folder, read_marker(folder))

    def best_model(self) -> str | None:
        """SHA-256 of the best checkpoint's tensors; None where its marker (of the first EyeTune) does not say."""
        found = read_marker(self.best).get("files", {}).get(MODEL, {}).get("sha256")
        return found if isinstance(found, str) else None

    def _build(
        self,
        target: Path,
        tensors: Mapping[str, Mapping[str, Tensor]],
        texts: Mapping[str, Mapping[str, Any]],
        card: ModelCard,
    ) -> None:
        folder = _new(target)
        shutil.rmtree(folder, ignore_errors=True)
        try:
            seal(folder, tensors, texts, card.to_dict())
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def _promote_best(self) -> None:
        if self.best.exists():
            older = self.previous / self.best.name
            shutil.rmtree(older, ignore_errors=True)
            if self.previous.is_dir():
                _rename(self.best, older)
            else:  # the very first `last`
                shutil.rmtree(self.best)
        _rename(_new(self.best), self.best)

    def _settled(self, folder: Path) -> Path | None:
        """Where the checkpoint is that belongs at `folder`: there, or on the way when a process was killed.

        Between the two renames of a replacement `folder` is gone for a moment. A new `last` is then the one to take; a
        new best one only if there is no old one, for it may be of an epoch that `last` does not know of.
        """
        if folder.is_dir():
            return folder
        candidates = [_new(folder), self.previous]
        if folder == self.best:
            candidates = [self.previous / self.best.name, _new(folder)]
        return next((candidate for candidate in candidates if (candidate / MARKER).is_file()), None)

    def _others(self, damaged: Path) -> str:
        """Which other checkpoints are whole, and what to do with them."""
        lines = []
        if damaged == self.last and (epochs := _whole(self.previous)) is not None:
            lines.append(
                f"The checkpoint before it is whole ({epochs}). Go on from it with: {self.resume_command()} "
                "--from previous"
            )
        if damaged != self.best and (epochs := _whole(self.best)) is not None:
            lines.append(f"{self.best} is whole ({epochs}): evaluate and predict work with it.")
        if damaged == self.best and (epochs := _whole(self.last)) is not None:
            lines.append(
                f"{self.last} is whole ({epochs}). To use its weights instead, put a copy of that folder in the place "
                f"of {self.best}."
            )
        return "\n".join(lines) or "No other checkpoint of this run is whole: train it again, with another --out."


def _new(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.new")


def _card(folder: Path, marker: Mapping[str, Any]) -> ModelCard:
    return ModelCard.from_dict({name: value for name, value in marker.items() if name != "files"}, folder / MARKER)


def _read_trained(folder: Path, marker: Mapping[str, Any]) -> Checkpoint:
    verify(folder, marker)
    digest = marker.get("files", {}).get(MODEL, {}).get("sha256", "")
    return Checkpoint(read_sealed_tensors(folder, MODEL, marker), _card(folder, marker), digest=digest)


def _read_last(folder: Path) -> Checkpoint:
    marker = read_marker(folder)
    verify(folder, marker)
    return Checkpoint(
        read_sealed_tensors(folder, MODEL, marker),
        _card(folder, marker),
        read_sealed_tensors(folder, OPTIMIZER, marker),
        read_json(folder / STATE),
        # Schema 1 was written after whole epochs only, without these.
        read_sealed_tensors(folder, RANDOM, marker) if "files" in marker else {},
        read_sealed_tensors(folder, GRADIENTS, marker) if "files" in marker else {},
    )


def _whole(folder: Path) -> str | None:
    """Up to where a checkpoint goes, in words; None when it is missing or damaged."""
    try:
        marker = read_marker(folder)
        verify(folder, marker)
    except RunError:
        return None
    return f"up to epoch {marker.get('epoch', -1) + 1}"


def _rename(source: Path, target: Path) -> None:
    """Rename a folder, for good: both lists of names are on the disk when it returns."""
    try:
        source.rename(target)
        for parent in {source.parent, target.parent}:
            sync(parent)
    except OSError as error:
        raise writing_failed(target, error) from error
