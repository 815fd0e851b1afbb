"""Contrastive search beside what one would write first, and beside greedy search: tokens per second on this machine.

    python benchmarks/contrastive_search.py [--model house:prose] [--prompts 8] [--new-tokens 64]

- re-encode: every candidate's whole sequence is run again, as the definition reads (the oracle of the tests);
- repeated rows: k rows per prompt over a repeated cache, as decoders of this kind are usually written;
- looked ahead: the shipped way, k candidates as a tree over one cache.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch
from machine import machine

from papertrial.lm.generation import greedy
from papertrial.lm.models import load
from papertrial.papers.decoding.contrastive_search import method


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="house:prose")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--k", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = load(options.model).model
    shape = (options.prompts, options.prompt_tokens)
    ids = torch.randint(8, model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))

    def search(**settings: bool) -> torch.Tensor:
        return method.contrastive_search(model, ids, k=options.k, max_new_tokens=options.new_tokens, **settings)

    def repeated_rows() -> torch.Tensor:
        with mock.patch.object(method, "can_look_ahead", return_value=False):
            return search()

    ways: dict[str, Callable[[], object]] = {
        "re-encode": lambda: search(use_cache=False),
        "repeated rows": repeated_rows,
        "looked ahead": search,
        "greedy": lambda: greedy(model, ids, max_new_tokens=options.new_tokens),
    }
    assert torch.equal(search(), repeated_rows())
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds):  # in turn, so that a drift of the machine meets all of them
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    print(machine("torch", "transformers"))
    print(f"{options.model}, {shape[0]} prompts x {shape[1]} tokens, {options.new_tokens} new, k = {options.k}")
    base = statistics.median(seconds["re-encode"])
    for name, values in seconds.items():
        median = statistics.median(values)
        rate = options.prompts * options.new_tokens / median
        print(f"{name:14} {rate:10,.0f} tokens/s   {base / median:6.2f} x re-encode")


if __name__ == "__main__":
    main()
