"""``papertrial serve``: the whole service in one process, or in several workers on one address."""

import contextlib
import errno
import gc
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from typing import Any

from fastapi import FastAPI

from papertrial.errors import PapertrialError, UsageError
from papertrial.feed.store import Store
from papertrial.site import address
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
        Where to listen; port 0 takes a free one. ``base_url`` (default: this address) is what readers see; set it
        behind a proxy.
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
    if not 1 <= workers <= 64:
        raise UsageError(f"workers is {workers}; 1 to 64 can be started")
    if not 0 <= port <= 65535:
        raise UsageError(f"port is {port}; a number from 0 to 65535 is needed")
    with contextlib.ExitStack() as stack:
        # Taken first: a port that is in use is told at once, and not after the database was made.
        sockets = [stack.enter_context(taken) for taken in take_port(host, port)]
        port = sockets[0].getsockname()[1]
        if "base_url" not in settings and "PAPERTRIAL_BASE_URL" not in os.environ:
            shown = "127.0.0.1" if host in ("0.0.0.0", "::", "") else f"[{host}]" if ":" in host else host
            settings["base_url"] = f"http://{shown}:{port}"
        chosen = read_settings(database=database, ingest=ingest or None, **settings)
        _configure_log()
        _prepare(chosen)
        if workers == 1:
            _serve_alone(chosen, sockets)
            return
    _serve_with_workers(chosen, host, port, workers)


def take_port(host: str, port: int) -> list[socket.socket]:
    """Sockets at an address, one for each network protocol that it is in.

    Raises
    ------
    UsageError
        The address is not this machine's, the port is in use, or may not be used.
    """
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        raise UsageError(f"host is {host[:80]!r}, which is no address of this machine") from None
    taken: list[socket.socket] = []
    problem: OSError | None = None
    for family, kind, protocol, _, place in dict.fromkeys(found):
        try:
            opened = socket.socket(family, kind, protocol)
        except OSError as error:  # a protocol that this machine does not speak
            problem = error
            continue
        try:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            opened.bind((place[0], taken[0].getsockname()[1] if taken else port, *place[2:]))
            opened.listen(2048)
        except OSError as error:
            opened.close()
            problem = error
            if error.errno != errno.EADDRNOTAVAIL:
                break
        else:
            taken.append(opened)
    if problem is not None and (not taken or problem.errno in (errno.EADDRINUSE, errno.EACCES)):
        for opened in taken:
            opened.close()
        raise UsageError(_port_problem(problem, host, port)) from None
    return taken


def _port_problem(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} of {host} is in use; stop what listens there, or give another --port"
    if error.errno == errno.EACCES:
        return f"port {port} may not be used by this user; give a --port above 1023"
    return f"cannot listen at {host} port {port}: {error.strerror or error}"


def _options(settings: Settings) -> dict[str, Any]:
    return {
        # An empty list: nobody in front is believed, and the client is whoever opened the connection.
        "proxy_headers": bool(settings.trusted_proxies),
        "forwarded_allow_ips": list(settings.trusted_proxies),
        "access_log": False,
        "log_config": None,
        "server_header": False,
        "timeout_keep_alive": 30,
        "timeout_graceful_shutdown": 10,
        "limit_concurrency": 1000,
    }


def _serve_alone(settings: Settings, sockets: list[socket.socket]) -> None:
    import uvicorn

    _share_the_processor()
    server = uvicorn.Server(uvicorn.Config(create_app(settings), **_options(settings)))
    gc.freeze()
    gc.enable()
    _greet(settings)
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets)
    if not server.started:
        raise PapertrialError("the service did not start; the lines above say why")


def _serve_with_workers(settings: Settings, host: str, port: int, workers: int) -> None:
    import uvicorn

    os.environ[_HANDED_ON] = json.dumps(settings.model_dump(mode="json"))
    gc.enable()
    _greet(settings)
    application = "papertrial.site.serve:worker_app"
    uvicorn.run(application, factory=True, host=host, port=port, workers=workers, **_options(settings))


def _greet(settings: Settings) -> None:
    print(f"Papertrial serves at {settings.base_url}  (stop with Ctrl-C)", file=sys.stderr, flush=True)


def worker_app() -> FastAPI:
    """The application of one of several workers, with the settings of the process that started it."""
    _configure_log()
    _share_the_processor()
    threading.Thread(target=_stop_with, args=(os.getppid(),), name="papertrial-parent", daemon=True).start()
    return create_app(Settings(**json.loads(os.environ[_HANDED_ON])))


def _stop_with(parent: int) -> None:
    """A worker whose parent was killed would go on holding the port, with nobody to stop it."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)


def _prepare(settings: Settings) -> None:
    """Once, before any worker: the schema, our address for commands beside us, the administrator.

    On first start it shows the link that signs the administrator in.
    """
    with Store.open(settings.database) as store:
        address.note(store, settings)
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
        chosen = address.with_known_address(store, chosen)
        accounts.ensure_admin(store, chosen.admin_email)
        with store.reading() as connection:
            email = connection.execute(sa.select(users.c.email).where(users.c.role == "admin")).scalars().first()
        if email is None:
            raise PapertrialError("there is no administrator")
        return chosen.url(f"/sign-in/{accounts.make_sign_in_link(store, email, minutes=60, unlimited=True)}")


def _share_the_processor() -> None:
    """Let the thread that answers have the interpreter within a millisecond of asking, instead of five."""
    sys.setswitchinterval(0.001)


def _configure_log() -> None:
    level = os.environ.get("PAPERTRIAL_LOG", "WARNING").upper()
    known = level if level in ("DEBUG", "INFO", "WARNING", "ERROR") else "WARNING"
    logging.basicConfig(level=known, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
