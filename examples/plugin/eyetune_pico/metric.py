"""A metric from outside: it is in metrics.json, in history.csv, with an interval, and `train.metric` may name it."""

from __future__ import annotations

import numpy as np

from eyetune.metrics.metric import Undefined, metric
from eyetune.metrics.outcomes import Outcomes


@metric("within_one", scope="ordered")
def within_one(outcomes: Outcomes) -> float:
    """Share of images whose grade is called right or missed by one."""
    if outcomes.num_classes < 3:
        raise Undefined("with two classes nothing can be missed by two")
    distance = np.abs(outcomes.predicted - outcomes.targets)
    return float((distance <= 1).mean())
