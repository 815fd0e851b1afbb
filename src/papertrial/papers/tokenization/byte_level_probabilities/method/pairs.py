"""Which tokens may stand side by side under BPE, for a whole vocabulary at once and without running the encoder.

BPE joins the neighbours of lowest rank until none is left. Tokens u and v stay apart exactly if no merge joins a part
at the end of u to a part at the beginning of v while both parts are on their own. The parts that are ever on their own
there are few: u, its right part, the right part of that, ... and v, its left part, ... (*spines*). So each merge (a, b)
rules out, for every u that ends with a long enough, the tokens v that begin with b long enough. Walked from the left
parts, longest-lived child first, those v are one interval; all that u rules out is a union of a few hundred of them.
"""

import math
from bisect import bisect_left
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from papertrial.lm.token_bytes import SPACE, TokenBytes


class Pairs:
    """Neighbours under the merges of a BPE vocabulary (pieces that stay whole by another rule are not its matter).

    Attributes
    ----------
    made : bool (V,), tokens that the merges give for their own text.
    unsure : bool (V,), tokens made by a merge of lower rank than their parts', whose neighbours are not decided here.
    """

    def __init__(self, tokens: TokenBytes) -> None:
        self._size = tokens.size
        merges = tokens.merges
        self._rank = {(a, b): (rank, made) for rank, (a, b, made) in enumerate(merges.tolist())}
        self.made = np.zeros(tokens.size, dtype=bool)
        self.unsure = np.zeros(tokens.size, dtype=bool)
        self._time = np.full(tokens.size, -1, dtype=np.int64)  # rank at which a token is complete; -1: it begins so
        self._parts: dict[int, tuple[int, int]] = {}
        self._derive(tokens)
        self._merges = merges[self.made[merges[:, 0]] & self.made[merges[:, 1]]] if len(merges) else merges

    def _derive(self, tokens: TokenBytes) -> None:
        """How each token is made from its own text, short ones first."""
        alone = set(tokens.byte_tokens.values())
        spelled: list[tuple[str, int]] = []
        for token in range(tokens.size):
            data = tokens.bytes_of(token)
            if token in alone:
                self.made[token] = True
            elif data:
                text = data.decode().replace(" ", SPACE) if tokens.kind == "sentencepiece" else tokens.spell(data)
                spelled.append((text, token))
        letters = {text: token for text, token in spelled if len(text) == 1}
        for text, token in sorted(spelled, key=lambda pair: len(pair[0])):
            symbols = [letters.get(letter, -1) for letter in text]
            last = self._merge(symbols)
            if symbols != [token]:
                continue
            self.made[token] = True
            if last is not None:
                self._parts[token] = last
                rank, before = self._rank[last][0], max(self._time[list(last)])
                self._time[token] = max(rank, before)
                self.unsure[token] = rank <= before or bool(self.unsure[list(last)].any())

    def _merge(self, symbols: list[int]) -> tuple[int, int] | None:
        """BPE in place; the last pair that was joined."""
        last, none = None, (math.inf, -1)
        while len(symbols) > 1:
            ranks = [self._rank.get(pair, none) for pair in pairwise(symbols)]
            rank, made = min(ranks)
            if made < 0:
                break
            at = ranks.index((rank, made))
            last = (symbols[at], symbols[at + 1])
            symbols[at : at + 2] = [made]
        return last

    @cached_property
    def _longer(self) -> dict[int, list[int]]:
        """The tokens whose left part a token is, by the rank at which they are complete."""
        found: dict[int, list[int]] = {}
        for token in sorted(self._parts, key=lambda token: int(self._time[token])):
            found.setdefault(self._parts[token][0], []).append(token)
        return found

    @cached_property
    def _walk(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Token at each place of the walk, place of each token (-1: none), and the end of its subtree."""
        order: list[int] = []
        place, end = np.full(self._size, -1, dtype=np.int64), np.zeros(self._size, dtype=np.int64)
        stack = [token for token in np.flatnonzero(self.made).tolist() if token not in self._parts]
        while stack:
            token = stack.pop()
            if token < 0:
                end[~token] = len(order)
                continue
            place[token] = len(order)
            order.append(token)
            stack.append(~token)
            stack += self._longer.get(token, ())  # the last comes first
        return np.array(order, dtype=np.int64), place, end

    @cached_property
    def _ruled_out(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """For each merge, sorted by left part and time: where its left part's begin, time, and interval of the walk."""
        _, place, end = self._walk
        ranks = np.array([self._rank[a, b][0] for a, b, _ in self._merges.tolist()], dtype=np.int64)
        left, right = self._merges[:, 0], self._merges[:, 1]
        time = np.maximum(ranks, np.maximum(self._time[left], self._time[right]))
        order = np.lexsort((time, left))
        left, right, time = left[order], right[order], time[order]
        begins, ends = place[right], end[right].copy()
        times = {token: self._time[children].tolist() for token, children in self._longer.items()}
        for number, (token, when) in enumerate(zip(right.tolist(), time.tolist(), strict=True)):
            # a part already inside a longer one is out of reach; at equal rank the merge further left comes first
            absorbed = bisect_left(times.get(token, ()), when)
            if absorbed:
                ends[number] = place[self._longer[token][absorbed - 1]]
        starts = np.searchsorted(left, np.arange(self._size + 1))
        return starts, time, begins, ends

    def follows(self, token: int) -> NDArray[np.bool_]:
        """Bool (V,): the tokens that stay apart from ``token`` before them, and are made by the merges themselves."""
        order, _, _ = self._walk
        starts, time, begins, ends = self._ruled_out
        change = np.zeros(len(order) + 1, dtype=np.int64)
        part, until = token, math.inf
        while True:
            first, last = starts[part], starts[part + 1]
            if until < math.inf:
                last = first + np.searchsorted(time[first:last], until, side="left")
            change += np.bincount(begins[first:last], minlength=len(change))
            change -= np.bincount(ends[first:last], minlength=len(change))
            if part not in self._parts:
                break
            until, part = float(self._time[part]), self._parts[part][1]
        found = np.zeros(self._size, dtype=bool)
        found[order] = change[:-1].cumsum() == 0
        return found
