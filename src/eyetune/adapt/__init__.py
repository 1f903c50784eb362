"""Strategies: what trains, at which rate, in which mode. Importing this package does not import torch.

Every file here is a strategy and registers itself, but for the two that strategies are made of.
"""

from __future__ import annotations

import importlib
import pkgutil

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
    "parse_adapt",
]

_FOUNDATIONS = ("classifier", "strategy")

for _file in pkgutil.iter_modules(__path__):
    if _file.name not in _FOUNDATIONS:
        importlib.import_module(f"{__name__}.{_file.name}")
