"""The world of recall: every question has its fact, the filler is the chain it says, and nothing else stands there."""

from itertools import pairwise

import pytest
import torch

from papertrial.lm.worlds.recall import BOS, RecallWorld


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def world() -> RecallWorld:
    return RecallWorld.draw(generator(), filler=7, keys=9, values=4, concentration=1.5)


def kinds(world: RecallWorld) -> dict[str, range]:
    """The ids of each kind of token."""
    facts = 1 + world.filler
    questions = facts + world.keys * world.values
    answers = questions + world.keys
    return {
        "filler": range(1, facts),
        "fact": range(facts, questions),
        "question": range(questions, answers),
        "answer": range(answers, answers + world.values),
    }


def test_ids_of_all_kinds_fill_the_vocabulary_without_overlap(world):
    key, value = torch.arange(world.keys), torch.arange(world.values)
    ids = torch.cat([
        torch.tensor([BOS]),
        world.word(torch.arange(world.filler)),
        world.fact(key[:, None], value).flatten(),
        world.question(key),
        world.answer(value),
    ])  # fmt: skip
    assert ids.tolist() == list(range(world.vocabulary))


@pytest.mark.parametrize("questions", [0, 3, 5, 12])
def test_every_question_is_answered_as_an_earlier_fact_says(world, questions):
    batch = world.sample(200, generator(1), length=40, facts=5, questions=questions, fact_share=0.3)
    kind = kinds(world)
    assert batch.ids.shape == batch.answers.shape == (200, 40)
    for row, answers in zip(batch.ids.tolist(), batch.answers.tolist(), strict=True):
        assert row[0] == BOS
        places = [i for i, token in enumerate(row) if token in kind["fact"]]
        said = dict(divmod(row[i] - kind["fact"].start, world.values) for i in places)
        assert len(said) == len(places) == 5
        assert 1 <= min(places) <= max(places) < 12
        asked = [i for i, token in enumerate(row) if token in kind["question"]]
        assert len(asked) == questions
        assert [i + 1 for i in asked] == [i for i, answer in enumerate(answers) if answer]
        for i in asked:
            assert i >= 12
            assert row[i + 1] - kind["answer"].start == said[row[i] - kind["question"].start]
        assert sum(token in kind["answer"] for token in row) == questions
        counts = [sum(row[i] - kind["question"].start == k for i in asked) for k in said]
        assert max(counts) - min(counts) <= 1  # none again before all were


def test_scattered_facts_are_each_asked_about_once_and_later(world):
    batch = world.sample(300, generator(8), length=26, facts=8)
    kind = kinds(world)
    for row, answers in zip(batch.ids.tolist(), batch.answers.tolist(), strict=True):
        assert row[0] == BOS
        said = {}
        asked = []
        for i, token in enumerate(row):
            if token in kind["fact"]:
                key, value = divmod(token - kind["fact"].start, world.values)
                assert key not in said
                said[key] = value
            elif token in kind["question"]:
                asked.append(token - kind["question"].start)
                assert row[i + 1] - kind["answer"].start == said[asked[-1]]
                assert answers[i + 1]
        assert sorted(asked) == sorted(said)
        assert len(said) == sum(answers) == 8
        assert sum(token in kind["filler"] for token in row) == 26 - 1 - 24


def test_scattered_places_are_all_orders_of_events_alike(world):
    # one fact and its question among two fillers: (4 units choose 2) arrangements, each as likely as the others
    batch = world.sample(12000, generator(9), length=6, facts=1, questions=1)
    kind = kinds(world)
    counts: dict[tuple[str, ...], int] = {}
    for row in batch.ids.tolist():
        names = tuple(next(name for name, ids in kind.items() if token in ids) for token in row[1:])
        counts[names] = counts.get(names, 0) + 1
    assert len(counts) == 6
    assert all(abs(n / 12000 - 1 / 6) < 5 * (5 / 36 / 12000) ** 0.5 for n in counts.values())


def test_filler_follows_the_chain_across_interruptions(world):
    batch = world.sample(3000, generator(2), length=30, facts=4, questions=4, fact_share=0.3)
    filler = kinds(world)["filler"]
    counts = torch.zeros(world.filler, world.filler)
    for row in batch.ids.tolist():
        states = [token - filler.start for token in row if token in filler]
        assert len(states) == 30 - 1 - 4 - 8
        for one, next_one in pairwise(states):
            counts[one, next_one] += 1
    total = counts.sum(1, keepdim=True)
    # five standard errors of the proportion
    assert bool(((counts / total - world.transitions).abs() < 5 * (0.25 / total).sqrt()).all())


def test_facts_and_questions_stand_at_all_places_of_their_part_alike(world):
    batch = world.sample(8000, generator(3), length=24, facts=2, questions=1, fact_share=0.5)
    facts = (batch.ids >= kinds(world)["fact"].start) & (batch.ids < kinds(world)["question"].start)
    expected = torch.zeros(24)
    expected[1:12] = 2 / 11
    assert torch.allclose(facts.float().mean(0), expected, atol=5 * (0.25 / 8000) ** 0.5)
    answers = torch.zeros(24)
    answers[13:] = 1 / 11
    assert torch.allclose(batch.answers.float().mean(0), answers, atol=5 * (0.25 / 8000) ** 0.5)


def test_concentration_zero_is_uniform_filler_and_more_is_less_random():
    entropy = []
    for concentration in (0.0, 1.0, 3.0):
        rows = RecallWorld.draw(generator(4), filler=16, concentration=concentration).transitions
        entropy.append(float(-(rows * rows.log()).sum(1).mean()))
    assert entropy[0] == pytest.approx(torch.tensor(16.0).log().item())
    assert entropy[0] > entropy[1] > entropy[2]


def test_same_generator_same_sequences(world):
    one, other = (world.sample(5, generator(6)) for _ in range(2))
    assert torch.equal(one.ids, other.ids)
    assert not torch.equal(one.ids, world.sample(5, generator(7)).ids)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"count": 0}, "count"),
        ({"facts": 10}, "facts must lie in 1..9"),
        ({"questions": -1}, "questions must not be negative"),
        ({"questions": 3}, "once each"),
        ({"length": 12}, "do not fit into 12 places"),
        ({"length": 16, "fact_share": 0.25}, "first 4 places"),
        ({"questions": 25, "fact_share": 0.25}, "25 questions"),
        ({"fact_share": 1.0}, "fact_share"),
    ],
)
def test_impossible_sequences_are_refused(world, arguments, says):
    with pytest.raises(ValueError, match=says):
        world.sample(**{"count": 2, "generator": generator(), "facts": 4, "questions": 4, **arguments})


def test_impossible_worlds_are_refused():
    with pytest.raises(ValueError, match="keys and values"):
        RecallWorld.draw(generator(), keys=0)
    with pytest.raises(ValueError, match="filler"):
        RecallWorld.draw(generator(), filler=0)
    with pytest.raises(ValueError, match="rows of probabilities"):
        RecallWorld(torch.ones(3, 3))
    with pytest.raises(ValueError, match=r"\(F, F\)"):
        RecallWorld(torch.ones(3, 2))
