"""`eyetune export`: what leaves the house says what the run says, or does not leave; and needs no PyTorch to say it."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch
from export_kit import TASKS, make_run, photographs
from onnx import helper
from safetensors.torch import load_file

import eyetune as et
from eyetune.backbones import BACKBONES, find_spec, load_backbone
from eyetune.backbones.timm_any import timm_spec
from eyetune.cli import main
from eyetune.data.fundus import load_square
from eyetune.errors import RunError
from eyetune.exporting import network as exported_network
from eyetune.exporting import write_onnx, write_safetensors
from eyetune.exporting.photographs import photographs as photographs_of
from eyetune.exporting.timm_layout import TimmNetwork, without_head
from eyetune.metrics.heads import Head
from eyetune.predicting.model import open_model, why_no_heat_maps
from eyetune.predicting.onnx_file import CHECKSUM, NO_CHECKSUM, SHEET, read_outline
from eyetune.predicting.onnx_model import OnnxModel
from eyetune.predicting.sheet import read_sheet
from eyetune.predicting.sources import file_record
from eyetune.runtime import seed_everything
from eyetune.train.run import Run

torch.set_num_threads(1)

WITHOUT = ("cyclopts", "numpy", "onnxruntime", "opencv-python-headless", "pillow", "pydantic", "pyyaml", "rich")
"""What `eyetune predict MODEL.onnx` needs, as docs/export.md says."""

FLOAT32 = ("--device", "cpu", "--precision", "fp32")
"""As an export computes: a run may have been trained, and then predicts, in bfloat16."""


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photographs(tmp_path_factory.mktemp("photographs"))


@pytest.fixture(scope="module")
def run(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A vision transformer with LoRA, five grades."""
    return make_run(table, tmp_path_factory.mktemp("export") / "run", adapt="lora")


@pytest.fixture(scope="module")
def model(run: Run) -> Path:
    """The run as an ONNX file."""
    return et.export(run, "onnx")


@pytest.fixture
def eyes(table: Path) -> list[Path]:
    return sorted((table.parent / "images").iterdir())[:12]


def predict(model: Path, out: Path, *words: object) -> list[dict[str, str]]:
    assert main(["predict", str(model), *map(str, words), "--workers", "0", "--out", str(out)]) == 0
    with open(out, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def assert_alike(ours: list[dict[str, str]], theirs: list[dict[str, str]], tolerance: float = 1e-5) -> None:
    assert [list(row) for row in ours] == [list(row) for row in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        for name, cell in mine.items():
            if cell and name.startswith(("prob_", "low", "high", "ood")):
                assert float(cell) == pytest.approx(float(other[name]), rel=1e-4, abs=tolerance), name
            elif name == "predicted" and "low" in mine:
                assert float(cell) == pytest.approx(float(other[name]), rel=1e-5)
            else:
                assert cell == other[name], name


# --- the same rows, with and without PyTorch --------------------------------------------------------------------------


@pytest.mark.parametrize("words", [(), ("--tta",), ("--no-calibration", "--no-quality")], ids=" ".join)
def test_an_exported_model_gives_the_rows_of_its_run(
    run: Run, model: Path, eyes: list[Path], tmp_path: Path, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    mine = predict(run.folder.path, tmp_path / "a.csv", *eyes, broken, *words, *FLOAT32)
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("Predicting")]
    theirs = predict(model, tmp_path / "b.csv", *eyes, broken, *words)
    assert_alike(mine, theirs)
    err = capsys.readouterr().err.replace("b.csv", "a.csv")
    assert [line for line in err.splitlines() if not line.startswith("Predicting")] == said
    assert len({row["prob_0"] for row in theirs}) > 6
    assert theirs[-1]["error"]


BLOCKED = """
import sys
class Block:
    names = ("torch", "torchvision", "timm", "peft", "accelerate", "safetensors", "sklearn", "scipy", "pandas",
             "matplotlib", "transformers", "onnx", "onnxscript", "jinja2", "psutil", "tensorboard", "voyager")
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            raise ModuleNotFoundError(f"{name} is not to be imported", name=name)
sys.meta_path.insert(0, Block())
from eyetune.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_predicting_needs_no_pytorch(model: Path, eyes: list[Path], tmp_path: Path) -> None:
    expected = predict(model, tmp_path / "a.csv", *eyes)
    words = ["predict", str(model), *map(str, eyes), "--out", str(tmp_path / "b.csv")]
    done = subprocess.run([sys.executable, "-c", BLOCKED, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "b.csv", newline="", encoding="utf-8") as stream:
        assert_alike(expected, list(csv.DictReader(stream)), tolerance=1e-9)


def test_a_run_without_pytorch_says_that_it_needs_it(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "eyetune.train.run", None)
    assert main(["predict", str(run.folder.path), "eye.png"]) == 2
    assert "needs PyTorch" in capsys.readouterr().err


def test_a_verb_whose_package_is_not_there_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise ModuleNotFoundError("No module named 'timm'", name="timm")

    monkeypatch.setattr("eyetune.cli.app", missing)
    assert main(["finetune"]) == 2
    said = capsys.readouterr().err
    assert "needs timm" in said
    assert said.count("\n") == 1


def test_squares_give_what_their_files_give(model: Path, eyes: list[Path]) -> None:
    opened = open_model(model)
    assert isinstance(opened, OnnxModel)
    squares = [load_square(path, opened.settings) for path in eyes]
    one = opened.table_of([path.name for path in eyes], squares)
    other = opened.table(opened.unlabelled([file_record(str(path)) for path in eyes]), workers=0, batch_size=5)
    np.testing.assert_allclose(one.logits, other.logits, atol=1e-6)
    np.testing.assert_allclose(one.ood, other.ood, rtol=1e-5)
    alone = opened.outputs(["probabilities"], np.stack(squares[:1]))[0]
    assert opened.calibration is not None
    np.testing.assert_allclose(alone[0], opened.calibration.apply(one).probabilities[0], atol=1e-6)


def test_the_file_says_what_it_is(run: Run, model: Path) -> None:
    sheet = read_sheet(read_outline(model).properties[SHEET])
    assert sheet.classes == run.classes
    assert sheet.fitted() == run.calibration
    assert sheet.base.fingerprint == run.card.fingerprint
    assert sheet.squares.settings == run.settings
    assert sheet.licence == run.licence
    assert sheet.checked is not None
    assert sheet.checked.split == "val"
    assert sheet.checked.images == 9
    assert sheet.checked.probabilities < 1e-5
    whole = onnx.load(model)
    onnx.checker.check_model(whole)
    text = whole.SerializeToString()
    for private in (str(run.folder.path), str(Path(et.__file__).parent), os.path.expanduser("~") + "/"):
        assert private.encode() not in text
    assert why_no_heat_maps(open_model(model)) is not None


def test_what_an_exported_model_lacks_is_said(
    model: Path, eyes: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, said in (
        (["--heatmaps", str(tmp_path / "maps")], "heat maps look into the network"),
        (["--weights", "x.pth"], "--weights"),
        (["--precision", "bf16"], "--precision bf16"),
        (["--calibration", "elsewhere"], "holds no calibration for 'elsewhere'"),
        (["--operating-point", "nonsense"], "no operating point 'nonsense'"),
        (["--device", "mps"], "--device mps"),
    ):
        assert main(["predict", str(model), str(eyes[0]), *words]) == 2
        assert said in capsys.readouterr().err
    assert main(["evaluate", str(model), "--data", f"x={tmp_path}"]) == 2
    assert "run folder" in capsys.readouterr().err


# --- files from outside -----------------------------------------------------------------------------------------------


def changed(model: Path, tmp_path: Path, change: Callable[[Any], None], *, sealed: bool = True) -> Path:
    """The model with a change that its checksum knows of."""
    whole = onnx.load(model)
    change(whole)
    for one in whole.metadata_props:
        if one.key == CHECKSUM and sealed:
            one.value = NO_CHECKSUM
    path = tmp_path / "changed.onnx"
    content = whole.SerializeToString()
    if sealed:
        assert content.count(NO_CHECKSUM.encode()) == 1
        content = content.replace(NO_CHECKSUM.encode(), hashlib.sha256(content).hexdigest().encode())
    path.write_bytes(content)
    return path


def _external(whole: Any) -> None:
    tensor = whole.graph.initializer[0]
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")


def _external_in_a_node(whole: Any) -> None:
    tensor = onnx.TensorProto(data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="x")
    whole.graph.node.append(helper.make_node("Constant", [], ["more"], value=tensor))


def _custom(whole: Any) -> None:
    whole.graph.node[0].domain = "evil.ops"


def _branch(whole: Any) -> None:
    inner = helper.make_graph([], "inner", [], [])
    whole.graph.node.append(helper.make_node("If", ["logits"], ["x"], then_branch=inner, else_branch=inner))


def _function(whole: Any) -> None:
    whole.functions.add(name="f", domain="")


def _sheet(**changes: Any) -> Callable[[Any], None]:
    def change(whole: Any) -> None:
        for one in whole.metadata_props:
            if one.key == SHEET:
                one.value = json.dumps(json.loads(one.value) | changes)

    return change


def _foreign(whole: Any) -> None:
    del whole.metadata_props[:]


def _damaged_text(whole: Any) -> None:
    next(one for one in whole.metadata_props if one.key == SHEET).value = "{"


def _wrong_size(whole: Any) -> None:
    whole.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 7


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_external, "another file"),
        (_external_in_a_node, "another file"),
        (_custom, "not standard"),
        (_branch, "graphs inside"),
        (_function, "functions"),
        (_damaged_text, "no JSON"),
        (_sheet(schema=99), "newer EyeTune"),
        (_sheet(surprise=1), "surprise"),
        (_sheet(classes=["a", "b"]), "calibration"),
        (_sheet(licence="\x1b[2J"), "licence"),
        (_sheet(squares={"pixels": 10**9, "fit": "pad", "crop": True, "contrast": "none"}), "pixels"),
        (_sheet(squares={"pixels": 64, "fit": "pad", "crop": True, "contrast": "none"}), "its input is"),
        (_sheet(form="adapter"), "adapter"),
        (_sheet(task={"kind": "regression", "head": "corn"}), "task"),
        (_wrong_size, "input is|cannot load"),
    ],
)
def test_a_file_that_is_not_ours_is_refused_before_it_is_run(
    model: Path, tmp_path: Path, change: Callable[[Any], None], said: str
) -> None:
    with pytest.raises(RunError, match=said) as caught:
        OnnxModel(changed(model, tmp_path, change))
    assert str(tmp_path) in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_a_model_of_another_program_or_without_its_checksum_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="another program"):
        OnnxModel(changed(model, tmp_path, _foreign, sealed=False))
    bare = onnx.load(model)
    kept = [one for one in bare.metadata_props if one.key != CHECKSUM]
    del bare.metadata_props[:]
    bare.metadata_props.extend(kept)
    (tmp_path / "bare.onnx").write_bytes(bare.SerializeToString())
    with pytest.raises(RunError, match="checksum is missing"):
        OnnxModel(tmp_path / "bare.onnx")


def test_damage_anywhere_is_noticed(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = model.read_bytes()
    rng = np.random.default_rng(3)
    path = tmp_path / "damaged.onnx"
    places = [*rng.integers(0, len(content), 40).tolist(), *range(12), len(content) - 1]
    for place in places:
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << int(rng.integers(8))]) + content[place + 1 :])
        with pytest.raises(RunError):
            read_outline(path)
    for length in (0, 1, 2, 100, *rng.integers(0, len(content), 20).tolist()):
        path.write_bytes(content[:length])
        with pytest.raises(RunError):
            read_outline(path)
    assert main(["predict", str(path), str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["predict", str(tmp_path / "missing.onnx"), str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"eyetune: no file at {tmp_path / 'missing.onnx'}.\n"


# --- held against the run ---------------------------------------------------------------------------------------------


def test_an_export_that_says_something_else_is_refused_and_leaves_nothing(
    run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(run: Run, classifier: Any, path: Path) -> None:
        whole = onnx.load(model)
        del whole.metadata_props[:]
        bias = next(one for one in whole.graph.initializer if one.name.endswith("head.1.bias"))
        bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) * np.float32(1.01), bias.name))
        onnx.save(whole, path)

    out = tmp_path / "out" / "model.onnx"
    out.parent.mkdir()
    out.write_bytes(b"what was there")
    monkeypatch.setattr("eyetune.exporting.onnx._export", wrong)
    with pytest.raises(RunError, match=r"differs by up to 0\.00\d+ \(allowed: 0\.0001\)"):
        write_onnx(run, out)
    assert [path.name for path in out.parent.iterdir()] == ["model.onnx"]
    assert out.read_bytes() == b"what was there"


def test_forms_that_do_not_fit_are_refused_with_what_to_do(
    run: Run, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(run.folder.path)
    for words, said in (
        (["--to", "safetensors", "--int8"], "--int8 is for --to onnx"),
        (["--to", "onnx", "--out", str(tmp_path / "model")], "call it .onnx"),
        (["--to", "safetensors", "--out", str(table)], "is a file"),
        (["--to", "safetensors", "--out", str(table.parent)], "is no export"),
        (["--to", "tflite"], "tflite"),
    ):
        assert main(["export", folder, *words]) == 2
        assert said in capsys.readouterr().err
    full = make_run(table, tmp_path / "full", splits=False)
    with pytest.raises(RunError, match=r"full, not with LoRA.*--to safetensors"):
        et.export(full, "adapter")
    assert sorted(path.name for path in table.parent.iterdir()) == ["images", "table.csv"]


def test_class_names_that_no_sheet_can_hold_are_refused(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "card", replace(run.card, classes=("0", "1\nwith line breaks", "2", "3", "4")))
    with pytest.raises(RunError, match="classes"):
        write_onnx(run, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def normal_tail(values: list[float]) -> list[float]:
    return [0.5 * math.erfc(value / math.sqrt(2)) for value in values]


def test_what_the_graph_makes_of_a_head_is_what_the_tables_say() -> None:
    points = [-9.0, -3.0, -0.1, 0.0, 0.2, 1.0, 4.0, 8.0, 20.0]
    found = exported_network._tail(torch.tensor(points, dtype=torch.float64))
    np.testing.assert_allclose(found.numpy(), normal_tail(points), rtol=2e-7)
    generator = torch.Generator().manual_seed(0)
    for name, spread in (("corn", 3.0), ("coral", 3.0), ("regression", 1.5), ("softmax", 3.0)):
        head = Head(kind="ordinal", head=name, **TASKS["ranked"]["fitted"])
        raw = torch.randn(300, head.outputs("01234"), generator=generator) * spread
        raw[0], raw[1] = 12.0, -12.0
        expected = head.logits(raw.double().numpy(), 5)
        found = exported_network.log_shares(head, raw, 5).double().numpy()
        # At a temperature of 2, which makes much of shares that are next to nothing.
        shares = [np.exp(one / 2) / np.exp(one / 2).sum(axis=1, keepdims=True) for one in (expected, found)]
        np.testing.assert_allclose(shares[0], shares[1], atol=2e-6, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["ranked", "labels", "number"])
def test_every_task_goes_through(table: Path, tmp_path: Path, eyes: list[Path], task: str) -> None:
    run = make_run(table, tmp_path / "run", task=task, adapt="linear", backbone="test_vit")
    path = et.export(run, "onnx", out=tmp_path / "m.onnx")
    mine = predict(run.folder.path, tmp_path / "a.csv", *eyes, *FLOAT32)
    assert_alike(mine, predict(path, tmp_path / "b.csv", *eyes))
    assert_alike(
        predict(run.folder.path, tmp_path / "c.csv", *eyes, "--tta", *FLOAT32),
        predict(path, tmp_path / "d.csv", *eyes, "--tta"),
    )


@pytest.mark.slow
def test_int8_is_smaller_near_to_the_run_and_scaled_by_training_photographs(
    run: Run, model: Path, table: Path, tmp_path: Path, eyes: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = et.export(run, "onnx", out=tmp_path / "small.onnx", int8=True)
    sheet = read_sheet(read_outline(small).properties[SHEET])
    assert (sheet.numbers, sheet.quantised) == ("int8", "dynamic")
    assert small.stat().st_size < 0.5 * model.stat().st_size
    assert {"MatMulInteger", "DynamicQuantizeLinear"} <= read_outline(small).operators
    assert sheet.checked is not None
    assert 0 < sheet.checked.probabilities < 0.05
    assert open_model(small).digest != open_model(model).digest
    rows = predict(small, tmp_path / "a.csv", *eyes)
    float32 = predict(model, tmp_path / "b.csv", *eyes)
    away = [abs(float(a["prob_0"]) - float(b["prob_0"])) for a, b in zip(rows, float32, strict=True)]
    assert 0 < max(away) < 0.1
    cnn = make_run(table, tmp_path / "cnn", backbone="test_resnet")
    asked: list[str] = []

    def noted(run: Run, split: str) -> Any:
        asked.append(split)
        return photographs_of(run, split)

    monkeypatch.setattr("eyetune.exporting.onnx.photographs", noted)
    path = et.export(cnn, "onnx", out=tmp_path / "cnn.onnx", int8=True)
    assert asked == ["train"]
    assert {"QuantizeLinear", "DequantizeLinear"} <= read_outline(path).operators
    assert read_sheet(read_outline(path).properties[SHEET]).quantised == "static"


# --- for timm and PEFT ------------------------------------------------------------------------------------------------


def images_of(run: Run, count: int = 4) -> torch.Tensor:
    side = run.settings.pixels
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "pixels", "pool", "adapt", "task"),
    [
        ("test_vit", 32, "avg", "lora", "coral"),
        ("test_efficientnet", 32, None, "full", "labels"),
        ("resnet18", 64, None, "full", "classes"),
        ("nano", 64, "avg", "full", "classes"),
        ("green", 56, None, "lora", "classes"),
        ("swin_tiny_patch4_window7_224", 64, None, "linear", "classes"),
    ],
)
def test_plain_timm_loads_the_whole_network(
    table: Path, tmp_path: Path, backbone: str, pixels: int, pool: str | None, adapt: str, task: str
) -> None:
    run = make_run(table, tmp_path / "run", backbone=backbone, pixels=pixels, pool=pool, adapt=adapt, task=task)
    folder = et.export(run, "safetensors", out=tmp_path / "out")
    layout = TimmNetwork.of(run.model.backbone, run.model.outputs)
    assert layout is not None
    network = timm.create_model(layout.architecture, **layout.arguments).eval()
    network.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    images = images_of(run)
    with torch.no_grad():
        expected = run.model(images)
        torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-4)
        by_folder = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        torch.testing.assert_close(by_folder(images), expected, rtol=1e-4, atol=1e-4)
    assert str(layout) in (folder / "README.md").read_text(encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["pretrained_cfg"]
    assert config["mean"] == list(run.model.backbone.preprocess.mean)
    sheet = read_sheet((folder / "eyetune.json").read_text(encoding="utf-8"))
    assert sheet.checked is not None
    assert sheet.checked.probabilities < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(BACKBONES.names()))
def test_timm_builds_every_published_network(name: str) -> None:
    """The same tensors under the same names, of the same shapes; of timm's own poolings too, for one of its names."""
    for spec in (find_spec(name), *([timm_spec("vit_tiny_patch16_224")] if name == "nano" else [])):
        assert spec.plain or name == "ret-clip"
        for pool, call in spec.plain.items():
            with torch.device("meta"):
                theirs = timm.create_model(call.architecture, num_classes=0, **call.arguments)
                ours = spec.build(spec.pixels, pool)
            assert {n: t.shape for n, t in theirs.state_dict().items()} == {
                n: t.shape for n, t in ours.state_dict().items()
            }, (name, pool)


@pytest.mark.slow
def test_plain_peft_loads_the_adapter(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import peft

    folder = et.export(run, "adapter", out=tmp_path / "adapter")
    card = run.card
    seed_everything(card.seed)
    backbone = load_backbone(card.backbone, card.weights, pixels=card.pixels, pool=card.pool)
    layout = TimmNetwork.of(run.model.backbone, run.model.outputs)
    assert layout is not None
    base = without_head(layout, backbone, 0)
    images = images_of(run)
    with torch.no_grad():
        before = base(images)
        found = peft.PeftModel.from_pretrained(base, str(folder)).eval()(images)
        torch.testing.assert_close(found, run.model(images), rtol=1e-4, atol=1e-5)
    assert (found - before).abs().max() > 0.1
    content = json.loads((folder / "eyetune.json").read_text(encoding="utf-8"))
    assert content["base"]["fingerprint"] == card.fingerprint
    assert content["calibration"]["temperature"]["value"] == run.calibration.temperature.value
    # Over other base weights it says something else: that is what the check is for.
    (tmp_path / "again").mkdir()
    monkeypatch.setattr("eyetune.exporting.adapter.seed_everything", lambda seed: seed_everything(seed + 1))
    with pytest.raises(RunError, match="nothing was written"):
        et.export(run, "adapter", out=tmp_path / "again" / "adapter")
    assert not list((tmp_path / "again").iterdir())


@pytest.mark.slow
def test_where_no_photograph_is_left_drawn_eyes_stand_for_them(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(table, tmp_path / "run", splits=False)
    found = write_safetensors(run, tmp_path / "out")
    assert found.split == "drawn eyes"
    assert found.images > 4
    et.export(run, "safetensors", out=tmp_path / "out")
    assert "is at hand to check on; drawn eyes stood" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_networks_that_timm_has_not_are_refused(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.model.backbone, "spec", replace(run.model.backbone.spec, plain={}))
    with pytest.raises(RunError, match="with pooling cls: use --to onnx"):
        write_safetensors(run, tmp_path / "out")
    assert not list(tmp_path.iterdir())
