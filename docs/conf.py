"""Sphinx configuration. Build with ``make docs``: warnings are errors, and no network is needed."""

import logging

import lightning_nc

project = "lightning-neural-collapse"
author = "The lightning-neural-collapse authors"
copyright = author
version = release = lightning_nc.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx-mathjax-offline",  # copies MathJax into the built site, so formulas need no network
    "myst_nb",
]
exclude_patterns = ["_build", "**/.ipynb_checkpoints"]
html_theme = "furo"
html_title = f"{project} {release}"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# The notebooks are stored without outputs and run now. An error in a cell ends the build.
nb_execution_mode = "force"
nb_execution_in_temp = True  # the files that they write are not kept
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_output_stderr = "remove"  # progress bars and the log of the Trainer
nb_mime_priority_overrides = [("html", "image/gif", 5)]

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
python_maximum_signature_line_length = 88

intersphinx_mapping = {
    "python": ("https://docs.python.org/3", None),
    "torch": ("https://docs.pytorch.org/docs/stable", None),
    "lightning": ("https://lightning.ai/docs/pytorch/stable", None),
    "torchmetrics": ("https://lightning.ai/docs/torchmetrics/stable", None),
}
intersphinx_timeout = 5


def is_not_about_the_network(record: logging.LogRecord) -> bool:
    """False for the one warning that an offline build gives. It has no type, so suppress_warnings cannot name it."""
    return not str(record.msg).startswith("failed to reach any of the inventories")


def setup(app: object) -> None:
    # Without the inventories, links to other projects are plain text; everything else is the same.
    logging.getLogger("sphinx.sphinx.ext.intersphinx").addFilter(is_not_about_the_network)
