"""Nearest-neighbour search over a datastore: exact in two ways and approximate, time and neighbours found.

    python benchmarks/datastore_search.py [--entries 200000] [--width 128] [--queries 500] [--k 256]

- numpy: brute force, the keys as one float32 matrix, one product and one partition per block of queries;
- cdist and topk: the same in PyTorch;
- exact: the shipped search, keys in float16 read in chunks;
- ivfpq, ivf, hnsw: the shipped approximate searches with their default sizes, and ivfpq re-scored by the keys.

numpy takes its threads from the environment: set OMP_NUM_THREADS to what --threads says.
"""

import argparse
import time

import numpy as np
import torch
from machine import machine

from papertrial.lm.datastore import ApproximateSearch, ExactSearch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=200_000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--k", type=int, default=256)
    parser.add_argument("--kinds", nargs="+", default=["ivfpq", "ivf", "hnsw"])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    draw = np.random.default_rng(0)
    # clusters of clusters: random points have no neighbourhood that an index could use
    centres = draw.standard_normal((options.entries // 100 + 1, options.width))
    points = centres[draw.integers(0, len(centres), options.entries + options.queries)]
    points = (points + 0.5 * draw.standard_normal(points.shape)).astype(np.float32)
    keys, queries = points[: options.entries].astype(np.float16), torch.from_numpy(points[options.entries :])
    print(machine("numpy", "torch", "faiss-cpu"))
    print(f"{options.entries:,} keys of width {options.width}, {options.queries} queries, k = {options.k}")

    whole = torch.from_numpy(keys.astype(np.float32))

    def naive() -> torch.Tensor:
        return torch.cat(
            [torch.cdist(part, whole).topk(options.k, largest=False).indices for part in queries.split(64)]
        )

    matrix, lengths = whole.numpy(), (whole * whole).sum(1).numpy()

    def numpy_brute_force() -> torch.Tensor:
        found = []
        for part in queries.split(64):
            # the query's own length changes no order
            distances = lengths - 2 * (part.numpy() @ matrix.T)
            nearest = np.argpartition(distances, options.k, axis=1)[:, : options.k]
            order = np.take_along_axis(distances, nearest, axis=1).argsort(axis=1)
            found.append(torch.from_numpy(np.take_along_axis(nearest, order, axis=1)))
        return torch.cat(found)

    truth = _report("cdist and topk", naive, None, options.queries)
    _report("numpy", numpy_brute_force, truth, options.queries)
    exact = ExactSearch(keys)
    _report("exact", lambda: exact.search(queries, options.k).indices, truth, options.queries)
    for kind in options.kinds:
        start = time.perf_counter()
        index = ApproximateSearch.build(keys, kind=kind)
        built = f"built in {time.perf_counter() - start:.1f} s, {index.nbytes / 2**20:.0f} MiB"
        _report(kind, lambda index=index: index.search(queries, options.k).indices, truth, options.queries, built)
        if kind == "ivfpq":
            _report(
                "ivfpq, re-scored",
                lambda index=index: index.search(queries, options.k, candidates=4 * options.k, rescore=True).indices,
                truth,
                options.queries,
            )


def _report(name, search, truth, queries, note=""):
    start = time.perf_counter()
    found = search()
    took = time.perf_counter() - start
    share = ""
    if truth is not None:
        rows = zip(found.tolist(), truth.tolist(), strict=True)
        share = f"{100 * np.mean([len({*a} & {*b}) / len(b) for a, b in rows]):5.1f} % found"
    print(f"{name:18} {1000 * took / queries:8.2f} ms a query   {share:14} {note}")
    return found


if __name__ == "__main__":
    main()
