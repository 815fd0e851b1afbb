"""How fast texts are encoded: this project's encoder against sentence-transformers with the same weights and threads.

    python benchmarks/encoder_speed.py [--texts 200] [--rounds 5]

The two take turns, so that a busy machine slows both; needs the package sentence-transformers. Texts are the cards'
summaries and claims joined to the length of an abstract (``--words``), or the catalogue's abstracts with ``--store``.
"""

import argparse
import os
import subprocess
import sys
import time
from itertools import cycle

import numpy as np
from machine import machine

THREADS = 2
START = """
import time
started = time.perf_counter()
from papertrial.feed.encoder import SentenceEncoder
imported = time.perf_counter()
encoder = SentenceEncoder()
loaded = time.perf_counter()
encoder.encode(["how do language models use a long context"])
print(imported - started, loaded - imported, time.perf_counter() - loaded)
"""


def abstracts(count: int, words: int, use_store: bool) -> list[str]:
    """Texts of an abstract's length, no two alike."""
    if use_store:
        from papertrial.feed.store import Store

        with Store.open() as store:
            changes, _ = store.changes_since(0, limit=20 * count)
        texts = [
            f"{change.paper.title}\n{change.paper.abstract}"
            for change in changes
            if change.paper is not None and change.paper.abstract
        ]
        if len(texts) < 20:
            raise SystemExit("the catalogue has fewer than 20 abstracts; leave --store out")
    else:
        from papertrial.lab.claim import read_cards

        cards = read_cards()
        stream = cycle(" ".join(f"{card.title} {card.summary} {card.limits}" for card in cards).split())
        texts = [" ".join(next(stream) for _ in range(words + offset % 61 - 30)) for offset in range(count)]
    return [text for _, text in zip(range(count), cycle(texts), strict=False)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=200)
    parser.add_argument("--words", type=int, default=175)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--store", action="store_true", help="encode the catalogue's abstracts")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))
    import torch
    from sentence_transformers import SentenceTransformer

    from papertrial.feed.encoder import SentenceEncoder, model_folder

    torch.set_num_threads(THREADS)
    print(machine("onnxruntime", "tokenizers", "torch", "transformers", "sentence-transformers", "numpy"))
    texts = abstracts(arguments.texts, arguments.words, arguments.store)
    plain = SentenceTransformer(str(model_folder()), device="cpu")
    ours = {precision: SentenceEncoder(threads=THREADS, precision=precision) for precision in ("fp32", "int8")}
    words = np.mean([len(text.split()) for text in texts])
    tokens = [len(row) for row in plain.tokenizer(texts, truncation=True, max_length=256)["input_ids"]]
    print(f"{len(texts)} texts of {words:.0f} words and {np.mean(tokens):.0f} tokens on average, {THREADS} threads")

    def rate(encode: object) -> float:
        started = time.perf_counter()
        encode(texts)  # type: ignore[operator]
        return len(texts) / (time.perf_counter() - started)

    contestants = {
        "sentence-transformers, batches of 32": lambda given: plain.encode(
            given, batch_size=32, show_progress_bar=False
        )
    }
    contestants |= {f"this encoder, {precision}": encoder.encode for precision, encoder in ours.items()}
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for encode in contestants.values():
        encode(texts[:16])
    for _ in range(arguments.rounds):
        for name, encode in contestants.items():
            rates[name].append(rate(encode))
    base = np.array(next(iter(rates.values())))
    for name, found in rates.items():
        ratios = np.array(found) / base
        spread = f"{np.median(ratios):.2f} (rounds {ratios.min():.2f} to {ratios.max():.2f})"
        print(f"  {name:40} median {np.median(found):6.1f} texts/s   ratio {spread}")

    reference = plain.encode(texts, batch_size=32, show_progress_bar=False)
    for precision, encoder in ours.items():
        cosines = (encoder.encode(texts) * reference).sum(axis=1)
        print(
            f"  {precision} against sentence-transformers: cosine mean {cosines.mean():.5f}, least {cosines.min():.5f}"
        )
    starts = []
    for _ in range(arguments.rounds):
        run = subprocess.run([sys.executable, "-c", START], capture_output=True, text=True, check=True)
        starts.append([float(part) for part in run.stdout.split()])
    parts = np.median(starts, axis=0) * 1000
    print(f"  start in a new process: import {parts[0]:.0f} ms, load {parts[1]:.0f} ms, first query {parts[2]:.1f} ms")


if __name__ == "__main__":
    main()
