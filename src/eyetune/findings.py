"""Findings of a check or an audit: pass or fail, what was measured, what to do; as lines, as JSON."""

from __future__ import annotations

import math
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from eyetune.errors import UserError
from eyetune.files import write_json

#: Version of the JSON of a report.
SCHEMA = 1

_LINE = 116
"""Columns of a printed line."""


class Status(StrEnum):
    """What became of one check. Only `FAIL` makes the exit code 1."""

    PASS = "pass"  # noqa: S105 - not a password
    WARN = "warn"
    """Worth knowing; a run would still do what it says."""
    FAIL = "FAIL"
    SKIP = "skip"
    """It has no meaning for this configuration."""


@dataclass(frozen=True)
class Finding:
    """One check's verdict.

    Attributes:
        status: what became of it.
        why: what was measured, and against what.
        advice: what to do; empty where there is nothing to do.
        values: the numbers behind it, as JSON values.
        name: the check's; filled in by :func:`carry_out`.
        seconds: how long it took; likewise.
    """

    status: Status
    why: str
    advice: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Report:
    """All that one `eyetune check`, or an audit, found.

    Attributes:
        check: "model", "memory", "data", "loader" or "audit".
        subject: a line that says what was checked, where.
        findings: in the order they were made.
        pictures: files drawn beside the JSON.
        details: tables and settings, as JSON values.
    """

    check: str
    subject: str
    findings: Sequence[Finding]
    pictures: Sequence[Path] = ()
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return all(finding.status != Status.FAIL for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Content of `CHECK.json`; numbers that are not finite are null."""
        content = {
            "schema": SCHEMA,
            "check": self.check,
            "passed": self.passed,
            "subject": self.subject,
            "findings": [
                {
                    "name": finding.name,
                    "status": finding.status.value.lower(),
                    "why": finding.why,
                    "advice": finding.advice,
                    "seconds": round(finding.seconds, 3),
                    "values": finding.values,
                }
                for finding in self.findings
            ],
            "pictures": [picture.name for picture in self.pictures],
            **self.details,
        }
        plain: dict[str, Any] = _plain(content)
        return plain

    def write(self, folder: Path) -> Path:
        """Write `folder/CHECK.json`, atomically; returns the file. Raises UserError when it cannot be written."""
        file = Path(folder) / f"{self.check}.json"
        write_json(file, self.to_dict())
        return file


def lines(finding: Finding) -> list[str]:
    """A finding as it is printed: verdict and measure, and below it what to do."""
    head = f"  {finding.status:<5} {finding.name:<13} "
    room = _LINE - len(head)
    body = [line for part in finding.why.splitlines() for line in textwrap.wrap(part, room) or [""]]
    shown = [head + body[0], *(" " * len(head) + line for line in body[1:])]
    for number, line in enumerate(textwrap.wrap(finding.advice, room - 3)):
        shown.append(" " * len(head) + ("-> " if number == 0 else "   ") + line)
    return shown


def carry_out(name: str, check: Callable[[], Finding]) -> Finding:
    """Run one check. What breaks down in the network or the strategy (training that diverges, too little memory, an
    error in the network's own code) is a finding too, not the end of the others."""
    start = time.perf_counter()
    try:
        finding = check()
    except UserError as error:
        finding = Finding(Status.FAIL, str(error))
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        first = (str(error).splitlines() or [""])[0]
        finding = Finding(
            Status.FAIL,
            f"could not be carried out: {type(error).__name__}: {first}",
            "Something in the network or the strategy breaks down here; training would too.",
        )
    return replace(finding, name=name, seconds=time.perf_counter() - start)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value
