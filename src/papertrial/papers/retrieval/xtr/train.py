"""Train the token encoder that ``papertrial search --ranker xtr`` uses, on docstrings of what is installed here.

python -m papertrial.papers.retrieval.xtr.train [--steps 300] [--out folder]
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from papertrial.errors import UsageError
from papertrial.home import home
from papertrial.lm import sources
from papertrial.lm.docstring_pairs import docstring_pairs
from papertrial.lm.encoders import load_minilm, token_states
from papertrial.papers.retrieval.xtr.method import TokenEncoder, train_encoder

PACKAGES = ("stdlib", "numpy", "scipy", "networkx")
QUERY_TOKENS, DOCUMENT_TOKENS = 32, 64


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, save, and say where."""
    parser = argparse.ArgumentParser(prog="python -m papertrial.papers.retrieval.xtr.train", description=__doc__)
    parser.add_argument("--out", type=Path, default=home() / "models" / "xtr", help="folder (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--k-train", type=int, default=32, help="tokens that a query token retrieves within a batch")
    parser.add_argument("--dim", type=int, default=128, help="width of a token vector")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--pairs", type=int, default=4000, help="at most so many docstrings")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        train_and_save(options)
    except (UsageError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def train_and_save(options: argparse.Namespace) -> None:
    """What the command does."""
    generator = torch.Generator().manual_seed(options.seed)
    checkpoint = load_minilm()
    pairs = docstring_pairs(tuple(package for package in PACKAGES if sources.installed(package)))
    chosen = [pairs[i] for i in torch.randperm(len(pairs), generator=generator)[: options.pairs].tolist()]
    print(f"{len(chosen)} docstrings; states below the trained layer are computed once and kept", flush=True)
    queries = token_states(
        checkpoint, [pair.query.lower() for pair in chosen], layer=-2, max_length=QUERY_TOKENS,
        on_progress=_Progress("queries"),
    )  # fmt: skip
    documents = token_states(
        checkpoint, [pair.document.lower() for pair in chosen], layer=-2, max_length=DOCUMENT_TOKENS,
        on_progress=_Progress("documents"),
    )  # fmt: skip
    encoder = TokenEncoder(checkpoint, options.dim, trained_layers=1, max_length=256, generator=generator)
    report = train_encoder(
        encoder,
        queries,
        documents,
        objective="xtr",
        k_train=options.k_train,
        steps=options.steps,
        batch_size=options.batch,
        lr=options.lr,
        generator=generator,
        on_progress=_Progress("steps"),
    )
    encoder.save(options.out)
    last = report.losses[-min(20, len(report.losses)) :]
    print(f"loss {sum(last) / len(last):.3f}; saved in {options.out}")


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
