"""The catalogue: one record a paper, whatever the number of sources, in a database that many processes may use at once.

with Store.open() as store:
    store.upsert(records)
    for paper in store.feed("2025-10-03").papers: ...
"""

import re
import sqlite3
import threading
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime
from itertools import islice
from typing import Any

import sqlalchemy as sa

from papertrial.errors import UsageError
from papertrial.feed import schema
from papertrial.feed.database import BUSY_SECONDS, connect, explained
from papertrial.feed.paging import MAX_LIMIT, Page, checked_limit, page_order, period_bounds, read_cursor, write_cursor
from papertrial.feed.records import Paper, Record, paper_key, parse_arxiv_id
from papertrial.feed.writing import Batch, Outcome, lock_counters, save_counters

#: Records that are stored in one transaction: few enough that a reader waits briefly, many enough to be quick.
BATCH = 500

# Built once: putting a statement of thirty columns together takes as long as running it.
_BY_IDS = sa.select(schema.papers).where(schema.papers.c.id.in_(sa.bindparam("ids", expanding=True)))
_BY_ARXIV_ID = sa.select(schema.papers).where(schema.papers.c.arxiv_id == sa.bindparam("arxiv_id"))
_BY_SLUG = sa.select(schema.papers).where(schema.papers.c.slug == sa.bindparam("slug"))


@dataclass(frozen=True, slots=True)
class Change:
    """What happened to a paper since a revision: `paper` as it is now, or None where it is no more."""

    id: int
    key: str
    revision: int
    paper: Paper | None

    @property
    def removed(self) -> bool:
        return self.paper is None


@dataclass(frozen=True, slots=True)
class Counts:
    """What an upsert did, in records."""

    added: int = 0
    updated: int = 0
    unchanged: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(self.added + other.added, self.updated + other.updated, self.unchanged + other.unchanged)


class Store:
    """The catalogue's database. Safe to share between threads; open one per process.

    Notes
    -----
    Every changed paper gets the next revision, in the order of commits, so an index that is derived from the store
    keeps itself fresh with `changes_since`. Ingesting the same thing again changes nothing and makes no revision.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = engine
        self._watch: sqlite3.Connection | None = None
        self._watch_lock = threading.Lock()
        self._held = threading.local()
        self.is_sqlite = engine.url.get_backend_name() == "sqlite"

    @classmethod
    def open(cls, database: str | None = None) -> "Store":
        """Open, and where needed create or migrate, the catalogue; `database` is a URL (default: SQLite at home)."""
        return cls(connect(database))

    def close(self) -> None:
        with self._watch_lock:
            if self._watch is not None:
                self._watch.close()
                self._watch = None
        self.engine.dispose()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """One consistent view of the database."""
        held = getattr(self._held, "connection", None)
        if held is not None:
            yield held
            return
        with explained(self.engine.url), self.engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def held(self) -> Iterator[None]:
        """One view for everything that this thread reads meanwhile: quicker, and a page shows one moment.

        What the thread writes meanwhile is stored, and is not seen before the end.
        """
        with self.reading() as connection:
            outer = getattr(self._held, "connection", None)
            self._held.connection = connection
            try:
                yield
            finally:
                self._held.connection = outer

    @contextmanager
    def writing(self, *, shown: bool = True) -> Iterator[sa.Connection]:
        """One transaction that writes; all of it is stored or none.

        ``shown=False`` says that nothing of it is on any page, so that `version` need not become another one.
        """
        with (
            explained(self.engine.url),
            self.engine.connect().execution_options(writing=True) as connection,
            connection.begin(),
        ):
            if not (shown and self.is_sqlite):
                yield connection
                return
            raw: Any = connection.connection.dbapi_connection
            before = raw.total_changes
            yield connection
            if raw.total_changes != before:
                number = int(connection.exec_driver_sql("PRAGMA user_version").scalar_one())
                connection.exec_driver_sql(f"PRAGMA user_version = {(number + 1) % 2**31}")

    # -- writing ------------------------------------------------------------------------------------------------------

    def upsert(self, records: Iterable[Record]) -> Counts:
        """Bring records in, in batches of `BATCH`, each its own transaction; the same records again change nothing.

        Raises
        ------
        PapertrialError
            The database refused (disk full, locked, read-only); batches before that are stored.
        """
        counts = Counts()
        remaining = iter(records)
        while batch := list(islice(remaining, BATCH)):
            counts += self._upsert_batch(batch)
        return counts

    def _upsert_batch(self, records: Sequence[Record]) -> Counts:
        with self.writing() as connection:
            counters = lock_counters(connection)
            batch = Batch(connection, utc_now(), counters)
            batch.load(records)
            outcomes: list[Outcome] = [batch.put(record) for record in records]
            batch.write()
            save_counters(connection, counters)
        return Counts(outcomes.count("added"), outcomes.count("updated"), outcomes.count("unchanged"))

    def retire_slugs(self, in_scope: Iterable[str]) -> int:
        """Take papers out of scope whose slug is not in `in_scope`; how many there were.

        What our card said of them goes; a paper that no other source knows goes altogether.
        """
        papers = schema.papers
        with self.writing() as connection:
            counters = lock_counters(connection)
            held = connection.execute(sa.select(papers.c.slug, papers.c.id).where(papers.c.slug.is_not(None))).all()
            gone = sorted(row.id for row in held if row.slug not in set(in_scope))
            if gone:
                batch = Batch(connection, utc_now(), counters)
                batch.load_ids(gone)
                for paper_id in gone:
                    batch.out_of_scope(paper_id)
                batch.write()
                save_counters(connection, counters)
        return len(gone)

    # -- one paper ----------------------------------------------------------------------------------------------------

    def find(self, name: str) -> Paper | None:
        """A paper by arXiv id (any spelling), slug or key, also a key that it had before it had an arXiv id."""
        name = name.strip()
        if parsed := parse_arxiv_id(name):
            return self.by_arxiv_id(parsed[0])
        if re.fullmatch(r"t-[0-9a-f]{20}", name):
            return self.by_title_key(name[2:])
        return self.by_slug(name)

    def by_arxiv_id(self, arxiv_id: str) -> Paper | None:
        return self._first(_BY_ARXIV_ID, {"arxiv_id": arxiv_id})

    def by_slug(self, slug: str) -> Paper | None:
        return self._first(_BY_SLUG, {"slug": slug})

    def by_title_key(self, key: str) -> Paper | None:
        """A paper by the hash of a title that it has or had; of several the one with the smallest arXiv id."""
        papers, titles = schema.papers, schema.titles
        query = sa.select(papers).join(titles, titles.c.paper_id == papers.c.id).where(titles.c.title_key == key)
        return self._first(query.order_by(papers.c.arxiv_id.is_(None), papers.c.arxiv_id, papers.c.id).limit(1), {})

    def by_ids(self, ids: Sequence[int]) -> list[Paper | None]:
        """Papers by number, in the order asked for; the way to show search results."""
        found: dict[int, Paper] = {}
        with self.reading() as connection:
            for start in range(0, len(ids), MAX_LIMIT):
                wanted = {"ids": list(ids[start : start + MAX_LIMIT])}
                found |= {row["id"]: _paper(row) for row in connection.execute(_BY_IDS, wanted).mappings()}
        return [found.get(paper_id) for paper_id in ids]

    def _first(self, query: sa.Select[Any], values: dict[str, Any]) -> Paper | None:
        with self.reading() as connection:
            row = connection.execute(query, values).mappings().first()
        return _paper(row) if row else None

    # -- listings -----------------------------------------------------------------------------------------------------

    def feed(self, period: str, *, limit: int = 50, cursor: str | None = None, order: str = "votes") -> Page:
        """The papers of a day (``2025-10-03``), ISO week (``2025-W40``) or month (``2025-10``).

        Parameters
        ----------
        order
            ``"votes"``: newest day first, within a day most votes first. ``"top"``: most votes first, whatever the
            day. ``"trending"``: hottest first.

        Notes
        -----
        A paper of which only the month is known is in the month's feed and in no day's or week's.
        """
        first, last, whole_month = period_bounds(period)
        papers = schema.papers
        query = sa.select(papers).where(papers.c.feed_day.between(first, last))
        if not whole_month:
            query = query.where(papers.c.feed_precision == "day")
        return self._page(query, limit, cursor, order, narrowed=True)

    def listing(
        self,
        *,
        limit: int = 50,
        cursor: str | None = None,
        order: str = "votes",
        organisation: str | None = None,
        family: str | None = None,
        since: date | None = None,
        until: date | None = None,
    ) -> Page:
        """All papers, or those of one organisation, one family or a span of days; a page at a time.

        ``order`` is as in `feed`; ``"top"`` needs something that narrows the choice down.
        """
        papers = schema.papers
        query = sa.select(papers)
        if organisation is not None:
            query = query.where(papers.c.organisation == organisation)
        if family is not None:
            query = query.where(papers.c.family == family)
        if since is not None:
            query = query.where(papers.c.feed_day >= since)
        if until is not None:
            query = query.where(papers.c.feed_day <= until)
        narrowed = (organisation, family, since, until) != (None, None, None, None)
        return self._page(query, limit, cursor, order, narrowed)

    def topic(self, topic: str, *, limit: int = 50, cursor: str | None = None) -> Page:
        """The papers of one category such as ``cs.CL``, newest day first."""
        table, limit = schema.topics, checked_limit(limit)
        query = sa.select(table.c.paper_id, table.c.feed_day).where(table.c.topic == topic)
        order = (table.c.feed_day, table.c.paper_id)
        if cursor is not None:
            day, paper_id = read_cursor(cursor, "topic")
            query = query.where(sa.tuple_(*order) < sa.tuple_(sa.literal(day), sa.literal(paper_id)))
        query = query.order_by(*(column.desc() for column in order)).limit(limit + 1)
        with self.reading() as connection:
            rows = connection.execute(query).all()
            shown = sa.select(schema.papers).where(schema.papers.c.id.in_([row.paper_id for row in rows[:limit]]))
            found = {row["id"]: _paper(row) for row in connection.execute(shown).mappings()}
        more = write_cursor("topic", rows[limit - 1].feed_day, rows[limit - 1].paper_id) if len(rows) > limit else None
        return Page(tuple(found[row.paper_id] for row in rows[:limit]), more)

    def in_scope(self) -> list[Paper]:
        """The papers that have a folder, by slug."""
        query = sa.select(schema.papers).where(schema.papers.c.slug.is_not(None)).order_by(schema.papers.c.slug)
        with self.reading() as connection:
            return [_paper(row) for row in connection.execute(query).mappings()]

    def _page(self, query: sa.Select[Any], limit: int, cursor: str | None, order: str, narrowed: bool) -> Page:
        """One page by key set: the next page starts after the last row seen, however far that is from the top."""
        limit = checked_limit(limit)
        columns = page_order(order, narrowed)
        keys: list[sa.ColumnElement[Any]] = list(columns)
        if narrowed and order == "trending":
            # Of few papers the hottest are found by sorting them; walking the index of all by heat would be slower.
            keys[0] = columns[0] + sa.literal(0.0)
        if cursor is not None:
            bound = [sa.literal(v, type_=c.type) for v, c in zip(read_cursor(cursor, order), columns, strict=True)]
            query = query.where(sa.tuple_(*keys) < sa.tuple_(*bound))
        query = query.order_by(*(key.desc() for key in keys)).limit(limit + 1)
        with self.reading() as connection:
            found = [_paper(row) for row in connection.execute(query).mappings()]
        more = None
        if len(found) > limit:
            last = found[limit - 1]
            more = write_cursor(order, *(getattr(last, column.name) for column in columns))
        return Page(tuple(found[:limit]), more)

    def version(self) -> Hashable:
        """What there is to be shown now, whoever wrote it: equal as long as nothing has been written to be shown.

        Takes some microseconds with SQLite, where `writing` counts in the number that a file has for its application;
        with PostgreSQL a round trip, and every transaction counts.
        """
        with explained(self.engine.url):
            if not self.is_sqlite:
                # two equal snapshots see the same transactions
                with self.engine.connect() as connection:
                    return str(connection.execute(sa.text("SELECT pg_current_snapshot()::text")).scalar_one())
            with self._watch_lock:
                try:
                    if self._watch is None:
                        path = str(self.engine.url.database)
                        self._watch = sqlite3.connect(path, timeout=BUSY_SECONDS, check_same_thread=False)
                    return int(self._watch.execute("PRAGMA user_version").fetchone()[0])
                except sqlite3.Error:  # nobody can tell: other than anything before
                    return object()

    # -- counts and changes -------------------------------------------------------------------------------------------

    def count(self) -> int:
        """How many papers there are; kept as a counter, so it costs one look-up."""
        return self._counter("papers")

    def revision(self) -> int:
        """The revision of the newest change."""
        return self._counter("revision")

    def _counter(self, name: str) -> int:
        with self.reading() as connection:
            table = schema.counters
            return int(connection.execute(sa.select(table.c.value).where(table.c.name == name)).scalar_one())

    def counts_by_day(self, period: str) -> dict[date, int]:
        """How many papers each day of a week or month has; days without papers are left out."""
        first, last, _ = period_bounds(period)
        papers = schema.papers
        query = (
            sa.select(papers.c.feed_day, sa.func.count())
            .where(papers.c.feed_day.between(first, last), papers.c.feed_precision == "day")
            .group_by(papers.c.feed_day)
            .order_by(papers.c.feed_day)
        )
        with self.reading() as connection:
            return {row[0]: row[1] for row in connection.execute(query)}

    def count_of(self, period: str) -> int:
        """How many papers the feed of a day, week or month has."""
        first, last, whole_month = period_bounds(period)
        papers = schema.papers
        query = sa.select(sa.func.count()).where(papers.c.feed_day.between(first, last))
        if not whole_month:
            query = query.where(papers.c.feed_precision == "day")
        with self.reading() as connection:
            return int(connection.execute(query).scalar_one())

    def latest_day(self) -> date | None:
        """The newest day that has papers; None for an empty catalogue."""
        papers = schema.papers
        query = sa.select(papers.c.feed_day).order_by(papers.c.feed_day.desc()).limit(1)
        with self.reading() as connection:
            return connection.execute(query).scalar()

    def changes_since(self, revision: int, limit: int = 1000) -> tuple[list[Change], int]:
        """What changed after `revision`, oldest first, and the revision to ask from the next time.

        Parameters
        ----------
        revision
            0 for everything, else what the last call returned.
        limit
            At most so many changes; ask again until none come.

        Notes
        -----
        A paper that changed twice is reported once, as it is now. One that was merged into another, or that no source
        knows any more, comes with ``paper`` None. ``id`` never changes and is never given twice; ``key`` changes when
        the arXiv id becomes known.
        """
        if limit < 1:
            raise UsageError(f"limit is {limit}; ask for at least 1")
        papers, removals = schema.papers, schema.removals
        changed = sa.select(papers).where(papers.c.revision > revision).order_by(papers.c.revision).limit(limit)
        removed = sa.select(removals).where(removals.c.revision > revision).order_by(removals.c.revision).limit(limit)
        with self.reading() as connection:
            found = [_paper(row) for row in connection.execute(changed).mappings()]
            dropped = connection.execute(removed).all()
        changes = [Change(paper.id, paper.key, paper.revision, paper) for paper in found]
        changes += [Change(row.paper_id, row.key, row.revision, None) for row in dropped]
        changes = sorted(changes, key=lambda change: change.revision)[:limit]
        return changes, changes[-1].revision if changes else revision


def utc_now() -> datetime:
    """Now, in UTC and without a zone, as the database keeps it."""
    return datetime.now(UTC).replace(tzinfo=None)


def _paper(row: Any) -> Paper:
    values = dict(row)
    for name in ("authors", "categories", "keywords"):
        values[name] = tuple(values[name])
    arxiv_id = values["arxiv_id"]
    values["key"] = paper_key(arxiv_id, values["title"])
    if values["pdf_url"] is None and arxiv_id:
        values["pdf_url"] = f"https://arxiv.org/pdf/{arxiv_id}"
    for name in ("first_seen", "updated"):
        values[name] = values[name].replace(tzinfo=UTC)
    return Paper(**values)
