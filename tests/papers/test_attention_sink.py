"""The sink metric against its definition in loops, and the survey of a model against the model's own attention."""

import pytest
import torch

from families import CORE, DECODERS, ENCODERS, left_padded, random_ids, tiny_model
from papertrial.lm.anatomy import anatomy
from papertrial.papers.attention.attention_sink.method import (
    column_excess,
    column_importance,
    measure_sinks,
    proxy_scores,
    set_attention,
    sink_metric,
    uniform_importance,
)


def causal_maps(batch, heads, length, *, seed=0, sharpness=3.0):
    """Random causal maps whose rows sum to one, uneven enough for some columns to pass any threshold."""
    draw = torch.randn(batch, heads, length, length, generator=torch.Generator().manual_seed(seed)) * sharpness
    return draw.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).softmax(-1)


def by_loops(layers, eps, causal=True):
    """The definition, one number at a time."""
    length = layers[0].shape[-1]
    sink = []
    for k in range(length):
        hits = total = 0
        for attn in layers:
            for sample in attn.tolist():
                for head in sample:
                    rows = range(k, length) if causal else range(length)
                    hits += sum(head[i][k] for i in rows) / len(rows) > eps
                    total += 1
        sink.append(100 * hits / total)
    return torch.tensor(sink)


# -- the metric ----------------------------------------------------------------------------------------------------


def test_attention_to_oneself_gives_one_row_of_those_that_could_look():
    alpha = column_importance(torch.eye(6).expand(2, 3, 6, 6))
    assert torch.allclose(alpha, (1 / torch.arange(6.0, 0, -1)).expand(2, 3, 6))


def test_all_mass_on_the_first_token_is_a_sink_everywhere_and_nowhere_else():
    attn = torch.zeros(2, 3, 8, 8)
    attn[..., 0] = 1
    assert sink_metric([attn, attn]).tolist() == [100.0] + [0.0] * 7


def test_even_attention_gives_the_harmonic_mean_and_no_sink_at_64_tokens():
    attn = torch.ones(64, 64).tril() / torch.arange(1, 65)[:, None]
    alpha = column_importance(attn[None, None])[0, 0]
    assert float(alpha[0]) == pytest.approx(sum(1 / i for i in range(1, 65)) / 64, abs=1e-6)
    assert float(alpha[0]) == pytest.approx(0.0741, abs=5e-5)
    assert torch.allclose(alpha.double(), uniform_importance(64), atol=1e-6)
    assert sink_metric([attn[None, None]])[0] == 0


@pytest.mark.parametrize("eps", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("causal", [True, False])
def test_metric_equals_its_definition_also_with_unequal_heads(eps, causal):
    layers = [causal_maps(3, heads, 7, seed=heads) for heads in (2, 5)]
    if not causal:
        layers = [layer.flip(-1) for layer in layers]
    found = sink_metric(layers, eps, causal=causal)
    assert torch.allclose(found, by_loops(layers, eps, causal))
    assert len(found.unique()) > 1


def test_the_first_positions_of_causal_maps_are_the_maps_of_a_shorter_text():
    attn = causal_maps(4, 2, 9)
    assert torch.equal(sink_metric([attn], 0.2, 5), sink_metric([attn[..., :5, :5]], 0.2))


def test_shares_are_the_weights_where_rows_sum_to_one_and_ignore_size_and_sign_elsewhere():
    attn = causal_maps(2, 2, 6)
    assert torch.allclose(proxy_scores(attn), attn, atol=1e-6)
    scale = torch.tensor([-3.0, 0.1, 1.0, -1.0, 20.0, 5.0])[:, None]
    assert torch.allclose(proxy_scores(attn * scale), attn, atol=1e-6)
    assert torch.equal(proxy_scores(torch.zeros(1, 1, 3, 3)), torch.zeros(1, 1, 3, 3))
    tiny = torch.zeros(1, 1, 6, 6)
    tiny[..., 0] = 0.01  # a sink in shares only: why both are to be reported
    assert sink_metric([tiny])[0] == 0
    assert sink_metric([tiny], normalize=True)[0] == 100


def excess_by_loops(attn, causal):
    """One head (T, T): what a column gets against what it would get if every row shared out evenly."""
    length = len(attn)
    excess = []
    for k in range(length):
        rows = range(k, length) if causal else range(length)
        got = sum(abs(float(attn[i, k])) for i in rows)
        even = sum(sum(abs(float(a)) for a in attn[i]) / (i + 1 if causal else length) for i in rows)
        excess.append(got / even if even else 1.0)
    return torch.tensor(excess)


@pytest.mark.parametrize("causal", [True, False])
def test_excess_equals_its_definition_for_rows_of_any_sum_and_sign(causal):
    attn = causal_maps(2, 3, 7) * torch.linspace(-2, 5, 7)[:, None]
    attn = attn if causal else attn.flip(-1)
    found = column_excess(attn, causal=causal)
    for sample in range(2):
        for head in range(3):
            assert torch.allclose(found[sample, head], excess_by_loops(attn[sample, head], causal), rtol=1e-4)
    assert float(found.max()) > 2


def test_excess_is_one_where_nothing_is_preferred_whatever_rows_sum_to():
    visible = torch.ones(9, 9).tril()
    halves, shares = visible / 2, visible / torch.arange(1, 10)[:, None]
    uneven_rows = shares * torch.rand(9, 1, generator=torch.Generator().manual_seed(0))
    for attn in (halves, shares, uneven_rows, halves * 1e-6, torch.zeros(9, 9)):
        assert torch.allclose(column_excess(attn[None, None]), torch.ones(1, 1, 9), rtol=1e-5)
    assert torch.allclose(column_excess(torch.full((1, 1, 4, 4), 0.3), causal=False), torch.ones(1, 1, 4))
    first = torch.zeros(1, 1, 4, 4)
    first[..., 0] = 1
    # every row gives all to one of the 1, 2, 3, 4 tokens that it sees
    assert float(column_excess(first)[0, 0, 0]) == pytest.approx(4 / (1 + 1 / 2 + 1 / 3 + 1 / 4))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_an_error_and_not_the_absence_of_a_sink(bad):
    attn = causal_maps(1, 2, 5)
    attn[0, 1, 3, 1] = bad
    for measure in (column_importance, column_excess, lambda attn: sink_metric([attn])):
        with pytest.raises(ValueError, match="NaN or infinite"):
            measure(attn)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"attentions": [torch.ones(1, 1, 1, 1)]}, "at least 2 tokens"),
        ({"attentions": [torch.ones(1, 1, 3, 4)]}, r"\(B, H, T, T\)"),
        ({"attentions": [torch.ones(3, 3)]}, r"\(B, H, T, T\)"),
        ({"attentions": []}, "empty"),
        ({"eps": 0.0}, "eps"),
        ({"eps": 1.0}, "eps"),
        ({"positions": 7}, "positions must lie in 2..6"),
        ({"positions": 1}, "positions must lie in 2..6"),
        ({"positions": 4, "causal": False}, "cannot be cut"),
        ({"attentions": [torch.ones(1, 1, 6, 6)]}, "above the diagonal"),
    ],
)
def test_what_the_metric_is_not_defined_for_is_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        sink_metric(**{"attentions": [causal_maps(1, 1, 6)], **arguments})
    with pytest.raises(ValueError, match="length"):
        uniform_importance(0)


# -- whole models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*DECODERS, *ENCODERS])
def test_survey_equals_what_eager_attention_and_hidden_states_say(family):
    ids = random_ids(5, 12)
    model, eager = tiny_model(family), tiny_model(family, attn_implementation="eager")
    causal = family in DECODERS
    with torch.no_grad():
        out = eager(ids, output_attentions=True, output_hidden_states=True)
    report = measure_sinks(model, ids, 0.12, kinds=("natural",), batch_size=2)["natural"]
    assert torch.allclose(report.sink, sink_metric(out.attentions, 0.12, causal=causal))
    assert torch.equal(report.sink, report.proxy_sink)
    expected = torch.stack([column_importance(a, causal=causal).mean(0) for a in out.attentions])
    assert torch.allclose(report.importance, expected, atol=1e-5)
    assert torch.allclose(report.proxy_importance, expected, atol=1e-5)
    assert torch.allclose(report.row_sum, torch.ones_like(report.row_sum), atol=1e-5)
    # the last of transformers' hidden states of a decoder is after the final norm, ours never is
    norms = torch.stack([hidden.norm(dim=-1).mean(0) for hidden in out.hidden_states])
    assert torch.allclose(report.hidden_norm[:-1], norms[:-1], rtol=1e-4)
    assert report.hidden_norm.shape == norms.shape
    assert report.first == float(report.sink[0])
    assert report.strongest == float(report.sink.max())


@pytest.mark.parametrize("family", CORE)
def test_norms_cosines_and_contributions_are_those_of_the_cached_keys_and_values(family):
    ids = random_ids(4, 9)
    model = tiny_model(family)
    report = measure_sinks(model, ids, kinds=("natural",), batch_size=3)["natural"]
    with torch.no_grad():
        out = model(ids, use_cache=True)
        eager = tiny_model(family, attn_implementation="eager")(ids, output_attentions=True)
    for layer, cached in enumerate(out.past_key_values.layers):
        assert torch.allclose(report.key_norm[layer], cached.keys.norm(dim=-1).mean(0), rtol=1e-4)
        assert torch.allclose(report.value_norm[layer], cached.values.norm(dim=-1).mean(0), rtol=1e-4)
        alpha = column_importance(eager.attentions[layer])
        heads, groups = alpha.shape[1], cached.values.shape[1]
        for head in range(heads):
            length = cached.values[:, head * groups // heads].norm(dim=-1)
            added = (alpha[:, head] * length).mean(0)
            assert torch.allclose(report.contribution[layer, head], added, rtol=1e-3, atol=1e-5)
            maps = eager.attentions[layer][:, head]
            excess = torch.stack([excess_by_loops(attn, True) for attn in maps])
            assert torch.allclose(report.excess[layer, head], excess.mean(0), rtol=1e-4)
            excess = torch.stack([excess_by_loops(a * v, True) for a, v in zip(maps, length, strict=True)])
            assert torch.allclose(report.contribution_excess[layer, head], excess.mean(0), rtol=1e-3)
    assert bool((report.query_key_cosine.abs() <= 1 + 1e-5).all())


def test_cosine_is_of_the_query_with_the_first_key_and_tells_the_sink():
    # scores of a head are |q| |k| cos: with one sample they give the cosine back
    model = tiny_model("llama")
    ids = random_ids(1, 6)
    report = measure_sinks(model, ids, kinds=("natural",))["natural"]
    block = anatomy(model).blocks[0]
    with torch.no_grad():
        hidden = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids))[0]  # (T, D)
        query, key = block.module.self_attn.q_proj(hidden), block.module.self_attn.k_proj(hidden)
    # position 0 is not rotated: there the cosine needs no rotary embedding
    for head in range(4):
        q, k = query[0].view(4, 8)[head], key[0].view(2, 8)[head // 2]
        assert float(report.query_key_cosine[0, head, 0]) == pytest.approx(
            float(torch.cosine_similarity(q, k, dim=0)), abs=1e-5
        )


def test_random_and_repeated_inputs_come_from_the_vocabulary_and_the_generator():
    model, ids = tiny_model("gpt2"), random_ids(6, 10)
    seen = []
    hook = model.transformer.wte.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    pool = torch.tensor([4, 9, 17])
    reports = [
        measure_sinks(model, ids, generator=torch.Generator().manual_seed(3), vocabulary=pool, batch_size=6)
        for _ in range(2)
    ]
    hook.remove()
    natural, random, repeat = seen[:3]
    assert torch.equal(natural, ids)
    assert set(random.flatten().tolist()) == set(pool.tolist())
    assert bool((random != random[:, :1]).any())
    assert bool((repeat == repeat[:, :1]).all())
    assert set(repeat.flatten().tolist()) <= set(pool.tolist())
    assert len(set(repeat[:, 0].tolist())) > 1
    assert list(reports[0]) == ["natural", "random", "repeat"]
    assert torch.equal(reports[0]["random"].importance, reports[1]["random"].importance)


def test_repeated_tokens_without_positions_are_attended_to_evenly():
    # llama's rotary embedding is the only thing that could tell equal tokens apart; without it keys are equal
    model = tiny_model("llama")
    for block in anatomy(model).blocks:
        block.module.self_attn.q_proj.weight.data.zero_()
    report = measure_sinks(model, random_ids(3, 16), kinds=("repeat",), generator=torch.Generator().manual_seed(0))
    expected = uniform_importance(16).float().expand(2, 4, 16)
    assert torch.allclose(report["repeat"].importance, expected, atol=1e-5)


def test_report_does_not_depend_on_the_batch_size_and_leaves_the_model_as_it_was():
    model, ids = tiny_model("qwen3"), random_ids(7, 8)
    model.train()
    one = measure_sinks(model, ids, 0.2, kinds=("natural",), batch_size=7)["natural"]
    other = measure_sinks(model, ids, 0.2, kinds=("natural",), batch_size=3)["natural"]
    for name in vars(one):
        assert torch.allclose(getattr(one, name), getattr(other, name), atol=1e-4), name
    assert model.training
    assert model.config._attn_implementation == "sdpa"


def test_survey_inside_a_variant_measures_the_variant():
    model, ids = tiny_model("llama"), random_ids(3, 8)
    with set_attention(model, "sigmoid"):
        report = measure_sinks(model, ids, kinds=("natural",))["natural"]
    assert report.row_sum.mean() > 1.5  # about half of 4.5 visible keys
    assert torch.allclose(report.proxy_importance[..., 0], uniform_importance(8)[0].float(), atol=0.25)
    assert not torch.allclose(report.importance, report.proxy_importance, atol=0.05)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", *ENCODERS])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_are_measured_as_if_alone(family, side):
    model = tiny_model(family)
    ids, mask = left_padded(4, 12)
    if side == "right":
        ids, mask = ids.flip(1), mask.flip(1)
    found = measure_sinks(model, ids, 0.12, kinds=("natural",), attention_mask=mask, batch_size=3)["natural"]
    alone = [
        measure_sinks(model, row[real.bool()][None], 0.12, kinds=("natural",))["natural"]
        for row, real in zip(ids, mask, strict=True)
    ]
    assert len({len(report.sink) for report in alone}) == 4
    for name in vars(found):
        for k in range(12):  # a position is a mean over the texts that reach it
            values = [getattr(report, name) for report in alone if k < len(report.sink)]
            if name == "row_sum":
                expected, got = sum(values) / len(values), found.row_sum
            else:
                expected, got = sum(v[..., k] for v in values) / len(values), getattr(found, name)[..., k]
            if name != "row_sum" or k == 0:
                assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5), (name, k)
    unmasked = measure_sinks(model, ids, 0.12, kinds=("natural",))["natural"]
    assert not torch.allclose(unmasked.importance, found.importance, atol=1e-3)


def test_drawn_kinds_have_the_lengths_of_the_masked_rows():
    ids, mask = left_padded(3, 6)
    model, seen = tiny_model("gpt2"), []
    hook = model.transformer.wte.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    reports = measure_sinks(model, ids, attention_mask=mask, generator=torch.Generator().manual_seed(0))
    hook.remove()
    assert seen == [(1, 4), (1, 5), (1, 6)] * 3
    assert {len(report.sink) for report in reports.values()} == {6}


def test_a_model_that_overflows_is_an_error():
    model = tiny_model("llama")
    model.get_input_embeddings().weight.data[7] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        measure_sinks(model, torch.tensor([[5, 7, 9]]), kinds=("natural",))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"input_ids": torch.ones(2, 1, dtype=torch.long)}, "T >= 2"),
        ({"input_ids": torch.ones(4, dtype=torch.long)}, r"\(N, T\)"),
        ({"eps": 1.5}, "eps"),
        ({"kinds": ("natural", "shuffled")}, "shuffled"),
        ({"vocabulary": torch.tensor([], dtype=torch.long)}, "vocabulary"),
        ({"batch_size": 0}, "batch_size"),
        ({"input_ids": torch.tensor([[1, 10**6]])}, r"input_ids holds 1000000; the model has the tokens 0\.\."),
        ({"input_ids": torch.tensor([[1, -2]])}, "input_ids holds -2"),
        ({"vocabulary": torch.tensor([3, 10**6])}, "vocabulary holds 1000000"),
        ({"attention_mask": torch.ones(2, 5)}, r"shape of input_ids, \(2, 6\)"),
        ({"attention_mask": torch.tensor([[1, 1, 0, 1, 1, 1]] * 2)}, "gaps"),
        ({"attention_mask": torch.tensor([[1] * 6, [0] * 5 + [1]])}, "row 1 with 1 of 2"),
        ({"attention_mask": torch.zeros(2, 6)}, "row 0 with 0 of 2"),
    ],
)
def test_bad_requests_are_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        measure_sinks(tiny_model("gpt2"), **{"input_ids": random_ids(2, 6), **arguments})


def test_ids_that_are_not_integers_are_refused():
    with pytest.raises(TypeError, match="input_ids must be integers"):
        measure_sinks(tiny_model("gpt2"), torch.ones(2, 6))
    with pytest.raises(TypeError, match="vocabulary must be integers"):
        measure_sinks(tiny_model("gpt2"), random_ids(2, 6), vocabulary=torch.ones(3))
