"""`eyetune compare`: strategies, backbones and seeds on the same splits; one table, tests, one picture."""

from __future__ import annotations

import gc
import shutil
import sys
from pathlib import Path
from signal import SIGINT
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from eyetune import processes
from eyetune.comparison.plan import Cell, Plan, describe, differing, read_plan
from eyetune.errors import ConfigError, RunError, UserError, listing
from eyetune.files import WRITING_ERRORS, make_folder, write_json, writing_failed
from eyetune.flags import table_and_images
from eyetune.interrupt import Interrupted
from eyetune.terminal import show
from eyetune.train.elsewhere import Learnt, open_dataset, open_table
from eyetune.verbs.evaluate import evaluate
from eyetune.verbs.finetune import check_settings, finetune, prepare_data, resume

if TYPE_CHECKING:
    from eyetune.train.run import Run

_HELP = """CONFIG.yaml is one for finetune; it may have a section compare: with what follows.
  --strategies linear,lora,full
      Which; NAME=KIND for several of a kind: --strategies lora8=lora,lora32=lora
      --lora8.r 8 --lora32.r 32
  --backbones nano,retfound=models/RETFound_cfp_weights.pth,resnet50=hub
      Which, with their weights [default: the configuration's]
  --seeds 0,1,2
      Seeds of training; the splits are the same for all [default: seed]
  --budget epochs|own
      epochs: train.epochs for all; own: what each strategy says [default: epochs]
  --data NAME=TABLE[:IMAGES]
      An external dataset to score as well; may be repeated.
  --map NAME=MAP
      What its labels mean, as in eyetune evaluate; in the file compare.maps.NAME
  --NAME.field VALUE
      For one strategy: --lora.r 16, --full.train.lr 5e-5. Its learning rate is its
      own unless it is given so, or as --train.lr for all.
Every field of the configuration is a flag: see eyetune finetune --help.
The same command again goes on where it stopped: what is finished is kept.
Exit code 1: some runs failed; the others are compared."""

app = App(
    name="compare",
    help_format="plaintext",
    help_epilogue=_HELP,
    usage="Usage: eyetune compare [CONFIG.yaml] --strategies a,b,… [--backbones x,y,…] [--seeds 0,1,…] "
    "[--section.field VALUE]...",
)


@app.default
def command(*words: Annotated[str, Parameter(allow_leading_hyphen=True, show=False)]) -> int:
    """Train every strategy on every backbone with every seed, and say which differ."""
    content = compare(read_plan(words))
    return 1 if content["status"] == "failed" else 0


def compare(plan: Plan) -> dict[str, Any]:
    """Carry out a plan, or what is left of it; returns the content of comparison.json (see comparison.results).

    Raises ConfigError when a run in the folder has another configuration than the plan, UserError for what else the
    user can mend; KeyboardInterrupt, with how to go on, when interrupted.
    """
    from eyetune.train.rundir import RunDir

    for arm in plan.arms:
        check_settings(plan.config(arm))
    check_outside(plan)
    desk = _Desk(plan)
    desk.open()
    with RunDir(plan.out, desk.main).in_use():
        try:
            desk.begin()
            for number, cell in enumerate(plan.cells, 1):
                desk.carry_out(number, cell)
        except KeyboardInterrupt as interrupt:
            done = sum(record["status"] == "finished" for record in desk.records.values())
            desk.write("interrupted")
            raise Interrupted(
                f"{done} of {len(plan.cells)} runs are finished and kept in {plan.out}, and what was done of the next. "
                "Go on with the same command.",
                getattr(interrupt, "signum", SIGINT),
            ) from None
        return desk.conclude()


def check_outside(plan: Plan) -> None:
    """Say what is wrong with the tables and labels of external datasets before anything is trained.

    Raises DataError and ConfigError as eyetune evaluate does.
    """
    from eyetune.data.records import open_manifest

    if not plan.datasets:
        return
    config = plan.cells[0].config
    learnt = Learnt(config.data, config.reads, open_manifest(config.data, kind=config.reads).classes, plan.out)
    for name, word in plan.datasets.items():
        table, images = table_and_images(word)
        manifest, labels = open_table(learnt, table, images, {}, name=name, said=plan.maps.get(name))
        if labels is not None:
            labels.apply(manifest)


class _Desk:
    """The state of a comparison: what became of each cell, also on the disk."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.main = processes.rank() == 0
        self.records: dict[str, dict[str, Any]] = {}
        self.void: list[Path] = []
        """Run folders of another configuration in which no batch was trained."""

    def open(self) -> None:
        """Read what is there. Raises RunError for a folder of something else, ConfigError for other configurations."""
        from eyetune.comparison.results import FILE
        from eyetune.train.rundir import RunDir, is_free
        from eyetune.train.sealed import read_json

        out = self.plan.out
        file = out / FILE
        if not file.is_file() and not is_free(out):
            raise RunError(f"{out} holds something that is not a comparison: choose another --out.")
        known = read_json(file) if file.is_file() else {}
        before = {cell.get("name"): cell for cell in known.get("cells", [])}
        asked = {"external": self.plan.datasets, "maps": self.plan.maps}
        stale = any(
            known.get(key, {}).get(name) != now.get(name) for key, now in asked.items() for name in asked["external"]
        )
        faults = []
        for cell in self.plan.cells:
            folder = out / cell.name
            record = {"name": cell.name, "folder": cell.name, "arm": cell.arm.name, "seed": cell.seed}
            self.records[cell.name] = record | {"status": "waiting", "error": None, "drift": None}
            if (folder / "config.yaml").is_file():
                run = RunDir.open(folder)
                changed = differing(run.read_config(), cell.config)
                if changed and cell.name in before and not run.has_checkpoint():
                    self.void.append(folder)  # nothing was learnt yet
                    continue
                faults += [f"{cell.name}: {one}" for one in changed]
                if before.get(cell.name, {}).get("status") == "finished" and not stale:
                    self.records[cell.name] |= {"status": "finished", "drift": before[cell.name].get("drift")}
        if faults:
            raise ConfigError(
                f"{out} holds runs with another configuration:\n{listing(faults)}\nGo on with the configuration they "
                "were begun with, or choose another --out."
            )
        if self.main:
            try:
                make_folder(out)
            except OSError as error:
                raise writing_failed(out, error) from error
            count = len(self.plan.cells)
            print(f"{count} runs into {out}, budget {self.plan.budget_text()}\n{describe(self.plan)}", flush=True)

    def begin(self) -> None:
        """Note that the comparison runs, and drop what failed before it learnt anything."""
        if self.main:
            for folder in self.void:
                shutil.rmtree(folder)
        self.write("running")

    def carry_out(self, number: int, cell: Cell) -> None:
        """One run from where it is to its scores. A failure is noted, and only ends everything where several processes
        have to stay together, or the disk takes no more."""
        record = self.records[cell.name]
        if record["status"] == "finished":
            return self.say(f"\n[{number}/{len(self.plan.cells)}] {cell.name}: finished before")
        self.say(f"\n[{number}/{len(self.plan.cells)}] {cell.name}")
        try:
            run = self.train(cell)
            self.score_elsewhere(run)
            record["drift"] = self.drift(run, cell)
            record |= {"status": "finished", "error": None}
        except KeyboardInterrupt:
            record["status"] = "interrupted"
            raise
        except Exception as error:
            if processes.count() > 1 or getattr(error.__cause__, "errno", None) in WRITING_ERRORS:
                raise
            record |= {"status": "failed", "error": _text(error)}
            print(f"{cell.name} failed: {_text(error)}", file=sys.stderr, flush=True)
        run = None  # type: ignore[assignment]  # its network makes room for the next one
        gc.collect()
        self.write("running")

    def train(self, cell: Cell) -> Run:
        """The finished run of a cell: begun, gone on with, or only loaded."""
        from eyetune.train.run import load_run
        from eyetune.train.rundir import RunDir

        folder = self.plan.out / cell.name
        if not (folder / "config.yaml").is_file():
            return finetune(cell.config)
        if RunDir.open(folder).read_cost().get("finished"):
            return load_run(folder, device=cell.config.device)
        return resume(folder)

    def score_elsewhere(self, run: Run) -> None:
        """The external datasets."""
        from eyetune.data.readable import check_readable

        for name, word in self.plan.datasets.items():
            table, images = table_and_images(word)
            manifest, labels = open_dataset(run, table, images, {}, name=name, said=self.plan.maps.get(name))
            readable = check_readable(manifest, False, cache=run.cache, settings=run.settings)
            evaluate(run, {name: readable}, maps={name: labels})

    def drift(self, run: Run, cell: Cell) -> dict[str, Any] | None:
        """How far the features of the validation images (the test images, where there are none) moved."""
        from eyetune.comparison.forgetting import feature_drift

        manifest = prepare_data(cell.config, run.cache, splits=run.folder.splits_file)
        split = next((name for name in ("val", "test") if name in manifest.splits), None)
        if split is None:
            return None
        size, workers = cell.config.train.batch_size, cell.config.workers
        return feature_drift(run, manifest.select(split), split, workers=workers, batch_size=size)

    def write(self, status: str) -> None:
        """How far the comparison is, into comparison.json."""
        from eyetune.comparison.results import FILE, started
        from eyetune.runtime import command_line

        if self.main:
            write_json(
                self.plan.out / FILE, started(self.plan, list(self.records.values()), status, command_line(sys.argv))
            )

    def conclude(self) -> dict[str, Any]:
        """Compare what is finished: comparison.json, the table, the picture, the sentences."""
        from eyetune.comparison import results
        from eyetune.comparison.show import legend, picture, terminal_table, write_csv
        from eyetune.comparison.words import heading
        from eyetune.runtime import command_line

        if all(record["status"] == "failed" for record in self.records.values()):
            self.write("failed")
        content = results.finished(self.plan, list(self.records.values()), command_line(sys.argv))
        if not self.main:
            return content
        out = self.plan.out
        write_csv(out / results.TABLE, content)
        picture(out / results.PICTURE, content)
        write_json(out / results.FILE, content)
        print()
        show(terminal_table(content))
        print("\n".join(legend(content)))
        if content["sentences"]:
            print("\n".join(["", heading(content["tests"][0]), *(f"  {line}" for line in content["sentences"])]))
        if content["warnings"]:
            print("\n".join(["", "Mind:", *(f"  {line}" for line in content["warnings"])]))
        print(f"\n{out / results.FILE}, {results.TABLE}, {results.PICTURE}, and a run folder each beside them")
        print("For research; not a medical device.")
        return content

    def say(self, line: str) -> None:
        """To the terminal, once."""
        if self.main:
            print(line, flush=True)


def _text(error: Exception) -> str:
    return str(error).strip() if isinstance(error, UserError) else f"{type(error).__name__}: {str(error).strip()}"
