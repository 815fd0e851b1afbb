"""In-context navigation on trial: a small decoder learns categories of single-token members, then lists are probed.

Membership has nothing to do with style, but style is what the output layer's keys cluster by, and there are many more
members than key dimensions. Both ways of probing check the same number of answers, all judged exactly. How many
categories there are was set so that the baseline is right about half of the time, by looking at the baseline alone.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from papertrial.lab.trial import Metrics, Trial
from papertrial.lm.schedules import warmup_cosine
from papertrial.lm.training import adamw, train
from papertrial.lm.worlds.categories import CategoryWorld
from papertrial.papers.decoding.in_context_navigation.method import (
    Exploration,
    InContextNavigator,
    KeyReport,
    accuracy_at_k,
    cluster_keys,
    explored_key_similarity,
    map_at_k,
    rank_adjusted_accuracy,
    spurious_key_report,
)

SCALES: dict[str, dict[str, Any]] = {
    "smoke": {
        "seeds": 1,
        "world": {"categories": 12, "answers": 12, "styles": 4, "per_style": 10}, "facts": 0.7,
        "width": 16, "layers": 1, "heads": 2, "length": 32, "batch": 8, "steps": 60, "lr": 1e-2,
        "checked": 12, "judged": 40, "top": 4, "clusters": 24, "least_accuracy": 0.0,
    },
    "small": {
        "seeds": 5,
        "world": {"categories": 800, "answers": 12, "styles": 16, "per_style": 10}, "facts": 0.7,
        "width": 24, "layers": 3, "heads": 2, "length": 64, "batch": 16, "steps": 3000, "lr": 5e-3,
        "checked": 12, "judged": 60, "top": 4, "clusters": 20, "least_accuracy": 0.3,
    },
    "gpu": {
        "seeds": 5,
        "world": {"categories": 8000, "answers": 12, "styles": 32, "per_style": 40}, "facts": 0.7,
        "width": 64, "layers": 6, "heads": 2, "length": 256, "batch": 64, "steps": 8000, "lr": 3e-3,
        "checked": 12, "judged": 60, "top": 4, "clusters": 40, "least_accuracy": 0.3,
    },
}  # fmt: skip


def run(trial: Trial) -> Metrics:
    """Train the decoder of one seed, then probe every category in each way."""
    world = CategoryWorld.draw(trial.generator("world"), **trial["world"])
    model = trained(trial, world)
    tokenizer = world.tokenizer()
    categories = [str(category) for category in range(len(world.members))]

    def template(category: str, explored: Sequence[str]) -> str:
        return world.prompt(int(category), explored)

    def is_correct(category: str, answer: str) -> bool:
        return world.is_member(int(category), answer)

    checked = trial["checked"]
    runs = {"single_context": (1, checked), "icn": (checked, 1), "icn_wide": (checked // 3, 3)}
    found: dict[str, list[list[Exploration]]] = {}
    metrics: Metrics = {}
    for arm, (n_runs, per_run) in runs.items():
        navigator = InContextNavigator(
            model, tokenizer, template, n_runs=n_runs, per_run=per_run, stop=None, max_answer_tokens=1
        )
        found[arm] = navigator.run_batch(categories)
        pairs = zip(categories, found[arm], strict=True)
        hits = torch.tensor([[is_correct(category, one.text) for one in row] for category, row in pairs])
        metrics[arm] = {"map@12": 100 * map_at_k(hits), "accuracy@12": 100 * accuracy_at_k(hits)}
        for k in range(1, checked + 1):
            trial.log("right answers among the first k, %", arm, k, 100 * accuracy_at_k(hits, k))
    trial.require(
        metrics["single_context"]["accuracy@12"] >= 100 * trial["least_accuracy"],
        f"the decoder knows too little: {metrics['single_context']['accuracy@12']:.0f} % of its answers are right",
    )
    displacement(trial, model, tokenizer, template, categories, found["icn"], metrics)
    reports = spurious_key_report(
        model, tokenizer, categories, is_correct, cluster_keys(model, trial["clusters"], seed=trial.seed),
        n=trial["judged"], k=trial["top"], template=template, stop=None, max_answer_tokens=1,
    )  # fmt: skip
    correlation(trial, reports, metrics)
    trial.example(
        "one category", world.prompt(0),
        {arm: " ".join(one.text + ("" if is_correct("0", one.text) else " (wrong)") for one in rows[0])
         for arm, rows in found.items()},
    )  # fmt: skip
    return metrics


def trained(trial: Trial, world: CategoryWorld) -> LlamaForCausalLM:
    """A decoder that has read the world's text; its output layer has fewer dimensions than there are members."""
    config = LlamaConfig(
        vocab_size=len(world.words), hidden_size=trial["width"], intermediate_size=3 * trial["width"],
        num_hidden_layers=trial["layers"], num_attention_heads=trial["heads"], num_key_value_heads=trial["heads"],
        head_dim=trial["width"],  # one head can then tell all members apart, which not repeating them needs
        max_position_embeddings=max(128, trial["length"]), tie_word_embeddings=False, pad_token_id=0,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(trial.numpy_generator("init").integers(2**31)))
        model = LlamaForCausalLM(config)
    steps = trial["steps"]
    text = world.batches(trial["batch"], trial["length"], trial.generator("text"), facts=trial["facts"])
    batches = (batch.to(trial.device) for batch in text)
    torch.nn.Module.to(model, trial.device)
    train(
        model, batches, steps=steps, optimizer=adamw(trial["lr"]),
        schedule=warmup_cosine(steps, max(1, steps // 20), 0.05), on_progress=trial.reporter("training"),
        on_step=lambda step: trial.log("training loss", "decoder", step.step, step.loss),
    )  # fmt: skip
    return model


def displacement(
    trial: Trial,
    model: LlamaForCausalLM,
    tokenizer: Any,
    template: Any,
    categories: Sequence[str],
    found: Sequence[Sequence[Exploration]],
    metrics: Metrics,
) -> None:
    """Similarity of the query to explored keys, before and after the explored answers stand in the prompt."""
    before = [template(category, []) for category in categories]
    cosines: dict[str, list[float]] = {"single_context": [], "icn": []}
    scores: dict[str, list[float]] = {"single_context": [], "icn": []}
    for explored in range(1, trial["checked"]):
        after = [
            template(category, [one.text for one in row[:explored]])
            for category, row in zip(categories, found, strict=True)
        ]
        tokens = [[one.token_id for one in row[:explored]] for row in found]
        for arm, contexts in (("single_context", before), ("icn", after)):
            cosine, score = explored_key_similarity(model, tokenizer, contexts, tokens)
            cosines[arm].append(float(cosine.mean()))
            scores[arm].append(float(score.mean()))
    for arm, values in cosines.items():
        metrics[arm]["explored_key_cosine"] = float(np.mean(values))
        metrics[arm]["explored_key_score"] = float(np.mean(scores[arm]))
    trial.figure(
        "cosine of query and explored keys", kind="line", x=list(range(1, trial["checked"])), series=cosines,
        x_label="answers explored", y_label="mean cosine",
        caption="Keys of the answers explored so far, seen from the prompt without them and from the prompt with them.",
    )  # fmt: skip


def correlation(trial: Trial, reports: Sequence[KeyReport], metrics: Metrics) -> None:
    """Tokens in the middle ranks, split by whether they share a key cluster with the top ones."""
    main, other = rank_adjusted_accuracy(reports)
    metrics["main_clusters"] = {
        "rank_adjusted_accuracy": 100 * main,
        "raw_accuracy": 100 * _pooled(reports, main=True),
        "mean_rank": float(np.nanmean([report.rank_main for report in reports])),
    }
    metrics["other_clusters"] = {
        "rank_adjusted_accuracy": 100 * other,
        "raw_accuracy": 100 * _pooled(reports, main=False),
        "mean_rank": float(np.nanmean([report.rank_other for report in reports])),
    }
    metrics["main_clusters"]["share"] = 100 * float(np.mean([report.share_main for report in reports]))
    metrics["other_clusters"]["share"] = 100 - metrics["main_clusters"]["share"]
    edges = np.linspace(trial["top"], trial["judged"], 6).astype(int)
    bars: dict[str, list[float]] = {"main_clusters": [], "other_clusters": []}
    for low, high in pairwise(edges.tolist()):
        for arm, wanted in (("main_clusters", True), ("other_clusters", False)):
            bars[arm].append(100 * _pooled(reports, main=wanted, ranks=(low + 1, high)))
    trial.figure(
        "right answers by rank", kind="bar", series=bars, y_label="right, %", x_label="rank of the first token",
        x=[f"{low + 1}-{high}" for low, high in pairwise(edges.tolist())],
        caption=f"Tokens that share a key cluster with the {trial['top']} most probable ones, and the others.",
    )  # fmt: skip


def _pooled(reports: Sequence[KeyReport], *, main: bool, ranks: tuple[int, int] | None = None) -> float:
    """Share of right answers over all reports; 0 where there is none to judge."""
    right = total = 0
    for report in reports:
        chosen = report.in_main == main
        if ranks is not None:
            chosen &= (report.ranks >= ranks[0]) & (report.ranks <= ranks[1])
        right += int(report.correct[report.k :][chosen].sum())
        total += int(chosen.sum())
    return right / total if total else 0.0
