"""Chromium without a window, by the protocol WebDriver: JSON to ChromeDriver on loopback."""

import base64
import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request

import pytest
from conftest import ENVIRONMENT, PATIENCE

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
DRIVER = shutil.which("chromedriver")
MISSING = "" if BROWSER and DRIVER else "Chromium or its ChromeDriver is not installed"


class Browser:
    """A page that scripts can ask and a mouse can use. Close it by `with`."""

    def __init__(self, folder, width=1400, height=1000):
        """`folder` is for the browser's own files."""
        log = folder / "chromedriver.txt"
        with log.open("w") as out:
            self.process = subprocess.Popen(
                [DRIVER, "--port=0"], stdout=out, stderr=out, env=ENVIRONMENT
            )
        arguments = ["--headless", "--no-sandbox", f"--user-data-dir={folder / 'profile'}"]
        options = {"binary": BROWSER, "args": [*arguments, f"--window-size={width},{height}"]}
        try:
            started = wait(
                lambda: re.search(r"started successfully on port (\d+)", log.read_text())
            )
            self.url = f"http://127.0.0.1:{started[1]}/session"
            wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
            self.url += "/" + self._do("POST", "", wanted)["sessionId"]
        except BaseException:
            self.process.kill()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            self._do("DELETE", "")
        finally:
            self.process.terminate()
            self.process.wait(PATIENCE)

    def _do(self, method, route, content=None):
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(self.url + route, data, method=method)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            pytest.fail(json.load(error)["value"]["message"].splitlines()[0])

    def open(self, url):
        """Open a page, also where only what follows its # is another."""
        self._do("POST", "/url", {"url": "about:blank"})
        self._do("POST", "/url", {"url": url})

    def ask(self, script, *arguments):
        """What JavaScript returns, such as "return document.title"."""
        return self._do("POST", "/execute/sync", {"script": script, "args": arguments})

    def until(self, script, *arguments):
        """What JavaScript returns, once that is true."""
        return wait(lambda: self.ask(script, *arguments), f"{script}\n{self.text()}")

    def text(self):
        return self.ask("return document.body?.innerText ?? ''")

    def enter(self, frame):
        """Look into a frame, which a script returns."""
        self._do("POST", "/frame", {"id": self.until(frame)})

    def drag(self, *places):
        """Move the mouse to the first place (x, y) in pixels, and drag it to the others, if any."""
        moves = [{"type": "pointerMove", "duration": 100, "x": round(x), "y": round(y)}
                 for x, y in places]  # fmt: skip
        if len(places) > 1:
            moves.insert(1, {"type": "pointerDown", "button": 0})
            moves.append({"type": "pointerUp", "button": 0})
        mouse = {"type": "pointer", "id": "mouse", "actions": moves}
        self._do("POST", "/actions", {"actions": [mouse]})

    def picture(self):
        """The page as PNG."""
        return base64.b64decode(self._do("GET", "/screenshot"))


def wait(ask, what="", seconds=60):
    """What `ask()` returns, once that is true."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := ask():
            return found
        time.sleep(0.1)
    pytest.fail(f"not within {seconds} s: {what}")
