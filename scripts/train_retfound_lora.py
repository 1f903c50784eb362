"""Adapt RETFound or RETFound-Green by LoRA, as the older guides do (docs/older-guides.md)."""

import sys

from eyetune.guides.training import TRAIN_RETFOUND_LORA

if __name__ == "__main__":
    sys.exit(TRAIN_RETFOUND_LORA.enter())
