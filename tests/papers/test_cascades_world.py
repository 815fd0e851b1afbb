import numpy as np
import pytest
import torch

from families import tiny_model
from papertrial.lab.trial import PreconditionFailed, Trial
from papertrial.papers.decoding.cascades import experiment, world
from papertrial.papers.decoding.cascades.method import Records


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def small_world(facts=50, terms=12, longest=24):
    return world.World(facts, terms, longest, generator())


def parts_of(question):
    """Problem, first letter, last letter ('-' for none), the recited letters, and the result, in characters."""
    marker, _, body = world.text(question.prompt[:-1]).partition(" ")
    assert marker == question.task
    letters, _, result = world.text(question.answer).partition(":")
    return body[:-2], body[-2], body[-1], letters, result


def test_results_of_the_world_are_right():
    made = small_world()
    names = {
        "".join(map(letter, key)): "".join(map(letter, name)) for key, name in zip(made.keys, made.names, strict=True)
    }
    assert len(names) == 50
    for question in made.questions(600, generator(1)):
        assert question.prompt[-1] == world.SEP
        assert question.answer[-1] == world.EOS
        problem, *_, result = parts_of(question)
        if question.task == "sum":
            assert int(result) == int(problem[:2]) + int(problem[2:])
            assert max(int(problem[:2]), int(problem[2:])) < 12
        elif question.task == "largest":
            numbers = [int(problem[n : n + 2]) for n in (0, 2, 4)]
            assert numbers[int(result) - 1] == max(numbers)
        else:
            assert result == names[problem]


def letter(number):
    return "abcdefghijklmnopqrstuvwxyz"[number]


def test_letters_run_from_the_first_to_the_last_and_capitals_do_not_matter():
    capitals: set[str] = set()
    swap = world.CAPITALS | {capital: small for small, capital in world.CAPITALS.items()}
    for question in small_world().questions(900, generator(1)):
        _, first, last, letters, _ = parts_of(question)
        assert len(letters) == question.letters
        if last == "-":
            assert letters == ""
            continue
        expected = [letter((ord(first) - ord("a") + n) % 26) for n in range(len(letters))]
        assert letters.lower() == "".join(expected)
        assert letters[-1].lower() == last
        capitals |= set(letters) - set(letters.lower())
        other = [swap.get(token, token) for token in question.answer]
        assert (other != question.answer) == any(
            character in "aeiou" for character in world.text(question.answer).lower()
        )
        assert world.same(other, question.answer)
        wrong = [*question.answer[:-2], question.answer[-2] + 1, question.answer[-1]]
        assert not world.same(wrong, question.answer)
    assert capitals == set("AEIOU")


def test_how_many_letters_there_are_says_nothing_about_the_problem():
    """Two orders of length, evenly on a logarithmic scale, whatever the task, the numbers and the key."""
    questions = small_world().questions(9000, generator(2))
    letters = np.array([question.letters for question in questions])
    assert (letters.min(), letters.max()) == (0, 24)
    for most in (0, 3, 12, 24):
        expected = np.log(most + 2) / np.log(26)
        for task in world.TASKS:
            rows = np.array([question.task == task for question in questions])
            # 3000 draws: a standard deviation of at most 0.0092
            assert (letters[rows] <= most).mean() == pytest.approx(expected, abs=0.035)
    common = tuple(small_world().keys[0])
    asked = np.array([
        n for n, q in enumerate(questions) if q.task == "recall" and q.prompt[1:4] == [world.LETTER + k for k in common]
    ])  # fmt: skip
    rest = np.array([n for n, q in enumerate(questions) if q.task == "recall" and n not in set(asked.tolist())])
    assert len(asked) > 500
    spread = letters.std() * (1 / len(asked) + 1 / len(rest)) ** 0.5
    assert abs(letters[asked].mean() - letters[rest].mean()) < 4 * spread


def test_parts_of_a_split_have_no_fact_and_no_sum_in_common_and_a_quarter_is_reserved():
    made = small_world()
    for task, width, known in (("recall", 3, 50), ("sum", 4, 144)):
        parts = [made.questions(3000, generator(3), [task], share=(k, 3)) for k in range(3)]
        asked = [{tuple(q.prompt[1 : 1 + width]) for q in part} for part in parts]
        assert sum(map(len, asked)) == len(set.union(*asked)) == known
    falls = [0, 0, 0]
    for seed in range(90):
        many = world.World(50, 12, 0, generator(seed))
        often = {tuple(world.LETTER + letter for letter in key) for key in many.keys[:1]}
        for part in range(3):
            asked = {tuple(q.prompt[1:4]) for q in many.questions(60, generator(seed), ["recall"], share=(part, 3))}
            falls[part] += bool(asked & often)
    # which part has the key that is asked for most is a matter of lot: 30 each, with a standard deviation of 4.5
    assert sum(falls) == 90
    assert max(abs(count - 30) for count in falls) < 16
    questions = made.questions(6000, generator(4))
    for task in world.TASKS:
        kept = [world.reserved(question) for question in questions if question.task == task]
        assert 0.2 < sum(kept) / len(kept) < 0.3
    assert [world.reserved(q) for q in questions] == [world.reserved(q) for q in made.questions(6000, generator(4))]


def test_packed_batches_teach_the_answers_alone_and_keep_questions_apart():
    made = small_world(20)
    questions = made.questions(50, generator(1))
    batches = world.training_batches(questions, 4, 48)
    whole = iter(questions)
    model = tiny_model("llama")
    for batch in batches:
        total, count = 0.0, 0
        for ids, labels, positions in zip(*(batch[name].tolist() for name in batch), strict=True):
            starts = [n for n, place in enumerate(positions) if place == 0 and ids[n] != world.PAD]
            for start in starts:
                question = next(whole)
                length = len(question.prompt) + len(question.answer)
                assert ids[start : start + length] == question.prompt + question.answer
                assert labels[start : start + length] == [-100] * len(question.prompt) + question.answer
                assert positions[start : start + length] == list(range(length))
                with torch.no_grad():
                    logits = model(torch.tensor([ids[start : start + length]])).logits[0].log_softmax(-1)
                for place in range(len(question.prompt), length):
                    total -= float(logits[place - 1, ids[start + place]])
                    count += 1
        with torch.no_grad():
            loss = world.answer_loss(model, batch)
        assert int(loss.weight) == count
        assert float(loss.total) == pytest.approx(total, rel=1e-4)
    with pytest.raises(ValueError, match="does not fit into rows of 4"):
        world.training_batches(questions, 4, 4)
    with pytest.raises(ValueError, match="and a batch has 4"):
        world.training_batches(questions[:3], 4, 48)


def test_bad_requests_are_refused_with_a_reason():
    for sizes, reason in (
        ((0, 12, 24), "facts must lie"), ((26**3 + 1, 12, 24), "facts must lie"), ((50, 1, 24), "terms must lie"),
        ((50, 51, 24), "terms must lie"), ((50, 12, 26), "longest must lie"), ((50, 12, -1), "longest must lie"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=reason):
            small_world(*sizes)
    with pytest.raises(ValueError, match="tasks must be"):
        small_world().questions(3, generator(), ["sing"])
    for share in ((2, 2), (-1, 3), (0, 51)):
        with pytest.raises(ValueError, match="share must be"):
            small_world().questions(3, generator(), share=share)


@pytest.mark.parametrize(
    ("small", "large", "reason"),
    [
        ([0.5, 0.6], [0.9, 0.95], None),
        ([0.5, 0.5], [0.7, 0.7], "the large model is right in 70.0 %, not in 85 to 100 %"),
        ([0.2, 0.3], [0.9, 0.9], "the small model is right in 25.0 %, not in 40 to 80 %"),
        ([0.7, 0.8], [0.85, 0.89], "the large model is 12.0 points better"),
        ([0.8, 0.4], [0.9, 0.9], "the small model's accuracy differs by 40.0 points between short and long"),
        ([0.5, 0.6], [1.0, 0.8], "the large model's accuracy differs by 20.0 points between short and long"),
    ],
)
def test_a_pair_that_cannot_test_the_claims_is_refused(small, large, reason):
    """Right answers in these shares of 500 questions without letters and of 500 with the most of them."""
    questions = [
        world.Question(world.TASKS[n % 3], [1], [40 + n % 7] * (2 if half == 0 else 20), 0 if half == 0 else 24)
        for half in range(2)
        for n in range(500)
    ]

    def answered(shares):
        right = [n < round(500 * share) for share in shares for n in range(500)]
        tokens = [q.answer if good else [9] * len(q.answer) for q, good in zip(questions, right, strict=True)]
        log_probs = [torch.zeros(len(ids)) for ids in tokens]
        return Records(tokens, log_probs, torch.zeros(1000, 1), torch.ones(1000))

    limits = {name: experiment.SCALES["small"][name] for name in ("accuracy", "least_gain", "length_effect")}
    trial = Trial("cascades", "small", 0, limits)
    part = experiment.Part(questions, answered(small), answered(large))
    if reason is None:
        experiment._check_pair(trial, part)
        assert trial.notes["accuracy of the small model, all, %"] == 55.0
        assert trial.notes["correlation of being right and length, small model"] == pytest.approx(0.1, abs=0.005)
    else:
        with pytest.raises(PreconditionFailed, match=reason):
            experiment._check_pair(trial, part)
