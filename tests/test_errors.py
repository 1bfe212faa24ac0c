"""What commands do with mistakes."""

from __future__ import annotations

import logging
import sys
import threading

import pytest

from maskvit.core.errors import FAILED, INTERRUPTED, Mistakes, all_mistakes, log_lines, message, printable, run_command


def fail(error):
    raise error


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("config.total is 0"), "error: config.total is 0\n"),
        (FileNotFoundError(2, "No such file or directory", "a.pth"), "error: a.pth: No such file or directory\n"),
        (OSError("no space left"), "error: no space left\n"),
        (ValueError("tensor \x1b[2J"), "error: tensor \\x1b[2J\n"),
        (MemoryError(), "error: MemoryError\n"),
    ],
)
def test_an_error_is_one_line(error, line, capsys):
    assert run_command(lambda: fail(error)) == FAILED
    assert capsys.readouterr().err == line


def test_a_fault_of_ours_tells_its_type_and_how_to_see_more(capsys):
    assert run_command(lambda: fail(KeyError("depth"))) == FAILED
    told = capsys.readouterr().err
    assert told.startswith("error: KeyError: 'depth'\n") and "--debug" in told and "Traceback" not in told


def test_debug_shows_the_traceback():
    with pytest.raises(KeyError):
        run_command(lambda: fail(KeyError("depth")), debug=True)


def test_ctrl_c_is_one_word(capsys):
    assert run_command(lambda: fail(KeyboardInterrupt())) == INTERRUPTED == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_the_status_of_a_command_is_its_own():
    assert run_command(lambda: None) == 0
    assert run_command(lambda: 1) == 1


def test_several_mistakes_are_one_list():
    with pytest.raises(Mistakes) as told, all_mistakes() as checks:
        with checks.check():
            raise ValueError("first")
        with checks.check(OSError):
            raise FileNotFoundError(2, "No such file or directory", "x")
        with checks.check():
            raise Mistakes(["second", "first"])
    assert str(told.value) == "3 mistakes:\n  - first\n  - x: No such file or directory\n  - second"


def test_one_mistake_needs_no_list():
    with pytest.raises(Mistakes, match="^only$"), all_mistakes() as checks, checks.check():
        raise ValueError("only")


class Unraisable:
    """What fails where nobody could catch it, as callbacks of C++ libraries do."""

    def __del__(self):
        fail(RuntimeError("Event loop is closed"))


def test_errors_in_threads_of_libraries_are_lines(capsys):
    def command():
        for _ in range(3):
            thread = threading.Thread(target=fail, args=(RuntimeError("Event loop is closed"),))
            thread.start()
            thread.join()
            Unraisable()
        log_lines()
        try:
            fail(OSError("File too large"))
        except OSError:
            logging.getLogger("absl").error("a save failed\nwith details", exc_info=True)
            logging.getLogger("asyncio").error("never retrieved", exc_info=True)

    before = sys.excepthook, sys.unraisablehook, threading.excepthook
    assert run_command(command) == 0
    assert capsys.readouterr().err == "in a thread beside: Event loop is closed\na save failed\n"
    assert (sys.excepthook, sys.unraisablehook, threading.excepthook) == before


def test_printable_keeps_lines_and_letters():
    assert printable("ä\n\tb\x07\u202e") == "ä\n\tb\\x07\\u202e"
    assert message(KeyError()) == "KeyError"
