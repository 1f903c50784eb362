"""`eyetune finetune`: train, choose the best epoch on validation, score the test split, write a run folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from signal import SIGINT
from typing import TYPE_CHECKING, Annotated, NamedTuple

from cyclopts import App, Parameter

from eyetune.config import Config
from eyetune.errors import ConfigError, RunError
from eyetune.flags import help_text, parse, to_resume
from eyetune.interrupt import Interrupted
from eyetune.terminal import show

if TYPE_CHECKING:
    from eyetune.adapt.classifier import Classifier
    from eyetune.adapt.strategy import Strategy
    from eyetune.data.cache import Cache
    from eyetune.data.loader import Loader
    from eyetune.data.records import Manifest
    from eyetune.runtime import Runtime
    from eyetune.train.answers import Answer
    from eyetune.train.cost import Cost
    from eyetune.train.loop import AfterEpoch, FitResult
    from eyetune.train.run import Run
    from eyetune.train.rundir import ModelCard, RunDir
    from eyetune.train.task import SupervisedTask

app = App(
    name="finetune",
    help_format="plaintext",
    help_epilogue=help_text(),
    usage="Usage: eyetune finetune [CONFIG.yaml] [--section.field VALUE]... | --resume RUN [--from previous]",
)


@app.default
def command(*words: Annotated[str, Parameter(allow_leading_hyphen=True, show=False)]) -> None:
    """Train, choose the best epoch on validation, score the test split, and write a run folder."""
    given = parse(words)
    if (again := to_resume(given)) is not None:
        folder, previous = again
        resume(folder, previous=previous)
    elif given.positional or given.overrides:
        finetune(Config.from_yaml(given.positional, given.overrides))
    else:
        raise ConfigError("nothing to train on: name a CONFIG.yaml, or at least --data.table TABLE. See --help.")


def finetune(config: Config) -> Run:
    """Carry out a configuration and return the finished run.

    Raises UserError for what the user can mend; KeyboardInterrupt, with how to go on, when interrupted.
    """
    from eyetune.data.cache import Cache
    from eyetune.runtime import Runtime
    from eyetune.train.cost import Cost
    from eyetune.train.rundir import RunDir

    runtime = Runtime(config.device, config.precision, config.seed)
    check_settings(config)
    check_split(config, config.adapt.build(), runtime)
    RunDir.check_free(config.out)
    runtime.wait()  # all have looked before one makes it
    cache = Cache.of(config.data)
    manifest = prepare_data(config, cache)
    model, strategy = build_model(config, manifest.classes)
    folder = RunDir.create(config.out, runtime.is_main)
    with folder.in_use():
        with Cost(folder, runtime) as cost:
            job = Job(config, manifest, model, strategy, folder, runtime, cache, cost)
            lesson = job.lesson()
            job.describe()
            run = job.train(lesson, resumed=False)
        job.report()
        return run


def resume(path: str | Path, *, previous: bool = False) -> Run:
    """Go on with an interrupted run, exactly where it stopped. A run that is finished is only scored again.

    Args:
        path: the run folder.
        previous: from the checkpoint before the last one, which is dropped.

    Raises RunError when another process works on the run, or what there is of it is damaged; and as
    :func:`finetune`.
    """
    from eyetune.data.cache import Cache
    from eyetune.runtime import Runtime
    from eyetune.train.cost import Cost
    from eyetune.train.rundir import RunDir

    folder = RunDir.open(path)
    config = folder.read_config()
    runtime = Runtime(config.device, config.precision, config.seed)
    folder.main = runtime.is_main
    check_split(config, config.adapt.build(), runtime)
    config = share_batch(config, folder.processes(), runtime)
    with folder.in_use():
        with runtime.main_first():
            if previous:
                folder.back_to_previous()
        begun = folder.splits_file.is_file()
        cache = Cache.of(config.data)
        manifest = prepare_data(config, cache, splits=folder.splits_file if begun else None)
        model, strategy = build_model(config, manifest.classes)
        with Cost(folder, runtime) as cost:
            job = Job(config, manifest, model, strategy, folder, runtime, cache, cost)
            lesson = job.lesson()
            if not begun:
                job.describe()
            run = job.train(lesson, resumed=True)
        job.report()
        return run


def share_batch(config: Config, before: int, runtime: Runtime) -> Config:
    """The configuration of a run begun by `before` processes, for those that go on with it: as many images a step.

    Raises RunError when these cannot share them evenly.
    """
    if before == runtime.processes:
        return config
    batch_size, accumulate = config.train.batch_size, config.train.accumulate
    step = batch_size * accumulate * before
    each, rest = divmod(step, runtime.processes)
    if rest:
        raise RunError(
            f"the run was begun by {before} processes, {step} images a step; {runtime.processes} cannot share them "
            f"evenly. Go on with {before}, or another number that divides {step}."
        )
    # No batch larger than what fitted before.
    parts = next(parts for parts in range(1, each + 1) if each % parts == 0 and each // parts <= batch_size)
    if runtime.is_main:
        print(
            f"begun by {before} processes, goes on with {runtime.processes}: train.batch_size {each // parts}, "
            f"train.accumulate {parts}, {step} images a step as before (dropout and mixup draw otherwise)"
        )
    train = config.train.model_copy(update={"batch_size": each // parts, "accumulate": parts})
    return config.model_copy(update={"train": train})


def check_split(config: Config, strategy: Strategy, runtime: Runtime) -> None:
    """Raise ConfigError where `train.fsdp` cannot do what it says."""
    if not config.train.fsdp:
        return
    if runtime.processes == 1:
        raise ConfigError(
            "train.fsdp: splits the network over several processes, and this is one. Start them with torchrun "
            "--nproc_per_node=N -m eyetune finetune …, or leave train.fsdp out."
        )
    if not strategy.shardable:
        raise ConfigError(f"train.fsdp: not with adapt.kind {config.adapt.kind}. Use full or lora, or leave it out.")
    for name, wrong in (("precision fp16", runtime.precision == "fp16"), ("train.compile", config.train.compile)):
        if wrong:
            raise ConfigError(f"train.fsdp: not with {name}. Leave one of them out.")


def check_settings(config: Config) -> None:
    """Say what is wrong with names and sizes before any image is read: backbone, pool, pixels, augmentation, extras."""
    from eyetune.backbones import find_spec
    from eyetune.data.on_device import check_on_device
    from eyetune.data.transforms import train_transform
    from eyetune.train.logs import check_available

    check_available(config.train)
    spec = find_spec(config.model.backbone)
    spec.check_pool(config.model.pool)
    spec.check_pixels(config.model.pixels)
    train_transform(spec.preprocess, config.augment)
    if config.augment_on == "device":
        check_on_device(config.augment)


def prepare_data(config: Config, cache: Cache | None = None, *, splits: Path | None = None) -> Manifest:
    """The photographs of a configuration, every one readable, in a split and with a label.

    Args:
        config: the configuration.
        cache: where the prepared photographs go.
        splits: a splits.csv to repeat; None cuts splits as the configuration says.

    Raises DataError for everything that is wrong with the table, the images or the splits.
    """
    from eyetune.backbones import find_spec
    from eyetune.data.fundus import FundusSettings
    from eyetune.data.readable import check_readable
    from eyetune.data.records import open_manifest
    from eyetune.data.splits import read_splits, split_configured

    preprocess = find_spec(config.model.backbone).preprocess_at(config.model.pixels)
    manifest = check_readable(
        open_manifest(config.data, kind=config.reads),
        config.data.skip_unreadable,
        workers=config.workers,
        cache=cache,
        settings=FundusSettings.of(config.data, preprocess),
    )
    if splits is not None:
        manifest = read_splits(splits, manifest)
    else:
        manifest = split_configured(manifest, config.data, config.split_seed, cache)
    manifest.check_trainable()
    return manifest


def build_model(config: Config, classes: tuple[str, ...]) -> tuple[Classifier, Strategy]:
    """The backbone with its weights and a new head, adapted as configured; on the CPU.

    Args:
        config: the configuration.
        classes: the manifest's: classes, labels, or the name of the number.

    Raises WeightsError when the weights do not arrive whole, ConfigError when the strategy does not fit the network.
    """
    from eyetune.adapt.classifier import Classifier
    from eyetune.backbones import load_backbone
    from eyetune.runtime import seed_everything
    from eyetune.train.answers import answer_to

    answer = answer_to(config.asked, classes)
    seed_everything(config.seed)  # the head's first weights, and the backbone's when they are "random"
    backbone = load_backbone(
        config.model.backbone, config.model.weights, pixels=config.model.pixels, pool=config.model.pool
    )
    model = Classifier(backbone, answer.outputs, config.model.dropout, shared=answer.shared)
    strategy = config.adapt.build()
    return strategy.apply(model), strategy


def model_card(config: Config, answer: Answer, model: Classifier) -> ModelCard:
    """All it takes to rebuild the model of a configuration around its checkpoint."""
    from eyetune.data.fundus import FundusSettings
    from eyetune.train.rundir import ModelCard

    backbone = model.backbone
    return ModelCard(
        backbone=config.model.backbone,
        weights=config.model.weights,
        pool=backbone.pool,
        pixels=backbone.preprocess.pixels,
        dropout=config.model.dropout,
        fingerprint=model.base_fingerprint(),
        preprocess=backbone.preprocess.to_dict(),
        fundus=FundusSettings.of(config.data, backbone.preprocess).to_dict(),
        classes=answer.names,
        task=answer.card(),
        adapt=config.adapt.model_dump(mode="json"),
        seed=config.seed,
    )


class Lesson(NamedTuple):
    """What a run is taught, and the batches it learns from and is validated on."""

    task: SupervisedTask
    train: Loader
    val: Loader | None


@dataclass(frozen=True)
class Job:
    """One run on its way: from what is known before training to the scores."""

    config: Config
    manifest: Manifest
    model: Classifier
    strategy: Strategy
    folder: RunDir
    runtime: Runtime
    cache: Cache | None
    cost: Cost

    def describe(self) -> None:
        """What is known before training, into the run folder and on the terminal."""
        from eyetune.adapt.strategy import describe_parameters
        from eyetune.data.splits import write_splits
        from eyetune.data.summary import summary

        self.folder.write_config(self.config)
        self.folder.write_environment(self.runtime.describe())
        report = self.model.backbone.report
        self.folder.write_load_report(report.to_dict() if report else {"weights": "random", "loaded": {}})
        if not self.runtime.is_main:
            return
        self.folder.update_data(**summary(self.manifest))
        write_splits(
            self.manifest, self.folder.splits_file
        )  # last: a run that has it is begun, and not described again
        for note in self.manifest.notes:
            print(note)
        print(f"backbone: {self.config.model.backbone}, {report.summary() if report else 'untrained weights'}")
        print(f"strategy: {self.config.adapt.kind}, {describe_parameters(self.model)}")
        print(f"on {self.runtime.device.type} in {self.runtime.precision}; run folder {self.folder.path}")

    def lesson(self) -> Lesson:
        """What is taught, from what. Before anything is written: what cannot be trained leaves the folder free."""
        from eyetune.train.loop import check_validation
        from eyetune.train.task import SupervisedTask

        config = self.config
        task = SupervisedTask.of(self.manifest.select("train"), config.train, config.asked)
        check_validation(task, config.train, "val" in self.manifest.splits)
        train = self.loader("train", training=True)
        return Lesson(task, train, self.loader("val", training=False) if "val" in self.manifest.splits else None)

    def fit(self, lesson: Lesson, *, resumed: bool = False, after_epoch: AfterEpoch | None = None) -> FitResult:
        """Train, and count what it costs; `after_epoch` as for :func:`eyetune.train.loop.fit`."""
        from eyetune.train.loop import fit

        config = self.config
        self.cost.training_begins()
        fitted = fit(
            self.model,
            self.strategy,
            lesson.task,
            lesson.train,
            lesson.val,
            run=self.folder,
            runtime=self.runtime,
            train=config.train,
            lr=config.learning_rate,
            card=model_card(config, lesson.task.answer, self.model),
            resume=resumed,
            features_once=self.once,
            settings=config.model_dump(mode="json"),
            after_epoch=after_epoch,
        )
        self.cost.training_ends(fitted, self.model, len(self.manifest.select("train")))
        return fitted

    def train(self, lesson: Lesson, *, resumed: bool) -> Run:
        """Train, then score `val` and `test` with the best epoch."""
        from eyetune.train.answers import read_answer
        from eyetune.train.run import Run, rebuild

        fitted = self.fit(lesson, resumed=resumed)
        model, strategy = self.model, self.strategy
        if self.config.train.fsdp:  # to predict, it fits whole, and nothing of it has to wait for other processes
            model, strategy = rebuild(self.folder.load_best(fitted.best_epoch), self.folder.path)
            self.runtime.place(model)
        model.reading = read_answer(fitted.card.task, fitted.card.classes).evidence
        run = Run(self.folder, model, strategy, fitted.card, self.runtime, cache=self.cache)
        try:
            self.score(run, fitted)
        except KeyboardInterrupt as interrupt:
            path = self.folder.path
            raise Interrupted(
                f"Training is finished and kept in {path}; its scores are not whole yet. "
                f"Get them with: eyetune finetune --resume {path}",
                getattr(interrupt, "signum", SIGINT),
            ) from None
        return run

    def score(self, run: Run, fitted: FitResult) -> None:
        """Predict and score val and test with the best epoch, draw the plots, say what came of it."""
        from eyetune.metrics import plots
        from eyetune.report.mistakes import remember
        from eyetune.train.results import OWN, add_scores, calibrate, remarks_table, scores_table

        size = self.config.train.batch_size
        run.novelty = None  # whatever an earlier training left
        if "val" in self.manifest.splits:
            run.fit_novelty(self.manifest.select("train"), workers=self.config.workers, batch_size=size)
        tables = {
            name: run.table(self.manifest.select(name), workers=self.config.workers, batch_size=size)
            for name in OWN
            if name in self.manifest.splits
        }
        run.calibration = calibrate(run, tables.get("val"))
        about = {name: {"warnings": self.warnings(name)} for name in tables}
        content = add_scores(self.folder, tables, run.calibration, about=about)
        if not self.folder.main:
            return
        remember(self.folder, tables, {name: self.manifest.select(name) for name in tables})
        run.strategy.write_artifacts(run.model, self.folder.path)
        plots.learning_curves(fitted.history, self.folder.plot_file("learning_curves"), metric=fitted.metric)
        chosen = "" if fitted.best_value is None else f", {fitted.metric} {fitted.best_value:.3f} on validation"
        print(f"best epoch: {fitted.best_epoch + 1} of {fitted.epochs}{chosen}")
        if tables:
            show(scores_table(content))
            for shown in remarks_table(content, list(tables)):
                print(shown) if isinstance(shown, str) else show(shown)
        print(f"run folder: {self.folder.path} (metrics.json, predictions/, plots/)")

    def report(self) -> None:
        """The run is finished: its report and model card, for people."""
        from eyetune.report.page import refresh

        if self.folder.main:
            refresh(self.folder)
            print("For research; not a medical device.")

    def warnings(self, split: str) -> list[str]:
        """What a reader of a split's scores must not overlook."""
        from eyetune.train.leaks import Seen, overlap, unnamed_patients

        if not self.folder.main:
            return []
        records = self.manifest.select(split).records
        before = ("train",) if split == "val" else ("train", "val")
        shared = overlap(records, Seen.of_manifest(self.manifest, before), self.cache)
        return [*shared, *unnamed_patients([record.patient for record in records])]

    @property
    def once(self) -> bool:
        """Whether the features of an image are computed once, and not in every epoch."""
        from eyetune.train.features import can_compute_once

        return can_compute_once(self.strategy, self.config.train, self.config.augment)

    def loader(self, split: str, *, training: bool) -> Loader:
        """Batches of one split."""
        from eyetune.data.fundus import FundusSettings
        from eyetune.data.loader import make_loader

        config = self.config
        preprocess = self.model.backbone.preprocess
        return make_loader(
            self.manifest.select(split),
            preprocess,
            FundusSettings.of(config.data, preprocess),
            batch_size=config.train.batch_size,
            training=training,
            augment=config.augment,
            balance=config.train.balance,
            workers=config.workers,
            seed=config.seed,
            cache=self.cache,
            shard=(self.runtime.rank, self.runtime.processes),
            on_device=config.augment_on == "device" and not self.once,
            prefetch=config.prefetch,
            pin_memory=config.pin_memory,
        )
