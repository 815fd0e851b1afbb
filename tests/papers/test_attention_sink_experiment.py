"""The trial's own measures: no sink where nothing was learned, the right token first, a user's model by itself."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from papertrial.lab.trial import PreconditionFailed, Trial
from papertrial.lm.worlds.recall import BOS
from papertrial.papers.attention.attention_sink import experiment
from papertrial.papers.attention.attention_sink.method import (
    VARIANTS,
    SinkReport,
    measure_sinks,
    set_attention,
    uniform_importance,
)

EVEN = 100 * float(uniform_importance(experiment.SEEN)[0])


def trial(**settings):
    parameters = {name: value for name, value in experiment.SCALES["smoke"].items() if name != "seeds"}
    model = settings.pop("model", None)
    return Trial("attention_sink", "smoke", 0, parameters | settings, model=model)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seed", [0, 1])
def test_an_untrained_model_has_no_sink_by_any_measure_that_is_judged(variant, seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=64, bos_token_id=0, eos_token_id=None,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 97, (32, 64), generator=draw)
    ids[:, 0] = 0
    with set_attention(model, variant, generator=draw):
        report = measure_sinks(model, ids, kinds=("natural",))["natural"]
    found = experiment.first_token(report)
    # scores of random queries and keys: a head may happen to like bos a little, never by half as much again
    assert found["first_token_share"] < 1.5 * EVEN
    assert found["first_token_excess"] < 1.5
    assert float(report.proxy_sink[0]) == 0
    assert experiment.attention_to_first(report, variant) < 1.5 * EVEN
    if variant == "sigmoid":  # the plain weight is a half for every token, so it is not judged by itself
        assert found["first_token_weight"] > 45


def test_even_attention_has_the_measures_that_claims_compare_with():
    attn = torch.ones(64, 64).tril() / torch.arange(1, 65)[:, None]
    from papertrial.papers.attention.attention_sink.method import column_excess, column_importance, sink_metric

    found = experiment.evenly()
    assert found["first_token_share"] == pytest.approx(100 * float(column_importance(attn[None, None])[0, 0, 0]))
    assert found["first_token_weight"] == found["first_token_share"]
    assert found["first_token_excess"] == pytest.approx(float(column_excess(attn[None, None])[0, 0, 0]))
    assert found["sink@0.3"] == float(sink_metric([attn[None, None]])[0]) == 0
    assert found["sink@0.2"] == float(sink_metric([attn[None, None]], 0.2)[0]) == 0


def report_of(importance, shares):
    """Two layers of two heads and three tokens; only the first token's numbers are told apart."""

    def filled(first):
        out = torch.full((2, 2, 3), 0.1)
        out[..., 0] = torch.tensor(first)
        return out

    norms = torch.tensor([[[1.0, 2.0, 4.0]], [[0.3, 5.0, 7.0]]])  # (L, G, T)
    return SinkReport(
        sink=torch.zeros(3), proxy_sink=torch.zeros(3), importance=filled(importance),
        proxy_importance=filled(shares), excess=filled([[1.0, 2.0], [3.0, 4.0]]), row_sum=torch.ones(2, 2),
        hidden_norm=torch.tensor([[1.0, 1.0, 1.0], [8.0, 1.0, 3.0], [9.0, 9.0, 9.0]]),
        key_norm=norms, value_norm=norms, query_key_cosine=torch.arange(12.0).view(2, 2, 3),
        contribution=filled([[1.0, 1.0], [1.0, 1.0]]), contribution_excess=filled([[0.1, 0.2], [0.3, 0.4]]),
    )  # fmt: skip


def test_sigmoid_is_judged_by_shares_and_everything_else_by_weights():
    report = report_of([[0.5, 0.5], [0.5, 0.6]], [[0.1, 0.2], [0.1, 0.1]])
    assert experiment.attention_to_first(report, "sigmoid") == pytest.approx(20)
    for variant in ("softmax", "sigmoid_norm", "k_bias"):
        assert experiment.attention_to_first(report, variant) == pytest.approx(60)
    assert experiment.first_token(report) == pytest.approx(
        {"first_token_share": 20, "first_token_weight": 60, "first_token_excess": 4}
    )


def test_inside_looks_at_the_head_with_the_largest_share_its_values_and_what_it_reads():
    # layer 1, head 0 has the largest share; its block reads row 1 of the residual stream, its values are group 0's
    found = experiment.inside(report_of([[0.5, 0.5], [0.2, 0.6]], [[0.1, 0.2], [0.7, 0.1]]))
    assert found["first_token_contribution"] == pytest.approx(0.3)
    assert found["value_norm_ratio"] == pytest.approx(0.3 / 6)
    assert found["hidden_norm_ratio"] == pytest.approx(8 / 2)
    assert found["query_key_cosine"] == pytest.approx((7 + 8) / 2)


def test_without_bos_the_same_sequences_begin_one_token_later():
    data = experiment.recall(trial())
    bos, without = data[True], data[False]
    assert bool((bos.judged[:, 0] == BOS).all())
    assert not bool((without.judged == BOS).any())
    assert torch.equal(bos.judged[:, 1:], without.judged[:, :-1])
    assert torch.equal(bos.answers[:, 1:], without.answers[:, :-1])
    assert torch.equal(bos.batches[..., 1:], without.batches[..., :-1])
    assert bos.judged.shape == without.judged.shape == (8, 64)
    assert bos.batches.shape == without.batches.shape == (6, 4, 64)
    # an answer follows its question, so that predicting it is what `answers` counts
    questions = data[True].judged[:, :-1][data[True].answers[:, 1:]]
    assert len(questions) > 0
    assert bool((questions >= 1 + 8 + 8 * 4).all())
    assert bool((questions < 1 + 8 + 8 * 4 + 8).all())


def test_a_model_of_the_users_is_measured_by_the_papers_metric_and_nothing_is_trained(monkeypatch):
    def no_training(*args, **kwargs):
        raise AssertionError("a toy model was trained for a run about a checkpoint")

    monkeypatch.setattr(experiment, "trained", no_training)
    asked = trial(model="house:code")
    with pytest.raises(PreconditionFailed) as failed:
        experiment.run(asked)
    checkpoint = asked.checkpoint("house:prose")
    assert checkpoint.name == "house:code"
    ids = experiment.openings(checkpoint, asked["surveyed"])
    expected = measure_sinks(checkpoint.model, ids, kinds=("natural",))["natural"]
    assert asked.notes["checkpoint_natural: sink@0.3"] == expected.first
    assert asked.notes["checkpoint_natural: first_token_share"] == 100 * expected.first_proxy_importance
    kinds = ("natural", "random", "repeat")
    sinks = ", ".join(f"{asked.notes[f'checkpoint_{kind}: sink@0.3']:.1f}" for kind in kinds)
    assert f"house:code on natural, random and repeated tokens: Sink_1 at 0.3 is {sinks} %" in str(failed.value)
    (figure,) = asked.figures
    assert figure["series"]["checkpoint: Sink_1 at 0.3"][0] == pytest.approx(expected.first)
