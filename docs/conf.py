"""The site: `make docs` builds it from these pages and from the docstrings of maskvit/ into site/."""

from __future__ import annotations

import os
import pathlib
import re
import sys
from typing import Any

from sphinx.util.matching import patfilter

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "_extensions"), str(HERE.parent)]
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # modules are imported, nothing is computed

project = "maskvit"
author = "the authors of maskvit"
project_copyright = "the authors of maskvit"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "docstrings", "mathml", "repository_files"]
exclude_patterns = ["_extensions", "_static"]

# Pages are read in the repository too: plain Markdown, and headings are linked to as GitHub does it.
myst_heading_anchors = 4
myst_enable_extensions = ["dollarmath"]
myst_dmath_double_inline = True
html_math_renderer = "mathml"
smartquotes = False  # what stands in quotes is typed as it is
highlight_language = "none"  # most blocks are shell commands with comments

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_inherit_docstrings = False
autodoc_typehints_format = "short"
add_module_names = False  # headings say the module
python_display_short_literal_types = True
python_maximum_signature_line_length = 100
toc_object_entries_show_parents = "hide"
napoleon_custom_sections = [("Options", "params_style")]
napoleon_use_ivar = True
napoleon_attr_annotations = False  # the signature above them shows the types
# Names of links are checked in pages; types in signatures come from other packages, whose sites are not read here.
nitpicky = True
nitpick_ignore_regex = [("py:.*", ".*")]

html_theme = "furo"
html_title = "maskvit"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_last_updated_fmt = None


def list_pages(app: Any, docname: str, source: list[str]) -> None:
    """Contents of index.md: a line with "*" may find no page, and "*" alone stands for the pages that no other line names."""
    if docname != "index":
        return
    patterns = {line: re.sub(r"^.*<(.*)>$", r"\1", line) for line in source[0].splitlines() if re.fullmatch(r"[\w/]*\*?|\w+ <\w+>", line)}
    found = {line: patfilter(app.env.found_docs, pattern) for line, pattern in patterns.items()}
    named = set().union(*(pages for line, pages in found.items() if line != "*"))
    listed = {line: line if pages else None for line, pages in found.items() if "*" in line}
    listed["*"] = "\n".join(sorted({*found["*"]} - named - {docname})) or None
    lines = (listed.get(line, line) for line in source[0].splitlines())
    source[0] = "\n".join(line for line in lines if line is not None)


def setup(app: Any) -> None:
    """Register with Sphinx."""
    app.connect("source-read", list_pages)
