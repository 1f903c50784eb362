"""The guides' `from scripts.model import DRClassifier`; as a program, its self-test."""

from eyetune.guides.baseline import DRClassifier

__all__ = ["DRClassifier"]

if __name__ == "__main__":
    from eyetune.guides.selftest import main

    raise SystemExit(main("model"))
