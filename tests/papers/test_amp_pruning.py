import re
import warnings
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from families import DECODERS, ENCODERS, left_padded, random_ids, tiny_model, tiny_tokenizer
from papertrial.lab.trial import Trial
from papertrial.lm.anatomy import anatomy, body
from papertrial.lm.hooks import record
from papertrial.lm.pruning import (
    LayerSizes,
    UnitScores,
    magnitude_scores,
    parameter_counts,
    parameters_after,
    prune,
    random_scores,
    sizes,
    unit_costs,
    whole_plan,
)
from papertrial.papers.compression.amp_pruning import experiment
from papertrial.papers.compression.amp_pruning.method import (
    Amounts,
    ApplyOptions,
    amp_amounts,
    amp_importance,
    amp_plan,
    apply,
    calibration_pieces,
    recover,
)

EVERY = DECODERS + ENCODERS
PROMPTS = [random_ids(1, length, seed=length) for length in (5, 9, 3)]


def by_definition(model, prompts, *, average="prompts", projected=False):
    """One prompt and one head at a time, contributions formed in full."""
    head_rows, neuron_rows, weights = [], [], []
    for ids in prompts:
        with torch.no_grad(), record(model, ["head_out", "mlp_act"]) as seen:
            body(model)(input_ids=ids)
        heads, neurons = [], []
        for block in anatomy(model).blocks:
            z, a = seen["head_out"][block.index][0], seen["mlp_act"][block.index][0]  # (T, H, d_h), (T, F)
            y = torch.einsum("thd,hdo->tho", z, block.W_O)
            heads.append(y.abs().sum(-1).mean(0))
            column = block.W_out.abs().sum(1) if projected else torch.ones(block.neurons)
            neurons.append((a.abs() * column).mean(0))
        head_rows.append(torch.stack(heads))
        neuron_rows.append(torch.stack(neurons))
        weights.append(1.0 if average == "prompts" else ids.shape[1])
    weights = torch.tensor(weights) / sum(weights)
    return tuple((weights[:, None, None] * torch.stack(rows)).sum(0).detach() for rows in (head_rows, neuron_rows))


# -- importance --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize(
    "settings", [{}, {"average": "tokens", "mlp_criterion": "projected"}], ids=["as released", "variants"]
)
def test_importance_is_the_definition_prompt_by_prompt(family, settings):
    model = tiny_model(family)
    heads, neurons = by_definition(
        model, PROMPTS, average=settings.get("average", "prompts"), projected="mlp_criterion" in settings
    )
    found = amp_importance(model, PROMPTS, **settings)
    assert torch.allclose(torch.stack(found.heads).float(), heads, rtol=1e-4)
    assert torch.allclose(torch.stack(found.neurons).float(), neurons, rtol=1e-4)


@pytest.mark.parametrize("family", EVERY)
def test_contributions_of_the_heads_sum_to_what_the_output_projection_gives(family):
    """The quantity that is ranked is the whole of what attention writes, bias aside."""
    model = tiny_model(family)
    with torch.no_grad(), record(model, ["head_out", "attn_out"]) as seen:
        body(model)(input_ids=random_ids(2, 7))
        for block in anatomy(model).blocks:
            total = torch.einsum("bthd,hdo->bto", seen["head_out"][block.index], block.W_O)
            total = total if block.b_O is None else total + block.b_O
            assert torch.allclose(total, seen["attn_out"][block.index], atol=1e-5)


@pytest.mark.parametrize("family", DECODERS)
def test_padding_does_not_count(family):
    model = tiny_model(family)
    ids, mask = left_padded(4, 9)
    alone = [ids[row, mask[row].bool()][None] for row in range(4)]
    padded, single = amp_importance(model, [(ids, mask)]), amp_importance(model, alone)
    for a, b in zip(padded.heads + padded.neurons, single.heads + single.neurons, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_a_head_nobody_reads_and_a_neuron_that_never_fires_matter_least_and_go_first():
    model = tiny_model("opt")  # ReLU
    with torch.no_grad():
        for block in anatomy(model).blocks:
            block.W_O[2] = 0
            block.W_in[:, 17] = 0
            block.b_in[17] = -1.0
    importance = amp_importance(model, PROMPTS)
    plan = amp_plan(model, importance, 0.2)
    for layer in range(2):
        assert importance.heads[layer][2] == 0 == importance.neurons[layer][17]
        assert 2 not in plan.heads[layer]
        assert 17 not in plan.neurons[layer]


def test_heads_are_ranked_by_what_they_write_not_by_how_large_they_are():
    """The projection is the point: a head can be loud where its output weights are not."""
    model = tiny_model("llama", num_key_value_heads=4)
    with torch.no_grad():
        for block in anatomy(model).blocks:
            block.head_weights("value")[1] *= 10
            block.W_O[1] *= 1e-3
    importance = amp_importance(model, PROMPTS)
    with torch.no_grad(), record(model, "head_out") as seen:
        body(model)(input_ids=PROMPTS[1])
    for layer in range(2):
        assert seen["head_out"][layer].abs().mean((0, 1, 3)).argmax() == 1
        assert importance.heads[layer].argmin() == 1


def test_importance_leaves_mode_weights_and_hooks_alone():
    model = tiny_model("llama").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    amp_importance(model, PROMPTS)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_importance_of_a_bfloat16_model_is_computed_in_float32():
    model = tiny_model("llama")
    rounded = tiny_model("llama").bfloat16()
    full, half = amp_importance(model, PROMPTS), amp_importance(rounded, PROMPTS)
    for a, b in zip(full.heads, half.heads, strict=True):
        assert torch.allclose(a, b, rtol=0.05)  # the activations are bfloat16, 8 bits; sums over 32 columns are not


# -- amounts -----------------------------------------------------------------------------------------------------


def released_amounts(heads, neurons, total, blocks, ratio):
    """The two formulas with numbers put in, as a second writing of them."""
    r = total * ratio / blocks
    n = min(round(r * heads), heads - 1)
    m = round(neurons * ((heads / neurons) * (r - n / heads) + r))
    return n, min(m, neurons - 1)


@pytest.mark.parametrize("ratio", [0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5])
def test_amounts_are_the_released_formulas(ratio):
    model = tiny_model("llama", num_key_value_heads=8, num_attention_heads=8, hidden_size=64, intermediate_size=200)
    counts = parameter_counts(model)
    found = amp_amounts(model, ratio)
    assert (found.heads, found.neurons) == released_amounts(8, 200, counts.total, counts.blocks, ratio)
    assert found.groups == found.heads


def test_amounts_of_llama_2_7b_at_thirty_per_cent_by_hand():
    """H 32, F 11008, D 4096, 32 layers, V 32000: r = 0.3 x 6.738e9 / 6.476e9 = 0.31214; 0.31214 x 32 = 9.99."""
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    found = amp_amounts(model, 0.3)
    assert (found.heads, found.neurons) == (10, 3436)
    assert found.groups == 10


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("compensate", ["code", "params"])
@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.35])
def test_the_ratio_is_met_within_a_head_and_a_neuron_of_each_layer(family, compensate, ratio):
    # of the whole model, embeddings included
    model = tiny_model(family, **({} if family == "gpt2" else {"vocab_size": 31}))
    layer = anatomy(model).blocks[0]
    costs, size = unit_costs(layer), sizes(model)[0]
    per_group = size.heads // size.key_value_heads
    unit = per_group * costs.query_head + costs.key_value_head if size.key_value_heads > 1 else costs.query_head
    total = parameter_counts(model).total
    if ratio * total / parameter_counts(model).blocks >= 0.85:
        pytest.skip("more than the layers of this tiny model can give")
    plan = amp_plan(model, magnitude_scores(model), ratio, compensate=compensate)
    missed = abs(total - parameters_after(model, plan) - ratio * total)
    # biases of the output projections count as block parameters and never go
    stays = 2 * sum(0 if bias is None else bias.numel() for bias in (layer.b_O, layer.b_out))
    slack = (unit if compensate == "code" else 0) + (0 if size.key_value_heads > 1 else costs.key_value_head)
    assert missed <= 2 * (slack + costs.neuron * (1 + size.heads / 2 * (compensate == "code"))) + stays


def test_compensation_in_parameters_meets_the_ratio_more_closely():
    model = tiny_model("llama", num_key_value_heads=4, intermediate_size=352)
    total = parameter_counts(model).total
    missed = {}
    for compensate in ("code", "params"):
        plan = amp_plan(model, magnitude_scores(model), 0.3, compensate=compensate)
        missed[compensate] = abs(total - parameters_after(model, plan) - 0.3 * total)
    assert (
        missed["params"] <= 2 * unit_costs(anatomy(model).blocks[0]).neuron
    )  # half a neuron of each layer, generously
    assert missed["params"] < missed["code"]


def test_grouped_heads_go_in_whole_groups_or_evenly_within_them():
    model = tiny_model("llama", num_attention_heads=8, num_key_value_heads=4, hidden_size=64)
    scores = UnitScores(
        tuple(torch.tensor([1.0, 9, 5, 4, 0, 12, 7, 8]) for _ in range(2)), tuple(torch.rand(44) for _ in range(2))
    )
    whole = amp_plan(model, scores, 0.4, groups="whole")
    within = amp_plan(model, scores, 0.4, groups="within")
    assert amp_amounts(model, 0.4, groups="whole") == Amounts(4, 2, amp_amounts(model, 0.4, groups="whole").neurons)
    assert whole.heads[0] == (4, 5, 6, 7)  # groups sum to 10, 9, 12, 15
    assert within.heads[0] == (1, 2, 5, 7)  # the lower head of each group goes
    for plan in (whole, within):
        pruned = prune(model, plan)
        size = sizes(pruned)[0]
        assert size.heads % size.key_value_heads == 0
        assert pruned.config.num_attention_heads == size.heads


@pytest.mark.parametrize(("heads", "groups", "finer"), [(12, 2, "within"), (8, 4, "whole"), (4, 2, "whole")])
def test_heads_that_share_keys_go_by_the_finer_steps_unless_told(heads, groups, finer):
    model = tiny_model("llama", num_attention_heads=heads, num_key_value_heads=groups, hidden_size=8 * heads)
    for ratio in (0.1, 0.2, 0.3, 0.5):
        assert amp_amounts(model, ratio) == amp_amounts(model, ratio, groups=finer)


def test_two_groups_of_six_lose_heads_at_twenty_per_cent():
    """The shape of Qwen2.5-1.5B, of which whole groups would leave every head, or half of them."""
    import transformers

    config = transformers.Qwen2Config(
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        vocab_size=151936,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = transformers.Qwen2ForCausalLM(config)
    # r = 0.2 x 1543.7e6 / 1310.2e6 = 0.2357, of 6 heads in a group 1.41
    assert [amp_amounts(model, ratio).heads for ratio in (0.1, 0.2, 0.25)] == [2, 2, 4]
    assert [amp_amounts(model, ratio, groups="whole").heads for ratio in (0.1, 0.2, 0.25)] == [0, 0, 6]


def test_one_shared_group_is_cut_within():
    model = tiny_model("gemma")
    assert amp_amounts(model, 0.4).groups == 0
    assert amp_amounts(model, 0.4).heads > 0
    assert amp_amounts(model, 0.4, groups="whole").heads == 0


def test_every_layer_loses_the_same_and_ranking_is_within_layers():
    """Not a global ranking: a layer with small scores throughout loses no more than the others."""
    model = tiny_model("llama", num_key_value_heads=4)
    scores = random_scores(model, generator=torch.Generator().manual_seed(0))
    scores = UnitScores((scores.heads[0] * 1e-6, scores.heads[1]), (scores.neurons[0] * 1e-6, scores.neurons[1]))
    plan = amp_plan(model, scores, 0.3)
    assert len(set(map(len, plan.heads))) == len(set(map(len, plan.neurons))) == 1


def test_reversed_takes_the_highest_and_ratio_zero_nothing():
    model = tiny_model("llama", num_key_value_heads=4)
    importance = amp_importance(model, PROMPTS)
    lowest, highest = (amp_plan(model, importance, 0.3, remove=which) for which in ("lowest", "highest"))
    for layer in range(2):
        kept = importance.neurons[layer][list(lowest.neurons[layer])]
        gone = sorted(set(range(44)) - set(lowest.neurons[layer]))
        assert kept.min() >= importance.neurons[layer][gone].max()
        assert set(importance.heads[layer].topk(len(highest.heads[layer]), largest=False).indices.tolist()) == set(
            highest.heads[layer]
        )
    assert amp_plan(model, importance, 0.0) == whole_plan(model)


def test_neurons_only_meets_the_ratio_without_touching_heads():
    model = tiny_model("gpt2", n_inner=400)
    plan = amp_plan(model, amp_importance(model, PROMPTS), 0.4, parts="mlp")
    total = parameter_counts(model).total
    assert plan.heads == whole_plan(model).heads
    assert (
        abs(1 - parameters_after(model, plan) / total - 0.4) < 2 * unit_costs(anatomy(model).blocks[0]).neuron / total
    )


# -- recovery ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt", "phi"])
def test_recovery_lowers_the_loss_and_leaves_a_plain_model(family, tmp_path):
    model = tiny_model(family)
    plan = amp_plan(model, amp_importance(model, PROMPTS), 0.2, parts="mlp")
    ids = random_ids(4, 12, seed=3)

    def tuned(steps=30):
        generator = torch.Generator().manual_seed(1)
        return recover(prune(model, plan), [ids], steps=steps, generator=generator, rate=1e-2)

    def loss(of):
        with torch.no_grad():
            return float(of(ids, labels=ids).loss)

    pruned, again = tuned(), tuned()
    assert loss(pruned) < loss(prune(model, plan)) - 0.05
    assert all(torch.equal(a, b) for a, b in zip(pruned.parameters(), again.parameters(), strict=True))
    assert sizes(pruned) == plan.sizes(model)
    assert set(dict(pruned.named_parameters())) == set(dict(model.named_parameters()))
    assert all(parameter.requires_grad for parameter in pruned.parameters())
    embedding = pruned.get_input_embeddings().weight
    assert torch.equal(embedding, model.get_input_embeddings().weight)  # adapters sit on projections only
    pruned.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loss(reloaded) == pytest.approx(loss(pruned), abs=1e-6)


def test_recovery_does_not_disturb_the_global_generator():
    model = tiny_model("llama")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    recover(prune(model, whole_plan(model)), [random_ids(2, 6)], steps=1, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.rand(3), expected)


# -- on a checkpoint ---------------------------------------------------------------------------------------------

TEXTS = ["the cat sat on the mat, then the dog came back."] * 30 + ["a quick brown fox jumps over the lazy dog!"] * 30


def checkpoint(family, **overrides):
    return SimpleNamespace(model=tiny_model(family, **overrides), tokenizer=tiny_tokenizer(), name=f"tiny {family}")


def run(of, **options):
    settings = {"prompts": 20, "prompt_tokens": 24, **options}
    return apply(of, TEXTS, ApplyOptions(**settings), generator=torch.Generator().manual_seed(0))


def test_apply_prunes_as_the_parts_by_hand_do():
    given = checkpoint("llama", num_key_value_heads=4)
    before = {name: value.clone() for name, value in given.model.state_dict().items()}
    seen = []
    changed = apply(
        given,
        TEXTS,
        ApplyOptions(ratio=0.3, prompts=20, prompt_tokens=24),
        generator=torch.Generator().manual_seed(0),
        on_progress=lambda *event: seen.append(event),
    )
    pieces = calibration_pieces(given.tokenizer, TEXTS, 24)
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0))[:20].tolist()
    importance = amp_importance(given.model, [torch.tensor([pieces[i]]) for i in order])
    plan = amp_plan(given.model, importance, 0.3, compensate="params")
    expected = prune(given.model, plan)
    assert sizes(changed.model) == sizes(expected)
    ids = random_ids(2, 8)
    assert torch.allclose(changed.model(ids).logits, expected(ids).logits, atol=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in given.model.state_dict().items())
    assert seen[-1] == ("measuring importance", 20, 20)
    assert "of 44 neurons are left" in changed.summary


def test_apply_tunes_when_asked():
    given = checkpoint("llama")
    untuned, tuned = run(given), run(given, tune_steps=20, tune_rate=1e-2, tune_batch=4)
    ids = torch.tensor([tiny_tokenizer()(TEXTS[0])["input_ids"]])
    with torch.no_grad():
        assert float(tuned.model(ids, labels=ids).loss) < float(untuned.model(ids, labels=ids).loss)
    assert "20 steps" in str(tuned.facts["recovery"])


@pytest.mark.parametrize(
    ("family", "settings", "says", "never"),
    [
        ("llama", {"ratio": 0.3}, "heads that write least .* 2 of 4 heads and .* of 44 neurons are left. It", "stay"),
        (
            "llama",
            {"ratio": 0.3, "parts": "mlp"},
            "In every layer the MLP neurons .* All 4 heads stay, as was",
            "write",
        ),
        ("llama", {"ratio": 0.02}, "In every layer the MLP neurons .* All 4 heads stay: heads come in steps", "write"),
        ("narrow llama", {"ratio": 0.2}, "2 of 4 heads are left. All 4 neurons stay: the heads alone", "active"),
        ("llama", {"ratio": 0.0}, "^Nothing was taken out: 0 %", "left"),
        (
            "gpt2",
            {"ratio": 0.1, "parts": "mlp", "mlp_criterion": "projected"},
            "neurons that feed the .* stay",
            "write",
        ),
        ("llama", {"ratio": 0.3, "tune_steps": 1, "tune_batch": 2}, "briefly", "not tuned"),
    ],
)
def test_the_card_says_of_heads_and_neurons_only_what_was_done(family, settings, says, never):
    few = {"intermediate_size": 4} if family.startswith("narrow") else {}
    changed = run(checkpoint(family.removeprefix("narrow "), **few), **settings)
    assert re.search(says, changed.summary), changed.summary
    assert never not in changed.summary


def test_recovery_warns_of_nothing_that_its_caller_could_not_change():
    given = checkpoint("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(given, tune_steps=1, tune_batch=2)


def test_apply_refuses_before_it_works_where_the_result_would_be_no_ordinary_checkpoint():
    with pytest.raises(ValueError, match=r"gpt2 has no head size.*prune neurons only \(--parts mlp\)"):
        run(checkpoint("gpt2"), ratio=0.3)
    assert run(checkpoint("gpt2", n_inner=300), ratio=0.3, parts="mlp").model.config.n_inner < 300


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 1.0}, r"ratio must lie in \[0, 1\)"),
        ({"ratio": -0.1}, "ratio must lie in"),
        ({"ratio": float("nan")}, "ratio must lie in"),
        ({"ratio": 0.95}, "would empty the layers"),
        ({"ratio": 0.9, "parts": "mlp"}, "more than the MLPs hold"),
        ({"prompts": 0}, "prompts must be at least 1"),
        ({"prompts": 500}, "give 60 prompts.*500 are asked for"),
        ({"prompt_tokens": 1}, "prompt_tokens must be at least 2"),
        ({"tune_steps": -1}, "tune_steps must be at least 0"),
        ({"tune_rate": 0.0}, "tune_rate must be positive"),
        ({"mlp_criterion": "size"}, "mlp_criterion must be one of activation, projected"),
        ({"groups": "some"}, "groups must be one of auto, whole, within"),
        ({"compensate": "x"}, "compensate must be one of"),
        ({"parts": "heads"}, "parts must be one of both, mlp"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        run(checkpoint("llama"), **options)


def test_prompts_longer_than_a_position_table_are_refused():
    with pytest.raises(ValueError, match="100 and the model has 64 positions"):
        run(checkpoint("gpt2"), parts="mlp", ratio=0.1, prompt_tokens=100)


def test_bad_batches_and_scores_are_named():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="batches is empty"):
        amp_importance(model, [])
    ids, mask = random_ids(2, 4), torch.ones(2, 4, dtype=torch.long)
    mask[1] = 0
    with pytest.raises(ValueError, match="prompt 1 of a batch has no token"):
        amp_importance(model, [(ids, mask)])
    with pytest.raises(ValueError, match="with a mask of that shape"):
        amp_importance(model, [(ids, mask[:1])])
    with pytest.raises(ValueError, match="average must be one of"):
        amp_importance(model, PROMPTS, average="rows")
    other = magnitude_scores(tiny_model("llama", intermediate_size=40))
    with pytest.raises(ValueError, match="importance is of layers"):
        amp_plan(model, other, 0.2)
    with pytest.raises(ValueError, match="remove must be one of"):
        amp_plan(model, magnitude_scores(model), 0.2, remove="middle")


# -- the experiment ----------------------------------------------------------------------------------------------


@pytest.fixture
def setting():
    parameters = {
        **experiment.SCALES["smoke"],
        "calibration": [6, 8],
        "test_windows": [4, 16],
        "cloze": {"items": 6, "prompt": 6, "continuation": 4},
        "draws": 2,
        "tuned_draws": 2,
        "tuned": ["amp", "random"],
    }
    trial = Trial("amp_pruning", "smoke", 0, parameters)
    base = checkpoint("llama", num_key_value_heads=4)
    texts = {"train": TEXTS, "test": [f"{text} {text[::-1]}" for text in TEXTS[::7]]}
    return trial, base, experiment.Data(trial, base, texts)


def test_every_cloze_item_holds_its_true_continuation_and_three_of_others(setting):
    _, _, data = setting
    shifts = [
        next(s for s in range(6) if torch.equal(data.choices[:, c], data.choices[:, 0].roll(s, 0))) for c in range(4)
    ]
    assert shifts[0] == 0
    assert len(set(shifts)) == 4


def test_notes_describe_a_layer_in_words():
    assert experiment._in_words(LayerSizes(3, 1, 200)) == "3 heads, 1 key/value heads, 200 neurons"


def test_all_criteria_cut_models_of_one_shape(setting):
    trial, base, data = setting
    criteria = experiment._criteria(trial, base.model, data.calibration)
    cuts = experiment._cuts(trial, base.model, criteria, 0.3)
    assert len(cuts["random"]) == 2
    shapes = {arm: {tuple(sizes(make())) for make in makers} for arm, makers in cuts.items() if arm != "depth"}
    assert len(set.union(*shapes.values())) == 1
    assert set(shapes) == {"amp", "amp_projected", "magnitude", "wanda", "loss_change", "random", "reversed"}


def test_every_arm_recovers_on_the_same_batches(setting, monkeypatch):
    trial, base, data = setting
    seen = []

    def note(model, batches, *, generator, **settings):
        seen.append((next(iter(batches)), generator.initial_seed(), settings))
        return model

    monkeypatch.setattr(experiment, "recover", note)
    cut = {arm: [base.model, base.model] for arm in ("amp", "random")}
    results = {}
    experiment._recover(trial, cut, data, results)
    assert set(results) == {"amp_tuned", "random_tuned"}
    assert len(seen) == 4
    for batch, seed, settings in seen[1:]:
        assert torch.equal(batch, seen[0][0])
        assert (seed, settings) == seen[0][1:]
