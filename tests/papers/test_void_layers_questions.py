import contextlib
import itertools

import pytest
import torch

from families import random_ids, tiny_model, tiny_tokenizer
from papertrial.lm.corpora import Document
from papertrial.lm.generation import left_pad
from papertrial.lm.scoring import continuation_scores
from papertrial.papers.compression.void_layers.examination import Examination, control_masks, share_used
from papertrial.papers.compression.void_layers.experiment import Sweep, _chosen, _distances, _tabulated
from papertrial.papers.compression.void_layers.method import (
    L2AdaptiveComputation,
    layer_usage,
    phase_distance,
    profile_distance,
    shuffled_phase_distances,
    trace_layers,
)
from papertrial.papers.compression.void_layers.phases import compare
from papertrial.papers.compression.void_layers.questions import (
    ANSWER,
    BEGIN,
    QUESTION,
    RELATIONS,
    FactWorld,
    Questions,
    continuations,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def world():
    return FactWorld(16, 8, generator=generator())


def solved(world):
    """From the tokens of a question to those of its answer."""
    pairs = zip(world.questions.tolist(), world.answers.tolist(), strict=True)
    return {tuple(question): tuple(answer) for question, answer in pairs}


def test_sums_and_products_are_right(world):
    digit = {7 + d: d for d in range(10)}
    checked = 0
    for question, answer in solved(world).items():
        if question[0] in digit:
            left, sign, right = digit[question[0]], question[1], digit[question[2]]
            value = left + right if sign == 5 else left * right
            assert 10 * digit[answer[0]] + digit[answer[1]] == value
            checked += 1
    assert checked == 200


def test_every_question_has_one_answer_and_a_seed_makes_a_world(world):
    assert len(solved(world)) == len(world.questions) == 16 * RELATIONS + 200
    assert torch.equal(world.answers, FactWorld(16, 8, generator=generator()).answers)
    assert not torch.equal(world.answers, FactWorld(16, 8, generator=generator(1)).answers)
    assert int(world.answers.max()) < world.vocabulary


def test_training_texts_are_solved_questions_and_only_answers_carry_loss(world):
    batch = next(world.batches(6, 4, generator=generator()))
    known = solved(world)
    for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        assert ids[0] == BEGIN
        assert labels[0] == -100
        for k in range(4):
            part = slice(1 + 7 * k, 1 + 7 * (k + 1))
            question, answer = tuple(ids[part][:QUESTION]), tuple(ids[part][QUESTION:])
            assert known[question] == answer
            assert labels[part] == [-100] * QUESTION + list(answer)


def test_the_true_option_is_the_answer_and_the_others_answer_other_questions(world):
    questions = world.ask(60, 2, validation=False, generator=generator())
    known = solved(world)
    kinds = dict(zip(map(tuple, world.questions.tolist()), world.kinds.tolist(), strict=True))
    answers = {kind: {known[q] for q, k in kinds.items() if k == kind} for kind in set(kinds.values())}
    for prompt, options, correct in zip(questions.prompts, questions.options, questions.correct.tolist(), strict=True):
        asked, options = tuple(prompt[-QUESTION:]), [tuple(option) for option in options.tolist()]
        assert options[correct] == known[asked]
        assert len(set(options)) == 4
        assert set(options) <= answers[kinds[asked]]
        for k in range(2):
            example = prompt[1 + 7 * k : 8 + 7 * k]
            assert known[tuple(example[:QUESTION])] == tuple(example[QUESTION:])
            columns = questions.examples[1 + 7 * k : 8 + 7 * k].tolist()
            assert columns == [False] * QUESTION + [True] * (ANSWER - 1) + [False]
    assert set(questions.correct.tolist()) == {0, 1, 2, 3}
    assert int(questions.examples.sum()) == 2 * (ANSWER - 1)
    facts = sum(kinds[tuple(prompt[-QUESTION:])] < RELATIONS for prompt in questions.prompts)
    assert 15 < facts < 45  # half of 60


def test_what_is_asked_for_validation_is_never_asked_in_the_test(world):
    asked = [
        {tuple(prompt[-QUESTION:]) for prompt in world.ask(300, 1, validation=v, generator=generator(3)).prompts}
        for v in (True, False)
    ]
    assert not asked[0] & asked[1]
    assert all(len(questions) > 30 for questions in asked)


def test_a_passage_goes_on_with_the_true_option_only():
    tokenizer = tiny_tokenizer()
    text = (
        "the quick dog sat on the mat. " * 3
        + "a lazy fox came back over the brown cat! then jumps, the mat the dog. " * 2
    )
    documents = [Document("one", (text,)), Document("short", ("the cat",))]
    ids = tokenizer.encode(text, add_special_tokens=False)
    questions = continuations(tokenizer, documents, 40, prompt=10, length=5, generator=generator())
    joined = [ids[i : i + 15] for i in range(len(ids) - 14)]
    for prompt, options, correct in zip(
        questions.prompts, questions.options.tolist(), questions.correct.tolist(), strict=True
    ):
        assert prompt + options[correct] in joined
        assert all(option != options[correct] for i, option in enumerate(options) if i != correct)
        assert all(option in [ids[i : i + 5] for i in range(len(ids) - 4)] for option in options)
    with pytest.raises(ValueError, match="no document has"):
        continuations(tokenizer, documents, 1, prompt=500, length=5, generator=generator())
    with pytest.raises(ValueError, match="repeats one passage"):
        continuations(tokenizer, [Document("same", ("aaaaaaaa" * 40,))], 1, prompt=4, length=2, generator=generator())


def test_worlds_too_small_for_four_options_are_refused():
    with pytest.raises(ValueError, match="at least"):
        FactWorld(3, 8, generator=generator())


# -- examination -------------------------------------------------------------------------------------------------


def some_questions(count=7, length=3):
    """Prompts of several lengths over the vocabulary of the tiny models."""
    prompts = [random_ids(1, 4 + n % 3, seed=n)[0].tolist() for n in range(count)]
    options = random_ids(count * 4, length, seed=99).view(count, 4, length)
    return Questions(prompts, options, torch.arange(count) % 4, torch.zeros(0, dtype=torch.bool))


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("batch", [2, 100])
def test_accuracy_equals_scoring_every_option_by_itself(length, batch):
    model, questions = tiny_model("llama"), some_questions(24, length)
    hits = 0
    for prompt, options, correct in zip(questions.prompts, questions.options, questions.correct, strict=True):
        scores, _ = continuation_scores(model, [prompt] * 4, options.tolist())
        hits += int(scores.argmax()) == int(correct)
    assert 0 < hits < 24
    assert Examination(model, questions, batch).accuracy() == pytest.approx(100 * hits / 24)


def test_prompts_and_options_are_the_two_phases():
    model, questions = tiny_model("llama", num_hidden_layers=4), some_questions()
    with L2AdaptiveComputation(model, 0.4) as lac:
        Examination(model, questions, 4).accuracy()
    assert [trace.real.shape for trace in lac.passes] == [(4, 6), (16, 2), (3, 6), (12, 2)]
    assert [bool(trace.response.any()) for trace in lac.passes] == [False, True, False, True]
    reading = trace_layers(model, *left_pad(questions.prompts[:4], 0), 0.4)
    assert int(lac.passes[0].real.sum()) == int(reading.real.sum())
    tokens = sum(int(trace.real.sum()) for trace in lac.passes)
    active = sum(int(trace.active[:, trace.real].sum()) for trace in lac.passes)
    assert share_used(lac.passes) == pytest.approx(active / tokens / 4)


def test_given_masks_reproduce_the_rule_and_controls_match_its_counts():
    model, questions = tiny_model("llama", num_hidden_layers=5), some_questions()
    examination = Examination(model, questions, 4)
    with L2AdaptiveComputation(model, 0.7) as lac:
        by_rule = examination.accuracy()
    assert examination.masked([trace.active for trace in lac.passes]) == by_rule
    with L2AdaptiveComputation(model, phases=()) as plain:
        examination.accuracy()
    for masks in control_masks(lac.passes, plain.passes, generator()).values():
        for mask, trace in zip(masks, lac.passes, strict=True):
            assert torch.equal((~mask).sum(0), trace.dropped)
    with pytest.raises(ValueError, match="4 forwards need as many contexts"):
        examination.accuracy([contextlib.nullcontext])


def test_the_factor_is_chosen_on_validation_questions_and_ties_use_fewest_layers():
    class FakeTrial:
        parameters = {"alphas": [0.0, 0.1, 0.4, 0.8]}

        def __getitem__(self, name):
            return self.parameters[name]

    model = tiny_model("llama", num_hidden_layers=4)
    examination = Examination(model, some_questions(), 4)
    found = {}
    for alpha in (0.1, 0.4, 0.8):
        with L2AdaptiveComputation(model, alpha, semantics="readout"):
            found[alpha] = examination.accuracy()
    best = max(alpha for alpha in found if found[alpha] == max(found.values()))
    assert _chosen(FakeTrial(), model, examination, "readout") == best


def test_more_alpha_uses_fewer_layers_on_a_fixed_text():
    model, ids = tiny_model("llama", num_hidden_layers=6), random_ids(4, 12)
    shares = [layer_usage(trace_layers(model, ids, alpha=alpha)).mean for alpha in (0.0, 0.1, 0.4, 0.8)]
    assert all(after <= before for before, after in itertools.pairwise(shares))
    assert shares[0] > shares[-1]


def test_the_sweep_of_somebodys_model_is_told_arm_by_arm():
    points = {"skip, both": [(90.0, 70.0), (50.0, 40.0)], "readout, both": [(91.0, 72.0), (55.0, 60.0)]}
    assert _tabulated(Sweep(points), [0.0, 0.8]) == {
        "skip@0": {"sweep_accuracy": 70.0, "sweep_layers_used": 90.0},
        "skip@0.8": {"sweep_accuracy": 40.0, "sweep_layers_used": 50.0},
        "readout@0": {"sweep_accuracy": 72.0, "sweep_layers_used": 91.0},
        "readout@0.8": {"sweep_accuracy": 60.0, "sweep_layers_used": 55.0},
    }


# -- phases in the experiment ------------------------------------------------------------------------------------


class NotingTrial(dict):
    """Parameters, one stream of chance, and what was noted."""

    def generator(self, purpose):
        return generator(7)

    def note(self, name, value):
        self[name] = value


def test_phase_distances_are_of_every_factor_and_their_null_has_the_same_deals():
    trial = NotingTrial(alphas=[0.0, 0.1, 0.8], shuffles=30)
    model, ids = tiny_model("llama", num_hidden_layers=6), random_ids(20, 12)
    trace = trace_layers(model, ids, prompt_length=8)
    results = {}
    comparison = _distances(trial, trace, trace.of("prompt"), "distance", results)
    expected = [trace_layers(model, ids, alpha=alpha, prompt_length=8) for alpha in (0.1, 0.8)]
    found = [phase_distance(t) for t in expected]
    assert comparison.found == tuple(found)
    assert results["lac"] == {"mean_distance": pytest.approx(sum(found) / 2), "distance_at_0.8": found[1]}
    null = [shuffled_phase_distances(t, 30, generator=generator(7)) for t in expected]
    assert results["shuffled_phases"]["mean_distance"] == pytest.approx(float((null[0] + null[1]).mean() / 2))
    assert results["shuffled_phases"]["distance_at_0.8"] == pytest.approx(float(null[1].mean()))
    noted = trial["99th percentile of shuffled_phases, mean_distance"]
    assert noted == round(float(((null[0] + null[1]) / 2).quantile(0.99)), 4)


def test_a_comparison_of_some_tokens_has_a_null_of_their_number():
    """By brute force: the answers inside a prompt against the response, nothing else in either group or its null."""
    model, ids = tiny_model("llama", num_hidden_layers=6), random_ids(20, 12)
    trace = trace_layers(model, ids, prompt_length=8)
    places = torch.zeros_like(trace.real)
    places[:, 2:4] = True
    response = trace.of("response")
    found = compare(trace, places, response, [0.1], count=400, generator=generator(3))
    active = trace_layers(model, ids, alpha=0.1).active
    inside, after = active[:, places].double(), active[:, response].double()
    assert found.found == (profile_distance(inside.mean(1), after.mean(1)),)
    pool, chance = torch.cat([inside, after], 1), generator(4)
    by_hand = []
    for _ in range(400):
        order = torch.randperm(120, generator=chance)
        by_hand.append(profile_distance(pool[:, order[:40]].mean(1), pool[:, order[40:]].mean(1)))
    # standard error of either mean: the spread over deals / sqrt(400); they are 4 of their difference apart at most
    spread = float(torch.tensor(by_hand).std()) * 2**0.5 / 20
    assert found.mean_chance == pytest.approx(sum(by_hand) / 400, abs=4 * spread)
    whole = compare(trace, trace.of("prompt"), response, [0.1], count=400, generator=generator(3))
    assert found.mean_chance > whole.mean_chance + 4 * spread  # fewer tokens, more chance
    assert found.chance_quantile(0.99) == pytest.approx(float(found.dealt[0].quantile(0.99)))


def test_groups_that_share_tokens_or_hold_padding_are_refused():
    ids, mask = left_pad([[3, 4, 5], [6, 7]], 0)
    trace = trace_layers(tiny_model("llama"), ids, mask, prompt_length=2)
    response = trace.of("response")
    for one in (torch.ones_like(response), ~response):
        with pytest.raises(ValueError, match="real tokens, each in one group"):
            compare(trace, one, response, [0.1], count=2, generator=generator())
