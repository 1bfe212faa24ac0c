"""One self-contained HTML page."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Prose(NamedTuple):
    """A paragraph of plain text."""

    text: str


class Table(NamedTuple):
    """Rows of cells under a header; columns of numbers and percentages are aligned right."""

    header: Sequence[str]
    rows: Sequence[Sequence[Any]]


class Figure(NamedTuple):
    """A PNG or SVG with its caption, which is also the text for those who cannot see it."""

    image: bytes
    caption: str


class Commands(NamedTuple):
    """Text to copy: commands, a config, a log."""

    text: str


class Section(NamedTuple):
    """A heading and what stands under it."""

    heading: str
    blocks: Sequence[Prose | Table | Figure | Commands]


_STYLE = """
:root { color-scheme: light dark; }
:root { --paper: #ffffff; --ink: #1c2026; --faint: #5c6570; --line: #dfe3e8; --panel: #f5f7f9; --accent: #2f6fb5; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15181c; --ink: #e4e7eb; --faint: #9aa4af; --line: #2d333b; --panel: #1e2329; --accent: #7fb2e8; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main, header { max-width: 76rem; margin: 0 auto; padding: 0 1.5rem; }
header { padding-top: 2.5rem; padding-bottom: 1rem; border-bottom: 1px solid var(--line); }
h1 { overflow-wrap: anywhere; font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em; }
header p { margin: 0; max-width: 50rem; font-size: 1.06rem; }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; margin-top: 1rem; font-size: .92rem; }
a { color: var(--accent); text-decoration: none; } a:hover { text-decoration: underline; }
h2 { font-size: 1.3rem; margin: 2.4rem 0 .7rem; }
p { max-width: 50rem; margin: .6rem 0; }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem; overflow-x: auto;
  font: .86rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.wide { overflow-x: auto; margin: .8rem 0; }
.wide:has(table) { background:
  linear-gradient(90deg, var(--paper) 30%, transparent) left, linear-gradient(270deg, var(--paper) 30%, transparent) right,
  linear-gradient(90deg, #0003, transparent) left, linear-gradient(270deg, #0003, transparent) right;
  background-size: 3rem 100%, 3rem 100%, .8rem 100%, .8rem 100%; background-repeat: no-repeat;
  background-attachment: local, local, scroll, scroll; }
table { border-collapse: collapse; font-size: .94rem; }
th, td { padding: .4rem .9rem .4rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { color: var(--faint); font-weight: 600; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; padding-left: .9rem; }
figure { margin: 1rem 0; }
figure img { display: block; max-width: 100%; height: auto; border: 1px solid var(--line); border-radius: 8px; background: #fff; }
figure img.svg { border: 0; border-radius: 0; background: none; }
figcaption { color: var(--faint); font-size: .92rem; margin-top: .4rem; max-width: 56rem; }
footer { height: 3rem; }
@media (max-width: 600px) {
  nav { flex-wrap: nowrap; overflow-x: auto; } nav a { white-space: nowrap; }
  td:last-child:not(.number) { min-width: 11rem; }
}
"""


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (float, np.floating)) else str(value)


def _is_number(value: Any) -> bool:
    """Whether a cell is aligned as a number: one, the text of one, a percentage, or "-" where there is none."""
    return isinstance(value, (int, float, np.number)) or re.fullmatch(r"-|[+-]?\d+(\.\d+)?%?", str(value)) is not None


def _kind_and_width(image: bytes) -> tuple[str, int]:
    """("png" or "svg+xml", width in CSS pixels)."""
    if image.startswith(b"\x89PNG"):
        return "png", int.from_bytes(image[16:20], "big")
    points = re.search(rb'<svg[^>]* width="([\d.]+)pt"', image)
    if not points:
        raise ValueError("a figure is neither a PNG nor an SVG with a width in points")
    return "svg+xml", round(float(points[1]) * 96 / 72)


def _block(block: Prose | Table | Figure | Commands) -> str:
    match block:
        case Prose(text):
            return f"<p>{html.escape(text)}</p>"
        case Commands(text):
            return f"<pre>{html.escape(text.strip())}</pre>"
        case Figure(image, caption):
            data, words = base64.b64encode(image).decode("ascii"), html.escape(caption)
            kind, width = _kind_and_width(image)
            # A wide figure is no narrower than can be read: a phone scrolls it.
            size = f'style="min-width: min({width}px, 44rem)"'
            shown = f'<img src="data:image/{kind};base64,{data}" class="{kind[:3]}" alt="{words}" {size}>'
            return f'<figure><div class="wide">{shown}</div><figcaption>{words}</figcaption></figure>'
        case Table(header, rows):
            if ragged := [row for row in rows if len(row) != len(header)]:
                raise ValueError(f"a table row has {len(ragged[0])} cells under a header of {len(header)}: {ragged[0]}")
            numeric = [all(_is_number(row[i]) for row in rows) and any(row[i] != "-" for row in rows) for i in range(len(header))]
            mark = [' class="number"' if number else "" for number in numeric]
            head = "".join(f"<th{m}>{html.escape(name)}</th>" for m, name in zip(mark, header, strict=True))
            body = "".join(
                "<tr>" + "".join(f"<td{m}>{html.escape(_cell(cell))}</td>" for m, cell in zip(mark, row, strict=True)) + "</tr>\n"
                for row in rows
            )
            return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>'
    raise TypeError(f"a page has Prose, Table, Figure and Commands, not {type(block).__name__}")


def html_page(title: str, sections: Sequence[Section], summary: str = "") -> str:
    """One HTML page that needs nothing beside itself: styles inline, pictures as data, no script; light and dark.

    `summary`: what came of it, in a sentence or two; it stands above all else.

    All text is escaped. Raises TypeError for a block of another kind, ValueError for a table row of another length than its header and for
    a figure that is neither PNG nor SVG.
    """
    links = "".join(f'<a href="#s{index}">{html.escape(section.heading)}</a>' for index, section in enumerate(sections))
    body = "\n".join(
        f'<section id="s{index}"><h2>{html.escape(section.heading)}</h2>\n'
        + "\n".join(_block(block) for block in section.blocks)
        + "</section>"
        for index, section in enumerate(sections)
    )
    head = f'<header><h1>{html.escape(title)}</h1><p>{html.escape(summary)}</p><nav>{links}</nav></header>'
    return document(title, f"{head}\n<main>\n{body}\n</main>\n<footer></footer>")


def document(title: str, body: str, style: str = "", allowed: str = "") -> str:
    """The whole of a page in the house style: `style` is added to it, `allowed` to what its browser may do (no scripts, no addresses)."""
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'{allowed}"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{html.escape(title)}</title>
<style>{_STYLE}{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
