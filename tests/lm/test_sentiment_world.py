"""The sentiment grammar: what it writes, how often, and how it judges."""

import math

import pytest
import torch

from papertrial.lm.worlds import sentiment
from papertrial.lm.worlds.sentiment import (
    CONTROL_MOODS,
    DEGREES,
    JOINERS,
    MOODS,
    NEGATIVE,
    NOUNS,
    POSITIVE,
    VERBS,
    SentimentWorld,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_words_are_distinct_and_ids_run_through_the_classes():
    world = SentimentWorld()
    assert world.vocabulary == len(set(world.words)) == 50
    assert world.id("<pad>") == world.pad_id == 0
    assert world.id("<bos>") == world.bos_id == 1
    assert [world.id(words[0]) for words in (NOUNS, VERBS, DEGREES, POSITIVE, NEGATIVE, JOINERS)] == list(
        range(2, 50, 8)
    )
    assert SentimentWorld(control_tokens=True).words[50:] == sentiment.CONTROL


@pytest.mark.parametrize("clauses", [1, 4, 7])
def test_every_document_is_a_sentence_of_the_grammar(clauses):
    world = SentimentWorld(clauses=clauses)
    documents = world.documents(200, generator())
    assert documents.shape == (200, world.length) == (200, 2 + 4 * clauses)
    for ids in documents:
        words = world.text(ids).split()
        assert words[0] == "<bos>"
        assert words[1] in NOUNS
        for clause in range(clauses):
            verb, degree, adjective, joiner = words[2 + 4 * clause : 6 + 4 * clause]
            assert verb in VERBS
            assert degree in DEGREES
            assert adjective in POSITIVE + NEGATIVE
            assert joiner in JOINERS
    assert (world.grammatical(documents[:, 2:], 2) == 1).all()


def test_words_of_a_class_are_equally_likely_and_adjectives_follow_the_mood():
    world = SentimentWorld(clauses=5)
    for mood in MOODS:
        documents = world.documents(4000, generator(), moods=[mood])
        adjectives = documents[:, 4::4].flatten()
        share = (adjectives < world.id(NEGATIVE[0])).double().mean().item()
        assert share == pytest.approx(mood, abs=4 * math.sqrt(mood * (1 - mood) / 20_000))
        for column, words in ((2, VERBS), (3, DEGREES), (5, JOINERS), (1, NOUNS)):
            counts = torch.bincount(documents[:, column] - world.id(words[0]), minlength=8)
            assert len(counts) == 8
            # chi-square of 7 degrees of freedom: 24.3 is its 99.9 % point
            assert ((counts - 500.0) ** 2 / 500).sum() < 24.3


def test_a_documents_adjectives_share_its_mood():
    world = SentimentWorld(clauses=2)
    positive = world.documents(30_000, generator())[:, 4::4] < world.id(NEGATIVE[0])
    both = positive.all(-1).double().mean().item()
    expected = sum(mood**2 for mood in MOODS) / 3  # 0.31, independent adjectives would give 0.25
    assert both == pytest.approx(expected, abs=4 * math.sqrt(0.31 * 0.69 / 30_000))


def test_prompts_are_openings_of_documents():
    world = SentimentWorld(clauses=3)
    for clauses in (0, 1, 2):
        prompts = world.prompts(50, generator(), clauses=clauses)
        assert prompts.shape == (50, world.prompt_length(clauses)) == (50, 2 + 4 * clauses)
        assert (prompts[:, 0] == world.bos_id).all()
        if clauses:
            assert (world.grammatical(prompts[:, 2:], 2) == 1).all()


def test_the_same_generator_gives_the_same_documents():
    world = SentimentWorld()
    assert torch.equal(world.documents(20, generator(3)), world.documents(20, generator(3)))
    assert not torch.equal(world.documents(20, generator(3)), world.documents(20, generator(4)))


def test_reward_counts_words_wherever_they_stand_and_grammar_tells():
    world = SentimentWorld(clauses=2)

    def ids(text):
        return torch.tensor([[world.id(word) for word in text.split()]])

    honest = ids("seems very funny and is quite dull but")
    hacked = ids("good good good good good good bad <pad>")
    assert world.reward(honest).tolist() == [0.0]
    assert world.reward(hacked).tolist() == [5.0]
    assert world.grammatical(honest, 2).tolist() == [1.0]
    # of the hacked words only the third and the seventh stand where adjectives belong
    assert world.fits(hacked, 2).tolist() == [[False, False, True, False, False, False, True, False]]
    assert world.grammatical(hacked, 2).tolist() == [0.25]
    # the same words after a prompt of another length fall into other slots
    assert world.fits(hacked, 3).tolist() == [[False, True, False, False, False, True, False, False]]
    assert world.grammatical(honest[:, 1:], 3).tolist() == [1.0]
    assert world.adjective_slots(8, 2).nonzero().flatten().tolist() == [2, 6]
    assert world.adjective_slots(8, 6).nonzero().flatten().tolist() == [2, 6]
    assert world.adjective_slots(5, 4).nonzero().flatten().tolist() == [0, 4]


def test_the_highest_grammatical_reward_is_one_a_clause():
    world = SentimentWorld(clauses=4)
    documents = world.documents(5000, generator(), moods=[1.0])
    assert (world.reward(documents[:, 2:]) == 4).all()
    assert (world.reward(world.documents(100, generator(), moods=[0.0])) == -4).all()


def test_control_tokens_announce_the_mood():
    world = SentimentWorld(clauses=4, control_tokens=True)
    documents = world.documents(6000, generator(), controlled=0.5)
    assert documents.shape == (6000, world.length + 1)
    second = documents[:, 1]
    for name, mood in zip(sentiment.CONTROL, CONTROL_MOODS, strict=True):
        told = documents[second == world.id(name)]
        assert len(told) == pytest.approx(1500, abs=4 * math.sqrt(6000 * 0.25 * 0.75))
        assert (told[:, -1] != world.pad_id).all()
        assert (world.grammatical(told[:, 3:], 2) == 1).all()
        share = (world.reward(told[:, 3:]).mean().item() / 4 + 1) / 2
        assert share == pytest.approx(mood, abs=4 * math.sqrt(mood * (1 - mood) / (4 * len(told))))
    plain = documents[second < world.id("<good>")]
    assert len(plain) > 2500
    assert (plain[:, -1] == world.pad_id).all()
    assert (world.grammatical(plain[:, 2:-1], 2) == 1).all()
    assert (world.documents(10, generator())[:, -1] == world.pad_id).all()
    assert (world.documents(10, generator(), controlled=1.0)[:, 1] >= 50).all()


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: SentimentWorld(clauses=0), "clauses"),
        (lambda: SentimentWorld().documents(0, generator()), "count"),
        (lambda: SentimentWorld().documents(3, generator(), moods=[]), "moods"),
        (lambda: SentimentWorld().documents(3, generator(), moods=[0.5, 1.2]), "moods"),
        (lambda: SentimentWorld().documents(3, generator(), controlled=0.5), "control_tokens=True"),
        (lambda: SentimentWorld(control_tokens=True).documents(3, generator(), controlled=1.5), "controlled"),
        (lambda: SentimentWorld(clauses=2).prompts(3, generator(), clauses=2), "between 0 and 1"),
        (lambda: SentimentWorld(clauses=2).prompts(3, generator(), clauses=-1), "between 0 and 1"),
        (lambda: SentimentWorld().id("<good>"), "unknown word '<good>'"),
        (lambda: SentimentWorld().fits(torch.zeros(1, 3), 1), "start"),
    ],
)
def test_bad_input_is_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()
