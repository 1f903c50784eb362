"""`eyetune models …`: the backbones there are, and what a weights file holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from eyetune.terminal import show

if TYPE_CHECKING:
    from eyetune.backbones import BackboneSpec, Inspection

PROBLEMS_FOUND = 1


def list_models() -> None:
    """Every backbone: width, pixels, normalisation, pooling, licence, and where its weights are."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from eyetune.backbones import BACKBONES

    table = Table(box=SIMPLE_HEAD, show_lines=True)
    for column in ("name", "network", "parameters", "pixels", "mean / std", "pool: width", "licence and weights"):
        table.add_column(column, overflow="fold", no_wrap=column == "name")
    for name, spec in BACKBONES:
        table.add_row(name, *_row(spec))
    show(
        table,
        "The first pooling is the default; * squashes photographs to a square instead of padding them.\n"
        "Any timm name works as well: resnet50, efficientnet_b3, vit_base_patch16_224, …",
    )


def _row(spec: BackboneSpec) -> tuple[str, ...]:
    from eyetune.backbones import BACKBONES

    image = spec.preprocess
    aliases = BACKBONES.aliases(spec.name)
    also = f"\nalso: {', '.join(aliases)}" if aliases else ""
    pools = {spec.pool: spec.width, **spec.pools}
    return (
        f"{spec.title}\n{spec.architecture}{also}",
        f"{spec.parameters / 1e6:.1f} M",
        f"{image.pixels}{'*' if image.fit == 'squash' else ''}",
        "\n".join(" ".join(f"{value:.3f}".strip("0") for value in values) for values in (image.mean, image.std)),
        "\n".join(f"{pool}: {width}" for pool, width in pools.items()),
        f"{spec.licence}\n{spec.source}{' — or weights: hub' if spec.download else ''}",
    )


def inspect(file: Path, *, as_: Annotated[str | None, Parameter(name="--as")] = None) -> int:
    """Say which family a weights file is, what is inside, and how much of it would load. Nothing in it is executed.

    Exit code 0: the file would load whole; 1: it would not.

    Args:
        file: Checkpoint: .pth, .pt or .safetensors.
        as_: Judge it as this backbone, instead of the one it comes nearest to.
    """
    from eyetune.backbones import inspect_checkpoint

    found = inspect_checkpoint(file, as_)
    print("\n".join(_findings(found)))
    return 0 if found.whole else PROBLEMS_FOUND


def _findings(found: Inspection) -> list[str]:
    lines = [f"{found.path}: {found.format}, {found.bytes / 1e6:,.1f} MB"]
    if found.report is not None:
        lines.append(f"  sha256        {found.report.sha256}")
    for name, (tensors, numbers) in found.containers.items():
        lines.append(f"  inside        {name or '(flat)'}: {tensors} tensors, {numbers:,} numbers")
    if found.other:
        lines.append(f"  besides       {', '.join(found.other)}")
    if found.named_as and found.named_as != found.family:
        lines.append(f"  by its name   {found.named_as}")
    if found.report is None:
        return [
            *lines,
            "It resembles none of the known backbones. With --as NAME it is judged as one, timm's included.",
        ]
    lines += found.report.summary().splitlines()[1:]
    if found.whole:
        pool = f"  pool: {found.pool}" if found.needs_pool else ""
        verdict = f"It would load whole. Under `model:`\n  backbone: {found.family}\n  weights: {found.path}\n{pool}"
    else:
        verdict = f"It would not load whole into {found.family}, the backbone it was judged as."
    return [*lines, verdict.rstrip()]
