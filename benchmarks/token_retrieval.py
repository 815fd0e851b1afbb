"""Scoring from retrieved tokens (XTR) beside gathering and full MaxSim (ColBERT): seconds per query on this machine.

    python benchmarks/token_retrieval.py [--documents 5000] [--tokens 60] [--k-prime 100 1000]

Unit vectors at random, so the figures are of speed alone. Token retrieval is the same for both and timed apart.
"""

import argparse
import statistics
import time
from unittest import mock

import numpy as np
import torch
from machine import machine
from torch.nn.functional import normalize

from papertrial.papers.retrieval.xtr.method import ColBERTRetriever, TokenIndex, XTRRetriever, multiply_adds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=5000)
    parser.add_argument("--tokens", type=int, default=60, help="of a document, half to one and a half times as many")
    parser.add_argument("--query-tokens", type=int, default=16)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--k-prime", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--queries", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    draw, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    lengths = draw.integers(options.tokens // 2, options.tokens * 3 // 2 + 1, options.documents)
    corpus = [normalize(torch.randn(int(length), options.dim, generator=generator), dim=1) for length in lengths]
    index = TokenIndex.build(corpus, kind="exact")
    queries = [
        normalize(torch.randn(options.query_tokens, options.dim, generator=generator), dim=1)
        for _ in range(options.queries)
    ]
    print(machine("torch", "faiss-cpu"))
    print(
        f"{len(index):,} documents, {index.tokens:,} tokens of width {options.dim}, {options.query_tokens} query tokens"
    )
    print(f"{'k_prime':>8} {'retrieval':>11} {'XTR':>11} {'ColBERT':>11}   operations: XTR, ColBERT")
    for k_prime in options.k_prime:
        seconds: dict[str, list[float]] = {"retrieval": [], "xtr": [], "colbert": []}
        operations: list[tuple[int, int]] = []
        for query in queries:
            near, took = _timed(index.search, query, k_prime)
            seconds["retrieval"].append(took)
            candidates = index.document_of[near.indices].unique().numpy()
            size = {
                "n": len(query), "k_prime": k_prime, "candidates": len(candidates), "dim": options.dim,
                "candidate_tokens": int(lengths[candidates].sum()),
            }  # fmt: skip
            operations.append((multiply_adds("xtr", **size), multiply_adds("colbert", **size)))
            # token retrieval answers at once from here on: what is left is the scoring stage
            with mock.patch.object(index, "search", return_value=near):
                seconds["xtr"].append(_timed(XTRRetriever(index).search, query)[1])
                seconds["colbert"].append(_timed(ColBERTRetriever(index).search, query)[1])
        xtr, colbert = (statistics.mean(pair[i] for pair in operations) for i in (0, 1))
        row = " ".join(f"{1000 * statistics.median(values):8.2f} ms" for values in seconds.values())
        print(f"{k_prime:>8} {row}   {xtr:,.0f}, {colbert:,.0f} ({colbert / xtr:,.0f} times)")


def _timed(call, *arguments):
    start = time.perf_counter()
    result = call(*arguments)
    return result, time.perf_counter() - start


if __name__ == "__main__":
    main()
