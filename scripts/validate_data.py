"""Look for what would make a result wrong, as the older guides do (docs/older-guides.md): command and Python name."""

import sys

from eyetune.guides.validation import VALIDATE_DATA, DataValidator

__all__ = ["DataValidator"]

if __name__ == "__main__":
    sys.exit(VALIDATE_DATA.enter())
