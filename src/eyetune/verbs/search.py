"""`eyetune search`: the best values of any fields of the configuration, judged on validation; the test stays unseen."""

from __future__ import annotations

import contextlib
import gc
import shutil
import sys
import time
from pathlib import Path
from signal import SIGINT
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from eyetune import processes
from eyetune.comparison.plan import MOVABLE
from eyetune.errors import ConfigError, RunError, UserError, plural
from eyetune.files import WRITING_ERRORS, make_folder, writing_failed
from eyetune.interrupt import Interrupted, deferred, obey, pending
from eyetune.searching.plan import Objective, Plan, fitting, read_plan, settled
from eyetune.searching.space import Choices
from eyetune.terminal import show
from eyetune.verbs.finetune import Job, build_model, check_settings

if TYPE_CHECKING:
    from eyetune.data.cache import Cache
    from eyetune.data.fundus import FundusSettings
    from eyetune.data.records import Manifest
    from eyetune.searching.ledger import Ledger, Taken
    from eyetune.searching.results import Outcome
    from eyetune.searching.storage import Place
    from eyetune.train.loop import FitResult

HOPELESS = 3
"""When so many trials of a worker failed, and no trial of the search ever came through, it stops."""

_HELP = """CONFIG.yaml is one for finetune; it may have a section search: with what follows.
  --trials 50
      Stop when so many trials are finished, those of all workers together.
  --space.train.lr "1e-5..1e-3 log"   --space.adapt.r 4,8,16,32
      What is searched: any field, a range (log; step S) or values. Without any,
      the usual space of the strategy; --space usual has it beside your own, and
      --space.FIELD fixed takes a field out of it.
  --objectives qwk,trainable_parameters
      Judge by a metric on validation [default: the one that chooses the epoch];
      by several, also trainable_parameters, seconds, peak_memory: a Pareto front.
  --pruner median|hyperband|none
      Stop what does badly after an epoch [default: median]
  --storage URL
      The database [default: search.db, SQLite, in the folder of --out]
  --study NAME
      What the search is called in a database of your own [default: the folder's name]
  --timeout SECONDS
      Begin no trial after this time; the one under way is finished.
  --keep-checkpoints
      Keep the weights of every trial; else only settings and curves are kept.
Every field of the configuration is a flag: see eyetune finetune --help.
The same command again goes on; started several times, workers share the trials.
The test split is never touched. Then: eyetune finetune OUT/best.yaml"""

app = App(
    name="search",
    help_format="plaintext",
    help_epilogue=_HELP,
    usage="Usage: eyetune search [CONFIG.yaml] [--trials N] [--space.FIELD RANGE]... [--section.field VALUE]...",
)


@app.default
def command(*words: Annotated[str, Parameter(allow_leading_hyphen=True, show=False)]) -> None:
    """Search the best settings on the validation split, and write the YAML that finetune runs."""
    search(read_plan(words))


def search(plan: Plan) -> Outcome:
    """Work on a search until its trials are finished; returns what came of it so far.

    Raises ConfigError when the search was begun otherwise, RunError when nothing can be trained, UserError for what
    else the user can mend; KeyboardInterrupt, with how to go on, when interrupted.
    """
    from eyetune.searching.ledger import Ledger
    from eyetune.searching.storage import find_place
    from eyetune.searching.workers import at_work

    if processes.count() > 1:
        raise ConfigError(
            "eyetune search is one process a worker, and this is a launcher's. Start the same command as often as you "
            "want workers, without torchrun; with CUDA_VISIBLE_DEVICES each has a GPU of its own."
        )
    place = find_place(plan.storage, plan.out)
    check_settings(plan.base)
    for path in ("model.backbone", "model.pool", "model.pixels", "augment"):
        if isinstance(dimension := plan.space.fields.get(path), Choices):
            for value in dimension.values:
                check_settings(plan.config({path: value}, plan.out))
    study = _Study(plan, place)
    plan = study.plan
    with at_work(plan.out) as worker:
        ledger = Ledger(plan, place, study.objectives, worker)
        ledger.agree(study.identity())
        desk = _Desk(study, ledger)
        try:
            desk.work()
        except KeyboardInterrupt as interrupt:
            done = sum(row.state in ("complete", "pruned", "failed") for row in desk.write().rows)
            raise Interrupted(
                f"Finished and kept in {place.shown}: {done} of {plural(plan.trials, 'trial')}. The one under way will "
                "be done again. Go on with the same command.",
                getattr(interrupt, "signum", SIGINT),
            ) from None
        return desk.conclude()


class _Study:
    """What all trials have in common: the photographs in their splits, the image cache, what they are judged by."""

    def __init__(self, plan: Plan, place: Place) -> None:
        from eyetune.data.cache import Cache
        from eyetune.data.records import open_manifest
        from eyetune.train.answers import answer_to
        from eyetune.train.task import SupervisedTask

        config = plan.base
        self.cache: Cache | None = Cache.of(config.data)
        manifest = open_manifest(config.data, kind=config.reads)
        answer = answer_to(config.asked, manifest.classes)
        self.objectives: tuple[Objective, ...] = plan.judged(config.train.metric or answer.metric, answer.task)
        self.plan = settled(plan, self.objectives)
        self.begin_folder(place)
        self.manifest = self.split(manifest)
        # Says what is wrong with the metric, here and not in every trial.
        SupervisedTask.of(self.manifest.select("train"), self.plan.config({}, plan.out).train, config.asked)
        self.plan = fitting(self.plan, len(self.manifest.select("train")))
        self.readable: dict[str, Manifest] = {}

    def begin_folder(self, place: Place) -> None:
        """Raise RunError where something else is in the folder, or another search."""
        from eyetune.searching.folder import other_search
        from eyetune.searching.results import TRIALS
        from eyetune.searching.storage import FILE
        from eyetune.train.rundir import is_free

        out = self.plan.out
        ours = any((out / name).exists() for name in (FILE, TRIALS)) and not (out / "config.yaml").exists()
        if not ours and not is_free(out):
            raise RunError(f"{out} holds something that is not a search: choose another --out.")
        if (other := other_search(self.plan, place.shown)) is not None:
            raise RunError(f"{out} holds another search, {other}: choose another --out.")
        try:
            make_folder(out / TRIALS)
        except OSError as error:
            raise writing_failed(out, error) from error

    def split(self, manifest: Manifest) -> Manifest:
        """The records of train and val; the splits are cut once for all trials, as `finetune` would cut them, and kept
        in splits.csv. No photograph of the test is opened, unless unreadable ones are to be left out before the cut."""
        from eyetune.data.splits import read_splits, split_configured, write_splits

        config, file = self.plan.base, self.plan.out / "splits.csv"
        if file.is_file():
            manifest = read_splits(file, manifest)
        else:
            given = manifest.splits
            if config.data.skip_unreadable and not {"val", "test"} <= set(given):
                manifest = self.check(manifest, self.settings(config))
            apart = [record for record in manifest if record.split == "test"]
            rest = manifest.with_records([record for record in manifest if record.split != "test"])
            data = config.data.model_copy(update={"test": 0.0}) if apart else config.data
            rest = split_configured(rest, data, config.split_seed, self.cache)
            assigned = {record.name: record for record in [*rest, *apart]}
            manifest = rest.with_records([assigned[record.name] for record in manifest])
            write_splits(manifest, file)
        for note in manifest.notes:
            print(note)
        learning = manifest.with_records([record for record in manifest if record.split in ("train", "val")])
        if "val" not in learning.splits:
            raise ConfigError(
                "trials are judged on a validation split, and there is none: keep some images (data.val)."
            )
        learning.check_trainable()
        return learning

    def settings(self, config: Any) -> FundusSettings:
        """How a trial prepares its photographs."""
        from eyetune.backbones import find_spec
        from eyetune.data.fundus import FundusSettings

        return FundusSettings.of(config.data, find_spec(config.model.backbone).preprocess_at(config.model.pixels))

    def check(self, manifest: Manifest, settings: FundusSettings) -> Manifest:
        """The photographs that can be read, prepared in the cache."""
        from eyetune.data.readable import check_readable

        config = self.plan.base
        return check_readable(
            manifest, config.data.skip_unreadable, workers=config.workers, cache=self.cache, settings=settings
        )

    def photographs(self, config: Any) -> Manifest:
        """The manifest for a trial: every photograph is looked at once, however many trials prepare it alike."""
        settings = self.settings(config)
        key = repr(sorted(settings.to_dict().items()))
        if key not in self.readable:
            self.readable[key] = self.check(self.manifest, settings)
        return self.readable[key]

    def identity(self) -> dict[str, Any]:
        """What makes two searches the same; where data, weights and results lie may differ from machine to machine."""
        from eyetune.files import sha256

        plan = self.plan
        config = plan.base.model_dump(mode="json")
        for path in (*MOVABLE, "data.table", "data.images", "data.split_seed"):
            section, _, name = path.rpartition(".")
            (config[section] if section else config).pop(name, None)
        for path in plan.space.fields:
            section, _, name = path.rpartition(".")
            (config[section] if section else config).pop(name, None)
        config["adapt"] = {"kind": plan.base.adapt.kind} | config["adapt"]
        return {
            "configuration": config,
            "space": plan.space.texts(),
            "objectives": list(plan.objectives),
            "pruner": plan.pruner,
            "splits": sha256(plan.out / "splits.csv"),
        }


class _Stopped(Exception):
    """The trial does worse than others did after as many epochs."""


class _Desk:
    """One worker: takes trials, trains them, says what came of them."""

    def __init__(self, study: _Study, ledger: Ledger) -> None:
        self.study = study
        self.plan = study.plan
        self.ledger = ledger
        self.start = time.monotonic()
        self.failed: list[str] = []

    def work(self) -> None:
        """Trial after trial, until enough are finished."""
        plan = self.plan
        print(f"searching into {plan.out}, trials in {self.ledger.place.shown}:", flush=True)
        for path, text in plan.space.texts().items():
            print(f"  {path}: {text}")
        judged = ", ".join(f"{one.name} ({one.direction}d)" for one in self.study.objectives)
        judged = judged.replace("maximized", "maximised").replace("minimized", "minimised")
        print(f"judged on validation by {judged}; stopped early by: {plan.pruner}", flush=True)
        for note in plan.notes:
            print(note)
        while (taken := self.ledger.take(plan.trials, self.say_waiting, self.late)) is not None:
            with deferred():  # between trials nothing is lost: who asks to stop finds this one told
                self.carry_out(taken)
                self.write()
                if pending() is not None:
                    raise obey("")
            self.check_hope()

    def late(self) -> bool:
        """Whether the time is up."""
        return self.plan.timeout is not None and time.monotonic() - self.start >= self.plan.timeout

    def say_waiting(self, running: int) -> None:
        """That others do the last trials."""
        print(f"waiting for {plural(running, 'trial')} of other workers (Ctrl-C leaves them to it)", flush=True)

    def check_hope(self) -> None:
        """Raise RunError when trial after trial failed and none ever came through."""
        from eyetune.searching.ledger import count

        if len(self.failed) < min(HOPELESS, self.plan.trials):
            return
        counts = count(self.ledger.trials())
        if not counts.complete and not counts.pruned:
            raise RunError(
                f"the first {plural(len(self.failed), 'trial')} failed, and none came through. The last one because: "
                f"{self.failed[-1]}\nMend it, and begin anew with another --out."
            )

    def carry_out(self, taken: Taken) -> None:
        """One trial from its values to its place in the database."""
        from eyetune.searching.results import TRIALS, describe
        from eyetune.searching.storage import StorageError

        so_far = f"{taken.finished} of {self.plan.trials} finished"
        print(f"\ntrial {taken.number} ({so_far}): {describe(taken.values)}", flush=True)
        folder = self.plan.out / TRIALS / f"{taken.number:04d}"
        try:
            if pending() is not None:
                raise obey("")
            if (twin := self.ledger.twin(taken)) is not None:
                self.ledger.finish(taken, twin.values, {**twin.user_attrs["facts"], "same_as": twin.number})
                print(f"trial {taken.number}: the same values as trial {twin.number}, so the same result", flush=True)
                return
            with self.ledger.beating(taken):
                self.train(taken, folder)
        except KeyboardInterrupt:
            self.ledger.hand_back(taken)
            raise
        except Exception as error:
            if isinstance(error, StorageError) or _disk(error):
                with contextlib.suppress(StorageError):
                    self.ledger.hand_back(taken)
                raise
            reason = _text(error)
            self.failed.append(reason)
            self.ledger.fail(taken, reason)
            print(f"trial {taken.number} failed: {reason}", file=sys.stderr, flush=True)
        finally:
            if not self.plan.keep_checkpoints:
                shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            gc.collect()

    def train(self, taken: Taken, folder: Path) -> None:
        """Train a trial, and note its values; or that it was stopped early."""
        from eyetune.runtime import Runtime
        from eyetune.train.cost import Cost
        from eyetune.train.rundir import RunDir

        config = self.plan.config(taken.values, folder)
        check_settings(config)
        runtime = Runtime(config.device, config.precision, config.seed)
        manifest = self.study.photographs(config)
        model, strategy = build_model(config, manifest.classes)
        epochs = strategy.epochs(config.train.epochs)
        shutil.rmtree(folder, ignore_errors=True)
        run = RunDir.create(folder)
        seen: list[float] = []
        higher = self.study.objectives[0].higher

        def after_epoch(epoch: int, value: float | None, row: dict[str, Any]) -> None:
            if value is None:
                return
            seen.append(value)
            best = max(seen) if higher else min(seen)  # what the trial would be worth: its best epoch counts
            if self.ledger.report(taken, epoch + 1, best) and epoch + 1 < epochs:
                raise _Stopped(f"{best:.3f} at best after epoch {epoch + 1} of {epochs}")

        try:
            with run.in_use(), Cost(run, runtime) as cost:
                job = Job(config, manifest, model, strategy, run, runtime, self.study.cache, cost)
                lesson = job.lesson()
                run.write_config(config)
                fitted = job.fit(lesson, after_epoch=after_epoch)
        except _Stopped as stopped:
            self.ledger.prune(taken, {"epochs": len(seen)})
            print(f"trial {taken.number}: stopped early, {stopped}", flush=True)
            return
        facts = run.read_cost()
        values = [_value(one, fitted, facts) for one in self.study.objectives]
        self.ledger.finish(taken, values, {name: facts.get(name) for name in _FACTS} | {"epochs": fitted.epochs})
        said = ", ".join(f"{one.name} {value:.4g}" for one, value in zip(self.study.objectives, values, strict=True))
        print(f"trial {taken.number}: {said}", flush=True)

    def write(self) -> Outcome:
        """What is known by now, into the folder; what killed workers left of their trials is cleared away."""
        from eyetune.runtime import command_line
        from eyetune.searching.folder import write_results
        from eyetune.searching.results import TRIALS, outcome
        from eyetune.searching.storage import translated

        place = self.ledger.place
        with translated(place):
            found = outcome(self.plan, self.study.objectives, self.ledger.study)
        for row in found.rows:
            folder = self.plan.out / TRIALS / f"{row.number:04d}"
            if row.state == "lost":
                shutil.rmtree(folder, ignore_errors=True)
            elif row.state not in ("running", "waiting") and not self.plan.keep_checkpoints:
                shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        write_results(found, command_line(place.command(sys.argv, self.plan.storage)), place.shown)
        return found

    def conclude(self) -> Outcome:
        """Say what came of the search. Raises RunError when nothing did."""
        from eyetune.searching import folder, results

        found = self.write()
        out, counts = self.plan.out, results.count_rows(found.rows)
        if found.best is None:
            if self.failed:
                raise RunError(f"no trial came through. The last one failed because: {self.failed[-1]}")
            print("no trial is complete yet; the same command goes on")
            return found
        print()
        show(results.terminal_table(found))
        print(", ".join(f"{number} {state}" for state, number in counts.items() if number))
        for row in found.front[:1]:
            said = ", ".join(f"{o.name} {v:.4g}" for o, v in zip(found.objectives, row.values, strict=True))
            print(f"best: trial {row.number}, {said} ({results.describe(row.parameters)})")
        print(results.honest(counts["complete"] + counts["pruned"], found.objectives[0]))
        if found.warnings:
            print("\n".join(["", "Mind:", *(f"  {line}" for line in found.warnings)]))
        print(f"\n{out / results.PAGE}, {folder.TABLE}; the best settings: {out / folder.BEST}. Next:")
        print(f"  eyetune finetune {out / folder.BEST}")
        print("For research; not a medical device.")
        return found


_FACTS = ("best_epoch", "trainable_parameters", "training_seconds", "peak_memory")


def _value(objective: Objective, fitted: FitResult, facts: dict[str, Any]) -> float:
    """What a trial is judged by. Raises RunError where it has no value."""
    if objective.cost:
        value = facts.get({"seconds": "training_seconds"}.get(objective.name, objective.name))
    else:
        value = fitted.history[fitted.best_epoch].get(f"val_{objective.name}")
    if value is None:
        why = "this system does not say" if objective.cost else "it is not defined on the validation split"
        raise RunError(f"{objective.name} has no value: {why}")
    return float(value)


def _disk(error: Exception) -> bool:
    """Whether the disk takes no more: no trial's fault."""
    return any(getattr(one, "errno", None) in WRITING_ERRORS for one in (error, error.__cause__))


def _text(error: Exception) -> str:
    return str(error).strip() if isinstance(error, UserError) else f"{type(error).__name__}: {str(error).strip()}"
