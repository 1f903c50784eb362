"""`eyetune embed`: features of every image once, for probes, clustering and retrieval."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eyetune.config import Config
from eyetune.errors import ConfigError, UserError
from eyetune.files import atomic
from eyetune.flags import USUAL, Computing, Switch, table_and_images

if TYPE_CHECKING:
    from eyetune.backbones import Backbone
    from eyetune.data.cache import Cache
    from eyetune.data.config import DataConfig
    from eyetune.data.fundus import FundusSettings
    from eyetune.data.record import Kind
    from eyetune.data.records import Manifest
    from eyetune.runtime import Runtime

COLUMNS = ("image", "patient", "eye", "split")


def command(
    source: Path,
    *,
    out: Path,
    data: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    skip_unreadable: Switch = False,
    computing: Computing = USUAL,
) -> None:
    """Write the backbone's feature of every image, and a CSV of the same name that says which row is which image.

    The file holds `features` float32[N, width]; row n of it is line n of the CSV. Features of unchanged images and
    weights are read from the cache.

    Args:
        source: A configuration (its backbone, its data), or a run folder (the backbone as it was adapted).
        out: File to write, .safetensors; the CSV goes beside it.
        data: TABLE or TABLE:IMAGES (default: the data of the configuration or run).
        image_column: Column of the image names (default: the usual names; without --data, as configured).
        label_column: Column of the labels, if any (default: likewise).
        skip_unreadable: Leave out images that cannot be read, and say which.
        computing: Device, precision, workers, batch size, weights, cache.
    """
    from eyetune.data.loader import make_loader
    from eyetune.data.readable import check_readable
    from eyetune.data.records import open_manifest
    from eyetune.train.features import backbone_features

    if out.suffix != ".safetensors":
        raise UserError(f"--out {out}: features are written as .safetensors.")
    made = _of_run if source.is_dir() else _of_config
    found = made(source, computing)
    config = found.config
    if data is not None:
        table, images = table_and_images(data)
        usual = dict.fromkeys(("image_column", "label_column", "patient_column", "eye_column", "split_column"))
        config = config.model_copy(update={**usual, "table": table, "images": images, "classes": None})
    columns = {"image_column": image_column, "label_column": label_column}
    config = config.model_copy(update={name: column for name, column in columns.items() if column is not None})
    manifest = check_readable(
        open_manifest(config, labels_required=False, kind="value" if found.reads == "value" else None),
        skip_unreadable or config.skip_unreadable,
        workers=computing.workers,
        cache=found.cache,
        settings=found.settings,
    )
    loader = make_loader(
        manifest,
        found.backbone.preprocess,
        found.settings,
        batch_size=computing.batch_size,
        training=False,
        workers=computing.workers,
        cache=found.cache,
        shard=(found.runtime.rank, found.runtime.processes),
    )
    features = backbone_features(
        found.backbone, loader, found.runtime, fingerprint=found.fingerprint, description="Features"
    )[0]
    if not found.runtime.is_main:
        return
    for note in manifest.notes:
        print(note)
    _write(out, features.numpy(), manifest, found)
    rows, width = features.shape
    print(f"{out}: features float32[{rows}, {width}]; {out.with_suffix('.csv')} says which row is which image")


@dataclass(frozen=True)
class _Source:
    """A backbone on its device, and all it takes to show it images."""

    backbone: Backbone
    fingerprint: str
    settings: FundusSettings
    config: DataConfig
    reads: Kind
    runtime: Runtime
    cache: Cache | None


def _of_run(path: Path, computing: Computing) -> _Source:
    from eyetune.train.run import load_run

    run = load_run(path, **computing.loading())
    model = run.model
    # What training has changed has a fingerprint of its own.
    fingerprint = model.base_fingerprint() if run.strategy.frozen_backbone else model.backbone.fingerprint()
    config = run.folder.read_config()
    return _Source(model.backbone, fingerprint, run.settings, config.data, config.reads, run.runtime, run.cache)


def _of_config(path: Path, computing: Computing) -> _Source:
    from eyetune.backbones import load_backbone
    from eyetune.data.cache import Cache
    from eyetune.data.fundus import FundusSettings
    from eyetune.runtime import Runtime, seed_everything

    if computing.weights is not None:
        raise ConfigError("--weights is for run folders; a configuration names them itself (model.weights).")
    config = Config.from_yaml(path)
    device = config.device if computing.device == "auto" else computing.device
    runtime = Runtime(device, computing.precision or config.precision, config.seed)
    seed_everything(config.seed)  # as in training, where the weights are "random"
    model = config.model
    backbone = runtime.place(load_backbone(model.backbone, model.weights, pixels=model.pixels, pool=model.pool))
    settings = FundusSettings.of(config.data, backbone.preprocess)
    kept = None if computing.no_cache else Cache.of(config.data)
    return _Source(backbone, backbone.fingerprint(), settings, config.data, config.reads, runtime, kept)


def _write(out: Path, features: Any, manifest: Manifest, found: _Source) -> None:
    """`features` float32[N, width] and the table of their rows."""
    from safetensors.numpy import save_file

    backbone = found.backbone
    said = {
        "backbone": backbone.spec.name,
        "pool": backbone.pool,
        "fingerprint": found.fingerprint,
        "preprocess": backbone.preprocess.to_dict(),
        "fundus": found.settings.to_dict(),
        "precision": found.runtime.precision,
        "classes": list(manifest.classes),
    }
    with atomic(out.with_suffix(".csv")) as temporary, open(temporary, "w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        image, *rest = COLUMNS
        truth = ["label"] if manifest.kind == "classes" else manifest.truth_columns()
        writer.writerow([image, *truth, *rest])
        for record in manifest:
            known = [record.patient or "", record.eye or "", record.split or ""]
            writer.writerow([record.name, *manifest.truth_cells(record), *known])
    with atomic(out) as temporary:
        save_file({"features": features}, str(temporary), metadata={"eyetune": json.dumps(said)})
