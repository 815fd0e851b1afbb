"""Feeds: every list in every format, read with feedparser, valid by the rules of each format, fetched once only."""

import json
import re
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import format_datetime, parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import feedparser
import httpx
import pytest
import sqlalchemy as sa
from lxml import etree

from papertrial.feed.people_schema import metadata
from papertrial.feed.records import Record
from papertrial.site import upkeep
from papertrial.site.people import accounts
from papertrial.site.syndication import formats
from papertrial.site.syndication.items import Feed, Item
from site_service import TODAY, Browser, Site

FORMS = ("rss", "atom", "json")
PUBLIC = [
    "/feeds/papers.{}",
    f"/feeds/papers.{{}}?period={TODAY:%Y-%m}",
    "/feeds/papers.{}?family=decoding",
    "/feeds/papers.{}?organisation=Example%20Lab",
    "/feeds/topic.{}?topic=cs.CL",
    "/feeds/search.{}?q=speculative%20decoding",
    "/feeds/verdicts.{}",
    "/feeds/verdicts.{}?verdict=upheld",
]
MEDIA = {"rss": "application/rss+xml", "atom": "application/atom+xml", "json": "application/feed+json"}
RFC3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")


def read(answer: httpx.Response, form: str) -> list[dict[str, Any]]:
    """Title, id, link and date of every item, from any of the formats."""
    if form == "json":
        return [
            {"title": item["title"], "id": item["id"], "link": item["url"], "date": item["date_published"]}
            for item in answer.json()["items"]
        ]
    parsed = feedparser.parse(answer.content, response_headers={"content-type": answer.headers["content-type"]})
    assert not parsed.bozo, parsed.bozo_exception
    return [
        {
            "title": entry.title,
            "id": entry.id,
            "link": entry.link,
            "date": f"{datetime(*entry.published_parsed[:6]):%Y-%m-%dT%H:%M:%SZ}",
        }
        for entry in parsed.entries
    ]


@pytest.fixture
def reader(site: Site) -> Browser:
    """Somebody with a tag that has learned something."""
    browser = site.sign_in("ada@example.org")
    topics = {"walrus": "The walrus swims in arctic water", "desert": "A camel crosses dry desert sand"}
    made = [
        Record(
            source="huggingface",
            title=f"{name} study {i}",
            arxiv_id=f"2602.{n}{i:04d}",
            abstract=f"{text} {i}.",
            entered=TODAY,
        )
        for n, (name, text) in enumerate(topics.items())
        for i in range(6)
    ]
    site.context.store.upsert(made)
    for i in range(3):
        assert browser.client.put(f"/api/papers/2602.0000{i}/tags/sea").status_code == 200
    return browser


@pytest.mark.parametrize("address", PUBLIC)
def test_every_list_says_the_same_in_every_format(site: Site, address: str) -> None:
    answers = {form: site.client.get(address.format(form)) for form in FORMS}
    for form, answer in answers.items():
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"].split(";")[0] == MEDIA[form]
        assert answer.headers["access-control-allow-origin"] == "*"
    items = {form: read(answer, form) for form, answer in answers.items()}
    assert items["rss"] == items["atom"] == items["json"]
    ids = [item["id"] for item in items["json"]]
    assert len(ids) == len(set(ids))
    if "family" not in address and "verdict=" not in address:
        assert ids


def test_a_feed_holds_its_papers_newest_first(site: Site) -> None:
    items = read(site.client.get("/feeds/topic.atom?topic=cs.CL"), "atom")
    assert [item["title"] for item in items[:2]] == [
        "Paper number 1 about speculative decoding",
        "Paper number 0 about sparse attention",
    ] or items[0]["title"].startswith("Paper number")
    assert [item["date"] for item in items] == sorted((item["date"] for item in items), reverse=True)
    assert {urlsplit(item["link"]).path for item in items} >= {f"/papers/2601.0000{i}" for i in range(6)}
    found = read(site.client.get('/feeds/search.json?q="speculative decoding"'), "json")
    assert "Paper number 1 about speculative decoding" in [item["title"] for item in found]
    assert not read(site.client.get('/feeds/search.json?q="decoding speculative"'), "json")


def test_atom_keeps_rfc_4287(site: Site) -> None:
    root = etree.fromstring(site.client.get("/feeds/papers.atom").content)
    names = {"a": formats.ATOM}
    for element in [root, *root.findall("a:entry", names)]:
        for name in ("id", "title", "updated"):
            assert len(element.findall(f"a:{name}", names)) == 1
        assert RFC3339.fullmatch(element.findtext("a:updated", namespaces=names))
        assert urlsplit(element.findtext("a:id", namespaces=names)).scheme == "tag"
        assert len([link for link in element.findall("a:link", names) if link.get("rel") == "alternate"]) == 1
    own = [link.get("href") for link in root.findall("a:link", names) if link.get("rel") == "self"]
    assert own == ["http://testserver/feeds/papers.atom"]
    assert root.find("a:author/a:name", names).text


def test_rss_keeps_its_best_practices(site: Site) -> None:
    channel = etree.fromstring(site.client.get("/feeds/papers.rss").content).find("channel")
    assert all(len(channel.findall(name)) == 1 for name in ("title", "link", "description"))
    assert channel.find(f"{{{formats.ATOM}}}link").get("href") == "http://testserver/feeds/papers.rss"
    for item in channel.findall("item"):
        assert item.find("guid").get("isPermaLink") == "false"
        moment = parsedate_to_datetime(item.findtext("pubDate"))
        assert moment.tzinfo is not None
        assert not item.findall("author")  # that would have to be an e-mail address
    assert channel.findall(f"item/{{{formats.DC}}}creator")


def test_json_keeps_json_feed_1_1(site: Site) -> None:
    feed = site.client.get("/feeds/papers.json").json()
    assert feed["version"] == "https://jsonfeed.org/version/1.1"
    assert feed["feed_url"] == "http://testserver/feeds/papers.json"
    for item in feed["items"]:
        assert isinstance(item["id"], str)
        assert item["content_html"]
        assert RFC3339.fullmatch(item["date_published"])
        assert RFC3339.fullmatch(item["date_modified"])
        assert all(set(author) == {"name"} for author in item.get("authors", []))
        assert set(item) <= {
            "id", "url", "external_url", "title", "content_html", "summary", "date_published", "date_modified",
            "authors", "tags", "_papertrial",
        }  # fmt: skip


def test_verdicts_come_with_word_and_scale(site: Site) -> None:
    feed = site.client.get("/feeds/verdicts.json").json()
    judged = [entry for entry in site.context.board.snapshot if entry.headline]
    assert len(feed["items"]) == min(50, len(judged))
    assert judged
    for item in feed["items"]:
        assert item["_papertrial"]["scale"] in ("small", "gpu", "paper")
        assert item["title"].lower().startswith(item["_papertrial"]["verdict"])
    upheld = site.client.get("/feeds/verdicts.json?verdict=upheld").json()["items"]
    assert all(item["_papertrial"]["verdict"] == "upheld" for item in upheld)


# -- fetched once -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", PUBLIC)
def test_what_a_reader_has_is_not_sent_again(site: Site, address: str) -> None:
    for form in FORMS:
        first = site.client.get(address.format(form))
        tag, changed = first.headers["etag"], first.headers["last-modified"]
        for known in (tag, tag.removeprefix("W/"), f'"other", {tag}', "*"):
            again = site.client.get(address.format(form), headers={"If-None-Match": known})
            assert again.status_code == 304
            assert again.content == b""
            assert again.headers["etag"] == tag
        assert site.client.get(address.format(form), headers={"If-Modified-Since": changed}).status_code == 304
        # An ETag decides alone; a date that cannot be read decides nothing.
        both = {"If-None-Match": '"other"', "If-Modified-Since": changed}
        assert site.client.get(address.format(form), headers=both).status_code == 200
        assert site.client.get(address.format(form), headers={"If-Modified-Since": "today"}).status_code == 200
        early = format_datetime(datetime(1960, 1, 1, tzinfo=UTC), usegmt=True)
        assert site.client.get(address.format(form), headers={"If-Modified-Since": early}).status_code == 200


def test_a_new_paper_changes_the_feed_and_a_vote_does_not(site: Site) -> None:
    address = "/feeds/search.atom?q=paper"
    before = site.client.get(address)
    site.sign_in().client.put("/api/papers/2601.00003/vote")
    assert site.client.get(address, headers={"If-None-Match": before.headers["etag"]}).status_code == 304
    site.context.store.upsert([Record(source="page", title="Another paper on zebras", entered=TODAY)])
    upkeep.update_index_now(site.context)
    after = site.client.get(address, headers={"If-None-Match": before.headers["etag"]})
    assert after.status_code == 200
    assert {item["id"] for item in read(before, "atom")} < {item["id"] for item in read(after, "atom")}


# -- hostile text -----------------------------------------------------------------------------------------------------


def test_text_from_outside_is_text_in_every_format(site: Site) -> None:
    """Even where markup came past the cleaning of what is ingested."""
    title, text = "</title><script>alert(1)</script> & ]]> zebra", "<img src=x onerror=alert(1)> <b>zebra</b>"
    table = metadata.tables["papers"]
    with site.context.store.writing() as connection:
        row = table.update().where(table.c.arxiv_id == "2601.00000")
        connection.execute(row.values(title=title, abstract=text, ai_summary=None, organisation="<i>x</i>"))
    for form in FORMS:
        answer = site.client.get(f"/feeds/topic.{form}?topic=cs.CL")
        (html,) = [html for name, html in _contents(answer, form) if name == title]
        assert re.sub(r"</?p>", "", html).count("<") == 0
        assert "&lt;img src=x onerror=alert(1)&gt; &lt;b&gt;zebra&lt;/b&gt;" in html
        assert form == "json" or b"<script" not in answer.content


def _contents(answer: httpx.Response, form: str) -> list[tuple[str, str]]:
    """Title and HTML of every item, as they are."""
    if form == "json":
        return [(item["title"], item["content_html"]) for item in answer.json()["items"]]
    root = etree.fromstring(answer.content)
    if form == "rss":
        return [(item.findtext("title"), item.findtext("description")) for item in root.iter("item")]
    entries = root.iter(f"{{{formats.ATOM}}}entry")
    return [(e.findtext(f"{{{formats.ATOM}}}title"), e.findtext(f"{{{formats.ATOM}}}content")) for e in entries]


def test_what_xml_cannot_hold_is_replaced() -> None:
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    item = Item("tag:x,2025:1", "http://x/1", "a\0b\x1b\ufffe\ud800", "t\x08", "<p>\x0b</p>", moment, moment, moment)
    feed = Feed("T\x01", "D", "http://x/", "http://x/f", "tag:x,2025:f", [item])
    for form in ("rss", "atom"):
        parsed = feedparser.parse(formats.written(feed, form))
        assert not parsed.bozo, parsed.bozo_exception
        assert parsed.entries[0].title == "a\N{REPLACEMENT CHARACTER}b" + "\N{REPLACEMENT CHARACTER}" * 3
    assert json.loads(formats.written(feed, "json"))["items"][0]["id"] == "tag:x,2025:1"


@pytest.mark.parametrize(
    ("address", "status"),
    [
        ("/feeds/papers.pdf", 400),
        ("/feeds/papers.rss?family=nonsense", 400),
        ("/feeds/papers.rss?period=2026-99", 400),
        ("/feeds/papers.rss?organisation=a%0Ab", 400),
        ("/feeds/search.rss", 400),
        ("/feeds/search.rss?q=" + "x" * 251, 400),
        ("/feeds/topic.rss?topic=", 400),
        ("/feeds/verdicts.rss?verdict=maybe", 400),
        ("/feeds/nothing.rss", 404),
    ],
)
def test_what_is_wrong_is_refused_as_json(site: Site, address: str, status: int) -> None:
    answer = site.client.get(address)
    assert answer.status_code == status
    assert answer.json()["error"]


# -- private feeds ----------------------------------------------------------------------------------------------------


def own_feeds(browser: Browser, tag: str = "sea") -> dict[str, str]:
    found = browser.client.get("/api/feeds").json()[tag]
    return {form: address.removeprefix("http://testserver") for form, address in found.items()}


def test_the_feed_of_a_tag_has_papers_like_those_under_it_for_whoever_has_its_address(
    site: Site, reader: Browser
) -> None:
    feeds = own_feeds(reader)
    answers = {form: site.client.get(feeds[form]) for form in FORMS}
    items = {form: read(answer, form) for form, answer in answers.items()}
    assert items["rss"] == items["atom"] == items["json"]
    titles = [item["title"] for item in items["json"]]
    assert any(title.startswith("walrus") for title in titles)
    assert not any(title.startswith("desert") for title in titles)
    for answer in answers.values():
        assert "private" in answer.headers["cache-control"]
        assert "access-control-allow-origin" not in answer.headers
    tag = answers["atom"].headers["etag"]
    assert site.client.get(feeds["atom"], headers={"If-None-Match": tag}).status_code == 304


def test_a_private_address_cannot_be_guessed_and_can_be_made_void(site: Site, reader: Browser) -> None:
    address = own_feeds(reader)["atom"]
    assert own_feeds(reader)["atom"] == address  # it stays
    key = address.split("/")[3]
    number, mac = key.split(".")
    other = site.sign_in("bob@example.org")
    other.client.put("/api/papers/2601.00001/tags/sea")
    assert own_feeds(other)["atom"] != address
    forged = [f"{number}.{'0' * 40}", f"{other.reader.id}.{mac}", "x", f"{number}.é", f"{10**30}.{mac}", f"-1.{mac}"]
    for wrong in forged:
        answer = site.client.get(address.replace(key, wrong))
        assert answer.status_code == 404, wrong
    assert site.client.get(address.replace("/sea.", "/nothing.")).status_code == 404
    renewed = reader.client.post("/subscriptions/renew-feeds", data={"csrf": reader.csrf}, follow_redirects=False)
    assert renewed.status_code == 303
    assert site.client.get(address).status_code == 404
    assert site.client.get(own_feeds(reader)["atom"]).status_code == 200
    assert site.client.get(own_feeds(other)["atom"]).status_code == 200


def test_showing_private_addresses_writes_nothing_and_an_account_that_goes_takes_them_along(
    site: Site, reader: Browser
) -> None:
    address = own_feeds(reader)["atom"]
    with site.context.store.reading() as connection:
        assert connection.execute(sa.select(metadata.tables["feed_keys"])).all() == []
    accounts.delete_account(site.context.store, reader.reader.id)
    assert site.client.get(address).status_code == 404


def test_pages_name_their_feeds(make_site: Callable[..., Site]) -> None:
    client = make_site().client
    for page in ("/", "/verdicts", "/topics/cs.CL", "/search?q=decoding"):
        html = client.get(page).text
        links = re.findall(r'<link rel="alternate"[^>]*type="application/(?:rss|atom|feed)[^"]*"[^>]*>', html)
        assert len(links) == 3, page
        for link in links:
            (address,) = re.findall(r'href="([^"]+)"', link)
            assert client.get(address.replace("&amp;", "&")).status_code == 200, address
