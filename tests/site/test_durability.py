"""Kill -9 at any moment: what was acknowledged is there after the next start, and the next start is quick."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
import sqlalchemy as sa

from papertrial.feed import people_schema as tables
from papertrial.feed.delivery_schema import subscriptions
from papertrial.feed.store import Store
from papertrial.site.people import accounts, tokens
from site_service import free_port, links_in, records, start_server

KILLS = 50
NAMES = [record.arxiv_id for record in records() if record.arxiv_id]

#: A process that has imported the service, and forks one that serves for every port it reads: a start then costs what
#: the service does, and not what Python's imports cost. Limits on how much one account may write are out of the way.
NURSERY = """
import os, signal, sys
from papertrial.site import app, serve
from papertrial.site.delivery import subscriptions
from papertrial.site.people import bounds
app._modules()
for module, names in (
    (bounds, ("COMMENTS_AN_HOUR", "COMMENTS_A_DAY", "VOTES_AN_HOUR")),
    (subscriptions, ("LETTERS_PER_ADDRESS", "LETTERS_PER_HOUR", "SUBSCRIPTIONS_PER_ADDRESS")),
):
    for name in names:
        assert hasattr(module, name)
        setattr(module, name, 10**9)
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for line in sys.stdin:
    child = os.fork()
    if not child:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        quotas = dict.fromkeys(("api_quota", "api_quota_signed_in", "page_quota", "letter_quota"), 0)
        serve.serve(port=int(line), encoder=False, fetch=False, **quotas)
        os._exit(0)
    print(child, flush=True)
"""


class Nursery:
    """Starts services on one home folder, and kills them."""

    def __init__(self, home: Path) -> None:
        self.log = (home / "server.log").open("ab")
        environment = {**os.environ, "PAPERTRIAL_HOME": str(home), "OMP_NUM_THREADS": "1"}
        run = [sys.executable, "-c", NURSERY]
        self.process = subprocess.Popen(
            run, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True
        )

    def start(self) -> tuple[int, str]:
        """Process id and address of a service that answers."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        port = free_port()
        self.process.stdin.write(f"{port}\n")
        self.process.stdin.flush()
        child, url = int(self.process.stdout.readline()), f"http://127.0.0.1:{port}"
        end = time.monotonic() + 60
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/health", timeout=5).is_success:
                    return child, url
            assert time.monotonic() < end, "the service did not start"
            time.sleep(0.005)

    @staticmethod
    def kill(child: int) -> None:
        """As a power cut would: no time to tidy up."""
        os.kill(child, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            while True:
                os.kill(child, 0)
                time.sleep(0.001)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.log.close()


@dataclass
class Acknowledged:
    """What servers said is done. ``unsure`` are the things that a killed server was working on."""

    comments: set[str] = field(default_factory=set)
    tags: set[tuple[str, str]] = field(default_factory=set)
    votes: dict[str, bool] = field(default_factory=dict)
    subscriptions: dict[str, str] = field(default_factory=dict)
    unsure: set[str] = field(default_factory=set)


class Writer(threading.Thread):
    """Comments, tags, votes, takes votes back, subscribes, confirms and ends digests as fast as it can."""

    def __init__(self, url: str, token: str, turn: int, home: Path, done: Acknowledged) -> None:
        super().__init__(daemon=True)
        self.client = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=30)
        self.turn, self.home, self.done = turn, home, done
        self.count = 0
        self.problem: Exception | None = None

    def run(self) -> None:
        number = self.turn  # papers and steps in another order every turn
        try:
            while True:
                number += 1
                text, name = f"{self.turn}-{number}", NAMES[number % len(NAMES)]
                steps = [self._comment, self._tag, self._vote, self._subscribe]
                steps[number % len(steps)](text, name)
                self.count += 1
        except httpx.TransportError:
            pass  # killed
        except Exception as error:
            self.problem = error
        finally:
            self.client.close()

    def _comment(self, text: str, name: str) -> None:
        assert self.client.post(f"/api/papers/{name}/comments", json={"body": text}).status_code == 201
        self.done.comments.add(text)

    def _tag(self, text: str, name: str) -> None:
        assert self.client.put(f"/api/papers/{name}/tags/{text}").status_code == 200
        self.done.tags.add((text, name))

    def _vote(self, _: str, name: str) -> None:
        wanted = not self.done.votes.get(name, False)
        self.done.unsure.add(name)
        answer = self.client.request("PUT" if wanted else "DELETE", f"/api/papers/{name}/vote")
        assert answer.json()["voted"] == wanted
        self.done.votes[name] = wanted
        self.done.unsure.discard(name)

    def _subscribe(self, text: str, _: str) -> None:
        held = self.done.subscriptions
        made = self.client.post("/api/subscriptions", json={"kind": "search", "value": text})
        assert made.status_code == 202, made.text
        held[text] = "pending"
        self.done.unsure.add(text)
        assert self.client.post(self._link_for(text)).status_code == 200
        held[text] = "active"
        if len(held) % 3 == 0:
            assert self.client.delete(f"/api/subscriptions/{made.json()['id']}").status_code == 204
            held[text] = "ended"
        self.done.unsure.discard(text)

    def _link_for(self, text: str) -> str:
        """The link of the letter that was sent last; its file was complete before the request was answered."""
        newest = max((self.home / "outbox").glob("[!.]*.eml"), key=lambda path: path.name)
        letter = newest.read_text().replace("=\n", "").replace("=3D", "=")
        assert f"papers about {text}" in letter
        return next(link for link in links_in(letter) if "/confirm/" in link)


@pytest.fixture
def account(home: Path) -> str:
    """A token of somebody who may write."""
    with Store.open(f"sqlite:///{home / 'papertrial.db'}") as store:
        store.upsert(records())
        reader = accounts.sign_in(store, accounts.make_sign_in_link(store, "w@example.org", minutes=5), days=1).reader
        return tokens.make_token(store, reader, "writer", "write")[0]


@pytest.fixture
def nursery(home: Path) -> Iterator[Nursery]:
    made = Nursery(home)
    yield made
    made.close()


def check(home: Path, done: Acknowledged, turn: int) -> None:
    """Everything that was acknowledged is in the database, and the database is whole."""
    with Store.open(f"sqlite:///{home / 'papertrial.db'}") as store, store.reading() as connection:
        assert connection.exec_driver_sql("PRAGMA quick_check").scalar() == "ok"
        said = set(connection.execute(sa.select(tables.comments.c.body)).scalars())
        papers = tables.metadata.tables["papers"]
        tagged = sa.select(tables.tags.c.name, papers.c.arxiv_id).join(papers, papers.c.id == tables.tags.c.paper_id)
        under = {(row[0], row[1]) for row in connection.execute(tagged)}
        voted = sa.select(papers.c.arxiv_id).join(tables.votes, papers.c.id == tables.votes.c.paper_id)
        votes = set(connection.execute(voted).scalars())
        rows = connection.execute(sa.select(subscriptions.c.value, subscriptions.c.state))
        states = {row.value: row.state for row in rows}
    assert done.comments <= said, f"comments lost in turn {turn}: {sorted(done.comments - said)[:5]}"
    assert done.tags <= under, f"tags lost in turn {turn}: {sorted(done.tags - under)[:5]}"
    for name, wanted in done.votes.items():
        assert name in done.unsure or (name in votes) == wanted, f"the vote for {name} was lost in turn {turn}"
    for text, state in done.subscriptions.items():
        if text in done.unsure:  # it may be one step further than was said, and never one back
            assert state == "active" or text in states
        else:
            assert states.get(text, "ended") == state, f"the subscription to {text} was lost in turn {turn}"


@pytest.mark.slow
def test_fifty_kills_lose_nothing_that_was_acknowledged(home: Path, account: str, nursery: Nursery) -> None:
    generator, done, acknowledged = random.Random(7), Acknowledged(), 0
    for turn in range(KILLS):
        child, url = nursery.start()
        writer = Writer(url, account, turn, home, done)
        writer.start()
        # At any moment: before the first answer, in the middle of a write, between two, whatever the machine's pace.
        while writer.count < turn % 5 and writer.is_alive():
            time.sleep(0.001)
        time.sleep(generator.uniform(0.0, 0.1))
        nursery.kill(child)
        writer.join(40)
        assert not writer.is_alive()
        assert writer.problem is None, repr(writer.problem)
        acknowledged += writer.count
        check(home, done, turn)
        # What the last kill left open is known now, and counts from here on.
        done.unsure = {name for name in done.unsure if name in done.subscriptions}
        done.votes = _votes(home)
    assert acknowledged >= 2 * KILLS
    assert {"active", "ended"} <= set(done.subscriptions.values())


def _votes(home: Path) -> dict[str, bool]:
    with Store.open(f"sqlite:///{home / 'papertrial.db'}") as store, store.reading() as connection:
        papers = tables.metadata.tables["papers"]
        voted = sa.select(papers.c.arxiv_id).join(tables.votes, papers.c.id == tables.votes.c.paper_id)
        found = set(connection.execute(voted).scalars())
    return {name: name in found for name in NAMES}


def test_a_server_that_was_killed_while_starting_starts_again(tmp_path: Path) -> None:
    for wait in (0.3, 0.7, 1.0):
        server = start_server(tmp_path, wait=False)
        time.sleep(wait)
        server.kill()
    server = start_server(tmp_path)
    try:
        assert httpx.get(f"{server.url}/health").json()["papers"] >= 100
    finally:
        server.stop()
