"""In-context navigation against plain loops over the model, and its edges."""

import math

import numpy as np
import pytest
import torch

from families import CORE, DECODERS, tiny_model, tiny_tokenizer
from papertrial.papers.decoding.in_context_navigation.method import (
    InContextNavigator,
    KeyReport,
    accuracy_at_k,
    answer_prompt,
    cluster_keys,
    explored_key_similarity,
    explored_mass,
    key_weight,
    map_at_k,
    navigate_cot,
    numbered_list,
    rank_adjusted_accuracy,
    regrouped,
    spurious_key_report,
    ways_list,
)
from papertrial.papers.decoding.in_context_navigation.method.navigation import NOTHING


def short_list(instruction, explored):
    """A prompt that fits into a tiny model's context."""
    return instruction + "".join(f" {text[:2]}" for text in explored) + " a"


def navigator(model, tokenizer, **options):
    return InContextNavigator(
        model, tokenizer, short_list, **{"n_runs": 3, "per_run": 2, "stop": "e", "max_answer_tokens": 5, **options}
    )


@torch.no_grad()
def next_scores(model, tokenizer, text):
    ids = torch.tensor([tokenizer(text).input_ids])
    return model(input_ids=ids).logits[0, -1, : len(tokenizer)].float()


@torch.no_grad()
def completed(model, tokenizer, text, token, stop, most):
    """The answer by full passes, one token at a time."""
    ids, said = [*tokenizer(text).input_ids, token], [token]
    while stop not in tokenizer.decode(said[-1:]) and said[-1] != tokenizer.eos_token_id:
        if len(said) == most:
            return NOTHING
        said.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1, : len(tokenizer)].argmax()))
        ids = [*ids, said[-1]]
    return tokenizer.decode(said, skip_special_tokens=True).split(stop)[0]


# -- the navigator --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("complete_from", ["original", "navigated"])
def test_navigation_equals_a_plain_loop(family, complete_from):
    model, tokenizer = tiny_model(family), tiny_tokenizer()
    found = navigator(model, tokenizer, complete_from=complete_from).run("the")
    expected, probed, explored = [], set(), []
    for run in range(3):
        prompt = short_list("the", explored)
        order = next_scores(model, tokenizer, prompt).argsort(descending=True, stable=True).tolist()
        taken = [token for token in order if token not in probed][:2]
        start = short_list("the", []) if complete_from == "original" else prompt
        for token in taken:
            probed.add(token)
            text = completed(model, tokenizer, start, token, "e", 5)
            expected.append((token, text, run, order.index(token) + 1))
        explored += [text for _, text, r, _ in expected if r == run]
    assert [(one.token_id, one.text, one.run, one.rank) for one in found] == expected
    assert [one.finished for one in found] == [text != NOTHING for _, text, _, _ in expected]


@pytest.mark.parametrize("family", CORE)
def test_one_run_is_the_baseline_and_completion_matters_later_only(family):
    model, tokenizer = tiny_model(family), tiny_tokenizer()
    order = next_scores(model, tokenizer, short_list("the", [])).argsort(descending=True).tolist()
    single = navigator(model, tokenizer, n_runs=1, per_run=6).run("the")
    assert [one.token_id for one in single] == order[:6]
    assert [one.rank for one in single] == [1, 2, 3, 4, 5, 6]
    both = [navigator(model, tokenizer, complete_from=where).run("the") for where in ("original", "navigated")]
    assert both[0][:2] == both[1][:2]
    assert len({one.token_id for one in both[0]}) == len(both[0]) == 6


def test_instructions_side_by_side_give_what_they_give_alone():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    instructions = ["the", "the cat and the", "a dog"]
    together = navigator(model, tokenizer).run_batch(instructions)
    assert together == [navigator(model, tokenizer).run(text) for text in instructions]


def test_the_list_ends_with_the_vocabulary():
    model, tokenizer = tiny_model("llama", max_position_embeddings=256), tiny_tokenizer()
    many = navigator(
        model, tokenizer, n_runs=2, per_run=len(tokenizer) - 3, stop=None, max_answer_tokens=1,
    )  # fmt: skip
    found = many.run("a")
    assert sorted(one.token_id for one in found) == list(range(len(tokenizer)))
    assert [one.run for one in found].count(1) == 3


def test_prompts_are_as_described():
    assert numbered_list("Name leagues.", []) == 'Name leagues.\n\nAnswer:\n1. "'
    assert numbered_list("Name leagues.", ["NBA", "NFL"]) == 'Name leagues.\n\nAnswer:\n1. "NBA"\n2. "NFL"\n3. "'
    text = ways_list("1 + 1?", ["add"])
    assert text.endswith("### Way 1:\n* **Step 1:**\nadd\n### Way 2:\n* **Step 1:**\n")
    # the answer is asked for under the same request, in a form that is named, with the way but without its heading
    asked = text.split("###")[0]
    assert asked.startswith("1 + 1?\n\n")
    assert answer_prompt("1 + 1?", "add \n").startswith(f"{asked}* **Step 1:**\nadd\n**Final Answer (digits")
    assert answer_prompt("1 + 1?", "add", cue='(A or B): "').endswith('\nadd\n(A or B): "')


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"n_runs": 0}, "n_runs"),
        ({"per_run": 0}, "per_run"),
        ({"complete_from": "elsewhere"}, "complete_from"),
        ({"stop": "end"}, "one character"),
        ({"max_answer_tokens": 0}, "max_tokens"),
    ],
)
def test_bad_options_are_named(options, says):
    with pytest.raises(ValueError, match=says):
        navigator(tiny_model("gpt2"), tiny_tokenizer(), **options)


def test_a_template_that_forgets_is_refused():
    forgetful = InContextNavigator(tiny_model("gpt2"), tiny_tokenizer(), lambda text, explored: text)
    with pytest.raises(ValueError, match="ignores the explored"):
        forgetful.run("the")
    with pytest.raises(ValueError, match="empty"):
        forgetful.run_batch([])


# -- keys -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", DECODERS)
def test_scores_are_products_of_one_query_with_fixed_keys(family):
    model, tokenizer = tiny_model(family), tiny_tokenizer()
    states = []
    handle = model.get_decoder().register_forward_hook(lambda _m, _a, out: states.append(out.last_hidden_state))
    logits = next_scores(model, tokenizer, "the cat")
    handle.remove()
    products = key_weight(model)[: len(tokenizer)] @ states[0][0, -1]
    bias = getattr(model.get_output_embeddings(), "bias", None)
    cap = getattr(model.config, "final_logit_softcapping", None)
    products = products if bias is None else products + bias[: len(tokenizer)]
    products = products if cap is None else cap * torch.tanh(products / cap)
    assert torch.allclose(products, logits, atol=1e-5)
    _, score = explored_key_similarity(model, tokenizer, ["the cat"], [[5]])
    assert score[0] == pytest.approx((key_weight(model)[5] @ states[0][0, -1]).item(), abs=1e-5)


def test_keys_that_are_near_get_scores_that_are_near():
    generator = torch.Generator().manual_seed(0)
    keys, queries = torch.randn(50, 8, generator=generator), torch.randn(20, 8, generator=generator)
    logits = queries @ keys.T
    gaps = (logits[:, :, None] - logits[:, None, :]).abs()
    bound = queries.norm(dim=-1)[:, None, None] * torch.cdist(keys, keys)
    assert (gaps <= bound + 1e-4).all()


def test_clusters_find_what_is_apart():
    generator = torch.Generator().manual_seed(0)
    centres = 20 * torch.eye(4, 6)
    keys = centres.repeat_interleave(10, 0) + 0.1 * torch.randn(40, 6, generator=generator)
    found = cluster_keys(keys, 4)
    groups = found.ids.view(4, 10)
    assert (groups == groups[:, :1]).all()
    assert len(set(groups[:, 0].tolist())) == 4
    assert torch.allclose(found.centers[groups[:, 0]], keys.view(4, 10, 6).mean(1), atol=0.1)
    assert cluster_keys(keys, 4, seed=3).ids.tolist() == cluster_keys(keys, 4, seed=3).ids.tolist()


@pytest.mark.parametrize(("keys", "n"), [(torch.ones(5, 2), 6), (torch.ones(5, 2), 0), (torch.ones(5), 1)])
def test_impossible_clusters_are_refused(keys, n):
    with pytest.raises(ValueError, match=r"keys"):
        cluster_keys(keys, n)


def test_keys_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        cluster_keys(torch.full((5, 2), math.nan), 2)


def test_report_splits_the_ranks_after_k_by_cluster():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    clusters = cluster_keys(model, 8)
    options = {"n": 20, "k": 4, "template": short_list, "stop": "e", "max_answer_tokens": 4}

    def right(instruction, text):
        return len(text) % 2 == 0

    (report,) = spurious_key_report(model, tokenizer, ["the"], right, clusters, **options)
    order = next_scores(model, tokenizer, short_list("the", [])).argsort(descending=True).tolist()
    assert list(report.token_ids) == order[:20]
    main = {int(clusters.ids[token]) for token in order[:4]}
    assert report.in_main.tolist() == [int(clusters.ids[token]) in main for token in order[4:20]]
    assert report.correct.tolist() == [right("the", text) for text in report.texts]
    assert report.texts == tuple(
        completed(model, tokenizer, short_list("the", []), token, "e", 4) for token in order[:20]
    )
    assert report.share_main == pytest.approx(report.in_main.mean())
    total = report.accuracy_main * report.in_main.sum() + report.accuracy_other * (~report.in_main).sum()
    assert total == pytest.approx(report.correct[4:].sum())
    # the names of clusters do not matter
    swapped = type(clusters)(7 - clusters.ids, clusters.centers.flip(0))
    (again,) = spurious_key_report(model, tokenizer, ["the"], right, swapped, **options)
    assert again.in_main.tolist() == report.in_main.tolist()
    # answers split by other clusters are those of a report made with them
    others = cluster_keys(model, 5, seed=1)
    (expected,) = spurious_key_report(model, tokenizer, ["the"], right, others, **options)
    moved = regrouped(report, others)
    assert moved.in_main.tolist() == expected.in_main.tolist() != report.in_main.tolist()
    assert (moved.token_ids, moved.texts) == (report.token_ids, report.texts)
    with pytest.raises(ValueError, match=r"clusters are of 10 keys, the report has the token"):
        regrouped(report, cluster_keys(key_weight(model)[:10], 4))


def test_reports_name_impossible_numbers():
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer()
    clusters = cluster_keys(model, 4)
    with pytest.raises(ValueError, match="1 <= k < n"):
        spurious_key_report(model, tokenizer, ["a"], lambda *_: True, clusters, n=5, k=5)
    small = cluster_keys(key_weight(model)[:10], 4)
    with pytest.raises(ValueError, match="clusters are of"):
        spurious_key_report(model, tokenizer, ["a"], lambda *_: True, small, n=5, k=2)


def test_adjusting_for_rank_removes_what_rank_alone_explains():
    """Correctness falls with rank; main-cluster tokens stand higher. Raw shares differ, adjusted ones must not."""
    source = np.random.default_rng(0)
    reports = []
    for _ in range(400):
        ranks = np.arange(5, 61)
        in_main = source.random(56) < np.clip(1.2 - ranks / 50, 0.05, 0.95)
        correct = source.random(56) < 0.6 * np.exp(-ranks / 25)
        reports.append(KeyReport((0,) * 60, ("",) * 60, np.r_[np.ones(4, bool), correct], in_main, 4))
    raw_main = np.mean([r.correct[4:][r.in_main].mean() for r in reports])
    raw_other = np.mean([r.correct[4:][~r.in_main].mean() for r in reports])
    main, other = rank_adjusted_accuracy(reports)
    assert raw_main > raw_other + 0.1
    assert main == pytest.approx(other, abs=0.015)  # three standard errors of 22,400 draws
    effect = [
        KeyReport(r.token_ids, r.texts, r.correct & ~np.r_[np.zeros(4, bool), r.in_main], r.in_main, 4) for r in reports
    ]
    low, high = rank_adjusted_accuracy(effect)
    assert low < 0.01 < high


def test_nothing_to_compare_is_an_error():
    def report(correct, main):
        return KeyReport((0,) * 6, ("",) * 6, np.r_[True, True, correct].astype(bool), np.array(main, dtype=bool), 2)

    with pytest.raises(ValueError, match="none of the 4 tokens are correct"):
        rank_adjusted_accuracy([report([0, 0, 0, 0], [1, 0, 1, 0])])
    with pytest.raises(ValueError, match="all of the 4 tokens are in main"):
        rank_adjusted_accuracy([report([1, 0, 0, 0], [1, 1, 1, 1])])


# -- measures -------------------------------------------------------------------------------------------------------


def test_map_averages_precision_over_every_rank():
    assert map_at_k([1] * 7) == 1.0
    assert map_at_k([1, 0, 0, 0]) == pytest.approx(np.mean([1, 1 / 2, 1 / 3, 1 / 4]))
    hits = np.random.default_rng(0).integers(0, 2, 12).tolist()
    assert map_at_k(hits) == pytest.approx(np.mean([np.mean(hits[: i + 1]) for i in range(12)]))
    assert map_at_k(hits, 5) == pytest.approx(np.mean([np.mean(hits[: i + 1]) for i in range(5)]))
    assert accuracy_at_k(hits, 5) == pytest.approx(np.mean(hits[:5]))
    table = torch.tensor([hits, hits[::-1]])
    assert map_at_k(table) == pytest.approx((map_at_k(hits) + map_at_k(hits[::-1])) / 2)
    for wrong in (lambda: map_at_k([]), lambda: map_at_k([1], 2), lambda: accuracy_at_k([1], 0)):
        with pytest.raises(ValueError, match=r"hits is empty|k must lie"):
            wrong()


def test_similarity_is_a_mean_over_the_named_tokens():
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer()
    rows = [[3, 4, 9], [7]]
    cosine, score = explored_key_similarity(model, tokenizer, ["the cat", "a"], rows)
    for i, (context, row) in enumerate(zip(["the cat", "a"], rows, strict=True)):
        each = [explored_key_similarity(model, tokenizer, [context], [[token]]) for token in row]
        assert cosine[i] == pytest.approx(float(np.mean([float(c) for c, _ in each])), abs=1e-5)
        assert score[i] == pytest.approx(float(np.mean([float(s) for _, s in each])), abs=1e-5)


@pytest.mark.parametrize("measure", [explored_key_similarity, explored_mass])
def test_tokens_that_are_none_are_named(measure):
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer()
    beyond = len(key_weight(model))
    for tokens, says in (
        ([[], [1]], r"tokens\[0\] is empty"),
        ([[1]], "row for each of the 2 contexts, got 1"),
        ([[1], [2, beyond]], rf"tokens\[1\] names \[{beyond}\]"),
        ([[1], [-1]], r"tokens\[1\] names \[-1\]"),
    ):
        with pytest.raises(ValueError, match=says):
            measure(model, tokenizer, ["a", "the"], tokens)


@pytest.mark.parametrize("family", CORE)
def test_explored_mass_is_the_chance_of_any_of_the_tokens(family):
    model, tokenizer = tiny_model(family), tiny_tokenizer()
    contexts, rows = ["the cat", "a"], [[3, 4, 9, 4], [7]]
    mass = explored_mass(model, tokenizer, contexts, rows)
    for i, (context, row) in enumerate(zip(contexts, rows, strict=True)):
        chances = next_scores(model, tokenizer, context).softmax(-1)
        assert float(mass[i]) == pytest.approx(sum(float(chances[token]) for token in set(row)), abs=1e-6)


# -- reasoning ------------------------------------------------------------------------------------------------------


def ways(question, explored):
    return question + "".join(f" {text[:2]}" for text in explored) + " a"


def after_the_way(question, way):
    return f"{question} {way[:2]} the"


@pytest.mark.parametrize("navigate", [True, False])
def test_the_vote_counts_what_each_way_answers(navigate):
    model, tokenizer = tiny_model("llama", max_position_embeddings=512), tiny_tokenizer()
    vote = navigate_cot(
        model, tokenizer, "the", extract_answer=lambda text: text[:1] or None, n_paths=3, navigate=navigate,
        template=ways, max_path_tokens=3, max_answer_tokens=2, answer_template=after_the_way,
    )  # fmt: skip
    assert len(vote.votes) == len(vote.ways) == 3
    given = [one for one in vote.votes if one is not None]
    assert vote.answer == (max(dict.fromkeys(given), key=given.count) if given else None)


def test_the_answer_is_asked_for_in_the_words_that_were_passed():
    model, tokenizer = tiny_model("llama", max_position_embeddings=512), tiny_tokenizer()
    asked = []

    def record(question, way):
        asked.append((question, way))
        return after_the_way(question, way)

    vote = navigate_cot(
        model, tokenizer, "the", extract_answer=lambda text: text, n_paths=2, template=ways,
        answer_template=record, max_path_tokens=3, max_answer_tokens=1,
    )  # fmt: skip
    assert asked == [("the", way) for way in vote.ways]


def test_ties_go_to_the_first_and_silence_is_no_vote():
    model, tokenizer = tiny_model("llama", max_position_embeddings=512), tiny_tokenizer()
    told = iter(["two", None, "one", "one", "two"])
    options = {"template": ways, "max_path_tokens": 2, "max_answer_tokens": 1, "answer_template": after_the_way}
    vote = navigate_cot(model, tokenizer, "the", extract_answer=lambda _: next(told), n_paths=5, **options)
    assert vote.answer == "two"
    silent = navigate_cot(model, tokenizer, "the", extract_answer=lambda _: None, n_paths=2, **options)
    assert silent.answer is None
