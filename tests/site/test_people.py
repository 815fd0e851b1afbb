"""Accounts, votes, comments, tags, collections, submissions: as a browser with a session and as a program."""

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient

from papertrial.errors import PapertrialError
from papertrial.feed import people_schema as tables
from papertrial.feed.delivery_schema import subscriptions as subscriptions_table
from papertrial.feed.http import PoliteClient
from papertrial.feed.records import Record, paper_key
from papertrial.feed.store import Store, utc_now
from papertrial.site.delivery import subscriptions
from papertrial.site.delivery.subscriptions import Watch
from papertrial.site.errors import Problem
from papertrial.site.people import accounts, bounds, comments, pulse, submissions, votes
from papertrial.site.people.pulse import pulses
from site_service import TODAY, Site, links_in

PAPER = "2601.00003"


@pytest.fixture(params=["sqlite", "postgresql"])
def site(request: pytest.FixtureRequest, make_site: Callable[..., Site]) -> Site:
    """The service on each database."""
    if request.param == "sqlite":
        return make_site()
    return make_site(database=request.getfixturevalue("postgresql_site"))


def paper_id(site: Site, name: str = PAPER) -> int:
    paper = site.context.store.find(name)
    assert paper is not None
    return paper.id


# -- accounts ---------------------------------------------------------------------------------------------------------


def test_a_letter_signs_in_once(site: Site, home: Path) -> None:
    assert site.client.post("/api/sign-in", json={"email": "New.Reader@Example.org"}).status_code == 202
    letter = next((home / "outbox").glob("*.eml")).read_text()
    assert "To: new.reader@example.org" in letter
    token = next(link for link in links_in(letter) if "/sign-in/" in link).rsplit("/", 1)[1]
    store = site.context.store
    assert accounts.link_is_good(store, token)
    signed = accounts.sign_in(store, token, days=1)
    assert signed.new
    assert (signed.reader.email, signed.reader.role) == ("new.reader@example.org", "reader")
    assert not accounts.link_is_good(store, token)
    with pytest.raises(accounts.Problem, match="used already"):
        accounts.sign_in(store, token, days=1)


def test_nothing_secret_is_stored_in_the_clear(site: Site) -> None:
    browser = site.sign_in()
    session = browser.client.cookies[site.context.settings.cookie_name]
    token = browser.client.post("/api/tokens", json={"name": "x", "scope": "write"}).json()["token"]
    with site.context.store.reading() as connection:
        dump = repr([connection.execute(sa.select(table)).all() for table in tables.metadata.tables.values()])
    assert session not in dump
    assert token not in dump


def test_an_old_link_signs_nobody_in(site: Site) -> None:
    store = site.context.store
    token = accounts.make_sign_in_link(store, "a@example.org", minutes=5)
    with store.writing() as connection:
        connection.execute(tables.sign_in_links.update().values(expires=utc_now() - timedelta(seconds=1)))
    with pytest.raises(accounts.Problem) as refused:
        accounts.sign_in(store, token, days=1)
    assert refused.value.status == 403


def test_links_are_limited_by_address(site: Site) -> None:
    for _ in range(accounts.LINKS_PER_ADDRESS):
        assert site.client.post("/api/sign-in", json={"email": "a@example.org"}).status_code == 202
    refused = site.client.post("/api/sign-in", json={"email": "A@example.org"})
    assert refused.status_code == 429
    assert refused.json()["field"] == "email"
    assert site.client.post("/api/sign-in", json={"email": "b@example.org"}).status_code == 202


def test_a_client_causes_few_letters_in_an_hour_whomever_they_go_to(site: Site, home: Path) -> None:
    """One stranger fills no mailboxes, and does not use up what the others may send."""
    quota = site.context.settings.letter_quota
    asked = [site.client.post("/api/sign-in", json={"email": f"x{i}@example.org"}) for i in range(quota)]
    assert {answer.status_code for answer in asked} == {202}
    refused = site.client.post("/api/sign-in", json={"email": "y@example.org"})
    assert refused.status_code == 429
    assert "network" in refused.json()["error"]
    assert 0 < int(refused.headers["Retry-After"]) <= 3601
    form = site.client.post("/subscriptions", data={"email": "z@example.org"})
    assert form.status_code == 429
    assert len(list((home / "outbox").glob("*.eml"))) == quota
    elsewhere = TestClient(site.client.app, client=("203.0.113.7", 4000))
    assert elsewhere.post("/api/sign-in", json={"email": "y@example.org"}).status_code == 202
    assert elsewhere.post("/subscriptions", data={"email": "z@example.org"}).status_code == 200


def test_letters_are_counted_in_the_database_by_the_clocks_hour(database: str, home: Path) -> None:
    """All workers count together; the next hour begins anew, and forgets who asked."""
    start = utc_now().replace(minute=10)
    with Store.open(database) as one, Store.open(database) as other:
        for i in range(6):
            with (one, other)[i % 2].writing() as connection:
                bounds.count_letter(connection, "192.0.2.1", 6, start)
        with pytest.raises(Problem) as refused, one.writing() as connection:
            bounds.count_letter(connection, "192.0.2.1", 6, start)
        assert refused.value.headers["Retry-After"] == str(50 * 60 - start.second + (start.microsecond == 0))
        with one.writing() as connection:
            bounds.count_letter(connection, "192.0.2.2", 6, start)
        with one.writing() as connection:
            bounds.count_letter(connection, "192.0.2.1", 6, start + timedelta(hours=1))
            assert len(connection.execute(sa.select(tables.letter_counts)).all()) == 1


def test_letters_asked_for_at_once_do_not_pass_the_limit(database: str, home: Path) -> None:
    now = utc_now()

    def ask(_: int) -> bool:
        try:
            with store.writing() as connection:
                bounds.count_letter(connection, "192.0.2.1", 10, now)
        except Problem:
            return False
        return True

    with Store.open(database) as store, ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(ask, range(40))) == 10


def test_who_asks_for_many_links_locks_nobody_out(make_site: Callable[..., Site], home: Path) -> None:
    """The last letter before the limit holds until more letters are sent, and the page says so."""
    site = make_site(letter_quota=0, link_minutes=1)
    store = site.context.store
    for _ in range(accounts.LINKS_PER_ADDRESS):
        assert site.client.post("/sign-in", data={"email": "victim@example.org"}).status_code == 200
    page = site.client.post("/sign-in", data={"email": "victim@example.org"})
    assert page.status_code == 429
    assert "the link in the newest of them signs in until" in page.text
    newest = sorted((home / "outbox").glob("*.eml"))[-1].read_text()
    assert "within 60 minutes" in newest
    with store.writing() as connection:  # half an hour later
        links = tables.sign_in_links
        for row in connection.execute(sa.select(links)).all():
            earlier = {"created": row.created - timedelta(minutes=30), "expires": row.expires - timedelta(minutes=30)}
            connection.execute(links.update().where(links.c.token_hash == row.token_hash).values(**earlier))
    assert site.client.post("/api/sign-in", json={"email": "victim@example.org"}).status_code == 429
    (link,) = re.findall(r"/sign-in/([\w-]+)", newest)
    assert accounts.sign_in(store, link, days=1).reader.email == "victim@example.org"
    # The letter was wanted: it counts no longer, and there is always one more way in.
    assert site.client.post("/api/sign-in", json={"email": "victim@example.org"}).status_code == 202
    assert "within 60 minutes" in sorted((home / "outbox").glob("*.eml"))[-1].read_text()


def test_accounts_can_sign_in_when_strangers_used_up_the_letters_of_the_hour(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_site(letter_quota=0)
    site.sign_in("ada@example.org")
    monkeypatch.setattr(accounts, "LINKS_PER_HOUR", 3)
    for i in range(2):
        assert site.client.post("/api/sign-in", json={"email": f"s{i}@example.org"}).status_code == 202
    assert site.client.post("/api/sign-in", json={"email": "s9@example.org"}).status_code == 429
    assert site.client.post("/api/sign-in", json={"email": "ada@example.org"}).status_code == 202


def test_a_reader_asks_for_digests_whatever_others_asked_for_the_address(site: Site) -> None:
    reader = site.sign_in("ada@example.org")
    for i in range(6):
        site.client.post("/subscriptions", data={"email": "ada@example.org", "kind": "search", "value": f"word{i}"})
    asked = site.client.post("/subscriptions", data={"email": "ada@example.org", "kind": "search", "value": "wordy"})
    assert asked.status_code == 429
    mine = reader.client.post("/api/subscriptions", json={"kind": "search", "value": "what I want"})
    assert mine.status_code == 202


def test_readers_are_signed_in_behind_a_proxy_that_asks_for_a_password(site: Site) -> None:
    """HTTP Basic is the proxy's; only a bearer token is ours."""
    reader = site.sign_in("ada@example.org")
    basic = {"Authorization": "Basic dTpw"}
    assert reader.client.get("/api/me", headers=basic).json()["name"] == reader.reader.name
    page = reader.client.get("/profile", headers=basic)
    assert page.status_code == 200
    (csrf,) = set(re.findall(r'name="csrf" value="([^"]+)"', page.text))
    del reader.client.headers["X-CSRF-Token"]
    saved = reader.client.post("/profile", headers=basic, data={"csrf": csrf, "name": "ada-l", "full_name": "Ada"})
    assert saved.status_code == 200
    assert "ada-l" in saved.text
    forged = {"Authorization": "Bearer pt_forged"}
    assert reader.client.get("/api/me", headers=forged).status_code == 401
    assert reader.client.post("/profile", headers=basic, data={"name": "eve", "full_name": ""}).status_code == 403


def test_a_collections_address_leads_to_its_page(site: Site) -> None:
    reader = site.sign_in()
    made = reader.client.post("/api/collections", json={"title": "Worth reading", "public": True}).json()
    read = reader.client.get(f"/api/collections/{made['owner']}/{made['slug']}").json()
    assert read["url"] == made["url"]
    answer = site.client.get(made["url"])
    assert answer.status_code == 200
    assert "Worth reading" in answer.text


@pytest.mark.parametrize(
    "email", ["", "no-at-sign", "a@b@c", "a b@example.org", "x" * 300 + "@e.org", "a@exa\nmple.org"]
)
def test_what_is_no_address_is_refused_by_name(site: Site, email: str) -> None:
    refused = site.client.post("/api/sign-in", json={"email": email})
    assert refused.status_code == 422
    assert refused.json()["field"] == "email"


def test_a_session_ends_when_its_reader_signs_out(site: Site) -> None:
    browser = site.sign_in()
    assert browser.client.post("/api/sign-out").status_code == 204
    browser.client.cookies.set(site.context.settings.cookie_name, "forged")
    assert browser.client.get("/api/me").status_code == 401


def test_the_cookie_is_bound_to_https_where_readers_come_over_it(make_site: Callable[..., Site]) -> None:
    settings = make_site(base_url="https://papers.example.org").context.settings
    assert settings.cookie_name.startswith("__Host-")
    assert settings.secure


def test_two_people_with_one_mailbox_name_get_two_account_names(site: Site) -> None:
    names = {site.sign_in(f"ada@{host}.org").reader.name for host in ("one", "two", "three")}
    assert len(names) == 3


def test_the_first_start_makes_an_administrator(site: Site) -> None:
    admin = accounts.reader_by_name(site.context.store, "admin")
    assert admin is not None
    assert (admin.role, admin.email) == ("admin", "admin@localhost")
    assert accounts.ensure_admin(site.context.store, "other@example.org") == "admin@localhost"
    admin_browser = site.sign_in("admin@localhost")
    assert admin_browser.reader.role == "admin"
    assert accounts.ensure_admin(site.context.store, None) is None  # has signed in: no more links are printed


def test_an_administrator_blocks_an_account_at_once(site: Site) -> None:
    reader, admin = site.sign_in("r@example.org"), site.sign_in("admin@localhost")
    token = reader.client.post("/api/tokens", json={"name": "t", "scope": "write"}).json()["token"]
    name = reader.reader.name
    assert reader.client.put(f"/api/people/{name}/role", json={"role": "admin"}).status_code == 403
    assert admin.client.put(f"/api/people/{name}/role", json={"role": "blocked"}).status_code == 200
    assert reader.client.get("/api/me").status_code == 401
    with_token = TestClient(site.client.app)
    assert with_token.get("/api/whoami-v2", headers={"Authorization": f"Bearer {token}"}).status_code == 401
    link = accounts.make_sign_in_link(site.context.store, "r@example.org", minutes=5)
    with pytest.raises(accounts.Problem, match="blocked"):
        accounts.sign_in(site.context.store, link, days=1)


def test_the_last_administrator_stays(site: Site) -> None:
    admin = site.sign_in("admin@localhost")
    assert admin.client.put("/api/people/admin/role", json={"role": "reader"}).status_code == 409
    assert admin.client.delete("/api/me").status_code == 409


def test_a_service_that_takes_no_accounts_takes_none(site: Site) -> None:
    token = accounts.make_sign_in_link(site.context.store, "new@example.org", minutes=5)
    with pytest.raises(accounts.Problem, match="no new accounts"):
        accounts.sign_in(site.context.store, token, days=1, sign_up=False)


def test_a_deleted_account_takes_everything_along(site: Site) -> None:
    browser = site.sign_in()
    browser.client.put(f"/api/papers/{PAPER}/vote")
    browser.client.put(f"/api/papers/{PAPER}/tags/later")
    browser.client.post(f"/api/papers/{PAPER}/comments", json={"body": "hello"})
    before = site.client.get(f"/api/papers/{PAPER}").json()["upvotes"]
    assert browser.client.delete("/api/me").status_code == 204
    with site.context.store.reading() as connection:
        for table in (tables.votes, tables.tags, tables.comments, tables.sessions, tables.api_tokens):
            assert connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one() == 0, table.name
    assert site.client.get(f"/api/papers/{PAPER}").json()["upvotes"] == before - 1
    assert site.client.get(f"/api/papers/{PAPER}/comments").json() == []


def test_names_are_checked_and_unique(site: Site) -> None:
    one, two = site.sign_in("one@example.org"), site.sign_in("two@example.org")
    assert one.client.patch("/api/me", json={"name": "ada", "full_name": "Ada  L."}).json()["full_name"] == "Ada L."
    assert two.client.patch("/api/me", json={"name": "ada"}).status_code == 409
    for bad in ("Ada", "-a", "admin", "a/b", "", "x" * 41, "a\u202eb"):
        refused = two.client.patch("/api/me", json={"name": bad})
        assert refused.status_code == 422, bad
        assert refused.json()["field"] == "name"


# -- tokens -----------------------------------------------------------------------------------------------------------


def test_a_reading_token_cannot_write_and_a_revoked_one_cannot_anything(site: Site) -> None:
    browser = site.sign_in()
    made = {
        scope: browser.client.post("/api/tokens", json={"name": scope, "scope": scope}).json()
        for scope in ("read", "write")
    }
    program = TestClient(site.client.app)

    def vote(scope: str) -> int:
        headers = {"Authorization": f"Bearer {made[scope]['token']}"}
        return program.put(f"/api/papers/{PAPER}/vote", headers=headers).status_code

    assert (vote("read"), vote("write")) == (403, 200)
    assert browser.client.delete(f"/api/tokens/{made['write']['id']}").status_code == 204
    assert vote("write") == 401
    assert [token["name"] for token in browser.client.get("/api/tokens").json()] == ["read"]


def test_a_token_cannot_make_tokens_or_delete_the_account(site: Site) -> None:
    token = site.sign_in().client.post("/api/tokens", json={"name": "t", "scope": "write"}).json()["token"]
    program = TestClient(site.client.app, headers={"Authorization": f"Bearer {token}"})
    assert program.post("/api/tokens", json={"name": "more", "scope": "write"}).status_code == 403
    assert program.delete("/api/me").status_code == 403


# -- votes ------------------------------------------------------------------------------------------------------------


def test_a_vote_counts_once_and_can_be_taken_back(site: Site) -> None:
    browser = site.sign_in()
    before = site.client.get(f"/api/papers/{PAPER}").json()["upvotes"]
    for _ in range(3):
        assert browser.client.put(f"/api/papers/{PAPER}/vote").json()["upvotes"] == before + 1
    for _ in range(2):
        assert browser.client.delete(f"/api/papers/{PAPER}/vote").json()["upvotes"] == before


def test_votes_here_move_a_paper_in_its_day_and_in_trending(site: Site) -> None:
    store = site.context.store
    day = (TODAY - timedelta(days=1)).isoformat()
    order = [e["paper"]["id"] for e in site.client.get("/api/daily_papers", params={"date": day}).json()]
    last = order[-1]
    for i in range(6):
        reader = site.sign_in(f"r{i}@example.org").reader
        with store.writing() as connection:
            connection.execute(tables.users.update().values(confirmed=utc_now() - timedelta(days=30)))
        confirmed = accounts.reader_by_name(store, reader.name)
        assert confirmed is not None
        votes.cast_vote(store, confirmed, paper_id(site, last))
    site.context.bodies.clear()
    by_day = [e["paper"]["id"] for e in site.client.get("/api/daily_papers", params={"date": day}).json()]
    trending = site.client.get("/api/daily_papers", params={"sort": "trending", "limit": 1}).json()
    assert by_day[0] == last
    assert trending[0]["paper"]["id"] == last


def test_votes_are_limited_by_the_hour(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "VOTES_AN_HOUR", 2)
    browser = site.sign_in()
    codes = [browser.client.put(f"/api/papers/2601.0000{i}/vote").status_code for i in range(3)]
    assert codes == [200, 200, 429]


def test_votes_comments_and_tags_follow_a_paper_that_is_merged(site: Site) -> None:
    """A paper known by title gets its arXiv id by another row that people voted for as well."""
    store = site.context.store
    store.upsert([Record(source="page", title="Twin one", entered=TODAY)])
    store.upsert([Record(source="arxiv", title="Twin two", arxiv_id="2602.00001", published=TODAY)])
    ada, bob = site.sign_in("ada@example.org"), site.sign_in("bob@example.org")
    by_title = store.find(paper_key(None, "Twin one"))
    assert by_title is not None
    for browser in (ada, bob):
        assert browser.client.put(f"/api/papers/{by_title.key}/vote").status_code == 200
    assert bob.client.put("/api/papers/2602.00001/vote").status_code == 200
    ada.client.post(f"/api/papers/{by_title.key}/comments", json={"body": "the same as another one"})
    ada.client.put(f"/api/papers/{by_title.key}/tags/twins")
    store.upsert([Record(source="huggingface", title="Twin one", arxiv_id="2602.00001", entered=TODAY)])
    pulse.refresh_all(store)
    merged = store.find("2602.00001")
    assert merged is not None
    assert pulses(store, [merged.id])[merged.id].votes == 2  # ada's and bob's, bob's once
    assert [c.body for c in comments.comments_on(store, merged.id)] == ["the same as another one"]
    assert ada.client.get("/api/tags").json() == {"twins": 1}


# -- comments ---------------------------------------------------------------------------------------------------------


def test_comments_are_shown_with_their_replies_behind_them(site: Site) -> None:
    ada, bob = site.sign_in("ada@example.org"), site.sign_in("bob@example.org")
    first = ada.client.post(f"/api/papers/{PAPER}/comments", json={"body": "**first**"}).json()
    bob.client.post(f"/api/papers/{PAPER}/comments", json={"body": "second"})
    reply = bob.client.post(f"/api/papers/{PAPER}/comments", json={"body": "reply", "parent": first["id"]}).json()
    deeper = ada.client.post(f"/api/papers/{PAPER}/comments", json={"body": "deeper", "parent": reply["id"]}).json()
    assert deeper["parent"] == first["id"]  # one level
    shown = site.client.get(f"/api/papers/{PAPER}/comments").json()
    assert [c["body"] for c in shown] == ["**first**", "reply", "deeper", "second"]
    assert shown[0]["html"].strip() == "<p><strong>first</strong></p>"


def test_a_removed_comment_keeps_its_place_only_while_it_is_answered(site: Site) -> None:
    ada, bob = site.sign_in("ada@example.org"), site.sign_in("bob@example.org")
    first = ada.client.post(f"/api/papers/{PAPER}/comments", json={"body": "secret"}).json()
    reply = bob.client.post(f"/api/papers/{PAPER}/comments", json={"body": "ok", "parent": first["id"]}).json()
    assert bob.client.delete(f"/api/comments/{first['id']}").status_code == 403
    assert ada.client.delete(f"/api/comments/{first['id']}").status_code == 204
    shown = site.client.get(f"/api/papers/{PAPER}/comments").json()
    assert [(c["removed"], c["body"], c["author"]) for c in shown] == [(True, "", None), (False, "ok", bob.reader.name)]
    assert site.sign_in("admin@localhost").client.delete(f"/api/comments/{reply['id']}").status_code == 204
    assert site.client.get(f"/api/papers/{PAPER}/comments").json() == []


def test_a_comment_can_be_changed_for_an_hour_by_its_author(site: Site) -> None:
    ada, bob = site.sign_in("ada@example.org"), site.sign_in("bob@example.org")
    made = ada.client.post(f"/api/papers/{PAPER}/comments", json={"body": "typo"}).json()
    assert bob.client.patch(f"/api/comments/{made['id']}", json={"body": "mine"}).status_code == 403
    assert ada.client.patch(f"/api/comments/{made['id']}", json={"body": "fixed"}).json()["edited"] is not None
    with site.context.store.writing() as connection:
        connection.execute(tables.comments.update().values(created=utc_now() - timedelta(minutes=61)))
    assert ada.client.patch(f"/api/comments/{made['id']}", json={"body": "late"}).status_code == 403


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"body": ""}, "body"),
        ({"body": "   \n "}, "body"),
        ({"body": "x" * 5001}, "body"),
        ({"body": "a\x00b"}, "body"),
        ({"body": "x", "parent": 999}, "parent"),
        ({"body": "x", "shout": True}, "shout"),
        ({}, "body"),
        ({"body": 7}, "body"),
    ],
)
def test_a_bad_comment_is_refused_by_the_field(site: Site, body: dict[str, object], field: str) -> None:
    refused = site.sign_in().client.post(f"/api/papers/{PAPER}/comments", json=body)
    assert refused.status_code == 422
    assert refused.json()["field"] == field


def test_comments_are_limited_and_not_repeated(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "COMMENTS_AN_HOUR", 2)
    browser = site.sign_in()

    def say(text: str) -> int:
        return browser.client.post(f"/api/papers/{PAPER}/comments", json={"body": text}).status_code

    assert [say("one"), say("one"), say("two"), say("three")] == [201, 409, 201, 429]


# -- tags, hiding, collections ----------------------------------------------------------------------------------------


def test_tags_are_the_readers_own(site: Site) -> None:
    ada, bob = site.sign_in("ada@example.org"), site.sign_in("bob@example.org")
    for name in ("later", "émigré 日本"):
        assert ada.client.put(f"/api/papers/{PAPER}/tags/{name}").status_code == 200
    assert ada.client.get("/api/tags").json() == {"later": 1, "émigré 日本": 1}
    assert [e["paper"]["id"] for e in ada.client.get("/api/tags/later").json()] == [PAPER]
    assert bob.client.get("/api/tags").json() == {}
    assert ada.client.delete(f"/api/papers/{PAPER}/tags/later").json()["tags"] == ["émigré 日本"]
    assert site.client.get("/api/tags").status_code == 401


def test_hidden_papers_leave_the_readers_lists(site: Site) -> None:
    from papertrial.site.listing import Selection, list_papers

    browser = site.sign_in()
    assert browser.client.put(f"/api/papers/{PAPER}/hidden").status_code == 204
    store, mine = site.context.store, browser.reader.id
    for order in ("votes", "trending"):
        shown = [s.paper.key for s in list_papers(store, Selection(hidden_from=mine), order=order, limit=100)]  # type: ignore[arg-type]
        everybody = [s.paper.key for s in list_papers(store, order=order, limit=100)]  # type: ignore[arg-type]
        assert PAPER in everybody
        assert PAPER not in shown
    browser.client.delete(f"/api/papers/{PAPER}/hidden")
    assert PAPER in [s.paper.key for s in list_papers(store, Selection(hidden_from=mine), limit=100)]


def test_a_private_collection_does_not_exist_for_others(site: Site) -> None:
    ada, bob = site.sign_in("ada@example.org"), site.sign_in("bob@example.org")
    made = ada.client.post("/api/collections", json={"title": "Über Sparsity!", "note": "n"}).json()
    where = f"/api/collections/{made['owner']}/{made['slug']}"
    assert made["slug"] == "uber-sparsity"
    for number in (3, 1, 2):
        assert ada.client.put(f"{where}/items/2601.0000{number}", json={"note": f"n{number}"}).status_code == 204
    assert bob.client.get(where).status_code == 404
    assert site.client.get("/api/collections").json() == []
    assert bob.client.put(f"{where}/items/{PAPER}").status_code == 403
    changed = ada.client.patch(where, json={"public": True, "order": ["2601.00002", "2601.00003"]})
    assert changed.json()["public"]
    items = bob.client.get(where).json()["items"]
    assert [(i["id"][-1], i["note"]) for i in items] == [("2", "n2"), ("3", "n3"), ("1", "n1")]
    assert [c["size"] for c in site.client.get("/api/collections").json()] == [3]
    assert ada.client.delete(f"{where}/items/2601.00003").status_code == 204
    assert ada.client.delete(where).status_code == 204
    assert ada.client.get(where).status_code == 404


def test_two_collections_of_one_title_have_two_addresses(site: Site) -> None:
    ada = site.sign_in()
    slugs = {ada.client.post("/api/collections", json={"title": "Same"}).json()["slug"] for _ in range(3)}
    assert len(slugs) == 3


# -- submissions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "2601.00003",
        "arXiv:2601.00003v2",
        "https://arxiv.org/abs/2601.00003",
        "http://arxiv.org/pdf/2601.00003v1.pdf",
        "https://huggingface.co/papers/2601.00003",
        "arxiv.org/html/2601.00003v3",
        "https://doi.org/10.48550/arXiv.2601.00003",
    ],
)
def test_a_known_paper_is_submitted_by_any_spelling(site: Site, text: str) -> None:
    made = site.sign_in().client.post("/api/submissions", json={"url": text})
    assert made.status_code == 202, made.text
    assert (made.json()["arxiv"], made.json()["state"]) == ("2601.00003", "done")


def test_the_newest_comments_are_shown_and_the_older_ones_can_be_asked_for(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = comments.MOST_SHOWN
    reader, store, paper = site.sign_in(), site.context.store, paper_id(site)
    values = {
        "paper_id": paper,
        "user_id": reader.reader.id,
        "parent_id": None,
        "created": utc_now() - timedelta(days=9),
    }
    with store.writing() as connection:
        connection.execute(tables.comments.insert(), [values | {"body": f"old {i}"} for i in range(most + 7)])
    newest = reader.client.post(f"/api/papers/{PAPER}/comments", json={"body": "my newest words"}).json()
    answer = site.client.get(f"/api/papers/{PAPER}/comments")
    shown = answer.json()
    assert len(shown) == most
    assert shown[-1]["id"] == newest["id"]
    assert answer.headers["X-Older-Comments"] == "8"
    page = site.client.get(f"/papers/{PAPER}").text
    assert "my newest words" in page
    assert f'/comments?before={min(one["id"] for one in shown)}">8 older comments' in page
    before = site.client.get(f"/api/papers/{PAPER}/comments", params={"before": min(one["id"] for one in shown)})
    assert [one["body"] for one in before.json()] == [f"old {i}" for i in range(8)]
    assert before.headers["X-Older-Comments"] == "0"
    late = reader.client.post(
        f"/api/papers/{PAPER}/comments", json={"body": "reply", "parent": before.json()[0]["id"]}
    ).json()
    assert late["id"] in [one["id"] for one in site.client.get(f"/api/papers/{PAPER}/comments").json()]


def test_an_account_goes_with_the_digests_of_its_address(site: Site) -> None:
    """Also with those that were asked for before there was an account; other addresses keep theirs."""
    store = site.context.store
    for address in ("z@example.org", "y@example.org"):
        asked = subscriptions.ask(store, address, Watch("feed"))
        assert asked is not None
        subscriptions.confirm(store, asked[1])
    reader = site.sign_in("z@example.org")
    assert reader.client.delete("/api/me").status_code == 204
    with store.reading() as connection:
        left = connection.execute(sa.select(subscriptions_table.c.email)).scalars().all()
        assert left == ["y@example.org"]
        assert "z@example.org" not in repr(connection.execute(sa.select(tables.sign_in_links)).all())


def test_a_blocked_accounts_private_feed_is_no_more(site: Site) -> None:
    reader, admin = site.sign_in("blk@example.org"), site.sign_in("admin@localhost")
    reader.client.put(f"/api/papers/{PAPER}/tags/mine")
    address = reader.client.get("/api/feeds").json()["mine"]["rss"]
    assert site.client.get(address).status_code == 200
    role = f"/api/people/{reader.reader.name}/role"
    assert admin.client.put(role, json={"role": "blocked"}).status_code == 200
    assert site.client.get(address).status_code == 404
    assert admin.client.put(role, json={"role": "reader"}).status_code == 200
    assert site.client.get(address).status_code == 200


@pytest.fixture
def asking(request: pytest.FixtureRequest, make_site: Callable[..., Site]) -> Site:
    """A service that may ask arXiv, and does so only when a test says it."""
    made = make_site(fetch=True)
    made.client.app.state.jobs.stop()  # type: ignore[attr-defined]
    return made


def test_an_unknown_paper_waits_until_the_catalogue_has_it(asking: Site) -> None:
    browser, store = asking.sign_in(), asking.context.store
    assert browser.client.post("/api/submissions", json={"url": "2602.11111"}).json()["state"] == "waiting"
    submissions.settle(store, submissions.waiting(store), TODAY)
    assert browser.client.get("/api/submissions").json()[0]["state"] == "waiting"
    store.upsert(
        [Record(source="arxiv", title="Here it is", arxiv_id="2602.11111", published=TODAY - timedelta(days=9))]
    )
    submissions.settle(store, submissions.waiting(store), TODAY)
    assert browser.client.get("/api/submissions").json()[0]["state"] == "done"
    entry = asking.client.get("/api/daily_papers", params={"date": TODAY.isoformat(), "limit": 99}).json()
    mine = next(e for e in entry if e["paper"]["id"] == "2602.11111")
    assert mine["submittedBy"]["user"] == browser.reader.name


def test_what_arxiv_never_has_is_refused_in_the_end(asking: Site) -> None:
    browser, store = asking.sign_in(), asking.context.store
    browser.client.post("/api/submissions", json={"url": "2602.22222"})
    for _ in range(submissions.ATTEMPTS):
        submissions.settle(store, submissions.waiting(store), TODAY)
    shown = browser.client.get("/api/submissions").json()[0]
    assert (shown["state"], shown["message"]) == ("refused", "arXiv does not have it")


def test_where_arxiv_cannot_be_reached_it_is_asked_for_a_day(asking: Site) -> None:
    browser, store = asking.sign_in(), asking.context.store
    browser.client.post("/api/submissions", json={"url": "2602.22222"})
    for _ in range(3 * submissions.ATTEMPTS):
        submissions.settle(store, submissions.waiting(store), TODAY, answered=False)
    shown = browser.client.get("/api/submissions").json()[0]
    assert (shown["state"], shown["message"]) == ("waiting", submissions.NOT_REACHED)
    with store.writing() as connection:
        connection.execute(tables.submissions.update().values(created=utc_now() - timedelta(hours=25)))
    submissions.settle(store, submissions.waiting(store), TODAY, answered=False)
    shown = browser.client.get("/api/submissions").json()[0]
    assert (shown["state"], shown["message"]) == ("refused", "arXiv could not be reached for a day")


def test_a_failed_round_is_the_jobs_failure_and_leaves_submissions_waiting(
    asking: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def get(self: PoliteClient, *_: object, **__: object) -> None:
        raise PapertrialError("arxiv cannot be reached")

    monkeypatch.setattr(PoliteClient, "get", get)
    browser, store = asking.sign_in(), asking.context.store
    browser.client.post("/api/submissions", json={"url": "2602.22222"})
    with pytest.raises(PapertrialError, match="cannot be reached"):
        submissions.work_off(store, TODAY)
    assert browser.client.get("/api/submissions").json()[0]["message"] == submissions.NOT_REACHED


def test_a_service_that_does_not_fetch_says_so_at_once(site: Site) -> None:
    browser, store = site.sign_in(), site.context.store
    refused = browser.client.post("/api/submissions", json={"url": "2602.11111"})
    assert (refused.status_code, refused.json()["field"]) == (503, "url")
    assert "FETCH is off" in refused.json()["error"]
    page = browser.client.post("/submit", data={"csrf": browser.csrf, "url": "2602.11111"})
    assert page.status_code == 503
    assert "FETCH is off" in page.text
    assert browser.client.get("/api/submissions").json() == []
    assert browser.client.post("/api/submissions", json={"url": PAPER}).json()["state"] == "done"
    submissions.submit(store, browser.reader, "2602.11111", today=TODAY)  # taken before the setting was changed
    submissions.not_asked(store)
    assert browser.client.get("/api/submissions").json()[0]["message"] == submissions.NOT_ASKED


def test_submissions_are_limited_by_the_day(asking: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submissions, "SUBMISSIONS_A_DAY", 2)
    browser = asking.sign_in()
    codes = [browser.client.post("/api/submissions", json={"url": f"2602.0000{i}"}).status_code for i in range(3)]
    assert codes == [202, 202, 429]
    again = browser.client.post("/api/submissions", json={"url": "2602.00001"})
    assert again.status_code == 202  # the same once more is no new one


def test_indexing_by_the_hubs_own_route_needs_a_writing_token(asking: Site) -> None:
    token = asking.sign_in().client.post("/api/tokens", json={"name": "t", "scope": "write"}).json()["token"]
    program = TestClient(asking.client.app)
    body = {"arxivId": "2602.33333"}
    assert program.post("/api/papers/index", json=body).status_code == 401
    headers = {"Authorization": f"Bearer {token}"}
    assert program.post("/api/papers/index", json=body, headers=headers).json() == {}
    assert program.post("/api/papers/index", json={"arxivId": "nope"}, headers=headers).status_code == 422
    assert re.fullmatch(r"2602\.33333", submissions.waiting(asking.context.store)[0][1])
