"""How much the page may take: of bytes, pixels, places and time. A stranger's request must not cost more than this."""

from __future__ import annotations

from dataclasses import dataclass

from eyetune.data.photo import MAX_PIXELS
from eyetune.errors import ConfigError

MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """Bounds of one server.

    Attributes:
        upload: bytes of one photograph.
        pixels: of one photograph; more is refused by its head, before it is decoded.
        waiting: photographs that are on their way in or wait to be read, all pages together. Who comes later waits at
            the door, and nothing is read from him meanwhile.
        memory: bytes of those.
        results: photographs with a result that are kept, all pages together.
        pages: open pages.
        idle: seconds in which a sender may send nothing.
        patience: seconds for which somebody waits at the door.
        forget: seconds after which a page that does not ask any more is forgotten.
        connections: at a time; more are turned away.
    """

    upload: int = 64 * MIB
    pixels: int = MAX_PIXELS
    waiting: int = 64
    memory: int = 256 * MIB
    results: int = 1000
    pages: int = 64
    idle: float = 15.0
    patience: float = 300.0
    forget: float = 3600.0
    connections: int = 256

    def __post_init__(self) -> None:
        if self.upload > self.memory:
            raise ConfigError(
                f"--max-upload is {self.upload // MIB} MiB and --max-memory {self.memory // MIB}: no photograph of "
                "that size would ever have room. Raise the second, or lower the first."
            )
        if self.pixels > MAX_PIXELS:
            raise ConfigError(f"--max-pixels: at most {MAX_PIXELS // 1_000_000} million, as everywhere in EyeTune.")
