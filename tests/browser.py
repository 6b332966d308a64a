"""A real headless browser, spoken to over a pipe in the DevTools protocol: pages as people see them.

    python -m tests.browser page.html shots/page        # page-wide.png, -dark.png, -phone.png and .pdf

Source: chromedevtools.github.io/devtools-protocol; --remote-debugging-pipe reads from 3 and writes to 4.
"""
import base64
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
         "--disable-component-update --disable-sync --remote-debugging-pipe").split()
WIDE, PHONE = 1280, 390
COMPLAINTS = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")


class Browser:
    """One browser with one page, which `open` fills; `complaints` and `requests` are those of that page."""

    def __init__(self):
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        ours, theirs = os.pipe(), os.pipe()
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={self.profile.name}", "about:blank"]
        redirected = f'exec "$@" 3<&{ours[0]} 4>&{theirs[1]}'
        self.process = subprocess.Popen(["bash", "-c", redirected, "bash", *command], stderr=subprocess.DEVNULL,
                                        stdout=subprocess.DEVNULL, pass_fds=(ours[0], theirs[1]))
        os.close(ours[0]), os.close(theirs[1])
        self.to, self.back = open(ours[1], "wb", buffering=0), open(theirs[0], "rb")
        self.numbers, self.events, self.session = itertools.count(1), [], None
        page = next(target for target in self("Target.getTargets")["targetInfos"] if target["type"] == "page")
        attached = self("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **params) -> dict:
        """What the browser answers to a command; what it tells meanwhile is kept in `events`."""
        number, session = next(self.numbers), {"sessionId": self.session} if self.session else {}
        self.to.write(json.dumps({"id": number, "method": method, "params": params, **session}).encode() + b"\0")
        while (said := self._next()).get("id") != number:
            self.events.append(said)
        if "error" in said:
            raise RuntimeError(f"{method}: {said['error']['message']}")
        return said["result"]

    def _next(self) -> dict:
        said = bytearray()
        while (byte := self.back.read(1)) != b"\0":
            if not byte:
                raise RuntimeError("the browser has ended")
            said += byte
        return json.loads(said)

    def open(self, path: Path, width: int = WIDE, dark: bool = False) -> None:
        """Show a file at a width, wait until it is whole."""
        self("Emulation.setDeviceMetricsOverride", width=width, height=900, mobile=width < 600,
             deviceScaleFactor=1)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self("Page.navigate", url=Path(path).absolute().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    @property
    def complaints(self) -> list[dict]:
        """What the page has written to the console, and its errors."""
        return [event["params"] for event in self.events if event["method"] in COMPLAINTS]

    @property
    def requests(self) -> list[str]:
        """What the page has asked for, besides itself and what it holds."""
        asked = [event["params"]["request"]["url"] for event in self.events
                 if event["method"] == "Network.requestWillBeSent"]
        return [url for url in asked[1:] if not url.startswith("data:")]

    def find(self, script: str):
        """The value of a line of JavaScript in the page."""
        found = self("Runtime.evaluate", expression=script, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"]["exception"]["description"])
        return found["result"].get("value")

    def screenshot(self) -> bytes:
        """The whole page as PNG."""
        return base64.b64decode(self("Page.captureScreenshot", captureBeyondViewport=True)["data"])

    def printed(self) -> bytes:
        """The page as PDF."""
        return base64.b64decode(self("Page.printToPDF", printBackground=False)["data"])

    def close(self) -> None:
        """The browser has ended."""
        self.to.close(), self.back.close()
        self.process.terminate()
        self.process.wait()
        self.profile.cleanup()


if __name__ == "__main__":
    browser, page, shots = Browser(), Path(sys.argv[1]), sys.argv[2]
    for name, width, dark in (("wide", WIDE, False), ("dark", WIDE, True), ("phone", PHONE, False)):
        browser.open(page, width, dark)
        Path(f"{shots}-{name}.png").write_bytes(browser.screenshot())
        print(name, browser.complaints, browser.requests)
    Path(f"{shots}.pdf").write_bytes(browser.printed())
    browser.close()
