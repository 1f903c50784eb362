"""From a spec and a weights argument to a Backbone."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from eyetune.backbones.backbone import Backbone
from eyetune.backbones.inspection import hint
from eyetune.backbones.opening import open_checkpoint
from eyetune.backbones.spec import BackboneSpec
from eyetune.backbones.weights import LoadReport, empty_network, fill, plan
from eyetune.errors import WeightsError


def load(
    spec: BackboneSpec, weights: str | Path | None, *, pixels: int | None = None, pool: str | None = None
) -> Backbone:
    """The work of :func:`eyetune.backbones.load_backbone`."""
    pool, pixels = spec.check_pool(pool), spec.check_pixels(pixels)
    report: LoadReport | None = None
    if weights == "random":
        network = spec.build(pixels, pool)
    elif weights == "hub" and spec.kind == "timm":
        from eyetune.backbones.timm_any import pretrained

        network, report = pretrained(spec, pixels, pool)
    else:
        network, report = _from_file(spec, _file(spec, weights), pixels, pool)
    network.eval()
    return Backbone(
        spec,
        network,
        preprocess=spec.preprocess_at(pixels),
        pool=pool,
        width=spec.pools[pool],
        report=report,
    )


def _file(spec: BackboneSpec, weights: str | Path | None) -> Path:
    """The file that `weights` means. Raises WeightsError when it means none."""
    if weights == "hub":
        from eyetune.backbones.hub import download

        return download(spec)
    if weights is not None:
        return Path(weights)
    if spec.embedded is None:
        raise WeightsError(f"model.weights: {spec.name} needs its weights. {where_to_get(spec)}")
    if not spec.embedded.is_file():
        raise WeightsError(
            f"the weights of {spec.name} should be shipped with the package but are not at {spec.embedded}. "
            "Install EyeTune again, or use weights: random for an untrained network."
        )
    return spec.embedded


def where_to_get(spec: BackboneSpec) -> str:
    """One sentence or two: which file, from where, on which terms, and what to type."""
    if spec.kind == "timm":
        return "Use weights: hub for timm's pretrained ones, random for none, or give a file."
    hub = " Or weights: hub downloads it." if spec.download else ""
    return f"Get them from {spec.source} (licence: {spec.licence}) and set model.weights to the file.{hub}"


def _from_file(spec: BackboneSpec, path: Path, pixels: int, pool: str) -> tuple[nn.Module, LoadReport]:
    checkpoint = open_checkpoint(path, where=where_to_get(spec))
    network = empty_network(spec, pixels, pool)
    made = plan(spec, network, checkpoint)
    if not made.report.whole:
        advice = hint(spec, pool, checkpoint)
        raise WeightsError(f"{path} does not load whole into {spec.name}.\n{made.report.faults()}\n{advice}")
    if any(parameter.is_meta for parameter in network.parameters()):
        network.to_empty(device="cpu")
        _reset(network, [name for name, _ in made.report.left_initial])
    fill(network, made, checkpoint)
    return network, made.report


def _reset(network: nn.Module, names: list[str]) -> None:
    """Initialise the modules that hold the tensors `names`, which no file brings."""
    for module in {name.rpartition(".")[0] for name in names}:
        network.get_submodule(module).reset_parameters()  # type: ignore[operator]
