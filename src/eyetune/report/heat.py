"""Heat maps of a few photographs for the report, and whether they show what the network learnt."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from pydantic import Field

from eyetune.errors import UserError
from eyetune.pages.page import picture
from eyetune.report.content import Part, read_content
from eyetune.report.mistakes import SIDE, Album, examples

if TYPE_CHECKING:
    from eyetune.report.facts import Facts
    from eyetune.train.run import Run

#: Photographs that heat maps are drawn of: some that are right, some that are wrong.
MOST = 8


class Example(Part):
    """One photograph: as the network saw it, with its heat map, and with that of a network of shuffled weights.

    Each a data URI; `correlation` of the two maps, and the case as in :class:`eyetune.report.mistakes.Case`.
    """

    dataset: str
    row: int
    image: str
    truth: str
    called: str
    probability: float | None
    square: str = Field(pattern="^data:image/")
    learnt: str = Field(pattern="^data:image/")
    shuffled: str = Field(pattern="^data:image/")
    correlation: float


class HeatMaps(Part):
    """Content of `heatmaps.json`.

    `model` is the SHA-256 of the weights they are of; `correlation` the mean rank correlation with the maps of the
    same network with shuffled weights, which passes below `threshold`.
    """

    model: str | None
    method: str
    correlation: float
    threshold: float
    examples: tuple[Example, ...]

    @property
    def passed(self) -> bool:
        """Whether the maps depend on what was learnt."""
        return self.correlation < self.threshold


def draw_heat_maps(run: Run, facts: Facts) -> HeatMaps:
    """Draw heat maps of a few photographs of the dataset the run is judged on, and keep them in `heatmaps.json`.

    Each beside the map of the same network with shuffled weights: the randomised-network check of Adebayo et al.,
    "Sanity Checks for Saliency Maps", 2018.

    Raises UserError when there is no photograph to draw on, or no heat map for such a network.
    """
    from eyetune.heatmaps import explain, overlay, sanity_check
    from eyetune.heatmaps.sanity import shuffle_weights

    name = facts.judged_on
    table = facts.calibrated.get(name) if name is not None else None
    if name is None or table is None:
        raise UserError("there are no predictions on a test split or an outside dataset.")
    album = Album(facts)
    places = [(case, path) for case in examples(table) if (path := album.place(name, case.image)) is not None][:MOST]
    if not places:
        raise UserError("the photographs are no longer where they were.")
    # A table of numbers does not know what they are called.
    targets = [case.output if case.output in run.classes else None for case, _ in places]
    sanity = sanity_check(run, [path for _, path in places])
    shuffled = copy.copy(run)
    shuffled.model = shuffle_weights(run.model)
    found = []
    for (case, path), target, correlation in zip(places, targets, sanity.correlations, strict=True):
        learnt = explain(run, path, target=target)
        random = explain(shuffled, path, target=target)
        found.append(
            Example(
                dataset=name,
                row=case.row,
                image=case.image,
                truth=case.truth,
                called=case.called,
                probability=case.probability,
                square=picture(learnt.square, side=SIDE),
                learnt=picture(overlay(learnt.square, learnt.values), side=SIDE),
                shuffled=picture(overlay(random.square, random.values), side=SIDE),
                correlation=correlation,
            )
        )
    made = HeatMaps(
        model=facts.model,
        method=sanity.method,
        correlation=sanity.correlation,
        threshold=sanity.threshold,
        examples=tuple(found),
    )
    facts.folder.write_heat(made.model_dump())
    return made


def read_heat_maps(facts: Facts) -> HeatMaps | None:
    """The heat maps that were drawn for this run; None without any, or when they are of other weights.

    Raises RunError when heatmaps.json is damaged.
    """
    content = facts.folder.read_heat()
    if not content:
        return None
    found = read_content(HeatMaps, content, facts.folder.heat_file)
    return found if found.examples and found.model == facts.model else None
