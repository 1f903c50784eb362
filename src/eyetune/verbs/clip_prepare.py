"""`eyetune clip prepare`: from photographs and texts to pairs that image-text training reads."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

from eyetune import __version__
from eyetune.data.config import Contrast
from eyetune.data.pairs.sample import EyeTexts, Problems, Repeats
from eyetune.errors import UserError, plural
from eyetune.flags import Switch, Workers
from eyetune.interrupt import Interrupted

if TYPE_CHECKING:
    from eyetune.clip.tokens import Coverage
    from eyetune.data.pairs.dataset import PhotoDataset
    from eyetune.data.pairs.encode import Encoder
    from eyetune.data.pairs.plan import Plan

Share = Annotated[float, Parameter(validator=Number(gte=0, lt=1))]


@Parameter(name="*")
@dataclass(frozen=True)
class ColumnNames:
    """Columns that have no usual name; "none" for a column that is not to be used."""

    patient_column: str | None = None
    """Column of the patient."""
    eye_column: str | None = None
    """Column that says left or right."""
    image_column: str | None = None
    """Column of the image names; with --dataset, the dataset's column of images."""
    left_column: str | None = None
    """Column of the left eye's image."""
    right_column: str | None = None
    """Column of the right eye's image."""
    text_column: Annotated[tuple[str, ...], Parameter(negative=())] = ()
    """Column of the text; may be given several times."""
    label_column: str | None = None
    """Column of the label that belongs to the text."""
    split_column: str | None = None
    """Column that says train, val or test."""
    index_column: str | None = None
    """Column that counts in --dataset."""


@Parameter(name="*")
@dataclass(frozen=True)
class Pictures:
    """How photographs are prepared."""

    pixels: Annotated[int, Parameter(validator=Number(gte=32, lte=4096))] | None = None
    """Side of the square images (default: 256, with a margin for random crops of 224)."""
    quality: Annotated[int, Parameter(validator=Number(gte=1, lte=100))] = 95
    """Of the JPEG files, 1 to 100."""
    crop: bool = True
    """Crop to the field of view."""
    contrast: Contrast = "none"
    """none, clahe or ben-graham."""
    bits: Annotated[int, Parameter(validator=Number(gte=9, lte=16))] | None = None
    """Bits that gray images of more than 8 bits use, 9 to 16 (default: what the file says, else 16)."""


@Parameter(name="*")
@dataclass(frozen=True)
class Cutting:
    """What is cut from train where the tables have no such split."""

    val_share: Share = 0.1
    """Share of the patients for validation."""
    test_share: Share = 0.1
    """Share of the patients for the test."""
    validate_on_test: Switch = False
    """Cut no validation split: the test stands for it. Reports will warn that scores are too good."""
    seed: int = 0
    """Another seed cuts other patients."""


_NAMES, _PICTURES, _CUTTING = ColumnNames(), Pictures(), Cutting()


def command(
    table: Path,
    *,
    out: Path,
    val: Path | None = None,
    test: Path | None = None,
    split: Literal["train", "val", "test"] | None = None,
    images: Path | None = None,
    dataset: str | None = None,
    dataset_split: str | None = None,
    eye_texts: EyeTexts = "join",
    repeats: Repeats = "refuse",
    skip_broken: Switch = False,
    text_encoder: str | None = None,
    length: Annotated[int, Parameter(validator=Number(gte=3, lte=512))] = 64,
    any_vocabulary: Switch = False,
    columns: ColumnNames = _NAMES,
    pictures: Pictures = _PICTURES,
    cutting: Cutting = _CUTTING,
    workers: Workers = "auto",
) -> None:
    """Prepare photographs and texts for image-text training, in the layout of RET-CLIP.

    Writes train_imgs.tsv, train_texts.jsonl, lmdb/train (and val, test) and prepare.json. Interrupted, the same command
    goes on where it stopped. Reads tables with a row a patient (left and right image), a row an eye (image, patient,
    eye), a row an image of a Hugging Face dataset (dataset_index), or a folder of RET-CLIP's own tables.

    Args:
        table: CSV, TSV or JSONL, or a folder with train_imgs.tsv and train_texts.jsonl.
        out: Folder to write.
        val: Table of the validation split (default: a split column, or cut from train by patient).
        test: Table of the test split (default: likewise).
        split: All of TABLE is this split, and nothing is cut: train, val or test, a folder for this one alone.
        images: Folder of the images that the tables name.
        dataset: Hugging Face dataset that dataset_index counts in: a folder, or a name on the hub (streamed; HF_TOKEN).
        dataset_split: The dataset's split it counts in (default: the one of the same name, or the only one).
        eye_texts: Texts about one eye: join (one text about both), each (two texts of the patient), or apart (every
            eye is a sample of its own).
        repeats: Further photographs of a patient: refuse, first (only the first pair), or each (a sample a pair).
        skip_broken: Leave out what cannot be used, instead of refusing: listed in problems.csv.
        text_encoder: Folder or hub name of the text encoder: measures whether its vocabulary knows the texts.
        length: Tokens a text may take.
        any_vocabulary: Go on with a vocabulary that does not fit the texts.
        columns: Columns by name.
        pictures: How photographs are prepared.
        cutting: What is cut from train.
        workers: Photographs at a time; auto chooses by the number of processors.
    """
    from eyetune.data.pairs.dataset import PhotoDataset
    from eyetune.data.pairs.encode import Encoder, ImageSettings
    from eyetune.data.pairs.finish import finished
    from eyetune.data.pairs.journal import NAME
    from eyetune.data.pairs.plan import Shares, cut
    from eyetune.data.pairs.write import require_lmdb

    require_lmdb()
    opened = None
    tables = {"table": table, "val": val, "test": test}
    _check_alone(split, tables, cutting)
    if table.is_dir():
        plan = _read_folder(tables, out, dataset)
    else:
        if dataset is not None:
            opened = PhotoDataset(dataset, column=columns.image_column, split=dataset_split)
        plan = _read_tables(tables, images, opened, columns, split=split, eye_texts=eye_texts, repeats=repeats)
    plan.problems.refuse(plan.source, skip=skip_broken, repeats=repeats)
    cut(
        plan,
        Shares(cutting.val_share, cutting.test_share, cutting.validate_on_test, cutting.seed),
        alone=split is not None,
    )
    for note in plan.notes:
        print(note)
    coverage = _cover(plan, text_encoder, length, any_vocabulary=any_vocabulary)
    settings = ImageSettings(**{**asdict(pictures), "pixels": pictures.pixels or ImageSettings.pixels})
    encoder = Encoder(settings, opened, as_they_are=table.is_dir() and pictures.pixels is None)
    keys = encoder.keys(plan.sources())
    fingerprint = plan.fingerprint(keys)
    if finished(out, fingerprint, plan.splits):
        (out / NAME).unlink(missing_ok=True)  # of a process that was killed when it was all but done
        print(f"{out} is prepared already, from these photographs and texts and in this way.")
        return
    report = {
        "eyetune": __version__,
        "fingerprint": fingerprint,
        "sources": {name: str(path) for name, path in tables.items() if path is not None},
        "dataset": dataset,
        "settings": {
            **asdict(settings),
            "as_they_are": encoder.as_they_are,
            "eye_texts": eye_texts,
            "repeats": repeats,
            "skip_broken": skip_broken,
            **asdict(cutting),
        },
        "validation": "test" if cutting.validate_on_test else "val" if "val" in plan.splits else None,
        "coverage": None if coverage is None else {"text_encoder": text_encoder, **asdict(coverage)},
        "notes": plan.notes,
    }
    _prepare(out, plan, encoder, report, skip=skip_broken, workers=_threads(workers))


def _check_alone(split: str | None, tables: dict[str, Path | None], cutting: Cutting) -> None:
    """Raise UserError where `--split` is said of more than one table."""
    table = tables["table"]
    assert table is not None
    if split is not None and (table.is_dir() or tables["val"] or tables["test"] or cutting.validate_on_test):
        raise UserError(
            f"--split {split}: all of one table is of this split. Leave out --val, --test and --validate-on-test; a "
            "folder of tables has its own splits."
        )


def _read_folder(tables: dict[str, Path | None], out: Path, dataset: str | None) -> Plan:
    """The samples of a folder of RET-CLIP's tables, and what is amiss with them."""
    from eyetune.data.pairs.plan import Plan, read_layout

    folder, problems = tables["table"], Problems()
    assert folder is not None
    if others := [f"--{name}" for name in ("val", "test") if tables[name] is not None]:
        raise UserError(f"{folder} is a folder of tables with its own splits: leave out {', '.join(others)}.")
    if dataset is not None:
        raise UserError(f"{folder} is a folder of tables that hold their images: leave out --dataset.")
    if out.resolve() == folder.resolve():
        raise UserError(f"--out {out} is the folder that is read; choose another.")
    samples = read_layout(folder, problems)
    if not samples and not problems:
        raise UserError(
            f"{folder} holds no train_imgs.tsv and train_texts.jsonl (RET-CLIP's tables). Give those, or a table as "
            "CSV, TSV or JSONL."
        )
    return Plan(samples, str(folder), problems)


def _read_tables(
    tables: dict[str, Path | None],
    images: Path | None,
    dataset: PhotoDataset | None,
    columns: ColumnNames,
    *,
    split: str | None,
    eye_texts: EyeTexts,
    repeats: Repeats,
) -> Plan:
    """The samples of all tables, and what is amiss with their rows."""
    from eyetune.data.pairs.plan import Plan
    from eyetune.data.pairs.reading import Wanted, read_table

    named = {part.removesuffix("_column"): name for part, name in asdict(columns).items()}
    wanted = Wanted(**{**named, "image": None if dataset is not None else columns.image_column})
    plan = Plan([], ", ".join(str(path) for path in tables.values() if path is not None), Problems())
    for name, path in tables.items():
        if path is not None:
            samples, notes = read_table(
                path,
                split=split if name == "table" else name,
                images=images,
                dataset=dataset,
                wanted=wanted,
                eye_texts=eye_texts,
                repeats=repeats,
                problems=plan.problems,
            )
            plan.samples += samples
            plan.notes += [f"{path}: {note}" for note in notes]
    return plan


def _cover(plan: Plan, text_encoder: str | None, length: int, *, any_vocabulary: bool) -> Coverage | None:
    """How well the encoder's vocabulary knows the texts. Raises DataError when it does not, unless that is accepted."""
    if text_encoder is None:
        plan.notes.append("no --text-encoder: whether its vocabulary knows these texts was not measured")
        return None
    from eyetune.clip.tokens import Tokenizer

    texts = list(dict.fromkeys(text for sample in plan.samples for text, _ in sample.texts))
    coverage = Tokenizer.from_folder_or_name(text_encoder).coverage(texts, length)
    print(
        f"Vocabulary of {text_encoder}: {coverage.unknown_share:.1%} of the tokens are unknown, {coverage.pieces:.2f} "
        f"pieces a word; {coverage.truncated_share:.1%} of {plural(coverage.texts, 'text')} are longer than {length} "
        f"tokens (the longest: {coverage.longest})."
    )
    if not any_vocabulary:
        coverage.check(f"text encoder {text_encoder} (--any-vocabulary goes on all the same)")
    elif fault := coverage.fault():
        plan.warnings.append(fault)
    if coverage.truncated_share:
        plan.warnings.append(
            f"{coverage.truncated_share:.1%} of the texts are longer than {length} tokens and lose their end in "
            "training"
        )
    return coverage


def _prepare(out: Path, plan: Plan, encoder: Encoder, report: dict[str, Any], *, skip: bool, workers: int) -> None:
    """Prepare the photographs, then write everything. What is done is kept when this is interrupted or refused."""
    from eyetune.data.pairs.encode import OUTSIDE, encode
    from eyetune.data.pairs.finish import PROBLEMS, write_all
    from eyetune.data.pairs.journal import Journal

    with Journal.open(out) as journal:
        try:
            keys, faults = encode(plan.sources(), encoder, journal, workers)
            splits = plan.splits
            plan.without(faults, OUTSIDE)
            if faults and not skip:
                plan.problems.write(out / PROBLEMS)
                plan.problems.refuse(
                    f"{plan.source} (all of it in {out / PROBLEMS}; what was prepared is kept)", skip=False
                )
            if lost := [split for split in splits if split not in plan.splits]:
                raise UserError(f"{plan.source}: nothing is left of {', '.join(lost)}:\n{plan.problems.said()}")
            write_all(out, plan, keys, journal, report)
        except Interrupted as stop:
            said = f"{plural(len(journal), 'photograph')} are prepared in {out}; the same command goes on there."
            raise Interrupted(said, stop.signum, stop.again) from None
        journal.delete()
    _say(out, plan)


def _say(out: Path, plan: Plan) -> None:
    from eyetune.data.pairs.finish import PROBLEMS
    from eyetune.data.pairs.plan import texts_of

    for split in plan.splits:
        samples = plan.of(split)
        texts, _ = texts_of(samples)
        single = sum(sample.single is not None for sample in samples)
        print(
            f"{split}: {plural(len({sample.group for sample in samples}), 'patient')}, "
            f"{plural(len(samples), 'pair')} of eyes{f' ({single} with one eye for both)' if single else ''}, "
            f"{plural(len(texts), 'text')}, {plural(sum(len(text.patients) for text in texts), 'sample')}"
        )
    if plan.problems:
        counted = ", ".join(f"{kind.replace('_', ' ')} {count}" for kind, count in plan.problems.counts().items())
        print(f"Left out ({counted}): {out / PROBLEMS}")
    for warning in plan.warnings:
        print(f"Warning: {warning}.")
    print(f"Pairs in {out / 'lmdb'}; what was done is in {out / 'prepare.json'}.")


def _threads(workers: Workers) -> int:
    import os

    if workers != "auto":
        return max(1, workers)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
