"""How the values of a trial are chosen (TPE), and which trials are stopped early.

TPE: Bergstra et al., Algorithms for hyper-parameter optimization, NeurIPS 2011; several fields together as in Falkner
et al., ICML 2018; several objectives: Ozaki et al., GECCO 2020. Median rule: Golovin et al., Google Vizier, KDD 2017.
Hyperband: Li et al., JMLR 2018.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner
from optuna.samplers import BaseSampler, TPESampler
from optuna.trial import FrozenTrial

from eyetune.searching.plan import Pruner

STARTUP = 5
"""Trials that are trained to the end before any is held against their median."""


class Sampler(BaseSampler):
    """TPE whose random numbers belong to the search's seed and the trial's place among the draws.

    One worker so draws the same trials however often it is interrupted, and several never draw the same ones. The first
    trial is the configuration as it stands, where it lies in the space: nobody ends up with worse without knowing.

    Args:
        seed: of the configuration.
        first: values of the first trial, by field.
        place: of a trial, the number of other draws before it; one that is done again has that of the one before.
    """

    def __init__(self, seed: int, first: Mapping[str, Any], place: Callable[[FrozenTrial], int]) -> None:
        self.seed = seed
        self.first = first
        self.place = place
        self.at = 0
        self.inner = self._tpe()

    def _tpe(self) -> BaseSampler:
        digest = hashlib.sha256(f"{self.seed}\0{self.at}".encode()).digest()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that `group` is experimental
            return TPESampler(seed=int.from_bytes(digest[:4], "little"), multivariate=True, group=True)

    def before_trial(self, study: Any, trial: Any) -> None:
        """Take the random numbers of this trial."""
        self.at = self.place(trial)
        self.inner = self._tpe()

    def infer_relative_search_space(self, study: Any, trial: Any) -> Any:
        """The fields that are drawn together; none in the first trial."""
        return {} if self.at == 0 else self.inner.infer_relative_search_space(study, trial)

    def sample_relative(self, study: Any, trial: Any, search_space: Any) -> Any:
        """Values of the fields that are drawn together."""
        return {} if self.at == 0 else self.inner.sample_relative(study, trial, search_space)

    def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
        """The value of one field."""
        if self.at == 0 and param_name in self.first:
            return self.first[param_name]
        return self.inner.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: Any, trial: Any, state: Any, values: Any) -> None:
        """Nothing is remembered outside the database."""
        self.inner.after_trial(study, trial, state, values)


def build_pruner(name: Pruner, epochs: int) -> BasePruner:
    """The rule by which trials of up to so many epochs are stopped."""
    if name == "median":
        # The first epochs are mostly warm-up: a fifth of them is left to every trial.
        return MedianPruner(n_startup_trials=STARTUP, n_warmup_steps=1 + max(1, epochs // 5))
    if name == "hyperband":
        return HyperbandPruner(min_resource=1, max_resource=max(2, epochs), reduction_factor=3)
    return NopPruner()
