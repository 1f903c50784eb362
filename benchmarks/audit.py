"""The audit: recall and precision on planted copies, time for thousands of images, growth to 100,000 hashes.

python benchmarks/audit.py --images 5000 --hashes 12500,25000,50000,100000
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from common import machine, markdown

from eyetune import load_backbone
from eyetune.data.audit import hashes
from eyetune.data.audit.copies import AGREE, Views, examine, register
from eyetune.data.audit.looks import view_of
from eyetune.data.audit.run import Audit, audit
from eyetune.data.config import DataConfig
from eyetune.data.fundus import FundusSettings, find_field, prepare
from eyetune.data.phantom import CAMERAS, sample, write_cohort
from eyetune.data.photo import Photo, read_image

PLANTED = {
    "duplicates": 0.01, "near_duplicates": 0.024, "reencoded": 0.004, "conflicts": 0.002, "patient_leaks": 0.006,
    "truncated": 0.002, "blank": 0.001, "missing": 0.001, "out_of_range": 0.001,
}  # fmt: skip
"""Share of the images."""


def cohort(folder: Path, images: int, pixels: int) -> Path:
    """Draw eyes with planted defects: `images` photographs, copies included."""
    planted = {kind: max(1, round(share * images)) for kind, share in PLANTED.items()}
    copies = sum(planted[kind] for kind in ("duplicates", "near_duplicates", "reencoded", "conflicts"))
    shares = {"train": 0.7, "val": 0.1, "test": 0.2}
    write_cohort(
        folder, patients=(images - copies) // 2, size=pixels, seed=5, splits=shares, defects=planted, workers=2
    )
    return folder


def accuracy(folder: Path) -> None:
    """Audit a cohort without a cache, and with the looks of the first time."""
    config = DataConfig(table=str(folder / "labels.csv"), label_column="dr_grade", cache=folder / "cache")
    start, cpu = time.perf_counter(), time.process_time()
    found = audit([config], threads=2)
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    truth = json.loads((folder / "defects.json").read_text())["defects"]
    rows = []
    for kinds, name in (
        (("duplicates", "conflicts"), "bytes"),
        (("reencoded",), "pixels"),
        (("near_duplicates",), "near"),
    ):
        real = {frozenset(d["images"]) for d in truth if d["kind"] in kinds}
        seen = {frozenset(found.entries[at].record.name for at in g.rows) for g in found.groups if g.kind == name}
        rows.append(
            [name, len(real), len(seen), share(len(real & seen), len(real)), share(len(real & seen), len(seen))]
        )
    rows += others(found, truth)
    print(f"\n{len(found.entries)} images: {wall:.0f} s, {cpu:.0f} s of processor time, nothing cached\n")
    print(markdown(["what", "planted", "found", "recall", "precision"], rows))


def others(found: Audit, truth: list[dict]) -> list[list[object]]:
    """Planted defects of single rows and of patients, against what was found."""
    name = {at: entry.record.name for at, entry in enumerate(found.entries)}
    values = {finding.name: finding.values for finding in found.report.findings}
    rows: list[list[object]] = []
    for kinds, seen in (
        (("truncated", "missing"), {name[at] for at in found.unreadable}),
        (("blank",), {name[at] for at in found.blank}),
        (("out_of_range",), {name[at] for at in found.labels}),
    ):
        real = {image for d in truth if d["kind"] in kinds for image in d["images"]}
        hit = len(real & seen)
        rows.append([", ".join(kinds), len(real), len(seen), share(hit, len(real)), share(hit, len(seen))])
    leaks = sum(d["kind"] == "patient_leaks" for d in truth)
    rows.append(["patients in two splits", leaks, values["patients"]["in_two_splits"], "", ""])
    conflicts = sum(d["kind"] == "conflicts" for d in truth)
    rows.append(["two labels", conflicts, values["conflicts"]["conflicts"], "", ""])
    return rows


def share(part: int, whole: int) -> str:
    return f"{part / whole:.4f}" if whole else "–"


def crowds(counts: list[int]) -> Iterator[tuple[int, np.ndarray]]:
    """How many eyes, and as many hashes as there could be images, float32[N, CROPS, 126].

    The crowd is normal with the mean and the covariance of the hashes of drawn eyes, right and left ones mirrored. The
    eyes themselves come first, then an altered copy of each.
    """
    rng = np.random.default_rng(0)
    eyes = [sample(1, patient, "R", camera, 192).image for patient in range(150) for camera in CAMERAS]
    changes = [*ALTERED, *list(REACH.values())[:4]]
    copies = [np.ascontiguousarray(changes[at % len(changes)](eye)) for at, eye in enumerate(eyes)]
    hashed = np.stack([hashes.frequencies(view_of(photo, find_field(photo))) for photo in [*eyes, *copies]])
    known = hashed[: len(eyes)].reshape(len(eyes), -1)
    middle = known.mean(axis=0)
    _, sizes, ways = np.linalg.svd(known - middle, full_matrices=False)
    ways = (ways * sizes[:, None] / np.sqrt(len(eyes))).astype(np.float32)
    for count in counts:
        drawn = rng.normal(size=(count - len(hashed), len(ways))).astype(np.float32) @ ways + middle
        crowd = drawn.reshape(-1, len(hashes.CROPS), hashes.SIZE)
        crowd[count // 2 :] *= hashes.SIGNS[1]
        crowd /= np.linalg.norm(crowd, axis=2, keepdims=True)
        yield len(eyes), np.concatenate([hashed, crowd], dtype=np.float32)


def growth(counts: list[int]) -> None:
    """Processor time of the search, and which copies it finds in the crowd."""
    rows: list[list[object]] = []
    before = 0.0
    for eyes, values in crowds(counts):
        start = time.process_time()
        found = hashes.candidates(values)
        seconds = time.process_time() - start
        pairs = {frozenset(pair) for pair in zip(found.first.tolist(), found.second.tolist(), strict=True)}
        met = sum({at, at + eyes} in pairs for at in range(eyes))
        times = seconds / before if before else ""
        count = len(values)
        rows.append([f"{count:,}", seconds, 1e3 * seconds / count, times, f"{len(pairs):,}", share(met, eyes)])
        print(*rows[-1], flush=True)
        before = seconds
    print()
    print(markdown(["hashes", "seconds", "ms a hash", "times the row above", "pairs to compare", "copies met"], rows))


def steps(counts: list[int]) -> None:
    """What a look-up has to look at: distances, counted by faiss in a graph of the same links and widths as ours.

    (voyager does not count them. faiss-cpu is no dependency: install it for this.)
    """
    import faiss

    rows: list[list[object]] = []
    counted = faiss.cvar.hnsw_stats
    for _, values in crowds(counts):
        components = hashes.Components(values[:, 0])
        members = components(values[:, 0])[np.random.default_rng(0).permutation(len(values))]
        graph = faiss.IndexHNSWFlat(hashes.KEPT, hashes._LINKS, faiss.METRIC_INNER_PRODUCT)
        graph.hnsw.efConstruction, graph.hnsw.efSearch = hashes._BUILT, hashes._TRIED
        graph.add(members)
        queries = components(values[:2000].reshape(-1, hashes.SIZE))
        counted.reset()
        graph.search(queries, hashes.MOST + 1)
        each = counted.ndis / len(queries)
        rows.append([f"{len(values):,}", round(each), each / np.log2(len(values))])
    print()
    print(markdown(["hashes", "distances a look-up", "divided by log2 of the hashes"], rows))


def evidence(folders: list[Path], eyes: int) -> None:
    """What tells copies from strangers: the correlation after registration, against the cosine of nano's features."""
    rows: list[list[object]] = []
    for folder in folders:
        photos = [read_image(path, short_side=512) for path in files_of(folder)[:eyes]]
        rows += compare(folder.parent.name if folder.name == "images" else folder.name, photos)
    drawn = [sample(3, patient, eye, "clinic", 256).image for patient in range(eyes // 2) for eye in "RL"]
    rows += compare("drawn eyes, fellows among them", drawn)
    columns = ["eyes", "evidence", "least of copies", "1st percentile", "99.9th of strangers", "most of strangers"]
    print()
    print(markdown(columns, rows))


def compare(name: str, photos: list[Photo]) -> list[list[object]]:
    """Four alterations of each photograph, and the strangers whose hashes are nearest."""
    altered = [change(photo) for photo in photos for change in ALTERED]
    views = [view_of(photo, find_field(photo)) for photo in [*photos, *altered]]
    values = np.stack([hashes.frequencies(view) for view in views[: len(photos)]])
    near = hashes.candidates(values, least=0.5, most=8)
    shown = Views(dict(enumerate(views)))
    features = embed([*photos, *altered])
    pairs = list(zip(near.first.tolist(), near.second.tolist(), near.flip.tolist(), near.crop.tolist(), strict=True))
    strangers = [register(shown, *pair).agreement for pair in pairs]
    copies = [(at // len(ALTERED), len(photos) + at) for at in range(len(altered))]
    same = [register(shown, one, other, 0, 1).agreement for one, other in copies]
    return [
        [name, "registration", *ends(same, strangers)],
        [
            name,
            "nano",
            *ends([features[i] @ features[j] for i, j in copies], [features[p[0]] @ features[p[1]] for p in pairs]),
        ],
    ]


def ends(same: list[float], strangers: list[float]) -> list[object]:
    # Real photographs hold real copies: those found by both kinds of evidence are known and left out by the reader.
    return [min(same), float(np.percentile(same, 1)), float(np.percentile(strangers, 99.9)), max(strangers)]


def reach(folders: list[Path], eyes: int) -> None:
    """How far a copy may be altered until it is no longer found, from hash to decision, on real photographs."""
    photos = [read_image(path, short_side=340) for folder in folders for path in files_of(folder)[:eyes]]
    views = [view_of(photo, find_field(photo)) for photo in photos]
    hashed = [hashes.frequencies(view) for view in views]
    rows: list[list[object]] = []
    for name, change in REACH.items():
        copies = [view_of(copy, find_field(copy)) for copy in (np.ascontiguousarray(change(photo)) for photo in photos)]
        near = hashes.candidates(np.stack([*hashed, *map(hashes.frequencies, copies)]))
        shown = Views(dict(enumerate([*views, *copies])))
        found, strangers = set(), 0
        for one, other, flip, crop in zip(*(column.tolist() for column in near[:4]), strict=True):
            result = examine(shown, one, other, flip, crop)
            if result is not None and result.agreement >= AGREE:
                found |= {one % len(views)} if abs(one - other) == len(views) else set()
                strangers += one % len(views) != other % len(views)
        rows.append([name, len(photos), share(len(found), len(photos)), strangers])
    print()
    print(markdown(["alteration", "photographs", "found", "strangers taken for copies"], rows))


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".png"))


def turned(photo: Photo, degrees: float) -> Photo:
    height, width = photo.shape[:2]
    warp = cv2.getRotationMatrix2D((width / 2, height / 2), degrees, 1)
    return np.asarray(cv2.warpAffine(photo, warp, (width, height)), np.uint8)


def within(photo: Photo, part: float) -> Photo:
    """Borders off the field of view itself, black surroundings gone."""
    field = find_field(photo)
    return cropped(np.ascontiguousarray(photo[field.top : field.bottom, field.left : field.right]), part)


def brighter(photo: Photo, times: float) -> Photo:
    return np.clip(photo * times, 0, 255).astype(np.uint8)


def recompressed(photo: Photo) -> Photo:
    content = cv2.imencode(".jpg", photo[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 45])[1]
    return np.ascontiguousarray(cv2.imdecode(content, cv2.IMREAD_COLOR)[..., ::-1])


def cropped(photo: Photo, part: float) -> Photo:
    border = round(part * min(photo.shape[:2]))
    return np.ascontiguousarray(photo[border:-border, border:-border])


def half(photo: Photo) -> Photo:
    return cv2.resize(photo, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)


ALTERED = (half, recompressed, lambda photo: cropped(photo, 0.03), lambda photo: cropped(photo, 0.06))
REACH = {
    "half the size, JPEG quality 45, mirrored": lambda photo: recompressed(half(photo))[:, ::-1],
    "half as bright": lambda photo: brighter(photo, 0.5),
    "1.5 times as bright": lambda photo: brighter(photo, 1.5),
    "blurred by 2 of 340 pixels": lambda photo: cv2.GaussianBlur(photo, (0, 0), 2),
    **{
        f"{part:.0%} off each border of the field": partial(within, part=part)
        for part in (0.03, 0.06, 0.09, 0.12, 0.15)
    },
    **{f"turned by {degrees} degrees": partial(turned, degrees=degrees) for degrees in (1, 3, 5, 8)},
}


@torch.inference_mode()
def embed(photos: list[Photo]) -> np.ndarray:
    """Features of nano, of unit length."""
    backbone = load_backbone("nano").eval()
    settings = FundusSettings(pixels=224)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (backbone.preprocess.mean, backbone.preprocess.std))
    found = []
    for photo in photos:
        square = torch.from_numpy(prepare(photo, settings)).permute(2, 0, 1).float() / 255
        found.append(backbone.features(((square - mean) / std)[None])[0].numpy())
    features = np.stack(found)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--pixels", type=int, default=512)
    parser.add_argument("--cohort", type=Path, help="a cohort that was drawn before, in place of a new one")
    parser.add_argument("--hashes", default="12500,25000,50000,100000")
    parser.add_argument("--steps", action="store_true", help="count the distances of look-ups (needs faiss-cpu)")
    parser.add_argument("--eyes", type=int, default=150, help="photographs of each kind for the evidence")
    parser.add_argument("--photos", type=Path, nargs="*", default=[], help="folders of real photographs")
    given = parser.parse_args()
    print(machine())
    if given.images:
        with tempfile.TemporaryDirectory() as folder:
            accuracy(given.cohort or cohort(Path(folder) / "eyes", given.images, given.pixels))
    if given.hashes:
        (steps if given.steps else growth)([int(word) for word in given.hashes.split(",")])
    if given.eyes:
        evidence(given.photos, given.eyes)
    if given.eyes and given.photos:
        reach(given.photos, given.eyes)


if __name__ == "__main__":
    main()
