"""House tokenizers: byte-level BPE and unigram, trained on the spot, the same from the same texts."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
SPECIALS = (PAD, BOS, EOS)
"""Ids 0, 1 and 2 of every house tokenizer."""


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    *,
    specials: Sequence[str] = (),
    split_words: bool = True,
    padding_side: Literal["left", "right"] = "left",
) -> "PreTrainedTokenizerFast":
    """Byte-level BPE (1508.07909 on bytes, as in GPT-2): any text goes in and comes out byte for byte.

    Parameters
    ----------
    texts : training texts; the result depends on nothing else.
    vocab_size : number of tokens, the 256 bytes and the special tokens included. Fewer if the texts run out of pairs.
    specials : further special tokens (a mask, separators, sentinels), with ids from 3 on.
    split_words : forbid merges across words (GPT-2's pattern); without it, tokens may span spaces.
    padding_side : ``left`` suits decoders, ``right`` encoders.

    Returns
    -------
    tokenizer : with pad, bos and eos set (never added by themselves) and, if named so, ``mask_token``.

    Raises
    ------
    ValueError
        If ``vocab_size`` leaves no room for a merge, or a special token is repeated.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokens = _specials(specials)
    if vocab_size <= 256 + len(tokens):
        raise ValueError(f"vocab_size must exceed {256 + len(tokens)} (bytes and special tokens), got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split_words)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=tokens,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return wrap(tokenizer, tokens, padding_side)


def train_unigram(
    texts: Iterable[str],
    vocab_size: int,
    *,
    specials: Sequence[str] = (),
    padding_side: Literal["left", "right"] = "left",
) -> "PreTrainedTokenizerFast":
    """Unigram language-model tokenizer (1804.10959) over bytes: byte-exact like ``train_bpe``, and takes its arguments.

    The library finds the pieces; it sums in an order left to chance, which shows in the second digit of their scores.
    So the scores are estimated again here, by expectation-maximisation from the same start for every piece.

    Raises
    ------
    ValueError
        If ``vocab_size`` does not exceed the bytes and special tokens, or a special token is repeated.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokens = _specials(specials)
    if vocab_size <= 256 + len(tokens):
        raise ValueError(f"vocab_size must exceed {256 + len(tokens)} (bytes and special tokens), got {vocab_size}")
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size,
        special_tokens=tokens,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    rows = list(texts)
    tokenizer.train_from_iterator(rows, trainer)
    words = Counter(word for row in rows for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(row))
    pieces = sorted(set(tokenizer.get_vocab()) - set(tokens))
    scores = unigram_scores(pieces, words)
    vocabulary = [(token, 0.0) for token in tokens] + sorted(scores.items(), key=lambda item: (-item[1], item[0]))
    tokenizer.model = models.Unigram(vocabulary)
    return wrap(tokenizer, tokens, padding_side)


def unigram_scores(pieces: Sequence[str], words: Mapping[str, int], rounds: int = 6) -> dict[str, float]:
    """Log-probabilities of ``pieces`` that make ``words`` (word to count) likely, all their segmentations summed.

    Expectation-maximisation from equal probabilities (1804.10959, section 3.2). A piece keeps at least the weight of
    half an occurrence, so that each can still be used.
    """
    scores = dict.fromkeys(pieces, -math.log(len(pieces)))
    longest = max(map(len, pieces))
    for _ in range(rounds):
        expected = dict.fromkeys(pieces, 0.5)
        for word, count in sorted(words.items()):
            _expect(word, count, scores, longest, expected)
        total = math.log(sum(expected.values()))
        scores = {piece: math.log(weight) - total for piece, weight in expected.items()}
    return scores


def _expect(word: str, count: int, scores: Mapping[str, float], longest: int, expected: dict[str, float]) -> None:
    """Add the expected count of each piece in ``count`` copies of ``word``: forward and backward sums over its lattice.

    Words of hundreds of characters, whose probability is below the smallest number, are passed over.
    """
    n = len(word)
    arcs = [
        (start, end, word[start:end], math.exp(scores[word[start:end]]))
        for start in range(n)
        for end in range(start + 1, min(n, start + longest) + 1)
        if word[start:end] in scores
    ]
    forward, backward = [1.0] + [0.0] * n, [0.0] * n + [1.0]
    for start, end, _, p in arcs:  # in the order of their starts
        forward[end] += forward[start] * p
    for start, end, _, p in reversed(arcs):
        backward[start] += p * backward[end]
    if forward[n] > 0.0:
        for start, end, piece, p in arcs:
            expected[piece] += count * forward[start] * p * backward[end] / forward[n]


def byte_tokenizer(*, specials: Sequence[str] = ()) -> "PreTrainedTokenizerFast":
    """One token per byte: ids 3 + len(specials) onwards, in the order of the byte values."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokens = _specials(specials)
    alphabet = byte_alphabet()
    vocabulary = {token: index for index, token in enumerate(tokens + [alphabet[byte] for byte in range(256)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens(tokens)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return wrap(tokenizer, tokens, "left")


def byte_alphabet() -> list[str]:
    """The character that stands for each byte value in byte-level vocabularies: printable Latin-1 bytes stand for
    themselves, the other 68 are moved, in order, to U+0100 onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = (byte for byte in range(256) if byte not in set(printable))
    table = {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + n) for n, byte in enumerate(moved)}
    return [table[byte] for byte in range(256)]


def wrap(
    tokenizer: "Tokenizer", tokens: Sequence[str], padding_side: Literal["left", "right"]
) -> "PreTrainedTokenizerFast":
    """A ``tokenizers`` object as the class that transformers takes, with this project's special tokens."""
    from transformers import PreTrainedTokenizerFast

    named: dict[str, Any] = {"pad_token": PAD, "bos_token": BOS, "eos_token": EOS}
    rest = [token for token in tokens if token not in SPECIALS]
    for token in rest:
        if token.strip("<|>[]").lower() in ("mask", "sep", "cls", "unk"):
            named[f"{token.strip('<|>[]').lower()}_token"] = token
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        additional_special_tokens=[token for token in rest if token not in named.values()],
        padding_side=padding_side,
        clean_up_tokenization_spaces=False,
        **named,
    )


def encode_plain(tokenizer: "PreTrainedTokenizerFast", text: str) -> list[int]:
    """Ids of ``text`` taken as mere text: nothing is added, and a special token's name in it is spelled out."""
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def _specials(further: Sequence[str]) -> list[str]:
    tokens = [*SPECIALS, *further]
    if len(set(tokens)) != len(tokens):
        raise ValueError(
            f"special tokens must differ from each other and from {', '.join(SPECIALS)}; got {list(further)}"
        )
    return tokens
