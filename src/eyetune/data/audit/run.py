"""The audit itself: read, look, compare, judge."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from eyetune.data.audit import judge
from eyetune.data.audit.copies import AGREE, Link, find_copies
from eyetune.data.audit.looks import Look, Looker, Seen
from eyetune.data.audit.reading import Sheet, check_comparable, read_sheets
from eyetune.data.audit.rows import KINDS, Entry, Group, entries_of, make_group, same_scale
from eyetune.data.cache import Cache
from eyetune.data.config import DataConfig
from eyetune.data.identical import join
from eyetune.findings import Finding, Report, Status, carry_out

_UNOPENED = ("unnamed", "missing", "ambiguous")


@dataclass(frozen=True)
class Audit:
    """What was found in some tables.

    Attributes:
        sheets: the tables as they are.
        entries: every row of all of them; positions below are positions in this list.
        looks: by position, of the images that could be decoded.
        links: every two rows that show one photograph.
        groups: rows that show one photograph; those of a looser kind hold those of a stricter.
        unreadable, blank, labels, splits: what is wrong with single rows, by position.
        report: the findings.
    """

    sheets: Sequence[Sheet]
    entries: Sequence[Entry]
    looks: Mapping[int, Look]
    links: Sequence[Link]
    groups: Sequence[Group]
    unreadable: Mapping[int, str]
    blank: Sequence[int]
    labels: Mapping[int, str]
    unlabelled: Sequence[int]
    splits: Mapping[int, str]
    report: Report


def audit(
    sources: Sequence[DataConfig],
    *,
    threads: int = 1,
    cache: Cache | None = None,
    patients_apart: bool = False,
    say: Callable[[Finding], None] = lambda finding: None,
    start: Callable[[str], None] = lambda line: None,
) -> Audit:
    """Look at every image of some tables, and at the tables, and say what would make a result wrong.

    Args:
        sources: table or folder, images, columns and classes of each.
        threads: images at a time.
        cache: where looks are kept; None keeps none.
        patients_apart: each table numbers its own patients: the same number in two tables is not one patient.
        say: takes each finding as it is made.
        start: takes the line that says what is looked at.

    Raises DataError for what is no table at all.
    """
    sheets = read_sheets(sources)
    if patients_apart:
        sheets = [_own_patients(sheet) for sheet in sheets]
    entries = entries_of(sheets)
    faults = {(number, index): found for number, sheet in enumerate(sheets) for index, found in sheet.faults.items()}
    places = [(number, index) for number, sheet in enumerate(sheets) for index in range(len(sheet.records))]

    def of_kind(*kinds: str) -> dict[int, str]:
        """The faults of some kinds by position, in words."""
        return {
            at: "; ".join(fault.said for fault in faults[place] if fault.kind in kinds)
            for at, place in enumerate(places)
            if any(fault.kind in kinds for fault in faults.get(place, ()))
        }

    line = ", ".join(f"{sheet.name} ({len(sheet.records)} rows)" for sheet in sheets)
    start(line)
    seen = _look(entries, of_kind(*_UNOPENED), Looker(cache, sources[0].bits), threads)
    looks = {at: one.look for at, one in seen.items() if one.look is not None}
    unreadable = of_kind(*_UNOPENED) | {at: _short(one.fault) for at, one in seen.items() if one.look is None}
    unreadable = dict(sorted(unreadable.items()))
    blank_finding, blank = judge.blank(entries, looks)
    links = _links(entries, seen, looks, set(blank), threads)
    groups = _group(entries, links, same_scale(sheets))
    labels, unlabelled, splits = of_kind("label"), list(of_kind("unlabelled")), of_kind("split")
    notes = check_comparable(sheets)
    counts = judge.class_counts(entries, sheets)
    findings: list[Finding] = []
    for name, check in (
        ("files", lambda: judge.files(entries, unreadable)),
        ("blank", lambda: blank_finding),
        ("field", lambda: judge.field(entries, looks, blank)),
        ("sizes", lambda: judge.sizes(entries, looks)),
        ("labels", lambda: judge.labels(entries, labels, unlabelled)),
        ("conflicts", lambda: judge.conflicts(entries, _widest(groups), notes)),
        ("classes", lambda: judge.classes(counts)),
        ("splits", lambda: judge.splits(entries, splits)),
        ("patients", lambda: judge.patients(entries)),
        ("identical", lambda: judge.copies(entries, groups, "bytes", len(seen))),
        ("re-encoded", lambda: judge.copies(entries, groups, "pixels", len(looks))),
        ("near copies", lambda: judge.copies(entries, groups, "near", len(looks))),
    ):
        findings.append(carry_out(name, check))
        say(findings[-1])
    details = _details(sheets, entries, links, groups)
    report = Report("audit", line, findings, details=details)
    return Audit(sheets, entries, looks, links, groups, unreadable, blank, labels, unlabelled, splits, report)


def _own_patients(sheet: Sheet) -> Sheet:
    records = tuple(
        record if record.patient is None else replace(record, patient=f"{sheet.name}\0{record.patient}")
        for record in sheet.records
    )
    return replace(sheet, records=records)


def _look(entries: Sequence[Entry], unopened: Mapping[int, str], looker: Looker, threads: int) -> dict[int, Seen]:
    """What became of every file that there is, by position; a file that several rows name is looked at once."""
    paths = {at: entry.record.image for at, entry in enumerate(entries) if at not in unopened}
    once = list(dict.fromkeys(paths.values()))
    found = dict(zip(once, looker.all(once, threads), strict=True))
    return {at: found[path] for at, path in paths.items()}


def _short(fault: str) -> str:
    """The reader's message without the folder the file is in: the row says which it is."""
    path, colon, why = fault.partition(": ")
    return why.rstrip(".") if colon and ("/" in path or "\\" in path) else fault.rstrip(".")


def _links(
    entries: Sequence[Entry], seen: Mapping[int, Seen], looks: Mapping[int, Look], without: set[int], threads: int
) -> list[Link]:
    order = sorted(seen)
    place = {at: index for index, at in enumerate(order)}
    compared = {place[at]: look for at, look in looks.items() if at not in without}
    # A blank picture is no photograph of anybody: it is compared with nothing, not even by its bytes.
    digests = [b"" if at in without else seen[at].digest for at in order]
    links = find_copies([entries[at].record.image for at in order], compared, digests, threads)
    return [Link(order[one.first], order[one.second], one.kind, one.agreement, one.how) for one in links]


def _group(entries: Sequence[Entry], links: Sequence[Link], compared: Callable[[int, int], bool]) -> list[Group]:
    """Groups of each kind: of the same bytes; with the same pixels joined; with near copies joined."""
    groups = []
    allowed: set[str] = set()
    for kind in KINDS:
        allowed.add(kind)
        here = [link for link in links if link.kind in allowed]
        new = {at for link in here if link.kind == kind for at in (link.first, link.second)}
        told: dict[int, list[str]] = {}
        for link in here:
            if link.kind == "near":
                told.setdefault(link.first, []).append(f"{link.how} ({link.agreement:.2f})")
        for rows in join(len(entries), ((link.first, link.second) for link in here)):
            if new & set(rows):
                ways = list(dict.fromkeys(words for at in rows for words in told.get(at, ())))
                how = "; ".join([*ways[:3], *(["…"] if len(ways) > 3 else [])])
                groups.append(make_group(entries, rows, kind, how if kind == "near" else "", compared))
    return groups


def _widest(groups: Sequence[Group]) -> list[Group]:
    """The groups that no other holds. Looser kinds come later, and hold stricter ones whole."""
    last = {row: group for group in groups for row in group.rows}
    return [group for group in groups if last[group.rows[0]] is group]


def _details(
    sheets: Sequence[Sheet], entries: Sequence[Entry], links: Sequence[Link], groups: Sequence[Group]
) -> dict[str, Any]:
    def row(at: int) -> dict[str, Any]:
        entry = entries[at]
        table = sheets[entry.sheet].name
        named = {"table": table, "row": entry.record.row, "image": entry.record.name}
        return {**named, "part": entry.part, "label": entry.label}

    return {
        "tables": [
            {
                "table": sheet.source,
                "rows": len(sheet.records),
                "images": None if sheet.root is None else str(sheet.root),
                "classes": list(sheet.classes),
                "labels": sheet.label,
                "notes": list(sheet.notes),
            }
            for sheet in sheets
        ],
        "groups": [
            {
                "kind": group.kind,
                "how": group.how,
                "conflicting": group.conflicting,
                "crossing": group.crossing,
                "not_split_yet": group.unsplit,
                "rows": [row(at) for at in group.rows],
            }
            for group in groups
        ],
        "links": [
            {
                "rows": [entries[link.first].record.row, entries[link.second].record.row],
                "kind": link.kind,
                "agreement": link.agreement,
                "how": link.how,
            }
            for link in links
        ],
        "thresholds": {
            "agreement": AGREE,
            "imbalance": judge.IMBALANCE,
            "blank": judge.BLANK,
            "field": judge.FIELD,
            "pixels": judge.PIXELS,
        },
        "research_use_only": True,
    }


def verdict(found: Audit) -> str:
    """One line: what failed, if anything."""
    failed = [finding.name for finding in found.report.findings if finding.status == Status.FAIL]
    if failed:
        return f"audit: results on this data would be biased or wrong: {', '.join(failed)}"
    return "audit passed: nothing found that would bias a result"
