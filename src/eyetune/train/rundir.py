"""The run folder: all that a run leaves on disk is written and read here and nowhere else.

Layout (see docs/configuration.md)::

    config.yaml  environment.json  load_report.json  splits.csv  history.csv  metrics.json
    checkpoints/best/{model.safetensors, model.json}
    checkpoints/last/{model.safetensors, optimizer.safetensors, state.json, model.json}
    adapter/  predictions/NAME.csv  plots/NAME.png  tensorboard/  report.html

Every file arrives whole or not at all. A checkpoint is built in a folder of its own beside the old one, its JSON
marker (`model.json`) last, and then takes the old one's place by renaming; a new best epoch takes its place only once
the `last` checkpoint that knows of it is complete. Killed at any moment, a run so has a `last` and a `best` that belong
together. Nothing is pickled.
"""

from __future__ import annotations

import csv
import errno
import io
import json
import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eyetune.errors import RunError, UserError, did_you_mean
from eyetune.files import atomic, write_json, write_text, writing_failed

if TYPE_CHECKING:
    from torch import Tensor

    from eyetune.config import Config
    from eyetune.metrics.predictions import Predictions

#: Version of `model.json`; raised when a reader of the old form would misunderstand the new one.
SCHEMA = 1

MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
MARKER = "model.json"
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
    schema: int = SCHEMA

    def at(self, epoch: int, metric: str | None, value: float | None) -> ModelCard:
        """The same card for the weights of `epoch`."""
        return replace(self, epoch=epoch, metric=metric, value=value)

    def to_dict(self) -> dict[str, Any]:
        """JSON content."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], where: Path) -> ModelCard:
        """Read JSON content. Raises RunError, naming the file `where`, when fields are missing or it is too new."""
        schema = content.get("schema")
        if not isinstance(schema, int) or schema > SCHEMA:
            raise RunError(
                f"{where} has schema {schema!r}; this EyeTune reads {SCHEMA}. Use the version that wrote it."
            )
        known = {one.name for one in fields(cls)}
        needed = {"backbone", "weights", "pool", "pixels", "fingerprint", "preprocess", "fundus", "classes", "adapt"}
        if missing := sorted(needed - set(content)):
            raise RunError(f"{where} is damaged: it lacks {', '.join(missing)}.")
        if extra := sorted(set(content) - known):
            raise RunError(f"{where} has fields this EyeTune does not know: {', '.join(extra)}.")
        values = {"dropout": 0.0} | dict(content)
        values["classes"] = tuple(values["classes"])
        return cls(**values)


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint read back: the trained tensors and their card; for `last` also what resuming needs."""

    tensors: dict[str, Tensor]
    card: ModelCard
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)


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
        if path.is_dir() and any(path.iterdir()):
            hint = (
                f"go on with it (eyetune finetune --resume {path}) or choose another --out"
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
                path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise writing_failed(path, error) from error
        return cls(path, main)

    @classmethod
    def open(cls, path: Path | str, main: bool = True) -> RunDir:
        """A run folder that exists. Raises RunError when there is none at `path`."""
        path = Path(path)
        if not path.is_dir():
            siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
            raise RunError(f"no run folder at {path}.{did_you_mean(path.name, siblings)}")
        run = cls(path, main)
        if not run.config_file.is_file():
            raise RunError(f"{path} is not a run folder: it has no config.yaml. Name the folder that --out named.")
        return run

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

    def predictions_file(self, name: str) -> Path:
        """Where the predictions on the dataset `name` stand."""
        return self.path / "predictions" / f"{_safe(name)}.csv"

    def plot_file(self, name: str) -> Path:
        """Where the plot `name` stands."""
        return self.path / "plots" / f"{_safe(name)}.png"

    def predictions(self) -> dict[str, Path]:
        """Every predictions file there is, by dataset name."""
        return {file.stem: file for file in sorted((self.path / "predictions").glob("*.csv"))}

    # -- the small files -------------------------------------------------------------------------------------------

    def write_config(self, config: Config) -> None:
        """Write `config.yaml`."""
        if self.main:
            write_text(self.config_file, config.to_yaml())

    def read_config(self) -> Config:
        """Read `config.yaml`; the data it names need not be there any more. Raises RunError when damaged."""
        from eyetune.config import Config

        try:
            return Config.from_yaml(self.config_file, check_files=False)
        except UserError as error:
            raise RunError(f"the run's configuration cannot be read. {error}") from error

    def write_environment(self, environment: Mapping[str, Any]) -> None:
        """Write `environment.json` (see Runtime.describe)."""
        self._json("environment.json", environment)

    def write_load_report(self, report: Mapping[str, Any]) -> None:
        """Write `load_report.json`: checkpoint to network, key by key."""
        self._json("load_report.json", report)

    def write_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Write `metrics.json`; numbers that are not finite become null."""
        self._json("metrics.json", metrics)

    def read_metrics(self) -> dict[str, Any]:
        """Read `metrics.json`. Raises RunError when there is none or it is damaged."""
        return _read_json(self.metrics_file)

    def write_predictions(self, name: str, predictions: Predictions) -> None:
        """Write `predictions/NAME.csv`."""
        if self.main:
            predictions.to_csv(self.predictions_file(name))

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

    def read_history(self) -> list[dict[str, Any]]:
        """The rows of `history.csv`: numbers as int or float, an empty cell as None. Empty before the first epoch."""
        if not self.history_file.is_file():
            return []
        with open(self.history_file, encoding="utf-8", newline="") as stream:
            return [{name: _cell(text) for name, text in row.items()} for row in csv.DictReader(stream)]

    def _json(self, name: str, content: Mapping[str, Any]) -> None:
        if self.main:
            write_json(self.path / name, _plain(content))

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def save_best(self, tensors: Mapping[str, Tensor], card: ModelCard) -> None:
        """Write the best epoch's checkpoint beside the old one; the next :meth:`save_last` puts it in place."""
        if self.main:
            self._build(self.best, {MODEL: tensors}, {MARKER: card.to_dict()})

    def save_last(
        self,
        tensors: Mapping[str, Tensor],
        card: ModelCard,
        optimizer: Mapping[str, Tensor],
        state: Mapping[str, Any],
    ) -> None:
        """Write the checkpoint to resume from, put it in place, then the best one that waits.

        Raises UserError when the disk is full or not ours to write; the checkpoint before then stays as it was.
        """
        if not self.main:
            return
        self._build(self.last, {MODEL: tensors, OPTIMIZER: optimizer}, {STATE: state, MARKER: card.to_dict()})
        self._promote(self.last)
        if (_new(self.best) / MARKER).is_file():
            self._promote(self.best)

    def load_best(self, epoch: int | None = None) -> Checkpoint:
        """The best epoch's checkpoint. Raises RunError when there is none, or it is damaged.

        Args:
            epoch: the epoch it has to be of (a run killed between two renames has it in waiting still); None takes
                what is in place.
        """
        folder = _settled(self.best)
        if epoch is not None and (folder is None or self._epoch(folder) != epoch):
            waiting = _new(self.best)
            if (waiting / MARKER).is_file() and self._epoch(waiting) == epoch:
                folder = waiting
            else:
                raise RunError(f"{self.best} is not the checkpoint of epoch {epoch}, which was the best. {_AGAIN}")
        if folder is None:
            raise RunError(f"no checkpoint at {self.best}: the run did not finish an epoch. {_AGAIN}")
        return Checkpoint(_read_tensors(folder / MODEL), self._card(folder))

    def load_last(self) -> Checkpoint | None:
        """The checkpoint to resume from, or None when no epoch was finished. Raises RunError when it is damaged."""
        folder = _settled(self.last)
        if folder is None:
            return None
        card = self._card(folder)
        return Checkpoint(
            _read_tensors(folder / MODEL), card, _read_tensors(folder / OPTIMIZER), _read_json(folder / STATE)
        )

    def settle(self, best_epoch: int | None) -> None:
        """Before going on with a run: finish or undo what a killed process left half renamed.

        Args:
            best_epoch: what the `last` checkpoint says the best epoch is; a waiting checkpoint of that epoch takes its
                place, any other is dropped (its epoch will be run again).
        """
        if not self.main:
            return
        if (found := _settled(self.last)) is not None and found != self.last:
            _rename(found, self.last)
        if (found := _settled(self.best)) is not None and found != self.best:
            _rename(found, self.best)
        waiting = _new(self.best)
        if (waiting / MARKER).is_file() and self._epoch(waiting) == best_epoch:
            self._promote(self.best)
        for folder in (self.last, self.best):
            shutil.rmtree(_new(folder), ignore_errors=True)
            shutil.rmtree(_old(folder), ignore_errors=True)

    def _build(
        self, target: Path, tensors: Mapping[str, Mapping[str, Tensor]], texts: Mapping[str, Mapping[str, Any]]
    ) -> None:
        folder = _new(target)
        shutil.rmtree(folder, ignore_errors=True)
        try:
            for name, content in tensors.items():
                _write_tensors(folder / name, content)
            for name, text in texts.items():  # the marker comes last
                write_json(folder / name, _plain(text))
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def _promote(self, target: Path) -> None:
        old = _old(target)
        try:
            if target.exists():
                shutil.rmtree(old, ignore_errors=True)
                target.rename(old)
            _new(target).rename(target)
        except OSError as error:
            raise writing_failed(target, error) from error
        shutil.rmtree(old, ignore_errors=True)

    def _card(self, folder: Path) -> ModelCard:
        return ModelCard.from_dict(_read_json(folder / MARKER), folder / MARKER)

    def _epoch(self, folder: Path) -> int:
        return self._card(folder).epoch


_AGAIN = "Run it again, or go on with: eyetune finetune --resume RUN."


def _new(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.new")


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _settled(folder: Path) -> Path | None:
    """Where the valid checkpoint is that belongs at `folder`: there, or left on the way by a process that was killed.

    Between the two renames of a replacement `folder` is gone for a moment. A new `last` is then the one to take; a new
    best one only if there is no old one, for it may be of an epoch that `last` does not know of.
    """
    if folder.is_dir():
        return folder
    candidates = [_new(folder), _old(folder)]
    for candidate in candidates if folder.name == "last" else reversed(candidates):
        if (candidate / MARKER).is_file():
            return candidate
    return None


def _rename(source: Path, target: Path) -> None:
    try:
        source.rename(target)
    except OSError as error:
        raise writing_failed(target, error) from error


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with atomic(path) as temporary:
        try:
            # Clones: tied parameters share memory, which the format refuses.
            save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, temporary)
        except SafetensorError as error:
            # The library wraps the system's error in text: unwrap it, so that a full disk is called a full disk.
            number = re.search(r"os error (\d+)", str(error))
            raise OSError(int(number[1]) if number else errno.EIO, str(error), str(path)) from error


def _read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise RunError(f"{path} is missing: the checkpoint is not whole.")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise RunError(f"{path} is damaged ({error}).") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise RunError(f"{path} is missing.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise RunError(f"{path} is damaged ({error}).") from error
    if not isinstance(content, dict):
        raise RunError(f"{path} is damaged (not a JSON object).")
    return content


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


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it: paths as text, tuples as lists, NaN and infinity as null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value
