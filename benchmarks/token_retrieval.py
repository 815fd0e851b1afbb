"""Token retrieval with scoring by XTR or by MaxSim, and MaxSim of every document: time per query on this machine.

    python benchmarks/token_retrieval.py [--documents 5000] [--tokens 60] [--k-prime 100 1000]

Unit vectors at random, so the figures are of speed alone; product quantisation does worse on them than on real tokens,
whose neighbours are nearer. Token retrieval is the same for XTR and ColBERT and timed once. Exhaustive search is one
matrix product and a maximum per document: nothing is retrieved, and nothing missed.
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
    exact = TokenIndex.build(corpus, kind="exact")
    compressed, built = _timed(lambda: TokenIndex.build(corpus, kind="ivfpq"))
    queries = [
        normalize(torch.randn(options.query_tokens, options.dim, generator=generator), dim=1)
        for _ in range(options.queries)
    ]
    print(machine("torch", "faiss-cpu"))
    print(
        f"{len(exact):,} documents, {exact.tokens:,} tokens of width {options.dim}, {options.query_tokens} query "
        f"tokens, {options.threads} threads; median of {options.queries} queries"
    )
    sizes = [f"{index.nbytes / 2**20:.0f} MiB" for index in (exact, compressed)]
    print(f"exact index {sizes[0]}; IVF-PQ {sizes[1]}, built in {built:.1f} s")
    print(f"\n{'':34}{'retrieval':>12}{'scoring':>12}{'total':>12}   operations of scoring")
    everything = [_timed(lambda q=query: _exhaustive(exact, q, lengths)) for query in queries]
    operations = options.query_tokens * exact.tokens * options.dim
    _row("exhaustive MaxSim", [0.0] * len(queries), [took for _, took in everything], operations)
    for k_prime in options.k_prime:
        for name, index in (("exact", exact), ("IVF-PQ", compressed)):
            retrieved = [_timed(lambda q=query, i=index, k=k_prime: i.search(q, k)) for query in queries]
            retrieval = [took for _, took in retrieved]
            for scoring, retriever in (("XTR", XTRRetriever(index)), ("ColBERT", ColBERTRetriever(index))):
                spent, same, counts = [], [], []
                for query, (near, _), (best, _) in zip(queries, retrieved, everything, strict=True):
                    # token retrieval answers at once: what is left is the scoring stage
                    with mock.patch.object(index, "search", return_value=near):
                        hits, took = _timed(lambda q=query, r=retriever: r.search(q))
                    spent.append(took)
                    same.append(len({hit.document for hit in hits} & set(best)) / len(best))
                    candidates = index.document_of[near.indices[near.indices >= 0]].unique().numpy()
                    size = {
                        "n": len(query), "k_prime": k_prime, "candidates": len(candidates), "dim": options.dim,
                        "candidate_tokens": int(lengths[candidates].sum()),
                    }  # fmt: skip
                    counts.append(multiply_adds("xtr" if scoring == "XTR" else "colbert", **size))
                label = f"{scoring}, {name}, k' = {k_prime}"
                _row(label, retrieval, spent, statistics.mean(counts), f"; {statistics.mean(same):.0%} of exhaustive's")


def _exhaustive(index: TokenIndex, query: torch.Tensor, lengths: np.ndarray) -> list[int]:
    """The ten best documents by MaxSim over all of them."""
    similarities = torch.from_numpy(np.asarray(index.vectors)) @ query.T
    best = torch.segment_reduce(similarities, "max", lengths=torch.from_numpy(lengths), axis=0)
    return best.mean(1).topk(min(10, len(index))).indices.tolist()


def _row(name: str, retrieval: list[float], scoring: list[float], operations: float, note: str = "") -> None:
    total = [a + b for a, b in zip(retrieval, scoring, strict=True)]
    times = "".join(f"{1000 * statistics.median(values):9.2f} ms" for values in (retrieval, scoring, total))
    print(f"{name:34}{times}   {operations:,.0f}{note}{' ten best' if note else ''}", flush=True)


def _timed(call):
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


if __name__ == "__main__":
    main()
