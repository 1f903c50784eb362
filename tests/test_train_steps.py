"""One epoch of steps: exact accumulation, clipping, losses, what is said when training diverges."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from train_kit import tiny_backbone

from eyetune.adapt.strategy import RateGroup
from eyetune.config import TrainConfig
from eyetune.errors import ConfigError, UserError
from eyetune.runtime import Runtime
from eyetune.train import steps
from eyetune.train.answers import Classes
from eyetune.train.optim import Schedule, build_optimizer
from eyetune.train.steps import EpochStopped, train_epoch
from eyetune.train.task import SupervisedTask, predict

CLASSES = ("0", "1", "2")


class Given:
    """A loader of given batches of given sizes."""

    def __init__(self, images: Tensor, targets: Tensor, sizes: list[int]) -> None:
        self.images, self.targets, self.sizes = images, targets, sizes

    def set_epoch(self, epoch: int) -> None: ...

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        order = torch.arange(len(self.images)).split(self.sizes)
        for index in order:
            yield {"image": self.images[index], "target": self.targets[index], "index": index}


class Recorder(torch.optim.SGD):
    """Keeps the gradient of every step."""

    def __init__(self, parameters: Any) -> None:
        super().__init__([{"params": list(parameters), "name": "all", "base_lr": 0.0, "lr": 0.0}])
        self.gradients: list[Tensor] = []

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.gradients.append(torch.cat([p.grad.flatten().clone() for g in self.param_groups for p in g["params"]]))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.GELU(), nn.Linear(8, 3))


def data(count: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(count, 3, 2, 2), torch.randint(0, 3, (count,))


def gradients(sizes: list[int], accumulate: int, batch_size: int, **settings: Any) -> list[Tensor]:
    images, targets = data(sum(sizes))
    model = network()
    recorder = Recorder(model.parameters())
    train_epoch(
        model,
        SupervisedTask(Classes(CLASSES), TrainConfig(**settings), weights=torch.tensor([0.5, 1.0, 1.5])),
        Given(images, targets, sizes),
        optimizer=recorder,
        schedule=Schedule(recorder, "constant", 10, 0),
        runtime=Runtime("cpu", "fp32"),
        batch_size=batch_size,
        accumulate=accumulate,
    )
    return recorder.gradients


@pytest.mark.parametrize("settings", [{}, {"balance": "weighted", "label_smoothing": 0.1}, {"balance": "focal"}])
@pytest.mark.parametrize(
    ("sizes", "accumulate"), [([4, 4, 4], 3), ([4, 4, 2], 3), ([4, 4], 3), ([4, 1], 2), ([3], 4), ([4, 4, 4, 3], 2)]
)
def test_accumulated_batches_give_the_gradient_of_one_big_batch(
    sizes: list[int], accumulate: int, settings: dict[str, Any]
) -> None:
    """Full groups, a shorter last batch, a group with fewer batches: always the mean over its images."""
    found = gradients(sizes, accumulate, 4, **settings)
    groups = [sum(sizes[i : i + accumulate]) for i in range(0, len(sizes), accumulate)]
    expected = gradients(groups, 1, max(groups), **settings)
    assert len(found) == len(expected) == len(groups)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=0)


def test_the_gradient_is_that_of_the_plain_mean() -> None:
    images, targets = data(10)
    model = network()
    F.cross_entropy(model(images), targets).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(gradients([4, 4, 2], 3, 4)[0], expected, atol=1e-6, rtol=0)


def run(model: nn.Module, images: Tensor, targets: Tensor, sizes: list[int], **options: Any) -> Any:
    optimizer = build_optimizer([RateGroup("all", list(model.parameters()), 1.0, True)], 1e-3, 0.0)
    return train_epoch(
        model,
        SupervisedTask(Classes(CLASSES), TrainConfig(), names=[f"eye{i}.png" for i in range(len(images))]),
        Given(images, targets, sizes),
        optimizer=optimizer,
        schedule=Schedule(optimizer, "constant", 10, 0),
        runtime=options.pop("runtime", Runtime("cpu", "fp32")),
        batch_size=max(sizes),
        **options,
    )


def test_the_epochs_loss_is_the_mean_over_images_not_over_batches() -> None:
    images, targets = data(7)
    model = network()
    with torch.no_grad():
        expected = float(F.cross_entropy(model(images), targets))
    recorder = Recorder(model.parameters())
    result = train_epoch(
        model,
        SupervisedTask(Classes(CLASSES), TrainConfig()),
        Given(images, targets, [5, 2]),
        optimizer=recorder,
        schedule=Schedule(recorder, "constant", 10, 0),
        runtime=Runtime("cpu", "fp32"),
        batch_size=5,
    )
    assert result.loss == pytest.approx(expected, abs=1e-6)
    assert result.images == 7


def test_clipping_bounds_the_whole_gradient_after_accumulation() -> None:
    images, targets = data(8)
    model = network()
    recorder = Recorder(model.parameters())
    train_epoch(
        model,
        SupervisedTask(Classes(CLASSES), TrainConfig()),
        Given(images, targets, [2, 2, 2, 2]),
        optimizer=recorder,
        schedule=Schedule(recorder, "constant", 10, 0),
        runtime=Runtime("cpu", "fp32"),
        batch_size=2,
        accumulate=2,
        clip_norm=0.01,
    )
    assert [float(one.norm()) for one in recorder.gradients] == pytest.approx([0.01, 0.01], rel=1e-3)


def test_a_loss_that_is_nan_stops_and_names_the_images() -> None:
    images, targets = data(6)
    images[4] = math.nan
    with pytest.raises(UserError, match="batch 3") as caught:
        run(network(), images, targets, [2, 2, 2])
    assert "eye4.png" in str(caught.value)
    assert "eye5.png" in str(caught.value)
    assert "eye3.png" not in str(caught.value)


class OutOfMemory(nn.Module):
    """As a GPU of CUDA says it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))

    def forward(self, images: Tensor) -> Tensor:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB of which 1.00 GiB "
            "is free. Of the allocated memory 5.00 GiB is allocated by PyTorch."
        )


def test_too_little_memory_is_the_users_to_mend() -> None:
    images, targets = data(4)
    with pytest.raises(UserError, match=r"train\.batch_size.*train\.accumulate.*train\.grad_checkpointing") as caught:
        run(OutOfMemory(), images, targets, [4])
    assert "Tried to allocate 2.00 GiB" in str(caught.value)
    assert "PyTorch" not in str(caught.value)
    with pytest.raises(UserError, match=r"--batch-size in predict.*train\.batch_size"):
        predict(OutOfMemory(), Given(images, targets, [4]), Runtime("cpu", "fp32"))


def test_a_gradient_that_is_infinite_stops_too() -> None:
    class Blows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3))

        def forward(self, images: Tensor) -> Tensor:
            # Finite at 0, with an infinite slope.
            return self.weight.abs().sqrt() + torch.zeros(len(images), 3)

    images, targets = data(4)
    with pytest.raises(UserError, match="gradient is"):
        run(Blows(), images, targets, [4], clip_norm=1.0)


def test_loss_scaling_changes_nothing_but_the_range() -> None:
    """fp16's path, with a CPU scaler: unscaled before clipping, the same weights as without."""

    class Scaled(Runtime):
        @property
        def scaler(self) -> torch.amp.GradScaler:
            return self._scaler

        def backward(self, loss: Tensor) -> None:
            self._scaler.scale(loss).backward()

    images, targets = data(7)
    weights = []
    for scaled in (False, True):
        model = network()
        runtime = (Scaled if scaled else Runtime)("cpu", "fp32")
        if isinstance(runtime, Scaled):
            runtime._scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        run(model, images, targets, [2, 2, 2, 1], accumulate=2, clip_norm=0.5, runtime=runtime)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], atol=1e-6, rtol=0)
    assert not torch.equal(weights[0], torch.cat([p.detach().flatten() for p in network().parameters()]))


def test_a_last_batch_of_one_image_passes_batch_norm() -> None:
    images, targets = data(5)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3), nn.BatchNorm1d(3))
    run(model, images, targets, [4, 1])
    assert model[2].training
    assert int(model[2].num_batches_tracked) == 1


def test_focal_is_cross_entropy_at_gamma_zero_and_less_for_easy_images() -> None:
    logits, targets = torch.tensor([[4.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), torch.tensor([0, 1])
    plain = SupervisedTask(Classes(CLASSES), TrainConfig()).losses(logits, targets)
    zero = SupervisedTask(Classes(CLASSES), TrainConfig(balance="focal", focal_gamma=0)).losses(logits, targets)
    two = SupervisedTask(Classes(CLASSES), TrainConfig(balance="focal", focal_gamma=2)).losses(logits, targets)
    torch.testing.assert_close(zero, plain)
    chance = (-plain).exp()
    torch.testing.assert_close(two, (1 - chance) ** 2 * plain)


def test_soft_targets_give_the_mixture_of_the_losses() -> None:
    logits = torch.randn(1, 3, generator=torch.Generator().manual_seed(0))
    for balance in ("none", "focal", "weighted"):
        task = SupervisedTask(Classes(CLASSES), TrainConfig(balance=balance), weights=torch.tensor([0.5, 1.0, 1.5]))
        mixed = task.losses(logits, torch.tensor([[0.3, 0.0, 0.7]]))
        parts = [task.losses(logits, torch.tensor([c])) for c in (0, 2)]
        torch.testing.assert_close(mixed, 0.3 * parts[0] + 0.7 * parts[1])


def test_mixup_reaches_the_loss() -> None:
    images, targets = data(6)
    seen = {}

    class Spy(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            seen["images"] = images
            return images.flatten(1)[:, :3]

    torch.manual_seed(0)
    task = SupervisedTask(Classes(CLASSES), TrainConfig(mixup=1.0))
    task.loss(Spy(), {"image": images, "target": targets, "index": torch.arange(6)})
    assert not torch.equal(seen["images"], images)


@pytest.mark.parametrize(
    ("classes", "name", "message"),
    [
        (CLASSES, "qkw", "Did you mean 'qwk'"),
        (("cat", "dog", "cow"), "qwk", "order"),
        (("no", "yes"), "referable_auroc", "five grades"),
    ],
)
def test_a_metric_that_cannot_be_is_refused_at_once(classes: tuple[str, ...], name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SupervisedTask(Classes(classes), TrainConfig(metric=name))


def test_the_default_metric_follows_the_classes() -> None:
    assert SupervisedTask(Classes(("0", "1", "2", "3", "4")), TrainConfig()).metric == "qwk"
    assert SupervisedTask(Classes(("no", "yes")), TrainConfig()).metric == "auroc_macro"
    assert not SupervisedTask(Classes(("no", "yes")), TrainConfig(metric="nll")).higher_is_better


@pytest.mark.parametrize(
    ("targets", "gaps"),
    [
        ([0, 1, 2, -1], ""),
        ([1, 1, 1, -1], "no validation image is of 0, 2"),
        ([-1, -1, -1, -1], "no validation image has a label"),
    ],
)
def test_validation_says_what_its_images_lack(targets: list[int], gaps: str) -> None:
    loader = Given(data(4)[0], torch.tensor(targets), [4])
    found = SupervisedTask(Classes(CLASSES), TrainConfig()).validate(network(), loader, Runtime("cpu", "fp32"))
    assert found.gaps == gaps


def test_prediction_gives_each_image_once_in_order_in_float32() -> None:
    torch.manual_seed(0)
    images, targets = torch.randn(9, 3, 32, 32), torch.arange(9) % 2

    class Repeats(Given):
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            for index in (torch.tensor([7, 1, 3]), torch.tensor([8, 0, 2]), torch.tensor([4, 5, 6]), torch.tensor([1])):
                yield {"image": self.images[index], "target": self.targets[index], "index": index}

    backbone = tiny_backbone()
    backbone.train()
    found = predict(backbone, Repeats(images, targets, []), Runtime("cpu", "bf16"))
    assert found.index.tolist() == list(range(9))
    assert found.target.tolist() == targets.tolist()
    assert found.raw.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(found.raw, backbone.eval()(images), atol=0.05, rtol=0.05)


class Spoilt(SupervisedTask):
    """The loss of every batch in `bad` (from 0) is NaN."""

    bad: tuple[int, ...] = ()
    seen = 0

    def loss(self, network: nn.Module, batch: dict[str, Any]) -> Tensor:
        self.seen += 1
        return super().loss(network, batch) * (math.nan if self.seen - 1 in self.bad else 1.0)


def spoilt(bad: tuple[int, ...], model: nn.Module, sizes: list[int], **options: Any) -> Any:
    images, targets = (whole[: sum(sizes)] for whole in data(8))
    optimizer = build_optimizer([RateGroup("all", list(model.parameters()), 1.0, True)], 1e-2, 0.0)
    task = Spoilt(Classes(CLASSES), TrainConfig(), names=[f"eye{i}.png" for i in range(sum(sizes))])
    task.bad = bad
    return train_epoch(
        model,
        task,
        Given(images, targets, sizes),
        optimizer=optimizer,
        schedule=Schedule(optimizer, "constant", 10, 0),
        runtime=Runtime("cpu", "fp32"),
        batch_size=max(sizes),
        **options,
    )


def weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("lag", [0, 1], ids=["CPU", "as on CUDA"])
@pytest.mark.parametrize("bad", [0, 1, 3])
def test_a_loss_that_is_not_finite_never_reaches_the_weights(
    monkeypatch: pytest.MonkeyPatch, lag: int, bad: int
) -> None:
    """With a lag, the kernel of the optimizer leaves the step out, and one more step is taken before it is noticed."""
    monkeypatch.setattr(steps, "_lag", lambda runtime: lag)
    model, expected = network(), network()
    with pytest.raises(UserError, match=f"diverged at batch {bad + 1}: the loss is nan") as caught:
        spoilt((bad,), model, [2, 2, 2, 2])
    assert [f"eye{n}.png" in str(caught.value) for n in range(8)] == [n // 2 == bad for n in range(8)]
    assert bool(weights(model).isfinite().all())
    if lag == 0 and bad:
        spoilt((), expected, [2] * bad)
        torch.testing.assert_close(weights(model), weights(expected), rtol=0, atol=0)


@pytest.mark.parametrize("lag", [0, 1], ids=["CPU", "as on CUDA"])
def test_steps_that_are_not_finite_can_be_skipped_and_are_counted(monkeypatch: pytest.MonkeyPatch, lag: int) -> None:
    """As if the batches had not been there, but for the schedule; the mean loss is that of the others."""
    monkeypatch.setattr(steps, "_lag", lambda runtime: lag)
    model, expected = network(), network()
    found = spoilt((2, 3), model, [2, 2, 2, 2], skip_nonfinite=True)
    reference = spoilt((), expected, [2, 2])
    assert (found.skipped, found.images, reference.skipped) == (2, 4, 0)
    assert found.loss == reference.loss
    torch.testing.assert_close(weights(model), weights(expected), rtol=0, atol=0)


def test_a_skipped_batch_leaves_no_trace_in_batch_norm() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3), nn.BatchNorm1d(3))
    images, targets = data(6)
    images[2:4] = math.nan
    run(model, images, targets, [2, 2, 2], skip_nonfinite=True)
    assert all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values())


def test_one_bad_batch_spoils_its_whole_step() -> None:
    with pytest.raises(UserError, match="diverged at batch 2") as caught:
        spoilt((1,), network(), [2, 2, 2, 2], accumulate=2)
    assert "eye3.png" in str(caught.value)
    assert "eye1.png" not in str(caught.value)
    assert spoilt((1,), network(), [2, 2, 2, 2], accumulate=2, skip_nonfinite=True).skipped == 1


def test_an_epoch_without_a_finite_loss_is_no_epoch() -> None:
    with pytest.raises(UserError, match="no step of the epoch had a finite loss"):
        spoilt((0, 1), network(), [2, 2], skip_nonfinite=True)


def test_no_state_is_given_out_before_its_losses_were_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "_lag", lambda runtime: 1)
    with pytest.raises(UserError, match="diverged at batch 2"):
        spoilt((1,), network(), [2, 2, 2], stop=iter([False, True, True]).__next__)
    with pytest.raises(EpochStopped) as caught:
        spoilt((2,), network(), [2, 2, 2], stop=iter([False, True]).__next__)
    assert caught.value.state.batches == 2
