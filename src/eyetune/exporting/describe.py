"""What an export says of itself, for programs (the sheet) and for people (the README beside it)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import ValidationError

from eyetune import __version__
from eyetune.errors import RunError
from eyetune.files import sha256
from eyetune.predicting.sheet import Base, Normalisation, Sheet, Squares

if TYPE_CHECKING:
    from eyetune.train.run import Run

SHEET = "eyetune.json"
"""The sheet, in the folder of an export."""


def sheet_of(run: Run, form: Literal["onnx", "safetensors", "adapter"], **parts: object) -> Sheet:
    """The sheet of a run in another form; `parts` are further fields.

    Raises RunError for a run that a sheet cannot describe: class names with line breaks in them, or whole pages long.
    """
    try:
        return _sheet_of(run, form, parts)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()[:3])
        raise RunError(f"{run.name} cannot be exported: {faults}.") from error


def _sheet_of(run: Run, form: str, parts: Mapping[str, object]) -> Sheet:
    import timm
    import torch

    card, spec = run.card, run.model.backbone.spec
    weights = Path(card.weights) if card.weights not in (None, "hub", "random") else None
    sites = {name: run.calibration_for(name) for name in run.folder.calibrations()}
    return Sheet(
        form=form,
        backbone=card.backbone,
        title=f"{spec.title}, {spec.architecture}",
        licence=spec.licence,
        base=Base(
            fingerprint=card.fingerprint,
            file=weights.name if weights else card.weights,
            sha256=sha256(weights) if weights else None,
        ),
        adapt=card.adapt,
        classes=run.classes,
        task=run.answer.reading,
        squares=Squares.of(run.settings),
        normalisation=Normalisation(**{name: card.preprocess[name] for name in ("mean", "std")}),
        calibration=None if run.calibration is None else run.calibration.to_dict(),
        sites={name: fitted.to_dict() for name, fitted in sites.items() if fitted is not None},
        digest=run.digest,
        versions={"eyetune": __version__, "torch": torch.__version__, "timm": timm.__version__},
        **parts,
    )


def squares_in_words(sheet: Sheet) -> str:
    """How a photograph becomes what the network sees, for people."""
    squares = sheet.squares
    crop = "cropped to the field of view, " if squares.crop else ""
    fit = "padded with black to a square" if squares.fit == "pad" else "stretched to a square"
    contrast = "" if squares.contrast == "none" else f", contrast {squares.contrast}"
    return f"RGB, {crop}{fit}, resized to {squares.pixels} x {squares.pixels} pixels{contrast}"


def reading_in_words(sheet: Sheet) -> str:
    """How the head's numbers become what is said, for people."""
    head, names = sheet.task, ", ".join(sheet.classes)
    temperature = (sheet.calibration or {}).get("temperature", {}).get("value")
    if head.kind == "regression":
        return f"one number z: {names} = {head.mean!r} + {head.std!r} * z"
    if head.kind == "multilabel":
        return f"a logit for each label ({names}): sigmoid(logit / temperature), the temperatures in {SHEET}"
    scaled = "" if temperature is None else f"; calibrated: softmax(logits / {temperature!r})"
    if head.head == "softmax":
        return f"a logit for each class, in this order: {names}{scaled}"
    return (
        f"what a {head.head} head gives for the ordered classes {names}; `eyetune.metrics.heads.Head` reads it with "
        f"the `task` of {SHEET}"
    )


def readme(sheet: Sheet, use: str) -> str:
    """README.md of an exported folder: what it is, how to use it, how photographs have to be prepared."""
    checked = sheet.checked
    normalisation = sheet.normalisation
    mean, std = (", ".join(f"{value:g}" for value in of) for of in (normalisation.mean, normalisation.std))
    lines = [
        f"# {sheet.title}, adapted with EyeTune",
        f"{sheet.use}",
        "## Use",
        use,
        f"- **Images:** {squares_in_words(sheet)}; then (image / 255 - mean) / std with mean {mean} and std {std}. "
        "`eyetune.data.fundus.load_square` with the `squares` of `eyetune.json` does all but the normalisation; timm's "
        "own transforms do not crop to the field of view.",
        f"- **Output:** {reading_in_words(sheet)}.",
        f"- **Thresholds, prediction sets, intervals:** `calibration` in `{SHEET}`. They were chosen on validation.",
        f"- **Base weights:** {sheet.backbone}, fingerprint {sheet.base.fingerprint}. Their licence binds this too: "
        f"{sheet.licence}.",
    ]
    if checked is not None:
        lines.append(
            f"- **Checked** against the run on {checked.images} images of {checked.split}: a probability differs by at "
            f"most {checked.probabilities:.1e}, {checked.equal_calls:.1%} are called alike."
        )
    lines.append(
        "- **Not here:** the out-of-distribution score (the run and its ONNX export have it) and heat maps (the run)."
    )
    return "\n\n".join(lines[:4]) + "\n\n" + "\n".join(lines[4:]) + "\n"
