"""Preference training: statistics from the definition, objectives in closed form, training, measurement."""

import copy
import json
import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from families import CORE, DECODERS, VOCABULARY, random_ids, tiny_model, tiny_tokenizer
from papertrial.lm.generation import left_pad
from papertrial.lm.preferences import (
    DPO,
    PreferenceBatch,
    PreferenceLoss,
    PreferencePair,
    PreferenceTrainer,
    Reference,
    as_pairs,
    at_matched,
    cache_reference,
    check_totals,
    collate,
    dpo_loss,
    evaluate_pairs,
    evaluate_policy,
    frontier,
    pair_batches,
    pairs_from_samples,
    read_pairs,
    token_kl,
    token_log_ratio,
    token_stats,
)
from papertrial.lm.training import adamw

CLOSE = {"atol": 5e-5, "rtol": 1e-4}  # float32 sums over the vocabulary in another order


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def make_pairs(count=5, *, seed=0):
    """Pairs whose prompts and answers all have different lengths."""
    rows = random_ids(3 * count, 12, seed=seed)
    return [
        PreferencePair(rows[3 * i, : 1 + i % 3], rows[3 * i + 1, : 2 + i % 4], rows[3 * i + 2, : 5 - i % 4])
        for i in range(count)
    ]


def two_models(family="llama", **settings):
    return tiny_model(family, seed=1, **settings), tiny_model(family, seed=2, **settings)


@torch.no_grad()
def by_definition(policy, ref, prompt, answer):
    """Rows of (log pi, log r, KL(r||pi), KL(pi||r), entropy of pi), one per answer token, float64, one sequence."""
    ids = torch.cat([prompt, answer])[None]
    ours, theirs = (m(ids).logits[0].double().log_softmax(-1) for m in (policy, ref))
    rows = []
    for position, token in enumerate(answer.tolist(), start=len(prompt)):
        p, q = ours[position - 1], theirs[position - 1]
        rows.append([p[token], q[token], (q.exp() * (q - p)).sum(), (p.exp() * (p - q)).sum(), -(p.exp() * p).sum()])
    return torch.tensor(rows, dtype=torch.float64)


# -- from logits -------------------------------------------------------------------------------------------------------


def test_token_kl_and_log_ratio_are_sums_over_the_vocabulary_done_by_hand():
    policy, ref = (torch.randn(2, 4, 5, generator=generator(s)).double() for s in (1, 2))
    labels = torch.tensor([[-100, 3, 1, 4], [-100, -100, 2, -100]])
    forward, reverse = (token_kl(policy, ref, labels, d) for d in ("forward", "reverse"))
    ratio = token_log_ratio(policy, ref, labels)
    for row in range(2):
        for t in range(3):
            label = int(labels[row, t + 1])
            if label == -100:
                assert forward[row, t] == reverse[row, t] == ratio[row, t] == 0
                continue
            p, q = ([math.exp(v) for v in logits[row, t].tolist()] for logits in (policy, ref))
            p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
            assert forward[row, t].item() == pytest.approx(sum(b * math.log(b / a) for a, b in zip(p, q, strict=True)))
            assert reverse[row, t].item() == pytest.approx(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
            assert ratio[row, t].item() == pytest.approx(math.log(p[label] / q[label]))
            assert forward[row, t] > 0
            assert reverse[row, t] > 0


def test_logits_at_masked_places_do_not_matter_not_even_nan():
    policy, ref = (torch.randn(2, 4, 5, generator=generator(s)) for s in (1, 2))
    labels = torch.tensor([[-100, 3, 1, 4], [-100, -100, 2, -100]])
    other = policy.clone()
    other[:, -1] = 7.0  # predicts nothing
    other[1, [0, 2]] = torch.nan
    for function in (token_kl, token_log_ratio):
        assert torch.equal(function(policy, ref, labels), function(other, ref, labels))


def test_extreme_logits_do_not_underflow():
    policy = torch.tensor([[[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]])
    ref = torch.tensor([[[0.0, 300.0, -300.0], [0.0, 0.0, 0.0]]])
    labels = torch.tensor([[-100, 2]])
    assert token_kl(policy, ref, labels).item() == pytest.approx(math.log(3))
    assert token_kl(policy, ref, labels, "reverse").item() == pytest.approx(300 - math.log(3))
    assert token_log_ratio(policy, ref, labels).item() == pytest.approx(600 - math.log(3))


def test_a_token_forbidden_by_both_adds_nothing_and_keeps_gradients_finite():
    policy = torch.randn(1, 2, 4, generator=generator(1))
    ref = torch.randn(1, 2, 4, generator=generator(2))
    policy[..., 3] = ref[..., 3] = -torch.inf
    labels = torch.tensor([[-100, 1]])
    for direction in ("forward", "reverse"):
        logits = policy.clone().requires_grad_()
        kl = token_kl(logits, ref, labels, direction)
        torch.testing.assert_close(kl, token_kl(policy[..., :3], ref[..., :3], labels, direction))
        kl.sum().backward()
        assert logits.grad.isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", range(5))
def test_broken_logits_are_named(bad, place):
    good = torch.randn(1, 3, 5, generator=generator())
    broken = good.clone()
    broken[0, 1, place] = bad
    labels = torch.tensor([[-100, 1, 2]])
    with pytest.raises(ValueError, match="policy logits hold NaN"):
        token_kl(broken, good, labels)
    with pytest.raises(ValueError, match="reference logits hold NaN"):
        token_log_ratio(good, broken, labels)


def test_no_gradient_reaches_the_reference_logits():
    policy, ref = (torch.randn(1, 3, 5, generator=generator(s), requires_grad=True) for s in (1, 2))
    (
        token_kl(policy, ref, labels := torch.tensor([[-100, 1, 2]])) + token_log_ratio(policy, ref, labels)
    ).sum().backward()
    assert policy.grad.abs().sum() > 0
    assert ref.grad is None


# -- from models -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", DECODERS)
def test_token_stats_equal_the_definition_row_by_row(family, side):
    policy, ref = two_models(family)
    pairs = make_pairs()
    batch = collate(pairs, pad_id=5)
    if side == "left":
        shift = [int((row == 0).sum()) for row in batch.attention_mask]
        rolled = [
            torch.stack([row.roll(n) for row, n in zip(values, shift, strict=True)])
            for values in (batch.input_ids, batch.attention_mask, batch.labels)
        ]
        batch = PreferenceBatch(*rolled)
    wants = ("kl", "reverse_kl", "entropy")
    for logits_at_once in (2**25, 3 * VOCABULARY, 1):
        with torch.no_grad():
            stats = token_stats(policy, Reference(policy, ref), batch, want=wants, logits_at_once=logits_at_once)
        answers = [p.chosen_ids for p in pairs] + [p.rejected_ids for p in pairs]
        for row, (pair, answer) in enumerate(zip(pairs * 2, answers, strict=True)):
            expected = by_definition(policy, ref, pair.prompt_ids, answer)
            columns = [stats.logps, stats.ref_logps, stats.kl, stats.reverse_kl, stats.entropy]
            found = torch.stack([column[row][stats.mask[row]] for column in columns], -1)
            torch.testing.assert_close(found.double(), expected, **CLOSE)
            assert all((column[row][~stats.mask[row]] == 0).all() for column in columns)
            torch.testing.assert_close(stats.total("kl")[row].double(), expected[:, 2].sum(), **CLOSE)


@pytest.mark.parametrize("family", CORE)
def test_gradients_in_pieces_equal_those_of_the_plain_computation(family):
    batch, gradients = collate(make_pairs()), []
    for logits_at_once in (2 * VOCABULARY, None):
        policy, ref = two_models(family)
        if logits_at_once is None:
            rows = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
            with torch.no_grad():
                theirs = ref(**rows).logits
            ours = policy(**rows).logits
            loss = (token_kl(ours, theirs, batch.labels) - token_log_ratio(ours, theirs, batch.labels)).sum()
        else:
            stats = token_stats(policy, Reference(policy, ref), batch, want=["kl"], logits_at_once=logits_at_once)
            loss = (stats.kl - stats.logratio).sum()
        loss.backward()
        gradients.append({name: p.grad for name, p in policy.named_parameters()})
        assert all(p.grad is None for p in ref.parameters())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=2e-4, rtol=1e-3)


def test_no_more_logits_than_asked_for_are_ever_made():
    policy, ref = two_models()
    sizes = []
    for model in (policy, ref):
        model.lm_head.register_forward_hook(lambda _m, _a, out: sizes.append(out.numel()))
    batch = collate(make_pairs())
    answers = int((batch.labels != -100).sum())
    stats = token_stats(policy, Reference(policy, ref), batch, want=["kl"], logits_at_once=4 * VOCABULARY)
    stats.kl.sum().backward()
    assert max(sizes) <= 4 * VOCABULARY
    assert sum(sizes) <= 4 * answers * VOCABULARY  # both models, twice with the backward pass: answers only, no prompts


@pytest.mark.parametrize("family", CORE)
def test_hidden_states_are_those_of_the_reference_aligned_with_the_tokens_they_predict(family):
    policy, ref = two_models(family)
    batch = collate(make_pairs(3))
    stats = token_stats(policy, Reference(policy, ref), batch, want=["hidden", "kl"])
    with torch.no_grad():
        expected = ref(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True
        ).hidden_states
    assert len(stats.hidden) == 2
    for found, layer in zip(stats.hidden, expected[1:], strict=True):
        torch.testing.assert_close(found[stats.mask], layer[:, :-1][stats.mask], **CLOSE)
        assert not found.requires_grad
    # the last layer's states, unembedded, give the reference's own log-probabilities
    log_probs = ref.get_output_embeddings()(stats.hidden[-1]).log_softmax(-1)
    again = log_probs.gather(-1, batch.input_ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(again[stats.mask], stats.ref_logps[stats.mask], **CLOSE)
    plain = token_stats(policy, Reference(policy, ref), batch, want=["kl"])
    torch.testing.assert_close(plain.kl, stats.kl)


def test_a_model_whose_head_is_not_known_is_read_by_its_logits():
    class Scaled(type(tiny_model("llama"))):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = 2 * output.logits
            return output

    policy, ref = (Scaled(model.config) for model in two_models())
    for scaled, model in zip((policy, ref), two_models(), strict=True):
        scaled.load_state_dict(model.state_dict())
    pair = make_pairs(1)[0]
    with torch.no_grad():
        stats = token_stats(policy, Reference(policy, ref), collate([pair]), want=["kl", "hidden"])
    expected = by_definition(policy, ref, pair.prompt_ids, pair.chosen_ids)
    torch.testing.assert_close(stats.kl[0][stats.mask[0]].double(), expected[:, 2], **CLOSE)


def test_halves_are_chosen_and_rejected():
    policy, ref = two_models()
    pairs = make_pairs(3)
    chosen, rejected = token_stats(policy, Reference(policy, ref), collate(pairs), want=["kl", "hidden"]).halves()
    swapped = [PreferencePair(p.prompt_ids, p.rejected_ids, p.chosen_ids) for p in pairs]
    other_chosen, other_rejected = token_stats(policy, Reference(policy, ref), collate(swapped), want=["kl"]).halves()
    for name in ("logratio", "kl"):
        torch.testing.assert_close(chosen.total(name), other_rejected.total(name), **CLOSE)
        torch.testing.assert_close(rejected.total(name), other_chosen.total(name), **CLOSE)
    assert chosen.hidden[0].shape[0] == 3
    with pytest.raises(ValueError, match="entropy was not computed"):
        chosen.total("entropy")


# -- the reference -----------------------------------------------------------------------------------------------------


def test_without_ref_model_the_reference_is_the_policy_as_it_was():
    policy = tiny_model("llama")
    before = copy.deepcopy(policy)
    reference = Reference(policy)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.3)
    with reference.active() as ref:
        assert all(torch.equal(a, b) for a, b in zip(ref.parameters(), before.parameters(), strict=True))


def test_a_given_reference_is_used_in_evaluation_mode_and_left_as_it_was():
    policy, ref = two_models("gpt2", resid_pdrop=0.5, attn_pdrop=0.5)
    ref.train()
    reference, batch = Reference(policy, ref), collate(make_pairs())
    first, second = (token_stats(policy, reference, batch).ref_logps for _ in range(2))
    assert torch.equal(first, second)
    assert ref.training
    assert all(p.requires_grad for p in ref.parameters())


def test_a_reference_that_would_be_trained_along_is_refused():
    policy, ref = two_models()
    with pytest.raises(ValueError, match="shares the parameter"):
        Reference(policy, policy)
    ref.model.embed_tokens.weight = policy.model.embed_tokens.weight
    with pytest.raises(ValueError, match=r"shares the parameter 'model.embed_tokens.weight'"):
        Reference(policy, ref)
    view = tiny_model("llama", seed=2)
    view.lm_head.weight = nn.Parameter(policy.lm_head.weight.data[:])
    with pytest.raises(ValueError, match="shares the parameter"):
        PreferenceTrainer(policy, view, objective=DPO())


def test_another_vocabulary_is_refused():
    with pytest.raises(ValueError, match="vocabulary of 67 and ref_model one of 70"):
        Reference(tiny_model("llama"), tiny_model("llama", vocab_size=70))
    policy, ref = two_models()
    reference = Reference(policy, ref)
    ref.lm_head = nn.Linear(32, VOCABULARY + 1)
    with pytest.raises(ValueError, match="67 logits a token and the reference 68"):
        token_stats(policy, reference, collate(make_pairs()))


def lora(model):
    import peft

    with torch.random.fork_rng():
        torch.manual_seed(0)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.3))
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:  # starts at zero, where the adapter does nothing
                parameter.data.normal_(std=0.1)
    return wrapped


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_reference_of_an_adapter_is_its_base_model(family):
    base = tiny_model(family)
    policy = lora(copy.deepcopy(base))
    reference, batch = Reference(policy), collate(make_pairs())
    assert reference.adapter_off
    stats = token_stats(policy, reference, batch, want=["kl", "hidden"], logits_at_once=3 * VOCABULARY)
    with torch.no_grad():
        expected = token_stats(base, Reference(base, tiny_model(family, seed=9)), batch)
    torch.testing.assert_close(stats.ref_logps, expected.logps, **CLOSE)
    assert (stats.kl[stats.mask] > 0).all()
    (stats.kl.sum() + stats.logratio.sum()).backward()
    grown = [name for name, p in policy.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert grown
    assert all("lora" in name for name in grown)


def test_training_an_adapter_leaves_base_and_reference_alone():
    base = tiny_model("llama")
    policy = lora(copy.deepcopy(base))
    trainer = PreferenceTrainer(policy, objective=DPO())
    pairs = make_pairs()
    report = trainer.fit(pairs, steps=10, batch_size=5, optimizer=adamw(1e-2), generator=generator())
    assert report.losses[-1] < report.losses[0]
    with policy.disable_adapter():
        for name, parameter in base.named_parameters():
            kept = [p for n, p in policy.named_parameters() if n.replace(".base_layer", "").endswith(name)]
            assert torch.equal(kept[0], parameter)


def test_a_copy_follows_the_policy_and_a_given_model_stays():
    policy, ref = two_models()
    own, given = Reference(policy), Reference(policy, ref)
    elsewhere = copy.deepcopy(policy).to("meta")
    for reference in (own, given):
        reference.follow(elsewhere)
    with own.active() as model:
        assert model.device.type == "meta"
    with given.active() as model:
        assert model.device.type == "cpu"


# -- DPO ---------------------------------------------------------------------------------------------------------------


def test_dpo_is_minus_log_sigmoid_of_the_margin_and_its_gradient_the_known_one():
    chosen, rejected = (torch.randn(6, generator=generator(s)).double().requires_grad_() for s in (1, 2))
    values = dpo_loss(chosen, rejected, beta=0.3)
    margin = 0.3 * (chosen - rejected).detach()
    torch.testing.assert_close(values.loss, -F.logsigmoid(margin), check_dtype=False)
    values.loss.sum().backward()
    torch.testing.assert_close(chosen.grad, -0.3 * torch.sigmoid(-margin))
    torch.testing.assert_close(rejected.grad, 0.3 * torch.sigmoid(-margin))
    torch.testing.assert_close(values.chosen_reward - values.rejected_reward, margin)
    assert not values.chosen_reward.requires_grad


def test_a_policy_that_is_its_reference_has_loss_log_two():
    policy = tiny_model("qwen2")
    report = evaluate_pairs(policy, Reference(policy), DPO(), make_pairs())
    assert report.loss == pytest.approx(math.log(2), abs=1e-6)
    assert report.margin == report.chosen_kl == report.rejected_kl == report.accuracy == 0


def test_the_loss_of_the_trainer_is_dpo_from_the_definition():
    policy, ref = two_models()
    pairs = make_pairs()
    trainer = PreferenceTrainer(policy, ref, objective=DPO(beta=0.2))
    loss = trainer.loss(policy, collate(pairs))
    expected, won = 0.0, 0
    for pair in pairs:
        margin = 0.0
        for answer, sign in ((pair.chosen_ids, 1), (pair.rejected_ids, -1)):
            rows = by_definition(policy, ref, pair.prompt_ids, answer)
            margin += sign * float((rows[:, 0] - rows[:, 1]).sum())
        expected += math.log1p(math.exp(-0.2 * margin))
        won += margin > 0
    assert float(loss.total.detach()) == pytest.approx(expected, rel=1e-5)
    assert loss.weight == len(pairs)
    assert loss.parts["accuracy"].item() == pytest.approx(won / len(pairs))


# -- pairs -------------------------------------------------------------------------------------------------------------


def test_collate_puts_everything_in_its_place():
    pairs = [
        PreferencePair([7, 8], [9, 10, 11], [12], {"score": [0.1, 0.2, 0.3]}),
        PreferencePair([13], [14], [15, 16], {}, {"score": torch.tensor([0.4, 0.5]), "other": [1.0, 2.0]}),
    ]
    batch = collate(pairs, pad_id=4)
    assert len(batch) == 2
    assert batch.input_ids.tolist() == [[7, 8, 9, 10, 11], [13, 14, 4, 4, 4], [7, 8, 12, 4, 4], [13, 15, 16, 4, 4]]
    assert batch.attention_mask.tolist() == [[1] * 5, [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 0, 0]]
    o = -100
    assert batch.labels.tolist() == [[o, o, 9, 10, 11], [o, 14, o, o, o], [o, o, 12, o, o], [o, 15, 16, o, o]]
    expected = torch.tensor([[0, 0.1, 0.2, 0.3], [0, 0, 0, 0], [0, 0, 0, 0], [0.4, 0.5, 0, 0]])
    torch.testing.assert_close(batch.extras["score"], expected)
    assert batch.extras["other"].tolist() == [[0] * 4, [0] * 4, [0] * 4, [1, 2, 0, 0]]
    policy, ref = two_models()
    chosen, rejected = token_stats(policy, Reference(policy, ref), batch).halves()
    assert torch.equal(torch.cat([chosen.extras["score"], rejected.extras["score"]]), batch.extras["score"])
    assert not batch.extras["score"][~torch.cat([chosen.mask, rejected.mask])].any()


def test_padding_and_its_id_change_nothing():
    policy, ref = two_models("gpt2")
    pairs = make_pairs()
    trainer = PreferenceTrainer(policy, ref, objective=DPO())
    together = [trainer.loss(policy, collate(pairs, pad)).total.item() for pad in (0, 33)]
    apart = sum(trainer.loss(policy, collate([pair])).total.item() for pair in pairs)
    assert together[0] == together[1] == pytest.approx(apart, rel=1e-5)


def test_batches_go_through_all_pairs_before_any_comes_again_and_repeat_with_the_generator():
    pairs = [PreferencePair([i + 1], [50], [51]) for i in range(7)]

    def firsts(seed, count):
        batches = pair_batches(pairs, 3, generator=generator(seed))
        return [int(b.input_ids[r, 0]) for b, _ in zip(batches, range(count), strict=False) for r in range(3)]

    order = firsts(0, 14)
    assert all(sorted(order[i : i + 7]) == list(range(1, 8)) for i in range(0, 42, 7))
    assert order[:7] != order[7:14]
    assert order == firsts(0, 14) != firsts(1, 14)


def test_pairs_from_text_share_the_prompt_and_end():
    tokenizer = tiny_tokenizer()
    pair = PreferencePair.from_text("the cat", " sat on", " jumps", tokenizer)
    assert tokenizer.decode(pair.prompt_ids) == "the cat"
    assert tokenizer.decode(pair.chosen_ids) == " sat on<eos>"
    assert tokenizer.decode(pair.rejected_ids) == " jumps<eos>"
    without = PreferencePair.from_text("the cat", " sat on", " jumps", tokenizer, end=False)
    assert torch.equal(without.chosen_ids, pair.chosen_ids[:-1])
    assert PreferencePair.from_text("", "a", "b", tokenizer).prompt_ids.tolist() == [tokenizer.bos_token_id]
    from_mapping = as_pairs([{"prompt": "the cat", "chosen": " sat on", "rejected": " jumps"}, pair], tokenizer)
    assert torch.equal(from_mapping[0].chosen_ids, pair.chosen_ids)
    assert from_mapping[1] is pair


@pytest.mark.parametrize("template", ["<bos> $A", "<bos> $A <eos>", "$A <eos>"])
def test_a_prompt_keeps_the_special_token_in_front_and_loses_the_one_behind(template):
    from tokenizers import processors

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    plain = tokenizer("the cat", add_special_tokens=False)["input_ids"]
    pair = PreferencePair.from_text("the cat", "a", "b", tokenizer)
    assert pair.prompt_ids.tolist() == ([1] if "<bos>" in template else []) + plain


def test_chat_messages_are_rendered_by_the_tokenizers_template():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}the dog{% endif %}"
    )
    pair = PreferencePair.from_text([{"role": "user", "content": "the cat"}], " sat", " ran", tokenizer)
    assert tokenizer.decode(pair.prompt_ids) == "the cat<eos>the dog"


def test_a_pair_is_shortened_at_the_front_of_its_prompt_and_the_back_of_its_answers():
    pair = PreferencePair([1, 2, 3, 4], [5, 6, 7], [8], {"score": [0.1, 0.2, 0.3]})
    short = pair.shortened(max_length=4, max_prompt=2)
    assert short.prompt_ids.tolist() == [3, 4]
    assert short.chosen_ids.tolist() == [5, 6]
    assert short.rejected_ids.tolist() == [8]
    torch.testing.assert_close(short.chosen_extras["score"], torch.tensor([0.1, 0.2]))
    with pytest.raises(ValueError, match="no answer token"):
        pair.shortened(max_length=3, max_prompt=3)


def test_pairs_are_read_from_lines_of_json(tmp_path):
    path, tokenizer = tmp_path / "pairs.jsonl", tiny_tokenizer()
    row = {"prompt": "the cat", "chosen": " sat", "rejected": " ran"}
    path.write_text(json.dumps(row) + "\n\n" + json.dumps(row | {"prompt": "a dog"}))
    pairs = read_pairs(path, tokenizer)
    assert [tokenizer.decode(p.prompt_ids) for p in pairs] == ["the cat", "a dog"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2"),
        ("[1]", "line 2: needs an object"),
        ('{"prompt": "a", "chosen": "b"}', "line 2: pair 0 lacks rejected"),
        ('{"prompt": "a", "chosen": [1], "rejected": [2]}', "line 2: needs an object"),
        ('{"prompt": "a", "chosen": "", "rejected": 5}', "line 2"),
        ("[" * 100_000, "line 2"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, said):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' + line)
    with pytest.raises(ValueError, match=said):
        read_pairs(path, tiny_tokenizer())


def test_an_endless_line_is_not_read_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("papertrial.lm.preferences.pairs.LARGEST_LINE", 100)
    path = tmp_path / "pairs.jsonl"
    path.write_text("x" * 101)
    with pytest.raises(ValueError, match="line 1: longer than 100"):
        read_pairs(path, tiny_tokenizer())


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CORE)
def test_training_separates_what_is_chosen_from_what_is_rejected(family):
    policy = tiny_model(family)
    trainer = PreferenceTrainer(policy, objective=DPO(beta=0.5))
    start = copy.deepcopy(policy)
    pairs = make_pairs(6)
    heard = []
    report = trainer.fit(
        pairs, steps=15, batch_size=6, optimizer=adamw(5e-3), generator=generator(), on_step=heard.append
    )
    assert report.losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert trainer.evaluate(pairs).accuracy == 1
    assert trainer.evaluate(pairs).loss < 0.3
    assert heard[-1].parts["accuracy"] == 1
    assert heard[-1].parts["chosen_reward"] > heard[-1].parts["rejected_reward"]
    assert not policy.training
    with trainer.reference.active() as ref:
        assert all(torch.equal(a, b) for a, b in zip(ref.parameters(), start.parameters(), strict=True))


def test_dropout_is_off_unless_asked_for():
    def losses(dropout, seed):
        policy = tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5)
        return (
            PreferenceTrainer(policy, objective=DPO())
            .fit(
                make_pairs(), steps=2, batch_size=5, optimizer=adamw(1e-3), generator=generator(), dropout=dropout,
                seed=seed,
            )
            .losses
        )  # fmt: skip

    assert losses(False, 0) == losses(False, 1)
    assert losses(False, 0)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses(True, 0) != losses(True, 1)


def test_micro_batches_give_the_step_of_the_whole_batch():
    def weights(**batches):
        policy = tiny_model("llama")
        PreferenceTrainer(policy, tiny_model("llama", seed=3), objective=DPO()).fit(
            make_pairs(6), steps=3, optimizer=lambda p: torch.optim.SGD(p, 0.1), generator=generator(), **batches
        )
        return policy.state_dict()

    whole, parts = weights(batch_size=6), weights(batch_size=2, accumulate=3)
    for name, values in whole.items():
        torch.testing.assert_close(values, parts[name], atol=1e-5, rtol=1e-4)


@dataclass(frozen=True)
class WithDivergence:
    """An objective that needs what cannot be cached."""

    wants: tuple[str, ...] = ("kl",)

    def __call__(self, chosen, rejected):
        values = dpo_loss(chosen.total("logratio"), rejected.total("logratio"))
        return values._replace(loss=values.loss + 0.1 * rejected.total("kl"))


def test_a_cached_reference_gives_the_same_training_and_is_not_run():
    def train(**settings):
        policy, ref = two_models()
        runs = []
        trainer = PreferenceTrainer(policy, ref, objective=DPO())
        handle = ref.model.register_forward_hook(lambda *_: runs.append(1))
        report = trainer.fit(
            make_pairs(6), steps=8, batch_size=3, optimizer=adamw(1e-3), generator=generator(), **settings
        )
        handle.remove()
        return report.losses, policy.state_dict(), len(runs)

    plain, cached = train(), train(cache_reference=True)
    assert cached[0] == pytest.approx(plain[0], abs=1e-5)
    for name, values in plain[1].items():
        torch.testing.assert_close(values, cached[1][name], atol=1e-4, rtol=1e-3)
    assert plain[2] == 8
    assert cached[2] == 1  # six pairs are one batch of scoring


def test_what_is_cached_are_the_references_log_probabilities_in_the_right_places():
    policy, ref = two_models("gpt2")
    pairs = make_pairs(5)
    cached = cache_reference(pairs, Reference(policy, ref), batch_size=2)
    for pair in cached:
        for answer, extras in ((pair.chosen_ids, pair.chosen_extras), (pair.rejected_ids, pair.rejected_extras)):
            expected = by_definition(policy, ref, pair.prompt_ids, answer)[:, 1]
            torch.testing.assert_close(extras["ref_logps"].double(), expected, **CLOSE)
    stats = token_stats(policy, None, collate(cached), want=["entropy"])
    whole = token_stats(policy, Reference(policy, ref), collate(cached), want=["entropy"])
    for name in ("logps", "ref_logps", "entropy"):
        torch.testing.assert_close(getattr(stats, name), getattr(whole, name), **CLOSE)
    assert "ref_logps" not in stats.extras


def test_a_cache_is_refused_where_it_cannot_serve():
    policy, ref = two_models()
    pairs = make_pairs(4)
    trainer = PreferenceTrainer(policy, ref, objective=WithDivergence())
    with pytest.raises(ValueError, match="cache_reference=True, and the objective needs the reference for kl"):
        trainer.fit(pairs, steps=1, batch_size=2, optimizer=adamw(1e-3), generator=generator(), cache_reference=True)
    cached = cache_reference(pairs, trainer.reference)
    with pytest.raises(ValueError, match="kl cannot be had"):
        token_stats(policy, None, collate(cached), want=["kl"])
    with pytest.raises(ValueError, match="no 'ref_logps'"):
        token_stats(policy, None, collate(pairs))
    with pytest.raises(ValueError, match="some do not"):
        collate(cached[:2] + pairs[2:])
    # an objective that needs the reference runs it, cache or not
    report = trainer.fit(cached, steps=1, batch_size=4, optimizer=adamw(1e-3), generator=generator())
    assert math.isfinite(report.losses[0])


class Weighted(nn.Module):
    """An objective with a parameter: one learned weight per answer token score."""

    wants = ("kl",)

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))

    def forward(self, chosen, rejected):
        u = self.weight * (chosen.total("logratio") - rejected.total("logratio"))
        return PreferenceLoss(F.softplus(-u), u.detach(), torch.zeros_like(u))


def test_an_objectives_own_parameters_are_trained_and_a_killed_run_goes_on(tmp_path):
    def run(steps_before_kill=None, folder=None):
        policy, ref = two_models()
        trainer = PreferenceTrainer(policy, ref, objective=Weighted())

        def stop(report):
            if report.step == steps_before_kill:
                raise KeyboardInterrupt

        trainer.fit(
            make_pairs(6), steps=6, batch_size=4, optimizer=adamw(1e-2), generator=generator(), on_step=stop,
            checkpoint=folder, checkpoint_every=1,
        )  # fmt: skip
        return policy.state_dict() | {"own": trainer.objective.weight.detach()}

    whole = run()
    assert whole["own"] != 1
    with pytest.raises(KeyboardInterrupt):
        run(4, tmp_path)
    again = run(None, tmp_path)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_bf16_runs_keep_float32_weights_and_learn():
    policy = tiny_model("llama")
    trainer = PreferenceTrainer(policy, objective=DPO(beta=0.5))
    pairs = make_pairs()
    trainer.fit(pairs, steps=15, batch_size=5, optimizer=adamw(5e-3), generator=generator(), precision="bf16")
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    assert trainer.evaluate(pairs).accuracy == 1


def test_models_that_cannot_be_trained_are_refused():
    settings = {"steps": 1, "batch_size": 2, "optimizer": adamw(1e-3), "generator": generator()}
    with pytest.raises(ValueError, match="bfloat16, which rounds small updates away"):
        PreferenceTrainer(tiny_model("llama").bfloat16(), objective=DPO()).fit(make_pairs(), **settings)
    with pytest.raises(ValueError, match="no trainable parameter"):
        PreferenceTrainer(tiny_model("llama").requires_grad_(False), objective=DPO()).fit(make_pairs(), **settings)
    from transformers import LlamaModel

    with pytest.raises(ValueError, match="no language-model head"):
        PreferenceTrainer(LlamaModel(tiny_model("llama").config), objective=DPO())
    broken = tiny_model("llama")
    broken.lm_head.weight.data[3] = torch.nan
    with pytest.raises(ValueError, match="policy logits hold NaN"):
        PreferenceTrainer(broken, tiny_model("llama", seed=1), objective=DPO()).fit(make_pairs(), **settings)


# -- measuring ---------------------------------------------------------------------------------------------------------


def count_of(token):
    return lambda drawn: ((drawn.tokens == token) & drawn.mask).sum(-1).float()


@pytest.mark.parametrize("batch_size", [3, 256])
def test_a_policys_divergences_are_sums_of_exact_ones_along_its_samples(batch_size):
    policy, ref = two_models("gpt2")
    prompts, mask = left_pad([*random_ids(4, 3), [5]], 0)
    report = evaluate_policy(
        policy, Reference(policy, ref), prompts, mask, reward=count_of(7), valid=count_of(9), max_new_tokens=4,
        generator=generator(), num_samples=2, eos_token_id=list(range(3, 20)), batch_size=batch_size,
    )  # fmt: skip
    drawn = report.generation
    assert drawn.finished.any()
    assert not drawn.finished.all()
    totals, tokens = torch.zeros(5, dtype=torch.float64), 0
    for row, answer in enumerate(drawn.continuations()):
        prompt = drawn.prompt_ids[row][drawn.prompt_mask[row].bool()]
        totals += by_definition(policy, ref, prompt, torch.tensor(answer)).sum(0)
        tokens += len(answer)
    assert report.forward_kl == pytest.approx(totals[2].item() / 10, rel=1e-5)
    assert report.reverse_kl == pytest.approx(totals[3].item() / 10, rel=1e-5)
    assert report.entropy == pytest.approx(totals[4].item() / tokens, rel=1e-5)
    assert report.reward == pytest.approx(sum(a.count(7) for a in drawn.continuations()) / 10)
    assert report.numbers().keys() == {"reward", "reverse_kl", "forward_kl", "entropy", "valid"}


def test_the_exact_divergence_agrees_with_the_log_ratio_of_many_samples():
    policy, ref = two_models("llama")
    report = evaluate_policy(
        policy, Reference(policy, ref), random_ids(1, 2).expand(2000, -1), reward=count_of(7), max_new_tokens=3,
        generator=generator(),
    )  # fmt: skip
    drawn = report.generation
    labels = torch.cat([torch.full((2000, 2), -100), drawn.tokens], 1)
    with torch.no_grad():
        stats = token_stats(
            policy, Reference(policy, ref), PreferenceBatch(drawn.sequences, drawn.attention_mask, labels)
        )
    ratios = stats.total("logratio")
    assert abs(report.reverse_kl - ratios.mean().item()) < 4 * ratios.std().item() / 2000**0.5
    assert report.valid is None


def test_held_out_pairs_are_measured_the_same_in_any_batches_and_nothing_is_left_changed():
    policy, ref = two_models("gpt2", resid_pdrop=0.5)
    policy.train()
    pairs, objective = make_pairs(7), Weighted().train()
    reports = [evaluate_pairs(policy, Reference(policy, ref), objective, pairs, batch_size=n) for n in (2, 64)]
    assert policy.training
    assert objective.training
    for name in ("loss", "accuracy", "margin", "chosen_kl", "rejected_kl", "kl_gap"):
        assert getattr(reports[0], name) == pytest.approx(getattr(reports[1], name), rel=1e-5), name
    policy.eval()
    kls = [by_definition(policy, ref, p.prompt_ids, p.rejected_ids)[:, 2].sum().item() for p in pairs]
    assert reports[0].rejected_kl == pytest.approx(sum(kls) / 7, rel=1e-5)
    chosen = [by_definition(policy, ref, p.prompt_ids, p.chosen_ids)[:, 2].sum().item() for p in pairs]
    gaps = [abs(a - b) for a, b in zip(chosen, kls, strict=True)]
    assert reports[0].kl_gap == pytest.approx(sum(gaps) / 7, rel=1e-4)


def test_pairs_from_samples_put_the_best_against_the_worst_and_drop_ties():
    model = tiny_model("llama")
    prompts, mask = left_pad([[5, 6, 7], [8], [9, 10]] * 6, 0)

    def reward(drawn):  # all samples of every third prompt count as equal
        tied = (drawn.prompt_ids == 8).any(-1)
        return (drawn.tokens.float() * drawn.mask).sum(-1).masked_fill(tied, 0.0)

    made = [
        pairs_from_samples(
            model, prompts, mask, reward=reward, max_new_tokens=3, generator=generator(), num_samples=4, batch_size=size
        )
        for size in (5, 100)
    ]
    assert [p.prompt_ids.tolist() for p in made[0]] == [[5, 6, 7], [9, 10]] * 6
    for one, other in zip(*made, strict=True):
        assert torch.equal(one.chosen_ids, other.chosen_ids)
        assert torch.equal(one.rejected_ids, other.rejected_ids)
        assert one.chosen_ids.sum() > one.rejected_ids.sum()
    # the samples themselves, drawn again
    from papertrial.lm.generation import sample

    drawn = sample(model, prompts, mask, max_new_tokens=3, generator=generator(), num_samples=4)
    sums = drawn.tokens.sum(-1).view(-1, 4)[0]
    assert made[0][0].chosen_ids.sum() == sums.max()
    assert made[0][0].rejected_ids.sum() == sums.min()


def test_the_moment_of_a_reward_is_read_between_the_checkpoints_that_first_pass_it():
    records = [{"reward": r, "reverse_kl": k} for r, k in ((0.0, 0.0), (1.0, 0.4), (3.0, 2.0), (2.0, 9.0), (4.0, 20.0))]
    assert at_matched(records, 0.5) == {"reward": 0.5, "reverse_kl": pytest.approx(0.2)}
    assert at_matched(records, 1.0) == {"reward": 1.0, "reverse_kl": pytest.approx(0.4)}
    assert at_matched(records, 2.5)["reverse_kl"] == pytest.approx(1.6)  # the first time, not after the fall
    assert at_matched(records, -1.0) == records[0]
    assert at_matched(records, 4.1) is None
    assert at_matched(records, 10.0, on="reverse_kl")["reward"] == pytest.approx(2 + 2 / 11)
    with pytest.raises(ValueError, match="empty"):
        at_matched([], 1.0)
    with pytest.raises(ValueError, match="every record needs 'kl'; the first has reverse_kl, reward"):
        at_matched(records, 1.0, on="kl")


def test_the_frontier_is_what_no_other_record_beats():
    values = torch.randint(0, 8, (40, 2), generator=generator()).tolist()
    records = [{"reward": float(r), "reverse_kl": float(k)} for r, k in values]
    kept = frontier(records)
    brute = {
        (a, k) for a, k in map(tuple, values) if not any((b >= a and j <= k and (b, j) != (a, k)) for b, j in values)
    }
    assert {(r["reward"], r["reverse_kl"]) for r in kept} == brute
    assert len(kept) == len(brute)
    assert [r["reverse_kl"] for r in kept] == sorted(r["reverse_kl"] for r in kept)
    assert frontier([]) == []


# -- bad input ---------------------------------------------------------------------------------------------------------


def tiny_stats(**settings):
    policy, ref = two_models()
    return token_stats(policy, Reference(policy, ref), collate(make_pairs()), **settings)


LOGITS = torch.zeros(1, 3, 5)
LABELS = torch.tensor([[-100, 1, 2]])


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: token_kl(LOGITS, LOGITS[..., :4], LABELS), "same tokenizer"),
        (lambda: token_kl(LOGITS, LOGITS, LABELS[:, :2]), r"\(N, S\)"),
        (lambda: token_kl(LOGITS, LOGITS, LABELS, "sideways"), "direction"),
        (lambda: token_kl(LOGITS, LOGITS, torch.tensor([[1, -100, -100]])), "row 0 of labels has no answer"),
        (lambda: tiny_stats(want=["kl", "speed"]), "speed"),
        (lambda: tiny_stats(logits_at_once=0), "logits_at_once"),
        (lambda: DPO(beta=0.0), "beta"),
        (lambda: DPO(beta=math.inf), "beta"),
        (lambda: dpo_loss(torch.zeros(2), torch.zeros(2), beta=-1.0), "beta"),
        (lambda: check_totals(a=torch.zeros(2), b=torch.zeros(3)), r"a \(2,\), b \(3,\)"),
        (lambda: check_totals(a=torch.zeros(2, 1), b=torch.zeros(2, 1)), "one sum per answer"),
        (lambda: check_totals(a=torch.tensor([torch.nan])), "a holds NaN"),
        (lambda: PreferencePair([], [1], [2]), "prompt_ids"),
        (lambda: PreferencePair([1], [1], []), "rejected_ids"),
        (lambda: PreferencePair([1], [[1]], [2]), "chosen_ids"),
        (lambda: PreferencePair([1], [-100, 2], [2]), "negative id -100"),
        (lambda: PreferencePair([1], [1, 2], [2], {"score": [0.5]}), r"chosen_extras\['score'\]"),
        (lambda: PreferencePair([1], [2], [3]).shortened(4, 0), "max_prompt"),
        (lambda: as_pairs([]), "empty"),
        (lambda: as_pairs([{"prompt": "a", "chosen": "b"}]), "pair 0 lacks rejected"),
        (lambda: as_pairs([{"prompt": "a", "chosen": "b", "rejected": "c"}]), "pair 0 is text: give a tokenizer"),
        (lambda: collate([]), "empty"),
        (lambda: pair_batches(make_pairs(2), 3, generator=generator()), "batch_size"),
        (lambda: pair_batches(make_pairs(2), 0, generator=generator()), "batch_size"),
        (lambda: evaluate_pairs(*two_models(), DPO(), []), "empty"),
        (
            lambda: pairs_from_samples(
                tiny_model("llama"), random_ids(2, 3), reward=count_of(7), max_new_tokens=2, generator=generator(),
                num_samples=1,
            ),
            "num_samples",
        ),
        (
            lambda: pairs_from_samples(
                tiny_model("llama"), random_ids(2, 3), reward=lambda d: torch.full((4,), torch.nan), max_new_tokens=2,
                generator=generator(),
            ),
            "reward must give one number .* with NaN",
        ),
        (
            lambda: evaluate_policy(
                *(m := two_models())[:1], Reference(*m), random_ids(2, 3), reward=lambda d: torch.zeros(3),
                max_new_tokens=2, generator=generator(),
            ),
            "reward must give one number for each of the 2 samples",
        ),
        (
            lambda: evaluate_policy(
                *(m := two_models())[:1], Reference(*m), random_ids(2, 3), reward=count_of(7), max_new_tokens=2,
                generator=generator(), batch_size=0,
            ),
            "batch_size",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()


def unknown_id(side, value=VOCABULARY):
    """Sound pairs, and a last one with an id that no tiny model knows."""
    ids = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]} | {f"{side}_ids": [1, value]}
    return [*make_pairs(), PreferencePair(**ids)]


def tiny_trainer():
    return PreferenceTrainer(tiny_model("llama"), objective=DPO())


TRAINING = {"steps": 1, "batch_size": 1, "optimizer": adamw(1e-3)}
PROMPT = torch.tensor([[1, VOCABULARY]])
DRAWING = {"reward": count_of(7), "max_new_tokens": 2}


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: token_kl(LOGITS, LOGITS, LABELS + 4), "labels holds the id 6, .* 0 to 4"),
        (lambda: token_log_ratio(LOGITS, LOGITS, LABELS.clamp(min=-1) - 2), "labels holds the id -1"),
        *(
            (
                lambda side=side: tiny_trainer().fit(unknown_id(side), generator=generator(), **TRAINING),
                f"{side}_ids of pair 5 holds the id {VOCABULARY}, .* 0 to {VOCABULARY - 1}",
            )
            for side in ("prompt", "chosen", "rejected")
        ),
        (lambda: tiny_trainer().evaluate(unknown_id("chosen", 9999)), "chosen_ids of pair 5 holds the id 9999"),
        (
            lambda: token_stats(*(m := two_models())[:1], Reference(*m), collate(unknown_id("rejected"))),
            f"input_ids of the batch holds the id {VOCABULARY}",
        ),
        (
            lambda: cache_reference(unknown_id("rejected"), Reference(*two_models())),
            f"input_ids of the batch holds the id {VOCABULARY}",
        ),
        (
            lambda: evaluate_policy(
                *(m := two_models())[:1], Reference(*m), PROMPT, generator=generator(), **DRAWING
            ),
            f"prompt_ids holds the id {VOCABULARY}",
        ),
        (
            lambda: pairs_from_samples(tiny_model("llama"), PROMPT, generator=generator(), **DRAWING),
            f"prompt_ids holds the id {VOCABULARY}",
        ),
    ],
)  # fmt: skip
def test_ids_outside_the_vocabulary_are_named_before_anything_is_run(call, named):
    with pytest.raises(ValueError, match=named):
        call()


def test_a_padding_id_without_an_embedding_does_not_stop_training():
    policy = tiny_model("gpt2")
    policy.config.pad_token_id = VOCABULARY
    trainer = PreferenceTrainer(policy, objective=DPO())
    report = trainer.fit(make_pairs(), steps=2, batch_size=5, optimizer=adamw(1e-3), generator=generator())
    assert report.losses[-1] < report.losses[0]


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: PreferencePair("text", [1], [2]), "prompt_ids is text"),
        (lambda: PreferencePair([1], [0.5], [2]), "chosen_ids must hold integers"),
        (lambda: PreferencePair([True], [1], [2]), "prompt_ids must hold integers"),
    ],
)
def test_ids_of_a_wrong_type_are_named(call, named):
    with pytest.raises(TypeError, match=named):
        call()
