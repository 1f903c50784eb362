"""The data section of the configuration."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

from eyetune.data.config import DataConfig


def test_only_the_table_is_needed() -> None:
    config = DataConfig(table="train.csv")
    assert (config.val, config.test, config.crop, config.fit, config.contrast) == (0.1, 0.1, True, None, "none")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"val": 0.5, "test": 0.5}, "must leave something to train on"),
        ({"val": -0.1}, "greater than or equal to 0"),
        ({"test": 1.0}, "less than 1"),
        ({"classes": ("a",)}, "at least two"),
        ({"classes": ("a", "b", "a")}, "one class twice"),
        ({"contrast": "claha"}, "'none', 'clahe' or 'ben-graham'"),
        ({"lable_column": "x"}, "Extra inputs are not permitted"),
    ],
)
def test_faults_are_refused(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        DataConfig.model_validate({"table": "train.csv", **wrong})


def test_every_field_has_its_help() -> None:
    assert [name for name, field in DataConfig.model_fields.items() if not field.description] == []


def test_importing_it_is_light() -> None:
    code = "import sys, eyetune.data.config; print(sorted({'torch', 'numpy', 'cv2', 'PIL'} & set(sys.modules)))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "[]"
