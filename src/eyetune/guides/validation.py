"""`scripts.validate_data`: the audit of a table and its photographs, as the guides call it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from eyetune.data.config import DataConfig
from eyetune.guides.network import CROSS, TICK

if TYPE_CHECKING:
    from eyetune.data.audit.run import Audit
    from eyetune.findings import Finding


class DataValidator:
    """Looks at every row of a table and every photograph in it.

    Args:
        csv_file: the table; a class folder will do too.
        img_dir: the folder that image names are relative to; None: the table's, or an images folder beside it.
        columns: names of the columns where they are not the usual ones: `image_column`, `label_column`,
            `patient_column`, `eye_column`, `split_column`.

    Attributes:
        audit: what was found, after :meth:`validate_all`.
    """

    def __init__(self, csv_file: str | Path, img_dir: str | Path | None = None, **columns: str) -> None:
        images = None if img_dir is None else Path(img_dir)
        self.config = DataConfig.model_validate({"table": str(csv_file), "images": images, **columns})
        self.audit: Audit | None = None

    def validate_all(self) -> bool:
        """Print every finding; True when nothing was found that would make a result wrong (docs/audit.md).

        Raises DataError for what is no table at all.
        """
        from eyetune.data.audit.run import audit, verdict
        from eyetune.data.cache import Cache
        from eyetune.data.readable import choose_workers

        threads = max(1, choose_workers("auto", 10**6))
        self.audit = audit([self.config], threads=threads, cache=Cache.of(self.config), say=_say, start=print)
        passed = self.audit.report.passed
        print(f"{TICK if passed else CROSS} {verdict(self.audit)}")
        return passed


def _say(finding: Finding) -> None:
    from eyetune.findings import lines

    print("\n".join(lines(finding)), flush=True)
