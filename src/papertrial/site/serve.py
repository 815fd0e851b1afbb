"""``papertrial serve``: the whole service in one process, or in several workers on one address."""

import json
import logging
import os
import sys
from typing import Any

from fastapi import FastAPI

from papertrial.errors import PapertrialError, UsageError
from papertrial.feed.store import Store
from papertrial.site.app import create_app
from papertrial.site.people import accounts
from papertrial.site.settings import Settings, read_settings

_HANDED_ON = "PAPERTRIAL_SERVE_SETTINGS"


def serve(
    host: str = "127.0.0.1",
    port: int = 8000,
    database: str | None = None,
    workers: int = 1,
    ingest: bool = False,
    **settings: Any,
) -> None:
    """Serve until stopped.

    Parameters
    ----------
    host, port
        Where to listen. ``base_url`` (default: this address) is what readers see; set it behind a proxy.
    database
        URL of the database (default: SQLite in the home folder).
    workers
        Processes. They share the database; jobs are done once.
    ingest
        Fetch new papers in the background.
    settings
        Any other field of `Settings`; what is not given is read from ``PAPERTRIAL_<NAME>``.

    Raises
    ------
    UsageError
        A setting is wrong, or the port cannot be had.
    PapertrialError
        The database or the home folder cannot be used.
    """
    import uvicorn

    if not 1 <= workers <= 64:
        raise UsageError(f"workers is {workers}; 1 to 64 can be started")
    if not 0 <= port <= 65535:
        raise UsageError(f"port is {port}; a number from 0 to 65535 is needed")
    if "base_url" not in settings and "PAPERTRIAL_BASE_URL" not in os.environ:
        shown = "127.0.0.1" if host in ("0.0.0.0", "::", "") else f"[{host}]" if ":" in host else host
        settings["base_url"] = f"http://{shown}:{port}"
    chosen = read_settings(database=database, ingest=ingest or None, **settings)
    _configure_log()
    _prepare(chosen)
    options: dict[str, Any] = {
        "host": host,
        "port": port,
        "access_log": False,
        "log_config": None,
        "server_header": False,
        "timeout_keep_alive": 30,
        "timeout_graceful_shutdown": 10,
        "limit_concurrency": 1000,
    }
    print(f"Papertrial serves at {chosen.base_url}  (stop with Ctrl-C)", file=sys.stderr, flush=True)
    if workers == 1:
        uvicorn.run(create_app(chosen), **options)
        return
    os.environ[_HANDED_ON] = json.dumps(chosen.model_dump(mode="json"))
    uvicorn.run("papertrial.site.serve:worker_app", factory=True, workers=workers, **options)


def worker_app() -> FastAPI:
    """The application of one of several workers, with the settings of the process that started it."""
    _configure_log()
    return create_app(Settings(**json.loads(os.environ[_HANDED_ON])))


def _prepare(settings: Settings) -> None:
    """Once, before any worker: the schema, the administrator, and on first start the link that signs him in."""
    with Store.open(settings.database) as store:
        email = accounts.ensure_admin(store, settings.admin_email)
        if email is not None:
            token = accounts.make_sign_in_link(store, email, minutes=24 * 60, unlimited=True)
            link = settings.url(f"/sign-in/{token}")
            print(
                f"First start: sign in as administrator ({email}) within a day at\n  {link}",
                file=sys.stderr,
                flush=True,
            )


def admin_link(database: str | None = None, **settings: Any) -> str:
    """A new sign-in link for the administrator, for whoever has the machine but no mail.

    Raises
    ------
    PapertrialError
        There is no administrator yet.
    """
    import sqlalchemy as sa

    from papertrial.feed.people_schema import users

    chosen = read_settings(database=database, **settings)
    with Store.open(chosen.database) as store:
        accounts.ensure_admin(store, chosen.admin_email)
        with store.reading() as connection:
            email = connection.execute(sa.select(users.c.email).where(users.c.role == "admin")).scalars().first()
        if email is None:
            raise PapertrialError("there is no administrator")
        return chosen.url(f"/sign-in/{accounts.make_sign_in_link(store, email, minutes=60, unlimited=True)}")


def _configure_log() -> None:
    level = os.environ.get("PAPERTRIAL_LOG", "WARNING").upper()
    known = level if level in ("DEBUG", "INFO", "WARNING", "ERROR") else "WARNING"
    logging.basicConfig(level=known, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
