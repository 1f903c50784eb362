"""From texts to the numbers a BERT reads, and whether its vocabulary knows the words of these texts at all.

The same numbers as transformers' BertTokenizer, from the same files (vocab.txt, tokenizer_config.json), without
importing transformers. A text encoder whose vocabulary is of another language answers with [UNK], or with single
letters, and training on that learns nothing while looking well: :class:`Coverage` measures it before training does.
"""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eyetune.errors import DataError, MissingExtra, UserError
from eyetune.files import make_folder, write_json, write_text

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

VOCABULARY = "vocab.txt"
CONFIG = "tokenizer_config.json"
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MOST_UNKNOWN = 0.05
"""Share of unknown words above which texts and vocabulary do not fit together."""

_MOST_PIECES = 2.0
"""Pieces a word, in a language that writes words apart, above which words are spelled and not known."""

_LARGEST_VOCABULARY = 5_000_000
"""Bytes of vocab.txt. The largest published one, of a hundred languages, has a million."""

_QUOTES = str.maketrans({"“": '"', "”": '"'})

_SCRIPTS = (
    ("CJK", "Chinese"),
    ("HIRAGANA", "Japanese"),
    ("KATAKANA", "Japanese"),
    ("HANGUL", "Korean"),
    ("CYRILLIC", "Russian or another Cyrillic language"),
    ("ARABIC", "Arabic"),
    ("DEVANAGARI", "Hindi"),
    ("GREEK", "Greek"),
    ("HEBREW", "Hebrew"),
    ("THAI", "Thai"),
    ("LATIN", "English or another Latin language"),
)
"""What the Unicode name of a letter begins with, and the language it is taken for."""

MIXED = "several languages"

_REMEDIES = {
    "Chinese": "hfl/chinese-roberta-wwm-ext (RET-CLIP's own) or hfl/rbt3",
    "English or another Latin language": "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract (PubMedBERT), "
    "dmis-lab/biobert-base-cased-v1.2 or google-bert/bert-base-uncased",
}
_ANY_LANGUAGE = "google-bert/bert-base-multilingual-cased"


@dataclass(frozen=True)
class Coverage:
    """How well a vocabulary knows some texts.

    Attributes:
        texts: how many.
        words: words (or, in Chinese, characters) and punctuation marks in them.
        unknown_share: share of their tokens that are [UNK], 0..1; the frame of [CLS] and [SEP] is not counted.
        truncated_share: share of the texts that do not fit the length and lose their end.
        longest: tokens of the longest text, [CLS] and [SEP] included.
        pieces: tokens a word, on average. 1 to 2 is usual; above, words are spelled.
        unknown: the words that are unknown most often.
        language: of the texts, by their letters.
        vocabulary_language: of the vocabulary.
        length: the length meant by `truncated_share`.
    """

    texts: int
    words: int
    unknown_share: float
    truncated_share: float
    longest: int
    pieces: float
    unknown: tuple[str, ...]
    language: str
    vocabulary_language: str
    length: int

    def fault(self) -> str | None:
        """Why texts and vocabulary do not fit together, and what to use instead; None when they do."""
        spelled = self.pieces > _MOST_PIECES and self.language != self.vocabulary_language
        if self.unknown_share <= MOST_UNKNOWN and not spelled:
            return None
        if self.unknown_share > MOST_UNKNOWN:
            words = ", ".join(repr(word) for word in self.unknown[:5])
            said = (
                f"{self.unknown_share:.0%} of the tokens are unknown to it (at most {MOST_UNKNOWN:.0%} may be): {words}"
            )
        else:
            said = f"it knows no words of theirs and spells them: {self.pieces:.1f} pieces a word"
        advice = (
            "It is the same language, so look whether the vocabulary belongs to these texts"
            if self.language == self.vocabulary_language
            else f"Use a text encoder of their language: {_REMEDIES.get(self.language, _ANY_LANGUAGE)}"
        )
        return (
            f"the vocabulary does not fit the texts: {said}. The vocabulary seems to be {self.vocabulary_language}, "
            f"the texts {self.language}. {advice}; or train a vocabulary of your own on the texts."
        )

    def check(self, source: str) -> None:
        """Raise DataError, naming `source` (the text encoder), when texts and vocabulary do not fit together."""
        if fault := self.fault():
            raise DataError(f"{source}: {fault}")


class Tokenizer:
    """A WordPiece vocabulary and how text is cut before it; use :meth:`from_folder_or_name` or :meth:`from_texts`.

    Args:
        vocabulary: the tokens by their numbers; [PAD] is the first.
        lowercase: letters become small, and lose their accents, before anything else.
        source: where it came from, for messages.

    Raises UserError for a vocabulary that lacks [PAD], [UNK], [CLS] or [SEP], or has [PAD] elsewhere.

    Curly quotes become straight ones where the vocabulary has only those, as in RET-CLIP. Otherwise the numbers are
    those of transformers' BertTokenizer. May be pickled.
    """

    def __init__(self, vocabulary: Sequence[str], *, lowercase: bool = True, source: str = "vocabulary") -> None:
        missing = [token for token in SPECIAL[:4] if token not in set(vocabulary[:1000])]
        if missing:
            raise UserError(
                f"{source} is no vocabulary of a BERT: it lacks {', '.join(missing)} among its first thousand lines."
            )
        if vocabulary[0] != "[PAD]":
            raise UserError(f"{source}: [PAD] must be its first line, as in every published BERT.")
        self.vocabulary = tuple(vocabulary)
        self.lowercase = lowercase
        self.source = source
        numbers = {token: number for number, token in enumerate(self.vocabulary)}
        self.unknown, self.cls, self.sep = (numbers[token] for token in ("[UNK]", "[CLS]", "[SEP]"))
        self._straighten = "“" not in numbers or "”" not in numbers
        self._numbers = numbers

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_engine", "language", "fingerprint")}

    def __len__(self) -> int:
        """Tokens in the vocabulary."""
        return len(self.vocabulary)

    @classmethod
    def from_folder_or_name(cls, path: str | Path) -> Tokenizer:
        """Read vocab.txt, and tokenizer_config.json where there is one, of a local folder or of a name on the hub.

        Raises UserError when the folder lacks its vocabulary or it is none of a BERT; MissingExtra for a name on the
        hub without the package huggingface_hub.
        """
        folder = Path(path).expanduser()
        if not folder.is_dir():
            folder = _fetch(str(path))
        file = folder / VOCABULARY
        try:
            content = file.read_bytes()
        except FileNotFoundError:
            raise UserError(
                f"text encoder {str(path)!r} has no vocabulary ({VOCABULARY}): it belongs to the encoder as its "
                "weights do. Copy it from where the encoder came from."
            ) from None
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror}.") from None
        if len(content) > _LARGEST_VOCABULARY:
            raise UserError(f"{file} has {len(content):,} bytes: it is no vocabulary.")
        try:
            lines = content.decode("utf-8").replace("\r\n", "\n").removesuffix("\n").split("\n")
        except UnicodeDecodeError:
            raise UserError(f"{file} is not UTF-8 text.") from None
        return cls(lines, lowercase=_lowercase(folder / CONFIG), source=str(file))

    @classmethod
    def from_texts(cls, texts: Iterable[str], size: int) -> Tokenizer:
        """Train a WordPiece vocabulary of at most `size` tokens on `texts`; the same texts give the same vocabulary.

        (The trainer of `tokenizers` numbers letters as it meets them in a hash table, which differs from run to run
        and decides ties; here they are numbered beforehand.)

        Raises UserError when `size` is too small for the letters of the texts, MissingExtra without `tokenizers`.
        """
        engine = _new_engine({token: number for number, token in enumerate(SPECIAL)}, lowercase=True)
        lines = [text.translate(_QUOTES) for text in texts]
        words: Counter[str] = Counter()
        for line in lines:
            normal = engine.normalizer.normalize_str(line)
            words.update(word for word, _ in engine.pre_tokenizer.pre_tokenize_str(normal))
        if not words:
            raise UserError("there are no words to make a vocabulary of.")
        first = {word[0] for word in words}
        within = {letter for word in words for letter in word[1:]}
        letters = [*sorted(first | within), *(f"##{letter}" for letter in sorted(within))]
        if size < len(SPECIAL) + len(letters):
            raise UserError(
                f"a vocabulary of {size} tokens is too small: the letters of these texts alone take "
                f"{len(SPECIAL) + len(letters)}."
            )
        from tokenizers.trainers import WordPieceTrainer

        trainer = WordPieceTrainer(vocab_size=size, special_tokens=[*SPECIAL, *letters], show_progress=False)
        # Sorted: the trainer counts words, and their order must not matter either.
        engine.train_from_iterator(sorted(lines), trainer)
        numbers = engine.get_vocab()
        return cls(sorted(numbers, key=lambda token: numbers[token]), source="vocabulary made from the texts")

    def save(self, folder: str | Path) -> None:
        """Write vocab.txt and tokenizer_config.json into `folder`, as transformers reads them."""
        folder = Path(folder)
        make_folder(folder)
        write_text(folder / VOCABULARY, "".join(f"{token}\n" for token in self.vocabulary))
        write_json(folder / CONFIG, {"tokenizer_class": "BertTokenizer", "do_lower_case": self.lowercase})

    def encode(self, texts: Sequence[str], length: int) -> npt.NDArray[np.int64]:
        """The tokens of each text: int64[N, length], [CLS] … [SEP], padded with [PAD] (0), cut to `length`.

        Raises ValueError for a length below 3.
        """
        import numpy as np

        if length < 3:
            raise ValueError("a length of 3 holds one token between [CLS] and [SEP]")
        result = np.zeros((len(texts), length), dtype=np.int64)
        for row, ids in zip(result, self._ids(texts), strict=True):
            kept = ids[: length - 2]
            row[0], row[1 : 1 + len(kept)], row[1 + len(kept)] = self.cls, kept, self.sep
        return result

    def coverage(self, texts: Sequence[str], length: int) -> Coverage:
        """How well the vocabulary knows `texts`, when each may take `length` tokens."""
        unknown = tokens = words = truncated = longest = 0
        strange: Counter[str] = Counter()
        script: Counter[str] = Counter()
        for text, encoding in zip(texts, self._encodings(texts), strict=True):
            ids = encoding.ids
            tokens += len(ids)
            words += len({word for word in encoding.word_ids if word is not None})
            longest = max(longest, len(ids) + 2)
            truncated += len(ids) + 2 > length
            for number, (start, end) in zip(ids, encoding.offsets, strict=True):
                if number == self.unknown:
                    unknown += 1
                    strange[text[start:end]] += 1
            script.update(_letters(text))
        return Coverage(
            texts=len(texts),
            words=words,
            unknown_share=unknown / max(tokens, 1),
            truncated_share=truncated / max(len(texts), 1),
            longest=longest,
            pieces=tokens / max(words, 1),
            unknown=tuple(word for word, _ in sorted(strange.items(), key=lambda item: (-item[1], item[0]))[:10]),
            language=_language(script),
            vocabulary_language=self.language,
            length=length,
        )

    @cached_property
    def language(self) -> str:
        """The language the vocabulary seems to be of, by the letters of its tokens."""
        counts: Counter[str] = Counter()
        for token in self.vocabulary:
            letters = _letters(token.removeprefix("##")) if token not in SPECIAL else Counter()
            if letters and not token.startswith("[unused"):
                counts[letters.most_common(1)[0][0]] += 1
        return _language(counts)

    @cached_property
    def fingerprint(self) -> str:
        """Two tokenizers with the same fingerprint give the same numbers."""
        content = "\n".join((str(self.lowercase), *self.vocabulary))
        return hashlib.sha256(content.encode(errors="surrogatepass")).hexdigest()[:16]

    @cached_property
    def _engine(self) -> Any:
        return _new_engine(self._numbers, lowercase=self.lowercase)

    def _encodings(self, texts: Sequence[str]) -> list[Any]:
        # Quotes are single characters both ways, so that offsets stay those of the text.
        lines = [text.translate(_QUOTES) for text in texts] if self._straighten else list(texts)
        return self._engine.encode_batch(lines, add_special_tokens=False)

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._encodings(texts)]


def _new_engine(numbers: dict[str, int], *, lowercase: bool) -> Any:
    """A WordPiece tokenizer as BertTokenizer builds it, without its frame."""
    try:
        from tokenizers import Tokenizer as Engine
        from tokenizers import models, normalizers, pre_tokenizers
    except ImportError:
        raise MissingExtra("cutting texts into tokens", "clip") from None
    # Its threads would be waited for by forked workers, and a table of reports takes less than a second without.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    engine = Engine(models.WordPiece(numbers, unk_token=SPECIAL[1], max_input_chars_per_word=100))
    engine.normalizer = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=True, strip_accents=None, lowercase=lowercase
    )
    engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    engine.add_special_tokens([token for token in SPECIAL if token in numbers])
    return engine


def _lowercase(config: Path) -> bool:
    """What tokenizer_config.json says; True, as BertTokenizer assumes, where it says nothing."""
    try:
        found = json.loads(config.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return True
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{config} cannot be read ({error}). Copy it again from where the encoder came from.") from None
    value = found.get("do_lower_case", True) if isinstance(found, dict) else None
    if not isinstance(value, bool):
        raise UserError(f"{config}: do_lower_case must be true or false.")
    return value


def _fetch(name: str) -> Path:
    """The folder with the vocabulary of a name on the hub, from the cache where it is there."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise MissingExtra(f"text encoder {name!r} is no folder here, and fetching it from the hub", "hub") from None
    try:
        return Path(snapshot_download(name, allow_patterns=[VOCABULARY, CONFIG]))
    except Exception as error:  # the hub's, requests' and the cache's own errors
        said = str(error).split("\n", 1)[0][:200]
        raise UserError(
            f"text encoder {name!r} is neither a folder here nor a name the hub gives us ({said}). Give the folder "
            f"that holds its {VOCABULARY}, or its name on the hub."
        ) from error


def _letters(text: str) -> Counter[str]:
    """How many letters of each script a text has, by the languages of :data:`_SCRIPTS`."""
    found: Counter[str] = Counter()
    for letter, count in Counter(text).items():
        if letter.isalpha():
            name = unicodedata.name(letter, "")
            found[next((language for start, language in _SCRIPTS if name.startswith(start)), "")] += count
    found.pop("", None)
    return found


def _language(counts: Counter[str]) -> str:
    """The language most of what was counted is of; Chinese with some Latin is Chinese, as their vocabularies are."""
    total = sum(counts.values())
    if not total:
        return "none that was recognised"
    shares = {language: count / total for language, count in counts.items()}
    if sum(share > 0.03 for share in shares.values()) >= 4:
        return MIXED
    if shares.get("Japanese", 0) > 0.1:
        return "Japanese"
    if shares.get("Chinese", 0) > 0.2:
        return "Chinese"
    return max(shares, key=lambda language: shares[language])
