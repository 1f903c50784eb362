"""`eyetune export`: a run for others to use: an adapter, a network, or a model that needs no PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from eyetune.errors import ConfigError
from eyetune.flags import Switch

if TYPE_CHECKING:
    from eyetune.train.run import Run

Form = Literal["adapter", "safetensors", "onnx"]


def command(run: Path, *, to: Form, int8: Switch = False, out: Path | None = None, weights: str | None = None) -> None:
    """Write a run in a form that others can use, once it was found to say what the run says.

    The export and the run look at the same validation photographs (training ones where there are none). Where a
    probability differs by more than 1e-4 (int8: 0.1), or calls differ, nothing is written. For research; the
    backbone's licence binds what is exported from it.

    Args:
        run: The run folder.
        to: adapter: what LoRA trained, for PEFT, without the backbone's weights. safetensors: the whole network, for
            timm. onnx: squares in, calibrated probabilities out, for ONNX Runtime and eyetune predict without PyTorch.
        int8: Of onnx: matrix products in 8 bits; a quarter of the size, faster on most processors, a little off.
        out: The file (onnx) or folder to write (default: exports/ in the run folder).
        weights: Where the base weights are now, when they moved since training.
    """
    export(run, to, out=out, int8=int8, weights=weights)


def export(
    run: str | Path | Run, to: Form, *, out: str | Path | None = None, int8: bool = False, weights: str | None = None
) -> Path:
    """Write a run in a form that others can use; see :func:`command`. Returns the file or folder.

    The run is held against its export in float32 on the processor, whatever it was loaded with.

    Raises ConfigError for options that do not fit together; RunError when the run cannot take that form (it says what
    to do instead) or the export differs too much from it; MissingExtra without the extra `onnx`.
    """
    from eyetune.exporting import check, write_adapter, write_onnx, write_safetensors
    from eyetune.train.run import load_run

    if int8 and to != "onnx":
        raise ConfigError(f"--int8 is for --to onnx: {to} keeps the weights as they are.")
    if out is not None and to == "onnx" and Path(out).suffix.lower() != ".onnx":
        raise ConfigError(f"--out {out}: call it .onnx, by which eyetune predict knows it.")
    folder = run if isinstance(run, (str, Path)) else run.folder.path
    if weights is None and not isinstance(run, (str, Path)):
        weights = run.card.weights
    trained = load_run(folder, device="cpu", precision="fp32", weights=weights)
    names = {"adapter": "adapter", "safetensors": "safetensors", "onnx": "model-int8.onnx" if int8 else "model.onnx"}
    path = trained.folder.path / "exports" / names[to] if out is None else Path(out)
    if path.is_dir() and to == "onnx":
        raise ConfigError(f"--out {path} is a folder: --to onnx writes one file.")
    if path.is_file() and to != "onnx":
        raise ConfigError(f"--out {path} is a file: --to {to} writes a folder.")
    if not trained.runtime.is_main:
        return path
    if to == "onnx":
        found = write_onnx(trained, path, int8=int8)
    else:
        found = (write_adapter if to == "adapter" else write_safetensors)(trained, path)
    print(check.line(found))
    if found.split not in ("val", "train"):
        print(f"note: no photograph of {trained.name} is at hand to check on; {found.split} stood for them")
    elif found.split == "train":
        print("note: the run has no validation photographs; training ones stood for them")
    print(f"written: {path}\nlicence of the weights it was made from ({trained.backbone}): {trained.licence}")
    print("For research; not a medical device.")
    return path
