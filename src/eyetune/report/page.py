"""The report of a run: what the templates are filled with, and the files written."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from eyetune.errors import UserError, plural
from eyetune.metrics.predictions import Predictions
from eyetune.metrics.table import Table
from eyetune.pages.page import write_page
from eyetune.report import curves, glossary
from eyetune.report.card import write_card
from eyetune.report.content import Dataset, Score
from eyetune.report.facts import TEST, VAL, Facts, read_facts
from eyetune.report.heat import read_heat_maps
from eyetune.report.mistakes import Album, Case, furthest_mistakes, surest_mistakes
from eyetune.report.spans import Spans, spans
from eyetune.report.words import calibration_words, shared_patients, summarise, table_name, title
from eyetune.train.rundir import RunDir


@dataclass(frozen=True)
class Options:
    """What goes into a report.

    Attributes:
        pictures: photographs of mistakes, and heat maps. They are photographs of patients.
        names: file names of the photographs; else the row of the predictions that holds the name.
    """

    pictures: bool = True
    names: bool = False


def write_report(path: Path | str, options: Options | None = None) -> Path:
    """Write `report.html` and `MODEL_CARD.md` into a run folder; returns the page's path.

    Args:
        path: the run folder.
        options: what goes in; kept for the next time. None: as the last time, at first everything but names.

    Raises RunError when there is no run, it was not scored yet, or a file of it is damaged.
    """
    facts = read_facts(path)
    if options is None:
        before = facts.data.get("report")
        options = Options(**before) if isinstance(before, dict) and set(before) == {"pictures", "names"} else Options()
    else:
        facts.folder.update_data(report=asdict(options))
    write_card(facts)
    return write_page(facts.folder.report_file, "report.html.j2", **run_page(facts, options))


def refresh(folder: RunDir) -> None:
    """Write the report of a run that was just scored, and say where. What is wrong with it is said, not raised: the
    scores are safe. Raises UserError where the disk takes no more: nobody may think that all is well."""
    try:
        print(f"report: {write_report(folder.path)}")
    except UserError as error:
        if isinstance(error.__cause__, OSError):
            again = f"The scores are whole. Write their report with: eyetune report {folder.path}"
            raise UserError(f"{error}\n{again}") from error
        print(f"eyetune: no report was written. {error}", file=sys.stderr)


def run_page(facts: Facts, options: Options) -> dict[str, Any]:
    """What `report.html.j2` asks for."""
    heat = read_heat_maps(facts) if options.pictures else None
    album = Album(facts, options.pictures)
    datasets = [_dataset(facts, name, found, album) for name, found in facts.datasets.items()]
    return {
        "title": title(facts),
        "facts": facts,
        "summary": summarise(facts),
        "options": options,
        "plural": plural,
        "table": table_name(facts),
        "label": glossary.label,
        "meaning": glossary.meaning,
        "flow": flow(facts),
        "leaks": leaks(facts),
        "ranges": ranges(facts),
        "datasets": datasets,
        "gaps": gaps(facts),
        "reference": facts.metrics.generalization.reference if facts.metrics.generalization else None,
        "joined": facts.metrics.generalization.joined_reference if facts.metrics.generalization else {},
        "judged": facts.judged_on,
        "calibration": calibration_words(facts.calibration) if facts.calibration is not None else None,
        "every": every_metric(facts),
        "missing_pictures": album.missing,
        "heat": heat,
        "training": training(facts),
        "glossary": terms(facts, heat is not None),
        "config": _config_text(facts),
    }


# --- the data ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flow:
    """The way of the images: what the table names, what was left out, what is left, and where it went."""

    source: str
    rows: int | None
    left_out: Sequence[tuple[str, int]]
    images: int | None
    patients: int | None
    parts: Sequence[Any]
    outside: Sequence[Any]
    classes: Sequence[str] = field(default_factory=tuple)


def flow(facts: Facts) -> Flow:
    """The flow chart, from data.json and splits.csv; numbers that neither has are None."""
    parts = facts.parts()
    patients = {row["patient"] for row in facts.splits if row.get("patient")}
    images = sum(part.images for part in parts) or None
    rows = facts.data.get("rows")
    return Flow(
        source=table_name(facts),
        rows=rows if isinstance(rows, int) else None,
        left_out=[(str(entry["why"]), int(entry["images"])) for entry in facts.data.get("left_out", [])],
        images=images,
        patients=len(patients) or None,
        parts=parts,
        outside=facts.outside_parts(),
        classes=facts.classes,
    )


@dataclass(frozen=True)
class Leak:
    """One way in which test images may have been seen in training, and whether they were."""

    what: str
    found: str
    level: str


def leaks(facts: Facts) -> list[Leak]:
    """What was looked for, and what was found. Nothing looked for is not nothing there: that is said too."""
    found = []
    if facts.knows_patients:
        count = shared_patients(facts)
        said = f"{plural(count, 'patient')} in more than one split" if count else "none"
        found.append(Leak("Patients in more than one split", said, "bad" if count else "good"))
    else:
        found.append(Leak("Patients in more than one split", "not known: the table names no patients", "warn"))
    same = facts.data.get("identical")
    if isinstance(same, Mapping):
        crossing, other = (list(same.get(key, [])) for key in ("across_splits", "other_labels"))
        found.append(
            Leak(
                "The same file under two names, in two splits",
                plural(len(crossing), "photograph") if crossing else "none",
                "bad" if crossing else "good",
            )
        )
        found.append(
            Leak(
                "The same file under two names, with two labels",
                plural(len(other), "photograph") if other else "none",
                "warn" if other else "good",
            )
        )
    else:
        found.append(Leak("The same file under two names", "not looked for (a run of an older version)", "warn"))
    found.append(
        Leak("Nearly the same photograph twice", "not looked for here: eyetune data audit does", "warn"),
    )
    return found


# --- the scores ----------------------------------------------------------------------------------------------------


def ranges(facts: Facts) -> list[tuple[str, Spans]]:
    """The headline metrics: for each a line a dataset."""
    names = {dataset: f"{dataset} *" if dataset in facts.rejoined else dataset for dataset in facts.datasets}
    found = [
        (name, spans(name, [(shown, facts.score(dataset, name)) for dataset, shown in names.items()]))
        for name in facts.headline
    ]
    return [(name, lines) for name, lines in found if lines.known]


def gaps(facts: Facts) -> list[tuple[str, dict[str, Score]]]:
    """Outside dataset -> headline metric -> gap to the run's own test split."""
    known = facts.metrics.generalization
    if known is None:
        return []
    wanted = [name for name, _ in ranges(facts)]
    return [
        (dataset, {name: found[name] for name in wanted if name in found and found[name].value is not None})
        for dataset, found in known.external.items()
        if dataset in facts.datasets and known.reference in facts.datasets
    ]


def every_metric(facts: Facts) -> list[tuple[str, list[Score]]]:
    """Every metric with its score on each dataset, in the order of metrics.json."""
    names = dict.fromkeys(name for found in facts.datasets.values() for name in found.metrics)
    return [(name, [found.metrics.get(name, Score()) for found in facts.datasets.values()]) for name in names]


def _dataset(facts: Facts, name: str, found: Dataset, album: Album) -> dict[str, Any]:
    table = facts.predictions.get(name)
    calibrated = facts.calibrated.get(name)
    charts = [] if table is None else [*curves.ranking_charts(table), *curves.agreement_charts(table, found)]
    more = [curves.reliability_chart(found), curves.selective_chart(found)]
    more += [curves.reliability_chart(alone, f"Reliability of “{label}”") for label, alone in found.per_label.items()]
    charts += [chart for chart in more if chart is not None]
    sure, far = [], []
    if table is not None and name != VAL:
        sure = album.gallery(name, _mistakes(surest_mistakes, table, calibrated))
        far = album.gallery(name, _mistakes(furthest_mistakes, table, calibrated))
    return {
        "name": name,
        "title": {TEST: "Test split", VAL: "Validation split"}.get(name, f"Outside dataset “{name}”"),
        "scores": found,
        "warnings": facts.warnings(name),
        "charts": charts,
        "matrix": _matrix(found),
        "sure": sure,
        "far": far,
        "columns": list(dict.fromkeys(column for scores in found.per_class.values() for column in scores)),
    }


def _mistakes(choose: Callable[[Table], list[Case]], table: Table, calibrated: Table | None) -> list[Case]:
    """The cases with the calibrated probability of what was called. Of classes a site's calibration may call others
    than the scores are of, so those are chosen before; of labels it cannot."""
    if calibrated is None or not isinstance(table, Predictions) or not isinstance(calibrated, Predictions):
        return choose(table if calibrated is None else calibrated)
    place = {name: index for index, name in enumerate(calibrated.classes)}
    return [
        replace(case, probability=float(calibrated.probabilities[case.row - 2, place[case.called]]))
        for case in choose(table)
    ]


def _matrix(found: Dataset) -> list[tuple[str, int, list[tuple[int, float | None]]]]:
    """Rows of (class, images, cells of (count, share of the row))."""
    return [
        (name, sum(row), [(count, count / sum(row) if sum(row) else None) for count in row])
        for name, row in zip(found.classes, found.confusion_matrix, strict=False)
    ]


# --- training and the rest -----------------------------------------------------------------------------------------


def training(facts: Facts) -> dict[str, Any]:
    """The charts of the epochs, and what they say."""
    seconds = [row["seconds"] for row in facts.history if isinstance(row.get("seconds"), (int, float))]
    metric = facts.card.metric if facts.card is not None and facts.card.metric else facts.primary
    return {
        "charts": curves.history_charts(facts.history, metric),
        "epochs": len(facts.history),
        "best": facts.card.epoch + 1 if facts.card is not None and facts.card.epoch >= 0 else None,
        "metric": metric,
        "value": facts.card.value if facts.card is not None else None,
        "seconds": sum(seconds) if seconds else None,
    }


def terms(facts: Facts, heat: bool) -> list[tuple[str, glossary.Term, str]]:
    """The glossary of what the page shows: (name, term, source)."""
    names = list(dict.fromkeys(name for found in facts.datasets.values() for name in found.metrics))
    per_class = list(
        dict.fromkeys(
            column for one in facts.datasets.values() for scores in one.per_class.values() for column in scores
        )
    )
    shown = [part for one in facts.datasets.values() for part in (one, *one.per_label.values())]
    names += ["interval", *per_class]
    names += ["ppv", "npv"] if any(one.operating_points for one in shown) else []
    for key in ("reliability", "selective", "conformal", "prediction_interval", "ood"):
        names += [key] if any(getattr(one, key) is not None for one in shown) else []
    names += ["ece_equal_mass"] if any("ece_equal_mass" in one.calibrated_metrics for one in shown) else []
    names += ["heat_maps"] if heat else []
    return [
        (name, glossary.Term(glossary.label(name), glossary.meaning(name)), glossary.source(name))
        for name in dict.fromkeys(names)
    ]


def _config_text(facts: Facts) -> str:
    return facts.folder.config_file.read_text(encoding="utf-8", errors="replace")
