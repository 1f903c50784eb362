"""`scripts.utils` and `scripts.validate_data` of the older guides: the house's numbers under their names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics
import torch
from data_kit import fundus, save
from guides_kit import GREEN, LARGE, checkout
from test_weights_files import RunsCode
from torch import nn
from torch.utils.data import TensorDataset

from eyetune.backbones.older import read_older
from eyetune.errors import ConfigError, DataError, RunError, UserError, WeightsError
from eyetune.guides import selftest
from eyetune.guides.baseline import DRClassifier
from eyetune.guides.checkpoints import load_checkpoint, save_checkpoint
from eyetune.guides.lora import RETFoundLoRA
from eyetune.guides.retfound import VisionTransformer
from eyetune.guides.settings import GuideConfig
from eyetune.guides.tools import (
    calculate_metrics,
    count_parameters,
    create_data_loaders,
    plot_confusion_matrix,
    set_seed,
)
from eyetune.guides.validation import DataValidator
from eyetune.train.adopt import adopt
from eyetune.train.run import load_run

__all__ = ["checkout"]  # a fixture


def small() -> DRClassifier:
    return DRClassifier("test_resnet", pretrained=False)


def nothing(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: nn.Module) -> bool:
    state = other.state_dict()
    return set(one) == set(state) and all(torch.equal(tensor, state[name]) for name, tensor in one.items())


# -- checkpoints -------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_read_back_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    history = {"val_acc": [80.0, np.float64(85.25)], "path": tmp_path}
    file = tmp_path / "checkpoints" / "epoch_10.pth"
    save_checkpoint(model, optimizer, 10, {"val_acc": np.float32(0.5)}, file, is_best=True, history=history)
    assert (file.parent / "best_model.pth").read_bytes() == file.read_bytes()
    again = small()
    other = torch.optim.AdamW(again.parameters(), lr=1e-4)
    said = load_checkpoint(file, again, other)
    assert same(nothing(model), again)
    assert other.state_dict()["param_groups"][0]["lr"] == 1e-2
    state = optimizer.state_dict()["state"]
    assert all(torch.equal(other.state_dict()["state"][n]["exp_avg"], state[n]["exp_avg"]) for n in state)
    assert said["epoch"] == 10
    assert said["metrics"] == {"val_acc": 0.5}
    assert said["history"] == {"val_acc": [80.0, 85.25], "path": str(tmp_path)}
    assert (said["model_class"], said["model_name"]) == ("DRClassifier", "test_resnet")
    assert not {"model_state_dict", "optimizer_state_dict"} & set(said)
    out = capsys.readouterr().out
    assert out.startswith(f"✓ Checkpoint saved: {file}\n✓ Best model saved: ")
    assert out.endswith(f"✓ Checkpoint loaded: {file} (epoch 10)\n")


def test_any_module_has_checkpoints(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    save_checkpoint(model, None, 1, {}, tmp_path / "a.pth")
    again = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    assert "variant" not in load_checkpoint(tmp_path / "a.pth", again)
    assert same(nothing(model), again)


def test_a_checkpoint_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    model = small()
    save_checkpoint(model, None, 1, {}, tmp_path / "a.pth")
    other = DRClassifier("test_resnet", num_classes=3, pretrained=False)
    before = nothing(other)
    with pytest.raises(RunError, match=r"is of another model:\n  num_classes: 5 in the file, 3 here"):
        load_checkpoint(tmp_path / "a.pth", other)
    with pytest.raises(RunError, match="holds no state of an optimizer: load it without"):
        load_checkpoint(tmp_path / "a.pth", small(), torch.optim.SGD(model.parameters(), lr=1))
    with pytest.raises(UserError, match="strict=False would leave out silently"):
        load_checkpoint(tmp_path / "a.pth", other, strict=False)
    torch.save(RunsCode("ran"), tmp_path / "evil.pth")
    with pytest.raises(WeightsError, match="would run code"):
        load_checkpoint(tmp_path / "evil.pth", other)
    state = {name: tensor for name, tensor in other.state_dict().items() if "head" not in name}
    torch.save(state, tmp_path / "headless.pth")
    with pytest.raises(RunError, match=r"does not fit this model.*\n  missing: head.1.weight"):
        load_checkpoint(tmp_path / "headless.pth", other)
    assert same(before, other)
    save_checkpoint(model, torch.optim.SGD(model.parameters(), lr=1), 1, {}, tmp_path / "b.pth")
    with pytest.raises(RunError, match=r"the optimizer's state in .* does not fit"):
        load_checkpoint(tmp_path / "b.pth", small(), torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1))


def test_only_plain_values_go_into_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"save_checkpoint: scheduler\[0\].rule is a function, which only a program"):
        save_checkpoint(small(), None, 1, {}, tmp_path / "a.pth", scheduler=[{"rule": small}])
    with pytest.raises(UserError, match="num_classes is written by itself"):
        save_checkpoint(small(), None, 1, {}, tmp_path / "a.pth", num_classes=5)
    assert not (tmp_path / "a.pth").exists()


def older(model: RETFoundLoRA) -> dict[str, torch.Tensor]:
    """The state of the model under the names that the guides' program gave it: PEFT around a timm network, and a
    `classifier` behind it."""
    names = {}
    for name, tensor in model.state_dict().items():
        name = name.replace("backbone.network.", "module.backbone.base_model.model.")
        names[name.replace("head.", "module.classifier.") if name.startswith("head.") else name] = tensor
    return names


@pytest.mark.slow
def test_a_file_of_the_guides_program_means_large(checkout: Path) -> None:
    model = RETFoundLoRA(LARGE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    content = {"epoch": 7, "model_state_dict": older(model), "best_acc": np.float64(0.9)}
    torch.save(content, "old.pth")
    again = RETFoundLoRA(LARGE)
    said = load_checkpoint("old.pth", again)
    assert same(nothing(model), again)
    assert (said["variant"], said["epoch"]) == ("large", 7)
    torch.save(content | {"variant": "green"}, "green.pth")
    with pytest.raises(RunError, match="variant: 'green' in the file, 'large' here"):
        load_checkpoint("green.pth", again)


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("large", "adapters", "full")]


@pytest.mark.parametrize("kind", ["green", *SLOW])
def test_eyetune_reads_these_checkpoints(kind: str, checkout: Path) -> None:
    """As checkpoints of another program: the same logits, the variant and alpha as the file says."""
    green = kind == "green"
    file, variant, pixels = (GREEN, "green", 392) if green else (LARGE, "large", 224)
    model: Any = (
        VisionTransformer(5, checkpoint_path=LARGE)
        if kind == "full"
        else RETFoundLoRA(file, lora_r=2, lora_alpha=16, model_variant=variant)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    weights = None
    if kind == "adapters":
        model.save_lora_adapters(f"{kind}.pth")
        weights = file
    else:
        save_checkpoint(model, torch.optim.AdamW(model.parameters()), 3, {"acc": 0.5}, f"{kind}.pth")
    found = read_older(Path(f"{kind}.pth"), base=weights)
    assert found.spec.name == ("retfound-green" if green else "retfound")
    assert found.alpha == (None if kind == "full" else 16)
    assert not found.assumptions  # network and pooling stand in the file
    adopt(f"{kind}.pth", f"run-{kind}", weights=weights, device="cpu")
    run = load_run(f"run-{kind}", device="cpu", precision="fp32", cache=False)
    images = torch.randn(1, 3, pixels, pixels)
    with torch.no_grad():
        torch.testing.assert_close(run.model(images), model.eval()(images), atol=2e-5, rtol=1e-4)


# -- seeds, counts, metrics --------------------------------------------------------------------------------------------


def test_a_seed_repeats_everything(capsys: pytest.CaptureFixture[str]) -> None:
    def draw(seed: int) -> tuple[float, float]:
        set_seed(seed)
        return float(torch.rand(())), float(np.random.rand())  # noqa: NPY002 - the generator that is seeded

    assert draw(42) == draw(42) != draw(43)
    assert capsys.readouterr().out.splitlines()[0] == "✓ Random seed set to 42 (deterministic mode: ON)"
    with pytest.raises(ConfigError, match="seed: must be a whole number, 0 or more, got -1"):
        set_seed(-1)


def test_parameters_are_counted_as_the_guides_count() -> None:
    model = small()
    model.freeze_backbone()
    total, trainable = count_parameters(model)  # type: ignore[misc]
    assert (total, trainable) == model.get_num_params()
    assert count_parameters(model, trainable_only=True) == trainable == 5 * model.get_feature_dim() + 5


def test_metrics_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 5, 200)
    called = np.where(rng.random(200) < 0.6, truth, rng.integers(0, 5, 200))
    found = calculate_metrics(torch.from_numpy(truth), called.tolist())
    report = sklearn.metrics.classification_report(truth, called, output_dict=True)
    for name in ("precision", "recall", "f1-score"):
        own = "f1" if name == "f1-score" else name
        assert found[f"{own}_macro"] == pytest.approx(report["macro avg"][name])
        assert found[f"{own}_weighted"] == pytest.approx(report["weighted avg"][name])
        for grade in map(str, range(5)):
            assert found["per_class_metrics"][grade][name] == pytest.approx(report[grade][name])
    assert found["accuracy"] == pytest.approx(report["accuracy"])
    assert found["cohen_kappa"] == pytest.approx(sklearn.metrics.cohen_kappa_score(truth, called))
    weighted = sklearn.metrics.cohen_kappa_score(truth, called, weights="quadratic")
    assert found["quadratic_kappa"] == pytest.approx(weighted)
    assert found["confusion_matrix"] == sklearn.metrics.confusion_matrix(truth, called).tolist()


def test_metrics_without_a_value_are_none() -> None:
    found = calculate_metrics([1, 1], [1, 1], num_classes=3)
    assert (found["accuracy"], found["cohen_kappa"]) == (1.0, None)
    assert (found["per_class_metrics"]["0"]["recall"], found["per_class_metrics"]["0"]["support"]) == (None, 0)


@pytest.mark.parametrize(
    ("truth", "called", "message"),
    [
        ([0, 1], [0], "y_true has 2 classes and y_pred 1"),
        ([], [], "y_true has 0 classes"),
        ([0, 5], [0, 1], "y_true: must be a list of classes from 0 to 4"),
        ([0, 1], [[0.1, 0.9], [0.5, 0.5]], "y_pred: must be a list of classes"),
        ([0, 1], [0.5, 1], "y_pred: must be a list of classes"),
    ],
)
def test_classes_that_do_not_belong_together(truth: Any, called: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        calculate_metrics(truth, called)


def test_the_confusion_matrix_is_drawn(tmp_path: Path) -> None:
    plot_confusion_matrix([0, 1, 2, 3, 4], [0, 1, 1, 3, 4], save_path=tmp_path / "all.png")
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(DataError, match="y_true: must be a list of classes from 0 to 1"):
        plot_confusion_matrix([0, 2], [0, 1], ["no", "yes"], tmp_path / "two.png")


# -- loaders and the validator -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two photographs of each of ten patients."""
    folder = tmp_path_factory.mktemp("aptos")
    rows = []
    for number in range(20):
        save(folder / "train_images" / f"{number}.png", fundus(64, 64, radius=28, seed=number))
        rows.append({"id_code": number, "diagnosis": number // 2 % 2, "patient": number // 2})
    pd.DataFrame(rows).to_csv(folder / "train.csv", index=False)
    return folder


def test_loaders_of_a_configuration_keep_patients_together(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = GuideConfig(
        {
            "model.name": "test_vit",
            "model.num_classes": 2,
            "data.train_csv": str(table / "train.csv"),
            "data.train_img_dir": str(table / "train_images"),
            "data.val_split": 0.2,
            "training.batch_size": 4,
            "num_workers": 0,
        }
    )
    train, val = create_data_loaders(config)
    assert "images: train 14, val 4, test 2" in capsys.readouterr().out
    images, labels = next(iter(train))
    assert (images.dtype, labels.dtype, labels.shape) == (torch.float32, torch.int64, (4,))
    assert images.shape[1] == 3
    patients = [{record.patient for record in loader.dataset.records} for loader in (train, val)]
    assert not patients[0] & patients[1]
    assert len(val.dataset) == sum(len(labels) for _, labels in val)
    orders = [torch.cat([labels for _, labels in train]).tolist() for _ in range(4)]
    assert len({tuple(order) for order in orders}) > 1  # every pass is an epoch of its own
    again, _ = create_data_loaders(config)
    assert torch.equal(next(iter(again))[0], images)
    with pytest.raises(UserError, match=r"batch_size is 64 but there are only"):
        create_data_loaders(config, batch_size=64)


def test_loaders_of_a_dataset_say_what_they_cannot_know(capsys: pytest.CaptureFixture[str]) -> None:
    dataset = TensorDataset(torch.arange(10.0), torch.arange(10))
    train, val = create_data_loaders(dataset, batch_size=3)
    assert "train=8, val=2. Split by image: two photographs of one patient may fall on both sides" in (
        capsys.readouterr().out
    )
    seen = [sorted(int(one) for _, labels in loader for one in labels) for loader in (train, val)]
    assert sorted(seen[0] + seen[1]) == list(range(10))
    assert seen[1] == sorted(int(one) for _, labels in create_data_loaders(dataset)[1] for one in labels)
    for wrong in ({"split_ratio": 1.0}, {"split_ratio": 0.01}):
        with pytest.raises(UserError, match="create_data_loaders: "):
            create_data_loaders(dataset, **wrong)  # type: ignore[arg-type]


def test_the_validator_is_the_audit(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    validator = DataValidator(csv_file=str(table / "train.csv"), img_dir=str(table / "train_images"))
    assert validator.validate_all()
    assert capsys.readouterr().out.endswith("✓ audit passed: nothing found that would bias a result\n")
    frame = pd.read_csv(table / "train.csv", dtype=str)
    frame.loc[3, "id_code"] = "gone"
    frame.to_csv(table / "broken.csv", index=False)
    broken = DataValidator(table / "broken.csv", table / "train_images")
    assert not broken.validate_all()
    assert broken.audit is not None
    assert not broken.audit.report.passed
    out = capsys.readouterr().out
    assert "FAIL  files" in out
    assert "✗ audit: results on this data would be biased or wrong: files" in out
    with pytest.raises(DataError, match="none"):
        DataValidator(table / "none.csv").validate_all()


# -- self-tests --------------------------------------------------------------------------------------------------------


def test_self_test_says_what_failed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> str:
        raise selftest.CheckFailed("it does not")

    monkeypatch.setattr(selftest, "_baseline", lambda: [("one", lambda: "yes"), ("two", broken)])
    assert selftest.main("model", []) == 1
    assert capsys.readouterr().out == "✓ one: yes\n✗ two: it does not\n1 of 2 checks passed\n"
    assert selftest.main("model", ["--help"]) == 0
    assert selftest.main("model", ["a", "b"]) == 2


def test_the_self_test_of_lora_reads_weights_that_are_there(checkout: Path, capsys: Any, monkeypatch: Any) -> None:
    """Here of the miniatures, whose counts are others: which is what it says."""
    assert selftest.main("retfound_lora", []) == 1
    out = capsys.readouterr().out
    assert "✗ large: " in out
    assert "train, not 793,605" in out
