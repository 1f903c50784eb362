"""What a finished image-text run leaves for other programs: the image tower alone, and RET-CLIP's own layout."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from eyetune.backbones.backbone import Backbone
from eyetune.backbones.retclip import published_name
from eyetune.clip.towers import merged_tower
from eyetune.errors import ConfigError, UserError
from eyetune.files import atomic
from eyetune.tensors import write_tensors

if TYPE_CHECKING:
    from eyetune.clip.model import RetClip
    from eyetune.clip.run import Built
    from eyetune.train.loop import FitResult
    from eyetune.train.rundir import RunDir

VISION = "vision.safetensors"
RET_CLIP_FILE = "ret-clip.pt"


def write_files(folder: RunDir, built: Built, fitted: FitResult, *, ret_clip: bool) -> None:
    """Write `vision.safetensors`, the trained image tower as a backbone's own file: `model.weights` of fine-tuning; and
    with `ret_clip`, `ret-clip.pt`. Raises UserError when they cannot be written."""
    if not folder.main:
        return
    tower = merged_tower(built.model.visual)
    write_tensors(folder.path / VISION, tower.network.state_dict())
    if ret_clip:
        save_ret_clip(built.model, folder.path / RET_CLIP_FILE, epoch=fitted.best_epoch + 1, name=folder.path.name)


def check_ret_clip(visual: Backbone) -> None:
    """Raise ConfigError unless RET-CLIP's code has an image tower like this one."""
    known = {published_name(name) for name in visual.network.state_dict()}
    wanted = {"class_embedding", "positional_embedding", "conv1.weight", "ln_pre.weight", "ln_post.weight"}
    if not wanted <= known or None in known:
        raise ConfigError(
            f"train.ret_clip_file: RET-CLIP's code has no image tower like {visual.spec.name}. It takes CLIP's vision "
            "transformers: ret-clip, or timm's vit_base_patch16_clip_quickgelu_224 and its kin."
        )


def save_ret_clip(model: RetClip, path: Path, *, epoch: int = 0, step: int = 0, name: str = "eyetune") -> None:
    """Write a model as RET-CLIP's own trainer saves it: {"epoch", "step", "name", "state_dict": `module.…`}.

    Its evaluation reads that; so does :func:`eyetune.clip.loading.load_clip`. (Its trainer's `--resume` wants the bare
    `state_dict` instead, and `--reset-data-offset --reset-optimizer`.)

    Args:
        model: adapters are merged into a copy.
        path: of the file.
        epoch, step, name: what the file says of the training.

    Raises ConfigError when RET-CLIP's code has no such image tower, UserError when the file cannot be written.
    """
    tower = merged_tower(model.visual)
    check_ret_clip(tower)
    state: dict[str, Tensor] = {}
    for key, tensor in tower.network.state_dict().items():
        state[f"visual.{published_name(key)}"] = tensor
    if isinstance(model.visual_projection, nn.Linear):
        # What stands between the two is of the same kind as the norm below it, and goes into its numbers.
        mean, scale = (model.visual_standard.get_buffer(name) for name in ("mean", "scale"))
        state["visual.ln_post.bias"] = (state["visual.ln_post.bias"] - mean) * scale
        state["visual.ln_post.weight"] = state["visual.ln_post.weight"] * scale
        state["visual.proj"] = model.visual_projection.weight.T
    elif "visual.proj" in state:
        state["visual.proj"] = state["visual.proj"].T
    # The published file has no axis for the batch in its tables.
    state["visual.class_embedding"] = state["visual.class_embedding"].reshape(-1)
    position = state["visual.positional_embedding"]
    state["visual.positional_embedding"] = position.reshape(-1, position.shape[-1])
    bert = merged_tower(model.towers()["bert"]).network
    state |= {f"bert.{key}": tensor for key, tensor in bert.state_dict().items()}
    heads = {key: tensor for key, tensor in model.state_dict().items() if key.partition(".")[0] not in _TOWERS}
    content = {
        "epoch": epoch,
        "step": step,
        "name": name,
        "state_dict": {
            f"module.{key}": tensor.detach().float().cpu().clone().contiguous()
            for key, tensor in (state | heads).items()
        },
    }
    try:
        with atomic(path) as temporary:
            torch.save(content, temporary)
    except RuntimeError as error:  # torch's own, of a disk that is full
        raise UserError(f"{path} cannot be written ({error}).") from error


_TOWERS = ("visual", "bert", "visual_projection", "visual_standard")
