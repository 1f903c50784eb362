"""What was read and seen, as findings: each says what was measured and whether a result would be wrong because of it.

A finding fails where a score would come out wrong or a label is not to be believed; docs/audit.md lists each with its
threshold. Patients are counted, never named.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from eyetune.data.audit.looks import Look
from eyetune.data.audit.reading import Sheet
from eyetune.data.audit.rows import KINDS, Entry, Group, apart
from eyetune.errors import listing, plural
from eyetune.findings import Finding, Status

IMBALANCE = 10
"""A class this many times as frequent as another calls for balancing."""

FEWEST = 10
"""Fewer training images of a class than this teach little."""

BLANK = 8.0
"""Gray levels between the darkest and the brightest hundredth of the field of view, below which nothing is on it."""

FIELD = 0.25
"""Share of the picture that the field of view must take."""

PIXELS = 224
"""Shorter side below which most backbones enlarge the picture."""

_MOST_CLASSES = 20
"""Classes that are counted on one line."""

LONGEST = 2.0
"""Longer by shorter side, above which a picture is hardly one fundus."""


# -- files and pictures ------------------------------------------------------------------------------------------------


def files(entries: Sequence[Entry], faults: Mapping[int, str]) -> Finding:
    """Whether every row names a file that can be decoded. `faults` by the row's position."""
    values = {"rows": len(entries), "faults": [{"row": entries[i].record.row, "why": why} for i, why in faults.items()]}
    if not faults:
        return Finding(Status.PASS, f"all {len(entries)} images can be decoded", values=values)
    shown = listing(f"{entries[i].record.row}: {why}" for i, why in faults.items())
    return Finding(
        Status.FAIL,
        f"{len(faults)} of {len(entries)} images are missing or cannot be read:\n{shown}",
        "Replace them, or take their rows out of the table (--fix).",
        values,
    )


def blank(entries: Sequence[Entry], looks: Mapping[int, Look]) -> tuple[Finding, list[int]]:
    """Pictures with nothing on them, and their positions."""
    found = [index for index, look in looks.items() if look.spread < BLANK]
    values = {"blank": _rows(entries, found), "threshold": BLANK}
    if not found:
        return Finding(Status.PASS, "no picture is blank", values=values), found
    why = f"{plural(len(found), 'picture')} of one brightness all over:\n{listing(_rows(entries, found))}"
    return Finding(
        Status.FAIL, why, "A label without a picture teaches noise: take the rows out (--fix).", values
    ), found


def field(entries: Sequence[Entry], looks: Mapping[int, Look], without: Iterable[int]) -> Finding:
    """Pictures that hardly show a fundus: too small a field of view, or colours no fundus has."""
    left = set(looks) - set(without)
    small = [index for index in sorted(left) if looks[index].lit < FIELD]
    # A fundus is orange: red above green above blue. Gray pictures have all three alike.
    coloured = [index for index in sorted(left - set(small)) if max(looks[index].colour) - min(looks[index].colour) > 4]
    other = [i for i in coloured if looks[i].colour[0] < max(looks[i].colour[1:])]
    values = {"small_field": _rows(entries, small), "other_colours": _rows(entries, other), "threshold": FIELD}
    said = []
    if small:
        said.append(
            f"{plural(len(small), 'picture')} with a field of view on less than {100 * FIELD:.0f}% of the area:\n"
            + listing(f"{entries[i].record.row}: {100 * looks[i].lit:.0f}%" for i in small)
        )
    if other:
        said.append(
            f"{plural(len(other), 'picture')} not orange, as a fundus is:\n"
            + listing(
                f"{entries[i].record.row}: red {looks[i].colour[0]:.0f}, green {looks[i].colour[1]:.0f}, "
                f"blue {looks[i].colour[2]:.0f}"
                for i in other
            )
        )
    if said:
        return Finding(Status.WARN, "\n".join(said), "Look at them: are they colour fundus photographs?", values)
    return Finding(Status.PASS, "every picture shows a field of view in a fundus's colours", values=values)


def sizes(entries: Sequence[Entry], looks: Mapping[int, Look]) -> Finding:
    """Pictures too small for the networks, of odd shapes, or of another mode than RGB."""
    if not looks:
        return Finding(Status.SKIP, "no picture to measure")
    small = [i for i, look in looks.items() if min(look.width, look.height) < PIXELS]
    long = [i for i, look in looks.items() if max(look.width, look.height) > LONGEST * min(look.width, look.height)]
    modes = Counter(look.mode for look in looks.values())
    usual = modes.most_common(1)[0][0]
    unlike = [i for i, look in looks.items() if look.mode not in ("RGB", "DICOM", usual)]
    several = Counter((look.width, look.height) for look in looks.values()).most_common()
    values = {
        "small": _rows(entries, small),
        "odd_shape": _rows(entries, long),
        "other_mode": _rows(entries, unlike),
        "modes": dict(modes),
        "sizes": [{"width": width, "height": height, "images": n} for (width, height), n in several[:50]],
        "pixels": PIXELS,
    }
    (width, height), most = several[0]
    head = (
        f"{width}x{height} pixels"
        if len(several) == 1
        else f"{len(several)} sizes, most often {width}x{height} ({most})"
    )
    head += f"; {'mode' if len(modes) == 1 else 'modes'} {', '.join(modes)}"
    said = [head]
    for found, words in (
        (small, f"smaller than {PIXELS} pixels, which will be enlarged"),
        (long, f"more than {LONGEST:.0f} times as long as wide"),
        (unlike, f"of another mode than {usual}"),
    ):
        if found:
            shown = (f"{entries[i].record.row}: {looks[i].width}x{looks[i].height} {looks[i].mode}" for i in found)
            said.append(f"{plural(len(found), 'picture')} {words}:\n{listing(shown)}")
    if len(said) == 1 and usual in ("RGB", "DICOM"):
        return Finding(Status.PASS, head, values=values)
    advice = "Take the originals where you have them; a camera or an export that goes with a label is learnt as one."
    return Finding(Status.WARN, "\n".join(said), advice, values)


# -- labels ------------------------------------------------------------------------------------------------------------


def labels(entries: Sequence[Entry], wrong: Mapping[int, str], unlabelled: Sequence[int]) -> Finding:
    """Whether every row has a label that can be one. Rows of tables without any label are not asked for one."""
    to_train = [index for index in unlabelled if entries[index].split in ("train", None)]
    values = {
        "wrong": [{"row": entries[i].record.row, "why": why} for i, why in wrong.items()],
        "unlabelled": _rows(entries, unlabelled),
    }
    if not any(entry.label is not None for entry in entries):
        return Finding(Status.SKIP, "no labels", values=values)
    said = []
    if wrong:
        shown = listing(f"{entries[i].record.row}: {why}" for i, why in wrong.items())
        said.append(f"{plural(len(wrong), 'label')} that cannot be right:\n{shown}")
    if unlabelled:
        said.append(f"{plural(len(unlabelled), 'row')} without a label:\n{listing(_rows(entries, unlabelled))}")
    if wrong or to_train:
        return Finding(Status.FAIL, "\n".join(said), "Correct them, or take the rows out (--fix).", values)
    if said:
        return Finding(Status.WARN, "\n".join(said), "They are not trained on; scores leave them out.", values)
    return Finding(Status.PASS, f"{sum(entry.label is not None for entry in entries)} labels", values=values)


def conflicts(entries: Sequence[Entry], groups: Sequence[Group], notes: Sequence[str]) -> Finding:
    """Photographs with two labels."""
    found = [group for group in groups if group.conflicting]
    kinds = Counter(group.kind for group in found)
    values = {"conflicts": len(found), "by_kind": dict(kinds), "rows": [_rows(entries, g.rows) for g in found]}
    if not found:
        return Finding(Status.PASS, "\n".join(["no photograph has two labels", *notes]), values=values)
    counted = ", ".join(f"{n} of {KINDS[kind]}" for kind, n in kinds.items())
    why = f"{plural(len(found), 'photograph')} with different labels ({counted}):\n{_list(entries, found)}"
    advice = "Decide which is right. --fix takes all of them out, for nobody can tell from here."
    return Finding(Status.FAIL, "\n".join([why, *notes]), advice, values)


def imbalance(counts: Iterable[int]) -> float:
    """How many times the most frequent class is as frequent as the rarest that is there at all; 1 for one class."""
    present = [count for count in counts if count]
    return max(present) / min(present) if present else 1.0


def classes(counts: Mapping[str, Mapping[str, int]]) -> Finding:
    """Whether every part shows every class, and often enough. `counts` by part and class."""
    if not any(any(of.values()) for of in counts.values()):
        return Finding(Status.SKIP, "no labels")
    said, advice = [], []
    ratios = {part: imbalance(of.values()) for part, of in counts.items()}
    for part, of in counts.items():
        name = part or "all"
        shown = _some([f"{one}: {n}" for one, n in of.items()], _MOST_CLASSES)
        said.append(f"{name}: {shown}; the most frequent class is {ratios[part]:.1f} times the rarest")
        absent = [one for one, n in of.items() if not n]
        if absent and any(of.values()):
            advice.append(f"Scores on {name} say nothing of {_some(absent)}.")
        if ratios[part] > IMBALANCE:
            advice.append(
                f"More than {IMBALANCE} to 1 in {name}: train with train.balance weighted, sampler or focal; look at "
                "balanced_accuracy, kappa and the scores of each class, not at accuracy."
            )
        rare = [one for one, n in of.items() if 0 < n < FEWEST]
        if rare:
            advice.append(f"Fewer than {FEWEST} images of {_some(rare)} in {name}: their scores will be uncertain.")
    values = {"counts": {part: dict(of) for part, of in counts.items()}, "imbalance": ratios}
    status = Status.WARN if advice else Status.PASS
    return Finding(status, "\n".join(said), " ".join(advice), values)


def class_counts(entries: Sequence[Entry], sheets: Sequence[Sheet]) -> dict[str, dict[str, int]]:
    """Images of each class in each part, in order; classes of sheets that cannot be compared stay by themselves."""
    parts: dict[str, dict[str, int]] = {}
    for entry in entries:
        names = sheets[entry.sheet].classes
        if sheets[entry.sheet].label is not None:
            of = parts.setdefault(entry.part, dict.fromkeys(names, 0))
            if entry.label is not None:
                of[entry.label] += 1
    return parts


# -- splits and patients -----------------------------------------------------------------------------------------------


def splits(entries: Sequence[Entry], wrong: Mapping[int, str]) -> Finding:
    """Whether every row of a table with splits is in one."""
    sizes_of = Counter(entry.part for entry in entries if entry.split)
    values = {"sizes": dict(sizes_of), "wrong": _rows(entries, wrong)}
    if wrong:
        shown = listing(f"{entries[i].record.row}: {why}" for i, why in wrong.items())
        advice = "Correct them, or take the rows out (--fix)."
        return Finding(Status.FAIL, f"{plural(len(wrong), 'row')} in no split:\n{shown}", advice, values)
    if not sizes_of:
        advice = "eyetune data split makes splits that keep patients and copies together."
        return Finding(Status.SKIP, "no splits yet", advice, values)
    return Finding(Status.PASS, ", ".join(f"{part} {n}" for part, n in sizes_of.items()), values=values)


def patients(entries: Sequence[Entry]) -> Finding:
    """Whether a patient's photographs are all in one split of one table. Patients are not named."""
    where: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        if entry.record.patient is not None:
            where[entry.record.patient].append(entry)
    values: dict[str, object] = {"patients": len(where)}
    if not where:
        return Finding(
            Status.WARN,
            "no patient column: two photographs of one patient may be in train and test, and scores too good",
            "Name the column of the patients (patient_column).",
            values,
        )
    shared = [found for found in map(_first_of_each_part, where.values()) if len(found) > 1]
    crossing = [found for found in shared if any(apart(found[0], other) for other in found[1:])]
    fellows = sum(_fellows_apart(where[str(found[0].record.patient)]) for found in crossing)
    tables = sum(len({entry.sheet for entry in found}) > 1 for found in shared)
    values |= {"in_two_splits": len(crossing), "fellow_eyes_apart": fellows, "in_two_tables": tables}
    unknown = sum(entry.record.patient is None for entry in entries)
    rest = [f"{plural(unknown, 'row')} without a patient: each counts as a patient of its own"] if unknown else []
    if crossing:
        shown = listing(", ".join(f"{e.record.row} ({e.part})" for e in found) for found in crossing)
        said = f"{len(crossing)} of {len(where)} patients are in more than one split or table"
        said += f", {fellows} of them with one eye here and the fellow eye there" if fellows else ""
        return Finding(
            Status.FAIL,
            "\n".join([f"{said}:\n{shown}", *rest]),
            "Move each patient to one split (--fix keeps those held out), or cut new splits: eyetune data split. "
            + ("Where each table numbers its own patients: --patients-apart." if tables else ""),
            values,
        )
    if tables:
        rest.append(f"{plural(tables, 'patient')} in two tables, in the same split")
    status = Status.WARN if rest else Status.PASS
    return Finding(status, "\n".join([f"{len(where)} patients, each in one split", *rest]), values=values)


def _first_of_each_part(rows: Sequence[Entry]) -> list[Entry]:
    first: dict[tuple[int, str | None], Entry] = {}
    for entry in rows:
        first.setdefault((entry.sheet, entry.split), entry)
    return list(first.values())


def _fellows_apart(rows: Sequence[Entry]) -> bool:
    """Whether one eye of a patient is in another part than the other eye, as a whole."""
    parts: dict[str, set[str]] = defaultdict(set)
    for entry in rows:
        if entry.record.eye in ("left", "right"):
            parts[str(entry.record.eye)].add(entry.part)
    return len(parts) == 2 and not parts["left"] & parts["right"]


# -- copies ------------------------------------------------------------------------------------------------------------


def copies(entries: Sequence[Entry], groups: Sequence[Group], kind: str, searched: int) -> Finding:
    """Whether a photograph is there twice: across splits, or before they are cut, that makes scores too good.

    Args:
        entries: all rows.
        groups: all groups; those of `kind` are looked at.
        kind: "bytes", "pixels" or "near".
        searched: how many images were compared.
    """
    found = [group for group in groups if group.kind == kind]
    values = {
        "groups": len(found),
        "images": sum(len(group.rows) for group in found),
        "in_different_splits": sum(group.crossing for group in found),
        "with_different_labels": sum(group.conflicting for group in found),
        "not_split_yet": sum(group.unsplit for group in found),
        "in_one_split_with_one_label": sum(not group.biases for group in found),
    }
    if not found:
        none = {"bytes": "files hold the same bytes", "pixels": "files hold the same pixels"}
        words = none.get(kind, "pictures are copies")
        return Finding(Status.PASS, f"no two of {searched} {words}", values=values)
    alike: dict[str, list[Group]] = {}
    for group in sorted(found, key=lambda group: (not group.crossing, not group.conflicting, not group.unsplit)):
        alike.setdefault(group.said, []).append(group)
    why = "\n".join(f"{len(some)} x {said}:\n{_list(entries, some)}" for said, some in alike.items())
    if any(group.biases for group in found):
        advice = "Keep one of each, in one split, with the label that is right (--fix)."
        if values["not_split_yet"]:
            advice += " eyetune data split keeps them on one side."
        return Finding(Status.FAIL, why, advice, values)
    return Finding(Status.WARN, why, "Remove the repeats: they weigh twice.", values)


def _list(entries: Sequence[Entry], groups: Sequence[Group]) -> str:
    return listing(
        _some([entries[row].where for row in group.rows]) + (f": {group.how}" if group.how else "") for group in groups
    )


def _some(words: Sequence[str], most: int = 5) -> str:
    """The first words, and how many more there are."""
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")


def _rows(entries: Sequence[Entry], rows: Iterable[int]) -> list[str]:
    return [entries[row].record.row for row in rows]
