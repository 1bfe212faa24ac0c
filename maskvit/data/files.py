"""Which files below a folder count, and which are passed over: hidden ones, those of systems, those of an unknown kind."""

from __future__ import annotations

import collections
import os
from collections.abc import Collection, Mapping
from typing import NamedTuple

from maskvit.core.errors import printable
from maskvit.data.pictures import SUFFIXES

ARRAYS = (".npy", ".npz")

# Left behind by file managers, operating systems and tools; what begins with a dot is hidden as well.
HIDDEN = {"__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found", "__pycache__"}
HIDDEN |= {"thumbs.db", "ehthumbs.db", "desktop.ini"}

# What to do with files of a kind that is known and not read.
REMEDIES = {
    ".exr": "save it as .npy or as a float .tif",
    ".hdr": "save it as .npy or as a float .tif",
    **dict.fromkeys((".heic", ".heif", ".jp2", ".jpx", ".j2k", ".jpc", ".jxl", ".svg", ".psd", ".dng"), "convert it to PNG or JPEG"),
    **dict.fromkeys((".zip", ".tar", ".gz", ".tgz", ".7z", ".rar"), "unpack it"),
    **dict.fromkeys((".mat", ".h5", ".hdf5", ".pkl", ".pt", ".pth"), "save it as .npy"),
    "": "its name has no suffix, and the suffix tells what a file is",
}
SHOWN = 3  # names told per reason


class Listing(NamedTuple):
    """`files`: those that count, sorted; `passed_over`: all other files and folders with the reason."""

    files: list[str]
    passed_over: dict[str, str]


def is_hidden(name: str) -> bool:
    """Whether a file or folder of that name is none of the user's own."""
    return name.startswith(".") or name.lower() in HIDDEN


def list_files(top: str | os.PathLike[str], suffixes: Collection[str] = SUFFIXES) -> Listing:
    """All files below `top` (links are followed) whose suffix, in any case, is one of `suffixes`.

    Hidden files and folders, other suffixes, what is no regular file, and folders that cannot be listed or that link back to one
    above them are passed over.
    """
    files: list[str] = []
    passed_over: dict[str, str] = {}
    folders: list[tuple[str, frozenset[tuple[int, int]]]] = [(os.fspath(top), frozenset())]
    while folders:
        folder, above = folders.pop()
        try:
            about = os.stat(folder)
            entries = list(os.scandir(folder))
        except OSError as error:
            passed_over[folder] = f"cannot be listed: {error.strerror}"
            continue
        here = (about.st_dev, about.st_ino)
        if here in above:
            passed_over[folder] = "links back to a folder above it"
            continue
        for entry in entries:
            suffix = os.path.splitext(entry.name)[1].lower()
            if is_hidden(entry.name):
                passed_over[entry.path] = "hidden"
            elif entry.is_dir():
                folders.append((entry.path, above | {here}))
            elif suffix not in suffixes:
                passed_over[entry.path] = not_read(suffix)
            elif not entry.is_file() and os.path.exists(entry.path):  # a link to nowhere counts: reading it tells so
                passed_over[entry.path] = "is no regular file"
            else:
                files.append(entry.path)
    return Listing(sorted(files), dict(sorted(passed_over.items())))


def not_read(suffix: str) -> str:
    """Why files of a suffix do not count, and what to do with them."""
    remedy = REMEDIES.get(suffix)
    return (f"{suffix} is not read" if suffix else "not read") + (f": {remedy}" if remedy else "")


def tell(passed_over: Mapping[str, str], top: str | os.PathLike[str]) -> list[str]:
    """What was passed over below `top`, one line per reason: how many, some names, and what to do."""
    reasons = collections.defaultdict(list)
    for path, reason in passed_over.items():
        reasons[reason].append(printable(os.path.relpath(path, top)))
    return [
        f"passed over {len(names)}: {', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''} ({reason})"
        for reason, names in sorted((reason, sorted(names)) for reason, names in reasons.items())
    ]
