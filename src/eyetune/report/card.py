"""The model card: what a colleague who is given the model has to know, under the headings that are usual for it.

The nine headings of Mitchell et al. 2019, "Model Cards for Model Reporting", in their order; the front matter is what
the Hugging Face hub reads. It holds no photograph, no name of a file but the table's, and nothing of a patient.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from eyetune.errors import plural
from eyetune.files import write_text
from eyetune.metrics.scores import is_graded_dr
from eyetune.report.content import Score
from eyetune.report.facts import VAL, Facts
from eyetune.report.glossary import label, meaning
from eyetune.report.words import Summary, calibration_words, summarise, table_name, title

#: Licences by the words of the backbones, as the hub spells them; any other is "other", with its words.
_LICENCES = {"apache-2.0": "apache-2.0", "cc by-nc 4.0": "cc-by-nc-4.0", "mit": "mit", "cc by 4.0": "cc-by-4.0"}

_CLASSIFICATION = "image-classification"

_WITHOUT_THRESHOLD = {
    "classification": "none were fixed; the most probable class is called.",
    "multilabel": "none were fixed; a label is called where its probability is above 0.5.",
    "regression": "none; it says a number, and how far the true one may lie from it stands under Calibration.",
}


def write_card(facts: Facts) -> None:
    """Write `MODEL_CARD.md` into the run folder."""
    write_text(facts.folder.card_file, model_card(facts))


def model_card(facts: Facts) -> str:
    """The card as Markdown with YAML front matter."""
    front = yaml.safe_dump(_front_matter(facts), sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n\n" + "\n".join(_body(facts, summarise(facts))) + "\n"


def _front_matter(facts: Facts) -> dict[str, Any]:
    spec = facts.spec
    known = _LICENCES.get(spec.licence.lower()) if spec is not None else None
    front: dict[str, Any] = {"license": known}
    if known is None:
        front = {"license": "other", "license_name": "of-the-base-weights"}
        if spec is not None and (address := re.search(r"https?://\S+", spec.source)):
            front["license_link"] = address[0].rstrip(".,;)")
    front |= {
        "library_name": "eyetune",
        # The hub has no task for a number of an image.
        **({} if facts.task == "regression" else {"pipeline_tag": _CLASSIFICATION}),
        "tags": ["retina", "fundus-photography", "medical", "research-use-only"],
    }
    if spec is not None and spec.download is not None and spec.download.repo:
        front["base_model"] = spec.download.repo
    front["metrics"] = list(facts.headline)
    results = [_result(facts, name) for name in facts.datasets if name != VAL]
    front["model-index"] = [{"name": _plain(title(facts)), "results": results}]
    return front


def _result(facts: Facts, dataset: str) -> dict[str, Any]:
    scores = [(name, facts.score(dataset, name)) for name in facts.headline]
    return {
        "task": {"type": "regression" if facts.task == "regression" else _CLASSIFICATION},
        "dataset": {"name": _plain(f"{table_name(facts)}, {dataset}"), "type": _plain(dataset)},
        "metrics": [
            {"type": name, "name": label(name), "value": round(score.value, 6)}
            for name, score in scores
            if score.value is not None
        ],
    }


def _body(facts: Facts, summary: Summary) -> Iterator[str]:
    yield f"# {_text(title(facts))}"
    yield "\n> **Research use only. Not a medical device; not a diagnosis.** No number here says how the model will do"
    yield "> in a clinic that is not in its data.\n"
    yield _text(summary.asked)
    yield from _details(facts)
    yield from _use()
    yield from _factors(facts)
    yield from _metrics(facts)
    yield from _evaluation_data(facts, summary)
    yield from _training_data(facts)
    yield from _results(facts, summary)
    yield "\n## Ethical considerations\n"
    yield "- The photographs and labels come from people. Whether they agreed to this use, those who hold the data must"
    yield "  say. This card holds no photograph, no patient and no file name but the table's."
    yield "- A photograph of an eye can tell who someone is, and their age and sex. A model trained on such photographs"
    yield "  may hold traces of them: share it as carefully as the data."
    yield "- Groups that are rare in the data, or not in it, may be served worse, and nothing here would show it."
    yield "\n## Caveats and recommendations\n"
    yield from (f"- {_text(one.text)}" for one in summary.cautions)
    yield "- An interval is about other patients of the same kind; it does not cover another camera, clinic or grader."
    yield "- The labels are taken as the truth. A photograph that is no fundus photograph gets an answer all the same."
    yield "- Measure it on your own labelled photographs before relying on any number here:"
    yield "  `eyetune evaluate RUN --data NAME=TABLE`."
    yield "\n## How to get started with the model\n"
    yield '```python\nimport eyetune as et\n\nrun = et.load_run("RUN")'
    said = "numbers" if facts.task == "regression" else "probabilities"
    shape = "[2], in the units of the table" if facts.task == "regression" else "[2, K], in the order of run.classes"
    yield f'{said} = run.predict(["a.jpg", "b.jpg"])  # float64{shape}\n```'
    yield from _environment(facts)


def _details(facts: Facts) -> Iterator[str]:
    spec, card = facts.spec, facts.card
    yield "\n## Model details\n"
    yield "- **Made by:** whoever trained it; EyeTune does not know them, and names nobody. Ask them, not EyeTune."
    if facts.environment.get("date"):
        yield f"- **Date:** {_text(str(facts.environment['date']))}"
    if card is not None:
        base = f"{spec.title} ({spec.architecture})" if spec else card.backbone
        yield f"- **Base model:** {_text(base)}"
        yield f"- **Adapted by:** {card.adapt.get('kind')}, with EyeTune"
        if "trainable_parameters" in facts.cost:
            whole = facts.cost.get("parameters", 0)
            yield f"- **Parameters trained:** {facts.cost['trainable_parameters']:,} of {whole:,}"
        yield f"- **Input:** colour fundus photographs, {card.pixels} x {card.pixels} pixels after cropping"
        if card.classes:
            names = _text(", ".join(card.classes))
            yield "- **Output:** " + {
                "multilabel": f"a probability of each of {len(card.classes)} labels: {names}",
                "regression": f"a number, {names}, in the units of the table",
            }.get(facts.task, f"probabilities of {len(card.classes)} classes: {names}")
        if is_graded_dr(card.classes):
            yield "  (grades of diabetic retinopathy, 0 none to 4 proliferative)"
    if facts.calibration is not None:
        yield f"- **Calibration:** {_text(calibration_words(facts.calibration))}"
    if spec is not None:
        yield f"- **Licence of the base weights:** {_text(spec.licence)}. It holds for what was adapted from them, too."
        yield f"- **Source of the base weights:** {_text(spec.source)}"
    yield "- **Cite:** the base model, and EyeTune by its name and version."


def _use() -> Iterator[str]:
    yield "\n## Intended use\n"
    yield "- **Primary intended uses:** research on colour fundus photographs like those it was trained and tested on."
    yield "- **Primary intended users:** eye researchers and engineers who can check its answers."
    yield "- **Out of scope:** care of patients: screening, diagnosis, triage, or telling patients anything. Other"
    yield "  images than colour fundus photographs. Cameras and populations that were not measured."


def _factors(facts: Facts) -> Iterator[str]:
    yield "\n## Factors\n"
    yield "- **Relevant:** camera and field of view, pupil and image quality, age, sex, ethnicity, other eye disease,"
    yield "  how common the disease is, and who graded it."
    columns = dict.fromkeys(column for found in facts.datasets.values() for column in found.subgroups)
    measured = _text(", ".join(columns)) if columns else "none of them: `eyetune evaluate RUN --by COLUMN` does"
    yield f"- **Measured here, group by group:** {measured}."
    names = _text(", ".join(facts.outside)) or "none: `eyetune evaluate RUN --data NAME=TABLE` does"
    yield f"- **Measured on outside datasets:** {names}."


def _metrics(facts: Facts) -> Iterator[str]:
    yield "\n## Metrics\n"
    yield from (f"- **{label(name)}**: {meaning(name)}" for name in (*facts.headline, "interval"))
    scored = [part for found in facts.datasets.values() for part in (found, *found.per_label.values())]
    points = [point for part in scored for point in part.operating_points]
    if points:
        chosen = {(point.chosen_on, point.name): point for point in points if point.threshold is not None}
        for sample in dict.fromkeys(sample for sample, _ in chosen):
            where = "the validation split" if sample == VAL else f"the labelled sample “{_text(sample)}”"
            yield f"- **Decision thresholds** chosen on {where}:"
            mine = [one for (of, _), one in chosen.items() if of == sample]
            yield from (f"  - {_text(one.name)}: probability at least {one.threshold:.3f}" for one in mine)
    else:
        yield f"- **Decision thresholds:** {_WITHOUT_THRESHOLD[facts.task]}"


def _evaluation_data(facts: Facts, summary: Summary) -> Iterator[str]:
    yield "\n## Evaluation data\n"
    yield _text(summary.whom)
    yield "\n| dataset | photographs | patients |\n|---|---|---|"
    for name, found in facts.datasets.items():
        if name != VAL:
            yield f"| {_text(name)} | {found.n} | {found.patients or 'not known'} |"
    yield "\nThe test split shows what holds for other patients of the same kind, outside datasets what another camera"
    yield "or clinic costs. Photographs are cropped and made square as in training; none is augmented."
    for name, found in facts.datasets.items():
        if found.label_map:
            pairs = ", ".join(
                f"{theirs} " + ("left out" if ours is None else f"read as {ours}")
                for theirs, ours in found.label_map.items()
            )
            yield f"\nLabels of {_text(name)}: {_text(pairs)}."


def _training_data(facts: Facts) -> Iterator[str]:
    yield "\n## Training data\n"
    yield f"From {_text(table_name(facts))}" + (
        f", {facts.data['rows']:,} photographs in the table." if isinstance(facts.data.get("rows"), int) else "."
    )
    yield "\n| split | photographs | patients |" + "".join(f" {_text(name)} |" for name in facts.classes)
    yield "|---|---|---|" + "---|" * len(facts.classes)
    for part in facts.parts():
        counts = "".join(f" {part.classes.get(name, 0)} |" for name in facts.classes)
        yield f"| {part.name} | {part.images} | {part.patients or 'not known'} |{counts}"
    for entry in facts.data.get("left_out", []):
        yield f"\n{plural(entry['images'], 'photograph')} left out: {_text(str(entry['why']))}."
    yield "\n### Training procedure\n"
    if facts.config is not None:
        settings = facts.config.train.model_dump(mode="json") | {"lr": facts.config.learning_rate}
        yield from (f"- {name}: {_text(str(value))}" for name, value in settings.items() if value is not None)
    if facts.card is not None:
        yield "- strategy: " + _text(", ".join(f"{name} {value}" for name, value in facts.card.adapt.items()))
        epochs = len(facts.history) or "an unknown number"
        yield f"- epoch kept: {facts.card.epoch + 1} of {epochs}, chosen on validation"


def _results(facts: Facts, summary: Summary) -> Iterator[str]:
    yield "\n## Quantitative analyses\n"
    yield "Scores with their 95 % interval, from resampling patients (photographs where no patient is known)."
    names = [name for name in facts.datasets if name != VAL]
    yield "\n### Unitary results\n"
    yield "| metric |" + "".join(f" {_text(name)} |" for name in names)
    yield "|---|" + "---|" * len(names)
    for metric in facts.headline:
        yield f"| {label(metric)} |" + "".join(f" {_entry(facts.score(name, metric))} |" for name in names)
    yield ""
    yield from (f"- {_text(line)}" for line in (*summary.good, summary.sure, *summary.elsewhere))
    yield "\n### Intersectional results\n"
    none = True
    for name in names:
        for column, groups in facts.metrics.datasets[name].subgroups.items():
            known = {metric for group in groups.groups.values() for metric in group.metrics}
            for metric in [one for one in (facts.primary, "balanced_accuracy", "accuracy") if one in known][:1]:
                none = False
                yield f"By {_text(column)}, {_text(name)}, {label(metric)}:\n"
                yield from (
                    f"- {_text(value)} ({plural(group.n, 'photograph')}): {_entry(group.metrics.get(metric, Score()))}"
                    for value, group in groups.groups.items()
                )
                yield ""
    if none:
        yield "Not measured: no group was scored on its own, and no two factors together."


def _environment(facts: Facts) -> Iterator[str]:
    yield "\n## Technical specifications\n"
    seconds = facts.cost.get("seconds")
    spent = f"{seconds / 60:.1f} minutes in all" if isinstance(seconds, (int, float)) else "time not recorded"
    yield f"- hardware: {_text(str(facts.environment.get('device', 'not recorded')))}; {spent}"
    versions = ", ".join(f"{name} {version}" for name, version in facts.environment.get("versions", {}).items())
    yield f"- {_text(versions) or 'versions not recorded'}"
    if facts.environment.get("commit"):
        yield f"- commit {_text(str(facts.environment['commit']))}"
    if facts.load_report.get("sha256"):
        yield f"- base weights, SHA-256 {_text(str(facts.load_report['sha256']))}"


def _entry(score: Score) -> str:
    if score.value is None:
        return "–"
    low, high = score.ci
    return f"{score.value:.3f}" + ("" if low is None or high is None else f" ({low:.3f} to {high:.3f})")


def _plain(text: str) -> str:
    """One line without control characters."""
    return " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())


def _text(text: str) -> str:
    """`text` as Markdown that means itself: no HTML, no links, no emphasis from a hostile name."""
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", _plain(text))
