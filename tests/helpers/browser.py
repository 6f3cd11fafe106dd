"""Headless Chromium, driven over two pipes by its own DevTools protocol: no library between.

with Browser(find_browser()) as browser, browser.open(path, width=400, dark=True) as page:
    page.value("document.title")          # any JavaScript expression, as JSON gives it
    page.errors, page.requests            # what the console said in anger; every address that was asked for
    page.pixels("canvas")                 # (H, W, 4) uint8
    page.screenshot(folder / "page.png")

The fixture `browser` (conftest.py) starts it once a session. Messages end with a NUL; Chromium reads
them from its file descriptor 3 and answers on 4, and ends when they close, so that it never outlives a
killed session.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from helpers.waiting import LIMIT_S, until

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--remote-debugging-pipe",
    "--no-sandbox",  # root has none; it opens our own files only
    "--no-first-run",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--disable-sync",
    "--force-color-profile=srgb",
    "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND",
)
WIDTH, HEIGHT = 1280, 900


def find_browser() -> str | None:
    """The program, or None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class BrowserError(Exception):
    """Chromium refused a command, ended, or an expression threw; says what it said."""


class Browser:
    """One Chromium process. Its pages share nothing but the process."""

    def __init__(self, program: str) -> None:
        self._profile = Path(tempfile.mkdtemp(prefix="dsatrace-chromium-"))
        to_read, self._to = os.pipe()
        self._from, to_write = os.pipe()
        self._said = (self._profile / "stderr").open("w+b")
        # Bash moves the pipes' ends to where Chromium looks for them.
        flags = *FLAGS, f"--user-data-dir={self._profile}"
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{to_read} 4>&{to_write}', "bash", program, *flags, "about:blank"],
            pass_fds=(to_read, to_write),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._said,
        )
        os.close(to_read)
        os.close(to_write)
        self._buffer = b""
        self._last_id = 0
        self._answers: dict[int, dict[str, Any]] = {}
        self._pages: dict[str, Page] = {}

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends Chromium and every process of it; waits until they are gone."""
        children = list[psutil.Process]()
        with contextlib.suppress(psutil.NoSuchProcess):  # it may have died
            children = psutil.Process(self.pid).children(recursive=True)
        os.close(self._to)
        os.close(self._from)
        for process in (self._process, *children):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()
        until(lambda: not any(map(is_alive, children)))
        self._said.close()
        shutil.rmtree(self._profile, ignore_errors=True)

    @property
    def pid(self) -> int:
        """Of its first process."""
        return self._process.pid

    @contextlib.contextmanager
    def open(
        self,
        file: Path,
        *,
        width: int = WIDTH,
        height: int = HEIGHT,
        dark: bool = False,
        javascript: bool = True,
        media: str = "screen",
    ) -> Iterator[Page]:
        """The page of a file, loaded; closed at the end."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self._pages[session] = Page(self, session)
        try:
            for domain in ("Page", "Runtime", "Network", "Log"):
                page.call(f"{domain}.enable")
            page.resize(width, height)
            page.darken(dark, media)
            page.call("Emulation.setScriptExecutionDisabled", value=not javascript)
            page.load(file)
            yield page
        finally:
            del self._pages[session]
            self.call("Target.closeTarget", targetId=target)

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """A command's result; raises `BrowserError` with what Chromium says against it."""
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": parameters}
        self._send(message if session is None else message | {"sessionId": session})
        while self._last_id not in self._answers:
            self.receive()
        answer = self._answers.pop(self._last_id)
        if "error" in answer:
            raise BrowserError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def _send(self, message: dict[str, Any]) -> None:
        data = json.dumps(message).encode() + b"\0"
        try:
            while data:
                data = data[os.write(self._to, data) :]
        except BrokenPipeError as error:
            raise BrowserError(self._ended()) from error

    def receive(self) -> None:
        """Takes one message in, an answer or an event; waits for it."""
        deadline = time.monotonic() + LIMIT_S
        while b"\0" not in self._buffer:
            readable, _, _ = select.select([self._from], [], [], max(0.0, deadline - time.monotonic()))
            if not readable:
                raise BrowserError("Chromium says nothing")
            data = os.read(self._from, 1 << 20)
            if not data:
                raise BrowserError(self._ended())
            self._buffer += data
        text, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(text)
        if "id" in message:
            self._answers[message["id"]] = message
        elif (page := self._pages.get(message.get("sessionId", ""))) is not None:
            page.take(message["method"], message["params"])

    def _ended(self) -> str:
        self._said.seek(0)
        said = self._said.read()[-1000:].decode(errors="replace")
        return f"Chromium ended, code {self._process.poll()}: {said}"


class Page:
    """One open page, and what it did so far."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session
        self._is_loaded = False
        self.errors: list[str] = []
        """Exceptions nobody caught, console errors and warnings, and the browser's own complaints."""
        self.requests: list[str] = []
        """Every address that was asked for, its own file first."""

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **parameters)

    def take(self, event: str, told: dict[str, Any]) -> None:
        """Notes an event of this page."""
        if event == "Page.loadEventFired":
            self._is_loaded = True
        elif event == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            self.errors.append(_thrown(told["exceptionDetails"]))
        elif event == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
            said = " ".join(str(part.get("value", part.get("description"))) for part in told["args"])
            self.errors.append(f"console.{told['type']}: {said}")
        elif event == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.errors.append(f"{told['entry']['source']}: {told['entry']['text']}")

    def load(self, file: Path) -> None:
        self._is_loaded = False
        told = self.call("Page.navigate", url=file.absolute().as_uri())
        if "errorText" in told:
            raise BrowserError(f"{file}: {told['errorText']}")
        while not self._is_loaded:
            self._browser.receive()

    def resize(self, width: int, height: int = HEIGHT) -> None:
        """Sets the window's size, in CSS pixels, one to one on the screen."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def darken(self, dark: bool, media: str = "screen") -> None:
        """Whether the reader prefers dark."""
        colours = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=media, features=[colours])

    def value(self, expression: str) -> Any:
        """What the expression gives, once it is there if it is a promise; raises what it throws."""
        told = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in told:
            raise BrowserError(f"{expression[:200]}: {_thrown(told['exceptionDetails'])}")
        return told["result"].get("value")

    def wait(self, condition: str) -> None:
        """Waits until the expression holds."""
        until(lambda: self.value(f"Boolean({condition})"))

    def press(self, key: str, modifiers: int = 0) -> None:
        """A key down and up again, as `KeyboardEvent.key` names it; modifiers: 1 Alt, 2 Ctrl, 8 Shift."""
        codes = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32, "End": 35, "Home": 36}
        codes |= {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
        told = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key], "modifiers": modifiers}
        text = {"Enter": "\r", " ": " "}.get(key)
        down = {"type": "rawKeyDown"} if text is None else {"type": "keyDown", "text": text}
        self.call("Input.dispatchKeyEvent", **down, **told)
        self.call("Input.dispatchKeyEvent", type="keyUp", **told)

    def pixels(self, selector: str) -> np.ndarray:
        """(H, W, 4) uint8: red, green, blue and alpha of the canvas that the selector finds first."""
        told = self.value(
            f"""(() => {{
                const canvas = document.querySelector({json.dumps(selector)});
                const {{width, height}} = canvas;
                const bytes = canvas.getContext("2d").getImageData(0, 0, width, height).data;
                let text = "";
                for (let at = 0; at < bytes.length; at += 32768)
                    text += String.fromCharCode(...bytes.subarray(at, at + 32768));
                return [height, width, btoa(text)];
            }})()"""
        )
        height, width, text = told
        return np.frombuffer(base64.b64decode(text), np.uint8).reshape(height, width, 4)

    def screenshot(self, path: Path, *, whole: bool = True) -> Path:
        """Writes a PNG of the whole page, or of the window."""
        told = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(told["data"]))
        return path


def is_alive(process: psutil.Process) -> bool:
    """Whether it still runs; one that waits for its parent to notice its end does not."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _thrown(details: dict[str, Any]) -> str:
    said = details.get("exception", {}).get("description") or details["text"]
    return f"{said} (line {details['lineNumber'] + 1})"
