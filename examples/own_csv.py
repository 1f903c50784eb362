"""Your own CSV to a report, in Python.

    python examples/own_csv.py labels.csv photos runs/own

labels.csv has a column of image names and one of labels, best also one of patients. A linear probe is trained, the test
split scored, and RUN/report.html written. `nano` has seen drawn eyes only: for real photographs take another backbone
(`eyetune models list`) and its weights. For research; not a medical device.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import eyetune as et
from eyetune.errors import UserError


def main(table: str, images: str, out: str) -> None:
    """Train on the table, and print what came of it on unseen patients."""
    config = et.Config.parse(
        {
            "model": {"backbone": "nano"},
            "data": {"table": table, "images": images, "val": 0.2, "test": 0.3},
            "adapt": {"kind": "linear"},
            "train": {"lr": 0.01},
            "augment": "none",  # with a frozen backbone every photograph is then looked at once
            "out": out,
        }
    )
    et.finetune(config)

    test = json.loads((Path(out) / "metrics.json").read_text(encoding="utf-8"))["datasets"]["test"]
    print(
        f"\n{test['n']} photographs of {test['patients'] or 'unnamed'} patients, classes {', '.join(test['classes'])}"
    )
    for name, metric in test["metrics"].items():
        if metric["value"] is None:
            print(f"{name}: not defined ({metric['reason']})")
        elif None not in metric["ci"]:
            print("{}: {:.3f} (95% interval {:.3f} to {:.3f})".format(name, metric["value"], *metric["ci"]))
    print(f"Read {out}/report.html, first of all what not to believe.")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except UserError as mistake:  # its text says what was wrong, where, and what to do
        sys.exit(str(mistake))
