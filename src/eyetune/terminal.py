"""Tables on the terminal, and whole in a pipe."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType

#: Columns where nobody's window says: wide enough for every table of this package.
PIPE_WIDTH = 150


def show(*parts: RenderableType) -> None:
    """Print tables and lines to stdout: as wide as the window, or `PIPE_WIDTH` where there is none."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=PIPE_WIDTH)
    for part in parts:
        console.print(part, highlight=False)
