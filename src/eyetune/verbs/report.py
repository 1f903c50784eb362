"""`eyetune report`: what runs and comparisons say of themselves, one self-contained HTML page each."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from eyetune.errors import ConfigError, UserError
from eyetune.flags import USUAL, Computing, Switch


def command(
    runs: Annotated[list[Path], Parameter(negative=())],
    /,
    *,
    no_pictures: Switch = False,
    no_heat_maps: Switch = False,
    names: Switch = False,
    out: Path | None = None,
    computing: Computing = USUAL,
) -> None:
    """Write the report of a run or a comparison: one HTML file that needs no network; of a run a model card, too.

    RUN/report.html and RUN/MODEL_CARD.md are written anew. With several runs there is a page over all of them, too.

    Args:
        runs: Run folders, or folders of eyetune compare.
        no_pictures: Leave out photographs: those of mistakes, and heat maps.
        no_heat_maps: Draw no heat maps, which need the base weights and a second or more each on a CPU.
        names: Show the file names of the photographs; else the row of the predictions that holds the name.
        out: Where the page over several runs goes (default: overview.html in the folder above them).
        computing: Device, precision, workers, batch size, weights, cache, for the heat maps.
    """
    from eyetune.report.comparison import is_comparison, write_comparison
    from eyetune.report.overview import write_overview
    from eyetune.report.page import Options, write_report

    if not runs:
        raise ConfigError("name at least one run folder, as in: eyetune report runs/first")
    if out is not None and len(runs) == 1:
        raise ConfigError("--out is for the page over several runs; the report of one run goes into its folder.")
    options = Options(pictures=not no_pictures, names=names)
    single = [run for run in runs if not is_comparison(run)]
    for folder in runs:
        if folder not in single:
            print(write_comparison(folder))
    for run in single:
        if not no_pictures and not no_heat_maps:
            _draw(run, computing)
        page = write_report(run, options)
        print(f"{page} ({page.stat().st_size / 1024:,.0f} KiB), {page.with_name('MODEL_CARD.md').name} beside it")
    if len(single) > 1:
        print(write_overview(single, out))
    print("For research; not a medical device.")


def _draw(run: Path, computing: Computing) -> None:
    """Heat maps of the run's present weights, where there are none yet; what is missing for them is said."""
    from eyetune.report.facts import read_facts
    from eyetune.report.heat import draw_heat_maps, read_heat_maps
    from eyetune.train.run import load_run

    facts = read_facts(run)
    if read_heat_maps(facts) is not None:
        return
    try:
        found = draw_heat_maps(load_run(run, **computing.loading()), facts)
    except UserError as error:
        print(f"{run}: no heat maps. {error}", file=sys.stderr)
        return
    verdict = "they depend on what was learnt" if found.passed else "they hardly depend on what was learnt"
    print(f"{run}: {len(found.examples)} heat maps by {found.method}; {verdict} (correlation {found.correlation:.2f})")
