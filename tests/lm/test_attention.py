"""The dispatcher against stock attention, bit for bit, and what no attention function may do: see the future."""

import copy

import pytest
import torch

from families import DECODERS, ENCODERS, left_padded, random_ids, tiny_model
from papertrial.lm.anatomy import anatomy
from papertrial.lm.attention import (
    attention_scores,
    record_attention,
    repeat_heads,
    softmax_attention,
    softmax_weights,
    use_attention,
    visible,
    weighted_attention,
)
from papertrial.lm.generation import greedy, position_ids
from papertrial.lm.hooks import record

FAMILIES = (*DECODERS, *ENCODERS)
CLOSE = {"atol": 1e-5, "rtol": 1e-4}  # float32 sums in another order


def run(model, ids, mask):
    with torch.no_grad():
        return model(ids, attention_mask=mask, position_ids=position_ids(mask)).logits


def implementations(family):
    return ("eager",) if family == "gemma2" else ("sdpa", "eager")  # soft-capped scores have no sdpa


def uniform(module, scores, seen):
    return seen / seen.sum(-1, keepdim=True).clamp(min=1).expand_as(scores)


def sigmoid(module, scores, seen):
    return scores.sigmoid()


CASES = [(family, name) for family in FAMILIES for name in implementations(family)]


@pytest.mark.parametrize(("family", "implementation"), CASES)
@pytest.mark.parametrize("padded", [False, True])
def test_layers_without_override_run_bit_equal_to_the_stock_implementation(family, implementation, padded):
    model = tiny_model(family, attn_implementation=implementation)
    ids, mask = left_padded(3, 8) if padded else (random_ids(3, 8), torch.ones(3, 8, dtype=torch.long))
    expected = run(model, ids, mask)
    with use_attention(model, softmax_attention, layers=[]):
        assert torch.equal(run(model, ids, mask), expected)
    with record_attention(model) as seen:
        assert torch.equal(run(model, ids, mask), expected)
    assert seen.layers == [0, 1]
    assert model.config._attn_implementation == implementation
    assert torch.equal(run(model, ids, mask), expected)


@pytest.mark.parametrize("family", DECODERS)
def test_decoding_with_a_cache_is_bit_equal_without_override(family):
    model = tiny_model(family)
    ids, mask = left_padded(3, 6)
    expected = greedy(model, ids, mask, max_new_tokens=5)
    with use_attention(model, softmax_attention, layers=[]):
        got = greedy(model, ids, mask, max_new_tokens=5)
    assert torch.equal(got.tokens, expected.tokens)
    assert torch.equal(got.log_probs, expected.log_probs)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plain_function_equals_stock_attention_in_forward_and_in_generation(family):
    model = tiny_model(family)
    ids, mask = left_padded(3, 8)
    expected = run(model, ids, mask)
    real = mask.bool()
    for layers in (None, [0], [-1]):
        with use_attention(model, softmax_attention, layers):
            torch.testing.assert_close(run(model, ids, mask)[real], expected[real], **CLOSE)
    if family in DECODERS:
        plain = greedy(model, ids, mask, max_new_tokens=5)
        with use_attention(model, softmax_attention):
            assert torch.equal(greedy(model, ids, mask, max_new_tokens=5).tokens, plain.tokens)


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("attend", [None, softmax_attention, weighted_attention(uniform), weighted_attention(sigmoid)])
def test_earlier_logits_do_not_see_the_last_token(family, attend):
    model = tiny_model(family)
    ids, mask = left_padded(3, 8)
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 5) % 60 + 3
    with use_attention(model, softmax_attention if attend is None else attend, [] if attend is None else None):
        before, after = run(model, ids, mask), run(model, changed, mask)
    # a padding token sees nothing, and stock attention then averages over everything: its own row is never read
    real = mask.bool()[:, :-1]
    assert torch.equal(before[:, :-1][real], after[:, :-1][real])
    assert not torch.allclose(before[:, -1], after[:, -1])


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_is_not_attended_to(family):
    model = tiny_model(family)
    ids, mask = left_padded(3, 8)
    other = torch.where(mask.bool(), ids, torch.full_like(ids, 11))
    with use_attention(model, weighted_attention(sigmoid)):
        before, after = run(model, ids, mask), run(model, other, mask)
    assert torch.equal(before[mask.bool()], after[mask.bool()])


@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_patterns_are_those_of_eager_attention_and_mix_the_values(family):
    ids, mask = left_padded(3, 7)
    model = tiny_model(family)
    eager = tiny_model(family, attn_implementation="eager")
    with torch.no_grad():
        expected = eager(ids, attention_mask=mask, position_ids=position_ids(mask), output_attentions=True).attentions
    with record_attention(model) as seen, record(model, "head_out") as heads:
        run(model, ids, mask)
    real = mask.bool()
    for layer in (0, 1):
        pattern = seen[layer]
        torch.testing.assert_close(pattern.transpose(1, 2)[real], expected[layer].transpose(1, 2)[real], **CLOSE)
        torch.testing.assert_close(pattern.sum(-1).transpose(1, 2)[real], torch.ones(int(real.sum()), 4))
        mixed = (pattern @ repeat_heads(seen.values(layer), 4)).transpose(1, 2)
        torch.testing.assert_close(mixed[real], heads["head_out"][layer][real], **CLOSE)
    assert seen.patterns().shape == (2, 3, 4, 7, 7)
    groups = anatomy(model).blocks[0].key_value_heads
    assert seen.keys(0).shape[1] == groups
    assert seen.queries(0).shape[:3] == (3, 4, 7)


def test_layers_are_recorded_under_their_own_index_and_see_overrides():
    model = tiny_model("llama")
    ids, mask = left_padded(2, 6)
    with record_attention(model, [1]) as seen, use_attention(model, weighted_attention(uniform), [1]):
        run(model, ids, mask)
    assert seen.layers == [1]
    torch.testing.assert_close(seen[1][0, 0, 3], torch.tensor([0.25, 0.25, 0.25, 0.25, 0.0, 0.0]))
    with pytest.raises(KeyError, match="layer 0 was not recorded"):
        _ = seen[0]

    def silent(*args, **kwargs):
        return softmax_attention(*args, **kwargs)[0], None

    with use_attention(model, silent), record_attention(model) as quiet:
        with pytest.raises(KeyError, match="was not passed"):
            _ = quiet[0]
        run(model, ids, mask)
        with pytest.raises(KeyError, match="returns no weights"):
            _ = quiet[0]
    assert quiet.keys(0).shape == (2, 2, 6, 8)


def test_nested_overrides_let_the_innermost_win_and_come_off_in_order():
    model = tiny_model("qwen2")
    ids, mask = left_padded(2, 6)
    plain = run(model, ids, mask)
    calls = []

    def tagged(name):
        def attend(module, *args, **kwargs):
            calls.append((name, module.layer_idx))
            return softmax_attention(module, *args, **kwargs)

        return attend

    with use_attention(model, tagged("outer")):
        with use_attention(model, tagged("inner"), [1]):
            run(model, ids, mask)
        assert calls == [("outer", 0), ("inner", 1)]
        calls.clear()
        run(model, ids, mask)
        assert calls == [("outer", 0), ("outer", 1)]
    calls.clear()
    with pytest.raises(RuntimeError, match="inside"), use_attention(model, tagged("outer")):
        raise RuntimeError("inside")
    assert torch.equal(run(model, ids, mask), plain)
    assert calls == []
    assert model.config._attn_implementation == "sdpa"
    assert not any(hasattr(block.attention, "_papertrial_attention") for block in anatomy(model).blocks)


def test_another_model_in_the_same_process_is_not_touched():
    model = tiny_model("llama")
    other = copy.deepcopy(model)
    ids, mask = left_padded(2, 6)
    plain = run(other, ids, mask)
    with use_attention(model, weighted_attention(uniform)):
        assert not torch.allclose(run(model, ids, mask), plain)
        assert torch.equal(run(other, ids, mask), plain)


def test_sliding_windows_are_kept():
    model = tiny_model("mistral", sliding_window=3)
    ids, mask = left_padded(2, 8)
    expected = run(model, ids, mask)
    with use_attention(model, softmax_attention), record_attention(model) as seen:
        torch.testing.assert_close(run(model, ids, mask)[mask.bool()], expected[mask.bool()], **CLOSE)
    weights = seen[0][0, 0]
    assert (weights[torch.ones(8, 8).tril(-3).bool()] == 0).all()
    assert (weights[torch.ones(8, 8).tril(0).triu(-2).bool()] > 0).all()


def test_training_through_an_override_gives_the_stock_gradients():
    ids, mask = left_padded(2, 6)
    gradients = []
    for attend in (softmax_attention, weighted_attention(lambda _module, scores, seen: softmax_weights(scores, seen))):
        model = tiny_model("qwen3")
        with use_attention(model, attend):
            out = model(ids, attention_mask=mask, position_ids=position_ids(mask), use_cache=False)
            out.logits[mask.bool()].square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    model = tiny_model("qwen3")
    out = model(ids, attention_mask=mask, position_ids=position_ids(mask), use_cache=False)
    out.logits[mask.bool()].square().sum().backward()
    for plain, safe, stock in zip(*gradients, [p.grad for p in model.parameters()], strict=True):
        torch.testing.assert_close(plain, stock, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(safe, stock, atol=1e-3, rtol=1e-3)


def test_softmax_weights_of_a_row_that_sees_nothing_are_zero_with_finite_gradients():
    scores = torch.randn(1, 1, 2, 3, requires_grad=True)
    seen = torch.tensor([[True, True, False], [False, False, False]])[None, None]
    weights = softmax_weights(scores, seen)
    assert weights[0, 0, 1].tolist() == [0, 0, 0]
    torch.testing.assert_close(weights[0, 0, 0, :2], scores[0, 0, 0, :2].softmax(-1))
    weights.square().sum().backward()
    assert scores.grad.isfinite().all()


def test_the_pieces_of_attention():
    query, key = torch.randn(1, 4, 2, 8), torch.randn(1, 2, 3, 8)
    scores = attention_scores(query, key)
    assert scores[0, 3, 1, 2].item() == pytest.approx((query[0, 3, 1] @ key[0, 1, 2]).item() / 8**0.5, abs=1e-5)
    capped = attention_scores(query, key, scaling=1.0, softcap=2.0)
    torch.testing.assert_close(capped, 2 * torch.tanh(query @ repeat_heads(key, 4).mT / 2))
    assert visible(None, scores).shape == (1, 1, 2, 3)
    with pytest.raises(ValueError, match="evenly"):
        repeat_heads(key, 3)


def test_bad_requests_are_refused_with_a_reason():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="layer 2 is out of range"), use_attention(model, softmax_attention, [2]):
        pass
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="flash_attention_2"), record_attention(model):
        pass
