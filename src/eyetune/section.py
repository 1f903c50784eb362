"""The base of every configuration section."""

from __future__ import annotations

import os
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Section(BaseModel):
    """Frozen, no unknown keys; the docstring under each field is its help on the command line."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _as_written(cls, value: Any, info: ValidationInfo) -> Any:
        """`~/` is the home folder, and `yes` is no number: left alone, it would silently be 1."""
        if isinstance(value, str) and value.startswith("~/"):
            return os.path.expanduser(value)
        if isinstance(value, bool) and bool not in _members(cls.model_fields[str(info.field_name)].annotation):
            raise ValueError(f"must not be a truth value, got {str(value).lower()}")
        return value


def _members(annotation: Any) -> set[Any]:
    """The types in an annotation, those inside unions and Annotated included."""
    return {annotation}.union(*(_members(member) for member in get_args(annotation)))
