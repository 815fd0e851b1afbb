"""Which token sequences an encoder can produce: the condition under the sum of the representation lemma.

A sequence is valid if some text is encoded to tokens that begin with it. For plain BPE that is the same as "encoding
its bytes gives it back". A pre-tokenizer that looks ahead makes a difference: GPT-2 cuts a run of blanks before its
last blank only if a word follows, so that after ``"a  "`` both ``[a][ ][ ]`` and ``[a][  ]`` may still be on their
way. Here every cut that some continuation would cause is considered, and the lemma stays exact.
"""

import unicodedata
from collections import OrderedDict
from collections.abc import Iterator
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from papertrial.lm.token_bytes import TokenBytes
from papertrial.papers.tokenization.byte_level_probabilities.method.bulk import BulkCheck, looks_ahead
from papertrial.papers.tokenization.byte_level_probabilities.method.characters import (
    FOLLOWERS,
    characters,
    composed_followers,
    continuation_bytes,
    followers,
    last_starter,
    utf8,
)

Mode = Literal["exact", "pairwise", "off"]

RECENT = 8
"""Pieces at the end of a text among which the last settled cut is looked for."""

MASK_BYTES = 64 * 2**20
"""Memory for remembered masks."""


class Validity:
    """Valid continuations of a token sequence.

    Parameters
    ----------
    tokens
        The tokenizer.
    mode
        ``exact``; ``pairwise`` (each token against its predecessor only: the same for BPE without pre-tokenizer,
        nearly the same with one, and remembered per token instead of per word); ``off`` (every token passes).

    Notes
    -----
    What decides lies after the last cut that no continuation can move, the *tail* of a sequence: the current word, as
    a rule. Everything here is remembered per tail. Pre-tokenizers may look ahead over blanks and contractions; other
    lookahead is not known from any published decoder and would not be seen.

    Raises
    ------
    ValueError
        For an unknown mode, or a tokenizer whose encoding is not BPE or not invertible.
    """

    def __init__(self, tokens: TokenBytes, mode: Mode = "exact") -> None:
        if mode not in get_args(Mode):
            raise ValueError(f"validity must be one of {', '.join(get_args(Mode))}; got {mode!r}")
        if tokens.lossy is not None:
            raise ValueError(f"this tokenizer cannot be inverted: {tokens.lossy}; use one that keeps every byte")
        if tokens.algorithm != "BPE":
            raise ValueError(
                f"the encoder is {tokens.algorithm}; which of its sequences are valid depends on all of the text to "
                "come (only BPE decides it locally): use a model with a BPE tokenizer"
            )
        self.tokens, self.mode = tokens, mode
        self._remembered: OrderedDict[tuple[int, ...], Tensor] = OrderedDict()
        self._fallback: dict[bytes, bool] = {}
        self._room = max(16, MASK_BYTES // tokens.size)
        self.textual = torch.tensor([bool(tokens.bytes_of(token)) for token in range(tokens.size)])
        self._cuts: dict[tuple[str, str], tuple[int, ...]] = {}

    # -- what is asked -------------------------------------------------------------------------------------------

    def tail(self, sequence: tuple[int, ...]) -> tuple[int, ...]:
        """The end of a sequence that decides what may follow it."""
        if not self.tokens.splits:
            return self._last_whole(sequence)
        data = self._join(sequence)
        whole, partial = utf8(data) or ("", b"")
        if partial:  # cuts before an unfinished character are judged without it
            data = data[: len(data) - len(partial)]
        start = self._steady_cut(whole)  # under NFC, a mark to come could still change the last character
        at, first = 0, 0
        while at < start:
            at += len(self.tokens.bytes_of(sequence[first]) or b"")
            first += 1
        return sequence[first:]

    def mask(self, tail: tuple[int, ...]) -> Tensor:
        """Bool (V,): the tokens that may follow a tail. Special tokens never may."""
        if self.mode == "off":
            return self.textual
        if self.mode == "pairwise":
            tail = self._last_whole(tail)
        found = self._remembered.get(tail)
        if found is None:
            found = self._all(tail)
            self._remembered[tail] = found
            if len(self._remembered) > self._room:
                self._remembered.popitem(last=False)
        else:
            self._remembered.move_to_end(tail)
        return found

    def accepts(self, tail: tuple[int, ...], token: int) -> bool:
        """Whether one token may follow a tail; exact even where masks are off."""
        if self.mode == "pairwise":
            tail = self._last_whole(tail)
        found = self._remembered.get(tail)
        return bool(found[token]) if found is not None else self._accepts(tail, token)

    def may_end(self, tail: tuple[int, ...]) -> bool:
        """Whether a text may end after a tail: then it must be the encoding of its own bytes."""
        data = self._join(tail)
        head = continuation_bytes(data)
        found = utf8(data[head:])
        if found is None or found[1]:
            return False
        if head:
            return True  # begins inside a character, which happens without pre-tokenizer only; pairs were checked
        return self._canonical(found[0]) == tail

    # -- how it is decided ---------------------------------------------------------------------------------------

    def _join(self, sequence: tuple[int, ...]) -> bytes:
        return b"".join(self.tokens.bytes_of(token) or b"" for token in sequence)

    def _last_whole(self, sequence: tuple[int, ...]) -> tuple[int, ...]:
        """The last token, with those before it that hold the beginning of its first character; under NFC also those
        that hold the character that its marks belong to."""
        for length in range(1, len(sequence) + 1):
            end = sequence[-length:]
            data = self._join(end)
            if not continuation_bytes(data) and not (self.tokens.composed and self._only_marks(data)):
                return end
        return sequence

    def _only_marks(self, data: bytes) -> bool:
        found = utf8(data)
        return found is not None and all(unicodedata.combining(character) for character in found[0])

    def _canonical(self, text: str) -> tuple[int, ...]:
        return tuple(token for piece in self.tokens.pieces(text) for token in self.tokens.cut(piece))

    @cached_property
    def _bulk(self) -> BulkCheck:
        return BulkCheck(self.tokens, self._accepts)

    def _all(self, tail: tuple[int, ...]) -> Tensor:
        """``_accepts`` for every token."""
        mask = self._bulk.mask(tail)
        if mask is None:
            return torch.tensor([self._accepts(tail, token) for token in range(self.tokens.size)])
        return torch.from_numpy(mask)

    def _accepts(self, tail: tuple[int, ...], token: int) -> bool:
        new = self.tokens.bytes_of(token)
        if not new:
            return False
        data = self._join(tail) + new
        found = utf8(data)
        if found is None:
            return False
        sequence = (*tail, token)
        whole, partial = found
        if not self._stays(whole, partial):
            return False
        if self.tokens.kind == "sentencepiece":
            return self._accepts_pieces(sequence, whole, partial)
        if not partial:
            if self._canonical(whole) == sequence:
                return True
            if not self.tokens.splits or not looks_ahead(whole):
                return False
        elif not self.tokens.splits:
            return self.tokens.cut(self.tokens.spell(data)) == sequence
        return any(cut == sequence for cut in self._possible(data, whole, partial))

    def _stays(self, whole: str, partial: bytes) -> bool:
        """Whether the encoder's normalizer may leave a text that begins like this alone."""
        if not self.tokens.composed:
            return True
        return self.tokens.is_normal(whole) and bool(not partial or self._nexts(whole, partial))

    def _nexts(self, whole: str, partial: bytes) -> tuple[str, ...]:
        if partial and self.tokens.composed:
            return composed_followers(whole, partial, self.tokens.is_normal)
        return followers(partial)

    def _accepts_pieces(self, sequence: tuple[int, ...], whole: str, partial: bytes) -> bool:
        """SentencePiece: an unfinished character can only be one that falls back to its bytes."""
        if not partial:
            return self._canonical(whole) == sequence
        if not self._falls_back(partial):
            return False
        spelled = tuple(self.tokens.byte_tokens.get(byte, -1) for byte in partial)
        return self._canonical(whole) + spelled == sequence

    def _falls_back(self, partial: bytes) -> bool:
        """Whether some character that begins with these bytes is not in the vocabulary."""
        if partial not in self._fallback:
            known = self.tokens.ids_of
            self._fallback[partial] = any(character.encode() not in known for character in characters(partial))
        return self._fallback[partial]

    def _possible(self, data: bytes, whole: str, partial: bytes) -> Iterator[tuple[int, ...]]:
        """Token sequences of ``data`` under the cuts that the possible continuations cause."""
        spelled, seen = self.tokens.spell(data), set()
        for follower in self._nexts(whole, partial):
            cuts = self._cuts_before(whole, follower)
            if cuts not in seen:
                seen.add(cuts)
                ends = (*cuts[1:], len(data))
                pieces = [spelled[a:b] for a, b in zip(cuts, ends, strict=True)]
                yield tuple(token for piece in pieces for token in self.tokens.cut(piece))

    def _cuts_before(self, whole: str, follower: str) -> tuple[int, ...]:
        """Bytes of ``whole`` at which pieces begin when ``follower`` comes next; its end too, if one begins there."""
        key = (whole, follower)
        if key not in self._cuts:
            if len(self._cuts) > 50_000:
                self._cuts.clear()
            end, at, starts = len(whole.encode()), 0, []
            for piece in self.tokens.pieces(whole + follower):
                if at > end:
                    break
                starts.append(at)
                at += self.tokens.width(piece)
            self._cuts[key] = tuple(starts)
        return self._cuts[key]

    def _steady_cut(self, text: str) -> int:
        """The last byte offset of ``text`` at which a piece begins whatever follows."""
        pieces = self.tokens.pieces(text)
        skipped = sum(self.tokens.width(piece) for piece in pieces[:-RECENT])  # cuts that far back are settled
        text = text.encode()[skipped:].decode()
        steady = {0, *self._cuts_before(text, ""), len(text.encode())}
        for follower in FOLLOWERS[1:]:
            steady &= {0, *self._cuts_before(text, follower)}
        end = len(text[: last_starter(text)].encode()) if self.tokens.composed else len(text.encode())
        return skipped + max(cut for cut in steady if cut <= end)
