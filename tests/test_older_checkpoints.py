"""Checkpoints as the earlier projects wrote them: recognised, loaded whole, and the same numbers as there."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import data_kit
import numpy as np
import peft
import pytest
import torch
from test_weights_files import RunsCode
from torch import Tensor, nn

from eyetune.backbones import load_backbone
from eyetune.backbones.older import is_older, read_older
from eyetune.backbones.retfound import RETFOUND
from eyetune.cli import main
from eyetune.errors import UserError, WeightsError
from eyetune.train.adopt import adopt
from eyetune.train.run import load_run

PIXELS = 64
CLASSES = 3


class Guide(nn.Module):
    """The guides' classifier: a backbone under a name, and a head with or without a LayerNorm."""

    def __init__(self, backbone: nn.Module, width: int, *, norm: bool, outputs: int = CLASSES) -> None:
        super().__init__()
        self.backbone = backbone
        layers = [nn.LayerNorm(width), nn.Dropout(0.3), nn.Linear(width, outputs)]
        self.head = nn.Sequential(*layers) if norm else nn.Linear(width, outputs)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.head(self.backbone(images))
        return out


@pytest.fixture(scope="module")
def base() -> nn.Module:
    torch.manual_seed(0)
    return load_backbone("nano", "random", pixels=PIXELS).network


def trained(base: nn.Module, *, norm: bool = True, outputs: int = CLASSES) -> Guide:
    """A classifier whose every tensor is its own, so that a mix-up shows."""
    torch.manual_seed(1)
    model = Guide(copy.deepcopy(base), 192, norm=norm, outputs=outputs).eval()
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def with_lora(base: nn.Module, alpha: float) -> Guide:
    model = trained(base)
    config = peft.LoraConfig(r=2, lora_alpha=alpha, target_modules=["qkv"])
    model.backbone = peft.get_peft_model(model.backbone, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn_like(parameter))
    return model.eval()


def save(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def same(folder: Path, model: nn.Module, outputs: int = CLASSES) -> None:
    """The run gives what the model gives on the same images."""
    run = load_run(folder, device="cpu", precision="fp32", cache=False)
    torch.manual_seed(7)
    images = torch.randn(2, 3, PIXELS, PIXELS)
    with torch.no_grad():
        expected = model(images)
        found = run.model(images)
    if outputs == 1:
        found, expected = found.softmax(dim=1)[:, 1:], expected.sigmoid()
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


LAYOUTS = {
    "plain": lambda state: state,
    "model": lambda state: {"model": state, "epoch": 3, "optimizer": {"state": {}, "param_groups": [{"lr": 1e-3}]}},
    "state_dict": lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}, "best": 0.9},
    "timm": lambda state: {key.removeprefix("backbone."): value for key, value in state.items()},
    "classifier": lambda state: {key.replace("head.", "classifier."): value for key, value in state.items()},
}


@pytest.mark.parametrize(("layout", "norm"), [*((layout, True) for layout in LAYOUTS), ("timm", False)])
def test_every_layout_gives_the_same_numbers(layout: str, norm: bool, base: nn.Module, tmp_path: Path) -> None:
    model = trained(base, norm=norm)
    file = save(tmp_path / "best_model.pth", LAYOUTS[layout](model.state_dict()))
    adopt(file, tmp_path / "run", device="cpu")
    same(tmp_path / "run", model)
    report = json.loads((tmp_path / "run" / "load_report.json").read_text())
    assert report["unexplained"] == report["missing"] == []
    assert len(report["loaded"]) == len(model.state_dict())
    assert report["assumed"][0].startswith("the file does not say its network: nano assumed")
    assert "photographs cropped" in report["assumed"][-1]


@pytest.mark.parametrize("outputs", [1, 2])
def test_heads_of_two_classes(outputs: int, base: nn.Module, tmp_path: Path) -> None:
    """One output with a sigmoid is two classes, exactly."""
    model = trained(base, norm=False, outputs=outputs)
    adopt(save(tmp_path / "a.pth", model.state_dict()), tmp_path / "run", classes=["no", "yes"], device="cpu")
    same(tmp_path / "run", model, outputs)
    assert load_run(tmp_path / "run", device="cpu").classes == ("no", "yes")


def test_a_whole_network_with_adapters_in_it(base: nn.Module, tmp_path: Path) -> None:
    model = with_lora(base, alpha=6)
    file = save(tmp_path / "full_model.pth", {"model": model.state_dict(), "config": {"lora_alpha": 6}})
    adopt(file, tmp_path / "run", device="cpu")
    same(tmp_path / "run", model)
    assert (tmp_path / "run" / "base.safetensors").is_file()


@pytest.mark.parametrize("said", [True, False])
def test_adapters_alone_over_their_base(said: bool, base: nn.Module, tmp_path: Path) -> None:
    model = with_lora(base, alpha=8)  # four times the rank: what is assumed where nothing is said
    state = {key: value for key, value in model.state_dict().items() if "lora_" in key or key.startswith("head.")}
    weights = save(tmp_path / "base.pth", base.state_dict())
    file = save(tmp_path / "adapters.pth", {"lora_state_dict": state, "lora_alpha": 8} if said else state)
    config = {"backbone": "nano", "weights": str(weights), "device": "cpu"}
    adopt(file, tmp_path / "run", **config)
    run = load_run(tmp_path / "run", device="cpu", precision="fp32", cache=False)
    torch.manual_seed(7)
    # The base file is for 64 pixels, the run for nano's own: its position embedding was resized.
    assert run.card.pixels == 224
    assert run.card.adapt["r"] == 2
    assert run.card.adapt["alpha"] == 8
    for name, value in state.items():
        if "lora_" in name:
            own = run.model.get_parameter(name.replace("backbone.base_model.model.", "backbone.network."))
            assert torch.equal(own, value)
    report = json.loads((tmp_path / "run" / "load_report.json").read_text())
    assert any("alpha 8, four times the rank" in one for one in report["assumed"]) is not said
    assert report["base"]["missing"] == []
    adopt(file, tmp_path / "other", alpha=3, **config)
    assert load_run(tmp_path / "other", device="cpu").card.adapt["alpha"] == 3


def test_a_folder_that_peft_wrote(base: nn.Module, tmp_path: Path) -> None:
    """Its alpha stands in adapter_config.json; the head was trained as a module to save."""
    network = copy.deepcopy(base)
    network.head = nn.Linear(192, CLASSES)
    config = peft.LoraConfig(r=2, lora_alpha=5, target_modules=["qkv"], modules_to_save=["head"])
    model = peft.get_peft_model(network, config)
    model.save_pretrained(tmp_path / "adapter")
    assert is_older(tmp_path / "adapter")
    adopt(tmp_path / "adapter", tmp_path / "run", backbone="nano", device="cpu")  # over the embedded weights
    assert load_run(tmp_path / "run", device="cpu").card.adapt["alpha"] == 5


def test_timm_checkpoints(tmp_path: Path) -> None:
    """resnet18 as a script of timm saves it, under the key that its --checkpoint_key names."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=4).eval()
    file = save(tmp_path / "model_best.pth.tar", {"state_dict": model.state_dict(), "arch": "resnet18", "epoch": 1})
    adopt(file, tmp_path / "run", device="cpu")
    run = load_run(tmp_path / "run", device="cpu", precision="fp32")
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(run.model(images), model(images), atol=1e-4, rtol=1e-4)
    assert run.card.preprocess["mean"] == list(timm.data.IMAGENET_DEFAULT_MEAN)


# --- recognised without being loaded ------------------------------------------------------------------------------


def shapes(spec: Any, pool: str, outputs: int = 5) -> dict[str, Tensor]:
    """A state dict of the right shapes that takes no room: every tensor is one number, repeated."""
    from eyetune.backbones.weights import empty_network

    network = empty_network(spec, spec.pixels, pool)
    state = {key: torch.ones(1).expand(value.shape) for key, value in network.state_dict().items()}
    width = spec.pools[pool]
    return state | {"head.weight": torch.ones(1).expand(outputs, width), "head.bias": torch.ones(outputs)}


@pytest.mark.parametrize("pool", ["cls", "avg"])
def test_large_is_assumed_and_its_pooling_seen(pool: str, tmp_path: Path) -> None:
    """timm's ViT-L has the very same tensors."""
    found = read_older(save(tmp_path / "a.pth", shapes(RETFOUND, pool)))
    assert (found.spec.name, found.pool, found.pixels, len(found.head.weight)) == ("retfound", pool, 224, 5)
    assert "retfound assumed" in found.assumptions[0]


@pytest.mark.slow
def test_large_whole(tmp_path: Path) -> None:
    """A ViT-L in its full size, as the guides save it, gives the numbers that timm's ViT-L gives."""
    import timm

    torch.manual_seed(0)
    pool = 0.02 * torch.randn(5_000_000)  # every tensor a piece of it: the file stays small
    with torch.device("meta"):
        model = timm.create_model("vit_large_patch16_224", num_classes=5)
    state, place = {}, 0
    for key, value in model.state_dict().items():
        place = place + 997 if place + 997 + value.numel() <= len(pool) else 0
        state[key] = pool[place : place + value.numel()].view(value.shape)
    file = save(tmp_path / "full_model.pth", {"model": {f"backbone.{k}": v for k, v in state.items()}, "epoch": 19})
    run = load_run(adopt(file, tmp_path / "run", device="cpu").path, device="cpu", precision="fp32", cache=False)
    assert run.card.backbone == "retfound"
    model.load_state_dict(state, assign=True)
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(run.model(images), model.eval()(images), atol=1e-4, rtol=1e-4)


def test_green_is_told_apart(tmp_path: Path) -> None:
    from eyetune.backbones.retfound_green import RETFOUND_GREEN

    found = read_older(save(tmp_path / "a.pth", {"model": shapes(RETFOUND_GREEN, "avg"), "variant": "green"}))
    assert (found.spec.name, found.pixels, found.assumptions) == ("retfound-green", 392, ())


def test_what_several_networks_fit_is_asked(tmp_path: Path) -> None:
    """VisionFM and timm's ViT-B differ in how an image is normalised, not in a single key."""
    from eyetune.backbones.visionfm import VISIONFM

    file = save(tmp_path / "a.pth", shapes(VISIONFM, "cls"))
    with pytest.raises(WeightsError, match=r"visionfm, vit_base_patch16_224(?s:.)*--backbone"):
        read_older(file)
    assert read_older(file, backbone="vit_base_patch16_224").spec.name == "vit_base_patch16_224"
    named = save(
        tmp_path / "b.pth", {"state_dict": shapes(VISIONFM, "cls"), "args": {"model_name": "vit_base_patch16_224"}}
    )
    assert read_older(named).spec.name == "vit_base_patch16_224"


# --- refused ------------------------------------------------------------------------------------------------------


def without(state: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if part not in key}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: without(s, "head."), "no classification head"),
        (lambda s: without(s, "blocks.3."), "is not of nano(?s:.)*blocks.3.norm1.weight"),
        (lambda s: s | {"backbone.extra.weight": torch.ones(3, 3)}, "backbone.extra.weight"),
        (lambda s: s | {"head.4.weight": torch.ones(3, 3)}, "more than a LayerNorm and a linear layer"),
        (lambda s: without(s, "head.2.w") | {"head.2.kernel": torch.ones(3, 192)}, "more than a LayerNorm"),
        (lambda s: s | {"module.head.2.bias": torch.ones(3)}, "another key means too"),
        (lambda s: s | {"head.2.bias": torch.full((3,), float("nan"))}, "NaN"),
        (lambda s: {k: v for k, v in s.items() if k.startswith("head.")}, "a head at most"),
        (lambda s: s | {"backbone.blocks.0.attn.qkv.lora_A.weight": torch.ones(2, 192)}, "half an adapter"),
        (lambda s: {"epoch": 3}, "no named tensors"),
    ],
)
def test_what_does_not_add_up_is_refused(change: Any, message: str, base: nn.Module, tmp_path: Path) -> None:
    file = save(tmp_path / "a.pth", {"model": change(trained(base).state_dict()), "model_name": "nano"})
    with pytest.raises(WeightsError, match=message):
        adopt(file, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_a_network_that_is_not_known(base: nn.Module, tmp_path: Path) -> None:
    """The message names what came nearest and what is wrong with it."""
    state = without(trained(base).state_dict(), "blocks.3.")
    with pytest.raises(WeightsError, match=r"comes nearest to nano(?s:.)*12 network tensors(?s:.)*--backbone"):
        read_older(save(tmp_path / "a.pth", state))
    other = {"stem.weight": torch.ones(8, 3, 3, 3), "stem.bias": torch.ones(8), "head.weight": torch.ones(2, 8)}
    with pytest.raises(WeightsError, match="not one of its tensors"):
        read_older(save(tmp_path / "b.pth", other))


def test_a_pickle_that_would_run_code(tmp_path: Path) -> None:
    file = save(tmp_path / "a.pth", {"model": RunsCode(tmp_path / "ran")})
    with pytest.raises(WeightsError, match="would run code"):
        adopt(file, tmp_path / "run", device="cpu")
    assert not (tmp_path / "ran").exists()


def test_adapters_ask_for_their_base(base: nn.Module, tmp_path: Path) -> None:
    state = {
        f"blocks.{n}.attn.qkv.lora_{side}.weight": torch.ones(*shape)
        for n in range(24)
        for side, shape in (("A", (8, 1024)), ("B", (3072, 8)))
    }
    file = save(tmp_path / "a.pth", state | {"head.weight": torch.ones(5, 1024), "head.bias": torch.ones(5)})
    with pytest.raises(WeightsError, match="24 layers"):
        read_older(file)
    other = save(tmp_path / "b.pth", base.state_dict())
    with pytest.raises(WeightsError, match="of another network than the adapters"):
        read_older(file, base=other)
    with pytest.raises(WeightsError, match="fit nano"):
        read_older(file, backbone="nano", base=other)


def test_options_that_do_not_fit(base: nn.Module, tmp_path: Path) -> None:
    file = save(tmp_path / "a.pth", {"model": trained(base).state_dict(), "model_name": "nano"})
    for options, message in [
        ({"classes": ["a", "b"]}, "tells 3 classes apart"),
        ({"alpha": 3.0}, "no LoRA adapters"),
        ({"weights": str(file)}, "only for|alone; leave it out"),
        ({"backbone": "retfond"}, "Did you mean 'retfound'"),
    ]:
        with pytest.raises(UserError, match=message):
            adopt(file, tmp_path / "run", device="cpu", **options)  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_folder_is_made_once(base: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --out after the file; the same file read the same way is taken again, anything else refused."""
    monkeypatch.chdir(tmp_path)
    model = trained(base)
    file = save(tmp_path / "best.pth.tar", {"state_dict": model.state_dict()})
    same(load_run(file, device="cpu").folder.path, model)
    before = (tmp_path / "runs" / "best" / "config.yaml").stat().st_mtime_ns
    assert adopt(file, device="cpu").path == Path("runs/best")
    assert (tmp_path / "runs" / "best" / "config.yaml").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="is not empty"):
        adopt(file, classes=["x", "y", "z"], device="cpu")
    save(file, {"state_dict": trained(base, norm=False).state_dict()})
    with pytest.raises(UserError, match="is not empty"):
        load_run(file, device="cpu")


# --- the verb -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_evaluate_takes_a_checkpoint_file(base: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = trained(base, outputs=2)
    file = save(tmp_path / "old.pth", model.state_dict())
    photographs = data_kit.photographs(tmp_path / "images", 12)
    rows = [f"{record.image.name},{('healthy', 'glaucoma')[record.label or 0]}" for record in photographs]
    rows[-1] = f"{photographs[-1].image.name},blurred"
    (tmp_path / "t.csv").write_text("image,label\n" + "\n".join(rows) + "\n")
    said = "clinic=healthy:healthy,glaucoma:glaucoma,blurred:null"
    words = ["--data", f"clinic={tmp_path / 't.csv'}", "--map", said, "--workers", "0", "--device", "cpu", "--no-cache"]
    run = str(tmp_path / "run")
    assert main(["evaluate", str(file), "--out", run, "--classes", "healthy,glaucoma", *words]) == 0
    said = capsys.readouterr().out
    assert "assumed: the file does not say its network" in said
    assert "what the run was trained on is not known" in said
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())["datasets"]["clinic"]
    assert metrics["n"] == 11
    assert np.array(metrics["confusion_matrix"]).sum() == 11
    assert "blurred → left out" in (tmp_path / "run" / "report.html").read_text()
    assert main(["predict", run, str(tmp_path / "images"), "--workers", "0", "--device", "cpu"]) == 0
    assert main(["evaluate", run, *words]) == 0
    assert main(["evaluate", run, "--out", str(tmp_path / "more"), *words]) == 2
