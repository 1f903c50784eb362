"""The guides' evaluation across datasets."""

from __future__ import annotations

from pathlib import Path

from eyetune.errors import ConfigError, did_you_mean
from eyetune.guides.door import Door, Given, Meant, Parser, options_of, spoken
from eyetune.older_config import TYPES, VARIANTS

KINDS = {
    "baseline": ("full", "linear", "gradual"),
    "retfound": ("full", "linear", "gradual"),
    "retfound_lora": ("lora",),
}
"""Which of the guides' models -> the strategies by which it is trained here."""


def _declare(parser: Parser) -> None:
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=Path,
        metavar="FILE|RUN",
        help="a run folder or anything in it, or a checkpoint of the guides' programs",
    )
    parser.add_argument("--model_type", metavar="TYPE", help="lora, retfound or baseline; found out without it")
    parser.add_argument(
        "--datasets",
        required=True,
        nargs="+",
        action="extend",
        metavar="NAME:CSV:IMAGES",
        help="tables with the folders of their images",
    )
    parser.add_argument("--model_variant", choices=tuple(VARIANTS), help="of an old file that does not say (large)")
    parser.add_argument("--model_name", metavar="NAME", help="timm name of an old baseline")
    parser.add_argument("--checkpoint_path", metavar="FILE", help="the published weights, for a file of adapters alone")
    parser.add_argument("--output_dir", metavar="DIR", help="run folder to make from an old file (runs/NAME)")
    parser.add_argument("--num_workers", metavar="N", help="processes that read images")


def run_of(checkpoint: Path) -> Path | None:
    """The run folder that a path lies in, itself included: of `RUN/checkpoints/best_model.pth`, RUN. None: of none.

    A file of weights that is really there, and not a checkpoint of EyeTune's own, is nobody's run.
    """
    if checkpoint.is_file() and checkpoint.suffix not in {".safetensors", ".json"}:
        return None
    around = (checkpoint, *checkpoint.parents[:3])
    return next((folder for folder in around if _is_run(folder)), None)


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir()


def dataset(word: str) -> str:
    """`NAME:CSV:IMAGES` -> `NAME=CSV:IMAGES`, as `eyetune evaluate --data` takes it. Raises ConfigError."""
    name, colon, table = word.partition(":")
    if not (name and colon and table):
        raise ConfigError(
            f"--datasets {word}: write NAME:CSV:IMAGES, as in APTOS:data/aptos/test.csv:data/aptos/images"
        )
    return f"{name}={table}"


def _about_run(run: Path, given: Given) -> list[str]:
    """What the options say otherwise than the run itself."""
    from eyetune.train.rundir import RunDir

    config = RunDir.open(run).read_config()
    notes = []
    kind = TYPES.get(str(given["model_type"]).lower())
    if kind is not None and config.adapt.kind not in KINDS[kind]:
        notes.append(f"--model_type {given['model_type']}: {run} was trained by {config.adapt.kind}; the run is right.")
    for name, says in (
        ("model_variant", VARIANTS.get(str(given["model_variant"]))),
        ("model_name", given["model_name"]),
    ):
        if says not in (None, config.model.backbone):
            notes.append(f"--{name} {given[name]}: {run} is of {config.model.backbone}; the run is right.")
    if given["output_dir"] is not None:
        notes.append(f"--output_dir: means nothing for a run folder; scores and predictions go into {run}.")
    return notes


def _meaning(given: Given, rest: list[str]) -> Meant:
    typed = given["model_type"]
    if typed is not None and typed.lower() not in TYPES:
        raise ConfigError(f"--model_type: unknown {typed!r}.{did_you_mean(typed, TYPES)} Known: {', '.join(TYPES)}.")
    checkpoint = given["checkpoint"]
    run = run_of(checkpoint)
    data = [word for one in given["datasets"] for word in ("--data", dataset(one))]
    words = ["evaluate", str(checkpoint if run is None else run), *data]
    notes: list[str] = []
    if run is not None:
        notes = _about_run(run, given)
    else:
        backbone = given["model_name"] or VARIANTS.get(str(given["model_variant"]))
        words += spoken({"--backbone": backbone, "--out": given["output_dir"]})
    words += spoken({"--weights": given["checkpoint_path"], "--workers": given["num_workers"]})
    return Meant([*words, *rest], notes)


EVALUATE_CROSS_DATASET = Door(
    script="scripts/evaluate_cross_dataset.py",
    about="Score a trained model on several datasets, and say how much is lost outside its own.",
    verb="evaluate",
    declare=_declare,
    meaning=_meaning,
    passed=options_of("evaluate"),
)
