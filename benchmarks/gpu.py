"""Everything EyeTune promises of a GPU, in one table, in under five minutes: speed, memory, precision, no waiting.

Weights are random, which changes neither time nor memory. Each row of training runs in a process of its own, so that
its peak memory is its own. Targets are those of an H200: batch 64, 224 px, bf16. Without a GPU the script runs the same
rows at toy size on the CPU, which tries the code and measures nothing.

    python benchmarks/gpu.py [--rounds 20]
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from common import in_process, in_turn, machine, markdown, matrix_peak
from train_step import CLASSES, with_eyetune


@dataclass(frozen=True)
class Row:
    """One training step to measure, and what it should reach."""

    name: str
    backbone: str
    strategy: str
    batch: int
    pixels: int
    options: dict[str, bool] = field(default_factory=dict)
    most_gib: float | None = None


ROWS = (
    Row("RETFound full", "retfound", "full", 64, 224),
    Row("RETFound full, compiled", "retfound", "full", 64, 224, {"compile": True}),
    Row("RETFound LoRA", "retfound", "lora", 64, 224),
    Row("RETFound LoRA, compiled", "retfound", "lora", 64, 224, {"compile": True}),
    Row("RETFound full", "retfound", "full", 32, 224),
    Row("RETFound full, recomputing", "retfound", "full", 32, 224, {"grad_checkpointing": True}, 12),
    Row("RETFound LoRA", "retfound", "lora", 48, 224),
    Row("RETFound LoRA, recomputing", "retfound", "lora", 48, 224, {"grad_checkpointing": True}, 8),
    Row("Green LoRA", "retfound-green", "lora", 32, 392),
    Row("Green LoRA, recomputing", "retfound-green", "lora", 32, 392, {"grad_checkpointing": True}, 6),
)
#: On a CPU.
TOY_PIXELS = 64


def inference(backbone: str, batch: int, pixels: int, rounds: int) -> dict[str, float]:
    """Median seconds of a forward pass at precision auto, and the largest difference in probability from float32 of
    each lower precision the device has."""
    from eyetune.adapt.classifier import Classifier
    from eyetune.backbones import load_backbone
    from eyetune.runtime import Runtime

    torch.manual_seed(0)
    model = Classifier(load_backbone(backbone, "random", pixels=pixels), CLASSES).eval()
    # A head that decides: at its start all probabilities are equal in any precision.
    torch.nn.init.normal_(model.head[1].weight)  # type: ignore[index, arg-type]
    images = torch.randn(batch, 3, pixels, pixels)

    def forward(precision: str) -> torch.Tensor:
        runtime = Runtime(precision=precision)
        network = runtime.place(model)
        with torch.no_grad(), runtime.autocast():
            return network(runtime.to_device(images)).float().softmax(dim=-1)

    exact = forward("fp32")
    lower = ("bf16", "fp16") if torch.cuda.is_available() else ("bf16",)
    off = {f"{precision}_off": float((forward(precision) - exact).abs().max()) for precision in lower}
    return in_turn({"seconds": lambda: forward("auto")}, rounds) | off


def measure(row: Row, rounds: int) -> dict[str, float]:
    """The numbers of :func:`with_eyetune` for a row, `peak_gib` among them."""
    step = partial(with_eyetune, **row.options)
    return in_process(step, row.backbone, row.strategy, row.batch, row.pixels, rounds)


def at_toy_size(row: Row) -> Row:
    """The same code on the embedded network, under a name that says so, without a goal."""
    return replace(row, name=f"nano for {row.name}", backbone="nano", batch=2, pixels=TOY_PIXELS, most_gib=None)


def training_table(rounds: int, toy: bool) -> str:
    """Every row of training against the matrix peak of the same run."""
    peak = None if toy else matrix_peak()
    if peak:
        print(f"matrix peak: {peak / 1e12:.0f} TFLOP/s in bf16", flush=True)
    full: float | None = None
    lines: list[list[Any]] = []
    # At toy size without compilation: a minute of C++ for nothing.
    rows = [at_toy_size(row) for row in ROWS if not row.options.get("compile")] if toy else ROWS
    for row in rows:
        found = measure(row, rounds)
        rate = row.batch / found["seconds"]
        full = full or rate
        goal = f" (goal {row.most_gib:g})" if row.most_gib else ""
        lines.append(
            [
                f"{row.name}, {row.pixels} px, batch {row.batch}",
                rate,
                "-" if peak is None else f"{found['flops'] / found['seconds'] / peak:.0%}",
                f"{rate / full:.2f}x",
                f"{found['peak_gib']:.2f}{goal}",
                {0.0: "no", 1.0: "yes"}.get(found.get("waits", -1.0), "-"),
            ]
        )
        print(lines[-1], flush=True)
    columns = ["training step", "images/s", "of peak", "to the first", "peak GiB", "host waits"]
    return markdown(columns, lines)


def inference_table(rounds: int, toy: bool) -> str:
    """RETFound against RETFound-Green, and each precision against float32."""
    lines: list[list[Any]] = []
    rows = [Row("RETFound", "retfound", "", 64, 224), Row("Green", "retfound-green", "", 64, 392)]
    for row in [at_toy_size(row) for row in rows] if toy else rows:
        found = in_process(inference, row.backbone, row.batch, row.pixels, rounds)
        off = [found.get("bf16_off", "-"), found.get("fp16_off", "-")]
        name = f"{row.name}, {row.pixels} px, batch {row.batch}"
        lines.append([name, row.batch / found["seconds"], *off, found["peak_gib"]])
    columns = ["inference", "images/s", "bf16 off by", "fp16 off by", "peak GiB"]
    ratio = "" if toy else f"\n\nGreen to RETFound: {lines[1][1] / lines[0][1]:.2f}x (goal 2)"
    return markdown(columns, lines) + ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    toy = not torch.cuda.is_available()
    print(machine(), flush=True)
    if toy:
        print(
            "No GPU here: toy size (nano, 64 px, batch 2) on the CPU. These numbers say nothing of a GPU.", flush=True
        )
    rounds = 1 if toy else options.rounds
    tables = [training_table(rounds, toy), inference_table(rounds, toy)]
    print("\n" + "\n\n".join(tables))
    if not toy:
        print("\nGoals: full at 45% of peak, LoRA 1.5x of full; nowhere does the host wait.")


if __name__ == "__main__":
    main()
