"""The pictures are written whole, and say what the numbers say. How they look was judged by eye."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from eyetune.errors import UserError
from eyetune.metrics import plots
from eyetune.metrics.predictions import Predictions
from eyetune.metrics.scores import score

GRADES = tuple("01234")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that would have been written."""
    figures: list[Figure] = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    return figures


def predictions(classes: tuple[str, ...], n: int = 200, absent: int | None = None, unknown: int = 0) -> Predictions:
    rng = np.random.default_rng(0)
    k = len(classes)
    targets = rng.choice([grade for grade in range(k) if grade != absent], n)
    logits = rng.normal(size=(n, k)) + 2 * np.eye(k)[targets]
    targets[:unknown] = -1
    return Predictions([f"{i}" for i in range(n)], [None] * n, [None] * n, targets, logits, classes)


def words(figure: Figure) -> list[str]:
    return [item.get_text() for item in figure.findobj(Text) if item.get_text()]  # type: ignore[attr-defined]


def labels(figure: Figure, panel: int = 0) -> list[str]:
    return list(figure.axes[panel].get_legend_handles_labels()[1])


def history(epochs: int = 12) -> list[dict[str, Any]]:
    return [
        {
            **{"epoch": e, "phase": "head" if e < 5 else "all", "train_loss": 1 / e, "val_loss": 2 / e},
            **{"val_qwk": None if e == 2 else 0.9 - (e - 9) ** 2 / 100, "val_nll": 2.0, "lr_head": 1e-3, "seconds": 3},
            **({"lr_blocks": 1e-4} if e >= 5 else {}),
        }
        for e in range(1, epochs + 1)
    ]


def test_pictures_are_whole_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "DPI", 80)
    table = predictions(GRADES, absent=3)
    plots.confusion_matrix(score(table)["confusion_matrix"], GRADES, tmp_path / "new" / "a.png", title="test")
    plots.roc(table, tmp_path / "new" / "b.png", title="test")
    plots.learning_curves(history(), tmp_path / "new" / "c.png", title="test")
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == ["a.png", "b.png", "c.png"]
    for file in (tmp_path / "new").iterdir():
        with Image.open(file) as image:
            image.load()
            assert image.format == "PNG"
            assert min(image.size) > 360
            assert np.ptp(np.asarray(image.convert("L"))) > 150
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        plots.learning_curves(history(), tmp_path / "file" / "c.png")


def test_confusion_matrix_says_counts_and_shares(drawn: list[Figure]) -> None:
    matrix = [[3, 1, 0], [0, 0, 0], [1, 999, 0]]
    plots.confusion_matrix(matrix, ("a", "b", "c"), Path("x"), title="here")
    found = words(drawn[0])
    assert {"3\n75%", "1\n25%", "0\n0%", "999\n100%", "1\n<1%", "a\n(n = 4)", "b\n(n = 0)", "here"} <= set(found)
    assert found.count("–") == 3
    cells = {item.get_text(): item.get_position() for item in drawn[0].axes[0].texts}
    assert cells["999\n100%"] == (1, 2)  # column = predicted, row = true


def test_roc_names_every_class_with_its_area(drawn: list[Figure]) -> None:
    table = predictions(GRADES, absent=3, unknown=20)
    plots.roc(table, Path("x"))
    found, scores = labels(drawn[0]), score(table)
    for name in "0124":
        entry = scores["per_class"][name]
        assert f"{name}: {entry['auroc']:.3f} (n = {entry['support']})" in found
    assert "3: no examples" in found
    area = scores["metrics"]["referable_auroc"]["value"]
    assert any(label.startswith(f"referable (grade ≥ 2): {area:.3f}") for label in found)


def test_roc_line_keeps_the_area_of_the_curve(drawn: list[Figure]) -> None:
    table = predictions(("a", "b"), n=500)
    rounded = Predictions(*(table.images, table.patients, table.eyes), table.targets, table.logits.round(), ("a", "b"))
    plots.roc(rounded, Path("x"))
    line = drawn[0].axes[0].get_lines()[1]
    x, y = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
    assert np.trapezoid(y, x) == pytest.approx(score(rounded)["metrics"]["auroc_macro"]["value"], abs=1e-12)
    assert labels(drawn[0])[1].startswith("b: ")
    assert len(labels(drawn[0])) == 2


def test_roc_of_nothing_and_of_very_many_classes(drawn: list[Figure]) -> None:
    plots.roc(predictions(("a", "b"), n=5, unknown=5), Path("x"))
    assert "b: no examples" in labels(drawn[0])
    plots.roc(predictions(tuple(f"c{i}" for i in range(30)), n=900), Path("x"))
    assert len(labels(drawn[1])) == plots.MAX_CURVES + 1
    assert any("18 most frequent" in text for text in [drawn[1].axes[0].get_legend().get_title().get_text()])  # type: ignore[union-attr]


def test_learning_curves_read_the_history(drawn: list[Figure]) -> None:
    plots.learning_curves(history(), Path("x"), metric="qwk")
    loss, scores, rates = (labels(drawn[0], panel) for panel in range(3))
    assert loss == ["train loss", "val loss"]
    assert scores == ["qwk", "best: 0.900\n(epoch 9)"]
    assert rates == ["head", "blocks"]
    qwk = np.asarray(drawn[0].axes[1].get_lines()[0].get_ydata(), dtype=float)
    assert np.isnan(qwk).tolist() == [epoch == 2 for epoch in range(1, 13)]
    assert {"head", "all"} <= set(words(drawn[0]))
    borders = [line.get_xdata() for axes in drawn[0].axes for line in axes.get_lines() if len(line.get_xdata()) == 2]  # type: ignore[arg-type]
    assert borders == [[4.5, 4.5]] * 3


def test_learning_curves_mark_the_lowest_where_lower_is_better(drawn: list[Figure]) -> None:
    rows = [{"epoch": e, "val_nll": value} for e, value in enumerate([0.9, 0.4, 0.7], start=1)]
    plots.learning_curves(rows, Path("x"), metric="nll")
    assert labels(drawn[0]) == ["nll", "best: 0.400\n(epoch 2)"]


@pytest.mark.filterwarnings("error")
def test_awkward_histories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "DPI", 40)
    many = [{"epoch": e, **{f"lr/blocks.{i}": 0.1**i * e for i in range(30)}, "lr/never": 0.0} for e in (0, 1)]
    for rows in (history(1), [{"epoch": 1}], [{"val_qwk": None, "train_loss": ""}] * 3, many, [{"lr": 0.0}]):
        plots.learning_curves(rows, tmp_path / "c.png")
    with pytest.raises(ValueError, match="no epoch"):
        plots.learning_curves([], tmp_path / "c.png")


@pytest.mark.filterwarnings("error")
def test_awkward_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "DPI", 40)
    names = ("$unbalanced", "$a_b$ \\frac{", "视网膜", "x" * 90, "a_very_long-name/without any_end" * 3)
    plots.confusion_matrix(np.eye(5, dtype=int), names, tmp_path / "a.png", title="50% of $x$")
    plots.roc(predictions(names), tmp_path / "b.png", title="_")


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("short", "short"),
        ("moderate non-proliferative", "moderate non-\nproliferative"),
        ("diabetic_retinopathy_grade", "diabetic_\nretinopathy_…"),
        ("x" * 20, "xxxxxxxxxxxxxx\nxxxxxx"),
        ("costs $5", r"costs \$5"),
        ("", ""),
    ],
)
def test_labels_break_where_they_may(name: str, label: str) -> None:
    assert plots.folded(name, 14) == label


def test_no_global_state(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from eyetune.metrics import plots\n"
        "assert 'matplotlib' not in sys.modules, 'imported too early'\n"
        "plots.confusion_matrix([[1, 0], [0, 1]], ('a', 'b'), Path(sys.argv[1]))\n"
        "assert 'matplotlib.pyplot' not in sys.modules, 'pyplot'\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(plots.__file__).parents[2])}
    command = [sys.executable, "-c", code, str(tmp_path / "a.png")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "a.png").is_file()
