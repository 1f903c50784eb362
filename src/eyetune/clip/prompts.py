"""Classes in words: what a model that reads is asked, class by class, without a single labelled photograph.

Each class has one phrase or several, put into every template; the class is the mean of what the model makes of all of
them (Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021, section
3.1.4). Phrases that name the findings help models that were trained on descriptions (Silva-Rodríguez et al., "A
Foundation Language-Image Model of the Retina", Medical Image Analysis 99, 2025).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from eyetune.errors import ConfigError, DataError, did_you_mean, listing, plural

if TYPE_CHECKING:
    from torch import Tensor

    from eyetune.clip.features import By
    from eyetune.clip.run import ClipRun

FIELDS = ("title", "source", "ordered", "templates", "classes")

PLACE = "{}"
"""Where in a template the phrase goes."""


@dataclass(frozen=True)
class Prompts:
    """The classes of a question, in words.

    Args:
        name: the shipped set, or the file.
        title: what is asked, for people.
        source: where the wording comes from.
        ordered: a later class is a worse one.
        templates: sentences with {} where the phrase goes.
        classes: class name -> its phrases; the order is that of the logits.
    """

    name: str
    title: str
    source: str
    ordered: bool
    templates: tuple[str, ...]
    classes: Mapping[str, tuple[str, ...]]

    def texts(self, name: str) -> list[str]:
        """Every sentence of a class."""
        return [template.replace(PLACE, phrase) for template in self.templates for phrase in self.classes[name]]

    def check(self, run: ClipRun) -> None:
        """Raise DataError where `run` cannot read the sentences: too long, or in another language."""
        texts = {text: name for name in self.classes for text in self.texts(name)}
        check_texts(run, list(texts), f"--prompts {self.name}", self._other(run))

    def _other(self, run: ClipRun) -> str:
        """The shipped set of the same question in the language of the run's vocabulary, as advice."""
        other = self.name.removesuffix("-zh") if self.name.endswith("-zh") else f"{self.name}-zh"
        return f" Its own language may be that of --prompts {other}." if other in shipped() else ""


def check_texts(run: ClipRun, texts: list[str], where: str, advice: str = "") -> None:
    """Raise DataError, calling them `where`, for texts that are empty, too long for `run`, or not in its language."""
    if any(not text.strip() for text in texts):
        raise DataError(f"{where}: the text is empty. Say what to look for.")
    coverage = run.tokenizer.coverage(texts, run.length)
    if coverage.longest > run.length:
        long = [text for text in texts if run.tokenizer.coverage([text], run.length).longest > run.length]
        raise DataError(
            f"{where}: {plural(len(long), 'text')} longer than the {run.length} tokens that {run.path} reads; the end "
            f"would be cut off. Shorten:\n{listing(text[:100] for text in long)}"
        )
    if fault := coverage.fault():
        raise DataError(f"{where}: {fault}{advice}")


def shipped() -> list[str]:
    """The names of the sets that come with EyeTune."""
    folder = resources.files("eyetune.clip") / "prompt_sets"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def read_prompts(word: str) -> Prompts:
    """A shipped set by its name, or a YAML file. Raises ConfigError, all faults together."""
    names = shipped()
    if word in names:
        text, where = (resources.files("eyetune.clip") / "prompt_sets" / f"{word}.yaml").read_text("utf-8"), word
    else:
        path = Path(word)
        if not path.is_file():
            raise ConfigError(
                f"--prompts {word}: neither a file nor a shipped set.{did_you_mean(word, names)} Sets: "
                f"{', '.join(names)}."
            )
        where = str(path)
        try:
            text = path.read_text("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--prompts {where}: cannot be read as text ({error}).") from None
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"--prompts {where}: not YAML ({' '.join(str(error).split())}).") from None
    if not isinstance(content, Mapping):
        raise ConfigError(f"--prompts {where}: a mapping with `classes` and `templates` is expected.")
    faults = _faults(content)
    if faults:
        raise ConfigError(f"--prompts {where}: {len(faults)} faults.\n{listing(faults, 10)}")
    classes = {str(name): _phrases(phrases) for name, phrases in content["classes"].items()}
    return Prompts(
        name=where,
        title=str(content.get("title", where)),
        source=str(content.get("source", "")),
        ordered=bool(content.get("ordered", False)),
        templates=_phrases(content.get("templates", [PLACE])),
        classes=classes,
    )


def _phrases(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _faults(content: Mapping[Any, Any]) -> list[str]:
    """What is wrong with a file's content, one sentence each."""
    faults = [f"{key}: no such field.{did_you_mean(str(key), FIELDS)}" for key in content if key not in FIELDS]
    if not isinstance(content.get("ordered", False), bool):
        faults.append("ordered: true or false")
    faults += _text_faults("templates", content.get("templates", [PLACE]))
    for template in _strings(content.get("templates", [PLACE])):
        if template.strip() and template.count(PLACE) != 1:
            faults.append(f"templates: {template[:60]!r} needs {PLACE} once, where the class goes")
    classes = content.get("classes")
    if not isinstance(classes, Mapping) or len(classes) < 2:
        return [*faults, "classes: a mapping of two classes or more, each with its phrases"]
    for name, phrases in classes.items():
        if isinstance(name, bool):
            faults.append("classes: YAML reads no, yes, on and off as truth values; put quotes around such a name")
        elif not isinstance(name, (str, int)) or not str(name).strip():
            faults.append(f"classes: {name!r} is no name of a class")
        faults += _text_faults(f"classes.{name}", phrases)
    if len({str(name) for name in classes}) < len(classes):
        faults.append("classes: one class is named twice")
    return faults


def _strings(value: Any) -> list[str]:
    return [one for one in ([value] if isinstance(value, str) else value or []) if isinstance(one, str)]


def _text_faults(where: str, value: Any) -> list[str]:
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not value:
        return [f"{where}: a text or a list of texts is needed"]
    if any(not isinstance(one, str) for one in value):
        return [f"{where}: {next(one for one in value if not isinstance(one, str))!r} is no text; put quotes around it"]
    return [f"{where}: an empty text"] if any(not one.strip() for one in value) else []


def class_vectors(run: ClipRun, prompts: Prompts, by: By = "patient") -> Tensor:
    """float32[K, D], unit length: each class as the mean of all its sentences. Raises as :meth:`Prompts.check`."""
    import torch

    from eyetune.clip.features import SPACES, embed_texts

    prompts.check(run)
    sentences = [prompts.texts(name) for name in prompts.classes]
    vectors = embed_texts(run, [text for texts in sentences for text in texts])[SPACES[by][1]]
    means = [part.mean(dim=0) for part in vectors.split([len(texts) for texts in sentences])]
    return torch.nn.functional.normalize(torch.stack(means), dim=1)
