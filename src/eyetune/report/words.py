"""The top of the page: how good, on whom, how sure, and what not to believe, in sentences a clinician can check."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Literal

from eyetune.errors import plural
from eyetune.metrics.calibration import Calibration, LabelCalibration
from eyetune.metrics.metric import METRICS
from eyetune.metrics.ranges import ValueCalibration
from eyetune.metrics.scores import is_graded_dr
from eyetune.report.content import Dataset, Score
from eyetune.report.facts import TEST, VAL, Facts
from eyetune.report.glossary import label
from eyetune.train.leaks import SAME_BYTES, unnamed_patients

if TYPE_CHECKING:
    from eyetune.metrics.fitted import Fitted

#: Below so many test images a share is known to ten percentage points either way at best (1.96 * sqrt(0.25 / 100)).
FEW_IMAGES = 100
#: Below so many images of a class, one image more or less right moves its recall by ten points or more.
FEW_OF_A_CLASS = 10
#: An interval of a score on 0..1 beyond this leaves open whether a model is good or mediocre.
WIDE = 0.2
#: Expected calibration error beyond which a probability should not be read as one.
OFF = 0.1
#: Share of a dataset beyond the out-of-distribution threshold that is worth a word (the threshold leaves 5 %).
STRANGE = 0.1
#: An interval below this has no width: the photographs of every class were all alike.
POINT = 1e-9


@dataclass(frozen=True)
class Caution:
    """One thing not to believe: "bad" spoils the numbers, "warn" limits what they say."""

    level: Literal["bad", "warn"]
    text: str


@dataclass(frozen=True)
class Summary:
    """The top of the page, each a sentence or more."""

    asked: str
    good: tuple[str, ...]
    whom: str
    sure: str
    elsewhere: tuple[str, ...]
    cautions: tuple[Caution, ...]


def summarise(facts: Facts) -> Summary:
    """The sentences for a run."""
    name = facts.judged_on
    return Summary(
        asked=_asked(facts),
        good=tuple(_good(facts, name)) if name else (),
        whom=_whom(facts, name),
        sure=_sure(facts, name),
        elsewhere=tuple(_elsewhere(facts)),
        cautions=tuple(sorted(_cautions(facts), key=lambda one: one.level != "bad")),
    )


def title(facts: Facts) -> str:
    """`resnet50 (linear) on labels.csv`."""
    what = f"{facts.card.backbone} ({facts.card.adapt.get('kind')})" if facts.card else facts.folder.path.resolve().name
    return f"{what} on {table_name(facts)}"


def table_name(facts: Facts) -> str:
    """The table or folder trained on, without the folders above it: those may name people."""
    table = facts.config.data.table if facts.config else str(facts.data.get("source", "its data"))
    return table if table.startswith("hf:") else PurePath(table).name or table


def calibration_words(calibration: Fitted) -> str:
    """`temperature 1.31 (95 % interval 1.10 to 1.55), fitted on 80 photographs of val`."""
    said = "nothing"
    if isinstance(calibration, Calibration):
        said = f"temperature {_temperature(calibration)}"
    elif isinstance(calibration, LabelCalibration):
        each = [f"of “{name}” {_temperature(one)}" for name, one in calibration.labels.items()]
        said = f"temperature {', '.join(each)}"
    elif isinstance(calibration, ValueCalibration) and calibration.interval.half_width is not None:
        interval = calibration.interval
        said = f"prediction interval of {100 * interval.level:.0f} %: the number predicted ± {interval.half_width:.3g}"
    sample = calibration.fitted_on
    return f"{said}, fitted on {plural(sample.n, 'photograph')} of {sample.dataset}"


def _temperature(calibration: Calibration) -> str:
    low, high = calibration.temperature.ci
    ends = "" if low is None or high is None else f" (95 % interval {low:.2f} to {high:.2f})"
    return f"{calibration.temperature.value:.2f}{ends}"


def listed(names: list[str], most: int = 8) -> str:
    """`a, b and c`; of many the first ones."""
    shown = [f"“{name}”" for name in names[:most]]
    if len(names) > most:
        return f"{', '.join(shown)} and {len(names) - most} more"
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


def with_interval(score: Score, percent: bool = False) -> str:
    """`0.875 (95 % interval 0.835 to 0.915)`."""

    def text(value: float) -> str:
        return f"{100 * value:.0f}" if percent else f"{value:.3f}"

    if score.value is None:
        return f"not defined ({score.reason})" if score.reason else "not defined"
    unit = " %" if percent else ""
    low, high = score.ci
    if low is None or high is None:
        return f"{text(score.value)}{unit}"
    if high - low < POINT:
        return f"{text(score.value)}{unit} (no interval: all of one class were answered alike)"
    return f"{text(score.value)}{unit} (95 % interval {text(low)} to {text(high)}{unit})"


# --- the sentences -------------------------------------------------------------------------------------------------


def _asked(facts: Facts) -> str:
    classes = facts.classes
    if is_graded_dr(classes):
        task = "the grade of diabetic retinopathy, 0 to 4, of a colour fundus photograph"
    elif facts.task == "multilabel":
        task = f"for each of {listed(list(classes))}, whether a colour fundus photograph has it"
    elif facts.task == "regression":
        task = f"a number, “{', '.join(classes)}”, of a colour fundus photograph"
    elif classes:
        task = f"which of {listed(list(classes))} a colour fundus photograph shows"
    else:
        task = "what the table says of a colour fundus photograph"
    train = next((part for part in facts.parts() if part.name == "train"), None)
    how = ""
    if facts.card is not None:
        name = facts.spec.title if facts.spec else facts.card.backbone
        how = f" {name} was adapted ({facts.card.adapt.get('kind')})"
        if train is not None:
            who = f" of {plural(train.patients, 'patient')}" if train.patients else ""
            how += f" on {plural(train.images, 'photograph')}{who} from {table_name(facts)}"
        how += "."
    return f"The question was {task}.{how}"


def _good(facts: Facts, name: str) -> Iterator[str]:
    found, primary = facts.metrics.datasets[name], facts.primary
    yield _headline(primary, facts.score(name, primary), found)
    accuracy = facts.score(name, "accuracy")
    if accuracy.value is not None:
        right = round(accuracy.value * found.n)
        sentence = f"It gave {right} of {found.n} photographs the labelled class: {with_interval(accuracy, True)}."
        if share := _commonest(found):
            sentence += f" Always answering “{share[0]}” would be right for {100 * share[1]:.0f} %."
        yield sentence
    yield from _good_of_labels(found)
    yield from _good_of_number(facts, name)
    sensitivity, specificity = (facts.score(name, f"referable_{side}") for side in ("sensitivity", "specificity"))
    if sensitivity.value is not None and specificity.value is not None:
        yield (
            f"Of the eyes with referable retinopathy (grade 2 or worse) it found {with_interval(sensitivity, True)}; "
            f"of those without, it spared {with_interval(specificity, True)}. It is said to find an eye where the "
            "probabilities of the grades from 2 on add up to a half, whichever single grade it answered."
        )


def _good_of_labels(found: Dataset) -> Iterator[str]:
    for label_name, alone in found.per_label.items():
        if not alone.n:
            continue
        having = sum(alone.confusion_matrix[-1]) if alone.confusion_matrix else 0
        area = with_interval(alone.metrics.get("auroc_macro", Score()))
        yield f"“{label_name}”: AUROC {area}; {having} of {plural(alone.n, 'photograph')} have it."


def _good_of_number(facts: Facts, name: str) -> Iterator[str]:
    low, high, explained = (facts.score(name, one).value for one in ("loa_low", "loa_high", "r2"))
    if low is not None and high is not None:
        limits = f"{low:+.3g} and {high:+.3g}".replace("-", "−")
        yield f"If its errors are normally distributed, 95 % of them lie between {limits} (limits of agreement)."
    if explained is not None and explained > 0:
        yield (
            f"It explains {100 * explained:.0f} % of the differences between photographs (R²); always saying the mean "
            "explains 0 %."
        )


def _headline(name: str, score: Score, found: Dataset) -> str:
    if score.value is None:
        return f"{label(name)}: {with_interval(score)}."
    if name == "auroc_macro" and len(found.classes) == 2:
        return (
            f"Of two photographs, one “{found.classes[1]}” and one “{found.classes[0]}”, it ranks the right one higher "
            f"in {100 * score.value:.0f} of 100 pairs: AUROC {with_interval(score)}; 0.5 is a coin."
        )
    if name == "qwk":
        return f"Agreement with the labelled grades (QWK): {with_interval(score)}; 1 is perfect, 0 is chance."
    return f"{label(name)}: {with_interval(score)}."


def _commonest(found: Dataset) -> tuple[str, float] | None:
    """The class with most images, and its share; None where the classes were not counted."""
    sizes = [sum(row) for row in found.confusion_matrix]
    if not sum(sizes) or len(sizes) != len(found.classes):
        return None
    return found.classes[sizes.index(max(sizes))], max(sizes) / sum(sizes)


def _whom(facts: Facts, name: str | None) -> str:
    if name is None:
        return "On nobody new: there is no test split, and validation chose the epoch."
    found = facts.metrics.datasets[name]
    images = plural(found.n, "photograph")
    if name != TEST:
        who = f" of {plural(found.patients, 'patient')}" if found.patients else ""
        return f"On {images}{who} of the outside dataset “{name}”: the run has no test split of its own."
    if shared_patients(facts) or any(SAME_BYTES in text for text in found.warnings):
        return f"On {images}, some of which, or of whose patients, it was trained or chosen on: see below."
    if found.patients:
        return f"On {images} of {plural(found.patients, 'patient')}, none of whom it was trained on."
    return f"On {images} it was not trained on. Their patients are not known, so some may be the same people."


def _sure(facts: Facts, name: str | None) -> str:
    if name is None:
        return "Not at all: a score on validation is too good, by how much nobody knows."
    found, score = facts.metrics.datasets[name], facts.score(name, facts.primary)
    low, high = score.ci
    if low is None or high is None:
        return "There is no interval for this score" + (f": {score.ci_reason}." if score.ci_reason else ".")
    unit = found.intervals.unit if found.intervals else "image"
    count = plural(found.patients, "patient") if unit == "patient" and found.patients else plural(found.n, "photograph")
    return (
        f"With {count}, chance alone leaves {label(facts.primary)} uncertain between {low:.3f} and {high:.3f}. "
        "That is about other patients of the same kind, not about another camera or clinic."
    )


def _elsewhere(facts: Facts) -> Iterator[str]:
    gaps = facts.metrics.generalization
    for name, found in facts.outside.items():
        if gaps is not None and name == gaps.reference:
            continue
        score = facts.score(name, facts.primary)
        text = f"On “{name}” ({plural(found.n, 'photograph')}): {label(facts.primary)} {with_interval(score)}."
        gap = gaps.external.get(name, {}).get(facts.primary) if gaps else None
        if gaps is not None and gap is not None and gap.value is not None:
            where = "on its own test split" if gaps.reference == TEST else f"on “{gaps.reference}”"
            if name in gaps.joined_reference:
                there = gaps.joined_reference[name].metrics.get(facts.primary, Score()).value
                where += " with the same classes joined" + ("" if there is None else f", {there:.3f}")
            text += f" {_gap_words(gap, where)}"
        yield text


def _gap_words(gap: Score, where: str) -> str:
    assert gap.value is not None
    low, high = gap.ci
    ends = "" if low is None or high is None else f" (95 % interval of what is lost: {low:+.3f} to {high:+.3f})"
    ends = ends.replace("-", "−")
    worse = "worse" if gap.value > 0 else "better"
    if not ends or low is None or high is None or low <= 0 <= high:
        return f"That is {abs(gap.value):.3f} {worse} than {where}{ends}: this may be chance."
    return f"That is {abs(gap.value):.3f} {worse} than {where}{ends}."


# --- what not to believe -------------------------------------------------------------------------------------------


def _cautions(facts: Facts) -> Iterator[Caution]:
    yield from _about_data(facts)
    for name, found in facts.datasets.items():
        if name != VAL:
            yield from _about_scores(facts, name, found)
            yield from _about_warnings(name, facts.warnings(name))
    yield from _about_outside(facts)
    yield from _about_calibration(facts)
    if facts.card is not None and facts.card.weights == "random":
        yield Caution("bad", "The network began untrained (weights: random): this is a trial, not a foundation model.")
    elif facts.card is not None and facts.card.backbone == "nano":
        yield Caution(
            "warn", "nano has seen drawn eyes only before this run. For real photographs take a foundation model."
        )


def _about_warnings(name: str, texts: Iterable[str]) -> Iterator[Caution]:
    """What evaluating warned of. That the run's own table names no patients is said of the data already."""
    for text in texts:
        if name != TEST or text not in unnamed_patients([None]):
            yield Caution("bad" if "the run was trained" in text else "warn", f"{name}: {text}")


def _about_calibration(facts: Facts) -> Iterator[Caution]:
    if facts.calibration is not None and facts.calibration.fitted_on.n < FEW_IMAGES:
        sample = facts.calibration.fitted_on
        rests = f"on {plural(sample.n, 'photograph')} of {sample.dataset}"
        yield Caution(
            "warn",
            f"The prediction interval rests {rests}: expect another coverage than it aims at."
            if facts.task == "regression"
            else f"Calibration, thresholds and prediction sets rest {rests}: expect other sensitivities and coverages "
            "than they aim at.",
        )


def _about_data(facts: Facts) -> Iterator[Caution]:
    if TEST not in facts.datasets:
        yield Caution("bad", "There is no test split of its own: nothing here says how it does on unseen patients.")
    shared = shared_patients(facts)
    if shared:
        yield Caution(
            "bad", f"{plural(shared, 'patient')} in more than one split: the test met eyes it was trained on."
        )
    same = facts.data.get("identical", {})
    where = {row.get("image", ""): row.get("split", "") for row in facts.splits}
    crossing = [{where.get(name, "") for name in group} for group in same.get("across_splits", [])]
    tested = [splits for splits in crossing if TEST in splits or not facts.splits]
    said = TEST in facts.datasets and any(SAME_BYTES in text for text in facts.metrics.datasets[TEST].warnings)
    if tested and not said:
        text = f"{plural(len(tested), 'photograph')} of the test split also in another split, under another name"
        yield Caution("bad", f"{text}: the test met images that training or the choice of the epoch had seen.")
    if rest := len(crossing) - len(tested):
        yield Caution("warn", f"{plural(rest, 'photograph')} in training and validation alike, under another name.")
    if other := same.get("other_labels"):
        text = f"{plural(len(other), 'photograph')} with two different labels (the same file under two names)"
        yield Caution("warn", f"{text}: the labels are not all right.")
    if facts.knows_patients is False:
        yield Caution(
            "warn",
            "The table names no patients. Two photographs of one person may lie in train and test, which makes scores "
            "too good; and the intervals, which count every photograph as a person, are too narrow.",
        )
    for entry in facts.data.get("left_out", []):
        text = f"{plural(entry['images'], 'photograph')} left out: {entry['why']}"
        yield Caution("warn", f"{text}. If those differ from the rest, the scores do not speak for them.")


def shared_patients(facts: Facts) -> int:
    """How many patients have images in more than one split."""
    splits: dict[str, set[str]] = {}
    for row in facts.splits:
        if row.get("patient"):
            splits.setdefault(row["patient"], set()).add(row.get("split", ""))
    return sum(len(found) > 1 for found in splits.values())


def _about_scores(facts: Facts, name: str, found: Dataset) -> Iterator[Caution]:
    if found.n < FEW_IMAGES:
        yield Caution("warn", f"{name}: only {plural(found.n, 'photograph')}. Read the intervals, not the scores.")
    primary = facts.score(name, facts.primary)
    bounded = facts.primary in METRICS and METRICS.get(facts.primary).high <= 1
    if bounded and primary.width is not None and primary.width > WIDE:
        yield Caution(
            "warn",
            f"{name}: the interval of {label(facts.primary)} is {primary.width:.2f} wide. That leaves open whether the "
            "model is good or mediocre.",
        )
    still = [
        label(one)
        for one in facts.headline
        if (score := found.metrics.get(one))
        and score.value is not None
        and score.width is not None
        and score.width < POINT
    ]
    if still:
        yield Caution(
            "warn",
            f"{name}: the interval of {', '.join(still)} has no width. That is no certainty: resampling cannot show "
            "mistakes that none of these photographs made.",
        )
    yield from _about_classes(name, found)
    for one, alone in found.per_label.items():
        if not alone.n:
            yield Caution("warn", f"{name}: of no photograph is “{one}” known. Its scores say nothing of that.")
            continue
        yield from _about_classes(f"{name}, {one}", alone)
        yield from _about_probabilities(f"{name}, {one}", alone)
    share, accuracy = _commonest(found), facts.score(name, "accuracy")
    if share and accuracy.ci[0] is not None and accuracy.ci[0] <= share[1]:
        yield Caution(
            "bad",
            f"{name}: it is not shown to be right more often than always answering “{share[0]}” "
            f"({100 * share[1]:.0f} %).",
        )
    explained = facts.score(name, "r2").ci[0]
    if explained is not None and explained <= 0:
        yield Caution("bad", f"{name}: it is not shown to be nearer to the truth than always saying the mean (R²).")
    yield from _about_probabilities(name, found)
    if found.unlabelled:
        yield Caution("warn", f"{name}: {plural(found.unlabelled, 'photograph')} without a label, not scored.")


def _about_classes(name: str, found: Dataset) -> Iterator[Caution]:
    matrix = found.confusion_matrix
    sizes = dict(zip(found.classes, map(sum, matrix), strict=False))
    called = dict(zip(found.classes, map(sum, zip(*matrix, strict=True)), strict=False))
    absent = [one for one, size in sizes.items() if not size]
    few = [one for one, size in sizes.items() if 0 < size < FEW_OF_A_CLASS]
    never = [one for one, size in sizes.items() if size and not called[one]]
    if absent:
        yield Caution("warn", f"{name}: no photograph of {listed(absent)}. Its scores say nothing of that.")
    if few:
        yield Caution("warn", f"{name}: fewer than {FEW_OF_A_CLASS} photographs of {listed(few)}: hardly tested.")
    if never:
        yield Caution("bad", f"{name}: it never answered {listed(never)}, though such photographs are there.")


def _about_probabilities(name: str, found: Dataset) -> Iterator[Caution]:
    after = found.calibrated_metrics.get("ece")
    ece = after or found.metrics.get("ece")
    if ece is not None and ece.value is not None and ece.value > OFF:
        when = "even calibrated" if after else "uncalibrated"
        yield Caution(
            "warn",
            f"{name}: its probabilities ({when}) are off by {100 * ece.value:.0f} points on average (ECE). Do not read "
            "“90 %” as 90 in 100.",
        )
    sets = found.conformal.marginal if found.conformal else None
    if sets is not None and found.conformal is not None:
        high = sets.coverage.ci[1]
        if high is not None and high < found.conformal.level:
            yield Caution(
                "warn",
                f"{name}: its prediction sets hold the truth for {with_interval(sets.coverage, True)} of photographs, "
                f"not for the {100 * found.conformal.level:.0f} % they were made for.",
            )
    drawn = found.prediction_interval
    if drawn is not None and drawn.coverage.ci[1] is not None and drawn.coverage.ci[1] < drawn.level:
        yield Caution(
            "warn",
            f"{name}: its prediction intervals hold the truth for {with_interval(drawn.coverage, True)} of "
            f"photographs, not for the {100 * drawn.level:.0f} % they were made for.",
        )
    for column, groups in found.subgroups.items():
        yield from _about_groups(name, column, groups.gap.get("balanced_accuracy") or groups.gap.get("accuracy"))


def _about_groups(name: str, column: str, gap: Score | None) -> Iterator[Caution]:
    between = getattr(gap, "between", None)
    if gap is None or gap.value is None or None in gap.ci or not between:
        return
    low, high = gap.ci
    assert low is not None
    assert high is not None
    if low > 0 or high < 0:
        yield Caution(
            "warn", f"{name}: it does not do equally well for every {column} ({between[0]} against {between[1]})."
        )


def _about_outside(facts: Facts) -> Iterator[Caution]:
    gaps = facts.metrics.generalization
    for name, found in facts.outside.items():
        gap = gaps.external.get(name, {}).get(facts.primary) if gaps else None
        if gap is not None and gap.ci[0] is not None and gap.ci[0] > 0:
            yield Caution(
                "bad",
                f"{name}: {label(facts.primary)} is worse there, by {with_interval(gap)}. The test score does not hold "
                "outside its own data.",
            )
        if found.ood is not None and found.ood.share_above is not None and found.ood.share_above > STRANGE:
            yield Caution(
                "warn",
                f"{name}: {100 * found.ood.share_above:.0f} % of its photographs look unlike those trained on "
                "(out of distribution).",
            )
    if not facts.outside:
        yield Caution(
            "warn",
            "No outside dataset was scored. Models of this kind usually do worse with another camera or clinic: "
            "eyetune evaluate measures it.",
        )
