import copy
import itertools

import pytest
import torch
from scipy.stats import chisquare
from torch import nn
from transformers import LogitsProcessor

from families import CONTEXT, DECODERS, left_padded, random_ids, tiny_model
from papertrial.lab.trial import Trial
from papertrial.lm import cache as kv
from papertrial.lm.anatomy import body
from papertrial.lm.generation import StepDecoder, evaluating, greedy, left_pad, sample
from papertrial.papers.decoding.chimera import experiment
from papertrial.papers.decoding.chimera.base_model import in_precision
from papertrial.papers.decoding.chimera.method import (
    ChimeraDraft,
    Draft,
    DraftState,
    MedusaDraft,
    TokenTree,
    acceptance,
    draft_accuracy,
    draft_loss,
    modelled_speedup,
    speculative_decoding,
    speculative_generate,
    train_draft,
)
from papertrial.papers.decoding.chimera.method.training import final_states

PROMPTS = [[5, 9, 3, 22, 7, 41], [8], [60, 11, 33]]
TREE = TokenTree([[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0], [0, 1, 0], [0, 1, 1]])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def untrained(model, *, n_heads=3, spread=0.2, seed=0, **settings):
    """A draft with noise in all weights, so that no part of it is silently without effect."""
    draft = ChimeraDraft(model, n_heads, generator=generator(seed), **settings)
    source = generator(seed + 1)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=source), alpha=spread)
    return draft


def proposal(state, root, tree):
    """What a state proposes, (B, N), and the draft's chance of each node among its siblings' alternatives, (B, N)."""
    expand, chances = state.expand, []

    def watched(*arguments):
        for level, logits, tokens in expand(*arguments):
            yield level, logits, tokens
            q = logits.softmax(-1)[:, level.parent_of]
            chances.append(q.gather(2, tokens[:, level.children, None])[..., 0])

    state.expand = watched
    tokens = state.propose(root, tree).tokens
    del state.expand
    return tokens, torch.cat(chances, 1)


class Oracle(Draft):
    """Drafts what the base model goes on with, or what it certainly does not go on with; ``right`` may depend on the
    length of the text."""

    def __init__(self, model, n_heads, right=True):
        super().__init__(model, n_heads)
        self.model, self.right, self.anything = (model,), right, nn.Parameter(torch.zeros(1))

    def start(self, decoder):
        return OracleState(
            self, [row[m.bool()] for row, m in zip(decoder.input_ids, decoder.attention_mask, strict=True)]
        )

    def training_steps(self, *arguments, **settings):
        raise NotImplementedError


class OracleState(DraftState):
    def __init__(self, draft, rows):
        self.draft, self.rows = draft, rows

    def expand(self, root, tree):
        tokens = root.new_zeros(len(root), len(tree))
        for level in tree.levels:
            logits = torch.zeros(len(root), len(level.parents), self.draft.vocabulary)
            for row, (column, node) in itertools.product(range(len(root)), enumerate(level.parents)):
                path = [] if node < 0 else tree.attention_mask[node].nonzero()[:, 0].tolist()
                ids = torch.cat([self.rows[row], root[row, None], tokens[row, path]])
                true = self.draft.model[0](ids[None]).logits[0, -1]
                right = self.draft.right(len(ids)) if callable(self.draft.right) else self.draft.right
                logits[row, column] = true if right else -true
            yield level, logits, tokens

    def extend(self, tokens, hidden, kept):
        self.rows = [torch.cat([old, new[keep]]) for old, new, keep in zip(self.rows, tokens, kept, strict=True)]

    def select(self, rows):
        self.rows = [row for row, keep in zip(self.rows, rows.tolist(), strict=True) if keep]


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("make", [untrained, lambda model: MedusaDraft(model, 3, blocks=2, widening=2)])
def test_greedy_output_is_the_base_models_token_for_token(family, make):
    model = tiny_model(family)
    ids, mask = left_pad(PROMPTS, 0)
    alone = greedy(model, ids, mask, max_new_tokens=20)
    for tree in (TREE, TokenTree.chain(3), TokenTree([[n] for n in range(5)])):
        out = speculative_generate(model, make(model), ids, mask, tree=tree, max_new_tokens=20)
        assert torch.equal(out.tokens, alone.tokens)
        assert out.mask.all()


@pytest.mark.parametrize("family", ["mistral", "gemma2", "qwen3"])
def test_it_is_lossless_behind_sliding_windows_too(family):
    settings = {"sliding_window": 6}
    if family == "qwen3":
        settings |= {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]}
    model = tiny_model(family, **settings)
    ids, mask = left_pad(PROMPTS, 0)
    draft = untrained(model)
    out = speculative_generate(model, draft, ids, mask, tree=TREE, max_new_tokens=24)
    assert torch.equal(out.tokens, greedy(model, ids, mask, max_new_tokens=24).tokens)
    right = speculative_generate(model, Oracle(model, 3), ids, mask, tree=TREE, max_new_tokens=24)
    assert torch.equal(right.tokens, out.tokens)


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_it_goes_up_to_the_last_position_of_a_learned_table(family):
    model = tiny_model(family)
    ids, mask = left_pad(PROMPTS, 0)
    settings = {"max_new_tokens": CONTEXT - 6 + 1}  # the last token is chosen and not fed
    alone = greedy(model, ids, mask, **settings)
    for draft in (untrained(model), MedusaDraft(model, 3)):
        out = speculative_generate(model, draft, ids, mask, tree=TREE, **settings)
        assert torch.equal(out.tokens, alone.tokens)
    right = speculative_generate(model, Oracle(model, 3), ids[:1], tree=TREE, **settings)
    assert torch.equal(right.tokens, alone.tokens[:1])


@pytest.mark.parametrize("settings", [{"temperature": 0.7}, {"temperature": 1.3, "top_k": 9}, {"top_p": 0.8}])
def test_sampled_output_is_the_one_of_plain_sampling_with_the_same_generator(settings):
    model = tiny_model("llama")
    ids, mask = left_pad(PROMPTS, 0)
    plain = sample(model, ids, mask, max_new_tokens=20, generator=generator(3), **settings)
    for draft in (untrained(model), Oracle(model, 3)):
        out = speculative_generate(
            model, draft, ids, mask, tree=TREE, max_new_tokens=20, do_sample=True, generator=generator(3), **settings
        )
        assert torch.equal(out.tokens, plain.tokens)


def test_a_perfect_draft_gives_its_depth_and_one_and_a_wrong_one_a_token_per_pass():
    model = tiny_model("llama")
    ids, mask = left_pad(PROMPTS, 0)
    alone = greedy(model, ids, mask, max_new_tokens=17).tokens
    for depth in (1, 2, 4):
        out = speculative_generate(
            model, Oracle(model, 4), ids, mask, tree=TokenTree.chain(depth), max_new_tokens=1 + 4 * (depth + 1)
        )
        assert out.stats.tokens_per_forward == depth + 1
        assert out.stats.acceptance == [1.0] * depth
    wrong = speculative_generate(model, Oracle(model, 4, right=False), ids, mask, tree=TREE, max_new_tokens=17)
    assert torch.equal(wrong.tokens, alone)
    assert wrong.stats.tokens_per_forward == 1.0
    assert wrong.stats.rounds.tolist() == [16] * 3
    assert wrong.stats.accepted.tolist() == [0, 0, 0]


def test_a_tree_finds_what_a_chain_misses_at_the_second_rank():
    model = tiny_model("llama")
    ids = torch.tensor(PROMPTS[:1])

    class Second(OracleState):
        def expand(self, root, tree):
            for level, logits, tokens in super().expand(root, tree):
                best = logits.argmax(-1, keepdim=True)  # the right token comes second, behind token 66 or 65
                decoy = torch.where(best == 66, 65, 66)
                yield level, torch.zeros_like(logits).scatter(2, best, 1.0).scatter(2, decoy, 2.0), tokens

    draft = Oracle(model, 2)
    draft.start = lambda decoder: Second(draft, [decoder.input_ids[0]])
    branched = TokenTree([[0], [1], [0, 0], [1, 0], [1, 1]])
    alone = greedy(model, ids, max_new_tokens=10).tokens
    for tree, gained in ((TokenTree.chain(2), 1.0), (branched, 3.0)):
        out = speculative_generate(model, draft, ids, tree=tree, max_new_tokens=10)
        assert torch.equal(out.tokens, alone)
        assert out.stats.tokens_per_forward == gained


@pytest.mark.parametrize("family", DECODERS)
def test_after_every_round_the_cache_is_that_of_a_run_from_scratch(family, monkeypatch):
    from papertrial.papers.decoding.chimera.method import decoding

    model, rounds = tiny_model(family), []
    fitting = decoding._Run._fitting

    def watched(run, decoder, rows):  # called as each round begins, with what the round before has left
        rounds.append([int(n) for n in decoder.attention_mask.sum(1)])
        assert kv.length(decoder.cache) == decoder.input_ids.shape[1]
        for row, mask in enumerate(decoder.attention_mask.bool()):
            fresh = StepDecoder(model, decoder.input_ids[row, mask][None])
            for layer, expected in zip(decoder.cache.layers, fresh.cache.layers, strict=True):
                for held, wanted in ((layer.keys, expected.keys), (layer.values, expected.values)):
                    torch.testing.assert_close(held[row, :, mask], wanted[0], atol=2e-5, rtol=1e-4)  # two routes
        return fitting(run, decoder, rows)

    monkeypatch.setattr(decoding._Run, "_fitting", watched)
    ids, mask = left_pad(PROMPTS, 0)
    draft = Oracle(model, 3, right=lambda length: length % 5 in (0, 2, 3))
    out = speculative_generate(model, draft, ids, mask, tree=TREE, max_new_tokens=12)
    assert 0 < int(out.stats.accepted.sum()) < int(out.stats.reached.sum()), "rounds that differ, or little is tested"
    assert rounds[0] == [6, 1, 3]
    assert len(rounds) > 2
    assert torch.equal(out.tokens, greedy(model, ids, mask, max_new_tokens=12).tokens)


def unsteady(model, noise=0.03):
    """The model itself, a little beside itself: drafts of it are right now and then."""
    other, source = copy.deepcopy(model), generator(9)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=source), alpha=noise)
    return other


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_a_tree_of_one_branch_is_the_assisted_generation_of_transformers_round_by_round(family):
    model = tiny_model(family)
    assistant, lengths = unsteady(model), []
    assistant.generation_config.num_assistant_tokens = 3
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0

    def watch(module, arguments, settings):
        lengths.append(settings["past_key_values"].get_seq_length())

    body(model).register_forward_pre_hook(watch, with_kwargs=True)
    ids = torch.tensor(PROMPTS[:1])
    ours = speculative_generate(model, Oracle(assistant, 3), ids, tree=TokenTree.chain(3), max_new_tokens=40)
    found = lengths.copy()
    lengths.clear()
    # theirs drafts behind the prompt, ours behind the first token that the prompt gives
    prompt = torch.cat([ids, ours.tokens[:, :1]], 1)
    theirs = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), assistant_model=assistant, do_sample=False, max_new_tokens=39,
        eos_token_id=-1, pad_token_id=0,
    )  # fmt: skip
    assert torch.equal(theirs[:, 6:], ours.tokens)
    assert 0 < int(ours.stats.accepted.sum()) < int(ours.stats.reached.sum())
    assert found[:2] == [0, 6]  # the prompt, and the first round behind it, which are one pass there
    assert found[2:] == lengths[1:]


def test_rows_end_at_their_own_end_tokens():
    model, ids = tiny_model("llama"), left_pad(PROMPTS, 0)
    free = greedy(model, *ids, max_new_tokens=20)
    ends = [int(free.tokens[0, 4]), int(free.tokens[2, 9])]
    plain = greedy(model, *ids, max_new_tokens=20, eos_token_id=ends)
    for draft in (Oracle(model, 3), untrained(model)):
        out = speculative_generate(model, draft, *ids, tree=TREE, max_new_tokens=20, eos_token_id=ends)
        assert torch.equal(out.tokens, plain.tokens)
        assert torch.equal(out.mask, plain.mask)
        assert out.stats.emitted.tolist() == plain.lengths.tolist()


def test_processors_see_the_path_that_leads_to_each_choice():
    model, ids = tiny_model("llama"), torch.tensor(PROMPTS[:1])

    def no_repeats(input_ids, scores):  # depends on everything written so far
        return scores.scatter(1, input_ids, -torch.inf)

    plain = greedy(model, ids, max_new_tokens=16, processors=[no_repeats])
    for draft in (Oracle(model, 3), untrained(model)):
        out = speculative_generate(model, draft, ids, tree=TREE, max_new_tokens=16, processors=[no_repeats])
        assert torch.equal(out.tokens, plain.tokens)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_generate_runs_it_with_its_own_processors_and_stopping_criteria(family):
    class Ban(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores.index_fill(1, torch.tensor(banned), -torch.inf)

    model, ids = tiny_model(family), torch.tensor(PROMPTS[:1])
    custom = {"custom_generate": speculative_decoding(Oracle(model, 3), TREE)}
    settings = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0, "do_sample": False, "max_new_tokens": 14}
    plain = model.generate(ids, eos_token_id=-1, **settings)
    assert torch.equal(model.generate(ids, eos_token_id=-1, **settings, **custom), plain)
    banned = plain[0, 6:8].tolist()
    restricted = model.generate(ids, eos_token_id=-1, logits_processor=[Ban()], **settings)
    assert torch.equal(model.generate(ids, eos_token_id=-1, logits_processor=[Ban()], **settings, **custom), restricted)
    end = int(plain[0, 10])
    stopped = model.generate(ids, eos_token_id=end, **settings)
    assert torch.equal(model.generate(ids, eos_token_id=end, **settings, **custom), stopped)
    with pytest.raises(ValueError, match="one prompt at a time"):
        model.generate(ids.repeat(2, 1), eos_token_id=-1, **settings | {"attention_mask": None}, **custom)


@pytest.mark.parametrize(
    ("wish", "reason"),
    [
        ({"num_beams": 3}, "leave num_beams at 1, got 3"),
        ({"num_return_sequences": 2, "do_sample": True}, "leave num_return_sequences at 1, got 2"),
        ({"return_dict_in_generate": True}, "leave out return_dict_in_generate"),
        ({"return_dict_in_generate": True, "output_scores": True}, "leave out return_dict_in_generate"),
        ({"output_scores": True}, "leave out output_scores"),
        ({"output_logits": True}, "leave out output_logits"),
        ({"output_attentions": True}, "leave out output_attentions"),
        ({"output_hidden_states": True}, "leave out output_hidden_states"),
    ],
)
def test_what_generate_cannot_give_with_drafts_is_refused_by_name(wish, reason):
    model, ids = tiny_model("llama"), torch.tensor(PROMPTS[:1])
    settings = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0, "eos_token_id": -1, "max_new_tokens": 4}
    with pytest.raises(ValueError, match=reason):
        model.generate(
            ids, custom_generate=speculative_decoding(Oracle(model, 3), TREE), **settings, **{"do_sample": False} | wish
        )


def test_a_cache_that_is_filled_already_is_refused():
    model, ids = tiny_model("llama"), torch.tensor(PROMPTS[:1])
    cache = model(ids[:, :-1]).past_key_values
    with pytest.raises(ValueError, match="leave out past_key_values"):
        model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=4, do_sample=False,
            pad_token_id=0, eos_token_id=-1, custom_generate=speculative_decoding(Oracle(model, 3), TREE),
        )  # fmt: skip


# -- the draft model -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", DECODERS)
def test_parallel_training_steps_are_the_sequential_drafts(family):
    model = tiny_model(family)
    for settings in ({}, {"trigram": False}, {"full_context": False}):
        draft = untrained(model, **settings)
        ids = random_ids(2, 14)
        with torch.no_grad():
            parallel = draft.training_steps(ids, final_states(model, ids), own_drafts=True)
            for place in range(10):
                decoder = StepDecoder(model, ids[:, : place + 1], keep_hidden=True)
                drafted, chances = proposal(draft.start(decoder), ids[:, place + 1], TokenTree.chain(3))
                for step, output in enumerate(parallel):
                    best = output.logits[:, place].softmax(-1).max(-1)
                    assert torch.equal(drafted[:, step], best.indices)
                    torch.testing.assert_close(chances[:, step], best.values, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_node_of_the_tree_is_drafted_as_if_its_path_were_the_only_one(family):
    model, ids = tiny_model(family), random_ids(2, 9)
    draft = untrained(model)
    root = random_ids(2, 1, seed=5)[:, 0]
    with torch.no_grad():
        drafted, chances = proposal(draft.start(StepDecoder(model, ids, keep_hidden=True)), root, TREE)
        for leaf in (node for node in range(len(TREE)) if node not in TREE.parents):
            path = TREE.attention_mask[leaf].nonzero()[:, 0].tolist()
            state = draft.start(StepDecoder(model, ids, keep_hidden=True))
            for depth, (_, logits, tokens) in enumerate(state.expand(root, TokenTree.chain(len(path)))):
                node = path[depth]
                expected = logits[:, 0].softmax(-1).gather(1, drafted[:, node, None])[:, 0]
                torch.testing.assert_close(chances[:, node], expected, atol=1e-5, rtol=1e-3)
                tokens[:, depth] = drafted[:, node]


@pytest.mark.parametrize("family", DECODERS)
def test_a_state_carried_through_rounds_drafts_what_a_fresh_one_would(family):
    model, draft = tiny_model(family), None
    draft = untrained(model)
    rows = [[5, 9, 3], [8], [60, 11]]
    with torch.no_grad():
        ids, mask = left_pad(rows, 0)
        decoder = StepDecoder(model, ids, mask, keep_hidden=True)
        state = draft.start(decoder)
        for round_, counts in enumerate(([3, 1, 2], [1, 2, 3], [2, 1, 1])):
            root = random_ids(3, 1, seed=40 + round_)[:, 0]
            if round_ != 1:  # a round may draft nothing
                state.propose(root, TREE)
            fed = torch.zeros(3, max(counts), dtype=torch.long)
            kept = torch.zeros_like(fed, dtype=torch.bool)
            hidden = torch.randn(3, max(counts), 32)  # noise where nothing is kept
            for row, count in enumerate(counts):
                rows[row] = rows[row] + random_ids(1, count, seed=50 + 7 * row + round_)[0].tolist()
                fed[row, -count:], kept[row, -count:] = torch.tensor(rows[row][-count:]), True
                hidden[row, -count:] = final_states(model, torch.tensor([rows[row]]))[0, -count:]
            state.extend(fed, hidden, kept)
        state.select(torch.tensor([True, False, True]))
        root = random_ids(3, 1, seed=60)[:, 0]
        carried, chances = proposal(state, root[[0, 2]], TREE)
        for place, row in enumerate((0, 2)):
            alone = draft.start(StepDecoder(model, torch.tensor([rows[row]]), keep_hidden=True))
            fresh, expected = proposal(alone, root[row, None], TREE)
            assert torch.equal(carried[place], fresh[0])
            torch.testing.assert_close(chances[place], expected[0], atol=1e-5, rtol=1e-3)


def test_each_part_is_read_only_where_it_should_be():
    """Trigrams reach two tokens back, the full context everything, and an ablated draft neither."""
    model, ids = tiny_model("llama"), random_ids(1, 12)
    hidden = final_states(model, ids)
    with torch.no_grad():
        for settings, reads_neighbour, reads_past in (
            ({}, True, True), ({"trigram": False}, False, True), ({"full_context": False}, True, False),
        ):  # fmt: skip
            draft = untrained(model, **settings)
            before = draft.training_steps(ids, hidden)[0].logits[0, 6]
            other = ids.clone()
            other[0, 5] = 3 if ids[0, 5] != 3 else 4  # two before the token at place 7, states as they were
            neighbour = draft.training_steps(other, hidden)[0].logits[0, 6]
            assert torch.equal(before, neighbour) != reads_neighbour
            changed = hidden.clone()
            changed[0, 1] += 1.0
            past = draft.training_steps(ids, changed)[0].logits[0, 6]
            assert torch.allclose(before, past, atol=1e-6) != reads_past
            changed = hidden.clone()
            changed[0, 7:] += 1.0  # the future
            assert torch.allclose(before, draft.training_steps(ids, changed)[0].logits[0, 6], atol=1e-6)


def test_ablations_have_the_parameters_of_the_whole_and_nothing_of_the_base_model():
    model = tiny_model("llama")
    draft = ChimeraDraft(model, 3, generator=generator())
    for settings in ({"trigram": False}, {"full_context": False}):
        assert ChimeraDraft(model, 3, **settings).parameter_count() == draft.parameter_count()
    d, v, layer = 32, 67, 32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 44 + 2 * 32
    assert draft.parameter_count() == 3 * v * 2 * d + (9 * d * d + 3 * d) + 3 * d * d + layer
    assert MedusaDraft(model, 3).parameter_count() == 3 * (v * d + d * d + d)
    held = {parameter.data_ptr() for parameter in draft.parameters()}
    assert not held & {parameter.data_ptr() for parameter in model.parameters()}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_heads_start_as_two_copies_of_the_base_models(family):
    model, ids = tiny_model(family), random_ids(2, 9)
    hidden = final_states(model, ids)
    with torch.no_grad():
        logits = model(ids).logits
        torch.testing.assert_close(ChimeraDraft(model, 2).guess(2, hidden, hidden), 2 * logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(MedusaDraft(model, 2).guess(1, hidden), logits, atol=1e-4, rtol=1e-4)


def test_the_same_generator_gives_the_same_draft_and_leaves_the_global_one_alone():
    model, before = tiny_model("llama"), torch.get_rng_state()
    one, two = (ChimeraDraft(model, 2, generator=generator(4)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), before)


# -- training ------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_sum_of_its_three_parts_at_the_right_places():
    model, ids = tiny_model("llama"), random_ids(2, 10)
    draft = untrained(model)
    hidden = final_states(model, ids)
    with torch.no_grad():
        base = model(ids).logits.log_softmax(-1)
        steps = draft.training_steps(ids, hidden)
        parts = torch.zeros(3)
        for row, place, step in itertools.product(range(2), range(6), (1, 2, 3)):
            guess = steps[step - 1].logits[row, place].log_softmax(-1)
            teacher = base[row, place + step]
            parts[0] -= guess[ids[row, place + step + 1]]
            parts[1] += (teacher.exp() * (teacher - guess)).sum()
            parts[2] += (steps[step - 1].states[row, place] - hidden[row, place + step]).square().mean()
        loss = draft_loss(draft, model, ids, distil=0.5, regress=2.0)
        torch.testing.assert_close(loss.total, parts[0] + 0.5 * parts[1] + 2.0 * parts[2], atol=1e-3, rtol=1e-5)
        assert loss.weight == 12.0
        torch.testing.assert_close(draft_loss(draft, model, ids, distil=0, regress=0).total, parts[0])
        given = draft_loss(draft, model, {"input_ids": ids, "hidden": hidden}, distil=0.5, regress=2.0)
        torch.testing.assert_close(given.total, loss.total)


def test_padding_carries_no_loss_and_changes_nothing():
    model = tiny_model("llama")
    draft = untrained(model)
    ids, mask = left_padded(3, 12)
    with torch.no_grad():
        padded = draft_loss(draft, model, {"input_ids": ids, "attention_mask": mask})
        alone = [draft_loss(draft, model, row[keep.bool()][None]) for row, keep in zip(ids, mask, strict=True)]
        torch.testing.assert_close(padded.total, sum(loss.total for loss in alone), atol=1e-3, rtol=1e-5)
        assert int(padded.weight) == sum(loss.weight for loss in alone)


def test_detaching_cuts_the_gradient_between_steps_only():
    model, ids = tiny_model("llama"), random_ids(2, 10)
    hidden = final_states(model, ids)
    draft = untrained(model)
    gradients = []
    for detach in (True, False):
        draft.zero_grad()
        draft.training_steps(ids, hidden, detach=detach)[1].logits.square().sum().backward()
        gradients.append([parameter.grad for parameter in draft.parameters()])
    # values agree, so the heads' gradients do; what lies before the estimates differs
    torch.testing.assert_close(gradients[0][-2], gradients[1][-2])
    assert not torch.allclose(gradients[0][0], gradients[1][0])


@pytest.mark.parametrize("make", [ChimeraDraft, MedusaDraft])
def test_a_draft_of_a_half_precision_base_learns_as_much_as_one_of_the_same_base_in_float32(make):
    half = in_precision(tiny_model("llama"), torch.bfloat16)
    whole = in_precision(copy.deepcopy(half), torch.float32)
    learned = []
    for model in (half, whole):
        settings = {"generator": generator()} if make is ChimeraDraft else {}
        draft = make(model, 2, **settings)
        assert {parameter.dtype for parameter in draft.parameters()} == {torch.float32}
        report = train_draft(draft, model, [random_ids(8, 16)], steps=30, lr=2e-4)
        learned.append(report.losses[0] - report.losses[-1])
        written = speculative_generate(model, draft, torch.tensor(PROMPTS[:1]), tree=TREE.pruned(2), max_new_tokens=6)
        assert written.tokens.shape == (1, 6)
    assert learned[1] > 0.05
    assert learned[0] == pytest.approx(learned[1], rel=0.05)  # the base's states differ by its rounding


def test_a_trained_draft_can_be_put_into_half_precision_without_its_positions():
    model = in_precision(tiny_model("llama"), torch.bfloat16)
    draft = untrained(model)
    frequencies = draft.context.layer.rotary_emb.inv_freq.clone()
    assert draft.set_precision(torch.bfloat16) is draft
    assert {parameter.dtype for parameter in draft.parameters()} == {torch.bfloat16}
    assert torch.equal(draft.context.layer.rotary_emb.inv_freq, frequencies)
    ids, mask = left_pad(PROMPTS, 0)
    out = speculative_generate(model, draft, ids, mask, tree=TREE, max_new_tokens=8)
    assert out.tokens.shape == (3, 8)


def test_training_raises_accuracy_and_leaves_the_base_model_as_it_was():
    model = tiny_model("llama")
    before = [parameter.clone() for parameter in model.parameters()]
    follows = torch.randperm(64, generator=generator(1))  # a language where each token decides the next
    texts = random_ids(48, 1) - 3
    for _ in range(16):
        texts = torch.cat([texts, follows[texts[:, -1:]]], 1)
    texts = texts + 3
    draft = ChimeraDraft(model, 2, generator=generator())
    start = draft_accuracy(draft, model, texts[:16])
    report = train_draft(draft, model, [texts[16:]], steps=80, lr=1e-2, distil=0.0)
    end = draft_accuracy(draft, model, texts[:16])
    assert report.losses[-1] < 0.5 * report.losses[0]
    assert all(a < 0.2 and b > 0.8 for a, b in zip(start, end, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(a <= b for a, b in zip(end, draft_accuracy(draft, model, texts[:16], k=5), strict=True))


def test_accuracy_on_greedy_text_predicts_what_verification_accepts():
    model = tiny_model("llama", spread=0.5)
    prompts = random_ids(16, 4)
    texts = greedy(model, prompts, max_new_tokens=40).sequences
    draft = ChimeraDraft(model, 1, generator=generator())
    train_draft(draft, model, [texts], steps=10, lr=3e-3)
    # at every place of the text, a round of a one-token tree succeeds where the guess is right
    shares = draft_accuracy(draft, model, texts, start=4)
    tries = []
    with evaluating(draft), torch.no_grad():
        for place in range(4, 42):
            decoder = StepDecoder(model, texts[:, : place + 1], keep_hidden=True)
            drafted = draft.start(decoder).propose(texts[:, place + 1], TokenTree.chain(1))
            tries.append((drafted.tokens[:, 0] == texts[:, place + 2]).float())
    assert shares[0] == pytest.approx(float(torch.stack(tries).mean()), abs=1e-6)


# -- trees and acceptance ------------------------------------------------------------------------------------------


def test_a_tree_knows_its_parents_mask_and_levels():
    tree = TokenTree([[0, 1], [1], [0], [0, 0], [0, 0, 2]])
    assert tree.paths == [(0,), (1,), (0, 0), (0, 1), (0, 0, 2)]
    assert tree.parents == [-1, -1, 0, 0, 2]
    assert tree.rooted_parents == [-1, 0, 0, 1, 1, 3]
    for n, path in enumerate(tree.paths):
        ancestors = [m for m, other in enumerate(tree.paths) if path[: len(other)] == other]
        assert tree.attention_mask[n].nonzero()[:, 0].tolist() == ancestors
    assert [level.parents for level in tree.levels] == [[-1], [0], [2]]
    assert tree.levels[2].width == 3
    assert tree.pruned(2).paths == [(0,), (1,), (0, 0), (0, 1)]
    assert tree.pruned(5) is tree
    assert tree.pruned(0) is None


def test_likely_trees_hold_the_most_probable_paths():
    tree = TokenTree.likely(12, 3, first=0.6, decay=0.3)
    chance = lambda path: 0.6 ** len(path) * 0.3 ** sum(path)  # noqa: E731
    every = [path for depth in (1, 2, 3) for path in itertools.product(range(8), repeat=depth)]
    best = sorted(every, key=chance, reverse=True)[:12]
    assert min(map(chance, tree.paths)) == pytest.approx(min(map(chance, best)))
    assert len(tree) == 12


@pytest.mark.parametrize("sampled", [True, False])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_accepted_or_drawn_tokens_have_the_base_distribution_exactly(sampled, k):
    """Over every outcome: all drafts, all acceptances."""
    source = generator(k)
    p, q = (torch.softmax(2 * torch.randn(5, generator=source, dtype=torch.float64), 0) for _ in range(2))
    p[2] = 0.0
    p = p / p.sum()
    result = torch.zeros(5, dtype=torch.float64)
    drafts = itertools.product(range(5), repeat=k) if sampled else [tuple(q.topk(k).indices.tolist())]
    for children in drafts:
        weight = float(q[list(children)].prod()) if sampled else 1.0
        chances, rest = acceptance(p, children, q if sampled else None)
        for child, chance in zip(children, chances, strict=True):
            result[child] += weight * chance
            weight *= 1.0 - float(chance)
        result += weight * rest
    torch.testing.assert_close(result, p)


def test_sampled_drafts_give_the_distribution_of_the_base_model():
    model = tiny_model("llama", vocab_size=8)
    draft = untrained(model, n_heads=2, spread=0.4)
    rows = 3000
    ids = torch.tensor([[5, 3, 4]]).expand(rows, -1)
    tree = TokenTree([[0], [1], [0, 0], [1, 0]])
    settings = {"max_new_tokens": 3, "temperature": 0.6}
    out = speculative_generate(
        model, draft, ids, tree=tree, do_sample=True, sampled_drafts=True, generator=generator(1), **settings
    )
    assert out.stats.accepted[0] > 100  # of drafts there are many, or nothing is tested
    assert (out.stats.reached - out.stats.accepted)[0] > 100
    first = torch.arange(512)
    every = torch.stack([first // 64, first // 8 % 8, first % 8], 1)
    with torch.no_grad():
        logits = model(torch.cat([ids[:1].expand(512, -1), every], 1)).logits[:, 2:-1] / 0.6
    expected = logits.log_softmax(-1).gather(2, every[..., None])[..., 0].sum(1).exp() * rows
    counts = torch.bincount(out.tokens @ torch.tensor([64, 8, 1]), minlength=512).double()
    common = expected >= 5
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    wanted = torch.cat([expected[common], expected[~common].sum()[None]]).double()
    assert chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue > 0.001


def test_the_modelled_speedup_counts_draft_and_tree():
    assert modelled_speedup(3.0, draft_calls=4, draft_cost=0.1, tree_cost=0.1) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="must not be negative"):
        modelled_speedup(3.0, draft_calls=4, draft_cost=-0.1, tree_cost=0.0)


def test_bad_requests_are_refused_with_a_reason():
    for paths, reason in (
        ([], "at least one node"), ([[0], [0]], "twice"), ([[]], "one rank or more"), ([[-1]], "from 0 up"),
        ([[0], [1, 0]], "no parent"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=reason):
            TokenTree(paths)
    with pytest.raises(ValueError, match="at least depth"):
        TokenTree.likely(2, 3)
    with pytest.raises(ValueError, match="must lie in"):
        TokenTree.likely(4, 3, decay=1.0)
    model, ids = tiny_model("llama"), random_ids(1, 6)
    draft = ChimeraDraft(model, 2)
    settings = {"tree": TokenTree.chain(2), "max_new_tokens": 4}
    for changed, reason in (
        ({"tree": TREE}, "3 deep and the draft has 2 heads"),
        ({"tree": TokenTree([[n] for n in range(68)])}, "more children than the 67"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"do_sample": True}, "needs a generator"),
        ({"do_sample": True, "generator": generator(), "temperature": 0.0}, "temperature"),
        ({"sampled_drafts": True}, "needs do_sample"),
    ):
        with pytest.raises(ValueError, match=reason):
            speculative_generate(model, draft, ids, **settings | changed)
    with pytest.raises(ValueError, match="knows 67 tokens and the model 50"):
        speculative_generate(tiny_model("llama", vocab_size=50), draft, ids, **settings)
    wide = tiny_model("llama", hidden_size=64)
    with pytest.raises(ValueError, match="states of width 32 and the model's have 64"):
        speculative_generate(wide, draft, ids, **settings)
    with pytest.raises(ValueError, match="states of width 32 and the model's have 64"):
        wide.generate(ids, custom_generate=speculative_decoding(draft, settings["tree"]), max_new_tokens=4)
    with pytest.raises(ValueError, match="n_heads"):
        ChimeraDraft(model, 0)
    with pytest.raises(ValueError, match="no next-token head"):
        ChimeraDraft(model.model, 2)
    with pytest.raises(ValueError, match="blocks and widening"):
        MedusaDraft(model, 2, blocks=0)
    with pytest.raises(ValueError, match="too short to train 2 heads"):
        draft.training_steps(ids[:, :3], final_states(model, ids[:, :3]))
    with pytest.raises(ValueError, match="k must lie"):
        draft_accuracy(draft, model, ids, k=0)
    with pytest.raises(ValueError, match="start must lie"):
        draft_accuracy(draft, model, ids, start=3)
    with pytest.raises(ValueError, match="warmup"):
        train_draft(draft, model, [ids], steps=2, warmup=1.0)
    p = torch.full((4,), 0.25)
    with pytest.raises(ValueError, match="repeats a token"):
        acceptance(p, [1, 1])
    with pytest.raises(ValueError, match="probability 0 under q"):
        acceptance(p, [1], torch.tensor([1.0, 0, 0, 0]))
    with pytest.raises(ValueError, match="q alike"):
        acceptance(p, [1], p[:2])


# -- the experiment ------------------------------------------------------------------------------------------------


def test_a_base_trained_here_in_half_precision_goes_through_the_whole_experiment(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPERTRIAL_HOME", str(tmp_path))
    gpu = experiment.SCALES["gpu"]
    parameters = {**experiment.SCALES["smoke"], "heads": 2, "nodes": 4, "new_tokens": 6}
    base = gpu["base"] | {"layers": 2, "width": 32, "heads": 4, "steps": 3, "batch": 2, "length": 64}
    assert (gpu["base"]["layers"], gpu["base"]["width"], gpu["base"]["dtype"]) == (24, 1024, "bfloat16")
    trial = Trial("chimera", "gpu", 0, parameters | {"base": base})
    results = experiment.run(trial)
    for arm in ("autoregressive", "medusa", "chimera", "chimera_no_trigram"):
        assert results[arm]["greedy_match"] == 100.0, "in float32, to the last token"
        assert 0 <= results[arm]["half_precision_match"] <= 100.0
        assert results[arm]["tokens_per_second"] > 0
    assert results["chimera"]["accuracy_fall"] == results["chimera"]["accuracy_1"] - results["chimera"]["accuracy_2"]
    assert trial.notes["parameters of the base model"] == 768 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 80 + 2 * 32) + 32
