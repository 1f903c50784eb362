"""Score a model on several datasets, as the older guides do (docs/older-guides.md)."""

import sys

from eyetune.guides.evaluation import EVALUATE_CROSS_DATASET

if __name__ == "__main__":
    sys.exit(EVALUATE_CROSS_DATASET.enter())
