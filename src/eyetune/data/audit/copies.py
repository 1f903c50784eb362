"""Which photographs are copies of each other: the same bytes, the same pixels, or one altered into the other.

Hashes name candidates; registration decides. The second picture, flipped back, is laid over the first: by shifting
(a glance, which drops most), then by an affine map that maximises their correlation (ECC: Evangelidis and Psarakis,
"Parametric Image Alignment Using Enhanced Correlation Coefficient Maximization", TPAMI 2008). What counts is how well
their local contrast, vessels and spots, agrees where both show the retina. Two eyes, mirrored fellow eyes of one
patient included, agree by less than 0.75, whatever their coarse resemblance; altered copies, and photographs of one
eye in one position, by more than 0.9 (docs/audit.md has the measurement).
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from eyetune.data.audit.hashes import CROPS, FLIPS, candidates, cut, frequencies, local_contrast
from eyetune.data.audit.looks import SIDE, Look, View
from eyetune.data.photo import read_image
from eyetune.errors import DataError
from eyetune.progress import track

GLANCE = 0.45
"""Correlation, after shifting only, below which a candidate is dropped."""

AGREE = 0.85
"""Correlation of the local contrast, after alignment, from which two photographs count as copies."""

_SAME = 0.98
"""Correlation from which the pixels of two files of one size may be the same: they are compared as they are."""

_SMALL, _SHIFT = 64, 4
"""Pixels of the views at a glance, and how far one is shifted over the other."""

_OVERLAP = 0.3
"""Share of the square in which both must show the retina."""

_STEPS = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 40, 1e-4)

Contrast = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Link:
    """Two photographs that are one.

    Attributes:
        first, second: their positions, first < second.
        kind: "bytes", "pixels" or "near".
        agreement: correlation after alignment, 0..1.
        how: how the second differs, in words; empty for the same bytes or pixels.
    """

    first: int
    second: int
    kind: str
    agreement: float = 1.0
    how: str = ""


def find_copies(paths: Sequence[Path], looks: Mapping[int, Look], digests: Sequence[bytes], threads: int) -> list[Link]:
    """All copies among photographs, each altered one linked to the picture it resembles.

    Args:
        paths: the files.
        looks: by position, of the photographs that are to be compared: not those that are blank.
        digests: of each file's content; empty where it could not be read.
        threads: registrations at a time.

    Returns:
        Links; of files with the same bytes only the first is compared with others.
    """
    first_of: dict[bytes, int] = {}
    links = []
    for index, digest in enumerate(digests):
        if digest and first_of.setdefault(digest, index) != index:
            links.append(Link(first_of[digest], index, "bytes"))
    chosen = [index for index in first_of.values() if index in looks]
    if len(chosen) < 2:
        return links
    with ThreadPoolExecutor(max(1, threads)) as pool:
        found = pool.map(lambda index: frequencies(looks[index].view), chosen)
        values = np.stack(list(track(found, len(chosen), "Hashing images")))
        pairs = candidates(values, threads=max(1, threads))
        tell = functools.partial(examine, Views({at: looks[index].view for at, index in enumerate(chosen)}))
        order = np.lexsort((pairs.second, pairs.first))
        tried = pool.map(tell, *(column[order].tolist() for column in pairs[:4]))
        results = list(track(tried, len(order), "Comparing images", "pairs"))
        near = [
            (chosen[int(pairs.first[at])], chosen[int(pairs.second[at])], int(pairs.flip[at]), result)
            for at, result in zip(order, results, strict=True)
            if result is not None and result.agreement >= AGREE
        ]
        links += pool.map(lambda pair: _describe(*pair, paths=paths, looks=looks), near)
    return links


@dataclass(frozen=True)
class Registration:
    """How one view lies over another.

    Attributes:
        agreement: correlation of the local contrast where both show the retina, -1..1.
        scale: how much larger the same structure is in the second view.
    """

    agreement: float
    scale: float


class Views:
    """Views by position, with what is computed of each kept for a while."""

    def __init__(self, views: Mapping[int, View]) -> None:
        self.views = views
        self.small = functools.lru_cache(4096)(self._small)
        self.whole = functools.lru_cache(1024)(self._whole)

    def _small(self, index: int, crop: int) -> Contrast:
        return local_contrast(cut(self.views[index], CROPS[crop], _SMALL), 2)

    def _whole(self, index: int) -> tuple[Contrast, npt.NDArray[np.uint8]]:
        view = self.views[index]
        inside = cv2.erode((view > 12).astype(np.uint8), np.ones((5, 5), np.uint8), borderValue=0)
        return cv2.GaussianBlur(local_contrast(view, SIDE / 16), (0, 0), 1.0), inside


def examine(views: Views, first: int, second: int, flip: int, crop: int) -> Registration | None:
    """How the second view, flipped back, lies over the first; None when a glance is enough to see different eyes.

    Args:
        views: the views.
        first, second: positions in them.
        flip, crop: indexes into FLIPS and CROPS: in which way their hashes are near.
    """
    over = np.ascontiguousarray(turn(views.small(second, 0), flip)[_SHIFT:-_SHIFT, _SHIFT:-_SHIFT])
    # The crop that hashes best is not always the one that fits best.
    for tried in (crop, *range(max(0, crop - 1), crop), *range(crop + 1, min(crop + 2, len(CROPS)))):
        if cv2.matchTemplate(views.small(first, tried), over, cv2.TM_CCOEFF_NORMED).max() >= GLANCE:
            return register(views, first, second, flip, tried)
    return None


def register(views: Views, first: int, second: int, flip: int, crop: int) -> Registration:
    """Lay the second view, flipped back, over the first, beginning with a cut of its borders."""
    one, one_inside = views.whole(first)
    other, other_inside = (np.ascontiguousarray(turn(part, flip)) for part in views.whole(second))
    share = 1 - 2 * CROPS[crop]
    shift = CROPS[crop] * SIDE + (share - 1) / 2
    warp = np.array([[share, 0, shift], [0, share, shift]], np.float32)
    try:
        _, warp = cv2.findTransformECC(other, one, warp, cv2.MOTION_AFFINE, _STEPS, other_inside, 3)
    except cv2.error:  # it does not converge: nothing in common
        return Registration(0.0, 1.0)
    flags = cv2.WARP_INVERSE_MAP
    laid = cv2.warpAffine(one, warp, (SIDE, SIDE), flags=cv2.INTER_LINEAR | flags)
    laid_inside = cv2.warpAffine(one_inside, warp, (SIDE, SIDE), flags=cv2.INTER_NEAREST | flags)
    both = (laid_inside > 0) & (other_inside > 0)
    size = float(np.sqrt(abs(np.linalg.det(warp[:, :2].astype(np.float64)))))
    if both.mean() < _OVERLAP or not 0.6 < size < 1.6:
        return Registration(0.0, 1.0)
    left, right = laid[both], other[both]
    if left.std() < 1e-3 or right.std() < 1e-3:
        return Registration(0.0, 1.0)
    return Registration(float(np.corrcoef(left, right)[0, 1]), 1 / size)


def turn(picture: npt.NDArray[np.generic], flip: int) -> npt.NDArray[np.generic]:
    """A picture flipped as FLIPS[flip] says."""
    across, down = flip in (1, 3), flip in (2, 3)
    return picture[:: -1 if down else 1, :: -1 if across else 1]


def _describe(
    first: int, second: int, flip: int, found: Registration, *, paths: Sequence[Path], looks: Mapping[int, Look]
) -> Link:
    """The link of two photographs that agree: the same pixels, or how the second differs."""
    scale = found.scale
    if first > second:
        first, second, scale = second, first, 1 / scale
    one, other = looks[first], looks[second]
    same_size = (one.width, one.height) == (other.width, other.height)
    if (
        same_size
        and not flip
        and found.agreement >= _SAME
        and pixel_digest(paths[first]) == pixel_digest(paths[second])
    ):
        return Link(first, second, "pixels")
    words = [f"flipped {FLIPS[flip]}"] if flip else []
    if not same_size:
        words.append(f"{other.width}x{other.height} beside {one.width}x{one.height} pixels")
    if abs(scale - 1) > 0.02:
        words.append("borders cropped")
    return Link(first, second, "near", round(found.agreement, 3), ", ".join(words) or "of one size, with other pixels")


def pixel_digest(path: Path) -> bytes:
    """What identifies a photograph's pixels, whatever the file's format. Empty when it cannot be read any more."""
    try:
        pixels = read_image(path)
    except DataError:
        return os.urandom(16)
    return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).digest()
