"""Config files and assets that come with the package: beside it in a checkout, inside it where a wheel was installed.

Config files say `from configs import common`. In a checkout's root that is the folder there. Elsewhere `bring_configs` lets the import
system find what else nobody has: a top-level package `configs` of all installed Pythons would be in everybody's way.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

PACKAGE = Path(__file__).resolve().parent.parent
FOLDERS = ("configs", "assets")


def shipped(folder: str) -> Path | None:
    """The folder of that name of `FOLDERS` that came with the package; None where it came without."""
    for place in (PACKAGE / f"_{folder}", PACKAGE.parent / folder):
        if place.is_dir():
            return place
    return None


def find(path: str | os.PathLike) -> Path:
    """`path`, or where nothing is there and it begins with one of `FOLDERS`, the file of that name that came with the package."""
    path = Path(path)
    if path.exists() or path.is_absolute() or path.parts[:1] not in [(name,) for name in FOLDERS]:
        return path
    place = shipped(path.parts[0])
    inside = place.joinpath(*path.parts[1:]) if place else path
    return inside if inside.is_file() else path


class _Configs(importlib.abc.MetaPathFinder):
    """Finds `configs` and its modules in the package, where no other finder has found them."""

    def find_spec(
        self, fullname: str, path: Iterable[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        top, *inside = fullname.split(".")
        place = shipped("configs") if top == "configs" else None
        if place is None:
            return None
        if inside:
            return importlib.machinery.PathFinder.find_spec(fullname, [str(place.joinpath(*inside[:-1]))])
        return importlib.util.spec_from_file_location(top, place / "__init__.py", submodule_search_locations=[str(place)])


def bring_configs() -> None:
    """From now on `import configs` finds what came with the package where the working directory has nothing of that name."""
    if not any(isinstance(finder, _Configs) for finder in sys.meta_path):
        sys.meta_path.append(_Configs())
