import json
import os
import subprocess
import sys

import pytest

from papertrial.feed.catalogue import Catalogue, update_index
from papertrial.feed.records import Record


@pytest.fixture
def catalogue(own_home):
    catalogue = Catalogue()
    catalogue.index._given = None  # words only: the encoder is tested elsewhere
    catalogue.prepare()
    yield catalogue
    catalogue.close()


def test_the_papers_in_scope_are_there_from_the_start(catalogue):
    assert catalogue.store.count() >= 119
    found = catalogue.search("contrastive_search", 3)
    assert found.papers[0].slug == "contrastive_search"
    assert [hit.key for hit in found.result.hits] == [paper.id for paper in found.papers]


def test_a_second_look_changes_nothing(catalogue):
    revision = catalogue.store.revision()
    again = Catalogue()
    assert again.prepare() is None
    assert again.store.revision() == again.index.revision == revision


def test_the_index_follows_the_store(catalogue):
    catalogue.store.upsert(
        [Record(source="arxiv", title="Zebras parse sentences", arxiv_id="2501.00001", abstract="Stripes.")]
    )
    assert "2501.00001" not in [paper.arxiv_id for paper in catalogue.search("zebras parse", 5).papers]
    assert update_index(catalogue.store, catalogue.index) == 1
    assert catalogue.search("zebras parse", 5).papers[0].arxiv_id == "2501.00001"
    assert catalogue.index.revision == catalogue.store.revision()


def test_a_users_own_papers_are_found(own_home, tmp_path):
    folder = tmp_path / "papers" / "decoding" / "own_paper"
    folder.mkdir(parents=True)
    (folder / "paper.toml").write_text(
        'title = "Our unpublished walrus decoder"\npublished = "2026-01"\nsummary = "Walrus."\n'
    )
    done = subprocess.run(
        [sys.executable, "-m", "papertrial", "search", "walrus decoder", "--json", "--mode", "lexical"],
        capture_output=True, text=True, timeout=120, env={**os.environ, "PAPERTRIAL_PAPERS": str(tmp_path / "papers")},
    )  # fmt: skip
    assert json.loads(done.stdout)["hits"][0]["slug"] == "own_paper", done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["search", " "], "query is empty"),
        (["search", "x", "--since", "yesterday"], "--since is 'yesterday'"),
        (["search", "x", "--mode", "magic"], "mode is 'magic'"),
        (["ingest", "no-such-file.txt"], "there is no file 'no-such-file.txt'"),
        (["ingest", "a.txt", "--bulk"], "belong to `ingest arxiv`"),
    ],
)
def test_mistakes_are_one_line(arguments, says):
    done = subprocess.run([sys.executable, "-m", "papertrial", *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
