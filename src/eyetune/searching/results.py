"""What came of a search so far: the table of trials, the best configuration, which fields mattered, what to mind.

The files of it are written by :mod:`eyetune.searching.folder`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from eyetune.errors import plural
from eyetune.searching.ledger import is_failed, is_lost
from eyetune.searching.plan import Objective, Plan
from eyetune.searching.space import Choices, extension

TRIALS = "trials"
PAGE = "search.html"

GOOD = 5
FEWEST = 2 * GOOD
"""Below this many complete trials nothing is said of which fields matter."""


@dataclass(frozen=True)
class Row:
    """One trial, for people.

    Attributes:
        number: its folder is trials/NUMBER.
        state: complete, pruned, failed, lost, running or waiting.
        values: by objective; none unless complete.
        parameters: the searched fields it had, by dotted path.
        course: the best value up to each epoch: (epoch from 1, value).
        facts: epochs, best epoch, seconds, parameters trained, where known.
        reason: why it failed, or what became of it.
        seconds: from its beginning to its end.
    """

    number: int
    state: str
    values: tuple[float, ...]
    parameters: dict[str, Any]
    course: list[tuple[int, float]]
    facts: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    seconds: float | None = None


@dataclass(frozen=True)
class Outcome:
    """What is known of a search."""

    plan: Plan
    objectives: tuple[Objective, ...]
    rows: tuple[Row, ...]
    front: tuple[Row, ...]
    """The best trial; of several objectives all that no other beats in each, the best by the first one first."""
    importance: dict[str, float]
    warnings: tuple[str, ...]

    @property
    def best(self) -> Row | None:
        """The best trial, by the first objective."""
        return self.front[0] if self.front else None

    def complete(self) -> list[Row]:
        """The trials with values."""
        return [row for row in self.rows if row.state == "complete"]


def outcome(plan: Plan, objectives: tuple[Objective, ...], study: Any) -> Outcome:
    """Read the study."""
    trials = [one for one in study.get_trials(deepcopy=False) if not one.user_attrs.get("surplus")]
    after = {one.user_attrs["retry_of"]: one.number for one in trials if "retry_of" in one.user_attrs}
    rows = tuple(_row(plan, one, after) for one in trials)
    front = _front(rows, objectives)
    importance = _importance(study, len([row for row in rows if row.state == "complete"]))
    return Outcome(plan, objectives, rows, front, importance, tuple(_warnings(plan, objectives, rows, front)))


def _row(plan: Plan, trial: FrozenTrial, after: dict[int, int]) -> Row:
    parameters = {
        path: dimension.value(trial.params[path]) if isinstance(dimension, Choices) else trial.params[path]
        for path, dimension in plan.space.fields.items()
        if path in trial.params
    }
    state, reason = trial.state.name.lower(), str(trial.user_attrs.get("reason", ""))
    if is_failed(trial):
        state = "failed"
    elif is_lost(trial):
        again = f"; done again as trial {after[trial.number]}" if trial.number in after else ""
        why = "interrupted" if trial.user_attrs.get("interrupted") else "its worker was killed"
        state, reason = "lost", why + again
        if not again and not trial.user_attrs.get("interrupted"):
            state, reason = "failed", "every worker that tried it was killed: it may need more memory than there is"
    facts = dict(trial.user_attrs.get("facts", {}))
    if (twin := facts.pop("same_as", None)) is not None:
        reason = f"the same values as trial {twin}: not trained again"
    end, start = trial.datetime_complete, trial.datetime_start
    seconds = (end - start).total_seconds() if isinstance(end, datetime) and isinstance(start, datetime) else None
    return Row(
        number=trial.number,
        state=state,
        values=tuple(trial.values) if trial.state == TrialState.COMPLETE else (),
        parameters=parameters,
        course=sorted((int(step), value) for step, value in trial.intermediate_values.items()),
        facts=facts,
        reason=reason,
        seconds=seconds,
    )


def _front(rows: Sequence[Row], objectives: Sequence[Objective]) -> tuple[Row, ...]:
    """The trials that no other equals in every objective and beats in one; of equal ones the first."""
    signs = [1 if one.higher else -1 for one in objectives]
    scored = [
        (tuple(s * v for s, v in zip(signs, row.values, strict=True)), row) for row in rows if row.state == "complete"
    ]
    found: list[tuple[tuple[float, ...], Row]] = []
    for score, row in sorted(scored, key=lambda pair: (tuple(-v for v in pair[0]), pair[1].number)):
        if not any(all(a >= b for a, b in zip(other, score, strict=True)) for other, _ in found):
            found.append((score, row))
    return tuple(row for _, row in found)


def good(complete: int) -> int:
    """How many of so many complete trials count as good ones for the importance: a tenth, but not too few."""
    return max(GOOD, round(complete / 10))


def _importance(study: Any, complete: int) -> dict[str, float]:
    """Share of each field in what makes good trials good (PED-ANOVA: Watanabe et al., IJCAI 2023), of all 1."""
    if complete < FEWEST:
        return {}
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = get_param_importances(
                study, evaluator=PedAnovaImportanceEvaluator(target_quantile=good(complete) / complete)
            )
        except (RuntimeError, ValueError):  # all values the same
            return {}
    return {str(path): float(share) for path, share in found.items() if math.isfinite(share)}


def _warnings(plan: Plan, objectives: Sequence[Objective], rows: Sequence[Row], front: Sequence[Row]) -> list[str]:
    found = []
    complete = [row.values for row in rows if row.state == "complete"]
    if len(complete) > 1 and len(set(complete)) == 1:  # the best is merely the first: no edge to speak of
        found.append(
            f"all {len(complete)} complete trials came to {objectives[0].name} {complete[0][0]:.3g}: that tells no "
            "settings apart. Train longer (train.epochs), or see whether the network learns: eyetune check model"
        )
    elif front:
        best = front[0]
        kind = str(best.parameters.get("adapt.kind", plan.space.kind))
        for path, value in best.parameters.items():
            said = extension(path, plan.space.fields[path], value, plan.content, kind)
            if said is not None:
                found.append(said)
    failed = [row for row in rows if row.state == "failed"]
    if failed:
        reasons: dict[str, int] = {}
        for row in failed:
            reasons[first_line(row.reason)] = reasons.get(first_line(row.reason), 0) + 1
        often = max(reasons, key=lambda reason: reasons[reason])
        found.append(f"{plural(len(failed), 'trial')} failed, most often because: {often}")
    return found


def honest(complete: int, objective: Objective) -> str:
    """What the best score of a search is, in a sentence."""
    if complete == 1:
        return "How good the model is says the test split, which no trial has seen."
    return (
        f"The best of {complete} validation scores is optimistic: it was chosen because it is the "
        f"{'highest' if objective.higher else 'lowest'}, partly by luck. How good the model is says the test split, "
        "which no trial has seen."
    )


def describe(parameters: Mapping[str, Any]) -> str:
    """The values of a trial on one line."""
    return ", ".join(f"{path} {Choices.label(_short(value))}" for path, value in parameters.items())


def _short(value: Any) -> Any:
    return float(f"{value:.3g}") if isinstance(value, float) else value


def first_line(text: str) -> str:
    """The first line of a reason, which may have several."""
    return text.strip().splitlines()[0] if text.strip() else ""


def count_rows(rows: Sequence[Row]) -> dict[str, int]:
    """How many trials of each state."""
    states = ("complete", "pruned", "failed", "lost", "running", "waiting")
    return {state: sum(row.state == state for row in rows) for state in states}


def terminal_table(found: Outcome, most: int = 10) -> Any:
    """The best trials, by the first objective."""
    from rich.table import Table

    names = [one.name for one in found.objectives]
    table = Table(box=None, pad_edge=False)
    table.add_column("trial", justify="right")
    for name in names:
        table.add_column(name, justify="right")
    for path in found.plan.space.fields:
        table.add_column(path, justify="right")
    sign = -1 if found.objectives[0].higher else 1
    for row in sorted(found.complete(), key=lambda one: (sign * one.values[0], one.number))[:most]:
        cells = {path: Choices.label(_short(value)) for path, value in row.parameters.items()}
        scores = [f"{value:.4g}" for value in row.values]
        table.add_row(str(row.number), *scores, *(cells.get(path, "") for path in found.plan.space.fields))
    return table
