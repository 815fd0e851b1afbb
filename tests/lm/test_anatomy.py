"""The weight views against the modules they describe: a whole block is recomputed from them by hand."""

import pytest
import torch
from torch import nn
from transformers import AutoModel, BloomConfig, BloomForCausalLM

from families import CORE, DECODERS, ENCODERS, random_ids, tiny_model
from papertrial.lm.anatomy import SUPPORTED, anatomy, body, position_limit, read_out, unwrap

FAMILIES = (*DECODERS, *ENCODERS)
# float32 sums of 32 to 48 terms in another order
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


def apply_norm(norm, x):
    y = norm.normalise(x) * norm.gain
    return y if norm.bias is None else y + norm.bias


def project(x, weight, bias):
    """(B, T, D) and (H, D, d_h) -> (B, H, T, d_h)."""
    y = torch.einsum("btd,hde->bhte", x, weight)
    return y if bias is None else y + bias[:, None]


def attend_by_hand(block, x, causal):
    """Attention without rotation: the model is run with all positions 0, where rotation is the identity."""
    q, k, v = project(x, block.W_Q, block.b_Q), project(x, block.W_K, block.b_K), project(x, block.W_V, block.b_V)
    if block.query_norm is not None:
        q, k = apply_norm(block.query_norm, q), apply_norm(block.key_norm, k)
    scores = q @ k.mT * block.scaling
    if block.softcap is not None:
        scores = (scores / block.softcap).tanh() * block.softcap
    if causal:
        scores = scores.masked_fill(~torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril(), -torch.inf)
    out = torch.einsum("bhte,hed->btd", scores.softmax(-1) @ v, block.W_O)
    return out if block.b_O is None else out + block.b_O


def feed_forward_by_hand(block, x):
    hidden = x @ block.W_in if block.b_in is None else x @ block.W_in + block.b_in
    if block.W_gate is None:
        hidden = block.activation(hidden)
    else:
        assert block.b_gate is None
        hidden = block.activation(x @ block.W_gate) * hidden
    return hidden @ block.W_out if block.b_out is None else hidden @ block.W_out + block.b_out


def block_by_hand(block, x, causal):
    if block.family.placement == "post":
        x = apply_norm(block.attention_norm, x + attend_by_hand(block, x, causal))
        return apply_norm(block.mlp_norm, x + feed_forward_by_hand(block, x))
    attended = attend_by_hand(block, apply_norm(block.attention_norm, x), causal)
    if block.post_attention_norm is not None:
        attended = apply_norm(block.post_attention_norm, attended)
    middle = x if block.parallel else x + attended
    fed = feed_forward_by_hand(block, apply_norm(block.mlp_norm, middle))
    if block.post_mlp_norm is not None:
        fed = apply_norm(block.post_mlp_norm, fed)
    return x + attended + fed


def block_inputs_and_outputs(model, ids):
    parts, seen = anatomy(model), []
    handles = [
        block.module.register_forward_hook(lambda _m, args, out: seen.append((args[0], out))) for block in parts.blocks
    ]
    mask = torch.ones_like(ids)
    with torch.no_grad():
        model(ids, attention_mask=mask, position_ids=torch.zeros_like(ids))
    for handle in handles:
        handle.remove()
    return parts, seen


VARIANTS = [(family, {}) for family in FAMILIES] + [
    ("gpt_neox", {"use_parallel_residual": False}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    ("gpt2", {"n_inner": None}),
    ("phi", {"qk_layernorm": True}),
    ("llama", {"num_key_value_heads": 4}),
    ("qwen3", {"num_key_value_heads": 1}),
]


@pytest.mark.parametrize(("family", "overrides"), VARIANTS)
def test_a_block_recomputed_from_the_views_equals_the_module(family, overrides):
    parts, seen = block_inputs_and_outputs(tiny_model(family, **overrides), random_ids(2, 7))
    assert len(seen) == len(parts.blocks) == 2
    for block, (before, after) in zip(parts.blocks, seen, strict=True):
        with torch.no_grad():
            by_hand = block_by_hand(block, before, causal=family in DECODERS)
        torch.testing.assert_close(by_hand, after, **CLOSE)


@pytest.mark.parametrize("family", DECODERS)
def test_embedding_final_norm_and_unembedding_frame_the_blocks(family):
    model = tiny_model(family)
    ids = random_ids(2, 5)
    parts, seen = block_inputs_and_outputs(model, ids)
    embedded = parts.W_E[ids] * parts.embedding_scale
    if parts.W_pos is not None:
        embedded = embedded + parts.W_pos[torch.zeros_like(ids)]
    torch.testing.assert_close(seen[0][0], embedded, **CLOSE)
    final = apply_norm(parts.final_norm, seen[-1][1])
    logits = final @ parts.W_U if parts.b_U is None else final @ parts.W_U + parts.b_U
    cap = getattr(model.config, "final_logit_softcapping", None)
    logits = logits if cap is None else (logits / cap).tanh() * cap
    with torch.no_grad():
        expected = model(ids, attention_mask=torch.ones_like(ids), position_ids=torch.zeros_like(ids)).logits
    torch.testing.assert_close(logits, expected, **CLOSE)
    torch.testing.assert_close(read_out(model, final), expected, **CLOSE)


@pytest.mark.parametrize("family", ENCODERS)
def test_encoders_sum_their_three_embeddings(family):
    model = tiny_model(family)
    ids = random_ids(2, 5)
    parts = anatomy(model)
    with torch.no_grad():
        embedded = body(model).embeddings(ids)
        tables = parts.W_E[ids] + parts.W_pos[:5] + body(model).embeddings.token_type_embeddings.weight[0]
        torch.testing.assert_close(body(model).embeddings.LayerNorm(tables), embedded, **CLOSE)
    assert parts.final_norm is None
    assert parts.W_U.shape == (32, 67)


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_come_from_the_weights(family):
    parts = anatomy(tiny_model(family))
    size = {"qwen3": 12, "gemma": 12, "gemma2": 12}.get(family, 8)
    groups = {"gemma": 1}.get(family, 2 if family in (*CORE[1:], "gemma2", "phi") else 4)
    for block in parts.blocks:
        assert (block.heads, block.key_value_heads, block.head_size, block.neurons) == (4, groups, size, 44)
        for weight in (block.W_Q, block.W_K, block.W_V):
            assert weight.shape == (4, 32, size)
        assert block.head_weights("key").shape == (groups, 32, size)
        assert block.W_O.shape == (4, size, 32)
        assert (block.W_in.shape, block.W_out.shape) == ((32, 44), (44, 32))
    assert parts.width == 32


@pytest.mark.parametrize("family", FAMILIES)
def test_writing_into_a_view_changes_the_model_and_gradients_pass_through_it(family):
    model = tiny_model(family)
    block = anatomy(model).blocks[1]
    views = [block.head_weights(name) for name in ("query", "key", "value")] + [block.W_O, block.W_in, block.W_out]
    storages = {parameter.data_ptr() for parameter in block.module.parameters()}
    for view in views:
        assert view.untyped_storage().data_ptr() in storages
    ids = random_ids(1, 6)
    with torch.no_grad():
        before = model(ids).logits
        # a head without an output weight is a head removed: the same as removing its values
        block.W_O[2].zero_()
        without = model(ids).logits
    assert (before - without).abs().max() > 1e-4
    other = tiny_model(family)
    twin = anatomy(other).blocks[1]
    if twin.key_value_heads == 4:
        with torch.no_grad():
            twin.head_weights("value")[2].zero_()
            if twin.b_V is not None:
                twin.head_biases("value")[2].zero_()
        torch.testing.assert_close(other(ids).logits, without, **CLOSE)
    block.W_Q.square().sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in block.projection("query").parameters())


def test_a_pruned_model_is_described_as_it_is():
    model = tiny_model("llama", num_key_value_heads=4)
    attention = model.model.layers[0].self_attn
    for name in ("q_proj", "k_proj", "v_proj"):
        old = getattr(attention, name)
        narrow = nn.Linear(32, 24, bias=False)
        narrow.weight.data = old.weight.data[:24].clone()
        setattr(attention, name, narrow)
    output = nn.Linear(24, 32, bias=False)
    output.weight.data = attention.o_proj.weight.data[:, :24].clone()
    attention.o_proj = output
    blocks = anatomy(model).blocks
    assert [block.heads for block in blocks] == [3, 4]
    assert [block.key_value_heads for block in blocks] == [3, 4]
    assert blocks[0].W_V.shape == (3, 32, 8)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_without_a_head_has_the_same_blocks(family):
    model = tiny_model(family)
    headless = AutoModel.from_config(model.config)
    parts = anatomy(headless)
    assert len(parts.blocks) == 2
    assert parts.unembed is None
    assert not parts.tied
    with pytest.raises(ValueError, match="no unembedding"):
        _ = parts.W_U
    assert body(headless) is body(headless.get_decoder())


def test_tying_is_seen():
    assert anatomy(tiny_model("gpt2")).tied
    assert not anatomy(tiny_model("llama")).tied
    assert anatomy(tiny_model("llama", tie_word_embeddings=True)).tied


def test_position_tables_say_how_long_a_text_may_be():
    limits = {family: position_limit(tiny_model(family)) for family in FAMILIES}
    learned = {"gpt2": 64, "opt": 64, "bert": 64, "roberta": 65}  # padding id 0 here: one row before position 0
    assert limits == {family: learned.get(family) for family in FAMILIES}
    for family in ("gpt2", "opt", "bert", "roberta"):
        model = tiny_model(family)
        model(random_ids(1, limits[family]))
        with pytest.raises((IndexError, RuntimeError)):
            model(random_ids(1, limits[family] + 1))


def test_wrappers_are_looked_through():
    model = tiny_model("llama")

    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.module = inner

    class Adapter(nn.Module):
        def get_base_model(self):
            return model

    assert unwrap(Wrapper(model)) is model
    assert anatomy(Adapter()).blocks[0].module is model.model.layers[0]
    with pytest.raises(TypeError, match="Linear"):
        unwrap(nn.Linear(2, 2))


def test_an_unmerged_adapter_is_refused_where_its_weight_would_be_wrong():
    model = tiny_model("llama")

    class LoraLike(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base_layer, self.merged = base, False

    layer = model.model.layers[0].self_attn
    layer.q_proj = LoraLike(layer.q_proj)
    with pytest.raises(ValueError, match="merge it first"):
        _ = anatomy(model).blocks[0].W_Q
    layer.q_proj.merged = True
    assert anatomy(model).blocks[0].W_Q.shape == (4, 32, 8)


def test_an_unknown_architecture_is_refused_with_the_list_of_known_ones():
    bloom = BloomForCausalLM(BloomConfig(vocab_size=11, hidden_size=8, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="bloom") as error:
        anatomy(bloom)
    for name in SUPPORTED:
        assert name in str(error.value)
    with pytest.raises(ValueError, match="post-norm"):
        anatomy(tiny_model("opt", do_layer_norm_before=False))
    with pytest.raises(ValueError, match="next-token head"):
        read_out(tiny_model("bert"), torch.zeros(1, 32))
