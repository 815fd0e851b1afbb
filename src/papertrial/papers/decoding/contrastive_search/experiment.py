"""Contrastive search against greedy, beam, top-k and nucleus decoding: open-ended continuations of held-out prose.

A seed is its own set of held-out prefixes, disjoint from every other seed's. Every decoder that has a dial
(contrastive, top-k, nucleus) is tuned by the same rule on validation prefixes: the same number of bisections towards
the diversity of the human continuations, and of the settings tried the one that comes closest. How close each comes on
the test prefixes is a metric, since coherence grows where text repeats itself. Coherence is judged by another house
model that saw none of the generator's training documents.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from papertrial.lab.trial import Trial
from papertrial.lm.anatomy import position_limit
from papertrial.lm.corpora import corpus, unseen_by
from papertrial.lm.generation import beam, greedy, sample
from papertrial.lm.metrics import diversity, rep_n
from papertrial.lm.models import Checkpoint
from papertrial.lm.scoring import continuation_scores
from papertrial.papers.decoding.contrastive_search.method import (
    contrastive_search,
    isotropy,
    self_similarity_matrix,
)

SCALES = {
    "smoke": {
        "seeds": 1,
        "prefixes": 4,
        "validation_prefixes": 2,
        "prefix_tokens": 16,
        "new_tokens": 24,
        "draws": 1,
        "beams": 2,
        "k": 4,
        "tuning_steps": 1,
        "alpha_range": [0.2, 0.8],
        "top_k_range": [2, 200],
        "top_p_range": [0.5, 1.0],
        "batch": 16,
        "least_isotropy": 0.0,
    },
    "small": {
        "seeds": 4,
        "prefixes": 32,
        "validation_prefixes": 16,
        "prefix_tokens": 32,
        "new_tokens": 96,
        "draws": 2,
        "beams": 4,
        "k": 5,
        "tuning_steps": 5,
        "alpha_range": [0.2, 0.8],
        "top_k_range": [2, 200],
        "top_p_range": [0.5, 1.0],
        "batch": 40,
        "least_isotropy": 0.3,
    },
    "gpu": {
        "seeds": 5,
        "prefixes": 64,
        "validation_prefixes": 64,
        "prefix_tokens": 32,
        "new_tokens": 200,
        "draws": 3,
        "beams": 4,
        "k": 5,
        "tuning_steps": 7,
        "alpha_range": [0.2, 0.8],
        "top_k_range": [2, 200],
        "top_p_range": [0.5, 1.0],
        "batch": 64,
        "least_isotropy": 0.3,
    },
}

Decoder = Callable[[Tensor], Tensor]
"""Prompts (B, S) to continuations (B, T)."""


def run(trial: Trial) -> dict[str, dict[str, float]]:
    """One seed; metrics are diversity (%) and its distance from human text (points), coherence (nats per token), rep_2
    and rep_4 (%)."""
    generator, judge = trial.checkpoint("house:prose"), _judge(trial)
    prompts, references = _prefixes(trial, generator, "test", trial["prefixes"])
    tuning, tuning_references = _prefixes(trial, generator, "valid", trial["validation_prefixes"])
    measure = Measure(generator, judge)
    _require_isotropy(trial, generator, torch.cat([prompts, references], 1))

    human = diversity(measure.words(tuning_references))
    trial.note("human diversity on validation prefixes, %", round(human, 2))
    settings: dict[str, float] = {}
    sweeps: dict[str, list[tuple[float, float]]] = {}
    for arm, dial in (("contrastive", "alpha"), ("top_k", "top_k"), ("nucleus", "top_p")):

        def tried(value: float, arm: str = arm) -> dict[str, float]:
            return measure(tuning, _decode(trial, generator, arm, value, tuning, f"tuning {arm} {value:.4g}"))

        low, high = trial[f"{dial}_range"]
        found = bisect(tried, low, high, human, trial["tuning_steps"], whole=dial == "top_k")
        settings[arm] = min(found, key=lambda value: abs(found[value]["diversity"] - human))
        sweeps[arm] = sorted((values["diversity"], values["coherence"]) for values in found.values())
        trial.note(f"{arm} tuned to", round(settings[arm], 4))

    results: dict[str, dict[str, float]] = {}
    outputs: dict[str, Tensor] = {}
    for arm in ("greedy", "beam", "top_k", "nucleus", "contrastive"):
        draws = trial["draws"] if arm in ("top_k", "nucleus") else 1
        drawn = []
        for draw in range(draws):
            outputs[arm] = _decode(trial, generator, arm, settings.get(arm), prompts, f"{arm} draw {draw}")
            drawn.append(measure(prompts, outputs[arm]))
        results[arm] = {metric: sum(values[metric] for values in drawn) / draws for metric in drawn[0]}
    results["human"] = measure(prompts, references)
    for values in results.values():
        values["diversity_gap"] = abs(values["diversity"] - results["human"]["diversity"])
    _show(trial, measure, prompts, outputs | {"human": references}, results, sweeps["contrastive"])
    return results


def bisect(
    tried: Callable[[float], dict[str, float]], low: float, high: float, target: float, steps: int, *, whole: bool
) -> dict[float, dict[str, float]]:
    """What a dial that makes text more diverse the higher it stands gave at settings ever closer to the target.

    Parameters
    ----------
    tried : what a setting gives, with its ``diversity``.
    low, high : the range of the dial; the ends themselves are not tried.
    whole : the dial has whole numbers, and the middle is that of their logarithms.
    """
    found: dict[float, dict[str, float]] = {}
    for _ in range(steps):
        value = round((low * high) ** 0.5) if whole else (low + high) / 2
        if value in found:
            break
        found[value] = tried(value)
        if found[value]["diversity"] < target:
            low = value
        else:
            high = value
    return found


class Measure:
    """Diversity over words, coherence under the judge."""

    def __init__(self, generator: Checkpoint, judge: Checkpoint) -> None:
        self.generator, self.judge = generator, judge

    def texts(self, ids: Tensor) -> list[str]:
        return self.generator.tokenizer.batch_decode(ids, skip_special_tokens=True)

    def words(self, ids: Tensor) -> list[list[str]]:
        """Words of each continuation; one without a word counts as a single empty word, not as nothing."""
        return [text.split() or [""] for text in self.texts(ids)]

    def __call__(self, prompts: Tensor, continuations: Tensor) -> dict[str, float]:
        words = self.words(continuations)
        encode = self.judge.tokenizer
        pairs = [
            (encode(p, add_special_tokens=False)["input_ids"], encode(c, add_special_tokens=False)["input_ids"])
            for p, c in zip(self.texts(prompts), self.texts(continuations), strict=True)
        ]
        pairs = [(p, c) for p, c in pairs if p and c]
        nats, counts = continuation_scores(
            self.judge.model, [p for p, _ in pairs], [c for _, c in pairs], batch_size=32
        )
        return {
            "diversity": diversity(words),
            "coherence": float((nats / counts).mean()),
            "rep_2": 100 * sum(rep_n(w, 2) for w in words) / len(words),
            "rep_4": 100 * sum(rep_n(w, 4) for w in words) / len(words),
        }


def _judge(trial: Trial) -> Checkpoint:
    from papertrial.lm.models import load

    judge = load("house:scorer", device=trial.device)
    trial.models[judge.name] = judge.digest
    return judge


def _prefixes(trial: Trial, generator: Checkpoint, split: Any, count: int) -> tuple[Tensor, Tensor]:
    """This seed's prompts and their human continuations; no two seeds share a window, and neither model saw them."""
    prefix, length = _lengths(trial, generator)
    documents = corpus("prose").documents(split)
    for model in ("prose", "scorer"):
        documents = unseen_by(model, documents)
    windows: list[list[int]] = []
    for document in documents:
        ids = generator.tokenizer(document.text, add_special_tokens=False)["input_ids"]
        windows += [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
    first = trial.seed * count
    trial.require(
        len(windows) >= first + count,
        f"seed {trial.seed} needs windows {first}..{first + count - 1} of held-out text and there are {len(windows)}",
    )
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))  # the same for every seed
    chosen = torch.tensor([windows[i] for i in order[first : first + count].tolist()], device=trial.device)
    return chosen[:, :prefix], chosen[:, prefix:]


def _lengths(trial: Trial, generator: Checkpoint) -> tuple[int, int]:
    """Tokens of a prefix, and of a prefix with its continuation; in the same proportion where the model holds fewer."""
    prefix, length = trial["prefix_tokens"], trial["prefix_tokens"] + trial["new_tokens"]
    limit = position_limit(generator.model) or length
    if limit >= length:
        return prefix, length
    if limit < 16:
        raise ValueError(f"the model holds {limit} positions; at least 16 are needed")
    trial.note("cut to the positions that the model holds", limit)
    return limit * prefix // length, limit


def _require_isotropy(trial: Trial, generator: Checkpoint, ids: Tensor) -> None:
    measured = isotropy(generator.model, ids.tolist())
    with torch.random.fork_rng():
        torch.manual_seed(trial.seed)
        untrained = AutoModelForCausalLM.from_config(generator.model.config).to(trial.device).eval()
    trial.note("isotropy of the generator", round(measured, 4))
    trial.note("isotropy of the same architecture untrained", round(isotropy(untrained, ids.tolist()), 4))
    least = trial["least_isotropy"]
    trial.require(
        measured > least, f"the generator's isotropy is {measured:.2f}; the paper speaks of models above {least}"
    )


def _decode(trial: Trial, generator: Checkpoint, arm: str, value: Any, prompts: Tensor, purpose: str) -> Tensor:
    """Continuations (N, T) by one decoder at one setting. Every arm makes the same number of tokens."""
    model = generator.model
    prefix, length = _lengths(trial, generator)
    tokens = length - prefix
    rng = trial.generator(purpose)
    decoders: dict[str, Decoder] = {
        "greedy": lambda ids: greedy(model, ids, max_new_tokens=tokens).tokens,
        "beam": lambda ids: beam(model, ids, num_beams=trial["beams"], max_new_tokens=tokens).tokens,
        "top_k": lambda ids: sample(model, ids, max_new_tokens=tokens, top_k=value, generator=rng).tokens,
        "nucleus": lambda ids: sample(model, ids, max_new_tokens=tokens, top_p=value, generator=rng).tokens,
        "contrastive": lambda ids: contrastive_search(model, ids, k=trial["k"], alpha=value, max_new_tokens=tokens)[
            :, ids.shape[1] :
        ],
    }
    return torch.cat(
        [decoders[arm](batch) for batch in trial.track(prompts.split(trial["batch"]), f"decoding: {purpose}")]
    )


def _show(
    trial: Trial,
    measure: "Measure",
    prompts: Tensor,
    outputs: dict[str, Tensor],
    results: dict[str, dict[str, float]],
    sweep: list[tuple[float, float]],
) -> None:
    """Figures and examples for readers."""
    points = {arm: [(values["diversity"], values["coherence"])] for arm, values in results.items()}
    trial.figure(
        "Diversity and coherence",
        kind="scatter",
        x_label="diversity, %",
        y_label="coherence, nats per token",
        caption="Each decoder on the test prefixes; contrastive search also over its penalty weight on the validation "
        "prefixes. Up and to the right is better; human text marks where a reader would want to be.",
        series=points | {"contrastive, validation sweep": sorted(sweep)},
    )
    for arm in ("greedy", "contrastive") if trial.seed == 0 else ():  # large, and one pair is enough to see it
        ids = torch.cat([prompts[:1], outputs[arm][:1]], 1)[:, :60]
        with torch.no_grad():
            hidden = measure.generator.model.base_model(ids).last_hidden_state[0]
        trial.figure(
            f"Similarity of token states, {arm}",
            kind="heatmap",
            x_label="token",
            y_label="token",
            caption="Cosine between the last-layer states of every two tokens of one text. Blocks off the diagonal are "
            "passages that the model says again.",
            series={"cosine": self_similarity_matrix(hidden).cpu()},
        )
    written = {arm: measure.texts(ids[:2]) for arm, ids in outputs.items()}
    for row, prompt in enumerate(measure.texts(prompts[:2])):
        trial.example(f"Prefix {row + 1}", prompt, {arm: texts[row] for arm, texts in written.items()})
