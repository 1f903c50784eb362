"""An image-text model that knows colours by heart, and pairs of coloured eyes: what it must find is known."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from eyetune.backbones import Preprocess
from eyetune.clip.run import ClipRun
from eyetune.clip.tokens import Tokenizer
from eyetune.data.fundus import FundusSettings
from eyetune.data.pairs import layout
from eyetune.data.pairs.texts import Images, Text
from eyetune.data.pairs.write import write_split
from eyetune.runtime import Runtime

COLOURS = {"red": (220, 30, 30), "green": (30, 220, 30), "blue": (30, 30, 220), "white": (200, 200, 200)}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *COLOURS, "a", "the", "fundus", "eye", "of", "is", "."]
PIXELS = 24


class Colours(nn.Module):
    """Eyes by their mean colour, texts by the colours they name. Of two eyes both colours count."""

    width = 3

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0  # eyes looked at

    def encode_eyes(self, left: Tensor, right: Tensor, single: Tensor | None = None) -> dict[str, Tensor]:
        alone = torch.zeros(len(left), dtype=torch.bool) if single is None else single
        self.seen += 2 * len(left) - int(alone.sum())
        colours = [one.flatten(2).mean(dim=2) for one in (left, right)]
        other = torch.where(alone[:, None], colours[0], colours[1])
        found = {"image": colours[0] + other, "left": colours[0], "right": other}
        return {name: functional.normalize(one, dim=1) for name, one in found.items()}

    def encode_text(self, ids: Tensor) -> dict[str, Tensor]:
        palette = torch.tensor(list(COLOURS.values())).float()
        first = WORDS.index("red")
        counts = torch.stack([(ids == first + number).sum(dim=1) for number in range(len(palette))], dim=1)
        said = functional.normalize(counts.float() @ palette + 1e-3, dim=1)
        return dict.fromkeys(("text", "text_left", "text_right"), said)

    def logit_scales(self) -> dict[str, Tensor]:
        return {"logit_scale": torch.tensor(20.0)}


def colour_run(path: Path, fingerprint: str = "colours", length: int = 8) -> ClipRun:
    """A run of :class:`Colours`; `path` is there, but empty."""
    path.mkdir(exist_ok=True)
    return ClipRun(
        path=path,
        model=Colours(),  # type: ignore[arg-type]
        tokenizer=Tokenizer(WORDS),
        preprocess=Preprocess(PIXELS, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "pad"),
        settings=FundusSettings(PIXELS),
        config=None,
        length=length,
        fingerprint=fingerprint,
        runtime=Runtime("cpu", "fp32"),
    )


def eye(colour: str, shade: int = 0) -> Image.Image:
    """A disc of that colour on black, `shade` darker."""
    y, x = np.mgrid[:PIXELS, :PIXELS] - (PIXELS - 1) / 2
    disc = (x**2 + y**2 < (PIXELS / 2) ** 2)[..., None]
    pixels = np.clip(np.array(COLOURS[colour]) - shade, 0, 255)
    return Image.fromarray(np.where(disc, pixels, 0).astype(np.uint8))


def _base64(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, "png")
    return layout.encode_base64(stream.getvalue())


def colour_pairs(folder: Path, colours: Sequence[str] = ("red", "green", "blue", "white", "red")) -> Path:
    """Pairs of the split test: patient n has eyes of the n-th colour, the last patient one eye only."""
    rows, texts = [], []
    for number, colour in enumerate(colours):
        eyes = [_base64(eye(colour, shade)) for shade in (0, 0 if number == len(colours) - 1 else 5)]
        rows.append(Images(f"p{number}", *eyes))
        texts.append(Text(number, f"the fundus is {colour}", (f"p{number}",), colour))
    patients = {
        row.patient: {"single": None if row.left != row.right else "left", "label": colour}
        for row, colour in zip(rows, colours, strict=True)
    }
    labels = {str(text.number): text.label for text in texts}
    write_split(folder, "test", rows, texts, {"patients": patients, "labels": labels})
    return folder


def colour_table(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Eyes as files and labels.csv: columns as in `rows`, whose `colour` is drawn."""
    folder.mkdir(exist_ok=True)
    path = folder / "labels.csv"
    names = ["image", *(name for name in rows[0] if name != "colour")]
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, names)
        writer.writeheader()
        for number, row in enumerate(rows):
            eye(row["colour"], number % 7).save(folder / f"{number}.png")
            writer.writerow({"image": f"{number}.png"} | {n: v for n, v in row.items() if n != "colour"})
    return path
