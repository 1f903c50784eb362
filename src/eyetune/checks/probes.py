"""What is done to a model to check it, and how far two results are apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from eyetune.checks.bench import Bench
from eyetune.data.fundus import FundusSettings
from eyetune.data.loader import make_loader
from eyetune.errors import UserError
from eyetune.runtime import seed_everything
from eyetune.train.optim import build_optimizer
from eyetune.train.task import Batch, forward

if TYPE_CHECKING:
    from eyetune.adapt.classifier import Classifier
    from eyetune.adapt.strategy import Strategy


def score(bench: Bench, model: Classifier, strategy: Strategy, network: nn.Module, batch: Batch) -> tuple[float, float]:
    """Mean plain loss and share of right answers, in eval mode; the model is back in training mode afterwards."""
    strategy.set_mode(model, False)
    with torch.no_grad():
        raw = forward(network, batch).float()
    strategy.set_mode(model, True)
    target, task = batch["target"], bench.plain_task
    return float(task.losses(raw, target).mean()), task.answer.right(raw.cpu(), target.cpu())


def without_opinion(bench: Bench, model: Classifier) -> tuple[float, str]:
    """The loss of a head whose weights are zero, and how that is said."""
    answer, target = bench.plain_task.answer, bench.batch["target"]
    if answer.head == "softmax" and answer.task == "classification":
        classes = len(answer.names)
        return math.log(classes), f"{classes} equally likely classes give ln {classes} = {math.log(classes):.3f}"
    features = torch.zeros(len(target), model.backbone.width, device=target.device)
    training = model.head.training
    with torch.no_grad():
        chance = float(bench.plain_task.losses(model.head.eval()(features).float(), target).mean())
    model.head.train(training)
    return chance, f"the biases of the head alone give {chance:.3f}"


def memorise(
    bench: Bench,
    model: Classifier,
    strategy: Strategy,
    network: nn.Module,
    batch: Batch,
    *,
    lr: float,
    steps: int,
    target: float,
) -> tuple[float, float, int]:
    """Train on one batch until the loss is at `target`: loss (infinite: diverged), share right, steps taken."""
    optimizer = build_optimizer(strategy.groups(model), lr, 0.0)
    loss, right, taken = math.inf, 0.0, 0
    seed_everything(bench.config.seed)
    while taken < steps:
        some = min(10, steps - taken)
        try:
            bench.train(
                model, strategy, [batch] * some, lr=lr, task=bench.plain_task, optimizer=optimizer, network=network
            )
        except UserError:  # the loss is no number any more
            return math.inf, right, taken
        taken += some
        loss, right = score(bench, model, strategy, network, batch)
        if loss <= target:
            break
    return loss, right, taken


def why_not_learnt(bench: Bench, model: Classifier, strategy: Strategy) -> str:
    """What to do about a batch that was not memorised."""
    features = features_of(bench, model)["features"]
    centre = features.mean(dim=0)
    spread = float((features - centre).norm(dim=1).mean() / centre.norm().clamp_min(1e-12))
    if spread < 0.02:
        return (
            f"The features of different images differ by {spread:.1%} only: are the weights the published ones "
            "(model.weights), and do the images show anything (see: eyetune check data)?"
        )
    if strategy.frozen_backbone:
        return "Raise train.lr, or let the backbone learn too: adapt.kind lora."
    return "Something keeps the network from learning: see the gradients above; try another train.lr and --steps."


def features_of(bench: Bench, model: Classifier) -> Batch:
    """The batch with the backbone's features, in eval mode, in place of its images."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    with torch.no_grad():
        features = model.backbone.features(bench.batch["image"]).float()
    for module, mode in modes.items():
        module.training = mode
    return {"features": features, "target": bench.batch["target"], "index": bench.batch["index"]}


def gradient(
    bench: Bench, model: Classifier, strategy: Strategy, batches: Sequence[Batch], size: int
) -> dict[str, Tensor]:
    """The gradient the training loop's one step would follow; the weights stay as they are."""
    found: dict[str, Tensor] = {}

    def note(*_: Any) -> None:
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                found[name] = parameter.grad.detach().clone()

    optimizer = build_optimizer(strategy.groups(model), 0.0, 0.0)
    optimizer.register_step_pre_hook(note)
    bench.train(
        model,
        strategy,
        batches,
        lr=0.0,
        task=bench.plain_task,
        optimizer=optimizer,
        batch_size=size,
        accumulate=len(batches),
    )
    return found


def short_run(bench: Bench) -> dict[str, Tensor]:
    """Build, read, augment and train for an epoch of three or four steps: what came of each part, on the CPU."""
    config = bench.config
    model, strategy = bench.fresh()
    bench.runtime.seed_epoch(0)
    size = max(2, len(bench.images) // 3)
    preprocess = model.backbone.preprocess
    loader = make_loader(
        bench.images,
        preprocess,
        FundusSettings.of(config.data, preprocess),
        batch_size=size,
        training=True,
        augment=config.augment,
        balance=config.train.balance,
        workers=0,
        seed=config.seed,
    )
    start = flat(strategy.checkpoint(model))
    pixels = torch.stack([batch["image"].mean() for batch in loader])
    loss = bench.train(model, strategy, [], lr=config.learning_rate, loader=loader, batch_size=size)
    end = flat(strategy.checkpoint(model))
    strategy.set_mode(model, False)
    return {
        "the first weights": start,
        "the images": pixels,
        "the loss": torch.tensor(loss),
        "the trained weights": end,
    }


def flat(tensors: dict[str, Tensor]) -> Tensor:
    """All numbers of the tensors in one: float32[N], on the CPU."""
    return torch.cat([tensor.detach().float().cpu().reshape(-1) for tensor in tensors.values()])


def logits(model: nn.Module, batch: Batch) -> Tensor:
    """What the model gives for a batch: float32[B, K]."""
    with torch.no_grad():
        found: Tensor = model(batch["image"]).float()
    return found


def apart(one: Tensor, two: Tensor) -> float:
    """Largest difference, relative to the largest value where that is above 1; NaN counts as infinite."""
    difference = float((one - two).abs().max()) / max(1.0, float(one.abs().max()))
    return difference if math.isfinite(difference) else math.inf


def relative(differences: Sequence[Tensor], whole: Sequence[Tensor]) -> float:
    """Norm of the differences over the norm of the whole."""
    size = math.sqrt(squares(whole))
    return math.sqrt(squares(differences)) / size if size else math.inf


def squares(tensors: Any) -> float:
    """Sum of the squares of all numbers of the tensors."""
    return sum(float(tensor.detach().cpu().double().pow(2).sum()) for tensor in tensors)
