"""How long a search takes on catalogues of a thousand, a hundred thousand and a million papers.

    python benchmarks/search_latency.py [--sizes 1000 100000 1000000] [--queries 300]

Texts are synthetic: words by Zipf's law (exponent 1.07 over 300,000 words, the most frequent ones being English
function words), titles of some 10 and abstracts of some 175 words. Vectors are synthetic too: unit vectors around 4,000
centres. A query is encoded by the real encoder, whose time counts, and its vector is then exchanged for one near a
paper's. Indexing a million papers is mostly the vectors' graph: minutes on two idle cores. Disk and memory are printed.
"""

import argparse
import datetime
import resource
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from machine import machine

from papertrial.feed.encoder import DIMENSIONS, SentenceEncoder
from papertrial.feed.lexical import _FUNCTION_WORDS
from papertrial.feed.search import Document, Filters, Mode, SearchIndex

VOCABULARY, EXPONENT, CENTRES = 300_000, 1.07, 4_000
BATCH = 10_000
FAMILIES = ("attention", "decoding", "tokenization", "retrieval")


class Synthetic:
    """Papers with real term statistics and clustered vectors, the same ones for the same seed."""

    def __init__(self, seed: int = 0) -> None:
        self.source = np.random.default_rng(seed)
        syllables = [c + v for c in "bcdfghjklmnprstvz" for v in "aeiou"]
        made: set[str] = set()
        while len(made) < VOCABULARY:
            lengths = self.source.integers(2, 5, 100_000)
            picks = self.source.integers(0, len(syllables), (100_000, 4))
            made |= {"".join(syllables[p] for p in row[:n]) for row, n in zip(picks, lengths, strict=True)}
        rest = sorted(made)
        self.source.shuffle(rest)
        self.words = np.array((sorted(_FUNCTION_WORDS) + rest)[:VOCABULARY], dtype=object)
        chances = 1.0 / np.arange(1, VOCABULARY + 1) ** EXPONENT
        self.cumulative = np.cumsum(chances / chances.sum())
        self.centres = self.source.normal(size=(CENTRES, DIMENSIONS)).astype(np.float32)

    def text(self, count: int) -> Sequence[str]:
        places = np.searchsorted(self.cumulative, self.source.random(count))
        return list(self.words[np.minimum(places, VOCABULARY - 1)])

    def vectors(self, count: int) -> np.ndarray:
        centres = self.centres[self.source.integers(0, CENTRES, count)]
        made = centres + 0.8 * self.source.standard_normal((count, DIMENSIONS), dtype=np.float32)
        return made / np.linalg.norm(made, axis=1, keepdims=True)

    def batches(self, count: int) -> Iterator[tuple[list[Document], np.ndarray]]:
        for start in range(0, count, BATCH):
            number = min(BATCH, count - start)
            lengths = np.clip(self.source.normal(175, 35, number), 60, 320).astype(int)
            words = self.text(int(lengths.sum()) + 10 * number)
            documents, place = [], 0
            for row in range(number):
                key, end = start + row, place + 10 + int(lengths[row])
                documents.append(
                    Document(
                        key=key,
                        title=" ".join(words[place : place + 10]),
                        abstract=" ".join(words[place + 10 : end]),
                        authors=("Some Body", "Any One"),
                        arxiv_id=f"{2000 + key // 100_000}.{key % 100_000:05d}",
                        family=FAMILIES[key % len(FAMILIES)],
                        published=datetime.date(2010, 1, 1) + datetime.timedelta(days=key % 6000),
                    )
                )
                place = end
            yield documents, self.vectors(number)


class ExchangedVectors:
    """Encodes for real, then gives a vector of the synthetic kind in place of the text's."""

    def __init__(self, synthetic: Synthetic) -> None:
        self.encoder, self.synthetic = SentenceEncoder(), synthetic
        self.name = self.encoder.name

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        return self.synthetic.vectors(len(self.encoder.encode(texts)))


def resident_mib() -> float:
    """Memory of this process now, file pages that it has mapped included."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return float("nan")
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def percentiles(seconds: Sequence[float]) -> str:
    p50, p99 = np.quantile(seconds, [0.5, 0.99]) * 1000
    return f"p50 {p50:7.1f} ms   p99 {p99:7.1f} ms   max {max(seconds) * 1000:7.1f} ms"


def measure(count: int, queries: int, commit: int) -> None:
    synthetic = Synthetic()
    with tempfile.TemporaryDirectory() as folder:
        encoder = ExchangedVectors(synthetic)
        index = SearchIndex(Path(folder), encoder)
        started, making, samples, pending, revision = time.perf_counter(), 0.0, [], 0, 0
        batches = synthetic.batches(count)
        while True:
            before = time.perf_counter()
            batch = next(batches, None)
            making += time.perf_counter() - before
            if batch is None:
                break
            index.add(*batch)
            samples += [batch[0][row].abstract for row in range(0, len(batch[0]), 37)]
            pending += len(batch[0])
            if pending >= commit:
                revision, pending = revision + 1, 0
                index.commit(revision)
        if pending:
            index.commit(revision + 1)
        building = time.perf_counter() - started - making
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()) / 2**20
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"\n{count:,} papers: indexed in {building:.0f} s without encoding; {size:.0f} MiB on disk, ", end="")
        print(f"peak {peak:.0f} MiB")

        index = SearchIndex(Path(folder), encoder)
        picks = np.random.default_rng(1)

        def asked(length: int) -> list[str]:
            found = []
            for _ in range(queries):
                words = samples[picks.integers(len(samples))].split()
                start = picks.integers(0, max(1, len(words) - length))
                found.append(" ".join(words[start : start + length]))
            return found

        recent = Filters(since=datetime.date(2024, 1, 1), families=["attention", "decoding"])
        one_day = Filters(since=datetime.date(2026, 1, 1), until=datetime.date(2026, 1, 1))
        started = time.perf_counter()
        index.search("warm up")
        print(f"  first search after opening: {(time.perf_counter() - started) * 1000:.0f} ms")
        runs: list[tuple[str, list[str], Mode, Filters]] = [
            ("3 words, hybrid", asked(3), "hybrid", Filters()),
            ("8 words, hybrid", asked(8), "hybrid", Filters()),
            ("sentence of 20 words, hybrid", asked(20), "hybrid", Filters()),
            ("8 words, lexical", asked(8), "lexical", Filters()),
            ("8 words, dense", asked(8), "dense", Filters()),
            ("8 words, hybrid, 2 families of 4, 15 % of dates", asked(8), "hybrid", recent),
            ("8 words, hybrid, one day", asked(8), "hybrid", one_day),
        ]
        for name, texts, mode, filters in runs:
            spent = []
            for text in texts:
                started = time.perf_counter()
                index.search(text, mode=mode, filters=filters)
                spent.append(time.perf_counter() - started)
            print(f"  {name:50} {percentiles(spent)}")
        print(f"  recall@10 of the vector half against an exact scan: {recall(index, synthetic, count):.3f}")
        print(f"  memory while searching: {resident_mib():.0f} MiB resident (mapped file pages included)")


def recall(index: SearchIndex, synthetic: Synthetic, count: int) -> float:
    """Share of the true ten nearest (by float query and stored codes) that search finds, over 100 queries."""
    view = index._refresh().dense
    shares = []
    for query in synthetic.vectors(100):
        scored: list[tuple[float, int]] = []
        for segment in view.segments:
            for start in range(0, len(segment.rows), 100_000):
                rows = np.arange(start, min(start + 100_000, len(segment.rows)))
                scores = (segment.codes[rows] @ query) / np.linalg.norm(segment.codes[rows].astype(np.float32), axis=1)
                best = np.argpartition(-scores, min(10, len(scores) - 1))[:10]
                scored += [(-float(scores[place]), int(segment.keys[rows[place]])) for place in best]
        truth = {key for _, key in sorted(scored)[:10]}
        found = {key for key, _ in view.search(query, 200, Filters())[:10]}
        shares.append(len(truth & found) / min(10, count))
        if len(shares) * count > 2e7:  # twenty exact scans of a million are enough
            break
    return float(np.mean(shares))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 100_000, 1_000_000])
    parser.add_argument("--queries", type=int, default=300)
    parser.add_argument("--commit", type=int, default=1_000_000, help="papers in one commit of the index")
    arguments = parser.parse_args()
    print(machine("tantivy", "onnxruntime", "usearch", "tokenizers", "numpy"))
    print("synthetic texts and vectors, two threads; query encoding is real and counted")
    for count in arguments.sizes:
        measure(count, arguments.queries, arguments.commit)


if __name__ == "__main__":
    main()
