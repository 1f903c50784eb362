"""Probabilities and a threshold for another hospital, in Python.

    python examples/new_site.py runs/first site.csv site_photos

site.csv is a labelled sample of the hospital: 30 patients or more, none of whom the run was trained on, with the run's
classes as labels. What the calibration brings is judged by cross-validation over these patients, and written as
RUN/calibration/site.json, for `eyetune predict --calibration site`. For research; not a medical device.
"""

from __future__ import annotations

import sys

import eyetune as et
from eyetune.errors import UserError


def main(folder: str, table: str, images: str) -> None:
    """Fit a calibration to the site, and say what it brings and what its threshold does."""
    run = et.load_run(folder)
    sample = et.Manifest.from_csv(table, images=images, classes=run.classes)
    fitted = et.calibrate(run, "site", sample, replace=True)

    print(f"temperature {fitted.temperature.value:.2f} (above 1: the network was too sure)")
    if fitted.brought is not None:
        change = fitted.brought.difference["nll"]
        print(f"log loss on patients it was not fitted on: {change.value:+.3f}, 95% interval {change.ci}")
        print("That helps." if fitted.brought.helps else "That is not shown to help: the run's own may do as well.")
    calibrated = fitted.apply(run.predictions(sample))  # a table of predictions: classes, logits, probabilities
    for point in fitted.operating_points:
        called = point.called(calibrated.probabilities).mean()
        print(f"{point.name}: positive from a probability of {point.threshold:.2f} on, {called:.0%} of the sample")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except UserError as mistake:  # its text says what was wrong, where, and what to do
        sys.exit(str(mistake))
