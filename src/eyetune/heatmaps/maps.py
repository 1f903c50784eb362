"""Where a network looked: images to one number a cell of its grid.

Three methods, all in float32 whatever the network computes in:

- `rollout` (Abnar and Zuidema, ACL 2020): attention alone, multiplied through the blocks. Knows of no class.
- `relevance` (Chefer et al., ICCV 2021, section 3.1): attention weighted by the gradient of one output.
- `gradcam` (Selvaraju et al., ICCV 2017): the last feature map of a convolutional network, or of one that pools like
  one (Swin), weighted by the gradient of one output.

All of them show what an output depends on, roughly. None shows why, and none makes an output right.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from eyetune.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from eyetune.adapt.classifier import Classifier

Method = Literal["relevance", "rollout", "gradcam"]
METHODS: tuple[str, ...] = get_args(Method)

_CLASS_TOKEN = ("cls", "token", "projected", "last4")
"""Poolings that read class tokens; `avg` reads the patch tokens."""


def choose_method(model: Classifier, method: str = "auto") -> Method:
    """The method for a network: what was asked for, or `relevance` for a transformer and `gradcam` for the rest.

    Raises UserError for an unknown method, and for one that the network has no ground for.
    """
    if method not in ("auto", *METHODS):
        raise UserError(
            f"unknown heat map method {method!r}.{did_you_mean(method, METHODS)} Known: auto, {', '.join(METHODS)}."
        )
    network, name = model.backbone.network, model.backbone.spec.name
    tokens = hasattr(network, "num_prefix_tokens") and bool(_attentions(network))
    if tokens and not (model.backbone.pool in _CLASS_TOKEN or model.backbone.pool == "avg"):
        raise UserError(
            f"no heat map for {name} with pooling {model.backbone.pool}: which tokens its feature reads is known for "
            f"class tokens and for avg only."
        )
    if method == "gradcam" and tokens:
        raise UserError(f"gradcam needs a feature map, and {name} is a transformer: use relevance or rollout.")
    if method in ("relevance", "rollout") and not tokens:
        raise UserError(f"{method} needs attention over all patches, which {name} does not have: use gradcam.")
    if not tokens and not callable(getattr(network, "forward_features", None)):
        raise UserError(f"no heat map for {name}: it is neither a vision transformer nor has it a last feature map.")
    return method if method != "auto" else "relevance" if tokens else "gradcam"  # type: ignore[return-value]


def grid_maps(model: Classifier, images: Tensor, targets: Tensor | None = None, method: Method = "relevance") -> Tensor:
    """What each cell of the network's grid contributes to one output of each image.

    Args:
        model: in eval mode; adapters inside it count. Neither its outputs nor its parameters change.
        images: float[B, 3, P, P], normalised, on the model's device.
        targets: int64[B], which output of each image; None = the highest. `rollout` does not look at it.
        method: as :func:`choose_method` says.

    Returns float32[B, rows, columns] >= 0, on the model's device: only the relation of cells of one image counts.
    """
    device = images.device.type
    # Full precision: products over two dozen blocks and gradients of a softmax lose too much in half of it.
    with torch.enable_grad(), torch.autocast(device, enabled=False):
        images = images.detach().float().requires_grad_(method != "rollout")
        if method == "gradcam":
            return gradcam(model, images, targets).detach()
        with _attention(model.backbone.network) as matrices:
            with torch.set_grad_enabled(method != "rollout"):
                outputs = model.scores(images)
            _check_whole(model, matrices)
            tokens = rollout(matrices) if method == "rollout" else relevance(matrices, _score(outputs, targets))
        return _on_grid(model, tokens).detach()


def _score(outputs: Tensor, targets: Tensor | None) -> Tensor:
    """The sum over the batch of one output an image: images do not mix in eval mode, so gradients do not either."""
    targets = outputs.argmax(dim=1) if targets is None else targets
    return outputs.gather(1, targets[:, None]).sum()


def rollout(matrices: list[Tensor]) -> list[Tensor]:
    """Attention float[B, heads, N, N] of every block to what reaches each token from each: float[B, N, N] by depth.

    Of half attention (mean over heads) and half the residual connection, as Abnar and Zuidema take it.
    """
    reached: list[Tensor] = []
    for matrix in matrices:
        mean = matrix.mean(dim=1)
        step = 0.5 * mean + 0.5 * torch.eye(mean.shape[-1], device=mean.device)
        step = step / step.sum(dim=-1, keepdim=True)
        reached.append(step @ reached[-1] if reached else step)
    return reached


def relevance(matrices: list[Tensor], score: Tensor) -> list[Tensor]:
    """As :func:`rollout`, each block's attention weighted by its gradient: the positive part of gradient times
    attention, mean over heads, added to what was relevant before (equations 5 and 6 of Chefer et al.)."""
    gradients = torch.autograd.grad(score, matrices)
    reached: list[Tensor] = []
    for matrix, gradient in zip(matrices, gradients, strict=True):
        weighted = (gradient * matrix.detach()).clamp_min(0).mean(dim=1)
        # What each token began as, the identity, is no finding and is left out; beside it small shares would be lost.
        before = reached[-1] if reached else torch.zeros_like(weighted)
        reached.append(before + weighted + weighted @ before)
    return reached


def _on_grid(model: Classifier, reached: list[Tensor]) -> Tensor:
    """The patch tokens' share in what the pooling reads, float[B, rows, columns].

    Class and register tokens hold no place: what flows through them counts, what they began with does not.
    """
    network: Any = model.backbone.network
    first, pool = int(network.num_prefix_tokens), model.backbone.pool
    if pool == "avg":
        read = reached[-1][:, first:].mean(dim=1)
    elif pool == "last4":
        read = torch.stack([matrix[:, 0] for matrix in reached[-4:]]).mean(dim=0)
    else:
        read = reached[-1][:, 0]
    rows, columns = network.patch_embed.grid_size
    return read[:, first:].reshape(-1, rows, columns)


def _check_whole(model: Classifier, matrices: list[Tensor]) -> None:
    """Raise UserError unless every block lets every token look at every other, and the tokens are the grid's."""
    network: Any = model.backbone.network
    rows, columns = getattr(network.patch_embed, "grid_size", None) or (0, 0)
    tokens = int(network.num_prefix_tokens) + rows * columns
    if not matrices or any(matrix.shape[-2:] != (tokens, tokens) for matrix in matrices):
        raise UserError(
            f"no heat map for {model.backbone.spec.name}: its blocks do not let every patch look at every other, and "
            "other attention cannot be followed from block to block."
        )


def _attentions(network: nn.Module) -> list[nn.Module]:
    """The attention modules that can show their weights, in the order of the blocks."""
    return [module for module in network.modules() if hasattr(module, "fused_attn") and hasattr(module, "attn_drop")]


@contextlib.contextmanager
def _attention(network: nn.Module) -> Iterator[list[Tensor]]:
    """Collect float[B, heads, N, N] of every block that runs inside, in order, as the block itself computes it.

    Fused attention never forms these weights, so inside the blocks compute them openly: the same numbers but for
    rounding. They pass the attention's dropout, which in eval mode does nothing; there they are picked up.
    """
    modules: list[Any] = _attentions(network)
    before = [module.fused_attn for module in modules]
    seen: list[Tensor] = []
    hooks = [module.attn_drop.register_forward_hook(lambda _, given, __: seen.append(given[0])) for module in modules]
    try:
        for module in modules:
            module.fused_attn = False
        yield seen
    finally:
        for module, fused, hook in zip(modules, before, hooks, strict=True):
            module.fused_attn = fused
            hook.remove()


def gradcam(model: Classifier, images: Tensor, targets: Tensor | None) -> Tensor:
    """The positive part of the last feature map's channels, weighted by the mean gradient of one output in each.

    The last feature map is what timm's `forward_features` gives: of a ResNet its last stage, of an EfficientNet its
    last convolution, of a Swin its last tokens, in their places. As :func:`grid_maps` otherwise.
    """
    network: Any = model.backbone.network
    seen: list[Tensor] = []
    own = network.forward_features

    def remember(*args: Any, **options: Any) -> Tensor:
        seen.append(own(*args, **options))
        return seen[-1]

    # On the object, not its class: found first, and gone again afterwards.
    network.forward_features = remember
    try:
        score = _score(model.scores(images), targets)
    finally:
        del network.forward_features
    if len(seen) != 1 or seen[0].dim() != 4:
        raise UserError(f"no heat map for {model.backbone.spec.name}: it has no last feature map to look at.")
    features = seen[0]
    (gradient,) = torch.autograd.grad(score, features)
    if getattr(network, "output_fmt", "NCHW") == "NHWC":
        features, gradient = features.permute(0, 3, 1, 2), gradient.permute(0, 3, 1, 2)
    weights = gradient.mean(dim=(2, 3), keepdim=True)
    return (weights * features).sum(dim=1).clamp_min(0)
