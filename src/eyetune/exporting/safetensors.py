"""A run as a folder that timm loads: the whole network with its head, adapters added into the weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import timm

from eyetune.errors import RunError
from eyetune.exporting.check import refuse
from eyetune.exporting.describe import SHEET, readme, sheet_of
from eyetune.exporting.folder import whole_folder
from eyetune.exporting.network import plain
from eyetune.exporting.sample import Sample
from eyetune.exporting.timm_layout import TimmNetwork, tensors_of
from eyetune.files import write_json, write_text
from eyetune.tensors import write_tensors

if TYPE_CHECKING:
    from eyetune.predicting.sheet import Checked
    from eyetune.train.run import Run

_USE = """```python
import timm

model = {call}
model.load_state_dict(safetensors.torch.load_file("model.safetensors"), strict=True)
# or at once, from config.json: timm.create_model("local-dir:PATH_OF_THIS_FOLDER", pretrained=True)
logits = model.eval()(images)  # float32[B, 3, P, P], normalised as below
```"""


def write_safetensors(run: Run, path: Path) -> Checked:
    """Write a run as `model.safetensors` and `config.json` for plain timm, once they were found to say what it says.

    Args:
        run: on the CPU, in float32.
        path: the folder; an earlier export there is replaced.

    Raises RunError when no timm network is the run's, or it says something else: then nothing is written.
    """
    model = plain(run)
    layout = TimmNetwork.of(model.backbone, model.outputs)
    if layout is None:
        raise RunError(
            f"{run.name}: no network of timm's is {run.backbone} with pooling {model.backbone.pool}: use --to onnx."
        )
    sheet = sheet_of(run, "safetensors")
    with whole_folder(path) as folder:
        write_tensors(folder / "model.safetensors", tensors_of(model, layout))
        write_json(folder / "config.json", layout.config(sheet))
        network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        found = Sample.of(run).compare(network)
        refuse(found, f"the timm network {path}")
        sheet = sheet.model_copy(update={"checked": found})
        write_json(folder / SHEET, sheet.to_dict())
        use = _USE.format(call=layout).replace("import timm\n", "import safetensors.torch\nimport timm\n")
        write_text(folder / "README.md", readme(sheet, use))
    return found
