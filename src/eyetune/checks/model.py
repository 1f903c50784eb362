"""Does it learn? Ten checks of network, strategy and training step on a few of the user's own images.

The steps are taken by the training loop itself (:func:`eyetune.train.steps.train_epoch`), with the strategy's own
groups and rates: what is checked is what will run.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from eyetune.checks import plots, probes
from eyetune.checks.bench import Bench
from eyetune.checks.gradients import Flow, digests, gradient_flow
from eyetune.checks.subject import Subject, few_images, part, to_last_phase
from eyetune.errors import listing
from eyetune.findings import Finding, Report, Status, carry_out
from eyetune.runtime import Runtime
from eyetune.train.features import FeatureHead
from eyetune.train.run import rebuild
from eyetune.train.rundir import ModelCard, RunDir
from eyetune.train.task import enough_memory, forward

if TYPE_CHECKING:
    from eyetune.adapt.classifier import Classifier

MOST_IMAGES = 16
"""Two of each class, at least 8, at most so many, and never more than a batch of the configuration (or 4)."""

FIRST_LOSS = 0.5
"""How far, in nats, the first loss may be from ln K. A new head knows nothing: its classes are equally likely."""

STEPS, STEPS_ON_FEATURES = 100, 300
"""Steps to overfit a batch in: through the network, and on features computed once (a frozen backbone)."""

LEARNT, LEARNT_BY_HEAD = 0.1, 0.5
"""The loss that counts as learnt, as a share of the first: a network that can change is to remember a handful of
images; a linear layer on frozen features is only to show that it gets there."""

RATES = (1.0, 10.0, 0.1)
"""Multiples of the learning rate that are tried, in this order, until one learns the batch."""

EXACT = 1e-4
"""Largest difference of float32 results that differ in the order of summation only, relative to the largest value."""

MIXED_LOGITS, MIXED_COSINE = 0.10, 0.95
"""Mixed precision against float32: largest relative difference of the logits, least cosine of the gradients."""

SEEDED = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 2e-2}
"""Relative difference of two seeded runs that a GPU is granted, whose sums have no fixed order. On the CPU: none."""

Say = Callable[[Finding], None]


def check_model(
    subject: Subject,
    folder: Path,
    card: Callable[[Classifier], ModelCard],
    *,
    steps: int | None,
    say: Say,
    start: Callable[[str], None],
) -> Report:
    """Carry out every check of the model and draw the gradients.

    Args:
        subject: the configuration and its photographs.
        folder: for the picture.
        card: what a run would note beside the checkpoints of a model.
        steps: to overfit a batch in; None for the usual number.
        say: takes each finding as it is made.
        start: takes the line that says what is checked.

    Raises DataError when an image cannot be read, UserError when the device is not there.
    """
    config = subject.config
    count = min(max(8, 2 * len(subject.manifest.classes)), MOST_IMAGES, max(4, config.train.batch_size))
    images = few_images(subject.manifest, count, config.data.skip_unreadable)
    wanted = Runtime(config.device, config.precision, config.seed)
    line = subject.describe(subject.build()[0], wanted, f"{len(images)} training images of {images.source}")
    start(line)
    # Differences are only as small as they should be in float32; the configuration's precision has its own checks.
    # (One runtime at a time: the precision of autocast belongs to the process.)
    exact = Bench(subject, Runtime(config.device, "fp32", config.seed), images, steps)
    findings: list[Finding] = []
    flows: list[Flow] = []

    def run(bench: Bench, checks: dict[str, Callable[[Bench], Finding]]) -> None:
        for name, check in checks.items():

            def careful(check: Callable[[Bench], Finding] = check) -> Finding:
                with enough_memory("Lower train.batch_size, or see: eyetune check memory."):
                    return check(bench)

            findings.append(carry_out(name, careful))
            say(findings[-1])

    run(
        exact,
        {
            "first loss": first_loss,
            "gradients": lambda bench: gradients(bench, flows),
            "overfit": overfit,
            "accumulation": accumulation,
            "eval mode": eval_mode,
            "independence": independence,
            "reload": lambda bench: reload(bench, card),
            "merge": merge,
        },
    )
    del exact
    mixed = Bench(subject, Runtime(config.device, config.precision, config.seed), images, steps)
    run(mixed, {"seed": seed, "precision": precision})
    pictures = []
    if flows:
        pictures.append(folder / "model-gradients.png")
        plots.gradient_flow(
            flows, pictures[0], title=f"{config.model.backbone}, {config.adapt.kind}: gradients by layer"
        )
    return Report("model", line, findings, pictures, {"images": [record.name for record in images]})


# -- the checks --------------------------------------------------------------------------------------------------------


def first_loss(bench: Bench) -> Finding:
    """A new head has no opinion: the loss of the first batch is close to that of its biases alone, ln K for classes."""
    model, strategy = bench.fresh()
    loss, _ = probes.score(bench, model, strategy, model, bench.batch)
    chance, why = probes.without_opinion(bench, model)
    values = {"loss": loss, "chance": chance, "tolerance": FIRST_LOSS}
    why = f"{loss:.3f} before training; {why}"
    if abs(loss - chance) <= FIRST_LOSS:
        return Finding(Status.PASS, why, values=values)
    return Finding(
        Status.FAIL,
        f"{why}, at most {FIRST_LOSS} away",
        "The head is not new, its first weights are large, or the features are: check model.weights and model.pool, "
        "and that the head starts near zero."
        if loss > chance
        else "The head already knows these images: it is not new.",
        values,
    )


def gradients(bench: Bench, flows: list[Flow]) -> Finding:
    """Every trained tensor gets a finite gradient and moves, in every phase; no frozen one does either."""
    model, strategy = bench.fresh()
    flows += gradient_flow(bench, model, strategy)
    faults = [fault for flow in flows for fault in flow.faults]
    unused = list(dict.fromkeys(name for flow in flows for name in flow.unused))
    last = flows[-1]
    in_phases = f" in each of {len(flows)} phases" if len(flows) > 1 else ""
    values = {
        "trained_tensors": len(last.trained),
        "frozen_tensors": last.frozen,
        "faults": faults,
        "unused": unused,
        "layers": [
            {"phase": flow.phase, "layer": layer.name, "trained": layer.trained, "gradient_rms": layer.rms}
            for flow in flows
            for layer in flow.layers
        ],
    }
    if faults:
        return Finding(
            Status.FAIL,
            f"{len(faults)} of {len(last.trained) + last.frozen} tensors are not as they should be:\n{listing(faults)}",
            last.hint or "Look for .detach(), .data, torch.no_grad or requires_grad in the network and the strategy.",
            values,
        )
    why = f"all {len(last.trained) - len(unused)} trained tensors get one and move{in_phases}"
    why += f"; the {last.frozen} frozen ones stay as they are, to the bit" if last.frozen else "; nothing is frozen"
    if unused:
        return Finding(
            Status.WARN,
            f"{why}. {len(unused)} trained tensors have no part in the output: {', '.join(unused[:3])}"
            + ("…" if len(unused) > 3 else ""),
            "Harmless: model.pool leaves them out, or they stand in a branch whose frozen factor is zero.",
            values,
        )
    return Finding(Status.PASS, why, values=values)


def overfit(bench: Bench) -> Finding:
    """One batch can be learnt by heart, by the strategy's own groups."""
    model, strategy = bench.fresh()
    to_last_phase(model, strategy)
    network: nn.Module = model
    batch, steps, share = bench.batch, STEPS, LEARNT
    if not any(parameter.requires_grad for parameter in model.backbone.parameters()):
        share = LEARNT_BY_HEAD
    if strategy.frozen_backbone:
        network, batch, steps = FeatureHead(model), probes.features_of(bench, model), STEPS_ON_FEATURES
    steps = bench.steps or steps
    start = strategy.checkpoint(model)
    first, _ = probes.score(bench, model, strategy, network, batch)
    target = share * first
    reached: dict[str, float | None] = {}
    for rate in RATES:
        strategy.load_checkpoint(model, start)
        strategy.set_mode(model, True)
        lr = rate * bench.config.learning_rate
        loss, right, taken = probes.memorise(bench, model, strategy, network, batch, lr=lr, steps=steps, target=target)
        reached[f"{lr:g}"] = loss if math.isfinite(loss) else None
        if loss <= target:
            break
    values = {"first": first, "target": target, "steps": steps, "loss_by_rate": reached, "right": right}
    if loss <= target:
        why = f"loss {first:.3f} to {loss:.3f} in {taken} steps at lr {lr:g} ({right:.0%} right; needed: {target:.3f})"
        if rate == 1.0:
            return Finding(Status.PASS, why, values=values)
        advice = (
            f"train.lr {bench.config.learning_rate:g} is {'low' if rate > 1 else 'high'} for this network: at that "
            f"rate the batch was not learnt in {steps} steps. Try train.lr {lr:g}."
        )
        return Finding(Status.WARN, why, advice, values)
    said = ", ".join("diverged" if value is None else f"{value:.3f}" for value in reached.values())
    return Finding(
        Status.FAIL,
        f"loss {first:.3f} to {said} at lr {', '.join(reached)}, in {steps} steps each; needed: {target:.3f}",
        probes.why_not_learnt(bench, model, strategy),
        values,
    )


def accumulation(bench: Bench) -> Finding:
    """Small batches accumulated give the gradient of the big batch, the last short one included."""
    model, strategy = bench.fresh()
    to_last_phase(model, strategy)
    norms = sum(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in model.modules())
    strategy.set_mode(model, False)  # dropout draws anew for every batch, batch norm looks at it
    count = len(bench.batch["index"])
    size = next((size for size in range(max(1, 2 * count // 5), count) if count % size), 1)  # the last one is shorter
    small = [part(bench.batch, start, start + size) for start in range(0, count, size)]
    whole = probes.gradient(bench, model, strategy, [bench.batch], count)
    parts = probes.gradient(bench, model, strategy, small, size)
    # Images of different classes pull in opposite directions: what is left of the sum may be small beside its parts,
    # and so beside the rounding of these.
    largest = max(
        [probes.gradient(bench, model, strategy, [one], len(one["index"])) for one in small] + [whole],
        key=lambda gradient: probes.squares(gradient.values()),
    )
    difference = probes.relative([whole[name] - parts[name] for name in whole], list(largest.values()))
    sizes = " + ".join(str(len(one["index"])) for one in small)
    values = {"difference": difference, "tolerance": EXACT, "batches": [len(one["index"]) for one in small]}
    why = f"batches of {sizes} against one of {count}: gradients differ by {difference:.1e} (at most {EXACT:g})"
    if not difference <= EXACT:
        advice = "The loss of a batch must be the mean over its images, and each part weigh by its images."
        return Finding(Status.FAIL, why, advice, values)
    if norms:
        return Finding(
            Status.WARN,
            f"{why}; but {norms} batch norms train, and each looks at its own small batch",
            "With batch norm in training, accumulate does not stand for a larger batch: keep train.batch_size at 16 or "
            "more.",
            values,
        )
    return Finding(Status.PASS, why, values=values)


def eval_mode(bench: Bench) -> Finding:
    """In eval mode the same images give the same outputs and nothing changes; frozen features are always steady."""
    model, strategy = bench.trained
    before = digests(dict(model.named_buffers()))
    first, second = probes.logits(model, bench.batch), probes.logits(model, bench.batch)
    difference = float((first - second).abs().max())
    changed = [name for name, digest in digests(dict(model.named_buffers())).items() if before[name] != digest]
    values: dict[str, Any] = {"difference": difference, "changed_buffers": changed}
    if difference or changed:
        awake = [name or "the model" for name, module in model.named_modules() if module.training]
        what = f"outputs differ by {difference:.1e}" if difference else "outputs agree"
        what += f", and {len(changed)} buffers change ({changed[0]}, …)" if changed else ""
        return Finding(
            Status.FAIL,
            f"the same images twice: {what}",
            f"Still in training mode: {', '.join(awake[:4])}. The strategy's set_mode must switch it off."
            if awake
            else "Something in the network draws random numbers in eval mode.",
            values,
        )
    if strategy.frozen_backbone:
        strategy.set_mode(model, True)
        with torch.no_grad():
            one, two = (model.backbone.features(bench.batch["image"]) for _ in range(2))
        strategy.set_mode(model, False)
        if not torch.equal(one, two):
            return Finding(
                Status.FAIL,
                f"the frozen backbone's features differ by {float((one - two).abs().max()):.1e} in training mode",
                "Dropout or drop-path is on in a backbone that does not train: set_mode must leave it in eval mode.",
                values,
            )
    return Finding(Status.PASS, "the same images twice: the same outputs, and no buffer changes", values=values)


def independence(bench: Bench) -> Finding:
    """What is said of an image does not depend on the others in the batch."""
    model, _ = bench.trained
    together = probes.logits(model, bench.batch)
    count = len(bench.batch["index"])
    alone = torch.cat([probes.logits(model, part(bench.batch, place, place + 1)) for place in range(count)])
    difference = probes.apart(together, alone)
    values = {"difference": difference, "tolerance": EXACT}
    why = f"{count} images one by one and together: logits differ by {difference:.1e} (at most {EXACT:g})"
    if difference <= EXACT:
        return Finding(Status.PASS, why, values=values)
    return Finding(
        Status.FAIL,
        why,
        "Something looks across the batch: batch norm in training mode, or an operation over the wrong dimension.",
        values,
    )


def reload(bench: Bench, card: Callable[[Classifier], ModelCard]) -> Finding:
    """Saved as a run saves, read back as `evaluate` and `predict` do: the same outputs."""
    model, strategy = bench.trained
    before = probes.logits(model, bench.batch)
    with tempfile.TemporaryDirectory(prefix="eyetune-check-") as scratch:
        folder = RunDir.create(Path(scratch) / "run")
        described = card(model).at(0, None, None)
        folder.save_best(strategy.checkpoint(model), described)
        folder.save_last({}, described, {}, {})  # which puts the best one in place
        again, _ = rebuild(folder.load_best(), folder.path)
    after = probes.logits(bench.runtime.place(again), bench.batch)
    difference = probes.apart(before, after)
    tolerance = 0.0 if bench.runtime.device.type == "cpu" else EXACT
    values = {"difference": difference, "tolerance": tolerance, "tensors": len(strategy.checkpoint(model))}
    kept = f"{values['tensors']} tensors saved and read back"
    if difference <= tolerance:
        same = "the same outputs, to the bit" if not difference else f"outputs agree to {difference:.1e}"
        return Finding(Status.PASS, f"{kept}: {same}", values=values)
    return Finding(
        Status.FAIL,
        f"{kept}: logits differ by {difference:.1e} (at most {tolerance:g})",
        "Training changes something that the checkpoint does not hold: the strategy's saved() must name it, or the "
        "base weights are not the same at every load.",
        values,
    )


def merge(bench: Bench) -> Finding:
    """An adapter added into the weights: the same outputs."""
    from eyetune.adapt import lora

    model, _ = bench.trained
    if model.adapter is None:
        return Finding(Status.SKIP, f"{bench.config.adapt.kind} has no adapter to merge")
    difference = probes.apart(probes.logits(model, bench.batch), probes.logits(lora.merge(model).eval(), bench.batch))
    values = {"difference": difference, "tolerance": EXACT}
    why = f"adapter merged into the weights: logits differ by {difference:.1e} (at most {EXACT:g})"
    if difference <= EXACT:
        return Finding(Status.PASS, why, values=values)
    return Finding(
        Status.FAIL,
        why,
        "Use the run as it is and do not export it merged; adapt fewer layers (adapt.targets), or without adapt.dora.",
        values,
    )


def seed(bench: Bench) -> Finding:
    """Two runs with one seed: the same order, augmentation, dropout, steps and weights."""
    first, second = (probes.short_run(bench) for _ in range(2))
    cpu = bench.runtime.device.type == "cpu"
    tolerance = 0.0 if cpu else SEEDED[bench.runtime.precision]
    difference = max(probes.apart(one, two) for one, two in zip(first.values(), second.values(), strict=True))
    values = {
        "difference": difference,
        "tolerance": tolerance,
        "losses": [float(r["the loss"]) for r in (first, second)],
    }
    if difference <= tolerance:
        how = "agree to the bit" if cpu else f"agree to {difference:.1e} (a GPU is granted {tolerance:g})"
        return Finding(Status.PASS, f"two short runs with seed {bench.config.seed} {how}", values=values)
    parts = [name for name in first if probes.apart(first[name], second[name]) > tolerance]
    return Finding(
        Status.FAIL,
        f"two short runs with seed {bench.config.seed} differ by {difference:.1e} in {', '.join(parts)} "
        f"(at most {tolerance:g})",
        "Something draws from a generator that the seed does not set: a transform, the network's first weights, or the "
        "strategy.",
        values,
    )


def precision(bench: Bench) -> Finding:
    """Mixed precision stays close to float32, in outputs and in the direction of the gradient."""
    runtime = bench.runtime
    if runtime.precision == "fp32":
        return Finding(Status.SKIP, "computes in float32")
    model, strategy = bench.fresh()
    to_last_phase(model, strategy)
    strategy.set_mode(model, False)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    results = []
    for mixed in (False, True):
        scale = runtime.scaler.get_scale() if mixed and runtime.scaler is not None else 1.0
        with runtime.autocast() if mixed else torch.autocast(runtime.device.type, enabled=False):
            logits = forward(model, bench.batch)
            loss = bench.plain_task.losses(logits, bench.batch["target"]).mean()
        found = torch.autograd.grad(loss * scale, parameters, allow_unused=True)
        # (On the CPU: Apple's GPUs have no float64.)
        gradient = {n: g.float().cpu().double() / scale for n, g in zip(names, found, strict=True) if g is not None}
        results.append((logits.detach().float(), gradient))
    (exact, slopes), (near, near_slopes) = results
    difference = probes.relative([exact - near], [exact])
    product = sum(float((slopes[name] * near_slopes[name]).sum()) for name in slopes)
    size = math.sqrt(probes.squares(slopes.values()) * probes.squares(near_slopes.values()))
    cosine = product / size if size else math.nan
    values = {"logits": difference, "cosine": cosine, "most": MIXED_LOGITS, "least": MIXED_COSINE}
    why = (
        f"{runtime.precision} against float32: logits differ by {difference:.2%} (at most {MIXED_LOGITS:.0%}), "
        f"gradients have cosine {cosine:.4f} (at least {MIXED_COSINE})"
    )
    if difference <= MIXED_LOGITS and cosine >= MIXED_COSINE:
        return Finding(Status.PASS, why, values=values)
    return Finding(Status.FAIL, why, "Train in float32: --precision fp32.", values)
