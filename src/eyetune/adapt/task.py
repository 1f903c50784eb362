"""What the user says about what is to be learnt. Importable without torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

from pydantic import model_validator

from eyetune.section import Section

Kind = Literal["auto", "classification", "ordinal", "multilabel", "regression"]
Head = Literal["softmax", "corn", "coral", "regression"]

READS: Mapping[str, Literal["classes", "labels", "value"]] = {
    "classification": "classes",
    "ordinal": "classes",
    "multilabel": "labels",
    "regression": "value",
}
"""What the label column holds for each kind of task."""


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

    def settled(self, *, several_labels: bool) -> TaskConfig:
        """The same with its kind settled, where it is auto.

        Args:
            several_labels: whether data.label_column is a list of columns.
        """
        if self.kind != "auto":
            return self
        kind = "ordinal" if self.head != "softmax" else "multilabel" if several_labels else "classification"
        return self.model_copy(update={"kind": kind})

    def misfits(
        self, *, several_labels: bool, named_classes: bool, balance: str, smoothing: float
    ) -> Iterator[tuple[str, str]]:
        """What other sections ask for that this task cannot do: the dotted path and what is wrong with it.

        Args:
            several_labels: whether data.label_column is a list of columns.
            named_classes: whether data.classes is given.
            balance: train.balance.
            smoothing: train.label_smoothing.
        """
        kind = self.settled(several_labels=several_labels).kind
        if several_labels and kind != "multilabel":
            yield "data.label_column", f"several columns are for task.kind multilabel, not for {kind}"
        if kind == "multilabel" and not several_labels:
            yield "data.label_column", "task.kind multilabel needs the list of its columns of 0 and 1: [a, b]"
        if named_classes and kind in ("multilabel", "regression"):
            yield "data.classes", f"task.kind {kind} has no classes"
        if kind == "multilabel" and balance == "sampler":
            yield "train.balance", "an image with several labels cannot be drawn for one of them: weighted or focal"
        if kind == "regression" and balance != "none":
            yield "train.balance", f"{balance} is for classes, and task.kind regression has none"
        if self.head != "softmax" and balance == "focal":
            yield "train.balance", f"focal is for task.head softmax, not for {self.head}: weighted or sampler"
        if smoothing and "regression" in (kind, self.head):
            yield "train.label_smoothing", "a number has nothing to be smoothed over: leave it at 0"
