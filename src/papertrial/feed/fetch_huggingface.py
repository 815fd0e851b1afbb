"""The daily lists of the Hugging Face papers API, day by day."""

import json
import os
from datetime import date, timedelta

from papertrial.errors import PapertrialError, UsageError
from papertrial.feed.cursors import read_position, save_position
from papertrial.feed.http import PoliteClient, utc_today
from papertrial.feed.runs import IngestReport, recorded_run
from papertrial.feed.sources.huggingface import entries_of, parse_huggingface_json
from papertrial.feed.store import Store

#: 500 requests in five minutes are allowed without a token; half of that leaves room for others behind one address.
INTERVAL_SECONDS = 1.2
PAGE_SIZE = 100
#: Votes and comments of so many past days are fetched again.
REFRESHED_DAYS = 3
_CURSOR = "huggingface"


def base_url() -> str:
    return os.environ.get("PAPERTRIAL_HUGGINGFACE", "https://huggingface.co").rstrip("/")


def polite_client(patience: float = 0.0) -> PoliteClient:
    return PoliteClient("huggingface", INTERVAL_SECONDS, patience=patience)


def fetch_huggingface(
    store: Store, since: date | None = None, *, until: date | None = None, client: PoliteClient | None = None
) -> IngestReport:
    """Bring in the daily lists of a span of days, oldest first.

    Parameters
    ----------
    since, until
        First and last day (default: from a few days before the last one that was fetched, to today in UTC).

    Raises
    ------
    UsageError
        A span that cannot be; no `since` and no earlier fetch.
    PapertrialError
        The service cannot be reached or refuses. Complete days are stored, and a call without `since` goes on.
    """
    last = until or utc_today()
    saved = read_position(store, _CURSOR)
    if since is None:
        if saved is None:
            raise UsageError("nothing was fetched from Hugging Face yet: say from which day on (since)")
        since = date.fromisoformat(saved["day"]) - timedelta(days=REFRESHED_DAYS)
    if since > last:
        raise UsageError(f"since is {since}, after {last}")
    with (
        recorded_run(store, f"huggingface {since}..{last}") as report,
        (client or polite_client()).session() as session,
    ):
        for offset in range((last - since).days + 1):
            day = since + timedelta(days=offset)
            _fetch_day(store, session, day, report)
            if saved is None or day.isoformat() > saved["day"]:
                saved = {"day": day.isoformat()}
                save_position(store, _CURSOR, saved)
    return report


def _fetch_day(store: Store, session: PoliteClient, day: date, report: IngestReport) -> None:
    for page in range(100):
        response = session.get(
            f"{base_url()}/api/daily_papers",
            {"date": day.isoformat(), "limit": str(PAGE_SIZE), "p": str(page)},
            whole=lambda body: body.rstrip().endswith((b"]", b"}")),
        )
        if not response.is_success:
            raise PapertrialError(f"Hugging Face answered {response.status_code} to the list of {day}")
        parsed = parse_huggingface_json(response.content, entered=day)
        report.problems += [f"{day}: {problem}" for problem in parsed.problems]
        report.count(store.upsert(parsed.records))
        if _length(response.content) < PAGE_SIZE:
            return
    report.problems.append(f"{day}: more than {100 * PAGE_SIZE} papers; the rest is left out")


def _length(body: bytes) -> int:
    """How many entries a page has, readable or not; 0 ends a list that cannot be read."""
    try:
        return len(entries_of(json.loads(body)))
    except (ValueError, RecursionError):
        return 0
