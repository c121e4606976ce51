"""Which headless browser is there, and how is a page opened in it?

Playwright drives it; the browser itself comes from the system (`apt install chromium`) or from Playwright.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from coordinator.errors import UsageError

if TYPE_CHECKING:
    from playwright.sync_api import Browser

_COMMANDS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_FLAGS = ("--disable-background-networking", "--disable-dev-shm-usage", "--disable-gpu", "--no-first-run")


@contextmanager
def headless_browser() -> Iterator[Browser]:
    """Raises UsageError where there is none."""
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError as error:
        raise UsageError("no browser can be driven here: pip install playwright") from error

    command = next((found for name in _COMMANDS if (found := shutil.which(name))), None)
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=command, args=list(_FLAGS))
        except Error as error:
            why = str(error).strip().splitlines()[0]
            raise UsageError(f"no browser starts here ({why}): install Chromium") from error
        try:
            yield browser
        finally:
            browser.close()
