"""Sphinx: Markdown pages by myst-parser, class pages from docstrings. Nothing is fetched while building."""

from importlib.metadata import version as version_of

project = "fused_optim"
author = "fused_optim authors"
copyright = author
version = release = version_of("fused_optim")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"fused_optim {version}"

myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_type_aliases = {"ParamsT": "ParamsT"}
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Shapes and dtypes"]
