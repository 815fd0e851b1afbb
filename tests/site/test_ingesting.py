"""New papers on a schedule: what is due is fetched, recorded and shown; failures come again and hold nothing up."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from papertrial.errors import PapertrialError
from papertrial.feed.http import utc_today
from papertrial.feed.runs import recent_runs
from papertrial.feed.store import Store
from papertrial.site import ingesting
from papertrial.site.background import Job, Jobs, last_done
from papertrial.site.context import Context
from papertrial.site.limits import Limiter
from papertrial.site.settings import Settings
from site_service import Site


class Source:
    """Stands for Hugging Face and arXiv, on loopback; keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.status = 200
        source = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                parts = urlsplit(self.path)
                parameters = {name: values[0] for name, values in parse_qs(parts.query).items()}
                source.asked.append((parts.path, parameters))
                body = source.answer(parts.path, parameters) if source.status == 200 else b"no"
                self.send_response(source.status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, path: str, parameters: dict[str, str]) -> bytes:
        if path == "/api/daily_papers":
            day = parameters["date"]
            paper = {"id": f"2501.{int(day[-2:]):05d}", "title": f"A paper of {day}", "publishedAt": f"{day}T00:00:00Z"}
            return json.dumps([{"paper": paper, "publishedAt": f"{day}T00:00:00Z", "title": paper["title"]}]).encode()
        return (
            b'<?xml version="1.0"?><feed xmlns="http://www.w3.org/2005/Atom" '
            b'xmlns:opensearch="http://a9.com/-/spec/opensearch/1.1/">'
            b"<opensearch:totalResults>1</opensearch:totalResults><entry>"
            b"<id>http://arxiv.org/abs/2502.00001v1</id><title>From arXiv</title><summary>Short.</summary>"
            b"<published>2025-02-01T00:00:00Z</published><updated>2025-02-01T00:00:00Z</updated>"
            b'<author><name>A B</name></author><category term="cs.CL"/></entry></feed>'
        )


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> Iterator[Source]:
    made = Source()
    monkeypatch.setenv("PAPERTRIAL_HUGGINGFACE", made.url)
    monkeypatch.setenv("PAPERTRIAL_ARXIV_API", f"{made.url}/api/query")
    monkeypatch.setattr("papertrial.feed.fetch_huggingface.INTERVAL_SECONDS", 0.0)
    monkeypatch.setattr("papertrial.feed.fetch_arxiv.INTERVAL_SECONDS", 0.0)
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def here(home: Path) -> Iterator[Context]:
    settings = Settings(ingest=True, categories=("cs.CL",), encoder=False)
    with Store.open() as store:
        yield Context(settings, store, Limiter(settings))


def test_the_first_fetch_goes_back_some_days_and_the_next_goes_on(here: Context, source: Source) -> None:
    ingesting.fetch_from_huggingface(here.store)
    days = [date.fromisoformat(asked["date"]) for _, asked in source.asked]
    assert min(days) == utc_today() - timedelta(days=ingesting.FIRST_DAYS["huggingface"])
    assert max(days) == utc_today()
    source.asked.clear()
    ingesting.fetch_from_huggingface(here.store)
    again = [date.fromisoformat(asked["date"]) for _, asked in source.asked]
    assert min(days) < min(again) < utc_today()  # votes of the last days are fetched again
    assert here.store.count() == len(set(days))


def test_arxiv_is_asked_for_the_categories_of_the_settings(here: Context, source: Source) -> None:
    ingesting.fetch_from_arxiv(here.store, ("cs.LG", "cs.CL"))
    ((_, asked),) = source.asked
    assert "cat:cs.CL OR cat:cs.LG" in asked["search_query"]
    first = utc_today() - timedelta(days=ingesting.FIRST_DAYS["arxiv"])
    assert f"submittedDate:[{first:%Y%m%d}0000" in asked["search_query"]
    assert here.store.find("2502.00001") is not None


def test_nothing_is_fetched_unless_it_is_asked_for(home: Path) -> None:
    with Store.open() as store:
        for settings, names in (
            (Settings(), []),
            (Settings(ingest=True), ["ingest huggingface", "ingest arxiv"]),
            (Settings(ingest=True, categories=()), ["ingest huggingface"]),
        ):
            assert [job.name for job in ingesting.jobs(Context(settings, store, Limiter(settings)))] == names


def test_the_service_fetches_by_itself_and_shows_the_runs(
    make_site: Callable[..., Site], source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingesting, "AFTER", 0.0)
    site = make_site(ingest=True, categories=("cs.CL",))
    runs = _until(lambda: _finished(site), lambda found: len(found) >= 2)
    assert {run["source"].split(" ")[0] for run in runs} == {"huggingface", "arxiv:cs.CL"}
    assert all(run["error"] is None and run["added"] for run in runs)
    assert site.client.get("/api/papers/2502.00001").status_code == 200
    planned = {one.name: one for one in _until(lambda: ingesting.schedule(site.context), _all_done)}
    assert set(planned) == {"huggingface", "arxiv"}
    for one in planned.values():
        assert one.last is not None
        assert one.following == one.last + timedelta(seconds=one.every)
    shown = site.client.get("/api/ingest-schedule").json()
    assert {row["source"] for row in shown} == {"huggingface", "arxiv"}
    assert all(datetime.fromisoformat(row["next"]) > datetime.now(UTC) for row in shown)
    count = len(source.asked)
    make_site(ingest=True, categories=("cs.CL",))
    time.sleep(0.5)
    assert len(source.asked) == count  # a service that starts again does not ask before the time


def _finished(site: Site) -> list[dict[str, Any]]:
    found = site.client.get("/api/ingest-runs").json()
    return [run for run in found if run["source"] != "scope" and run["finished"]]


def _all_done(found: list[ingesting.Source]) -> bool:
    return all(one.last is not None for one in found)


def _until(ask: Callable[[], Any], good: Callable[[Any], bool], seconds: float = 30.0) -> Any:
    end = time.monotonic() + seconds
    while not good(found := ask()):
        assert time.monotonic() < end, found
        time.sleep(0.05)
    return found


def test_a_source_that_fails_is_recorded_and_nothing_else_waits_for_it(
    make_site: Callable[..., Site], source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingesting, "AFTER", 0.0)
    source.status = 403
    site = make_site(ingest=True, categories=("cs.CL",))
    runs = _until(lambda: _finished(site), lambda found: len(found) >= 2)
    assert all("403" in run["error"] for run in runs)
    assert all(one.last is None and one.following is None for one in ingesting.schedule(site.context))
    administrator = site.sign_in("admin@localhost")
    page = administrator.client.get("/admin").text
    assert "answered 403" in page
    assert "huggingface: not fetched without an error yet" in page
    assert site.client.get("/").status_code == 200


# -- jobs -------------------------------------------------------------------------------------------------------------


def test_a_slow_job_apart_keeps_the_others_running(here: Context) -> None:
    done, release = threading.Event(), threading.Event()
    ticks: list[float] = []
    slow = Job("slow", 60.0, lambda: (done.set(), release.wait(20)), apart=True)
    quick = Job("quick", 0.05, lambda: ticks.append(time.monotonic()), everywhere=True)
    jobs = Jobs(here.store, [slow, quick])
    jobs.start()
    try:
        assert done.wait(10)
        _until(lambda: len(ticks), lambda count: count >= 5)
    finally:
        release.set()
        jobs.stop()
    assert last_done(here.store, "slow") is not None


def test_a_job_that_fails_comes_again_sooner_and_one_that_is_done_does_not(here: Context) -> None:
    tried: dict[str, int] = {"bad": 0, "broken": 0, "good": 0}

    def fail(name: str, error: Exception) -> None:
        tried[name] += 1
        if tried[name] < 3:
            raise error

    def good() -> None:
        tried["good"] += 1

    jobs = Jobs(
        here.store,
        [
            Job("bad", 1000.0, lambda: fail("bad", PapertrialError("no")), retry=0.05),
            Job("broken", 1000.0, lambda: fail("broken", RuntimeError("a bug")), retry=0.05, apart=True),
            Job("good", 1000.0, good, retry=0.05),
        ],
    )
    jobs.start()
    _until(lambda: dict(tried), lambda found: found["bad"] == 3 and found["broken"] == 3)
    time.sleep(0.3)
    jobs.stop()
    assert tried == {"bad": 3, "broken": 3, "good": 1}


def test_two_workers_do_a_job_once(here: Context) -> None:
    done: list[str] = []
    workers = [Jobs(here.store, [Job("once", 1000.0, lambda: done.append("x"))]) for _ in range(3)]
    for worker in workers:
        worker.start()
    _until(lambda: list(done), bool)
    time.sleep(0.3)
    for worker in workers:
        worker.stop()
    assert done == ["x"]


def test_a_job_waits_for_its_first_turn(here: Context) -> None:
    done: list[float] = []
    jobs = Jobs(here.store, [Job("later", 1000.0, lambda: done.append(time.monotonic()), after=0.5)])
    began = time.monotonic()
    jobs.start()
    _until(lambda: list(done), bool)
    jobs.stop()
    assert done[0] - began >= 0.5


def test_every_run_is_kept_with_what_it_did(here: Context, source: Source) -> None:
    ingesting.fetch_from_huggingface(here.store)
    (run,) = recent_runs(here.store)
    assert run.added == ingesting.FIRST_DAYS["huggingface"] + 1
    assert run.finished is not None
    assert run.error is None
