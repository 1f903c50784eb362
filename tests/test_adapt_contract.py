"""What every strategy promises on every architecture: one suite for all, registered strategies included by name."""

from __future__ import annotations

import json

import pytest
import torch
from adapt_kit import REAL, SMALL, backbone, images
from torch import nn
from torch.nn import functional as F

from eyetune.adapt import STRATEGIES, Step, parse_adapt
from eyetune.adapt.classifier import Classifier
from eyetune.adapt.strategy import Strategy
from eyetune.train.answers import Answer, Classes, Coral, Corn, Labels, Number, Objective, Ranked

ARCHITECTURES = [*SMALL, "nano", *(pytest.param(name, marks=pytest.mark.slow) for name in REAL)]
CLASSES = 3
LR = 0.01

every_strategy = pytest.mark.parametrize("kind", STRATEGIES.names())
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def prepared(kind: str, architecture: str) -> tuple[Classifier, Strategy]:
    torch.manual_seed(1)
    strategy = parse_adapt(kind).build()
    model = strategy.apply(Classifier(backbone(architecture), CLASSES, dropout=0.1))
    return model, strategy


def optimizer_for(model: Classifier, strategy: Strategy) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        [{"params": g.parameters, "lr": LR * g.scale, "name": g.name} for g in strategy.groups(model)], weight_decay=0.0
    )


def train_two_steps(model: Classifier, strategy: Strategy, architecture: str) -> None:
    """Two: the first moves only B of a LoRA pair, since B starts at zero and so A has no gradient yet."""
    optimizer = optimizer_for(model, strategy)
    strategy.set_mode(model, True)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(images(architecture)), torch.tensor([0, 1, 2, 0])).backward()
        optimizer.step()


def promised(kind: str, model: Classifier) -> set[str]:
    """Written apart from the strategies: what each is to train at first, by name."""
    everything = {name for name, _ in model.named_parameters()}
    head = {"head.1.weight", "head.1.bias"}
    if kind in ("linear", "gradual"):
        return head
    if kind == "full":
        return everything
    if kind == "lora":
        return head | {name for name in everything if ".lora_A." in name or ".lora_B." in name}
    raise AssertionError(f"say here what {kind} promises to train")


@every_strategy
@every_architecture
def test_trains_exactly_what_it_promises(kind: str, architecture: str) -> None:
    model, _ = prepared(kind, architecture)

    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    assert trainable == promised(kind, model)


@every_strategy
@every_architecture
def test_groups_hold_each_trainable_parameter_once_at_a_rate_that_grows_towards_the_head(
    kind: str, architecture: str
) -> None:
    model, strategy = prepared(kind, architecture)

    groups = strategy.groups(model)

    grouped = [id(parameter) for group in groups for parameter in group.parameters]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in model.parameters() if p.requires_grad}
    assert len({group.name for group in groups}) == len(groups)
    scales = [group.scale for group in groups]
    assert scales == sorted(scales)
    assert {group.scale for group in groups if group.name.startswith("head")} == {1.0}
    real = {group["name"]: group["lr"] for group in optimizer_for(model, strategy).param_groups}
    assert real == {group.name: pytest.approx(LR * group.scale) for group in groups}
    one_dimensional = {id(p) for p in model.parameters() if p.ndim <= 1}
    assert not any(id(p) in one_dimensional for group in groups if group.decay for p in group.parameters)


@every_strategy
@every_architecture
def test_a_step_moves_all_that_trains_and_nothing_else(kind: str, architecture: str) -> None:
    model, strategy = prepared(kind, architecture)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    train_two_steps(model, strategy, architecture)

    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert trainable - moved == set()
    statistics = {name for name, _ in model.named_buffers()} if kind == "full" else set()
    assert moved - trainable - statistics == set()


@every_strategy
@every_architecture
def test_a_checkpoint_brings_the_same_outputs_back_bit_by_bit(kind: str, architecture: str) -> None:
    model, strategy = prepared(kind, architecture)
    train_two_steps(model, strategy, architecture)
    strategy.set_mode(model, False)
    photographs = images(architecture)

    other, other_strategy = prepared(kind, architecture)
    other_strategy.set_mode(other, False)
    with torch.no_grad():
        expected, untrained = model(photographs), other(photographs)
        other_strategy.load_checkpoint(other, strategy.checkpoint(model))

        assert torch.equal(other(photographs), expected)
    assert not torch.equal(untrained, expected)


@every_strategy
@every_architecture
def test_eval_mode_is_deterministic_and_half_precision_works(kind: str, architecture: str) -> None:
    model, strategy = prepared(kind, architecture)
    photographs = images(architecture)
    strategy.set_mode(model, False)

    with torch.no_grad():
        assert torch.equal(model(photographs), model(photographs))
    assert not any(module.training for module in model.modules())

    strategy.set_mode(model, True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(photographs)
    assert logits.dtype == torch.bfloat16
    F.cross_entropy(logits.float(), torch.tensor([0, 1, 2, 0])).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@every_strategy
@every_architecture
def test_a_checkpoint_holds_copies(kind: str, architecture: str) -> None:
    model, strategy = prepared(kind, architecture)
    saved = strategy.checkpoint(model)

    with torch.no_grad():
        nn.init.constant_(model.head[1].bias, 7.0)

    assert saved["head.1.bias"].abs().max() < 1


@every_strategy
def test_the_configuration_knows_its_name_and_a_rate(kind: str) -> None:
    section = STRATEGIES.get(kind)

    assert section().kind == kind
    assert 0 < section.default_lr < 1
    assert section.model_validate(section().model_dump()) == section()


@every_strategy
def test_the_state_survives_json_and_continues_the_same_way(kind: str) -> None:
    scores = [0.5, 0.6, 0.6, 0.5, 0.4, 0.7, 0.7, 0.7, 0.7, 0.1, 0.2, 0.3]
    model, strategy = prepared(kind, "test_vit")
    for epoch in range(5):
        strategy.after_epoch(model, epoch, scores[epoch])

    resumed_model, resumed = prepared(kind, "test_vit")
    resumed.load_state(resumed_model, json.loads(json.dumps(strategy.state())))

    def trainable(of: Classifier) -> list[str]:
        return [name for name, parameter in of.named_parameters() if parameter.requires_grad]

    assert trainable(resumed_model) == trainable(model)
    for epoch in range(5, len(scores)):
        expected = strategy.after_epoch(model, epoch, scores[epoch])
        assert resumed.after_epoch(resumed_model, epoch, scores[epoch]) == expected
        assert trainable(resumed_model) == trainable(model)
        if expected.step is Step.STOP:
            break


# --- heads: what the last layer gives, and what it is asked -----------------------------------------------------------

GRADES = ("0", "1", "2", "3")
ANSWERS: dict[str, tuple[Answer, torch.Tensor]] = {
    "softmax": (Classes(GRADES), torch.tensor([0, 1, 3, 0])),
    "corn": (Corn(GRADES), torch.tensor([0, 1, 3, 2])),
    "coral": (Coral(GRADES), torch.tensor([0, 1, 3, 2])),
    "regression": (Ranked(GRADES, mean=1.0, std=0.8), torch.tensor([0, 1, 3, 2])),
    "labels": (Labels(("a", "b")), torch.tensor([[0.0, 1.0], [float("nan"), 1.0], [1.0, 0.0], [0.0, float("nan")]])),
    "number": (Number(("age",), mean=50.0, std=9.0), torch.tensor([40.0, 61.0, 52.0, 38.0])),
}

every_answer = pytest.mark.parametrize("asked", ANSWERS)


def answering(kind: str, asked: str) -> tuple[Classifier, Strategy, torch.optim.Optimizer]:
    """A small network with the head that an answer needs, and two steps of its own loss behind it."""
    answer, target = ANSWERS[asked]
    torch.manual_seed(1)
    strategy = parse_adapt(kind).build()
    model = strategy.apply(Classifier(backbone("test_vit"), answer.outputs, dropout=0.1, shared=answer.shared))
    model.reading = answer.evidence
    optimizer = optimizer_for(model, strategy)
    strategy.set_mode(model, True)
    for _ in range(2):
        optimizer.zero_grad()
        answer.losses(model(images("test_vit")), target, Objective()).mean().backward()
        optimizer.step()
    return model, strategy, optimizer


@every_strategy
@every_answer
def test_the_loss_of_every_head_moves_all_that_trains(kind: str, asked: str) -> None:
    answer, _ = ANSWERS[asked]
    torch.manual_seed(1)
    before = Classifier(backbone("test_vit"), answer.outputs, dropout=0.1, shared=answer.shared)
    untrained = parse_adapt(kind).build().apply(before)
    start = {name: tensor.clone() for name, tensor in untrained.state_dict().items()}

    model, _, _ = answering(kind, asked)

    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, start[name])}
    assert promised(kind, model) - moved == set()


@every_strategy
@every_answer
def test_every_head_comes_back_bit_by_bit(kind: str, asked: str) -> None:
    answer, _ = ANSWERS[asked]
    model, strategy, _ = answering(kind, asked)
    strategy.set_mode(model, False)
    other_strategy = parse_adapt(kind).build()
    other = other_strategy.apply(Classifier(backbone("test_vit"), answer.outputs, dropout=0.1, shared=answer.shared))
    other.reading = answer.evidence
    other_strategy.set_mode(other, False)
    photographs = images("test_vit")

    with torch.no_grad():
        expected = model.scores(photographs)
        assert not torch.equal(other.scores(photographs), expected)
        other_strategy.load_checkpoint(other, strategy.checkpoint(model))

        assert torch.equal(other.scores(photographs), expected)
    assert model(photographs).shape == (4, answer.outputs)
    assert bool(expected.isfinite().all())


@every_strategy
@every_answer
def test_every_head_trains_in_half_precision(kind: str, asked: str) -> None:
    answer, target = ANSWERS[asked]
    model, strategy, _ = answering(kind, asked)
    strategy.set_mode(model, True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = answer.losses(model(images("test_vit")), target, Objective())
    assert losses.dtype == torch.float32
    losses.mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
