"""`eyetune clip train`: contrast both eyes of patients with the texts about them, and score what was learnt."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from signal import SIGINT
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from eyetune.clip.config import CLIP, ClipConfig
from eyetune.errors import ConfigError, RunError
from eyetune.flags import help_text, parse, to_resume
from eyetune.interrupt import Interrupted
from eyetune.terminal import show

if TYPE_CHECKING:
    from eyetune.clip.batches import PairDataset
    from eyetune.clip.run import Built, ClipRun
    from eyetune.data.cache import Cache
    from eyetune.data.loader import Loader
    from eyetune.data.pairs import PairSet
    from eyetune.runtime import Runtime
    from eyetune.train.cost import Cost
    from eyetune.train.loop import FitResult
    from eyetune.train.rundir import RunDir

app = App(
    name="train",
    help_format="plaintext",
    help_epilogue=help_text(ClipConfig),
    usage="Usage: eyetune clip train [CONFIG.yaml] [--section.field VALUE]... | --resume RUN [--from previous]",
)


@app.default
def command(*words: Annotated[str, Parameter(allow_leading_hyphen=True, show=False)]) -> None:
    """Train an image-text model on prepared pairs, choose the best epoch, score the test split, write a run folder."""
    given = parse(words, ClipConfig)
    if (again := to_resume(given)) is not None:
        folder, previous = again
        resume(folder, previous=previous)
    elif given.positional or given.overrides:
        train(ClipConfig.from_yaml(given.positional, given.overrides))
    else:
        raise ConfigError("nothing to train on: name a CONFIG.yaml, or at least --data.folder PAIRS. See --help.")


def train(config: ClipConfig) -> ClipRun:
    """Carry out a configuration and return the finished run.

    Raises UserError for what the user can mend; KeyboardInterrupt, with how to go on, when interrupted.
    """
    from eyetune.data.cache import Cache
    from eyetune.runtime import Runtime
    from eyetune.train.cost import Cost
    from eyetune.train.logs import check_available
    from eyetune.train.rundir import RunDir

    runtime = Runtime(config.device, config.precision, config.seed)
    check_available(config.train)
    RunDir.check_free(config.out)
    runtime.wait()  # all have looked before one makes it
    splits = open_splits(config)
    built = build_model(config, splits)
    folder = RunDir.create(config.out, runtime.is_main)
    with folder.in_use():
        with Cost(folder, runtime) as cost:
            job = _Job(config, splits, built, folder, runtime, Cache.of(config.data), cost)
            loaders = job.loaders()
            job.describe()
            run = job.train(loaders, resumed=False)
        job.farewell()
        return run


def resume(path: str | Path, *, previous: bool = False) -> ClipRun:
    """Go on with an interrupted run, exactly where it stopped. A run that is finished is only scored again.

    Args:
        path: the run folder.
        previous: from the checkpoint before the last one, which is dropped.

    Raises RunError when another process works on the run, it is damaged, or the pairs have changed; and as
    :func:`train`.
    """
    from eyetune.data.cache import Cache
    from eyetune.runtime import Runtime
    from eyetune.train.cost import Cost
    from eyetune.train.rundir import RunDir

    folder = RunDir.open(path, kind=CLIP)
    config = folder.read_config_as(ClipConfig)
    runtime = Runtime(config.device, config.precision, config.seed)
    folder.main = runtime.is_main
    config = share_batch(config, folder.processes(), runtime)
    with folder.in_use():
        with runtime.main_first():
            if previous:
                folder.back_to_previous()
        splits = open_splits(config)
        begun = folder.read_data()
        now = {name: pairs.fingerprint for name, pairs in splits.items()}
        if begun and begun.get("fingerprints") != now:
            raise RunError(
                f"{folder.path} was begun with other pairs than {config.data.folder} holds now. Put those back, or "
                "train anew with another --out."
            )
        built = build_model(config, splits)
        with Cost(folder, runtime) as cost:
            job = _Job(config, splits, built, folder, runtime, Cache.of(config.data), cost)
            loaders = job.loaders()
            if not begun:
                job.describe()
            run = job.train(loaders, resumed=True)
        job.farewell()
        return run


def share_batch(config: ClipConfig, before: int, runtime: Runtime) -> ClipConfig:
    """The configuration of a run begun by `before` processes, for those that go on: as many pairs are contrasted.

    Raises RunError when these cannot share them evenly.
    """
    if before == runtime.processes:
        return config
    batch, rest = divmod(config.train.batch_size * before, runtime.processes)
    if rest or batch < 2:
        raise RunError(
            f"the run was begun by {before} processes, {config.train.batch_size * before} pairs a batch; "
            f"{runtime.processes} cannot share them evenly. Go on with {before}, or another number that divides them."
        )
    # No part larger than what fitted before.
    micro = min(config.train.micro_batch or config.train.batch_size, batch)
    if runtime.is_main:
        print(
            f"begun by {before} processes, goes on with {runtime.processes}: train.batch_size {batch}, in parts of "
            f"{micro}; {batch * runtime.processes} pairs are contrasted as before (dropout draws otherwise)"
        )
    train = config.train.model_copy(update={"batch_size": batch, "micro_batch": micro})
    return config.model_copy(update={"train": train})


def open_splits(config: ClipConfig) -> dict[str, PairSet]:
    """The pairs of a configuration by "train", "val" and "test", those that it names and that are there.

    Raises DataError when train or val is not there, or any is damaged.
    """
    from eyetune.data.pairs import PairSet
    from eyetune.data.pairs.layout import database_folder
    from eyetune.errors import DataError

    data = config.data
    splits = {"train": PairSet.open(data.folder, data.train)}
    if data.val is not None:
        splits["val"] = PairSet.open(data.folder, data.val)
    if data.test is not None and (database_folder(data.folder, data.test).is_dir() or data.test != "test"):
        splits["test"] = PairSet.open(data.folder, data.test)
    if empty := [name for name, pairs in splits.items() if not len(pairs)]:
        raise DataError(f"{data.folder}: no pairs in {', '.join(empty)}.")
    return splits


def build_model(config: ClipConfig, splits: dict[str, PairSet]) -> Built:
    """The model, its vocabulary, which has to know the texts, and what trains; on the CPU.

    Raises as :func:`eyetune.clip.run.build`; DataError when the vocabulary does not fit the texts; ConfigError when
    RET-CLIP's code could not read what is asked for.
    """
    from eyetune.clip.export import check_ret_clip
    from eyetune.clip.run import build

    texts = splits["train"].texts
    built = build(config, texts)
    if config.train.ret_clip_file:
        check_ret_clip(built.model.visual)
    built.tokenizer.coverage(texts, config.text.length).check(f"text.encoder {config.text.encoder}")
    return built


@dataclass(frozen=True)
class _Job:
    """One run on its way: from what is known before training to the scores."""

    config: ClipConfig
    splits: dict[str, PairSet]
    built: Built
    folder: RunDir
    runtime: Runtime
    cache: Cache | None
    cost: Cost

    def describe(self) -> None:
        """What is known before training, into the run folder and on the terminal."""
        from eyetune.adapt.strategy import describe_parameters
        from eyetune.clip.run import PHOTOGRAPHS, save_text, seen_in_training

        config, model, folder = self.config, self.built.model, self.folder
        folder.write_config(config)
        folder.write_environment(self.runtime.describe())
        report = model.report or model.visual.report
        folder.write_load_report(report.to_dict() if report else {"weights": "random", "loaded": {}})
        save_text(folder, self.built)
        if not self.runtime.is_main:
            return
        coverage = self.built.tokenizer.coverage(self.splits["train"].texts, config.text.length)
        print(f"image tower: {model.visual.spec.name}, {config.adapt_image.kind}")
        print(
            f"text tower: {config.text.encoder}, {config.adapt_text.kind}; {len(self.built.tokenizer)} tokens, "
            f"{coverage.unknown_share:.1%} of the texts' unknown, {coverage.truncated_share:.1%} of the texts cut at "
            f"{config.text.length}"
        )
        print(describe_parameters(model))
        for name, pairs in self.splits.items():
            print(f"{name}: {len(pairs)} pairs of {len(pairs.patients)} patients and {len(pairs.texts)} texts")
        for warning in self.warnings():
            print(f"warning: {warning}")
        print(f"on {self.runtime.device.type} in {self.runtime.precision}; run folder {folder.path}")
        folder.update_data(  # last: a run that has it is begun, and not described again
            source=str(config.data.folder),
            fingerprints={name: pairs.fingerprint for name, pairs in self.splits.items()},
            pairs={name: len(pairs) for name, pairs in self.splits.items()},
            warnings=self.warnings(),
            **{PHOTOGRAPHS: seen_in_training(self.splits, config.model.start)},
        )

    def warnings(self) -> list[str]:
        """What a reader of the scores must not overlook."""
        found = list(dict.fromkeys(text for pairs in self.splits.values() for text in pairs.warnings))
        known = set(self.splits["train"].groups)
        for name in ("val", "test"):
            if name in self.splits and (shared := known & set(self.splits[name].groups)):
                found.append(
                    f"{len(shared)} patients of {name} are in train too: its scores say nothing of new patients"
                )
        prints = [self.splits[name].fingerprint for name in ("val", "test") if name in self.splits]
        if len(set(prints)) < len(prints):
            found.append("val is the test split: the best epoch was chosen on it, and its scores are too good")
        return found

    def loaders(self) -> list[Any]:
        """Of training and validation (None without). Before anything is written: what cannot be trained leaves the
        folder free."""
        train = self.loader(self.dataset("train", training=True), training=True)
        return [train, self.loader(self.dataset("val"), training=False) if "val" in self.splits else None]

    def train(self, loaders: list[Any], *, resumed: bool) -> ClipRun:
        """Train, then score `val` and `test` with the best epoch."""
        from typing import cast

        from eyetune.clip.batches import fit_standard
        from eyetune.clip.run import model_card
        from eyetune.clip.task import ContrastTask
        from eyetune.train.loop import fit

        config, val = self.config, self.splits.get("val")
        names = loaders[0].dataset.names
        self.cost.training_begins()
        card = model_card(config, self.built)
        self.runtime.place(self.built.model)
        if config.seen_once:
            loaders = self.once(loaders)
        if config.model.start is None and not (resumed and self.folder.has_checkpoint()):
            fit_standard(self.built.model, loaders[0], self.runtime)
        fitted = fit(
            cast(Any, self.built.model),
            self.built.strategy,
            ContrastTask(config.train, val, names),
            loaders[0],
            loaders[1],
            run=self.folder,
            runtime=self.runtime,
            train=config.train,
            lr=config.learning_rate,
            card=card,
            resume=resumed,
            settings=config.model_dump(mode="json"),
        )
        self.cost.training_ends(fitted, cast(Any, self.built.model), 2 * len(self.splits["train"]))
        try:
            self.score(fitted)
        except KeyboardInterrupt as interrupt:
            raise Interrupted(
                f"Training is finished and kept in {self.folder.path}; its scores are not whole yet. "
                f"Get them with: {self.folder.resume_command()}",
                getattr(interrupt, "signum", SIGINT),
            ) from None
        return self.run()

    def once(self, loaders: list[Any]) -> list[Any]:
        """The loaders over the features of the frozen image tower, and of the text tower where that is frozen too."""
        from eyetune.clip.batches import features_once

        model, text = self.built.model, self.config.read_once
        return [
            loader and features_once(model, loader, self.runtime, f"Features of the {name} eyes", text=text)
            for name, loader in zip(("training", "validation"), loaders, strict=True)
        ]

    def score(self, fitted: FitResult) -> None:
        """Retrieval in val and test with the best epoch, and the files for other programs."""
        from eyetune.clip.export import write_files
        from eyetune.clip.task import embed_pairs
        from eyetune.metrics import plots

        found: dict[str, dict[str, Any]] = {}
        for name in ("val", "test"):
            if name in self.splits:
                loader = self.loader(self.dataset(name), training=False)
                embedded = embed_pairs(self.built.model, loader, self.runtime)
                if self.folder.main:
                    found[name] = {
                        **embedded.retrieval(self.splits[name], resamples=1000),
                        "loss": embedded.loss(self.config.train.batch_size * self.runtime.processes),
                        "warnings": self.warnings(),
                    }
        if not self.folder.main:
            return
        self.folder.write_metrics({"kind": CLIP, "metric": fitted.metric, "datasets": found})
        write_files(self.folder, self.built, fitted, ret_clip=self.config.train.ret_clip_file)
        plots.learning_curves(fitted.history, self.folder.plot_file("learning_curves"), metric=fitted.metric)
        chosen = "" if fitted.best_value is None else f", {fitted.metric} {fitted.best_value:.3f} on validation"
        print(f"best epoch: {fitted.best_epoch + 1} of {fitted.epochs}{chosen}")
        if found:
            show(scores_table(found))
        print(f"run folder: {self.folder.path} (metrics.json, checkpoints/, text/, vision.safetensors)")

    def run(self) -> ClipRun:
        """The finished run, its model as in the best epoch."""
        from eyetune.clip.run import ClipRun
        from eyetune.data.fundus import FundusSettings

        model, tokenizer = self.built.model.eval(), self.built.tokenizer
        return ClipRun(
            path=self.folder.path,
            model=model,
            tokenizer=tokenizer,
            preprocess=model.preprocess,
            settings=FundusSettings.of(self.config.data, model.preprocess),
            config=self.config,
            length=self.config.text.length,
            fingerprint=f"{self.folder.best_model()}:{tokenizer.fingerprint}",
            runtime=self.runtime,
        )

    def farewell(self) -> None:
        """The run is finished: what to do with it."""
        if self.folder.main:
            print(f"Next: eyetune clip retrieve {self.folder.path} --data {self.config.data.folder}")
            print("For research; not a medical device.")

    def dataset(self, split: str, *, training: bool = False) -> PairDataset:
        """The pairs of a split as the network gets them; changed and cut for `training` only."""
        from eyetune.clip.batches import PairDataset, Wordings
        from eyetune.data.fundus import FundusSettings

        config, pairs, preprocess = self.config, self.splits[split], self.built.model.preprocess
        sample = config.text.sample if training else 0.0
        return PairDataset(
            pairs,
            Wordings(pairs.texts, self.built.tokenizer, config.text.length, sample),
            FundusSettings.of(config.data, preprocess),
            preprocess,
            augment=config.changes if training else "none",
            seed=config.seed,
            cache=self.cache,
        )

    def loader(self, dataset: PairDataset, *, training: bool) -> Loader:
        """Batches of it; of validation as many at a time as a forward pass takes."""
        from eyetune.clip.batches import pair_loader

        train = self.config.train
        size = train.batch_size if training else train.micro_batch or train.batch_size
        return pair_loader(
            dataset,
            batch_size=size,
            training=training,
            workers=self.config.workers,
            shard=(self.runtime.rank, self.runtime.processes),
            prefetch=self.config.prefetch,
            pin_memory=self.config.pin_memory,
        )


def scores_table(found: dict[str, dict[str, Any]]) -> Any:
    """Retrieval of each split, both ways, for the terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from eyetune.clip.scoring import DIRECTIONS

    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("split")
    table.add_column("find")
    for column in ("gallery", "R@1", "chance", "R@5", "R@10", "median rank"):
        table.add_column(column, justify="right")
    for split, scores in found.items():
        for direction in DIRECTIONS:
            one, metrics = scores[direction], scores[direction]["metrics"]
            cells = [_value(metrics, f"recall_at_{k}") for k in (1, 5, 10)]
            chance = _value(metrics, "recall_at_1", "chance")
            row = [str(one["gallery"]), cells[0], chance, *cells[1:], _value(metrics, "median_rank", digits=1)]
            table.add_row(split, direction.replace("_", " "), *row)
    return table


def _value(metrics: dict[str, Any], name: str, part: str = "value", digits: int = 3) -> str:
    value = metrics.get(name, {}).get(part)
    return "–" if value is None else f"{value:.{digits}f}"
