"""The run folder: all that a run leaves on disk is written and read here and nowhere else.

Layout (see docs/configuration.md)::

    config.yaml  environment.json  load_report.json  data.json  splits.csv  history.csv  metrics.json
    cost.json
    checkpoints/best/{model.safetensors, model.json}
    checkpoints/last/{model.safetensors, optimizer.safetensors, random.safetensors, state.json, model.json}
    checkpoints/epoch-NNNN/  of every so many epochs, where train.save_every asks for it: as best
    checkpoints/previous/    while training: the `last` before this one, and in previous/best the `best` before, if new
    adapter/  predictions/NAME.csv  plots/NAME.png  tensorboard/  report.html  MODEL_CARD.md
    calibration.json  calibration.safetensors  calibration/SITE.json
    .lock     while a process works on the run

Every file arrives whole or not at all. A checkpoint is built in a folder of its own beside the old one and sealed (see
``sealed.py``); then the old one becomes `previous` and the new one takes its place, by renaming; a new best epoch takes
its place only once the `last` checkpoint that knows of it is there. Killed at any moment, or cut off from power, a run
so has a `last` and a `best` that belong together. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import csv
import io
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from eyetune.errors import RunError, UserError, did_you_mean
from eyetune.files import is_temporary, make_folder, sha256, sync, write_json, write_text, writing_failed
from eyetune.tensors import read_tensors, write_tensors
from eyetune.train.sealed import (
    MARKER,
    SCHEMA,
    plain,
    read_json,
    read_marker,
    read_sealed_tensors,
    seal,
    verify,
)

if TYPE_CHECKING:
    from torch import Tensor

    from eyetune.config import Config, RunConfig
    from eyetune.metrics.fitted import Fitted
    from eyetune.metrics.table import Table

AnyConfig = TypeVar("AnyConfig", bound="RunConfig")

MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
RANDOM = "random.safetensors"
GRADIENTS = "gradients.safetensors"
STATE = "state.json"

CALIBRATION = "calibration.json"
NOVELTY = "calibration.safetensors"

LOCK = ".lock"

FINETUNE = "finetune"
_KINDS = {FINETUNE: "a run of eyetune finetune", "clip": "an image-text run (eyetune clip train)"}
_VERBS = {FINETUNE: "finetune", "clip": "clip train"}
_INSTEAD = {
    FINETUNE: "eyetune evaluate and predict work with it.",
    "clip": "eyetune clip retrieve and clip zeroshot work with it; {}/vision.safetensors is its image tower, for "
    "model.weights.",
}


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


class RunDir:
    """One run folder. Create it with :meth:`create`, find it again with :meth:`open`.

    With several processes only the one that was told it is `main` writes; in the others, writing does nothing.
    """

    def __init__(self, path: Path, main: bool = True) -> None:
        self.path = Path(path)
        self.main = main

    @staticmethod
    def check_free(path: Path | str) -> None:
        """Raise UserError when `path` holds anything already: a run never overwrites."""
        path = Path(path)
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file: choose another --out for the run folder.")
        if not is_free(path):
            hint = (
                f"go on with it ({RunDir(path).resume_command()}) or choose another --out"
                if (path / "config.yaml").is_file()
                else "choose another --out"
            )
            raise UserError(f"{path} is not empty, and a run never overwrites: {hint}.")

    @classmethod
    def create(cls, path: Path | str, main: bool = True) -> RunDir:
        """Start a run folder. Raises UserError when `path` holds anything already or cannot be written."""
        path = Path(path)
        if main:
            cls.check_free(path)
            try:
                make_folder(path)
            except OSError as error:
                raise writing_failed(path, error) from error
        return cls(path, main)

    @classmethod
    def open(cls, path: Path | str, main: bool = True, kind: str = FINETUNE) -> RunDir:
        """A run folder that exists. Raises RunError when there is none at `path`, or it is not of this kind."""
        path = Path(path)
        if not path.is_dir():
            siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
            raise RunError(f"no run folder at {path}.{did_you_mean(path.name, siblings)}")
        run = cls(path, main)
        if not run.config_file.is_file():
            raise RunError(f"{path} is not a run folder: it has no config.yaml. Name the folder that --out named.")
        if (found := run.kind()) != kind:
            raise RunError(f"{path} is {_KINDS[found]}, and this takes {_KINDS[kind]}. {_INSTEAD[found].format(path)}")
        return run

    def resume_command(self) -> str:
        """What to type to go on with the run."""
        return f"eyetune {_VERBS[self.kind()]} --resume {self.path}"

    def kind(self) -> str:
        """What kind of run it is, by its configuration: one of those that know their own kind, or of `finetune`."""
        try:
            with open(self.config_file, encoding="utf-8", errors="replace") as stream:
                named = re.search(r"^kind: *['\"]?(\w+)", stream.read(1 << 20), re.MULTILINE)
        except OSError:
            return FINETUNE  # what is wrong with the file is said when it is read
        return named[1] if named and named[1] in _KINDS else FINETUNE

    # -- where things are ------------------------------------------------------------------------------------------

    @property
    def config_file(self) -> Path:
        """The resolved configuration, enough to run it again."""
        return self.path / "config.yaml"

    @property
    def splits_file(self) -> Path:
        """Every image, its split, its patient."""
        return self.path / "splits.csv"

    @property
    def history_file(self) -> Path:
        """A row an epoch."""
        return self.path / "history.csv"

    @property
    def metrics_file(self) -> Path:
        """The scores."""
        return self.path / "metrics.json"

    @property
    def tensorboard(self) -> Path:
        """Folder of the TensorBoard events."""
        return self.path / "tensorboard"

    @property
    def adapter(self) -> Path:
        """Folder of the PEFT adapter."""
        return self.path / "adapter"

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

    @property
    def report_file(self) -> Path:
        """The report, one HTML file."""
        return self.path / "report.html"

    @property
    def heat_file(self) -> Path:
        """The heat maps that the report shows."""
        return self.path / "heatmaps.json"

    @property
    def card_file(self) -> Path:
        """The model card, in Markdown."""
        return self.path / "MODEL_CARD.md"

    def predictions_file(self, name: str) -> Path:
        """Where the predictions on the dataset `name` stand."""
        return self.path / "predictions" / f"{_safe(name)}.csv"

    def plot_file(self, name: str) -> Path:
        """Where the plot `name` stands."""
        return self.path / "plots" / f"{_safe(name)}.png"

    def calibration_file(self, site: str | None = None) -> Path:
        """Where the run's own calibration stands, or that for a site."""
        return self.path / (CALIBRATION if site is None else f"calibration/{_safe(site)}.json")

    def calibrations(self) -> dict[str, Path]:
        """Every site calibration there is, by the site's name."""
        return {file.stem: file for file in sorted((self.path / "calibration").glob("*.json"))}

    def predictions(self) -> dict[str, Path]:
        """Every predictions file there is, by dataset name."""
        return {file.stem: file for file in sorted((self.path / "predictions").glob("*.csv"))}

    # -- the small files -------------------------------------------------------------------------------------------

    def write_config(self, config: RunConfig) -> None:
        """Write `config.yaml`."""
        if self.main:
            write_text(self.config_file, config.to_yaml())

    def read_config(self) -> Config:
        """Read `config.yaml`; the data it names need not be there any more. Raises RunError when damaged."""
        from eyetune.config import Config

        return self.read_config_as(Config)

    def read_config_as(self, kind: type[AnyConfig]) -> AnyConfig:
        """As :meth:`read_config`, for the configuration of any kind of run."""
        try:
            return kind.from_yaml(self.config_file, check_files=False)
        except UserError as error:
            raise RunError(f"the run's configuration cannot be read. {error}") from error

    def write_environment(self, environment: Mapping[str, Any]) -> None:
        """Write `environment.json` (see Runtime.describe)."""
        self._json("environment.json", environment)

    def processes(self) -> int:
        """How many processes began the run; 1 when it does not say."""
        found = self.read_environment().get("processes")
        return found if isinstance(found, int) and found > 0 else 1

    def write_load_report(self, report: Mapping[str, Any]) -> None:
        """Write `load_report.json`: checkpoint to network, key by key."""
        self._json("load_report.json", report)

    def read_environment(self) -> dict[str, Any]:
        """Read `environment.json`; empty when there is none. Raises RunError when it is damaged."""
        return self._optional("environment.json")

    def read_load_report(self) -> dict[str, Any]:
        """Read `load_report.json`; empty when there is none. Raises RunError when it is damaged."""
        return self._optional("load_report.json")

    def write_cost(self, content: Mapping[str, Any]) -> None:
        """Write `cost.json` (see cost.Cost)."""
        self._json("cost.json", content)

    def read_cost(self) -> dict[str, Any]:
        """Read `cost.json`; empty when there is none. Raises RunError when it is damaged."""
        return self._optional("cost.json")

    def update_data(self, **parts: Any) -> None:
        """Write `parts` into `data.json`, beside what stands there: mappings join, other values take the old place."""
        content = self.read_data()
        for name, value in parts.items():
            before = content.get(name)
            content[name] = {**before, **value} if isinstance(before, dict) and isinstance(value, Mapping) else value
        self._json("data.json", content)

    def read_data(self) -> dict[str, Any]:
        """Read `data.json`, where the images came from and which were left out; empty when there is none.

        Raises RunError when it is damaged.
        """
        return self._optional("data.json")

    def write_heat(self, content: Mapping[str, Any]) -> None:
        """Write `heatmaps.json`."""
        self._json(self.heat_file.name, content)

    def read_heat(self) -> dict[str, Any]:
        """Read `heatmaps.json`; empty when there is none. Raises RunError when it is damaged."""
        return self._optional(self.heat_file.name)

    def _optional(self, name: str) -> dict[str, Any]:
        return read_json(self.path / name) if (self.path / name).is_file() else {}

    def write_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Write `metrics.json`; numbers that are not finite become null."""
        self._json("metrics.json", metrics)

    def read_metrics(self) -> dict[str, Any]:
        """Read `metrics.json`. Raises RunError when there is none or it is damaged."""
        return read_json(self.metrics_file)

    def write_predictions(self, name: str, predictions: Table) -> None:
        """Write `predictions/NAME.csv`."""
        if self.main:
            predictions.to_csv(self.predictions_file(name))

    def read_predictions(self, name: str) -> Table | None:
        """Read `predictions/NAME.csv`; None when there is none. Raises DataError when it is damaged.

        That the classes have an order, where only the task says so, comes from the checkpoint's card.
        """
        from eyetune.metrics.predictions import Predictions, read_table

        file = self.predictions_file(name)
        if not file.is_file():
            return None
        table = read_table(file)
        card = self.read_card() if isinstance(table, Predictions) else None
        if isinstance(table, Predictions) and card is not None and card.task.get("kind") == "ordinal":
            return replace(table, ordered=True) if tuple(table.classes) == tuple(card.classes) else table
        return table

    def write_calibration(self, calibration: Fitted, site: str | None = None) -> None:
        """Write `calibration.json`, or `calibration/SITE.json`."""
        if self.main:
            write_json(self.calibration_file(site), calibration.to_dict())

    def read_calibration(self, site: str | None = None) -> Fitted | None:
        """The run's own calibration, None where it has none; or that for a site: its name, or a file (a path, or what
        ends in .json).

        Raises RunError when it is damaged, of other weights or classes than the best checkpoint's, or when there is
        none for the site.
        """
        from eyetune.metrics.calibration import read_calibration

        elsewhere = site is not None and (site.endswith(".json") or os.sep in site or "/" in site)
        file = Path(str(site)) if elsewhere else self.calibration_file(site)
        if elsewhere and not file.is_file():
            raise RunError(f"no calibration at {file}. eyetune calibrate writes them as RUN/calibration/NAME.json.")
        if site is not None and not file.is_file():
            known = self.calibrations()
            names = f" There are: {', '.join(known)}." if known else ""
            raise RunError(
                f"{self.path} has no calibration for {site!r}.{did_you_mean(site, known)}{names} Fit one with: "
                f"eyetune calibrate {self.path} --data {site}=TABLE"
            )
        if not file.is_file():
            return None
        again = f"eyetune finetune --resume {self.path}" if site is None else f"eyetune calibrate {self.path} --data …"
        try:
            calibration = read_calibration(read_json(file))
        except (RunError, ValueError) as error:
            said = str(error) if isinstance(error, RunError) else f"{file} is damaged: {error}."
            raise RunError(f"{said} Fit it again with: {again}") from error
        if calibration.model != self.best_model():
            raise RunError(f"{file} was fitted for other weights than {self.best} holds. Fit it again with: {again}")
        return calibration

    def write_novelty(self, tensors: Mapping[str, Tensor]) -> str:
        """Write `calibration.safetensors`: what computes the out-of-distribution score. Returns its SHA-256, which is
        empty in a process that does not write."""
        return str(write_tensors(self.path / NOVELTY, tensors)["sha256"]) if self.main else ""

    def read_novelty(self, expected: str) -> dict[str, Tensor]:
        """Read `calibration.safetensors`, whose SHA-256 calibration.json says. Raises RunError when it is another."""
        file = self.path / NOVELTY
        if not file.is_file() or sha256(file) != expected:
            what = "has changed since it was written" if file.is_file() else "is missing"
            raise RunError(f"{file} {what}. Fit it again with: eyetune finetune --resume {self.path}")
        return read_tensors(file)

    def best_model(self) -> str | None:
        """SHA-256 of the best checkpoint's tensors; None where its marker (of the first EyeTune) does not say."""
        found = read_marker(self.best).get("files", {}).get(MODEL, {}).get("sha256")
        return found if isinstance(found, str) else None

    def write_history(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write `history.csv` anew: a row an epoch, the union of the rows' columns in order of appearance."""
        if not self.main:
            return
        columns = list(dict.fromkeys(column for row in rows for column in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: value for name, value in row.items() if _finite(value)})
        write_text(self.history_file, text.getvalue())

    def read_splits(self) -> list[dict[str, str]]:
        """The rows of `splits.csv`, every cell as text; empty when there is none. Raises RunError when damaged."""
        if not self.splits_file.is_file():
            return []
        with (
            _as_run_error(self.splits_file),
            open(self.splits_file, encoding="utf-8", errors="surrogateescape", newline="") as stream,
        ):
            reader = csv.DictReader(stream)
            if not {"image", "split"} <= set(reader.fieldnames or ()):
                raise RunError(f"{self.splits_file} is damaged: it has no columns image and split.")
            return [{name: cell or "" for name, cell in row.items() if name is not None} for row in reader]

    def read_card(self) -> ModelCard | None:
        """The card of the best epoch's checkpoint, its tensors not looked at; None when there is no checkpoint.

        Raises RunError when it is damaged.
        """
        folder = self._settled(self.best)
        return None if folder is None else _card(folder, read_marker(folder))

    def read_history(self) -> list[dict[str, Any]]:
        """The rows of `history.csv`: numbers as int or float, an empty cell as None. Empty before the first epoch."""
        if not self.history_file.is_file():
            return []
        with _as_run_error(self.history_file), open(self.history_file, encoding="utf-8", newline="") as stream:
            return [{name: _cell(text) for name, text in row.items()} for row in csv.DictReader(stream)]

    def _json(self, name: str, content: Mapping[str, Any]) -> None:
        if self.main:
            write_json(self.path / name, plain(content))

    # -- checkpoints -----------------------------------------------------------------------------------------------

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

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """While inside, no other process may work on this run. Raises RunError when one does already.

        A record lock on the file `.lock`: the system releases it when the process dies, however it dies, it works on
        network drives, and unlike `flock` it does not pass on to the loader's processes, which outlive a killed one
        for seconds. Where the file system has no locks, a line on stderr says so.
        """
        path = self.path / LOCK
        if not self.main or path in _LOCKED:
            yield  # one process may come here twice: evaluate inside finetune
            return
        handle = _lock(path)
        _LOCKED.add(path)
        try:
            if handle is not None:
                self._sweep()
            yield
        finally:
            _LOCKED.discard(path)
            if handle is not None:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
                os.close(handle)

    def _sweep(self) -> None:
        """Remove the half-written files of a process that was killed."""
        for path in self.path.rglob(".*"):
            if is_temporary(path):
                path.unlink(missing_ok=True)

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


def is_free(path: Path) -> bool:
    """Whether there is nothing at `path`, or a folder that holds no more than what a run leaves behind that was killed
    before its first file."""
    if not path.exists():
        return True
    return path.is_dir() and all(is_temporary(entry) or entry.name == LOCK for entry in path.iterdir())


#: The locks this process holds: record locks do not keep a process from itself.
_LOCKED: set[Path] = set()


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


def _lock(path: Path) -> int | None:
    """Lock `path`: an open file, None where there are no locks. Raises RunError when another process has it."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise writing_failed(path, error) from error
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            owner = os.read(handle, 32).decode("ascii", "replace").strip() or "unknown"
            os.close(handle)
            raise RunError(
                f"{path.parent} is in use by another process (number {owner} on its machine). Wait for it to end, or "
                "choose another run folder."
            ) from error
        except OSError as error:
            print(
                f"{path.parent}: no locks on this file system ({error.strerror}); run one process there at a time.",
                file=sys.stderr,
            )
            os.close(handle)
            return None
        # Whoever held the lock before may have removed the file between our opening and locking it.
        mine = False
        with contextlib.suppress(FileNotFoundError):
            mine = os.fstat(handle).st_ino == path.stat().st_ino
        if mine:
            try:
                os.ftruncate(handle, 0)
                os.write(handle, f"{os.getpid()}\n".encode())
            except OSError as error:
                os.close(handle)
                raise writing_failed(path, error) from error
            return handle
        os.close(handle)


@contextlib.contextmanager
def _as_run_error(path: Path) -> Iterator[None]:
    """A table that is no text, or no table, is a damaged run."""
    try:
        yield
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RunError(f"{path} is damaged, or cannot be read ({error}).") from error


def _safe(name: str) -> str:
    if not name or re.search(r"[/\\\0]", name) or name.startswith("."):
        raise UserError(f"{name!r} cannot be the name of a file: use letters, digits, - and _.")
    return name


def _finite(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))


def _cell(text: str | None) -> Any:
    if not text:
        return None
    kinds: tuple[Callable[[str], Any], ...] = (int, float)
    for kind in kinds:
        try:
            return kind(text)
        except ValueError:
            continue
    return text
