"""Sites against the identities that define them, and patches against what they must do downstream."""

import pytest
import torch

from families import DECODERS, ENCODERS, left_padded, random_ids, tiny_model
from papertrial.lm.anatomy import anatomy
from papertrial.lm.generation import greedy, position_ids
from papertrial.lm.hooks import SITES, Edit, add, change, patch, record, replace, scale

FAMILIES = (*DECODERS, *ENCODERS)
PARALLEL = ("gpt_neox", "phi")
CLOSE = {"atol": 1e-5, "rtol": 1e-4}  # float32 sums in another order


def sites_of(family):
    return [site for site in SITES if not (site == "resid_mid" and family in PARALLEL)]


def hooks_left(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def run(model, ids):
    with torch.no_grad():
        return model(ids, attention_mask=torch.ones_like(ids)).logits


def norm_of(norm, x):
    with torch.no_grad():
        return norm.module(x)


@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_sites_satisfy_the_equations_of_the_block(family):
    model = tiny_model(family)
    ids = random_ids(2, 6)
    parts = anatomy(model)
    with record(model, sites_of(family)) as seen:
        logits = run(model, ids)
    for layer, block in enumerate(parts.blocks):
        at = {site: seen[site][layer] for site in sites_of(family) if site != "final_hidden"}
        assert at["head_out"].shape == (2, 6, 4, block.head_size)
        assert at["mlp_act"].shape == (2, 6, 44)
        # the sum of what the heads write is the attention output
        heads = torch.einsum("bthe,hed->bthd", at["head_out"], block.W_O).sum(2)
        torch.testing.assert_close(heads if block.b_O is None else heads + block.b_O, at["attn_out"], **CLOSE)
        down = at["mlp_act"] @ block.W_out
        torch.testing.assert_close(down if block.b_out is None else down + block.b_out, at["mlp_out"], **CLOSE)
        for name, weight, bias in (("query", "W_Q", "b_Q"),):
            expected = torch.einsum("btd,hde->bthe", at["attn_in"], getattr(block, weight))
            expected = expected if getattr(block, bias) is None else expected + getattr(block, bias)
            torch.testing.assert_close(at[name], expected, **CLOSE)
        for name in ("key", "value"):
            expected = torch.einsum("btd,hde->bthe", at["attn_in"], block.head_weights(name))
            bias = block.head_biases(name)
            torch.testing.assert_close(at[name], expected if bias is None else expected + bias, **CLOSE)
        attended, fed = at["attn_out"], at["mlp_out"]
        if family in ENCODERS:
            torch.testing.assert_close(at["attn_in"], at["resid_pre"])
            middle = norm_of(block.attention_norm, at["resid_pre"] + attended)
            torch.testing.assert_close(at["resid_mid"], middle, **CLOSE)
            torch.testing.assert_close(at["ffn_in"], at["resid_mid"])
            torch.testing.assert_close(at["resid_post"], norm_of(block.mlp_norm, middle + fed), **CLOSE)
            continue
        torch.testing.assert_close(at["attn_in"], norm_of(block.attention_norm, at["resid_pre"]), **CLOSE)
        if block.post_attention_norm is not None:
            attended, fed = norm_of(block.post_attention_norm, attended), norm_of(block.post_mlp_norm, fed)
        middle = at["resid_pre"] if family in PARALLEL else at["resid_mid"]
        torch.testing.assert_close(at["ffn_in"], norm_of(block.mlp_norm, middle), **CLOSE)
        if family not in PARALLEL:
            torch.testing.assert_close(at["resid_mid"], at["resid_pre"] + attended, **CLOSE)
        torch.testing.assert_close(at["resid_post"], at["resid_pre"] + attended + fed, **CLOSE)
    assert torch.equal(seen["resid_post"][0], seen["resid_pre"][1])
    if family in DECODERS:
        final = seen["final_hidden"]
        torch.testing.assert_close(final, norm_of(parts.final_norm, seen["resid_post"][1]), **CLOSE)
        if family != "gemma2":
            torch.testing.assert_close(final @ parts.W_U + (0 if parts.b_U is None else parts.b_U), logits, **CLOSE)
    else:
        assert torch.equal(seen["final_hidden"], seen["resid_post"][1])
    assert hooks_left(model) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_replacing_a_site_by_its_recorded_value_changes_nothing_and_by_another_run_moves_that_run(family):
    model = tiny_model(family)
    base, source = random_ids(2, 6), random_ids(2, 6, seed=1)
    with record(model, sites_of(family)) as of_base:
        plain = run(model, base)
    with record(model, sites_of(family)) as of_source:
        target = run(model, source)
    for site in sites_of(family):
        layer = None if site == "final_hidden" else 1
        own, foreign = (seen[site] if layer is None else seen[site][1] for seen in (of_base, of_source))
        with patch(model, replace(site, layer, own)):
            torch.testing.assert_close(run(model, base), plain, atol=1e-6, rtol=1e-5)
        with patch(model, replace(site, layer, foreign)), record(model, sites_of(family)) as seen:
            moved = run(model, base)
        assert not torch.allclose(moved, plain, atol=1e-4)
        # the recording shows the patched value, also where the recorder came second or first
        assert torch.equal(seen[site] if layer is None else seen[site][1], foreign)
        if site in ("resid_post", "final_hidden"):
            torch.testing.assert_close(moved, target, **CLOSE)
        if site == "resid_mid" and family in DECODERS:
            # the feed-forward layer and the residual stream behind it both read the patched middle
            torch.testing.assert_close(moved, target, **CLOSE)
    assert hooks_left(model) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_patching_the_first_block_input_with_another_prompt_reproduces_that_prompt(family):
    model = tiny_model(family)
    base, source = random_ids(2, 6), random_ids(2, 6, seed=1)
    with record(model, "resid_pre", layers=[0]) as seen:
        target = run(model, source)
    with patch(model, replace("resid_pre", 0, seen["resid_pre"][0])):
        torch.testing.assert_close(run(model, base), target, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_zeroing_a_head_or_a_neuron_equals_zeroing_its_output_weights(family):
    ids = random_ids(2, 6)
    model, cut = tiny_model(family), tiny_model(family)
    block = anatomy(cut).blocks[0]
    with torch.no_grad():
        block.W_O[1].zero_()
        block.W_out[[3, 7]] = 0.0
    with patch(model, scale("head_out", 0, 0.0, units=[1]), scale("mlp_act", 0, 0.0, units=[3, 7])):
        torch.testing.assert_close(run(model, ids), run(cut, ids), **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_patching_one_of_the_fused_projections_leaves_the_others_alone(family):
    model = tiny_model(family)
    ids = random_ids(2, 6)
    names = ("query", "key", "value")
    with record(model, names) as plain:
        run(model, ids)
    for name in names:
        with patch(model, scale(name, 0, 2.0)), record(model, names) as seen:
            run(model, ids)
        for other in names:
            assert torch.equal(seen[other][0], plain[other][0] * (2.0 if other == name else 1.0))


def test_edits_compose_in_the_order_in_which_they_were_entered():
    model = tiny_model("llama")
    ids = random_ids(1, 4)
    with record(model, "resid_post") as plain:
        run(model, ids)
    x = plain["resid_post"][0]
    one, double = torch.ones(32), 2.0
    with record(model, "resid_post") as seen:
        with patch(model, add("resid_post", 0, one), scale("resid_post", 0, double)):
            run(model, ids)
        assert torch.equal(seen["resid_post"][0], (x + 1) * 2)
        with patch(model, scale("resid_post", 0, double)), patch(model, add("resid_post", 0, one)):
            run(model, ids)
        assert torch.equal(seen["resid_post"][0], x * 2 + 1)
        run(model, ids)
    assert torch.equal(seen["resid_post"][0], x)
    assert hooks_left(model) == 0


def test_positions_may_be_one_step_some_steps_or_different_in_every_row():
    model = tiny_model("gpt2")
    ids = random_ids(3, 6)
    with record(model, "resid_post") as plain:
        run(model, ids)
    x = plain["resid_post"][1]
    rows = torch.arange(3)
    cases = [
        (-1, (3, 32), lambda y: y[:, -1]),
        ([0, 4], (3, 2, 32), lambda y: y[:, [0, 4]]),
        (torch.tensor([5, 0, -2]), (3, 32), lambda y: y[rows, torch.tensor([5, 0, 4])]),
        (torch.tensor([[0, 1], [2, 3], [4, 5]]), (3, 2, 32), lambda y: y[rows[:, None], torch.arange(6).view(3, 2)]),
        (None, (3, 6, 32), lambda y: y),
    ]
    for positions, shape, select in cases:
        values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        with patch(model, replace("resid_post", 1, values, positions=positions)), record(model, "resid_post") as seen:
            run(model, ids)
        y = seen["resid_post"][1]
        assert torch.equal(select(y), values)
        untouched = x.clone()
        select_mask = torch.zeros_like(x, dtype=torch.bool)
        if positions is None:
            continue
        index = torch.arange(6).expand(3, 6)[..., None].expand(3, 6, 32)
        select_mask = torch.isin(index * 3 + rows[:, None, None], select(index * 3 + rows[:, None, None]))
        assert torch.equal(y[~select_mask], untouched[~select_mask])
        assert int(select_mask.sum()) == values.numel()


def test_heads_are_selected_together_with_positions():
    model = tiny_model("qwen3")
    ids = random_ids(2, 5)
    edit = change("head_out", 0, lambda z: z * 0 + 7, positions=torch.tensor([1, 3]), units=[0, 2])
    assert edit(torch.zeros(2, 5, 4, 12)).sum() == 7 * 2 * 2 * 12
    with record(model, "head_out") as plain:
        run(model, ids)
    with record(model, "head_out") as seen, patch(model, edit):
        run(model, ids)
    expected = plain["head_out"][0].clone()
    for row, step in ((0, 1), (1, 3)):
        expected[row, step, [0, 2]] = 7
    assert torch.equal(seen["head_out"][0], expected)
    single = change("mlp_act", 0, lambda z: z.fill_(3.0) if z.shape == (2,) else z, positions=0, units=5)
    out = single(torch.zeros(2, 5, 44))
    assert out.sum() == 6
    assert (out[:, 0, 5] == 3).all()


def test_hooks_are_gone_after_an_error():
    model = tiny_model("mistral")
    plain = run(model, random_ids(1, 4))

    def fail(_):
        raise RuntimeError("inside")

    with (
        pytest.raises(RuntimeError, match="inside"),
        record(model, SITES),
        patch(model, scale("resid_mid", 0, 3.0), change("mlp_out", 1, fail)),
    ):
        run(model, random_ids(1, 4))
    assert hooks_left(model) == 0
    known, unknown = scale("resid_pre", 0, 2.0), scale("nowhere", 0, 1.0)
    with pytest.raises(ValueError, match="unknown site"), patch(model, known, unknown):
        pass
    assert hooks_left(model) == 0
    assert torch.equal(run(model, random_ids(1, 4)), plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_flow_through_recordings_and_patches(family):
    model = tiny_model(family)
    ids = random_ids(1, 5)
    for site in sites_of(family):
        layer = None if site == "final_hidden" else 0
        shift = torch.zeros((), requires_grad=True)
        with patch(model, change(site, layer, lambda z, s=shift: z * z + s)), record(model, site, detach=False) as seen:
            loss = model(ids).logits.square().sum()
        values = seen[site] if layer is None else seen[site][0]
        gradient, of_shift = torch.autograd.grad(loss, [values, shift])
        # a shift of all values moves the loss by the sum of their gradients
        torch.testing.assert_close(of_shift, gradient.sum(), atol=1e-2, rtol=1e-3)
        assert gradient.abs().sum() > 0


def test_every_decoding_step_can_be_kept():
    model = tiny_model("llama")
    ids, mask = left_padded(2, 5)
    with record(model, "resid_post", layers=[-1], every=True) as seen:
        out = greedy(model, ids, mask, max_new_tokens=4)
    steps = seen.history("resid_post")[1]
    assert [s.shape[1] for s in steps] == [5, 1, 1, 1]
    fed = out.sequences[:, :-1]
    fed_mask = out.attention_mask[:, :-1]
    with record(model, "resid_post", layers=[1]) as whole, torch.no_grad():
        model(fed, attention_mask=fed_mask, position_ids=position_ids(fed_mask))
    real = fed_mask.bool()
    torch.testing.assert_close(torch.cat(steps, 1)[real], whole["resid_post"][1][real], **CLOSE)


def test_a_patch_acts_in_every_step_of_generation():
    model = tiny_model("gpt2")
    ids = random_ids(1, 5)
    direction = anatomy(model).W_U[:, 9].detach() * 100  # towards token 9, whatever the context
    with patch(model, add("final_hidden", None, direction)):
        assert (greedy(model, ids, max_new_tokens=4).tokens == 9).all()
    assert not (greedy(model, ids, max_new_tokens=4).tokens == 9).all()


def test_two_models_do_not_share_hooks():
    one, two = tiny_model("llama"), tiny_model("llama")
    ids = random_ids(1, 4)
    with patch(one, scale("resid_post", 1, 3.0)):
        assert not torch.allclose(run(one, ids), run(two, ids))
        assert hooks_left(two) == 0


def test_bad_requests_are_refused_with_a_reason():
    model = tiny_model("llama")
    ids = random_ids(2, 4)
    for edits, message in (
        ([scale("resid_post", 5, 1.0)], "needs a layer in 0 .. 1"),
        ([scale("resid_post", None, 1.0)], "needs a layer"),
        ([scale("final_hidden", 0, 1.0)], "belongs to no layer"),
        ([replace("resid_post", 0, torch.zeros(3, 32), positions=-1)], "must fit the selection"),
        ([scale("resid_post", 0, 1.0, positions=4)], "within the 4 steps"),
        ([scale("resid_post", 0, 1.0, positions=torch.tensor([0, 1, 2]))], "positions must be integers"),
        ([scale("head_out", 0, 1.0, units=[4])], "units of head_out"),
        ([Edit("mlp_act", 0, lambda z: z, units=44)], "units of mlp_act"),
    ):
        with pytest.raises(ValueError, match=message), patch(model, *edits):
            run(model, ids)
        assert hooks_left(model) == 0
    with pytest.raises(ValueError, match="in parallel"), record(tiny_model("phi"), "resid_mid"):
        pass
    with pytest.raises(ValueError, match="unknown site"), record(model, ["attn_pattern"]):
        pass
    with record(model, "resid_post", layers=[0]) as seen:
        with pytest.raises(KeyError, match="was not passed"):
            _ = seen["resid_post"]
        with pytest.raises(KeyError, match="was not recorded"):
            _ = seen["mlp_out"]
