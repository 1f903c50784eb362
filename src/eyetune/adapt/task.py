"""What the user says about what is to be learnt. Importable without torch."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from eyetune.section import Section

Kind = Literal["auto", "classification", "ordinal", "multilabel", "regression"]
Head = Literal["softmax", "corn", "coral", "regression"]


class TaskConfig(Section):
    """What is learnt: one class an image, an ordered grade, several yes-or-no labels, or a number."""

    kind: Kind = "auto"
    """One class an image, ordered classes (grades), several yes-or-no labels, or a number. auto: labels where
    data.label_column names several columns, grades where task.head knows an order, else classes."""
    head: Head = "softmax"
    """How classes are learnt: softmax (cross-entropy), or by their order: corn, coral, or regression with thresholds
    tuned on validation for QWK."""

    @model_validator(mode="after")
    def _coherent(self) -> TaskConfig:
        if self.head != "softmax" and self.kind not in ("auto", "ordinal"):
            raise ValueError(f"head {self.head} is for ordered classes (kind ordinal), not for {self.kind}")
        return self
