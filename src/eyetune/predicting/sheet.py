"""What an exported model says of itself, beside its weights: all that a prediction has to repeat, and its origin.

One JSON text of a fixed form: a metadata property of an ONNX file, or `eyetune.json` in the folder of another export.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, FiniteFloat, ValidationError, field_validator, model_validator

from eyetune.data.config import Contrast, Fit
from eyetune.data.fundus import FundusSettings
from eyetune.metrics.calibration import read_calibration
from eyetune.metrics.fitted import Fitted
from eyetune.metrics.heads import Head
from eyetune.metrics.part import Part

SCHEMA = 1
"""Version of the form; raised when a reader of the old one would misunderstand the new one."""

RESEARCH = "For research use. Not a medical device, not a diagnosis."

_LONGEST = 1000
"""Signs of a text."""


def _plain(text: str) -> str:
    """Texts of a file from outside are printed: nothing in them may move the cursor or fill the screen."""
    if len(text) > _LONGEST or not text.isprintable():
        raise ValueError("a text that is not plain")
    return text


Plain = Annotated[str, AfterValidator(_plain)]
Positive = Annotated[float, Field(gt=0)]


class Normalisation(Part):
    """(image / 255 - mean) / std, a channel each: red, green, blue."""

    mean: tuple[FiniteFloat, FiniteFloat, FiniteFloat]
    std: tuple[Positive, Positive, Positive]


class Squares(Part):
    """How a photograph becomes the square uint8[pixels, pixels, 3]: :class:`eyetune.data.fundus.FundusSettings`."""

    pixels: int = Field(ge=8, le=4096)
    fit: Fit
    crop: bool
    contrast: Contrast
    bits: int | None = Field(default=None, ge=9, le=16)

    @classmethod
    def of(cls, settings: FundusSettings) -> Squares:
        """From the settings of a run."""
        return cls(**asdict(settings))

    @property
    def settings(self) -> FundusSettings:
        """As the preparation takes them."""
        return FundusSettings(**self.model_dump())


class Checked(Part):
    """What the export was found to differ by from its run, on photographs."""

    images: int = Field(ge=1)
    split: Plain
    """Of which split they were."""
    probabilities: float = Field(ge=0)
    """The largest difference of a calibrated probability; of a number, in standard deviations of the training
    images."""
    equal_calls: float = Field(ge=0, le=1)
    """Share of images that are called the same."""
    tolerance: float = Field(ge=0)
    """What the largest difference had to stay below."""
    least_equal: float = Field(ge=0, le=1)
    """What the share of equal calls had to reach."""


class Base(Part):
    """The weights a run began with."""

    fingerprint: Plain
    """SHA-256 over names, shapes and bytes of the network's tensors, whatever file they came from."""
    file: Plain | None = None
    sha256: Plain | None = None
    """Of the file."""


class Sheet(Part):
    """What an exported model is."""

    schema_number: int = Field(default=SCHEMA, alias="schema", ge=1)
    form: Literal["onnx", "safetensors", "adapter"]
    numbers: Literal["float32", "int8"] = "float32"
    """In what the network computes."""
    quantised: Plain | None = None
    """How, where its numbers are int8."""
    backbone: Plain
    title: Plain
    licence: Plain
    """Of the backbone's weights: what was made from them is bound by it."""
    base: Base
    adapt: dict[str, Any]
    """The strategy, as the configuration has it."""
    classes: tuple[Plain, ...] = Field(min_length=1, max_length=10_000)
    task: Head
    squares: Squares
    normalisation: Normalisation
    calibration: dict[str, Any] | None = None
    """The content of calibration.json."""
    sites: dict[Plain, dict[str, Any]] = Field(default_factory=dict)
    """The content of calibration/SITE.json, by site."""
    digest: Plain | None = None
    """SHA-256 of what the run's training changed."""
    checked: Checked | None = None
    versions: dict[Plain, Plain] = Field(default_factory=dict)
    use: Plain = RESEARCH

    @field_validator("calibration")
    @classmethod
    def _readable(cls, content: dict[str, Any] | None) -> dict[str, Any] | None:
        if content is not None:
            read_calibration(content)
        return content

    @field_validator("sites")
    @classmethod
    def _all_readable(cls, sites: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for content in sites.values():
            read_calibration(content)
        return sites

    @model_validator(mode="after")
    def _fits(self) -> Sheet:
        if len(set(self.classes)) < len(self.classes) or (len(self.classes) < 2 and self.task.kind in _NEED_TWO):
            raise ValueError("classes: too few, or one twice")
        for content in (self.calibration, *self.sites.values()):
            if content is not None and tuple(content["classes"]) != self.classes:
                raise ValueError("calibration: of other classes")
        return self

    def fitted(self, site: str | None = None) -> Fitted | None:
        """The calibration, or that of a site. Raises KeyError for a site there is none for."""
        content = self.calibration if site is None else self.sites[site]
        return None if content is None else read_calibration(content)

    def text(self) -> str:
        """As JSON."""
        return json.dumps(self.to_dict(), ensure_ascii=False, allow_nan=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON content."""
        return self.model_dump(mode="json", by_alias=True)


_NEED_TWO = ("classification", "ordinal")


def read_sheet(text: str) -> Sheet:
    """The sheet that a JSON text says. Raises ValueError, in one line, for what is none."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON ({error})") from error
    found = content.get("schema") if isinstance(content, dict) else None
    if isinstance(found, int) and found > SCHEMA:
        raise ValueError(f"it has schema {found}, and this EyeTune reads {SCHEMA}: use a newer EyeTune")
    try:
        return Sheet.model_validate(content)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, one['loc'])) or 'as a whole'}: {one['msg']}" for one in error.errors()]
        raise ValueError("; ".join(faults[:3])) from error
