"""Deferral rules on a cascade of two small decoders that answer questions of very different lengths.

A seed is its own pair of models, trained here on the same questions, its own facts, and its own questions to fit the
rules on, to choose the quantile on, and to measure on. None of these stood in training, but for the facts, which can
only be learnt by heart: there the three parts ask for different ones. Every rule ranks the same answers.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from papertrial.lab.trial import Trial
from papertrial.lm.generation import left_pad
from papertrial.lm.training import adamw, train, warmup_cosine
from papertrial.papers.decoding.cascades.method import (
    ALPHAS,
    PostHocDeferral,
    Records,
    answer,
    auc_df,
    chow_average,
    chow_quantile,
    chow_sum,
    cost_curve,
    deferral_curve,
    forward_flops,
    length_bias_report,
    oracle_score,
    random_auc,
)
from papertrial.papers.decoding.cascades.world import (
    EOS,
    PAD,
    TASKS,
    VOCABULARY,
    Question,
    World,
    answer_loss,
    reserved,
    same,
    text,
    training_batches,
)

SCALES = {
    "smoke": {
        "seeds": 1,
        "facts": 40,
        "small": {"width": 16, "layers": 1, "steps": 6, "lr": 8e-3},
        "large": {"width": 24, "layers": 2, "steps": 6, "lr": 6e-3},
        "rows": 4,
        "row_length": 48,
        "rule_questions": 48,
        "validation_questions": 24,
        "test_questions": 48,
        "rule_steps": 20,
        "answer_batch": 64,
        "least_gain": -1.0,
    },
    "small": {
        "seeds": 3,
        "facts": 500,
        "small": {"width": 48, "layers": 2, "steps": 500, "lr": 8e-3},
        "large": {"width": 80, "layers": 3, "steps": 900, "lr": 7e-3},
        "rows": 12,
        "row_length": 96,
        "rule_questions": 1500,
        "validation_questions": 500,
        "test_questions": 2000,
        "rule_steps": 300,
        "answer_batch": 256,
        "least_gain": 0.05,
    },
    "gpu": {
        "seeds": 5,
        "facts": 8000,
        "small": {"width": 64, "layers": 2, "steps": 4000, "lr": 4e-3},
        "large": {"width": 384, "layers": 8, "steps": 8000, "lr": 1e-3},
        "rows": 64,
        "row_length": 192,
        "rule_questions": 12000,
        "validation_questions": 4000,
        "test_questions": 24000,
        "rule_steps": 600,
        "answer_batch": 1024,
        "least_gain": 0.05,
    },
}

Qualities = tuple[np.ndarray, np.ndarray]


class Part:
    """Questions that both models have answered."""

    def __init__(self, questions: list[Question], small: Records, large: Records) -> None:
        self.questions, self.small, self.large = questions, small, large
        self.q_small, self.q_large = (
            np.array([same(made, q.answer) for made, q in zip(records.tokens, questions, strict=True)], dtype=float)
            for records in (small, large)
        )
        self.task = np.array([question.task for question in questions])

    def of(self, task: str) -> np.ndarray:
        """Numbers of the questions of one task, or of all."""
        return np.arange(len(self.task)) if task == "all" else np.flatnonzero(self.task == task)


def run(trial: Trial) -> dict[str, dict[str, float]]:
    """One seed.

    ``auc_df`` is the area of the mixed questions, ``auc_df_<task>`` of each task's alone; ``gap_closed`` the share in %
    of the way from random deferral to the oracle; ``long_output_deferral`` and ``short_output_deferral`` the % of the
    longest and shortest quarter of answers that are deferred at a rate of a half; ``quality_at_cost`` the mean accuracy
    in % over budgets from nothing to the cost of the large model, the look into it charged.
    """
    world = World(trial["facts"], trial.generator("facts"))
    steps = max(trial[size]["steps"] for size in ("small", "large"))
    # more than enough: questions have 18 tokens on average
    drawn = world.questions(steps * trial["rows"] * trial["row_length"] // 11, trial.generator("training questions"))
    batches = training_batches(
        [question for question in drawn if not reserved(question)], trial["rows"], trial["row_length"]
    )
    models = {size: _train(trial, size, batches) for size in ("small", "large")}
    seen: set[tuple[int, ...]] = set()
    parts = {
        name: _answered(trial, models, _fresh(trial, world, name, part, seen), name)
        for part, name in enumerate(("rule", "validation", "test"))
    }
    test = parts["test"]
    for size, quality in (("small", test.q_small), ("large", test.q_large)):
        for task in ("all", *TASKS):
            trial.note(f"accuracy of the {size} model, {task}, %", round(100 * float(quality[test.of(task)].mean()), 1))
    gain = float(test.q_large.mean() - test.q_small.mean())
    trial.require(
        gain >= trial["least_gain"], f"the large model is {100 * gain:.1f} points better: there is nothing to defer for"
    )
    scores = _scores(trial, parts)
    results = {arm: _metrics(models, test, arm, score) for arm, score in scores.items()}
    _show(trial, test, scores, results)
    return results


def _train(trial: Trial, size: str, batches: list[dict[str, Tensor]]) -> LlamaForCausalLM:
    shape: Mapping[str, Any] = trial[size]
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape["width"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=shape["width"] * 8 // 3 // 8 * 8,
        max_position_embeddings=96,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=EOS,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(trial.seed)
        model: Any = LlamaForCausalLM(config)
    steps = shape["steps"]
    train(
        model.to(trial.device),
        batches[:steps],
        steps=steps,
        optimizer=adamw(shape["lr"]),
        schedule=warmup_cosine(steps, steps // 20, floor=0.05),
        loss=answer_loss,
        on_progress=trial.reporter(f"training the {size} model"),
    )
    return model


def _fresh(trial: Trial, world: World, name: str, part: int, seen: set[tuple[int, ...]]) -> list[Question]:
    """Questions that stood neither in training nor in another part; of the facts, a third that is this part's alone."""
    count = trial[f"{name}_questions"]
    drawn = world.questions(16 * count, trial.generator(name), share=(part, 3))
    quota = -(-count // len(TASKS))
    kept: dict[str, list[Question]] = {task: [] for task in TASKS}
    for question in drawn:
        key, group = tuple(question.prompt), kept[question.task]
        if len(group) < quota and (question.task == "recall" or (reserved(question) and key not in seen)):
            group.append(question)
            seen.add(key)
    fresh = [question for group in kept.values() for question in group]
    trial.require(
        len(fresh) == quota * len(TASKS), f"only {len(fresh)} of {count} questions of part {name} could be found unseen"
    )
    return fresh


def _answered(trial: Trial, models: Mapping[str, Any], questions: list[Question], name: str) -> Part:
    # of similar length together, so that little is padding
    questions = sorted(questions, key=lambda question: (len(question.prompt), len(question.answer)))
    size = trial["answer_batch"]
    found: dict[str, list[Records]] = {"small": [], "large": []}
    for start in trial.track(range(0, len(questions), size), f"answering: {name}"):
        ids, mask = left_pad([question.prompt for question in questions[start : start + size]], PAD)
        for model, looked_into in (("small", models["large"]), ("large", None)):
            made = answer(models[model], ids, mask, max_new_tokens=32, eos_token_id=EOS, large=looked_into)
            found[model].append(made)
    return Part(questions, Records.join(found["small"]), Records.join(found["large"]))


def _scores(trial: Trial, parts: Mapping[str, Part]) -> dict[str, np.ndarray]:
    """Confidence of every rule on the test questions; rules are fitted and chosen on the other parts."""
    fit, choose, test = parts["rule"], parts["validation"], parts["test"]
    areas = {
        alpha: auc_df(chow_quantile(choose.small.log_probs, alpha), choose.q_small, choose.q_large) for alpha in ALPHAS
    }
    best = max(areas, key=lambda alpha: areas[alpha])
    trial.note("quantile chosen on validation questions", best)
    log_probs = test.small.log_probs
    scores: dict[str, Any] = {
        "random": np.zeros(len(test.questions)),
        "chow_sum": chow_sum(log_probs),
        "chow_average": chow_average(log_probs),
        "chow_quantile": chow_quantile(log_probs, best),
    }
    rules = {
        "post_hoc_quantile": "quantile",
        "post_hoc_embed_small": "quantile+embed1",
        "post_hoc_embed": "quantile+embed1+embed2",
    }
    # where the large model is never better there is nothing to classify, and the gain is regressed
    both = 0 < int((fit.q_large > fit.q_small).sum()) < len(fit.questions)
    for arm, features in rules.items():
        rule = PostHocDeferral(
            features,  # type: ignore[arg-type]
            target="classification" if both else "regression",
            steps=trial["rule_steps"],
            generator=trial.generator("learned rule"),
        )
        scores[arm] = rule.fit(fit.small, fit.q_small, fit.q_large).score(test.small)
    scores["oracle"] = oracle_score(test.q_small, test.q_large)
    return {arm: np.asarray(score, dtype=float) for arm, score in scores.items()}


def _metrics(models: Mapping[str, Any], test: Part, arm: str, score: np.ndarray) -> dict[str, float]:
    small, large = test.q_small, test.q_large
    area, chance = auc_df(score, small, large), random_auc(small, large)
    best = auc_df(oracle_score(small, large), small, large)
    bias = length_bias_report(score, test.small.lengths, small, large, rate=0.5, buckets=4)
    metrics = {
        "auc_df": area,
        "gap_closed": 100 * (area - chance) / (best - chance) if best > chance else 0.0,
        "long_output_deferral": 100 * float(bias.rule[-1]),
        "short_output_deferral": 100 * float(bias.rule[0]),
        "quality_at_cost": 100 * _quality_at_cost(*_costs(models, test, arm, score)),
    }
    for task in TASKS:
        rows = test.of(task)
        metrics[f"auc_df_{task}"] = auc_df(score[rows], small[rows], large[rows])
    return metrics


def _costs(models: Mapping[str, Any], test: Part, arm: str, score: np.ndarray) -> Qualities:
    prompts = test.small.prompt_lengths
    cheap = forward_flops(models["small"], prompts, test.small.lengths)
    dear = forward_flops(models["large"], prompts, test.large.lengths)
    looks = forward_flops(models["large"], prompts, layer=1) if arm == "post_hoc_embed" else 0.0 * cheap
    cost, quality = cost_curve(score, test.q_small, test.q_large, cheap, dear, looks)
    return cost / float(dear.mean()), quality


def _quality_at_cost(cost: np.ndarray, quality: np.ndarray) -> float:
    """Mean quality over budgets between 0 and the cost of the large model alone, whatever can be had for each."""
    budgets = np.linspace(0.0, 1.0, 201)
    affordable = np.searchsorted(cost, budgets, side="right") - 1
    best = np.maximum.accumulate(quality)
    return float(np.where(affordable >= 0, best[affordable.clip(min=0)], 0.0).mean())


def _show(
    trial: Trial, test: Part, scores: Mapping[str, np.ndarray], results: Mapping[str, Mapping[str, float]]
) -> None:
    curves = {arm: deferral_curve(score, test.q_small, test.q_large) for arm, score in scores.items()}
    thin = max(1, len(test.questions) // 40)
    trial.figure(
        "Deferral curves",
        kind="line",
        x_label="share of questions that the large model answers",
        y_label="right answers",
        caption="All three tasks mixed. The higher the curve, the better the rule picks what to defer.",
        series={arm: [(float(x), float(y)) for x, y in zip(r[::thin], q[::thin])] for arm, (r, q) in curves.items()},  # noqa: B905
    )
    report = length_bias_report(scores["chow_sum"], test.small.lengths, test.q_small, test.q_large)
    edges = [int(edge) for edge in report.edges]
    names = [f"up to {edge}" for edge in edges[1:]]
    shown = ("chow_sum", "chow_average", "chow_quantile", "post_hoc_quantile", "oracle")
    trial.figure(
        "Deferred by length of the answer",
        kind="bar",
        x_label="tokens of the small model's answer",
        y_label="deferred, %",
        caption="At an overall rate of one half.",
        x=names,
        series={
            arm: (100 * length_bias_report(scores[arm], test.small.lengths, test.q_small, test.q_large).rule).tolist()
            for arm in shown
        },
    )
    for task in TASKS:
        number = int(test.of(task)[0])
        trial.example(
            task,
            text(test.questions[number].prompt),
            {"small": text(test.small.tokens[number]), "large": text(test.large.tokens[number])},
        )
