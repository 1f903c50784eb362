"""`scripts.validate_data`: the audit of a table and its photographs, as the guides call it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from eyetune.data.config import DataConfig
from eyetune.errors import ConfigError
from eyetune.guides import CROSS, TICK
from eyetune.guides.door import Door, Given, Meant, Parser, options_of, spoken
from eyetune.guides.settings import GuideConfig, read_guide_config

if TYPE_CHECKING:
    from eyetune.data.audit.run import Audit
    from eyetune.findings import Finding


class DataValidator:
    """Looks at every row of a table and every photograph in it.

    Args:
        csv_file: the table; a class folder will do too.
        img_dir: the folder that image names are relative to; None: the table's, or an images folder beside it.
        image_column, label_column, patient_column: names of the columns where they are not the usual ones.

    Attributes:
        audit: what was found, after :meth:`validate_all`.
    """

    def __init__(
        self,
        csv_file: str | Path,
        img_dir: str | Path | None = None,
        *,
        image_column: str | None = None,
        label_column: str | None = None,
        patient_column: str | None = None,
    ) -> None:
        self.config = DataConfig(
            table=str(csv_file),
            images=None if img_dir is None else Path(img_dir),
            image_column=image_column,
            label_column=label_column,
            patient_column=patient_column,
        )
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


def _declare(parser: Parser) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML of the guides, which names table and folder")
    parser.add_argument(
        "--csv_file", "--csv_path", "--data_csv", "--csv", dest="csv_file", metavar="FILE", help="the table"
    )
    parser.add_argument(
        "--img_dir", "--data_img_dir", "--image_dir", dest="img_dir", metavar="DIR", help="folder of its photographs"
    )


def _meaning(given: Given, rest: list[str]) -> Meant:
    data = read_guide_config(given["config"]).data if given["config"] is not None else GuideConfig().data
    table, images = given["csv_file"] or data.train_csv, given["img_dir"] or data.train_img_dir
    if table is None:
        raise ConfigError("--csv_file: which table? Name it, or a --config that does.")
    columns = {f"--{name}-column": getattr(data, f"{name}_column") for name in ("image", "label", "patient")}
    return Meant(["data", "audit", str(table), *spoken({"--images": images, **columns}), *rest])


VALIDATE_DATA = Door(
    script="scripts/validate_data.py",
    about="Look at every photograph and every row, and say what would make a result wrong.",
    verb="data audit",
    declare=_declare,
    meaning=_meaning,
    passed=options_of("data", "audit"),
)
