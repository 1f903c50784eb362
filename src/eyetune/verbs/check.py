"""`eyetune check …`: would this configuration learn, fit, and keep the device busy? Pass or fail, why, what to do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from eyetune.config import Config
from eyetune.errors import ConfigError, UserError
from eyetune.flags import parse

if TYPE_CHECKING:
    from eyetune.checks.subject import Subject
    from eyetune.findings import Finding, Report

PROBLEMS_FOUND = 1

Words = Annotated[str, Parameter(allow_leading_hyphen=True, show=False)]

_EPILOGUE = """\
CONFIG.yaml and flags are those of eyetune finetune (see eyetune finetune --help); flags win.
--out DIR takes the report and the pictures. Not given: the run folder of the configuration with -check behind its name.
Exit code: 0 nothing failed, 1 something did, 2 the configuration or the data cannot be read."""


def _app(name: str, words: str, more: str = "") -> App:
    return App(
        name=name,
        help_format="plaintext",
        help_epilogue=f"{more}\n{_EPILOGUE}".strip(),
        usage=f"Usage: eyetune check {name} [CONFIG.yaml] [--section.field VALUE]... {words}[--out DIR]",
    )


app = App(name="check")
_model = _app("model", "[--steps N] ", "--steps N: steps to overfit one batch in (100; 300 on frozen features).")
_memory = _app(
    "memory", "[--steps N] ", "--steps N: steps to look for growing memory in (100, or as many as a minute takes)."
)
_data = _app("data", "")
_loader = _app("loader", "[--seconds N] ", "--seconds N: how long each setting is watched (3).")
for _each in (_model, _memory, _data, _loader):
    app.command(_each)


@_model.default
def model(*words: Words) -> int:
    """Does it learn? First loss, gradients, overfitting, accumulation, eval mode, reload, merge, seed, precision.

    Trains a few steps on a few of your training images, on the device and with the strategy of the configuration.
    Writes model.json and model-gradients.png.
    """
    from eyetune.checks.model import check_model
    from eyetune.train.answers import answer_to
    from eyetune.verbs.finetune import model_card

    asked = _read(words, {"steps": 1})
    subject = _subject(asked.config)
    answer = answer_to(asked.config.asked, subject.manifest.classes).learnt_from(subject.manifest.select("train"))
    report = check_model(
        subject,
        asked.out,
        partial(model_card, asked.config, answer),
        steps=asked.numbers.get("steps"),
        say=_say,
        start=_start("model"),
    )
    return _finish(report, asked.out)


@_memory.default
def memory(*words: Words) -> int:
    """What fits? Peak memory by batch size, the largest batch that fits, and whether memory grows over 100 steps.

    Takes training steps with batches of noise, with and without gradient checkpointing. On a GPU every size is tried;
    on the CPU small ones are measured, in a process of their own, and the rest follows from the slope.
    Writes memory.json and memory.png.
    """
    from eyetune.checks.memory import check_memory
    from eyetune.terminal import show

    asked = _read(words, {"steps": 5})
    report, table = check_memory(
        _subject(asked.config), asked.out, steps=asked.numbers.get("steps"), say=_say, start=_start("memory")
    )
    show(table, "* train.batch_size; ~ predicted from the slope")
    return _finish(report, asked.out)


@_data.default
def data(*words: Words) -> int:
    """Is the data sound? Unreadable files, class balance, splits, patients and identical files across splits, sizes.

    Decodes every image once, as a run would (and keeps it in the cache for that run). Needs no network and no weights.
    Writes data.json, data-classes.png and data-batches.png: what the network sees, prepared and augmented.
    """
    from eyetune.checks.data import check_data
    from eyetune.verbs.finetune import check_settings

    asked = _read(words, {})
    check_settings(asked.config)
    return _finish(check_data(asked.config, asked.out, say=_say, start=_start("data")), asked.out)


@_loader.default
def loader(*words: Words) -> int:
    """What is slow? Images a second from the loader against the step's need, by workers, prefetch and pinning.

    Times the training step, the loader with 0, 1, 2, 4, … processes (from the cache, and decoding), and every operation
    on an image. Writes loader.json and loader.png.
    """
    from eyetune.checks.loader import check_loader
    from eyetune.terminal import show

    asked = _read(words, {"seconds": 1})
    report, tables = check_loader(
        _subject(asked.config), asked.out, seconds=asked.numbers.get("seconds"), say=_say, start=_start("loader")
    )
    show(tables[0], "* the configuration's number of workers\n", tables[1])
    return _finish(report, asked.out)


class _Asked:
    """A command line: the configuration, where the report goes, and the check's own numbers."""

    def __init__(self, config: Config, out: Path, numbers: dict[str, int]) -> None:
        self.config = config
        self.out = out
        self.numbers = numbers


def _read(words: Sequence[str], numbers: dict[str, int]) -> _Asked:
    """Read a command line.

    Args:
        words: as typed.
        numbers: the check's own options, each with the least it may be.

    Raises ConfigError for everything that is wrong with it.
    """
    given = parse(words)
    overrides = dict(given.overrides)
    out = overrides.pop("out", None)
    found: dict[str, int] = {}
    for name, least in numbers.items():
        if name in overrides:
            value: Any = overrides.pop(name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"--{name} must be a whole number of at least {least}, got {value!r}.")
            found[name] = value
    if given.positional is None and not overrides:
        raise ConfigError("nothing to check: name a CONFIG.yaml, or at least --data.table TABLE. See --help.")
    config = Config.from_yaml(given.positional, overrides)
    folder = config.out.with_name(f"{config.out.name}-check") if out is None else Path(str(out)).expanduser()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: choose another --out for the report.")
    if (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is a run folder: choose another --out for the report.")
    return _Asked(config, folder, found)


def _subject(config: Config) -> Subject:
    """The configuration with its photographs (not decoded yet) and its model. Raises as `finetune` would."""
    from eyetune.checks.subject import Subject
    from eyetune.data.records import open_manifest
    from eyetune.data.splits import split_configured
    from eyetune.runtime import Runtime
    from eyetune.verbs.finetune import build_model, check_settings

    if Runtime(config.device, config.precision, config.seed).processes > 1:
        raise UserError("check looks at one process: run it without torchrun or accelerate launch.")
    check_settings(config)
    manifest = split_configured(open_manifest(config.data, kind=config.reads), config.data, config.split_seed)
    manifest.check_trainable()
    return Subject(config, manifest, partial(build_model, config, manifest.classes))


def _start(name: str) -> Callable[[str], None]:
    return lambda line: print(f"check {name}: {line}", flush=True)


def _say(finding: Finding) -> None:
    from eyetune.findings import lines

    print("\n".join(lines(finding)), flush=True)


def _finish(report: Report, folder: Path) -> int:
    """Write the report, say where it is and how it ended; the exit code."""
    file = report.write(folder)
    failed = [finding.name for finding in report.findings if finding.status == "FAIL"]
    verdict = "passed" if report.passed else f"FAILED: {', '.join(failed)}"
    print(f"check {report.check} {verdict}. {', '.join(str(path) for path in (file, *report.pictures))}")
    return 0 if report.passed else PROBLEMS_FOUND
