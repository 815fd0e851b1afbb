"""XTR's objective against ColBERT's, and its scoring from retrieved tokens against full MaxSim, on docstrings.

The summary of a docstring asks for the rest of it, among the documents of all modules. Both objectives train the same
start (the last layers of a sentence encoder and a projection) on the same batches for the same number of steps at the
same scale, each at the learning rate that did best for it on the development modules, see ``tuning.py``. A seed is its
own draw of test modules, projection and order of batches.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from papertrial.lab.trial import Trial
from papertrial.lm.docstring_pairs import DocstringPair, docstring_pairs
from papertrial.lm.encoders import load_minilm
from papertrial.lm.models import Checkpoint
from papertrial.lm.ranking import ndcg_at, reciprocal_rank
from papertrial.papers.retrieval.xtr.docstring_search import (
    Search,
    index_of,
    maxsim_mrr,
    maxsim_of_all,
    split_pairs,
)
from papertrial.papers.retrieval.xtr.method import (
    TokenEncoder,
    aggregate,
    mine_negatives,
    multiply_adds,
    token_recall,
    train_encoder,
    vectors_of,
)
from papertrial.papers.retrieval.xtr.method.imputation import Imputation
from papertrial.papers.retrieval.xtr.method.training import Objective, States

SCALES: dict[str, dict[str, Any]] = {
    "smoke": {
        "seeds": 1,
        "packages": ["mpmath"],
        "pairs": 60,
        "queries": 12,
        "query_tokens": 16,
        "document_tokens": 24,
        "trained_layers": 1,
        "dim": 32,
        "steps": 3,
        "batch": 8,
        "k_train": 8,
        "k_train_others": [4],
        "negatives": True,
        "lr": {"colbert": 1e-4, "xtr": 1e-4},
        "scale": 20.0,
        "k_primes": [4, 16, 64, 256],
        "training_must_help": False,  # three steps do not
    },
    "small": {
        "seeds": 5,
        "packages": ["stdlib"],
        "pairs": None,
        "queries": 300,
        "query_tokens": 32,
        "document_tokens": 48,
        "trained_layers": 1,
        "dim": 64,
        "steps": 100,
        "batch": 32,
        "k_train": 64,
        "k_train_others": [],
        "negatives": False,
        "lr": {"colbert": 1e-4, "xtr": 1e-4},
        "scale": 20.0,
        "k_primes": [4, 16, 64, 256],
        "training_must_help": True,
    },
    # the learning rates are a start: python -m papertrial.papers.retrieval.xtr.tuning --scale gpu --device cuda
    "gpu": {
        "seeds": 5,
        "packages": ["stdlib", "numpy", "scipy", "sympy", "networkx"],
        "pairs": None,
        "queries": 500,
        "query_tokens": 48,
        "document_tokens": 256,
        "trained_layers": 6,
        "dim": 128,
        "steps": 2000,
        "batch": 256,
        "k_train": 128,
        "k_train_others": [32, 320],
        "negatives": True,
        "lr": {"colbert": 1e-4, "xtr": 1e-4},
        "scale": 20.0,
        "k_primes": [4, 16, 64, 256, 1000, 10_000],
        "training_must_help": True,
    },
}

OBJECTIVES = ("colbert", "xtr")
SHALLOW, DEEP = 16, 256
"""Tokens retrieved per query token where the claims compare."""

IMPUTATIONS: tuple[Imputation, ...] = ("zero", "mean", "power_law")
"""Compared with the paper's, the last retrieved score, on the same retrieved tokens; no claim rests on them."""


def run(trial: Trial) -> dict[str, dict[str, float]]:
    """One seed; metrics at several depths k' of token retrieval, see the claims."""
    checkpoint = load_minilm(device=trial.device)
    trial.models[checkpoint.name] = checkpoint.digest
    pairs = docstring_pairs(tuple(trial["packages"]))[: trial["pairs"]]
    queries, documents = states(checkpoint, pairs, trial.parameters, trial)
    split = split_pairs(pairs, trial["queries"], trial.numpy_generator("modules"))
    for what, places in (("training pairs", split.train), ("development queries", split.development)):
        trial.note(what, len(places))
    trial.note("test queries", len(split.test))
    trial.note("documents", len(pairs))

    results: dict[str, dict[str, float]] = {}
    searches: dict[str, Search] = {}
    learned: dict[str, float] = {}
    for arm in ("untrained", *OBJECTIVES, *(f"xtr_k{k_train}" for k_train in trial["k_train_others"])):
        encoder = new_encoder(checkpoint, trial.parameters, trial.generator("projection"))
        if arm != "untrained":
            train_arm(
                arm, trial.parameters, encoder, queries, documents, split.train, trial.generator("batches"), trial
            )
        index = index_of(encoder, documents, trial.device)
        held_out = vectors_of(encoder, [queries[place] for place in split.development])
        learned[arm] = Search(index, held_out, split.development, SHALLOW).mrr(SHALLOW)
        trial.note(f"{arm}: MRR@10 of the development queries from 16 tokens", round(learned[arm], 4))
        of_all = maxsim_mrr(index, held_out, split.development)
        trial.note(f"{arm}: MRR@10 of the development queries by full MaxSim", round(of_all, 4))
        asked = vectors_of(encoder, [queries[place] for place in split.test])
        searches[arm] = Search(index, asked, split.test, max(trial["k_primes"]))
        results[arm], results[f"{arm}_maxsim"] = measure(searches[arm], trial, arm)
    # by the score that the first claim compares: XTR gives no gradient to most of what full MaxSim reads
    worse = [name for name in OBJECTIVES if learned[name] <= learned["untrained"]]
    trial.require(
        not (worse and trial["training_must_help"]),
        f"training with the objective of {' and '.join(worse)} taught nothing: MRR@10 of the development queries is "
        f"{', '.join(f'{learned[name]:.4f}' for name in worse)} after {learned['untrained']:.4f} without training",
    )
    trial.note("tokens in the index", searches["xtr"].index.tokens)
    trial.note("share of the index that 256 tokens are, %", round(100 * DEEP / searches["xtr"].index.tokens, 2))
    _show(trial, searches, results, pairs, split.test)
    return results


def states(
    checkpoint: Checkpoint, pairs: Sequence[DocstringPair], scale: Mapping[str, Any], trial: Trial | None = None
) -> tuple[States, States]:
    """What enters the trained layers, of all queries and all documents."""
    encoder = TokenEncoder(checkpoint, None, trained_layers=scale["trained_layers"])
    queries, documents = (
        encoder.states(
            [getattr(pair, part) for pair in pairs],
            max_length=scale[f"{part}_tokens"],
            on_progress=None if trial is None else trial.reporter(f"states of the {part} texts"),
        )
        for part in ("query", "document")
    )
    return queries, documents


def new_encoder(checkpoint: Checkpoint, scale: Mapping[str, Any], generator: torch.Generator) -> TokenEncoder:
    """The start of every arm, with a model of its own."""
    own = copy.copy(checkpoint)
    own.model = copy.deepcopy(checkpoint.model)
    return TokenEncoder(own, scale["dim"], trained_layers=scale["trained_layers"], generator=generator)


def train_arm(
    arm: str,
    scale: Mapping[str, Any],
    encoder: TokenEncoder,
    queries: States,
    documents: States,
    places: Sequence[int],
    batches: torch.Generator,
    trial: Trial | None = None,
) -> None:
    """Train with the objective of ``arm`` on the pairs at ``places``; ``xtr_k32`` is XTR with k_train = 32."""
    objective: Objective = "colbert" if arm == "colbert" else "xtr"
    asked, found = [queries[place] for place in places], [documents[place] for place in places]
    k_train = int(arm.removeprefix("xtr_k")) if arm.startswith("xtr_k") else scale["k_train"]
    train_encoder(
        encoder,
        asked,
        found,
        objective=objective,
        k_train=k_train if objective == "xtr" else None,
        negatives=mine_negatives(encoder, asked, found) if scale["negatives"] else None,
        steps=scale["steps"],
        batch_size=scale["batch"],
        lr=scale["lr"][objective],
        scale=scale["scale"],
        generator=batches,
        on_progress=None if trial is None else trial.reporter(f"training {arm}"),
    )


def measure(search: Search, trial: Trial, arm: str) -> tuple[dict[str, float], dict[str, float]]:
    """Scored from retrieved tokens, and by full MaxSim over the same candidates; also logs curves over k'."""
    own: dict[str, float] = {}
    full: dict[str, float] = {}
    every = [maxsim_of_all(search.index, query) for query in search.queries]
    for k in trial["k_primes"]:
        rows = [_one(search, query, k, scores) for query, scores in enumerate(every)]
        found = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
        trial.log("MRR@10 over tokens retrieved", arm, k, found["mrr"])
        trial.log("MRR@10 over tokens retrieved", f"{arm}, full MaxSim", k, found["full_mrr"])
        trial.log("share of query tokens that retrieve the right document", arm, k, found["recall"])
        if k == SHALLOW:
            own |= {"mrr@10": found["mrr"], "ndcg@10": found["ndcg"], "token_recall@16": found["recall"]}
            full |= {"mrr@10": found["full_mrr"], "ndcg@10": found["full_ndcg"], "token_recall@16": found["recall"]}
        if k == DEEP:
            own["mrr@10_deep"], full["mrr@10_deep"] = found["mrr"], found["full_mrr"]
        if k in (SHALLOW, DEEP):
            name = "scoring_multiply_adds" if k == SHALLOW else "scoring_multiply_adds_deep"
            own[name], full[name] = found["operations"], found["full_operations"]
            trial.note(f"{arm}: candidates at k' = {k}", round(found["candidates"], 1))
    for impute in IMPUTATIONS:
        own[f"mrr@10_{impute}"], own[f"mrr@10_deep_{impute}"] = (search.mrr(k, impute) for k in (SHALLOW, DEEP))
    return own, full


def _one(search: Search, query: int, k: int, every: NDArray[np.floating]) -> dict[str, float]:
    """What one query found; ``every`` is the full MaxSim of all documents."""
    index, relevant = search.index, search.relevant[query]
    near = search.first(query, k)
    found = aggregate(near, index.document_of)
    ranking, right = found.documents[:10].tolist(), {relevant}
    candidates = found.documents.sort().values.numpy()
    in_full = candidates[np.argsort(-every[candidates], kind="stable")[:10]].tolist()
    size: dict[str, int] = {
        "n": near.indices.shape[0],
        "k_prime": near.indices.shape[1],
        "candidates": len(candidates),
        "candidate_tokens": int(np.diff(index.offsets)[candidates].sum()),
        "dim": index.vectors.shape[1],
    }
    return {
        "mrr": reciprocal_rank(ranking, right),
        "ndcg": ndcg_at(ranking, right),
        "recall": token_recall(near, index.document_of, relevant, near.indices.shape[1]),
        "operations": multiply_adds("xtr", **size),
        "full_mrr": reciprocal_rank(in_full, right),
        "full_ndcg": ndcg_at(in_full, right),
        "full_operations": multiply_adds("colbert", **size),
        "candidates": len(candidates),
    }


def _show(
    trial: Trial,
    searches: dict[str, Search],
    results: dict[str, dict[str, float]],
    pairs: list[DocstringPair],
    test: list[int],
) -> None:
    trial.figure(
        "Work of the scoring stage",
        kind="bar",
        x=["from retrieved tokens", "full MaxSim"],
        series={
            f"{arm}, k' = {k}": [results[a][name] for a in (arm, f"{arm}_maxsim")]
            for arm in OBJECTIVES
            for k, name in ((SHALLOW, "scoring_multiply_adds"), (DEEP, "scoring_multiply_adds_deep"))
        },
        y_label="operations per query",
        log_y=True,
        caption="Multiply-adds of MaxSim over the candidates' vectors, and comparisons and additions of scoring from "
        "what token retrieval returned.",
    )
    trial.figure(
        "MRR@10 by what is imputed",
        kind="bar",
        x=["last score", *(impute.replace("_", " ") for impute in IMPUTATIONS)],
        series={
            f"{arm}, k' = {k}": [results[arm][name], *(results[arm][f"{name}_{impute}"] for impute in IMPUTATIONS)]
            for arm in OBJECTIVES
            for k, name in ((SHALLOW, "mrr@10"), (DEEP, "mrr@10_deep"))
        },
        y_label="MRR@10",
        caption="What a query token gives to a document of which it retrieved nothing: its last retrieved score (the "
        "paper's), nothing, the mean of its scores, or a power law through them read further down.",
    )
    for query, place in list(enumerate(test))[:4]:
        outputs = {}
        for arm in OBJECTIVES:
            found = aggregate(searches[arm].first(query, SHALLOW), searches[arm].index.document_of)
            outputs[arm] = "\n".join(
                f"{score:.3f} {'*' if document == place else ' '} {pairs[document].document[:100]}"
                for document, score in zip(found.documents[:3].tolist(), _list(found.scores[:3]), strict=True)
            )
        trial.example(f"Query {query + 1}", pairs[place].query, outputs)


def _list(values: Tensor) -> list[float]:
    return [float(value) for value in values]
