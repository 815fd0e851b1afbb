"""A real browser on a real server: the service over the whole library and four papers of every verdict."""

import email
import email.policy
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, Playwright, expect, sync_playwright

import papertrial.papers
from papers_on_trial import write_papers
from papertrial.feed.ingest import ingest_scope
from papertrial.feed.store import Store
from papertrial.site import upkeep
from papertrial.site.app import create_app
from papertrial.site.settings import Settings
from site_service import IN_PROCESS, Server, links_in, start_server

CHROMIUM = "/usr/bin/chromium"
DESKTOP = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 844}
SMALLEST = {"width": 320, "height": 640}


expect.set_options(timeout=20_000)  # a machine that does other work as well may be slow


@dataclass
class Reading:
    """The server, and a way to open browser windows on it. `open` makes a window of somebody who is not signed in."""

    server: Server
    open: Callable[..., BrowserContext]

    @property
    def url(self) -> str:
        return self.server.url

    def letters(self) -> list[str]:
        """The text of every letter that was sent, oldest first."""
        found = []
        for path in sorted((self.server.home / "outbox").glob("*.eml")):
            message = email.message_from_bytes(path.read_bytes(), policy=email.policy.default)
            body = message.get_body(("plain",))
            found.append(f"To: {message['To']}\n{body.get_content() if body else ''}")
        return found

    def link(self, to: str, part: str) -> str:
        """The address in the newest letter to somebody that holds `part`."""
        for letter in reversed(self.letters()):
            found = [address for address in links_in(letter) if part in address]
            if letter.startswith(f"To: {to}\n") and found:
                return found[0]
        raise AssertionError(f"no letter to {to} has a link with {part}")

    def sign_in(self, page: Page, address: str) -> None:
        """As people do: ask for a link, open it, press the button."""
        page.goto(f"{self.url}/sign-in")
        page.get_by_label("E-mail address").fill(address)
        page.get_by_role("button", name="Send me the link").click()
        page.wait_for_url("**/sign-in/sent")
        page.goto(self.link(address, "/sign-in/"))
        page.get_by_role("main").get_by_role("button", name="Sign in").click()
        page.wait_for_url(lambda current: "/sign-in" not in current)


@pytest.fixture(scope="module")
def playwright_driver() -> Iterator[Playwright]:
    """Ends with the module: while it lives no other test can run an event loop of its own."""
    if not Path(CHROMIUM).exists():
        pytest.skip(f"there is no browser at {CHROMIUM}")
    with sync_playwright() as driver:
        yield driver


@pytest.fixture(scope="module")
def chromium(playwright_driver: Playwright) -> Iterator[Browser]:
    browser = playwright_driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
    yield browser
    browser.close()


@pytest.fixture(scope="session")
def served(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The service with every paper in scope in its index."""
    home = tmp_path_factory.mktemp("browsed")
    shutil.copytree(prepared, home, dirs_exist_ok=True)
    papers = write_papers(tmp_path_factory.mktemp("papers"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAPERTRIAL_HOME", str(home))
        patch.setenv("PAPERTRIAL_PAPERS", str(papers))
        patch.setattr(papertrial.papers, "__path__", [*papertrial.papers.__path__, str(papers)])
        with Store.open() as store:
            ingest_scope(store)
        app = create_app(Settings.model_validate(IN_PROCESS))
        upkeep.update_index_now(app.state.context)
        app.state.context.close()
        names = ("page_quota", "page_quota_signed_in", "api_quota", "api_quota_signed_in", "letter_quota")
        server = start_server(home, **dict.fromkeys(names, 0))
        yield server
        server.stop()


@pytest.fixture(scope="module")
def reading(chromium: Browser, served: Server) -> Iterator[Reading]:
    """Windows that are closed with the module; a script error or a refused file in any of them is an error."""
    contexts: list[BrowserContext] = []
    wrong: list[str] = []

    def open_window(**options: object) -> BrowserContext:
        context = chromium.new_context(**{"viewport": DESKTOP, "base_url": served.url, **options})
        context.set_default_timeout(20_000)
        context.on("weberror", lambda error: wrong.append(f"{error.page and error.page.url}: {error.error}"))
        context.on(
            "console",
            lambda message: wrong.append(message.text) if "Content Security Policy" in message.text else None,
        )
        contexts.append(context)
        return context

    yield Reading(served, open_window)
    for context in contexts:
        context.close()
    assert not wrong, wrong


def overflow(page: Page) -> int:
    """How many pixels the page is wider than its window."""
    return int(page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))
