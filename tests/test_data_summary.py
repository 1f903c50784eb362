"""data.json: what came in, what was left out, and which files are one and the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from data_kit import fundus, photographs, save

from eyetune.data.readable import check_readable
from eyetune.data.summary import identical, summary


def test_files_of_the_same_bytes_are_found_and_only_those(tmp_path: Path) -> None:
    made = photographs(tmp_path, 6)
    first, second, third = (record.image for record in made.records[:3])
    second.write_bytes(first.read_bytes())
    # As long as the first, other content.
    third.write_bytes(first.read_bytes()[:-1] + bytes([first.read_bytes()[-1] ^ 1]))
    made.records[5].image.unlink()
    groups = identical(made.records)
    assert [[record.name for record in group] for group in groups] == [["0.png", "1.png"]]


def test_the_summary_counts_what_was_left_out_and_names_leaks(tmp_path: Path) -> None:
    made = photographs(tmp_path, 8)
    made.records[3].image.write_bytes(made.records[0].image.read_bytes())  # another label, another split
    made.records[5].image.write_bytes(made.records[1].image.read_bytes())  # the same label, the same split
    made.records[7].image.write_bytes(b"no image")
    kept = check_readable(made, skip=True, workers=1)
    splits = ["train", "train", "train", "test", "train", "train", "val"]
    found = summary(kept.with_records(replace(r, split=s) for r, s in zip(kept, splits, strict=True)))
    assert json.loads(json.dumps(found)) == found
    assert (found["rows"], found["images"]) == (8, 7)
    assert found["left_out"] == [{"why": "cannot be read", "images": 1}]
    assert found["identical"] == {
        "groups": 2,
        "across_splits": [["0.png", "3.png"]],
        "other_labels": [["0.png", "3.png"]],
    }
    assert found["notes"] == list(kept.notes)


def test_a_manifest_without_some_of_its_records_keeps_count(tmp_path: Path) -> None:
    made = photographs(tmp_path, 4)
    fewer = made.without("first reason", made.records[1:]).without("second reason", made.records[3:], "a note")
    assert fewer.left_out == (("first reason", 1), ("second reason", 2))
    assert fewer.notes[-1] == "a note"


def test_identical_reads_no_file_whose_size_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = photographs(tmp_path, 3)
    save(made.records[2].image, fundus(90, 64, radius=20))
    sizes = {record.image.stat().st_size for record in made}
    assert len(sizes) == 3
    monkeypatch.setattr("eyetune.data.summary.file_digest", lambda path: pytest.fail(f"read {path}"))
    assert identical(made.records) == []
