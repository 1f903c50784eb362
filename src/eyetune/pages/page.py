"""Templates to one self-contained HTML file: style, pictures and data inside it, nothing fetched, no script needed."""

from __future__ import annotations

import base64
import io
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eyetune import files

if TYPE_CHECKING:
    import numpy as np
    from jinja2 import Environment
    from markupsafe import Markup
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

#: JPEG quality of the pictures inside a page.
QUALITY = 82


def write_page(path: Path, template: str, **content: Any) -> Path:
    """Fill a template of this room and write it to `path`, atomically; returns the path.

    Args:
        path: the HTML file.
        template: name of a file in `pages/templates`, which extends `base.html.j2`; a name that the content lacks is
            an error, and every text is escaped.
        content: what the template asks for; of `base.html.j2` that is `title`.

    Raises UserError when the file cannot be written.
    """
    text = _environment().get_template(template).render(**content)
    with files.atomic(Path(path)) as temporary:
        # A file name that is not UTF-8 is shown with a sign in place of what cannot be read.
        temporary.write_text(text.encode("utf-8", "replace").decode(), encoding="utf-8")
    return Path(path)


def picture(image: Path | NDArray[np.uint8], *, side: int | None = None) -> str:
    """A picture as a data URI for `<img src>`.

    Args:
        image: a PNG file that EyeTune drew itself (taken as it is), or pixels uint8[H, W, 3], RGB (become JPEG).
        side: pixels beyond that are reduced to this longer side; None keeps the size.
    """
    if isinstance(image, Path):
        return "data:image/png;base64," + base64.b64encode(image.read_bytes()).decode()
    import cv2

    height, width = image.shape[:2]
    if side is not None and max(height, width) > side:
        scale = side / max(height, width)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    encoded = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1]
    return "data:image/jpeg;base64," + base64.b64encode(encoded.tobytes()).decode()


def chart(figure: Figure) -> Markup:
    """A figure as inline SVG. Its paper is left out; what it draws must read on the card the page puts below it."""
    from markupsafe import Markup

    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    svg = stream.getvalue()
    return Markup(svg[svg.index("<svg") :])  # noqa: S704 - matplotlib's own, its texts escaped by it


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("eyetune.pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = _number
    environment.filters["interval"] = _interval
    environment.filters["signed"] = _signed
    environment.filters["percent"] = lambda value: "–" if value is None else f"{100 * value:.1f} %"
    return environment


def _number(value: float | None, digits: int = 3) -> str:
    """0.8731 -> 0.873; None -> a dash."""
    return "–" if value is None else f"{value:.{digits}f}"


def _signed(value: float | None, digits: int = 3) -> str:
    """-0.02 -> −0.020, 0.02 -> +0.020; None -> a dash."""
    return "–" if value is None else f"{value:+.{digits}f}".replace("-", "−")


def _interval(ends: tuple[float | None, float | None] | None, digits: int = 3, sign: bool = False) -> str:
    """(0.81, 0.92) -> "0.810 to 0.920", with their signs when asked for; without ends a dash."""
    if ends is None or ends[0] is None or ends[1] is None:
        return "–"
    if sign:
        return f"{_signed(ends[0], digits)} to {_signed(ends[1], digits)}"
    return f"{ends[0]:.{digits}f} to {ends[1]:.{digits}f}"
