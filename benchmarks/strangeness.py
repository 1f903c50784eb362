"""Which score tells photographs that are unlike the training images: a normal cloud, one a class, or the nearest ones.

Features of the embedded nano backbone, which has only ever seen drawn eyes. Drawn eyes of one camera are known; those
of the other cameras, and pictures that are no eyes, are not. Real photographs come with --known and --other, tables or
class folders; a fifth of the known ones is held out, and the threshold is that which 95% of these do not exceed.

    python benchmarks/strangeness.py [--known NAME=TABLE --other NAME=TABLE …]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from common import machine, markdown
from sklearn.covariance import ledoit_wolf

from eyetune.backbones import load_backbone
from eyetune.data.config import DataConfig
from eyetune.data.fundus import FundusSettings
from eyetune.data.labels import AS_THEY_STAND
from eyetune.data.loader import make_loader
from eyetune.data.phantom import CAMERAS, write_cohort
from eyetune.data.record import Record
from eyetune.data.records import Manifest, open_manifest
from eyetune.metrics.outcomes import Floats, Ranking
from eyetune.train.novelty import Novelty

Score = Callable[[Floats], Floats]


def cloud(features: Floats, labels: Floats) -> Score:
    """EyeTune's."""
    found = Novelty.fit(torch.from_numpy(features))
    assert found is not None
    return lambda new: found.score(torch.from_numpy(new)).numpy()


def cloud_a_class(features: Floats, labels: Floats) -> Score:
    """The nearest class's middle, with one covariance within classes (Lee et al., 2018)."""
    means = np.stack([features[labels == k].mean(axis=0) for k in np.unique(labels)])
    middles = means[np.unique(labels, return_inverse=True)[1]]
    covariance, _ = ledoit_wolf(features.astype(np.float64) - middles)
    whitening = np.linalg.cholesky(np.linalg.inv(covariance))
    return lambda new: np.min([np.linalg.norm((new - mean) @ whitening, axis=1) for mean in means], axis=0)


def nearest(k: int) -> Callable[[Floats, Floats], Score]:
    """The distance to the k-th nearest training image, features at unit length (Sun et al., 2022)."""

    def unit(features: Floats) -> Floats:
        return features / np.linalg.norm(features, axis=1, keepdims=True)

    def fit(features: Floats, labels: Floats) -> Score:
        known = unit(features)
        return lambda new: np.sort(np.sqrt(np.maximum(2 - 2 * unit(new) @ known.T, 0)), axis=1)[:, k - 1]

    return fit


WAYS = {"one cloud": cloud, "a cloud a class": cloud_a_class, "nearest": nearest(1), "10th nearest": nearest(10)}


def no_eyes(folder: Path, count: int = 40, size: int = 256) -> Path:
    """Pictures that are no fundus photographs: noise, stripes, gradients, words, a lamp's disc, black."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    down, across = np.mgrid[:size, :size]
    for number in range(count):
        kind, picture = number % 6, np.zeros((size, size, 3), np.uint8)
        colour = rng.integers(60, 255, 3)
        if kind == 0:
            picture = rng.integers(0, 256, picture.shape, dtype=np.uint8)
        elif kind == 1:
            picture[:] = ((np.sin((down * rng.random() + across * rng.random()) / 5) > 0) * 255)[..., None]
        elif kind == 2:
            picture[:] = (across[..., None] * colour / size).astype(np.uint8)
        elif kind == 3:
            picture[:] = 255
            for line in range(30, size, 30):
                text = "".join(rng.choice(list("abcdefgh "), 14))
                cv2.putText(picture, text, (5, line), cv2.FONT_HERSHEY_SIMPLEX, 0.8, (0, 0, 0), 2)
        elif kind == 4:
            cv2.circle(picture, (size // 2, size // 2), size // 3, colour.tolist(), -1)
        cv2.imwrite(str(folder / f"{number}.png"), picture)
    return folder


def features_of(manifest: Manifest) -> tuple[Floats, Floats]:
    """Features float32[N, 192] and labels (0 where not known)."""
    backbone = load_backbone("nano")
    settings = FundusSettings.of(DataConfig(table="x"), backbone.preprocess)
    loader = make_loader(manifest, backbone.preprocess, settings, batch_size=32, training=False, workers=0)
    with torch.no_grad():
        found = torch.cat([backbone.features(batch["image"]) for batch in loader])
    return found.numpy(), np.array([record.label or 0 for record in manifest])


def compared(known: Manifest, others: dict[str, Manifest]) -> list[list[str]]:
    """A row an unknown dataset: AUROC against the held-out fifth, and the share above its threshold, each way."""
    features, labels = features_of(known)
    _, of = np.unique([record.patient or record.name for record in known], return_inverse=True)
    inside = (np.random.default_rng(0).permutation(of.max() + 1) % 5 > 0)[of]
    ways = {name: fit(features[inside], labels[inside]) for name, fit in WAYS.items()}
    held = {name: way(features[~inside]) for name, way in ways.items()}
    rows = []
    for other, manifest in others.items():
        new, _ = features_of(manifest)
        row = [other, str(len(new))]
        for name, way in ways.items():
            scores = way(new)
            truth = np.repeat([True, False], [len(scores), len(held[name])])
            auroc = Ranking.of(truth, np.concatenate([scores, held[name]])).curve().auroc
            row.append(f"{auroc:.3f} ({(scores > np.quantile(held[name], 0.95)).mean():.0%})")
        rows.append(row)
    return rows


def drawn(folder: Path) -> tuple[Manifest, dict[str, Manifest]]:
    """Eyes of the clinic camera, and what is none of them."""
    tables = {}
    for camera in CAMERAS:
        patients, first = (150, 1) if camera == "clinic" else (40, 1001)
        write_cohort(folder / camera, patients=patients, first_patient=first, size=256, cameras=(camera,))
        tables[camera] = str(folder / camera / "labels.csv")
    pictures = [
        Record(image=path, label=None, name=path.name, row=path.name) for path in no_eyes(folder / "none").iterdir()
    ]
    opened = {name: opened_from(table, "dr_grade") for name, table in tables.items()}
    write_cohort(folder / "again", patients=40, first_patient=2001, size=256, cameras=("clinic",))
    others = {"clinic, other patients": opened_from(str(folder / "again" / "labels.csv"), "dr_grade")}
    others |= {name: manifest for name, manifest in opened.items() if name != "clinic"}
    return opened["clinic"], others | {"no eyes": Manifest(tuple(pictures), ("0", "1"), "pictures")}


def opened_from(table: str, label: str | None = None) -> Manifest:
    """The photographs of a table or class folder."""
    config = DataConfig(table=table, split_column="none", label_column=label)
    return open_manifest(config, classes=AS_THEY_STAND)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--known", help="NAME=TABLE")
    parser.add_argument("--other", action="append", default=[], help="NAME=TABLE; repeat it")
    options = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        if options.known:
            named = dict(word.split("=", 1) for word in options.other)
            name, table = options.known.split("=", 1)
            rows = compared(opened_from(table), {other: opened_from(one) for other, one in named.items()})
        else:
            name = "clinic, drawn"
            rows = compared(*drawn(Path(folder)))
    print(markdown([f"against {name}", "images", *WAYS], rows))


if __name__ == "__main__":
    main()
