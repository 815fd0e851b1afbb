"""What may follow a token sequence, for the whole vocabulary at once.

A token that follows either begins a new piece of the text, where it is valid if the encoder gives it for its own text,
or continues the last piece, where its neighbour decides (:class:`Pairs`). Which of the two depends on where the
pre-tokenizer cuts, and that only on the token's shape (:class:`Alphabet`): the pre-tokenizer is asked once for each
shape of the vocabulary, the encoder not at all.
"""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from papertrial.lm.token_bytes import TokenBytes
from papertrial.papers.tokenization.byte_level_probabilities.method.characters import (
    FIRST_MARK,
    FOLLOWERS,
    composed_followers,
    continuation_bytes,
    followers,
    last_starter,
    utf8,
)
from papertrial.papers.tokenization.byte_level_probabilities.method.pairs import Pairs
from papertrial.papers.tokenization.byte_level_probabilities.method.shapes import QUOTES, Alphabet, UnknownPattern

TABLES = 128
"""Shapes of texts for which the cuts before every token are remembered."""


def looks_ahead(text: str) -> bool:
    """Whether what follows can move a cut inside ``text``: after blanks, and in what may be a contraction."""
    return text[-1].isspace() or any(quote in text[-3:] for quote in QUOTES)


class BulkCheck:
    """Masks over the vocabulary, equal to asking ``accepts`` for every token.

    Parameters
    ----------
    tokens
        A BPE tokenizer.
    accepts
        ``accepts(tail, token)``: for the few tokens that have to be asked for one by one.
    """

    def __init__(self, tokens: TokenBytes, accepts: Callable[[tuple[int, ...], int], bool]) -> None:
        self.tokens, self._accepts = tokens, accepts
        self._pairs = Pairs(tokens)
        size = tokens.size
        self._begins_inside = np.zeros(size, dtype=bool)  # with bytes that finish a character
        self._texts = [("", b"")] * size
        one_by_one = self._pairs.unsure.copy()
        self._usable = np.zeros(size, dtype=bool)
        for token in range(size):
            data = tokens.bytes_of(token)
            found = utf8(data) if data else None
            if found is not None and tokens.is_normal(found[0]):
                self._usable[token], self._texts[token] = True, found
            self._begins_inside[token] = bool(data) and continuation_bytes(data or b"") > 0
        if tokens.kind == "sentencepiece":  # single bytes have a rule of their own
            one_by_one[list(tokens.byte_tokens.values())] = True
        self._one_by_one = np.flatnonzero(one_by_one & (self._usable | self._begins_inside))
        self._usable &= ~one_by_one
        # alone in its piece: made by merges, or kept whole whatever they say
        self._alone = self._usable & (self._pairs.made | tokens.words_first)
        self._marked = [
            token for token in np.flatnonzero(self._usable).tolist() if self._texts[token][0][:1] >= FIRST_MARK
        ]
        self._alphabet = self._read_alphabet()
        self._reach = 0 if self._alphabet is None else self._alphabet.reach
        self._tables: OrderedDict[object, dict[tuple[int, ...], NDArray[np.bool_]]] = OrderedDict()
        self._sorted = sorted(tokens.ids_of)
        self._groups = (self._grouped(after_quote=False), self._grouped(after_quote=True))

    def _read_alphabet(self) -> Alphabet | None:
        """What the pre-tokenizer sees of characters; None where that is not known, or there is none."""
        try:
            whole = {character for text, _ in self._texts for character in text}
            return Alphabet(self.tokens.pre_tokenizers, whole) if self.tokens.splits else None
        except UnknownPattern:
            return None

    def _grouped(self, *, after_quote: bool) -> tuple[NDArray[np.int64], list[int]]:
        """The number of each token's group (0 where it has none), and a token of each group."""
        alphabet = self._alphabet
        numbers: dict[object, int] = {}
        group = np.zeros(self.tokens.size, dtype=np.int64)
        chosen: list[int] = []
        for token in np.flatnonzero(self._usable).tolist():
            text, partial = self._texts[token]
            key: object = token if self.tokens.splits else bool(partial)  # unknown patterns: each for itself
            if alphabet is not None:
                ending = (text[-1:].isspace(), any(quote in text[-3:] for quote in QUOTES))
                rest: object = followers(partial) if partial else ()
                if partial and self.tokens.composed:
                    rest = (text, partial)
                key = (alphabet.shape(text, after_quote=after_quote), ending, bool(partial), rest)
            group[token] = numbers.setdefault(key, len(numbers))
            if group[token] == len(chosen):
                chosen.append(token)
        return group, chosen

    def mask(self, tail: tuple[int, ...]) -> NDArray[np.bool_] | None:
        """Bool (V,), or None where this cannot tell: a tail that begins inside a character, or with unsure tokens."""
        data = b"".join(self.tokens.bytes_of(token) or b"" for token in tail)
        found = utf8(data)
        if found is None or any(self._pairs.unsure[token] for token in tail):
            return None
        before, partial = found
        mask = np.zeros(self.tokens.size, dtype=bool)
        if partial:
            self._ask(tail, np.flatnonzero(self._begins_inside).tolist(), mask)
            return mask
        where = _Tail(self.tokens, self._pairs, tail, data)
        apart = self._pairs.follows(tail[-1]) & self._usable if tail else self._alone
        for cuts, some in self._by_cuts(before).items():
            at = where.joins(cuts)
            if at == len(data):
                mask |= some & self._alone
            elif at >= 0:
                mask |= some & apart & ~self._whole_words(data[at:])
        if self.tokens.composed and before:
            for token in self._marked:
                mask[token] = mask[token] and self.tokens.is_normal(before + self._texts[token][0])
        self._ask(tail, self._one_by_one.tolist(), mask)
        return mask

    def _ask(self, tail: tuple[int, ...], some: Iterable[int], mask: NDArray[np.bool_]) -> None:
        for token in some:
            mask[token] = self._accepts(tail, token)

    def _whole_words(self, begun: bytes) -> NDArray[np.bool_]:
        """Tokens that make a token together with ``begun``, where such pieces stay whole."""
        found = np.zeros(self.tokens.size, dtype=bool)
        if self.tokens.words_first:
            for at in range(bisect_right(self._sorted, begun), len(self._sorted)):
                if not self._sorted[at].startswith(begun):
                    break
                found[list(self.tokens.ids_of.get(self._sorted[at][len(begun) :], ()))] = True
        return found

    def _by_cuts(self, before: str) -> dict[tuple[int, ...], NDArray[np.bool_]]:
        """For each way to cut a text, the tokens behind it under which some continuation causes these cuts.

        Remembered for all texts of one shape: what ``retr`` does to the tokens behind it, ``node`` does too.
        """
        near = before[-self._reach :] if self._reach else ""
        after_quote = any(quote in near for quote in QUOTES)
        seen: object = before if self._alphabet is None else self._alphabet.shape(before, after_quote=False)
        widths = tuple(len(character.encode()) for character in before)
        marks = before[last_starter(before) :] if self.tokens.composed else ""
        key = (seen, widths, after_quote, before[-3:].isspace(), marks)
        table = self._tables.get(key)
        if table is None:
            group, chosen = self._groups[after_quote]
            numbers: dict[tuple[int, ...], list[int]] = {}
            for number, token in enumerate(chosen):
                for cuts in self._cuts(before, *self._texts[token]):
                    numbers.setdefault(cuts, []).append(number)
            table = {}
            for cuts, some in numbers.items():
                among = np.zeros(len(chosen), dtype=bool)
                among[some] = True
                table[cuts] = among[group]
            if len(self._tables) >= TABLES:
                self._tables.popitem(last=False)
            self._tables[key] = table
        else:
            self._tables.move_to_end(key)
        return table

    def _cuts(self, before: str, text: str, partial: bytes) -> set[tuple[int, ...]]:
        """Where pieces of ``before`` and a token of this shape may begin, in bytes; -1 stands for a cut in the token.

        A cut at the end of the token's whole characters is inside it if an unfinished character follows.
        """
        if not self.tokens.splits:
            return {(0,)}
        whole = before + text
        if self.tokens.kind == "sentencepiece":
            nexts: tuple[str, ...] = ("",)
        elif partial and self.tokens.composed:
            nexts = composed_followers(whole, partial, self.tokens.is_normal)
        elif partial:
            nexts = followers(partial)
        else:
            nexts = FOLLOWERS if looks_ahead(whole) else ("",)
        start, end = len(before.encode()), len(whole.encode()) + (1 if partial else 0)
        found = set()
        for follower in nexts:
            at, starts, spoilt = 0, [], False
            for piece in self.tokens.pieces(whole + follower):
                if at >= end:
                    break
                spoilt = at > start
                if spoilt:
                    break
                starts.append(at)
                at += self.tokens.width(piece)
            if not spoilt:
                found.add(tuple(starts))
        return found


class _Tail:
    """How one tail agrees with cuts."""

    def __init__(self, tokens: TokenBytes, pairs: Pairs, tail: tuple[int, ...], data: bytes) -> None:
        self._tokens, self._pairs, self._tail, self._data = tokens, pairs, tail, data
        self._answers: dict[tuple[int, ...], int] = {}
        self._ends = [0]
        for token in tail:
            self._ends.append(self._ends[-1] + len(tokens.bytes_of(token) or b""))

    def joins(self, cuts: tuple[int, ...]) -> int:
        """The byte at which the piece of the next token begins, -1 if the tail is none of these cuts' sequences."""
        if cuts not in self._answers:
            self._answers[cuts] = self._joins(cuts)
        return self._answers[cuts]

    def _joins(self, cuts: tuple[int, ...]) -> int:
        last = cuts[-1]
        if last not in self._ends:
            return -1
        count = self._ends.index(last)
        settled: list[int] = []
        for begin, end in pairwise(cuts):
            settled += self._cut(self._data[begin:end])
        if tuple(settled) != self._tail[:count]:
            return -1
        open_ = self._tail[count:]
        alike = all(self._pairs.follows(a)[b] for a, b in pairwise(open_))
        return last if alike and all(self._pairs.made[token] for token in open_) else -1

    def _cut(self, data: bytes) -> tuple[int, ...]:
        if self._tokens.kind == "sentencepiece":
            return self._tokens.cut(data.decode().replace(" ", "\u2581"))
        return self._tokens.cut(self._tokens.spell(data))
