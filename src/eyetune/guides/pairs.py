"""The guides' preparation of image-text pairs."""

from __future__ import annotations

from eyetune.guides.door import Door, Given, Meant, Parser, options_of, spoken

_STREAMING = "means nothing here: images are streamed, and the hub's own limits are heeded"
_GONE = {
    "hf_token": "tokens do not belong on a command line: set HF_TOKEN",
    "sleep_time": _STREAMING,
    "streaming": _STREAMING,
}


def _declare(parser: Parser) -> None:
    parser.add_argument("--csv_path", required=True, metavar="FILE", help="table: dataset_index, prompt, label")
    parser.add_argument("--hf_dataset_name", metavar="NAME", help="Hugging Face dataset that dataset_index counts in")
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--split",
        choices=("train", "val", "test"),
        default="train",
        help="train (also cuts a validation split); val or test go to DIR/val or DIR/test (%(default)s)",
    )
    parser.add_argument("--test_csv_path", metavar="FILE", help="table of the test split, prepared along with train")
    parser.add_argument("--resume", action="store_true", help="not needed: the same command goes on where it stopped")
    parser.add_argument("--image_size", metavar="N", help="side of the square images (256)")
    for name, why in _GONE.items():
        parser.add_argument(f"--{name}", nargs="?", const=True, metavar="VALUE", help=why)


def _meaning(given: Given, rest: list[str]) -> Meant:
    split, out = given["split"], given["output_dir"]
    words = ["clip", "prepare", given["csv_path"], *spoken({"--dataset": given["hf_dataset_name"]})]
    notes = [f"--{name}: {why}" for name, why in _GONE.items() if given[name] is not None]
    if split != "train":
        words += ["--split", split, "--out", f"{out}/{split}"]
        notes.append(f"{split} is a folder of its own: name it as {out}/{split}:{split} where data is asked for.")
    else:
        words += ["--out", out]
        words += ["--test-share", "0"] if given["test_csv_path"] is None else ["--test", given["test_csv_path"]]
        if "--validate-on-test" not in rest:
            notes.append(
                "A tenth of the patients of train validate: an epoch chosen on the test split would be chosen by what "
                "is asked afterwards."
            )
    return Meant([*words, *spoken({"--pixels": given["image_size"]}), *rest], notes)


PREPARE_RETCLIP_DATA = Door(
    script="scripts/prepare_retclip_data_streaming.py",
    about="Prepare photographs and texts for RET-CLIP: TSV, JSONL and LMDB.",
    verb="clip prepare",
    declare=_declare,
    meaning=_meaning,
    passed=options_of("clip", "prepare"),
)
