"""Fine-tune by one of three strategies, as the older guides do (docs/older-guides.md)."""

import sys

from eyetune.guides.training import TRAIN_CLASSIFICATION

if __name__ == "__main__":
    sys.exit(TRAIN_CLASSIFICATION.enter())
