"""What the service does for itself: the catalogue before the first reader comes, then indices and sums kept fresh."""

import contextlib
import hashlib
import logging
import shutil
import time

from sqlalchemy import event

from papertrial.errors import PapertrialError
from papertrial.feed.catalogue import update_index
from papertrial.feed.cursors import read_position, save_position
from papertrial.feed.ingest import ingest_scope
from papertrial.feed.search import IndexBusy
from papertrial.feed.sources.scope import card_paths
from papertrial.site import ingesting
from papertrial.site.background import Job
from papertrial.site.context import Context
from papertrial.site.people import accounts, pulse, submissions

log = logging.getLogger("papertrial.site")

_SCOPE = "scope"


def prepare(here: Context) -> None:
    """Before the application serves: durable writes, the service's key, an administrator, papers in scope."""
    _write_through(here)
    _ = here.key
    accounts.ensure_admin(here.store, here.settings.admin_email)
    take_in_scope(here)


def jobs(here: Context) -> list[Job]:
    """The service's own background work."""
    return [
        Job("scope", 60.0, lambda: take_in_scope(here), after=60.0),
        # Each home folder has an index; its own lock keeps the workers that share one from doing the work twice.
        Job("index", 15.0, lambda: update_index_now(here), everywhere=True, apart=True, after=1.0),
        Job("pulse", 300.0, lambda: pulse.refresh_all(here.store), after=2.0),
        Job("submissions", 60.0, lambda: _work_off_submissions(here), apart=True, retry=600.0, after=2.0),
        Job("board", 5.0, lambda: _refresh_board(here), everywhere=True, after=1.5),
        *ingesting.jobs(here),
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


def take_in_scope(here: Context) -> None:
    """Bring the papers in scope into the catalogue if a card was added, changed or removed since the last time."""
    total = hashlib.sha256()
    for path in card_paths():
        with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
            total.update(f"{path.parent.name}\0{path.read_text(encoding='utf-8', errors='replace')}\0".encode())
    cards = {"cards": total.hexdigest()}
    if read_position(here.store, _SCOPE) == cards and here.store.count():
        return
    report = ingest_scope(here.store)
    save_position(here.store, _SCOPE, cards)
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
    else:
        submissions.not_asked(here.store)


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
