"""Work beside the requests: each job at its interval, once across all workers of a database.

A job is taken by a lease in the database: a worker that dies lets go of it when the lease runs out. Jobs must be safe
to repeat: a worker may die after the work and before it says so.
"""

import logging
import os
import random
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from papertrial.errors import PapertrialError
from papertrial.feed import people_schema as tables
from papertrial.feed.store import Store, utc_now

log = logging.getLogger("papertrial.site.jobs")


@dataclass(frozen=True)
class Job:
    """Something to do again and again.

    Attributes
    ----------
    name
        Unique; the lease's name.
    every
        Seconds between the end of one run and the start of the next.
    work
        What to do; an error is logged and the job comes again.
    everywhere
        Done by every worker (what it does is local to the process) instead of by one of them.
    lease
        Seconds that a worker may take before another one may think it dead.
    apart
        On a thread of its own: for what waits for other machines, so that nothing else waits for it.
    retry
        Seconds after which a run that failed is tried again (default: `every`).
    after
        Seconds from the start of the service to the first run: the first readers have its processor to themselves.
    """

    name: str
    every: float
    work: Callable[[], object]
    everywhere: bool = False
    lease: float = 600.0
    apart: bool = False
    retry: float | None = None
    after: float = 0.0


class Jobs:
    """Runs jobs in this worker, one after the other on one thread but for those that are `Job.apart`."""

    def __init__(self, store: Store, jobs: list[Job]) -> None:
        self._store, self._jobs = store, jobs
        self._holder = f"{os.getpid()}-{secrets.token_hex(8)}"
        self._stop = threading.Event()
        self._due = dict.fromkeys((job.name for job in jobs), 0.0)
        groups = [[job for job in jobs if not job.apart], *([job] for job in jobs if job.apart)]
        self._nudged = [threading.Event() for _ in groups]
        self._threads = [
            threading.Thread(target=self._run, args=arguments, name=f"papertrial-jobs-{number}", daemon=True)
            for number, arguments in enumerate(zip(groups, self._nudged, strict=True))
        ]

    def start(self) -> None:
        began = time.monotonic()
        self._due = {job.name: began + job.after for job in self._jobs}
        for thread in self._threads:
            thread.start()

    def stop(self, timeout: float = 10.0) -> None:
        """Start nothing more, and wait for what runs; what waits for another machine is left to itself."""
        self._stop.set()
        self._wake()
        end = time.monotonic() + timeout
        for thread, patience in zip(self._threads, [timeout, *[1.0] * len(self._threads)], strict=False):
            thread.join(max(0.0, min(patience, end - time.monotonic())))

    def nudge(self, name: str) -> None:
        """Do a job soon instead of at its time (in this worker)."""
        self._due[name] = 0.0
        self._wake()

    def _wake(self) -> None:
        for event in self._nudged:
            event.set()

    def _run(self, jobs: list[Job], nudged: threading.Event) -> None:
        while not self._stop.is_set():
            for job in jobs:
                if self._stop.is_set():
                    return
                if time.monotonic() >= self._due[job.name]:
                    done = self._do(job)
                    pause = job.every if done or job.retry is None else job.retry
                    # Apart from each other, so that workers which started together do not keep meeting.
                    self._due[job.name] = time.monotonic() + pause * random.uniform(0.9, 1.1)
            wait = min((self._due[job.name] for job in jobs), default=60.0) - time.monotonic()
            nudged.wait(max(0.05, min(wait, 60.0)))
            nudged.clear()

    def _do(self, job: Job) -> bool:
        """Do a job if it is this worker's turn; False where it failed."""
        try:
            if job.everywhere or take_lease(self._store, job.name, self._holder, job.lease, job.every):
                job.work()
                if not job.everywhere:
                    give_lease_back(self._store, job.name, self._holder)
        except PapertrialError as error:
            log.error("job %s: %s", job.name, error)
            return False
        except Exception:
            log.exception("job %s failed", job.name)
            return False
        return True


def take_lease(store: Store, name: str, holder: str, seconds: float, every: float = 0.0) -> bool:
    """Whether this holder may do a job now: nobody else is at it, and nobody did it less than `every` seconds ago."""
    table, now = tables.leases, utc_now()
    rested = now - timedelta(seconds=0.8 * every)
    until = now + timedelta(seconds=seconds)
    free = sa.or_(table.c.until <= now, table.c.holder == holder)
    due = sa.or_(table.c.last_done.is_(None), table.c.last_done <= rested, table.c.holder == holder)
    with store.writing(shown=False) as connection:
        taken = connection.execute(
            table.update().where(table.c.name == name, free, due).values(holder=holder, until=until)
        )
        if taken.rowcount:
            return True
        if connection.execute(sa.select(table.c.name).where(table.c.name == name)).first() is not None:
            return False
        try:
            with connection.begin_nested():
                connection.execute(table.insert().values(name=name, holder=holder, until=until))
        except IntegrityError:
            return False  # another worker was quicker
        return True


def give_lease_back(store: Store, name: str, holder: str) -> None:
    """The job is done."""
    table, now = tables.leases, utc_now()
    with store.writing(shown=False) as connection:
        mine = (table.c.name == name, table.c.holder == holder)
        connection.execute(table.update().where(*mine).values(until=now, last_done=now))


def last_done(store: Store, name: str) -> datetime | None:
    """When a job was last finished."""
    table = tables.leases
    with store.reading() as connection:
        return connection.execute(sa.select(table.c.last_done).where(table.c.name == name)).scalar()
