"""Daily Papers pages saved as HTML.

Such a page carries its papers twice: as JSON in the attribute ``data-props`` of the element that the browser fills
(``div.SVELTE_HYDRATER[data-target="DailyPapers"]``), and as article cards. The JSON says more, so it is read first;
a page that was saved without it is read from its cards, and one without either as the text that it shows.
"""

import json
import re
from datetime import date
from typing import Any

from lxml import etree, html

from papertrial.feed.records import parse_arxiv_id, parse_day
from papertrial.feed.sources.huggingface import add_entries
from papertrial.feed.sources.listing_text import count_of, day_of, parse_listing_text
from papertrial.feed.sources.parsed import Parsed, decoded

_DAY_IN_ADDRESS = re.compile(r"/papers(?:/date/|\?date=)(\d{4}-\d{2}-\d{2})")
_SAVED_FROM = re.compile(r"saved from url=\(\d+\)(\S+)")
_PAPER_LINK = re.compile(r"(?:https?://(?:www\.)?huggingface\.co)?/papers/([^/?#\s]+)")
_BLOCKS = frozenset(
    {"address", "article", "div", "dl", "dd", "dt", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "header"}
    | {"hr", "li", "main", "nav", "ol", "p", "section", "table", "td", "th", "tr", "ul"}
)
_SILENT = frozenset(("script", "style", "svg", "head", "noscript", "template"))


def parse_listing_html(data: bytes, today: date | None = None) -> Parsed:
    """Read a saved page.

    Parameters
    ----------
    data
        The file as it is.
    today
        As in `papertrial.feed.sources.listing_text.parse_listing_text`, for a page of which only the text can be read.
    """
    parsed = Parsed("page")
    text = decoded(data).replace("\x00", "")
    try:
        parser = html.HTMLParser(huge_tree=False, no_network=True, remove_comments=False)
        tree = html.document_fromstring(text, parser=parser, ensure_head_body=True)
    except (etree.ParserError, etree.XMLSyntaxError, ValueError) as error:
        parsed.problem(None, f"not HTML that can be read: {str(error)[:120]}")
        return parsed
    day = _address_day(tree, text)
    _read_props(parsed, tree, day)
    if not parsed.records:
        _read_cards(parsed, tree, day)
    if not parsed.records:
        shown = parse_listing_text("\n".join(_shown_text(tree)).encode("utf-8", "replace"), today)
        # Lines of the shown text are not lines of the file, so its problems come without them.
        shown.problems = [re.sub(r"^line \d+: ", "", problem) for problem in shown.problems]
        parsed.extend([shown])
    return parsed


def _address_day(tree: Any, text: str) -> date | None:
    """The day in the address that the page was saved from."""
    addresses = tree.xpath("//link[@rel='canonical']/@href | //meta[@property='og:url']/@content")
    saved = _SAVED_FROM.search(text[:5000])
    for address in [*addresses[:5], *([saved[1]] if saved else [])]:
        if match := _DAY_IN_ADDRESS.search(address):
            try:
                return parse_day(match[1])[0]
            except ValueError:
                continue
    return None


def _read_props(parsed: Parsed, tree: Any, day: date | None) -> None:
    for element in tree.xpath("//*[@data-target and @data-props]"):
        if "Papers" not in element.get("data-target"):
            continue
        try:
            props = json.loads(element.get("data-props"))
        except (ValueError, RecursionError) as error:
            parsed.problem(element.sourceline, f"the page's data is not whole ({str(error)[:80]}); reading its cards")
            continue
        if not isinstance(props, dict):
            continue
        lists = [
            props[name] for name in ("dailyPapers", "papers", "searchResults") if isinstance(props.get(name), list)
        ]
        entered = day
        if props.get("periodType", "day") == "day" and isinstance(props.get("dateString"), str):
            try:
                entered = parse_day(props["dateString"])[0]
            except ValueError:
                parsed.problem(element.sourceline, f"the page's day {props['dateString'][:40]!r} is not one")
        for entries in lists[:1]:
            add_entries(parsed, entries, entered, element.sourceline)


def _read_cards(parsed: Parsed, tree: Any, day: date | None) -> None:
    for card in tree.xpath("//article"):
        titles = card.xpath(".//h1 | .//h2 | .//h3 | .//h4")
        if not titles:
            continue
        links = [match[1] for href in card.xpath(".//a/@href") if (match := _PAPER_LINK.match(href))]
        arxiv = next((found for link in links if (found := parse_arxiv_id(link))), None)
        lines = [line for line in _shown_text(card) if line]
        abstract = max((" ".join(p.text_content().split()) for p in card.xpath(".//p")), key=len, default="")
        published = next((shown for line in lines if (shown := day_of(line))), None)
        parsed.add(
            card.sourceline,
            title=titles[0].text_content(),
            arxiv_id=arxiv[0] if arxiv else None,
            source_url=f"https://huggingface.co/papers/{arxiv[0]}" if arxiv else None,
            abstract=abstract if len(abstract) > 80 else None,
            author_count=_author_count(lines),
            published=published,
            entered=None if published else day,
            listed=day,
            upvotes=_number(card.xpath(".//label | .//*[contains(@class, 'upvote')] | .//*[@data-upvotes]")),
            comment_count=_number(card.xpath(".//a[contains(@href, '#community')]")),
            organisation=_organisation(card),
        )


def _author_count(lines: list[str]) -> int | None:
    match = re.search(r"\b(\d{1,5})\s+authors?\b", " \n".join(lines))
    return int(match[1]) or None if match else None


def _number(elements: list[Any]) -> int | None:
    """The first count that one of the elements shows."""
    for element in elements:
        if (count := count_of(" ".join(element.text_content().split()))) is not None:
            return count
    return None


def _organisation(card: Any) -> str | None:
    for element in card.xpath(".//*[contains(@class, 'organization')] | .//a[contains(@href, '/organizations/')]"):
        if text := " ".join(element.text_content().split()):
            return text[:200]
    return None


def _shown_text(tree: Any) -> list[str]:
    """The text that a browser shows, with a blank line between blocks; no recursion, for pages nest deeply."""
    lines: list[str] = [""]
    for event, element in etree.iterwalk(tree, events=("start", "end")):
        tag = element.tag if isinstance(element.tag, str) else ""
        silent = tag in _SILENT or not tag
        if tag in _BLOCKS and lines[-1]:
            lines += ["", ""]
        elif tag == "br":
            lines += [""] if event == "start" else []
        text = (element.text if event == "start" and not silent else element.tail if event == "end" else None) or ""
        if text and not any(parent.tag in _SILENT for parent in _around(element, event)):
            joined = " ".join(text.split())
            gap = " " if lines[-1] and (text[:1].isspace() or lines[-1].endswith(" ")) else ""
            lines[-1] = lines[-1].rstrip() + gap + joined + (" " if text[-1:].isspace() and joined else "")
    return [line.strip() for line in lines]


def _around(element: Any, event: str) -> Any:
    """The elements whose content a text belongs to: not its own element for the text behind it."""
    if event == "start":
        yield element
    yield from element.iterancestors(*_SILENT)
