"""A real browser: the Chromium of the system, driven by Selenium."""

from __future__ import annotations

import base64
import json
import os
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import pytest
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from tests.programs import CHROMIUM, find

AXE = files("selenium_axe_python") / "axe-core" / "axe.min.js"
Found = TypeVar("Found")


class Browser:
    """A window of the browser.

    Attributes:
        driver: Selenium's own.
    """

    def __init__(self, driver: Chrome) -> None:
        self.driver = driver

    def open(self, address: str) -> None:
        self.driver.get(address)

    def look(self, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Make the window so large, with a light or a dark scheme of colors."""
        self._tell(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._tell("Emulation.setEmulatedMedia", features=[scheme])

    def switch_javascript(self, *, on: bool) -> None:
        self._tell("Emulation.setScriptExecutionDisabled", value=not on)

    def _tell(self, command: str, **parameters: Any) -> Any:
        return self.driver.execute_cdp_cmd(command, parameters)  # pyright: ignore[reportUnknownMemberType]

    def run(self, script: str, *arguments: object) -> Any:
        return self.driver.execute_script(script, *arguments)  # pyright: ignore[reportUnknownMemberType]

    def one(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        """The text of an element, also of one that an update replaces meanwhile."""
        return self.until(lambda: [self.one(selector).text])[0]

    def until(self, look: Callable[[], Found], within: float = 15) -> Found:
        """Look until there is something, and return it."""
        deadline = time.monotonic() + within
        while True:
            try:
                if found := look():
                    return found
            except StaleElementReferenceException:
                pass
            assert time.monotonic() < deadline, self.one("body").text
            time.sleep(0.05)

    def until_shown(self, words: str, selector: str = "body") -> None:
        self.until(lambda: words in self.text(selector))

    def picture(self, file: Path, *, height: int | None = None) -> None:
        """Take a picture of the page, from its top to this height or to its end."""
        width, whole = self.run(
            "const e = document.documentElement; return [e.clientWidth, e.scrollHeight]"
        )
        clip = {"x": 0, "y": 0, "width": width, "height": height or whole, "scale": 1}
        found = self._tell("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        file.write_bytes(base64.b64decode(found["data"]))

    def picture_of(self, selector: str, file: Path) -> None:
        """Take a picture of an element, as far as it is in the window."""
        self.one(selector).screenshot(str(file))  # pyright: ignore[reportUnknownMemberType]

    # -- what the browser itself has to say ----------------------------------------------------

    def complaints(self) -> list[str]:
        """What has been written to the console."""
        logged: list[dict[str, Any]] = self.driver.get_log("browser")  # type: ignore[no-untyped-call]  # pyright: ignore[reportUnknownMemberType]
        return [str(entry["message"]) for entry in logged]

    def requests(self) -> Iterator[str]:
        """The addresses that have been asked for since the last time."""
        logged: list[dict[str, Any]] = self.driver.get_log("performance")  # type: ignore[no-untyped-call]  # pyright: ignore[reportUnknownMemberType]
        for entry in logged:
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                yield message["params"]["request"]["url"]

    def violations(self) -> list[str]:
        """What axe-core finds wrong about the accessibility of the page."""
        self.run(AXE.read_text("utf-8"))
        found = self.driver.execute_async_script(  # pyright: ignore[reportUnknownMemberType]
            "const done = arguments[0]; axe.run(document, {resultTypes: ['violations']})"
            ".then(results => done(results.violations), error => done([{id: String(error)}]))"
        )
        return [
            f"{each['id']}: {node['target']} {node.get('failureSummary')}"
            for each in found
            for node in each.get("nodes", [{"target": "", "failureSummary": ""}])
        ]


@contextmanager
def browser() -> Generator[Browser]:
    """Start the browser, and end it with the block."""
    if CHROMIUM.missing:
        if CHROMIUM.is_packaged:
            pytest.fail(CHROMIUM.advice)
        pytest.skip("this system has no package of Chromium")
    options = ChromeOptions()
    options.binary_location = find("chromium") or ""
    for argument in (
        "--headless=new",
        "--no-sandbox",  # which neither root nor a container has
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--disable-component-update",
        "--hide-scrollbars",
        "--no-first-run",
        "--force-color-profile=srgb",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = Service(find("chromedriver"), env={**os.environ, "SE_OFFLINE": "true"})
    driver = Chrome(options=options, service=service)
    driver.set_script_timeout(120)
    try:
        yield Browser(driver)
    finally:
        driver.quit()
