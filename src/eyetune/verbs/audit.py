"""`eyetune data audit` and `eyetune data split`: what would make a result wrong, and splits that do not."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from eyetune.data.config import DataConfig
from eyetune.errors import DataError, UserError, plural
from eyetune.flags import Switch, Workers, table_and_images

if TYPE_CHECKING:
    from rich.table import Table

    from eyetune.data.audit.fix import Drop
    from eyetune.data.audit.run import Audit
    from eyetune.findings import Finding

PROBLEMS_FOUND = 1

Share = Annotated[float, Parameter(validator=Number(gte=0, lt=1))]
Bits = Annotated[int, Parameter(validator=Number(gte=9, lte=16))]


def audit(
    *tables: str,
    images: Path | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    patient_column: str | None = None,
    eye_column: str | None = None,
    split_column: str | None = None,
    classes: str | None = None,
    patients_apart: Switch = False,
    fix: Path | None = None,
    out: Path | None = None,
    bits: Bits | None = None,
    workers: Workers = "auto",
    no_cache: Switch = False,
) -> int:
    """Look at every photograph and every row, and say what would make a result wrong.

    Files that are missing, unreadable, blank or hardly a fundus; labels that make no sense or contradict each other;
    class balance; patients in two splits; the same photograph twice: identical, re-encoded, resized, recompressed,
    cropped, flipped. Several tables are compared with each other, too. Writes audit.json and audit.html.
    Exit code 1: something would bias a result. See docs/audit.md.

    Args:
        tables: Tables, class folders or hf:NAME; TABLE:IMAGES names the folder of the images.
        images: Folder of the images, for tables that do not name one.
        image_column: Column of the image names (default: the usual names).
        label_column: Column of the labels (default: the usual names; "none": no labels).
        patient_column: Column of the patients (default: patient or patient_id; "none": none).
        eye_column: Column with left or right (default: eye or laterality).
        split_column: Column with train, val or test (default: split; "none": none).
        classes: The classes in order, separated by commas (default: 0..K-1, or the names found).
        patients_apart: Each table numbers its own patients: the same number in two is not one patient.
        fix: Write the table without the rows that have to go, to this file (several tables: into this folder), and
            which rows went and why beside it.
        out: Folder for audit.json and audit.html (default: the first table's name with -audit behind it).
        bits: Bits that gray images of more than 8 bits use.
        workers: Images at a time; auto chooses by the number of processors.
        no_cache: Keep nothing of what was looked at.
    """
    from eyetune.data.audit import page
    from eyetune.data.audit.fix import check_outputs, choose_drops, write_drops, write_sheet
    from eyetune.data.audit.reading import read_sheets
    from eyetune.data.audit.run import verdict
    from eyetune.terminal import show

    if not tables:
        raise UserError("nothing to look at: name a table, a class folder or hf:NAME. See --help.")
    columns = _columns(image_column, label_column, patient_column, eye_column, split_column)
    configs = [_config(word, images, columns, classes, bits) for word in tables]
    folder = out or Path(f"{_stem(configs[0].table)}-audit")
    _check_folder(folder)
    sheets = read_sheets(configs)
    outputs = _outputs(fix, [sheet.source for sheet in sheets])
    dropped = _dropped_file(fix, len(sheets))
    if dropped is not None:
        check_outputs(sheets, outputs, dropped)
    found = _audit(configs, workers, no_cache, patients_apart)
    counted = _class_table(found)
    if counted is not None:
        show(counted)
    drops: list[Drop] = choose_drops(found) if fix else []
    if dropped is not None:
        for number, file in outputs.items():
            rows = _rows_of(found, number, drops)
            left = write_sheet(found.sheets[number], rows, file)
            print(f"{file}: {left} of {len(found.sheets[number].records)} rows")
        write_drops(found, drops, dropped)
        _say_drops(found, drops, dropped)
        print(f"Audit it again: eyetune data audit {_again(found, outputs)}")
    report = found.report.write(folder)
    command = shlex.join(["eyetune", "data", "audit", *tables])
    shown = page.write(found, folder / "audit.html", drops=drops, command=command)
    print(f"{verdict(found)}. {report}, {shown}")
    return 0 if found.report.passed else PROBLEMS_FOUND


def split(
    table: str,
    *,
    out: Path,
    val: Share = 0.1,
    test: Share = 0.1,
    seed: int = 0,
    images: Path | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    patient_column: str | None = None,
    split_column: str | None = None,
    classes: str | None = None,
    bits: Bits | None = None,
    workers: Workers = "auto",
    no_cache: Switch = False,
) -> int:
    """Write a table with a column of splits that pass the audit.

    Patients stay whole, copies of a photograph (identical, re-encoded, altered) stay on one side, with all rows of
    their patients, and the classes keep their proportions. Splits that the table has stay; a missing val or test is
    cut from train. Rows that cannot be used are left out and listed: unreadable, blank, without a sensible label,
    contradicting a copy, or already in two splits.

    Args:
        table: A table, class folder or hf:NAME; TABLE:IMAGES names the folder of the images.
        out: Table to write: the same columns and rows, and the split.
        val: Share of the images for validation.
        test: Share of the images for the test.
        seed: Another seed, another cut.
        images: Folder of the images.
        image_column: Column of the image names (default: the usual names).
        label_column: Column of the labels (default: the usual names).
        patient_column: Column of the patients (default: patient or patient_id; "none": none).
        split_column: Column with train, val or test (default: split; "none": cut new splits).
        classes: The classes in order, separated by commas (default: 0..K-1, or the names found).
        bits: Bits that gray images of more than 8 bits use.
        workers: Images at a time; auto chooses by the number of processors.
        no_cache: Keep nothing of what was looked at.
    """
    from eyetune.data.audit.fix import check_outputs, choose_drops, write_drops, write_sheet
    from eyetune.data.audit.reading import read_sheets
    from eyetune.data.identical import join
    from eyetune.data.records import Manifest
    from eyetune.data.splits import split as cut

    config = _config(
        table, images, _columns(image_column, label_column, patient_column, None, split_column), classes, bits
    )
    if val + test >= 1:
        raise UserError(f"--val and --test must leave something to train on, but {val:g} + {test:g} >= 1.")
    dropped = _dropped_file(out, 1)
    assert dropped is not None
    sheets = read_sheets([config])
    check_outputs(sheets, {0: out}, dropped)
    found = _audit([config], workers, no_cache, patients_apart=False, quiet=True)
    sheet = found.sheets[0]
    drops = choose_drops(found, uncut=True)
    gone = {one.at for one in drops}
    left = [at for at in range(len(sheet.records)) if at not in gone]
    place = {at: index for index, at in enumerate(left)}
    if sheet.label is None:
        raise DataError(f"{table}: no labels to split by; name their column with --label-column.")
    manifest = Manifest(tuple(sheet.records[at] for at in left), sheet.classes, sheet.source)
    pairs = [(link.first, link.second) for link in found.links]
    groups = join(len(sheet.records), pairs)
    together = [[place[at] for at in group if at in place] for group in groups]
    result = cut(manifest, val, test, seed, together=[group for group in together if len(group) > 1])
    splits: list[str | None] = [None] * len(sheet.records)
    for at, record in zip(left, result, strict=True):
        splits[at] = record.split
    rows = write_sheet(sheet, gone, out, splits)
    write_drops(found, drops, dropped)
    for note in result.notes:
        print(note)
    kept = sum(len(group) > 1 for group in together)
    print(
        f"{out}: {rows} of {len(sheet.records)} rows" + (f"; {kept} groups of copies kept on one side" if kept else "")
    )
    if sheet.split_column is None and any("split" in record.extra for record in sheet.records):
        print("the column split of the table was replaced")
    _say_drops(found, drops, dropped)
    print(f"Audit it: eyetune data audit {_again(found, {0: out})}")
    return 0


def _columns(
    image: str | None, label: str | None, patient: str | None, eye: str | None, split_: str | None
) -> dict[str, str | None]:
    return {
        "image_column": image,
        "label_column": label,
        "patient_column": patient,
        "eye_column": eye,
        "split_column": split_,
    }


def _config(
    word: str, images: Path | None, columns: dict[str, str | None], classes: str | None, bits: int | None
) -> DataConfig:
    table, own = table_and_images(word)
    names = None if classes is None else tuple(name.strip() for name in classes.split(","))
    if names is not None and (len(names) < 2 or len(set(names)) < len(names)):
        raise UserError(f"--classes takes two names or more, each once, separated by commas; got {classes!r}.")
    return DataConfig(table=table, images=own or images, classes=names, bits=bits, **columns)


def _stem(table: str) -> str:
    """What the outputs are called after: a table by its name, or by its folder where its name says nothing."""
    path = Path(table.removeprefix("hf:")).resolve()
    if path.is_dir() or path.stem.lower() not in ("labels", "table", "data"):
        return path.stem if not path.is_dir() else path.name
    return path.parent.name or path.stem


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: choose another --out for the report.")


def _outputs(fix: Path | None, sources: Sequence[str]) -> dict[int, Path]:
    """The cleaned table of each source, by position."""
    if fix is None:
        return {}
    if len(sources) == 1:
        return {0: fix}
    if fix.suffix.lower() in (".csv", ".tsv", ".jsonl", ".ndjson", ".tab", ".txt"):
        raise UserError(f"--fix {fix}: {len(sources)} tables are written into a folder; name one, such as cleaned.")
    if fix.exists() and not fix.is_dir():
        raise UserError(f"--fix {fix} is a file: {len(sources)} tables are written into a folder.")
    names = [Path(source.removeprefix("hf:")) for source in sources]
    return {number: fix / (name.name if name.is_file() else f"{name.name}.csv") for number, name in enumerate(names)}


def _dropped_file(fix: Path | None, tables: int) -> Path | None:
    if fix is None:
        return None
    return fix.with_name(f"{fix.stem}-dropped.csv") if tables == 1 else fix / "dropped.csv"


def _audit(
    configs: Sequence[DataConfig], workers: Workers, no_cache: bool, patients_apart: bool, quiet: bool = False
) -> Audit:
    from eyetune import processes
    from eyetune.data.audit.run import audit as look
    from eyetune.data.cache import Cache
    from eyetune.data.readable import choose_workers
    from eyetune.findings import lines

    if processes.count() > 1:
        raise UserError("audit works in one process: run it without torchrun or accelerate launch.")

    def say(finding: Finding) -> None:
        if not quiet:
            print("\n".join(lines(finding)), flush=True)

    def start(line: str) -> None:
        if not quiet:
            print(f"audit: {line}", flush=True)

    return look(
        configs,
        threads=max(1, choose_workers(workers, 10**6)),
        cache=None if no_cache else Cache.of(configs[0]),
        patients_apart=patients_apart,
        say=say,
        start=start,
    )


def _class_table(found: Audit) -> Table | None:
    """Counts and shares by class and part."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from eyetune.data.audit.judge import class_counts

    counts = class_counts(found.entries, found.sheets)
    names = list(dict.fromkeys(name for of in counts.values() for name in of))
    if not names or len(names) > 20:
        return None
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("class")
    for part in counts:
        table.add_column(part or "all", justify="right")
    for name in names:
        cells = [
            f"{of[name]} ({of[name] / max(1, sum(of.values())):.1%})" if name in of else "" for of in counts.values()
        ]
        table.add_row(name, *cells)
    return table


def _rows_of(found: Audit, sheet: int, drops: Sequence[Drop]) -> set[int]:
    """The dropped rows of one sheet, by their position in it."""
    before = sum(len(one.records) for one in found.sheets[:sheet])
    return {one.at - before for one in drops if found.entries[one.at].sheet == sheet}


def _say_drops(found: Audit, drops: Sequence[Drop], file: Path) -> None:
    """Every row that was left out, and why."""
    if not drops:
        print(f"no row had to go ({file})")
        return
    several = len(found.sheets) > 1
    for one in drops:
        entry = found.entries[one.at]
        table = f"{found.sheets[entry.sheet].name}: " if several else ""
        print(f"  left out: {table}{entry.record.row} ({entry.record.name}): {one.why}")
    kinds = Counter(one.why.partition(":")[0].partition(" as ")[0].partition(" is in ")[0] for one in drops)
    print(
        f"{plural(len(drops), 'row')} left out ({', '.join(f'{n} {kind}' for kind, n in kinds.most_common())}): {file}"
    )


def _again(found: Audit, outputs: dict[int, Path]) -> str:
    """The words that audit what was written, with the folders in which its images are."""
    words = []
    for number, file in outputs.items():
        root = found.sheets[number].root
        words.append(str(file) if root is None else f"{file}:{root}")
    return shlex.join(words)
