import copy
import inspect

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from families import DECODERS, ENCODERS, left_padded, random_ids, tiny_model, tiny_tokenizer
from papertrial.lm.anatomy import anatomy
from papertrial.lm.generation import greedy
from papertrial.lm.models import load
from papertrial.lm.pruning import (
    LayerSizes,
    Plan,
    is_ordinary,
    keep_layers,
    load_pruned,
    loss_change_scores,
    magnitude_scores,
    masked,
    parameter_counts,
    parameters_after,
    prune,
    random_scores,
    require_ordinary,
    sizes,
    wanda_scores,
    whole_plan,
)

EVERY = DECODERS + ENCODERS
FIXED_HEADS = ("gpt2", "gpt_neox", "opt", "bert", "roberta")
"""Their configurations have no head size of its own."""
EXACT = 2e-6
"""Sums over fewer addends in another order: float32 rounding of logits of size one."""


def logits(model, ids=None, **inputs):
    with torch.no_grad():
        return model(random_ids(3, 12) if ids is None else ids, **inputs).logits


def halves(model, kept_heads=(2, 3)):
    """A plan that keeps one key/value group where there are two, and every other neuron."""
    layers = len(sizes(model))
    return Plan([kept_heads] * layers, [range(1, 44, 2)] * layers)


def close(a, b, tolerance=EXACT):
    return torch.allclose(a, b, rtol=0, atol=tolerance * max(1.0, float(b.abs().max())))


def stock(family, folder):
    """What a user does who has never heard of this package."""
    kind = AutoModelForMaskedLM if family in ENCODERS else AutoModelForCausalLM
    return as_here(kind.from_pretrained(folder).eval(), family)


def as_here(model, family):
    if family == "gemma2":  # older versions of transformers choose sdpa, which has no soft cap, on loading
        model.set_attn_implementation("eager")
    return model


# -- the cut is exact --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", EVERY)
def test_a_cut_model_computes_what_the_whole_one_does_with_the_dropped_parts_zeroed(family):
    model = tiny_model(family)
    plan = halves(model)
    with masked(model, plan):
        expected = logits(model)
    assert not close(expected, logits(model), 1e-3), "the plan must matter"
    assert close(logits(prune(model, plan)), expected)


@pytest.mark.parametrize("family", EVERY)
def test_zeroing_rows_of_the_output_weights_is_the_same_cut(family):
    """An oracle without hooks: the weights that read the dropped heads and neurons are set to zero."""
    model = tiny_model(family)
    plan = halves(model)
    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        for block in anatomy(zeroed).blocks:
            block.W_O[plan.dropped_heads(block)] = 0
            block.W_out[plan.dropped_neurons(block)] = 0
    assert close(logits(prune(model, plan)), logits(zeroed))


@pytest.mark.parametrize("family", EVERY)
def test_layers_may_be_cut_differently_in_memory(family):
    model = tiny_model(family)
    plan = Plan([[0, 1], [0, 1, 2, 3]], [[0, 43, 7], range(40)])
    with masked(model, plan):
        expected = logits(model)
    assert close(logits(prune(model, plan)), expected)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "phi", "gemma"])
def test_query_heads_can_go_within_groups_that_stay(family):
    model = tiny_model(family)
    kept = [3] if family == "gemma" else [0, 3]  # gemma has one group of four, the others two of two
    plan = Plan([kept] * 2, [range(44)] * 2)
    with masked(model, plan):
        expected = logits(model)
    pruned = prune(model, plan)
    assert close(logits(pruned), expected)
    assert sizes(pruned)[0] == LayerSizes(len(kept), len(kept), 44)


@pytest.mark.parametrize("family", EVERY)
def test_keeping_everything_changes_nothing(family):
    model = tiny_model(family)
    pruned = prune(model, whole_plan(model))
    assert type(pruned) is type(model)
    assert torch.equal(logits(pruned), logits(model))
    assert pruned.config.to_dict() == model.config.to_dict()


@pytest.mark.parametrize("family", EVERY)
def test_the_given_model_is_left_alone_unless_asked(family):
    model = tiny_model(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = model.config.to_dict()
    prune(model, halves(model))
    assert model.config.to_dict() == config
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for plan in (halves(model), whole_plan(model)):  # nor does it share storage with what is made of it
        taken = {parameter.data_ptr() for parameter in model.parameters()}
        assert taken.isdisjoint(parameter.data_ptr() for parameter in prune(model, plan).parameters())
    expected = logits(prune(model, halves(model)))
    assert torch.equal(logits(prune(model, halves(model), inplace=True)), expected)


@pytest.mark.parametrize("family", DECODERS)
def test_generation_with_a_cache_runs_on_a_cut_model(family):
    pruned = prune(tiny_model(family), halves(tiny_model(family)))
    ids, mask = left_padded(3, 6)
    tokens = greedy(pruned, ids, mask, max_new_tokens=5, eos_token_id=[]).tokens
    with torch.no_grad():  # step by step without a cache
        for row in range(3):
            sequence = ids[row][mask[row].bool()][None]
            for step in range(5):
                best = pruned(sequence, use_cache=False).logits[0, -1].argmax()
                assert int(best) == int(tokens[row, step])
                sequence = torch.cat([sequence, best.view(1, 1)], 1)


def test_a_conv1d_is_cut_as_the_linear_layer_with_the_same_weights_is():
    model = tiny_model("gpt2")
    linear = copy.deepcopy(model)
    for module in list(linear.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Conv1D):
                other = torch.nn.Linear(child.nx, child.nf)
                other.weight.data, other.bias.data = child.weight.data.t().contiguous(), child.bias.data
                setattr(module, name, other)
    plan = halves(model)
    assert close(logits(prune(linear, plan)), logits(prune(model, plan)))


# -- the configuration is true, and the folder ordinary ----------------------------------------------------------


@pytest.mark.parametrize("family", EVERY)
def test_a_cut_model_reloads_with_the_same_logits(family, tmp_path):
    model = tiny_model(family)
    pruned = prune(model, halves(model))
    pruned.save_pretrained(tmp_path)
    ordinary = family not in FIXED_HEADS
    assert is_ordinary(pruned) == ordinary
    again = stock(family, tmp_path) if ordinary else load_pruned(tmp_path)
    assert torch.equal(logits(again), logits(pruned))
    assert sizes(again) == sizes(pruned)


@pytest.mark.parametrize("family", EVERY)
def test_neurons_alone_reload_with_plain_transformers_in_every_family(family, tmp_path):
    model = tiny_model(family)
    pruned = prune(model, Plan([range(4)] * 2, [range(0, 44, 3)] * 2))
    assert is_ordinary(pruned)
    pruned.save_pretrained(tmp_path)
    again = stock(family, tmp_path)
    assert torch.equal(logits(again), logits(pruned))
    assert type(again) is type(model)
    fresh = type(again)(again.config)  # the configuration alone builds a model of these shapes
    assert {n: p.shape for n, p in fresh.named_parameters()} == {n: p.shape for n, p in pruned.named_parameters()}


@pytest.mark.parametrize("family", [name for name in DECODERS if name not in FIXED_HEADS])
def test_the_configuration_of_a_cut_model_is_true(family):
    model = tiny_model(family)
    config = prune(model, halves(model)).config
    assert config.num_attention_heads == 2
    assert config.num_key_value_heads == 1
    assert config.intermediate_size == 22
    assert config.head_dim == anatomy(model).blocks[0].head_size


@pytest.mark.parametrize("family", EVERY)
def test_uneven_layers_are_saved_with_their_sizes_and_refused_by_plain_transformers(family, tmp_path):
    model = tiny_model(family)
    pruned = prune(model, Plan([[0, 1], [0, 1, 2, 3]], [[0, 43, 7], range(40)]))
    assert not is_ordinary(pruned)
    pruned.save_pretrained(tmp_path)
    again = as_here(load_pruned(tmp_path), family)
    assert torch.equal(logits(again), logits(pruned))
    with pytest.raises(RuntimeError):  # loudly, not with random weights
        stock(family, tmp_path)
    evened = prune(again, Plan([[0, 1]] * 2, [[0, 1, 2]] * 2))
    assert is_ordinary(evened) == (family not in FIXED_HEADS)


def three_of_four_heads(**overrides):
    config = LlamaConfig(
        vocab_size=67, hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, **overrides,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.15)
    return model, Plan([[0, 1, 3], [1, 2, 3]], [range(40)] * 2)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"tie_word_embeddings": True},
        {
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
            }
        },
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
    ],
)  # fmt: skip
def test_a_llama_whose_heads_no_longer_divide_its_width_becomes_the_same_mistral(overrides, tmp_path):
    model, plan = three_of_four_heads(**overrides)
    model.generation_config.max_new_tokens = 17
    ids = random_ids(2, 60)
    with masked(model, plan):
        expected = logits(model, ids)
    pruned = prune(model, plan)
    assert type(pruned).__name__ == "MistralForCausalLM"
    assert pruned.config.sliding_window is None
    assert close(logits(pruned, ids), expected)
    pruned.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, ids), logits(pruned, ids))
    assert again.generation_config.max_new_tokens == 17
    assert anatomy(pruned).tied == anatomy(model).tied


def test_what_no_class_can_say_is_refused_in_one_line_that_names_what_works():
    model, plan = three_of_four_heads(attention_bias=True)  # Mistral has no biases
    with pytest.raises(ValueError, match=r"3 heads.*takes 1, 2 or all 4"):
        require_ordinary(model, plan.sizes(model))
    with masked(model, plan):
        expected = logits(model)
    pruned = prune(model, plan)
    assert not is_ordinary(pruned)
    assert close(logits(pruned), expected)
    for family in FIXED_HEADS:
        fixed = tiny_model(family)
        with pytest.raises(ValueError, match="prune neurons only"):
            require_ordinary(fixed, halves(fixed).sizes(fixed))
        require_ordinary(fixed, Plan([range(4)] * 2, [range(9)] * 2).sizes(fixed))
    with pytest.raises(ValueError, match="different widths"):
        require_ordinary(model, Plan([[0], [1]], [range(3), range(4)]).sizes(model))


def test_a_cut_folder_is_smaller_and_loads_as_a_checkpoint_of_the_lab(tmp_path):
    model = tiny_model("llama", hidden_size=64, intermediate_size=256)
    for name, part in (("whole", model), ("cut", prune(model, Plan([[0, 1]] * 2, [range(64)] * 2)))):
        part.save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    sizes_on_disk = {name: (tmp_path / name / "model.safetensors").stat().st_size for name in ("whole", "cut")}
    assert sizes_on_disk["cut"] < 0.5 * sizes_on_disk["whole"]
    assert load(str(tmp_path / "cut")).model.config.intermediate_size == 64


def test_a_damaged_uneven_folder_is_a_clear_error(tmp_path):
    pruned = prune(tiny_model("gpt2"), Plan([[0], [1, 2]], [range(3), range(4)]))
    pruned.config.pruned_sizes[0] = [1, 1, 10**9]
    pruned.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="layer 0 must lie in"):
        load_pruned(tmp_path)
    pruned.config.pruned_sizes[0] = [1, 1, 2]
    pruned.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="do not have the sizes"):
        load_pruned(tmp_path)
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_pruned(tmp_path / "nowhere")


# -- layers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", EVERY)
def test_dropping_layers_keeps_an_ordinary_checkpoint_that_generates(family, tmp_path):
    layers = {"gpt2": "n_layer"}.get(family, "num_hidden_layers")
    model = tiny_model(family, **{layers: 4})
    pruned = keep_layers(model, [0, 3])
    expected = copy.deepcopy(model)
    for block in anatomy(expected).blocks[1:3]:  # a skipped block hands on what it gets
        block.module.forward = lambda hidden_states, *_, **__: hidden_states
    assert torch.allclose(logits(pruned), logits(expected), rtol=0, atol=1e-5)
    pruned.save_pretrained(tmp_path)
    again = stock(family, tmp_path)
    assert torch.equal(logits(again), logits(pruned))
    assert again.config.num_hidden_layers == 2
    if family in DECODERS:
        ids, mask = left_padded(2, 5)
        cached = greedy(again, ids, mask, max_new_tokens=4, eos_token_id=[])
        assert cached.tokens.shape == (2, 4)
        row = torch.cat([ids[0], cached.tokens[0]])[None]
        assert int(logits(again, row[:, :-1])[0, -1].argmax()) == int(row[0, -1])


# -- counting ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", EVERY)
def test_the_formula_for_parameters_agrees_with_the_cut_model(family):
    model = tiny_model(family)
    plan = halves(model)
    counts = parameter_counts(model)
    assert counts.total == sum(parameter.numel() for parameter in model.parameters())
    pruned = prune(model, plan)
    assert parameters_after(model, plan) == sum(parameter.numel() for parameter in pruned.parameters())
    after = parameter_counts(pruned)
    assert (after.embedding, after.norm, after.head) == (counts.embedding, counts.norm, counts.head)
    assert after.blocks < counts.blocks


def test_parts_of_a_llama_are_counted_by_hand():
    counts = parameter_counts(tiny_model("llama"))  # D 32, H 4, G 2, d_h 8, F 44, V 67, two layers, not tied
    assert counts.attention == 2 * (32 * 32 + 2 * 16 * 32 + 32 * 32)
    assert counts.mlp == 2 * 3 * 32 * 44
    assert counts.norm == 5 * 32
    assert (counts.embedding, counts.head, counts.other) == (67 * 32, 67 * 32, 0)


# -- other criteria ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", EVERY)
def test_magnitude_of_all_units_is_the_mass_of_the_projections(family):
    model = tiny_model(family)
    scores = magnitude_scores(model)
    for block, heads, neurons in zip(anatomy(model).blocks, scores.heads, scores.neurons, strict=True):
        attention = {id(p): p for m in ("query", "key", "value") for p in block.projection(m).parameters()}
        mass = sum(p.abs().sum() for p in attention.values()) + block.W_O.abs().sum()
        assert torch.allclose(heads.sum(), mass)
        mass = sum(p.abs().sum() for m in (block.gate, block.up) if m is not None for p in m.parameters())
        assert torch.allclose(neurons.sum(), mass + block.W_out.abs().sum())


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_wandas_score_is_the_formula_on_recorded_inputs(family):
    from papertrial.lm.hooks import record

    model, batches = tiny_model(family), [random_ids(2, 7, seed=1), random_ids(3, 5, seed=2)]
    seen = {"head_out": [], "mlp_act": []}
    for ids in batches:
        with record(model, list(seen)) as recording:
            logits(model, ids)
        for site, rows in seen.items():
            rows.append(recording[site][1].flatten(0, 1))
    block = anatomy(model).blocks[1]
    z, a = torch.cat(seen["head_out"]), torch.cat(seen["mlp_act"])
    scores = wanda_scores(model, batches)
    heads = (block.W_O.abs() * z.norm(dim=0)[..., None]).sum((1, 2))
    neurons = (block.W_out.abs() * a.norm(dim=0)[:, None]).sum(1)
    assert torch.allclose(scores.heads[1].float(), heads, rtol=1e-5)
    assert torch.allclose(scores.neurons[1].float(), neurons, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_loss_change_is_that_of_autograd_and_leaves_no_trace(family):
    model, batches = tiny_model(family), [random_ids(2, 7, seed=1), random_ids(2, 7, seed=2)]
    reference = copy.deepcopy(model)
    for ids in batches:
        (reference(ids, labels=ids).loss / 2).backward()
    model.requires_grad_(False)
    scores = loss_change_scores(model, batches)
    block = anatomy(reference).blocks[1]
    for module, rows in ((block.output, scores.heads[1]), (block.down, scores.neurons[1])):
        change = (module.weight * module.weight.grad).abs()
        change = change.sum(1 if isinstance(module, Conv1D) else 0)
        assert torch.allclose(rows, change.unflatten(0, (len(rows), -1)).sum(1), rtol=1e-4)
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


def test_random_scores_depend_on_the_generator_alone():
    model = tiny_model("llama")
    draw = [random_scores(model, generator=torch.Generator().manual_seed(seed)).neurons[0] for seed in (1, 1, 2)]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])


# -- bad input ---------------------------------------------------------------------------------------------------


def test_plans_that_do_not_fit_are_refused():
    model = tiny_model("llama")
    full = [range(44)] * 2
    with pytest.raises(ValueError, match="layer 1 would keep no heads"):
        Plan([[0], []], full)
    with pytest.raises(ValueError, match="distinct indices"):
        Plan([[0, 0], [1]], full)
    with pytest.raises(ValueError, match="1 layers and neurons of 2"):
        Plan([[0]], full)
    for plan, message in (
        (Plan([[0]], [[0]]), "the plan has 1 layers and the model has 2"),
        (Plan([[0, 1], [0, 4]], full), "layer 1 has 4 heads, the plan keeps head 4"),
        (Plan([[0, 1]] * 2, [[0], [44]]), "layer 1 has 44 neurons"),
        (Plan([[0, 1, 2]] * 2, full), "cut alike in every group"),
    ):
        for use in (prune, parameters_after, lambda m, p: masked(m, p).__enter__()):
            with pytest.raises(ValueError, match=message):
                use(model, plan)
    for layers in ([], [1, 0], [0, 2], [0, 0]):
        with pytest.raises(ValueError, match="ascending indices"):
            keep_layers(model, layers)


def test_wrapped_models_are_refused_with_the_remedy():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["o_proj"]))
    with pytest.raises(TypeError, match="merge and unwrap"):
        prune(model, whole_plan(tiny_model("llama")))
    inner = model.get_base_model()
    with pytest.raises(ValueError, match="adapter"):
        prune(inner, whole_plan(tiny_model("llama")))
    assert "inplace" in inspect.signature(prune).parameters


def test_an_unknown_family_is_refused_by_name():
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, state_size=2))
    with pytest.raises(ValueError, match="no anatomy for MambaForCausalLM"):
        whole_plan(model)
