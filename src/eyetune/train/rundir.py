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

Every file arrives whole or not at all; how checkpoints survive a kill is told in ``checkpoints.py``.
"""

from __future__ import annotations

import contextlib
import csv
import io
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from eyetune.errors import RunError, UserError, did_you_mean
from eyetune.files import is_temporary, make_folder, sha256, write_json, write_text, writing_failed
from eyetune.tensors import read_tensors, write_tensors
from eyetune.train import lock
from eyetune.train.checkpoints import Checkpoint, Checkpoints, ModelCard
from eyetune.train.sealed import plain, read_json

if TYPE_CHECKING:
    from torch import Tensor

    from eyetune.config import Config, RunConfig
    from eyetune.metrics.fitted import Fitted
    from eyetune.metrics.table import Table

AnyConfig = TypeVar("AnyConfig", bound="RunConfig")

__all__ = ["FINETUNE", "Checkpoint", "ModelCard", "RunDir", "is_free"]

CALIBRATION = "calibration.json"
NOVELTY = "calibration.safetensors"

FINETUNE = "finetune"
_KINDS = {FINETUNE: "a run of eyetune finetune", "clip": "an image-text run (eyetune clip train)"}
_VERBS = {FINETUNE: "finetune", "clip": "clip train"}
_INSTEAD = {
    FINETUNE: "eyetune evaluate and predict work with it.",
    "clip": "eyetune clip retrieve and clip zeroshot work with it; {}/vision.safetensors is its image tower, for "
    "model.weights.",
}


class RunDir(Checkpoints):
    """One run folder. Create it with :meth:`create`, find it again with :meth:`open`.

    With several processes only the one that was told it is `main` writes; in the others, writing does nothing.
    """

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

    def read_history(self) -> list[dict[str, Any]]:
        """The rows of `history.csv`: numbers as int or float, an empty cell as None. Empty before the first epoch."""
        if not self.history_file.is_file():
            return []
        with _as_run_error(self.history_file), open(self.history_file, encoding="utf-8", newline="") as stream:
            return [{name: _cell(text) for name, text in row.items()} for row in csv.DictReader(stream)]

    def _json(self, name: str, content: Mapping[str, Any]) -> None:
        if self.main:
            write_json(self.path / name, plain(content))

    # -- one process at a time -------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """While inside, no other process may work on this run. Raises RunError when one does already."""
        if not self.main:
            yield
            return
        with lock.in_use(self.path) as locked:
            if locked:
                self._sweep()
            yield

    def _sweep(self) -> None:
        """Remove the half-written files of a process that was killed."""
        for path in self.path.rglob(".*"):
            if is_temporary(path):
                path.unlink(missing_ok=True)


def is_free(path: Path) -> bool:
    """Whether there is nothing at `path`, or a folder that holds no more than what a run leaves behind that was killed
    before its first file."""
    if not path.exists():
        return True
    return path.is_dir() and all(is_temporary(entry) or entry.name == lock.LOCK for entry in path.iterdir())


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
