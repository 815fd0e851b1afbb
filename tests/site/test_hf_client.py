"""The installed Hugging Face client and its command line, unmodified, against the service on loopback."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import httpx
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import BadRequestError, HfHubHTTPError
from huggingface_hub.utils import parse_ratelimit_headers

from papertrial.feed.store import Store
from papertrial.site.listing import period_of
from papertrial.site.people import accounts, submissions, tokens
from site_service import TODAY, Server, records, start_server

WEEK = period_of(TODAY, "week")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("home")
    with Store.open(f"sqlite:///{home / 'papertrial.db'}") as store:
        store.upsert(records())
    running = start_server(home)
    end = 200
    while httpx.get(f"{running.url}/health").json()["index_behind"] and (end := end - 1):
        import time

        time.sleep(0.1)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def store(server: Server) -> Iterator[Store]:
    with Store.open(f"sqlite:///{server.home / 'papertrial.db'}") as opened:
        yield opened


@pytest.fixture(scope="module")
def account(store: Store) -> accounts.Reader:
    token = accounts.make_sign_in_link(store, "grace@example.org", minutes=5)
    return accounts.sign_in(store, token, days=1).reader


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest of the suite keeps the client off the network; loopback is none."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.fixture
def api(server: Server) -> HfApi:
    return HfApi(endpoint=server.url)


def hf(server: Server, *arguments: str, token: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_ENDPOINT": server.url, "HF_HOME": str(server.home / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    if token:
        environment["HF_TOKEN"] = token
    command = [str(Path(sys.executable).with_name("hf")), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def test_a_day_lists_the_papers_that_entered_it_most_votes_first(api: HfApi) -> None:
    day = TODAY - timedelta(days=1)
    found = list(api.list_daily_papers(date=day.isoformat()))
    expected = sorted((r for r in records() if r.entered == day), key=lambda r: -(r.upvotes or 0))
    assert [paper.title for paper in found] == [record.title for record in expected]


def test_the_client_reads_every_field_of_an_entry(api: HfApi) -> None:
    record = records()[1]
    paper = next(p for p in api.list_daily_papers(date=TODAY.isoformat()) if p.id == record.arxiv_id)
    assert (paper.title, paper.summary, paper.ai_summary) == (record.title, record.abstract, record.ai_summary)
    assert [author.name for author in paper.authors or []] == list(record.authors)
    assert paper.published_at is not None
    assert paper.published_at.date() == record.published
    assert paper.submitted_at is not None
    assert paper.submitted_at.date() == record.entered
    assert (paper.upvotes, paper.comments) == (1, 1)
    assert paper.ai_keywords == list(record.keywords)
    assert (paper.github_repo, paper.project_page) == (record.code_url, record.project_url)
    assert paper.organization is not None
    assert paper.organization.fullname == record.organisation
    assert paper.source == record.source_url


def test_no_votes_are_zero_votes(api: HfApi) -> None:
    paper = next(p for p in api.list_daily_papers(date=TODAY.isoformat()) if p.id == "2601.00000")
    assert paper.upvotes == 0


@pytest.mark.parametrize(("name", "value"), [("week", WEEK), ("month", f"{TODAY:%Y-%m}")])
def test_week_and_month_hold_their_days(api: HfApi, name: str, value: str) -> None:
    inside = {r.title for r in records() if r.entered and value in (period_of(r.entered, "week"), f"{r.entered:%Y-%m}")}
    found = {paper.title for paper in api.list_daily_papers(**{name: value}, limit=100)}
    assert inside
    assert inside <= found


def test_pages_follow_each_other_without_gap_or_overlap(api: HfApi) -> None:
    whole = [p.id for p in api.list_daily_papers(limit=60)]
    pieces = [p.id for n in range(20) for p in api.list_daily_papers(limit=3, p=n)]
    assert len(set(whole)) == 60
    assert pieces == whole


def test_trending_is_ordered_by_heat(api: HfApi, store: Store) -> None:
    found = [p.id for p in api.list_daily_papers(sort="trending", limit=100)]
    heats = [paper.heat for name in found if (paper := store.find(name)) is not None]
    assert len(heats) == len(found) == 100
    assert heats == sorted(heats, reverse=True)


def test_search_finds_by_words_and_by_id(api: HfApi) -> None:
    assert next(iter(api.list_papers(query="speculative decoding case"))).id == "2601.00001"
    assert [p.id for p in api.list_papers(query="2601.00003")] == ["2601.00003"]
    assert len(list(api.list_papers(query="language model attention", limit=7))) == 7
    assert len(list(api.list_papers(limit=5))) == 5


def test_a_paper_is_read_flat(api: HfApi) -> None:
    record = records()[2]
    paper = api.paper_info(id="2601.00002")
    assert (paper.id, paper.title, paper.summary) == ("2601.00002", record.title, record.abstract)
    assert (paper.upvotes, paper.comments) == (2, 0)
    assert paper.linked_models == []
    assert paper.organization is not None


def test_a_paper_in_scope_brings_its_claim_and_our_summary(api: HfApi) -> None:
    paper = api.paper_info(id="2210.14140")
    ours = paper.papertrial  # type: ignore[attr-defined]
    assert ours["slug"] == "contrastive_search"
    assert "contrastive search" in ours["claim"]
    assert {"verdict", "scale"} <= set(ours)


def test_a_paper_is_read_as_markdown(api: HfApi) -> None:
    text = api.read_paper(id="2210.14140")
    assert text.startswith("# Contrastive Search Is What You Need")
    assert "## On trial" in text


def test_what_is_unknown_is_404_and_what_is_wrong_is_400(api: HfApi) -> None:
    with pytest.raises(HfHubHTTPError) as unknown:
        api.paper_info(id="2601.99999")
    assert unknown.value.response.status_code == 404
    assert "2601.99999" in str(unknown.value)
    with pytest.raises(BadRequestError, match="date"):
        list(api.list_daily_papers(date="yesterday"))
    with pytest.raises(BadRequestError, match="limit"):
        list(api.list_daily_papers(limit=1000))
    with pytest.raises(BadRequestError, match="week"):
        list(api.list_daily_papers(week="2026-W60"))


def test_the_submitter_is_shown_and_filters(api: HfApi, store: Store, account: accounts.Reader) -> None:
    submissions.submit(store, account, "https://arxiv.org/abs/2601.00004v2", today=TODAY)
    import time

    time.sleep(2.1)  # lists may be two seconds old
    found = list(api.list_daily_papers(submitter=account.name))
    assert [p.id for p in found] == ["2601.00004"]
    assert found[0].submitted_by is not None
    assert found[0].submitted_by.username == account.name
    assert list(api.list_daily_papers(submitter="nobody")) == []


def test_a_token_of_ours_is_known_and_another_is_not(server: Server, store: Store, account: accounts.Reader) -> None:
    token, _ = tokens.make_token(store, account, "laptop", "read")
    assert HfApi(endpoint=server.url, token=token).whoami()["name"] == account.name
    # A token of the Hub itself that happens to be set does not keep anybody from reading.
    assert list(HfApi(endpoint=server.url, token="hf_" + "x" * 34).list_daily_papers(limit=1))
    with pytest.raises(HfHubHTTPError):
        HfApi(endpoint=server.url, token="hf_" + "x" * 34).whoami()


def test_the_client_parses_our_rate_limits(server: Server) -> None:
    answer = httpx.get(f"{server.url}/api/daily_papers", params={"limit": 1})
    parsed = parse_ratelimit_headers(answer.headers)
    assert parsed is not None
    assert parsed.resource_type == "api"
    assert 0 <= parsed.remaining < 1000
    assert parsed.limit == 1000
    assert 0 < parsed.reset_in_seconds <= 301


def test_a_client_beyond_its_quota_is_told_when_to_go_on(tmp_path: Path) -> None:
    running = start_server(tmp_path, api_quota=3)
    try:
        api = HfApi(endpoint=running.url)
        for _ in range(3):
            api.paper_info(id="2210.14140")
        with pytest.raises(HfHubHTTPError) as refused:
            api.paper_info(id="2210.14140")
    finally:
        running.stop()
    assert refused.value.response.status_code == 429
    assert int(refused.value.response.headers["Retry-After"]) > 0
    assert "3" in str(refused.value)


# -- the command line -------------------------------------------------------------------------------------------------


def test_hf_papers_ls(server: Server) -> None:
    shown = hf(server, "papers", "ls", "--date", TODAY.isoformat(), "--format", "json")
    assert shown.returncode == 0, shown.stderr
    assert {item["id"] for item in json.loads(shown.stdout)} == {"2601.00000", "2601.00001"}


def test_hf_papers_ls_trending(server: Server) -> None:
    shown = hf(server, "papers", "ls", "--sort", "trending", "--limit", "5")
    assert shown.returncode == 0, shown.stderr
    assert "Paper number" in shown.stdout


def test_hf_papers_search(server: Server) -> None:
    shown = hf(server, "papers", "search", "tokenizer transfer", "--format", "json")
    assert shown.returncode == 0, shown.stderr
    assert "2601.00002" in {item["id"] for item in json.loads(shown.stdout)}


def test_hf_papers_info_and_read(server: Server) -> None:
    info = hf(server, "papers", "info", "2601.00005")
    assert info.returncode == 0, info.stderr
    assert "pruning" in info.stdout
    read = hf(server, "papers", "read", "2601.00005")
    assert read.returncode == 0, read.stderr
    assert read.stdout.startswith("# Paper number 5")
    missing = hf(server, "papers", "info", "2601.99999")
    assert missing.returncode != 0
    assert "not found" in missing.stderr


def test_hf_auth_whoami(server: Server, store: Store, account: accounts.Reader) -> None:
    token, _ = tokens.make_token(store, account, "cli", "read")
    shown = hf(server, "auth", "whoami", token=token)
    assert shown.returncode == 0, shown.stderr
    assert account.name in shown.stdout
