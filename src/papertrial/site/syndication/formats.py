"""A feed as RSS 2.0, Atom 1.0 (RFC 4287) or JSON Feed 1.1. The same feed gives the same bytes."""

import json
import re
from datetime import datetime
from email.utils import format_datetime
from typing import Any

from lxml import etree
from lxml.builder import ElementMaker

from papertrial.site.syndication.addresses import MEDIA_TYPES
from papertrial.site.syndication.items import Feed, Item

ATOM = "http://www.w3.org/2005/Atom"
DC = "http://purl.org/dc/elements/1.1/"
#: Minutes that a reader may keep a feed.
KEEP_MINUTES = 30

# What XML 1.0 cannot hold: controls, lone surrogates and the two non-characters of the basic plane.
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def written(feed: Feed, form: str) -> bytes:
    """A feed in one of the formats: ``rss``, ``atom`` or ``json``."""
    return {"rss": as_rss, "atom": as_atom, "json": as_json}[form](feed)


def as_rss(feed: Feed) -> bytes:
    """RSS 2.0 with ``atom:link`` to itself and ``dc:creator``, as its best-practices profile asks for."""
    made = ElementMaker(nsmap={"atom": ATOM, "dc": DC})
    link = etree.Element(f"{{{ATOM}}}link", href=feed.address, rel="self", type=MEDIA_TYPES["rss"])
    channel = made.channel(
        made.title(_text(feed.title)),
        made.link(feed.page),
        made.description(_text(feed.description)),
        made.language("en"),
        made.lastBuildDate(format_datetime(feed.updated, usegmt=True)),
        made.ttl(str(KEEP_MINUTES)),
        link,
    )
    for item in feed.items:
        entry = made.item(
            made.title(_text(item.title)),
            made.link(item.url),
            made.guid(item.id, isPermaLink="false"),
            made.pubDate(format_datetime(item.published, usegmt=True)),
            made.description(_text(item.html)),
        )
        for name in item.authors:
            etree.SubElement(entry, f"{{{DC}}}creator").text = _text(name)
        for label in item.labels:
            entry.append(made.category(_text(label)))
        channel.append(entry)
    return _xml(made.rss(channel, version="2.0"))


def as_atom(feed: Feed) -> bytes:
    """Atom 1.0."""
    made = ElementMaker(namespace=ATOM, nsmap={None: ATOM})
    root = made.feed(
        made.title(_text(feed.title)),
        made.subtitle(_text(feed.description)),
        made.id(feed.id),
        made.updated(_rfc3339(feed.updated)),
        made.link(rel="self", type=MEDIA_TYPES["atom"], href=feed.address),
        made.link(rel="alternate", type="text/html", href=feed.page),
        made.author(made.name(_text(feed.title))),  # for items whose authors are not known
    )
    for item in feed.items:
        entry = made.entry(
            made.title(_text(item.title)),
            made.id(item.id),
            made.link(rel="alternate", type="text/html", href=item.url),
            made.published(_rfc3339(item.published)),
            made.updated(_rfc3339(item.updated)),
            made.summary(_text(item.text)),
            made.content(_text(item.html), type="html"),
        )
        for name in item.authors:
            entry.append(made.author(made.name(_text(name))))
        for label in item.labels:
            entry.append(made.category(term=_text(label)))
        if item.external_url:
            entry.append(made.link(rel="related", href=item.external_url))
        root.append(entry)
    return _xml(root)


def as_json(feed: Feed) -> bytes:
    """JSON Feed 1.1; the extension ``_papertrial`` holds the verdict."""
    shown = {
        "version": "https://jsonfeed.org/version/1.1",
        "title": feed.title,
        "description": feed.description,
        "home_page_url": feed.page,
        "feed_url": feed.address,
        "language": "en",
        "items": [_json_item(item) for item in feed.items],
    }
    return json.dumps(shown, ensure_ascii=False, indent=1).encode("utf-8", "replace")


def _json_item(item: Item) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "id": item.id,
        "url": item.url,
        "title": item.title,
        "content_html": item.html,
        "summary": item.text,
        "date_published": _rfc3339(item.published),
        "date_modified": _rfc3339(item.updated),
    }
    if item.external_url:
        shown["external_url"] = item.external_url
    if item.authors:
        shown["authors"] = [{"name": name} for name in item.authors]
    if item.labels:
        shown["tags"] = list(item.labels)
    if item.verdict:
        shown["_papertrial"] = item.verdict
    return shown


def _text(text: str) -> str:
    return _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text)


def _rfc3339(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def _xml(root: Any) -> bytes:
    return bytes(etree.tostring(root, xml_declaration=True, encoding="utf-8", pretty_print=True))
