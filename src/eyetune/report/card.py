"""The model card: what a colleague who is given the model has to know, under the headings that are usual for it.

Headings as on Hugging Face, after Mitchell et al. 2019, "Model Cards for Model Reporting"; the front matter is what
their hub reads. It holds no photograph, no name of a file but the table's, and nothing of a patient.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from eyetune.files import write_text
from eyetune.metrics.scores import is_graded_dr
from eyetune.report.content import Score
from eyetune.report.facts import VAL, Facts
from eyetune.report.glossary import label, meaning
from eyetune.report.words import Summary, plural, summarise, table_name, title

#: Licences by the words of the backbones, as the hub spells them; any other is "other", with its words.
_LICENCES = {"apache-2.0": "apache-2.0", "cc by-nc 4.0": "cc-by-nc-4.0", "mit": "mit", "cc by 4.0": "cc-by-4.0"}


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
        "pipeline_tag": "image-classification",
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
        "task": {"type": "image-classification"},
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
    yield _text(summary.asked) + "\n"
    yield from _details(facts)
    yield "\n## Uses\n\n### Direct use\n"
    yield "Research on colour fundus photographs like those it was trained and tested on."
    yield "\n### Out-of-scope use\n"
    yield "- Care of patients: screening, diagnosis, triage, or telling patients anything."
    yield "- Other images than colour fundus photographs; other cameras or populations than those below, unmeasured."
    yield "\n## Bias, risks and limitations\n"
    yield from (f"- {_text(one.text)}" for one in summary.cautions)
    yield "- An interval is about other patients of the same kind; it does not cover another camera, clinic or grader."
    yield "- The labels are taken as the truth. A photograph that is no fundus photograph gets an answer all the same."
    yield "\n### Recommendations\n\nMeasure it on your own labelled photographs before relying on any number here:"
    yield "`eyetune evaluate RUN --data NAME=TABLE`."
    yield "\n## How to get started with the model\n"
    yield '```python\nimport eyetune as et\n\nrun = et.load_run("RUN")'
    yield 'probabilities = run.predict(["a.jpg", "b.jpg"])  # float64[2, K], in the order of run.classes\n```'
    yield from _training(facts)
    yield from _evaluation(facts, summary)
    yield from _environment(facts)
    yield "\n## Citation\n\nCite the base model, and EyeTune by its name and version."
    yield "\n## Glossary\n"
    yield from (f"- **{label(name)}**: {meaning(name)}" for name in (*facts.headline, "interval"))
    yield "\n## Model card contact\n"
    yield "Whoever trained the model: EyeTune does not know them, and this card names nobody."


def _details(facts: Facts) -> Iterator[str]:
    spec, card = facts.spec, facts.card
    yield "## Model details\n"
    if card is not None:
        base = f"{spec.title} ({spec.architecture})" if spec else card.backbone
        yield f"- **Base model:** {_text(base)}"
        yield f"- **Adapted by:** {card.adapt.get('kind')}, with EyeTune"
        yield f"- **Input:** colour fundus photographs, {card.pixels} x {card.pixels} pixels after cropping"
        yield f"- **Output:** probabilities of {len(card.classes)} classes: {_text(', '.join(card.classes))}"
        if is_graded_dr(card.classes):
            yield "  (grades of diabetic retinopathy, 0 none to 4 proliferative)"
    if spec is not None:
        yield f"- **Licence of the base weights:** {_text(spec.licence)}. It holds for what was adapted from them, too."
        yield f"- **Source of the base weights:** {_text(spec.source)}"


def _training(facts: Facts) -> Iterator[str]:
    yield "\n## Training details\n\n### Training data\n"
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
    if "trainable_parameters" in facts.cost:
        yield f"- parameters trained: {facts.cost['trainable_parameters']:,} of {facts.cost.get('parameters', 0):,}"


def _evaluation(facts: Facts, summary: Summary) -> Iterator[str]:
    yield "\n## Evaluation\n\n### Testing data, factors and metrics\n"
    yield f"{_text(summary.whom)} Scores with their 95 % interval, from resampling patients (photographs where no"
    yield "patient is known)."
    names = [name for name in facts.datasets if name != VAL]
    yield "\n### Results\n"
    yield "| metric |" + "".join(f" {_text(name)} |" for name in names)
    yield "|---|" + "---|" * len(names)
    for metric in facts.headline:
        yield f"| {label(metric)} |" + "".join(f" {_entry(facts.score(name, metric))} |" for name in names)
    for name in names:
        found = facts.metrics.datasets[name]
        for column, groups in found.subgroups.items():
            known = {metric for group in groups.groups.values() for metric in group.metrics}
            for metric in [one for one in (facts.primary, "balanced_accuracy", "accuracy") if one in known][:1]:
                yield f"\nBy {_text(column)}, {_text(name)}, {label(metric)}:\n"
                yield from (
                    f"- {_text(value)} ({group.n}): {_entry(group.metrics.get(metric, Score()))}"
                    for value, group in groups.groups.items()
                )
    yield "\n### Summary\n"
    yield from (f"- {_text(line)}" for line in (*summary.good, summary.sure, *summary.elsewhere))


def _environment(facts: Facts) -> Iterator[str]:
    yield "\n## Environmental impact\n"
    seconds = facts.cost.get("seconds")
    spent = f"{seconds / 60:.1f} minutes in all" if isinstance(seconds, (int, float)) else "time not recorded"
    yield f"- **Hardware:** {_text(str(facts.environment.get('device', 'not recorded')))}\n- **Time used:** {spent}"
    yield "\n## Technical specifications\n"
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
