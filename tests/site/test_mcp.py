"""The tools over both transports, driven by the official SDK's own client."""

import json
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from mcp import ClientSession, StdioServerParameters
from mcp.client.stdio import stdio_client
from mcp.client.streamable_http import streamablehttp_client

from papertrial.feed.ingest import ingest_scope
from papertrial.feed.store import Store
from papertrial.site.background import give_lease_back, take_lease
from papertrial.site.context import Context
from papertrial.site.errors import Problem
from papertrial.site.limits import Limiter
from papertrial.site.mcp import answers, smoke
from papertrial.site.people import accounts, tokens
from papertrial.site.settings import Settings
from site_service import Server, Site, records, start_server

# The newer name of the HTTP client is not in every version of the SDK that the project allows.
pytestmark = pytest.mark.filterwarnings("ignore:Use `streamable_http_client`:DeprecationWarning")

ON_TRIAL = "contrastive_search"
NOT_ON_TRIAL_HERE = "2601.00003"


@asynccontextmanager
async def over_stdio(home: Path) -> AsyncIterator[ClientSession]:
    environment = {**os.environ, "PAPERTRIAL_HOME": str(home), "PAPERTRIAL_ENCODER": "false", "OMP_NUM_THREADS": "1"}
    command = StdioServerParameters(
        command=sys.executable, args=["-m", "papertrial", "mcp"], env=environment, cwd=str(home)
    )
    with (home / "stderr").open("w") as log:
        async with stdio_client(command, errlog=log) as (read, write), ClientSession(read, write) as session:
            await session.initialize()
            yield session


@asynccontextmanager
async def over_http(url: str, token: str | None = None) -> AsyncIterator[ClientSession]:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    async with (
        streamablehttp_client(f"{url}/mcp", headers=headers) as (read, write, _),
        ClientSession(read, write) as session,
    ):
        await session.initialize()
        yield session


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("home")
    with Store.open(f"sqlite:///{home / 'papertrial.db'}") as store:
        store.upsert(records())
        ingest_scope(store)
    started = start_server(home)
    _wait_until_indexed(started.url)
    yield started
    started.stop()


def _wait_until_indexed(url: str) -> None:
    import time

    for _ in range(600):
        if httpx.get(f"{url}/health").json()["index_behind"] == 0:
            return
        time.sleep(0.1)
    raise TimeoutError("the index is not made")


def token_of(home: Path, scope: Any, name: str = "m") -> str:
    with Store.open(f"sqlite:///{home / 'papertrial.db'}") as store:
        link = accounts.make_sign_in_link(store, f"{name}@example.org", minutes=5, unlimited=True)
        return tokens.make_token(store, accounts.sign_in(store, link, days=1).reader, "mcp", scope)[0]


async def tried(session: ClientSession) -> dict[str, Any]:
    """What the reading tools answer, whatever the transport."""
    listed = {tool.name: tool for tool in (await session.list_tools()).tools}
    found = await session.call_tool("search", {"query": "contrastive search", "limit": 3, "in_scope": True})
    paper = await session.call_tool("paper", {"paper": ON_TRIAL})
    evidence = await session.call_tool("evidence", {"paper": ON_TRIAL, "scale": "small"})
    everything = await session.call_tool("evidence", {"paper": ON_TRIAL, "scale": "small", "metrics": "all"})
    wrong = {
        "metrics": await session.call_tool("evidence", {"paper": ON_TRIAL, "metrics": "some"}),
        "limit": await session.call_tool("search", {"query": "x", "limit": 1000}),
        "query": await session.call_tool("search", {"query": "x" * 251}),
        "family": await session.call_tool("search", {"query": "x", "family": "nonsense"}),
        "since": await session.call_tool("search", {"query": "x", "since": "yesterday"}),
        "paper": await session.call_tool("paper", {"paper": "9999.99999"}),
        "scale": await session.call_tool("evidence", {"paper": ON_TRIAL, "scale": "smoke"}),
        "missing": await session.call_tool("paper", {}),
    }
    return {
        "tools": listed,
        "search": found,
        "paper": paper,
        "evidence": evidence,
        "everything": everything,
        "wrong": wrong,
    }


def check(seen: dict[str, Any]) -> None:
    assert set(seen["tools"]) == {"search", "paper", "evidence", "run_smoke"}
    for tool in seen["tools"].values():
        assert tool.description
        assert tool.outputSchema
        assert tool.annotations.readOnlyHint == (tool.name != "run_smoke")
    assert seen["tools"]["search"].inputSchema["properties"]["limit"]["maximum"] == 50
    assert set(seen["tools"]["run_smoke"].inputSchema["properties"]) == {"paper"}

    first = seen["search"].structuredContent["papers"][0]
    assert first["slug"] == ON_TRIAL
    assert first["verdict"] in ("upheld", "contradicted", "undecided")
    assert first["scale"] == "small"
    assert json.loads(seen["search"].content[0].text) == seen["search"].structuredContent

    paper = seen["paper"].structuredContent
    assert paper["markdown"].startswith("# ")
    assert "## On trial" in paper["markdown"]
    assert paper["method"].endswith(f".{ON_TRIAL}.method")

    evidence = seen["evidence"].structuredContent
    assert evidence["slug"] == ON_TRIAL
    assert evidence["claims"][0]["verdict"] == first["verdict"]
    (recorded,) = evidence["recorded"]
    claim = evidence["claims"][0]
    values = recorded["arms"][claim["method"]][claim["metric"]]["values"]
    assert len(values) >= 3
    assert "papertrial run" in recorded["command"]
    claimed = {claim["metric"] for claim in evidence["claims"]}
    assert {metric for measured in recorded["arms"].values() for metric in measured} <= claimed
    (text,) = seen["evidence"].content
    assert text.text.startswith(f"# {evidence['title']}")
    assert f"**{claim['verdict']}** at small" in text.text
    assert len(text.text) < 8_000

    (every,) = seen["everything"].structuredContent["recorded"]
    assert {metric for measured in every["arms"].values() for metric in measured} == claimed | set(evidence["left_out"])
    assert seen["everything"].structuredContent["left_out"] == []

    for name, answer in seen["wrong"].items():
        assert answer.isError, name
        text = answer.content[0].text
        assert (name if name != "missing" else "paper") in text
        assert "Traceback" not in text


def test_evidence_stays_small_whatever_was_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both forms of every answer together: a model has to read it."""
    monkeypatch.setenv("PAPERTRIAL_HOME", str(tmp_path))
    settings = Settings(encoder=False)
    with Store.open() as store:
        here = Context(settings, store, Limiter(settings))
        sizes = {}
        for entry in here.board.snapshot:
            told = answers.evidence(here, entry.card.slug, None)
            size = len(told.model_dump_json()) + len(answers.evidence_markdown(told))
            sizes[entry.card.slug] = size
    assert max(sizes.values()) < 32_000, sorted(sizes.items(), key=lambda item: -item[1])[:5]


def test_a_client_reads_over_standard_input_and_output(tmp_path: Path) -> None:
    async def main() -> None:
        async with over_stdio(tmp_path) as session:
            check(await tried(session))

    anyio.run(main)
    assert "rror" not in (tmp_path / "stderr").read_text()


def test_a_client_reads_over_http(server: Server) -> None:
    async def main() -> None:
        async with over_http(server.url) as session:
            check(await tried(session))

    anyio.run(main)


def test_many_clients_at_once_each_get_their_own_answer(server: Server) -> None:
    names = [record.arxiv_id for record in records() if record.arxiv_id]
    got: dict[str, str] = {}

    async def ask(name: str) -> None:
        async with over_http(server.url) as session:
            answer = await session.call_tool("paper", {"paper": name})
            got[name] = answer.structuredContent["id"]  # type: ignore[index]

    async def main() -> None:
        async with anyio.create_task_group() as group:
            for name in names:
                group.start_soon(ask, name)

    anyio.run(main)
    assert got == {name: name for name in names}


def test_a_smoke_run_over_http_needs_a_token_that_may_write(server: Server) -> None:
    seen = {}

    async def ask(who: str, token: str | None) -> None:
        async with over_http(server.url, token) as session:
            seen[who] = await session.call_tool("run_smoke", {"paper": NOT_ON_TRIAL_HERE})

    async def main() -> None:
        await ask("nobody", None)
        await ask("reader", token_of(server.home, "read"))
        await ask("forger", "pt_" + "x" * 43)
        await ask("writer", token_of(server.home, "write"))

    anyio.run(main)
    texts = {who: answer.content[0].text for who, answer in seen.items()}
    assert all(answer.isError for answer in seen.values())
    assert "needs an API token" in texts["nobody"]
    assert "needs an API token" in texts["forger"]
    assert "read only" in texts["reader"]
    assert "not in scope" in texts["writer"]  # past the door; this paper has nothing to run


@pytest.mark.slow
def test_a_smoke_run_gives_every_arm_and_leaves_nothing_behind(server: Server, tmp_path: Path) -> None:
    token = token_of(server.home, "write")
    before = sorted(path.relative_to(server.home) for path in server.home.rglob("*.json") if "cache" not in path.parts)
    seen: list[Any] = []

    async def main() -> None:
        async with over_http(server.url, token) as session:
            seen.append(await session.call_tool("run_smoke", {"paper": ON_TRIAL}))

    anyio.run(main)
    answer = seen[0].structuredContent
    assert answer["passed"], answer["output"]
    assert answer["slug"] == ON_TRIAL
    assert len(answer["arms"]) >= 2
    assert all(found["values"] for metrics in answer["arms"].values() for found in metrics.values())
    assert "never evidence" in answer["note"]
    after = sorted(path.relative_to(server.home) for path in server.home.rglob("*.json") if "cache" not in path.parts)
    assert after == before


# -- runs that go wrong -----------------------------------------------------------------------------------------------


@pytest.fixture
def here(home: Path) -> Iterator[Context]:
    settings = Settings(encoder=False, fetch=False)
    with Store.open() as store:
        store.upsert(records())
        yield Context(settings, store, Limiter(settings))


def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str) -> None:
    """Let something else run in place of the command."""
    script = tmp_path / "stand-in"
    script.write_text(f"#!{sys.executable}\n{code}\n")
    script.chmod(0o700)
    monkeypatch.setattr(smoke.sys, "executable", str(script))


def test_a_run_that_takes_too_long_is_killed_with_all_it_started(
    here: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = tmp_path / "child"
    stand_in(
        monkeypatch,
        tmp_path,
        "import subprocess, time\np = subprocess.Popen(['sleep', '300'])\n"
        f"open({str(child)!r}, 'w').write(str(p.pid))\n"
        "time.sleep(300)",
    )
    answer = anyio.run(smoke.run_smoke, here, ON_TRIAL, 3.0)
    assert not answer.passed
    assert "more than 3 seconds" in answer.output
    assert 2.5 < answer.seconds < 30
    state = Path(f"/proc/{child.read_text()}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"
    holder = "next"
    assert take_lease(here.store, "smoke", holder, 5)  # and the next one may run
    give_lease_back(here.store, "smoke", holder)


def test_a_run_that_fails_says_why(here: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, tmp_path, "import sys; sys.exit('papertrial: error: the arm has no metric')")
    answer = anyio.run(smoke.run_smoke, here, ON_TRIAL, 30.0)
    assert not answer.passed
    assert answer.arms == {}
    assert "the arm has no metric" in answer.output


def test_a_run_that_talks_without_end_is_cut(here: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(
        monkeypatch, tmp_path, "import sys\nfor _ in range(300): sys.stderr.write('x' * 10_000 + '\\n')\nsys.exit(1)"
    )
    answer = anyio.run(smoke.run_smoke, here, ON_TRIAL, 30.0)
    assert not answer.passed
    assert len(answer.output) <= 2_000


def test_a_run_sees_none_of_the_services_settings(
    here: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAPERTRIAL_SMTP_URL", "smtps://user:secret@mail.example")
    stand_in(
        monkeypatch,
        tmp_path,
        "import json, os, sys\n"
        "env = {k: v for k, v in os.environ.items() if k.startswith('PAPERTRIAL_')}\n"
        "print(json.dumps({'arms': {'env': env, 'argv': sys.argv, 'stdin': sys.stdin.read()}}))",
    )
    answer = anyio.run(smoke.run_smoke, here, ON_TRIAL, 30.0)
    assert answer.passed
    assert list(answer.arms["env"]) == ["PAPERTRIAL_HOME"]
    assert answer.arms["env"]["PAPERTRIAL_HOME"] != os.environ["PAPERTRIAL_HOME"]
    assert answer.arms["stdin"] == ""
    assert not Path(answer.arms["env"]["PAPERTRIAL_HOME"]).exists()


def test_two_runs_at_once_are_refused(here: Context) -> None:
    assert take_lease(here.store, "smoke", "somebody", 60)

    async def main() -> None:
        with pytest.raises(Problem) as refused:
            await smoke.run_smoke(here, ON_TRIAL)
        assert refused.value.status == 409

    anyio.run(main)


def test_a_paper_that_is_not_on_trial_cannot_be_run(here: Context) -> None:
    waiting = next(entry for entry in here.board.snapshot if not entry.card.on_trial)

    async def main() -> None:
        for name in (waiting.card.slug, NOT_ON_TRIAL_HERE, "../../etc", "x" * 80):
            with pytest.raises(Problem) as refused:
                await smoke.run_smoke(here, name)
            assert refused.value.status == 404

    anyio.run(main)


# -- the address itself -----------------------------------------------------------------------------------------------

GREETING = {
    "jsonrpc": "2.0",
    "id": 1,
    "method": "initialize",
    "params": {
        "protocolVersion": "2025-06-18",
        "capabilities": {},
        "clientInfo": {"name": "test", "version": "0"},
    },
}
ACCEPTS = {"Accept": "application/json, text/event-stream"}


def test_only_posts_of_programs_and_of_our_own_pages_are_answered(site: Site) -> None:
    client = site.client
    assert client.post("/mcp", json=GREETING, headers=ACCEPTS).json()["result"]["serverInfo"]["name"] == "papertrial"
    assert client.get("/mcp").status_code == 405
    assert client.get("/mcp").json()["error"]
    assert client.delete("/mcp").status_code == 405
    for origin in ("https://evil.example", "null", "http://testserver.evil.example"):
        refused = client.post("/mcp", json=GREETING, headers={**ACCEPTS, "Origin": origin, "Host": "evil.example"})
        assert refused.status_code == 403
    own = {**ACCEPTS, "Origin": "http://testserver"}
    assert client.post("/mcp", json=GREETING, headers=own).status_code == 200


def test_what_is_no_message_of_the_protocol_is_refused(site: Site) -> None:
    for body in (b"", b"{", b"[]", b"null", b'{"jsonrpc": "2.0"}', b"\xff", b"[" * 10_000, b'{"a":' * 3_000):
        answer = site.client.post("/mcp", content=body, headers={**ACCEPTS, "Content-Type": "application/json"})
        assert 400 <= answer.status_code < 500, body[:20]
    large = b'{"a":"' + b"x" * 1_100_000 + b'"}'
    answer = site.client.post("/mcp", content=large, headers={**ACCEPTS, "Content-Type": "application/json"})
    assert answer.status_code == 413


def test_calls_count_against_the_quota_of_the_api(make_site: Callable[..., Site]) -> None:
    site = make_site(api_quota=3)
    answers = [site.client.post("/mcp", json=GREETING, headers=ACCEPTS).status_code for _ in range(5)]
    assert answers == [200, 200, 200, 429, 429]


def test_an_administrator_can_switch_runs_off(make_site: Callable[..., Site]) -> None:
    site = make_site(smoke_runs=False)
    call = {
        "jsonrpc": "2.0",
        "id": 2,
        "method": "tools/call",
        "params": {"name": "run_smoke", "arguments": {"paper": ON_TRIAL}},
    }
    answer = site.client.post("/mcp", json=call, headers=ACCEPTS).json()
    assert answer["result"]["isError"]
    assert "switched off" in answer["result"]["content"][0]["text"]
