"""The fetchers against a server on the loopback interface that speaks the services' formats, well and badly."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import date, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest

import feed_documents as documents
from papertrial.errors import PapertrialError, UsageError
from papertrial.feed import fetch_arxiv as arxiv
from papertrial.feed import fetch_huggingface as huggingface
from papertrial.feed.http import PoliteClient
from papertrial.feed.runs import recent_runs
from papertrial.feed.store import Store

DAY = date(2025, 10, 1)


class Service:
    """Answers from a function of (path, parameters), after the answers that a test put in front."""

    def __init__(self, answer):
        self.answer, self.queue, self.requests = answer, [], []
        service = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                parts = urlsplit(self.path)
                parameters = {name: values[0] for name, values in parse_qs(parts.query).items()}
                service.requests.append((parts.path, parameters, dict(self.headers)))
                reply = service.queue.pop(0) if service.queue else None
                status, headers, body, length = reply or (200, {}, service.answer(parts.path, parameters), None)
                if status == "drop":
                    self.close_connection = True
                    return
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body) if length is None else length))
                self.end_headers()
                self.wfile.write(body)
                if length is not None:
                    self.close_connection = True

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def first(self, status, *, headers=None, body=b"", length=None):
        self.queue.append((status, headers or {}, body, length))

    def close(self):
        self.server.shutdown()
        self.server.server_close()


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self):
        self.now, self.slept = 1_750_000_000.0, []

    def time(self):
        return self.now

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPERTRIAL_HOME", str(tmp_path))
    with Store.open() as opened:
        yield opened


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def client(clock):
    return PoliteClient("arxiv", 3.0, attempts=3, sleep=clock.sleep, clock=clock.time, timeout=5.0)


FIRST_PAGE = {"search_query": "[202510010000 TO 202510062359]", "start": "0", "max_results": "25"}
PAPERS = [(n, DAY + timedelta(days=n // 10)) for n in range(60)]


def answer_api(_path, parameters):
    """60 papers over 6 days."""
    span = parameters["search_query"].split("[")[1].rstrip("]").split(" TO ")
    first, last = (date(int(t[:4]), int(t[4:6]), int(t[6:8])) for t in span)
    start, size = int(parameters["start"]), int(parameters["max_results"])
    found = [(n, day) for n, day in PAPERS if first <= day <= last]
    entries = [documents.api_entry(n, day=str(day)) for n, day in found[start : start + size]]
    return documents.api_feed(*entries, total=len(found), start=start)


@pytest.fixture
def api(monkeypatch):
    service = Service(answer_api)
    monkeypatch.setenv("PAPERTRIAL_ARXIV_API", service.url + "/api/query")
    yield service
    service.close()


def fetch(store, client, **changes):
    settings = {"since": DAY, "until": DAY + timedelta(days=5), "categories": ["cs.LG", "cs.CL"], "page_size": 25}
    return arxiv.fetch_arxiv(store, client=client, **(settings | changes))


def test_api_is_read_page_by_page_one_request_in_three_seconds(store, client, clock, api):
    report = fetch(store, client)
    assert (report.added, report.problems) == (60, [])
    assert store.count() == 60
    assert [int(p["start"]) for _, p, _ in api.requests] == [0, 25, 50]
    assert clock.slept == pytest.approx([3.0, 3.0])
    assert all(headers["User-Agent"].startswith("papertrial/") for _, _, headers in api.requests)
    assert api.requests[0][1]["search_query"].startswith("(cat:cs.CL OR cat:cs.LG) AND submittedDate:[202510010000")
    assert fetch(store, client).unchanged == 60
    assert recent_runs(store)[0].unchanged == 60


def test_busy_server_is_asked_again_after_the_time_it_names(store, client, clock, api):
    api.first(429, headers={"Retry-After": "17"})
    api.first(503)
    assert fetch(store, client).added == 60
    assert clock.slept[0] == 17.0
    assert clock.slept[1] >= 6.0


def test_server_that_stays_busy_ends_the_fetch_and_the_next_one_goes_on(store, client, api):
    api.first(200, body=answer_api("", FIRST_PAGE))
    for _ in range(3):
        api.first(503)
    with pytest.raises(PapertrialError, match="answered 503 in 3 attempts; what was fetched is stored"):
        fetch(store, client)
    assert store.count() == 25
    assert "503" in recent_runs(store)[0].error
    api.requests.clear()
    report = fetch(store, client)
    assert [int(p["start"]) for _, p, _ in api.requests] == [25, 50]
    assert (report.added, store.count()) == (35, 60)


def test_server_that_asks_for_an_hour_is_believed(store, client, clock, api):
    api.first(503, headers={"Retry-After": "3600"})
    with pytest.raises(PapertrialError, match="asks to wait 3600 seconds"):
        fetch(store, client)
    assert 3600 not in clock.slept


def test_truncated_bodies_and_lost_connections_are_fetched_again(store, client, api):
    whole = documents.api_feed(documents.api_entry(1), total=60)
    api.first(200, body=whole[:-40], length=len(whole))  # the connection ends before the announced length
    api.first(200, body=whole[:-40])  # and here the length itself is wrong
    assert fetch(store, client).added == 60
    api.first(200, headers={"Content-Encoding": "gzip"}, body=b"this is not gzip")
    api.first("drop")
    assert fetch(store, client).unchanged == 60


def test_empty_page_in_the_middle_is_asked_for_again(store, client, api):
    api.first(200, body=answer_api("", FIRST_PAGE))
    api.first(200, body=documents.api_feed(total=60, start=25))
    assert fetch(store, client).added == 60


def test_error_feed_is_a_clear_message(store, client, api):
    api.first(400, body=documents.api_feed(documents.ERROR_ENTRY))
    with pytest.raises(PapertrialError, match="arXiv refused the query: max_results must be non-negative"):
        fetch(store, client)


def test_window_with_too_many_papers_is_halved(store, client, api, monkeypatch):
    monkeypatch.setattr(arxiv, "LARGEST_WINDOW", 15)
    assert fetch(store, client).added == 60
    assert len({p["search_query"] for _, p, _ in api.requests}) > 6


def test_fetch_without_a_day_goes_on_from_the_last_one(store, client, api):
    with pytest.raises(UsageError, match="say from which day"):
        fetch(store, client, since=None)
    fetch(store, client, until=DAY + timedelta(days=2))
    assert store.count() == 30
    api.requests.clear()
    assert fetch(store, client, since=None).added == 30
    assert "[202510020000" in api.requests[0][1]["search_query"]


def test_a_patient_fetch_waits_for_the_one_that_is_under_way(store, client, api):
    """A fetch on schedule meets one of a single paper now and then."""
    with client.session():
        waiting = ThreadPoolExecutor(1).submit(fetch, store, PoliteClient("arxiv", 0.0, patience=30.0))
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.5)
    assert waiting.result(timeout=30).added > 0


def test_a_run_that_was_refused_says_why_in_words_for_people(store, client, api):
    with client.session(), pytest.raises(PapertrialError):
        fetch(store, PoliteClient("arxiv", 3.0))
    error = recent_runs(store)[0].error
    assert error.startswith("another fetch from arxiv is under way")


def test_two_fetches_at_once_are_refused(store, client, api):
    with client.session(), pytest.raises(PapertrialError, match="another fetch from arxiv is under way"):
        fetch(store, PoliteClient("arxiv", 3.0))


@pytest.mark.parametrize(
    "changes",
    [
        {"categories": []},
        {"categories": ["cs.CL OR all:x"]},
        {"page_size": 0},
        {"page_size": 9999},
        {"since": date(2026, 1, 1)},
    ],
)
def test_impossible_requests_never_reach_the_server(store, client, api, changes):
    with pytest.raises(UsageError):
        fetch(store, client, **changes)
    assert api.requests == []


def test_unreachable_server_is_one_line(store, client, monkeypatch):
    monkeypatch.setenv("PAPERTRIAL_ARXIV_API", "http://127.0.0.1:9/api")
    with pytest.raises(PapertrialError, match=r"cannot be reached at 127\.0\.0\.1"):
        fetch(store, client)


@pytest.fixture
def oai(monkeypatch):
    def answer(_path, parameters):
        token = parameters.get("resumptionToken", "")
        page = int(token.removeprefix("t")) if token else 0
        records = [documents.oai_record(10 * page + n) for n in range(10)]
        return documents.oai_reply(*records, token=f"t{page + 1}" if page < 3 else None)

    service = Service(answer)
    monkeypatch.setenv("PAPERTRIAL_ARXIV_OAI", service.url + "/oai")
    yield service
    service.close()


def test_bulk_harvest_follows_resumption_tokens(store, client, oai):
    report = arxiv.fetch_arxiv_bulk(store, DAY, client=client)
    assert (report.added, report.problems) == (40, [])
    first, *rest = [parameters for _, parameters, _ in oai.requests]
    assert first == {"verb": "ListRecords", "metadataPrefix": "arXiv", "set": "cs", "from": "2025-10-01"}
    assert rest == [{"verb": "ListRecords", "resumptionToken": f"t{n}"} for n in (1, 2, 3)]
    oai.requests.clear()
    arxiv.fetch_arxiv_bulk(store, client=client)
    assert oai.requests[0][1]["from"] >= "2025-10-01"


def test_interrupted_harvest_goes_on_with_its_token_or_begins_again_when_it_expired(store, client, oai):
    answer = oai.answer
    oai.queue += [(200, {}, answer("", {}), None), *[(503, {}, b"", None)] * 3]
    with pytest.raises(PapertrialError, match="503"):
        arxiv.fetch_arxiv_bulk(store, DAY, client=client)
    assert store.count() == 10
    oai.requests.clear()
    oai.first(200, body=documents.oai_error("badResumptionToken"))
    report = arxiv.fetch_arxiv_bulk(store, client=client)
    asked = [parameters.get("resumptionToken") for _, parameters, _ in oai.requests]
    assert asked == ["t1", None, "t1", "t2", "t3"]
    assert (report.added, report.unchanged) == (30, 10)


def test_harvest_without_news_is_no_error(store, client, oai):
    oai.first(200, body=documents.oai_error("noRecordsMatch"))
    assert arxiv.fetch_arxiv_bulk(store, DAY, client=client).total == 0
    oai.first(200, body=documents.oai_error("badArgument"))
    with pytest.raises(PapertrialError, match="badArgument"):
        arxiv.fetch_arxiv_bulk(store, DAY, client=client)


def test_todays_announcements(store, client, monkeypatch):
    service = Service(lambda path, _: documents.RSS if path == "/rss/cs.CL+cs.LG" else b"")
    monkeypatch.setenv("PAPERTRIAL_ARXIV_RSS", service.url + "/rss")
    assert arxiv.fetch_arxiv_rss(store, ["cs.LG", "cs.CL"], client=client).added == 2
    service.close()
    assert [p.arxiv_id for p in store.feed("2025-10-03").papers] == ["2510.00001"]


@pytest.fixture
def hub(monkeypatch):
    def answer(_path, parameters):
        offset = (date.fromisoformat(parameters["date"]) - DAY).days
        page, limit = int(parameters["p"]), int(parameters["limit"])
        numbers = range(1000 * offset, 1000 * offset + (130 if offset == 1 else 3))
        return json.dumps([documents.daily_entry(n) for n in numbers[page * limit : (page + 1) * limit]]).encode()

    service = Service(answer)
    monkeypatch.setenv("PAPERTRIAL_HUGGINGFACE", service.url)
    yield service
    service.close()


def test_daily_lists_are_read_day_by_day_and_page_by_page(store, client, hub):
    report = huggingface.fetch_huggingface(store, DAY, until=DAY + timedelta(days=2), client=client)
    assert (report.added, report.problems) == (136, [])
    assert [(p["date"], p["p"]) for _, p, _ in hub.requests] == [
        ("2025-10-01", "0"), ("2025-10-02", "0"), ("2025-10-02", "1"), ("2025-10-03", "0"),
    ]  # fmt: skip
    # The list's day is the feed day, whatever the entries say.
    assert store.count_of("2025-10-02") == 130
    hub.requests.clear()
    report = huggingface.fetch_huggingface(store, until=DAY + timedelta(days=3), client=client)
    assert hub.requests[0][1]["date"] == "2025-09-30"
    assert report.added > 0


def test_refusal_of_the_hub_is_one_line_and_earlier_days_stay(store, client, hub):
    answer = hub.answer
    hub.queue += [(200, {}, answer("", {"date": "2025-10-01", "p": "0", "limit": "100"}), None), (403, {}, b"{}", None)]
    with pytest.raises(PapertrialError, match="answered 403 to the list of 2025-10-02"):
        huggingface.fetch_huggingface(store, DAY, until=DAY + timedelta(days=2), client=client)
    assert store.count() == 3


def test_cut_list_keeps_what_is_whole_after_the_last_attempt(store, client, hub):
    cut = documents.daily_json(3)[:-120]
    hub.queue += [(200, {}, cut, None)] * 3
    report = huggingface.fetch_huggingface(store, DAY, until=DAY, client=client)
    assert report.added == 2
    assert report.problems
