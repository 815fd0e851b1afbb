"""XTR's objective against ColBERT's, and its scoring from retrieved tokens against full MaxSim, on docstrings.

The summary of a docstring asks for the rest of it, among the documents of all modules. Both objectives train the same
start (the last layers of a sentence encoder and a projection) on the same batches for the same number of steps at the
same learning rate and scale. A seed is its own split by module, projection and order of batches.

Of k_train = 16 and 64 the second retrieved more of the right tokens on the split of a pilot, at the same rank of the
right document.
"""

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from papertrial.lab.trial import Trial
from papertrial.lm.datastore import Neighbours
from papertrial.lm.docstring_pairs import DocstringPair, docstring_pairs, split_by_module
from papertrial.lm.encoders import load_minilm, token_states
from papertrial.lm.models import Checkpoint
from papertrial.lm.ranking import ndcg_at, reciprocal_rank
from papertrial.papers.retrieval.xtr.method import (
    TokenEncoder,
    TokenIndex,
    aggregate,
    multiply_adds,
    token_recall,
    train_encoder,
    vectors_of,
)
from papertrial.papers.retrieval.xtr.method.imputation import Imputation

SCALES = {
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
        "lr": 5e-4,
        "scale": 20.0,
        "k_primes": [4, 16, 64, 256],
    },
    "small": {
        "seeds": 3,
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
        "lr": 5e-4,
        "scale": 20.0,
        "k_primes": [4, 16, 64, 256],
    },
    "gpu": {
        "seeds": 5,
        "packages": ["stdlib", "numpy", "scipy", "sympy", "networkx"],
        "pairs": None,
        "queries": 1000,
        "query_tokens": 48,
        "document_tokens": 256,
        "trained_layers": 6,
        "dim": 128,
        "steps": 2000,
        "batch": 256,
        "k_train": 128,
        "lr": 1e-4,
        "scale": 20.0,
        "k_primes": [4, 16, 64, 256, 1000],
    },
}

SHALLOW, DEEP = 16, 256
"""Tokens retrieved per query token where the claims compare."""

IMPUTATIONS: tuple[Imputation, ...] = ("zero", "mean", "power_law")
"""Compared with the paper's, the last retrieved score, on the same retrieved tokens; no claim rests on them."""


def run(trial: Trial) -> dict[str, dict[str, float]]:
    """One seed; metrics at several depths k' of token retrieval, see the claims."""
    checkpoint = load_minilm(device=trial.device)
    trial.models[checkpoint.name] = checkpoint.digest
    pairs = docstring_pairs(tuple(trial["packages"]))[: trial["pairs"]]
    below = -1 - trial["trained_layers"]
    queries, documents = (
        token_states(
            checkpoint, [getattr(pair, part) for pair in pairs], layer=below, max_length=trial[f"{part}_tokens"],
            on_progress=trial.reporter(f"states of the {part} texts"),
        )
        for part in ("query", "document")
    )  # fmt: skip
    train, test = _split(trial, pairs)
    trial.note("training pairs", len(train))
    trial.note("test queries", len(test))
    trial.note("documents", len(pairs))

    results: dict[str, dict[str, float]] = {}
    searches: dict[str, Search] = {}
    for arm in ("untrained", "colbert", "xtr"):
        encoder = _encoder(trial, checkpoint)
        if arm != "untrained":
            train_encoder(
                encoder,
                [queries[i] for i in train],
                [documents[i] for i in train],
                objective="xtr" if arm == "xtr" else "colbert",
                k_train=trial["k_train"] if arm == "xtr" else None,
                steps=trial["steps"],
                batch_size=trial["batch"],
                lr=trial["lr"],
                scale=trial["scale"],
                generator=trial.generator("batches"),
                on_progress=trial.reporter(f"training {arm}"),
            )
        searches[arm] = Search(trial, encoder, [queries[i] for i in test], documents, test)
        results[arm], results[f"{arm}_maxsim"] = searches[arm].measure(trial, arm)
    trial.note("tokens in the index", searches["xtr"].index.tokens)
    trial.note("share of the index that 256 tokens are, %", round(100 * DEEP / searches["xtr"].index.tokens, 2))
    _show(trial, searches, results, pairs, test)
    return results


def _split(trial: Trial, pairs: list[DocstringPair]) -> tuple[list[int], list[int]]:
    """Places of training pairs and of test queries, from modules apart."""
    train, test = split_by_module(pairs, trial["queries"], trial.numpy_generator("modules"))
    place = {id(pair): i for i, pair in enumerate(pairs)}
    return [place[id(pair)] for pair in train], [place[id(pair)] for pair in test][: trial["queries"]]


def _encoder(trial: Trial, checkpoint: Checkpoint) -> TokenEncoder:
    own = copy.copy(checkpoint)
    own.model = copy.deepcopy(checkpoint.model)
    layers = trial["trained_layers"]
    return TokenEncoder(own, trial["dim"], trained_layers=layers, generator=trial.generator("projection"))


class Search:
    """One encoder's index over all documents, and what its token retrieval finds for the test queries."""

    def __init__(self, trial: Trial, encoder: TokenEncoder, queries: Any, documents: Any, relevant: list[int]) -> None:
        self.index = TokenIndex.build(vectors_of(encoder, documents), kind="exact", device=trial.device)
        self.queries = vectors_of(encoder, queries)
        self.relevant = relevant
        near = self.index.search(torch.cat(self.queries), max(trial["k_primes"]))
        lengths = [len(query) for query in self.queries]
        self.near = [
            Neighbours(*pair) for pair in zip(near.scores.split(lengths), near.indices.split(lengths), strict=True)
        ]
        flat = torch.from_numpy(np.asarray(self.index.vectors, dtype=np.float32))
        # (C,) per query: full MaxSim of every document
        self.full = [
            np.maximum.reduceat((query @ flat.T).numpy(), self.index.offsets[:-1], axis=1).mean(0)
            for query in self.queries
        ]

    def measure(self, trial: Trial, arm: str) -> tuple[dict[str, float], dict[str, float]]:
        """Scored from retrieved tokens, and by full MaxSim over the same candidates; also logs curves over k'."""
        own: dict[str, float] = {}
        full: dict[str, float] = {}
        for k in trial["k_primes"]:
            values = np.mean([self._one(query, k) for query in range(len(self.queries))], axis=0)
            names = ("mrr", "ndcg", "recall", "operations", "full_mrr", "full_ndcg", "full_operations", "candidates")
            found = dict(zip(names, values.tolist(), strict=True))
            trial.log("MRR@10 over tokens retrieved", arm, k, found["mrr"])
            trial.log("MRR@10 over tokens retrieved", f"{arm}, full MaxSim", k, found["full_mrr"])
            trial.log("share of query tokens that retrieve the right document", arm, k, found["recall"])
            if k == SHALLOW:
                own |= {"mrr@10": found["mrr"], "ndcg@10": found["ndcg"], "token_recall@16": found["recall"]}
                full |= {"mrr@10": found["full_mrr"], "ndcg@10": found["full_ndcg"], "token_recall@16": found["recall"]}
                own["scoring_multiply_adds"] = found["operations"]
                full["scoring_multiply_adds"] = found["full_operations"]
                trial.note(f"{arm}: candidates at k' = 16", round(found["candidates"], 1))
            if k == DEEP:
                own["mrr@10_deep"], full["mrr@10_deep"] = found["mrr"], found["full_mrr"]
        for impute in IMPUTATIONS:
            own[f"mrr@10_{impute}"], own[f"mrr@10_deep_{impute}"] = (self._imputed(k, impute) for k in (SHALLOW, DEEP))
        return own, full

    def _imputed(self, k: int, impute: Imputation) -> float:
        """MRR@10 with another imputation."""
        ranks = []
        for near, right in zip(self.near, self.relevant, strict=True):
            first = Neighbours(near.scores[:, :k], near.indices[:, :k])
            found = aggregate(first, self.index.document_of, impute).documents[:10]
            ranks.append(reciprocal_rank(found.tolist(), {right}))
        return float(np.mean(ranks))

    def _one(self, query: int, k: int) -> tuple[float, ...]:
        near = Neighbours(self.near[query].scores[:, :k], self.near[query].indices[:, :k])
        found = aggregate(near, self.index.document_of)
        ranking, right = found.documents[:10].tolist(), {self.relevant[query]}
        candidates = found.documents.sort().values.numpy()
        scores = self.full[query][candidates]
        in_full = candidates[np.argsort(-scores, kind="stable")[:10]].tolist()
        size: dict[str, int] = {
            "n": near.indices.shape[0],
            "k_prime": near.indices.shape[1],
            "candidates": len(candidates),
            "candidate_tokens": int(np.diff(self.index.offsets)[candidates].sum()),
            "dim": self.index.vectors.shape[1],
        }
        return (
            reciprocal_rank(ranking, right),
            ndcg_at(ranking, right),
            token_recall(near, self.index.document_of, self.relevant[query], near.indices.shape[1]),
            multiply_adds("xtr", **size),
            reciprocal_rank(in_full, right),
            ndcg_at(in_full, right),
            multiply_adds("colbert", **size),
            len(candidates),
        )


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
            arm: [results[a]["scoring_multiply_adds"] for a in (arm, f"{arm}_maxsim")] for arm in ("colbert", "xtr")
        },
        y_label="operations per query at k' = 16",
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
            for arm in ("colbert", "xtr")
            for k, name in ((SHALLOW, "mrr@10"), (DEEP, "mrr@10_deep"))
        },
        y_label="MRR@10",
        caption="What a query token gives to a document of which it retrieved nothing: its last retrieved score (the "
        "paper's), nothing, the mean of its scores, or a power law through them read further down.",
    )
    for query, place in list(enumerate(test))[:4]:
        outputs = {}
        for arm in ("colbert", "xtr"):
            near = Neighbours(*(values[:, :SHALLOW] for values in searches[arm].near[query]))
            found = aggregate(near, searches[arm].index.document_of)
            outputs[arm] = "\n".join(
                f"{score:.3f} {'*' if document == place else ' '} {pairs[document].document[:100]}"
                for document, score in zip(found.documents[:3].tolist(), _list(found.scores[:3]), strict=True)
            )
        trial.example(f"Query {query + 1}", pairs[place].query, outputs)


def _list(values: Tensor) -> list[float]:
    return [float(value) for value in values]
