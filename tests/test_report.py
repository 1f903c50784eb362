"""Reports: every part that a run has is shown, what it lacks is left out, what is damaged is refused, nothing runs."""

from __future__ import annotations

import errno
import json
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from browser_kit import Measured, measured, needs_browser, screenshot, to_pdf
from report_kit import EVERYTHING, GRADES, comparison_folder, predictions, run_folder

from eyetune.cli import main
from eyetune.errors import RunError, UserError
from eyetune.report.comparison import write_comparison
from eyetune.report.content import Metrics
from eyetune.report.curves import history_charts
from eyetune.report.facts import read_facts
from eyetune.report.mistakes import examples, furthest_mistakes, surest_mistakes
from eyetune.report.overview import write_overview
from eyetune.report.page import Options, write_report
from eyetune.report.words import summarise

HOSTILE = '<img src=x onerror="alert(1)">'


class Checker(HTMLParser):
    """What a page would load or run, and whether its tags close."""

    VOID = frozenset({"meta", "br", "img", "path", "circle", "link"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.faults: list[str] = []
        self.feed(text)
        assert not self.stack, f"never closed: {self.stack}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.stack.append(tag)
        for name, value in attrs:
            remote = name in ("src", "href", "data", "action") and not (value or "").startswith(("data:image/", "#"))
            if remote or name.startswith("on") or tag in ("script", "iframe", "object", "embed", "link"):
                self.faults.append(f"<{tag} {name}={value!r}>")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.stack.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag in self.VOID:
            return
        if not self.stack or self.stack[-1] != tag:
            self.faults.append(f"</{tag}> closes {self.stack[-1:]}")
        else:
            self.stack.pop()


def written(folder: Any, options: Options | None = None) -> str:
    text = write_report(folder.path, options).read_text(encoding="utf-8")
    assert Checker(text).faults == []
    return text


def plain(text: str) -> str:
    """The page's words, without its marks."""
    bare = re.sub(r"<style>.*?</style>|<[^>]*>", " ", text, flags=re.DOTALL)
    return re.sub(r"\s+", " ", bare)


# -- what is shown -----------------------------------------------------------------------------------------------------


def test_a_run_with_everything_shows_everything(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", extras={"test": EVERYTHING})
    text = written(folder)
    words = plain(text)
    scores = json.loads(folder.metrics_file.read_text())["datasets"]["test"]
    for expected in (
        "QWK",
        f"{scores['metrics']['qwk']['value']:.3f}",
        "{:.3f} to {:.3f}".format(*scores["metrics"]["qwk"]["ci"]),
        "On 60 photographs, some of which, or of whose patients, it was trained or chosen on",
        "Left out : 3 (cannot be read)",
        "210 photographs",
        "ROC curve",
        "Precision-recall curve",
        "Reliability",
        "Risk and coverage",
        "Operating points",
        "grade ≥ 2 specificity 95 % ≥ 0.410 0.810 0.700 to 0.900",
        "chance 0.071",
        "area 0.120 (0.080 to 0.200)",
        "in random order: 0.300",
        "Prediction sets made to hold the truth for 90 %",
        "By the Mahalanobis distance",
        "AUROC of 0.830 (0.750 to 0.900) ; 0.5 would be no difference",
        "By sex",
        "F – M",
        "1 patient 1 1 –",
        "By patient",
        "none → 0, severe → 3, glaucoma → left out",
        "were among those the run was trained or chosen on (the very same bytes: row 6, gone.png)",
        "Lost on “handheld”",
        "Loss by epoch",
        "Apache-2.0",
        "eyetune finetune --out runs/&lt;x&gt;",
        "c0ffee",
        "ab" * 32,
        "What the numbers mean",
        "Cohen 1968",
        "Not a medical device",
    ):
        assert expected in words, expected
    confusion = scores["confusion_matrix"]
    cells = re.findall(r"<td class=\"[^\"]*\" style=\"--share:\d+%\">(\d+)", text)
    assert [int(cell) for cell in cells[:25]] == [count for row in confusion for count in row]
    assert text.count("<img ") >= 8
    assert len(text) < 5_000_000


def test_what_a_run_lacks_is_left_out(tmp_path: Path) -> None:
    classes = ("no", "yes")
    tables = {"test": predictions(30, classes, patients=False)}
    folder = run_folder(tmp_path / "run", classes=classes, tables=tables, pictures=False)
    for name in (
        "environment.json",
        "load_report.json",
        "data.json",
        "history.csv",
        "splits.csv",
        "predictions/test.csv",
    ):
        (folder.path / name).unlink()
    text = written(folder)
    words = plain(text)
    assert "environment.json is not there" in words
    assert "There is no history.csv to draw" in words
    assert "splits.csv is not there" in words
    assert "<svg" not in text
    assert "Of two photographs, one “yes” and one “no”, it ranks the right one higher" in words
    for part in ("Operating points", "Reliability", "Prediction sets", "Out of distribution", "Sanity check"):
        assert part not in words


def test_a_site_of_its_own_calibration_is_named(tmp_path: Path) -> None:
    points = [point | {"chosen_on": "clinic b"} for point in EVERYTHING["operating_points"]]
    extras = EVERYTHING | {"calibrated_by": {"dataset": "clinic b", "n": 80}, "operating_points": points}
    folder = run_folder(tmp_path / "run", extras={"handheld": extras}, pictures=False)
    words = plain(written(folder))
    assert "chosen on the labelled sample “clinic b”" in folder.card_file.read_text(encoding="utf-8")
    assert "are those fitted for “clinic b”, on 80 photographs of it, not the run's own" in words
    assert "Each threshold was chosen on “clinic b” to reach the target there" in words


def test_a_run_without_a_checkpoint_or_with_a_foreign_configuration_is_shown_too(tmp_path: Path) -> None:
    import shutil

    folder = run_folder(tmp_path / "run")
    shutil.rmtree(folder.best)
    folder.config_file.write_text("data: {table: labels.csv}\nof_a_later_version: 3\n")
    assert "of_a_later_version: 3" in plain(written(folder))


@pytest.mark.parametrize("damage", ["{", "[]", '{"datasets": {"test": {"n": "many"}}}', '{"datasets": 3}'])
def test_damaged_scores_are_one_message_and_exit_code_2(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_folder(tmp_path / "run", pictures=False)
    folder.metrics_file.write_text(damage)
    assert main(["report", str(folder.path), "--no-heat-maps"]) == 2
    said = capsys.readouterr().err
    assert "metrics.json is damaged" in said
    assert "Traceback" not in said
    assert not folder.report_file.exists()


@pytest.mark.parametrize("name", ["data.json", "environment.json", "splits.csv", "history.csv", "heatmaps.json"])
def test_other_damaged_files_are_named(name: str, tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", pictures=False)
    (folder.path / name).write_bytes(b"\xff\xfe\x00not what it was")
    with pytest.raises(RunError, match=re.escape(name)):
        write_report(folder.path)


def test_a_run_that_was_not_scored_says_how_to_finish_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_folder(tmp_path / "run", pictures=False)
    folder.metrics_file.unlink()
    assert main(["report", str(folder.path)]) == 2
    assert f"eyetune finetune --resume {folder.path}" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "rum")]) == 2
    assert "Did you mean 'run'?" in capsys.readouterr().err


# -- hostile names -----------------------------------------------------------------------------------------------------


def test_names_are_text_wherever_they_stand(tmp_path: Path) -> None:
    classes = (HOSTILE, "</style><script>alert(2)</script>", "{{ 7 * 7 }}")
    table = predictions(40, classes, prefix=HOSTILE)
    extras = EVERYTHING | {"warnings": [HOSTILE], "subgroups": {HOSTILE: EVERYTHING["subgroups"]["sex"]}}
    tables = {"test": table, HOSTILE.replace("/", ""): table}
    folder = run_folder(tmp_path / "run", classes=classes, tables=tables, extras={"test": extras}, pictures=False)
    folder.update_data(left_out=[{"why": HOSTILE, "images": 1}])
    text = written(folder, Options(names=True))
    assert "<img src=x" not in text
    assert "&lt;img src=x" in text
    assert "{{ 7 * 7 }}" in text
    card = folder.card_file.read_text(encoding="utf-8")
    assert "<img" not in card.split("---", 2)[2].replace("\\<img", "")


def test_patients_are_nowhere_and_file_names_only_when_asked_for(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    text = written(folder) + folder.card_file.read_text()
    table = predictions(60, prefix="test")
    assert not [name for name in (*table.images, *table.patients) if str(name) in text]
    named = written(folder, Options(names=True))
    case = surest_mistakes(read_facts(folder.path).predictions["test"])[0]
    assert case.image in named
    assert "testP" not in named


def test_pictures_can_be_left_out_and_stay_out(tmp_path: Path) -> None:
    from eyetune.report.page import refresh

    folder = run_folder(tmp_path / "run")
    assert "<img" in written(folder)
    assert "<img" not in written(folder, Options(pictures=False))
    refresh(folder)  # what evaluate does
    assert "<img" not in folder.report_file.read_text()
    assert "<img" in written(folder, Options())


def test_a_disk_that_takes_no_report_ends_in_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from eyetune.report.page import refresh

    folder = run_folder(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *given: (_ for _ in ()).throw(OSError(errno.ENOSPC, "no room")))
        with pytest.raises(UserError, match=r"the disk is full(.|\n)*eyetune report "):
            refresh(folder)
    folder.metrics_file.write_text("{")  # what is wrong with the run itself is only said
    refresh(folder)
    assert "no report was written" in capsys.readouterr().err


def test_photographs_that_are_gone_are_said_to_be(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    for path in (tmp_path / "photos").iterdir():
        path.unlink()
    text = written(folder)
    assert "<img" not in text
    assert "no longer where it was" in plain(text)


# -- which photographs -------------------------------------------------------------------------------------------------


def test_the_mistakes_shown_are_the_worst(tmp_path: Path) -> None:
    table = predictions(200, skill=1.0)
    top, called = table.probabilities.max(axis=1), table.predicted
    wrong = [row for row in range(200) if called[row] != table.targets[row]]
    slow = sorted(wrong, key=lambda row: -top[row])[:8]
    assert [case.row - 2 for case in surest_mistakes(table)] == slow
    far = [row for row in wrong if abs(called[row] - table.targets[row]) >= 2]
    slow = sorted(far, key=lambda row: (-abs(called[row] - table.targets[row]), -top[row]))[:8]
    found = furthest_mistakes(table)
    assert [case.row - 2 for case in found] == slow
    assert all(
        (case.truth, case.called) == (GRADES[table.targets[case.row - 2]], GRADES[called[case.row - 2]])
        for case in found
    )
    assert furthest_mistakes(predictions(50, ("cat", "dog", "eye"))) == []
    shown = examples(table)
    assert [case.truth for case in shown[:5]] == list(GRADES)
    assert all(case.truth == case.called for case in shown[:5])
    assert all(case.truth != case.called for case in shown[5:])


def test_a_network_that_answers_one_class_is_shown_on_enough_photographs() -> None:
    table = predictions(60)
    table = replace(table, logits=np.eye(5)[np.zeros(60, dtype=int)])
    shown = examples(table)
    assert len(shown) == 8
    assert [case.truth == case.called for case in shown] == [True] + [False] * 7


def test_epochs_are_whole_numbers() -> None:
    for count in (1, 2, 3, 40):
        drawn = history_charts([{"epoch": n + 1, "train_loss": 1.0} for n in range(count)], "qwk")
        words = [word for word in re.findall(r'text-anchor="middle">([^<]+)<', str(drawn[0])) if word != "Epoch"]
        assert all(word.isdigit() for word in words)
        assert len(words) == len(set(words)) >= 2


def test_images_without_a_label_are_no_mistakes() -> None:
    table = predictions(20, skill=0.0)
    unknown = replace(table, targets=np.full(20, -1))
    assert surest_mistakes(unknown) == furthest_mistakes(unknown) == examples(unknown) == []


# -- what is said ------------------------------------------------------------------------------------------------------


def cautions(folder: Any) -> list[tuple[str, str]]:
    return [(one.level, one.text) for one in summarise(read_facts(folder.path)).cautions]


def has(found: list[tuple[str, str]], level: str, words: str) -> bool:
    return any(one == level and words in text for one, text in found)


def test_a_small_test_a_drop_outside_and_left_out_images_are_warned_of(tmp_path: Path) -> None:
    found = cautions(run_folder(tmp_path / "run", extras={"handheld": EVERYTHING}, resamples=200))
    assert has(found, "warn", "test: only 60 photographs")
    assert has(found, "bad", "handheld: QWK is worse there")
    assert has(found, "warn", "3 photographs left out: cannot be read")
    assert has(found, "warn", "hold the truth for 70 %")
    assert has(found, "warn", "40 % of its photographs look unlike")
    assert has(found, "warn", "not do equally well for every sex (F against M)")
    assert has(found, "bad", "(the very same bytes: test4.png, gone.png)")
    assert not has(found, "warn", "names no patients")
    words = summarise(read_facts(run_folder(tmp_path / "other", pictures=False).path)).whom
    assert words == "On 60 photographs of 30 patients, none of whom it was trained on."
    assert [level for level, _ in found] == sorted((level for level, _ in found), key=lambda level: level != "bad")


def test_leaks_missing_patients_and_chance_are_warned_of(tmp_path: Path) -> None:
    table = predictions(150, skill=0.0, patients=False)
    folder = run_folder(tmp_path / "run", tables={"test": table}, pictures=False)
    crossing = [["eye0.png", "train1.png"], ["train2.png", "gone.png"]]
    folder.update_data(identical={"groups": 2, "across_splits": crossing, "other_labels": crossing})
    rows = folder.splits_file.read_text().splitlines()
    folder.splits_file.write_text("\n".join(re.sub(r",T\d+,", ",,", row) for row in rows) + "\n")
    found = cautions(folder)
    assert has(found, "bad", "1 photograph of the test split also in another split")
    assert has(found, "warn", "1 photograph in training and validation alike")
    assert has(found, "warn", "2 photographs with two different labels")
    assert has(found, "warn", "names no patients")
    assert has(found, "bad", "not shown to be right more often than always answering")
    assert has(found, "warn", "No outside dataset was scored")


def test_patients_in_two_splits_are_counted(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", pictures=False)
    text = folder.splits_file.read_text().replace(",train,T0,", ",train,testP1,").replace(",train,T3,", ",train,valP2,")
    folder.splits_file.write_text(text)
    assert has(cautions(folder), "bad", "2 patients in more than one split")
    assert "2 patients in more than one split" in plain(written(folder))


def test_without_a_test_split_nothing_is_claimed(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", tables={"val": predictions(40)}, pictures=False)
    words = plain(written(folder))
    assert "Nobody can say yet" in words
    assert "On nobody new" in words
    assert has(cautions(folder), "bad", "There is no test split of its own")


def test_classes_never_answered_or_never_tested_are_named(tmp_path: Path) -> None:
    table = predictions(120, skill=3.0)
    logits = table.logits.copy()
    logits[:, 4] = -50
    targets = np.where(table.targets == 1, 0, table.targets)
    folder = run_folder(
        tmp_path / "run", tables={"test": replace(table, logits=logits, targets=targets)}, pictures=False
    )
    found = cautions(folder)
    assert has(found, "bad", "never answered “4”")
    assert has(found, "warn", "no photograph of “1”")


def test_an_interval_without_width_is_no_certainty(tmp_path: Path) -> None:
    classes = ("no", "yes")
    table = predictions(60, classes, skill=30.0)
    folder = run_folder(tmp_path / "run", classes=classes, tables={"test": table}, pictures=False)
    assert has(cautions(folder), "warn", "has no width")


# -- the model card ----------------------------------------------------------------------------------------------------


def test_the_model_card_is_read_by_the_hubs_own_library(tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    folder = run_folder(tmp_path / "run", extras={"test": EVERYTHING})
    write_report(folder.path)
    card = hub.ModelCard.load(folder.card_file)
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "eyetune"
    results = {(one.dataset_type, one.metric_type): one.metric_value for one in card.data.eval_results}
    scores = json.loads(folder.metrics_file.read_text())["datasets"]
    for dataset in ("test", "handheld"):
        assert results[dataset, "qwk"] == pytest.approx(scores[dataset]["metrics"]["qwk"]["value"], abs=1e-6)
    headings = re.findall(r"^## (.+)$", card.text, re.MULTILINE)
    assert headings == [
        "Model details",
        "Intended use",
        "Factors",
        "Metrics",
        "Evaluation data",
        "Training data",
        "Quantitative analyses",
        "Ethical considerations",
        "Caveats and recommendations",
        "How to get started with the model",
        "Technical specifications",
    ]
    for line in card.text.splitlines():
        assert not line.startswith("|") or line.endswith("|"), line


def test_a_licence_that_the_hub_does_not_know_is_other(tmp_path: Path) -> None:
    from eyetune.backbones import find_spec
    from eyetune.report.card import model_card

    facts = read_facts(run_folder(tmp_path / "run", pictures=False).path)
    front = yaml.safe_load(model_card(replace(facts, spec=find_spec("retfound-green"))).split("---")[1])
    assert front["license"] == "other"
    front = yaml.safe_load(model_card(replace(facts, spec=find_spec("retfound"))).split("---")[1])
    assert front["license"] == "cc-by-nc-4.0"
    assert front["base_model"].startswith("YukunZhou/")


# -- several runs ------------------------------------------------------------------------------------------------------


def test_several_runs_get_a_page_over_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [run_folder(tmp_path / "runs" / name) for name in ("a & b", "c#1")]
    assert main(["report", *(str(folder.path) for folder in folders), "--no-heat-maps"]) == 0
    page = tmp_path / "runs" / "overview.html"
    assert str(page) in capsys.readouterr().out
    text = page.read_text()
    assert re.findall(r'href="([^"]+)"', text) == ["a%20%26%20b/report.html", "c%231/report.html"]
    assert "QWK on test" in plain(text)
    assert "QWK on handheld" in plain(text)
    other = run_folder(tmp_path / "runs" / "other", tables={"test": predictions(60, seed=9)}, pictures=False)
    apart = plain(write_overview([*(one.path for one in folders), other.path], tmp_path / "o.html").read_text())
    assert "QWK on test of a &amp; b, c#1" in apart, "held against each other"
    assert "QWK on test of other" in apart, "of other photographs: on a line of its own"
    assert main(["report", str(folders[0].path), str(folders[0].path), "--no-heat-maps"]) == 2
    assert "named twice" in capsys.readouterr().err


def test_a_comparison_gets_a_page_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = comparison_folder(tmp_path / "cmp")
    content = json.loads((folder / "comparison.json").read_text())
    content["warnings"] += ["there: 1 of its 9 photographs were seen (the very same bytes: Ann (left).png). Mind it."]
    (folder / "comparison.json").write_text(json.dumps(content))
    run = run_folder(tmp_path / "run", pictures=False)
    assert main(["report", str(folder), str(run.path), "--no-heat-maps"]) == 0
    said = capsys.readouterr().out
    assert str(folder / "report.html") in said
    assert "overview" not in said
    text = (folder / "report.html").read_text()
    assert re.findall(r'href="([^"]+)"', text) == ["lora-seed0/report.html"]
    words = plain(text)
    for expected in (
        "lora has a higher QWK than linear",
        "one run failed",
        "there: 1 of its 9 photographs were seen (the very same bytes). Mind it.",
        "Judged by QWK on the test split, decided before training",
        "3 epochs each",
        "60 photographs of 30 patients",
        "lora nano 37,829 2,893,061 61 s 3.0 GiB",
        "0.810",
        "did not move",
        "0.800 0.750 to 0.850",
        "lora − linear +0.100 −0.010 to +0.210 0.040 0.040 differs",
        "it broke &lt;b&gt;badly&lt;/b&gt;",
        "Not a medical device",
    ):
        assert expected in words, expected


def test_a_comparison_that_is_not_done_says_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = comparison_folder(tmp_path / "cmp")
    content = json.loads((folder / "comparison.json").read_text())
    (folder / "comparison.json").write_text(json.dumps(content | {"arms": [], "status": "interrupted"}))
    assert main(["report", str(folder)]) == 2
    assert "the comparison is interrupted, and nothing can be compared yet" in capsys.readouterr().err
    (folder / "comparison.json").write_text('{"status": 3, "arms": "two"}')
    assert main(["report", str(folder)]) == 2
    assert "comparison.json is damaged" in capsys.readouterr().err


def test_metrics_json_of_the_first_version_is_read() -> None:
    found = Metrics.model_validate(
        {"datasets": {"test": {"n": 3, "metrics": {"qwk": {"value": None, "reason": "why"}}}}}
    )
    assert found.datasets["test"].metrics["qwk"].reason == "why"


# -- in a browser ------------------------------------------------------------------------------------------------------


@needs_browser
@pytest.mark.slow
def test_the_page_reads_well_in_a_browser(tmp_path: Path) -> None:
    import cv2

    folder = run_folder(tmp_path / "run", extras={"test": EVERYTHING, "handheld": EVERYTHING})
    page = write_report(folder.path)
    light = cv2.imread(str(screenshot(page, tmp_path / "light.png", height=1500)))
    dark = cv2.imread(str(screenshot(page, tmp_path / "dark.png", height=1500, dark=True)))
    assert light.mean() > 200
    assert dark.mean() < 80
    pdf = to_pdf(page, tmp_path / "page.pdf").read_bytes()
    assert pdf.startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b", pdf)) >= 4
    comparison = write_comparison(comparison_folder(tmp_path / "cmp"))
    overview = write_overview([folder.path], tmp_path / "overview.html")
    for one in (page, comparison, overview):
        for window in (390, 1200):
            found = measured(one, window)
            assert found.width <= window
            assert found.smallest >= 11
            assert not found.broken
    assert measured(page, 390).pictures == page.read_text().count("<img ") > 8


@needs_browser
@pytest.mark.slow
def test_a_page_that_is_too_wide_would_be_noticed(tmp_path: Path) -> None:
    page = tmp_path / "wide.html"
    page.write_text(
        '<!doctype html><body style="margin: 0"><div style="width: 700px">wide <b style="font-size: 7px">tiny</b>'
        '<img src="data:image/png;base64,AAAA"></div>',
        encoding="utf-8",
    )
    assert measured(page, 390) == Measured(width=700, smallest=7, pictures=1, broken=1)
