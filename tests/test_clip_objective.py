"""The contrast: InfoNCE where nothing repeats, even among right answers where something does, whole or in parts."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_clip_towers import TINY_BERT, tiny_clip
from torch import Tensor, nn
from torch.nn import functional

from eyetune.clip.config import ClipTrainConfig
from eyetune.clip.objective import CONTRASTS, EMBEDDINGS, LARGEST_SCALE, SCALES, contrast, right_answers
from eyetune.clip.task import ContrastTask, summary
from eyetune.runtime import Runtime
from eyetune.train.steps import train_epoch

pytest.importorskip("transformers")


def embeddings(count: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {name: functional.normalize(torch.randn(count, 8, generator=generator), dim=1) for name in EMBEDDINGS}
    return found | {name: torch.tensor(10.0 + place) for place, name in enumerate(SCALES)}


def alone(count: int) -> tuple[Tensor, Tensor]:
    return torch.arange(count), torch.arange(count)


def test_without_repetitions_it_is_the_published_sum_of_three() -> None:
    found = embeddings(7)
    expected = torch.tensor(0.0)
    for image, text, scale in CONTRASTS:
        logits = found[scale] * found[image] @ found[text].T
        target = torch.arange(7)
        expected = (
            expected + (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2
        )
    torch.testing.assert_close(contrast(found, found, right_answers(alone(7), alone(7))), expected)


def test_the_slow_way_with_repetitions() -> None:
    found = embeddings(5)
    who = torch.tensor([0, 0, 1, 2, 3]), torch.tensor([10, 11, 12, 12, 13])  # one patient twice, one wording twice
    right = right_answers(who, who)
    assert right.int().tolist() == [
        [1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 0, 1],
    ]
    total = 0.0
    for image, text, scale in CONTRASTS:
        for queries, answers in ((image, text), (text, image)):
            for row in range(5):
                logits = [float(found[scale] * found[queries][row] @ found[answers][other]) for other in range(5)]
                log_sum = math.log(sum(math.exp(logit) for logit in logits))
                mine = [other for other in range(5) if right[row, other]]
                total += sum(log_sum - logits[other] for other in mine) / len(mine) / 2 / 5
    assert float(contrast(found, found, right)) == pytest.approx(total, rel=1e-5)


def test_a_copy_of_a_pair_does_not_push_itself_away() -> None:
    """Twice the same pair: with the diagonal alone the loss would grow; the right answers' shares stay the best."""
    found = embeddings(3)
    perfect = {name: torch.eye(8)[:3] for name in EMBEDDINGS} | {name: found[name] for name in SCALES}
    twice = {name: value[[0, 0, 1, 2]] if value.ndim else value for name, value in perfect.items()}
    who = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 0, 1, 2])
    for value in twice.values():
        value.requires_grad_()
    contrast(twice, twice, right_answers(who, who)).backward()
    pull = twice["image"].grad
    assert pull is not None
    # Towards its own text (a negative gradient along it), for the copies as for the others.
    assert pull[0, 0] < 0
    assert pull[1, 0] < 0
    torch.testing.assert_close(pull[0], pull[1])


def test_a_scale_stops_at_the_largest() -> None:
    found = embeddings(4)
    at, beyond = (
        found | {name: torch.tensor(value, requires_grad=True) for name in SCALES} for value in (LARGEST_SCALE, 500.0)
    )
    right = right_answers(alone(4), alone(4))
    loss = contrast(beyond, beyond, right)
    torch.testing.assert_close(loss, contrast(at, at, right))
    loss.backward()
    assert all(beyond[name].grad == 0 for name in SCALES)


# -- in parts ----------------------------------------------------------------------------------------------------------


def batch(count: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 40, (count, 6), generator=generator)
    ids[::2, 4:] = 0
    return {
        "left": torch.randn(count, 3, 32, 32, generator=generator),
        "right": torch.randn(count, 3, 32, 32, generator=generator),
        "ids": ids,
        "patient": torch.arange(count) // 2,
        "wording": torch.arange(count),
        "single": (torch.arange(count) == 1).long(),
        "index": torch.arange(count),
    }


def gradients(model: nn.Module, micro: int | None, count: int = 7) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    task = ContrastTask(ClipTrainConfig(micro_batch=micro), None, None)
    torch.manual_seed(3)
    loss = task.learn(model, batch(count), Runtime("cpu", "fp32"), weight=0.5, last=True)
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("micro", [1, 3, 4, 7])
def test_parts_have_the_gradient_of_the_whole(micro: int) -> None:
    model = tiny_clip().train()
    model.visual.eval()  # drop-path
    loss, whole = gradients(model, None)
    again, parts = gradients(model, micro)
    torch.testing.assert_close(again, loss, atol=1e-5, rtol=1e-5)
    assert whole.keys() == parts.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], atol=1e-5, rtol=1e-4, msg=name)
    biggest = max(float(gradient.abs().max()) for gradient in whole.values())
    assert biggest > 0.01, "there is something to compare"


def test_without_the_other_parts_the_gradient_is_another() -> None:
    """What plain accumulation would give: contrasts within the parts only."""
    model = tiny_clip().eval()
    _, whole = gradients(model, None, count=6)
    data = batch(6)
    model.zero_grad(set_to_none=True)
    task = ContrastTask(ClipTrainConfig(), None, None)
    for start in (0, 3):
        part = {name: value[start : start + 3] for name, value in data.items()}
        task.learn(model, part, Runtime("cpu", "fp32"), weight=0.25, last=True)
    name = "text_projection.2.weight"
    assert not torch.allclose(model.get_parameter(name).grad, whole[name], atol=1e-3)  # type: ignore[arg-type]


def test_dropout_draws_the_same_in_both_passes() -> None:
    """Against one graph of the same parts, drawn for in the same order."""
    model = tiny_clip(hidden_dropout_prob=0.3).train()
    _, found = gradients(model, 3, count=6)
    data = batch(6)
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    parts = [{name: value[start : start + 3] for name, value in data.items()} for start in (0, 3)]
    made = [model(part["left"], part["right"], part["ids"], part["single"].bool()) for part in parts]
    whole = {name: torch.cat([one[name] for one in made]) for name in EMBEDDINGS} | {n: made[0][n] for n in SCALES}
    who = data["patient"], data["wording"]
    (contrast(whole, whole, right_answers(who, who)) * 0.5).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-5, rtol=1e-4, msg=name)


# -- one eye -----------------------------------------------------------------------------------------------------------


def test_a_single_eye_meets_the_texts_as_in_training() -> None:
    model = tiny_clip().eval()
    data = batch(4)
    trained = model(data["left"], data["right"], data["ids"], torch.tensor([True, False, True, True]))
    both = model(data["left"], data["left"], data["ids"])
    used = model.encode_eyes(data["left"])
    for name in ("image", "left", "right"):
        for row in (0, 2, 3):
            torch.testing.assert_close(trained[name][row], both[name][row])
            torch.testing.assert_close(used[name][row], both[name][row])
    pair = model(data["left"], data["right"], data["ids"])
    torch.testing.assert_close(trained["image"][1], pair["image"][1])
    assert not torch.allclose(trained["image"][0], pair["image"][0], atol=1e-3)


# -- several processes -------------------------------------------------------------------------------------------------

PROGRAM = """
import sys, torch
sys.path[:0] = {path!r}
from test_clip_objective import batch, gradient_file
gradient_file(sys.argv[1], {micro})
"""


class Once(list[dict[str, Tensor]]):
    """A loader of one epoch; also a schedule that does nothing."""

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        pass

    def advance(self) -> None:
        pass


def gradient_file(path: str, micro: int | None) -> None:
    """In each of two processes: its part of seven pairs, one step of the loop; what it did to the weights is kept."""
    runtime = Runtime("cpu", "fp32")
    model = tiny_clip().eval()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD([{"params": list(model.parameters()), "name": "all"}], lr=1.0)
    data = {name: value.tensor_split(runtime.processes)[runtime.rank] for name, value in batch(7).items()}
    result = train_epoch(
        runtime.prepare(model),
        ContrastTask(ClipTrainConfig(micro_batch=micro), None, None),
        Once([data]),
        optimizer=optimizer,
        schedule=Once(),  # type: ignore[arg-type]
        runtime=runtime,
        batch_size=4,
    )
    if runtime.is_main:
        moved = {name: before[name] - parameter.detach() for name, parameter in model.named_parameters()}
        torch.save({"gradients": moved, "loss": result.loss}, path)


@pytest.mark.slow
@pytest.mark.parametrize("micro", [None, 2])
def test_two_processes_are_one(tmp_path: Path, micro: int | None) -> None:
    """Seven pairs shared four to three give the gradient, and the loss, of one process with all of them."""
    from test_processes import eyetune

    script = tmp_path / "program.py"
    script.write_text(PROGRAM.format(path=sys.path, micro=micro))
    done = eyetune(tmp_path, str(tmp_path / "found.pt"), count=2, script=script)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    loss, whole = gradients(tiny_clip().eval(), None)
    assert found["loss"] == pytest.approx(float(loss), abs=1e-5)
    for name, gradient in whole.items():
        torch.testing.assert_close(found["gradients"][name], gradient / 0.5, atol=1e-5, rtol=1e-4, msg=name)


def test_the_mean_of_both_directions() -> None:
    def side(value: float) -> dict[str, Any]:
        names = ("recall_at_1", "recall_at_5", "mrr")
        return {"queries": 3, "metrics": {name: {"value": value} for name in names}}

    found = summary({"image_to_text": side(0.2), "text_to_image": side(0.4)})
    assert found["recall_at_1"] == pytest.approx(0.3)
    assert found["recall_at_10"] == 1.0  # of a gallery of fewer than ten
    assert found["mean_recall"] == pytest.approx((0.3 + 0.3 + 1) / 3)
    assert TINY_BERT["hidden_dropout_prob"] == 0.0
