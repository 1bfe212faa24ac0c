"""The site: it builds without warnings, every link and anchor in it leads somewhere, and it fits a phone."""

from __future__ import annotations

import collections
import html
import importlib.util
import os
import pathlib
import subprocess
import sys
import urllib.parse
from html.parser import HTMLParser

import pytest

from tests.browser import open_browser
from tests.runs import ROOT

DOCS = ROOT / "docs"
NEEDED = ("sphinx", "myst_parser", "furo")


class Page(HTMLParser):
    """What a page links to and what it loads, and the anchors that others may link to."""

    def __init__(self, text: str):
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name == "id" or (name == "name" and tag == "a"):
                self.anchors.add(value)
            elif name in ("href", "src") and value is not None:
                (self.links if tag in ("a", "use") else self.loads).append(value)


def read_pages(site: pathlib.Path) -> dict[pathlib.Path, Page]:
    return {path.resolve(): Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html")) if "_static" not in path.parts}


def dead_links(pages: dict[pathlib.Path, Page]) -> list[str]:
    """Links without a file or anchor, and files that pages load from other hosts; other hosts' pages are not asked for."""
    dead = []
    for path, page in pages.items():
        for link in [*page.links, *page.loads]:
            parts = urllib.parse.urlsplit(link)
            if parts.scheme or parts.netloc:
                dead += [f"{path.name} loads {link}"] if link in page.loads and parts.scheme != "data" else []
                continue
            target = (path.parent / urllib.parse.unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file():
                dead.append(f"{path.name} links to {link}")
            elif parts.fragment and urllib.parse.unquote(parts.fragment) not in pages.get(target, page).anchors:
                dead.append(f"{path.name} links to {link}, which has no such anchor")
    return dead


def build(docs: pathlib.Path, out: pathlib.Path) -> subprocess.CompletedProcess:
    """`make docs`, elsewhere."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        pytest.skip(f"the site needs {' and '.join(missing)}: python -m pip install -e '.[docs]'")
    flags = ["--quiet", "--builder", "html", "--fail-on-warning", "--keep-going", "--nitpicky", "--doctree-dir", str(out) + "-doctrees"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "sphinx", *flags, str(docs), str(out)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("built") / "site"
    done = build(DOCS, out)
    assert done.returncode == 0, done.stderr[-5000:]
    return out


def test_every_link_leads_somewhere(site):
    pages = read_pages(site)
    built = {path.relative_to(site).with_suffix(".md").as_posix() for path in pages}
    assert {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")} <= built
    assert not (dead := dead_links(pages)), "\n".join(dead[:50])
    counts = collections.Counter("#" in link for page in pages.values() for link in page.links)
    assert min(counts[True], counts[False]) > 500, counts
    overview = pages[site / "overview.html"]
    assert {"own_config.html", "changes.html", "files/CITATION.cff.html"} <= {link.partition("#")[0] for link in overview.links}


def test_the_reference_has_what_a_user_calls(site):
    names = {
        "maskvit": ("maskvit.load", "maskvit.features.LoadedModel.predict"),
        "masking": ("maskvit.masking.plan.drop", "maskvit.masking.scores.attention_high"),
        "guidance": ("maskvit.guidance.build_source", "maskvit.guidance.attention.SelfAttention"),
        "objectives": ("maskvit.objectives.build_objective", "maskvit.objectives.methods.mae"),
        "heads": ("maskvit.heads.segmenter.SegmenterHead",),
        "checkpoints": ("maskvit.checkpoints.CheckpointStore.restore", "maskvit.checkpoints.load_params"),
        "convert": ("maskvit.convert.convert", "maskvit.convert.export"),
        "evaluators": ("maskvit.evaluators.knn.Knn",),
        "data": ("maskvit.data.open_source", "maskvit.data.batches.train_batches"),
        "training": ("maskvit.training.setup.train", "maskvit.training.step.train_step"),
        "plots": ("maskvit.plots.pictures.to_picture",),
    }
    for page, wanted in names.items():
        text = (site / "api" / f"{page}.html").read_text(encoding="utf-8")
        assert not [name for name in wanted if name not in Page(text).anchors], page
        for never in ("jaxlib", "<function ", "<class '", "object at 0x", "Alias for field number", "Sentinel"):
            assert never not in html.unescape(text), f"{page}: {never}"
    assert [path.stem for path in (DOCS / "api").glob("*.md") if path.stem not in names] == []


@pytest.mark.parametrize("width", [390, 1280])
def test_pages_are_no_wider_than_the_window(site, tmp_path, width):
    """Wide tables and code scroll inside the page."""
    wide = {}
    with open_browser(str(tmp_path)) as page:
        for path in ("index", "overview", "evaluation", "guidance_cost", "objectives", "api/objectives", "api/heads"):
            page.open((site / f"{path}.html").as_uri(), width)
            wide[path] = page.value("document.documentElement.scrollWidth")
        page.open((site / "guidance_cost.html").as_uri(), 390)
        assert page.value("[...document.querySelectorAll('.table-wrapper')].some(table => table.scrollWidth > table.clientWidth)")
    assert not {path: found for path, found in wide.items() if found > width}


PLAIN = """
import sys
sys.path.insert(0, {extensions!r})
extensions = ["myst_parser", "repository_files"]
myst_heading_anchors = 4
"""


@pytest.fixture
def small(tmp_path):
    """A repository of two files and one page, built with what resolves links out of docs/."""

    def write(page: str) -> subprocess.CompletedProcess:
        for name, text in {
            "configs/pretrain/mae.py": "batch = 4096\n",
            "README.md": "# Read me\n\n## First steps\n\n[this](docs/index.md) [licence](LICENSE)\n",
            "CHANGELOG.md": "# Changes\n",
            "LICENSE": "Free.\n",
            "docs/overview.md": "```{include} ../README.md\n```\n",
            "docs/changes.md": "```{include} ../CHANGELOG.md\n```\n",
            "docs/conf.py": PLAIN.format(extensions=str(DOCS / "_extensions")),
            "docs/index.md": f"# Start\n\n{page}\n\n```{{toctree}}\noverview\nchanges\n```\n",
        }.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return build(tmp_path / "docs", tmp_path / "site")

    return write


def test_links_out_of_docs_lead_to_copies(small, tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"\xff\x00")
    links = ("configs/pretrain/mae.py", "configs/pretrain", "README.md#first-steps", "CHANGELOG.md", "weights.pth")
    done = small(" ".join(f"[x](../{link})" for link in links))
    assert done.returncode == 0, done.stderr
    pages = read_pages(tmp_path / "site")
    assert not dead_links(pages)
    wanted = {"files/configs/pretrain/mae.py.html", "files/configs/pretrain.html", "overview.html#first-steps", "changes.html"}
    found = set(pages[tmp_path / "site/index.html"].links)
    assert wanted <= found and any(link.startswith("_downloads/") and link.endswith("weights.pth") for link in found)
    assert "4096" in (tmp_path / "site/files/configs/pretrain/mae.py.html").read_text()
    assert "pretrain/mae.py.html" in pages[tmp_path / "site/files/configs/pretrain.html"].links
    assert {"index.html", "files/LICENSE.html"} <= set(pages[tmp_path / "site/overview.html"].links)


def test_dead_links_end_the_build(small):
    dead = {"../configs/pretrain/none.py": "none.py", "none.md": "none.md", "../README.md#last-steps": "last-steps", "#final": "final"}
    done = small("\n\n".join(f"[x]({link})" for link in dead))
    assert done.returncode == 1
    for number, named in enumerate(dead.values()):
        warnings = [line for line in done.stderr.splitlines() if f"index.md:{3 + 2 * number}: WARNING" in line]
        assert len(warnings) == 1 and named in warnings[0], done.stderr


def test_the_checker_sees_dead_links(tmp_path):
    (tmp_path / "a.html").write_text('<h1 id="x"></h1><a href="a.html#x">1</a><a href="#y">2</a><a href="b.html">3</a><img src="https://c/d.png">')
    assert dead_links(read_pages(tmp_path)) == [
        "a.html links to #y, which has no such anchor", "a.html links to b.html", "a.html loads https://c/d.png",
    ]  # fmt: skip
