"""PairSet: both eyes of patients and the texts about them, as prepared for image-text training."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eyetune.data.pairs.database import Database, Item
from eyetune.data.pairs.layout import IMAGES_KEY, NOTES, REPORT, SAMPLES_KEY, database_folder, decode_base64
from eyetune.data.pairs.values import Refused, Value, unpack
from eyetune.errors import DataError, did_you_mean

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from eyetune.data.photo import Photo


class PairSet:
    """One split of a prepared folder; of P patients and T texts. Use :meth:`open`.

    What RET-CLIP's own converter wrote is read as well; it knows nothing of labels, groups and single eyes.
    Nothing in the files can run, and one that is cut short or damaged is a DataError. May be pickled and forked.

    Attributes:
        folder: of the split: holds imgs and pairs.
        split: its name. Asked for a "val" that was to be the test split, it is "test".
        patients: the names under which images are stored, in the order of the database.
        texts, text_ids: the texts and their numbers, in the order in which the pairs name them first.
        links: (place of a patient, place of a text); one for each training sample, in stored order.
        labels: of each text, the label that came with it; None where there was none, or several.
        patient_labels: the same of each patient.
        groups: of each patient, who it really is: two visits of one person are two patients here and one group.
        photographs: the ids (:func:`eyetune.data.cache.photograph_id`) of the files they were made of; None where
            nobody noted them.
        warnings: what a reader of results must not overlook.
    """

    def __init__(self, folder: Path, split: str, warnings: tuple[str, ...] = ()) -> None:
        self.folder, self.split, self.warnings = folder, split, warnings
        self._images = Database(folder / "imgs")
        self._items = self._image_items()
        self.patients = [item.key.decode() for item in self._items]
        self.texts: list[str] = []
        self.text_ids: list[int] = []
        self.links: list[tuple[int, int]] = []
        self._read_pairs()
        known, labels, self.photographs = _read_pair_notes(folder / NOTES)
        self.labels = [labels.get(str(number)) for number in self.text_ids]
        self.patient_labels = [known.get(name, {}).get("label") for name in self.patients]
        self.groups = [known.get(name, {}).get("group") or name for name in self.patients]
        self._eyes = (
            [known[name].get("single") for name in self.patients] if known.keys() >= set(self.patients) else None
        )

    @classmethod
    def open(cls, folder: str | Path, split: str) -> PairSet:
        """Read one split of a folder that `eyetune clip prepare` made, or of one with databases of RET-CLIP's layout.

        Raises DataError when the split is not there, cut short, damaged, or holds anything but tuples, strings and
        whole numbers.
        """
        folder = Path(folder)
        report = _read_notes(folder / REPORT)
        warnings = tuple(str(text) for text in report.get("warnings", []))
        if split == "val" and report.get("validation") == "test":
            split = "test"
        candidates = (database_folder(folder, split), folder / split)
        for candidate in candidates:
            if candidate.is_dir():
                return cls(candidate, split, warnings)
        raise DataError(f"{folder} has no {split} pairs ({candidates[0]}).{_others(folder, split)}")

    def __len__(self) -> int:
        """Training samples."""
        return len(self.links)

    def eyes(self, place: int) -> tuple[bytes, bytes]:
        """The images of the patient at `place`, left and right, as files (JPEG where EyeTune wrote them).

        Raises DataError, without the patient's name, for what is no pair of images.
        """
        where = f"{self.folder / 'imgs'}, entry {place}"
        texts = _value(self._images.value(self._items[place]), where)
        if not (isinstance(texts, tuple) and len(texts) == 2 and all(isinstance(text, str) for text in texts)):
            raise DataError(f"{where} is no pair of images.")
        left, right = (decode_base64(text) for text in texts)
        if left is None or right is None:
            raise DataError(f"{where}: the {'left' if left is None else 'right'} image is no base64.")
        return left, right

    def photos(self, place: int) -> tuple[Photo, Photo]:
        """The images of the patient at `place`, decoded: uint8[H, W, 3] RGB each; the sizes may differ.

        Raises DataError as :meth:`eyes`, and for images that cannot be decoded.
        """
        from eyetune.data.photo import decode_image

        left, right = self.eyes(place)
        where = f"{self.folder / 'imgs'}, entry {place}"
        first = decode_image(left, f"{where}, left")
        return first, first if right == left else decode_image(right, f"{where}, right")

    @cached_property
    def single(self) -> npt.NDArray[np.bool_]:
        """bool[P]: one eye stands for both. Where nothing was noted: both images are the same (all are read once)."""
        import numpy as np

        if self._eyes is not None:
            return np.array([eye is not None for eye in self._eyes], dtype=bool)
        pairs = (self.eyes(place) for place in range(len(self.patients)))
        return np.array([left == right for left, right in pairs], dtype=bool)

    @cached_property
    def fingerprint(self) -> str:
        """Another for another text, link or patient, and for an image of another length."""
        digest = hashlib.sha256()
        for item in self._items:
            digest.update(item.key + b"\0%d\0" % item.length)
        for place, text in self.links:
            digest.update(f"{place}\0{self.text_ids[text]}\0{self.texts[text]}\0".encode())
        return digest.hexdigest()[:16]

    def _image_items(self) -> list[Item]:
        path = self._images.path
        items = list(self._images.items())
        counts = [self._images.value(item) for item in items if item.key == IMAGES_KEY]
        items = [item for item in items if item.key != IMAGES_KEY]
        if counts != [str(len(items)).encode()]:
            raise DataError(
                f"{path} says it has {counts[0][:20].decode(errors='replace') if counts else 'no number of'} images "
                f"and has {len(items)}: it was not finished. Make it anew with eyetune clip prepare."
            )
        for place, item in enumerate(items):
            try:
                item.key.decode()
            except UnicodeDecodeError:
                raise DataError(f"{path}, entry {place}: its name is not UTF-8.") from None
        return items

    def _read_pairs(self) -> None:
        """Fill texts, text_ids and links."""
        database = Database(self.folder / "pairs")
        path = database.path
        values = {item.key: database.value(item) for item in database.items()}
        database.close()
        stated = values.pop(SAMPLES_KEY, b"").decode(errors="replace")
        keys = [b"%d" % number for number in range(len(values))]
        if stated != str(len(values)) or set(keys) != values.keys():
            raise DataError(
                f"{path} says it has {stated[:20] or 'no number of'} pairs and has {len(values)}, numbered or not: it "
                "was not finished. Make it anew with eyetune clip prepare."
            )
        patients = {name: place for place, name in enumerate(self.patients)}
        texts: dict[int, int] = {}
        for number, key in enumerate(keys):
            where = f"{path}, pair {number}"
            patient, text_id, text = _pair(_value(values[key], where), where)
            if patient not in patients:
                raise DataError(f"{where} names a patient without images.")
            place = texts.setdefault(text_id, len(texts))
            if place == len(self.texts):
                self.texts.append(text)
                self.text_ids.append(text_id)
            elif self.texts[place] != text:
                raise DataError(f"{where}: text {text_id} is another text than before; numbers must be unique.")
            self.links.append((patients[patient], place))


def _value(data: bytes, where: str) -> Value:
    try:
        return unpack(data)
    except Refused as refused:
        raise DataError(f"{where} {refused}.") from None


def _pair(value: Value, where: str) -> tuple[str, int, str]:
    """(patient, number of the text, text), each possibly written as a number or as digits."""
    if isinstance(value, tuple) and len(value) == 3:
        patient, number, text = value
        if isinstance(number, str) and number.isascii() and number.isdigit() and len(number) < 19:
            number = int(number)
        if isinstance(patient, (str, int)) and isinstance(number, int) and isinstance(text, str):
            return str(patient), number, text
    raise DataError(f"{where} is not (patient, number of the text, text).")


def _read_notes(path: Path) -> dict[str, Any]:
    """The JSON object at `path`; empty when there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read ({error}). Make it anew with eyetune clip prepare.") from None
    if not isinstance(found, dict):
        raise DataError(f"{path} is not a JSON object. Make it anew with eyetune clip prepare.")
    return found


def _read_pair_notes(
    path: Path,
) -> tuple[dict[str, dict[str, str | None]], dict[str, str | None], frozenset[str] | None]:
    """Of pairs.json what is known of each patient (group, single, label), the label of each text by its number, and
    the ids of the photographs."""
    notes = _read_notes(path)
    patients, labels, photographs = notes.get("patients", {}), notes.get("labels", {}), notes.get("photographs")
    cells = [patients, labels, *(patients.values() if isinstance(patients, dict) else ())]
    if all(isinstance(cell, dict) for cell in cells) and (photographs is None or isinstance(photographs, list)):
        texts = [value for cell in cells[1:] for value in cell.values()]
        if all(text is None or isinstance(text, str) for text in [*texts, *(photographs or ())]):
            return patients, labels, None if photographs is None else frozenset(photographs)
    raise DataError(f"{path} does not say what it should. Make it anew with eyetune clip prepare.")


def _others(folder: Path, split: str) -> str:
    there = folder / "lmdb"
    names = sorted(path.name for path in there.iterdir() if path.is_dir()) if there.is_dir() else []
    if not names:
        return " Make them with eyetune clip prepare."
    return f" It has {', '.join(names)}.{did_you_mean(split, names)}"
