"""`eyetune clip search`: the patients whose photographs are most like a text, or like a photograph."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

from eyetune.errors import ConfigError
from eyetune.flags import READING, Reading, Switch

if TYPE_CHECKING:
    from torch import Tensor

    from eyetune.clip.features import By, Eye
    from eyetune.clip.gallery import Hit
    from eyetune.clip.run import ClipRun


def command(
    query: str | None = None,
    *,
    features: Annotated[Path, Parameter(name=("--in", "--features"))],
    run: Path | None = None,
    image: Path | None = None,
    fellow: Path | None = None,
    top: Annotated[int, Parameter(validator=Number(gte=1))] = 10,
    label: str | None = None,
    by: Literal["patient", "left", "right"] = "patient",
    out: Path | None = None,
    json_lines: Annotated[Switch, Parameter(name="--json")] = False,
    reading: Reading = READING,
) -> None:
    """Search photographs by words, as in "hard exudates near the macula", or by an example photograph.

    Prints the most alike, and writes a page with their pictures where --out names one.

    Args:
        query: What to look for, in the language of the model's texts.
        features: The gallery: the features that clip retrieve wrote.
        run: The model (default: where it was when the features were computed).
        image: A photograph to look for the like of, in place of words: the left eye, or the only one.
        fellow: The right eye that belongs to --image.
        top: How many to show.
        label: Only patients of this class.
        by: patient compares with both eyes; left and right with one eye.
        out: HTML page to write.
        json_lines: A line of JSON each, in place of the table.
        reading: Device, precision, workers, batch size, text.
    """
    from eyetune.clip.features import Features
    from eyetune.clip.gallery import search, write_search
    from eyetune.clip.run import open_clip_run

    if (query is None) == (image is None):
        raise ConfigError('say what to look for: either words, as in "hard exudates", or --image a.jpg.')
    if fellow is not None and image is None:
        raise ConfigError("--fellow is the right eye beside --image; give that, too.")
    gallery = Features.load(features)
    model = Path(gallery.about.run) if run is None else run
    if run is None and not model.exists():
        raise ConfigError(f"the model of {features} is no longer at {model}: say where it is with --run.")
    opened = open_clip_run(model, **reading.loading())
    gallery.check_model(opened, features)
    vector = _vector(opened, query, image, fellow, by)
    hits = search(gallery, vector, top, by=by, what=label)
    if not opened.runtime.is_main:
        return
    if json_lines:
        for hit in hits:
            said = {"patient": hit.patient, "similarity": hit.similarity, "label": hit.label or None, "text": hit.text}
            print(json.dumps(said, ensure_ascii=False))
    else:
        _table(hits)
    if out is not None:
        asked = _asked(image, fellow)
        write_search(out, "Search", hits, gallery, query=query or "", asked=asked)
        if not json_lines:
            print(f"look at {out}")


def _vector(run: ClipRun, query: str | None, image: Path | None, fellow: Path | None, by: By) -> Tensor:
    """float32[D] of what is looked for, in the space that photographs are compared in."""
    from eyetune.clip.features import SPACES, embed_eyes, embed_texts
    from eyetune.clip.prompts import check_texts
    from eyetune.progress import counted_by

    seen_as, said_as = SPACES[by]
    with counted_by(lambda _: None):  # one text, one patient: no progress to show
        if query is not None:
            check_texts(run, [query], "the query")
            return embed_texts(run, [query])[said_as][0]
        assert image is not None
        eyes: tuple[Eye, Eye | None] = (image, fellow)
        return embed_eyes(run, 1, lambda _: eyes, names=[str(image)])[seen_as][0]


def _asked(image: Path | None, fellow: Path | None) -> list[str]:
    from eyetune.clip.gallery import SIDE
    from eyetune.data.fundus import FundusSettings, load_square
    from eyetune.pages.page import picture

    return [picture(load_square(one, FundusSettings(SIDE))) for one in (image, fellow) if one is not None]


def _table(hits: Sequence[Hit]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from eyetune.terminal import show

    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("place", justify="right")
    table.add_column("similarity", justify="right")
    for name in ("patient", "class", "text"):
        table.add_column(name)
    for place, hit in enumerate(hits, start=1):
        # Text: brackets in a report are no markup.
        table.add_row(str(place), f"{hit.similarity:.3f}", *(Text(one) for one in (hit.patient, hit.label, hit.text)))
    show(table)
