"""The verbs of the command line. Each is imported when it is called, so that every `--help` answers at once."""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from cyclopts import App, CycloptsError

from eyetune import __version__, processes
from eyetune.errors import UserError
from eyetune.files import WRITING_ERRORS, writing_failed
from eyetune.interrupt import Interrupted, heeded

INTERRUPTED = 130
TERMINATED = 143

app = App(
    name="eyetune",
    version=__version__,
    suppress_keyboard_interrupt=False,  # `main` says what was kept
    help="Adapt retinal foundation models to your own fundus photographs, and learn how good the result is. "
    "For research; not a medical device.",
    help_epilogue="Every verb: --help; --traceback shows where an error arose. Start with: eyetune demo",
)
app.command("eyetune.verbs.demo:command", name="demo", help="The whole way on built-in synthetic eyes, offline.")
app.command("eyetune.verbs.finetune:app", name="finetune", help="Train, choose the best epoch, score the test split.")
app.command("eyetune.verbs.evaluate:command", name="evaluate", help="Score one run on one or more datasets.")
app.command(
    "eyetune.verbs.calibrate:command", name="calibrate", help="Probabilities for a new site, from a labelled sample."
)
app.command(
    "eyetune.verbs.compare:app", name="compare", help="Strategies, backbones, seeds: one table, and what differs."
)
app.command("eyetune.verbs.search:app", name="search", help="The best settings, by Optuna, judged on validation.")
app.command("eyetune.verbs.embed:command", name="embed", help="Features of every image, for probes and retrieval.")
app.command("eyetune.verbs.predict:command", name="predict", help="Files, folders or tables in; one row an image out.")
app.command(
    "eyetune.verbs.serve:command", name="serve", help="A page on this machine: drop photographs, see what comes."
)
app.command("eyetune.verbs.export:command", name="export", help="A run for others: for PEFT, timm or ONNX Runtime.")
app.command("eyetune.verbs.report:command", name="report", help="One HTML page a run, and its model card.")
app.command("eyetune.verbs.check:app", name="check", help="Does it learn, what fits, what is slow, is the data sound?")

data = App(name="data", help="Before training: audit, splits, synthetic eyes, DICOM headers, the image cache.")
data.command(
    "eyetune.verbs.audit:audit", name="audit", help="What in photographs and tables would make a result wrong."
)
data.command("eyetune.verbs.audit:split", name="split", help="Splits that keep patients and copies together.")
data.command("eyetune.verbs.data:synth", name="synth", help="Draw a cohort of synthetic eyes with true labels.")
data.command("eyetune.verbs.data:table", name="table", help="List photographs, with patient, eye and date from DICOM.")
data.command("eyetune.verbs.data:cache", name="cache", help="Prepare photographs in advance; show or clear the cache.")
app.command(data)

clip = App(name="clip", help="Image-text models: both eyes of a patient and the report about them.")
clip.command(
    "eyetune.verbs.clip_prepare:command", name="prepare", help="Photographs and texts to pairs, in RET-CLIP's layout."
)
clip.command("eyetune.verbs.clip_demo:command", name="demo", help="The whole way on built-in eyes and captions.")
clip.command("eyetune.verbs.clip_train:app", name="train", help="Contrast eyes and texts; score retrieval.")
clip.command(
    "eyetune.verbs.clip_retrieve:command", name="retrieve", help="How well photographs and texts find each other."
)
clip.command("eyetune.verbs.clip_search:command", name="search", help="Photographs by words, or by an example.")
clip.command("eyetune.verbs.clip_zeroshot:command", name="zeroshot", help="Classes in words, or by a few photographs.")
app.command(clip)

models = App(name="models", help="The backbones, and what is inside a weights file.")
models.command("eyetune.verbs.models:list_models", name="list", help="Every backbone: size, pixels, licence, source.")
models.command("eyetune.verbs.models:inspect", name="inspect", help="Which family a file is, and what would load.")
app.command(models)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code.

    0; 1: a check found problems; 2: the user can mend it; 130 and 143: ended by Ctrl-C or SIGTERM.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    processes.quieten()
    show_traceback = "--traceback" in words
    words = [word for word in words if word != "--traceback"]
    try:
        with heeded():
            result = app(words, exit_on_error=False, print_error=False, result_action="return_value")
            processes.part()
    except (UserError, CycloptsError) as error:
        return _say(error, error.exit_code if isinstance(error, UserError) else UserError.exit_code, show_traceback)
    except ModuleNotFoundError as error:
        # EyeTune without its dependencies, as it is installed where it only predicts with exported models.
        if error.name is None or error.name.partition(".")[0] == "eyetune":
            raise
        said = (
            f"this needs {error.name}, which is not installed: pip install eyetune (docs/export.md says what does not)"
        )
        return _say(UserError(said), UserError.exit_code, show_traceback)
    except OSError as error:
        if error.errno not in WRITING_ERRORS:
            raise
        return _say(writing_failed(Path(error.filename or "the output"), error), UserError.exit_code, show_traceback)
    except KeyboardInterrupt as interrupt:
        ended = isinstance(interrupt, Interrupted) and interrupt.signum == signal.SIGTERM
        said = f"\neyetune: interrupted. {interrupt}".rstrip()
        return processes.fail(said, TERMINATED if ended else INTERRUPTED)
    except Exception as error:
        code = processes.crash(error)
        if code is None:
            raise
        return code
    return result if isinstance(result, int) else 0


def _say(error: Exception, exit_code: int, show_traceback: bool) -> int:
    if show_traceback:
        traceback.print_exception(error)
    return processes.fail(f"eyetune: {str(error).strip()}", exit_code)
