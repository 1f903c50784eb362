"""Look for good settings, as the older guides do (docs/older-guides.md)."""

import sys

from eyetune.guides.training import HYPERPARAMETER_SEARCH

if __name__ == "__main__":
    sys.exit(HYPERPARAMETER_SEARCH.enter())
