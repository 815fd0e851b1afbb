"""Markdown from people as HTML that is safe on a page.

Two walls: the parser takes no HTML and makes no images, and what it gives is reduced to a list of plain elements.
"""

from functools import lru_cache

import nh3
from markdown_it import MarkdownIt

_ELEMENTS = {
    "p", "br", "em", "strong", "s", "code", "pre", "blockquote", "ul", "ol", "li", "a", "h3", "h4", "h5", "h6", "hr",
    "table", "thead", "tbody", "tr", "th", "td",
}  # fmt: skip


@lru_cache(maxsize=1)
def _parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False, "linkify": False, "maxNesting": 20})
    return parser.enable(["table", "strikethrough"]).disable(["image", "reference", "html_block", "html_inline"])


@lru_cache(maxsize=4096)
def to_html(text: str) -> str:
    """Markdown as sanitised HTML: http(s) and mail links only, marked as made by users."""
    return nh3.clean(
        _lowered(_parser().render(text)),
        tags=_ELEMENTS,
        attributes={"a": {"href"}, "ol": {"start"}, "*": set()},
        attribute_filter=_outside_only,
        url_schemes={"http", "https", "mailto"},
        link_rel="nofollow noopener noreferrer ugc",
    )


def _outside_only(_element: str, attribute: str, value: str) -> str | None:
    """Links lead to whole addresses; a relative one would depend on the page that shows it."""
    whole = attribute != "href" or value.lower().startswith(("http://", "https://", "mailto:"))
    return value if whole else None


def _lowered(html: str) -> str:
    """Headings of a comment stand below those of the page."""
    for level in (2, 1):
        html = html.replace(f"<h{level}>", f"<h{level + 2}>").replace(f"</h{level}>", f"</h{level + 2}>")
    return html
