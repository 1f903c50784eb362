"""The guides' `from scripts.validate_data import DataValidator`."""

from eyetune.guides.validation import DataValidator

__all__ = ["DataValidator"]
