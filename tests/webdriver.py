"""A browser without a window, over the HTTP interface of its driver (W3C WebDriver)."""

from __future__ import annotations

import json
import re
import subprocess
import time
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
    "--disable-dev-shm-usage",
)  # fmt: skip
"""For root in a container, and a browser that asks nobody for updates."""


class Browser:
    """Chromium, as a context.

    Args:
        program: the path of chromium.
        driver: the path of its chromedriver.
        folder: an empty folder for what the browser keeps.
    """

    def __init__(self, program: str, driver: str, folder: Path) -> None:
        self._driver = subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, text=True)
        assert self._driver.stdout is not None
        port = next(
            found[1] for line in self._driver.stdout if (found := re.search(r"successfully on port (\d+)", line))
        )
        self._address = f"http://127.0.0.1:{port}/session"
        options = {"binary": program, "args": [*FLAGS, f"--user-data-dir={folder}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        try:
            session = self._call("", capabilities={"alwaysMatch": wanted})
        except BaseException:
            self._driver.kill()
            raise
        self._address += f"/{session['sessionId']}"

    def _call(self, command: str, method: str = "POST", **given: Any) -> Any:
        body = json.dumps(given).encode() if method == "POST" else None
        try:
            with urlopen(Request(self._address + command, body, method=method), timeout=120) as answer:
                return json.load(answer)["value"]
        except HTTPError as error:
            raise RuntimeError(json.load(error)["value"]["message"]) from None

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self._call("", "DELETE")
        self._driver.terminate()
        self._driver.communicate()

    def open(self, address: str) -> None:
        """Load a page, and wait until all of it is there."""
        self._call("/url", url=address)

    def run(self, script: str, *arguments: object) -> Any:
        """What the body of a JavaScript function returns on the page."""
        return self._call("/execute/sync", script=script, args=arguments)

    def wait_for(self, script: str, *arguments: object) -> Any:
        """What the script returns as soon as that is true; it is asked for 20 seconds."""
        last = time.monotonic() + 20
        while not (found := self.run(script, *arguments)):
            assert time.monotonic() < last, script
            time.sleep(0.05)
        return found

    def show(self, width: int, scheme: str) -> None:
        """Make the window that wide, on a system that prefers ``"light"`` or ``"dark"``."""
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self._develop("Emulation.setDeviceMetricsOverride", **metrics)
        self._develop("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def _develop(self, command: str, **parameters: Any) -> None:
        self._call("/goog/cdp/execute", cmd=command, params=parameters)

    def messages(self) -> list[str]:
        """What was written to the console since the last call, errors of loading among it."""
        return [entry["message"] for entry in self._call("/se/log", type="browser")]
