"""Choosing a strategy, and the checks that all of them share."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from eyetune.adapt import STRATEGIES, StrategyConfig, adapt_union, parse_adapt
from eyetune.adapt.freezing import GradualConfig, LinearConfig
from eyetune.adapt.lora import LoraConfig
from eyetune.adapt.strategy import Plateau, load_audited
from eyetune.errors import RunError
from eyetune.section import Section


class Whole(Section):
    adapt: adapt_union() = LinearConfig()  # type: ignore[valid-type]
    """How to adapt."""


def faults(value: Any) -> dict[str, str]:
    with pytest.raises(ValidationError) as caught:
        Whole(adapt=value)
    return {".".join(str(part) for part in error["loc"]): error["msg"] for error in caught.value.errors()}


def test_importing_the_configuration_needs_no_heavy_package() -> None:
    program = (
        "import sys, eyetune.adapt, eyetune.adapt.lora; "
        "print(sorted({'torch', 'peft', 'timm', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert result.stdout.strip() == "[]"


def test_kind_chooses_the_section() -> None:
    section = Whole(adapt={"kind": "lora", "r": 4, "targets": ["qkv", "proj"]}).adapt

    assert section == LoraConfig(r=4, targets=("qkv", "proj"))
    assert Whole.model_validate(Whole(adapt=section).model_dump()).adapt == section


def test_a_bare_name_is_a_section_with_its_defaults() -> None:
    assert parse_adapt("gradual") == GradualConfig()


def test_faults_are_located_by_dotted_path_all_at_once() -> None:
    found = faults({"kind": "lora", "r": 0, "dropout": 1.5, "rank": 8})

    assert set(found) == {"adapt.r", "adapt.dropout", "adapt.rank"}


def test_an_unknown_kind_brings_the_nearest_name() -> None:
    message = faults({"kind": "gradul"})["adapt.kind"]

    assert "Did you mean 'gradual'?" in message
    assert "linear, gradual, full, lora" in message


def test_a_missing_kind_and_a_wrong_type_say_what_is_possible() -> None:
    assert "linear, gradual, full, lora" in faults({"r": 8})["adapt.kind"]
    assert "linear, gradual, full, lora" in faults(3)["adapt"]


def test_an_instance_passes_unchanged() -> None:
    section = LoraConfig(r=2)

    assert parse_adapt(section) is section


def test_a_strategy_registered_outside_is_a_member_of_the_union(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(STRATEGIES, "_entries", dict(STRATEGIES._entries))

    @STRATEGIES.register("bitfit")
    class BitFitConfig(StrategyConfig):
        kind: str = "bitfit"

    class Later(Section):
        adapt: adapt_union()  # type: ignore[valid-type]
        """How to adapt."""

    assert isinstance(Later(adapt={"kind": "bitfit"}).adapt, BitFitConfig)


@pytest.mark.parametrize("value", ["qkv,proj", ["qkv", "proj"], ("qkv", "proj")])
def test_targets_may_be_one_text_or_a_list(value: Any) -> None:
    assert LoraConfig(targets=value).targets == ("qkv", "proj")


def test_a_plateau_counts_epochs_without_a_new_best() -> None:
    plateau = Plateau(patience=2)

    reached = [plateau.reached(metric) for metric in (0.5, 0.4, 0.6, 0.6, float("nan"), None)]

    assert reached == [False, False, False, False, True, True]
    assert plateau.best == 0.6


@pytest.mark.parametrize("state", [{}, {"best": "x", "stale": 0}, {"best": 0.5, "stale": None}])
def test_a_damaged_state_is_refused(state: dict[str, Any]) -> None:
    with pytest.raises(RunError, match="damaged"):
        Plateau(2).load_state(state)


@pytest.mark.parametrize(
    ("tensors", "fault"),
    [
        ({"a": torch.zeros(2)}, "missing: b"),
        ({"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(1)}, "unexpected: c"),
        ({"a": torch.zeros(2), "b": torch.zeros(4)}, r"b: shape \(4,\), expected \(3,\)"),
        ({"a": torch.zeros(2), "b": torch.tensor([0.0, float("nan"), 0.0])}, "b: holds NaN"),
        ({"a": torch.zeros(2), "b": torch.tensor([0.0, float("inf"), 0.0])}, "b: holds NaN or infinity"),
        ({"a": torch.zeros(2), "b": torch.zeros(3, dtype=torch.float16)}, "b: torch.float16"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_and_nothing_is_loaded(
    tensors: dict[str, torch.Tensor], fault: str
) -> None:
    own = {"a": torch.ones(2), "b": torch.ones(3)}

    with pytest.raises(RunError, match=fault):
        load_audited(own, tensors, "the checkpoint")

    assert all(torch.equal(tensor, torch.ones_like(tensor)) for tensor in own.values())
