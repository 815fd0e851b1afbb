"""Every test gets a home folder of its own, one thread, and no network by way of the Hugging Face hub."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory, monkeypatch):
    """State goes to a folder of this test alone."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("PAPERTRIAL_HOME", str(home))
    return home
