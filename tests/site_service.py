"""A catalogue to serve, the application in process, and a real server on loopback."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

import httpx
import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient

from papertrial.feed.catalogue import index_folder
from papertrial.feed.records import Record
from papertrial.feed.store import Store
from papertrial.site import upkeep
from papertrial.site.app import create_app
from papertrial.site.context import Context
from papertrial.site.people import accounts
from papertrial.site.settings import Settings
from postgresql_server import new_database

TODAY = date.today()
IN_PROCESS = {"encoder": False, "fetch": False, "base_url": "http://testserver"}


def records() -> list[Record]:
    """Six papers of the last days with everything a source can say, and one that has a title only."""
    made = [
        Record(
            source="huggingface",
            title=f"Paper number {i} about {topic}",
            source_url=f"https://huggingface.co/papers/2601.0000{i}",
            arxiv_id=f"2601.0000{i}",
            abstract=f"We study {topic} and find that it works in case {i}.",
            ai_summary=f"{topic} works." if i % 2 else None,
            authors=(f"Ada Number{i}", "Grace Hopper"),
            published=TODAY - timedelta(days=30 + i),
            entered=TODAY - timedelta(days=i // 2),
            organisation="Example Lab" if i < 3 else None,
            upvotes=i,
            comment_count=i % 2,
            keywords=(topic, "language models"),
            code_url=f"https://github.com/example/repo{i}",
            project_url="https://example.org/project",
            categories=("cs.CL",),
        )
        for i, topic in enumerate(
            ["sparse attention", "speculative decoding", "tokenizer transfer", "quantization", "retrieval", "pruning"]
        )
    ]
    return [*made, Record(source="page", title="A paper without an identifier", entered=TODAY - timedelta(days=1))]


@dataclass
class Site:
    """The application in process, with somebody who can sign in."""

    client: TestClient
    context: Context

    def sign_in(self, email: str = "reader@example.org") -> "Browser":
        return Browser.of(self, email)


@dataclass
class Browser:
    """A signed-in session: sends its cookie, and its CSRF token with what changes something."""

    client: httpx.Client
    csrf: str
    reader: accounts.Reader

    @classmethod
    def of(cls, site: Site, email: str) -> "Browser":
        store = site.context.store
        token = accounts.make_sign_in_link(store, email, minutes=5, unlimited=True)
        signed = accounts.sign_in(store, token, days=1)
        client = TestClient(site.client.app, raise_server_exceptions=False)
        client.cookies.set(site.context.settings.cookie_name, signed.session)
        csrf = client.get("/api/me").json()["csrf"]
        client.headers["X-CSRF-Token"] = csrf
        return cls(client, csrf, signed.reader)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PAPERTRIAL_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home folder with the catalogue and its index in it: made once, copied for each test."""
    folder = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAPERTRIAL_HOME", str(folder))
        with Store.open() as store:
            store.upsert(records())
        app = create_app(Settings.model_validate(IN_PROCESS))
        upkeep.update_index_now(app.state.context)
        app.state.context.close()
    shutil.rmtree(folder / "keys")
    return folder


@pytest.fixture
def postgresql_site(home: Path, postgresql_server: sa.URL, prepared_postgresql: tuple[str, Path]) -> Iterator[str]:
    """The URL of a PostgreSQL database with the catalogue in it, and the home folder has its index."""
    name, folder = prepared_postgresql
    with new_database(postgresql_server, template=name) as url:
        (home / "search").mkdir()
        shutil.copytree(folder, home / "search" / index_folder(url).name)
        yield url


@pytest.fixture(scope="session")
def prepared_postgresql(
    postgresql_server: sa.URL, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Path]]:
    """A PostgreSQL database with the catalogue in it, and the folder of its index: to be copied for each test."""
    folder = tmp_path_factory.mktemp("prepared-postgresql")
    with new_database(postgresql_server) as url:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PAPERTRIAL_HOME", str(folder))
            with Store.open(url) as store:
                store.upsert(records())
            app = create_app(Settings.model_validate({**IN_PROCESS, "database": url}))
            upkeep.update_index_now(app.state.context)
            app.state.context.close()
            indexed = index_folder(url)
        yield str(sa.make_url(url).database), indexed


@pytest.fixture
def make_site(home: Path, prepared: Path) -> Iterator[Callable[..., Site]]:
    """Makes an application over a small catalogue; settings as keywords."""
    clients: list[TestClient] = []

    def make(**settings: object) -> Site:
        if "database" not in settings and not (home / "papertrial.db").exists():
            shutil.copytree(prepared, home, dirs_exist_ok=True)
        values = {**IN_PROCESS, **settings}
        app = create_app(Settings.model_validate(values))
        client = TestClient(app, raise_server_exceptions=False)
        client.__enter__()
        clients.append(client)
        upkeep.wait_until_indexed(app.state.context, 30)
        return Site(client, app.state.context)

    yield make
    for client in clients:
        client.__exit__(None, None, None)


@pytest.fixture
def site(make_site: Callable[..., Site]) -> Site:
    return make_site()


@dataclass
class Server:
    """`papertrial serve` as a process of its own."""

    process: subprocess.Popen[bytes]
    url: str
    home: Path
    log: Path

    def kill(self) -> None:
        """As a power cut would: no time to tidy up."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_server(home: Path, *, port: int | None = None, wait: bool = True, **settings: object) -> Server:
    """Start the service on loopback and wait until it answers."""
    return start_code(home, port or free_port(), wait=wait, **settings)


def start_code(home: Path, port: int, *, prelude: str = "pass", wait: bool = True, **settings: object) -> Server:
    """Start the service after a statement of the test's own."""
    log = home / "server.log"
    values = ", ".join(f"{name}={value!r}" for name, value in {"encoder": False, "fetch": False, **settings}.items())
    code = f"{prelude}\nfrom papertrial.site.serve import serve\nserve(port={port}, {values})"
    environment = {**os.environ, "PAPERTRIAL_HOME": str(home), "OMP_NUM_THREADS": "1"}
    with log.open("ab") as stream:
        process = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=stream, stdout=stream)
    server = Server(process, f"http://127.0.0.1:{port}", home, log)
    end = time.monotonic() + 60
    while wait:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{server.url}/health", timeout=5).is_success:
                break
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            raise RuntimeError(f"the server did not start: {log.read_text()[-2000:]}")
        time.sleep(0.01)
    return server


def links_in(text: str) -> list[str]:
    """The addresses in a letter or a log."""
    return re.findall(r"https?://[^\s<>\"]+", text)
