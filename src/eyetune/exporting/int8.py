"""A network whose matrix products are computed in 8 bits, for processors: smaller, and on most of them faster.

Weights have a scale of their own for each output channel. How activations are scaled was measured (docs/export.md):
transformers anew for every batch ("dynamic"), which needs no photographs and is nearer to float32; convolutional
networks, whose convolutions are slow that way, by what training photographs give ("static").
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eyetune.errors import RunError
from eyetune.predicting.onnx_file import DOMAINS
from eyetune.predicting.onnx_model import INPUT

if TYPE_CHECKING:
    from numpy.typing import NDArray

_BATCH = 8


def quantise(source: Path, target: Path, photographs: Sequence[NDArray[np.uint8]] | None) -> None:
    """Write the ONNX model at `source` to `target`, its matrix products in int8.

    Args:
        source: in float32.
        target: the new file.
        photographs: squares of training, to scale activations by ("static"); None: anew for every batch ("dynamic").

    Raises RunError when photographs are needed and there are none.
    """
    import onnx
    from onnxruntime import quantization

    model: Any = onnx.load(source)
    # Remembered shapes would contradict those of the weights that are turned on the way.
    del model.graph.value_info[:]
    logging.getLogger().addFilter(_quiet)
    try:
        if photographs is None:
            quantization.quantize_dynamic(
                model,
                target,
                per_channel=True,
                weight_type=quantization.QuantType.QInt8,
                op_types_to_quantize=["MatMul"],
            )
        elif not photographs:
            raise RunError("--int8 scales a convolutional network by training photographs, and none could be read.")
        else:
            quantization.quantize_static(
                model,
                target,
                _Reader(photographs),
                quant_format=quantization.QuantFormat.QDQ,
                per_channel=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                op_types_to_quantize=["Conv", "MatMul"],
                extra_options={"MatMulConstBOnly": True},
            )
    finally:
        logging.getLogger().removeFilter(_quiet)
    _tidy(target)


class _Reader:
    """What `quantize_static` draws batches of photographs from."""

    def __init__(self, photographs: Sequence[NDArray[np.uint8]]) -> None:
        self._parts: Iterator[NDArray[np.uint8]] = (
            np.stack(photographs[first : first + _BATCH]) for first in range(0, len(photographs), _BATCH)
        )

    def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
        """The next batch; None at the end."""
        part = next(self._parts, None)
        return None if part is None else {INPUT: part}


def _quiet(record: logging.LogRecord) -> bool:
    """Advice to prepare the model first, which the exporter has done."""
    return "pre-processing" not in record.getMessage()


def _tidy(path: Path) -> None:
    """Take out what the quantiser has noted beside the model: operators it did not use, and a program's name."""
    import onnx

    model: Any = onnx.load(path)
    used = {node.domain for node in model.graph.node}
    kept = [one for one in model.opset_import if one.domain in used or one.domain in DOMAINS]
    del model.opset_import[:], model.metadata_props[:]
    model.opset_import.extend(kept)
    model.producer_name = "eyetune"
    onnx.save(model, path)
