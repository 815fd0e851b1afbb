"""TDPO: its loss against brute force, DPO and finite differences; its training; its trial."""

import copy
import doctest
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from families import CORE, random_ids, tiny_model, tiny_tokenizer
from papertrial.lab.claim import find_card
from papertrial.lab.trial import PreconditionFailed, Trial, trial_parameters
from papertrial.lm.preferences import (
    DPO,
    PreferencePair,
    Reference,
    TokenStats,
    collate,
    evaluate_pairs,
    token_kl,
    token_log_ratio,
    token_stats,
)
from papertrial.lm.training import adamw
from papertrial.papers.finetuning.tdpo import experiment, method
from papertrial.papers.finetuning.tdpo.method import TDPO, PreferenceTrainer, tdpo_loss

VARIANTS = ("tdpo1", "tdpo2")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def logits(rows, length, vocabulary, seed):
    return torch.randn(rows, length, vocabulary, generator=generator(seed), dtype=torch.float64)


def labels(rows, length, vocabulary, *, prompt=1, seed=7):
    ids = torch.randint(vocabulary, (rows, length), generator=generator(seed))
    ids[:, :prompt] = -100
    return ids


def loss_of_logits(policy, ref, targets, **settings):
    """The loss of pairs given as 2B rows, the chosen ones first."""
    ratio, kl = token_log_ratio(policy, ref, targets).sum(-1), token_kl(policy, ref, targets).sum(-1)
    half = len(ratio) // 2
    return tdpo_loss(ratio[:half], ratio[half:], kl[:half], kl[half:], **settings)


def make_pairs(count=6):
    rows = random_ids(3 * count, 8)
    return [
        PreferencePair(rows[3 * i, :2], rows[3 * i + 1, : 3 + i % 3], rows[3 * i + 2, : 5 - i % 3])
        for i in range(count)
    ]


# -- the loss ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_loss_is_the_papers_formula_done_by_hand(variant):
    policy, ref, targets = logits(2, 4, 5, 1), logits(2, 4, 5, 2), labels(2, 4, 5)
    ratios, kls = [], []
    for row in range(2):
        ratio = kl = 0.0
        for t in range(1, 4):  # the label at t is predicted by the logits at t - 1
            p = [math.exp(v) for v in policy[row, t - 1].tolist()]
            q = [math.exp(v) for v in ref[row, t - 1].tolist()]
            p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
            y = int(targets[row, t])
            ratio += math.log(p[y]) - math.log(q[y])
            step = sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))  # KL(reference || policy)
            assert step >= 0
            kl += step
        ratios.append(ratio)
        kls.append(kl)
    weight = 1.0 if variant == "tdpo1" else 0.7
    z = 0.2 * (ratios[0] - ratios[1] - weight * (kls[1] - kls[0]))
    values = loss_of_logits(policy, ref, targets, beta=0.2, alpha=0.7, variant=variant)
    assert values.loss.item() == pytest.approx(math.log1p(math.exp(-z)))
    assert values.chosen_reward.item() == pytest.approx(0.2 * (ratios[0] + kls[0]))
    assert values.rejected_reward.item() == pytest.approx(0.2 * (ratios[1] + kls[1]))
    assert not values.chosen_reward.requires_grad


def test_tdpo2_without_alpha_is_dpo_in_value_and_gradient():
    ref, targets = logits(6, 5, 7, 2), labels(6, 5, 7)
    gradients, losses = [], []
    for which in ("tdpo2", "dpo"):
        policy = logits(6, 5, 7, 1).requires_grad_()
        if which == "tdpo2":
            loss = loss_of_logits(policy, ref, targets, beta=0.3, alpha=0.0).loss
        else:  # DPO written independently
            keep = targets[:, 1:] != -100
            index = targets[:, 1:].clamp(min=0)[..., None]
            margin = policy[:, :-1].log_softmax(-1) - ref[:, :-1].log_softmax(-1)
            total = (margin.gather(-1, index)[..., 0] * keep).sum(-1)
            loss = -F.logsigmoid(0.3 * (total[:3] - total[3:]))
        loss.sum().backward()
        losses.append(loss.detach())
        gradients.append(policy.grad)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_policy_that_is_its_reference_has_loss_log_two_and_no_rewards(variant):
    ref, targets = logits(4, 5, 7, 2), labels(4, 5, 7)
    values = loss_of_logits(ref.clone(), ref, targets, variant=variant)
    assert values.loss.tolist() == pytest.approx([math.log(2)] * 2, abs=1e-12)
    assert values.chosen_reward.abs().max() < 1e-12
    assert values.rejected_reward.abs().max() < 1e-12


def test_the_variants_agree_in_value_at_alpha_one_and_differ_in_the_gradient_of_the_chosen_divergence():
    base = [torch.randn(5, generator=generator(s), dtype=torch.float64).abs() for s in range(4)]
    found = {}
    for variant in VARIANTS:
        r_w, r_l, k_w, k_l = (values.clone().requires_grad_() for values in base)
        loss = tdpo_loss(r_w, r_l, k_w, k_l, beta=0.4, alpha=1.0, variant=variant).loss
        loss.sum().backward()
        found[variant] = loss.detach(), r_w.grad, r_l.grad, k_w.grad, k_l.grad
    for which in (0, 1, 2, 4):
        torch.testing.assert_close(found["tdpo1"][which], found["tdpo2"][which])
    z = base[0] - base[1] - (base[3] - base[2])
    slope = 0.4 * torch.sigmoid(-0.4 * z)
    torch.testing.assert_close(found["tdpo1"][3], -slope)  # growth of the chosen answer's divergence is rewarded
    assert found["tdpo2"][3] is None or not found["tdpo2"][3].any()
    torch.testing.assert_close(found["tdpo2"][4], slope)


@pytest.mark.parametrize("alpha", [0.5, 2.0])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_gradient_in_the_policys_logits_is_that_of_finite_differences(variant, alpha):
    ref, targets = logits(2, 3, 4, 2), labels(2, 3, 4)
    start = logits(2, 3, 4, 1)
    frozen = token_kl(start, ref, targets).sum(-1)[0]  # TDPO2 holds the chosen answer's divergence constant

    def value(policy):
        if variant == "tdpo1":
            return loss_of_logits(policy, ref, targets, beta=0.5, variant="tdpo1").loss.sum()
        ratio, kl = token_log_ratio(policy, ref, targets).sum(-1), token_kl(policy, ref, targets).sum(-1)
        return -F.logsigmoid(0.5 * (ratio[0] - ratio[1] - alpha * (kl[1] - frozen)))

    policy = start.clone().requires_grad_()
    loss_of_logits(policy, ref, targets, beta=0.5, alpha=alpha, variant=variant).loss.sum().backward()
    numeric = torch.zeros_like(start)
    for index in range(start.numel()):
        step = torch.zeros(start.numel(), dtype=torch.float64)
        step[index] = 1e-5
        step = step.view_as(start)
        numeric.view(-1)[index] = (value(start + step) - value(start - step)) / 2e-5
    # central differences: error of the order of the step squared
    torch.testing.assert_close(policy.grad, numeric, atol=1e-8, rtol=1e-6)
    assert numeric.abs().max() > 1e-3


def test_identical_answers_have_loss_log_two_and_only_tdpo2_still_pulls_at_them():
    ref, targets = logits(1, 4, 5, 2), labels(1, 4, 5)
    for variant in VARIANTS:
        policy = logits(1, 4, 5, 1).requires_grad_()
        values = loss_of_logits(policy.repeat(2, 1, 1), ref.repeat(2, 1, 1), targets.repeat(2, 1), variant=variant)
        assert values.loss.item() == pytest.approx(math.log(2))
        values.loss.sum().backward()
        pulled = policy.grad.abs().max()
        assert pulled > 1e-3 if variant == "tdpo2" else pulled < 1e-12


def test_swapping_the_answers_negates_the_logit():
    policy, ref, targets = logits(8, 4, 5, 1), logits(8, 4, 5, 2), labels(8, 4, 5)
    for settings in ({"variant": "tdpo1"}, {"variant": "tdpo2", "alpha": 0.5}):
        there = loss_of_logits(policy, ref, targets, **settings)
        order = torch.tensor([4, 5, 6, 7, 0, 1, 2, 3])
        back = loss_of_logits(policy[order], ref[order], targets[order], **settings)
        ratio, kl = token_log_ratio(policy, ref, targets).sum(-1), token_kl(policy, ref, targets).sum(-1)
        weight = settings.get("alpha", 1.0)
        z = 0.1 * (ratio[:4] - ratio[4:] - weight * (kl[4:] - kl[:4]))
        # softplus(z) - softplus(-z) = z
        torch.testing.assert_close(back.loss - there.loss, z)
        torch.testing.assert_close(back.chosen_reward, there.rejected_reward)


def test_answers_are_summed_and_not_averaged_over_their_tokens():
    policy, ref, targets = logits(2, 3, 5, 1), logits(2, 3, 5, 2), labels(2, 3, 5, prompt=0)
    prompt = torch.full((2, 1), -100)

    def z(times):
        rows = [x.repeat(1, times, 1) for x in (policy, ref)]
        again = torch.cat([prompt, targets.repeat(1, times)], 1)[:, : 3 * times + 1]
        rows = [torch.cat([x, x[:, :1]], 1) for x in rows]
        return -torch.log(torch.expm1(loss_of_logits(*rows, again, variant="tdpo1").loss))

    torch.testing.assert_close(z(3), 3 * z(1))


@pytest.mark.parametrize("variant", VARIANTS)
def test_prompts_and_padding_do_not_enter(variant):
    policy, ref, targets = logits(4, 6, 5, 1), logits(4, 6, 5, 2), labels(4, 6, 5, prompt=3)
    targets[1, 4:] = targets[2, 5:] = -100
    before = loss_of_logits(policy, ref, targets, variant=variant).loss
    other = policy.clone()
    other[:, :2] += 3.0 * torch.arange(5)  # predicts prompt tokens
    other[1, 3:] += 3.0 * torch.arange(5)  # predicts padding
    longer = torch.cat([other, logits(4, 2, 5, 3)], 1), torch.cat([ref, logits(4, 2, 5, 4)], 1)
    after = loss_of_logits(*longer, F.pad(targets, (0, 2), value=-100), variant=variant).loss
    assert torch.equal(before, after)


def test_large_margins_neither_overflow_nor_lose_their_gradient():
    r_w = torch.tensor([-2e4, 2e4], requires_grad=True)
    zero = torch.zeros(2)
    loss = tdpo_loss(r_w, zero, zero, zero).loss
    assert loss.tolist() == pytest.approx([2e3, 0.0])
    loss.sum().backward()
    assert r_w.grad.tolist() == pytest.approx([-0.1, 0.0])


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: TDPO(beta=0.0), "beta"),
        (lambda: TDPO(beta=-0.1), "beta"),
        (lambda: TDPO(beta=math.nan), "beta"),
        (lambda: TDPO(alpha=-0.1), "alpha"),
        (lambda: TDPO(alpha=math.inf), "alpha"),
        (lambda: TDPO(variant="tdpo3"), "variant must be one of tdpo1, tdpo2"),
        (lambda: tdpo_loss(*[torch.zeros(2)] * 4, beta=0.0), "beta"),
        (lambda: tdpo_loss(*[torch.zeros(2)] * 3, torch.zeros(3)), r"rejected_kl \(3,\)"),
        (lambda: tdpo_loss(*[torch.zeros(2, 3)] * 4), "one sum per answer"),
        (lambda: tdpo_loss(*[torch.zeros(2)] * 3, torch.tensor([0.0, math.nan])), "rejected_kl holds NaN"),
        (lambda: token_kl(torch.zeros(1, 2, 4), torch.zeros(1, 2, 5), torch.zeros(1, 2).long()), "vocabulary"),
        (lambda: PreferenceTrainer(m := tiny_model("llama"), m, objective=TDPO()), "shares the parameter"),
    ],
)
def test_bad_input_is_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", CORE)
def test_the_objective_is_the_loss_of_what_the_models_say(family, variant):
    policy, ref = tiny_model(family, seed=1), tiny_model(family, seed=2)
    batch = collate(make_pairs())
    objective = TDPO(beta=0.2, alpha=0.7, variant=variant)
    stats = token_stats(policy, Reference(policy, ref), batch, want=objective.wants)
    found = objective(*stats.halves())
    with torch.no_grad():
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        rows = [model(**inputs).logits for model in (policy, ref)]
    expected = loss_of_logits(*rows, batch.labels, beta=0.2, alpha=0.7, variant=variant)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", CORE)
def test_training_learns_the_preferences(family):
    policy = tiny_model(family)
    trainer = PreferenceTrainer(policy, objective=TDPO())
    pairs, heard = make_pairs(), []
    report = trainer.fit(
        pairs, steps=20, batch_size=6, optimizer=adamw(5e-3), generator=generator(), on_step=heard.append
    )
    assert report.losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert trainer.evaluate(pairs).accuracy == 1
    assert heard[-1].parts["rejected_kl"] > 0


def trained(objective, steps=25):
    policy = tiny_model("llama")
    trainer = PreferenceTrainer(policy, objective=objective)
    trainer.fit(make_pairs(), steps=steps, batch_size=6, optimizer=adamw(3e-3), generator=generator())
    return evaluate_pairs(policy, trainer.reference, DPO(), make_pairs())


def test_tdpo2_holds_the_divergence_down_and_tdpo1_lets_that_of_the_chosen_answer_grow():
    dpo, tdpo1, tdpo2, firm = (
        trained(o) for o in (DPO(), TDPO(variant="tdpo1"), TDPO(alpha=0.5), TDPO(alpha=3.0))
    )  # fmt: skip
    assert firm.rejected_kl < tdpo2.rejected_kl < dpo.rejected_kl
    assert tdpo1.chosen_kl - tdpo1.rejected_kl > dpo.chosen_kl - dpo.rejected_kl
    assert tdpo2.accuracy == dpo.accuracy == 1


def test_text_pairs_and_an_adapter_train_and_the_policy_generates_without_the_reference():
    import peft

    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy = peft.get_peft_model(tiny_model("gpt2"), peft.LoraConfig(r=4, target_modules=["c_attn"]))
    tokenizer = tiny_tokenizer()
    trainer = PreferenceTrainer(policy, objective=TDPO(beta=0.5), tokenizer=tokenizer)
    pairs = [
        {"prompt": "the cat", "chosen": " sat on the mat", "rejected": " ran"},
        {"prompt": "a quick fox", "chosen": " jumps", "rejected": " the lazy dog"},
    ]
    trainer.fit(pairs, steps=30, batch_size=2, optimizer=adamw(2e-2), generator=generator())
    assert trainer.evaluate(pairs).accuracy == 1
    ids = torch.tensor([tokenizer("the cat")["input_ids"]])
    assert policy.generate(input_ids=ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]


def test_the_example_of_the_documentation_runs():
    results = doctest.testmod(method)
    assert results.attempted > 5
    assert results.failed == 0


def test_a_statistic_that_is_missing_is_named():
    rows = torch.zeros(2, 3)
    stats = TokenStats(rows.bool(), rows, rows)
    with pytest.raises(ValueError, match="kl was not computed"):
        TDPO()(stats, stats)


# -- the trial ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smoke():
    parameters = trial_parameters("tdpo", experiment.SCALES, "smoke")[1]
    trial = Trial("tdpo", "smoke", 0, parameters)
    return trial, experiment.run(trial)


def test_a_smoke_trial_returns_every_claimed_arm_and_metric_and_repeats_itself(smoke):
    trial, arms = smoke
    again = experiment.run(Trial("tdpo", "smoke", 0, trial.parameters))
    assert arms == again
    for claim in find_card("tdpo").claim:
        for arm in claim.arms:
            assert math.isfinite(arms[arm][claim.metric]), (arm, claim.metric)


def test_arms_are_compared_at_one_and_the_same_reward(smoke):
    trial, arms = smoke
    wanted = sum(trial["levels"]) / len(trial["levels"])
    for arm in ("dpo", "tdpo2", "dpo_tuned"):
        assert arms[arm]["reward"] == pytest.approx(wanted, abs=1e-6)


def test_every_arm_starts_from_the_same_model_and_leaves_it_alone():
    parameters = trial_parameters("tdpo", experiment.SCALES, "smoke")[1]
    trial = Trial("tdpo", "smoke", 1, parameters)
    task = experiment.sentiment_task(trial)
    before = copy.deepcopy(task.start)
    setting = experiment.Setting("tdpo2", 0.1, 3e-3, 2, 1, 1)
    paths = [experiment.train_arm(trial, task, setting, task.pairs) for _ in range(2)]
    assert paths[0].records == paths[1].records
    assert paths[0].records["test"][0]["reverse_kl"] == 0
    assert paths[0].records["test"][-1]["reverse_kl"] > 0
    for name, values in before.state_dict().items():
        assert torch.equal(values, task.start.state_dict()[name])


def test_pairs_prefer_the_truly_better_answer_and_the_placebo_a_coin():
    parameters = trial_parameters("tdpo", experiment.SCALES, "smoke")[1] | {"prompts": 400}
    trial = Trial("tdpo", "smoke", 2, parameters)
    task = experiment.sentiment_task(trial)
    world = experiment.SentimentWorld(clauses=parameters["clauses"])

    def better(pairs):
        gaps = [world.reward(p.chosen_ids[None]) - world.reward(p.rejected_ids[None]) for p in pairs]
        return torch.stack(gaps)[:, 0]

    assert (better(task.pairs) > 0).all()
    count = len(task.pairs)
    tossed = experiment.coin_tossed(trial, task.pairs)
    share = (better(tossed) > 0).double().mean().item()
    assert share == pytest.approx(0.5, abs=4 * 0.5 / count**0.5)
    for one, other in zip(task.pairs, tossed, strict=True):
        assert torch.equal(one.prompt_ids, other.prompt_ids)
    # what is held out is not what is trained on, nor are the prompts that settings are chosen by those of the figures
    assert not torch.equal(task.prompts["valid"], task.prompts["test"])


def test_the_mood_that_a_model_reads_is_measured_against_bayes():
    world = experiment.SentimentWorld(clauses=4)
    documents = world.documents(20_000, generator())
    prompts, answers = documents[:, : world.prompt_length(1)], documents[:, world.prompt_length(1) :]
    oracle, blind = answers, answers[torch.randperm(len(answers), generator=generator(1))]
    for tokens, expected in ((oracle, 0.24), (blind, 0.0)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(experiment, "sample", lambda *_, tokens=tokens, **__: SimpleNamespace(tokens=tokens))
            found = experiment.mood_read(None, world, prompts, generator())
        # 60,000 adjectives that share moods by threes
        assert found == pytest.approx(expected, abs=0.02)


def test_an_arm_that_never_reaches_the_reward_makes_the_trial_undecided():
    parameters = trial_parameters("tdpo", experiment.SCALES, "smoke")[1] | {"levels": [50.0]}
    with pytest.raises(PreconditionFailed, match="never reaches"):
        experiment.run(Trial("tdpo", "smoke", 0, parameters))
