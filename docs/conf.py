"""How the site is built from these pages: `make docs`. The source folder is the repository, so that links which work on
GitHub (`../CONTRIBUTING.md`, `../examples/…`) work here as they stand.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pygments.lexers.special import TextLexer

import eyetune

if TYPE_CHECKING:
    from sphinx.application import Sphinx

HERE = Path(__file__).parent

project = "EyeTune"
version = release = eyetune.__version__
copyright = "the EyeTune authors, Apache-2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

root_doc = "docs/index"
include_patterns = ["docs/*.md", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "src/eyetune/weights/*.md"]
exclude_patterns = [".venv", ".git", ".*_cache", "docs/_build", "runs", "demo", "models"]

# Headings are linked to as GitHub names them.
myst_heading_anchors = 5

autodoc_mock_imports = [
    "torch",
    "timm",
    "peft",
    "transformers",
    "torchvision",
    "accelerate",
    "matplotlib",
    "sklearn",
    "cv2",
    "tensorboard",
]
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_class_signature = "separated"
python_use_unqualified_type_names = True
napoleon_use_rtype = False
add_module_names = False
default_role = "literal"

html_theme = "furo"
html_title = "EyeTune"
html_logo = "_static/eye.svg"
html_favicon = "_static/eye.svg"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_additional_pages = {"index": "to-the-front.html"}
templates_path = ["_templates"]

linkcheck_timeout = 20
linkcheck_retries = 2
linkcheck_anchors = False  # pages whose anchors a script makes


def setup(app: Sphinx) -> None:
    """Tables of comma-separated values are shown as they are: Pygments has no lexer for them."""
    app.add_lexer("csv", TextLexer)
