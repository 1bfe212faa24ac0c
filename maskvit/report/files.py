"""Writing a report: the folder is looked for before any work, and a file appears whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def check_out(out: Path) -> None:
    """Raise FileNotFoundError where the folder of `out` does not exist."""
    if not out.parent.is_dir():
        raise FileNotFoundError(f"--out is {str(out)!r}, but the folder {out.parent} does not exist: make it first")


def write(out: Path, text: str) -> None:
    """Write `text` by way of a partial file beside it."""
    partial = out.with_name(out.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, out)
