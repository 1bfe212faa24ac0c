"""What every command does with a mistake: one line that says what to do, or one list; a traceback only with --debug."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence

# Errors whose text was written for the person at the keyboard. Anything else is a fault of ours, and its type is told too.
EXPECTED = (ValueError, RuntimeError, OSError, ImportError, FloatingPointError, MemoryError)
FAILED, INTERRUPTED = 2, 128 + signal.SIGINT


class Mistakes(ValueError):
    """Several mistakes, found before any work was done and shown as one list."""

    def __init__(self, mistakes: Sequence[str]):
        self.mistakes = tuple(dict.fromkeys(mistakes))
        lines = [f"{len(self.mistakes)} mistakes:", *(f"  - {m.replace(chr(10), chr(10) + '    ')}" for m in self.mistakes)]
        super().__init__(self.mistakes[0] if len(self.mistakes) == 1 else "\n".join(lines))


class Checks:
    """Collects the mistakes of several independent checks. See `all_mistakes`."""

    def __init__(self) -> None:
        self.mistakes: list[str] = []

    @contextlib.contextmanager
    def check(self, *expected: type[Exception]) -> Iterator[None]:
        """Note a ValueError, or one of `expected`, and continue after the block."""
        noted: tuple[type[Exception], ...] = (ValueError, *expected)
        try:
            yield
        except noted as error:
            self.mistakes += error.mistakes if isinstance(error, Mistakes) else [message(error)]


@contextlib.contextmanager
def all_mistakes() -> Iterator[Checks]:
    """`with all_mistakes() as checks:` run blocks under `checks.check()`; raises `Mistakes` at the end where there were any."""
    checks = Checks()
    yield checks
    if checks.mistakes:
        raise Mistakes(checks.mistakes)


def printable(text: str) -> str:
    """`text` with control characters spelled out: names out of files reach a terminal as text, not as commands to it."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def message(error: BaseException) -> str:
    """What to tell of an error: its own text, the file first where there is one, its type where the text alone says too little."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return printable(f"{error.filename}: {error.strerror}")
    text = str(error).strip()
    if isinstance(error, EXPECTED) and text:
        return printable(text)
    return printable(f"{type(error).__name__}: {text}" if text else type(error).__name__)


def run_command(command: Callable[[], int | None], debug: bool = False) -> int:
    """Call `command` and return the exit status: its own, 2 for an error (told in one line), 130 for Ctrl-C.

    With `debug` an error leaves with its traceback.
    """
    try:
        return command() or 0
    except BrokenPipeError:
        # Whoever read the output (head, less) has enough; Python must not complain again when it closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        if debug:
            raise
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if debug:
            raise
        print(f"error: {message(error)}", file=sys.stderr)
        if not isinstance(error, EXPECTED):
            print("This is a fault of maskvit, not yours; the same command with --debug shows where it happened.", file=sys.stderr)
        return FAILED


def add_debug(parser: argparse.ArgumentParser) -> None:
    """The flag that every command has."""
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
