"""Small files that ask for much: what a decoder must refuse before it allocates. Made here, never stored."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterable

import numpy as np
from PIL import Image

HUGE = 60_000
"""A side far over the bound on pixels, and inside what every header can say (WebP: see there)."""

INSIDE = 9_900
"""A side inside the bound: the size itself is no reason to refuse."""


def chunk(name: bytes, body: bytes) -> bytes:
    """One PNG chunk with its checksum."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(side: int, *extra: bytes, body: bytes = b"", colour: int = 2, depth: int = 8) -> bytes:
    """A PNG of side x side whose pixels are whatever `body` is."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(extra) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def deflated_zeros(megabytes: int) -> bytes:
    """That many megabytes of zeros, a thousandth of it."""
    squeeze = zlib.compressobj(9)
    return b"".join(squeeze.compress(bytes(1 << 20)) for _ in range(megabytes)) + squeeze.flush()


def tiff(
    tags: Iterable[tuple[int, int, int, int]], body: bytes = b"", *, entries: int | None = None, big: bool = False
) -> bytes:
    """A little-endian TIFF: tags (number, type, count, value or offset), then `body` at offset 8."""
    tags = sorted(tags)
    where = 16 if big else 8
    offset = where + len(body)
    if big:
        head = struct.pack("<2sHHHQ", b"II", 43, 8, 0, offset)
        rows = b"".join(struct.pack("<HHQQ", *tag) for tag in tags)
        return head + body + struct.pack("<Q", entries or len(tags)) + rows + bytes(8)
    rows = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return struct.pack("<2sHI", b"II", 42, offset) + body + struct.pack("<H", entries or len(tags)) + rows + bytes(4)


def tiff_tags(side: int, compression: int = 1, bytes_here: int = 0) -> dict[int, tuple[int, int, int, int]]:
    """The tags of a gray picture in one strip at offset 8."""
    values = {256: side, 257: side, 258: 8, 259: compression, 262: 1, 277: 1, 278: side, 279: bytes_here}
    return {tag: (tag, 4, 1, value) for tag, value in values.items()} | {273: (273, 4, 1, 8)}


def _jpeg(**options: object) -> bytearray:
    stream = io.BytesIO()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(stream, "JPEG", **options)
    return bytearray(stream.getvalue())


def jpeg(side: int) -> bytes:
    """A JPEG whose head claims side x side."""
    content = _jpeg()
    at = content.index(b"\xff\xc0")
    content[at + 5 : at + 9] = struct.pack(">HH", side, side)
    return bytes(content)


def jpeg_of_many_scans(side: int, scans: int) -> bytes:
    """A progressive JPEG that goes over all its pixels again and again."""
    stream = io.BytesIO()
    Image.new("L", (side, side), 9).save(stream, "JPEG", progressive=True)
    content = stream.getvalue()
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:-2] * scans + content[-2:]


def overlapping_exif(entries: int, size: int) -> bytes:
    """EXIF whose every entry claims the same `size` bytes."""
    rows = b"".join(struct.pack("<HHII", 0x8000 + i, 7, size, 8) for i in range(entries))
    blob = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", entries) + rows
    return b"Exif\0\0" + blob + bytes(max(0, size - len(blob)))


def jpeg_exif() -> bytes:
    """EXIF over several segments, which Pillow joins."""
    exif = overlapping_exif(5000, 60_000 * 8)
    parts = [exif[start : start + 60_000] for start in range(0, len(exif), 60_000)]
    segments = b"".join(
        b"\xff\xe1" + struct.pack(">H", len(part) + 2 + (6 if n else 0)) + (b"Exif\0\0" if n else b"") + part
        for n, part in enumerate(parts)
    )
    content = _jpeg()
    return bytes(content[:2]) + segments + bytes(content[2:])


def bmp(side: int, compression: int = 0, bits: int = 24) -> bytes:
    """A BMP without its pixels."""
    info = struct.pack("<IiiHHIIiiII", 40, side, side, 1, bits, compression, 0, 0, 0, 0, 0)
    palette = bytes(1024) if bits == 8 else b""
    return struct.pack("<2sIHHI", b"BM", 54, 0, 0, 54 + len(palette)) + info + palette + bytes(64)


def webp(side: int) -> bytes:
    """An extended WebP whose canvas is side x side, with a lossless picture of that size inside, cut off."""
    canvas = struct.pack("<I", 0) + (side - 1).to_bytes(3, "little") * 2
    inner = min(side, 16_384)
    bits = (inner - 1) | (inner - 1) << 14
    lossless = b"\x2f" + struct.pack("<I", bits) + bytes(200)
    body = b"WEBP" + b"VP8X" + struct.pack("<I", 10) + canvas + b"VP8L" + struct.pack("<I", len(lossless)) + lossless
    return b"RIFF" + struct.pack("<I", len(body)) + body


def webp_of_many_pictures() -> bytes:
    """An animation."""
    stream = io.BytesIO()
    frames = [Image.new("RGB", (64, 64), (n, 0, 0)) for n in range(30)]
    frames[0].save(stream, "WEBP", save_all=True, append_images=frames[1:])
    return stream.getvalue()


def overlapping_tags() -> bytes:
    """A TIFF with thousands of entries that all claim the same megabyte."""
    tags = tiff_tags(64, bytes_here=4096)
    body = bytes(1 << 20)
    extra = {tag: (tag, 7, 1 << 20, 8) for tag in range(33_000, 38_000)}
    return tiff((tags | extra).values(), body)


def deflated_strip(side: int, megabytes: int) -> bytes:
    """A TIFF whose one strip inflates to far more than its picture."""
    body = deflated_zeros(megabytes)
    return tiff(tiff_tags(side, 8, len(body)).values(), body)


def _change(tags: dict[int, tuple[int, int, int, int]], *new: tuple[int, int, int, int]) -> bytes:
    return tiff((tags | {tag[0]: tag for tag in new}).values(), bytes(256))


HOSTILE: dict[str, Callable[[], bytes]] = {
    "png huge": lambda: png(HUGE, body=zlib.compress(bytes(1000))),
    "png 16 bit huge": lambda: png(HUGE, body=zlib.compress(bytes(1000)), colour=6, depth=16),
    "png without its pixels": lambda: png(INSIDE, body=zlib.compress(bytes(1000))),
    "png pixels that inflate too far": lambda: png(64, body=deflated_zeros(600)[:-4]),
    "png text bomb": lambda: png(64, chunk(b"zTXt", b"a\0\0" + deflated_zeros(600))),
    "png many text bombs": lambda: png(64, *[chunk(b"zTXt", b"a\0\0" + deflated_zeros(1)[:-9])] * 99),
    "png iTXt bomb": lambda: png(64, chunk(b"iTXt", b"a\0\1\0\0\0" + deflated_zeros(600))),
    "png profile bomb": lambda: png(64, chunk(b"iCCP", b"a\0\0" + deflated_zeros(600))),
    "png exif bomb": lambda: png(64, chunk(b"eXIf", overlapping_exif(20_000, 1 << 20)[6:])),
    "jpeg huge": lambda: jpeg(HUGE),
    "jpeg without its pixels": lambda: jpeg(INSIDE),
    "jpeg of many scans": lambda: jpeg_of_many_scans(3000, 3000),
    "jpeg exif bomb": jpeg_exif,
    "tiff huge": lambda: tiff(tiff_tags(HUGE, bytes_here=256).values(), bytes(256)),
    "tiff without its pixels": lambda: tiff(tiff_tags(INSIDE, bytes_here=256).values(), bytes(256)),
    "tiff lzw without its pixels": lambda: tiff(tiff_tags(INSIDE, 5, 256).values(), bytes(256)),
    "tiff strip that inflates too far": lambda: deflated_strip(64, 600),
    "tiff overlapping tags": overlapping_tags,
    "tiff a tag of 4 GB": lambda: _change(tiff_tags(64, bytes_here=256), (270, 2, 0xFFFFFFF0, 8)),
    "tiff strips without number": lambda: _change(tiff_tags(64, bytes_here=256), (273, 4, 0x3FFFFFFF, 8)),
    "tiff 65535 samples": lambda: _change(tiff_tags(64, bytes_here=256), (277, 3, 1, 65_535)),
    "tiff 64 bits": lambda: _change(tiff_tags(64, bytes_here=256), (258, 3, 1, 64)),
    "tiff tile of 1 GB": lambda: _change(
        tiff_tags(64, 5, 256), (322, 4, 1, 30_000), (323, 4, 1, 30_000), (324, 4, 1, 8), (325, 4, 1, 256)
    ),
    "tiff tile of one side": lambda: _change(tiff_tags(64, 5, 256), (322, 4, 1, 16_807_221), (324, 4, 1, 8)),
    "bigtiff huge": lambda: tiff(tiff_tags(HUGE, bytes_here=256).values(), bytes(256), big=True),
    "bigtiff entries": lambda: tiff(tiff_tags(64).values(), bytes(256), big=True, entries=1 << 60),
    "bmp huge": lambda: bmp(HUGE),
    "bmp without its pixels": lambda: bmp(INSIDE),
    "bmp rle without its pixels": lambda: bmp(INSIDE, 1, 8),
    "webp huge": lambda: webp(1 << 24),
    "webp largest": lambda: webp(16_384),
    "webp without its pixels": lambda: webp(INSIDE),
    "webp of many pictures": webp_of_many_pictures,
}  # fmt: skip
"""What must cost neither time nor memory."""

HARMLESS = {
    "png pixels that inflate too far",
    "jpeg exif bomb",
    "tiff strip that inflates too far",
    "tiff overlapping tags",
}
"""Of these the picture may be read, 64 x 64: what it does not need is not unpacked."""
