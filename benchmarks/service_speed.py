"""How quickly the service answers over a hundred thousand papers in SQLite: pages a second, the slow ones, the start.

    python benchmarks/service_speed.py [--home FOLDER] [--papers 100000] [--workers 1] [--seconds 20]

The catalogue is synthetic: words by Zipf's law as in `search_latency.py`, some 50 papers a day, abstracts of some 175
words, authors, organisations, votes and categories, and a vector for each paper, so that "similar papers" really
searches. With ``--home`` it is made once and kept. The server runs as ``papertrial serve`` does, on cores 0 and 1
(``--cores``); what asks it runs on the others. Its request quotas are off, since one machine plays all readers.

Each kind of page is asked for in two ways. *Flat out*: 16 connections, each asking again as soon as it has its answer;
that gives pages a second, and the processor time of a page, which other work on the machine does not change. *Paced*:
300 requests a second at fixed moments, whether or not the earlier ones were answered; the time of an answer counts
from the moment it was due. The kinds: the front page alone; feed pages of all sorts; paper pages as readers choose
them (by Zipf's law, exponent 1); paper pages that nobody asked for before; and half feed, half papers.

On a machine that others use, ``--first`` puts server and asker before them (SCHED_FIFO): the figures of a free machine.

Beside them, on the same cores: a page of one line from a bare FastAPI, and our pages with all our caches off.
"""

import argparse
import asyncio
import contextlib
import datetime
import gzip
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import numpy as np
import psutil
from machine import machine
from search_latency import Synthetic

if TYPE_CHECKING:
    from papertrial.feed.store import Store

RATE, GOAL_MS, GOAL_RATE, GOAL_BYTES, GOAL_START = 300, 50.0, 300, 100_000, 2.0
CONNECTIONS = 16
CATEGORIES = ("cs.CL", "cs.LG", "cs.AI", "cs.CV", "cs.IR", "stat.ML")
PER_DAY = 50
SERVE = "from papertrial.site.serve import serve; serve(port={port}, workers={workers}, page_quota=0, fetch=False)"
UNCACHED = """
from papertrial.site.caching import Cache; Cache.get = lambda self, key, seconds, make: make()
from papertrial.site.page_cache import PageCache; PageCache.look = lambda self, key: None
"""
HELLO = """
import uvicorn
from fastapi import FastAPI
from starlette.responses import HTMLResponse
app = FastAPI()
@app.get("/")
def hello(): return HTMLResponse("<!doctype html><title>Hello</title><p>Hello.")
uvicorn.run(app, port={port}, access_log=False, log_config=None)
"""


# -- the catalogue ----------------------------------------------------------------------------------------------------


def make_catalogue(home: Path, count: int) -> None:
    """Fill a home folder with a catalogue of so many papers and its search index."""
    from papertrial.feed.ingest import ingest_scope
    from papertrial.feed.records import Record
    from papertrial.feed.store import Store

    synthetic, source = Synthetic(), np.random.default_rng(1)
    today = datetime.date.today()
    with Store.open() as store:
        ingest_scope(store)
        number = 0
        for documents, _ in synthetic.batches(count):
            made = []
            for one in documents:
                day = today - datetime.timedelta(days=(count - number) // PER_DAY)
                made.append(
                    Record(
                        source="arxiv",
                        title=one.title.capitalize(),
                        arxiv_id=f"{20 + number // 1_080_000:02d}{number // 90_000 % 12 + 1:02d}.{number % 90_000:05d}",
                        abstract=one.abstract.capitalize() + ".",
                        authors=tuple(" ".join(synthetic.text(2)).title() for _ in range(1 + number % 7)),
                        published=day,
                        entered=day,
                        upvotes=int(source.zipf(1.6)) % 1000,
                        organisation=f"Laboratory {number % 400}" if number % 3 == 0 else None,
                        categories=CATEGORIES[number % 4 : number % 4 + 1 + number % 3],
                        keywords=tuple(synthetic.text(4)) if number % 2 else (),
                        code_url=f"https://example.org/code/{number}" if number % 4 == 0 else None,
                    )
                )
                number += 1
            store.upsert(made)
            print(f"  {store.count():,} papers", end="\r", flush=True)
        make_index(store, synthetic)
    print(f"  {count:,} papers made and indexed in {home}")


class Named:
    """Stands for the encoder that the service will use, so that it takes the vectors made here for its own."""

    def __init__(self) -> None:
        from papertrial.feed import encoder

        self.name = "given" if encoder.available() else encoder.shared_encoder().name

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        raise RuntimeError("nothing is encoded here")


def make_index(store: "Store", synthetic: Synthetic) -> None:
    """Index every paper, with a synthetic vector each."""
    from papertrial.feed.catalogue import document, index_folder
    from papertrial.feed.search import SearchIndex

    index = SearchIndex(index_folder(), Named())
    index.clear()
    revision = 0
    while True:
        changes, revision = store.changes_since(revision, 10_000)
        if not changes:
            break
        papers = [document(change.paper) for change in changes if change.paper is not None]
        index.add(papers, synthetic.vectors(len(papers)))
    index.commit(store.revision())


# -- servers ----------------------------------------------------------------------------------------------------------


@dataclass
class Running:
    """A server on loopback, its start in seconds, and what processor time it has used."""

    process: subprocess.Popen[bytes]
    port: int
    started: float = 0.0

    def processor_seconds(self) -> float:
        root = psutil.Process(self.process.pid)
        total = 0.0
        for process in [root, *root.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                spent = process.cpu_times()
                total += spent.user + spent.system
        return total

    def memory_mib(self) -> float:
        root = psutil.Process(self.process.pid)
        return sum(p.memory_full_info().pss for p in [root, *root.children(recursive=True)]) / 2**20


@contextlib.contextmanager
def running(code: str, home: Path, cores: str, workers: int = 1, path: str = "/health") -> Iterator[Running]:
    """Run code that serves on `port` until the block ends."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", code.format(port=port, workers=workers)]
    if shutil.which("taskset"):
        command = ["taskset", "-c", cores, *command]
    if os.sched_getscheduler(0) == os.SCHED_FIFO:
        command = ["chrt", "-f", "5", *command]
    environment = {**os.environ, "PAPERTRIAL_HOME": str(home), "OMP_NUM_THREADS": "1"}
    began = time.perf_counter()
    with (home / "server.log").open("ab") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    server = Running(process, port)
    try:
        while True:
            with contextlib.suppress(OSError, httpx.TransportError):
                if httpx.get(f"http://127.0.0.1:{port}{path}", timeout=5).is_success:
                    break
            if process.poll() is not None or time.perf_counter() - began > 120:
                raise SystemExit(f"the server did not start; see {home / 'server.log'}")
            time.sleep(0.005)
        server.started = time.perf_counter() - began
        yield server
    finally:
        process.terminate()
        process.wait(30)


# -- asking -----------------------------------------------------------------------------------------------------------


class Connection:
    """One connection that is kept open: a browser's, as far as the server can tell."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.reader: asyncio.StreamReader | None = None

    async def get(self, path: str) -> int:
        """Ask for a page; its bytes on the wire.

        Raises
        ------
        RuntimeError
            The answer is not 200.
        """
        if self.reader is None:
            self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port, limit=2**20)
        self.writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAccept-Encoding: gzip\r\n\r\n".encode())
        head = await self.reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"{path}: {head[:60]!r}")
        length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
        if length is None:
            raise RuntimeError(f"{path}: an answer without a length")
        body = await self.reader.readexactly(int(length[1]))
        return len(head) + len(body)


@dataclass
class Figures:
    """What came out for one kind of page."""

    rate: float
    processor_ms: float
    times_ms: Sequence[float] = ()

    def quantile(self, share: float) -> float:
        return float(np.quantile(self.times_ms, share)) if len(self.times_ms) else float("nan")


async def flat_out(server: Running, paths: Iterator[str], seconds: float) -> tuple[int, float]:
    """Ask from all connections without pause; how many were answered, in how many seconds."""
    began = time.perf_counter()
    end, done = began + seconds, 0

    async def one(connection: Connection) -> None:
        nonlocal done
        while time.perf_counter() < end:
            await connection.get(next(paths))
            done += 1

    await asyncio.gather(*(one(Connection(server.port)) for _ in range(CONNECTIONS)))
    return done, time.perf_counter() - began


async def paced(server: Running, paths: Iterator[str], seconds: float, rate: int) -> list[float]:
    """Ask at fixed moments; milliseconds from the moment each was due to its last byte."""
    free: asyncio.Queue[Connection] = asyncio.Queue()
    for _ in range(4 * CONNECTIONS):
        free.put_nowait(Connection(server.port))
    times: list[float] = []

    async def one(path: str, due: float) -> None:
        connection = await free.get()
        try:
            await connection.get(path)
        finally:
            free.put_nowait(connection)
        times.append((time.perf_counter() - due) * 1000)

    begin = time.perf_counter() + 0.05
    tasks = []
    for number in range(int(seconds * rate)):
        due = begin + number / rate
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(one(next(paths), due)))
    await asyncio.gather(*tasks)
    return times


def measure(server: Running, paths: Callable[[], Iterator[str]], seconds: float, rate: int = RATE) -> Figures:
    """Both ways of asking, for one kind of page."""
    before = server.processor_seconds()
    done, spent = asyncio.run(flat_out(server, paths(), seconds))
    cost = (server.processor_seconds() - before) / done * 1000
    times = asyncio.run(paced(server, paths(), seconds, rate)) if rate else []
    return Figures(done / spent, cost, times)


class Kinds:
    """The addresses of each kind of page, drawn at random from a seed."""

    def __init__(self, count: int, ids: Sequence[str], days: Sequence[datetime.date]) -> None:
        self.source = np.random.default_rng(3)
        self.ids, self.days = ids, days
        self.unseen = iter(self.source.permutation(count))
        self.order = self.source.permutation(count)
        chances = 1.0 / np.arange(1, count + 1)
        self.cumulative = np.cumsum(chances / chances.sum())

    def front(self) -> Iterator[str]:
        while True:
            yield "/"

    def feed(self) -> Iterator[str]:
        """A third the front page, the rest days, weeks and months (recent ones more often), trending, later pages."""
        while True:
            kind, back = self.source.random(), int(self.source.exponential(60)) % len(self.days)
            day = self.days[back]
            year, week, _ = day.isocalendar()
            if kind < 0.35:
                yield "/"
            elif kind < 0.5:
                yield "/trending" + (f"?p={back % 5}" if back % 5 else "")
            elif kind < 0.8:
                yield f"/day/{day.isoformat()}"
            elif kind < 0.9:
                yield f"/week/{year}-W{week:02d}"
            elif kind < 0.95:
                yield f"/month/{day:%Y-%m}"
            else:
                yield f"/?p={1 + back % 20}"

    def papers(self) -> Iterator[str]:
        while True:
            rank = int(np.searchsorted(self.cumulative, self.source.random()))
            yield f"/papers/{self.ids[self.order[min(rank, len(self.order) - 1)]]}"

    def new_papers(self) -> Iterator[str]:
        for place in self.unseen:
            yield f"/papers/{self.ids[place]}"

    def mixed(self) -> Iterator[str]:
        feed, papers = self.feed(), self.papers()
        while True:
            yield next(feed if self.source.random() < 0.5 else papers)


# -- the report -------------------------------------------------------------------------------------------------------


def first_load(server: Running, path: str) -> tuple[int, int]:
    """Bytes of a page with everything it needs, as sent (compressed) and unpacked."""
    address = f"http://127.0.0.1:{server.port}"
    client = httpx.Client(base_url=address, headers={"Accept-Encoding": "gzip"}, timeout=60)
    sent = unpacked = 0
    page = client.get(path).raise_for_status()
    # what is marked to be loaded when the reader comes near it is not of the first load
    tags = [
        tag
        for tag in re.findall(r"<(?:link|script|img|source|use)\b[^>]*>", page.text)
        if "lazy" not in tag and 'rel="alternate"' not in tag
    ]
    found = [address for tag in tags for address in re.findall(r'(?:href|src)="(/[^"#]+)', tag)]
    for address in [path, *dict.fromkeys(found)]:
        with client.stream("GET", address) as answer:
            raw = b"".join(answer.iter_raw())
        sent += len(raw)
        unpacked += len(gzip.decompress(raw)) if answer.headers.get("content-encoding") == "gzip" else len(raw)
    return sent, unpacked


def met(holds: bool) -> str:
    return "met" if holds else "MISSED"


def line(name: str, figures: Figures, base: Figures | None) -> str:
    text = f"  {name:34} {figures.rate:7.0f}/s {figures.processor_ms:8.2f} ms"
    if len(figures.times_ms):
        text += "  " + " ".join(f"{figures.quantile(share):7.1f}" for share in (0.5, 0.9, 0.99, 0.999))
    else:
        text += " " * 33
    return text + (f"   {figures.processor_ms / base.processor_ms:5.2f}" if base else "")


def report(home: Path, arguments: argparse.Namespace) -> None:
    import sqlalchemy as sa

    from papertrial.feed.schema import papers
    from papertrial.feed.store import Store

    with Store.open() as store, store.reading() as connection:
        query = sa.select(papers.c.arxiv_id).where(papers.c.arxiv_id.is_not(None), papers.c.slug.is_(None))
        ids = list(connection.execute(query.order_by(papers.c.id)).scalars())
        days = sa.select(papers.c.feed_day).where(papers.c.feed_precision == "day").distinct()
        dates = list(connection.execute(days.order_by(papers.c.feed_day.desc())).scalars())
        in_scope = connection.execute(sa.select(papers.c.slug).where(papers.c.slug.is_not(None))).scalars().all()
    kinds = Kinds(len(ids), ids, dates)
    cores, workers, seconds = arguments.cores, arguments.workers, arguments.seconds
    how = "before other work" if arguments.first else "beside other work"
    load = os.getloadavg()[0]
    print(f"load before: {load:.1f}; {len(ids):,} papers; {workers} worker(s) on cores {cores}, {how}")

    starts = []
    for _ in range(arguments.starts):
        with running(SERVE, home, cores, workers) as server:
            starts.append((server.started, server.processor_seconds()))
    wall, used = (float(np.median([start[i] for start in starts])) for i in range(2))
    print(f"start to first answer: {wall:.2f} s (median of {len(starts)}), processor {used:.2f} s; ", end="")
    print(f"goal {GOAL_START} s, {met(wall <= GOAL_START)}")

    head = "  ".join(f"{name:>6}" for name in ("p50", "p90", "p99", "p99.9"))
    print(f"\n  {'':34} {'flat out':>9} {'processor':>11}  paced at {RATE}/s, ms: {'':0}")
    print(f"  {'':34} {'':>9} {'a page':>11}  {head}   to bare")
    with running(HELLO, home, cores, path="/") as server:
        base = measure(server, kinds.front, seconds)
    print(line("bare FastAPI, one line", base, base))
    results: dict[str, Figures] = {}
    chosen = {
        "front page": kinds.front,
        "feed pages": kinds.feed,
        "paper pages, by Zipf": kinds.papers,
        "paper pages, never seen": kinds.new_papers,
        "half feed, half papers": kinds.mixed,
    }
    with running(SERVE, home, cores, workers) as server:
        asyncio.run(flat_out(server, kinds.feed(), 2))  # a service that runs, not one that just began
        for name, paths in chosen.items():
            results[name] = measure(server, paths, seconds)
            print(line(name, results[name], base), flush=True)
        sizes = {path: first_load(server, path) for path in ("/", "/trending", f"/papers/{ids[0]}")}
        largest = {f"/papers/{slug}": first_load(server, f"/papers/{slug}") for slug in in_scope}
        sizes |= dict(sorted(largest.items(), key=lambda item: item[1])[-1:])  # of those with a trial
        print(f"  memory of the service: {server.memory_mib():.0f} MiB")
    with running(UNCACHED + SERVE, home, cores, workers) as server:
        for name in ("front page", "half feed, half papers"):
            plain = measure(server, chosen[name], seconds / 2, rate=0)
            print(line(f"{name}, caches off", plain, base), end="")
            print(f"   (ours {plain.processor_ms / results[name].processor_ms:.1f} times as quick)")
    print("\nfirst load, bytes sent (unpacked):")
    for path, (sent, unpacked) in sizes.items():
        print(f"  {path:34} {sent:9,} ({unpacked:,})  goal {GOAL_BYTES:,}, {met(sent < GOAL_BYTES)}")
    print()
    for name in ("feed pages", "paper pages, by Zipf", "half feed, half papers"):
        found = results[name]
        print(f"{name}: {found.rate:.0f}/s, goal {GOAL_RATE}, {met(found.rate >= GOAL_RATE)}; "
              f"p99 {found.quantile(0.99):.1f} ms, goal {GOAL_MS:.0f} ms, {met(found.quantile(0.99) <= GOAL_MS)}; "
              f"by processor time {1000 / found.processor_ms:.0f}/s a core")  # fmt: skip
    print(f"load after: {os.getloadavg()[0]:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, help="where the catalogue is kept for the next time")
    parser.add_argument("--papers", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20.0, help="how long each kind of page is asked for, each way")
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--first", action="store_true", help="before all other work on the machine (for its owner)")
    parser.add_argument("--cores", default="0,1", help="the server's processors, as taskset takes them")
    arguments = parser.parse_args()
    others = set(range(os.cpu_count() or 1)) - {int(core) for core in arguments.cores.split(",")}
    if others and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, others)
    if arguments.first:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(5))
    with contextlib.ExitStack() as stack:
        home = arguments.home or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        home.mkdir(parents=True, exist_ok=True)
        os.environ["PAPERTRIAL_HOME"] = str(home)
        print(machine("fastapi", "starlette", "uvicorn", "sqlalchemy", "jinja2"))
        if not (home / "made").exists():
            make_catalogue(home, arguments.papers)
            (home / "made").touch()
        report(home, arguments)


if __name__ == "__main__":
    main()
