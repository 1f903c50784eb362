"""`eyetune check …` through the front door: what it writes, its exit codes, and what it says to wrong input."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from PIL import Image

from eyetune.cli import main
from eyetune.data.phantom import write_cohort


@pytest.fixture(scope="module")
def eyes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cohort") / "eyes"
    write_cohort(folder, patients=12, size=64, seed=3)
    return folder


def flags(eyes: Path) -> list[str]:
    return [
        *("--data.table", str(eyes / "labels.csv"), "--data.label_column", "dr_grade", "--data.val", "0.2"),
        *("--model.weights", "random", "--model.pixels", "32", "--train.batch_size", "8"),
        *("--precision", "fp32", "--workers", "0"),
    ]


def sound_picture(path: Path) -> bool:
    with Image.open(path) as picture:
        return picture.format == "PNG" and min(picture.size) > 200 and len(picture.convert("L").getcolors() or []) > 3


@pytest.mark.slow
def test_model(eyes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report"
    assert main(["check", "model", *flags(eyes), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    found = json.loads((out / "model.json").read_text())
    assert found["passed"] is True
    names = [finding["name"] for finding in found["findings"]]
    assert names == [
        *("first loss", "gradients", "overfit", "accumulation", "eval mode"),
        *("independence", "reload", "merge", "seed", "precision"),
    ]
    assert all(f"  {name}" in said for name in names)
    assert "check model passed" in said
    assert found["pictures"] == ["model-gradients.png"]
    assert sound_picture(out / "model-gradients.png")


def test_a_model_that_fails(
    eyes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from eyetune.adapt.freezing import Linear

    # The checkpoint forgets the head's bias.
    monkeypatch.setattr(Linear, "saved", lambda self, model, name: name == "head.1.weight")
    words = ["check", "model", *flags(eyes), "--adapt.kind", "linear", "--train.lr", "0.1", "--out", str(tmp_path)]
    assert main(words) == 1
    said = capsys.readouterr().out
    assert "FAIL  reload" in said
    assert "saved() must name it" in " ".join(said.split())
    assert "check model FAILED" in said
    assert json.loads((tmp_path / "model.json").read_text())["passed"] is False


def test_the_report_goes_beside_the_run(eyes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from eyetune.findings import Report
    from eyetune.verbs import check

    monkeypatch.setattr("eyetune.checks.model.check_model", lambda *_, **__: Report("model", "", []))
    config = tmp_path / "config.yaml"
    config.write_text(f"data: {{table: {eyes / 'labels.csv'}, label_column: dr_grade}}\nout: {tmp_path / 'runs/a'}\n")
    assert main(["check", "model", str(config)]) == 0
    assert (tmp_path / "runs" / "a-check" / "model.json").is_file()
    assert not (tmp_path / "runs" / "a").exists(), "the run folder stays free for the run"
    assert check.PROBLEMS_FOUND == 1


@pytest.mark.parametrize("check", ["model", "memory"])
@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "nothing to check"),
        (["nowhere.yaml"], "nowhere.yaml"),
        (["--data.table", "nowhere.csv"], "data.table"),
        (["--train.epohcs", "3"], "Did you mean 'train.epochs'?"),
        (["--model.backbone", "retfond"], "Did you mean 'retfound'?"),
        (["--model.weights", "nowhere.pth"], "model.weights"),
        (["--data.label_column", "lable"], "lable"),
        (["--steps", "many"], "--steps must be a whole number"),
        (["--adapt.kind", "lora", "--adapt.targets", "qvk"], "qvk"),
        (["--augment", "[RandomFlip]"], "RandomFlip"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_wrong_input(
    eyes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], check: str, words: list[str], said: str
) -> None:
    given = words if len(words) < 2 else [*flags(eyes), "--out", str(tmp_path / "report"), *words]
    assert main(["check", check, *given]) == 2
    message = capsys.readouterr().err
    assert said in message
    assert "Traceback" not in message
    assert not (tmp_path / "report").exists()


def test_an_image_that_cannot_be_read(eyes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open(eyes / "labels.csv", encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    images = tmp_path / "images"
    images.mkdir()
    for row in rows:
        (images / row["image"]).parent.mkdir(parents=True, exist_ok=True)
        (images / row["image"]).write_bytes(b"<html>sign in</html>")
    words = [*flags(eyes), "--data.images", str(images), "--out", str(tmp_path / "report")]
    assert main(["check", "model", *words]) == 2
    assert "a web page, not an image" in capsys.readouterr().err
    assert main(["check", "model", *words, "--skip-unreadable"]) == 2
    assert "no image can be read" in capsys.readouterr().err


def test_a_report_never_goes_into_a_run_folder(eyes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("")
    assert main(["check", "model", *flags(eyes), "--out", str(tmp_path)]) == 2
    assert "is a run folder" in capsys.readouterr().err
    assert main(["check", "model", *flags(eyes), "--out", str(tmp_path / "config.yaml")]) == 2
    assert "is a file" in capsys.readouterr().err


def test_an_unknown_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "modle"]) == 2
    assert "model" in capsys.readouterr().err
