"""Texts to tokens: the numbers of BertTokenizer, and a vocabulary of another language found before training."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from eyetune.clip.tokens import SPECIAL, Tokenizer
from eyetune.errors import DataError, UserError

ENGLISH = [
    "Fundus photograph of the right eye. The vertical cup-disc ratio is 0.41: no sign of glaucoma. No lesions.",
    "Fundus photograph of the left eye. 7 microaneurysms: 4 superotemporal, 3 inferonasal. Mild retinopathy.",
    "The optic disc and vascular texture are mildly blurred; the macular area can be located.",
]
CHINESE = ["眼底呈橘红色，色彩略暗淡，亮度略降低。", "视盘及血管纹理轻度模糊，黄斑区轻度模糊可准确定位。"]


@pytest.fixture(scope="module")
def english() -> Tokenizer:
    return Tokenizer.from_texts(ENGLISH, 150)


@pytest.fixture(scope="module")
def chinese() -> Tokenizer:
    return Tokenizer.from_texts(CHINESE, 100)


STRANGE = [
    "",
    "  ",
    "Hémorrhagie À",
    "眼底 mixed 黄斑区",
    "x" * 120,
    "a\x00b\u200bc",
    "No lesions." * 30,
    "2.5mm (OD) [SEP] #?",
]


@pytest.mark.parametrize("lowercase", [True, False])
def test_the_numbers_are_those_of_bert_tokenizer(tmp_path: Path, english: Tokenizer, lowercase: bool) -> None:
    from transformers import AutoTokenizer

    Tokenizer(english.vocabulary, lowercase=lowercase).save(tmp_path)
    reference = AutoTokenizer.from_pretrained(tmp_path)
    assert type(reference).__name__.startswith("BertTokenizer")
    ours = Tokenizer.from_folder_or_name(tmp_path)
    for length in (8, 64):
        wanted = reference(ENGLISH + CHINESE + STRANGE, padding="max_length", truncation=True, max_length=length)
        assert ours.encode(ENGLISH + CHINESE + STRANGE, length).tolist() == wanted["input_ids"]


def test_saved_and_pickled_tokenizers_are_the_same(tmp_path: Path, english: Tokenizer) -> None:
    english.save(tmp_path)
    for other in (Tokenizer.from_folder_or_name(tmp_path), pickle.loads(pickle.dumps(english))):
        assert (other.fingerprint, other.language) == (english.fingerprint, english.language)
        assert np.array_equal(other.encode(ENGLISH, 32), english.encode(ENGLISH, 32))
    assert Tokenizer(english.vocabulary, lowercase=False).fingerprint != english.fingerprint


def test_a_vocabulary_from_texts_knows_them_and_is_the_same_everywhere(english: Tokenizer) -> None:
    assert english.vocabulary[:5] == SPECIAL
    assert len(english) == 150
    assert english.coverage(ENGLISH, 64).unknown_share == 0
    # In another process, whose hash tables are laid out differently, and from texts in another order.
    program = (
        "import sys, json; from eyetune.clip.tokens import Tokenizer;"
        "print(Tokenizer.from_texts(json.loads(sys.argv[1]), 150).fingerprint)"
    )
    done = subprocess.run([sys.executable, "-c", program, json.dumps(ENGLISH[::-1])], capture_output=True, text=True)
    assert done.stdout.strip() == english.fingerprint, done.stderr


def test_curly_quotes_become_straight_where_only_those_are_known() -> None:
    plain = Tokenizer([*SPECIAL, '"', "a"])
    assert plain.encode(["“a”"], 6).tolist() == plain.encode(['"a"'], 6).tolist()
    curly = Tokenizer([*SPECIAL, '"', "a", "“", "”"])
    assert curly.encode(["“a”"], 6).tolist() == [[2, 7, 6, 8, 3, 0]]


def test_languages_are_told_by_their_letters(english: Tokenizer, chinese: Tokenizer) -> None:
    assert english.language.startswith("English")
    assert chinese.language == "Chinese"
    assert Tokenizer([*SPECIAL, "the", "了", "и", "في"]).language == "several languages"
    assert Tokenizer([*SPECIAL, "[unused1]", "1"]).language == "none that was recognised"


def test_coverage_counts_unknown_words_and_cut_texts(english: Tokenizer) -> None:
    found = english.coverage(["No lesions.", "眼 no"], 5)
    # "no lesions ." is whole words here; of the second text one of two words is unknown.
    assert found.unknown == ("眼",)
    ids = english.encode(["No lesions.", "眼 no"], 64)
    tokens = int((ids > 3).sum() + (ids == 1).sum())
    assert found.unknown_share == pytest.approx(1 / tokens)
    assert (found.texts, found.words, found.pieces) == (2, 5, tokens / 5)
    assert found.longest == max(int((row != 0).sum()) for row in ids)
    assert found.truncated_share == np.mean([(row != 0).sum() > 5 for row in ids])


def test_a_vocabulary_of_another_language_is_refused(english: Tokenizer, chinese: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"chinese: .*unknown.* seems to be Chinese, the texts English.*PubMedBERT"):
        chinese.coverage(ENGLISH, 64).check("chinese")
    with pytest.raises(DataError, match=r"seems to be English.*the texts Chinese.*chinese-roberta-wwm-ext"):
        english.coverage(CHINESE, 64).check("english")
    english.coverage(ENGLISH, 64).check("english")
    # The published Chinese vocabularies know single Latin letters: nothing is unknown, and nothing is understood.
    letters = sorted(set("".join(ENGLISH).lower()) - {" "})
    spelling = Tokenizer(
        [*chinese.vocabulary, *(c for c in letters if c not in chinese.vocabulary), *(f"##{c}" for c in letters)]
    )
    found = spelling.coverage(ENGLISH, 64)
    assert found.unknown_share == 0
    assert "pieces a word" in (found.fault() or "")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "has no vocabulary"),
        ({"vocab.txt": "a\nb\n"}, "lacks .PAD."),
        ({"vocab.txt": "[UNK]\n[PAD]\n[CLS]\n[SEP]\n"}, "must be its first line"),
        ({"vocab.txt": b"\xff\xfe"}, "not UTF-8"),
        ({"vocab.txt": "\n".join(SPECIAL), "tokenizer_config.json": "{"}, "cannot be read"),
        ({"vocab.txt": "\n".join(SPECIAL), "tokenizer_config.json": '{"do_lower_case": 3}'}, "true or false"),
    ],
)
def test_a_text_encoder_without_its_vocabulary(tmp_path: Path, files: dict[str, str | bytes], said: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=said):
        Tokenizer.from_folder_or_name(tmp_path)


def test_a_name_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: (_ for _ in ()).throw(OSError("offline")))
    with pytest.raises(UserError, match=r"neither a folder here nor a name the hub gives us \(offline\)"):
        Tokenizer.from_folder_or_name("no/such")


def test_too_small_a_vocabulary() -> None:
    with pytest.raises(UserError, match="letters of these texts alone take"):
        Tokenizer.from_texts(ENGLISH, 20)
    with pytest.raises(UserError, match="no words"):
        Tokenizer.from_texts(["", " "], 20)
