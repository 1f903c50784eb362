"""The code blocks of the older guides as sessions: what each takes for granted, and what must hold after it.

`tests/guides/*.md` hold the blocks alone, as printed. Where a guide is wrong, or leaves something to the reader, an
edit says so; what cannot run at all is listed with the reason.
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from guides_kit import GREEN, LARGE
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from eyetune.backbones.backbone import BACKBONES
from eyetune.errors import WeightsError

GUIDES = Path(__file__).parent / "guides"
Names = dict[str, Any]
"""The names of a session, as a user's own."""


@dataclass(frozen=True)
class Block:
    """A block as printed."""

    guide: str
    name: str
    language: str
    text: str

    @property
    def key(self) -> tuple[str, str]:
        return self.guide, self.name


PRINTED = re.compile(r"^## (.+?)\n\n```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def read_blocks() -> dict[tuple[str, str], Block]:
    found = {}
    for page in sorted(GUIDES.glob("*.md")):
        for match in re.finditer(
            r"^## (.+?)\n\n```(\w+)\n(.*?)^```$", page.read_text("utf-8"), re.DOTALL | re.MULTILINE
        ):
            block = Block(page.stem, *match.groups())
            assert block.key not in found
            found[block.key] = block
    return found


BLOCKS = read_blocks()

EDITS: dict[tuple[str, str], list[tuple[str, str, str]]] = {
    ("architecture", "Full Fine-Tuning"): [
        ("    # Training loop...", "    train(model, train_loader)", "left to the reader; as printed no Python"),
    ],
    ("architecture", "Transfer Learning Workflow"): [
        ("# Train for 5-10 epochs...", "train(model, train_loader)", "left to the reader"),
        ("# Train for another 10-20 epochs...", "train(model, train_loader)", "left to the reader"),
    ],
    ("architecture", "Multiple Dataset Adapters"): [
        ("# ... training ...", "train(model, train_loader)", "left to the reader"),
    ],
    ("testing", "LoRA Merge Testing"): [
        ("RETFoundLoRA(...)", "RETFoundLoRA(checkpoint_path).eval()", "left to the reader"),
        ("# Train...", "train(model_with_lora, []); model_with_lora.eval()", "left to the reader"),
        (
            "merged_model = model_with_lora.merge_and_unload()",
            "out1 = model_with_lora(test_input)\nmerged_model = model_with_lora.merge_and_unload()",
            "merging is for good: compared afterwards, the model would be compared with itself",
        ),
        ("    out1 = model_with_lora(test_input)\n    out2", "    out2", "the same"),
    ],
    ("testing", "Checkpoint Loading"): [
        (
            "torch.load(checkpoint_path, map_location='cpu')",
            "torch.load(checkpoint_path, map_location='cpu', weights_only=True)",
            "a pickle from outside may run code",
        ),
    ],
    ("testing", "4. Mixed Precision Training"): [
        (
            "torch.cuda.amp.GradScaler()",
            "torch.amp.GradScaler(device)",
            "torch.cuda.amp is deprecated, and of CUDA only",
        ),
        ("torch.cuda.amp.autocast()", "torch.amp.autocast(device)", "the same"),
    ],
}
"""Block -> (as printed, as run, why)."""

NOT_RUN = {
    ("testing", "CUDA Memory Management"): "needs CUDA; what fits is measured by `eyetune check memory`",
    ("testing", "Memory Leak Detection"): "needs CUDA: elsewhere torch.cuda.memory_allocated() is 0 whatever happens",
    ("testing", "Profile Slow Operations"): "needs CUDA: the table is sorted by the time on it",
    ("testing", "Reduce Augmentation Overhead"): "needs albumentations; `eyetune check loader` times what is used here",
    ("testing", "Using Existing Fixtures"): "names the tests of another project",
    ("architecture", "Hyperparameter Tuning (2)"): "ranges to search, with a key twice: no configuration",
    ("architecture", "Downloading Weights"): "moves a download of the reader's",
    ("architecture", "Downloading Weights (2)"): "lists a download of the reader's",
}
"""Block -> why it is not run."""


@dataclass(frozen=True)
class Session:
    """Blocks pasted one after the other into one session.

    Args:
        name: of the test.
        blocks: (guide, block) in order.
        before: gives the names that the blocks take for granted.
        after: name of a block -> (names, what was printed, full size?) -> asserts.
        networks: "none"; "small" (miniatures of RETFound); "full" (RETFound in its published size, slow); "both";
            "timm" (real timm networks, whose weights are random here, slow); "slow" (miniatures that take long).
        again: run everything once for each of these, put over the names.
    """

    name: str
    blocks: tuple[tuple[str, str], ...]
    before: Callable[[bool], Names] = lambda full: {}
    after: Mapping[str, Callable[[Names, str, bool], None]] = field(default_factory=dict)
    networks: str = "none"
    again: tuple[Names, ...] = ({},)


# -- what the blocks take for granted ----------------------------------------------------------------------------------


def one_step(model: nn.Module, loader: Any) -> None:
    """`train(model, loader)`: one step a batch. Without a loader, as if it had been trained: every value its own."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for images, labels in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    if not loader:
        generator = torch.Generator().manual_seed(len(list(model.parameters())))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


def logits_of(model: nn.Module, loader: Any) -> torch.Tensor:
    """`evaluate(model, loader)`."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(images) for images, _ in loader])


def usual(full: bool, batch: int = 2) -> Names:
    """Images, labels, a loader of one batch, a loss: what most blocks name without making it."""
    batch = 1 if full else batch
    torch.manual_seed(0)
    images, labels = torch.randn(batch, 3, 224, 224), torch.arange(batch) % 5
    return {
        "torch": torch,
        "nn": nn,
        "np": np,
        "sys": sys,
        "random": random,
        "DataLoader": DataLoader,
        "images": images,
        "labels": labels,
        "train_loader": [(images, labels)],
        "criterion": nn.CrossEntropyLoss(),
        "num_epochs": 1,
        "train": one_step,
        "evaluate": logits_of,
        "checkpoint_path": LARGE,
    }


def lora(full: bool) -> Names:
    from scripts.retfound_lora import RETFoundLoRA

    return usual(full) | {"RETFoundLoRA": RETFoundLoRA, "test_input": usual(full)["images"]}


def with_messidor(full: bool) -> Names:
    """Adapters of another data set are there already; at full size nobody trains for them."""
    names = lora(full)
    other = names["RETFoundLoRA"](LARGE)
    one_step(other, [] if full else names["train_loader"])
    other.save_lora_adapters("adapters_messidor.pth")
    # B starts at zero, so A has no gradient in the first step: the block that asks for one comes after a second.
    return names | {"num_epochs": 2} | ({"train": lambda model, loader: one_step(model, [])} if full else {})


def loaders(full: bool) -> Names:
    names = lora(full)
    batches = dict.fromkeys(("aptos_loader", "messidor_loader"), names["train_loader"])
    tests = {
        name: [(torch.randn_like(names["images"]), names["labels"])]
        for name in ("aptos_test_loader", "messidor_test_loader")
    }
    return names | batches | tests | ({"train": lambda model, loader: one_step(model, [])} if full else {})


def selection(full: bool) -> Names:
    from scripts.model import DRClassifier
    from scripts.retfound_model import load_retfound_model

    return lora(full) | {"DRClassifier": DRClassifier, "load_retfound_model": load_retfound_model}


def timm_names(full: bool) -> Names:
    from scripts.model import DRClassifier

    return usual(False) | {
        "DRClassifier": DRClassifier,
        "val_loader": [],
        "evaluate": lambda model, loader: 0.5,
        # One step on small images: what matters is which parameters move.
        "train_loader": [(torch.randn(2, 3, 64, 64), torch.tensor([0, 1]))],
    }


def tiny(full: bool) -> Names:
    """A small network with batch norm, and a batch for it."""
    from scripts.model import DRClassifier

    torch.manual_seed(0)
    model = DRClassifier("test_resnet", pretrained=False, dropout_rate=0.0)
    batch, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 5
    criterion = nn.CrossEntropyLoss()
    criterion(model(batch), labels).backward()
    return usual(full) | {
        "model": model,
        "batch": batch,
        "fixed_batch": batch,
        "inputs": batch,
        "labels": labels,
        "device": "cpu",
        "batch_size": 2,
        "accumulation_steps": 4,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3),
    }


def accumulating(full: bool) -> Names:
    """The loop of the block takes the loss of the labels of all batches."""
    names = tiny(full)
    steps: list[int] = []
    optimizer = names["optimizer"]
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    return names | {"dataloader": [names["batch"]] * 8, "steps": steps}


def drawn(full: bool) -> Names:
    import matplotlib.pyplot as plt

    plt.switch_backend("Agg")
    return tiny(full) | {"plt": plt}


class Drawn(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Twelve items, eleven of class 0."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"image": torch.zeros(3, 8, 8), "label": torch.tensor(int(index == 5))}


def dataset(full: bool) -> Names:
    return usual(full) | {"dataset": TensorDataset(torch.zeros(4, 3, 8, 8), torch.arange(4))}


# -- what must hold ----------------------------------------------------------------------------------------------------


def shape(name: str, *wanted: int) -> Callable[[Names, str, bool], None]:
    def check(names: Names, out: str, full: bool) -> None:
        assert tuple(names[name].shape) == wanted

    return check


def basic(names: Names, out: str, full: bool) -> None:
    assert names["outputs"].shape == (4, 5)
    assert names["model"].pretrained


def from_config(names: Names, out: str, full: bool) -> None:
    model = names["model"]
    assert (model.model_name, model.dropout_rate, model.num_classes) == ("resnet50", 0.3, 5)


def inspected(names: Names, out: str, full: bool) -> None:
    assert out.startswith("Total: 23,518,277, Trainable: 23,518,277\n✓ Created DRClassifier with backbone: resnet50\n")
    for line in ("Feature dimension: 2048", "Output classes: 5", "Dropout rate: 0.3", "Pretrained: True"):
        assert f"  - {line}\n" in out


def compared(names: Names, out: str, full: bool) -> None:
    millions = re.findall(r"^(\w+): 50.00% \((\d+\.\d)M params\)$", out, re.MULTILINE)
    assert dict(millions) == {
        "resnet50": "23.5",
        "efficientnet_b3": "10.7",
        "vit_base_patch16_224": "85.8",
        "convnext_tiny": "27.8",
    }


def loaded(names: Names, out: str, full: bool) -> None:
    model = names["model"]
    assert names["outputs"].shape == (len(names["images"]), 5)
    assert names["predictions"].shape == (len(names["images"]),)
    report = model.backbone.report
    assert report.whole
    if full:
        # The guide: 303,804,170. The encoder has 303,301,632; a linear head of 5 classes 5,125.
        assert model.get_num_params() == (303_306_757, 303_306_757)


def features(names: Names, out: str, full: bool) -> None:
    assert names["features"].shape == (len(names["images"]), 1024 if full else 16)


def counted(names: Names, out: str, full: bool) -> None:
    model = names["model"]
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    width = model.get_feature_dim()
    assert trainable == 24 * (8 * width + 8 * 3 * width) + 2 * width + 5 * width + 5
    if full:
        # The guide: 793,093 of 303,804,170.
        assert out == "trainable params: 793,605 || all params: 304,095,237 || trainable%: 0.26%\n"
        linear = trainable - 2 * width
        assert linear == 791_557  # with a linear head alone, as `eyetune finetune` trains


def only_adapters(names: Names, out: str, full: bool) -> None:
    assert names["total_trainable"] == names["model"].get_num_params()[1]
    assert len(names["lora_params"]) == 24 * 2 + 4
    assert len(names["frozen_params"]) == len(list(names["model"].parameters())) - 52


def trained(names: Names, out: str, full: bool) -> None:
    for name, parameter in names["model"].named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def saved(names: Names, out: str, full: bool) -> None:
    sizes = {name: Path(name).stat().st_size for name in ("adapters_aptos.pth", "full_model.pth")}
    Path("full_model.pth").unlink()
    if full:
        assert round(sizes["adapters_aptos.pth"] / 1e6, 1) == 3.2  # the guide: about 3 MB
        assert round(sizes["full_model.pth"] / 1e9, 1) == 1.2


def switched(names: Names, out: str, full: bool) -> None:
    assert not torch.equal(names["aptos_predictions"], names["messidor_predictions"])
    names["model"].load_lora_adapters("adapters/aptos_r8.pth")
    assert torch.equal(names["evaluate"](names["model"], names["aptos_test_loader"]), names["aptos_predictions"])


def chosen(names: Names, out: str, full: bool) -> None:
    assert type(names["model"]).__name__ == names["wanted"]


def ranks(names: Names, out: str, full: bool) -> None:
    printed = {int(rank): int(count.replace(",", "")) for rank, count in re.findall(r"Rank (\d+): ([\d,]+)", out)}
    width = names["model"].get_feature_dim()
    assert printed == {r: 24 * 4 * r * width + 7 * width + 5 for r in (4, 8, 16, 32)}
    if full:
        # A of a qkv layer has 8 x 1024, B 3072 x 8: 32,768 a layer at rank 8, not the guide's 16,384.
        assert printed == {4: 400_389, 8: 793_605, 16: 1_580_037, 32: 3_152_901}


def merged(names: Names, out: str, full: bool) -> None:
    assert names["merged_model"].get_num_params()[0] == names["merged_model"].get_num_params()[1]


def deployed(names: Names, out: str, full: bool) -> None:
    import onnxruntime

    assert set(torch.load("production_model.pth", weights_only=True)) == set(names["model"].state_dict())
    found = onnxruntime.InferenceSession("model.onnx").run(["output"], {"input": names["dummy_input"].numpy()})[0]
    with torch.no_grad():
        wanted = names["model"].eval()(names["dummy_input"])
    torch.testing.assert_close(torch.from_numpy(found), wanted, atol=1e-4, rtol=1e-4)


def stats(names: Names, out: str, full: bool) -> None:
    for which, backbone in (("LARGE", "retfound"), ("GREEN", "retfound-green")):
        preprocess = BACKBONES.get(backbone).preprocess
        said = names[f"RETFOUND_{which}_STATS"]
        assert (tuple(said["mean"]), tuple(said["std"])) == (preprocess.mean, preprocess.std)
        assert names[f"RETFOUND_{which}_SIZE"] == preprocess.pixels


def attention(names: Names, out: str, full: bool) -> None:
    assert (names["num_patches"], names["expected_attn_shape"]) == (196, (4, 16, 197, 197))


def nothing_unsaid(names: Names, out: str, full: bool) -> None:
    """With another prefix `strict=False` loads nothing and says nothing; the house refuses or finds the tensors."""
    from scripts.retfound_model import load_retfound_model

    model, file = names["model"], Path("prefixed.pth")
    torch.save({f"encoder_q.{name}": tensor for name, tensor in names["state_dict"].items()}, file)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(torch.load(file, weights_only=True), strict=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(WeightsError, match="does not load whole"):
        load_retfound_model(file)


def bare(full: bool) -> Names:
    from scripts.retfound_model import VisionTransformer

    return usual(full) | {"model": VisionTransformer().backbone.network}


def balanced(names: Names, out: str, full: bool) -> None:
    assert names["distribution"] == {0: 11, 1: 1}
    assert "Warning: Class imbalance ratio 11.0x" in out


def drew(names: Names, out: str, full: bool) -> None:
    assert Path("gradient_flow.png").read_bytes().startswith(b"\x89PNG")


def validated(names: Names, out: str, full: bool) -> None:
    assert names["is_valid"] is True


def overridden(names: Names, out: str, full: bool) -> None:
    assert (names["batch_size"], names["learning_rate"], names["checkpoint_path"]) == (48, 5e-4, LARGE)
    assert names["config"].training.batch_size == 16
    content = names["config"].translation().content
    assert (content["train"]["batch_size"], content["model"]["weights"]) == (16, LARGE)


def differs(names: Names, out: str, full: bool) -> None:
    assert not torch.equal(names["outputs_train"], names["outputs_eval"])


def scaled(names: Names, out: str, full: bool) -> None:
    assert names["effective_batch_size"] == 8
    assert len(names["steps"]) == 2  # of eight batches, four at a time


def seeded(names: Names, out: str, full: bool) -> None:
    names["set_deterministic"]()
    first = torch.rand(3), np.random.rand(), random.random()  # noqa: NPY002 - what the block seeds
    names["set_deterministic"](42)
    again = torch.rand(3), np.random.rand(), random.random()  # noqa: NPY002
    assert torch.equal(first[0], again[0])
    assert first[1:] == again[1:]
    torch.backends.cudnn.deterministic = False


def clip_names(names: Names, out: str, full: bool) -> None:
    assert (names["VISION_MODEL"], names["BATCH_SIZE"], names["MAX_EPOCHS"]) == ("ViT-B-16", 64, 10)


def imported(names: Names, out: str, full: bool) -> None:
    assert all(callable(names[name]) for name in ("DRClassifier", "load_retfound_model", "calculate_metrics", "Config"))


def _of(guide: str, *names: str) -> tuple[tuple[str, str], ...]:
    return tuple((guide, name) for name in names)


_TIGHT = {"compute_budget": "high", "iteration_speed": "slow", "accuracy_is_paramount": True}

SESSIONS = (
    Session(
        "baseline",
        _of(
            "architecture",
            "Basic Creation",
            "Using Config System",
            "Transfer Learning Workflow",
            "Model Inspection",
            "Example 1: Quick Baseline Experiment",
            "Example 3: Transfer Learning Pipeline",
        ),
        timm_names,
        {"Basic Creation": basic, "Using Config System": from_config, "Model Inspection": inspected},
        "timm",
    ),
    Session(
        "architectures",
        _of("architecture", "Example 5: Comparing Multiple Architectures"),
        timm_names,
        {"Example 5: Comparing Multiple Architectures": compared},
        "timm",
    ),
    Session(
        "retfound",
        _of("architecture", "Loading RETFound", "Full Fine-Tuning", "Feature Extraction Only"),
        # At full size nobody trains: what trains is counted.
        lambda full: usual(full) | ({"train": lambda model, loader: None} if full else {}),
        {"Loading RETFound": loaded, "Feature Extraction Only": features},
        "both",
    ),
    Session(
        "lora",
        (
            *_of("architecture", "Creating LoRA Model"),
            *_of("testing", "Verify Only LoRA Parameters are Trainable"),
            *_of("architecture", "Training"),
            *_of("testing", "Gradient Flow Verification"),
            *_of("architecture", "Saving/Loading", "Multiple Dataset Adapters", "Example 2: RETFound + LoRA Training"),
        ),
        with_messidor,
        {
            "Creating LoRA Model": counted,
            "Verify Only LoRA Parameters are Trainable": only_adapters,
            "Training": trained,
            "Saving/Loading": saved,
            "Example 2: RETFound + LoRA Training": counted,
        },
        "full",
    ),
    Session(
        "adapters",
        _of("architecture", "Example 4: Multi-Dataset LoRA Adapters"),
        loaders,
        {"Example 4: Multi-Dataset LoRA Adapters": switched},
        "full",
    ),
    Session("ranks", _of("testing", "LoRA Rank Testing"), lora, {"LoRA Rank Testing": ranks}, "full"),
    Session("merging", _of("testing", "LoRA Merge Testing"), lora, {"LoRA Merge Testing": merged}, "full"),
    Session(
        "selection",
        _of("architecture", "Model Selection"),
        selection,
        {"Model Selection": chosen},
        "small",
        (
            _TIGHT | {"compute_budget": "low", "wanted": "DRClassifier"},
            _TIGHT | {"wanted": "VisionTransformer"},
            _TIGHT | {"accuracy_is_paramount": False, "wanted": "RETFoundLoRA"},
        ),
    ),
    Session(
        "deployment",
        _of("architecture", "Model Deployment"),
        lambda full: lora(full) | {"model": lora(full)["RETFoundLoRA"](LARGE)},
        {"Model Deployment": deployed},
        "slow",
    ),
    Session(
        "constants",
        (
            *_of("architecture", "Training Tips", "Training Tips (2)", "Training Tips (3)", "Import Cheat Sheet"),
            *_of("testing", "RETFound vs RETFound_Green", "ViT-Specific Testing", "Deterministic Testing"),
            *_of("testing", "Device Handling", "2. DataLoader num_workers on macOS"),
            *_of("retclip", "Configuration Options"),
        ),
        usual,
        {
            "Import Cheat Sheet": imported,
            "RETFound vs RETFound_Green": stats,
            "ViT-Specific Testing": attention,
            "Deterministic Testing": seeded,
            "Configuration Options": clip_names,
        },
    ),
    Session("checkpoint", _of("testing", "Checkpoint Loading"), bare, {"Checkpoint Loading": nothing_unsaid}, "small"),
    Session("convergence", _of("testing", "Loss Convergence Pattern"), tiny),
    Session(
        "accumulation",
        _of("testing", "Gradient Accumulation Testing"),
        accumulating,
        {"Gradient Accumulation Testing": scaled},
    ),
    Session(
        "gotchas",
        _of(
            "testing",
            "1. Batch Normalization in Eval Mode",
            "4. Mixed Precision Training",
            "Enable Anomaly Detection",
            "Visualize Gradient Flow",
        ),
        drawn,
        {"1. Batch Normalization in Eval Mode": differs, "Visualize Gradient Flow": drew},
    ),
    Session("compilation", _of("testing", "Compilation (PyTorch 2.0+)"), tiny, networks="slow"),
    Session(
        "pitfalls",
        _of("testing", "3. Gradient Accumulation Pitfalls"),
        lambda full: tiny(full) | {"outputs": torch.zeros(8, 5, requires_grad=True)},
    ),
    Session(
        "loaders",
        _of("testing", "5. Pin Memory with Non-Tensors", "DataLoader Optimization"),
        dataset,
    ),
    Session(
        "distribution",
        _of("testing", "Check Data Distribution"),
        lambda full: {"dataset": Drawn()},
        {"Check Data Distribution": balanced},
    ),
    Session(
        "validation", _of("testing", "Calling Validation Scripts"), usual, {"Calling Validation Scripts": validated}
    ),
    Session(
        "config",
        _of("testing", "Config System Integration"),
        lambda full: {"args": SimpleNamespace(batch_size=16)},
        {"Config System Integration": overridden},
    ),
)

__all__ = ["BLOCKS", "EDITS", "GREEN", "NOT_RUN", "SESSIONS", "Session"]
