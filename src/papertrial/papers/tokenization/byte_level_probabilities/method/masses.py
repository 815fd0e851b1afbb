"""Sums over covers: what a model's logits after the sources of a text make of its rows."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from papertrial.papers.tokenization.byte_level_probabilities.method.covers import Bundle, Plan, Row, Source, Vocabulary
from papertrial.papers.tokenization.byte_level_probabilities.method.validity import Validity


class Masses:
    """The arithmetic of the byte-level sum; it never runs a model.

    Parameters
    ----------
    vocabulary, validity
        Token bytes, and which sequences count.
    ends
        Tokens that end a text.
    renormalise
        See :class:`ByteLevelLM`.
    """

    def __init__(self, vocabulary: Vocabulary, validity: Validity, ends: Sequence[int], renormalise: bool) -> None:
        self.vocabulary, self.validity, self.renormalise = vocabulary, validity, renormalise
        self.tokens, self.ends = vocabulary.tokens, list(ends)

    def score(self, made: Plan, logits: Mapping[int, Tensor]) -> Row:
        """Masses of a plan's nodes, parents first, and from them the covers of its text."""
        end, bundles, sources, leaked, log_ends = len(made.data), [], [], [], []
        following: dict[int, tuple[Tensor, float]] = {}
        for node in made.nodes:
            if node.parent is not None:
                before, _ = following[id(node.parent)]
                node.log_mass = node.parent.log_mass + float(before[node.tokens[-1]])
            log_probs, log_end, lost = self._following(logits[id(node)], node.tail, made.data[: node.at])
            following[id(node)] = (log_probs, log_end)
            source = Source(node.tokens, node.tail, node.log_mass)
            if node.at == end:
                sources.append(source)
                leaked.append((node.log_mass, lost))
                log_ends.append(node.log_mass + log_end)
            ids = self.vocabulary.running_past(made.data[node.at :])
            ids = ids[log_probs[ids] > -torch.inf]
            if len(ids):
                bundles.append(Bundle(source, ids, node.log_mass + log_probs[ids], end - node.at))
        return self._row(made.data, made.base, made.nodes[0].tail, sources, bundles, log_ends, leaked)

    def advanced(
        self,
        row: Row,
        byte: int,
        fresh: Sequence[tuple[Source, Tensor]],
        kept: Sequence[Bundle],
    ) -> Row:
        """A row after ``byte``: ``fresh`` are the sources that it completes, with the logits (V,) after them, and
        ``kept`` the covers that still run past it."""
        data = row.data + bytes([byte])
        sources, bundles, log_ends, leaked = [], list(kept), [], []
        for source, logits in fresh:
            log_probs, log_end, lost = self._following(logits, source.tail, data)
            ids = (log_probs > -torch.inf).nonzero()[:, 0]
            if len(ids):
                bundles.append(Bundle(source, ids, source.log_mass + log_probs[ids], 0))
            sources.append(source)
            log_ends.append(source.log_mass + log_end)
            leaked.append((source.log_mass, lost))
        return self._row(data, row.base, row.base_tail, sources, bundles, log_ends, leaked)

    def _row(
        self,
        data: bytes,
        base: tuple[int, ...],
        base_tail: tuple[int, ...],
        sources: Sequence[Source],
        bundles: Sequence[Bundle],
        log_ends: Sequence[float],
        leaked: Sequence[tuple[float, float]],
    ) -> Row:
        parts = [torch.tensor([source.log_mass for source in sources], dtype=torch.float64)]
        parts += [bundle.log_mass for bundle in bundles if bundle.used]
        total = torch.cat(parts).logsumexp(0).item() if any(len(part) for part in parts) else -math.inf
        ending = torch.tensor(list(log_ends), dtype=torch.float64).logsumexp(0).item() if log_ends else -math.inf
        top = max((mass for mass, _ in leaked), default=0.0)
        weights = [math.exp(mass - top) for mass, _ in leaked]
        lost = sum(w * share for w, (_, share) in zip(weights, leaked, strict=True)) / sum(weights) if weights else 0.0
        return Row(data, base, base_tail, tuple(sources), tuple(bundles), ending, total, lost)

    def _following(self, logits: Tensor, tail: tuple[int, ...], data: bytes) -> tuple[Tensor, float, float]:
        """What follows a source that spells ``data``: log p of each token (V,) float64, -inf where invalid; log p of
        the end; the leaked share."""
        log_probs = logits.to("cpu", torch.float64).log_softmax(-1)
        # an empty text gets no blank before it, so that a blank alone is no text
        may_end = self.ends and self.validity.may_end(tail) and not (data == b" " and self.tokens.dummy_prefix(b" "))
        ends = float(log_probs[self.ends].logsumexp(0)) if may_end else -math.inf
        log_probs = log_probs[: self.tokens.size].masked_fill(~self.validity.mask(tail), -torch.inf)
        if self.validity.mode == "off":
            return log_probs, ends, 0.0
        kept = float(torch.logaddexp(log_probs.logsumexp(0), torch.tensor(ends, dtype=torch.float64)))
        if kept == -math.inf:
            return log_probs, ends, 1.0
        leaked = max(0.0, -math.expm1(kept))
        if not self.renormalise:
            return log_probs, ends, leaked
        return log_probs - kept, ends - kept, leaked
