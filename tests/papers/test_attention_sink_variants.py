"""Every attention variant against its formula in loops, and what the paper says tells them apart."""

import math

import pytest
import torch
import torch.nn.functional as F

from families import CORE, DECODERS, ENCODERS, left_padded, random_ids, tiny_model
from papertrial.lm.anatomy import anatomy
from papertrial.lm.attention import record_attention, use_attention
from papertrial.lm.generation import greedy, position_ids
from papertrial.lm.training import adamw, train
from papertrial.papers.attention.attention_sink.method import (
    VARIANTS,
    add_sink_token,
    attention_weights,
    forget_attention,
    prepend_sink_token,
    set_attention,
)
from papertrial.papers.attention.attention_sink.method.variants import _function

BIASES = ("k_bias", "kv_bias", "v_bias")
CLOSE = {"atol": 2e-5, "rtol": 1e-4}  # float32 sums in another order


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def run(model, ids, mask=None):
    mask = torch.ones_like(ids) if mask is None else mask
    with torch.no_grad():
        return model(ids, attention_mask=mask, position_ids=position_ids(mask)).logits


def strong(model):
    """Parameters of a variant large enough to matter: their start is close to zero."""
    for name, parameter in model.named_parameters():
        if "attention_sink" in name:
            parameter.data.normal_(generator=generator(5))
    return model


# -- formulas ------------------------------------------------------------------------------------------------------


def by_loops(variant, query, key, value, seen, own):
    """Output (B, H, T, d) and weights (B, H, T, S), number by number, in float64."""
    batch, heads, length, size = query.shape
    group = heads // key.shape[1]
    maps = {"mlp": lambda x: own(x), "elu": lambda x: F.elu(x) + 1, "linear": lambda x: x}
    name = variant.removesuffix("_norm")
    out, weights = torch.zeros_like(query), torch.zeros(batch, heads, length, key.shape[2], dtype=query.dtype)
    for b in range(batch):
        for h in range(heads):
            for i in range(length):
                keys = [j for j in range(key.shape[2]) if bool(seen[b, 0, i, j])]
                score = {j: float(query[b, h, i] @ key[b, h // group, j]) / math.sqrt(size) for j in keys}
                star, v_star = 0.0, torch.zeros(size, dtype=query.dtype)
                if variant in BIASES:
                    head = min(h, (own.value if own.key is None else own.key).shape[0] - 1)
                    star = 0.0 if own.key is None else math.exp(float(query[b, h, i] @ own.key[head]) / math.sqrt(size))
                    v_star = v_star if own.value is None else own.value[head]
                if name in maps:
                    phi = maps[name]
                    row = {j: float(phi(query[b, h, i]) @ phi(key[b, h // group, j])) / math.sqrt(size) for j in keys}
                elif name == "sigmoid":
                    row = {j: 1 / (1 + math.exp(-score[j])) for j in keys}
                elif name == "elu1":
                    row = {j: score[j] + 1 if score[j] > 0 else math.exp(score[j]) for j in keys}
                else:
                    row = {j: math.exp(score[j]) for j in keys}
                total = sum(row.values())
                if name in ("linear", "mlp") and variant.endswith("_norm"):
                    row = {j: a / max(abs(total), 1) for j, a in row.items()}
                elif variant.endswith("_norm"):
                    row = {j: a / (total + 1e-8) for j, a in row.items()}
                elif variant == "softmax" or variant in BIASES:
                    row = {j: a / (total + star) for j, a in row.items()}
                for j, a in row.items():
                    weights[b, h, i, j] = a
                    out[b, h, i] += a * value[b, h // group, j]
                if variant == "v_bias":
                    out[b, h, i] += v_star
                elif variant == "kv_bias":
                    out[b, h, i] += star / (total + star) * v_star
    return out, weights


def pieces(variant, *, per_head=True, seed=0):
    """A module with the variant's parameters, and queries, keys, values, mask of grouped heads with padding."""
    model = tiny_model("llama").double()
    set_attention(model, variant, per_head=per_head, generator=generator(1))
    module = anatomy(strong(model)).blocks[0].attention
    draw = generator(seed)
    query = torch.randn(2, 4, 5, 8, generator=draw, dtype=torch.float64)
    key, value = (torch.randn(2, 2, 7, 8, generator=draw, dtype=torch.float64) for _ in range(2))
    seen = torch.ones(2, 1, 5, 7).tril(2).bool()  # two cached keys in front
    seen[1, ..., :2] = False
    mask = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, torch.finfo(torch.float64).min)
    return module, query, key, value, mask, seen


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("per_head", [True, False])
def test_variant_equals_its_formula(variant, per_head):
    module, query, key, value, mask, seen = pieces(variant, per_head=per_head)
    with torch.no_grad():
        out, weights = _function(variant, 1.0)(module, query, key, value, mask, scaling=8**-0.5)
        expected, rows = by_loops(variant, query, key, value, seen, getattr(module, "attention_sink", None))
    # softmax weights pass through float32, as in transformers
    close = {"atol": 1e-6, "rtol": 1e-5}
    torch.testing.assert_close(out.transpose(1, 2), expected, **close)
    torch.testing.assert_close(weights, rows, **close)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v not in ("softmax", *BIASES)])
def test_gradients_of_the_unmasked_formulas_are_right(variant):
    module, query, key, value, mask, _ = pieces(variant)
    query, key, value = (x[:1, :, :3].detach().requires_grad_() for x in (query, key, value))
    function = _function(variant, 1.0)
    assert torch.autograd.gradcheck(
        lambda *qkv: function(module, *qkv, mask[:1, :, :3, :3], scaling=8**-0.5)[0], (query, key, value)
    )


@pytest.mark.parametrize("variant", ["softmax", *BIASES])
def test_gradients_of_the_softmax_variants_are_right(variant):
    # gradcheck needs float64 throughout, and weights pass through float32: directional derivatives instead
    module, query, key, value, mask, _ = pieces(variant)
    function = _function(variant, 1.0)
    parameters = [query, key, value, *module.attention_sink.parameters()] if variant in BIASES else [query, key, value]
    leaves = [p.detach().clone().requires_grad_() for p in parameters]
    if variant in BIASES:
        for (name, _), leaf in zip(list(module.attention_sink.named_parameters()), leaves[3:], strict=True):
            delattr(module.attention_sink, name)
            setattr(module.attention_sink, name, leaf)

    def loss():
        return function(module, *leaves[:3], mask, scaling=8**-0.5)[0].sin().sum()

    gradients = torch.autograd.grad(loss(), leaves)
    for seed, (leaf, gradient) in enumerate(zip(leaves, gradients, strict=True)):
        direction = torch.randn(leaf.shape, generator=generator(seed), dtype=leaf.dtype)
        sides = []
        with torch.no_grad():
            for sign in (1, -2, 1):
                leaf += sign * 1e-3 * direction
                sides.append(float(loss()))
        slope = (sides[0] - sides[1]) / 2e-3
        # rounding to float32 over the step, 1e-7 / 1e-3 per term, and the third derivative
        assert slope == pytest.approx(float((gradient * direction).sum()), rel=2e-3, abs=2e-3)


def test_a_fully_masked_row_gives_zeros_and_finite_gradients():
    for variant in VARIANTS:
        module, query, key, value, mask, _ = pieces(variant)
        query.requires_grad_()
        hidden = torch.full_like(mask, torch.finfo(torch.float64).min)
        out, weights = _function(variant, 1.0)(module, query, key, value, hidden, scaling=8**-0.5)
        assert weights.eq(0).all(), variant
        if variant in ("kv_bias", "v_bias"):  # the bias is always there
            star = module.attention_sink.value[None, None].expand_as(out)
            torch.testing.assert_close(out, star.to(out), atol=1e-6, rtol=1e-6)
        else:
            assert out.eq(0).all(), variant
        out.sum().backward()
        assert query.grad.isfinite().all(), variant


# -- what tells the variants apart -----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["softmax", "sigmoid_norm", "elu1_norm"])
def test_normalised_rows_sum_to_one_on_what_is_visible(variant):
    scores = torch.randn(2, 3, 6, 6, generator=generator())
    seen = torch.ones(2, 1, 6, 6).tril().bool()
    weights = attention_weights(scores, seen, variant)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 3, 6), atol=1e-6)
    assert not weights.masked_select(~seen.expand_as(weights)).any()
    assert bool((weights >= 0).all())


def test_sigmoid_output_is_additive_over_keys_and_softmax_output_is_not():
    scores, value = torch.randn(1, 1, 4, 6, generator=generator()), torch.randn(1, 1, 6, 8, generator=generator(1))
    part = torch.arange(6) % 2 == 0
    for variant, additive in (("sigmoid", True), ("elu1", True), ("softmax", False), ("sigmoid_norm", False)):
        whole, one, other = (
            attention_weights(scores, seen.expand(1, 1, 4, 6), variant) @ value
            for seen in (torch.ones(6).bool(), part, ~part)
        )
        assert torch.allclose(whole, one + other, atol=1e-5) is additive, variant


def test_moving_all_scores_of_a_row_changes_sigmoid_and_leaves_softmax():
    scores, seen = torch.randn(1, 2, 4, 4, generator=generator()), torch.ones(1, 1, 4, 4).tril().bool()
    shift = torch.tensor([-3.0, 1.0, 2.0, 5.0])[:, None]
    for variant, same in (("softmax", True), ("sigmoid", False), ("sigmoid_norm", False), ("elu1_norm", False)):
        before, after = (attention_weights(s, seen, variant) for s in (scores, scores + shift))
        assert torch.allclose(before, after, atol=1e-6) is same, variant


# -- in models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*DECODERS, *ENCODERS])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_runs_on_every_family_and_gives_back_what_was_there(family, variant):
    model, ids = tiny_model(family), random_ids(2, 6)
    before = run(model, ids)
    with set_attention(model, variant, generator=generator()):
        inside = run(model, ids)
    assert inside.isfinite().all()
    if variant == "softmax":
        torch.testing.assert_close(inside, before, **CLOSE)
    else:
        assert not torch.equal(inside, before)
    assert torch.equal(run(model, ids), before)
    forget_attention(model)
    assert not [name for name in model.state_dict() if "attention_sink" in name]


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_variant_sees_the_future(family, variant):
    model = tiny_model(family)
    ids, mask = left_padded(3, 7)
    changed = ids.clone()
    changed[:, 4:] = (changed[:, 4:] + 5) % 60 + 3
    with set_attention(model, variant, generator=generator()):
        strong(model)
        before, after = run(model, ids, mask), run(model, changed, mask)
    real = mask.bool()[:, :4]
    assert torch.equal(before[:, :4][real], after[:, :4][real])
    assert not torch.allclose(before[:, 4:], after[:, 4:])


@pytest.mark.parametrize("family", CORE)
@pytest.mark.parametrize("variant", VARIANTS)
def test_decoding_with_a_cache_equals_full_passes(family, variant):
    model = tiny_model(family)
    ids, mask = left_padded(2, 5)
    with set_attention(model, variant, generator=generator()):
        strong(model)
        found = greedy(model, ids, mask, max_new_tokens=4)
        for step in range(4):
            longer = torch.cat([ids, found.tokens[:, :step]], 1)
            full = torch.cat([mask, torch.ones(2, step, dtype=torch.long)], 1)
            assert torch.equal(run(model, longer, full)[:, -1].argmax(-1), found.tokens[:, step])


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("variant", ["elu", "mlp_norm"])
def test_feature_maps_see_the_query_before_scaling_in_every_family(family, variant):
    # OPT scales queries ahead of the attention function; the plain key there has the same convention as elsewhere
    model = tiny_model(family)
    ids = random_ids(2, 5)
    with set_attention(model, variant, generator=generator()), record_attention(model) as seen:
        run(model, ids)
    module = anatomy(model).blocks[0].attention
    query, key = seen.queries(0), seen.keys(0)
    size = query.shape[-1]
    if family == "opt":
        query = query * size**0.5
    phi = (lambda x: F.elu(x) + 1) if variant == "elu" else module.attention_sink
    raw = phi(query) @ phi(key).repeat_interleave(query.shape[1] // key.shape[1], 1).mT / size**0.5
    raw = raw.tril()
    expected = raw if variant == "elu" else raw / raw.sum(-1, keepdim=True).abs().clamp(min=1)
    torch.testing.assert_close(seen[0], expected, **CLOSE)


# -- biases --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*CORE, *ENCODERS])
def test_a_key_that_no_query_likes_leaves_softmax_attention(family):
    model, ids = tiny_model(family), random_ids(2, 6)
    expected = run(model, ids)
    attending = set_attention(model, "k_bias", generator=generator())

    def far(module, query, key, value, attention_mask, **kwargs):
        # k* against one query at a time, so that q . k* is very negative for every one of them
        rows = []
        for i in range(query.shape[2]):
            one = query[:1, :, i].detach()
            module.attention_sink.key.data = -1e4 * one[0] / one[0].square().sum(-1, keepdim=True)
            mask = attention_mask if attention_mask is None else attention_mask[:1, :, i : i + 1]
            rows.append(biased(module, query[:1, :, i : i + 1], key[:1], value[:1], mask, **kwargs)[0])
        return torch.cat(rows, 1), None

    biased = _function("k_bias", 1.0)
    with attending, use_attention(model, far):
        found = run(model, ids[:1])
    torch.testing.assert_close(found, expected[:1], **CLOSE)


@pytest.mark.parametrize("per_head", [True, False])
def test_key_and_value_bias_are_a_token_in_front_without_position(per_head):
    module, query, key, value, mask, _ = pieces("kv_bias", per_head=per_head)
    own = module.attention_sink
    key, value = (x.repeat_interleave(2, 1) for x in (key, value))
    star = [x.expand(4, 8)[None, :, None].expand(2, 4, 1, 8) for x in (own.key, own.value)]
    longer = torch.cat([torch.zeros_like(mask[..., :1]), mask], -1)
    expected = F.scaled_dot_product_attention(
        query, torch.cat([star[0], key], 2), torch.cat([star[1], value], 2), attn_mask=longer
    )
    found, weights = _function("kv_bias", 1.0)(module, query, key, value, mask, scaling=8**-0.5)
    torch.testing.assert_close(found.transpose(1, 2), expected, atol=1e-6, rtol=1e-5)
    assert weights.shape[-1] == key.shape[2]  # the bias's own column is not among them
    assert bool((weights.sum(-1) < 1).all())


def test_shared_biases_are_one_vector_and_own_ones_differ_by_head():
    for per_head, heads in ((True, 4), (False, 1)):
        model = tiny_model("llama")
        set_attention(model, "kv_bias", per_head=per_head, generator=generator())
        for block in anatomy(model).blocks:
            assert block.attention.attention_sink.key.shape == (heads, 8)
            assert block.attention.attention_sink.value.shape == (heads, 8)
    model = tiny_model("qwen3", hidden_size=1024, num_hidden_layers=1, head_dim=512)
    set_attention(model, "kv_bias", generator=generator())
    # 2048 draws of N(0, 0.02^2): five standard errors of the standard deviation
    key = anatomy(model).blocks[0].attention.attention_sink.key.detach()
    assert float(key.std()) == pytest.approx(0.02, abs=0.0016)


def test_key_bias_has_no_value_and_value_bias_no_key():
    for variant, names in (("k_bias", {"key"}), ("v_bias", {"value"}), ("kv_bias", {"key", "value"})):
        model = tiny_model("gpt2")
        set_attention(model, variant)
        assert {name for name, _ in anatomy(model).blocks[0].attention.attention_sink.named_parameters()} == names


@pytest.mark.parametrize("variant", [*BIASES, "mlp", "mlp_norm"])
def test_parameters_are_trained_stand_in_the_state_dict_and_are_taken_up_again(variant):
    model, ids = tiny_model("llama"), random_ids(4, 8)
    attending = set_attention(model, variant, generator=generator(1))
    own = {n: p.detach().clone() for n, p in model.named_parameters() if "attention_sink" in n}
    with attending:
        train(model, [ids], steps=3, optimizer=adamw(1e-2))
        trained = run(model, ids)
    state = model.state_dict()
    assert own
    assert all(not torch.equal(state[name], before) for name, before in own.items())
    other = tiny_model("llama", seed=9)
    attending = set_attention(other, variant, generator=generator(2))
    other.load_state_dict(state)
    with attending:
        assert torch.equal(run(other, ids), trained)
    with set_attention(other, variant, generator=generator(3)):  # takes up what is there
        assert torch.equal(run(other, ids), trained)


@pytest.mark.parametrize("family", [*DECODERS, *ENCODERS])
@pytest.mark.parametrize("variant", ["kv_bias", "mlp"])
def test_a_written_folder_gives_back_what_was_trained(family, variant, tmp_path):
    model, ids = tiny_model(family), random_ids(4, 8)
    attending = set_attention(model, variant, generator=generator(1))
    strong(model)
    with attending:
        expected = run(model, ids)
    model.save_pretrained(tmp_path)
    back = type(model).from_pretrained(tmp_path)
    assert not [name for name, _ in back.named_parameters() if "attention_sink" in name]  # why saved= is needed
    with set_attention(back, variant, saved=tmp_path):
        torch.testing.assert_close(run(back, ids), expected, atol=0, rtol=0)
    forget_attention(back)
    with set_attention(back, variant, generator=generator(2)):
        assert not torch.allclose(run(back, ids), expected, atol=1e-3)
    with set_attention(back, variant, saved=tmp_path):  # in the place of those that are attached
        torch.testing.assert_close(run(back, ids), expected, atol=0, rtol=0)


def test_a_folder_in_several_files_or_without_its_head_gives_back_the_same(tmp_path):
    model, ids = tiny_model("llama"), random_ids(2, 6)
    attending = set_attention(model, "k_bias", layers=[1], generator=generator(1))
    strong(model)
    model.save_pretrained(tmp_path / "pieces", max_shard_size="20KB")
    assert len(list((tmp_path / "pieces").glob("*.safetensors"))) > 1
    model.model.save_pretrained(tmp_path / "body")
    with attending:
        expected = run(model, ids)
    for folder in ("pieces", "body"):
        other = tiny_model("llama")
        with set_attention(other, "k_bias", layers=[-1], saved=tmp_path / folder):
            torch.testing.assert_close(run(other, ids), expected, atol=0, rtol=0)


def test_a_folder_that_has_no_such_parameters_is_refused_and_leaves_the_model_alone(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "plain")
    set_attention(model, "k_bias", layers=[0], generator=generator())
    model.save_pretrained(tmp_path / "half")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"no such thing")
    other = tiny_model("llama")
    for folder, variant, says in (
        ("plain", "k_bias", "no parameters of a sink variant"),
        ("half", "k_bias", "of layer 1 the folder holds nothing"),
        ("half", "kv_bias", r"of layer 0 the folder holds \{'key': \(4, 8\)\}; 'kv_bias' needs"),
        ("half", "sigmoid", "'sigmoid' has no parameters"),
        ("broken", "k_bias", "cannot be read"),
        ("nowhere", "k_bias", "holds no safetensors"),
    ):
        with pytest.raises(ValueError, match=says):
            set_attention(other, variant, saved=tmp_path / folder)
        assert not [name for name in other.state_dict() if "attention_sink" in name]
    with pytest.raises(ValueError, match="needs"):
        set_attention(other, "k_bias", per_head=False, layers=[0], saved=tmp_path / "half")


def test_layers_not_asked_for_stay_as_they_are():
    model, ids = tiny_model("llama"), random_ids(2, 6)
    with record_attention(model) as plain:
        run(model, ids)
    with set_attention(model, "sigmoid", layers=[-1]), record_attention(model) as seen:
        run(model, ids)
    torch.testing.assert_close(seen[0], plain[0], **CLOSE)
    assert bool((seen[1].sum(-1)[..., 1:] != 1).any())
    set_attention(model, "k_bias", layers=[0])
    blocks = anatomy(model).blocks
    assert hasattr(blocks[0].attention, "attention_sink")
    assert not hasattr(blocks[1].attention, "attention_sink")


def test_bad_requests_are_refused():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="unknown variant 'relu'"):
        set_attention(model, "relu")
    with pytest.raises(ValueError, match="layer 2 is out of range"):
        set_attention(model, "sigmoid", layers=[2])
    set_attention(model, "k_bias")
    with pytest.raises(ValueError, match="forget_attention"):
        set_attention(model, "kv_bias")
    forget_attention(model)
    set_attention(model, "kv_bias")
    with pytest.raises(ValueError, match="not a function of scores alone"):
        attention_weights(torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2).bool(), "k_bias")
    forget_attention(model)
    with use_attention(model, _function("k_bias", 1.0)), pytest.raises(ValueError, match="set_attention"):
        run(model, random_ids(1, 3))


# -- sink token ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", DECODERS)
def test_sink_token_is_one_more_row_and_leaves_the_others_alone(family):
    model = tiny_model(family)
    parts = anatomy(model)
    before, head, tied = parts.W_E.detach().clone(), parts.W_U.detach().clone(), parts.tied
    state = torch.get_rng_state()
    sink = add_sink_token(model, generator=generator())
    assert torch.equal(torch.get_rng_state(), state)
    parts = anatomy(model)
    assert sink == len(before) == len(parts.W_E) - 1
    assert torch.equal(parts.W_E[:-1], before)
    assert torch.equal(parts.W_U[:, :-1], head)
    assert parts.tied == tied
    assert 0 < float(parts.W_E[-1].detach().abs().max()) < 0.1
    if not tied:
        assert not torch.equal(parts.W_U[:, -1], parts.W_E[-1])
    ids, mask = prepend_sink_token(random_ids(2, 5), sink)
    assert run(model, ids, mask).shape == (2, 6, sink + 1)


def test_sink_token_stands_before_the_first_real_token():
    ids = torch.tensor([[5, 6, 7], [0, 8, 9], [4, 3, 0]])
    mask = torch.tensor([[1, 1, 1], [0, 1, 1], [1, 1, 0]])
    found, seen = prepend_sink_token(ids, 99, mask)
    assert found.tolist() == [[99, 5, 6, 7], [0, 99, 8, 9], [99, 4, 3, 0]]
    assert seen.tolist() == [[1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 1, 0]]
    plain, everything = prepend_sink_token(ids, 99)
    assert plain[:, 0].eq(99).all()
    assert torch.equal(plain[:, 1:], ids)
    assert everything.eq(1).all()


def test_sink_token_before_nothing_is_refused():
    with pytest.raises(ValueError, match=r"\(B, T\)"):
        prepend_sink_token(torch.tensor([1, 2]), 9)
    with pytest.raises(ValueError, match="real token"):
        prepend_sink_token(torch.tensor([[1, 2]]), 9, torch.zeros(1, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="attention_mask must be"):
        prepend_sink_token(torch.tensor([[1, 2]]), 9, torch.ones(2, 2, dtype=torch.long))
