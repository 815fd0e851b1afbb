"""Lossless decoding beside the greedy decoders of transformers: tokens per CPU second, one prompt at a time.

    python benchmarks/chimera.py [--model house:code-fine] [--steps 200] [--prompts 8] [--new-tokens 96]

- generate: transformers, greedy;
- prompt lookup: transformers, drafts copied from the prompt (``prompt_lookup_num_tokens``);
- greedy: this project's, over the same step driver as the drafting decoders;
- medusa, chimera: the drafts of the trial, trained here first, with one tree;
- chimera, chain: the same draft without branches.

All must return the same tokens. What a round is made of is printed below: drafting, and verification.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any, cast

import torch
from machine import machine
from transformers import PreTrainedTokenizerFast

from papertrial.lm.corpora import corpus, encode, random_batches
from papertrial.lm.generation import greedy
from papertrial.lm.models import load, quiet_transformers
from papertrial.papers.decoding.chimera.method import (
    ChimeraDraft,
    MedusaDraft,
    SpecStats,
    TokenTree,
    speculative_generate,
    train_draft,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="house:code-fine")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--nodes", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    checkpoint = load(options.model)
    model, new = checkpoint.model, options.new_tokens
    tokenizer = cast(PreTrainedTokenizerFast, checkpoint.tokenizer)
    stream = encode(tokenizer, corpus("code").texts("train")[:100])
    held = encode(tokenizer, corpus("code").texts("test"))
    prompts = list(held[: options.prompts * options.prompt_tokens].view(options.prompts, 1, -1))
    drafts = {
        "medusa": MedusaDraft(model, 3),
        "chimera": ChimeraDraft(model, 3, generator=torch.Generator().manual_seed(0)),
    }
    for draft in drafts.values():
        batches = random_batches(stream, 8, 64, generator=torch.Generator().manual_seed(0))
        train_draft(draft, model, batches, steps=options.steps, lr=1e-2, warmup=0.05)

    stats: dict[str, list[SpecStats]] = {}

    def speculative(name: str, draft: str, tree: TokenTree) -> Callable[[torch.Tensor], torch.Tensor]:
        def decode(prompt: torch.Tensor) -> torch.Tensor:
            out = speculative_generate(model, drafts[draft], prompt, tree=tree, max_new_tokens=new)
            stats.setdefault(name, []).append(out.stats)
            return out.tokens

        return decode

    def generate(prompt: torch.Tensor, **settings: int) -> torch.Tensor:
        with quiet_transformers():  # it would warn of the end token -1, which never occurs
            sequences = cast(Any, model).generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                max_new_tokens=new,
                eos_token_id=-1,
                pad_token_id=0,
                **settings,
            )
        return cast(torch.Tensor, sequences)[:, prompt.shape[1] :]

    tree, chain = TokenTree.likely(options.nodes, 3), TokenTree.chain(3)
    ways: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "generate": generate,
        "prompt lookup": lambda prompt: generate(prompt, prompt_lookup_num_tokens=3),
        "greedy": lambda prompt: greedy(model, prompt, max_new_tokens=new).tokens,
        "medusa": speculative("medusa", "medusa", tree),
        "chimera": speculative("chimera", "chimera", tree),
        "chimera, chain": speculative("chimera, chain", "chimera", chain),
    }
    for name, way in ways.items():
        assert all(torch.equal(way(prompt), ways["generate"](prompt)) for prompt in prompts), f"{name} is not lossless"
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds):  # in turn, so that a drift of the machine meets all of them
        for name, way in ways.items():
            began = time.process_time()
            for prompt in prompts:
                way(prompt)
            seconds[name].append(time.process_time() - began)
    print(machine("torch", "transformers"))
    print(f"{options.model}, {options.prompts} prompts, {new} new tokens each, tree of {len(tree)} nodes, depth 3")
    base = statistics.median(seconds["greedy"])
    for name, values in seconds.items():
        median = statistics.median(values)
        line = f"{name:15} {options.prompts * new / median:8,.0f} tokens/s   {base / median:5.2f} x greedy"
        if name in stats:
            runs = stats[name]
            tau = statistics.mean(run.tokens_per_forward for run in runs)
            drafting = sum(run.draft_seconds for run in runs)
            share = drafting / (drafting + sum(run.verify_seconds for run in runs))
            line += f"   {tau:.2f} tokens per pass, {100 * share:.0f} % of a round is drafting"
        print(line)


if __name__ == "__main__":
    main()
