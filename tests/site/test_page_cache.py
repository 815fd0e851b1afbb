"""Kept pages: the same answers as without, never another reader's, and fresh as soon as something was written."""

import asyncio
import gzip
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fastapi.testclient import TestClient

from papertrial.feed.records import Record
from papertrial.feed.store import Store
from papertrial.site import page_cache
from papertrial.site.page_cache import GRACE, LONGEST, Kept, KeptPages, PageCache
from site_service import Site

KEY = ("/", b"")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def counting(texts: list[str]) -> Callable[[], str]:
    def text() -> str:
        texts.append(f"page {len(texts)}")
        return texts[-1]

    return text


def shown(kept: Kept) -> str:
    return gzip.decompress(kept.packed).decode()


# -- the cache --------------------------------------------------------------------------------------------------------


def test_a_page_is_made_once_while_nothing_is_written(clock: Clock) -> None:
    pages, made = PageCache(lambda: 1, clock=clock), []
    for _ in range(10):
        assert shown(pages.make(KEY, counting(made))) == "page 0"
        assert pages.look(KEY) is not None
        clock.now += LONGEST / 11
    assert made == ["page 0"]


def test_a_page_grows_too_old_even_so(clock: Clock) -> None:
    pages, made = PageCache(lambda: 1, clock=clock), []
    pages.make(KEY, counting(made))
    clock.now += LONGEST
    assert pages.look(KEY) is None
    assert shown(pages.make(KEY, counting(made))) == "page 1"


def test_a_page_is_made_anew_after_a_write_but_not_for_every_write(clock: Clock) -> None:
    version, made = [0], []
    pages = PageCache(lambda: version[0], clock=clock)
    pages.make(KEY, counting(made))
    version[0] += 1
    clock.now += GRACE * 0.9
    assert pages.look(KEY) is not None
    clock.now += GRACE * 0.2
    assert pages.look(KEY) is None
    assert shown(pages.make(KEY, counting(made))) == "page 1"


def test_what_is_written_while_a_page_is_made_is_not_missed(clock: Clock) -> None:
    version = [0]
    pages = PageCache(lambda: version[0], clock=clock)

    def text() -> str:
        version[0] += 1  # somebody votes after the votes were read
        return "before the vote"

    pages.make(KEY, text)
    clock.now += GRACE
    assert pages.look(KEY) is None


def test_where_asking_takes_time_nobody_asks_on_the_way(clock: Clock) -> None:
    """Version 0 is believed for a second; then `look` knows nothing until `make`, on its thread, has asked again."""
    version, made, asked = [0], [], []

    def ask() -> int:
        asked.append(1)
        return version[0]

    pages = PageCache(ask, recheck=1.0, clock=clock)
    pages.make(KEY, counting(made))
    clock.now += GRACE + 5
    assert pages.look(KEY) is None
    assert len(asked) == 1
    assert shown(pages.make(KEY, counting(made))) == "page 0"
    assert pages.look(KEY) is not None
    assert len(asked) == 2
    version[0] = 1
    clock.now += 1.0
    assert shown(pages.make(KEY, counting(made))) == "page 1"


def test_memory_is_bounded_and_the_least_used_page_goes(clock: Clock) -> None:
    size = len(Kept.of("x" * 50, 0, 0.0).packed)
    pages = PageCache(lambda: 1, most_bytes=3 * size, clock=clock)
    for name in "abc":
        pages.make((name, b""), lambda name=name: name * 50)  # type: ignore[misc]
    assert pages.look(("a", b"")) is not None
    pages.make(("d", b""), lambda: "d" * 50)
    assert [pages.look((name, b"")) is not None for name in "abcd"] == [True, False, True, True]


# -- in the service ---------------------------------------------------------------------------------------------------


def test_a_kept_page_is_answered_as_a_new_one_is(site: Site) -> None:
    for path in ("/", "/trending", "/papers/2601.00003", "/search?q=attention", "/verdicts"):
        first, second = site.client.get(path), site.client.get(path)
        assert first.status_code == second.status_code == 200
        assert first.text == second.text
        assert first.headers["content-encoding"] == "gzip"
        changing = ("x-request-id", "ratelimit")
        one, two = ({k: v for k, v in r.headers.items() if k not in changing} for r in (first, second))
        assert one == two
        assert {"content-security-policy", "etag", "ratelimit-policy"} <= one.keys()
        assert {"accept-encoding", "cookie"} <= {part.strip().lower() for part in one["vary"].split(",")}


def test_a_client_that_takes_no_gzip_gets_plain_text(site: Site) -> None:
    packed = site.client.get("/")
    plain = site.client.get("/", headers={"Accept-Encoding": "identity"})
    assert "content-encoding" not in plain.headers
    assert plain.text == packed.text
    assert int(plain.headers["content-length"]) == len(plain.content)


def test_a_client_that_has_the_page_gets_none(site: Site) -> None:
    tag = site.client.get("/").headers["etag"]
    answer = site.client.get("/", headers={"If-None-Match": f'"other", {tag}'})
    assert (answer.status_code, answer.content) == (304, b"")
    assert site.client.get("/", headers={"If-None-Match": '"other"'}).status_code == 200


def test_who_is_signed_in_never_meets_the_page_of_nobody(site: Site) -> None:
    browser = site.sign_in("secret.name@example.org")
    for path in ("/", "/papers/2601.00003"):
        anonymous = site.client.get(path).text
        own = browser.client.get(path).text
        assert browser.csrf not in anonymous
        assert "Sign out" in own
        assert "Sign out" not in site.client.get(path).text
        assert "secret.name" not in site.client.get(path).text


def test_kept_pages_count_against_the_quota(make_site: Callable[..., Site]) -> None:
    site = make_site(page_quota=3)
    assert [site.client.get("/").status_code for _ in range(5)] == [200, 200, 200, 429, 429]


def test_a_vote_or_a_paper_is_on_the_next_page(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_cache, "GRACE", 0.0)
    browser, before = site.sign_in(), site.client.get("/").text
    assert site.client.get("/").text == before
    assert browser.client.put("/api/papers/2601.00003/vote").status_code == 200
    after = site.client.get("/").text
    assert after != before
    with Store.open() as elsewhere:  # another worker, or an ingest
        elsewhere.upsert([Record("page", "A paper that came in just now", entered=site.context.today())])
    assert "A paper that came in just now" in site.client.get("/").text


def test_errors_are_not_kept(site: Site) -> None:
    assert site.client.get("/papers/2601.99999").status_code == 404
    site.context.store.upsert([Record("page", "It is here now", arxiv_id="2601.99999")])
    assert site.client.get("/papers/2601.99999").status_code == 200


def test_a_head_request_gets_no_body(site: Site) -> None:
    site.client.get("/")
    assert site.client.head("/").content == b""


def test_forms_are_not_answered_from_the_cache(site: Site) -> None:
    site.client.get("/")
    assert site.client.post("/").status_code == 405


def test_every_worker_has_pages_of_its_own(make_site: Callable[..., Site]) -> None:
    one, two = make_site(title="One"), make_site(title="Two")
    assert "One" in one.client.get("/").text
    assert "Two" in two.client.get("/").text
    assert isinstance(one.client, TestClient)


# -- turns ------------------------------------------------------------------------------------------------------------


def request(path: str) -> dict[str, object]:
    return {"type": "http", "method": "GET", "path": path, "query_string": b"", "headers": []}


def ask_for(paths: list[str], send_seconds: float = 0.0) -> tuple[int, float]:
    """Ask at once for pages that take 20 ms to make; the most that were in the making together, and the seconds."""
    running, most = 0, 0

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal running, most
        running, most = running + 1, max(most, running + 1)
        await asyncio.sleep(0.02)
        running -= 1
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def send(message: Any) -> None:
        await asyncio.sleep(send_seconds)

    async def all_at_once() -> None:
        kept = KeptPages(app, PageCache(lambda: 0))
        await asyncio.gather(*(kept(request(path), None, send) for path in paths))  # type: ignore[arg-type]

    began = time.perf_counter()
    asyncio.run(all_at_once())
    return most, time.perf_counter() - began


def test_pages_are_made_in_turn() -> None:
    for path in ("/", "/trending", "/day/2026-01-02", "/papers/2601.00003", "/api/daily_papers", "/api/papers/x"):
        assert ask_for([path] * 5)[0] == 1, path


def test_what_may_take_long_takes_no_turn() -> None:
    for path in ("/figures/a/small/d/x.svg", "/search", "/api/papers/search", "/sign-in", "/mcp", "/static/x.css"):
        assert ask_for([path] * 5)[0] == 5, path


def test_a_client_that_reads_slowly_does_not_hold_the_turn() -> None:
    _, seconds = ask_for(["/"] * 5, send_seconds=0.5)
    assert seconds < 5 * 0.5  # two messages each; in turn they would take five seconds


def test_an_error_gives_the_turn_back() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("it breaks")

    async def twice() -> None:
        kept = KeptPages(app, PageCache(lambda: 0))
        for _ in range(2):
            with pytest.raises(RuntimeError, match="it breaks"):
                await asyncio.wait_for(kept(request("/"), None, None), 5)  # type: ignore[arg-type]

    asyncio.run(twice())


def test_those_who_waited_get_what_was_made_meanwhile(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    of = Kept.of

    def counted(text: str, *more: Any) -> Kept:
        made.append(text)
        return of(text, *more)

    monkeypatch.setattr(Kept, "of", counted)
    with ThreadPoolExecutor(8) as readers:
        answers = list(readers.map(lambda _: site.client.get("/trending"), range(8)))
    assert [answer.status_code for answer in answers] == [200] * 8
    assert len(made) == 1
