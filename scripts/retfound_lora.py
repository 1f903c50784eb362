"""The guides' `from scripts.retfound_lora import RETFoundLoRA`; as a program, its self-test."""

from eyetune.guides.lora import RETFoundLoRA

__all__ = ["RETFoundLoRA"]

if __name__ == "__main__":
    from eyetune.guides.selftest import main

    raise SystemExit(main("retfound_lora"))
