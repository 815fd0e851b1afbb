"""What the service does for itself: the catalogue before the first reader comes, then indices and sums kept fresh."""

import logging
import shutil
import time

from sqlalchemy import event

from papertrial.errors import PapertrialError
from papertrial.feed.catalogue import update_index
from papertrial.feed.ingest import ingest_scope
from papertrial.feed.search import IndexBusy
from papertrial.site.background import Job
from papertrial.site.context import Context
from papertrial.site.people import accounts, pulse, submissions

log = logging.getLogger("papertrial.site")


def prepare(here: Context) -> None:
    """Before the application serves: durable writes, the service's key, an administrator, papers in scope."""
    _write_through(here)
    _ = here.key
    accounts.ensure_admin(here.store, here.settings.admin_email)
    if not here.store.count():
        ingest_scope(here.store)


def jobs(here: Context) -> list[Job]:
    """The service's own background work."""
    return [
        Job("scope", 3600.0, lambda: _take_in_scope(here)),
        Job("index", 15.0, lambda: update_index_now(here), lease=3600.0),
        Job("pulse", 300.0, lambda: pulse.refresh_all(here.store)),
        Job("submissions", 60.0, lambda: _work_off_submissions(here)),
        Job("board", 5.0, lambda: _refresh_board(here), everywhere=True),
    ]


def _write_through(here: Context) -> None:
    """SQLite: a vote is on the disk before it is acknowledged, so that not even a power cut takes it back."""
    engine = here.store.engine
    if engine.url.get_backend_name() != "sqlite":
        return

    @event.listens_for(engine, "connect")
    def _full(connection: object, _record: object) -> None:
        cursor = connection.cursor()  # type: ignore[attr-defined]
        cursor.execute("PRAGMA synchronous = FULL")
        cursor.close()

    engine.dispose()


def _take_in_scope(here: Context) -> None:
    report = ingest_scope(here.store)
    for problem in report.problems:
        log.error("scope: %s", problem)


def update_index_now(here: Context) -> None:
    """Bring the search index to the store's revision; another worker may be at it already."""
    if here.index.revision < here.store.revision():
        try:
            update_index(here.store, here.index)
        except IndexBusy as error:
            log.info("%s", error)


def _work_off_submissions(here: Context) -> None:
    if here.settings.fetch:
        submissions.work_off(here.store, here.today())


def _refresh_board(here: Context) -> None:
    here.board.refresh()
    here.board.warm()


def free_space_mb(here: Context) -> float:
    """Room on the home folder's disk."""
    return shutil.disk_usage(here.settings.folder).free / 1e6


def wait_until_indexed(here: Context, seconds: float = 60.0) -> None:
    """Wait until search knows every paper (for tests and benchmarks).

    Raises
    ------
    PapertrialError
        It does not in time.
    """
    end = time.monotonic() + seconds
    while here.index.revision < here.store.revision():
        if time.monotonic() > end:
            raise PapertrialError(f"the search index is not up to date after {seconds:.0f} seconds")
        time.sleep(0.05)
