"""Train further the token encoder of ``papertrial search --ranker xtr``, on docstrings of what is installed here.

python -m papertrial.papers.retrieval.xtr.train [--steps 100] [--out folder]

The ranker needs no training: without this it reads the sentence encoder's tokens as they are. What is trained here is
saved only if, on docstrings of modules held out from training, it ranks better than that. Docstrings are not papers:
what is better for them need not be for a catalogue, see ``benchmarks/search_quality.py``. To go back, remove the
folder.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from papertrial.errors import UsageError
from papertrial.home import home
from papertrial.lm import sources
from papertrial.lm.docstring_pairs import docstring_pairs, split_by_module
from papertrial.lm.encoders import load_minilm
from papertrial.papers.retrieval.xtr.docstring_search import Search, index_of
from papertrial.papers.retrieval.xtr.method import TokenEncoder, train_encoder, vectors_of
from papertrial.papers.retrieval.xtr.method.training import States

PACKAGES = ("stdlib", "numpy", "scipy", "networkx")
QUERY_TOKENS, DOCUMENT_TOKENS = 32, 64
TOKENS_RETRIEVED = 1000
"""Per query token where encoders are compared, as in a search."""
LONGEST = 256
"""Tokens that the trained encoder reads of a text."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, compare, save, and say where."""
    parser = argparse.ArgumentParser(
        prog="python -m papertrial.papers.retrieval.xtr.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=home() / "models" / "xtr", help="folder (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--k-train", type=int, default=64, help="tokens that a query token retrieves within a batch")
    parser.add_argument("--dim", type=int, help="width of a token vector (default: the encoder's own, unprojected)")
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--pairs", type=int, default=4000, help="at most so many docstrings")
    parser.add_argument("--held-out", type=int, default=300, help="docstrings to compare on, by whole modules")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        train_and_save(options)
    except (UsageError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def train_and_save(options: argparse.Namespace) -> None:
    """What the command does.

    Raises
    ------
    UsageError
        If the trained encoder ranks no better than the one it started from; nothing is saved then.
    """
    generator = torch.Generator().manual_seed(options.seed)
    checkpoint = load_minilm()
    pairs = docstring_pairs(tuple(package for package in PACKAGES if sources.installed(package)))
    chosen = [pairs[i] for i in torch.randperm(len(pairs), generator=generator)[: options.pairs].tolist()]
    if not chosen:
        raise UsageError(f"there is no docstring to train on in {', '.join(PACKAGES)}; at least one is needed")
    train, held_out = split_by_module(chosen, options.held_out, np.random.default_rng(options.seed))
    print(f"{len(train)} docstrings to train on, {len(held_out)} of other modules held out to compare", flush=True)
    untrained = TokenEncoder(checkpoint, None, trained_layers=1, max_length=LONGEST)
    queries, documents = (
        untrained.states([getattr(pair, part).lower() for pair in [*train, *held_out]], max_length=tokens,
                         on_progress=_Progress(f"reading {part} texts"))
        for part, tokens in (("query", QUERY_TOKENS), ("document", DOCUMENT_TOKENS))
    )  # fmt: skip
    before = _quality(untrained, queries, documents, len(train))
    encoder = TokenEncoder(checkpoint, options.dim, trained_layers=1, max_length=LONGEST, generator=generator)
    report = train_encoder(
        encoder,
        queries[: len(train)],
        documents[: len(train)],
        objective="xtr",
        k_train=options.k_train,
        steps=options.steps,
        batch_size=options.batch,
        lr=options.lr,
        generator=generator,
        on_progress=_Progress("steps"),
    )
    after = _quality(encoder, queries, documents, len(train))
    last = report.losses[-min(20, len(report.losses)) :]
    print(f"training loss {sum(last) / len(last):.3f}; held-out MRR@10 {after:.4f}, without training {before:.4f}")
    if after <= before:
        raise UsageError(
            "the trained encoder ranks held-out docstrings no better than the untrained one, so it was not saved; try "
            "a smaller --lr or fewer --steps, or go without: --ranker xtr needs no training"
        )
    encoder.save(options.out)
    print(f"saved in {options.out}")


def _quality(encoder: TokenEncoder, queries: States, documents: States, trained_on: int) -> float:
    """MRR@10 of the queries after the first ``trained_on``, among all documents."""
    asked = vectors_of(encoder, queries[trained_on:])
    index = index_of(encoder, documents)
    depth = min(TOKENS_RETRIEVED, index.tokens)
    return Search(index, asked, range(trained_on, len(documents)), depth).mrr(depth)


class _Progress:
    """A line every five seconds."""

    def __init__(self, what: str) -> None:
        self.what, self.told = what, time.monotonic()

    def __call__(self, done: int, total: int | None) -> None:
        if time.monotonic() - self.told > 5:
            self.told = time.monotonic()
            print(f"{self.what}: {done:,} of {total or 0:,}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
