"""The trial of in-context navigation: what is clustered, what is learned, and when it decides nothing."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from papertrial.lab.trial import PreconditionFailed, Trial
from papertrial.lm.worlds.categories import CategoryWorld
from papertrial.papers.decoding.in_context_navigation import experiment
from papertrial.papers.decoding.in_context_navigation.method import Exploration


@pytest.fixture(scope="module")
def world() -> CategoryWorld:
    return CategoryWorld.draw(torch.Generator().manual_seed(0), categories=30, answers=6, styles=4, per_style=10)


def trial(**changes) -> Trial:
    smoke = {key: value for key, value in experiment.SCALES["smoke"].items() if key != "seeds"}
    return Trial("in_context_navigation", "smoke", 0, {**smoke, "steps": 5, **changes})


def decoder(world: CategoryWorld) -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(vocab_size=len(world.words), pad_token_id=0, **sizes)).eval()


def test_only_members_share_the_clusters_of_styles(world):
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(len(world.words), 8, generator=generator)
    keys[: world.first_entity] *= 100  # words that are no answers lie far apart and would take every cluster
    keys[world.first_entity :] = 20 * torch.eye(4, 8).repeat_interleave(10, 0) + 0.1 * keys[world.first_entity :]
    ids = experiment.member_clusters(keys, world, seed=0).ids
    groups = ids[world.first_entity :].view(4, 10)
    assert (groups == groups[:, :1]).all()
    assert sorted(groups[:, 0].tolist()) == [0, 1, 2, 3]
    assert (ids[: world.first_entity] == 4).all()


def test_only_members_carry_loss(world):
    model = decoder(world)
    ids = next(world.documents(6, torch.Generator().manual_seed(1)))
    found = experiment.member_loss(model, ids, world.first_entity)
    chances = model(input_ids=ids).logits.detach().log_softmax(-1)
    expected = [
        -float(chances[row, place - 1, ids[row, place]])
        for row in range(6)
        for place in range(1, ids.shape[1])
        if ids[row, place] >= world.first_entity
    ]
    assert int(found.weight) == len(expected)
    assert float(found.total.detach()) == pytest.approx(sum(expected), rel=1e-4)


def test_the_share_that_listed_answers_keep_is_a_ratio_of_probabilities(world):
    model, tokenizer = decoder(world), world.tokenizer()
    answers = [Exploration(world.first_entity + e, f"e{e}", 0, 1, True) for e in (3, 8, 9, 11, 20)]
    metrics = {"single_context": {}, "icn": {}}
    kept = experiment.repetition(
        trial(), model, tokenizer, lambda c, named: world.prompt(int(c), named), ["2"], [answers], metrics
    )
    first = [one.token_id for one in answers[:4]]  # as many as make the main clusters

    def mass(prompt: str) -> float:
        ids = torch.tensor([tokenizer(prompt).input_ids])
        return float(model(input_ids=ids).logits.detach()[0, -1].softmax(-1)[first].sum())

    before, after = mass(world.prompt(2)), mass(world.prompt(2, ["e3", "e8", "e9", "e11"]))
    assert kept == pytest.approx(after / before, rel=1e-4)
    assert metrics["single_context"]["listed_mass"] == pytest.approx(100 * before, rel=1e-4)
    assert metrics["icn"]["listed_mass"] == pytest.approx(100 * after, rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"most_kept": 0.2}, "repeats what its prompt lists"), ({"least_accuracy": 1.0}, "knows too little")],
)
def test_a_decoder_that_cannot_show_the_effect_decides_nothing(changes, says):
    """After five steps a decoder knows no members, and listing some hardly changes what comes next."""
    attempt = trial(**changes)
    with pytest.raises(PreconditionFailed, match=says):
        experiment.run(attempt)
    assert attempt.notes["probability left to listed answers, %"] > 20
    assert attempt.figures
