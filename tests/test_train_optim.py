"""Real learning rates, the schedule's numbers, and state carried from one optimizer to the next."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from train_kit import tiny_model

from eyetune.adapt.strategy import RateGroup
from eyetune.config import TrainConfig
from eyetune.train.optim import (
    Schedule,
    build_optimizer,
    build_schedule,
    carry_over,
    load_state_tensors,
    rates,
    state_tensors,
)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(*shape or (2,)))


def two_groups() -> torch.optim.AdamW:
    return build_optimizer(
        [RateGroup("low", [parameter()], 0.1, True), RateGroup("head", [parameter()], 1.0, False)],
        lr=1e-2,
        weight_decay=0.3,
    )


def test_each_group_gets_its_real_rate_and_decay() -> None:
    optimizer = two_groups()
    assert rates(optimizer) == pytest.approx({"low": 1e-3, "head": 1e-2})
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]


def test_layer_decay_is_in_the_rates_of_a_whole_network() -> None:
    """Trap: labels without effect. Two blocks, decay 0.5: head 1, norm 1/2, blocks 1/4 and 1/8, embeddings 1/16."""
    model, strategy = tiny_model({"kind": "full", "layer_decay": 0.5})
    found = rates(build_optimizer(strategy.groups(model), lr=1.0, weight_decay=0.1))
    # The final norm has no matrix: it stands in a group without decay.
    expected = {"backbone.embeddings": 1 / 16, "backbone.blocks.0": 1 / 8, "backbone.blocks.1": 1 / 4, "head": 1.0}
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert found["backbone.norm (no decay)"] == pytest.approx(1 / 2)


def test_one_step_moves_each_group_by_its_own_rate() -> None:
    """AdamW's first step has the size of the rate: what the parameters do must agree with what the log says."""
    optimizer = build_optimizer(
        [RateGroup("low", [parameter()], 0.1, False), RateGroup("head", [parameter()], 1.0, False)], 1e-2, 0.0
    )
    schedule = Schedule(optimizer, "cosine", total_steps=10, warmup_steps=4)
    for group in optimizer.param_groups:
        group["params"][0].grad = torch.ones(2)
    optimizer.step()
    moved = [1 - group["params"][0].detach()[0].item() for group in optimizer.param_groups]
    assert moved == pytest.approx([1e-3 / 4, 1e-2 / 4], rel=1e-3)
    assert schedule.step_number == 0


def test_no_decay_means_no_decay() -> None:
    optimizer = two_groups()
    for group in optimizer.param_groups:
        group["params"][0].grad = torch.zeros(2)
    optimizer.step()
    low, head = (group["params"][0].detach()[0].item() for group in optimizer.param_groups)
    assert head == 1.0
    assert low == pytest.approx(1 - 1e-3 * 0.3)


def test_cosine_with_warmup_step_by_step() -> None:
    optimizer = two_groups()
    schedule = Schedule(optimizer, "cosine", total_steps=8, warmup_steps=4)
    seen = []
    for _ in range(8):
        seen.append(rates(optimizer)["head"])
        schedule.advance()
    warm = [0.25, 0.5, 0.75, 1.0]
    cosine = [0.5 * (1 + math.cos(math.pi * part / 4)) for part in range(4)]
    assert seen == pytest.approx([1e-2 * factor for factor in warm + cosine])
    assert rates(optimizer)["low"] == pytest.approx(rates(optimizer)["head"] / 10, abs=1e-12)


def test_constant_stays() -> None:
    optimizer = two_groups()
    schedule = Schedule(optimizer, "constant", total_steps=5, warmup_steps=1)
    for _ in range(20):
        schedule.advance()
    assert rates(optimizer) == pytest.approx({"low": 1e-3, "head": 1e-2})


def test_plateau_halves_every_group_after_two_epochs_without_gain() -> None:
    """Epochs whose metric is not defined change nothing."""
    optimizer = two_groups()
    schedule = Schedule(optimizer, "plateau", total_steps=100, warmup_steps=0)
    heads = []
    for metric in (0.5, 0.6, 0.6, 0.55, 0.7, None, math.nan):
        schedule.advance()
        schedule.end_epoch(metric)
        heads.append(rates(optimizer)["head"])
    assert heads == pytest.approx([1e-2, 1e-2, 1e-2, 5e-3, 5e-3, 5e-3, 5e-3])
    assert rates(optimizer)["low"] == pytest.approx(5e-4)


def test_the_schedule_comes_back_from_its_state() -> None:
    first = Schedule(two_groups(), "plateau", total_steps=10, warmup_steps=0)
    for metric in (0.5, 0.4, 0.3, 0.2):
        first.advance()
        first.end_epoch(metric)
    second = Schedule(two_groups(), "plateau", total_steps=10, warmup_steps=0)
    second.load_state(first.state())
    assert rates(second.optimizer) == rates(first.optimizer)
    first.end_epoch(0.1)
    second.end_epoch(0.1)
    assert second.state() == first.state()


def test_warmup_counts_epochs_and_parts_of_one() -> None:
    schedule = build_schedule(two_groups(), TrainConfig(warmup_epochs=1.5), epochs=4, steps_per_epoch=10)
    assert (schedule.warmup_steps, schedule.total_steps) == (15, 40)


def test_state_is_carried_by_identity() -> None:
    kept, dropped, new = parameter(), parameter(), parameter()
    old = build_optimizer([RateGroup("a", [kept], 1.0, True), RateGroup("b", [dropped], 1.0, True)], 0.1, 0.0)
    for one in (kept, dropped):
        one.grad = torch.full((2,), 3.0)
    old.step()
    fresh = build_optimizer([RateGroup("b", [new], 1.0, True), RateGroup("c", [kept], 0.5, True)], 0.1, 0.0)
    assert carry_over(old, fresh) == 1
    assert torch.equal(fresh.state[kept]["exp_avg"], torch.full((2,), 0.3))
    assert int(fresh.state[kept]["step"]) == 1
    assert new not in fresh.state
    assert dropped not in fresh.state


def test_optimizer_state_survives_as_tensors() -> None:
    def trained(steps: int) -> tuple[nn.Module, torch.optim.AdamW]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        optimizer = build_optimizer([RateGroup("all", list(model.parameters()), 1.0, True)], 0.1, 0.01)
        torch.manual_seed(1)
        run(model, optimizer, steps)
        return model, optimizer

    def run(model: nn.Module, optimizer: torch.optim.AdamW, steps: int) -> None:
        for _ in range(steps):
            model(torch.randn(5, 3)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = trained(3)
    other, fresh = trained(0)
    other.load_state_dict(model.state_dict())
    load_state_tensors(fresh, other, {name: tensor.clone() for name, tensor in state_tensors(optimizer, model).items()})
    for one, its in ((model, optimizer), (other, fresh)):
        torch.manual_seed(2)
        run(one, its, 2)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_loaded_state_lies_in_memory_as_its_parameter_does() -> None:
    """The fused kernel goes through both in step, whatever their strides say."""
    model = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
    optimizer = build_optimizer([RateGroup("all", list(model.parameters()), 1.0, True)], 0.1, 0.01)
    model(torch.randn(2, 3, 5, 5)).square().sum().backward()
    optimizer.step()
    kept = {name: tensor.clone() for name, tensor in state_tensors(optimizer, model).items()}
    assert kept["weight|exp_avg"].is_contiguous()
    load_state_tensors(optimizer, model, kept)
    loaded = optimizer.state[model.weight]["exp_avg"]
    assert loaded.stride() == model.weight.stride()
    assert torch.equal(loaded, kept["weight|exp_avg"])


def test_foreign_optimizer_state_is_refused() -> None:
    model = nn.Linear(3, 2)
    optimizer = build_optimizer([RateGroup("all", list(model.parameters()), 1.0, True)], 0.1, 0.01)
    with pytest.raises(ValueError, match="not trained"):
        load_state_tensors(optimizer, model, {"other.weight|exp_avg": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match="shape"):
        load_state_tensors(optimizer, model, {"weight|exp_avg": torch.zeros(3, 3)})


@pytest.mark.parametrize("fault", ["twice", "frozen", "none"])
def test_groups_that_cannot_be_right_are_refused(fault: str) -> None:
    one = parameter()
    groups = {
        "twice": [RateGroup("a", [one], 1.0, True), RateGroup("b", [one], 1.0, True)],
        "frozen": [RateGroup("a", [nn.Parameter(torch.ones(2), requires_grad=False)], 1.0, True)],
        "none": [],
    }[fault]
    with pytest.raises(ValueError, match=r"two groups|frozen|nothing to train"):
        build_optimizer(groups, 0.1, 0.0)
