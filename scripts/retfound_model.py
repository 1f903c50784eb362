"""The guides' `from scripts.retfound_model import load_retfound_model`, …; as a program, its self-test."""

from eyetune.guides.retfound import (
    VisionTransformer,
    get_retfound_green,
    load_retfound_green_model,
    load_retfound_model,
)

__all__ = ["VisionTransformer", "get_retfound_green", "load_retfound_green_model", "load_retfound_model"]

if __name__ == "__main__":
    from eyetune.guides.selftest import main

    raise SystemExit(main("retfound_model"))
