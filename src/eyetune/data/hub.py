"""Reading a Hugging Face dataset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from eyetune.data.records import Manifest
from eyetune.errors import DataError


def read_manifest(
    name: str, *, columns: Mapping[str, str | None], classes: Sequence[str] | None, labels_required: bool
) -> Manifest:
    """The manifest of a dataset; see :meth:`Manifest.from_huggingface`."""
    raise DataError(f"hf:{name}: not readable yet")
