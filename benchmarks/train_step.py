"""One training step of RETFound-size and RETFound-Green networks, EyeTune against the loop people write by hand.

The hand-written loop is float32, AdamW, cross-entropy, on the same timm network (and PEFT for LoRA); weights are
random, which does not change the time. Each side runs in a process of its own, so that its peak memory is its own. On a
GPU the table also says which fraction of the matrix peak, measured in the same run, EyeTune's step reaches.

    python benchmarks/train_step.py [--batch 8] [--rounds 3] [--backbones retfound,retfound-green]
"""

from __future__ import annotations

import argparse
import traceback
from collections.abc import Callable, Iterator

import torch
from common import in_process, in_turn, machine, markdown, matrix_peak
from torch import nn

CLASSES = 5
#: timm's names of the same networks.
BY_HAND = {"retfound": "vit_large_patch16_224", "retfound-green": "vit_small_patch14_reg4_dinov2"}


def by_hand(backbone: str, strategy: str, batch: int, pixels: int, rounds: int) -> dict[str, float]:
    """Median seconds a step of the float32 loop."""
    import timm

    torch.manual_seed(0)
    model: nn.Module = timm.create_model(BY_HAND[backbone], num_classes=CLASSES, img_size=pixels)
    if strategy == "lora":
        from peft import LoraConfig, get_peft_model

        settings = LoraConfig(r=8, lora_alpha=32, lora_dropout=0.1, target_modules=["qkv"], modules_to_save=["head"])
        model = get_peft_model(model, settings)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.train().to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    criterion = nn.CrossEntropyLoss()
    images, labels = (
        torch.randn(batch, 3, pixels, pixels, device=device),
        torch.randint(CLASSES, (batch,), device=device),
    )

    def step() -> None:
        optimizer.zero_grad()
        criterion(model(images), labels).backward()
        optimizer.step()

    return in_turn({"seconds": step}, rounds)


def with_eyetune(
    backbone: str, strategy: str, batch: int, pixels: int, rounds: int, **options: bool
) -> dict[str, float]:
    """Seconds a step of EyeTune's own loop, at precision auto, gradient clipping included.

    Median of `rounds` steps on a CPU; on a GPU, where steps are queued one behind the other, the mean over an epoch of
    them. `options` (grad_checkpointing, compile) are those of the section `train`. Also `flops` of a step, and on a GPU
    `waits`: whether the host waited for it in the middle of an epoch.
    """
    from eyetune.adapt.classifier import Classifier
    from eyetune.adapt.strategy import parse_adapt
    from eyetune.backbones import load_backbone
    from eyetune.config import TrainConfig
    from eyetune.runtime import Runtime
    from eyetune.train.answers import Classes
    from eyetune.train.loop import compile_network
    from eyetune.train.optim import build_optimizer, build_schedule
    from eyetune.train.steps import train_epoch
    from eyetune.train.task import SupervisedTask

    runtime = Runtime()
    model = Classifier(load_backbone(backbone, "random", pixels=pixels), CLASSES, 0.3)
    adapt = parse_adapt({"kind": strategy})
    chosen = adapt.build()
    model = runtime.place(chosen.apply(model))
    chosen.set_mode(model, training=True)
    train = TrainConfig(batch_size=batch, **options)
    flops = batch * _flops(model, pixels)
    if train.grad_checkpointing:
        model.backbone.set_grad_checkpointing(True)
    if train.compile:
        compile_network(model.backbone)
    optimizer = build_optimizer(chosen.groups(model), adapt.default_lr, train.weight_decay)
    schedule = build_schedule(optimizer, train, epochs=train.epochs, steps_per_epoch=100)
    task = SupervisedTask(Classes(tuple(str(n) for n in range(CLASSES))), train)
    network = runtime.prepare(model)
    once = [
        {
            "image": torch.randn(batch, 3, pixels, pixels),
            "target": torch.randint(CLASSES, (batch,)),
            "index": torch.arange(batch),
        }
    ]

    cuda = runtime.device.type == "cuda"
    batches = [{name: tensor.pin_memory() for name, tensor in once[0].items()}] * max(rounds, 3) if cuda else once

    def epoch(loader: object) -> None:
        train_epoch(
            network,
            task,
            loader,  # type: ignore[arg-type]
            optimizer=optimizer,
            schedule=schedule,
            runtime=runtime,
            batch_size=batch,
            clip_norm=1.0,
        )

    if not cuda:
        return in_turn({"seconds": lambda: epoch(once)}, rounds) | {"flops": flops}
    seconds = in_turn({"epoch": lambda: epoch(batches)}, rounds=1)["epoch"] / len(batches)
    return {"seconds": seconds, "flops": flops, "waits": _waits(lambda: epoch(_Watched(batches)))}


class _Watched(list[dict[str, torch.Tensor]]):
    """Batches of an epoch in whose middle, from the third batch on, every wait for the GPU is an error."""

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        try:
            for number, batch in enumerate(super().__iter__()):
                if number == 2:
                    torch.cuda.set_sync_debug_mode("error")
                yield batch
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _waits(run: Callable[[], None]) -> float:
    """1.0 when `run` waits for the GPU where it should not (and says where), else 0.0."""
    try:
        run()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        traceback.print_exc()
        return 1.0
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return 0.0


def _flops(model: nn.Module, pixels: int) -> float:
    """Floating-point operations of one image forward and backward, recomputation and optimizer not counted."""
    from torch.utils.flop_counter import FlopCounterMode

    image = torch.randn(1, 3, pixels, pixels, device=next(model.parameters()).device)
    with FlopCounterMode(display=False) as counter:
        model(image).sum().backward()
    return float(counter.get_total_flops())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--backbones", default="retfound,retfound-green")
    parser.add_argument("--strategies", default="full,lora")
    options = parser.parse_args()
    print(machine(), flush=True)
    peak = matrix_peak() if torch.cuda.is_available() else None
    rows = []
    for backbone in options.backbones.split(","):
        pixels = 224 if backbone == "retfound" else 392
        for strategy in options.strategies.split(","):
            arguments = (backbone, strategy, options.batch, pixels, options.rounds)
            hand, own = in_process(by_hand, *arguments), in_process(with_eyetune, *arguments)
            rows.append(
                [
                    f"{backbone} {strategy}, {pixels} px, batch {options.batch}",
                    options.batch / hand["seconds"],
                    options.batch / own["seconds"],
                    f"{hand['seconds'] / own['seconds']:.2f}x",
                    hand["peak_gib"],
                    own["peak_gib"],
                    "-" if peak is None else f"{own['flops'] / own['seconds'] / peak:.0%}",
                ]
            )
            print(rows[-1], flush=True)
    columns = [
        "training step",
        "by hand, images/s",
        "EyeTune, images/s",
        "ratio",
        "by hand, GiB",
        "EyeTune, GiB",
        "of peak",
    ]
    print(markdown(columns, rows))


if __name__ == "__main__":
    main()
