"""Exact next-byte probabilities along a text: incrementally, from a cold start at every byte, and by re-encoding.

    python benchmarks/byte_level.py [--model house:code] [--texts 4] [--context 300] [--bytes 24]

- re-encode: every sequence that ends before the cut is run whole, without a cache (what the definition asks for);
- cold start: the covers of each longer text anew, one pass over the base and one over what goes on from it;
- incremental: the shipped way, a few tokens a byte on top of the cache;
- tokens: the same model on the same text, one cached forward pass a token, for scale.

Validity of sequences is remembered between texts, as in use: the first line says what it costs while nothing is.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from machine import machine

from papertrial.lm.corpora import corpus, unseen_by
from papertrial.lm.generation import StepDecoder, evaluating, left_pad
from papertrial.lm.models import load
from papertrial.papers.tokenization.byte_level_probabilities.method import ByteLevelLM, encode_prompt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="house:code")
    parser.add_argument("--validity", default="exact", choices=["exact", "pairwise", "off"])
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--context", type=int, default=300, help="bytes before the first cut")
    parser.add_argument("--bytes", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    checkpoint = load(options.model)
    lm = ByteLevelLM(checkpoint.model, checkpoint.tokenizer, options.validity)
    plain = ByteLevelLM(checkpoint.model, checkpoint.tokenizer, options.validity)
    plain._caching, plain.validity = False, lm.validity
    documents = corpus("code").documents("test")
    if options.model.startswith("house:"):
        documents = unseen_by(options.model, documents)
    whole = [d.text.encode() for d in documents if len(d.text) > options.context + options.bytes and d.text.isascii()]
    texts = [text[: options.context + options.bytes] for text in whole[: options.texts]]
    prompts = [text[: options.context] for text in texts]

    def incremental() -> torch.Tensor:
        state, found = lm.start(prompts), []
        for at in range(options.context, options.context + options.bytes):
            found.append(lm.next_byte_logprobs(state))
            state = lm.advance(state, [text[at] for text in texts])
        return torch.stack(found)

    def cold(model: ByteLevelLM) -> torch.Tensor:
        ends = range(options.context, options.context + options.bytes)
        return torch.stack([model.next_byte_logprobs(model.start([text[:end] for text in texts])) for end in ends])

    def tokens() -> None:
        before, mask = left_pad([encode_prompt(lm, prompt) for prompt in prompts], 0)
        count = max(len(encode_prompt(lm, text)) for text in texts) - before.shape[1]
        with evaluating(lm.model):
            decoder = StepDecoder(lm.model, before, mask)
            for _ in range(count):
                decoder.step(decoder.logits.argmax(-1))

    start = time.perf_counter()
    exact = incremental()
    first = time.perf_counter() - start
    torch.testing.assert_close(cold(lm), exact, atol=1e-3, rtol=0)  # float32 models
    ways: dict[str, Callable[[], object]] = {
        "re-encode": lambda: cold(plain),
        "cold start": lambda: cold(lm),
        "incremental": incremental,
        "tokens": tokens,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds):  # in turn, so that a drift of the machine meets all of them
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    print(machine("torch", "transformers", "tokenizers"))
    print(
        f"{options.model}, vocabulary {lm.tokens.size}, {len(texts)} texts x {options.bytes} bytes after "
        f"{options.context}, validity {options.validity}"
    )
    total = len(texts) * options.bytes
    print(f"{'first time':12} {total / first:9,.0f} bytes/s   (validity of {len(lm.validity._remembered)} tails found)")
    base = statistics.median(seconds["re-encode"])
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"{name:12} {total / median:9,.0f} bytes/s   {base / median:6.2f} x re-encode")


if __name__ == "__main__":
    main()
