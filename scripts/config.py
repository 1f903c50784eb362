"""The guides' `from scripts.config import Config, load_config`: their YAML, read and set by attribute."""

from eyetune.guides.settings import GuideConfig as Config
from eyetune.guides.settings import read_guide_config as load_config

__all__ = ["Config", "load_config"]
