"""What an attacker tries: scripts, forged forms, oversize and malformed requests, addresses inside, quotas."""

import logging
import re
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from fastapi import FastAPI
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient

from papertrial.errors import PapertrialError, UsageError
from papertrial.feed import people_schema as tables
from papertrial.feed.store import utc_now
from papertrial.site import keys
from papertrial.site.context import csrf_token
from papertrial.site.limits import Limiter
from papertrial.site.middleware import MAX_BODY
from papertrial.site.people.markdown import to_html
from papertrial.site.settings import Settings, read_settings
from site_service import Site

PAPER = "2601.00003"

# -- HEAD -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    ["/", "/health", "/papers/2601.00003", "/verdicts", "/feeds/papers.rss", "/api/daily_papers", "/static/style.css"],
)
def test_head_is_answered_as_get_without_a_body(site: Site, path: str) -> None:
    got, asked = site.client.get(path), site.client.head(path)
    assert asked.status_code == got.status_code == 200
    assert asked.content == b""
    assert got.content != b""
    own = {"x-request-id", "ratelimit", "date"}
    assert {k: v for k, v in asked.headers.items() if k not in own} == {
        k: v for k, v in got.headers.items() if k not in own
    }


def test_head_says_what_is_not_there_and_does_nothing_that_get_does_not(site: Site) -> None:
    assert site.client.head("/nowhere").status_code == 404
    assert site.client.head("/nowhere").content == b""
    assert site.client.head("/api/votes").status_code in (404, 405)
    assert site.client.head("/sign-out").status_code == 405
    assert site.client.head("/x" * 5000).content == b""


# -- scripts ----------------------------------------------------------------------------------------------------------

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg/onload=alert(1)>",
    "[x](javascript:alert(1))",
    "[x](JaVaScRiPt:alert(1))",
    "[x](&#106;avascript:alert(1))",
    "[x](data:text/html;base64,PHNjcmlwdD4=)",
    "[x](vbscript:x)",
    "![x](https://evil.example/pixel.png)",
    '[x](https://e.org "onmouseover=alert(1)")',
    '[x](https://e.org/"onmouseover="alert(1))',
    "<a href='https://e.org' onclick='alert(1)'>x</a>",
    "`<script>alert(1)</script>`",
    "```html\n<iframe src=javascript:alert(1)></iframe>\n```",
    "<style>body{display:none}</style>",
    "<base href=//evil.example>",
    "<!--><script>alert(1)</script>-->",
    "<math><mtext></table></math><img src=x onerror=alert(1)>",
    "[x]: javascript:alert(1)\n[x]",
    "<https://e.org/<script>>",
    "> " * 500 + "deep",
    "- " * 400 + "deep",
    "[" * 2000 + "x" + "](y)" * 2000,
    "**" * 1250,
]
_ALLOWED = re.compile(
    r'<(/?(p|em|strong|s|pre|code|blockquote|ul|li|h[3-6]|table|thead|tbody|tr|th|td|a)|br|hr|ol( start="\d+")?|/ol|'
    r'a href="(https?://|mailto:)[^"<>]*" rel="nofollow noopener noreferrer ugc"|a rel="[a-z ]+")>'
)


@pytest.mark.parametrize("text", HOSTILE, ids=lambda t: t[:24])
def test_markdown_becomes_nothing_but_harmless_elements(text: str) -> None:
    html = to_html(text)
    rest = _ALLOWED.sub("", html)
    assert "<" not in rest, rest
    for opening in re.findall(r"<[^>]*>", html):
        assert not re.search(r"(?i)\son\w+\s*=|javascript:|vbscript:|data:", opening)


@pytest.mark.parametrize("text", HOSTILE[:12], ids=lambda t: t[:24])
def test_a_stored_comment_comes_back_sanitised(site: Site, text: str) -> None:
    made = site.sign_in().client.post(f"/api/papers/{PAPER}/comments", json={"body": text})
    assert made.status_code == 201
    answer = site.client.get(f"/api/papers/{PAPER}/comments")
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()[0]["html"] == to_html(text)


@pytest.mark.parametrize("path", ["/<script>alert(1)</script>", '/papers/"><script>alert(1)</script>', "/x?q=<script>"])
def test_an_error_page_does_not_echo_markup(site: Site, path: str) -> None:
    answer = site.client.get(path, headers={"accept": "text/html"})
    assert answer.status_code in (400, 404)
    assert "<script>alert" not in answer.text


def test_every_kind_of_answer_carries_the_security_headers(make_site: Callable[..., Site]) -> None:
    site = make_site(api_quota=3)
    answers = [
        site.client.get("/health"),
        site.client.get("/nothing"),
        site.client.get("/api/nothing"),
        site.client.get("/static/robots.txt"),
        site.client.post("/api/sign-in", content=b"x" * (MAX_BODY + 1)),
        site.client.get("/api/papers/%00"),
        site.client.get("/api/verdicts"),
    ]
    assert [answer.status_code for answer in answers] == [200, 404, 404, 200, 413, 400, 429]
    for answer in answers:
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "*" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["x-request-id"]
        assert "server" not in answer.headers


# -- forged requests --------------------------------------------------------------------------------------------------


def test_a_session_alone_changes_nothing(site: Site) -> None:
    ada, bob = site.sign_in("ada@example.org"), site.sign_in("bob@example.org")
    where = f"/api/papers/{PAPER}/vote"
    own = ada.csrf
    for forged in ("", "x" * 80, bob.csrf, own[:-1] + ("0" if own[-1] != "0" else "1")):
        ada.client.headers["X-CSRF-Token"] = forged
        refused = ada.client.put(where)
        assert refused.status_code == 403
        assert refused.json()["field"] == "csrf"
    ada.client.headers["X-CSRF-Token"] = own
    assert ada.client.put(where).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://testserver.evil.example"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_a_request_from_another_site_is_refused_even_with_the_token(site: Site, headers: dict[str, str]) -> None:
    browser = site.sign_in()
    assert browser.client.put(f"/api/papers/{PAPER}/vote", headers=headers).status_code == 403
    assert site.client.post("/api/sign-in", json={"email": "a@example.org"}, headers=headers).status_code == 403


def test_a_token_of_a_form_differs_every_time_and_stays_good(site: Site) -> None:
    """Compression cannot be used to guess what differs in every answer."""
    browser = site.sign_in()
    given = {browser.client.get("/api/me").json()["csrf"] for _ in range(5)}
    assert len(given) == 5
    for token in given:
        browser.client.headers["X-CSRF-Token"] = token
        assert browser.client.put(f"/api/papers/{PAPER}/vote").status_code == 200
    assert callable(csrf_token)


def test_reading_changes_nothing(site: Site) -> None:
    """Every GET route there is, called by somebody who is signed in, leaves every table as it was."""
    browser = site.sign_in("admin@localhost")
    browser.client.put(f"/api/papers/{PAPER}/vote")
    browser.client.post(f"/api/papers/{PAPER}/comments", json={"body": "x"})
    made = browser.client.post("/api/collections", json={"title": "c"}).json()
    values = {
        "paper_id": PAPER, "paper": PAPER, "id": PAPER, "owner": made["owner"], "slug": made["slug"], "scale": "small",
        "token": "t" * 43, "day": "2026-01-01", "period": "2026-01",
    }  # fmt: skip

    def dump() -> str:
        with site.context.store.reading() as connection:
            skipped = ("leases", "pulse", "ingest_runs", "evidence_seen")  # background work
            found = [t for t in tables.metadata.sorted_tables if t.name not in skipped]
            return repr([(t.name, connection.execute(sa.select(t).order_by(*t.primary_key)).all()) for t in found])

    before, called = dump(), 0
    for route in _routes(site.client.app):  # type: ignore[arg-type]
        path = re.sub(r"\{(\w+)(:\w+)?\}", lambda m: values.get(m[1], "x"), route.path)
        answer = browser.client.get(path, follow_redirects=False)
        assert answer.status_code < 500, (path, answer.text)
        called += 1
    assert called > 15
    assert dump() == before


def _routes(app: FastAPI) -> Iterator[APIRoute]:
    from fastapi.routing import iter_route_contexts

    for held in iter_route_contexts(app.routes):
        route = held.original_route
        if isinstance(route, APIRoute) and "GET" in (route.methods or ()):
            yield route


# -- malformed and oversize -------------------------------------------------------------------------------------------


def test_a_large_body_is_refused_whether_or_not_it_says_so(site: Site) -> None:
    headers = {"content-type": "application/json"}
    said = site.client.post("/api/sign-in", content=b" " * (MAX_BODY + 1), headers=headers)
    chunked = site.client.post("/api/sign-in", content=(b" " * 100_000 for _ in range(11)), headers=headers)
    assert (said.status_code, chunked.status_code) == (413, 413)


@pytest.mark.parametrize(
    ("path", "status", "field"),
    [
        ("/api/daily_papers?limit=0", 400, "limit"),
        ("/api/daily_papers?limit=1e3", 400, "limit"),
        ("/api/daily_papers?p=-1", 400, "p"),
        ("/api/daily_papers?sort=best", 400, "sort"),
        ("/api/daily_papers?date=2026-02-30", 400, "date"),
        ("/api/daily_papers?date=2026-01", 400, "date"),
        ("/api/daily_papers?month=2026-13", 400, "month"),
        ("/api/daily_papers?date=2026-01-01&week=2026-W01", 400, "week"),
        ("/api/papers?cursor=AAAA", 400, None),
        ("/api/papers/search?q=" + "x" * 251, 400, "q"),
        ("/api/papers/" + "x" * 81, 400, "paper_id"),
        ("/api/claims?family=nope", 400, None),
        ("/api/claims?verdict=maybe", 400, "verdict"),
        ("/api/evidence/contrastive_search/huge", 400, "scale"),
        ("/api/papers/search?q=%00", 400, None),
        ("/" + "x" * 9000, 414, None),
    ],
)
def test_bad_input_is_4xx_and_names_the_field(site: Site, path: str, status: int, field: str | None) -> None:
    answer = site.client.get(path)
    assert answer.status_code == status, answer.text
    if path.startswith("/api"):
        assert answer.json()["error"]
    if field:
        assert answer.json()["field"] == field
        assert field in answer.json()["error"]


def test_broken_json_is_a_clear_4xx(site: Site) -> None:
    for content in (b"", b"{", b"[1,2", b'"text"', b"\xff\xfe", b'{"email": "\\ud800@e.org"}', b"[" * 5000):
        answer = site.client.post("/api/sign-in", content=content, headers={"content-type": "application/json"})
        assert answer.status_code in (400, 422), (content[:10], answer.text)
        assert answer.json()["error"]


def test_an_error_of_ours_tells_no_more_than_its_number(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    @site.client.app.get("/api/broken")  # type: ignore[attr-defined]
    def broken() -> None:
        raise RuntimeError("the secret is 42")

    with caplog.at_level(logging.ERROR):
        answer = site.client.get("/api/broken")
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert answer.json()["requestId"] == answer.headers["x-request-id"]
    assert "the secret is 42" in caplog.text


def test_the_log_holds_no_sign_in_links_and_no_forged_lines(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    token = keys.new_token()
    with caplog.at_level(logging.INFO, "papertrial.site.access"):
        site.client.get(f"/sign-in/{token}")
        site.client.get("/x%0aGET /forged 200")
        site.client.get("/health", headers={"x-request-id": "good-request-1"})
    text = "\n".join(record.getMessage() for record in caplog.records)
    assert token not in text
    assert "\nGET /forged" not in text
    assert "good-request-1" in text


# -- addresses inside -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address",
    [
        "http://127.0.0.1/abs/2601.00003",
        "http://localhost:8000/papers/2601.00003",
        "http://169.254.169.254/abs/2601.00003",
        "http://[::1]/abs/2601.00003",
        "https://arxiv.org@evil.example/abs/2601.00003",
        "https://evil.example/arxiv.org/abs/2601.00003",
        "https://arxiv.org.evil.example/abs/2601.00003",
        "https://evil.example/?x=https://arxiv.org/abs/2601.00003",
        "file:///abs/2601.00003",
        "gopher://arxiv.org/abs/2601.00003",
        "ftp://arxiv.org/abs/2601.00003",
        "https://arxiv.org/abs/../../2601.00003",
        "https://arxiv.org\\@evil.example/abs/2601.00003",
        "javascript:alert(1)",
        "//arxiv.org",
        "2601.00003\nHost: evil.example",
    ],
)
def test_no_submission_opens_an_address(site: Site, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    browser = site.sign_in()

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something was connected to")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    refused = browser.client.post("/api/submissions", json={"url": address})
    assert refused.status_code == 422, refused.text
    assert refused.json()["field"] == "url"


def test_what_is_fetched_is_arxivs_own_address_whatever_was_typed(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    from papertrial.feed.http import PoliteClient
    from papertrial.site.people import submissions
    from site_service import TODAY

    asked: list[str] = []

    def get(self: PoliteClient, url: str, params: dict[str, str], **_: object) -> None:
        asked.append(f"{url} {params['id_list']}")
        raise PapertrialError("no network in this test")

    monkeypatch.setattr(PoliteClient, "get", get)
    site = make_site(fetch=True)
    site.client.app.state.jobs.stop()  # type: ignore[attr-defined]
    site.sign_in().client.post(
        "/api/submissions", json={"url": "https://huggingface.co/papers/2603.00001?x=http://e.org"}
    )
    with pytest.raises(PapertrialError):
        submissions.work_off(site.context.store, TODAY)
    assert asked == ["https://export.arxiv.org/api/query 2603.00001"]


# -- keys and settings ------------------------------------------------------------------------------------------------


def test_keys_are_made_once_and_are_the_owners_alone(tmp_path: Path) -> None:
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(keys.read_key(tmp_path, "k"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert len(found[0]) == keys.KEY_BYTES
    path = tmp_path / "keys" / "k"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in path.parent.iterdir()] == ["k"]
    path.chmod(0o644)
    with pytest.raises(PapertrialError, match="chmod 600"):
        keys.read_key(tmp_path, "k")


def test_a_damaged_key_is_not_used(tmp_path: Path) -> None:
    keys.read_key(tmp_path, "k")
    (tmp_path / "keys" / "k").write_bytes(b"short")
    with pytest.raises(PapertrialError, match="damaged"):
        keys.read_key(tmp_path, "k")


def test_seals_are_bound_to_their_purpose_and_text() -> None:
    key, other = b"k" * 32, b"o" * 32
    mac = keys.seal(key, "csrf", "text")
    assert keys.is_sealed(key, "csrf", "text", mac)
    assert not keys.is_sealed(key, "unsubscribe", "text", mac)
    assert not keys.is_sealed(key, "csrf", "text2", mac)
    assert not keys.is_sealed(other, "csrf", "text", mac)
    assert not keys.is_sealed(key, "csrf", "text", "é")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("base_url", "javascript:alert(1)"),
        ("base_url", "example.org"),
        ("timezone", "Mars/Olympus"),
        ("admin_email", "nobody"),
        ("api_quota", "many"),
        ("api_quota", "-1"),
        ("colour", "red"),
    ],
)
def test_a_wrong_setting_is_named(name: str, value: str) -> None:
    with pytest.raises(UsageError, match=name):
        read_settings(**{name: value})


def test_settings_come_from_variables_and_are_overruled_by_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAPERTRIAL_API_QUOTA", "7")
    monkeypatch.setenv("PAPERTRIAL_SIGN_UP", "false")
    assert read_settings().api_quota == 7
    assert not read_settings().sign_up
    assert read_settings(api_quota=9).api_quota == 9


# -- quotas -----------------------------------------------------------------------------------------------------------


def _count(limiter: Limiter, host: str, path: str = "/api/x", **headers: str) -> bool:
    from starlette.datastructures import Headers

    return limiter.count({"path": path, "client": (host, 1)}, Headers(headers)).allowed


def test_a_quota_is_a_clients_own_and_ends_with_its_window() -> None:
    now = [1_000_000.0]
    limiter = Limiter(Settings(api_quota=2, page_quota=1), clock=lambda: now[0])
    assert [_count(limiter, "192.0.2.1") for _ in range(3)] == [True, True, False]
    assert _count(limiter, "192.0.2.2")
    assert _count(limiter, "192.0.2.1", "/page")  # another bucket
    assert _count(limiter, "192.0.2.1", "/static/site.css")
    now[0] += 300
    assert _count(limiter, "192.0.2.1")


def test_one_ipv6_subscriber_is_one_client() -> None:
    limiter = Limiter(Settings(api_quota=1))
    assert _count(limiter, "2001:db8::1")
    assert not _count(limiter, "2001:db8::ffff")
    assert _count(limiter, "2001:db8:0:1::1")


def test_made_up_credentials_do_not_get_a_quota_of_their_own() -> None:
    limiter = Limiter(Settings(api_quota=2, api_quota_signed_in=4))
    allowed = [_count(limiter, "192.0.2.1", authorization=f"Bearer pt_{i}") for i in range(3)]
    assert allowed == [True, True, False]
    limiter.recognise(keys.token_hash("pt_good"), 1)
    assert [_count(limiter, "192.0.2.1", authorization="Bearer pt_good") for _ in range(5)] == [True] * 4 + [False]


def test_an_expired_session_is_nobody(site: Site) -> None:
    browser = site.sign_in()
    with site.context.store.writing() as connection:
        connection.execute(tables.sessions.update().values(expires=utc_now()))
    assert browser.client.get("/api/me").status_code == 401
    assert browser.client.get("/api/daily_papers").status_code == 200


def test_another_services_token_keeps_nobody_from_reading(site: Site) -> None:
    client = TestClient(site.client.app, headers={"Authorization": "Bearer hf_abcdef"})
    assert client.get("/api/daily_papers").status_code == 200
    assert client.put(f"/api/papers/{PAPER}/vote").status_code == 401
    ours = TestClient(site.client.app, headers={"Authorization": "Bearer pt_unknown"})
    assert ours.get("/api/me").status_code == 401
