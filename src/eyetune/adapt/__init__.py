"""Strategies: what trains, at which rate, in which mode. Importing this package does not import torch."""

from __future__ import annotations

from eyetune.adapt import freezing, lora
from eyetune.adapt.strategy import (
    STRATEGIES,
    Advance,
    RateGroup,
    Step,
    Strategy,
    StrategyConfig,
    adapt_union,
    count_parameters,
    describe_parameters,
    parse_adapt,
)

__all__ = [
    "STRATEGIES",
    "Advance",
    "RateGroup",
    "Step",
    "Strategy",
    "StrategyConfig",
    "adapt_union",
    "count_parameters",
    "describe_parameters",
    "freezing",
    "lora",
    "parse_adapt",
]
