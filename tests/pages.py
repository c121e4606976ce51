"""How do tests open the monitor's page in a real browser, and what do they read off it?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from coordinator.errors import UsageError
from scripts.browser import headless_browser

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Dialog, Page

WAIT_MS = 60_000.0
SCRIPT = "<script>alert(1)</script>"  # as a name or a reason
PHONE = {"width": 390, "height": 844}
DESKTOP = {"width": 1180, "height": 800}


@contextmanager
def browser_or_skip() -> Iterator[Browser]:
    with ExitStack() as stack:
        try:
            browser = stack.enter_context(headless_browser())
        except UsageError as error:
            pytest.skip(f"needs a browser: {error}")
        yield browser


@contextmanager
def opened(browser: Browser, url: str, **options: Any) -> Iterator[tuple[Page, list[str], list[str]]]:
    """The page; what it asked for; what went wrong in it, dialogs included."""
    asked: list[str] = []
    wrong: list[str] = []
    page = browser.new_page(**options)
    page.set_default_timeout(WAIT_MS)  # a busy machine draws slowly
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: refuse(dialog, wrong))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    try:
        page.goto(url)
        yield page, asked, wrong
    finally:
        page.close()


def refuse(dialog: Dialog, wrong: list[str]) -> None:
    wrong.append(f"dialog {dialog.message}")
    dialog.dismiss()


def wait_for(page: Page, expression: str, argument: object = None) -> None:
    page.wait_for_function(expression, arg=argument, timeout=WAIT_MS)


def classes(page: Page) -> dict[str, str]:
    """Class of each row of the peers, by what its peer calls itself."""
    found: dict[str, str] = page.evaluate(
        "() => Object.fromEntries([...document.querySelectorAll('#peers tbody tr')]"
        ".map((r) => [r.querySelector('bdi')?.textContent ?? '', r.className]))"
    )
    return found


def cells(page: Page, peer_id: str) -> dict[str, str]:
    """What stands in the row of a peer, by the head of the column; the bar of the progress as a number."""
    found: dict[str, str] = page.evaluate(
        """(peer) => {
          const row = document.querySelector(`#peers tr[data-peer="${peer}"]`);
          const heads = [...document.querySelectorAll('#peers thead th')].map((th) => th.textContent);
          const found = Object.fromEntries([...row.cells].map((td, i) => [heads[i], td.innerText.trim()]));
          const bar = row.querySelector('progress');
          return {...found, progress: bar === null ? '' : String(bar.value)};
        }""",
        peer_id,
    )
    return found


def dropped(page: Page) -> list[str]:
    """The lines of who was dropped, each in one line of text."""
    return [" ".join(text.split()) for text in page.locator("#dropped li").all_inner_texts()]


def spec_shown(page: Page) -> dict[str, str]:
    found: dict[str, str] = page.evaluate(
        "() => Object.fromEntries([...document.querySelectorAll('#spec dt')]"
        ".map((dt) => [dt.textContent, dt.nextElementSibling.textContent]))"
    )
    return found


def overflow_pixels(page: Page) -> int:
    """By how much the page is wider than the window."""
    found: int = page.evaluate(
        "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"
    )
    return found


def brightness(page: Page, selector: str, what: str = "backgroundColor") -> float:
    """0 (black) to 255, of a computed colour."""
    text: str = page.evaluate(
        "([selector, what]) => getComputedStyle(document.querySelector(selector))[what]", [selector, what]
    )
    red, green, blue = (int(part) for part in text.removeprefix("rgb(").removesuffix(")").split(","))
    return 0.299 * red + 0.587 * green + 0.114 * blue


def downloaded_card(page: Page) -> tuple[str, str]:
    """Name and text of what the link to the model card gives."""
    with page.expect_download(timeout=WAIT_MS) as waiting:
        page.click("#card")
    return waiting.value.suggested_filename, waiting.value.path().read_text(encoding="utf-8")


def check_that_texts_stayed_texts(page: Page) -> None:
    """And that the page itself could not make markup of one."""
    assert page.evaluate("() => document.scripts.length") == 1
    assert page.evaluate("() => document.images.length") == 0
    with pytest.raises(Exception, match=r"TrustedHTML|Trusted Type"):
        page.evaluate("() => { document.body.innerHTML = '<b>x</b>'; }")
