"""Sphinx: Markdown pages by myst-parser, class pages from docstrings. Nothing is fetched while building."""

from importlib.metadata import version as version_of

project = "fused_optim"
author = "fused_optim authors"
copyright = author
version = release = version_of("fused_optim")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx-mathjax-offline",  # copies MathJax beside the pages, which are then read without network
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"fused_optim {version}"

html_css_files = ["pages.css"]
html_static_path = ["_static"]

myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_type_aliases = {"ParamsT": "ParamsT"}
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Shapes and dtypes"]


def setup(app: object) -> None:
    # After the extension's own choice: this one draws its letters and needs no font files.
    app.config.mathjax_path = "mathjax/tex-svg.js"  # type: ignore[attr-defined]
