"""The book: pages of this folder, and the notebooks as `make docs` executed them from the project's own records."""

import re

project = "Private vision transformers, measured"
author = "the contributors"
html_title = project
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx-mathjax-offline"]
html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["wide.css"]
html_show_sourcelink = False
html_show_copyright = False

# Tables are made while the book is built; the notebooks come executed.
nb_execution_mode = "force"
nb_execution_excludepatterns = ["notebooks/*"]
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_merge_streams = True
nb_render_markdown_format = "myst"  # formulas in what cells print
myst_enable_extensions = ["deflist", "dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 3
# A notebook's widgets cannot move here: the static figure above each shows the same.
nb_mime_priority_overrides = [
    ("html", "application/vnd.jupyter.widget-view+json", None),
]
suppress_warnings = ["mystnb.unknown_mime_type"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True}
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Functionality", "params_style")]


def _plain(app, what, name, kind, options, lines):
    """Docstrings are plain text: |x| is a magnitude, * a product, `name` a name."""
    for i, line in enumerate(lines):
        line = line.replace("\\", "\\\\").replace("|", "\\|").replace("*", "\\*")
        lines[i] = re.sub(r"(: )(\w\.)$", r"\1\\\2", line)  # "Failure: 0." begins no list


def setup(app):
    """Before napoleon, which adds marks that are meant."""
    app.connect("autodoc-process-docstring", _plain, priority=1)
