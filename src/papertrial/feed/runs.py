"""The record of every ingest: what it was, when, how many papers, what went wrong. For an administrator to look at."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime

import sqlalchemy as sa

from papertrial.errors import PapertrialError
from papertrial.feed import schema
from papertrial.feed.paging import checked_limit
from papertrial.feed.store import Counts, Store, utc_now

#: Problems that are kept with a run; all of them are counted.
KEPT_PROBLEMS = 100


@dataclass
class IngestReport:
    """What an ingest did. Counts are records: a paper that two files have counts twice.

    Attributes
    ----------
    added, updated, unchanged
        Records of new papers, records that said something new of a known one, records that said nothing new.
    problems
        One line each: where, and what could not be read. What could be read is stored all the same.
    """

    added: int = 0
    updated: int = 0
    unchanged: int = 0
    problems: list[str] = field(default_factory=list)

    def count(self, counts: Counts) -> None:
        """Add what an upsert did."""
        self.added += counts.added
        self.updated += counts.updated
        self.unchanged += counts.unchanged

    @property
    def total(self) -> int:
        return self.added + self.updated + self.unchanged


@dataclass(frozen=True, slots=True)
class IngestRun:
    """A recorded run; ``finished`` is None while it runs, and for one that was killed."""

    id: int
    source: str
    started: datetime
    finished: datetime | None
    added: int
    updated: int
    unchanged: int
    problem_count: int
    problems: tuple[str, ...]
    error: str | None


@contextmanager
def recorded_run(store: Store, source: str) -> Iterator[IngestReport]:
    """Record the ingest that the block does: it fills in the report, and an error is recorded and raised again."""
    report, error = IngestReport(), None
    table = schema.ingest_runs
    with store.writing() as connection:
        values = {"source": source[:200], "started": utc_now(), "added": 0, "updated": 0, "unchanged": 0}
        result = connection.execute(table.insert().values(**values, problem_count=0, problems=[]))
        run_id = next(iter(result.inserted_primary_key or ()))
    try:
        yield report
    except BaseException as raised:
        # Our own errors are written for people; of others the kind says most.
        error = str(raised) if isinstance(raised, PapertrialError) else f"{type(raised).__name__}: {raised}"
        error = error[:1000]
        raise
    finally:
        _finish(store, run_id, report, error)


def _finish(store: Store, run_id: int, report: IngestReport, error: str | None) -> None:
    table = schema.ingest_runs
    try:
        with store.writing() as connection:
            connection.execute(
                table.update()
                .where(table.c.id == run_id)
                .values(
                    finished=utc_now(),
                    added=report.added,
                    updated=report.updated,
                    unchanged=report.unchanged,
                    problem_count=len(report.problems),
                    problems=report.problems[:KEPT_PROBLEMS],
                    error=error,
                )
            )
    except PapertrialError:
        # The disk that stopped the ingest stops its record as well: the first error is the one to show.
        if error is None:
            raise


def recent_runs(store: Store, limit: int = 50) -> list[IngestRun]:
    """The newest runs first."""
    table = schema.ingest_runs
    query = sa.select(table).order_by(table.c.started.desc(), table.c.id.desc()).limit(checked_limit(limit))
    with store.reading() as connection:
        return [_run(dict(row)) for row in connection.execute(query).mappings()]


def _run(row: dict[str, object]) -> IngestRun:
    for name in ("started", "finished"):
        value = row[name]
        row[name] = value.replace(tzinfo=UTC) if isinstance(value, datetime) else None
    row["problems"] = tuple(row["problems"])  # type: ignore[arg-type]
    return IngestRun(**row)  # type: ignore[arg-type]
