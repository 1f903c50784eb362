"""Compare three fine-tuning strategies, as the older guides do (docs/older-guides.md)."""

import sys

from eyetune.guides.training import FINE_TUNING_COMPARISON

if __name__ == "__main__":
    sys.exit(FINE_TUNING_COMPARISON.enter())
