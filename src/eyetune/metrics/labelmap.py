"""Labels of another dataset in the classes of a run: said by the user, checked, and kept with the scores.

Two maps meet here. *Theirs* says what each of the dataset's labels means (`null`: leave those images out). *Ours*,
where the dataset has fewer classes than the run, says which of the run's classes count as one: their probabilities are
added up, as classes exclude each other. Nothing is guessed: a label the map does not name is refused.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from eyetune.errors import ConfigError, DataError, did_you_mean, listing
from eyetune.metrics.scores import REFERABLE_GRADE, is_graded_dr

if TYPE_CHECKING:
    from eyetune.data.records import Manifest
    from eyetune.metrics.predictions import Predictions

AS_IS = "as-is"
"""The word that confirms that equal labels mean the same."""

PRESETS = {
    "referable": (REFERABLE_GRADE, ("not referable", "referable")),
    "any-dr": (1, ("no DR", "any DR")),
}
"""Word -> (the first grade of the upper class, the two classes). Referable: moderate retinopathy or worse."""

YES_OR_NO = tuple(classes for _, classes in PRESETS.values())
"""The pairs of classes that merging makes; the second is the worse one."""

#: What a column's name says of the disease it grades; two that differ are not the same question.
_DISEASES = {
    "macular oedema": r"dme|csme|macul\w* (o?edema)|(o?edema)",
    "diabetic retinopathy": r"dr|retinopathy|diabetic|icdr",
    "glaucoma": r"glauc\w*|gon",
    "macular degeneration": r"amd|armd|macular degeneration",
    "cataract": r"cataract\w*",
    "myopia": r"myop\w*",
    "hypertension": r"hypertens\w*|htn",
}


@dataclass(frozen=True)
class LabelMap:
    """What the labels of one dataset mean.

    Args:
        theirs: the dataset's label -> one of `classes`; None leaves its images out.
        ours: each of the run's classes -> one of `classes`; None: the run's classes as they are.
        classes: what both end in, in order.
        stated: the user gave it; False for one that follows from equal names.
        typed: the user wrote what each label means; False where labels are the run's own by name.
    """

    theirs: Mapping[str, str | None]
    ours: Mapping[str, str] | None
    classes: tuple[str, ...]
    stated: bool = True
    typed: bool = True

    def apply(self, manifest: Manifest) -> Manifest:
        """The photographs whose label has a meaning, with labels that index :attr:`classes`.

        Raises DataError for labels that the map does not name, all together, and when nothing is left.
        """
        counts = Counter(manifest.classes[label] for label in manifest.labels if label is not None)
        check_named(counts, self.theirs, manifest.source, self.classes)
        if self.ours is not None and not self.typed and set(counts) == {"0", "1"}:
            no, yes = self.classes[0], self.classes[-1]
            raise DataError(
                f"{manifest.source}: its labels are only 0 and 1. Are they grades, or no and yes? Write it out: "
                f'"…,0:{no},1:{yes}" for the latter.'
            )
        place = {name: index for index, name in enumerate(self.classes)}
        records = []
        for record in manifest:
            meant = None if record.label is None else self.theirs[manifest.classes[record.label]]
            if record.label is None or meant is not None:
                records.append(replace(record, label=None if meant is None else place[meant]))
        if not any(record.label is not None for record in records):
            raise DataError(f"{manifest.source}: its label map leaves no image.")
        dropped = [f"{count} of {name!r}" for name, count in counts.items() if self.theirs[name] is None]
        if dropped:
            manifest = manifest.without(
                "left out by the label map", records, f"left out by the label map: {', '.join(dropped)}"
            )
        return replace(manifest, records=tuple(records), classes=self.classes)

    def merge(self, predictions: Predictions) -> Predictions:
        """The same table in :attr:`classes`: probabilities of the run's classes added up where `ours` joins them.

        What is not known stays unknown; targets and calls are translated too.
        """
        import numpy as np

        if self.ours is None:
            return predictions
        place = np.array([self.classes.index(self.ours[name]) for name in predictions.classes])
        shares = np.zeros((len(predictions), len(self.classes)))
        np.add.at(shares.T, place, predictions.probabilities.T)
        changes: dict[str, Any] = {
            "logits": np.log(np.clip(shares, np.finfo(np.float64).tiny, 1.0)),
            "targets": np.where(predictions.targets < 0, predictions.targets, place[predictions.targets]),
            "classes": self.classes,
            "calls": None if predictions.calls is None else place[predictions.calls],
            "ordered": None,
        }
        return replace(predictions, **changes)

    def to_dict(self) -> dict[str, Any]:
        """For metrics.json: `label_map`, and `merged` where classes of the run were joined."""
        found: dict[str, Any] = {"label_map": dict(self.theirs)}
        return found | ({"merged": dict(self.ours)} if self.ours is not None else {})


def merging(classes: Sequence[str], ours: Mapping[str, str]) -> LabelMap:
    """The map that joins a run's `classes` as `ours` says and leaves labels alone: for the run's own datasets.

    Raises DataError when `ours` is not about these classes.
    """
    if set(ours) != set(classes):
        raise DataError(f"a merging of {', '.join(ours)} is not about the classes {', '.join(classes)}.")
    return LabelMap({name: ours[name] for name in classes}, dict(ours), tuple(dict.fromkeys(ours[n] for n in classes)))


def parse(word: str | Mapping[str, Any], classes: Sequence[str], where: str = "--map") -> LabelMap:
    """The map that a user gave for a run with these `classes`.

    Args:
        word: `as-is`; `referable` or `any-dr`; pairs `theirs:ours,theirs:ours` (`null` leaves out), also after such a
            word; a YAML file; or the mapping that such a file holds: label -> class, or `theirs:` and `ours:`, the
            latter a mapping from the run's classes or one of the words.
        classes: of the run, in order.
        where: how messages call it.

    Raises ConfigError for anything that does not hold together.
    """
    content = _read(word, where)
    if set(content) <= {"theirs", "ours"} and isinstance(content.get("theirs", {}), Mapping):
        theirs, ours = content.get("theirs", {}), content.get("ours")
    else:
        theirs, ours = content, None
    if ours == AS_IS:
        return LabelMap({name: name for name in classes}, None, tuple(classes))
    merged = None if ours is None else _ours(ours, tuple(classes), where)
    final = tuple(classes) if merged is None else tuple(dict.fromkeys(merged[name] for name in classes))
    if len(final) < 2:
        raise ConfigError(f"{where}: it joins all classes of the run into one; two or more must be left.")
    # A label that the map does not name, but the run does, means itself only when the user wrote no label at all.
    given = _pairs(theirs, where)
    meant = given or {name: name for name in classes}
    found: dict[str, str | None] = {}
    wrong = []
    for label, target in meant.items():
        inside = merged.get(target, target) if merged is not None and target is not None else target
        if inside is not None and inside not in final:
            wrong.append(f"{label}: {target}{did_you_mean(target or '', [*final, *classes])}")
        found[label] = inside
    if wrong:
        known = ", ".join(dict.fromkeys([*final, *classes]))
        raise ConfigError(
            f"{where}: {len(wrong)} labels are sent to what is no class of the run; there are {known}. To leave images "
            f"out, write null; to join classes of the run, use a word ({', '.join(PRESETS)}) or `ours:` in a file.\n"
            f"{listing(wrong)}"
        )
    return LabelMap(found, merged, final, typed=bool(given))


def unstated(
    manifest: Manifest, classes: Sequence[str], *, name: str, columns: tuple[str | None, str | None] = (None, None)
) -> LabelMap:
    """The map that needs no saying: equal labels mean the same. Refused where they probably do not.

    Args:
        manifest: the dataset, its classes the labels as they stand.
        classes: of the run.
        name: of the dataset, for what to type.
        columns: of the labels: the run's, and the dataset's; None where not known.

    Raises DataError when a label is none of the run's classes; when a run of three or more classes meets labels that
    are only 0 and 1 (a yes-or-no question, perhaps of another disease); and when the two columns name two diseases.
    """
    used = [manifest.classes[index] for index in sorted({label for label in manifest.labels if label is not None})]
    say = f"Say what they mean, as in --map {name}={_example(used, classes)}; or --map {name}={AS_IS} if equal labels "
    say += "mean the same."
    diseases = [_disease(column) for column in columns]
    if None not in diseases and diseases[0] != diseases[1]:
        raise DataError(
            f"{manifest.source}: its labels come from the column {columns[1]!r} ({diseases[1]}), the run learnt "
            f"{columns[0]!r} ({diseases[0]}). {say}"
        )
    if len(classes) > 2 and used == ["0", "1"]:
        raise DataError(
            f"{manifest.source}: its labels are only 0 and 1, the run has {len(classes)} classes "
            f"({', '.join(classes)}): they look like the answers to another question than the run's. {say}"
        )
    found = {label: label for label in used}
    if not set(used) & set(classes) and all(_index(label, classes) is not None for label in used):
        found = {label: classes[int(label)] for label in used}
    else:
        check_named(Counter(used), dict.fromkeys(classes), manifest.source, classes, name)
    return LabelMap(found, None, tuple(classes), stated=False)


def remarks(found: LabelMap) -> list[str]:
    """Warnings on labels whose meaning was taken without being said: numbers read as places among names."""
    if found.stated or all(label == meant for label, meant in found.theirs.items()):
        return []
    pairs = ", ".join(f"{label} = {meant}" for label, meant in found.theirs.items())
    return [f"its labels are numbers where the run has names; they were read as {pairs}. A label map would say so."]


def check_named(
    counts: Mapping[str, int], known: Mapping[str, Any], source: str, classes: Sequence[str], name: str = "NAME"
) -> None:
    """Raise DataError, listing them with their numbers of images, for labels that `known` does not name."""
    unknown = {label: count for label, count in counts.items() if label not in known}
    if not unknown:
        return
    shown = [f"{label!r}{did_you_mean(label, known)}" for label in unknown]
    raise DataError(
        f"{source}: {len(unknown)} of its labels have no meaning for the run, whose classes are {', '.join(classes)}. "
        f"Say it for each with --map {name}=…, as in {_example(list(counts), classes)} (null leaves images out):\n"
        f"{listing(shown, 10)}"
    )


def _example(labels: Sequence[str], classes: Sequence[str]) -> str:
    plain = [label for label in labels if not re.search(r"[:,]", label)][:2] or ["their label"]
    pairs = [f"{label}:{classes[min(index, len(classes) - 1)]}" for index, label in enumerate(plain)]
    return f'"{",".join(pairs)}"'


def _index(label: str, classes: Sequence[str]) -> int | None:
    return int(label) if re.fullmatch(r"\d{1,6}", label) and int(label) < len(classes) else None


def _disease(column: str | None) -> str | None:
    words = re.sub(r"[^a-z]+", " ", (column or "").lower())
    return next((name for name, pattern in _DISEASES.items() if re.search(rf"\b(?:{pattern})\b", words)), None)


def _read(word: str | Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """A map as a mapping, whatever form it was given in."""
    if isinstance(word, Mapping):
        return {str(key): value for key, value in word.items()}
    text = word.strip()
    if text in (*PRESETS, AS_IS):
        return {"ours": text}
    if Path(text).suffix.lower() in (".yaml", ".yml", ".json"):
        return _read_file(Path(text), where)
    head, comma, rest = text.partition(",")
    if head in PRESETS and comma:
        return {"ours": head, "theirs": _inline(rest, where)}
    if ":" not in text:
        known = [*PRESETS, AS_IS]
        raise ConfigError(
            f"{where}: {text!r} is no map.{did_you_mean(text, known)} Write pairs (0:healthy,1:glaucoma), a word "
            f"({', '.join(known)}), or a YAML file."
        )
    return _inline(text, where)


def _inline(text: str, where: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for pair in text.split(","):
        label, colon, meant = (part.strip() for part in pair.partition(":"))
        if not (label and colon and meant) or ":" in meant:
            raise ConfigError(f"{where}: {pair.strip()!r} is not theirs:ours. Labels with , or : need a YAML file.")
        if label in found:
            raise ConfigError(f"{where}: the label {label!r} stands there twice.")
        found[label] = None if meant.lower() in ("null", "~") else meant
    return found


def _read_file(path: Path, where: str) -> Mapping[str, Any]:
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"{where}: no file at {path}.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: cannot read {path} ({error}).") from error
    if len(text) > 1 << 20:
        raise ConfigError(f"{where}: {path} is larger than any label map.")
    try:
        content = yaml.load(text, Loader=_AsText)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: {path} is not YAML: {' '.join(str(error).split())[:200]}.") from error
    if not isinstance(content, Mapping) or not content:
        raise ConfigError(f"{where}: {path} holds no map from labels to classes.")
    return {str(key): value for key, value in content.items()}


class _AsText(yaml.SafeLoader):
    """YAML whose words stay words (a label `no`, `on` or `01` is no truth value and no number), each key once."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - the parser's own attribute
        first: [pair for pair in pairs if pair[0] == "tag:yaml.org,2002:null"]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As the parser does, but a key that stands twice is a fault."""
        keys = [str(getattr(key, "value", key)) for key, _ in node.value]
        if twice := next((key for key, count in Counter(keys).items() if count > 1), None):
            raise yaml.MarkedYAMLError(problem=f"{twice!r} stands there twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def _pairs(content: Any, where: str) -> dict[str, str | None]:
    if not isinstance(content, Mapping):
        raise ConfigError(f"{where}: labels must map to classes, label: class.")
    wrong = [f"{key}: {value!r}" for key, value in content.items() if isinstance(value, (Mapping, list, tuple))]
    if wrong:
        raise ConfigError(f"{where}: a label means one class, or null:\n{listing(wrong)}")
    return {str(key): None if value is None else str(value) for key, value in content.items()}


def _ours(word: Any, classes: tuple[str, ...], where: str) -> dict[str, str]:
    """Each of the run's classes -> the class it counts as."""
    if isinstance(word, str):
        if word not in PRESETS:
            raise ConfigError(f"{where}: {word!r} is no way to join classes.{did_you_mean(word, PRESETS)}")
        if not is_graded_dr(classes):
            raise ConfigError(
                f"{where}: {word} joins the five grades of diabetic retinopathy, and the run's classes are "
                f"{', '.join(classes)}."
            )
        first, names = PRESETS[word]
        return {name: names[grade >= first] for grade, name in enumerate(classes)}
    given = _pairs(word, where)
    missing = [name for name in classes if given.get(name) is None]
    extra = [name for name in given if name not in classes]
    if missing or extra:
        raise ConfigError(
            f"{where}: `ours` must say for each class of the run ({', '.join(classes)}) what it counts as."
            + (f" Missing: {', '.join(missing)}." if missing else "")
            + (f" No classes of the run: {', '.join(extra)}.{did_you_mean(extra[0], classes)}" if extra else "")
        )
    return {name: str(given[name]) for name in classes}
