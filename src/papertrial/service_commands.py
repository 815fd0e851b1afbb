"""The commands of the service: serve, digest, mcp, backup, restore, admin-link; each imports it only when it runs."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from papertrial.errors import UsageError

Database = Annotated[str | None, typer.Option(help="Database URL; default, SQLite in the home folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def add_to(app: typer.Typer) -> None:
    """Make the commands part of an application."""
    for command in (serve, digest, mcp, backup, restore):
        app.command()(command)
    app.command("admin-link")(admin_link)


@contextmanager
def _installed() -> Iterator[None]:
    """Say which extra is missing instead of showing a traceback."""
    try:
        yield
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name == "papertrial":
            raise
        raise UsageError(f"the service needs {name}: pip install 'papertrial[site]'") from None


def serve(
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 for every one of this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0 takes a free one.")] = 8000,
    database: Database = None,
    ingest: Annotated[bool, typer.Option("--ingest", help="Fetch new papers in the background.")] = False,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Processes that share the address.")] = 1,
    base_url: Annotated[
        str | None, typer.Option(help="Address under which readers reach the service, when it is not the one above.")
    ] = None,
) -> None:
    """Serve pages, the API, feeds and MCP until stopped. Every other setting is a PAPERTRIAL_ variable."""
    gc.disable()  # until the service runs: looking for garbage in what it is made of takes a tenth of the start
    with _installed():
        from papertrial.site import serve as service

    service.serve(host, port, database, workers, ingest, **({"base_url": base_url} if base_url else {}))


def digest(database: Database = None, as_json: Json = False) -> None:
    """Send every digest that is due, once: for cron, with or without a running service."""
    with _installed():
        from papertrial.site.delivery.digests import send_digests
        from papertrial.site.settings import read_settings

    outcome = send_digests(read_settings(database=database))
    counts = {"queued": outcome.queued, "sent": outcome.sent, "empty": outcome.empty, "failed": outcome.failed}
    _tell(counts, as_json, f"{outcome.sent} sent, {outcome.empty} without anything new, {outcome.failed} failed")
    if outcome.failed:
        raise typer.Exit(1)


def mcp(database: Database = None) -> None:
    """Serve the tools search, paper, evidence and run_smoke to one MCP client on standard input and output."""
    with _installed():
        from papertrial.site.mcp.stdio import serve_stdio
        from papertrial.site.settings import read_settings

    serve_stdio(read_settings(database=database))


def backup(
    path: Annotated[Path, typer.Argument(help="The new file, such as papertrial.zip.", show_default=False)],
    database: Database = None,
    as_json: Json = False,
) -> None:
    """Write papers, accounts, keys and own runs to one file; the service may go on meanwhile."""
    with _installed():
        from papertrial.site import backup as service

    counts = service.backup(path, database)
    _tell(counts, as_json, f"{path}: {_rows(counts)}, {path.stat().st_size / 1e6:.1f} MB")


def restore(
    path: Annotated[Path, typer.Argument(help="A file that `papertrial backup` wrote.", show_default=False)],
    force: Annotated[bool, typer.Option("--force", help="Replace a database that has papers or accounts.")] = False,
    database: Database = None,
    as_json: Json = False,
) -> None:
    """Bring a backup back, all of it or nothing. Stop the service first."""
    with _installed():
        from papertrial.site import backup as service

    counts = service.restore(path, database, force=force)
    _tell(counts, as_json, f"restored {_rows(counts)}; search is ready again a little after the service starts")


def admin_link(database: Database = None) -> None:
    """Print a link that signs the administrator in, good for an hour."""
    with _installed():
        from papertrial.site import serve as service

    print(service.admin_link(database))


def _rows(counts: dict[str, int]) -> str:
    shown = {name: counts.get(table, 0) for name, table in (("papers", "papers"), ("accounts", "users"))}
    return ", ".join([*(f"{count:,} {name}" for name, count in shown.items()), f"{sum(counts.values()):,} rows in all"])


def _tell(data: dict[str, Any], as_json: bool, text: str) -> None:
    from papertrial.terminal import print_json

    if as_json:
        print_json(data)
    else:
        print(text, file=sys.stdout)
