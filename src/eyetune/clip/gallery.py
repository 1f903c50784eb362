"""Pages to look at: which queries found their answer and which did not, and what a search brought up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eyetune.clip.features import SPACES, By, Features
from eyetune.clip.ranking import Answers, Ranking, Ranks, top
from eyetune.clip.scoring import DIRECTIONS
from eyetune.data.fundus import FundusSettings, prepare
from eyetune.errors import DataError
from eyetune.pages.page import picture, write_page

if TYPE_CHECKING:
    import torch

    from eyetune.data.pairs import PairSet

MOST = 6
"""Best and worst queries of each direction: enough to see a pattern, few enough to be looked at."""

FOUND = 5
"""Answers shown with each."""

SIDE = 160
"""Pixels of a picture's side."""

METRICS = {
    "recall_at_1": "R@1",
    "recall_at_5": "R@5",
    "recall_at_10": "R@10",
    "mrr": "MRR",
    "median_rank": "median rank",
}
"""Names of measures as tables have them."""

TITLES = {"image_to_text": "Photographs that look for their text", "text_to_image": "Texts that look for their eyes"}


def name_of(features: Features) -> str:
    """The pairs in words: the folder that was prepared, and the split."""
    parts = [part for part in Path(features.about.folder).parts[:-1] if part != "lmdb"]
    return f"{parts[-1]}, {features.about.split}"


class Pictures:
    """The photographs of pairs as data URIs, while they are where they were.

    Args:
        pairs: the pairs; None: no pictures.
        side: of each picture, in pixels.
    """

    def __init__(self, pairs: PairSet | None, side: int = SIDE) -> None:
        self.pairs = pairs
        self.settings = FundusSettings(side)
        self._known: dict[int, list[str]] = {}

    @classmethod
    def of(cls, features: Features) -> Pictures:
        """Those of the pairs that `features` came from, where they still are the same; else none."""
        from eyetune.data.pairs import PairSet

        folder = Path(features.about.folder)
        try:
            pairs = PairSet(folder, features.about.split)
        except (DataError, OSError):
            return cls(None)
        return cls(pairs if pairs.fingerprint == features.about.data else None)

    def eyes(self, place: int) -> list[str]:
        """Left and right eye of a patient, or the only one; nothing where there are no pictures."""
        if self.pairs is None:
            return []
        if place not in self._known:
            left, right = self.pairs.photos(place)
            both = [left] if self.pairs.single[place] else [left, right]
            self._known[place] = [picture(prepare(one, self.settings)) for one in both]
        return self._known[place]


@dataclass(frozen=True)
class Hit:
    """One thing that a query brought up.

    Attributes:
        place: in the data, of photographs or text.
        similarity: the cosine.
        right: whether it is a right answer; None where that is no question.
        patient, text, label: what is known of it; several texts joined by a line end.
        copies: how many texts have these words.
    """

    place: int
    similarity: float
    right: bool | None
    patient: str = ""
    text: str = ""
    label: str = ""
    copies: int = 1


def describe(features: Features) -> list[str]:
    """Of each patient the different texts, a line each."""
    said: list[dict[str, None]] = [{} for _ in features.about.patients]
    for row, text in features.links:
        said[row][features.about.texts[text]] = None
    return ["\n".join(texts) for texts in said]


def search(
    features: Features, query: torch.Tensor, k: int, *, by: By = "patient", what: str | None = None
) -> list[Hit]:
    """The `k` patients whose photographs are most like a query.

    Args:
        features: of the gallery.
        query: float[D], of unit length: of a text, or of photographs.
        k: how many.
        by: which of the gallery's features.
        what: only patients of this class.

    Raises DataError for a class that the gallery does not have, or more than it has patients.
    """
    about = features.about
    rows = list(range(len(about.patients)))
    if what is not None:
        known = sorted({label for label in about.patient_labels if label is not None})
        if what not in known:
            raise DataError(
                f"--label {what}: no patient of the gallery has it. There are: {', '.join(known) or 'none'}."
            )
        rows = [row for row in rows if about.patient_labels[row] == what]
    if not 1 <= k <= len(rows):
        raise DataError(f"--top {k}: the gallery has {len(rows)} patients. Ask for 1 to {len(rows)}.")
    similarity, places = top(query[None], features.vectors[SPACES[by][0]][rows], k)
    texts = describe(features)
    found = zip(similarity[0].tolist(), places[0].tolist(), strict=True)
    return [replace(_patient(features, rows[place], value), text=texts[rows[place]]) for value, place in found]


def write_search(path: Path, title: str, hits: Sequence[Hit], features: Features, **content: Any) -> Path:
    """The page of a search; returns its path.

    Args:
        path: the page.
        title: its title.
        hits: what was found.
        features: of the gallery.
        content: `query`, a text or "", and `asked`, the pictures that were searched with.
    """
    pictures = Pictures.of(features)
    return write_page(
        path,
        "clip_search.html.j2",
        title=title,
        hits=[(hit, pictures.eyes(hit.place)) for hit in hits],
        shown=pictures.pairs is not None,
        name=name_of(features),
        about=features.about,
        **content,
    )


@dataclass(frozen=True)
class Query:
    """One query on the page: its place, its expected rank, what it brought up, and the right answer it has best."""

    place: int
    rank: float
    hits: list[Hit]
    best: Hit


def write_retrieval(
    path: Path,
    features: Features,
    pairs: PairSet,
    found: Mapping[str, Any],
    ranked: tuple[Answers, Ranking],
    *,
    by: By = "patient",
) -> Path:
    """The page of a retrieval: measures, and the best and worst queries of both directions; returns its path.

    Args:
        path: the page.
        features, pairs: what was searched.
        found: what :func:`eyetune.clip.scoring.measured` said of `ranked`.
        ranked: what :meth:`Features.ranking` gave for `by`.
        by: what was compared.
    """
    pictures = Pictures(pairs)
    answers, ranking = ranked
    sides = []
    for direction in DIRECTIONS:
        queries = _queries(direction, features, answers, ranking, by)
        sides.append({"name": direction, "title": TITLES[direction], "found": found[direction], "queries": queries})
    return write_page(
        path,
        "clip_retrieval.html.j2",
        title=f"Retrieval: {name_of(features)}",
        about=features.about,
        found=found,
        by=by,
        sides=sides,
        names=METRICS,
        eyes=pictures.eyes,
        texts=describe(features),
    )


def _queries(direction: str, features: Features, answers: Answers, ranking: Ranking, by: By) -> dict[str, list[Query]]:
    """The queries whose right answer stands highest and lowest, each once however many texts have its words."""
    image, text = (features.vectors[name] for name in SPACES[by])
    by_image = direction == "image_to_text"
    # A text stands in the gallery of the page once, however many have its words.
    first = np.unique(answers.texts, return_index=True)[1]
    ranks, rows = (ranking.images, ranking.image_rows) if by_image else (ranking.texts, ranking.text_rows)
    queries, gallery = (image, text[first]) if by_image else (text, image)
    if not by_image:  # a query of the same words is the same query
        kept = np.flatnonzero(np.isin(rows, first))
        ranks, rows = ranks.take(kept), rows[kept]
    chosen = _extremes(ranks)
    found: dict[str, list[Query]] = {}
    right = set(zip(answers.rows.tolist(), answers.columns.tolist(), strict=True))
    for name, places in chosen.items():
        found[name] = []
        for place in places:
            row = int(rows[place])
            order, values = (one[0].tolist() for one in reversed(top(queries[row][None], gallery, len(gallery))))
            hits = []
            for item, value in zip(order, values, strict=True):
                if by_image:
                    hit = _text(features, int(first[item]), value, copies=int((answers.texts == item).sum()))
                else:
                    hit = _patient(features, item, value)
                pair = (row, item) if by_image else (item, int(answers.texts[row]))
                hits.append(replace(hit, right=pair in right))
            best = next(hit for hit in hits if hit.right)
            found[name].append(Query(row, float(ranks.expected()[place]), hits[:FOUND], best))
    return found


def _text(features: Features, place: int, similarity: float, copies: int) -> Hit:
    about = features.about
    return Hit(place, similarity, None, text=about.texts[place], label=about.labels[place] or "", copies=copies)


def _patient(features: Features, place: int, similarity: float) -> Hit:
    about = features.about
    return Hit(place, similarity, None, about.patients[place], label=about.patient_labels[place] or "")


def _extremes(ranks: Ranks) -> dict[str, list[int]]:
    expected = ranks.expected()
    order = np.argsort(expected, kind="stable")
    worst = [int(place) for place in order[::-1][:MOST] if expected[place] > 1]
    best = [int(place) for place in order[:MOST] if int(place) not in worst]
    return {"worst": worst, "best": best}
