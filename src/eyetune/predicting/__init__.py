"""From paths to rows: which photographs are meant, what a run says of each, and the file it is written to."""

from eyetune.predicting.output import FORMATS, choose_format, writer
from eyetune.predicting.rows import Predictor
from eyetune.predicting.sources import Sources

__all__ = ["FORMATS", "Predictor", "Sources", "choose_format", "writer"]
