"""What the benchmarks share: timing in turn, peak memory, the machine's name, tables."""

from __future__ import annotations

import multiprocessing
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch


def machine() -> str:
    """Processor, cores, memory and versions, for the head of a table."""
    from eyetune.runtime import device_name

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    memory = ""
    with Path("/proc/meminfo").open() as stream:
        memory = f"{int(stream.readline().split()[1]) / 2**20:.0f} GiB"
    return (
        f"{device_name(device)}, {torch.get_num_threads()} threads, {memory} memory, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


def in_turn(steps: dict[str, Callable[[], Any]], rounds: int, warmup: int = 1) -> dict[str, float]:
    """Median seconds of each step, run in turn (A B A B …) so that drift of the machine's speed hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(warmup + rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number >= warmup:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def in_process(function: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    """Call `function` in a process of its own, which adds `peak_gib`: its most memory (the GPU's, if any)."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_measured, (function, arguments))


def _measured(function: Callable[..., dict[str, float]], arguments: tuple[Any, ...]) -> dict[str, float]:
    result = function(*arguments)
    if torch.cuda.is_available():
        return result | {"peak_gib": torch.cuda.max_memory_allocated() / 2**30}
    return result | {"peak_gib": own_peak() / 2**30}


def own_peak() -> int:
    """Most bytes this process itself held. On Linux from /proc: `ru_maxrss` of a child begins at its parent's peak."""
    status = Path("/proc/self/status")
    if status.is_file():
        return next(int(line.split()[1]) for line in status.open() if line.startswith("VmHWM")) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: in bytes, of this process


def matrix_peak(size: int = 8192) -> float:
    """FLOP/s of a large bfloat16 matrix product on the GPU: what the hardware gives in practice."""
    left, right = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / in_turn({"product": lambda: left @ right}, rounds=20, warmup=5)["product"]


def markdown(columns: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table; floats with three significant digits."""
    head = list(columns)
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        lines.append("| " + " | ".join(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row) + " |")
    return "\n".join(lines)
