"""House models: they load, beat their recorded floor on text they never saw, and can be made again."""

import hashlib
import json
import math
import random
from collections import Counter, defaultdict

import pytest
import torch

from papertrial.errors import UsageError
from papertrial.lm import corpora, house
from papertrial.lm.compressors import ByteNgram, xz_bits_per_byte
from papertrial.lm.corpora import Document
from papertrial.lm.models import load

SHIPPED = ["prose", "code", "scorer"]

TINY = house.HouseModel(
    summary="for this test",
    corpus="prose",
    evaluated_on=("prose",),
    vocabulary=300,
    width=16,
    layers=1,
    heads=2,
    feed_forward=24,
    length=32,
    batch_size=4,
    steps=6,
    warmup=2,
)


@pytest.fixture
def tiny(monkeypatch):
    """A recipe that trains in a second on a handful of invented documents."""
    rng = random.Random(0)
    words = [f"w{rng.randrange(10**6)}" for _ in range(60)]
    documents = tuple(
        Document(f"stdlib:m{i}", tuple(" ".join(rng.choices(words, k=12)) for _ in range(10))) for i in range(60, 120)
    )
    made = corpora.Corpus("prose", documents, {"stdlib": "0"})
    monkeypatch.setattr(corpora, "corpus", lambda name: made)
    monkeypatch.setitem(house.MODELS, "tiny", TINY)
    return made


# -- what is shipped -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_models_load_tied_in_float32_and_are_small(name):
    checkpoint = load(f"house:{name}")
    assert checkpoint.model.lm_head.weight is checkpoint.model.model.embed_tokens.weight
    assert checkpoint.model.dtype == torch.float32
    assert checkpoint.folder == house.SHIPPED / name
    assert (checkpoint.folder / "model.safetensors").stat().st_size < 16_000_000
    card = house.card(f"house:{name}")
    assert card["parameters"] == checkpoint.model.num_parameters()
    config = checkpoint.model.config
    assert card["recipe"]["length"] == config.max_position_embeddings >= 256
    assert len(checkpoint.tokenizer) == config.vocab_size == card["recipe"]["vocabulary"]


@pytest.mark.parametrize(("name", "corpus"), [("prose", "prose"), ("code", "code"), ("scorer", "prose")])
def test_shipped_models_beat_the_n_gram_on_text_they_never_saw(name, corpus):
    """The bound is the order-6 byte n-gram on the whole of its test text, as the card has it; this is a slice."""
    checkpoint = load(f"house:{name}")
    documents = house.held_out(corpus, house.seen_lines(name), at_most=12_000)
    assert sum(len(d.text) for d in documents) > 8_000
    corpora.assert_disjoint(f"house:{name}", documents)
    figures = house.card(f"house:{name}")["test"][corpus]["bits_per_byte"]
    assert figures["model"] < figures["byte_6_gram_of_training_text"]
    measured = house.bits_per_byte(checkpoint.model, checkpoint.tokenizer, documents)
    assert measured < figures["byte_6_gram_of_training_text"]


def test_the_judge_has_not_read_what_the_judged_has():
    corpora.assert_disjoint("house:prose", "house:scorer")
    assert not set(house.seen_documents("prose")) & set(house.seen_documents("scorer"))
    assert len(house.seen_documents("prose")) > 300
    with pytest.raises(ValueError, match="stand in both"):
        corpora.assert_disjoint("house:prose", "house:prose")


def test_unknown_names_come_with_the_nearest_and_the_list():
    with pytest.raises(UsageError, match="did you mean house:scorer"):
        house.folder("scorr")
    with pytest.raises(UsageError, match=r"no house model 'zzz'. There are house:prose"):
        house.recipe("zzz")


# -- making ----------------------------------------------------------------------------------------------------------


def test_a_model_that_is_not_shipped_is_trained_once_and_kept(tiny, own_home):
    first = load("house:tiny")
    folder = own_home / "cache" / "house" / "tiny"
    assert first.folder == folder
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    second = load("house:tiny")
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert second.digest == first.digest
    card = json.loads((folder / "card.json").read_text())
    train = tiny.documents("train")
    assert card["data"]["documents"] == len(train)
    assert card["data"]["digest"] == corpora.digest(train)
    assert set(house.seen_documents("tiny")) == {d.name for d in train}
    corpora.assert_disjoint("house:tiny", tiny.documents("test"))


def test_the_same_command_gives_the_same_model(tiny, tmp_path):
    digests = set()
    for name in ("a", "b"):
        house.train_house("tiny", tmp_path / name, evaluate=False)
        digests.add(hashlib.sha256((tmp_path / name / "model.safetensors").read_bytes()).hexdigest())
    assert len(digests) == 1
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")], "nothing half made is left"


def test_a_second_cycle_goes_on_from_the_first_and_is_recorded(tiny, tmp_path):
    first = house.train_house("tiny", tmp_path / "a", evaluate=False)
    second = house.train_house("tiny", tmp_path / "b", steps=4, start=tmp_path / "a", evaluate=False)
    assert second["training"]["steps"] == 10
    assert second["training"]["tokens"] == first["training"]["tokens"] * 10 // 6
    assert len(second["commands"]) == 2
    assert second["commands"][1].endswith("--from tiny")
    with pytest.raises(UsageError, match="other sizes"):
        house.train_house("mini", tmp_path / "c", start=tmp_path / "a")


def test_the_weights_on_disk_are_those_that_were_measured(tiny, tmp_path):
    card = house.train_house("tiny", tmp_path / "m")
    checkpoint = load(str(tmp_path / "m"))
    documents = house.held_out("prose", house._seen_lines(str(tmp_path / "m")))
    again = house.bits_per_byte(checkpoint.model, checkpoint.tokenizer, documents)
    assert again == pytest.approx(card["test"]["prose"]["bits_per_byte"]["model"], abs=1e-4)


def test_the_command_reports_unknown_models_and_lists_known_ones(capsys):
    assert house.main(["train", "zzz"]) == 2
    assert "no house model" in capsys.readouterr().err
    assert house.main(["list"]) == 0
    assert "house:prose" in capsys.readouterr().out


def test_held_out_text_stops_at_a_piece_within_its_limit(tiny):
    documents = house.held_out("prose", corpora.line_hashes([]), at_most=500)
    size = sum(len(d.text.encode()) for d in documents)
    assert 300 < size <= 500
    whole = {d.name: d for d in tiny.documents("test")}
    assert all(d.pieces == whole[d.name].pieces[: len(d.pieces)] for d in documents)


# -- the compressors that are the floor ------------------------------------------------------------------------------


def witten_bell(data, order, text):
    """The definition, by dictionaries."""
    followers = defaultdict(Counter)
    padded = b"\n" * order + data
    for i in range(order, len(padded)):
        for k in range(order + 1):
            followers[padded[i - k : i]][padded[i]] += 1
    padded = b"\n" * order + text
    result = []
    for i in range(order, len(padded)):
        p = 1 / 256
        for k in range(order + 1):
            seen = followers.get(padded[i - k : i])
            if seen:
                p = (seen[padded[i]] + len(seen) * p) / (sum(seen.values()) + len(seen))
        result.append(p)
    return result


@pytest.mark.parametrize("order", [0, 1, 3, 6])
def test_the_n_gram_is_its_definition(order):
    rng = random.Random(order)
    data = bytes(rng.choices(b"abcd\n\xff", k=400))
    text = bytes(rng.choices(b"abcde\n", k=100)) + data[:50]
    ours = ByteNgram(data, order).probabilities(text)
    assert ours == pytest.approx(witten_bell(data, order, text), rel=1e-12)


def test_the_n_gram_gives_a_distribution_over_bytes():
    model = ByteNgram(b"abracadabra", 2)
    mass = sum(model.probabilities(b"abr" + bytes([b]))[-1] for b in range(256))
    assert mass == pytest.approx(1.0, abs=1e-12)
    assert model.bits_per_byte(b"abra") == pytest.approx(-sum(map(math.log2, model.probabilities(b"abra"))) / 4)


def test_priming_xz_helps_exactly_where_text_repeats():
    rng = random.Random(0)
    text = bytes(rng.choices(range(256), k=20_000))
    assert xz_bits_per_byte(text) == pytest.approx(8.0, abs=0.05)  # random bytes do not compress
    assert xz_bits_per_byte(text, text) < 0.2  # references of at most 273 bytes each
    assert xz_bits_per_byte(text, bytes(rng.choices(range(256), k=20_000))) > 7.9


def test_compressors_refuse_what_they_cannot_do():
    with pytest.raises(ValueError, match="order"):
        ByteNgram(b"abc", 7)
    with pytest.raises(ValueError, match="empty"):
        ByteNgram(b"", 2)
    with pytest.raises(ValueError, match="empty"):
        xz_bits_per_byte(b"")
