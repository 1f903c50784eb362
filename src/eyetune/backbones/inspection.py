"""What is in a checkpoint file, and which family it is of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from eyetune.backbones.opening import Checkpoint, open_checkpoint
from eyetune.backbones.spec import BACKBONES, BackboneSpec
from eyetune.backbones.weights import LoadReport, empty_network, plan


@dataclass(frozen=True)
class Inspection:
    """What :func:`inspect` found.

    Args:
        path: the file.
        format: how it is written.
        bytes: its size.
        containers: dotted path -> (tensors, numbers in them) of every mapping of tensors.
        other: top-level entries that are not tensors.
        family: the backbone it would load into whole, or comes nearest to; None when it resembles none.
        pool: the pooling with which it does.
        needs_pool: that pooling is not the family's default.
        named_as: the backbone under whose published name the file is saved, or None.
        report: how the file would load into the family.
    """

    path: Path
    format: str
    bytes: int
    containers: dict[str, tuple[int, int]]
    other: tuple[str, ...]
    family: str | None
    pool: str | None
    needs_pool: bool
    named_as: str | None
    report: LoadReport | None

    @property
    def whole(self) -> bool:
        """Whether the file would load whole into :attr:`family`."""
        return self.report is not None and self.report.whole


def inspect(path: Path, spec: BackboneSpec | None = None) -> Inspection:
    """The work of :func:`eyetune.backbones.inspect_checkpoint`."""
    checkpoint = open_checkpoint(path)
    best = _nearest(checkpoint, [spec] if spec else [entry for _, entry in BACKBONES])
    tensors = checkpoint.containers()
    read = {name.partition(".")[0] for name in tensors}
    loose = set(tensors.get("", ()))
    return Inspection(
        path=path,
        format=checkpoint.format,
        bytes=path.stat().st_size,
        containers={name: (len(t), sum(v.numel() for v in t.values())) for name, t in tensors.items()},
        other=tuple(str(key) for key in checkpoint.content if key not in read and key not in loose),
        family=best[0].name if best else None,
        pool=best[1] if best else None,
        needs_pool=best is not None and best[1] != best[0].pool,
        named_as=next((name for name, entry in BACKBONES if entry.publishes(path)), None),
        report=best[2] if best else None,
    )


_RESEMBLES = 0.5  # share of a network's tensors that a file must bring to be called one of its family


def _nearest(checkpoint: Checkpoint, specs: list[BackboneSpec]) -> tuple[BackboneSpec, str, LoadReport] | None:
    """The spec and pooling whose network the file fits best: whole first, then by the share of tensors it brings."""
    found: list[tuple[tuple[bool, float, int], BackboneSpec, str, LoadReport]] = []
    for spec in specs:
        for rank, pool in enumerate((spec.pool, *(p for p in spec.pools if p != spec.pool))):
            network = empty_network(spec, spec.pixels, pool)
            report = plan(spec, network, checkpoint).report
            share = report.matched / max(1, len(network.state_dict()))
            found.append(((report.whole, share, -rank), spec, pool, report))
    if not found:
        return None
    (_, share, _), spec, pool, report = max(found, key=lambda entry: entry[0])
    return (spec, pool, report) if share >= _RESEMBLES or len(specs) == 1 else None


def hint(spec: BackboneSpec, pool: str, checkpoint: Checkpoint) -> str:
    """What to type instead, for a file that does not load whole into `spec`; empty when nothing is known."""
    best = _nearest(checkpoint, [entry for _, entry in BACKBONES])
    if best is not None and best[2].whole and best[0].name != spec.name:
        return f"It looks like {best[0].title}: use model.backbone: {best[0].name}."
    if best is not None and best[2].whole and best[1] != pool:
        return f"It was trained with another pooling: use model.pool: {best[1]}."
    named = next((entry for _, entry in BACKBONES if entry.publishes(checkpoint.path)), None)
    if named is not None and named.name != spec.name:
        return f"By its name it is {named.title}: use model.backbone: {named.name}."
    if best is not None and best[0].name != spec.name:
        return f"It comes nearest to {best[0].title} (model.backbone: {best[0].name}), but would not load whole there."
    return f"See what is inside with: eyetune models inspect {checkpoint.path}"
