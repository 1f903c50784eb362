"""What is known about a backbone before its network is built. Importing this module needs neither torch nor timm."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from eyetune.errors import UserError, did_you_mean
from eyetune.registry import Registry

if TYPE_CHECKING:
    from torch import nn

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Rules = tuple[tuple[str, str], ...]
"""Pairs of (regular expression, replacement or reason), tried in order."""


@dataclass(frozen=True)
class Preprocess:
    """What a backbone expects of an image.

    Args:
        pixels: side of the square input.
        mean: per channel (red, green, blue), of intensities in 0..1.
        std: likewise.
        fit: how a photograph that is not square becomes square: `pad` with black, or `squash` (aspect ratio lost).
    """

    pixels: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fit: Literal["pad", "squash"] = "pad"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; :meth:`from_dict` reads them back."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocess:
        """The inverse of :meth:`to_dict`. Raises ValueError when the values are not a Preprocess."""
        try:
            mean, std = (tuple(float(v) for v in values[key]) for key in ("mean", "std"))
            pixels, fit = int(values["pixels"]), values["fit"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a preprocessing record: {dict(values)}") from error
        if len(mean) != 3 or len(std) != 3 or pixels < 1 or fit not in ("pad", "squash"):
            raise ValueError(f"not a preprocessing record: {dict(values)}")
        return cls(pixels, mean, std, fit)


@dataclass(frozen=True)
class KeyLayout:
    """How a family spells its checkpoint: from the file's keys to the network's.

    Args:
        containers: where the weights may lie, best first; any other mapping of tensors is tried after these.
        prefixes: removed from the front of a key, repeatedly.
        rename: regular expression -> replacement, applied to the key without prefixes; each is tried in turn.
        transpose: names (in the network) of matrices that the published file holds transposed; not square, so that
            their shape tells whether they are.
        dropped: regular expression -> why a key that has no place in the network is left out.
        fresh: regular expression -> why a network tensor may keep its initial value.
    """

    containers: tuple[str, ...] = ("model", "state_dict", "teacher", "student")
    prefixes: tuple[str, ...] = ("module.", "_orig_mod.", "backbone.", "network.", "model.", "encoder.")
    rename: Rules = ()
    transpose: tuple[str, ...] = ()
    dropped: Rules = ()
    fresh: Rules = ()

    def target(self, key: str) -> str:
        """The network's name for the checkpoint's `key`."""
        name = self.strip(key)
        for pattern, replacement in self.rename:
            name = re.sub(pattern, replacement, name)
        return name

    def strip(self, key: str) -> str:
        """`key` without any of :attr:`prefixes`."""
        while prefix := next((p for p in self.prefixes if key.startswith(p) and len(key) > len(p)), None):
            key = key[len(prefix) :]
        return key

    def why_dropped(self, key: str) -> str | None:
        """The reason why `key` is left out, or None when there is none."""
        return _first_match(self.dropped, self.strip(key))

    def why_fresh(self, name: str) -> str | None:
        """The reason why the network's `name` may keep its initial value, or None."""
        return _first_match(self.fresh, name)


@dataclass(frozen=True)
class TimmCall:
    """`timm.create_model(architecture, **arguments)`."""

    architecture: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Download:
    """Where `weights: hub` finds a published file.

    Args:
        filename: the file's name there.
        repo: Hugging Face repository, or None when `url` is given.
        url: direct address.
        gated: the owner asks for terms to be accepted first.
        sha256: the file's checksum where the owner publishes one.
    """

    filename: str
    repo: str | None = None
    url: str | None = None
    gated: bool = False
    sha256: str | None = None

    @property
    def page(self) -> str:
        """The address for a person to open."""
        return f"https://huggingface.co/{self.repo}" if self.repo else str(self.url)


@dataclass(frozen=True)
class BackboneSpec:
    """A family of weights: the network they fit, how images reach it, and on which terms they are had.

    Args:
        name: as in `model.backbone`.
        title: for people.
        architecture: one line, for people.
        parameters: number of parameters of the network with the default pool and pixels; 0 when it is not known
            before building (timm names).
        pools: pooling -> width of the pooled feature.
        pool: the default pooling.
        preprocess: pixels, normalisation and fit as published.
        licence: of the weights.
        source: where to get the weights, for people.
        build: (pixels, pool) -> network whose forward takes float[B, 3, pixels, pixels] to float[B, width].
        patch: `pixels` must be a multiple of this (1: any).
        layout: how its checkpoints are spelt.
        file_names: names (regular expressions, whole name, any case) under which the weights are published.
        download: what `weights: hub` fetches, or None.
        embedded: weights shipped with the package, or None.
        plain: pooling -> the call of `timm.create_model` that builds the same network at the published size, its
            tensors under the same names; a pooling that is missing has none.
        kind: `timm` for names that timm resolves.
    """

    name: str
    title: str
    architecture: str
    parameters: int
    pools: Mapping[str, int]
    pool: str
    preprocess: Preprocess
    licence: str
    source: str
    build: Callable[[int, str], nn.Module]
    patch: int = 1
    layout: KeyLayout = field(default_factory=KeyLayout)
    file_names: tuple[str, ...] = ()
    download: Download | None = None
    embedded: Path | None = None
    plain: Mapping[str, TimmCall] = field(default_factory=dict)
    kind: Literal["family", "timm"] = "family"

    @property
    def pixels(self) -> int:
        """The default side of the input."""
        return self.preprocess.pixels

    @property
    def width(self) -> int:
        """Width of the feature with the default pooling."""
        return self.pools[self.pool]

    def publishes(self, path: Path | str) -> bool:
        """Whether the file's name is one under which these weights are published."""
        return any(pattern.fullmatch(Path(path).name) for pattern in self._name_patterns)

    @cached_property
    def _name_patterns(self) -> tuple[re.Pattern[str], ...]:
        return tuple(re.compile(name, re.IGNORECASE) for name in self.file_names)

    def check_pool(self, pool: str | None) -> str:
        """`pool`, or the default. Raises UserError naming the poolings there are."""
        if pool is None:
            return self.pool
        if pool not in self.pools:
            raise UserError(
                f"model.pool: {self.name} has no pooling {pool!r}.{did_you_mean(pool, self.pools)} "
                f"It has: {', '.join(self.pools)}."
            )
        return pool

    def check_pixels(self, pixels: int | None) -> int:
        """`pixels`, or the default. Raises UserError when the patches would not tile the image."""
        if pixels is None:
            return self.pixels
        if pixels < self.patch or pixels % self.patch:
            below = max(self.patch, pixels // self.patch * self.patch)
            raise UserError(
                f"model.pixels: {self.name} needs a positive multiple of its patch size {self.patch}, not {pixels}. "
                f"Nearest: {below} or {below + self.patch}; as published: {self.pixels}."
            )
        return pixels

    def preprocess_at(self, pixels: int | None) -> Preprocess:
        """The preprocessing at `pixels`, or the default size. Raises UserError as :meth:`check_pixels`."""
        return replace(self.preprocess, pixels=self.check_pixels(pixels))


BACKBONES: Registry[BackboneSpec] = Registry("backbone", "eyetune.backbones")


def _first_match(rules: Rules, name: str) -> str | None:
    return next((text for pattern, text in rules if re.match(pattern, name)), None)
