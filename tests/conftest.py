"""Every test gets a home folder of its own, one thread, and no network by way of the Hugging Face hub."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest


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
