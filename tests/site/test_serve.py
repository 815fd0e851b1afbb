"""The service as a process: it starts quickly and without torch, stops cleanly, and says in one line what is wrong."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import sqlalchemy as sa

from papertrial.errors import UsageError
from papertrial.feed.delivery_schema import subscriptions as table
from papertrial.feed.store import Store, utc_now
from papertrial.site.context import Context
from papertrial.site.errors import Problem
from papertrial.site.limits import Limiter
from papertrial.site.serve import take_port
from papertrial.site.settings import Settings, read_settings
from site_service import Server, free_port, links_in, records, start_server

#: What a start may cost in processor time: on a machine of its own, that is the time on the clock. The clock itself
#: would measure what else the machine does while tests run.
START_SECONDS = 2.0


def command(home: Path, *arguments: str, timeout: float = 60, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command line, as a user types it."""
    values = {**os.environ, "PAPERTRIAL_HOME": str(home), "OMP_NUM_THREADS": "1", **environment}
    run = [sys.executable, "-m", "papertrial", *arguments]
    return subprocess.run(run, env=values, capture_output=True, text=True, timeout=timeout, cwd=home)


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Callable[..., tuple[subprocess.Popen[str], str]]]:
    """Starts `papertrial serve` and waits for the first good answer of a page."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str, page: str = "/health", **environment: str) -> tuple[subprocess.Popen[str], str]:
        port = free_port()
        values = {**os.environ, "PAPERTRIAL_HOME": str(tmp_path), "OMP_NUM_THREADS": "1", **environment}
        run = [sys.executable, "-m", "papertrial", "serve", "--port", str(port), *arguments]
        with (tmp_path / "log").open("a") as log:
            process = subprocess.Popen(run, env=values, stderr=log, stdout=log, text=True)
        started.append(process)
        url = f"http://127.0.0.1:{port}"
        end = time.monotonic() + 60
        while True:
            try:
                if httpx.get(f"{url}{page}", timeout=30).status_code == 200:
                    return process, url
            except httpx.TransportError:
                pass
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < end
            time.sleep(0.005)

    yield start
    for process in started:
        process.kill()
        process.wait()


def _spent(process: subprocess.Popen[str]) -> float:
    times = psutil.Process(process.pid).cpu_times()
    return times.user + times.system


def test_only_trusted_proxies_say_who_the_client_is(home: Path) -> None:
    """From loopback, which the default trusts, and from nobody where the setting is empty."""

    def left(url: str, client: str) -> int:
        header = httpx.get(url, headers={"X-Forwarded-For": client}).headers["RateLimit"]
        return int(re.findall(r"r=(\d+)", header)[0])

    for trusted, apart in (("127.0.0.1", True), ("", False), ("127.0.0.0/8,10.0.0.7", True)):
        server = start_server(home, trusted_proxies=trusted)
        try:
            first = left(server.url, "203.0.113.1")
            assert (left(server.url, "203.0.113.2") == first) == apart
            assert left(server.url, "203.0.113.1") < first
        finally:
            server.stop()


@pytest.mark.parametrize("given", ["proxy.example.org", "10.0.0.300", "10.0.0.7/8", "*,10.0.0.7"])
def test_what_is_no_proxys_address_is_refused_by_name(given: str) -> None:
    with pytest.raises(UsageError, match=r"trusted_proxies.*is not an address"):
        read_settings(trusted_proxies=given)


def test_a_start_takes_two_seconds_of_processor_time_at_most(serving: Callable[..., Any], tmp_path: Path) -> None:
    for home in ("first", "second"):  # the first start after an installation compiles what it imports
        fresh, _ = serving(PAPERTRIAL_HOME=str(tmp_path / home))
        spent = _spent(fresh)
        fresh.terminate()
        fresh.wait()
    assert spent < START_SECONDS  # with a new database, and the catalogue in it
    again, url = serving(PAPERTRIAL_HOME=str(tmp_path / "second"))
    assert _spent(again) < START_SECONDS
    assert httpx.get(f"{url}/health").json()["papers"] >= 100


def test_the_serving_process_never_loads_torch(serving: Callable[..., Any]) -> None:
    """Every kind of page and tool was asked for, and the library's files are still not mapped."""
    process, url = serving()
    with httpx.Client(base_url=url, timeout=60) as client:
        slugs = [row["slug"] for row in client.get("/api/evidence").json()]
        assert slugs
        pages = ["/", "/verdicts", "/search?q=decoding", "/api/claims", "/api/methods", "/feeds/verdicts.atom"]
        pages += [f"/papers/{slug}" for slug in slugs[:3]] + [f"/api/evidence/{slug}/small" for slug in slugs[:3]]
        for page in pages:
            assert client.get(page).status_code == 200, page
        call = {
            "jsonrpc": "2.0",
            "id": 1,
            "method": "tools/call",
            "params": {"name": "evidence", "arguments": {"paper": slugs[0]}},
        }
        answer = client.post("/mcp", json=call, headers={"Accept": "application/json, text/event-stream"})
        assert not answer.json()["result"]["isError"]
    mapped = Path(f"/proc/{process.pid}/maps").read_text()
    assert "sqlite" in mapped  # the list is what it is taken for
    assert "libtorch" not in mapped
    assert "/torch/" not in mapped


def test_the_first_search_of_a_new_catalogue_finds_what_is_there(serving: Callable[..., Any]) -> None:
    """It waits for the index that is being made, and does not say that there is nothing."""
    _, url = serving(PAPERTRIAL_ENCODER="false")
    found = httpx.get(f"{url}/api/papers/search", params={"q": "contrastive search", "limit": 3}, timeout=60)
    assert found.status_code == 200
    assert "2210.14140" in [entry["paper"]["id"] for entry in found.json()]


def test_a_search_that_waited_too_long_says_so(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("papertrial.site.context.FIRST_INDEX_SECONDS", 0.1)
    settings = Settings(encoder=False)
    with Store.open() as store:
        store.upsert(records())
        with pytest.raises(Problem) as refused:
            Context(settings, store, Limiter(settings)).search("decoding")
    assert refused.value.status == 503
    assert refused.value.headers["Retry-After"]


def test_a_request_under_way_is_answered_when_the_service_is_told_to_stop(serving: Callable[..., Any]) -> None:
    process, url = serving()
    address = ("127.0.0.1", int(url.rsplit(":", 1)[1]))
    body = b"email=a%40example.org&kind=feed"
    head = (
        f"POST /subscriptions HTTP/1.1\r\nHost: {address[0]}:{address[1]}\r\nContent-Length: {len(body)}\r\n"
        "Content-Type: application/x-www-form-urlencoded\r\nConnection: close\r\n\r\n"
    ).encode()
    with socket.create_connection(address, timeout=30) as connection:
        connection.sendall(head + body[:10])
        time.sleep(0.3)  # the request is being read
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        connection.sendall(body[10:])
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    assert answer.startswith(b"HTTP/1.1 200")
    began = time.monotonic()
    process.wait(20)
    assert time.monotonic() - began < 15
    log = (Path(os.environ["PAPERTRIAL_HOME"]).parent, process.returncode)
    assert process.returncode in (0, -signal.SIGTERM), log
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{url}/health", timeout=2)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_leaves_no_traceback(serving: Callable[..., Any], tmp_path: Path, sent: signal.Signals) -> None:
    process, url = serving()
    httpx.get(url)
    process.send_signal(sent)
    process.wait(20)
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_workers_stop_with_the_process_that_started_them(serving: Callable[..., Any], sent: signal.Signals) -> None:
    process, url = serving("--workers", "2")
    workers = [child for child in psutil.Process(process.pid).children() if "spawn_main" in " ".join(child.cmdline())]
    assert len(workers) == 2
    process.send_signal(sent)
    gone, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive
    assert len(gone) == 2
    process.wait(30)
    port = int(url.rsplit(":", 1)[1])
    for taken in take_port("127.0.0.1", port):  # it is free again
        taken.close()


# -- what is wrong is said in one line --------------------------------------------------------------------------------


def complaint(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode in (1, 2), done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("papertrial: error: ")
    return lines[0]


def test_a_port_that_is_in_use_is_named_before_anything_is_made(tmp_path: Path) -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        said = complaint(command(tmp_path, "serve", "--port", str(port)))
        assert f"port {port}" in said
        assert "in use" in said
        workers = complaint(command(tmp_path, "serve", "--port", str(port), "--workers", "2"))
        assert "in use" in workers
    assert not (tmp_path / "papertrial.db").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--database", "nonsense"), "is not a database URL"),
        (("--database", "mysql://root@localhost/x"), "not supported"),
        (("--database", "sqlite://"), "needs a file"),
        (("--database", "postgresql://nobody@127.0.0.1:9/none"), "refused"),
        (("--host", "no-such-host.invalid"), "no address of this machine"),
        (("--host", "192.0.2.1"), "cannot listen"),
        (("--base-url", "ftp://x"), "base_url"),
    ],
)
def test_what_cannot_be_used_is_one_line(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    assert said in complaint(command(tmp_path, "serve", "--port", str(free_port()), *arguments))


def test_a_database_that_cannot_be_opened_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("this is no database, but a text of some length " * 100)
    (tmp_path / "folder.db").mkdir()
    for name, words in (("text.db", "not a SQLite database"), ("folder.db", "cannot be opened")):
        done = command(tmp_path, "serve", "--port", str(free_port()), "--database", f"sqlite:///{tmp_path / name}")
        assert words in complaint(done)
        done = command(tmp_path, "backup", "x.zip", "--database", f"sqlite:///{tmp_path / name}")
        assert words in complaint(done)


def test_wrong_settings_are_named(tmp_path: Path) -> None:
    wrong = {"PAPERTRIAL_TIMEZONE": "Mars/Olympus", "PAPERTRIAL_CATEGORIES": "cs.CL,rm -rf", "PAPERTRIAL_SMTP_URL": "x"}
    said = complaint(command(tmp_path, "serve", "--port", str(free_port()), **wrong))
    assert "timezone" in said
    assert "categories" in said
    assert "smtp_url" in complaint(command(tmp_path, "digest", PAPERTRIAL_SMTP_URL="http://x"))


def test_categories_are_read_from_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAPERTRIAL_CATEGORIES", "cs.CL, stat.ML ,math-ph")
    assert read_settings().categories == ("cs.CL", "stat.ML", "math-ph")
    assert Settings().categories == ("cs.CL", "cs.LG")


def test_a_name_with_two_addresses_is_listened_to_at_both() -> None:
    found = {info[4][0] for info in socket.getaddrinfo("localhost", 0, type=socket.SOCK_STREAM)}
    taken = take_port("localhost", 0)
    try:
        assert {one.getsockname()[0] for one in taken} <= found
        assert len({one.getsockname()[1] for one in taken}) == 1
        with pytest.raises(UsageError, match="in use"):
            take_port("localhost", taken[0].getsockname()[1])
    finally:
        for one in taken:
            one.close()


# -- the commands beside it -------------------------------------------------------------------------------------------


@pytest.fixture
def used(tmp_path: Path) -> Iterator[Server]:
    server = start_server(tmp_path)
    asked = httpx.post(f"{server.url}/subscriptions", data={"email": "me@example.org", "timezone": "UTC"})
    assert asked.status_code == 200
    (letter,) = (tmp_path / "outbox").glob("*.eml")
    text = letter.read_text().replace("=\n", "").replace("=3D", "=")
    link = next(link for link in links_in(text) if "/confirm/" in link)
    assert httpx.post(link).status_code == 200
    yield server
    server.stop()


def test_digest_sends_what_is_due_with_the_services_own_address(used: Server, tmp_path: Path) -> None:
    used.stop()  # it would send the digest itself
    with Store.open(f"sqlite:///{tmp_path / 'papertrial.db'}") as store, store.writing() as connection:
        long_ago = utc_now().replace(year=2020)
        values = {"next_due": utc_now().replace(microsecond=0), "hour": utc_now().hour, "covered_to": long_ago}
        connection.execute(table.update().values(**values))
        papers = sa.text("UPDATE papers SET feed_day = DATE('now'), feed_precision = 'day' WHERE id = 1")
        connection.execute(papers)
        connection.execute(sa.text("UPDATE papers SET first_seen = DATETIME('now', '-3 hours') || '.000000'"))
    done = command(tmp_path, "digest", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["sent"] == 1
    newest = max((tmp_path / "outbox").glob("*.eml"), key=lambda path: path.name).read_text()
    assert f"List-Unsubscribe: <{used.url}/unsubscribe/" in newest
    assert json.loads(command(tmp_path, "digest", "--json").stdout)["sent"] == 0


def test_backup_and_restore_bring_everything_elsewhere(
    used: Server, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    archive = tmp_path / "papertrial.zip"
    done = command(tmp_path, "backup", str(archive), "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert rows["subscriptions"] == 1
    assert "already" in complaint(command(tmp_path, "backup", str(archive)))
    used.stop()
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    done = command(elsewhere, "restore", str(archive), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == rows
    assert "--force" in complaint(command(elsewhere, "restore", str(archive)))
    assert command(elsewhere, "restore", str(archive), "--force").returncode == 0
    assert "no file" in complaint(command(elsewhere, "restore", str(elsewhere / "missing.zip")))
    server = start_server(elsewhere)
    try:
        assert httpx.get(f"{server.url}/health").json()["papers"] == rows["papers"]
    finally:
        server.stop()


def test_admin_link_signs_the_administrator_in(used: Server, tmp_path: Path) -> None:
    done = command(tmp_path, "admin-link")
    assert done.returncode == 0, done.stderr
    link = done.stdout.strip()
    assert link.startswith(f"{used.url}/sign-in/")
    with httpx.Client(follow_redirects=True) as client:
        assert client.get(link).status_code == 200
        assert client.post(link).status_code == 200
        assert client.get(f"{used.url}/admin").status_code == 200


def test_readers_are_served_while_a_backup_is_made(used: Server, tmp_path: Path) -> None:
    answers: list[int] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            answers.append(httpx.get(f"{used.url}/health").status_code)

    reader = threading.Thread(target=read)
    reader.start()
    done = command(tmp_path, "backup", str(tmp_path / "b.zip"))
    stop.set()
    reader.join()
    assert done.returncode == 0
    assert len(answers) > 3
    assert set(answers) == {200}
