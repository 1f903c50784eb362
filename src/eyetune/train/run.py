"""A finished run, ready to predict: the base network, what training changed, and how its images are prepared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from eyetune.adapt.classifier import Classifier, put_norm_before
from eyetune.adapt.strategy import Strategy, parse_adapt
from eyetune.adapt.task import READS
from eyetune.backbones import Preprocess, load_backbone
from eyetune.backbones.older import is_older
from eyetune.data.cache import Cache
from eyetune.data.fundus import FundusSettings
from eyetune.data.loader import Batch, make_loader, target_tensor
from eyetune.data.readable import Workers
from eyetune.data.record import Kind, Record
from eyetune.data.records import Manifest
from eyetune.data.transforms import eval_transform
from eyetune.errors import DataError, RunError, UserError
from eyetune.metrics.fitted import Fitted
from eyetune.metrics.predictions import LabelPredictions, Predictions, ValuePredictions
from eyetune.metrics.table import Table
from eyetune.runtime import Runtime, choose_device, choose_precision, seed_everything
from eyetune.train.adopt import adopt
from eyetune.train.answers import Answer, Rows, read_answer
from eyetune.train.features import FeatureHead, compute_once
from eyetune.train.mirrored import Mirrored
from eyetune.train.novelty import Novelty, sample_places
from eyetune.train.rundir import Checkpoint, ModelCard, RunDir
from eyetune.train.task import Outputs, predict

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor


class Run:
    """A trained classifier with all that prediction has to repeat.

    Attributes:
        folder: the run folder.
        model: the network, adapted, in eval mode.
        card: what it was built from and how its images are prepared.
        cache: where prepared photographs, and the features of a frozen backbone, are kept; None for nowhere.
    """

    def __init__(
        self,
        folder: RunDir,
        model: Classifier,
        strategy: Strategy,
        card: ModelCard,
        runtime: Runtime,
        *,
        cache: Cache | None = None,
    ) -> None:
        self.folder = folder
        self.model = model
        self.strategy = strategy
        self.card = card
        self.runtime = runtime
        self.cache = cache

    @property
    def name(self) -> str:
        """Its folder."""
        return str(self.folder.path)

    @property
    def backbone(self) -> str:
        """The name of the network it was adapted from."""
        return self.card.backbone

    @property
    def licence(self) -> str:
        """Of the weights it was adapted from."""
        return self.model.backbone.spec.licence

    @property
    def digest(self) -> str | None:
        """SHA-256 of what training changed; None for a run of the first EyeTune."""
        return self.folder.best_model()

    def as_run(self) -> Run:
        """Itself: it has a network to look into, as an exported model has not."""
        return self

    @property
    def settings(self) -> FundusSettings:
        """How its photographs become squares."""
        return FundusSettings.from_dict(self.card.fundus)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, in the order of the logits."""
        return self.card.classes

    @cached_property
    def calibration(self) -> Fitted | None:
        """What was fitted on the validation split: the temperature of the probabilities, operating points and the
        rest. None for a run without labelled validation images, or one that has none yet (`finetune --resume` adds it).

        Raises RunError when calibration.json is damaged or was fitted for other weights or classes.
        """
        return self.calibration_for(None)

    def calibration_for(self, site: str | None) -> Fitted | None:
        """The calibration fitted on a site's own images (see `eyetune calibrate`), by its name or its file; of None,
        the run's own.

        Raises as :attr:`calibration`, and RunError when there is none for the site.
        """
        found = self.folder.read_calibration(site)
        if found is not None and found.classes != self.classes:
            raise RunError(
                f"the calibration {site or 'of the run'} is for the classes {', '.join(found.classes)}; the run's are "
                f"{', '.join(self.classes)}. It belongs to another run."
            )
        return found

    @property
    def answer(self) -> Answer:
        """What its head was asked, and how its numbers are read."""
        return read_answer(self.card.task, self.card.classes)

    @property
    def reads(self) -> Kind:
        """What its manifests hold: classes, labels or a value."""
        return READS[self.answer.kind]

    def predictions(
        self, manifest: Manifest, *, workers: Workers = "auto", batch_size: int = 32, mirrored: bool = False
    ) -> Predictions:
        """As :meth:`table`, for a run that tells one class an image. Raises RunError for any other."""
        found = self.table(manifest, workers=workers, batch_size=batch_size, mirrored=mirrored)
        if not isinstance(found, Predictions):
            raise RunError(f"{self.folder.path} learnt a {found.task} task; this is for one class an image.")
        return found

    def table(
        self, manifest: Manifest, *, workers: Workers = "auto", batch_size: int = 32, mirrored: bool = False
    ) -> Table:
        """Predict every record of a manifest, in its order, exactly once; raw, as calibration takes them.

        With `mirrored`, the mean of the logits of each photograph and its mirror image (test-time augmentation); its
        `ood` stays that of the photograph as it is.
        Labels, where known, must be indexes into :attr:`classes`. Raises DataError, naming file and row, for an image
        that cannot be read, and for a manifest of another kind of task.
        """
        if manifest.kind != self.reads:
            raise DataError(f"{manifest.source} holds {manifest.kind}; {self.folder.path} learnt {self.reads}.")
        novelty = self.novelty
        judge = None if novelty is None else novelty.score
        outputs = self._outputs(manifest, workers=workers, batch_size=batch_size, judge=judge, mirrored=mirrored)
        return self._told(outputs, manifest)

    def table_of(
        self,
        names: Sequence[str],
        squares: Sequence[NDArray[np.uint8]],
        *,
        batch_size: int = 32,
        mirrored: bool = False,
    ) -> Table:
        """As :meth:`table`, of photographs that are squares uint8[P, P, 3] already, as :attr:`settings` makes them."""
        records = [Record(Path(name), None, f"{number}:{name}", name) for number, name in enumerate(names)]
        manifest = self.unlabelled(records)
        normalise, targets = eval_transform(self.model.backbone.preprocess), target_tensor(manifest)

        def batch(first: int) -> Batch:
            index = torch.arange(first, min(first + batch_size, len(squares)))
            pixels = (torch.from_numpy(np.array(squares[int(place)])).permute(2, 0, 1) for place in index)
            return {"image": torch.stack([normalise(one) for one in pixels]), "target": targets[index], "index": index}

        batches = (batch(first) for first in range(0, len(squares), batch_size))
        network = Mirrored(self.model) if mirrored else self.model
        judge = None if self.novelty is None else self.novelty.score
        return self._told(predict(network, batches, self.runtime, judge=judge), manifest)

    def _told(self, outputs: Outputs, manifest: Manifest) -> Table:
        table = outputs.table(manifest, self.answer)
        return table if outputs.judged is None else replace(table, ood=outputs.judged.double().numpy())

    def ood(self, features: Tensor) -> NDArray[np.float64]:
        """How unlike the training images, out of distribution, those with these features are.

        Args:
            features: float[N, width], as the head of :attr:`model` gets them, on any device.

        Returns float64[N], >= 0; `calibration.ood` says above which value an image is unlike validation. Raises
        RunError when the run has no such score, or its file is damaged.
        """
        if self.novelty is None:
            raise RunError(
                f"{self.folder.path} has no out-of-distribution score: it had no validation split, too few training "
                f"images, or is of an older EyeTune. eyetune finetune --resume {self.folder.path} adds it where it can."
            )
        found: NDArray[np.float64] = self.novelty.score(features).double().cpu().numpy()
        return found

    @cached_property
    def novelty(self) -> Novelty | None:
        """What computes :meth:`ood`; None for a run without. Raises RunError when its file is damaged."""
        rule = None if self.calibration is None else self.calibration.ood
        if rule is None:
            return None
        tensors = self.folder.read_novelty(rule.tensors)
        try:
            return Novelty.of_tensors(tensors, self.model.backbone.width, rule.fitted_on, rule.tensors)
        except ValueError as error:
            raise RunError(f"{self.folder.path}: calibration.safetensors is not this run's: {error}.") from error

    def fit_novelty(self, manifest: Manifest, *, workers: Workers = "auto", batch_size: int = 32) -> None:
        """Learn from (at most 1000 of) the training images what is usual, and write it into the run folder."""
        chosen = manifest.with_records(manifest[place] for place in sample_places(len(manifest), self.card.seed))
        what = "Features of the training images"
        outputs = self._outputs(chosen, workers=workers, batch_size=batch_size, judge=lambda given: given, what=what)
        assert outputs.judged is not None
        found = Novelty.fit(outputs.judged)
        if found is not None:
            digest = self.runtime.gather(self.folder.write_novelty(found.tensors()))[0]
            found = replace(found, digest=digest)
        self.novelty = found

    def _outputs(
        self,
        manifest: Manifest,
        *,
        workers: Workers,
        batch_size: int,
        judge: Callable[[Tensor], Tensor] | None,
        what: str = "Predicting",
        mirrored: bool = False,
    ) -> Outputs:
        loader = make_loader(
            manifest,
            self.model.backbone.preprocess,
            self.settings,
            batch_size=batch_size,
            training=False,
            workers=workers,
            cache=self.cache,
            shard=(self.runtime.rank, self.runtime.processes),
        )
        if mirrored:
            network = Mirrored(self.model)
            outputs = predict(network, loader, self.runtime, total=len(manifest), description=what, judge=judge)
        elif self.strategy.frozen_backbone:
            known = compute_once(self.model, loader, self.runtime, what)
            outputs = predict(FeatureHead(self.model), known, self.runtime, judge=judge)
        else:
            outputs = predict(self.model, loader, self.runtime, total=len(manifest), description=what, judge=judge)
        return outputs

    def predict(
        self, paths: Sequence[str | Path], *, batch_size: int = 32, calibrated: bool = False
    ) -> NDArray[np.float64]:
        """What is predicted for the photographs at `paths`, in their order: probabilities float64[N, K], rows sum to 1;
        of labels float64[N, L], each its own; of a number float64[N].

        They are as they came from the network; `calibrated=True` makes of them what `eyetune predict` gives, where the
        run has a calibration. Raises DataError for a file that is missing or cannot be read.
        """
        records = [
            Record(image=Path(path), label=None, name=f"{n}:{path}", row=str(path)) for n, path in enumerate(paths)
        ]
        found = self.table(self.unlabelled(records), batch_size=batch_size)
        if isinstance(found, ValuePredictions):
            return found.predicted
        if calibrated and self.calibration is not None:
            found = self.calibration.apply(found)
        assert isinstance(found, (Predictions, LabelPredictions))
        return found.probabilities

    def nothing(self) -> Table:
        """The table of no photograph: it has the columns of all."""
        return self.answer.table(torch.zeros(0, self.answer.outputs), self.unlabelled([]).targets(), Rows([], [], []))

    def unlabelled(self, records: Sequence[Record], source: str = "images") -> Manifest:
        """A manifest of photographs to predict, of which nothing else is known."""
        return Manifest(tuple(records), self.classes, source, kind=self.reads)


def load_run(
    path: str | Path,
    *,
    device: str = "auto",
    precision: str | None = None,
    weights: str | None = None,
    cache: bool = True,
) -> Run:
    """Read the best epoch of a run folder, or a checkpoint of another program.

    Args:
        path: the run folder; or a file with a network and its head, or with LoRA adapters, of another program, which
            becomes the run folder `runs/NAME` first (:func:`eyetune.train.adopt.adopt` has more to say about it).
        device: auto, cpu, cuda or mps.
        precision: auto, fp32, bf16 or fp16; None = as the run was trained, where the device can.
        weights: where the base weights are now, when they moved since training.
        cache: keep prepared photographs where the run's configuration says; False keeps nothing.

    Raises RunError when the folder is no run, is damaged, or the base weights are not the ones it was trained on;
    WeightsError when a file is not understood.
    """
    if is_older(Path(path)):
        path, weights = adopt(path, weights=weights, device=device).path, None
    folder = RunDir.open(path)
    checkpoint = folder.load_best()
    card = checkpoint.card if weights is None else replace(checkpoint.card, weights=weights)
    runtime = Runtime(device, precision or _trained_precision(folder, device), seed=card.seed)
    folder.main = runtime.is_main
    model, strategy = rebuild(replace(checkpoint, card=card), folder.path)
    kept = Cache.of(folder.read_config().data) if cache else None
    return Run(folder, runtime.place(model), strategy, card, runtime, cache=kept)


def _trained_precision(folder: RunDir, device: str) -> str:
    """The precision asked for in training, so that datasets scored later are comparable; auto where it cannot be."""
    trained = folder.read_config().precision
    try:
        choose_precision(trained, choose_device(device))
    except UserError:
        return "auto"
    return trained


def rebuild(checkpoint: Checkpoint, where: Path) -> tuple[Classifier, Strategy]:
    """The trained classifier of a checkpoint, on the CPU in eval mode, and its strategy. Raises as :func:`load_run`."""
    card = checkpoint.card
    if card.weights not in (None, "hub", "random") and not Path(card.weights).is_file():
        raise RunError(
            f"{where} was trained on the base weights {card.weights}, which are no longer there. A run keeps only what "
            "training changed: put the file back, or say where it is with --weights."
        )
    seed_everything(card.seed)
    backbone = load_backbone(card.backbone, card.weights, pixels=card.pixels, pool=card.pool)
    # As in training, whatever the spec says by now.
    backbone.preprocess = Preprocess.from_dict(card.preprocess)
    answer = read_answer(card.task, card.classes)
    model = Classifier(backbone, answer.outputs, card.dropout, shared=answer.shared)
    model.reading = answer.evidence
    if card.head_norm:
        put_norm_before(model)
    strategy = parse_adapt(card.adapt).build()
    model = strategy.apply(model)
    if model.base_fingerprint() != card.fingerprint:
        raise RunError(f"{where} was trained on other base weights than {card.weights or card.backbone} holds now.")
    strategy.load_checkpoint(model, checkpoint.tensors)
    strategy.set_mode(model, training=False)
    return model, strategy
