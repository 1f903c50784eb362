"""A run as one ONNX file: squares in, calibrated probabilities out, everything else about it as metadata."""

from __future__ import annotations

import importlib
import json
import os
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from eyetune import __version__
from eyetune.errors import MissingExtra, RunError
from eyetune.exporting.check import compare, refuse
from eyetune.exporting.describe import sheet_of, squares_in_words
from eyetune.exporting.int8 import quantise
from eyetune.exporting.network import Served, plain
from eyetune.exporting.photographs import photographs, to_check_on
from eyetune.files import atomic
from eyetune.metrics.predictions import LabelPredictions, Predictions, ValuePredictions
from eyetune.predicting.onnx_file import CHECKSUM, LARGEST, NO_CHECKSUM, SHEET, seal
from eyetune.predicting.onnx_model import INPUT, LOGITS, PROBABILITIES, STRANGE, VALUE, OnnxModel
from eyetune.runtime import convolves

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from eyetune.adapt.classifier import Classifier
    from eyetune.metrics.table import Table
    from eyetune.predicting.sheet import Checked, Sheet
    from eyetune.train.run import Run

OPSET = 20
"""Version of the operators: with them (and version 10 of the format) ONNX Runtime 1.18 and newer can do."""

_PROPERTY = 14
"""Number of `metadata_props` in ONNX's ModelProto."""


def write_onnx(run: Run, path: Path, *, int8: bool = False) -> Checked:
    """Write a run as an ONNX file, once it was found to say what the run says.

    Args:
        run: on the CPU, in float32.
        path: the file; what is there is replaced.
        int8: weights and activations of matrix products (of convolutional networks: and of convolutions) in 8 bits.

    Input `image`: uint8[N, P, P, 3]. Outputs: `logits` float32[N, outputs], what the head gave; `probabilities`
    float32[N, K], calibrated, or `value` float32[N]; `ood` float32[N], where the run has the score.

    Raises MissingExtra without onnx; RunError when the network cannot be exported, is too large for one file, or says
    something else than the run: then nothing is written.
    """
    versions = _tools()
    model = plain(run)
    kind = None if not int8 else "static" if convolves(model.backbone.network) else "dynamic"
    sheet = sheet_of(run, "onnx", numbers="int8" if int8 else "float32", quantised=kind)
    sheet = sheet.model_copy(update={"versions": sheet.versions | versions})
    with atomic(path) as target, tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}.") as scratch:
        whole = target if kind is None else Path(scratch) / "float32.onnx"
        _export(run, model, whole)
        if kind is not None:
            quantise(whole, target, photographs(run, "train") if kind == "static" else None)
        bare = target.stat().st_size
        _describe(target, sheet)
        found = _check(run, target, sheet)
        refuse(found, f"the ONNX model {path}" + (" in int8" if int8 else ""))
        os.truncate(target, bare)
        _describe(target, sheet.model_copy(update={"checked": found}))
    return found


def _tools() -> dict[str, str]:
    """Versions of what is needed. Raises MissingExtra."""
    found = {}
    for package in ("onnx", "onnxruntime", "onnxscript"):
        try:
            found[package] = str(importlib.import_module(package).__version__)
        except ImportError as error:
            raise MissingExtra("Exporting to ONNX", "onnx") from error
    return found


def _export(run: Run, model: Classifier, path: Path) -> None:
    """Write the network, without anything that says where or by whom."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    if size > LARGEST - 2**24:
        raise RunError(f"{run.name}: its network is of {size / 2**30:.1f} GiB, and one ONNX file holds 2.")
    served, side = Served(run, model).eval(), run.settings.pixels
    outputs = [LOGITS, VALUE if run.reads == "value" else PROBABILITIES, *([STRANGE] if served.novelty else [])]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # about its own deprecated parts
        try:
            program: Any = torch.onnx.export(
                served,
                (torch.zeros(2, side, side, 3, dtype=torch.uint8),),
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=outputs,
                dynamic_shapes={"image": {0: torch.export.Dim("batch")}},
                external_data=False,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            said = str(error).strip().splitlines()[0]
            raise RunError(f"{run.name}: PyTorch cannot export {run.backbone} to ONNX ({said}).") from error
    exported = program.model
    exported.producer_name, exported.producer_version = "eyetune", __version__
    exported.doc_string = None
    exported.metadata_props.clear()
    exported.graph.name, exported.graph.doc_string = "eyetune", None
    for node in exported.graph:  # each names the lines of code it comes from, and where these lay
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    program.save(str(path), external_data=False)


def _describe(path: Path, sheet: Sheet) -> None:
    """Append the metadata: what is repeated in a protocol buffer may stand anywhere, so nothing is written anew."""
    properties = {
        "use": sheet.use,
        "licence": f"{sheet.backbone}: {sheet.licence}",
        "classes": json.dumps(list(sheet.classes), ensure_ascii=False),
        INPUT: f"uint8[N, {sheet.squares.pixels}, {sheet.squares.pixels}, 3]: {squares_in_words(sheet)}",
        SHEET: sheet.text(),
        CHECKSUM: NO_CHECKSUM,
    }
    with open(path, "ab") as stream:
        for key, value in properties.items():
            entry = b"".join(_bytes_field(number, text.encode()) for number, text in ((1, key), (2, value)))
            stream.write(_bytes_field(_PROPERTY, entry))
    seal(path)


def _bytes_field(number: int, content: bytes) -> bytes:
    """A field of a protocol buffer that holds bytes: its key, its length, itself."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def _check(run: Run, path: Path, sheet: Sheet) -> Checked:
    """Hold the file against the run: what EyeTune makes of its logits, and what it gives by itself."""
    sample, fitted = to_check_on(run), run.calibration
    names = [str(number) for number in range(len(sample.squares))]
    exported = OnnxModel(path, device="cpu")
    tables = [model.table_of(names, sample.squares, batch_size=8) for model in (run, exported)]
    ours, theirs = (table if fitted is None else fitted.apply(table) for table in tables)
    like = partial(compare, ours, split=sample.split, numbers=sheet.numbers, head=sheet.task)
    found = like(theirs, rule=None if fitted is None else fitted.ood)
    alone = like(_alone(exported, sample.squares, ours))
    return found.model_copy(update={"probabilities": max(found.probabilities, alone.probabilities)})


def _alone(model: OnnxModel, squares: Sequence[NDArray[np.uint8]], like: Table) -> Table:
    """What the graph itself gives as probabilities or value, as a table like the other one."""
    name = VALUE if isinstance(like, ValuePredictions) else PROBABILITIES
    parts = (np.stack(squares[first : first + 8]) for first in range(0, len(squares), 8))
    said = np.concatenate([model.outputs([name], part)[0] for part in parts]).astype(np.float64)
    if isinstance(like, ValuePredictions):
        return replace(like, predicted=said)
    assert isinstance(like, (Predictions, LabelPredictions))
    tiny = np.finfo(np.float32).tiny
    if isinstance(like, LabelPredictions):
        odds = np.clip(said, tiny, 1) / np.clip(1 - said, tiny, 1)
        return replace(like, logits=np.log(odds))
    return replace(like, logits=np.log(np.clip(said, tiny, 1)))
