"""The OpenAPI description: served at both addresses, and no request made from it makes the service fail."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import schemathesis
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings

from papertrial.feed.store import Store
from papertrial.site.app import create_app
from papertrial.site.people import accounts, tokens
from papertrial.site.settings import Settings
from site_service import records

_QUOTAS = dict.fromkeys(("api_quota", "api_quota_signed_in", "page_quota", "page_quota_signed_in"), 0)


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FastAPI]:
    home = tmp_path_factory.mktemp("home")
    patch = pytest.MonkeyPatch()
    patch.setenv("PAPERTRIAL_HOME", str(home))
    with Store.open() as store:
        store.upsert(records())
    made = create_app(Settings.model_validate({"encoder": False, "fetch": False, **_QUOTAS}))
    with TestClient(made):
        yield made
    patch.undo()


@pytest.fixture(scope="module")
def bearer(app: FastAPI) -> dict[str, str]:
    """A token that may write, so that requests get past the door."""
    store = app.state.context.store
    reader = accounts.sign_in(store, accounts.make_sign_in_link(store, "f@example.org", minutes=5), days=1).reader
    return {"Authorization": f"Bearer {tokens.make_token(store, reader, 'fuzz', 'write')[0]}"}


@pytest.fixture(autouse=True)
def same_home(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole module works on one home folder."""
    monkeypatch.setenv("PAPERTRIAL_HOME", str(Path(app.state.context.store.engine.url.database).parent))


def test_no_request_makes_the_service_fail(app: FastAPI, bearer: dict[str, str]) -> None:
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) > 40
    for operation in operations:

        @settings(
            max_examples=12, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
        )
        @given(case=operation.as_strategy())
        def answers(case: schemathesis.Case) -> None:
            answer = case.call(headers=bearer)
            said_why = answer.status_code == 503 and "FETCH is off" in answer.text
            assert answer.status_code < 500 or said_why, (case.method, case.formatted_path, answer.text)
            if answer.status_code >= 400:
                assert answer.json()["error"]

        answers()


def test_both_addresses_serve_the_same_description(app: FastAPI) -> None:
    client = TestClient(app)
    first, second = client.get("/openapi.json").json(), client.get("/.well-known/openapi.json").json()
    assert first == second
    assert first["openapi"].startswith("3.1")
    assert {"/api/daily_papers", "/api/papers/{paper_id}", "/api/claims", "/api/papers/{paper_id}/vote"} <= set(
        first["paths"]
    )
    for path, operations in first["paths"].items():
        for method, operation in operations.items():
            assert operation.get("description"), f"{method} {path} is not described"
