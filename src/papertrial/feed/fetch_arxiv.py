"""New papers from arXiv: its API for a few categories, OAI-PMH for everything, RSS for today.

arXiv asks for one request every three seconds over one connection, and for bulk harvests to use OAI-PMH. A fetch that
was interrupted goes on where it stopped; a page that was stored twice changes nothing.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any

from papertrial.errors import PapertrialError, UsageError
from papertrial.feed.cursors import read_position, save_position
from papertrial.feed.http import PoliteClient, utc_today
from papertrial.feed.runs import IngestReport, recorded_run
from papertrial.feed.sources.arxiv import ArxivPage, parse_arxiv_xml
from papertrial.feed.store import Store

#: arXiv's terms of use, https://info.arxiv.org/help/api/tou.html
INTERVAL_SECONDS = 3.0
#: The API refuses slices above 2,000 entries and lists above 30,000; windows of time are halved to stay below.
LARGEST_SLICE = 2000
LARGEST_WINDOW = 10_000
_CATEGORY = re.compile(r"[a-z]+(?:-[a-z]+)*(?:\.[A-Za-z]{2}(?:-[a-z]+)*)?")
_SET = re.compile(r"[a-z-]+(?::[a-z-]+)*(?::[A-Za-z-]+)?")


def api_url() -> str:
    return os.environ.get("PAPERTRIAL_ARXIV_API", "https://export.arxiv.org/api/query")


def oai_url() -> str:
    return os.environ.get("PAPERTRIAL_ARXIV_OAI", "https://oaipmh.arxiv.org/oai")


def rss_url() -> str:
    return os.environ.get("PAPERTRIAL_ARXIV_RSS", "https://rss.arxiv.org/rss").rstrip("/")


def polite_client(patience: float = 0.0) -> PoliteClient:
    """The client that keeps arXiv's terms."""
    # OAI-PMH often takes more than a minute.
    return PoliteClient("arxiv", INTERVAL_SECONDS, timeout=180.0, patience=patience)


def fetch_arxiv(
    store: Store,
    since: date | None = None,
    categories: Sequence[str] = ("cs.CL",),
    *,
    until: date | None = None,
    page_size: int = 500,
    client: PoliteClient | None = None,
) -> IngestReport:
    """Bring in the papers that were submitted in a span of days, oldest first.

    Parameters
    ----------
    since, until
        First and last day of submission (default: from the day before the last complete fetch, to today).
    categories
        Such as ``cs.CL``; a paper of any of them comes, cross-lists included.
    page_size
        Entries a request, at most 2,000.

    Raises
    ------
    UsageError
        A category, a page size or a span that cannot be; no `since` and no earlier fetch.
    PapertrialError
        arXiv cannot be reached or refuses. What was fetched is stored, and the next call goes on from there.
    """
    names = _checked_categories(categories)
    if not 1 <= page_size <= LARGEST_SLICE:
        raise UsageError(f"page_size is {page_size}; arXiv gives 1 to {LARGEST_SLICE} entries a request")
    cursor_name = f"arxiv:{'+'.join(names)}"
    span = _Span.of(read_position(store, cursor_name), since, until or utc_today())
    with (
        recorded_run(store, f"{cursor_name} {span.since}..{span.until}") as report,
        (client or polite_client()).session() as session,
    ):
        while span.windows:
            first, last = span.windows[0]
            page = _api_page(session, names, first, last, span.start, page_size)
            report.problems += page.problems
            if page.refusal:
                raise PapertrialError(f"arXiv refused the query: {page.refusal}")
            if span.start == 0 and (page.total or 0) > LARGEST_WINDOW and first < last:
                middle = first + (last - first) // 2
                span.windows[:1] = [(first, middle), (middle + timedelta(days=1), last)]
                continue
            report.count(store.upsert(page.records))
            span.start += page.entry_count
            if page.entry_count == 0 or span.start >= (page.total or 0):
                if span.start < (page.total or 0):
                    report.problems.append(f"arXiv gave {span.start} of {page.total} papers of {first}..{last}")
                span.windows.pop(0)
                span.start = 0
            save_position(store, cursor_name, span.as_data())
    return report


@dataclass
class _Span:
    """What of a span of days is still to be fetched: windows, and the offset in the first of them."""

    since: date
    until: date
    windows: list[tuple[date, date]]
    start: int = 0

    @classmethod
    def of(cls, saved: dict[str, Any] | None, since: date | None, until: date) -> "_Span":
        """The saved span if it is the one asked for and is not complete, else a new one."""
        if saved is not None:
            before = cls(
                date.fromisoformat(saved["since"]),
                date.fromisoformat(saved["until"]),
                [(date.fromisoformat(a), date.fromisoformat(b)) for a, b in saved["windows"]],
                int(saved["start"]),
            )
            if before.windows and since in (None, before.since):
                if before.until < until:  # days have passed since the interruption
                    before.windows.append((before.until + timedelta(days=1), until))
                    before.until = until
                return before
            # A day is complete only when it is over, everywhere: one day is fetched again.
            since = since or before.until - timedelta(days=1)
        if since is None:
            raise UsageError("nothing was fetched of these categories yet: say from which day on (since)")
        if since > until:
            raise UsageError(f"since is {since}, after {until}")
        return cls(since, until, [(since, until)])

    def as_data(self) -> dict[str, Any]:
        windows = [[a.isoformat(), b.isoformat()] for a, b in self.windows]
        return {
            "since": self.since.isoformat(),
            "until": self.until.isoformat(),
            "windows": windows,
            "start": self.start,
        }


def _api_page(
    session: PoliteClient, categories: Sequence[str], first: date, last: date, start: int, size: int
) -> ArxivPage:
    query = " OR ".join(f"cat:{name}" for name in categories)
    params = {
        "search_query": f"({query}) AND submittedDate:[{first:%Y%m%d}0000 TO {last:%Y%m%d}2359]",
        "start": str(start),
        "max_results": str(size),
        "sortBy": "submittedDate",
        "sortOrder": "ascending",
    }

    def whole(body: bytes) -> bool:
        # Now and then arXiv sends an empty page in the middle of a list; asking again helps.
        if not body.rstrip().endswith(b"</feed>"):
            return False
        page = parse_arxiv_xml(body)
        return bool(page.entry_count or page.total is None or page.total <= start)

    response = session.get(api_url(), params, whole=whole)
    page = parse_arxiv_xml(response.content)
    if not response.is_success and not page.refusal:
        raise PapertrialError(f"arXiv answered {response.status_code} to the query")
    return page


def fetch_arxiv_bulk(
    store: Store,
    since: date | None = None,
    subject: str = "cs",
    *,
    client: PoliteClient | None = None,
) -> IngestReport:
    """Harvest a whole subject over OAI-PMH, by the day its records changed; the way to get hundreds of thousands.

    Parameters
    ----------
    since
        First day of change (default: from the day the last complete harvest began).
    subject
        An OAI set: ``cs``, ``stat``, or one category such as ``cs:cs:CL``.

    Notes
    -----
    An interrupted harvest goes on with its resumption token. Where the token has expired (they live a day) the harvest
    begins again from `since`; what is stored already changes nothing.
    """
    if not _SET.fullmatch(subject):
        raise UsageError(f"subject is {subject[:40]!r}; write an OAI set such as cs or cs:cs:CL")
    cursor_name = f"arxiv-oai:{subject}"
    saved = read_position(store, cursor_name) or {}
    token = saved.get("token") if since is None or since.isoformat() == saved.get("since") else None
    begin = date.fromisoformat(saved["since"]) if token else since
    if begin is None:
        begin = date.fromisoformat(saved["complete"]) if saved.get("complete") else None
    if begin is None:
        raise UsageError("nothing was harvested of this subject yet: say from which day on (since)")
    started = saved["started"] if token else utc_today().isoformat()
    with (
        recorded_run(store, f"{cursor_name} {begin}..") as report,
        (client or polite_client()).session() as session,
    ):
        first = {"verb": "ListRecords", "metadataPrefix": "arXiv", "set": subject, "from": begin.isoformat()}
        while True:
            page = _oai_page(session, {"verb": "ListRecords", "resumptionToken": token} if token else first)
            if token and page.refusal and page.refusal.startswith("badResumptionToken"):
                token = None
                continue
            if page.refusal and not page.refusal.startswith("noRecordsMatch"):
                raise PapertrialError(f"arXiv refused the harvest: {page.refusal}")
            report.problems += page.problems
            report.count(store.upsert(page.records))
            token = page.token
            position = {"since": begin.isoformat(), "started": started, "token": token}
            save_position(store, cursor_name, position | {"complete": saved.get("complete") if token else started})
            if not token:
                return report


def _oai_page(session: PoliteClient, params: dict[str, str]) -> ArxivPage:
    response = session.get(oai_url(), params, whole=lambda body: body.rstrip().endswith(b"</OAI-PMH>"))
    if not response.is_success:
        raise PapertrialError(f"arXiv answered {response.status_code} to the harvest")
    return parse_arxiv_xml(response.content)


def fetch_arxiv_rss(
    store: Store, categories: Sequence[str] = ("cs.CL",), *, client: PoliteClient | None = None
) -> IngestReport:
    """Bring in today's announcements: one request, empty on Saturdays and Sundays."""
    names = _checked_categories(categories)
    with (
        recorded_run(store, f"arxiv-rss:{'+'.join(names)}") as report,
        (client or polite_client()).session() as session,
    ):
        response = session.get(
            f"{rss_url()}/{'+'.join(names)}", {}, whole=lambda body: body.rstrip().endswith((b"</rss>", b"</feed>"))
        )
        if not response.is_success:
            raise PapertrialError(f"arXiv answered {response.status_code} to the feed of {'+'.join(names)}")
        page = parse_arxiv_xml(response.content)
        report.problems += page.problems
        report.count(store.upsert(page.records))
    return report


def _checked_categories(categories: Sequence[str]) -> list[str]:
    names = sorted(set(categories))
    bad = [name for name in names if not _CATEGORY.fullmatch(name)]
    if bad or not names or isinstance(categories, str):
        raise UsageError(f"categories: {bad or categories!r}; write arXiv categories such as cs.CL")
    if len("+".join(names)) > 200:
        raise UsageError(f"categories: {len(names)} are too many for one query; fetch a subject in bulk instead")
    return names
