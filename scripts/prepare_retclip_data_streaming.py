"""Prepare photographs and texts for RET-CLIP, as the older guides do (docs/older-guides.md)."""

import sys

from eyetune.guides.pairs import PREPARE_RETCLIP_DATA

if __name__ == "__main__":
    sys.exit(PREPARE_RETCLIP_DATA.enter())
