"""`eyetune serve`: a page on this machine where photographs are dropped and read."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from eyetune.errors import ConfigError, MissingExtra, UserError
from eyetune.flags import Device, Precision, Switch

if TYPE_CHECKING:
    from eyetune.predicting.model import TrainedModel

Whole = Annotated[int, Parameter(validator=Number(gte=1))]
Port = Annotated[int, Parameter(validator=Number(gte=0, lte=65535))]


def command(
    model: Path,
    *,
    host: str = "127.0.0.1",
    port: Port = 8000,
    expose: Switch = False,
    name: Annotated[list[str] | None, Parameter(negative=())] = None,
    open: Switch = False,
    point: str = "specificity",
    calibration: str | None = None,
    keep: Path | None = None,
    max_upload: Whole = 64,
    max_pixels: Whole = 100,
    max_waiting: Whole = 64,
    max_memory: Whole = 256,
    max_results: Whole = 1000,
    forget: Whole = 60,
    device: Device = "auto",
    precision: Precision | None = None,
    weights: str | None = None,
) -> int:
    """Show a page where photographs are dropped and a model says what it sees. For research; not a diagnosis.

    Only this machine can open it, nothing is kept on disk, and closing the page forgets its photographs. Ctrl-C ends
    the server.

    Args:
        model: The run folder, or a model exported from one (MODEL.onnx).
        host: The address to listen on.
        port: The port; 0 takes a free one.
        expose: Allow a --host that other machines can reach. There is no password and no encryption: whoever reaches
            the port can use the page (docs/serve.md).
        name: A name under which other machines know this one, with --expose; repeat it for several.
        open: Open the page in the browser.
        point: What decides referable or not at first: specificity, sensitivity, or the name of an operating point.
        calibration: The site whose calibration counts, of those fitted (default: the run's own).
        keep: Folder for a table of the results, a row a photograph (default: nothing is kept). Never the photographs.
        max_upload: Largest photograph, in MiB.
        max_pixels: Largest photograph, in millions of pixels.
        max_waiting: Photographs that may wait at a time; more have to wait before they are taken in.
        max_memory: MiB that photographs which wait may take.
        max_results: Photographs whose results are held at a time, all pages together.
        forget: Minutes after which a page that is gone without a word is forgotten.
        device: auto, cpu, cuda or mps.
        precision: auto, fp32, bf16 or fp16 (default: as in training).
        weights: Where the base weights are now, when they moved since training.
    """
    try:
        from eyetune.serving.server import is_local, listen, make_server
    except ImportError:
        raise MissingExtra("eyetune serve", "serve") from None
    from eyetune.predicting.model import open_model
    from eyetune.serving.app import make_app
    from eyetune.serving.keep import Kept
    from eyetune.serving.limits import MIB, Limits
    from eyetune.serving.reader import Reader

    _check_exposed(host, expose, name, is_local(host))
    limits = Limits(
        upload=max_upload * MIB,
        pixels=max_pixels * 1_000_000,
        waiting=max_waiting,
        memory=max_memory * MIB,
        results=max_results,
        forget=60.0 * forget,
    )
    with contextlib.ExitStack() as ending:
        socket = ending.enter_context(listen(host, port))
        trained = open_model(model, device=device, precision=precision, weights=weights, cache=False)
        _check_alone(trained)
        fitted = trained.calibration_for(calibration)
        reader = Reader(trained, calibration=fitted, point=point, most_pixels=limits.pixels)
        kept = None if keep is None else ending.enter_context(contextlib.closing(Kept(keep, reader)))
        app = make_app(reader, limits, None if kept is None else kept.add)
        address = _address(host, socket.getsockname()[1])
        _say(address, expose, None if kept is None else kept.path)
        if open:
            import webbrowser

            webbrowser.open(address)
        make_server(app, limits, names=tuple(name or ()), addresses=expose).run(sockets=[socket])
    return 0


def _check_exposed(host: str, expose: bool, names: list[str] | None, local: bool) -> None:
    if not local and not expose:
        raise ConfigError(
            f"--host {host} lets other machines reach the page, without password and encryption. If that is meant, add "
            "--expose; else leave --host out (docs/serve.md says how to do it well)."
        )
    if names and not expose:
        raise ConfigError("--name is for a server that others reach: it needs --expose.")


def _check_alone(model: TrainedModel) -> None:
    if model.runtime.processes > 1:
        raise UserError("eyetune serve is one process: start it without torchrun or accelerate.")


def _address(host: str, port: int) -> str:
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104
    return f"http://{shown}:{port}/"


def _say(address: str, expose: bool, kept: Path | None) -> None:
    """What holds for the page, to stderr; its address, to stdout."""
    said = ["For research; not a diagnosis."]
    if expose:
        said.append(
            "Warning: other machines can reach this page. There is no password and no encryption: whoever reaches the "
            "port can use it, and who listens on the network sees the photographs."
        )
    said.append("Photographs stay in memory." if kept is None else f"Results are kept in {kept}; photographs are not.")
    said.append("Ctrl-C ends it.")
    print(*said, sep="\n", file=sys.stderr)
    print(address, flush=True)
