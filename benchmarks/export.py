"""What exporting brings: images a second, memory and size of a run in PyTorch (float32, bfloat16), ONNX and int8.

    python benchmarks/export.py [--models nano,resnet50,retfound-green,retfound] [--images 8]

Random weights (but nano's): what is computed, and how fast, does not depend on them. Each way runs in a process of its
own, the exported ones in one that never imports PyTorch, so that peak memory is their own. CPU seconds are those of the
forward passes alone, best of two rounds: other work on the machine disturbs their ratios least.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

WAYS = ("PyTorch, float32", "PyTorch, bfloat16", "ONNX, float32", "ONNX, int8")


def make(name: str, folder: Path) -> Path:
    """The run folder of an untrained network with LoRA (a convolutional one: whole), and a few drawn eyes."""
    from dataclasses import replace

    import torch

    from eyetune.config import Config
    from eyetune.data.phantom import write_cohort
    from eyetune.data.records import open_manifest
    from eyetune.data.splits import write_splits
    from eyetune.train.answers import answer_to
    from eyetune.train.rundir import RunDir
    from eyetune.verbs.finetune import build_model, model_card

    write_cohort(folder / "eyes", patients=4, size=256)
    config = Config.parse(
        {
            "model": {"backbone": name, "weights": None if name == "nano" else "random"},
            "data": {"table": str(folder / "eyes" / "labels.csv"), "label_column": "dr_grade", "cache": False},
            "adapt": {"kind": "full" if "net" in name else "lora"},
            "out": str(folder / "run"),
        }
    )
    manifest = open_manifest(config.data, kind=config.reads)
    splits = ["train" if place % 2 else "val" for place in range(len(manifest))]
    pairs = zip(manifest, splits, strict=True)
    manifest = manifest.with_records(replace(record, split=split) for record, split in pairs)
    model, strategy = build_model(config, manifest.classes)
    *_, head = model.head.modules()
    with torch.no_grad():  # a network that calls something: the calls of one without a preference are noise
        head.bias.copy_(torch.arange(len(manifest.classes)))
    run = RunDir.create(folder / "run")
    run.write_config(config)
    run.write_environment({})
    run.write_load_report({})
    run.save_best(strategy.checkpoint(model), model_card(config, answer_to(config.asked, manifest.classes), model))
    run.settle(-1)
    write_splits(manifest, run.splits_file)
    return run.path


def export(run: str, path: str, numbers: str) -> dict[str, float]:
    """Write the ONNX file; CPU seconds, size, and what the check found."""
    from eyetune.exporting import write_onnx
    from eyetune.train.run import load_run

    start = time.process_time()
    found = write_onnx(load_run(run, device="cpu", precision="fp32"), Path(path), int8=numbers == "int8")
    size = Path(path).stat().st_size / 2**20
    return {"seconds": time.process_time() - start, "mib": size, "differs": found.probabilities}


def measure(path: str, precision: str, images: str) -> dict[str, float]:
    """Images a second and a CPU second, the weights' MiB in PyTorch, the process's peak memory."""
    from eyetune.predicting.model import open_model

    model, count = open_model(path, device="cpu", precision=precision), int(images)
    side = model.settings.pixels
    squares = list(np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8))
    names = [str(number) for number in range(count)]
    model.table_of(names[:2], squares[:2])
    taken = []
    for _ in range(2):
        cpu, wall = time.process_time(), time.perf_counter()
        model.table_of(names, squares, batch_size=8)
        taken.append((time.process_time() - cpu, time.perf_counter() - wall))
    cpu, wall = (min(times) for times in zip(*taken, strict=True))
    run = model.as_run()
    tensors = [] if run is None else list(run.model.state_dict().values())
    return {
        "rate": count / wall,
        "per_cpu_second": count / cpu,
        "mib": sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 2**20,
        "peak_gib": own_peak() / 2**30,
    }


def own_peak() -> int:
    """Most bytes this process held. (`common.own_peak` comes with PyTorch.)"""
    import resource

    status = Path("/proc/self/status")
    if status.is_file():
        return next(int(line.split()[1]) for line in status.open() if line.startswith("VmHWM")) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def alone(*words: str) -> dict[str, float]:
    """One of the functions above in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--alone", *words], stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def rows(name: str, images: int) -> list[list[Any]]:
    """The rows of one network."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        run = str(make(name, folder))
        files = {WAYS[2]: str(folder / "float32.onnx"), WAYS[3]: str(folder / "int8.onnx")}
        made = {way: alone("export", run, path, Path(path).stem) for way, path in files.items()}
        precisions = {WAYS[0]: "fp32", WAYS[1]: "bf16"}
        found = {way: alone("measure", files.get(way, run), precisions.get(way, "auto"), str(images)) for way in WAYS}
        first = found[WAYS[0]]
        return [
            [
                name,
                way,
                one["rate"],
                one["per_cpu_second"],
                f"{one['per_cpu_second'] / first['per_cpu_second']:.2f}x",
                one["peak_gib"],
                f"{made[way]['mib'] if way in made else first['mib']:,.0f}",
                f"{made[way]['differs']:.1e}" if way in made else "",
                made[way]["seconds"] if way in made else "",
            ]
            for way, one in found.items()
        ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", default="nano,resnet50,retfound-green,retfound")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--alone", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        print(json.dumps({"export": export, "measure": measure}[options.alone[0]](*options.alone[1:])))
        return
    from common import machine, markdown

    print(machine())
    columns = ["network", "how", "images/s", "images a CPU second", "against PyTorch float32", "peak GiB"]
    columns += ["file or weights, MiB", "largest difference of a probability", "CPU s to export"]
    head = True
    for name in options.models.split(","):
        print(*markdown(columns, rows(name, options.images)).splitlines()[0 if head else 2 :], sep="\n", flush=True)
        head = False


if __name__ == "__main__":
    main()
