"""Pretrain `nano`, EyeTune's embedded backbone, on synthetic eyes: this script made `weights/nano.safetensors`.

    PYTHONPATH=src python recipes/pretrain_nano.py --out build/nano

It draws a cohort once (``--eyes``), then teaches a small ViT what was drawn: from every patch token which structures
lie under that patch (arteries, veins, disc, cup, fovea and each kind of lesion), from the CLS token where disc and
fovea are, the vertical cup-disc ratio, and how much of the picture vessels, blood and bright lesions cover. The DR
grade is never a target, and cohorts with seeds below 10 000, which the demo and the tests draw, are refused.

Stopped, it goes on from its last epoch when run again with the same arguments. After every epoch
``OUT/nano.safetensors`` holds the weights so far.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from eyetune.data.fundus import FundusSettings, find_field, prepare
from eyetune.data.phantom import CAMERAS, LESIONS, sample

PIXELS, PATCH = 224, 16
ARCHITECTURE: dict[str, Any] = {
    "img_size": PIXELS,
    "patch_size": PATCH,
    "embed_dim": 192,
    "depth": 6,
    "num_heads": 3,
    "num_classes": 0,
    "class_token": True,
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

FIRST_SEED = 20_001
"""Cohorts below 10 000 belong to the demo and the tests; pretraining keeps a good distance."""
GRADE_WEIGHTS = (0.12, 0.22, 0.28, 0.20, 0.18)
"""How often each severity is drawn: fewer empty eyes than in a clinic. Nothing learns which one an eye has."""
CAMERA = "clinic"
"""Pretraining sees one camera, so that the others remain a domain shift."""
SHOT_PIXELS = (256, 320, 512)
"""Sides of the photographs; each is cropped to its field and reduced to `PIXELS`, as a user's photographs are."""

STRUCTURES: dict[str, float] = {"arteries": 56, "veins": 56, "disc": 256, "cup": 256, "fovea": 256}
_LESION_AREA = {"microaneurysm": 2.0, "hard_exudate": 2.0}
AREAS: dict[str, float] = STRUCTURES | {kind: _LESION_AREA.get(kind, 6.0) for kind in LESIONS}
"""The dense targets, and the area (pixels of a patch's 256) at which a patch counts as fully showing each."""
CELLS = PIXELS // 4
"""Masks are stored on a grid of this side: fine enough to follow an augmentation, sixteen times smaller."""
GEOMETRY = ("disc_x", "disc_y", "fovea_x", "fovea_y", "vcdr")
AMOUNTS = {
    "vessels": ("arteries", "veins"),
    "blood": ("microaneurysm", "blot_haemorrhage", "flame_haemorrhage", "preretinal_haemorrhage"),
    "bright": ("hard_exudate", "cotton_wool_spot"),
}
"""What the CLS token sums up, as the square root of the area: coarser than the patches know it, so that a linear probe
on it has something to leave to fine-tuning."""

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


# --- drawing ---------------------------------------------------------------------------------------------------------


def photographed(seed: int, patient: int, eye: str, camera: str, pixels: int) -> tuple[Bytes, Bytes, Floats]:
    """One eye as the network will see it, and what was drawn.

    Returns:
        The photograph cropped to its field, uint8[PIXELS, PIXELS, 3]; the coverage of every key of :data:`AREAS`,
        uint8[len(AREAS), CELLS, CELLS], 0..255; the positions of disc and fovea (-1..1) and vcdr, float32[5].
    """
    drawn = sample(seed, patient, eye, camera, pixels, masks=True, grades=GRADE_WEIGHTS)
    photo = _compressed(drawn.image, CAMERAS[camera].quality)
    field = find_field(photo)
    image = prepare(photo, FundusSettings(PIXELS), field)
    maps = np.zeros((len(AREAS), CELLS, CELLS), np.uint8)
    for channel, kind in enumerate(AREAS):
        if kind in drawn.masks:  # (as a gray picture: `prepare` takes colour)
            maps[channel] = prepare(cv2.merge([drawn.masks[kind]] * 3), FundusSettings(CELLS), field)[..., 0]
    # The camera shifts and tilts a little: the disc is taken from the picture, and the fovea moves with it.
    disc = _centre(maps[list(AREAS).index("disc")])
    view = CAMERAS[camera].fill / CAMERAS[camera].view * pixels / max(field.width, field.height)
    fovea = disc + view * (np.array(drawn.facts["fovea"]) - np.array(drawn.facts["disc"]))
    maps[list(AREAS).index("fovea")] = _spot(fovea)
    return image, maps, np.array([*disc, *fovea, drawn.facts["vcdr"]], np.float32)


def _compressed(photo: Bytes, quality: int) -> Bytes:
    """What JPEG leaves of an RGB photograph."""
    _, data = cv2.imencode(".jpg", photo[..., ::-1], (cv2.IMWRITE_JPEG_QUALITY, quality))
    return np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR), np.uint8)[..., ::-1]


def _axis() -> NDArray[np.float64]:
    return (np.arange(CELLS) + 0.5) / CELLS * 2 - 1


def _centre(coverage: Bytes) -> NDArray[np.float64]:
    """x, y of a map's centre of mass, -1..1."""
    weight = coverage.astype(np.float64) + 1e-9
    return np.array([(weight.sum(0) * _axis()).sum(), (weight.sum(1) * _axis()).sum()]) / weight.sum()


def _spot(centre: NDArray[np.float64], sigma: float = 0.06) -> Bytes:
    """A soft spot around `centre` (x, y in -1..1)."""
    x, y = np.exp(-(((_axis() - centre[0]) / sigma) ** 2) / 2), np.exp(-(((_axis() - centre[1]) / sigma) ** 2) / 2)
    return np.asarray(np.rint(255 * np.outer(y, x)), np.uint8)


def _draw_patient(patient: int, seed: int) -> list[tuple[Bytes, Bytes, Floats]]:
    """Both eyes of a patient, photographed at a size of its own."""
    cv2.setNumThreads(1)
    pixels = int(np.random.default_rng([seed, patient, 77]).choice(SHOT_PIXELS))
    return [photographed(seed, patient, eye, CAMERA, pixels) for eye in "RL"]


@dataclass(frozen=True)
class Cohort:
    """A drawn cohort: images uint8[N, PIXELS, PIXELS, 3], maps uint8[N, K, CELLS, CELLS], facts float32[N, F]."""

    images: Bytes
    maps: Bytes
    facts: Floats


def cohort(folder: Path, seed: int, eyes: int, processes: int) -> Cohort:
    """Draw a cohort into `folder` unless it is already there."""
    if seed < FIRST_SEED:
        raise SystemExit(f"Seed {seed} is not for pretraining: seeds below {FIRST_SEED} belong to the demo and tests.")
    stem = folder / f"cohort-{seed}-{eyes}"
    shapes = {
        "images": ((eyes, PIXELS, PIXELS, 3), np.uint8),
        "maps": ((eyes, len(AREAS), CELLS, CELLS), np.uint8),
        "facts": ((eyes, len(GEOMETRY)), np.float32),
    }
    done = stem.with_suffix(".done")
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {
            name: np.lib.format.open_memmap(f"{stem}-{name}.npy", mode="w+", dtype=dtype, shape=shape)
            for name, (shape, dtype) in shapes.items()
        }
        started, patients = time.time(), eyes // 2
        draw = partial(_draw_patient, seed=seed)
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            for patient, pair in enumerate(pool.imap(draw, range(patients), chunksize=8)):
                for row, parts in enumerate(pair, start=2 * patient):
                    for array, part in zip(arrays.values(), parts, strict=True):
                        array[row] = part
                if (patient + 1) % 250 == 0 or patient + 1 == patients:
                    speed = 2 * (patient + 1) / (time.time() - started)
                    print(f"drew {2 * (patient + 1)} of {eyes} eyes, {speed:.1f} a second", flush=True)
        for array in arrays.values():
            array.flush()
        done.touch()
    return Cohort(**{name: np.load(f"{stem}-{name}.npy", mmap_mode="r") for name in shapes})


# --- the network and what it is asked --------------------------------------------------------------------------------


class Pretext(nn.Module):
    """nano with two linear heads that are thrown away afterwards.

    Shapes: images float[B, 3, 224, 224], normalised -> dense logits float[B, 196, K], facts float[B, F].
    """

    def __init__(self) -> None:
        super().__init__()
        self.network = VisionTransformer(**ARCHITECTURE)
        width = self.network.embed_dim
        self.dense = nn.Linear(width, len(AREAS))
        self.whole = nn.Linear(width, len(GEOMETRY) + len(AMOUNTS))
        nn.init.constant_(self.dense.bias, -3.0)  # most patches show none of most things

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.network.forward_features(images)
        return self.dense(tokens[:, 1:]), self.whole(tokens[:, 0])


def augment(images: Tensor, maps: Tensor, facts: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Flip all, turn, shift and zoom half, vary the colours of all; targets move with the picture.

    Args:
        images: float[B, 3, 224, 224], 0..1.
        maps: float[B, K, CELLS, CELLS], 0..1.
        facts: float[B, F]; positions first.
        generator: Decides everything.
    """
    count = len(images)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator) * (high - low) + low

    sign = torch.where(uniform(0, 1, 2) < 0.5, -1.0, 1.0)  # over x, over y
    moved = (uniform(0, 1) < 0.5).float()
    turn, zoom = moved * uniform(-0.35, 0.35), 1 + moved * uniform(-0.10, 0.10)
    shift = moved[:, None] * uniform(-0.06, 0.06, 2)
    cos, sin = torch.cos(turn), torch.sin(turn)
    linear = torch.stack([cos, -sin, sin, cos], 1).view(count, 2, 2) * zoom[:, None, None] * sign[:, None, :]
    theta = torch.cat([linear, shift[:, :, None]], 2)  # where each pixel of the result is taken from
    images, maps = (
        F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)
        for x in (images, maps)
    )
    places = facts[:, :4].view(count, 2, 2)  # two points as rows
    places = torch.linalg.solve(linear, (places - shift[:, None, :]).transpose(1, 2)).transpose(1, 2)
    facts = torch.cat([places.reshape(count, 4), facts[:, 4:]], 1)

    gain = uniform(0.9, 1.1, 1, 1, 1) * uniform(0.96, 1.04, 3, 1, 1)
    contrast = uniform(0.9, 1.1, 1, 1, 1)
    middle = images.mean((2, 3), keepdim=True)
    images = ((images - middle) * contrast + middle) * gain
    return images.clamp(0, 1), maps, facts


def dense_targets(maps: Tensor) -> Tensor:
    """Coverage float[B, K, CELLS, CELLS], 0..1 -> how far each patch shows each thing, float[B, 196, K], 0..1."""
    cells = CELLS * PATCH // PIXELS
    area = F.avg_pool2d(maps, cells) * PATCH**2
    full = torch.tensor(list(AREAS.values())).view(1, -1, 1, 1)
    return (area / full).clamp(0, 1).flatten(2).transpose(1, 2)


def whole_targets(maps: Tensor, facts: Tensor) -> Tensor:
    """The facts and the square root of the share of the picture that each of :data:`AMOUNTS` covers, float[B, 8]."""
    covered = dict(zip(AREAS, maps.mean((2, 3)).unbind(1), strict=True))
    amounts = [torch.stack([covered[kind] for kind in kinds]).sum(0).sqrt() for kinds in AMOUNTS.values()]
    return torch.cat([facts, torch.stack(amounts, 1)], 1)


def normalised(images: Tensor) -> Tensor:
    """float[B, 3, H, W], 0..1 -> by ImageNet's mean and deviation."""
    return (images - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)


def batches(data: Cohort, size: int, generator: torch.Generator | None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Images 0..1, maps 0..1 and facts; in random order and augmented if there is a generator."""
    total = len(data.facts)
    order = torch.arange(total) if generator is None else torch.randperm(total, generator=generator)
    for start in range(0, total - size + 1 if generator else total, size):
        rows = np.sort(order[start : start + size].numpy())
        images = torch.from_numpy(data.images[rows]).permute(0, 3, 1, 2).float() / 255
        parts = images.contiguous(), torch.from_numpy(data.maps[rows]).float() / 255, torch.from_numpy(data.facts[rows])
        yield parts if generator is None else augment(*parts, generator)


@dataclass(frozen=True)
class Units:
    """What is subtracted from the CLS token's targets and what they are divided by, float[8] each."""

    centre: Tensor
    spread: Tensor

    @classmethod
    def of(cls, data: Cohort) -> Units:
        """From the first eyes as they were drawn."""
        known = whole_targets(
            torch.from_numpy(data.maps[:512]).float() / 255, torch.from_numpy(np.array(data.facts[:512]))
        )
        spread = known.std(0)
        spread[:4] = 0.3  # positions, which flips and turns spread further than they were drawn
        return cls(known.mean(0), spread)


def losses(model: Pretext, images: Tensor, maps: Tensor, facts: Tensor, units: Units) -> tuple[Tensor, Tensor]:
    """Cross-entropy over patches and things, and the Huber loss of the CLS token's targets in units of their spread."""
    with torch.autocast("cpu", torch.bfloat16):
        dense, whole = model(normalised(images))
    per_patch = F.binary_cross_entropy_with_logits(dense.float(), dense_targets(maps), reduction="none")
    wanted = (whole_targets(maps, facts) - units.centre) / units.spread
    return per_patch.mean((0, 1)).sum(), F.huber_loss(whole.float(), wanted)


# --- training --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def whiten(model: Pretext, images: Bytes) -> None:
    """Start the patch embedding as a random rotation of the patches' whitened principal components.

    Neighbouring pixels of a retina are nearly equal: from a random start, small lesions drown in the patch's mean for
    many thousand images. (As Jordan, "94% on CIFAR-10 in 3.29 seconds", 2024, starts the first convolution.)
    """
    embedding = model.network.patch_embed.proj
    width = embedding.out_channels
    batch = normalised(torch.from_numpy(images.copy()).permute(0, 3, 1, 2).float() / 255)
    patches = batch.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2)
    patches = patches[patches.std(1) > 0.01]  # not the black surround
    values, vectors = torch.linalg.eigh(torch.cov(patches.T))
    scale = 1 / (values + 1e-3 * values[-width:].mean()).sqrt()
    rotation = torch.linalg.qr(torch.randn(width, width)).Q
    filters = 0.5 * rotation @ (vectors * scale)[:, -width:].T
    embedding.weight.copy_(filters.view_as(embedding.weight))
    embedding.bias.copy_(-filters @ patches.mean(0))


def optimizers(model: Pretext, rate: float) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the matrices of the blocks, AdamW for everything else.

    After the first 2 400 images the loss over patches was 1.23 so, and 1.40 with AdamW throughout.
    """
    matrices = [p for p in model.network.blocks.parameters() if p.ndim == 2]
    taken = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in taken]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def export(model: Pretext, path: Path, about: str) -> None:
    """The network alone, half precision on disk."""
    tensors = {name: value.detach().half().contiguous() for name, value in model.network.state_dict().items()}
    save_file(tensors, path, metadata={"source": about})  # (one key: the format does not keep the order of several)


@torch.no_grad()
def validate(model: Pretext, held_out: Cohort, units: Units, size: int) -> dict[str, float]:
    """Losses on unseen eyes, and how well what is said of each eye correlates with what was drawn: the CLS token's
    targets, and for each kind of lesion the number of patches that show it."""
    model.eval()
    sums, seen, said, true = np.zeros(2), 0, [], []
    for images, maps, facts in batches(held_out, size, None):
        sums += len(images) * np.array([float(x) for x in losses(model, images, maps, facts, units)])
        seen += len(images)
        with torch.autocast("cpu", torch.bfloat16):
            dense, whole = model(normalised(images))
        said.append(torch.cat([whole.float(), dense.float().sigmoid().sum(1)], 1))
        true.append(torch.cat([whole_targets(maps, facts), dense_targets(maps).sum(1)], 1))
    model.train()
    predicted, actual = torch.cat(said).numpy(), torch.cat(true).numpy()
    result = {"dense": sums[0] / seen, "whole": sums[1] / seen}
    for column, name in enumerate((*GEOMETRY, *AMOUNTS, *AREAS)):
        if actual[:, column].std() > 0:
            result[name] = float(np.corrcoef(predicted[:, column], actual[:, column])[0, 1])
    return {name: round(float(value), 3) for name, value in result.items()}


def train(data: Cohort, held_out: Cohort, out: Path, options: argparse.Namespace) -> Pretext:
    """Train for `options.epochs`, going on from `out`'s checkpoint if there is one."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    model = Pretext()
    for block in model.network.blocks:
        block.attn.fused_attn = False  # on a CPU, plain matrix products train a third faster than the fused kernel
    units = Units.of(data)
    whiten(model, data.images[:512])
    steppers = optimizers(model, options.lr)
    per_epoch = len(data.facts) // options.batch
    total, warm_up = per_epoch * options.epochs, max(1, min(200, per_epoch * options.epochs // 10))
    checkpoint, first = out / "checkpoint.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for stepper, saved in zip(steppers, state["optimizers"], strict=True):
            stepper.load_state_dict(saved)
        first = state["epoch"]
        print(f"going on after epoch {first}")
    step = first * per_epoch
    for epoch in range(first, options.epochs):
        started, sums = time.time(), np.zeros(2)
        generator = torch.Generator().manual_seed(options.seed * 1000 + epoch)
        for done, (images, maps, facts) in enumerate(batches(data, options.batch, generator), start=1):
            rise = min(1.0, (step + 1) / warm_up)
            fall = 0.5 * (1 + math.cos(math.pi * max(0, step - warm_up) / max(1, total - warm_up)))
            for group in (group for stepper in steppers for group in stepper.param_groups):
                group["lr"] = options.lr * rise * max(fall, 0.01)
            dense, whole = losses(model, images, maps, facts, units)
            model.zero_grad()
            (dense + options.facts_weight * whole).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for stepper in steppers:
                stepper.step()
            step += 1
            sums += [dense.item(), whole.item()]
            if done % 100 == 0:
                speed = done * options.batch / (time.time() - started)
                print(f"epoch {epoch + 1} step {done}/{per_epoch} dense {sums[0] / done:.4f} "
                      f"whole {sums[1] / done:.4f} {speed:.0f} images/s", flush=True)  # fmt: skip
        scores = validate(model, held_out, units, 64)
        line = {"epoch": epoch + 1, "train_dense": round(sums[0] / per_epoch, 4), "minutes":
                round((time.time() - started) / 60, 2), **scores}  # fmt: skip
        print(json.dumps(line), flush=True)
        with (out / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")
        about = f"EyeTune recipes/pretrain_nano.py, {options.eyes} eyes, epoch {epoch + 1} of {options.epochs}"
        export(model, out / "nano.safetensors", about)
        state = {"model": model.state_dict(), "optimizers": [s.state_dict() for s in steppers], "epoch": epoch + 1}
        torch.save(state, checkpoint.with_suffix(".part"))
        checkpoint.with_suffix(".part").replace(checkpoint)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the cohort, checkpoints and nano.safetensors"
    )
    parser.add_argument("--eyes", type=int, default=8000, help="eyes to draw and learn from (default 8000)")
    parser.add_argument("--epochs", type=int, default=3, help="passes over them (default 3)")
    parser.add_argument("--batch", type=int, default=8, help="images a step (default 8)")
    parser.add_argument("--lr", type=float, default=3e-3, help="highest learning rate (default 0.003)")
    parser.add_argument("--facts-weight", type=float, default=0.5, help="weight of the CLS token's task (default 0.5)")
    parser.add_argument("--seed", type=int, default=FIRST_SEED, help=f"cohort and training seed (>= {FIRST_SEED})")
    parser.add_argument("--processes", type=int, default=2, help="processes that draw (default 2)")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="threads that train (default: all)"
    )
    parser.add_argument("--data", type=Path, default=None, help="folder with the drawn cohort (default: OUT)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    folder = options.data or options.out
    data = cohort(folder, options.seed, options.eyes, options.processes)
    held_out = cohort(folder, options.seed + 9000, 512, options.processes)
    train(data, held_out, options.out, options)
    print(f"wrote {options.out / 'nano.safetensors'}")


if __name__ == "__main__":
    main()
