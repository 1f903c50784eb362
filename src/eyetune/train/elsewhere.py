"""Tables that a run was not trained with: which of their columns are meant, and what their labels mean for the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eyetune.errors import ConfigError, DataError, UserError

if TYPE_CHECKING:
    from eyetune.data.config import DataConfig
    from eyetune.data.record import Kind
    from eyetune.data.records import Manifest
    from eyetune.metrics.labelmap import LabelMap
    from eyetune.train.run import Run


@dataclass(frozen=True)
class Learnt:
    """What a run learnt, or is to learn, as far as another table has to fit it.

    Args:
        data: the table trained on.
        reads: classes, labels or a value.
        names: of the classes, of the labels, or of the number.
        where: what messages call it.
    """

    data: DataConfig
    reads: Kind
    names: tuple[str, ...]
    where: Path

    @classmethod
    def of(cls, run: Run) -> Learnt:
        """Of a trained run."""
        return cls(run.folder.read_config().data, run.reads, run.classes, run.folder.path)


def open_dataset(
    run: Run,
    table: str,
    images: Path | None,
    columns: Mapping[str, str | None],
    *,
    name: str,
    said: Any = None,
) -> tuple[Manifest, LabelMap | None]:
    """As :func:`open_table`, for a trained run."""
    return open_table(Learnt.of(run), table, images, columns, name=name, said=said)


def open_table(
    learnt: Learnt,
    table: str,
    images: Path | None,
    columns: Mapping[str, str | None],
    *,
    name: str,
    said: Any = None,
) -> tuple[Manifest, LabelMap | None]:
    """A dataset with its labels as they stand, and what they mean for a run: see :func:`open_labelled`; several labels,
    or a number, need no map."""
    from eyetune.data.records import open_manifest

    if learnt.reads == "classes":
        return open_labelled(learnt.data, learnt.names, table, images, columns, name=name, said=said)
    refuse_map(learnt.reads, learnt.where, name, said)
    config = _where(learnt.data, table, images, columns)
    if learnt.reads == "labels":
        labels = _label_columns(learnt.names, columns.get("label_column"), table)
        config = config.model_copy(update={"label_column": labels})
    return open_manifest(config, kind=learnt.reads), None


def open_labelled(
    trained: DataConfig,
    classes: tuple[str, ...],
    table: str,
    images: Path | None,
    columns: Mapping[str, str | None],
    *,
    name: str,
    said: Any = None,
) -> tuple[Manifest, LabelMap]:
    """A dataset with its labels as they stand, and what they mean in the `classes` of the table `trained` on.

    A column that is not given is the one trained with, if the table has it. `said` is a label map as
    :func:`eyetune.metrics.labelmap.parse` takes it.
    """
    from eyetune.data.labels import AS_THEY_STAND
    from eyetune.data.records import open_manifest
    from eyetune.metrics.labelmap import parse, unstated

    config = _where(trained, table, images, columns)
    manifest = open_manifest(config, classes=AS_THEY_STAND)
    if said is not None:
        return manifest, parse(said, classes, f"--map {name}")
    both = label_column(trained), label_column(config)
    return manifest, unstated(manifest, classes, name=name, columns=both)


def _where(trained: DataConfig, table: str, images: Path | None, columns: Mapping[str, str | None]) -> DataConfig:
    """Another table with its columns; one that is not given is the one `trained` with, if the table has it."""
    from eyetune.data.config import DataConfig
    from eyetune.data.tables import read_rows

    here = read_rows(Path(table))[0] if Path(table).is_file() else []
    chosen = {}
    for field in ("image_column", "label_column", "patient_column", "eye_column"):
        given, before = columns.get(field), getattr(trained, field)
        chosen[field] = given if given is not None or before not in (*here, "none") else before
    # A split column of theirs says nothing here: all of it is outside the run.
    return DataConfig(table=table, images=images, split_column="none", **chosen)


def refuse_map(reads: Kind, where: Path, name: str, said: Any) -> None:
    """Raise ConfigError where a label map was said for a run that learnt several labels or a number."""
    if said is not None:
        what = "several labels" if reads == "labels" else "a number"
        raise ConfigError(f"--map {name}: a map is for classes, and {where} is of {what}. Leave it out.")


def _label_columns(labels: Sequence[str], given: str | None, table: str) -> tuple[str, ...]:
    """The columns of these labels in another table: those of them that are there."""
    from eyetune.data.tables import read_rows

    here = read_rows(Path(table))[0] if Path(table).is_file() else []
    wanted = [one.strip() for one in given.split(",")] if given else [one for one in labels if one in here]
    if not wanted:
        raise DataError(
            f"{table} has no column of the labels that the run learnt, {', '.join(labels)}; call them so, or name "
            "some with --label-column."
        )
    return tuple(wanted)


def label_column(config: DataConfig) -> str | None:
    """The column that the labels come from; None where it is not known, or there is no column."""
    from eyetune.data.tables import choose_columns, read_rows

    if config.label_column is not None or not Path(config.table).is_file():
        return config.label_column if isinstance(config.label_column, str) else None
    try:
        names = read_rows(Path(config.table))[0]
        return choose_columns(names, {"label": None}, config.table, labels_required=False)[0].get("label")
    except UserError:
        return None
