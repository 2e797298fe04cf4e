"""A headless Chromium for tests, spoken to by the WebDriver protocol of chromedriver; no package is needed."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-default-apps",
    "--host-resolver-rules=MAP * ~NOTFOUND",  # a request to the outside fails, and is seen
)
PATIENCE = 60.0


def find_programs() -> tuple[str, str]:
    """Chromium and its driver; the test is skipped where they are missing."""
    browser = next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
    )
    driver = shutil.which("chromedriver") or ""
    if not browser or not driver:
        pytest.skip("no Chromium" if not browser else "no chromedriver beside Chromium")
    return browser, driver


class Browser:
    """A context manager: one window, with the console and every request on record."""

    def __init__(self) -> None:
        browser, driver = find_programs()
        self.profile = tempfile.mkdtemp(prefix="chromium-")
        self.driver = subprocess.Popen(
            [driver, "--port=0", f"--log-path={self.profile}/driver.log"], stdout=subprocess.PIPE, text=True
        )
        try:
            self.address = f"http://127.0.0.1:{self._port()}/session"
            options = {"binary": browser, "args": [*FLAGS, f"--user-data-dir={self.profile}/profile"]}
            wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
            self.session = self._send("POST", "", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
            self.open("about:blank")
            self.console(), self.requests()  # what the browser's own first page asked for
        except BaseException:
            self._stop()
            raise

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._send("DELETE", f"/{self.session}")
        finally:
            self._stop()

    def _stop(self) -> None:
        self.driver.terminate()
        self.driver.wait(PATIENCE)
        shutil.rmtree(self.profile, ignore_errors=True)

    def open(self, address: str) -> None:
        """Load a page, and wait for it."""
        self._post("url", {"url": address})

    def run(self, script: str) -> Any:
        """The value of JavaScript such as ``return document.title``."""
        return self._post("execute/sync", {"script": script, "args": []})

    def console(self) -> list[str]:
        """Messages since the last call, errors of loading among them."""
        return [f"{entry['level']}: {entry['message']}" for entry in self._post("se/log", {"type": "browser"})]

    def requests(self) -> list[str]:
        """Addresses asked for since the last call."""
        events = [json.loads(entry["message"])["message"] for entry in self._post("se/log", {"type": "performance"})]
        return [each["params"]["request"]["url"] for each in events if each["method"] == "Network.requestWillBeSent"]

    def show(self, width: int, height: int, *, dark: bool = False) -> None:
        """The size of the window, and whether its reader likes it dark."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.devtools("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.devtools("Emulation.setEmulatedMedia", {"features": [scheme]})

    def devtools(self, command: str, parameters: dict[str, Any]) -> Any:
        return self._post("goog/cdp/execute", {"cmd": command, "params": parameters})

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """PNG of the window, or of the whole page."""
        shot = self.devtools("Page.captureScreenshot", {"format": "png", "captureBeyondViewport": whole})
        path.write_bytes(base64.b64decode(shot["data"]))

    def _port(self) -> int:
        assert self.driver.stdout is not None
        for line in self.driver.stdout:
            if "started successfully on port" in line:
                return int(line.rstrip(".\n").rsplit(" ", 1)[1])
        raise RuntimeError("chromedriver did not start")

    def _post(self, command: str, body: dict[str, Any]) -> Any:
        return self._send("POST", f"/{self.session}/{command}", body)

    def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = json.dumps(body).encode() if body is not None else None
        asked = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"}, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # not through a proxy: it is this machine
        try:
            with opener.open(asked, timeout=PATIENCE) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(json.load(error)["value"]["message"]) from None
