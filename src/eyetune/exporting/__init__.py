"""A run made into files that others can use: an adapter for PEFT, a network for timm, a model for ONNX Runtime.

Every export is held against its run on photographs before it is there: :mod:`eyetune.exporting.check`.
"""

from eyetune.exporting.adapter import write_adapter
from eyetune.exporting.onnx import write_onnx
from eyetune.exporting.safetensors import write_safetensors

__all__ = ["write_adapter", "write_onnx", "write_safetensors"]
