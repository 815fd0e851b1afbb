"""Cache surgery against the same computation done without a cache."""

import pytest
import torch
from transformers import DynamicCache, MambaConfig, MambaForCausalLM, StaticCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from families import CORE, DECODERS, left_padded, random_ids, tiny_model
from papertrial.lm import cache as kv
from papertrial.lm.generation import position_ids

# float32, two layers: cached and uncached runs differ by rounding in the order of the sums only
TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}


def run(model, ids, mask, cache=None):
    """Logits of the last ``ids.shape[1]`` columns of ``mask``."""
    positions = position_ids(mask)[:, -ids.shape[1] :]
    with torch.no_grad():
        use = cache is not None
        return model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=use).logits


def real(logits, mask):
    return logits[mask[:, -logits.shape[1] :].bool()]


def windowed(family):
    return tiny_model(family, sliding_window=4) if family in ("mistral", "gemma2") else tiny_model(family)


@pytest.mark.parametrize("family", DECODERS)
def test_cached_equals_uncached_with_left_padding(family):
    model = windowed(family)
    ids, mask = left_padded(3, 11)
    whole = run(model, ids, mask)
    cache = kv.new_cache(model)
    parts = [run(model, ids[:, a:b], mask[:, :b], cache) for a, b in ((0, 5), (5, 8), (8, 9), (9, 10), (10, 11))]
    torch.testing.assert_close(real(torch.cat(parts, 1), mask), real(whole, mask), **TOLERANCE)
    assert kv.length(cache) == 11


@pytest.mark.parametrize("family", DECODERS)
def test_repeating_rows_running_candidates_and_keeping_the_winners_continues_exactly(family):
    model = windowed(family)
    ids, mask = left_padded(3, 9)
    k, cache = 4, kv.new_cache(model)
    run(model, ids, mask, cache)
    for step in range(6):  # past the window of 4
        kv.repeat(cache, k)
        candidates = random_ids(3 * k, 1, seed=10 + step)
        grown = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
        run(model, candidates, grown.repeat_interleave(k, 0), cache)
        winners = torch.tensor([0, 3, 1]) + torch.arange(3) * k
        kv.select(cache, winners)
        ids, mask = torch.cat([ids, candidates[winners]], 1), grown
    probe = random_ids(3, 1, seed=99)
    mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
    continued = run(model, probe, mask, cache)
    fresh = run(model, torch.cat([ids, probe], 1), mask)[:, -1:]
    torch.testing.assert_close(continued, fresh, **TOLERANCE)


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("drops", [(3,), (1, 2, 4)])
def test_cropping_returns_to_the_shorter_sequence_also_behind_the_window(family, drops):
    model = windowed(family)
    ids, mask = left_padded(2, 14)
    cache = kv.new_cache(model)
    run(model, ids, mask, cache)
    for drop in drops:
        kv.crop(cache, drop)
    kept = 14 - sum(drops)
    assert kv.length(cache) == kept
    probe = random_ids(2, 2, seed=5)
    mask = torch.cat([mask[:, :kept], torch.ones(2, 2, dtype=torch.long)], 1)
    continued = run(model, probe, mask, cache)
    fresh = run(model, torch.cat([ids[:, :kept], probe], 1), mask)[:, -2:]
    torch.testing.assert_close(continued, fresh, **TOLERANCE)


@pytest.mark.parametrize("family", DECODERS)
def test_gather_keeps_one_path_of_a_tree_per_row(family):
    """Siblings are run as separate rows here, so the oracle needs no tree mask: gather must undo the detour."""
    model = windowed(family)
    ids, mask = left_padded(2, 8)
    cache = kv.new_cache(model)
    run(model, ids, mask, cache)
    twin = kv.branch(cache)
    path = random_ids(2, 3, seed=1)
    grown = torch.cat([mask, torch.ones(2, 3, dtype=torch.long)], 1)
    run(model, path, grown, twin)
    # row 0 accepts all three tokens of the path, row 1 only the first: it is padded by two more slots on the left
    positions = torch.stack([torch.arange(11), torch.tensor([-1, -1, *range(9)])])
    kv.gather(twin, positions)
    kept_mask = kv.gather_mask(grown, positions)
    assert kept_mask.tolist() == [grown[0].tolist(), [0, 0, *grown[1, :9].tolist()]]
    probe = random_ids(2, 1, seed=2)
    continued = run(model, probe, torch.cat([kept_mask, torch.ones(2, 1, dtype=torch.long)], 1), twin)
    for row, accepted in ((0, 3), (1, 1)):
        sequence = torch.cat([ids[row], path[row, :accepted], probe[row]])[None]
        real_mask = torch.cat([mask[row], torch.ones(accepted + 1, dtype=torch.long)])[None]
        torch.testing.assert_close(continued[row], run(model, sequence, real_mask)[0, -1:], **TOLERANCE)
    assert kv.length(cache) == 8  # the branch did not touch the trunk


@pytest.mark.parametrize("family", DECODERS)
def test_gather_to_a_shorter_sequence_equals_never_having_seen_the_rest(family):
    model = windowed(family)
    ids, mask = left_padded(2, 12)
    cache = kv.new_cache(model)
    run(model, ids, mask, cache)
    positions = torch.arange(9).expand(2, -1)
    kv.gather(cache, positions)
    assert [layer.get_seq_length() for layer in cache.layers] == [9, 9]
    probe = random_ids(2, 2, seed=4)
    kept = torch.cat([kv.gather_mask(mask, positions), torch.ones(2, 2, dtype=torch.long)], 1)
    fresh = run(model, torch.cat([ids[:, :9], probe], 1), kept)[:, -2:]
    torch.testing.assert_close(run(model, probe, kept, cache), fresh, **TOLERANCE)


def test_gather_reorders_and_leaves_the_chosen_keys_untouched():
    model = tiny_model("llama")
    cache = kv.new_cache(model)
    ids = random_ids(2, 6)
    run(model, ids, torch.ones_like(ids), cache)
    before = cache.layers[1].keys.clone()
    positions = torch.tensor([[0, 2, 5], [1, -1, 3]])
    kv.gather(cache, positions)
    after = cache.layers[1].keys
    assert torch.equal(after[0], before[0][:, [0, 2, 5]])
    assert torch.equal(after[1, :, [0, 2]], before[1][:, [1, 3]])
    assert not after[1, :, 1].any()


@pytest.mark.parametrize("family", CORE)
def test_a_branch_and_its_trunk_grow_independently_and_gradients_pass(family):
    model = windowed(family)
    ids = random_ids(2, 6)
    mask = torch.ones_like(ids)
    cache = kv.new_cache(model)
    run(model, ids[:, :4], mask[:, :4], cache)
    twin = kv.branch(cache)
    run(model, random_ids(2, 2, seed=7), mask, twin)
    torch.testing.assert_close(run(model, ids[:, 4:], mask, cache), run(model, ids, mask)[:, 4:], **TOLERANCE)

    embeddings = model.get_input_embeddings()(ids[:, :4]).detach().requires_grad_()
    trunk = kv.new_cache(model)
    model(inputs_embeds=embeddings, attention_mask=mask[:, :4], past_key_values=trunk, use_cache=True)
    out = model(ids[:, 4:], attention_mask=mask, past_key_values=kv.branch(trunk), use_cache=True)
    out.logits.sum().backward()
    assert embeddings.grad.abs().sum() > 0


def test_select_takes_row_numbers_and_boolean_masks_and_an_empty_cache_is_left_alone():
    model = tiny_model("gpt2")
    kv.select(kv.new_cache(model), torch.tensor([0, 0]))
    kv.repeat(kv.new_cache(model), 3)
    ids = random_ids(3, 4)
    first, second = kv.new_cache(model), kv.new_cache(model)
    for cache in (first, second):
        run(model, ids, torch.ones_like(ids), cache)
    kv.select(first, torch.tensor([0, 2]))
    kv.select(second, torch.tensor([True, False, True]))
    assert torch.equal(first.layers[0].keys, second.layers[0].keys)
    assert first.layers[0].keys.shape[0] == 2


def test_our_cache_works_inside_generate_like_the_stock_one():
    model = tiny_model("mistral", sliding_window=4)
    ids, mask = left_padded(2, 7)
    options = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    ours = model.generate(ids, past_key_values=kv.new_cache(model), **options)
    assert torch.equal(ours, model.generate(ids, **options))


def test_what_cannot_be_treated_is_refused_with_a_reason():
    mamba = MambaForCausalLM(MambaConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1, state_size=4))
    with pytest.raises(ValueError, match=r"use_cache=False|not a decoder-only"):
        kv.new_cache(mamba)
    with pytest.raises(ValueError, match="decoder-only"):
        kv.new_cache(tiny_model("bert"))
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="StaticLayer"):
        kv.repeat(StaticCache(config=model.config, max_cache_len=8), 2)
    ids = random_ids(2, 6)
    cache = kv.new_cache(model)
    run(model, ids, torch.ones_like(ids), cache)
    for call in (
        lambda: kv.crop(cache, 7),
        lambda: kv.crop(cache, -1),
        lambda: kv.repeat(cache, 0),
        lambda: kv.gather(cache, torch.tensor([[0, 6], [0, 1]])),
        lambda: kv.gather(cache, torch.tensor([[0, -2], [0, 1]])),
        lambda: kv.gather(cache, torch.tensor([[0, 1]])),
        lambda: kv.select(cache, torch.tensor([[0]])),
    ):
        with pytest.raises(ValueError, match=r"must|rows"):
            call()
    assert kv.length(cache) == 6


def test_a_stock_window_that_has_forgotten_is_refused_rather_than_silently_wrong():
    model = tiny_model("mistral", sliding_window=4)
    stock = DynamicCache(config=model.config)
    assert type(stock.layers[0]) is DynamicSlidingWindowLayer
    ids = random_ids(1, 9)
    run(model, ids, torch.ones_like(ids), stock)
    with pytest.raises(ValueError, match="new_cache"):
        kv.crop(stock, 2)
    with pytest.raises(ValueError, match="new_cache"):
        kv.gather(stock, torch.arange(7)[None])
    kept = torch.arange(9)[None]
    kv.gather(stock, kept)  # everything that the window needs is still there
    probe, mask = random_ids(1, 1, seed=3), torch.ones(1, 10, dtype=torch.long)
    fresh = run(model, torch.cat([ids, probe], 1), mask)[:, -1:]
    torch.testing.assert_close(run(model, probe, mask, stock), fresh, **TOLERANCE)
