"""Exact retrieval in both directions: time and memory as the gallery grows, and how much is computed twice.

python benchmarks/retrieval.py --sizes 10000,30000,100000 --threads 2
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from common import in_process, machine, markdown

from eyetune.clip.ranking import Answers, rank
from eyetune.clip.scoring import measured


def features(size: int, width: int, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Photographs and texts, each text its photographs' direction and `noise` times as much of chance."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size, width, generator=generator)
    texts = images + noise * torch.randn(size, width, generator=generator)
    return torch.nn.functional.normalize(images), torch.nn.functional.normalize(texts)


def once(size: int, noise: float, given: argparse.Namespace) -> dict[str, float]:
    """One ranking and its measures: seconds by the clock and of all processors, recall, in a process of its own."""
    torch.set_num_threads(given.threads)
    images, texts = features(size, given.width, noise)
    answers = Answers.of([(place, place) for place in range(size)], size, size)
    start, cpu = time.perf_counter(), time.process_time()
    ranking = rank(images, texts, answers, device=given.device)
    ranked, ranked_cpu = time.perf_counter() - start, time.process_time() - cpu
    start, cpu = time.perf_counter(), time.process_time()
    found = measured(ranking, answers, resamples=given.resamples)
    return {
        "seconds": ranked,
        "cpu": ranked_cpu,
        "measures_cpu": time.process_time() - cpu,
        "features_gib": 2 * images.numel() * 4 / 2**30,
        "recall": found["image_to_text"]["metrics"]["recall_at_1"]["value"],
        "median": float(np.median(ranking.images.expected())),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="10000,30000,100000")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--noises", default="6,1000", help="how unlike texts are; 1000 is a blind model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--resamples", type=int, default=2000)
    given = parser.parse_args()
    rows = []
    for size in map(int, given.sizes.split(",")):
        for noise in map(float, given.noises.split(",")):
            found = in_process(once, size, noise, given)
            rows.append(
                [
                    f"{size:,} x {size:,}",
                    f"{found['recall']:.3f}, {found['median']:,.0f}",
                    f"{found['seconds']:.1f}",
                    f"{found['cpu']:.1f}",
                    f"{found['measures_cpu']:.1f}",
                    f"{found['features_gib']:.2f}",
                    f"{found['peak_gib']:.2f}",
                ]
            )
    print(machine())
    head = ["pairs", "R@1, median rank", "s", "CPU s", "CPU s, intervals", "features, GiB", "peak, GiB"]
    print(markdown(head, rows))


if __name__ == "__main__":
    main()
