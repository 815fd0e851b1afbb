import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from families import CORE, random_ids, tiny_model
from papertrial.lm.datastore import (
    ApproximateSearch,
    Datastore,
    ExactSearch,
    KeySite,
    build_datastore,
    building,
    exact_scores,
    target_states,
)

SEQUENCES = [row.tolist()[:length] for row, length in zip(random_ids(5, 40, seed=3), (40, 17, 2, 1, 33), strict=True)]
ENTRIES = 39 + 16 + 1 + 0 + 32
BOTH = {"att": KeySite(), "top": KeySite("final_hidden", None)}


def keys_of(count, width=16, seed=0):
    return np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)


# -- building ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CORE)
def test_keys_are_the_states_before_each_token_run_one_window_at_a_time(family, tmp_path):
    model = tiny_model(family)
    stores = build_datastore(model, SEQUENCES, tmp_path, sites=BOTH, window=12, stride=5, dtype="float32", batch_size=3)
    expected, values = [], []
    for ids in SEQUENCES:
        for target in range(1, len(ids)):
            # the first window that holds the target
            start = next(s for s in itertools.count(0, 5) if target < min(s + 12, len(ids)))
            with torch.no_grad():
                out = model(torch.tensor([ids[start : start + 12]]), output_hidden_states=True)
            expected.append(out.hidden_states[-1][0, target - 1 - start])
            values.append(ids[target])
    assert len(stores["top"]) == ENTRIES
    assert stores["top"].values.tolist() == values
    # float32 and padding: a few units in the last place of numbers around 1
    torch.testing.assert_close(torch.from_numpy(np.array(stores["top"].keys)), torch.stack(expected), atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_default_key_is_the_normed_input_of_the_last_feed_forward_layer(family, tmp_path):
    model = tiny_model(family)
    ids = SEQUENCES[1]
    store = build_datastore(model, [ids], tmp_path, window=64, dtype="float32")["key"]
    last = (model.transformer.h if family == "gpt2" else model.model.layers)[-1]
    norm = last.ln_2 if family == "gpt2" else last.post_attention_layernorm
    caught = []
    handle = norm.register_forward_hook(lambda m, a, out: caught.append(out))
    with torch.no_grad():
        model(torch.tensor([ids]))
    handle.remove()
    torch.testing.assert_close(torch.from_numpy(np.array(store.keys)), caught[0][0, :-1], atol=1e-5, rtol=0)
    assert store.site == KeySite("ffn_in", -1)


def test_a_build_that_was_killed_goes_on_and_ends_the_same(tmp_path, monkeypatch):
    model = tiny_model("llama")
    settings = {"window": 8, "stride": 2, "batch_size": 2, "sites": BOTH}
    whole = build_datastore(model, SEQUENCES, tmp_path / "whole", **settings)
    monkeypatch.setattr(building, "SAVE_EVERY", 4)
    forwards = []
    model.register_forward_pre_hook(lambda *_: forwards.append(1))
    model.model.register_forward_pre_hook(lambda *_: forwards.append(1))

    class Killed(Exception):
        pass

    def kill(done, total):
        if done > ENTRIES // 2:
            raise Killed

    with pytest.raises(Killed):
        build_datastore(model, SEQUENCES, tmp_path / "half", on_progress=kill, **settings)
    with pytest.raises(ValueError, match="unfinished"):
        Datastore.open(tmp_path / "half", "att")
    before = len(forwards)
    resumed = build_datastore(model, SEQUENCES, tmp_path / "half", **settings)
    again = len(forwards) - before
    build_datastore(model, SEQUENCES, tmp_path / "half", **settings)
    assert len(forwards) - before == again, "a finished store is opened, not built"
    total = len(building.pieces_of(SEQUENCES, 8, 2))
    assert 0 < again < -(-total // 2), "what was written is not computed again"
    for name in BOTH:
        assert np.array_equal(resumed[name].keys, whole[name].keys)
        assert np.array_equal(resumed[name].values, whole[name].values)
        assert resumed[name].digest == whole[name].digest != ""


def test_a_store_of_another_text_model_or_window_is_not_taken_for_this_one(tmp_path):
    model = tiny_model("llama")
    build_datastore(model, SEQUENCES, tmp_path, window=16)
    for other, arguments in [
        ("text", (model, SEQUENCES[:2])),
        ("model", (tiny_model("llama", seed=1), SEQUENCES)),
    ]:
        with pytest.raises(ValueError, match=other):
            build_datastore(*arguments, tmp_path, window=16)
    with pytest.raises(ValueError, match="window"):
        build_datastore(model, SEQUENCES, tmp_path, window=32)


def test_without_a_folder_the_cache_keeps_one_per_recipe(own_home):
    model = tiny_model("gpt2")
    one = build_datastore(model, SEQUENCES, window=16)["key"]
    same = build_datastore(model, SEQUENCES, window=16)["key"]
    other = build_datastore(model, SEQUENCES, window=16, dtype="float32")["key"]
    assert one.keys.filename == same.keys.filename != other.keys.filename
    assert Path(one.keys.filename).resolve().is_relative_to((own_home / "cache").resolve())


def test_damage_is_found_when_asked_for(tmp_path):
    build_datastore(tiny_model("llama"), SEQUENCES, tmp_path, window=16)
    Datastore.open(tmp_path, verify=True)
    keys = np.load(tmp_path / "keys-key.npy", mmap_mode="r+")
    keys[3, 2] += 1
    keys.flush()
    with pytest.raises(ValueError, match="damaged"):
        Datastore.open(tmp_path, verify=True)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["recipe"]["entries"] += 1
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="manifest says"):
        Datastore.open(tmp_path)


def test_keys_that_half_precision_cannot_hold_are_refused(tmp_path):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[-1].post_attention_layernorm.weight.fill_(1e6)
    with pytest.raises(ValueError, match="not finite in float16; float32 would hold them"):
        build_datastore(model, SEQUENCES, tmp_path / "half", window=16)
    assert np.isfinite(build_datastore(model, SEQUENCES, tmp_path / "f", window=16, dtype="float32")["key"].keys).all()


def test_bad_requests_are_named(tmp_path):
    model = tiny_model("gpt2")
    for arguments, message in [
        ({"window": 1}, "window"),
        ({"window": 16, "stride": 16}, "stride"),
        ({"window": 16, "dtype": "int8"}, "dtype"),
        ({"window": 16, "sites": {}}, "sites is empty"),
        ({"window": 16, "sites": {"../x": KeySite()}}, "file names"),
        ({"window": 16, "sites": {"x": KeySite("ffn_in", 7)}}, "layers 0 .. 1"),
        ({"window": 16, "batch_size": 0}, "batch_size"),
    ]:
        with pytest.raises(ValueError, match=message):
            build_datastore(model, SEQUENCES, tmp_path / "x", **arguments)
    with pytest.raises(ValueError, match="no target"):
        build_datastore(model, [[5]], tmp_path / "y", window=16)
    with pytest.raises(ValueError, match="unknown site"):
        KeySite("nowhere", 0)
    with pytest.raises(ValueError, match="takes no layer"):
        KeySite("final_hidden", -1)
    with pytest.raises(ValueError, match="one per key"):
        Datastore.from_arrays(keys_of(4), np.arange(3))
    with pytest.raises(ValueError, match="not finite"):
        Datastore.from_arrays(np.full((2, 2), np.nan, np.float32), np.arange(2))
    with pytest.raises(ValueError, match="empty"):
        Datastore.from_arrays(np.zeros((0, 2), np.float32), np.arange(0))
    with pytest.raises(ValueError, match="no datastore"):
        Datastore.open(tmp_path / "nothing")


def test_states_left_out_at_the_beginning_change_nothing_after():
    model = tiny_model("llama")
    every = list(target_states(model, SEQUENCES, BOTH, window=8, stride=3, batch_size=2))
    late = list(target_states(model, SEQUENCES, BOTH, window=8, stride=3, batch_size=2, first_batch=4))
    assert len(late) == len(every) - 4
    assert all(torch.equal(a.states["att"], b.states["att"]) for a, b in zip(every[4:], late, strict=True))


# -- search ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "meta-free"])
@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_exact_search_equals_brute_force_whatever_the_chunks(metric, dtype, device, monkeypatch):
    keys = keys_of(300).astype(dtype)
    keys[120:140] = keys[7]  # duplicates
    queries = torch.from_numpy(np.concatenate([keys_of(9, seed=1), keys[[7, 130]].astype(np.float32)]))
    search = ExactSearch(keys, metric=metric, rows_at_once=64)
    if device != "cpu":  # the path of other devices, run here

        class Elsewhere:
            type = "elsewhere"

        search.device = Elsewhere()
        plain = torch.Tensor.to
        monkeypatch.setattr(
            torch.Tensor, "to", lambda t, *a, **k: t if a and isinstance(a[0], Elsewhere) else plain(t, *a, **k)
        )
    near = search.search(queries, 50)
    table = torch.from_numpy(keys.astype(np.float32))
    scores = queries @ table.T if metric == "ip" else -torch.cdist(queries.double(), table.double()).square().float()
    best = scores.topk(50, dim=1)
    # the products of 16 numbers around 1 in float32
    torch.testing.assert_close(near.scores, best.values, atol=2e-5, rtol=1e-5)
    assert all(len(set(row.tolist())) == 50 for row in near.indices)
    torch.testing.assert_close(scores.gather(1, near.indices), near.scores, atol=2e-5, rtol=1e-5)
    if metric == "l2":
        assert near.scores[-1, :21].eq(0).all(), "a duplicate has distance 0, not about 0"
        assert near.indices[-1, :21].tolist() == [7, *range(120, 140)], "ties stand by index"


def test_all_keys_can_be_asked_for_and_own_entries_left_out():
    keys = keys_of(40)
    keys[11] = keys[10]
    queries = torch.from_numpy(keys)
    near = ExactSearch(keys, rows_at_once=16).search(queries, 39, exclude=torch.arange(40))
    for row in range(40):
        assert sorted([*near.indices[row].tolist(), row]) == list(range(40))
    assert near.scores[10, 0] == 0
    assert near.indices[10, 0] == 11
    few = ExactSearch(keys).search(queries, 3, exclude=torch.full((40,), -1))
    assert few.indices[:, 0].tolist() == [*range(11), 10, *range(12, 40)], "negative: nothing is left out"


def test_searches_refuse_what_does_not_fit():
    keys, queries = keys_of(40), torch.zeros(2, 16)
    search = ExactSearch(keys)
    for arguments, message in [
        ((queries, 0), "k must"),
        ((queries, 41), "k must"),
        ((torch.zeros(2, 15), 3), "queries must be"),
        ((torch.full((2, 16), torch.nan), 3), "not finite"),
    ]:
        with pytest.raises(ValueError, match=message):
            search.search(*arguments)
    with pytest.raises(ValueError, match="k must lie between 1 and 39"):
        search.search(queries, 40, exclude=torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="metric"):
        ExactSearch(keys, metric="cosine")
    with pytest.raises(ValueError, match="keys must be"):
        ExactSearch(np.zeros((0, 4), np.float32))
    for arguments, message in [
        ({"kind": "lsh"}, "kind"),
        ({"kind": "ivf", "lists": 41}, "lists"),
        ({"kind": "ivfpq", "bytes_per_key": 3}, "divide"),
        ({"kind": "ivfpq", "lists": 1}, "at least 256 keys"),
    ]:
        with pytest.raises(ValueError, match=message):
            ApproximateSearch.build(keys, **arguments)


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_looking_everywhere_is_exact(kind, metric):
    keys = keys_of(600)
    queries = torch.from_numpy(keys_of(8, seed=1))
    index = ApproximateSearch.build(keys, kind=kind, metric=metric, lists=8, effort=8 if kind == "ivf" else 600)
    near, exact = index.search(queries, 20), ExactSearch(keys, metric=metric).search(queries, 20)
    assert torch.equal(near.indices, exact.indices)
    torch.testing.assert_close(near.scores, exact.scores, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_quantised_scores_are_those_of_the_stored_keys_and_rescoring_makes_them_exact(metric):
    keys = keys_of(2000)
    queries = torch.from_numpy(keys_of(6, seed=1))
    index = ApproximateSearch.build(keys, kind="ivfpq", metric=metric, lists=16, bytes_per_key=4, effort=16)
    near = index.search(queries, 30)
    # faiss adds tables of partial products, so the last bits differ
    torch.testing.assert_close(index.stored_scores(queries, near.indices), near.scores, atol=1e-4, rtol=1e-4)
    exact = exact_scores(keys, queries, near.indices, metric)
    assert not torch.allclose(exact, near.scores, atol=0.05), "otherwise nothing is quantised here"
    rescored = index.search(queries, 30, rescore=True)
    assert [set(row.tolist()) for row in rescored.indices] == [set(row.tolist()) for row in near.indices]
    torch.testing.assert_close(rescored.scores, exact.sort(dim=1, descending=True).values, atol=1e-5, rtol=1e-5)

    truth = ExactSearch(keys, metric=metric).search(queries, 30)
    more = index.search(queries, 30, candidates=600, rescore=True)

    def overlap(a):
        rows = zip(a.indices.tolist(), truth.indices.tolist(), strict=True)
        return sum(len(set(x) & set(y)) for x, y in rows) / truth.indices.numel()

    assert overlap(near) < overlap(more)
    assert overlap(more) > 0.95
    with pytest.raises(ValueError, match="together with rescore"):
        index.search(queries, 30, candidates=60)


def test_absent_neighbours_are_minus_infinity():
    keys = keys_of(600)
    index = ApproximateSearch.build(keys, kind="ivf", lists=60, effort=1)
    near = index.search(torch.from_numpy(keys_of(5, seed=1)), 300)
    absent = near.indices < 0
    assert absent.any()
    assert near.scores[absent].isneginf().all()
    assert near.scores[~absent].isfinite().all()
    rescored = exact_scores(keys, torch.from_numpy(keys_of(5, seed=1)), near.indices)
    assert torch.equal(rescored.isneginf(), absent)
    assert torch.equal(index.stored_scores(torch.from_numpy(keys_of(5, seed=1)), near.indices).isneginf(), absent)


def test_an_index_is_the_same_for_the_same_seed_and_comes_back_from_disk(tmp_path):
    keys = keys_of(1500)
    queries = torch.from_numpy(keys_of(6, seed=1))
    build = {"kind": "ivfpq", "lists": 16, "bytes_per_key": 4}
    index = ApproximateSearch.build(keys, seed=3, **build)
    near = index.search(queries, 10)
    assert torch.equal(ApproximateSearch.build(keys, seed=3, **build).search(queries, 10).scores, near.scores)
    assert not torch.equal(ApproximateSearch.build(keys, seed=4, **build).search(queries, 10).scores, near.scores)
    index.save(tmp_path / "keys.faiss")
    back = ApproximateSearch.load(tmp_path / "keys.faiss", keys)
    assert torch.equal(back.search(queries, 10).scores, near.scores)
    assert back.nbytes == index.nbytes < keys.nbytes
    with pytest.raises(ValueError, match="indexes keys"):
        ApproximateSearch.load(tmp_path / "keys.faiss", keys[:10])
    data = bytearray((tmp_path / "keys.faiss").read_bytes())
    data[-1] ^= 1
    (tmp_path / "keys.faiss").write_bytes(bytes(data))
    with pytest.raises(ValueError, match="damaged"):
        ApproximateSearch.load(tmp_path / "keys.faiss", keys)
    with pytest.raises(ValueError, match="no index"):
        ApproximateSearch.load(tmp_path / "other.faiss", keys)


def test_own_entries_are_left_out_of_approximate_search_too():
    keys = keys_of(600)
    index = ApproximateSearch.build(keys, kind="hnsw")
    near = index.search(torch.from_numpy(keys[:50]), 5, exclude=torch.arange(50))
    assert near.indices.shape == (50, 5)
    assert not (near.indices == torch.arange(50)[:, None]).any()
