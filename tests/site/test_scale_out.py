"""Several workers on one database, and several machines: no vote is lost, no digest is sent twice."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import httpx
import psutil
import pytest
import sqlalchemy as sa
from aiosmtpd.controller import Controller

from papertrial.feed import people_schema as tables
from papertrial.feed import schema
from papertrial.feed.delivery_schema import digests
from papertrial.feed.delivery_schema import subscriptions as subscribed
from papertrial.feed.store import Store, utc_now
from papertrial.site.delivery import subscriptions
from papertrial.site.delivery.subscriptions import Watch
from papertrial.site.people import accounts, tokens
from papertrial.site.people.pulse import pulses
from site_service import Server, free_port, records, start_server

WORKERS, PEOPLE, ROUNDS, READERS = 3, 9, 24, 30
NAMES = [record.arxiv_id for record in records() if record.arxiv_id]
WITHOUT_LIMITS = {"api_quota": 0, "api_quota_signed_in": 0, "page_quota": 0}


@pytest.fixture
def store(database: str, home: Path) -> Iterator[Store]:
    with Store.open(database) as opened:
        opened.upsert(records())
        yield opened


def workers_of(server: Server) -> list[psutil.Process]:
    """The processes that answer; beside them there is one that looks after what they share."""
    children = psutil.Process(server.process.pid).children()
    return [child for child in children if "resource_tracker" not in " ".join(child.cmdline())]


def wait_for_workers(server: Server, count: int = WORKERS) -> list[psutil.Process]:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        found = workers_of(server)
        if len(found) >= count and all(sum(w.cpu_times()[:2]) > 0.5 for w in found):
            return found
        time.sleep(0.05)
    raise AssertionError(f"{len(workers_of(server))} workers came up, not {count}")


# -- votes ------------------------------------------------------------------------------------------------------------


class Voter(threading.Thread):
    """Somebody who votes and takes votes back, and remembers what was acknowledged; every time a new connection."""

    def __init__(self, urls: list[str], token: str, number: int) -> None:
        super().__init__(daemon=True)
        self.urls, self.headers = urls, {"Authorization": f"Bearer {token}"}
        self.source = random.Random(number)
        self.votes: dict[str, bool] = {}
        self.refused: list[str] = []

    def run(self) -> None:
        for _ in range(ROUNDS):
            name, vote = self.source.choice(NAMES), self.source.random() < 0.7
            url = f"{self.source.choice(self.urls)}/api/papers/{name}/vote"
            answer = httpx.request("PUT" if vote else "DELETE", url, headers=self.headers, timeout=60)
            if answer.status_code == 200:
                self.votes[name] = answer.json()["voted"]
                assert self.votes[name] == vote
            else:
                self.refused.append(f"{answer.status_code} {answer.text[:200]}")


def vote_all_at_once(store: Store, urls: list[str]) -> list[Voter]:
    people = []
    for number in range(PEOPLE):
        link = accounts.make_sign_in_link(store, f"voter{number}@example.org", minutes=5, unlimited=True)
        reader = accounts.sign_in(store, link, days=1).reader
        people.append(Voter(urls, tokens.make_token(store, reader, "voter", "write")[0], number))
    for voter in people:
        voter.start()
    for voter in people:
        voter.join(180)
    assert not any(voter.is_alive() for voter in people)
    return people


def check_votes(store: Store, people: list[Voter]) -> None:
    """Everything acknowledged is there, nothing else, and the sums that pages show are those of the votes."""
    assert [voter.refused for voter in people] == [[] for _ in people]
    wanted = Counter(name for voter in people for name, voted in voter.votes.items() if voted)
    assert sum(wanted.values()) > PEOPLE
    papers = schema.papers
    query = sa.select(papers.c.arxiv_id, papers.c.id, sa.func.count()).join(tables.votes)
    with store.reading() as connection:
        held = connection.execute(query.group_by(papers.c.arxiv_id, papers.c.id)).all()
    assert {row[0]: row[2] for row in held} == dict(wanted)
    sums = pulses(store, [row[1] for row in held])
    assert {row[0]: sums[row[1]].votes for row in held} == dict(wanted)


@pytest.mark.slow
def test_workers_side_by_side_lose_no_vote(store: Store, home: Path, database: str) -> None:
    server = start_server(home, workers=WORKERS, database=database, **WITHOUT_LIMITS)
    try:
        before = {worker.pid: sum(worker.cpu_times()[:2]) for worker in wait_for_workers(server)}
        people = vote_all_at_once(store, [server.url])
        busy = [w.pid for w in workers_of(server) if sum(w.cpu_times()[:2]) - before.get(w.pid, 0) > 0.1]
        assert len(busy) >= WORKERS, "not all workers took part"
    finally:
        server.stop()
    check_votes(store, people)


@pytest.mark.slow
def test_machines_side_by_side_lose_no_vote(postgresql: str, tmp_path: Path) -> None:
    """Each with a home folder of its own; they share the database and nothing else."""
    with Store.open(postgresql) as store:
        store.upsert(records())
        homes = [tmp_path / f"machine{number}" for number in range(WORKERS)]
        for folder in homes:
            folder.mkdir()
        servers = [start_server(folder, database=postgresql, wait=False, **WITHOUT_LIMITS) for folder in homes]
        try:
            for server in servers:
                wait_until_up(server)
            check_votes(store, vote_all_at_once(store, [server.url for server in servers]))
        finally:
            for server in servers:
                server.stop()


def wait_until_up(server: Server) -> None:
    end = time.monotonic() + 60
    while True:
        try:
            httpx.get(f"{server.url}/health", timeout=5).raise_for_status()
            return
        except httpx.TransportError:
            assert server.process.poll() is None, server.log.read_text()[-2000:]
            assert time.monotonic() < end, server.log.read_text()[-2000:]
            time.sleep(0.05)


# -- digests ----------------------------------------------------------------------------------------------------------


class Postman:
    """A mail server's part: counts the letters by address, and takes its time, so that workers meet."""

    def __init__(self) -> None:
        self.letters: Counter[str] = Counter()
        self.lock = threading.Lock()

    async def handle_DATA(self, server: object, session: object, envelope: object) -> str:  # noqa: N802  aiosmtpd's name
        import asyncio

        await asyncio.sleep(0.02)
        with self.lock:
            self.letters.update(envelope.rcpt_tos)  # type: ignore[attr-defined]
        return "250 taken"


@pytest.fixture
def postman() -> Iterator[tuple[Postman, str]]:
    handler, port = Postman(), free_port()
    controller = Controller(handler, hostname="127.0.0.1", port=port)
    controller.start()
    yield handler, f"smtp://127.0.0.1:{port}"
    controller.stop()


def due_now(store: Store) -> list[str]:
    """Addresses whose daily digest is due at this moment, about papers that came in before."""
    addresses = [f"reader{number}@example.org" for number in range(READERS)]
    for address in addresses:
        asked = subscriptions.ask(store, address, Watch("feed"))
        assert asked is not None
        subscriptions.confirm(store, asked[1])
    now = utc_now()
    with store.writing() as connection:
        connection.execute(schema.papers.update().values(first_seen=now - timedelta(days=3)))
        connection.execute(
            subscribed.update().values(covered_to=now - timedelta(days=5), next_due=now - timedelta(minutes=1))
        )
    return addresses


def senders(home: Path, database: str, smtp_url: str, count: int) -> list[subprocess.Popen[bytes]]:
    """Processes that send whatever is due, as cron would start them."""
    code = (
        "from papertrial.site.delivery.digests import send_digests\n"
        "from papertrial.site.settings import Settings\n"
        f"send_digests(Settings(database={database!r}, encoder=False, smtp_url={smtp_url!r}))"
    )
    environment = {**os.environ, "PAPERTRIAL_HOME": str(home), "OMP_NUM_THREADS": "1"}
    return [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(count)]


def states(store: Store) -> Counter[str]:
    with store.reading() as connection:
        return Counter(connection.execute(sa.select(digests.c.state)).scalars())


def wait_until_sent(store: Store, count: int, seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while sum(states(store).values()) < count or states(store).keys() & {"due", "building"}:
        assert time.monotonic() < end, states(store)
        time.sleep(0.1)


@pytest.mark.slow
def test_workers_and_cron_send_every_digest_once(
    store: Store, home: Path, database: str, postman: tuple[Postman, str]
) -> None:
    handler, smtp_url = postman
    addresses = due_now(store)
    server = start_server(home, workers=WORKERS, database=database, smtp_url=smtp_url, wait=False)
    try:
        cron = senders(home, database, smtp_url, WORKERS)
        assert [process.wait(120) for process in cron] == [0] * WORKERS
        wait_until_sent(store, READERS)
        wait_for_workers(server)
    finally:
        server.stop()
    assert handler.letters == Counter(addresses)
    assert states(store) == {"sent": READERS}


@pytest.mark.slow
def test_a_sender_that_is_killed_makes_no_letter_come_twice(
    store: Store, home: Path, database: str, postman: tuple[Postman, str]
) -> None:
    """Killed at any moment of the sending; others go on, and what is unclear stays unsent."""
    handler, smtp_url = postman
    addresses = due_now(store)
    running = senders(home, database, smtp_url, WORKERS)
    while not handler.letters:
        time.sleep(0.005)
    for victim in running[1:]:
        victim.send_signal(signal.SIGKILL)
        victim.wait()
    assert running[0].wait(120) == 0
    (last,) = senders(home, database, smtp_url, 1)
    assert last.wait(120) == 0
    twice = {address: count for address, count in handler.letters.items() if count > 1}
    assert twice == {}
    # each of those killed held one digest at most: its letter may have gone out or not, the others all have
    assert len(set(addresses) - handler.letters.keys()) <= WORKERS - 1
    found = states(store)
    assert found["sent"] >= READERS - (WORKERS - 1)
    assert sum(found.values()) == READERS
