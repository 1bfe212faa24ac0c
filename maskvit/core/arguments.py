"""What commands check of their own arguments before any work: numbers, and places to write to."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path


def whole(least: int = 1) -> Callable[[str], int]:
    """An argparse type: a whole number, at least `least`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} must be at least {least}")
        return value

    return parse


def number(least: float = -math.inf, most: float = math.inf) -> Callable[[str], float]:
    """An argparse type: a finite number above `least` and at most `most`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
        if not (math.isfinite(value) and least < value <= most):
            limits = [f"above {least:g}"] if least > -math.inf else []
            limits += [f"at most {most:g}"] if most < math.inf else []
            raise argparse.ArgumentTypeError(f"{text} must be {' and '.join(limits) or 'finite'}")
        return value

    return parse


def check_output(path: Path, flag: str = "--out") -> None:
    """Raise unless a file can be written at `path`: its folder is there, is writable, and `path` is not a folder itself."""
    if path.is_dir():
        raise IsADirectoryError(f"{flag} is {str(path)!r}, which is a folder: give the name of a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{flag} is {str(path)!r}, but the folder {path.parent} does not exist: make it first")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{flag} is {str(path)!r}, but nothing can be written in {path.parent}")


def make_folder(path: Path, flag: str = "--out") -> None:
    """Make the folder a command writes to. Raises where it cannot be made or written in."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{flag} is {str(path)!r}, which cannot be made a folder: {error.strerror}") from error
    if not os.access(path, os.W_OK):
        raise PermissionError(f"{flag} is {str(path)!r}, in which nothing can be written")
