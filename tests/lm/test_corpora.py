"""Corpora: splits by name, nothing held out stands in training, pieces give the text again, batches from a seed."""

import ast
import hashlib
import inspect
import json
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch

from papertrial.errors import UsageError
from papertrial.lm import corpora, sources
from papertrial.lm.corpora import Document, deduplicate, long_lines, split_of
from papertrial.lm.tokenizers import byte_tokenizer

LONG = "a line of text that is certainly longer than the forty characters that count"


@pytest.fixture(scope="module")
def raw():
    """The standard library's documents with all their repetition."""
    return corpora.prose_documents(["stdlib"])


@pytest.fixture(scope="module")
def prose(raw):
    return corpora.Corpus("prose", tuple(deduplicate(raw)), {})


def named(split, n=1):
    """The first n names that fall into a split."""
    names = (f"stdlib:m{i}" for i in range(10_000))
    found = [name for name in names if split_of(name) == split]
    return found[:n]


# -- splits ----------------------------------------------------------------------------------------------------------


def test_splits_hold_every_document_once_in_about_the_stated_shares(prose):
    parts = {split: prose.documents(split) for split in ("train", "valid", "test")}
    assert sum(map(len, parts.values())) == len(prose.everything) > 300
    shares = {s: sum(split_of(f"stdlib:x{i}") == s for i in range(20_000)) / 20_000 for s in parts}
    # 20,000 draws: a standard error of 0.002
    assert shares["test"] == pytest.approx(corpora.SHARES["test"], abs=0.01)
    assert shares["valid"] == pytest.approx(corpora.SHARES["valid"], abs=0.01)
    with pytest.raises(ValueError, match="train, valid or test"):
        prose.documents("dev")


def test_the_split_of_a_name_never_changes():
    names = ["stdlib:json", "stdlib:topic:assert", "numpy:numpy.linalg", "stdlib:argparse", "stdlib:heapq", "stdlib:re"]
    assert [split_of(name) for name in names] == ["valid", "train", "test", "train", "test", "valid"]
    place = int(hashlib.sha256(b"split/stdlib:heapq").hexdigest()[:12], 16) / 2**48
    assert place < corpora.SHARES["test"]


def test_no_long_line_of_held_out_text_stands_in_training_text(prose):
    lines = {s: {line for d in prose.documents(s) for line in long_lines(d.text)} for s in ("train", "valid", "test")}
    assert len(lines["train"]) > 10_000
    assert len(lines["test"]) > 1_000
    assert not lines["test"] & lines["train"]
    assert not lines["valid"] & lines["train"]
    assert not lines["test"] & lines["valid"]


def test_there_was_repetition_to_remove(raw):
    train = {line for d in raw if split_of(d.name) == "train" for line in long_lines(d.text)}
    held_out = [line for d in raw if split_of(d.name) == "test" for line in long_lines(d.text)]
    share = sum(len(line) for line in held_out if line in train) / sum(map(len, held_out))
    assert share > 0.02


def test_adding_a_document_moves_no_other(prose):
    documents = list(prose.everything)[:60]
    more = [*documents, Document(named("train")[0], (LONG,))]
    before, after = deduplicate(documents), deduplicate(more)
    assert [d for d in after if d.name != named("train")[0]] == before


def test_two_readings_give_the_same_digest_and_the_cache_gives_it_again(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPERTRIAL_HOME", str(tmp_path))  # its cache is this test's alone
    monkeypatch.setitem(corpora.PACKAGES, "prose", ("accelerate",))  # a small one
    readings, given = [], []
    read = corpora.prose_documents
    monkeypatch.setattr(corpora, "prose_documents", lambda packages: readings.append(packages) or read(packages))
    for damage in (False, False, True):
        (cached,) = (tmp_path / "cache" / "corpora").glob("prose-*.json") if given else (None,)
        if damage:
            cached.write_text(cached.read_text().replace("the", "teh", 50))
        corpora._corpus.cache_clear()
        given.append(corpora.corpus("prose"))
    corpora._corpus.cache_clear()
    assert len(readings) == 2, "the first, and the one after the damage"
    assert given[0] == given[1] == given[2]
    assert given[0].digest == given[2].digest
    assert set(given[0].versions) == {"accelerate"}


def test_unknown_corpora_are_named_with_those_there_are():
    for name in ("poetry", "prose+poetry", "prose+prose", "prose+code"):
        with pytest.raises(UsageError, match=r"no corpus 'poetry'; there are prose|twice|cannot be joined"):
            corpora.corpus(name)


# -- repetition ------------------------------------------------------------------------------------------------------


def test_held_out_text_gives_way_to_training_text():
    train, test = named("train")[0], named("test")[0]
    documents = deduplicate(
        [Document(test, (LONG, "short", f"{LONG} of its own")), Document(train, ("x", LONG.upper()))]
    )
    assert documents == [
        Document(name, pieces)
        for name, pieces in sorted([(train, ("x", LONG.upper())), (test, ("short", f"{LONG} of its own"))])
    ]


def test_within_a_split_the_first_of_two_stays_and_short_pieces_all_do():
    first, second = sorted(named("train", 2))
    twice = deduplicate([Document(first, ("Returns", LONG)), Document(second, ("Returns", f"  {LONG} ", "Returns"))])
    assert twice == [Document(first, ("Returns", LONG)), Document(second, ("Returns", "Returns"))]


def test_one_seen_line_is_enough_in_held_out_prose_but_not_within_training():
    train, other = sorted(named("train", 2))
    test = named("test")[0]
    fresh = [f"{LONG}, number {i}" for i in range(6)]
    mixed = "\n".join([LONG, *fresh[:3]])
    kept = {d.name: d.pieces for d in deduplicate([Document(train, (LONG,)), Document(test, (mixed, fresh[5]))])}
    assert kept[test] == (fresh[5],)
    kept = {d.name: d.pieces for d in deduplicate([Document(train, (LONG,)), Document(other, (mixed,))])}
    assert kept[other] == (mixed,)
    loose = deduplicate([Document(train, (LONG,)), Document(test, (mixed,))], tolerance=0.3)
    assert {d.name for d in loose} == {train, test}


def test_documents_with_nothing_left_disappear():
    train, test = named("train")[0], named("test")[0]
    assert [d.name for d in deduplicate([Document(train, (LONG,)), Document(test, (LONG,))])] == [train]


# -- what was seen ---------------------------------------------------------------------------------------------------


def test_unseen_drops_exactly_what_was_seen(prose):
    train, test = prose.documents("train"), prose.documents("test")
    seen = corpora.line_hashes(train)
    assert seen.dtype == np.uint64
    assert np.all(seen[1:] > seen[:-1])
    assert corpora.unseen(test, seen) == test
    left = corpora.unseen(train, seen)
    assert not any(long_lines(d.text) for d in left)


def test_assert_disjoint_finds_a_single_line_in_common(prose):
    train, test = prose.documents("train"), prose.documents("test")
    corpora.assert_disjoint(train, test)
    line = long_lines(train[0].text)[0]
    with pytest.raises(ValueError, match="1 lines of 40 characters"):
        corpora.assert_disjoint(train, [*test, Document("mine", (line,))])


# -- sources ---------------------------------------------------------------------------------------------------------


def test_code_is_python_that_parses_and_pieces_give_the_source_again():
    names = 0
    for module, source in sources.modules("stdlib"):
        if module.split(".")[0] in ("json", "dataclasses", "heapq", "textwrap", "asyncio"):
            names += 1
            assert "".join(sources.statements(source)) == source
    assert names > 20
    code = corpora.corpus("code")
    for document in code.documents("test"):
        ast.parse(document.text)


def test_docstrings_are_those_that_python_shows(monkeypatch):
    monkeypatch.setattr(sources, "package_folder", lambda name: Path(json.__file__).parent)
    found = {(d.module, d.name): d.text for d in sources.docstrings("json")}
    assert found["json", ""] == inspect.getdoc(json)
    assert found["json.decoder", "JSONDecoder.raw_decode"] == inspect.getdoc(json.JSONDecoder.raw_decode)
    assert found["json.encoder", "JSONEncoder.__init__"] == inspect.getdoc(json.JSONEncoder.__init__)


def test_topics_are_those_of_help():
    assert dict(sources.topics()) == topics


def test_rulers_and_tables_go_and_long_runs_of_punctuation_are_shortened():
    text = "Title\n=====\n\n\n| a | b |\n+---+---+\nwait......... done\n\tx"
    assert sources.clean_prose(text) == "Title\n\nwait... done\n        x"


def test_other_peoples_code_is_never_run(tmp_path, monkeypatch):
    package = tmp_path / "trap"
    package.mkdir()
    (package / "__init__.py").write_text(f'"""Doc."""\nopen({str(tmp_path / "ran")!r}, "w")\n')
    (package / "broken.py").write_text("def (:\n")
    (package / "latin.py").write_bytes(b'"""\xe9"""')
    monkeypatch.setattr(sources, "package_folder", lambda name: package)
    assert [(d.module, d.name, d.text) for d in sources.docstrings("trap")] == [("trap", "", "Doc.")]
    assert not (tmp_path / "ran").exists()


# -- batches ---------------------------------------------------------------------------------------------------------


def test_streams_hold_the_texts_between_their_marks():
    tokenizer = byte_tokenizer()
    ids = corpora.encode(tokenizer, ["ab", "", "c <|eos|>"])
    text = [3 + byte for byte in b"c <|eos|>"]
    assert ids.tolist() == [1, 3 + 97, 3 + 98, 2, 1, 2, 1, *text, 2]
    assert corpora.encode(tokenizer, ["ab"], ends=False).tolist() == [100, 101]
    assert corpora.encode(tokenizer, []).shape == (0,)


def test_windows_lie_one_stride_apart():
    tokens = torch.arange(10)
    assert corpora.token_windows(tokens, 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert corpora.token_windows(tokens, 4, 3).tolist() == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    assert corpora.token_windows(tokens, 10).tolist() == [list(range(10))]


def test_random_batches_depend_on_the_generator_alone_and_reach_every_place():
    tokens = torch.arange(12)
    one = corpora.random_batches(tokens, 3, 5, generator=torch.Generator().manual_seed(3))
    two = corpora.random_batches(tokens, 3, 5, generator=torch.Generator().manual_seed(3))
    starts = set()
    for _ in range(60):
        batch = next(one)
        assert torch.equal(batch, next(two))
        assert torch.equal(batch, batch[:, :1] + torch.arange(5))
        starts |= set(batch[:, 0].tolist())
    assert starts == set(range(8)), "180 draws miss one of 8 places with probability 3e-10"


def test_windows_that_do_not_fit_are_refused():
    generator = torch.Generator()
    for length in (0, 11):
        with pytest.raises(ValueError, match="length must lie between 1 and the 10 tokens"):
            corpora.token_windows(torch.arange(10), length)
        with pytest.raises(ValueError, match="length must lie between 1 and the 10 tokens"):
            corpora.random_batches(torch.arange(10), 2, length, generator=generator)
    with pytest.raises(ValueError, match="stride"):
        corpora.token_windows(torch.arange(10), 2, 0)
    with pytest.raises(ValueError, match="one stream"):
        corpora.token_windows(torch.arange(10).view(2, 5), 2)
    with pytest.raises(ValueError, match="batch_size"):
        corpora.random_batches(torch.arange(10), 0, 2, generator=generator)
