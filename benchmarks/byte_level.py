"""Exact next-byte probabilities along a text: incrementally, from a cold start at every byte, and by re-encoding.

    python benchmarks/byte_level.py [--model house:code] [--texts 4] [--context 300] [--bytes 24]

- re-encode: every sequence that ends before the cut is run whole, without a cache (what the definition asks for);
- cold start: the covers of each longer text anew, one pass over the base and one over what goes on from it;
- incremental: the shipped way, a few tokens a byte on top of the cache;
- calls: one cached forward pass of the same model on one token for every byte, the price that the paper names;
- tokens: the same model on the same text, one cached forward pass a token, for scale.

Validity of sequences is remembered between texts, as in use: the first line says what it costs while nothing is.

Then the same with a vocabulary as large as released ones: ``--vocabulary`` tokens of byte-level BPE trained on the
shipped corpora, under a small untrained model, one text, for each way to judge validity; and, for ``exact``, against
asking the encoder about every token of the vocabulary. 0 leaves this part out.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from machine import machine
from transformers import LlamaConfig, LlamaForCausalLM

from papertrial.lm.corpora import corpus, unseen_by
from papertrial.lm.generation import StepDecoder, evaluating, left_pad
from papertrial.lm.models import load
from papertrial.lm.tokenizers import train_bpe
from papertrial.papers.tokenization.byte_level_probabilities.method import (
    ByteLevelLM,
    Validity,
    encode_prompt,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="house:code")
    parser.add_argument("--validity", default="exact", choices=["exact", "pairwise", "off"])
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--context", type=int, default=300, help="bytes before the first cut")
    parser.add_argument("--bytes", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--vocabulary", type=int, default=50_000)
    parser.add_argument("--long-bytes", type=int, default=120, help="bytes read with the large vocabulary")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    checkpoint = load(options.model)
    lm = ByteLevelLM(checkpoint.model, checkpoint.tokenizer, options.validity)
    plain = ByteLevelLM(checkpoint.model, checkpoint.tokenizer, lm.validity, caching=False)
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

    pairs = list(zip(texts, prompts, strict=True))

    def tokens() -> None:
        calls(lm, prompts, max(len(encode_prompt(lm, t)) - len(encode_prompt(lm, p)) for t, p in pairs))

    start = time.perf_counter()
    exact = incremental()
    first = time.perf_counter() - start
    torch.testing.assert_close(cold(lm), exact, atol=1e-3, rtol=0)  # float32 models
    ways: dict[str, Callable[[], object]] = {
        "re-encode": lambda: cold(plain),
        "cold start": lambda: cold(lm),
        "incremental": incremental,
        "calls": lambda: calls(lm, prompts, options.bytes),
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
    print(f"{'first time':12} {total / first:9,.0f} bytes/s   (validity of what may follow not known yet)")
    base = statistics.median(seconds["re-encode"])
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"{name:12} {total / median:9,.0f} bytes/s   {base / median:6.2f} x re-encode")
    if options.vocabulary:
        large_vocabulary(options.vocabulary, options.long_bytes)


def calls(lm: ByteLevelLM, prompts: list[bytes], count: int) -> None:
    """``count`` forward passes, each on one more token of every prompt."""
    before, mask = left_pad([encode_prompt(lm, prompt) for prompt in prompts], 0)
    with evaluating(lm.model):
        decoder = StepDecoder(lm.model, before, mask)
        for _ in range(count):
            decoder.step(decoder.logits.argmax(-1))


def large_vocabulary(size: int, count: int) -> None:
    """CPU seconds a byte of one text, read byte by byte."""
    texts = [document.text for name in ("code", "prose") for document in corpus(name).documents("train")]
    tokenizer = train_bpe(texts, size)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config).eval()
    text = next(d.text for d in corpus("code").documents("test") if d.text.isascii() and len(d.text) > 4000).encode()
    start, data = text[2000:2060], text[2060 : 2060 + count]
    lm = ByteLevelLM(model, tokenizer, "off")
    began = time.process_time()
    calls(lm, [start], count)
    price = (time.process_time() - began) / count
    print(f"\nvocabulary {len(tokenizer)}, one text of {count} bytes, model of {model.num_parameters():,} parameters")
    print(f"{'one model call a byte':34} {1e3 * price:8.1f} ms a byte")
    for mode in ("off", "pairwise", "exact"):
        began = time.process_time()
        lm = ByteLevelLM(model, tokenizer, mode)
        state = lm.start(start)
        first, began = time.process_time() - began, time.process_time()
        for byte in data:
            lm.next_byte_logprobs(state)
            state = lm.advance(state, byte)
        each = (time.process_time() - began) / count
        print(
            f"{'validity ' + mode:34} {1e3 * each:8.1f} ms a byte   {each / price:6.2f} calls   (start: {first:.1f} s)"
        )
    tails = [source.tail for source in state.rows[0].sources] or [()]
    began = time.process_time()
    asked = [lm.validity.accepts(tails[0], token) for token in range(lm.tokens.size)]
    print(f"{'asking the encoder for every token':34} {1e3 * (time.process_time() - began):8.1f} ms a mask")
    fresh = Validity(lm.tokens)
    assert fresh.mask(tails[0]).tolist() == asked


if __name__ == "__main__":
    main()
