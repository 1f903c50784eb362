"""What users get wrong, through the front door: one message that says what, where and what to do, and the exit code."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eyetune.cli import main

pytestmark = pytest.mark.usefixtures("no_pictures")

Rows = list[dict[str, str]]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Twenty-four photographs of twelve patients in a table with classes 0 and 1."""
    return drawn(tmp_path)


def drawn(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    folder = tmp_path / "images"
    folder.mkdir()
    rows = []
    for number in range(24):
        name = f"eye{number:02d}.png"
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(folder / name)
        rows.append({"image": name, "label": str(number // 2 % 2), "patient": f"p{number // 2}"})
    write(tmp_path, rows)
    return tmp_path


def write(data: Path, rows: Rows) -> None:
    with open(data / "labels.csv", "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, ["image", "label", "patient"])
        writer.writeheader()
        writer.writerows(rows)


def rows_of(data: Path) -> Rows:
    with open(data / "labels.csv", newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def finetune(data: Path, *flags: str, out: str = "run") -> int:
    return main(
        [
            "finetune",
            *("--data.table", str(data / "labels.csv"), "--model.weights", "random", "--model.pixels", "32"),
            *("--adapt.kind", "linear", "--augment", "none", "--train.epochs", "1", "--train.batch_size", "4"),
            *("--data.val", "0.2", "--data.test", "0.2", "--workers", "0", "--precision", "fp32"),
            *("--train.tensorboard", "false", "--out", str(data / out), *flags),
        ]
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder, trained on the same photographs elsewhere; nobody may write into it."""
    data = drawn(tmp_path_factory.mktemp("finished"))
    assert finetune(data) == 0
    return data / "run"


@pytest.fixture
def run(data: Path, finished: Path) -> Path:
    """A copy of that run folder beside the table."""
    return Path(shutil.copytree(finished, data / "run"))


@pytest.fixture
def refused(data: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., str]]:
    def run(*flags: str) -> str:
        code = finetune(data, *flags)
        said = capsys.readouterr().err
        assert code == 2, said
        assert "Traceback" not in said
        assert not (data / "run").exists() or not list((data / "run").iterdir()), "the mended command wants this folder"
        return said[said.index("eyetune: ") :]

    return run


Change = Callable[[Rows], Rows]


def test_the_data_itself_is_fine(finished: Path) -> None:
    assert set(json.loads((finished / "metrics.json").read_text())["datasets"]) == {"val", "test"}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data.table", "nowhere.csv"], ["data.table", "nowhere.csv"]),
        (["--data.images", "nowhere"], ["data.images", "nowhere"]),
        (["--data.label_column", "lable"], ["lable", "Did you mean 'label'?"]),
        (["--data.image_column", "imgae"], ["imgae", "Did you mean 'image'?"]),
        (["--model.weights", "nowhere.pth"], ["model.weights", "nowhere.pth"]),
        (["--model.backbone", "retfond"], ["retfond", "Did you mean 'retfound'?"]),
        (["--train.epohcs", "3"], ["train.epohcs", "Did you mean 'train.epochs'?"]),
        (["--train.lr", "fast"], ["train.lr", "fast"]),
        (["--train.batch_size", "1000"], ["batch_size", "1000", "at most"]),
        (["--adapt.kind", "lroa"], ["adapt.kind", "'lora'"]),
        (["--adapt.kind", "lora", "--adapt.targets", "qvk"], ["qvk", "qkv"]),
        (["--data.val", "1.5"], ["data.val"]),
        (["--train.epochs", "yes"], ["train.epochs", "truth value"]),
        (["--data.classes", "[no, mild]"], ["data.classes", "quotes"]),
        (["--adapt.r", "3"], ["adapt.r", "belongs to lora"]),
        (["--model.pool", "cls_token"], ["cls_token", "avg"]),
        (["--device", "cuda"], ["CUDA"]),
        (["--train.metric", "qkw"], ["qkw", "Did you mean 'qwk'?"]),
        (["--augment", "[RandomFlip]"], ["RandomFlip", "Random"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_flag_that_is_wrong(refused: Callable[..., str], flags: list[str], words: list[str]) -> None:
    if "--device" in flags and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    said = refused(*flags)
    for word in words:
        assert word in said


def test_all_faults_of_a_configuration_at_once(refused: Callable[..., str]) -> None:
    said = refused("--train.epohcs", "3", "--train.lr", "fast", "--data.images", "nowhere")
    assert "3 faults" in said


def set_label(row: int, label: str) -> Change:
    def change(rows: Rows) -> Rows:
        rows[row]["label"] = label
        return rows

    return change


def set_image(row: int, image: str) -> Change:
    def change(rows: Rows) -> Rows:
        rows[row]["image"] = image
        return rows

    return change


@pytest.mark.parametrize(
    ("change", "flags", "words"),
    [
        (lambda rows: [], [], ["labels.csv"]),
        (set_label(5, "7"), ["--data.classes", "['0', '1']"], ["7", "row 7"]),
        (set_label(5, "-1"), [], ["-1", "row 7"]),
        (set_label(5, ""), [], ["row 7"]),
        (set_label(5, "nan"), [], ["row 7"]),
        (set_label(5, "severe"), [], ["severe", "row 7"]),
        (set_label(5, "0.5"), [], ["0.5", "row 7"]),
        (lambda rows: [row | {"label": "1"} for row in rows], [], ["two classes"]),
        (lambda rows: [*rows, rows[3]], [], ["eye03.png", "row 5", "row 26"]),
        (
            lambda rows: [*rows, rows[3] | {"label": "0" if rows[3]["label"] == "1" else "1"}],
            [],
            ["eye03.png", "row 26"],
        ),
        (set_image(5, "missing.png"), [], ["missing.png", "row 7"]),
    ],
    ids=[
        "empty table",
        "label outside the classes",
        "negative label",
        "no label",
        "NaN",
        "text among numbers",
        "fraction",
        "one class",
        "duplicate row",
        "conflicting rows",
        "missing image",
    ],
)
def test_a_table_that_is_wrong(
    data: Path, refused: Callable[..., str], change: Change, flags: list[str], words: list[str]
) -> None:
    write(data, change(rows_of(data)))
    said = refused(*flags)
    for word in words:
        assert word in said


def test_a_class_that_training_never_sees(data: Path, refused: Callable[..., str]) -> None:
    said = refused("--data.classes", "['0', '1', '2']")
    assert "2" in said
    assert "no image to train on" in said


@pytest.mark.parametrize("content", [b"", b"<html>not an image</html>", None], ids=["empty", "web page", "truncated"])
def test_a_file_that_is_no_image(
    data: Path, refused: Callable[..., str], capsys: pytest.CaptureFixture[str], content: bytes | None
) -> None:
    victim = data / "images" / "eye05.png"
    victim.write_bytes(victim.read_bytes()[:200] if content is None else content)
    said = refused()
    assert "eye05.png" in said
    assert "row 7" in said
    assert "skip-unreadable" in said
    if content == b"":
        assert finetune(data, "--skip-unreadable", out="second") == 0
        assert "eye05.png" in capsys.readouterr().out


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch /tmp/eyetune-bomb-went-off",)


def bomb() -> bytes:
    buffer = io.BytesIO()
    torch.save({"model": Bomb()}, buffer)
    return buffer.getvalue()


def other_family() -> bytes:
    buffer = io.BytesIO()
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7), "fc.bias": torch.zeros(10)}, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: b"", "empty"),
        (lambda: b"<!DOCTYPE html><html>Sign in to download</html>", "web page"),
        (lambda: other_family()[:300], "cut short"),
        (other_family, "weights.pth"),
        (bomb, "system"),
        (lambda: pickle.dumps(Bomb()), "system"),
    ],
    ids=["empty", "web page", "truncated", "another family", "code", "code in a bare pickle"],
)
def test_weights_that_are_not(data: Path, refused: Callable[..., str], make: Callable[[], bytes], words: str) -> None:
    (data / "weights.pth").write_bytes(make())
    said = refused("--model.weights", str(data / "weights.pth"))
    assert "weights.pth" in said
    assert words in said
    assert not Path("/tmp/eyetune-bomb-went-off").exists()


def test_a_run_is_never_overwritten(data: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert finetune(data) == 2
    assert "--resume" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_full_disk_is_named(data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("eyetune.files.sync", full)
    assert finetune(data) == 2
    said = capsys.readouterr().err
    assert "disk is full" in said
    assert str(data / "run") in said


def test_ctrl_c_keeps_what_is_done_and_resume_goes_on(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import eyetune.train.loop as loop

    real, calls = loop.train_epoch, []

    def interrupted(*arguments: object, **named: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "train_epoch", interrupted)
    assert finetune(data, "--train.epochs", "3", "--train.warmup_epochs", "0") == 130
    said = capsys.readouterr().err
    assert f"--resume {data / 'run'}" in said
    assert "1 of 3 epochs" in said
    assert main(["finetune", "--resume", str(data / "run")]) == 0
    assert (data / "run" / "metrics.json").is_file()
    assert len((data / "run" / "history.csv").read_text().splitlines()) == 4


def test_evaluate_refuses_what_does_not_fit(data: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, words in [
        (["--data", "labels.csv"], "NAME=TABLE"),
        (["--data", f"test={data / 'labels.csv'}"], "belongs to the run"),
        (["--data", "other=nowhere.csv"], "nowhere.csv"),
    ]:
        capsys.readouterr()
        assert main(["evaluate", str(run), *flags, "--workers", "0"]) == 2
        assert words in capsys.readouterr().err
    write(data, set_label(5, "3")(rows_of(data)))
    assert main(["evaluate", str(run), "--data", f"other={data / 'labels.csv'}", "--workers", "0"]) == 2
    assert "3" in capsys.readouterr().err


def test_no_run_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(tmp_path / "nothing"), "a.png"]) == 2
    assert "no run folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["evaluate", str(tmp_path / "empty"), "--data", "a=b.csv"]) == 2
    assert "not a run folder" in capsys.readouterr().err


def test_predict_takes_every_image_of_a_folder_and_any_table(
    data: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = data / "images"
    (folder / "old").mkdir()
    (folder / "eye00.png").rename(folder / "old" / "eye00.png")
    table = data / "other.csv"
    table.write_text("photo,set,patient\neye01.png,A,p1\neye02.png,B,p1\n")
    capsys.readouterr()
    words = [str(folder), str(table), "--images", str(folder), "--image-column", "photo", "--workers", "0"]
    assert main(["predict", str(run), *words]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 1 + 24 + 2
    assert sum("old/eye00.png" in row for row in rows) == 1


def test_home_is_understood_in_a_configuration(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(data))
    config = data / "config.yaml"
    config.write_text("data: {table: ~/labels.csv, images: ~/images}\nout: ~/run\n")
    from eyetune.config import Config

    assert Config.from_yaml(config).out == data / "run"


def test_a_damaged_checkpoint(data: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    victim = run / "checkpoints" / "best" / "model.safetensors"
    victim.write_bytes(victim.read_bytes()[:-7])
    capsys.readouterr()
    assert main(["predict", str(run), str(data / "images")]) == 2
    assert str(victim) in capsys.readouterr().err


def test_an_unknown_verb_and_a_missing_argument(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetun"]) == 2
    assert "finetune" in capsys.readouterr().err
    assert main(["predict"]) == 2
    assert main(["finetune"]) == 2
    assert "nothing to train on" in capsys.readouterr().err
