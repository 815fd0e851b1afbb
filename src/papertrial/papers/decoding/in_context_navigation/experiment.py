"""In-context navigation on trial: a small decoder learns categories of single-token members, then lists are probed.

Membership has nothing to do with style, but style is what the output layer's keys cluster by, and there are many more
members than key dimensions. Both ways of probing check the same number of answers, all judged exactly. World and
training were set on seeds that are not recorded, by two things alone: the baseline must be right more than half of the
time and not always, and the decoder must not repeat what its prompt lists.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from sklearn.metrics import adjusted_mutual_info_score
from transformers import LlamaConfig, LlamaForCausalLM

from papertrial.lab.trial import Metrics, Trial
from papertrial.lm.losses import IGNORED, Loss, token_cross_entropy
from papertrial.lm.schedules import warmup_cosine
from papertrial.lm.training import adamw, train
from papertrial.lm.worlds.categories import CategoryWorld
from papertrial.papers.decoding.in_context_navigation.method import (
    Exploration,
    InContextNavigator,
    KeyClusters,
    KeyReport,
    accuracy_at_k,
    cluster_keys,
    explored_key_similarity,
    explored_mass,
    key_weight,
    map_at_k,
    rank_adjusted_accuracy,
    regrouped,
    spurious_key_report,
)

SCALES: dict[str, dict[str, Any]] = {
    "smoke": {
        "seeds": 1,
        "world": {"categories": 12, "answers": 12, "styles": 4, "per_style": 10}, "facts": 0.7,
        "width": 16, "inner": 64, "layers": 1, "heads": 2, "batch": 16, "steps": 60, "lr": 1e-2,
        "checked": 12, "judged": 40, "top": 4, "shuffles": 3, "least_accuracy": 0.0, "most_kept": 10.0,
    },
    "small": {
        "seeds": 5,
        "world": {"categories": 1000, "answers": 12, "styles": 16, "per_style": 10}, "facts": 0.7,
        "width": 32, "inner": 384, "layers": 1, "heads": 16, "batch": 64, "steps": 2000, "lr": 1.5e-2,
        "checked": 12, "judged": 60, "top": 4, "shuffles": 5, "least_accuracy": 0.3, "most_kept": 0.2,
    },
    "gpu": {
        "seeds": 5,
        "world": {"categories": 8000, "answers": 12, "styles": 32, "per_style": 40}, "facts": 0.7,
        "width": 64, "inner": 1024, "layers": 1, "heads": 16, "batch": 256, "steps": 12000, "lr": 1e-2,
        "checked": 12, "judged": 60, "top": 4, "shuffles": 5, "least_accuracy": 0.3, "most_kept": 0.2,
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
    kept = repetition(trial, model, tokenizer, template, categories, found["single_context"], metrics)
    displacement(trial, model, tokenizer, template, categories, found["icn"], metrics)
    clusters = {
        "key_clusters": [member_clusters(key_weight(model), world, seed=trial.seed)],
        "true_styles": [labelled(world, torch.arange(world.entities) // world.per_style)],
    }
    groups = clusters["key_clusters"][0].ids[world.first_entity :]
    shuffle = trial.generator("shuffled clusters")
    clusters["shuffled_clusters"] = [
        labelled(world, groups[torch.randperm(world.entities, generator=shuffle)]) for _ in range(trial["shuffles"])
    ]
    reports = spurious_key_report(
        model, tokenizer, categories, is_correct, clusters["key_clusters"][0], n=trial["judged"], k=trial["top"],
        template=template, stop=None, max_answer_tokens=1,
    )  # fmt: skip
    correlation(trial, reports, clusters, metrics)
    trial.example(
        "one category", world.prompt(0),
        {arm: " ".join(one.text + ("" if is_correct("0", one.text) else " (wrong)") for one in rows[0])
         for arm, rows in found.items()},
    )  # fmt: skip
    known = metrics["single_context"]["accuracy@12"]
    trial.require(
        known >= 100 * trial["least_accuracy"], f"the decoder knows too little: {known:.0f} % of its answers are right"
    )
    trial.require(
        kept <= trial["most_kept"],
        f"the decoder repeats what its prompt lists: {100 * kept:.0f} % of the probability of the first {trial['top']} "
        f"answers is left after they are listed, where at most {100 * trial['most_kept']:.0f} % may be",
    )
    return metrics


def trained(trial: Trial, world: CategoryWorld) -> LlamaForCausalLM:
    """A decoder that has read the world's text; its output layer has fewer dimensions than there are members."""
    config = LlamaConfig(
        vocab_size=len(world.words), hidden_size=trial["width"], intermediate_size=trial["inner"],
        num_hidden_layers=trial["layers"], num_attention_heads=trial["heads"], num_key_value_heads=trial["heads"],
        head_dim=trial["width"],  # one head can then tell all members apart, which not repeating them needs
        initializer_range=trial["width"] ** -0.5, tie_word_embeddings=True,
        max_position_embeddings=max(128, world.longest + 1), pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(trial.numpy_generator("init").integers(2**31)))
        model = LlamaForCausalLM(config)
    model.to(trial.device)  # type: ignore[arg-type]
    documents = world.documents(trial["batch"], trial.generator("text"), facts=trial["facts"])
    steps = trial["steps"]
    train(
        model, (batch.to(trial.device) for batch in documents), steps=steps,
        loss=lambda model, batch: member_loss(model, batch, world.first_entity),
        optimizer=adamw(trial["lr"], weight_decay=0.0), schedule=warmup_cosine(steps, max(1, steps // 20), 0.02),
        on_progress=trial.reporter("training"),
        on_step=lambda step: trial.log("training loss", "decoder", step.step, step.loss),
    )  # fmt: skip
    return model


def member_loss(model: torch.nn.Module, ids: torch.Tensor, first_entity: int) -> Loss:
    """Cross-entropy (nats) of the members alone: which one comes next is all that is asked of this decoder.

    Which category a list is of, and which style a line has, is chance; to learn chances costs most of the time.
    """
    targets = torch.where(ids >= first_entity, ids, IGNORED)[:, 1:]
    columns = (targets != IGNORED).any(0).nonzero()[:, 0]  # scores of the other columns would be thrown away
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=columns).logits
    return token_cross_entropy(logits, targets[:, columns])


def repetition(
    trial: Trial,
    model: LlamaForCausalLM,
    tokenizer: Any,
    template: Any,
    categories: Sequence[str],
    found: Sequence[Sequence[Exploration]],
    metrics: Metrics,
) -> float:
    """The share of their probability that the first answers keep when the prompt lists them.

    The paper's models do not repeat what their context lists. A decoder that does cannot show what listing answers does
    for those models, whatever comes of it.
    """
    named = [row[: trial["top"]] for row in found]
    tokens = [[one.token_id for one in row] for row in named]
    contexts = {
        "single_context": [template(category, []) for category in categories],
        "icn": [template(category, [one.text for one in row]) for category, row in zip(categories, named, strict=True)],
    }
    for arm, prompts in contexts.items():
        metrics[arm]["listed_mass"] = 100 * float(explored_mass(model, tokenizer, prompts, tokens).mean())
    kept = metrics["icn"]["listed_mass"] / metrics["single_context"]["listed_mass"]
    metrics["icn"]["listed_mass_kept"] = 100 * kept
    trial.note("probability left to listed answers, %", 100 * kept)
    return kept


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


def member_clusters(keys: torch.Tensor, world: CategoryWorld, *, seed: int) -> KeyClusters:
    """k-means of the members' keys alone, as many clusters as there are styles; see :func:`labelled`."""
    return labelled(world, cluster_keys(keys[world.first_entity :], world.styles, seed=seed).ids)


def labelled(world: CategoryWorld, groups: torch.Tensor) -> KeyClusters:
    """Clusters of the whole vocabulary from those of the members; all other words form one more of their own."""
    ids = torch.full((len(world.words),), world.styles)
    ids[world.first_entity :] = groups
    return KeyClusters(ids, torch.empty(0, 0))


def correlation(
    trial: Trial,
    reports: Sequence[KeyReport],
    clusters: Mapping[str, Sequence[KeyClusters]],
    metrics: Metrics,
) -> None:
    """Tokens in the middle ranks, split by whether they share a cluster with the top ones; means over the groupings."""
    for arm, groupings in clusters.items():
        each = [_split([regrouped(report, one) for report in reports]) for one in groupings]
        metrics[arm] = {name: float(np.mean([one[name] for one in each])) for name in each[0]}
    styles, found = (clusters[arm][0].ids.numpy() for arm in ("true_styles", "key_clusters"))
    metrics["key_clusters"]["agreement_with_styles"] = float(adjusted_mutual_info_score(styles, found))
    edges = np.linspace(trial["top"], trial["judged"], 6).astype(int)
    bars: dict[str, list[float]] = {"in key clusters of the top": [], "in other key clusters": []}
    for low, high in pairwise(edges.tolist()):
        for label, wanted in zip(bars, (True, False), strict=True):
            bars[label].append(100 * _pooled(reports, main=wanted, ranks=(low + 1, high)))
    trial.figure(
        "right answers by rank", kind="bar", series=bars, y_label="right, %", x_label="rank of the first token",
        x=[f"{low + 1}-{high}" for low, high in pairwise(edges.tolist())],
        caption=f"Tokens that share a key cluster with the {trial['top']} most probable ones, and the others.",
    )  # fmt: skip


def _split(reports: Sequence[KeyReport]) -> dict[str, float]:
    """Accuracy within and outside the clusters of the top tokens, in %; the gap is what being outside adds."""
    main, other = rank_adjusted_accuracy(reports)
    return {
        "accuracy_gap": 100 * (other - main),
        "accuracy_main": 100 * main,
        "accuracy_other": 100 * other,
        "raw_accuracy_main": 100 * _pooled(reports, main=True),
        "raw_accuracy_other": 100 * _pooled(reports, main=False),
        "mean_rank_main": float(np.nanmean([report.rank_main for report in reports])),
        "mean_rank_other": float(np.nanmean([report.rank_other for report in reports])),
        "share_main": 100 * float(np.mean([report.share_main for report in reports])),
    }


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
