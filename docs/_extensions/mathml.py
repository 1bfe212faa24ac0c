"""Equations as MathML, which browsers draw by themselves: no script and nothing from the network."""

from __future__ import annotations

import html
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert


def _drawn(node: Any, display: str) -> str:
    text = node.astext()
    return f'<span class="math" title="{html.escape(text, quote=True)}">{convert(text, display=display)}</span>'


def inline(translator: Any, node: Any) -> None:
    """An equation within a line."""
    translator.body.append(_drawn(node, "inline"))
    raise nodes.SkipNode


def block(translator: Any, node: Any) -> None:
    """An equation by itself; a wide one scrolls."""
    translator.body.append(f'<div class="equation">{_drawn(node, "block")}</div>\n')
    raise nodes.SkipNode


def setup(app: Any) -> dict[str, bool]:
    """Register with Sphinx."""
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    app.config.html_math_renderer = "mathml"
    return dict(parallel_read_safe=True, parallel_write_safe=True)
