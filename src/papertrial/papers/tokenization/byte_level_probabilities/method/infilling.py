"""Infilling prompts whose cut lies anywhere: which tokens go before, and which bytes the answer must begin with."""

from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from papertrial.papers.tokenization.byte_level_probabilities.method.byte_lm import ByteLevelLM
from papertrial.papers.tokenization.byte_level_probabilities.method.covers import base_of

_NAMES = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>"),
    ("<PRE>", "<SUF>", "<MID>"),
)


@dataclass(frozen=True)
class FillTokens:
    """Ids of the three tokens that mark the parts of an infilling prompt."""

    prefix: int
    suffix: int
    middle: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "FillTokens":
        """Those of a tokenizer that names them as Qwen, StarCoder, SantaCoder or Code Llama do.

        Raises
        ------
        ValueError
            If it has none of these names.
        """
        vocabulary = tokenizer.get_vocab()
        for names in _NAMES:
            if all(name in vocabulary for name in names):
                return cls(*(vocabulary[name] for name in names))
        known = ", ".join(names[0] for names in _NAMES)
        raise ValueError(
            f"the tokenizer has no infilling tokens of a known name ({known} ...): give FillTokens yourself"
        )


def infilling_prompt(
    lm: ByteLevelLM,
    prefix: str,
    suffix: str,
    marks: FillTokens,
    *,
    order: Literal["spm", "psm"] = "spm",
) -> tuple[list[int], str]:
    """What to give ``lm.start(text, prefix_ids=...)`` or ``lm.generate`` so that the new bytes fill the gap.

    Parameters
    ----------
    order
        ``spm``: suffix first, then the prefix, which the answer goes on from; a cut inside a token then matters, and
        the exact sum removes the bias (the paper's infilling set-up). ``psm``: the prefix comes first and is closed by
        a mark; its last, unfinished word is taken out of it and the answer is made to begin with that word.

    Returns
    -------
    tuple
        ``prefix_ids`` and ``text``: the answer is what follows ``text``.

    Raises
    ------
    ValueError
        For another order, or parts that do not survive the tokenizer.
    """
    if order not in ("spm", "psm"):
        raise ValueError(f"order must be 'spm' or 'psm', got {order!r}")
    after = lm.tokens.encode_bytes(suffix.encode())
    if order == "spm":
        return [*lm.bos, marks.prefix, marks.suffix, *after, marks.middle], prefix
    data = lm.tokens.dummy_prefix(prefix.encode()) + prefix.encode()
    at, base, _ = base_of(data, lm.validity)
    word = data[at:].decode()
    return [*lm.bos, marks.prefix, *base, marks.suffix, *after, marks.middle], word
