"""A headless Chromium for tests of pages, driven through its DevTools protocol over a pipe: nothing but the standard library."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--hide-scrollbars", "--remote-debugging-pipe")  # fmt: skip
# The browser reads commands from descriptor 3 and writes to 4.
START = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
SECONDS = 60


class Page:
    """One tab. Methods wait for the browser's answer; `TimeoutError` after a minute without one."""

    def __init__(self, to_browser: int, from_browser: int):
        self.to_browser, self.from_browser = to_browser, from_browser
        self.session: str | None = None
        self.sent, self.unread = 0, b""
        self.told: list[str] = []  # uncaught errors and messages of the console
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and give its result."""
        self.sent += 1
        message = {"id": self.sent, "method": method, "params": parameters, **({"sessionId": self.session} if self.session else {})}
        os.write(self.to_browser, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + SECONDS
        while True:
            answer = self._next(end)
            if answer.get("method") in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
                self.told.append(json.dumps(answer["params"]))
            if answer.get("id") == self.sent:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def _next(self, end: float) -> dict[str, Any]:
        while b"\0" not in self.unread:
            if not select.select([self.from_browser], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError("the browser does not answer")
            part = os.read(self.from_browser, 2**16)
            if not part:
                raise RuntimeError("the browser has ended")
            self.unread += part
        one, _, self.unread = self.unread.partition(b"\0")
        return json.loads(one)

    def open(self, url: str, width: int = 1280, height: int = 900) -> None:
        """Load a page in a window of that size."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def value(self, script: str) -> Any:
        """What an expression of JavaScript is."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{script}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def wait(self, script: str) -> Any:
        """Wait until an expression is true, and give its value."""
        end = time.monotonic() + SECONDS
        while not (found := self.value(script)):
            if time.monotonic() > end:
                raise TimeoutError(f"never true: {script}; the page told: {self.told}")
            time.sleep(0.02)
        return found

    def drag(self, *selectors: str) -> None:
        """Press the mouse on the first element, move it over the others, let go; on one element this is a click."""
        for number, selector in enumerate(selectors):
            script = f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: 'center'}}); "
            if number:
                script = f"(() => {{ const e = document.querySelector({json.dumps(selector)}); "
            x, y = self.value(script + "const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()")
            self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y, button="left" if number else "none", buttons=min(number, 1))
            if not number:
                self.call("Input.dispatchMouseEvent", type="mousePressed", x=x, y=y, button="left", buttons=1, clickCount=1)
        self.call("Input.dispatchMouseEvent", type="mouseReleased", x=x, y=y, button="left", buttons=0, clickCount=1)


@contextlib.contextmanager
def open_browser(profile: str) -> Iterator[Page]:
    """A tab of a browser of its own, which keeps what it stores in the folder `profile`; the test skips where there is none."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed")
    read_command, write_command = os.pipe()
    read_answer, write_answer = os.pipe()
    command = [sys.executable, "-c", START, str(read_command), str(write_answer), program, *FLAGS, f"--user-data-dir={profile}"]
    process = subprocess.Popen(command, pass_fds=(read_command, write_answer), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    os.close(read_command)
    os.close(write_answer)
    try:
        page = Page(write_command, read_answer)
        yield page
        with contextlib.suppress(RuntimeError, TimeoutError, OSError):
            page.session = None
            page.call("Browser.close")
    finally:
        process.kill()
        process.wait()
        os.close(write_command)
        os.close(read_answer)
