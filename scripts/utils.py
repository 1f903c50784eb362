"""The guides' `from scripts.utils import set_seed, …`: helpers for training loops of one's own."""

from eyetune.guides.checkpoints import load_checkpoint, save_checkpoint
from eyetune.guides.tools import (
    calculate_metrics,
    count_parameters,
    create_data_loaders,
    plot_confusion_matrix,
    set_seed,
)

__all__ = [
    "calculate_metrics",
    "count_parameters",
    "create_data_loaders",
    "load_checkpoint",
    "plot_confusion_matrix",
    "save_checkpoint",
    "set_seed",
]
