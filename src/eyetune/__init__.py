"""EyeTune: adapt retinal foundation models to your own fundus photographs, and learn honestly how good the result is.

For research; not a medical device. The public names below are imported when first used, so that `import eyetune`
and the command line stay quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from eyetune.backbones import Backbone, load_backbone
    from eyetune.clip import load_clip
    from eyetune.config import Config
    from eyetune.data.records import Manifest
    from eyetune.metrics.predictions import Predictions
    from eyetune.train.adopt import adopt
    from eyetune.train.run import Run, load_run
    from eyetune.verbs.calibrate import calibrate
    from eyetune.verbs.evaluate import evaluate
    from eyetune.verbs.export import export
    from eyetune.verbs.finetune import finetune

_HOMES = {
    "Backbone": "eyetune.backbones",
    "Config": "eyetune.config",
    "Manifest": "eyetune.data.records",
    "Predictions": "eyetune.metrics.predictions",
    "Run": "eyetune.train.run",
    "adopt": "eyetune.train.adopt",
    "calibrate": "eyetune.verbs.calibrate",
    "evaluate": "eyetune.verbs.evaluate",
    "export": "eyetune.verbs.export",
    "finetune": "eyetune.verbs.finetune",
    "load_backbone": "eyetune.backbones",
    "load_clip": "eyetune.clip",
    "load_run": "eyetune.train.run",
}

__all__ = [
    "Backbone",
    "Config",
    "Manifest",
    "Predictions",
    "Run",
    "__version__",
    "adopt",
    "calibrate",
    "evaluate",
    "export",
    "finetune",
    "load_backbone",
    "load_clip",
    "load_run",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'eyetune' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
