"""Signals and the watchdog, each in a process of its own where they end it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from maskvit.training.signals import StopAsked, StopSignals
from maskvit.training.watchdog import HUNG, Watchdog
from tests.runs import ROOT


def until(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_ends_a_wait(number):
    before = signal.getsignal(number)
    with StopSignals() as signals:
        os.kill(os.getpid(), number)
        until(lambda: signals.asked)
        assert signals.asked == number
        with pytest.raises(StopAsked), signals.interruptible():
            pytest.fail("what can be given up was begun")
    with StopSignals() as signals:
        threading.Timer(0.2, os.kill, (os.getpid(), number)).start()
        with pytest.raises(StopAsked) as asked, signals.interruptible():
            threading.Event().wait(10)
        assert asked.value.number == number
    assert signal.getsignal(number) is before


def test_signals_cannot_be_heard_in_another_thread():
    heard = []
    thread = threading.Thread(target=lambda: heard.append(StopSignals().__enter__().asked))
    thread.start()
    thread.join()
    assert heard == [0]


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)


# The second signal comes from a thread while the main thread is busy.
BUSY = """
import os, signal, threading, time
from maskvit.training.signals import StopSignals
with StopSignals() as signals:
    for wait in (0.2, {gap}):
        threading.Timer(wait, os.kill, (os.getpid(), signal.{name})).start()
    start = time.monotonic()
    while time.monotonic() - start < 4:
        sum(range(10**5))  # short: meanwhile neither a handler nor a timer can run, and on a busy machine that becomes seconds
print("done", signals.asked)
"""


def test_a_second_signal_ends_at_once_and_an_echo_of_the_first_does_not():
    twice = run(BUSY.format(name="SIGINT", gap=2.0))
    assert twice.returncode == 130 and "done" not in twice.stdout
    echo = run(BUSY.format(name="SIGTERM", gap=0.4))
    assert echo.returncode == 0 and echo.stdout == "done 15\n", echo.stderr


HANGS = """
import logging, time
from maskvit.training.watchdog import Watchdog
logging.basicConfig(format="%(message)s")
watchdog = Watchdog(0.5)
for _ in range(10):
    with watchdog.watching("a step that ends"):
        time.sleep(0.1)
def hangs():
    time.sleep(60)
with watchdog.watching("step 12"):
    hangs()
"""


def test_the_watchdog_names_what_hangs_and_where():
    ended = run(HANGS)
    assert ended.returncode == HUNG
    assert (
        "in hangs" in ended.stderr and "error: step 12 did not end within 0.5 s" in ended.stderr and "a step that ends" not in ended.stderr
    )


def test_a_process_that_was_suspended_does_not_hang():
    code = HANGS.replace("Watchdog(0.5)", "Watchdog(4)").replace("time.sleep(60)", "print('in', flush=True); time.sleep(1)")
    process = subprocess.Popen([sys.executable, "-c", code + "print('out')"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "in\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(6)
    process.send_signal(signal.SIGCONT)
    assert process.communicate(timeout=30)[0] == "out\n" and process.returncode == 0


def test_the_watchdog_leaves_alone_what_is_not_watched():
    ended: list[int] = []
    watchdog = Watchdog(0.2, ended.append)
    with watchdog.watching("short"):
        pass
    time.sleep(0.6)
    watchdog.close()
    assert not ended


# At the first import of main.py, and swallowed as in a callback of a library.
IMPORTING = """
import os, runpy, signal, sys
class Interrupting:
    def find_spec(name, path=None, target=None):
        if name == "absl":
            try:
                os.kill(os.getpid(), signal.SIGINT)
                sum(range(10**6))
            except BaseException:
                pass
sys.meta_path.insert(0, Interrupting)
sys.argv[1:] = ["--help"]
runpy.run_path({main!r}, run_name="__main__")
"""


def test_ctrl_c_while_main_is_imported_is_not_lost():
    ended = run(IMPORTING.format(main=str(ROOT / "main.py")))
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, "", "")
