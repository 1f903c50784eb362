"""`eyetune check model`: sound models pass every check, and each check fails on the fault it is there for."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from train_kit import photographs, tiny_model

from eyetune.adapt import lora
from eyetune.adapt.classifier import Classifier
from eyetune.adapt.strategy import Strategy
from eyetune.checks import model as checks
from eyetune.checks.bench import Bench
from eyetune.checks.gradients import Flow
from eyetune.checks.subject import Subject, few_images
from eyetune.config import Config
from eyetune.data.records import Manifest
from eyetune.errors import DataError
from eyetune.findings import Finding, Report, Status, carry_out, lines
from eyetune.runtime import Runtime
from eyetune.train import steps

Plant = Callable[[Classifier, Strategy], Any]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    from dataclasses import replace

    found = photographs(tmp_path_factory.mktemp("photographs"), 12)
    return found.with_records(replace(record, split="train") for record in found)


def bench(manifest: Manifest, kind: str = "full", plant: Plant | None = None, precision: str = "fp32") -> Bench:
    """The checks' bench over the tiny model, with a fault planted in every fresh one."""
    content = {"data": {"table": "t.csv", "crop": False}, "adapt": {"kind": kind}, "train": {"lr": 1e-3}}
    config = Config.parse(content, check_files=False)

    def build() -> tuple[Classifier, Strategy]:
        model, strategy = tiny_model({"kind": kind})
        if plant is not None:
            plant(model, strategy)
        return model, strategy

    return Bench(Subject(config, manifest, build), Runtime("cpu", precision, 0), few_images(manifest, 8, False))


def gradients(bench: Bench) -> Finding:
    return checks.gradients(bench, [])


ALL = {
    "first loss": checks.first_loss,
    "gradients": gradients,
    "overfit": checks.overfit,
    "accumulation": checks.accumulation,
    "eval mode": checks.eval_mode,
    "independence": checks.independence,
    "seed": checks.seed,
    "precision": checks.precision,
    "merge": checks.merge,
}


def after_block(model: Classifier, change: Callable[[Tensor], Tensor], block: int = 0) -> None:
    """Let `change` act on what a block of the network gives."""
    blocks: Any = model.backbone.network.blocks
    blocks[block].register_forward_hook(lambda _module, _inputs, output: change(output))


@pytest.mark.parametrize("kind", ["linear", "gradual", "full", "lora"])
@pytest.mark.parametrize("name", list(ALL))
def test_what_is_sound_passes(manifest: Manifest, kind: str, name: str) -> None:
    if (kind, name) == ("linear", "overfit"):
        pytest.skip("an untrained network gives no features to probe")
    finding = ALL[name](bench(manifest, kind, precision="bf16" if name == "precision" else "fp32"))
    expected = Status.SKIP if name == "merge" and kind != "lora" else Status.PASS
    assert finding.status == expected, finding.why


def set_head(factor: float) -> Plant:
    def plant(model: Classifier, strategy: Strategy) -> None:
        with torch.no_grad():
            for parameter in model.head.parameters():
                parameter.normal_(std=factor)

    return plant


def freeze_head(model: Classifier, strategy: Strategy) -> None:
    model.head.requires_grad_(False)


def detach(model: Classifier, strategy: Strategy) -> None:
    after_block(model, lambda output: output.detach())


def make_nan(model: Classifier, strategy: Strategy) -> None:
    # Finite forward, infinite slope: the root of zero.
    after_block(model, lambda output: output + (output - output).abs().sqrt())


def drift(model: Classifier, strategy: Strategy) -> None:
    """A frozen weight that every forward pass changes."""
    weight: Any = model.backbone.network.patch_embed.proj.weight

    def change(output: Tensor) -> Tensor:
        weight.data.add_(1e-3)
        return output

    after_block(model, change)


def forget_a_group(model: Classifier, strategy: Strategy) -> None:
    groups = strategy.groups
    strategy.groups = lambda model: groups(model)[:-1]  # type: ignore[method-assign]


def blind(model: Classifier, strategy: Strategy) -> None:
    after_block(model, lambda output: output * 0.0, block=1)


def stay_awake(model: Classifier, strategy: Strategy) -> None:
    set_mode = strategy.set_mode

    def awake(model: Classifier, training: bool) -> None:
        set_mode(model, training)
        model.head.train()

    strategy.set_mode = awake  # type: ignore[method-assign]


def noisy_features(model: Classifier, strategy: Strategy) -> None:
    """Drop-path left on in a backbone that does not train."""
    set_mode = strategy.set_mode

    def awake(model: Classifier, training: bool) -> None:
        set_mode(model, training)
        model.backbone.train(training)

    strategy.set_mode = awake  # type: ignore[method-assign]
    after_block(model, lambda output: nn.functional.dropout(output, 0.1, training=model.backbone.training))


def mix_images(model: Classifier, strategy: Strategy) -> None:
    after_block(model, lambda output: output - output.mean(dim=0, keepdim=True), block=1)


def unseeded(model: Classifier, strategy: Strategy) -> None:
    noise = torch.frombuffer(bytearray(os.urandom(32)), dtype=torch.uint8).float() / 255
    with torch.no_grad():
        next(parameter for parameter in model.head.parameters())[0] += noise


def bad_in_bf16(model: Classifier, strategy: Strategy) -> None:
    after_block(model, lambda output: output * (-1.0 if torch.is_autocast_enabled("cpu") else 1.0), block=1)


@pytest.mark.parametrize(
    ("name", "kind", "plant", "words"),
    [
        ("first loss", "full", set_head(3.0), ["ln 2", "head"]),
        ("gradients", "full", detach, ["patch_embed", "gets no gradient", "detach", "between", "blocks.1"]),
        ("gradients", "lora", detach, ["lora_A", "gets no gradient"]),
        ("gradients", "full", freeze_head, ["head", "frozen"]),
        ("gradients", "full", make_nan, ["finite"]),
        ("gradients", "linear", drift, ["patch_embed.proj.weight", "frozen, but it changes"]),
        ("gradients", "full", forget_a_group, ["head", "does not move"]),
        ("overfit", "full", blind, ["needed", "differ by 0.0%"]),
        ("eval mode", "full", stay_awake, ["outputs differ", "head", "set_mode"]),
        ("eval mode", "linear", noisy_features, ["frozen backbone", "training mode"]),
        ("independence", "full", mix_images, ["one by one", "across the batch"]),
        ("seed", "full", unseeded, ["the first weights", "generator"]),
        ("precision", "full", bad_in_bf16, ["bf16", "fp32"]),
    ],
)
def test_a_planted_fault_fails(manifest: Manifest, name: str, kind: str, plant: Plant, words: list[str]) -> None:
    tried = bench(manifest, kind, plant, precision="bf16" if name == "precision" else "fp32")
    finding = carry_out(name, lambda: ALL[name](tried))
    assert finding.status == Status.FAIL, finding.why
    said = " ".join("\n".join(lines(finding)).split())
    assert [word for word in words if word not in said] == [], said


def test_accumulation_that_weighs_wrongly_fails(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    real = steps._Steps.step

    def wrong(self: Any, *arguments: Any) -> bool:
        self.in_step = self.nominal  # the short last batch weighs as a full one
        return real(self, *arguments)

    monkeypatch.setattr(steps._Steps, "step", wrong)
    finding = checks.accumulation(bench(manifest))
    assert finding.status == Status.FAIL
    assert "3 + 3 + 2" in finding.why


def test_a_merge_that_forgets_the_adapter_fails(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    real = lora.merge

    def forgetful(model: Classifier) -> Classifier:
        for parameter in (p for name, p in model.named_parameters() if "lora_B" in name):
            parameter.data.zero_()
        return real(model)

    monkeypatch.setattr(lora, "merge", forgetful)
    finding = checks.merge(bench(manifest, "lora"))
    assert finding.status == Status.FAIL
    assert "merged" in finding.why


def test_a_rate_that_is_too_low_is_a_warning(manifest: Manifest) -> None:
    tried = bench(manifest)
    low = tried.config.train.model_copy(update={"lr": 1e-4})
    tried.subject = Subject(tried.config.model_copy(update={"train": low}), manifest, tried.subject.build)
    tried.steps = 40
    finding = checks.overfit(tried)
    assert finding.status == Status.WARN, finding.why
    assert "Try train.lr 0.001" in finding.advice


def test_parameters_the_output_does_not_use_are_a_warning(manifest: Manifest) -> None:
    def plant(model: Classifier, strategy: Strategy) -> None:
        model.backbone.network.norm.register_parameter("idle", nn.Parameter(torch.zeros(3)))  # type: ignore[union-attr]

    flows: list[Flow] = []
    finding = checks.gradients(bench(manifest, "full", plant), flows)
    assert finding.status == Status.WARN
    assert "norm.idle" in finding.why
    assert not flows[0].faults


def test_many_parameters_in_a_dead_branch_are_a_warning(manifest: Manifest) -> None:
    """More than are tried one by one: LoRA in branches that a frozen scale of zero switches off."""

    def plant(model: Classifier, strategy: Strategy) -> None:
        norm: Any = model.backbone.network.norm
        for number in range(30):
            norm.register_parameter(f"idle{number}", nn.Parameter(torch.zeros(1)))

    finding = checks.gradients(bench(manifest, "full", plant), [])
    assert finding.status == Status.WARN
    assert "30 trained tensors have no part" in finding.why


def test_images_are_taken_from_every_class_and_readable(tmp_path: Path) -> None:
    from dataclasses import replace

    found = photographs(tmp_path, 10)
    found = found.with_records(replace(r, split="train", label=int(n > 7)) for n, r in enumerate(found))
    assert few_images(found, 4, False).class_counts() == (2, 2)
    (tmp_path / "8.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"8\.png"):
        few_images(found, 4, False)
    assert [record.name for record in few_images(found, 4, True)] == ["0.png", "1.png", "9.png", "2.png"]


def test_what_breaks_down_is_a_finding() -> None:
    def broken() -> Finding:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied\nmore")

    finding = carry_out("first loss", broken)
    assert finding.status == Status.FAIL
    assert "mat1" in finding.why
    assert not Report("model", "", [finding]).passed
    assert Report("model", "", [Finding(Status.WARN, ""), Finding(Status.SKIP, "")]).passed
