"""The trials of one search, which all workers share through the database: who takes the next, what became of each.

A trial ends complete, pruned, or failed with a reason; these are finished, and count. One whose worker was killed or
interrupted is given out again with the same values, as a trial of its own number. What happens here happens in the
database first, one transaction a step, so that a process killed between two of them loses no finished trial, and what
it left half done is found and put right by whoever comes next (:meth:`Ledger._mend`).
"""

from __future__ import annotations

import contextlib
import functools
import json
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from eyetune.config import flattened
from eyetune.errors import ConfigError, RunError, listing
from eyetune.interrupt import deferred, obey, pending
from eyetune.searching import storage, workers
from eyetune.searching.plan import Objective, Plan
from eyetune.searching.sampler import Sampler, build_pruner
from eyetune.searching.space import Choices, suggest
from eyetune.searching.storage import HEARTBEAT, Place, StorageError, open_storage, translated

if TYPE_CHECKING:
    from optuna.trial import Trial

T = TypeVar("T")

RETRIES = 3
"""How often a trial whose worker was killed is tried again: one that eats all memory kills every worker."""

POLL = 2.0
"""Seconds between two looks at what other workers still have under way."""

IDENTITY = "eyetune"
"""What the study's attribute is called that says what is searched."""


class Counts(NamedTuple):
    """How many trials there are of each kind."""

    complete: int
    pruned: int
    failed: int
    running: int
    waiting: int

    @property
    def finished(self) -> int:
        """Those that count."""
        return self.complete + self.pruned + self.failed


@dataclass(frozen=True)
class Taken:
    """A trial that this worker has to carry out: its number, its values by dotted path."""

    number: int
    values: dict[str, Any]
    trial: Trial
    finished: int
    """How many were finished when it was taken."""


class Ledger:
    """The shared list of trials. Open it with :func:`open_ledger`."""

    def __init__(self, plan: Plan, place: Place, objectives: tuple[Objective, ...], worker: str) -> None:
        self.plan = plan
        self.place = place
        self.objectives = objectives
        self.worker = worker
        first = {
            path: dimension.category(value) if isinstance(dimension, Choices) else value
            for path, dimension in plan.space.fields.items()
            if dimension.holds(value := configured(plan, path))
        }
        sampler = Sampler(plan.base.seed, first, self._place)
        pruner = build_pruner(plan.pruner, plan.base.adapt.build().epochs(plan.base.train.epochs))
        self.storage = open_storage(place, lambda study, trial: None)
        with translated(place):
            self.study = optuna.create_study(
                study_name=plan.study,
                storage=self.storage,
                sampler=sampler,
                pruner=pruner,
                directions=[one.direction for one in objectives],
                load_if_exists=True,
            )

    # -- what is searched ----------------------------------------------------------------------------------------------

    def agree(self, identity: Mapping[str, Any]) -> None:
        """Note what is searched, or hold it against what was noted when the search began.

        Raises RunError when the study is of another program, ConfigError with what differs.
        """
        with translated(self.place):
            known = self.study.user_attrs.get(IDENTITY)
            if known is None:
                if self.study.get_trials(deepcopy=False):
                    raise RunError(
                        f"{self.place.shown} holds a study {self.plan.study!r} that is not one of eyetune search: "
                        "choose another --study."
                    )
                self.study.set_user_attr(IDENTITY, dict(identity))
                known = self.study.user_attrs[IDENTITY]  # another worker may have come first, with another space
        before, now = flattened(json.loads(json.dumps(known))), flattened(json.loads(json.dumps(identity)))
        faults = [
            f"{path}: was {before.get(path, 'not there')}, now {now.get(path, 'not there')}"
            for path in dict.fromkeys([*before, *now])
            if before.get(path) != now.get(path)
        ]
        if [one.name.lower() for one in self.study.directions] != [one.direction for one in self.objectives]:
            faults.append("the directions of the objectives differ")
        if faults:
            raise ConfigError(
                f"the search in {self.place.shown} was begun otherwise, and its trials could not be compared with "
                f"new ones:\n{listing(faults, 10)}\nGo on as it was begun, or begin anew with another --out or --study."
            )

    # -- taking and finishing trials -----------------------------------------------------------------------------------

    def trials(self) -> list[FrozenTrial]:
        """Every trial there is, by number."""
        found: list[FrozenTrial] = self._patiently(lambda: self.study.get_trials(deepcopy=False))
        return found

    def take(self, limit: int, waiting: Callable[[int], None], late: Callable[[], bool]) -> Taken | None:
        """The next trial, for this worker; None when `limit` are finished, or `late` says that no more is begun.

        While others work on the last ones, it waits for them, and takes over those whose worker dies. `waiting` is told
        once how many that are.
        """
        told = False
        while True:
            with deferred():  # a step in the database is done or not begun
                self._patiently(self._mend)
                counts = count(self.trials())
                if counts.finished >= limit or late():
                    return None
                if counts.finished + counts.running < limit:
                    taken = self._patiently(functools.partial(self._ask, limit, counts.finished))
                    if taken is not None:
                        return taken
            if pending() is not None:
                raise obey("")
            if not told:
                waiting(counts.running)
                told = True
            time.sleep(POLL)

    def _ask(self, limit: int, finished: int) -> Taken | None:
        """A new trial, or one that waits; None where others have begun enough meanwhile."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Optuna would rather send the heartbeats itself
            trial = self.study.ask()
            self.storage.record_heartbeat(trial._trial_id)
            trial.set_user_attr("worker", self.worker)
            before = [one for one in self.study.get_trials(deepcopy=False) if one.number < trial.number]
            if sum(_counts(one) or one.state == TrialState.RUNNING for one in before) >= limit:
                trial.set_user_attr("surplus", True)
                self.study.tell(trial, state=TrialState.FAIL)
                return None
            drawn = self._draw(trial)
        return Taken(trial.number, drawn, trial, finished)

    def _draw(self, trial: Trial) -> dict[str, Any]:
        fields = self.plan.space.fields
        kind = self.plan.space.kind
        if "adapt.kind" in fields:
            kind = str(suggest(trial, "adapt.kind", fields["adapt.kind"]))
        return {path: suggest(trial, path, dimension) for path, dimension in self.plan.space.of(kind).items()}

    def _place(self, trial: FrozenTrial) -> int:
        """How many draws there were before that of a trial: what takes the place of a lost one is no draw."""
        trials = {one.number: one for one in self.study.get_trials(deepcopy=False)}
        while (before := trial.user_attrs.get("retry_of")) in trials:
            trial = trials[before]
        earlier = [one for one in trials.values() if one.number < trial.number]
        return sum(not {"retry_of", "surplus"} & set(one.user_attrs) for one in earlier)

    @contextlib.contextmanager
    def beating(self, taken: Taken) -> Iterator[None]:
        """While inside, signs of life go into the database."""
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(HEARTBEAT):
                with contextlib.suppress(Exception):  # the next one may get through; results are another matter
                    self.storage.record_heartbeat(taken.trial._trial_id)
            self.storage.remove_session()

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def twin(self, taken: Taken) -> FrozenTrial | None:
        """A complete trial with the same values: training again with the same seed would come to the same."""
        for trial in self.trials():
            if trial.state == TrialState.COMPLETE and trial.params == taken.trial.params:
                return trial
        return None

    def report(self, taken: Taken, epoch: int, value: float) -> bool:
        """Note the score of an epoch (from 1); whether the trial is to be stopped."""
        if len(self.objectives) > 1:
            return False

        def act() -> bool:
            taken.trial.report(value, epoch)
            return bool(taken.trial.should_prune())

        return bool(self._of(taken, act))

    def finish(self, taken: Taken, values: list[float], facts: Mapping[str, Any]) -> None:
        """The trial is complete, with a value an objective."""
        self._of(taken, lambda: self._tell(taken, values, facts=dict(facts)))

    def prune(self, taken: Taken, facts: Mapping[str, Any]) -> None:
        """The trial was stopped early."""
        self._of(taken, lambda: self._tell(taken, state=TrialState.PRUNED, facts=dict(facts)))

    def fail(self, taken: Taken, reason: str) -> None:
        """The trial cannot be carried out, and why."""
        self._of(taken, lambda: self._tell(taken, state=TrialState.FAIL, reason=reason))

    def hand_back(self, taken: Taken) -> None:
        """The trial was interrupted: whoever comes next does it."""
        self._of(taken, lambda: self._tell(taken, state=TrialState.FAIL, interrupted=True))
        self._patiently(self._mend)

    def _tell(
        self, taken: Taken, values: list[float] | None = None, *, state: TrialState | None = None, **said: Any
    ) -> None:
        for name, value in said.items():
            taken.trial.set_user_attr(name, value)
        self.study.tell(taken.trial, values, state)

    def _of(self, taken: Taken, act: Callable[[], T]) -> T | None:
        """Do something with a trial of this worker; None when it is not its own any more."""
        try:
            return self._patiently(act)
        except UpdateFinishedTrialError:
            print(
                f"trial {taken.number} was given to another worker, because this one gave no sign of life for long: "
                "what it found here is dropped",
                file=sys.stderr,
                flush=True,
            )
            return None

    def _patiently(self, act: Callable[[], T]) -> T:
        """Do something in the database. A server that is away, for a restart say, is waited for: behind it stand hours
        of training. (SQLite waits by itself.) Raises StorageError when it does not come back."""
        end = time.monotonic() + (0 if self.place.file is not None else storage.WAIT)
        while True:
            try:
                with translated(self.place):
                    return act()
            except StorageError:
                if time.monotonic() >= end:
                    raise
                time.sleep(POLL)

    # -- putting right -------------------------------------------------------------------------------------------------

    def _mend(self) -> None:
        """Give out again what killed or interrupted workers left."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optuna.storages.fail_stale_trials(self.study)
            dead = workers.the_dead(self.plan.out, self.worker)  # before the look at what they have begun
            for trial in self.study.get_trials(deepcopy=False):
                if trial.state == TrialState.RUNNING and trial.user_attrs.get("worker") != self.worker:
                    self._look_after(trial, dead)
            workers.bury(self.plan.out, dead)
            trials = self.study.get_trials(deepcopy=False)
            followed = {trial.user_attrs.get("retry_of") for trial in trials}
            for trial in trials:
                if is_lost(trial) and trial.number not in followed and _losses(trial, trials) <= RETRIES:
                    self._give_out_again(trial)
            self._drop_doubles()

    def _look_after(self, trial: FrozenTrial, dead: set[str]) -> None:
        """A trial of another worker: its end, where that is known to be dead."""
        worker = trial.user_attrs.get("worker")
        if worker is None:
            # Killed before its first sign of life, or about to give it: from now on one is there that can grow old. It
            # is given once: workers that come and go must not keep the trial young.
            if "seen" not in trial.user_attrs:
                with contextlib.suppress(UpdateFinishedTrialError):
                    self.storage.set_trial_user_attr(trial._trial_id, "seen", True)
                    self.storage.record_heartbeat(trial._trial_id)
        elif worker in dead:
            with contextlib.suppress(UpdateFinishedTrialError):  # another worker saw it, too
                self.storage.set_trial_state_values(trial._trial_id, state=TrialState.FAIL)

    def _give_out_again(self, trial: FrozenTrial) -> None:
        kind = str(trial.params.get("adapt.kind", self.plan.space.kind))
        whole = set(trial.params) == set(self.plan.space.of(kind))  # else all are drawn anew, as they were to be
        self.study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.WAITING,
                params=trial.params if whole else {},
                distributions=trial.distributions if whole else {},
                user_attrs={"retry_of": trial.number},
            )
        )

    def _drop_doubles(self) -> None:
        """Of two trials that take the place of the same one (two workers put it right at once) the first is kept."""
        seen: set[int] = set()
        for trial in self.study.get_trials(deepcopy=False):
            before = trial.user_attrs.get("retry_of")
            if before is None or trial.user_attrs.get("surplus"):
                continue
            if before in seen and trial.state == TrialState.WAITING:
                with contextlib.suppress(UpdateFinishedTrialError):
                    self.storage.set_trial_user_attr(trial._trial_id, "surplus", True)
                    self.storage.set_trial_state_values(trial._trial_id, state=TrialState.FAIL)
            seen.add(before)


def configured(plan: Plan, path: str) -> Any:
    """What the configuration says of a searched field, as it would be without the search."""
    if path == "train.lr":
        return plan.base.learning_rate
    found: Any = plan.base
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


def is_lost(trial: FrozenTrial) -> bool:
    """Whether its worker was killed or interrupted: it says nothing of its values."""
    return trial.state == TrialState.FAIL and not ({"reason", "surplus"} & set(trial.user_attrs))


def is_failed(trial: FrozenTrial) -> bool:
    """Whether it could not be carried out."""
    return trial.state == TrialState.FAIL and "reason" in trial.user_attrs


def _counts(trial: FrozenTrial) -> bool:
    return trial.state in (TrialState.COMPLETE, TrialState.PRUNED) or is_failed(trial)


def _losses(trial: FrozenTrial, trials: list[FrozenTrial]) -> int:
    """How many of the workers that had these values were killed; an interruption is no sign of anything."""
    by_number = {one.number: one for one in trials}
    found, one = 0, trial
    while True:
        found += not one.user_attrs.get("interrupted")
        before = one.user_attrs.get("retry_of")
        if before is None or before not in by_number:
            return found
        one = by_number[before]


def count(trials: list[FrozenTrial]) -> Counts:
    """How many there are of each kind. One whose worker died every time has failed."""
    followed = {trial.user_attrs.get("retry_of") for trial in trials}
    given_up = sum(
        is_lost(trial) and trial.number not in followed and _losses(trial, trials) > RETRIES for trial in trials
    )
    states = [trial.state for trial in trials]
    return Counts(
        complete=states.count(TrialState.COMPLETE),
        pruned=states.count(TrialState.PRUNED),
        failed=sum(map(is_failed, trials)) + given_up,
        running=states.count(TrialState.RUNNING),
        waiting=states.count(TrialState.WAITING),
    )
