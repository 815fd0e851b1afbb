"""Kill -9 at any moment: what was acknowledged is there after the next start, and the next start is quick."""

import random
import threading
import time
from pathlib import Path

import httpx
import pytest
import sqlalchemy as sa

from papertrial.feed import people_schema as tables
from papertrial.feed.store import Store
from papertrial.site.people import accounts, bounds, tokens
from site_service import Server, free_port, records, start_server

KILLS = 50
NAMES = [record.arxiv_id for record in records() if record.arxiv_id]


class Writer(threading.Thread):
    """Votes, takes votes back, comments and tags as fast as it can, and remembers what the server acknowledged."""

    def __init__(self, url: str, token: str, turn: int) -> None:
        super().__init__(daemon=True)
        self.client = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=10)
        self.turn = turn
        self.comments: list[str] = []
        self.tags: list[tuple[str, str]] = []
        self.vote: tuple[str, bool] | None = None
        self.unsure: str | None = None

    def run(self) -> None:
        number = 0
        try:
            while True:
                number += 1
                self._write(f"{self.turn}-{number}", NAMES[number % len(NAMES)])
        except (httpx.TransportError, httpx.RemoteProtocolError):
            pass
        finally:
            self.client.close()

    def _write(self, text: str, name: str) -> None:
        if self.client.post(f"/api/papers/{name}/comments", json={"body": text}).status_code == 201:
            self.comments.append(text)
        if self.client.put(f"/api/papers/{name}/tags/{text}").status_code == 200:
            self.tags.append((text, name))
        self.unsure = name
        vote = self.vote is None or not self.vote[1] or self.vote[0] != name
        answer = self.client.request("PUT" if vote else "DELETE", f"/api/papers/{name}/vote")
        if answer.status_code == 200:
            self.vote, self.unsure = (name, answer.json()["voted"]), None


@pytest.fixture
def account(home: Path) -> str:
    """A token of somebody who may write without end: the limits are not what is tried here."""
    with Store.open(f"sqlite:///{home / 'papertrial.db'}") as store:
        store.upsert(records())
        reader = accounts.sign_in(store, accounts.make_sign_in_link(store, "w@example.org", minutes=5), days=1).reader
        return tokens.make_token(store, reader, "writer", "write")[0]


def _state(home: Path) -> tuple[set[str], set[tuple[str, str]], set[str]]:
    with Store.open(f"sqlite:///{home / 'papertrial.db'}") as store, store.reading() as connection:
        assert connection.exec_driver_sql("PRAGMA quick_check").scalar() == "ok"
        said = set(connection.execute(sa.select(tables.comments.c.body)).scalars())
        papers = tables.metadata.tables["papers"]
        tagged = sa.select(tables.tags.c.name, papers.c.arxiv_id).join(papers, papers.c.id == tables.tags.c.paper_id)
        voted = sa.select(papers.c.arxiv_id).join(tables.votes, papers.c.id == tables.votes.c.paper_id)
        return (
            said,
            {(row[0], row[1]) for row in connection.execute(tagged)},
            set(connection.execute(voted).scalars()),
        )


@pytest.mark.slow
def test_fifty_kills_lose_nothing_that_was_acknowledged(home: Path, account: str) -> None:
    generator = random.Random(7)
    limits = f"{{'COMMENTS_AN_HOUR': {10**9}, 'COMMENTS_A_DAY': {10**9}, 'VOTES_AN_HOUR': {10**9}}}"
    said: set[str] = set()
    tagged: set[tuple[str, str]] = set()
    acknowledged, server = 0, None
    for turn in range(KILLS):
        server = _start(home, limits)
        writer = Writer(server.url, account, turn)
        writer.start()
        # At any moment: while it starts to answer, in the middle of a write, between two.
        deadline = time.monotonic() + generator.uniform(0.0, 0.25)
        while time.monotonic() < deadline or (turn % 5 and not writer.comments and writer.is_alive()):
            time.sleep(0.001)
        server.kill()
        writer.join(15)
        assert not writer.is_alive()
        said |= set(writer.comments)
        tagged |= set(writer.tags)
        acknowledged += len(writer.comments) + len(writer.tags)
        there_said, there_tagged, there_voted = _state(home)
        assert said <= there_said, f"comments lost in turn {turn}: {sorted(said - there_said)[:5]}"
        assert tagged <= there_tagged, f"tags lost in turn {turn}"
        if writer.vote is not None and writer.unsure != writer.vote[0]:
            name, voted = writer.vote
            assert (name in there_voted) == voted, f"the vote for {name} was lost in turn {turn}"
    assert acknowledged > 2 * KILLS


def _start(home: Path, limits: str) -> Server:
    """The service in a process of its own, with the limits of an account out of the way."""
    from site_service import start_code

    prelude = f"from papertrial.site.people import bounds; [setattr(bounds, k, v) for k, v in {limits}.items()]"
    assert hasattr(bounds, "VOTES_AN_HOUR")
    return start_code(home, free_port(), prelude=prelude, api_quota=0, api_quota_signed_in=0)


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
