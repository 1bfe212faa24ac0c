"""Links from a page to files of the repository outside docs/ lead to copies in the site.

README.md and CHANGELOG.md have pages that include them. Any other text is shown on a page, a folder as the list of its texts; other files
are downloaded. A link to what does not exist stays as it is, and Sphinx warns of it.
"""

from __future__ import annotations

import html
import os
import pathlib
import posixpath
from collections.abc import Iterator
from typing import Any

from docutils import nodes
from sphinx import addnodes

# Files of the repository that are pages.
PAGES = {"README.md": "overview", "CHANGELOG.md": "changes"}
FOLDER = "files"  # of the site, where the copies lie
# Texts, by the ends of their names, and how their lines are highlighted.
LANGUAGES = {
    "": "none", ".txt": "none", ".lock": "none", ".py": "python", ".toml": "toml", ".md": "markdown", ".sh": "bash", ".json": "json",
    ".yaml": "yaml", ".cff": "yaml", ".Dockerfile": "docker",
}  # fmt: skip


def root_of(app: Any) -> pathlib.Path:
    """The repository: the folder that holds docs/."""
    return pathlib.Path(app.srcdir).parent


def page_of(path: pathlib.Path, root: pathlib.Path) -> str:
    """The page of the site that shows a file or folder of the repository."""
    return posixpath.join(FOLDER, path.relative_to(root).as_posix())


def target_of(app: Any, node: Any) -> tuple[pathlib.Path, str]:
    """(what a link that MyST has read leads to, anchor)."""
    if node.get("refdomain") == "doc":  # a page, by its path from docs/ (an absolute path where it lies outside) without ".md"
        return pathlib.Path(app.srcdir, node["reftarget"] + ".md"), node["reftargetid"] or ""
    path, _, anchor = node["reftarget"].partition("#")  # anything else, as written
    written_in = root_of(app) if app.env.docname in PAGES.values() else pathlib.Path(app.env.doc2path(app.env.docname)).parent
    return pathlib.Path(os.path.normpath(written_in / path)), anchor


def resolve_links(app: Any, document: nodes.document) -> None:
    """Replace what links out of docs/ in one page that was read."""
    root, docname = root_of(app), app.env.docname
    links = [node for kind in (addnodes.pending_xref, addnodes.download_reference) for node in document.findall(kind)]
    for node in links:
        if node.get("reftype") != "myst" or node["reftarget"].startswith("#"):
            continue
        path, anchor = target_of(app, node)
        if root not in path.parents or not path.exists():
            continue
        page = PAGES.get(path.relative_to(root).as_posix()) or app.env.path2doc(str(path))
        if page in app.env.found_docs:
            node.attributes.update(refdomain="doc", reftarget=page, reftargetid=anchor or None)
        elif pathlib.Path(app.srcdir) not in path.parents and (path.is_dir() or path.suffix in LANGUAGES):
            linked(app.env).setdefault(docname, set()).add(path)
            address = app.builder.get_relative_uri(docname, page_of(path, root))
            node.replace_self(nodes.reference("", "", *node.children, refuri=address, internal=True))


def linked(env: Any) -> dict[str, set[pathlib.Path]]:
    """Files and folders that need a page, by the pages that link to them; kept from one build to the next."""
    return env.__dict__.setdefault("repository_files", {})


def forget(app: Any, env: Any, docname: str) -> None:
    """A page is read again or has gone."""
    linked(env).pop(docname, None)


def files_in(folder: pathlib.Path) -> list[pathlib.Path]:
    """The text files below a folder, hidden ones and caches left out."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix in LANGUAGES)
    return [path for path in found if not any(part.startswith((".", "__pycache__")) for part in path.relative_to(folder).parts)]


def pages(app: Any) -> Iterator[tuple[str, dict[str, Any], str]]:
    """(page, what its template gets, template) of every copy."""
    root = root_of(app)
    wanted = set().union(*linked(app.env).values())
    listed = {folder: files_in(folder) for folder in wanted if folder.is_dir()}
    for path in sorted(wanted.union(*listed.values())):
        name = path.relative_to(root).as_posix()
        if path in listed:
            here = page_of(path, root)
            items = [(app.builder.get_relative_uri(here, page_of(file, root)), file.relative_to(path).as_posix()) for file in listed[path]]
            body = "".join(f'<li><a href="{html.escape(address)}">{html.escape(label)}</a></li>' for address, label in items)
            body = f"<ul>{body}</ul>"
        else:
            text, language = path.read_text(encoding="utf-8"), LANGUAGES.get(path.suffix, "none")
            body = app.builder.highlighter.highlight_block(text, language, force=True)
        yield page_of(path, root), {"title": name, "body": f"<h1>{html.escape(name)}</h1>{body}"}, "page.html"


def setup(app: Any) -> dict[str, Any]:
    """Register with Sphinx."""
    app.connect("env-purge-doc", forget)
    app.connect("doctree-read", resolve_links)
    app.connect("html-collect-pages", pages)
    return {"version": "1", "parallel_read_safe": False, "parallel_write_safe": True}
