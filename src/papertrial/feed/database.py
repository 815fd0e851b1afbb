"""The connection to the catalogue's database: SQLite under the home folder, or PostgreSQL when the URL says so.

Opening is quick: the migration library is imported only where the schema is not at head.
"""

import errno
import re
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event, exc

from papertrial.errors import PapertrialError, UsageError
from papertrial.feed import schema
from papertrial.home import home

#: Seconds that a SQLite connection waits for another writer.
BUSY_SECONDS = 30.0
MIGRATIONS = Path(__file__).resolve().parent / "migrations"
_EXTENSION = "vector"


def default_url() -> str:
    """The database that is used when nothing else is said: ``papertrial.db`` in the home folder."""
    return f"sqlite:///{home() / 'papertrial.db'}"


def connect(url: str | None = None) -> sa.Engine:
    """An engine for a database whose schema is at head; the file and its folder are made where they are missing.

    Raises
    ------
    UsageError
        The URL is not one of a database that is supported.
    PapertrialError
        The database cannot be opened, or a newer Papertrial wrote it.
    """
    engine = _engine(url or default_url())
    with explained(engine.url):
        at = _schema_revision(engine)
        if at != schema.HEAD:
            _upgrade(engine, at)
    return engine


def _engine(url: str) -> sa.Engine:
    try:
        parsed = sa.make_url(url)
    except exc.ArgumentError:
        raise UsageError(
            f"{url!r} is not a database URL; write sqlite:///<path> or postgresql+psycopg://<user>@<host>/<name>"
        ) from None
    if parsed.get_backend_name() == "sqlite":
        return _sqlite_engine(parsed)
    if parsed.get_backend_name() == "postgresql":
        try:
            return sa.create_engine(parsed.set(drivername="postgresql+psycopg"), pool_pre_ping=True)
        except ImportError:
            raise UsageError("PostgreSQL needs the extra: pip install 'papertrial[postgres]'") from None
    raise UsageError(f"the database {parsed.get_backend_name()!r} is not supported; use sqlite or postgresql")


def _sqlite_engine(url: sa.URL) -> sa.Engine:
    if not url.database or url.database == ":memory:":
        raise UsageError("the catalogue needs a file: write sqlite:///<path>")
    with explained(url):
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    engine = sa.create_engine(url, connect_args={"timeout": BUSY_SECONDS})

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # transactions begin where we say so, see below
        cursor = connection.cursor()
        _write_ahead(cursor)
        cursor.execute("PRAGMA synchronous = NORMAL")
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.execute("PRAGMA cache_size = -32768")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        # A writer takes the lock before it reads; otherwise two that read first could not both go on.
        writing = connection.get_execution_options().get("writing", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")

    return engine


def _write_ahead(cursor: Any) -> None:
    """Readers beside a writer. The mode stays with the file; changing it does not wait for others, so we do."""
    for _ in range(100):
        if cursor.execute("PRAGMA journal_mode").fetchone()[0] == "wal":
            return
        try:
            cursor.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if "locked" not in str(error):
                raise
            time.sleep(0.05)


def _schema_revision(engine: sa.Engine) -> str | None:
    """The migration that the database is at; None for an empty one."""
    if engine.url.get_backend_name() == "sqlite" and not Path(str(engine.url.database)).exists():
        return None
    with engine.connect() as connection:
        try:
            return connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()
        except (exc.OperationalError, exc.ProgrammingError) as error:
            if "alembic_version" in str(error.orig):
                return None
            raise


def _upgrade(engine: sa.Engine, at: str | None) -> None:
    """Bring the schema to head; two processes that open a fresh database at once do it one after the other."""
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    if at is not None and at not in {
        script.revision for script in ScriptDirectory.from_config(config).walk_revisions()
    }:
        raise PapertrialError(
            f"{_shown(engine.url)} was written by a newer Papertrial (schema {at}, this one knows {schema.HEAD}); "
            "upgrade Papertrial or choose another database"
        )
    with engine.connect().execution_options(writing=True) as connection, connection.begin():
        if engine.url.get_backend_name() == "postgresql":
            connection.execute(sa.text("SELECT pg_advisory_xact_lock(7036874417766)"))
            _check_postgresql(connection)
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def _check_postgresql(connection: sa.Connection) -> None:
    """Refuse a server that is too old, or that lacks the extension for vectors."""
    version = connection.dialect.server_version_info or (0,)
    if version < (15,):
        raise PapertrialError(f"PostgreSQL 15 or newer is needed; this server is {'.'.join(map(str, version))}")
    query = "SELECT coalesce(installed_version, default_version) FROM pg_available_extensions WHERE name = :name"
    found = connection.execute(sa.text(query), {"name": _EXTENSION}).scalar()
    if found is None or tuple(int(part) for part in re.findall(r"\d+", found)[:2]) < (0, 8):
        raise PapertrialError(
            f"the PostgreSQL server needs the extension pgvector 0.8 or newer and has {found or 'none'}; "
            "install it there (for Debian's PostgreSQL 17 the package is postgresql-17-pgvector)"
        )


def _shown(url: sa.URL) -> str:
    return str(url.database) if url.get_backend_name() == "sqlite" else url.render_as_string(hide_password=True)


@contextmanager
def explained(url: sa.URL) -> Iterator[None]:
    """Turn what the database or the disk says into one line that a user can act on."""
    try:
        yield
    except exc.DBAPIError as error:
        raise PapertrialError(_explanation(str(error.orig).strip(), url)) from error
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
        raise PapertrialError(f"cannot use the database {_shown(url)}: {reason}") from error


def _explanation(message: str, url: sa.URL) -> str:
    known = {
        "disk is full": "the disk is full; nothing of this batch was stored, what was there before is safe",
        "No space left": "the disk is full; nothing of this batch was stored, what was there before is safe",
        "disk I/O error": "the disk reports an input/output error (full, or failing)",
        "permission denied to create extension": "a superuser has to run CREATE EXTENSION vector in it once",
        "is locked": f"another process has been writing for more than {BUSY_SECONDS:.0f} seconds; try again",
        "readonly": "it is read-only for this user",
        "read-only": "it is read-only for this user",
        "unable to open": "the file cannot be opened (does its folder exist, may you write there?)",
        "not a database": "the file is not a SQLite database; move it away or give another --database",
        "malformed": "the file is damaged; restore it from a copy or ingest again into a new one",
    }
    for symptom, meaning in known.items():
        if symptom in message:
            return f"cannot use the database {_shown(url)}: {meaning}"
    return f"the database {_shown(url)} refused: {' '.join(message.split())[:300]}"
