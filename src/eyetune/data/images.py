"""Which file an image name in a table means."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from eyetune.errors import DataError, did_you_mean, listing

SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp", ".dcm", ".dicom")
"""File name endings taken for images, without case."""


def is_image_name(name: str) -> bool:
    """Whether a file name ends like an image and is not hidden."""
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def _fold(name: str) -> str:
    """A name without case, its accents written in one way: a Mac stores e and accent apart, tables have them as one."""
    return unicodedata.normalize("NFC", name).lower()


@dataclass(frozen=True)
class _Listing:
    """The files of one folder, found by one listing however many names are looked up."""

    exact: frozenset[str]
    folded: dict[str, list[str]]
    stems: dict[str, list[str]]

    @classmethod
    def of(cls, folder: Path) -> _Listing:
        try:
            with os.scandir(folder) as entries:
                names = sorted(entry.name for entry in entries if not entry.is_dir())
        except (OSError, ValueError):  # ValueError: a name that no file can have
            names = []
        folded: dict[str, list[str]] = {}
        stems: dict[str, list[str]] = {}
        for name in names:
            folded.setdefault(_fold(name), []).append(name)
            if is_image_name(name):
                stems.setdefault(_fold(os.path.splitext(name)[0]), []).append(name)
        return cls(frozenset(names), folded, stems)

    def candidates(self, name: str) -> list[str]:
        """The files `name` may mean: itself; itself in another case; itself plus, or with another, image suffix."""
        if name in self.exact:
            return [name]
        lower = _fold(name)
        bare = os.path.splitext(lower)[0] if lower.endswith(SUFFIXES) else lower
        return self.folded.get(lower) or self.stems.get(lower) or self.stems.get(bare) or []


class Finder:
    """Finds the image files of a table.

    Args:
        table: the table's path.
        images: the folder names are relative to; None to try the table's folder, its `images` sub-folder, a folder
            called like the table (`train.csv`: `train_images`, `train`), and `images` one level up, in this order.

    Raises DataError when `images` is given and no folder.
    """

    def __init__(self, table: Path, images: Path | None) -> None:
        self.table = table
        home = table.parent
        if images is None:
            stem = table.stem
            self.roots = [home, home / "images", home / f"{stem}_images", home / stem, home.parent / "images"]
        else:
            if not images.is_dir():
                parent = images.parent
                around = [entry.name for entry in parent.iterdir() if entry.is_dir()] if parent.is_dir() else []
                raise DataError(f"no image folder at {images} (data.images).{did_you_mean(images.name, around)}")
            self.roots = [images]
        self._listings: dict[Path, _Listing] = {}

    def find(
        self, names: Sequence[str], rows: Sequence[str], *, all_there: bool = True
    ) -> tuple[list[Path], list[str]]:
        """The file of each name, and notes. Names may be absolute, carry folders, and lack the suffix.

        Raises DataError, with the rows, when images are not there (unless some are and not `all_there`: then reading
        them will say so) or when a name may mean several files.
        """
        best, root = self.look_up(names)
        missing = [f"{row}: {name}" for name, row, files in zip(names, rows, best, strict=True) if not files]
        if missing and (all_there or len(missing) == len(names)):
            raise DataError(self._missing(missing, len(names), root))
        best = [files or [root / name] for name, files in zip(names, best, strict=True)]
        several = [
            f"{row}: {name} may be {' or '.join(file.name for file in files)}"
            for name, row, files in zip(names, rows, best, strict=True)
            if len(files) > 1
        ]
        if several:
            raise DataError(
                f"{self.table}: {len(several)} names fit several files in {root}; write the suffix in the table, or "
                f"name the right folder with data.images:\n{listing(several)}"
            )
        files = [found[0] for found in best]
        other = sum(
            is_image_name(name) and PurePosixPath(name.replace("\\", "/")).suffix.lower() != file.suffix.lower()
            for name, file in zip(names, files, strict=True)
        )
        notes = [f"images: {root}"]
        if other:
            notes.append(f"{other} images have another file type than the table says")
        return files, notes

    def look_up(self, names: Sequence[str]) -> tuple[list[list[Path]], Path]:
        """The files that each name may mean (none: it is not there), and the folder in which the most were found."""
        best: list[list[Path]] = []
        root = self.roots[0]
        for candidate in self.roots:
            found = [self._candidates(candidate, name) for name in names]
            if not best or sum(map(bool, found)) > sum(map(bool, best)):
                best, root = found, candidate
            if all(best):
                break
        return best, root

    def _candidates(self, root: Path, name: str) -> list[Path]:
        path = root / name.replace("\\", "/")
        folder = path.parent
        listed = self._listings.get(folder)
        if listed is None:
            listed = self._listings[folder] = _Listing.of(folder)
        return [folder / found for found in listed.candidates(path.name)]

    def _missing(self, missing: list[str], total: int, root: Path) -> str:
        looked = ", ".join(str(folder) for folder in self.roots if folder.is_dir())
        if len(missing) == total:
            return (
                f"{self.table}: none of its {total} images was found. Looked in {looked}; name the folder with "
                f"data.images.\n{listing(missing)}"
            )
        return f"{self.table}: {len(missing)} of {total} images are not in {root}:\n{listing(missing)}"
