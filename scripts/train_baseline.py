"""Train an ordinary vision network, as the older guides do (docs/older-guides.md)."""

import sys

from eyetune.guides.training import TRAIN_BASELINE

if __name__ == "__main__":
    sys.exit(TRAIN_BASELINE.enter())
