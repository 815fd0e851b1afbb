"""The task of XTR's trials: whose documentation is this summary? Splits by module, and one encoder's search.

Modules are of three kinds. Those of the development part are the same in every run: hyperparameters are chosen on them,
and no trial is tested on them. Of the others each seed draws its test modules, and trains on the rest.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from papertrial.lm.datastore import Neighbours
from papertrial.lm.docstring_pairs import DocstringPair, split_by_module
from papertrial.lm.ranking import reciprocal_rank
from papertrial.papers.retrieval.xtr.method import TokenEncoder, TokenIndex, aggregate, vectors_of
from papertrial.papers.retrieval.xtr.method.imputation import Imputation
from papertrial.papers.retrieval.xtr.method.training import States

DEVELOPMENT = 0.22
"""Share of the modules in the development part."""


@dataclass(frozen=True)
class Split:
    """Places of pairs."""

    train: list[int]
    development: list[int]
    test: list[int]


def is_development(pair: DocstringPair) -> bool:
    """Whether the pair's module is one of those that hyperparameters are chosen on; a matter of its name alone."""
    digest = hashlib.sha256(f"development/{pair.package}/{pair.module}".encode()).digest()
    return int.from_bytes(digest[:4], "big") < DEVELOPMENT * 2**32


def split_pairs(pairs: Sequence[DocstringPair], queries: int, generator: np.random.Generator) -> Split:
    """The development part, ``queries`` test queries of modules drawn from the others, and what is left to train on."""
    place = {id(pair): i for i, pair in enumerate(pairs)}
    train, test = split_by_module([pair for pair in pairs if not is_development(pair)], queries, generator)
    return Split(
        [place[id(pair)] for pair in train],
        [place[id(pair)] for pair in pairs if is_development(pair)],
        [place[id(pair)] for pair in test][:queries],
    )


def index_of(encoder: TokenEncoder, documents: States, device: torch.device | str = "cpu") -> TokenIndex:
    """All documents by their states below the trained layers."""
    return TokenIndex.build(vectors_of(encoder, documents), kind="exact", device=device)


def maxsim_of_all(index: TokenIndex, query: Tensor) -> NDArray[np.floating]:
    """Full MaxSim (C,) of every document for the vectors (n, d) of a query."""
    similarities = (query @ torch.from_numpy(np.asarray(index.vectors, dtype=np.float32)).T).numpy()
    return np.maximum.reduceat(similarities, index.offsets[:-1], axis=1).mean(0)


def maxsim_mrr(index: TokenIndex, queries: Sequence[Tensor], relevant: Sequence[int]) -> float:
    """MRR@10 by full MaxSim over all documents; ``relevant`` holds the document of each query."""
    best = [np.argsort(-maxsim_of_all(index, query), kind="stable")[:10].tolist() for query in queries]
    return float(np.mean([reciprocal_rank(b, {right}) for b, right in zip(best, relevant, strict=True)]))


class Search:
    """What the tokens of some queries (n, d) retrieve from an index, up to ``depth`` each."""

    def __init__(self, index: TokenIndex, queries: Sequence[Tensor], relevant: Sequence[int], depth: int) -> None:
        self.index, self.queries, self.relevant = index, queries, relevant
        near = index.search(torch.cat(list(queries)), depth)
        lengths = [len(query) for query in queries]
        self.near = [
            Neighbours(*pair) for pair in zip(near.scores.split(lengths), near.indices.split(lengths), strict=True)
        ]

    def first(self, query: int, k: int) -> Neighbours:
        """What the tokens of a query retrieved first."""
        return Neighbours(self.near[query].scores[:, :k], self.near[query].indices[:, :k])

    def mrr(self, k: int, impute: Imputation = "last") -> float:
        """MRR@10 scored from the k first retrieved tokens."""
        ranks = []
        for query, right in enumerate(self.relevant):
            found = aggregate(self.first(query, k), self.index.document_of, impute).documents[:10]
            ranks.append(reciprocal_rank(found.tolist(), {right}))
        return float(np.mean(ranks))
