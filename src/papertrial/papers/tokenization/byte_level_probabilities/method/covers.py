"""Covers of a byte string: the valid token sequences whose last token holds its last byte.

Section 3 of arXiv 2410.09303. A cover either ends exactly where the text ends (a *source*: the model can be asked what
follows it) or runs past it. Those that run past come from earlier sources by one token, and are kept together: a
:class:`Bundle` is a source, the tokens that may follow it, and how many bytes of those tokens the text has used up.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from papertrial.lm.token_bytes import TokenBytes
from papertrial.papers.tokenization.byte_level_probabilities.method.validity import Validity

END = 256
"""The symbol after the 256 bytes: the text ends."""


class Cover(NamedTuple):
    """A token sequence that covers a text.

    ``ids`` of the whole text, beginning-of-sequence and other prefix tokens included; ``data`` the bytes by which it
    runs past the text; ``log_prob`` its share among all covers, log P(t | x).
    """

    ids: list[int]
    data: bytes
    log_prob: float


@dataclass(frozen=True, eq=False)
class Source:
    """A valid sequence that ends where the text ends.

    Attributes
    ----------
    tokens : after the base of its row.
    tail : the end of the sequence that decides what may follow, see :meth:`Validity.tail`.
    log_mass : log P of it, given the base.
    """

    tokens: tuple[int, ...]
    tail: tuple[int, ...]
    log_mass: float


@dataclass(frozen=True, eq=False)
class Bundle:
    """Covers that are ``source`` plus one token of ``ids`` (m,); ``log_mass`` (m,) float64, ``used`` bytes gone by."""

    source: Source
    ids: Tensor
    log_mass: Tensor
    used: int


@dataclass(frozen=True, eq=False)
class Row:
    """One text on its way.

    Attributes
    ----------
    data : the bytes so far, with the blank that the encoder puts before a text.
    base : ids that all covers begin with; masses are relative to them.
    base_tail : the end of the base, as in ``Source.tail``.
    sources : covers that end with the text.
    bundles : covers that run past it by at least a byte, those of ``sources`` included.
    log_end : log of the mass of the text ending here.
    log_mass : log P(data | base).
    leaked : the share that the model gives, after its sources, to sequences that no encoder produces.
    """

    data: bytes
    base: tuple[int, ...]
    base_tail: tuple[int, ...]
    sources: tuple[Source, ...]
    bundles: tuple[Bundle, ...]
    log_end: float
    log_mass: float
    leaked: float


class Vocabulary:
    """Token bytes as tensors on the CPU: what the sums over covers need."""

    def __init__(self, tokens: TokenBytes) -> None:
        self.tokens = tokens
        self.table = torch.from_numpy(tokens.byte_table)  # (V, L)
        self.lengths = (self.table >= 0).sum(1)

    def next_bytes(self, bundle: Bundle) -> Tensor:
        """(m,) the next byte of each token of a bundle, -1 where it has none left."""
        return self.table[bundle.ids, bundle.used].long()

    def symbol_masses(self, row: Row) -> Tensor:
        """(257,) float64 log-masses of the 256 next bytes and of the end; not normalised."""
        masses = torch.cat(
            [bundle.log_mass for bundle in row.bundles] + [torch.tensor([row.log_end], dtype=torch.float64)]
        )
        symbols = torch.cat([self.next_bytes(bundle) for bundle in row.bundles] + [torch.tensor([END])])
        top = masses.max()
        if top == -torch.inf:
            return torch.full((257,), -torch.inf, dtype=torch.float64)
        sums = torch.zeros(257, dtype=torch.float64).index_add_(0, symbols, (masses - top).exp())
        return sums.log() + top

    def running_past(self, rest: bytes) -> Tensor:
        """Ids of the tokens that begin with ``rest`` and go on."""
        table, lengths = self.table, self.lengths
        if len(rest) >= table.shape[1]:
            return torch.empty(0, dtype=torch.long)
        begins = lengths > len(rest)
        if rest:
            begins = begins & (table[:, : len(rest)] == torch.tensor(list(rest), dtype=table.dtype)).all(1)
        return begins.nonzero()[:, 0]

    def consume(self, bundle: Bundle, byte: int, validity: Validity) -> tuple[list[Source], Bundle | None]:
        """What is left of a bundle after ``byte``: the tokens that it completes, and those that go on."""
        keep = self.next_bytes(bundle) == byte
        ids, masses, used = bundle.ids[keep], bundle.log_mass[keep], bundle.used + 1
        done = self.lengths[ids] == used
        sources = [
            extend(bundle.source, token, mass, validity)
            for token, mass in zip(ids[done].tolist(), masses[done].tolist(), strict=True)
            if mass > -torch.inf and (validity.mode != "off" or validity.accepts(bundle.source.tail, token))
        ]
        rest = None if bool(done.all()) else Bundle(bundle.source, ids[~done], masses[~done], used)
        return sources, rest


def extend(source: Source, token: int, log_mass: float, validity: Validity) -> Source:
    """``source`` with one more token."""
    return Source((*source.tokens, token), validity.tail((*source.tail, token)), log_mass)


# -- the covers of a whole text at once --------------------------------------------------------------------------


@dataclass(eq=False)
class Node:
    """A valid sequence on the way through a text: ``token`` after ``parent``, reaching byte ``at``."""

    tokens: tuple[int, ...]
    tail: tuple[int, ...]
    at: int
    parent: "Node | None" = None
    log_mass: float = 0.0
    leaf: bool = True


@dataclass(eq=False)
class Plan:
    """All sequences that end inside or at the end of a text, from its base on; known without the model.

    Attributes
    ----------
    data, base : as in :class:`Row`.
    nodes : parents before children; the first is the base itself.
    """

    data: bytes
    base: tuple[int, ...]
    nodes: list[Node] = field(default_factory=list)

    @property
    def ends(self) -> list[Node]:
        """The sequences that end with the text."""
        return [node for node in self.nodes if node.at == len(self.data)]


def base_of(data: bytes, validity: Validity) -> tuple[int, list[int], tuple[int, ...]]:
    """The part of a text whose encoding nothing to come can change: its bytes, tokens, and the tokens' tail.

    With a pre-tokenizer that is everything before the last cut that cannot move. Without one it is what the encodings
    of all prefixes share that a token could still reach beyond the end (section 3.2: the longest token's bytes).
    """
    tokens = validity.tokens
    ids = tokens.encode_bytes(data, start=False)
    if tokens.splits:
        base = ids[: len(ids) - len(validity.tail(tuple(ids)))]
        # what may follow the base is decided by the base alone: the text behind it says which cut it was, but the model
        # is conditioned on what was possible
        return len(tokens.decode_bytes(base, start=False)), base, validity.tail(tuple(base))
    base = ids
    for at in range(max(0, len(data) - tokens.longest), len(data)):
        if tokens.kind == "byte_bpe":
            left = list(tokens.cut(tokens.spell(data[:at])))
        elif data[at] & 0xC0 == 0x80:  # inside a character: the tokens before it, then single bytes
            continue
        else:
            left = tokens.encode_bytes(data[:at], start=False)
        shared = next(
            (i for i, (a, b) in enumerate(zip(base, left, strict=False)) if a != b), min(len(base), len(left))
        )
        base = base[:shared]
    return len(tokens.decode_bytes(base, start=False)), base, validity.tail(tuple(base))


def plan(data: bytes, start: int, base: Sequence[int], tail: tuple[int, ...], validity: Validity) -> Plan:
    """Follow every valid sequence from byte ``start`` to the end of ``data``.

    ``base`` are the ids before (special tokens too), ``tail`` the end of their text part.
    """
    ids_of, longest = validity.tokens.ids_of, validity.tokens.longest
    made = Plan(data, tuple(base), [Node((), tail, start)])
    for node in made.nodes:  # grows while it is read; a node only adds longer ones
        for end in range(node.at + 1, min(len(data), node.at + longest) + 1):
            for token in ids_of.get(data[node.at : end], ()):
                if validity.accepts(node.tail, token):
                    child = Node((*node.tokens, token), validity.tail((*node.tail, token)), end, node)
                    made.nodes.append(child)
                    node.leaf = False
    return made
