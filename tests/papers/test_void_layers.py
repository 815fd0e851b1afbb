import itertools

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from families import CORE, DECODERS, left_padded, random_ids, tiny_model
from papertrial.lm import cache as kv
from papertrial.lm.anatomy import anatomy, body
from papertrial.lm.generation import greedy, position_ids
from papertrial.lm.hooks import record
from papertrial.lm.hooks.junctions import _junctions
from papertrial.lm.pruning import keep_layers
from papertrial.papers.compression.void_layers.method import (
    L2AdaptiveComputation,
    LayerTrace,
    active_layers,
    last_layers,
    layer_usage,
    least_turning_layers,
    phase_distance,
    profile_distance,
    random_layers,
    shuffled_phase_distances,
    skip_layers,
    trace_layers,
)

SIX = {"gpt2": {"n_layer": 6}}
ROUNDING = 2e-5
"""float32 and other batch shapes: kernels sum in another order."""


def deep(family="llama", **settings):
    """Six blocks, so that the threshold has something to say from the third on."""
    return tiny_model(family, **SIX.get(family, {"num_hidden_layers": 6}), **settings)


def growing():
    """Blocks that always lengthen: positive embeddings, and feed-forward layers that put out their own bias."""
    model = tiny_model("gpt2", n_layer=5)
    with torch.no_grad():
        model.transformer.wte.weight.abs_()
        model.transformer.wpe.weight.abs_()
        for block, size in zip(model.transformer.h, (3.0, 1.0, 1.0, 0.5, 0.1), strict=True):
            block.attn.c_proj.weight.zero_()
            block.attn.c_proj.bias.zero_()
            block.mlp.c_proj.weight.zero_()
            block.mlp.c_proj.bias.fill_(size)
    return model


def literal_rule(norms, alpha, include_current=False, range_from=1):
    """Steps 1 to 3 as they are written, for one token: a list of norms to a list of booleans."""
    progress = [after - before for before, after in itertools.pairwise(norms)]
    active = []
    for layer in range(1, len(progress) + 1):
        end = layer + 1 if include_current else layer
        earlier = [progress[i - 1] for i in range(range_from, end)]
        if not earlier:
            earlier = [progress[layer - 1]]
        active.append(not progress[layer - 1] < alpha * (max(earlier) - min(earlier)))
    return active


def hidden_states(model, ids, mask=None):
    """(L + 1, B, S, D): what enters the first block and leaves each, without any final norm."""
    count = len(anatomy(model).blocks)
    mask = torch.ones_like(ids) if mask is None else mask
    with torch.no_grad(), record(model, ["resid_pre", "resid_post"]) as seen:
        model(input_ids=ids, attention_mask=mask)
    return torch.stack([seen["resid_pre"][0], *(seen["resid_post"][layer] for layer in range(count))])


# -- the rule ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("include_current", [False, True])
@pytest.mark.parametrize("range_from", [1, 2, 4])
@pytest.mark.parametrize("alpha", [0.0, 0.02, 0.3, 0.8, 1.0])
def test_masks_equal_a_loop_over_tokens_that_follows_the_definition(alpha, range_from, include_current):
    norms = torch.rand(9, 4, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 10
    active = active_layers(norms, alpha, include_current=include_current, range_from=range_from)
    for row in range(4):
        for token in range(7):
            expected = literal_rule(norms[:, row, token].tolist(), alpha, include_current, range_from)
            assert active[:, row, token].tolist() == expected


def test_a_worked_example():
    norms = torch.tensor([1.0, 5.0, 6.0, 6.5, 10.0, 9.0])  # progress 4, 1, 0.5, 3.5, -1
    assert active_layers(norms, 0.5).tolist() == [True, True, False, True, False]  # thresholds 0, 0, 1.5, 1.75, 1.75
    assert active_layers(norms, 0.1).tolist() == [True, True, True, True, False]
    # without the first block: progress 1, 0.5, 3.5, -1 against 0, 0, 0.25, 1.5
    assert active_layers(norms, 0.5, range_from=2).tolist() == [True, True, True, True, False]
    # with its own progress the second block is measured against (4 - 1) / 2
    assert active_layers(norms, 0.5, include_current=True).tolist() == [True, False, False, True, False]


def test_the_first_two_blocks_are_void_only_if_they_shorten():
    norms = torch.tensor([[5.0, 5.0], [6.0, 4.0], [6.0, 3.0], [9.0, 9.0]])
    assert active_layers(norms, 1.0)[:2].tolist() == [[True, False], [True, False]]


def test_progress_is_signed():
    # the third block shortens by far more than any block lengthens: void, although its change is the largest
    assert active_layers(torch.tensor([1.0, 2.0, 3.0, 0.5]), 0.0).tolist() == [True, True, False]


def test_more_alpha_never_means_more_active_blocks():
    norms = torch.rand(13, 50, generator=torch.Generator().manual_seed(2)) * 5
    counts = torch.stack([active_layers(norms, a).sum(0) for a in (0.0, 0.01, 0.1, 0.3, 0.5, 0.8, 1.0)])
    assert bool((counts.diff(dim=0) <= 0).all())
    assert bool((counts[0] > counts[-1]).any())


def test_masks_do_not_depend_on_the_unit_of_length():
    norms = torch.rand(9, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for factor in (0.25, 8.0, 1024.0):  # powers of two, so that rounding is the same
        assert torch.equal(active_layers(factor * norms, 0.4), active_layers(norms, 0.4))


@pytest.mark.parametrize(
    ("norms", "settings", "message"),
    [
        (torch.rand(4), {"alpha": 1.5}, "alpha must lie in"),
        (torch.rand(4), {"alpha": float("nan")}, "alpha must lie in"),
        (torch.rand(4), {"range_from": 0}, "range_from"),
        (torch.rand(1), {}, "at least one layer"),
        (torch.tensor([1.0, float("inf")]), {}, "finite"),
        (torch.tensor([1.0, -1.0]), {}, "negative"),
    ],
)
def test_bad_norms_and_dials_are_refused(norms, settings, message):
    with pytest.raises(ValueError, match=message):
        active_layers(norms, **settings)


# -- traces ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", DECODERS)
def test_a_trace_holds_the_norms_of_the_residual_stream(family):
    model = tiny_model(family)
    ids, mask = left_padded(3, 9)
    trace = trace_layers(model, ids, mask, 0.3)
    with torch.no_grad(), record(model, ["resid_pre", "resid_post"]) as seen:
        model(input_ids=ids, attention_mask=mask, **positions(model, mask))
    states = torch.stack([seen["resid_pre"][0], seen["resid_post"][0], seen["resid_post"][1]])
    real = mask.bool()
    torch.testing.assert_close(trace.norms[:, real], states.norm(dim=-1)[:, real], rtol=1e-5, atol=1e-6)
    assert torch.equal(trace.active, active_layers(trace.norms, 0.3))
    assert torch.equal(trace.real, real)
    torch.testing.assert_close(trace.progress, trace.norms.diff(dim=0), rtol=0, atol=1e-6)
    cosine = torch.nn.functional.cosine_similarity(states[:-1], states[1:], dim=-1)
    torch.testing.assert_close(trace.cosine[:, real], cosine[:, real], rtol=0, atol=1e-5)


def positions(model, mask):
    """``position_ids`` where the model's forward takes them; OPT counts by the mask."""
    return {} if "OPT" in type(model).__name__ else {"position_ids": position_ids(mask)}


def test_padding_is_in_no_phase_and_rows_may_have_prompts_of_their_own_length():
    ids, mask = left_padded(3, 8)
    trace = trace_layers(deep(), ids, mask, 0.2, prompt_length=torch.tensor([5, 6, 7]))
    assert trace.of("response").sum(1).tolist() == [3, 2, 1]
    assert trace.of("prompt").sum(1).tolist() == [5, 5, 5]
    assert torch.equal(trace.of(), mask.bool())
    usage = layer_usage(trace, "response")
    chosen = torch.stack([trace.active[:, r, t] for r, t in [(0, 5), (0, 6), (0, 7), (1, 6), (1, 7), (2, 7)]], 1)
    torch.testing.assert_close(usage.per_layer, chosen.double().mean(1))
    assert usage.mean == pytest.approx(float(chosen.double().mean()))
    assert usage.tokens == 6


@pytest.mark.parametrize("family", CORE)
def test_one_forward_over_a_text_equals_cached_one_token_forwards(family):
    model, ids = deep(family), random_ids(2, 7)
    whole = trace_layers(model, ids, alpha=0.3)
    with torch.no_grad(), L2AdaptiveComputation(model, 0.3, phases=()) as lac:
        cache = kv.new_cache(model)
        for token in ids.split(1, dim=1):
            model(input_ids=token, past_key_values=cache, use_cache=True)
    steps = lac.trace
    torch.testing.assert_close(steps.norms, whole.norms, rtol=1e-5, atol=ROUNDING)
    clear = (whole.progress - threshold_of(whole, 0.3)).abs() > 1e-3  # not decided by rounding
    assert torch.equal(steps.active[clear], whole.active[clear])
    assert float(clear.double().mean()) > 0.9
    assert steps.response.tolist() == [[False] + [True] * 6] * 2


def threshold_of(trace, alpha):
    high, low = trace.progress.cummax(0).values, trace.progress.cummin(0).values
    return torch.cat([torch.zeros_like(high[:1]), alpha * (high - low)[:-1]])


def test_half_precision_norms_do_not_overflow():
    model = tiny_model("llama").half()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(3000)  # squares of these do not fit into half precision
    trace = trace_layers(model, random_ids(1, 5), alpha=0.5)
    assert trace.norms.dtype == torch.float32
    assert float(trace.norms.min()) > 256


def test_vectors_that_are_not_finite_are_refused():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(1e38)
    with pytest.raises(ValueError, match="not finite"):
        trace_layers(model, random_ids(1, 5))


# -- leaving out -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("semantics", ["skip", "readout"])
def test_where_every_block_lengthens_alpha_zero_changes_no_bit(semantics):
    model, ids = growing(), random_ids(2, 9)
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with L2AdaptiveComputation(model, 0.0, semantics=semantics) as lac:
            same = model(input_ids=ids).logits
    assert bool(lac.trace.active.all())
    assert torch.equal(plain, same)
    with torch.no_grad(), L2AdaptiveComputation(model, 1.0, semantics=semantics) as lac:
        changed = model(input_ids=ids).logits
    assert not bool(lac.trace.active.all())  # the same model has voids at another alpha
    assert not torch.equal(plain, changed)


@pytest.mark.parametrize("family", DECODERS)
def test_readout_is_the_output_of_the_last_active_block(family):
    model, ids = (
        tiny_model(family, **({"n_layer": 5} if family == "gpt2" else {"num_hidden_layers": 5})),
        random_ids(3, 8),
    )
    states = hidden_states(model, ids)
    active = trace_layers(model, ids, alpha=0.4).active
    last = torch.zeros(3, 8, dtype=torch.long)
    for layer in range(active.shape[0]):
        last[active[layer]] = layer + 1
    assert int((last < active.shape[0]).sum()) > 0
    expected = states.gather(0, last[None, ..., None].expand(1, -1, -1, states.shape[-1]))[0]
    with torch.no_grad(), L2AdaptiveComputation(model, 0.4, semantics="readout"), record(model, "resid_post") as seen:
        model(input_ids=ids)
    assert torch.equal(seen["resid_post"][active.shape[0] - 1], expected)
    for layer in range(active.shape[0] - 1):  # nothing before the end is changed
        assert torch.equal(seen["resid_post"][layer], states[layer + 1])


def test_readout_leaves_the_cache_as_the_plain_model_writes_it():
    model, ids = deep(), random_ids(2, 8)
    caches = []
    for manager in (
        L2AdaptiveComputation(model, 0.5, phases=()),
        L2AdaptiveComputation(model, 0.5, semantics="readout"),
    ):
        cache = kv.new_cache(model)
        with torch.no_grad(), manager:
            model(input_ids=ids, past_key_values=cache, use_cache=True)
        caches.append(cache)
    for plain, other in zip(caches[0].layers, caches[1].layers, strict=True):
        assert torch.equal(plain.keys, other.keys)
        assert torch.equal(plain.values, other.values)


def test_skip_writes_keys_and_values_of_voids_too():
    model, ids = deep(), random_ids(2, 8)
    cache = kv.new_cache(model)
    with torch.no_grad(), L2AdaptiveComputation(model, 0.8) as lac:
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    assert not bool(lac.trace.active.all())
    assert all(layer.keys.shape[-2] == 8 for layer in cache.layers)


@pytest.mark.parametrize("family", CORE)
@pytest.mark.parametrize("layer", [0, 2, 5])
def test_skipping_one_block_for_all_tokens_equals_the_model_without_it(family, layer):
    model = deep(family)
    ids, mask = left_padded(3, 8)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids(mask)}
    active = torch.ones(6, 3, 8, dtype=torch.bool)
    active[layer] = False
    with torch.no_grad(), skip_layers(model, active):
        found = model(**inputs).logits
    with torch.no_grad():
        expected = keep_layers(model, [i for i in range(6) if i != layer])(**inputs).logits
        plain = model(**inputs).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=0, atol=ROUNDING)
    assert not torch.allclose(found, plain, atol=1e-2)


def test_skip_carries_each_token_past_its_own_voids():
    """Against a plain loop over blocks and tokens; attention sees what each token's block really wrote."""
    model, ids = deep("llama"), random_ids(2, 6)
    parts = anatomy(model)
    with torch.no_grad():
        state = parts.embed(ids)
        rotary = model.model.rotary_emb(state, torch.arange(6)[None])
        causal = torch.full((6, 6), float("-inf")).triu(1)[None, None]
        progress = []
        for block in parts.blocks:
            output = block.module(state, position_embeddings=rotary, attention_mask=causal)
            output = output if isinstance(output, torch.Tensor) else output[0]
            progress.append(output.norm(dim=-1) - state.norm(dim=-1))
            kept = output.clone()
            for row in range(2):
                for token in range(6):
                    own = [float(p[row, token]) for p in progress]
                    earlier = own[:-1] or own
                    if own[-1] < 0.5 * (max(earlier) - min(earlier)):
                        kept[row, token] = state[row, token]
            state = kept
        expected = model.lm_head(model.model.norm(state))
        with L2AdaptiveComputation(model, 0.5) as lac:
            found = model(input_ids=ids).logits
    assert 0.2 < layer_usage(lac.trace).mean < 0.95
    torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(lac.trace.progress, torch.stack(progress), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("semantics", ["skip", "readout"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_given_masks_repeat_what_the_rule_did(family, semantics):
    model, ids = deep(family) if family != "gemma2" else tiny_model("gemma2", num_hidden_layers=6), random_ids(2, 8)
    with torch.no_grad():
        with L2AdaptiveComputation(model, 0.6, semantics=semantics) as lac:
            by_rule = model(input_ids=ids).logits
        with skip_layers(model, lac.trace.active, semantics=semantics):
            by_mask = model(input_ids=ids).logits
    assert torch.equal(by_rule, by_mask)


def test_only_the_chosen_phase_is_changed():
    model, ids = deep(), random_ids(2, 10)
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with L2AdaptiveComputation(model, 0.8, phases=("response",), prompt_length=6):
            response = model(input_ids=ids).logits
        with L2AdaptiveComputation(model, 0.8, phases=["prompt"], semantics="readout", prompt_length=6):
            prompt = model(input_ids=ids).logits
        with L2AdaptiveComputation(model, 0.8, semantics="readout"):
            both = model(input_ids=ids).logits
    assert torch.equal(response[:, :6], plain[:, :6])
    assert not torch.equal(response[:, 6:], plain[:, 6:])
    assert torch.equal(prompt[:, 6:], plain[:, 6:])
    assert torch.equal(prompt[:, :6], both[:, :6])
    assert not torch.equal(prompt[:, :6], plain[:, :6])


@pytest.mark.parametrize("semantics", ["skip", "readout"])
@pytest.mark.parametrize("phases", [("prompt", "response"), ("response",), ("prompt",)])
def test_generation_is_the_same_with_and_without_a_cache(semantics, phases):
    model = deep()
    ids, mask = left_padded(3, 7)
    settings = {"max_new_tokens": 6, "eos_token_id": None}
    with L2AdaptiveComputation(model, 0.6, phases=phases, semantics=semantics):
        cached = greedy(model, ids, mask, **settings)
    with L2AdaptiveComputation(model, 0.6, phases=phases, semantics=semantics, prompt_length=7):
        whole = greedy(model, ids, mask, use_cache=False, **settings)
    plain = greedy(model, ids, mask, **settings)
    assert torch.equal(cached.tokens, whole.tokens)
    torch.testing.assert_close(cached.log_probs, whole.log_probs, rtol=0, atol=ROUNDING)
    assert not torch.allclose(cached.log_probs, plain.log_probs, atol=1e-2)


def test_generate_of_transformers_is_traced_phase_by_phase():
    model = deep()
    ids, mask = left_padded(3, 7)
    with L2AdaptiveComputation(model, 0.6) as lac:
        made = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False, eos_token_id=None)
    trace = lac.trace
    assert len(lac.passes) == 5
    assert trace.real.sum(1).tolist() == [11, 10, 9]  # the last token made is never fed
    assert trace.of("response").sum(1).tolist() == [4, 4, 4]
    with L2AdaptiveComputation(model, 0.6):
        ours = greedy(model, ids, mask, max_new_tokens=5, eos_token_id=None)
    assert torch.equal(made[:, 7:], ours.tokens)
    lac.clear()
    with pytest.raises(ValueError, match="nothing was traced"):
        _ = lac.trace


def test_all_is_as_before_when_the_block_is_left_even_by_an_error():
    model, ids = deep(), random_ids(1, 5)
    with torch.no_grad():
        plain = model(input_ids=ids).logits
    lac = L2AdaptiveComputation(model, 0.9)
    with pytest.raises(KeyError), lac:
        raise KeyError
    with (
        pytest.raises(ValueError, match="this forward has"),
        skip_layers(model, torch.zeros(6, 1, 4, dtype=torch.bool)),
    ):
        model(input_ids=ids)
    modules = [body(model), *(block.module for block in anatomy(model).blocks)]
    assert not any(m._forward_hooks or m._forward_pre_hooks or _junctions.get(m) for m in modules)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, plain)
        with lac:  # it may be entered again
            assert not torch.equal(model(input_ids=ids).logits, plain)
    assert len(lac.passes) == 1


def test_gradients_pass_through_the_active_blocks_only():
    model, ids = deep(), random_ids(1, 4)
    active = torch.ones(6, 1, 4, dtype=torch.bool)
    active[5] = False
    with skip_layers(model, active):
        model(input_ids=ids).logits.square().sum().backward()
    weights = [block.module.mlp.down_proj.weight.grad for block in anatomy(model).blocks]
    assert float(weights[4].abs().sum()) > 0
    assert weights[5] is None or float(weights[5].abs().sum()) == 0


# -- phases ------------------------------------------------------------------------------------------------------


def made_trace(active, response, real=None):
    active = torch.as_tensor(active, dtype=torch.bool)
    zeros = torch.zeros(active.shape)
    response = torch.as_tensor(response, dtype=torch.bool)
    real = torch.ones_like(response) if real is None else torch.as_tensor(real, dtype=torch.bool)
    return LayerTrace(torch.zeros(active.shape[0] + 1, *active.shape[1:]), zeros, active, zeros, real, response)


def test_phase_distance_is_the_mean_difference_of_shares():
    # prompt: layer 0 active in 2 of 2 tokens, layer 1 in 1 of 2; response: 0 of 1, 1 of 1; padding is not counted
    trace = made_trace([[[0, 1, 1, 0]], [[1, 1, 0, 1]]], [[0, 0, 0, 1]], [[0, 1, 1, 1]])
    assert phase_distance(trace) == pytest.approx((1.0 + 0.5) / 2)
    assert layer_usage(trace, "prompt").mean == pytest.approx(0.75)
    assert profile_distance(torch.tensor([0.2, 0.4]), torch.tensor([0.2, 0.4])) == 0


def test_shuffling_gives_the_null_and_finds_a_planted_difference():
    g = torch.Generator().manual_seed(0)
    response = torch.rand(20, 30, generator=g) < 0.3
    same = torch.rand(8, 20, 30, generator=g) < 0.6
    planted = torch.rand(8, 20, 30, generator=g) < torch.where(response, 0.75, 0.55)
    for active, differs in ((same, False), (planted, True)):
        trace = made_trace(active, response)
        null = shuffled_phase_distances(trace, 200, generator=torch.Generator().manual_seed(1))
        again = shuffled_phase_distances(trace, 200, generator=torch.Generator().manual_seed(1))
        assert torch.equal(null, again)
        # a fair share of 0.6 has standard deviation 0.49 * sqrt(1/180 + 1/420) = 0.044 and mean distance 0.8 of it
        assert float(null.mean()) == pytest.approx(0.8 * 0.044, rel=0.15)
        assert (phase_distance(trace) > float(null.quantile(0.999))) is differs


def test_a_phase_without_tokens_is_an_error():
    trace = made_trace([[[1, 1]]], [[0, 0]])
    for call in (lambda: layer_usage(trace, "response"), lambda: phase_distance(trace)):
        with pytest.raises(ValueError, match="no token of the phase 'response'"):
            call()
    with pytest.raises(ValueError, match="no tokens"):
        shuffled_phase_distances(trace, 5, generator=torch.Generator())
    with pytest.raises(ValueError, match="phase must be one of"):
        layer_usage(trace, "answer")
    with pytest.raises(ValueError, match="rows"):
        LayerTrace.concatenate([trace, made_trace([[[1], [1]]], [[0], [0]])])


# -- controls ----------------------------------------------------------------------------------------------------


def test_controls_drop_exactly_as_many_blocks_per_token():
    g = torch.Generator().manual_seed(0)
    dropped = torch.randint(0, 9, (4, 50), generator=g)
    cosine = torch.rand(8, 4, 50, generator=g)
    for active in (
        random_layers(dropped, 8, generator=g),
        random_layers(dropped, 8, generator=g, spared=2),
        last_layers(dropped, 8),
        least_turning_layers(dropped, cosine),
    ):
        assert torch.equal((~active).sum(0), dropped)


def test_random_layers_are_uniform_and_spare_the_first_ones():
    dropped = torch.full((1, 20000), 2)
    share = (~random_layers(dropped, 5, generator=torch.Generator().manual_seed(0))).double().mean((1, 2))
    torch.testing.assert_close(share, torch.full((5,), 0.4).double(), rtol=0, atol=0.015)  # four standard errors
    late = (~random_layers(dropped, 5, generator=torch.Generator().manual_seed(0), spared=2)).double().mean((1, 2))
    torch.testing.assert_close(late, torch.tensor([0, 0, 2, 2, 2]).double() / 3, rtol=0, atol=0.015)
    four = (~random_layers(torch.full((1, 9), 4), 5, generator=torch.Generator(), spared=2)).sum(0)
    assert four.tolist() == [[4] * 9]  # more than are left after the spared ones: those go too


def test_the_last_and_the_least_turning_layers_are_what_they_say():
    assert last_layers(torch.tensor([[0, 1, 3]]), 3)[:, 0].T.tolist() == [[True] * 3, [True, True, False], [False] * 3]
    cosine = torch.tensor([0.1, 0.9, 0.5, 0.95])[:, None, None]
    assert least_turning_layers(torch.tensor([[2]]), cosine)[:, 0, 0].tolist() == [True, False, True, False]


def test_leaving_out_the_last_layers_is_leaving_early():
    model, ids = deep(), random_ids(2, 6)
    with torch.no_grad(), skip_layers(model, last_layers(torch.full((2, 6), 2), 6)):
        found = model(input_ids=ids).logits
    with torch.no_grad():
        expected = keep_layers(model, [0, 1, 2, 3])(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: random_layers(torch.tensor([[4]]), 3, generator=torch.Generator()), "integers in 0 .. 3"),
        (lambda: random_layers(torch.tensor([[1]]), 3, generator=torch.Generator(), spared=4), "spared"),
        (lambda: last_layers(torch.tensor([[0.5]]), 3), "integers"),
        (lambda: least_turning_layers(torch.tensor([[1]]), torch.rand(3, 2, 1)), "cosine"),
    ],
)
def test_bad_counts_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# -- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": -0.1}, "alpha must lie in"),
        ({"alpha": 1.1}, "alpha must lie in"),
        ({"phases": ("prompt", "reply")}, "phases must be"),
        ({"phases": "prompt"}, "phases must be"),
        ({"semantics": "drop"}, "semantics must be one of skip, readout"),
        ({"prompt_length": torch.ones(2, 2)}, "prompt_length"),
        ({"range_from": 0}, "range_from"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        L2AdaptiveComputation(tiny_model("llama"), **settings)


def test_models_without_a_pre_norm_stream_of_tokens_are_refused():
    with pytest.raises(ValueError, match="normalises inside its residual stream"):
        L2AdaptiveComputation(tiny_model("bert"))
    with (
        pytest.raises(ValueError, match="semantics"),
        skip_layers(tiny_model("gpt2"), torch.ones(2, 1, 1).bool(), semantics="x"),
    ):
        pass
    with (
        pytest.raises(ValueError, match="active must be bool"),
        skip_layers(tiny_model("gpt2"), torch.ones(3, 1, 1).bool()),
    ):
        pass


def test_a_computation_in_force_cannot_be_entered_again():
    lac = L2AdaptiveComputation(tiny_model("gpt2"))
    with lac, pytest.raises(RuntimeError, match="already in force"):
        lac.__enter__()


def test_prompt_lengths_must_fit_the_rows():
    model = tiny_model("gpt2")
    with pytest.raises(ValueError, match="2 entries for 3 rows"):
        trace_layers(model, random_ids(3, 5), prompt_length=torch.tensor([1, 2]))


def test_a_block_by_itself_is_refused():
    config = LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)
    model = LlamaForCausalLM(config).eval()
    x = torch.randn(1, 3, 8)
    with L2AdaptiveComputation(model), pytest.raises(RuntimeError, match="outside a forward pass"):
        model.model.layers[0](x, position_embeddings=model.model.rotary_emb(x, torch.arange(3)[None]))
