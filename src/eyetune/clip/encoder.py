"""A BERT with its weights, from a folder or from the hub: opened safely, every key accounted for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from eyetune.backbones.opening import open_checkpoint
from eyetune.backbones.spec import BACKBONES, KeyLayout
from eyetune.backbones.weights import LoadReport, fill, plan
from eyetune.clip.loading import bert_model
from eyetune.clip.text import text_config
from eyetune.errors import MissingExtra, UserError, WeightsError

if TYPE_CHECKING:
    from eyetune.clip.config import TextConfig

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Files with a BERT's weights, best first."""

_LAYOUT = KeyLayout(
    containers=("state_dict", "model"),
    prefixes=("module.", "bert."),
    # Spelt as in the first BERTs.
    rename=((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")),
    dropped=(
        (r"cls\.", "heads of the pretraining: words and sentences are not predicted here"),
        (r"pooler\.", "BERT's pooler: the projections read the [CLS] token itself"),
        (r"classifier\.|qa_outputs\.", "head of a task that is not ours"),
        (r"embeddings\.(position|token_type)_ids$", "counters that older transformers saved; made anew"),
    ),
)


def load_encoder(source: str | Path) -> tuple[nn.Module, LoadReport]:
    """The BERT in a folder (config.json and weights), or of that name on the Hugging Face hub; on the CPU, in float32.

    Raises UserError when there is no such folder or name, or it is no BERT; WeightsError when the weights do not arrive
    whole, or would run code; MissingExtra without what is needed to read or fetch it.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        folder = fetch(str(source))
    config = text_config(folder)
    found = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if found is None:
        raise WeightsError(f"text encoder {str(source)!r} has no weights: neither {WEIGHTS[0]} nor {WEIGHTS[1]}.")
    bert = bert_model(config)
    spec = replace(BACKBONES.get("nano"), name="text encoder", title="text encoder", layout=_LAYOUT)
    checkpoint = open_checkpoint(found)
    made = plan(spec, bert, checkpoint)
    if not made.report.whole:
        raise WeightsError(f"{found} does not load whole into the BERT of its config.json.\n{made.report.faults()}")
    fill(bert, made, checkpoint)
    return bert.eval(), made.report


def small_encoder(config: TextConfig, tokens: int) -> nn.Module:
    """A little untrained BERT for a vocabulary of `tokens`. Raises MissingExtra without transformers."""
    return bert_model(
        text_config(
            {
                "vocab_size": tokens,
                "hidden_size": config.width,
                "num_hidden_layers": config.layers,
                "num_attention_heads": max(1, config.width // 64),
                "intermediate_size": 2 * config.width,
                "max_position_embeddings": config.length,
                "hidden_dropout_prob": config.dropout,
                "attention_probs_dropout_prob": config.dropout,
            }
        )
    )


def fetch(name: str) -> Path:
    """The folder of a text encoder's files from the Hugging Face hub, out of its cache where they are there."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise MissingExtra(f"text encoder {name!r} is no folder here, and fetching it from the hub", "hub") from None
    small = ["config.json", "vocab.txt", "tokenizer_config.json"]
    try:
        # The safe file alone where there is one: the other holds the same once more.
        for weights in WEIGHTS:
            folder = Path(snapshot_download(name, allow_patterns=[*small, weights]))
            if (folder / weights).is_file():
                return folder
    except Exception as error:  # the hub's, the connection's and the cache's own errors
        said = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"text encoder {name!r} is neither a folder here nor a name the hub gives us ({said}). Give the folder "
            "with its config.json, weights and vocab.txt, or its name on the hub."
        ) from error
    return folder
