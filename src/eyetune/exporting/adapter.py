"""A run's LoRA adapter for PEFT: small, to be put on the published weights by whoever has them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from eyetune.adapt.classifier import Classifier
from eyetune.adapt.lora import load_adapter, save_adapter
from eyetune.backbones import load_backbone
from eyetune.errors import RunError
from eyetune.exporting.check import refuse
from eyetune.exporting.describe import SHEET, readme, sheet_of
from eyetune.exporting.folder import whole_folder
from eyetune.exporting.sample import Sample
from eyetune.exporting.timm_layout import TimmNetwork, without_head
from eyetune.files import write_json, write_text
from eyetune.runtime import seed_everything

if TYPE_CHECKING:
    from torch import nn

    from eyetune.predicting.sheet import Checked
    from eyetune.train.run import Run

_USE = """```python
import peft, timm

network = {call}
# the published weights of {backbone} into it first: {base}
model = peft.PeftModel.from_pretrained(network, "PATH_OF_THIS_FOLDER").eval()
logits = model(images)  # float32[B, 3, P, P], normalised as below
```"""
_USE_EYETUNE = """```python
import eyetune
from eyetune.adapt.lora import load_adapter  # the head of {backbone} is none that timm has a place for
```"""


def write_adapter(run: Run, path: Path) -> Checked:
    """Write what LoRA trained, and the head, in PEFT's layout, once it was found to say what the run says.

    Args:
        run: on the CPU, in float32.
        path: the folder; an earlier export there is replaced.

    Raises RunError for a run that has no adapter, with what to do instead, for one whose head PEFT's layout has no
    place for, and when the adapter on fresh base weights says something else: then nothing is written.
    """
    if run.model.adapter is None:
        raise RunError(
            f"{run.name} was adapted with {run.card.adapt['kind']}, not with LoRA: it has no adapter. Use --to "
            "safetensors, or --to onnx."
        )
    layout = TimmNetwork.of(run.model.backbone, run.model.outputs)
    sheet = sheet_of(run, "adapter")
    with whole_folder(path) as folder:
        save_adapter(run.model, folder)
        found = Sample.of(run).compare(_fresh(run, folder, layout))
        refuse(found, f"the adapter {path}")
        sheet = sheet.model_copy(update={"checked": found})
        write_json(folder / SHEET, sheet.to_dict())
        base = f"sha256 {sheet.base.sha256}" if sheet.base.sha256 else str(sheet.base.file or "shipped with EyeTune")
        use = (_USE if layout else _USE_EYETUNE).format(call=layout, backbone=sheet.backbone, base=base)
        write_text(folder / "README.md", readme(sheet, use))
    return found


def _fresh(run: Run, folder: Path, layout: TimmNetwork | None) -> nn.Module:
    """The base weights, loaded anew, with the adapter of a folder: by PEFT on timm's own network where there is one."""
    import peft

    card = run.card
    seed_everything(card.seed)  # which random weights are made from
    backbone = load_backbone(card.backbone, card.weights, pixels=card.pixels, pool=card.pool)
    if layout is None:
        model = Classifier(backbone, run.model.outputs)
        load_adapter(model, folder, "exported")
        return model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT looks for a configuration that only transformers' networks have
        network: nn.Module = peft.PeftModel.from_pretrained(without_head(layout, backbone, card.seed), str(folder))
    return network.eval()
