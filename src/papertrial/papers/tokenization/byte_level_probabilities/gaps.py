"""Gaps in source code, and how each way of going on from a cut prompt fills them."""

import ast
import warnings
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from papertrial.lm.generation import greedy, left_pad
from papertrial.papers.tokenization.byte_level_probabilities.method import (
    ByteLevelLM,
    FillTokens,
    encode_prompt,
    infilling_prompt,
    token_healing,
)

GAP = 24
"""Bytes of the longest gap: the rest of a line."""


@dataclass(frozen=True)
class Gap:
    """The rest of a line that is missing from a document."""

    document: bytes
    start: int
    at: int
    end: int


def fill_gap(lm: ByteLevelLM, marks: FillTokens, gap: Gap, suffix_bytes: int) -> dict[str, bytes]:
    """What each arm writes into a gap, greedily, up to the end of the line; all are given the same text."""
    suffix = gap.document[gap.end : gap.end + suffix_bytes].decode()
    given, text = infilling_prompt(lm, gap.document[gap.start : gap.at].decode(), suffix, marks)
    ids, mask = left_pad([encode_prompt(lm, text, given)], 0)
    plain = _line_of_tokens(lm, ids.to(lm.model.device), mask.to(lm.model.device), b"", [])
    healed = token_healing(lm, text, prefix_ids=given)
    last = lm.tokens.bytes_of(int(ids[0, -1])) or b""
    mended = _line_of_tokens(lm, healed.input_ids, healed.attention_mask, last, [healed.processor])
    exact = lm.generate(text, GAP + 1, prefix_ids=given, stop=lambda new: b"\n" in new)
    return {"plain": plain, "token_healing": mended, "exact": _line(exact if isinstance(exact, bytes) else exact[0])}


def _line(text: bytes) -> bytes:
    return text.split(b"\n")[0].split(b"\0")[0]


def _line_of_tokens(
    lm: ByteLevelLM, ids: Tensor, mask: Tensor, given: bytes, processors: list[Callable[[Tensor, Tensor], Tensor]]
) -> bytes:
    """Greedy tokens up to the end of the line or of the answer, without what was ``given`` back."""
    tokens = greedy(lm.model, ids, mask, max_new_tokens=GAP + 2, processors=processors).tokens[0].tolist()
    return _line(b"".join(lm.tokens.bytes_of(token) or b"\0" for token in tokens)[len(given) :])


def compiles(source: bytes) -> bool:
    """Whether it is Python; nothing is run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(source)
    except (SyntaxError, ValueError):
        return False
    return True
