"""A trained model with and without neighbours from its own training text, on documents that it has not seen.

The base model is the same in every arm, and the datastore holds only documents that it was trained on. A seed is its
own set of held-out documents, some for choosing temperature and mixing weight and the others for the test, and its own
draws (k-means, training of the heads). Every arm is mixed with the base under a weight chosen the same way.

Learning rates of the small scale were chosen on the validation documents of all its seeds, which are in none of their
tests, by the mixture's perplexity after 410 thousand tokens: from 1e-2, 3e-2 and 1e-1 for the over-parameterised head,
with 3e-3 besides for the head of single rows, and from 1e-3, 3e-3 and 1e-2 for further training. With several rates in
a scale each seed chooses on its own validation documents.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from papertrial.lab.trial import Trial
from papertrial.lm.anatomy import read_out
from papertrial.lm.batches import random_batches
from papertrial.lm.corpora import corpus, unseen_by
from papertrial.lm.datastore import (
    ApproximateSearch,
    Datastore,
    ExactSearch,
    Neighbours,
    exact_scores,
    target_states,
)
from papertrial.lm.models import Checkpoint
from papertrial.lm.training import adamw, train, warmup_cosine
from papertrial.papers.decoding.knn_lm.method import (
    KEYS,
    OverparameterizedHead,
    allot_rows,
    build_datastore,
    interpolate,
    knn_target_log_probs,
    train_head,
    values_of,
)

SCALES = {
    "smoke": {
        "seeds": 1,
        "packages": ["stdlib"],
        "training_documents": 4,
        "document_tokens": 150,
        "groups": 16,
        "neighbours": [8, 32],
        "lists": 8,
        "probes": 2,
        "temperatures": [1, 3, 5, 10, 20, 30, 50, 100, 200, 300],
        "weight_steps": 20,
        "frequency_groups": 5,
        "heads": [
            ["overparameterized_head", 3, "frequency", [1e-2, 3e-2]],
            ["single_row_head", 1, "frequency", [1e-2]],
            ["head_2_rows_by_loss", 2, "loss", [1e-2]],
        ],
        "head_steps": 4,
        "head_batch": 64,
        "continued_steps": 2,
        "continued_batch": 2,
        "continued_lrs": [1e-3, 3e-3],
    },
    "small": {
        "seeds": 5,
        "packages": ["stdlib"],
        "training_documents": None,
        "document_tokens": 1000,
        "groups": 5,
        "neighbours": [256],
        "lists": 1024,
        "probes": 16,
        "temperatures": [1, 3, 5, 10, 20, 30, 50, 100, 200, 300],
        "weight_steps": 20,
        "frequency_groups": 5,
        "heads": [
            ["overparameterized_head", 3, "frequency", [3e-2]],
            ["single_row_head", 1, "frequency", [1e-2]],
        ],
        "head_steps": 600,
        "head_batch": 512,
        "continued_steps": 150,
        "continued_batch": 8,
        "continued_lrs": [3e-3],
    },
    "gpu": {
        "seeds": 5,
        "packages": ["stdlib", "numpy", "scipy", "sympy", "networkx", "mpmath"],
        "training_documents": None,
        "document_tokens": 4000,
        "groups": 5,
        "neighbours": [64, 256, 1024],
        "lists": 4096,
        "probes": 32,
        "temperatures": [1, 3, 5, 10, 20, 30, 50, 100, 200, 300],
        "weight_steps": 20,
        "frequency_groups": 10,
        "heads": [
            ["overparameterized_head", 3, "frequency", [3e-3, 1e-2, 3e-2]],
            ["head_3_rows_by_loss", 3, "loss", [3e-3, 1e-2, 3e-2]],
            ["head_6_rows_by_frequency", 6, "frequency", [3e-3, 1e-2, 3e-2]],
            ["head_6_rows_by_loss", 6, "loss", [3e-3, 1e-2, 3e-2]],
            ["single_row_head", 1, "frequency", [3e-3, 1e-2, 3e-2]],
        ],
        "head_steps": 4000,
        "head_batch": 2048,
        "continued_steps": 4000,
        "continued_batch": 8,
        "continued_lrs": [1e-3, 3e-3, 1e-2],
    },
}

Setting = tuple[int, float]
"""Of an arm with neighbours: their number and the temperature; of a trained one: 0 and the learning rate."""

Candidates = dict[Setting, tuple[Tensor, Tensor]]
"""By setting: log p of the validation targets and of the test targets, (N,) each."""


@dataclass
class Split:
    """Held-out tokens: the states that predict them by key (N, D), the tokens (N,), and the base's log p of them."""

    states: dict[str, Tensor]
    targets: Tensor
    base: Tensor


def run(trial: Trial) -> dict[str, dict[str, float]]:
    """One seed; the metric is test_perplexity per token of the base's tokenizer."""
    checkpoint = trial.checkpoint("house:prose")
    if checkpoint.name != "house:prose":
        trial.note(
            "datastore",
            "prose that this model need not have been trained on: what neighbours gain is then not the paper's gain "
            "from the model's own training text",
        )
    texts = _texts(trial, checkpoint)
    model, window = checkpoint.model, _window(checkpoint)
    stores = build_datastore(
        model, texts["train"], keys=list(KEYS), window=window, on_progress=trial.reporter("datastore")
    )
    valid, test = (_split(checkpoint, texts[part]) for part in ("valid", "test"))
    trial.note("entries in the datastore", len(stores["ffn_input"]))
    trial.note("validation tokens", len(valid.targets))
    trial.note("test tokens", len(test.targets))

    arms: dict[str, Candidates] = {}
    exact: dict[str, tuple[Neighbours, Neighbours]] = {}
    for key in trial.track(list(KEYS), "exact search"):
        search = ExactSearch(stores[key].keys, device=trial.device)
        most = max(trial["neighbours"])
        exact[key] = (search.search(valid.states[key], most), search.search(test.states[key], most))
        arms[f"knn_{key}"] = _votes(trial, stores[key], exact[key], valid, test)
    arms["knn_untuned_temperature"] = {at: c for at, c in arms["knn_ffn_input"].items() if at[1] == 1}
    arms |= _approximations(trial, stores["ffn_input"], exact["ffn_input"], valid, test)
    arms |= _heads(trial, checkpoint, stores, valid, test)
    arms["base_continued"] = {(0, lr): _continued(trial, checkpoint, texts, lr) for lr in trial["continued_lrs"]}

    results = {"base": {"test_perplexity": _perplexity(test.base)}}
    chosen: dict[str, Tensor] = {"base": test.base}
    for arm, candidates in arms.items():
        setting, weight = _tune(valid.base, candidates, _weights(trial))
        chosen[arm] = interpolate(test.base, candidates[setting][1], weight)
        results[arm] = {"test_perplexity": _perplexity(chosen[arm])}
        trial.note(f"{arm}: weight", weight)
        for place, name in ((0, "neighbours"), (1, "temperature" if setting[0] else "learning rate")):
            if len({at[place] for at in candidates}) > 1:
                trial.note(f"{arm}: {name}", setting[place])
    _show(trial, checkpoint, stores, exact, valid, test, arms, chosen)
    return results


# -- texts -------------------------------------------------------------------------------------------------------


def _window(checkpoint: Checkpoint) -> int:
    return min(int(checkpoint.model.config.max_position_embeddings), 256)


def _texts(trial: Trial, checkpoint: Checkpoint) -> dict[str, list[list[int]]]:
    """Ids of training documents (all seeds the same) and of this seed's held-out documents."""
    prose = corpus("prose+library-prose")
    named = tuple(f"{package}:" for package in trial["packages"])
    held_out = [d for split in ("valid", "test") for d in prose.documents(split) if d.name.startswith(named)]
    held_out = unseen_by("prose", held_out)
    groups = trial["groups"]
    # disjoint for the first ``groups`` seeds; further seeds deal the documents anew
    order = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(trial.seed // groups)).tolist()
    mine = order[trial.seed % groups :: groups]
    trial.require(len(mine) >= 3, f"{len(held_out)} held-out documents are too few for {groups} groups")
    third = max(1, len(mine) // 3)
    training = [d for d in prose.documents("train") if d.name.startswith(named)][: trial["training_documents"]]

    def ids(text: str) -> list[int]:
        encoded = checkpoint.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
        begin = [checkpoint.tokenizer.bos_token_id, checkpoint.tokenizer.eos_token_id]
        return [*[token for token in begin if token is not None][:1], *encoded["input_ids"]]

    cut = trial["document_tokens"] + 1
    return {
        "train": [ids(document.text) for document in training],
        "valid": [ids(held_out[i].text)[:cut] for i in mine[:third]],
        "test": [ids(held_out[i].text)[:cut] for i in mine[third:]],
    }


def _split(checkpoint: Checkpoint, sequences: Sequence[Sequence[int]]) -> Split:
    parts = list(target_states(checkpoint.model, sequences, KEYS, window=_window(checkpoint)))
    states = {key: torch.cat([part.states[key] for part in parts]) for key in KEYS}
    targets = torch.cat([part.targets for part in parts])
    return Split({key: s.cpu() for key, s in states.items()}, targets.cpu(), _base(checkpoint, states, targets))


@torch.no_grad()
def _base(checkpoint: Checkpoint, states: dict[str, Tensor], targets: Tensor) -> Tensor:
    """The model's own log p of the targets, from the vectors that its head reads."""
    rows = zip(states["hidden"].split(2048), targets.split(2048), strict=True)
    found = [read_out(checkpoint.model, h).float().log_softmax(-1).gather(1, t[:, None])[:, 0] for h, t in rows]
    return torch.cat(found).cpu()


# -- arms --------------------------------------------------------------------------------------------------------


def _votes(
    trial: Trial, store: Datastore, found: tuple[Neighbours, Neighbours], valid: Split, test: Split
) -> Candidates:
    """log p_kNN of the targets with so many of the neighbours found, at every temperature."""
    votes = [(near.scores, values_of(store, near), s.targets) for near, s in zip(found, (valid, test), strict=True)]

    def log_probs(k: int, tau: float, scores: Tensor, values: Tensor, targets: Tensor) -> Tensor:
        return knn_target_log_probs(scores[:, :k], values[:, :k], targets, tau)

    return {
        (k, tau): (log_probs(k, tau, *votes[0]), log_probs(k, tau, *votes[1]))
        for k in trial["neighbours"]
        for tau in trial["temperatures"]
    }


def _approximations(
    trial: Trial, store: Datastore, exact: tuple[Neighbours, Neighbours], valid: Split, test: Split
) -> dict[str, Candidates]:
    """{neighbours exact, approximate} x {scores exact, quantised}, and a datastore of half the entries."""
    index = ApproximateSearch.build(
        store.keys, kind="ivfpq", lists=trial["lists"], effort=trial["probes"], seed=trial.seed
    )
    queries = (valid.states["ffn_input"], test.states["ffn_input"])
    k = max(trial["neighbours"])
    quantised = [index.search(q, k) for q in queries]
    rescored = [
        Neighbours(exact_scores(store.keys, q, n.indices), n.indices) for q, n in zip(queries, quantised, strict=True)
    ]
    mask_only = [Neighbours(index.stored_scores(q, n.indices), n.indices) for q, n in zip(queries, exact, strict=True)]
    both = zip(quantised[1].indices.tolist(), exact[1].indices.tolist(), strict=True)
    trial.note(
        "neighbours of exact search that approximate search finds", np.mean([len({*a} & {*b}) / k for a, b in both])
    )
    rows = trial.numpy_generator("half of the datastore").choice(len(store), len(store) // 2, replace=False)
    half = store.subset(np.sort(rows))
    search = ExactSearch(half.keys, device=trial.device)
    return {
        "knn_approximate": _votes(trial, store, (quantised[0], quantised[1]), valid, test),
        "knn_approximate_neighbours": _votes(trial, store, (rescored[0], rescored[1]), valid, test),
        "knn_approximate_scores": _votes(trial, store, (mask_only[0], mask_only[1]), valid, test),
        "knn_half_datastore": _votes(
            trial, half, (search.search(queries[0], k), search.search(queries[1], k)), valid, test
        ),
    }


def _heads(
    trial: Trial, checkpoint: Checkpoint, stores: dict[str, Datastore], valid: Split, test: Split
) -> dict[str, Candidates]:
    """Softmax layers on the attention representation, trained on the datastore's entries: 3 V rows, V rows, others."""
    weight = checkpoint.model.get_output_embeddings().weight.detach()
    vocabulary = len(weight)
    store = stores["ffn_input"]
    importance = {"frequency": torch.from_numpy(np.bincount(store.values, minlength=vocabulary)).float()}
    if any(kind == "loss" for _, _, kind, _ in trial["heads"]):
        importance["loss"] = _training_loss(checkpoint, stores["hidden"], vocabulary)
    arms: dict[str, Candidates] = {}
    for arm, factor, kind, rates in trial["heads"]:
        arms[arm] = {}
        for lr in rates:
            generator = trial.generator("head")
            head = OverparameterizedHead.from_unembedding(
                weight, allot_rows(importance[kind], factor * vocabulary), noise=0.1, generator=generator
            )
            train_head(
                head.to(trial.device),
                store,
                steps=trial["head_steps"],
                batch_size=trial["head_batch"],
                lr=lr,
                generator=generator,
                on_progress=trial.reporter(arm),
            )
            arms[arm][0, lr] = (_read(trial, head, valid), _read(trial, head, test))
    return arms


@torch.no_grad()
def _training_loss(checkpoint: Checkpoint, store: Datastore, vocabulary: int) -> Tensor:
    """The base's total loss (V,) on each word of the datastore's text, from the vectors that its head reads."""
    weight = checkpoint.model.get_output_embeddings().weight
    total = torch.zeros(vocabulary, dtype=torch.float64)
    for start in range(0, len(store), 2048):
        hidden = torch.from_numpy(np.asarray(store.keys[start : start + 2048], dtype=np.float32)).to(weight)
        words = torch.from_numpy(np.asarray(store.values[start : start + 2048])).long()
        log_probs = read_out(checkpoint.model, hidden).float().log_softmax(-1).cpu()
        total.index_add_(0, words, -log_probs.gather(1, words[:, None])[:, 0].double())
    return total.float()


@torch.no_grad()
def _read(trial: Trial, head: OverparameterizedHead, split: Split) -> Tensor:
    rows = zip(split.states["ffn_input"].split(512), split.targets.split(512), strict=True)
    return torch.cat([head.target_log_probs(h.to(trial.device), t.to(trial.device)).cpu() for h, t in rows])


def _continued(
    trial: Trial, checkpoint: Checkpoint, texts: dict[str, list[list[int]]], lr: float
) -> tuple[Tensor, Tensor]:
    """The base trained further on as many tokens of the same text as a head is trained on."""
    model = copy.deepcopy(checkpoint.model)
    window = _window(checkpoint)
    stream = torch.tensor([token for ids in texts["train"] for token in ids], device=trial.device)
    steps = trial["continued_steps"]
    train(
        model,
        random_batches(stream, trial["continued_batch"], window, generator=trial.generator("continued")),
        steps=steps,
        optimizer=adamw(lr),
        schedule=warmup_cosine(steps, min(10, steps - 1)),
        on_progress=trial.reporter("base continued"),
    )
    further = Checkpoint(model, checkpoint.tokenizer, checkpoint.name, checkpoint.folder)
    return _split(further, texts["valid"]).base, _split(further, texts["test"]).base


def _weights(trial: Trial) -> list[float]:
    return [step / trial["weight_steps"] for step in range(trial["weight_steps"] + 1)]


def _tune(base: Tensor, candidates: Candidates, weights: Sequence[float]) -> tuple[Setting, float]:
    """Setting and mixing weight with the lowest perplexity on the validation targets."""
    grid = [(setting, weight) for setting in candidates for weight in weights]
    return min(grid, key=lambda point: _perplexity(interpolate(base, candidates[point[0]][0], point[1])))


def _perplexity(log_probs: Tensor) -> float:
    return math.exp(min(-float(log_probs.double().mean()), 700.0)) if log_probs.isfinite().all() else math.inf


# -- what readers see --------------------------------------------------------------------------------------------


def _show(
    trial: Trial,
    checkpoint: Checkpoint,
    stores: dict[str, Datastore],
    exact: dict[str, tuple[Neighbours, Neighbours]],
    valid: Split,
    test: Split,
    arms: dict[str, Candidates],
    chosen: dict[str, Tensor],
) -> None:
    def best(tau: float, arm: str) -> float:
        found = [c[0] for at, c in arms[arm].items() if at[1] == tau]
        return min(_perplexity(interpolate(valid.base, c, weight)) for c in found for weight in _weights(trial))

    knn = [arm for arm in ("knn_ffn_input", "knn_hidden", "knn_approximate") if arm in arms]
    trial.figure(
        "Perplexity over the temperature",
        kind="line",
        x=trial["temperatures"],
        series={arm: [best(tau, arm) for tau in trial["temperatures"]] for arm in knn},
        x_label="temperature of the kNN softmax",
        y_label="validation perplexity",
        log_x=True,
        caption="On validation documents, with the best mixing weight at each temperature. The scale of the distances "
        "differs between the keys, and the best temperature with it.",
    )
    inner = [weight for weight in _weights(trial) if weight < 0.9]
    trial.figure(
        "Perplexity over the mixing weight",
        kind="line",
        x=inner,
        series={
            arm: [
                min(_perplexity(interpolate(valid.base, c[0], weight)) for c in arms[arm].values()) for weight in inner
            ]
            for arm in (*knn, "overparameterized_head", "base_continued")
        },
        x_label="weight of the second distribution",
        y_label="validation perplexity",
        caption="On validation documents, with the best temperature at each weight; 0 is the base model alone.",
    )
    counts = np.bincount(stores["ffn_input"].values, minlength=int(test.targets.max()) + 1)
    groups = trial["frequency_groups"]
    rank = torch.from_numpy(counts)[test.targets].argsort(stable=True).tensor_split(groups)
    trial.figure(
        "Gain by how frequent a token is",
        kind="bar",
        x=["rarest", *(str(group) for group in range(2, groups)), "most frequent"],
        series={
            arm: [float((chosen[arm] - test.base)[part].mean()) for part in rank]
            for arm in ("knn_ffn_input", "overparameterized_head", "base_continued")
        },
        x_label="test tokens in equal groups by their frequency in the training text",
        y_label="gain over the base, nats per token",
        caption="Mean gain in log-probability of the test tokens, mixed with the base as tuned.",
    )
    _examples(trial, checkpoint, stores["ffn_input"], exact["ffn_input"][1], test, chosen)


def _examples(
    trial: Trial,
    checkpoint: Checkpoint,
    store: Datastore,
    near: Neighbours,
    test: Split,
    chosen: dict[str, Tensor],
) -> None:
    """The test tokens that gained most, with the training contexts that were found for them."""
    decode = checkpoint.tokenizer.decode
    gain = chosen["knn_ffn_input"] - test.base
    for place in gain.topk(min(3, len(gain))).indices.tolist():
        token = decode(test.targets[place : place + 1])
        contexts = [
            f"...{decode(store.values[max(0, row - 12) : row])} [{decode(store.values[row : row + 1])}]"
            for row in near.indices[place, :4].tolist()
        ]
        trial.example(
            f"Next token {token!r}",
            str(decode(test.targets[max(0, place - 24) : place])),
            {
                "base": f"p = {math.exp(float(test.base[place])):.4f}",
                "knn_ffn_input": f"p = {math.exp(float(chosen['knn_ffn_input'][place])):.4f}\n" + "\n".join(contexts),
            },
        )
