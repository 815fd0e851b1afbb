"""New papers on a schedule, for ``serve --ingest``: the daily lists of Hugging Face, and categories of arXiv.

Each source has a job of its own. Pauses between requests, one fetch at a time and going on after a failure are the
fetchers' (`papertrial.feed.http`); what came in and what went wrong is recorded with every run
(`papertrial.feed.runs.recent_runs`). ``papertrial ingest`` from cron does the same without the service.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

import sqlalchemy as sa

from papertrial.feed import people_schema as tables
from papertrial.feed.cursors import read_position
from papertrial.feed.http import utc_today
from papertrial.feed.store import Store
from papertrial.site.background import Job
from papertrial.site.context import Context

#: Seconds between two fetches of a source, and after one that failed.
EVERY = {"huggingface": 3600.0, "arxiv": 6 * 3600.0}
RETRY = 900.0
#: Seconds to wait for another fetch of the same source (a paper that somebody submitted) to end.
PATIENCE = 600.0
#: Seconds that the service runs before its first fetch.
AFTER = 5.0
#: Days that the first fetch of a source goes back.
FIRST_DAYS = {"huggingface": 7, "arxiv": 3}
_LEASE = 3600.0


@dataclass(frozen=True, slots=True)
class Source:
    """A source on the schedule: when it was last fetched without an error, and when it will be (UTC, no zone)."""

    name: str
    every: float
    last: datetime | None
    following: datetime | None


def jobs(here: Context) -> list[Job]:
    """The fetches that the settings ask for."""
    if not here.settings.ingest:
        return []
    work: dict[str, Callable[[], object]] = {
        "huggingface": lambda: fetch_from_huggingface(here.store),
        "arxiv": lambda: fetch_from_arxiv(here.store, here.settings.categories),
    }
    return [
        Job(f"ingest {name}", EVERY[name], work[name], lease=_LEASE, apart=True, retry=RETRY, after=AFTER)
        for name in EVERY
        if name != "arxiv" or here.settings.categories
    ]


def schedule(here: Context) -> list[Source]:
    """The sources that are fetched, for a page; empty where the service does not ingest."""
    names = {job.name: job for job in jobs(here)}
    table = tables.leases
    with here.store.reading() as connection:
        rows = connection.execute(sa.select(table.c.name, table.c.last_done).where(table.c.name.in_(names)))
        done = {row.name: row.last_done for row in rows}
    found = []
    for name, job in names.items():
        last = done.get(name)
        following = last + timedelta(seconds=job.every) if last else None
        found.append(Source(name.removeprefix("ingest "), job.every, last, following))
    return found


def fetch_from_huggingface(store: Store) -> None:
    """The daily lists since the last fetch, the last days of them again for their votes."""
    from papertrial.feed.fetch_huggingface import fetch_huggingface, polite_client

    first = read_position(store, "huggingface") is None
    since = utc_today() - timedelta(days=FIRST_DAYS["huggingface"]) if first else None
    fetch_huggingface(store, since, client=polite_client(PATIENCE))


def fetch_from_arxiv(store: Store, categories: tuple[str, ...]) -> None:
    """What was submitted in some categories since the last fetch."""
    from papertrial.feed.fetch_arxiv import fetch_arxiv, polite_client

    first = read_position(store, f"arxiv:{'+'.join(sorted(set(categories)))}") is None
    since = utc_today() - timedelta(days=FIRST_DAYS["arxiv"]) if first else None
    fetch_arxiv(store, since, categories, client=polite_client(PATIENCE))
