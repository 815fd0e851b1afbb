"""Which verdicts are news: those whose evidence this service did not have before.

When evidence was recorded says nothing about that: an upgrade brings evidence that is days or weeks old to a service
whose digests have long covered those days. So the service notes when it first had each piece of evidence.
"""

import hashlib
from collections.abc import Callable
from datetime import UTC, datetime

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from papertrial.feed.delivery_schema import evidence_seen
from papertrial.feed.store import Store
from papertrial.feed.writing import lock_counters
from papertrial.lab.evidence import Evidence
from papertrial.site.board import Entry, Snapshot


def note_evidence(store: Store, snapshot: Snapshot, now: Callable[[], datetime]) -> None:
    """Note what evidence there is; what was not noted before is first seen now.

    All that a service has when it looks for the first time came with the installation: it counts from its recording.
    """
    table, newest = evidence_seen, {}
    for entry in snapshot:
        evidence = _newest(entry)
        if evidence is not None:
            newest[_digest(evidence)] = evidence
    with store.reading() as connection:
        known = set(connection.execute(sa.select(table.c.digest)).scalars())
    if not set(newest) - known:
        return
    with store.writing() as connection:
        # As with papers: a digest of a span must not be built while something of that span is not stored yet.
        lock_counters(connection)
        moment, first = now(), connection.execute(sa.select(table.c.digest).limit(1)).first() is None
        for digest, evidence in newest.items():
            if digest not in known:
                seen = min(_plain(evidence.recorded), moment) if first else moment
                try:
                    with connection.begin_nested():
                        connection.execute(table.insert().values(digest=digest, slug=evidence.slug, first_seen=seen))
                except IntegrityError:
                    continue  # another worker noted it this moment


def new_verdicts(store: Store, snapshot: Snapshot, after: datetime, until: datetime, family: str = "") -> list[Entry]:
    """The papers with a verdict whose evidence was first seen after one moment and until another (UTC, no zone)."""
    table = evidence_seen
    query = sa.select(table.c.digest).where(table.c.first_seen > after, table.c.first_seen <= until)
    with store.reading() as connection:
        fresh = set(connection.execute(query).scalars())
    if not fresh:
        return []
    found = []
    for entry in snapshot:
        evidence = _newest(entry) if family in ("", entry.card.family) else None
        if evidence is not None and _digest(evidence) in fresh and entry.headline is not None:
            found.append(entry)
    return found


def _newest(entry: Entry) -> Evidence | None:
    """The evidence that a paper's verdict rests on: the one at the largest scale."""
    held = list(entry.evidence.values())
    return held[-1] if held else None


def _digest(evidence: Evidence) -> str:
    """One recording of one paper: what ran, at which scale, and when."""
    parts = (evidence.slug, evidence.scale, evidence.paper_digest, evidence.recorded.isoformat())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _plain(moment: datetime) -> datetime:
    """UTC, no zone."""
    return (moment.astimezone(UTC) if moment.tzinfo else moment).replace(tzinfo=None)
