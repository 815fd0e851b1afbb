"""What arXiv serves: the API's Atom, the daily RSS and Atom of rss.arxiv.org, and OAI-PMH.

The document is cut into its entries first and each entry is parsed by itself, so a broken or cut document keeps every
entry that is whole and names the others by line. A document type declaration is never part of an entry: there are no
entities to expand, whatever a document declares.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from email.utils import parsedate_to_datetime
from typing import Any

from lxml import etree

from papertrial.feed.records import parse_arxiv_id, parse_day
from papertrial.feed.sources.parsed import Parsed, decoded

_PARSER_OPTIONS = {"resolve_entities": False, "no_network": True, "load_dtd": False, "huge_tree": False}
_ROOT = re.compile(r"<(?![?!])((?:[\w.-]+:)?[A-Za-z][\w.-]*)((?:\s[^<>]*)?)>")
_ENCODING = re.compile(rb"^\s*<\?xml[^>]{0,100}encoding=[\"']([A-Za-z0-9_.-]{1,40})[\"']")
_ENCODINGS = {"utf-8", "us-ascii", "ascii", "iso-8859-1", "iso-8859-15", "windows-1252", "utf-16"}
_ENTRY_NAMES = {"feed": "entry", "rss": "item", "rdf": "item", "oai-pmh": "record"}
_ABSTRACT_MARK = re.compile(r"^\s*arXiv:\S+\s+Announce Type:\s*(?P<type>[\w-]+)\s*(?:Abstract:\s*)?", re.IGNORECASE)
_TITLE_MARK = re.compile(r"\.?\s*\(arXiv:\S+(?:\s+\[[^\]]*\])?(?:\s+\w+)?\)\s*$")
_MAX_ENTRY = 2_000_000


@dataclass
class ArxivPage(Parsed):
    """Records of one reply, and where it stands in its list."""

    total: int | None = None
    start: int | None = None
    entry_count: int = 0
    token: str | None = None
    refusal: str | None = None


def parse_arxiv_xml(data: bytes) -> ArxivPage:
    """Read any of arXiv's XML formats.

    Returns
    -------
    ArxivPage
        ``refusal`` is set where arXiv answered with an error document; ``token`` is OAI-PMH's resumption token.
    """
    text = _decoded_xml(data)
    root = _ROOT.search(text)
    name = root[1].rpartition(":")[2].lower() if root else ""
    page = ArxivPage("arxiv")
    if root is None or name not in _ENTRY_NAMES:
        page.problem(None, "not an Atom, RSS or OAI-PMH document")
        return page
    beginning = text[: text.find("<entry") + 500]
    rss = name in ("rss", "rdf") or (name == "feed" and ("rss.arxiv.org" in beginning or "oai:arXiv.org:" in beginning))
    page.source = "arxiv_rss" if rss else "arxiv"
    for line, entry in _entries(page, text, root, _ENTRY_NAMES[name]):
        page.entry_count += 1
        if name == "oai-pmh":
            _add_oai(page, line, entry)
        elif rss:
            _add_announcement(page, line, entry)
        else:
            _add_api_entry(page, line, entry)
    _read_envelope(page, text, name)
    return page


def _decoded_xml(data: bytes) -> str:
    match = _ENCODING.match(data[:200])
    encoding = match[1].decode().lower() if match else "utf-8"
    if encoding in _ENCODINGS and encoding not in ("utf-8", "utf-16"):
        return data.decode(encoding, "replace").replace("\r\n", "\n")
    return decoded(data)


def _entries(page: ArxivPage, text: str, root: re.Match[str], name: str) -> Iterator[tuple[int, Any]]:
    """Every whole entry with its line; what is broken is named on the page."""
    opening = re.compile(rf"<((?:[\w.-]+:)?{name})(?=[\s>])")
    head, tail = f"<{root[1]}{root[2].rstrip('/')}>", f"</{root[1]}>"
    position, line, counted, end = root.end(), 1, 0, -1
    while match := opening.search(text, position):
        line, counted = line + text.count("\n", counted, match.start()), match.start()
        closing = f"</{match[1]}>"
        if end < match.end():
            end = text.find(closing, match.end())
        if end < 0:
            page.problem(line, f"the document ends inside an <{name}>; it and what follows is left out")
            return
        following = opening.search(text, match.end())
        if following and following.start() < end:
            page.problem(line, f"an <{name}> that is not closed, left out")
            position = match.end()
            continue
        position = end + len(closing)
        chunk = text[match.start() : position]
        if len(chunk) > _MAX_ENTRY:
            page.problem(line, f"an <{name}> of {len(chunk):,} characters, left out")
            continue
        try:
            yield line, etree.fromstring(head + chunk + tail, etree.XMLParser(**_PARSER_OPTIONS))[0]
        except (etree.XMLSyntaxError, ValueError, IndexError) as error:
            page.problem(line, f"an <{name}> that is not well-formed, left out: {str(error)[:120]}")


def _read_envelope(page: ArxivPage, text: str, name: str) -> None:
    """What stands around the entries: counts, the resumption token, OAI-PMH's errors."""
    if name == "oai-pmh":
        if match := re.search(r"<resumptionToken[^>]*>([^<]{1,2000})</resumptionToken>", text):
            page.token = _unescaped(match[1].strip())
        if match := re.search(r"<error\s+code=[\"'](\w+)[\"']\s*(?:/>|>([^<]*)<)", text):
            page.refusal = f"{match[1]}: {_unescaped(match[2] or '')[:200]}"
            if match[1] != "noRecordsMatch":
                page.problem(None, f"arXiv refused: {page.refusal}")
        return
    for field, element in (("total", "totalResults"), ("start", "startIndex")):
        if match := re.search(rf"<(?:[\w.-]+:)?{element}[^>]*>\s*(\d{{1,9}})\s*<", text):
            setattr(page, field, int(match[1]))


def _unescaped(text: str) -> str:
    return text.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", '"').replace("&amp;", "&")


def _local(element: Any) -> str:
    return etree.QName(element).localname if isinstance(element.tag, str) else ""


def _children(element: Any, name: str) -> list[Any]:
    return [child for child in element if _local(child) == name]


def _text(element: Any, name: str) -> str | None:
    """Text of the first child of a name, with the text of its own children (a title with markup in it)."""
    for child in _children(element, name):
        return "".join(child.itertext())
    return None


# -- the API's Atom ---------------------------------------------------------------------------------------------------


def _add_api_entry(page: ArxivPage, line: int, entry: Any) -> None:
    name = (_text(entry, "id") or "").strip()
    if "/api/errors" in name or (_text(entry, "title") or "").strip() == "Error":
        page.refusal = " ".join((_text(entry, "summary") or name).split())[:300]
        page.problem(line, f"arXiv refused: {page.refusal}")
        return
    arxiv = parse_arxiv_id(name)
    if arxiv is None:
        page.problem(line, f"an entry that is not an arXiv paper, left out: {name[:80]!r}")
        return
    links = _children(entry, "link")
    pdf = next((link.get("href") for link in links if link.get("title") == "pdf"), None)
    page.add(
        line,
        title=_text(entry, "title") or "",
        arxiv_id=arxiv[0],
        arxiv_version=arxiv[1],
        abstract=_text(entry, "summary"),
        authors=tuple(_text(author, "name") or "" for author in _children(entry, "author")),
        published=_day(page, line, _text(entry, "published")),
        categories=_terms(entry),
        pdf_url=pdf,
        source_url=f"https://arxiv.org/abs/{arxiv[0]}",
    )


def _terms(entry: Any) -> tuple[str, ...]:
    """Categories, the primary one first."""
    primary = [c.get("term") for c in _children(entry, "primary_category")]
    every = [c.get("term") or (c.text or "").strip() for c in _children(entry, "category")]
    return tuple(dict.fromkeys(term for term in [*primary, *every] if term))


def _day(page: ArxivPage, line: int, text: str | None) -> date | None:
    """A day from an ISO or a mail date; one that cannot be read is named."""
    text = (text or "").strip()
    if not text:
        return None
    try:
        return parse_day(text)[0] if text[:4].isdigit() else parsedate_to_datetime(text).date()
    except (ValueError, TypeError, IndexError, OverflowError):
        page.problem(line, f"date left out: {text[:60]!r} is not one")
        return None


# -- the daily announcements ------------------------------------------------------------------------------------------


def _add_announcement(page: ArxivPage, line: int, entry: Any) -> None:
    """An item of rss.arxiv.org. Its date is the announcement's, so the paper's own date stays with the id's month."""
    link = next((item.get("href") for item in _children(entry, "link") if item.get("href")), None) or _text(
        entry, "link"
    )
    names = [_text(entry, "guid"), _text(entry, "id"), link]
    arxiv = next((found for name in names if name and (found := parse_arxiv_id(name.strip()))), None)
    if arxiv is None:
        page.problem(line, f"an item that is not an arXiv paper, left out: {(link or '')[:80]!r}")
        return
    body = _text(entry, "description") or _text(entry, "summary") or ""
    mark = _ABSTRACT_MARK.match(body)
    kind = (_text(entry, "announce_type") or (mark["type"] if mark else "new")).strip().lower()
    announced = _day(page, line, _text(entry, "pubDate") or _text(entry, "published") or _text(entry, "date"))
    page.add(
        line,
        title=_TITLE_MARK.sub("", _text(entry, "title") or ""),
        arxiv_id=arxiv[0],
        arxiv_version=arxiv[1],
        abstract=body[mark.end() :] if mark else body,
        authors=_creators(entry),
        listed=announced if kind in ("new", "cross") else None,
        categories=_terms(entry),
        source_url=f"https://arxiv.org/abs/{arxiv[0]}",
    )


def _creators(entry: Any) -> tuple[str, ...]:
    """Names from ``dc:creator`` (one comma-separated line, or one element each) or from Atom authors."""
    names: list[str] = []
    for creator in _children(entry, "creator"):
        text = re.sub(r"<[^<>]*>", "", "".join(creator.itertext()))
        text = re.sub(r"\s*\([^()]*\)", "", text)  # affiliations
        names += re.split(r"\s*,\s*(?:and\s+)?|\s+and\s+", text)
    names += [] if names else [_text(author, "name") or "" for author in _children(entry, "author")]
    return tuple(" ".join(name.split()) for name in names if name.strip())


# -- OAI-PMH ----------------------------------------------------------------------------------------------------------


def _add_oai(page: ArxivPage, line: int, record: Any) -> None:
    header = next(iter(_children(record, "header")), None)
    if header is not None and header.get("status") == "deleted":
        return
    metadata = next(iter(_children(record, "metadata")), None)
    paper = metadata[0] if metadata is not None and len(metadata) else None
    arxiv = parse_arxiv_id(_text(paper, "id") or "") if paper is not None else None
    if paper is None or arxiv is None:
        page.problem(line, "a record without arXiv metadata, left out (ask for metadataPrefix arXiv)")
        return
    versions = _children(paper, "version")
    created = _text(versions[0], "date") if versions else _text(paper, "created")
    page.add(
        line,
        title=_text(paper, "title") or "",
        arxiv_id=arxiv[0],
        arxiv_version=len(versions) or None,
        abstract=_text(paper, "abstract"),
        authors=_oai_authors(paper),
        published=_day(page, line, created),
        categories=tuple((_text(paper, "categories") or "").split()),
        source_url=f"https://arxiv.org/abs/{arxiv[0]}",
    )


def _oai_authors(paper: Any) -> tuple[str, ...]:
    listed = next(iter(_children(paper, "authors")), None)
    if listed is None:
        return ()
    people = _children(listed, "author")
    if people:
        parts = ([_text(p, "forenames"), _text(p, "keyname"), _text(p, "suffix")] for p in people)
        return tuple(" ".join(" ".join(filter(None, names)).split()) for names in parts)
    line = re.sub(r"\s*\([^()]*\)", "", " ".join("".join(listed.itertext()).split()))
    return tuple(name for name in re.split(r"\s*,\s*(?:and\s+)?|\s+and\s+", line) if name)
