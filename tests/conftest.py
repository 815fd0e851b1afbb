"""Every test gets a home folder of its own, one thread, and no network by way of the Hugging Face hub."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis
import pytest

hypothesis.settings.register_profile("papertrial", deadline=None)  # how long an example takes is the machine's affair
hypothesis.settings.load_profile("papertrial")


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory, monkeypatch, _shared_cache):
    """State goes to a folder of this test alone; only the cache of what can be made again is shared."""
    home = tmp_path_factory.mktemp("home")
    (home / "cache").symlink_to(_shared_cache)
    monkeypatch.setenv("PAPERTRIAL_HOME", str(home))
    return home


@pytest.fixture(scope="session")
def _shared_cache(tmp_path_factory):
    """Encoded corpora and house models made on first use, shared by all tests and workers of a run."""
    base = tmp_path_factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = root / "papertrial-cache"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def postgresql_server(tmp_path_factory):
    """The run's PostgreSQL server, shared by its workers; the test is skipped where none can be started."""
    from postgresql_server import server_url

    base = tmp_path_factory.getbasetemp()
    return server_url(base.parent if "PYTEST_XDIST_WORKER" in os.environ else base)


@pytest.fixture
def postgresql(postgresql_server):
    """The URL of an empty PostgreSQL database of this test alone."""
    from postgresql_server import new_database

    with new_database(postgresql_server) as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request, tmp_path):
    """The URL of an empty database of this test alone, one of each kind."""
    if request.param == "postgresql":
        return request.getfixturevalue("postgresql")
    return f"sqlite:///{tmp_path / 'papertrial.db'}"
