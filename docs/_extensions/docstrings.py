"""Docstrings of maskvit/ as Sphinx reads them, and pages that list the modules of a package.

Docstrings are prose with names in single backticks, sections such as "Args:", and indented blocks after a line that ends in ":". In a
page, a block

    ```{package} maskvit.masking
    ```

stands for a heading and the public names of the package and of each of its modules; names in the block choose the modules.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from typing import Any

from docutils import nodes
from sphinx import addnodes

BLOCK = re.compile(r"^```\{package\} (?P<name>[\w.]+)\n(?P<modules>[^`]*)```$", re.MULTILINE)
# Outside backticks "*" is a product, "|" a bar and "_" at the end of a word a part of it; *so* a word is stressed.
MARKUP = re.compile(r"(?<![\w*])\*\w+\*(?!\w)|[*|]|(?<=\w)_(?!\w)")
SIGNATURE = (
    (r"\b(?:jaxlib\._jax|jax|numpy)\.(Array|ndarray)\b", r"\1"),
    (r",? parent: [^=]*= <flax\.linen\.module\._Sentinel object>, name: str \| None = None", ""),
    (r"<function [\w.]*<lambda>>|<factory>", "..."),
    (r"<(?:built-in )?function (?:\w+\.)*(\w+)>", r"\1"),
    (r"<class '(?:\w+\.)*(\w+)'>", r"\1"),
)
SECTION = re.compile(r"\s*(Args|Attributes|Returns|Yields|Raises):$")


def expand(app: Any, docname: str, source: list[str]) -> None:
    """Write out the `package` blocks of a page."""

    def modules(match: re.Match[str]) -> str:
        package = importlib.import_module(match["name"])
        known = [module.name for module in pkgutil.iter_modules(package.__path__) if not module.name.startswith("_")]
        chosen = match["modules"].split() or known
        parts = [f"```{{eval-rst}}\n.. automodule:: {match['name']}\n```\n"]
        for name in chosen:
            parts.append(f"## `{match['name']}.{name}`\n\n```{{eval-rst}}\n.. automodule:: {match['name']}.{name}\n```\n")
        return "\n".join(parts)

    source[0] = BLOCK.sub(modules, source[0])


def plain_prose(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Make reStructuredText of a docstring, in place: what it takes for markup outside backticks is text, and names may have endings."""
    for i, line in enumerate(lines):
        if re.match(r"\s*(Returns|Raises|Yields|Options): ", line):  # a paragraph whose further lines are indented
            for further in range(i + 1, len(lines)):
                if indent(lines[further]) <= indent(line):
                    break
                lines[further] = " " * indent(line) + lines[further].lstrip()
    for i in range(len(lines) - 2):
        follows = lines[i].endswith(":") and not lines[i + 1].strip() and indent(lines[i + 2]) > indent(lines[i])
        if follows and not SECTION.match(lines[i]):
            lines[i] += ":"
    parts = re.split(r"(`[^`]+`)", "\n".join(lines))
    for i in range(0, len(parts), 2):
        parts[i] = MARKUP.sub(lambda found: found[0] if len(found[0]) > 1 else "\\" + found[0], parts[i])
    for i in range(1, len(parts), 2):
        before, after = parts[i - 1][-1:], parts[i + 1][:1]
        parts[i] = ("\\ " if before.isalnum() else "") + parts[i] + ("\\ " if after.isalnum() else "")
    lines[:] = "".join(parts).split("\n")


def indent(line: str) -> int:
    """How many spaces a line begins with."""
    return len(line) - len(line.lstrip())


def skip(app: Any, what: str, name: str, obj: Any, would_skip: bool, options: Any) -> bool | None:
    """Leave out fields whose docstring is not theirs: of named tuples ("Alias for field number 0"), or that of a type they hold."""
    return True if type(obj).__name__ == "_tuplegetter" or (isinstance(obj, type) and obj.__name__ != name) else None


def short_signature(app: Any, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: str | None) -> Any:
    """A signature as the source has it: shapes, functions and types by name; without Flax's arguments, and none for protocols."""
    if getattr(obj, "_is_protocol", False):
        return "", returns
    for pattern, text in SIGNATURE:
        signature, returns = (part and re.sub(pattern, text, part) for part in (signature, returns))
    return signature, returns


def dashes(app: Any, document: nodes.document) -> None:
    """Between an argument and its description."""
    for text in [text for text in document.findall(nodes.Text) if text == " -- "]:
        text.parent.replace(text, nodes.Text(" – "))


def name_role(role: str, raw: str, text: str, line: int, inliner: Any, options: Any = None, content: Any = ()) -> Any:
    """`name`: code, and a link where it is a name that the reference describes."""
    text = " ".join(raw.strip("`").split())
    code = nodes.literal(text, text)
    if not re.fullmatch(r"[A-Za-z_][\w.]*(\(\))?", text):
        return [code], []
    env = inliner.document.settings.env
    link = addnodes.pending_xref(
        raw, code, refdomain="py", reftype="obj", reftarget=text.removesuffix("()"), refdoc=env.docname, refexplicit=False, refwarn=False,
        **{"py:module": env.ref_context.get("py:module"), "py:class": env.ref_context.get("py:class")},
    )  # fmt: skip
    return [link], []


def setup(app: Any) -> dict[str, Any]:
    """Register with Sphinx."""
    app.add_role("name", name_role)
    app.config.default_role = "name"
    app.connect("source-read", expand)
    app.connect("autodoc-process-docstring", plain_prose, priority=100)  # before napoleon takes the sections
    app.connect("autodoc-process-signature", short_signature)
    app.connect("autodoc-skip-member", skip)
    app.connect("doctree-read", dashes)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
