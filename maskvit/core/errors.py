"""What every command does with a mistake: one line that says what to do, or one list; a traceback only with --debug."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

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
        with contextlib.nullcontext() if debug else _threads_in_lines():
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


@contextlib.contextmanager
def _threads_in_lines() -> Iterator[None]:
    """What libraries raise in threads and callbacks of their own, on a full disk say, is one line each and not a traceback."""
    told: set[str] = set()

    def tell(error: BaseException | None) -> None:
        line = f"in a thread beside: {message(error).partition(chr(10))[0]}" if error is not None else ""
        if line not in told:
            told.add(line)
            print(line, file=sys.stderr)

    hooks: tuple[Any, ...] = sys.excepthook, sys.unraisablehook, threading.excepthook
    sys.excepthook = lambda kind, error, trace: tell(error)
    sys.unraisablehook = lambda arguments: tell(arguments.exc_value)
    threading.excepthook = lambda arguments: tell(arguments.exc_value)
    try:
        yield
    finally:
        sys.excepthook, sys.unraisablehook, threading.excepthook = hooks


class _Lines(logging.Formatter):
    """Log records as their first line, where an exception hangs on them."""

    def format(self, record: logging.LogRecord) -> str:
        if not record.exc_info:
            return super().format(record)
        return record.getMessage().partition("\n")[0]


def log_lines(debug: bool = False) -> None:
    """Log to standard error as plain lines: ours, and warnings of libraries. Their tracebacks are shown with `debug`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s") if debug else _Lines("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for noisy in ("absl", "orbax", "jax", "grain"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # It reports what became of tasks inside Orbax whose failure Orbax has raised already.
    logging.getLogger("asyncio").setLevel(logging.WARNING if debug else logging.CRITICAL)


def add_debug(parser: argparse.ArgumentParser) -> None:
    """The flag that every command has."""
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
