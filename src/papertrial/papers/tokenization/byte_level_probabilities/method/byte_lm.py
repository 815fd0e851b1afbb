"""The exact byte-level process of a tokenized language model (sections 3 and 4 of arXiv 2410.09303)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from papertrial.lm import cache as kv
from papertrial.lm.anatomy import unwrap
from papertrial.lm.token_bytes import TokenBytes
from papertrial.papers.tokenization.byte_level_probabilities.method.covers import (
    END,
    Bundle,
    Cover,
    Node,
    Plan,
    Row,
    Source,
    Vocabulary,
    base_of,
    plan,
)
from papertrial.papers.tokenization.byte_level_probabilities.method.prefixes import Prefixes, run_prefixes
from papertrial.papers.tokenization.byte_level_probabilities.method.sampling import ByteProcess
from papertrial.papers.tokenization.byte_level_probabilities.method.validity import Mode, Validity, _utf8

Text = str | bytes


@dataclass(frozen=True, eq=False)
class ByteState:
    """Where one or several texts stand. Never changed: advancing makes a new one, and old ones can be branched from.

    Attributes
    ----------
    rows : a text each.
    single : whether it was started from one text and not from a list.
    prefixes : what the model was last run on; ``owners`` says for each of its rows which text it belongs to.
    """

    rows: tuple[Row, ...]
    single: bool
    prefixes: Prefixes
    owners: tuple[int, ...]

    @property
    def texts(self) -> list[bytes]:
        """The texts so far, each with the blank that its encoder put before it."""
        return [row.data for row in self.rows]


class ByteLevelLM(ByteProcess):
    """A causal language model, read byte by byte and without the bias of a cut inside a token.

    Parameters
    ----------
    model
        Any causal language model of transformers; it is run where it lies.
    tokenizer
        Its tokenizer: BPE, byte-level or SentencePiece. With the name of a special token in a text, the name is meant.
    validity
        ``exact``, ``pairwise`` or ``off``, see :class:`Validity`. ``off`` spares the check of the vocabulary at every
        step; the mass that the model gives to impossible sequences is then counted until they end.
    renormalise
        Condition the model after every token on the sequence staying valid, so that it is a language model of texts and
        its byte probabilities obey the chain rule. False only removes the mass of impossible sequences (:meth:`leaked`)
        and normalises over the symbols at the end, as the authors' code does; on a well-trained model the two agree up
        to that mass.
    bos_token_id
        Fed before every text. Default: the tokenizer's beginning-of-sequence token if it has one, else nothing; then a
        text must have more than one word, because nothing predicts its first token.
    eos_token_id
        Tokens that end a text; default those of the generation config or the tokenizer.

    Raises
    ------
    ValueError
        If the model is no causal language model, the tokenizer is lossy or not BPE, or has more ids than the model.

    Examples
    --------
    >>> lm = ByteLevelLM(model, tokenizer)                                  # doctest: +SKIP
    >>> state = lm.start("import collec")                                   # doctest: +SKIP
    >>> lm.next_byte_logprobs(state).argmax()                               # doctest: +SKIP
    tensor(116)
    >>> lm.generate("import collec", max_new_bytes=5)                       # doctest: +SKIP
    b'tions'
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        validity: Mode = "exact",
        *,
        renormalise: bool = True,
        bos_token_id: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
    ) -> None:
        inner = unwrap(model)
        if not inner.can_generate() or getattr(inner.config, "is_encoder_decoder", False):
            raise ValueError(f"{type(inner).__name__} does not predict the next token: give a causal language model")
        self.model, self.tokenizer = model, tokenizer
        self.tokens = TokenBytes(tokenizer)
        self.validity = Validity(self.tokens, validity)
        self.renormalise = renormalise and validity != "off"
        rows = inner.get_output_embeddings().weight.shape[0]
        if self.tokens.size > rows:
            raise ValueError(
                f"the tokenizer has {self.tokens.size} ids and the model predicts {rows}: they do not match"
            )
        self.vocabulary = Vocabulary(self.tokens)
        bos = tokenizer.bos_token_id if bos_token_id is None else bos_token_id
        self.bos = [] if bos is None else [int(cast(int, bos))]
        self.ends = _end_tokens(model, tokenizer, eos_token_id)
        try:
            kv.new_cache(model)
            self._caching = True
        except ValueError:  # state-space and other models whose state cannot be cut back: whole sequences are run
            self._caching = False

    # -- the process ---------------------------------------------------------------------------------------------

    def start(self, text: Text | Sequence[Text], *, prefix_ids: Sequence[int] | None = None) -> ByteState:
        """Read a text, or several at once.

        Parameters
        ----------
        text
            Strings or UTF-8; the last character may be unfinished. Several share their forward passes.
        prefix_ids
            Tokens to feed before the text instead of the beginning-of-sequence token: an instruction, or the suffix of
            an infilling prompt (see :func:`infilling_prompt`).

        Raises
        ------
        ValueError
            If the text is not UTF-8, does not survive the tokenizer, has probability zero, or there is no token before
            it to predict its first token from.
        """
        single = isinstance(text, str | bytes)
        texts = [cast(Text, text)] if single else list(cast(Sequence[Text], text))
        if not texts:
            raise ValueError("text is an empty list: give at least one text")
        prefix = self.bos if prefix_ids is None else list(prefix_ids)
        plans, unfinished = [], []
        for one in texts:
            whole, partial = _whole_characters(one)
            data = self.tokens.dummy_prefix(whole) + whole
            at, base, tail = base_of(data, self.validity)
            plans.append(plan(data, at, prefix + base, tail, self.validity))
            unfinished.append(partial)
        state = self._run_plans(plans, single)
        _check_possible(state.rows)
        while any(unfinished):
            busy = [row for row, partial in enumerate(unfinished) if partial]
            moved = self._advance(state, {row: unfinished[row][0] for row in busy})
            unfinished = [partial[1:] for partial in unfinished]
            state = moved
        return state

    def next_byte_logprobs(self, state: ByteState) -> Tensor:
        """Log-probabilities of the 256 bytes and of the end: (257,), or (B, 257) for several texts; float64."""
        masses = torch.stack([self.vocabulary.symbol_masses(row) for row in state.rows])
        masses = masses - masses.logsumexp(1, keepdim=True)
        return masses[0] if state.single else masses

    def advance(self, state: ByteState, byte: int | Sequence[int]) -> ByteState:
        """Append a byte to each text: one forward pass over at most a few tokens.

        Raises
        ------
        ValueError
            If a byte has probability zero after its text (no valid sequence goes on with it).
        """
        bytes_ = [byte] if isinstance(byte, int) else [int(b) for b in byte]
        if len(bytes_) != len(state.rows):
            raise ValueError(f"byte must be one for each of the {len(state.rows)} texts, got {len(bytes_)}")
        return self._advance(state, dict(enumerate(bytes_)))

    def select(self, state: ByteState, rows: Sequence[int]) -> ByteState:
        """Some of the texts, in the given order; one may be named more than once."""
        owned = [[i for i, owner in enumerate(state.owners) if owner == row] for row in rows]
        prefixes = state.prefixes.select([i for own in owned for i in own])
        owners = tuple(new for new, own in enumerate(owned) for _ in own)
        return ByteState(tuple(state.rows[row] for row in rows), False, prefixes, owners)

    # -- what it is good for -------------------------------------------------------------------------------------

    def logprob(self, text: bytes | Sequence[bytes], context: bytes | Sequence[bytes] = b"") -> float | list[float]:
        """log P(text | context) in nats, without the end: two sums over covers, whatever the length of the text.

        Raises
        ------
        ValueError
            As for :meth:`start`; texts and contexts must be whole characters.
        """
        single = isinstance(text, bytes)
        texts = [cast(bytes, text)] if single else list(cast(Sequence[bytes], text))
        contexts = [context] * len(texts) if isinstance(context, bytes) else list(context)
        if len(texts) != len(contexts) or not texts:
            raise ValueError(f"there are {len(texts)} texts and {len(contexts)} contexts: give as many, at least one")
        plans = []
        for before, after in zip(contexts, texts, strict=True):
            data = self.tokens.dummy_prefix(before or after) + before
            at, base, tail = base_of(data, self.validity)
            plans += [plan(part, at, self.bos + base, tail, self.validity) for part in (data, data + after)]
        state = self._run_plans(plans, False)
        masses = [row.log_mass for row in state.rows]
        _check_possible(state.rows[::2])
        found = [whole - part for part, whole in zip(masses[::2], masses[1::2], strict=True)]
        return found[0] if single else found

    def cover(self, text: Text, *, prefix_ids: Sequence[int] | None = None) -> list[Cover]:
        """All covers of a text with their shares, the most probable first."""
        return self.covers_of(self.start(text, prefix_ids=prefix_ids))

    def covers_of(self, state: ByteState, row: int = 0) -> list[Cover]:
        """The covers of one text of a state: first those that end with the text, then those that run past it."""
        one, found = state.rows[row], []
        for source in one.sources:
            found.append(([*one.base, *source.tokens], b"", source.log_mass))
        for bundle in one.bundles:
            if bundle.used:  # at 0 a bundle is what may follow the text, not what covers it
                for token, mass in zip(bundle.ids.tolist(), bundle.log_mass.tolist(), strict=True):
                    rest = (self.tokens.bytes_of(token) or b"")[bundle.used :]
                    found.append(([*one.base, *bundle.source.tokens, token], rest, mass))
        total = torch.tensor([mass for _, _, mass in found], dtype=torch.float64).logsumexp(0).item()
        covers = [Cover(ids, data, mass - total) for ids, data, mass in found if mass > -math.inf]
        return sorted(covers, key=lambda cover: -cover.log_prob)

    def to_tokens(self, state: ByteState, *, generator: torch.Generator | None = None) -> Cover | list[Cover]:
        """Go back to tokens: one cover for each text, drawn by its share P(t | x).

        Ordinary sampling from ``ids`` on then continues the text as the model would, without bias (section 4.2).
        """
        drawn = []
        for row in range(len(state.rows)):
            covers = self.covers_of(state, row)
            shares = torch.tensor([cover.log_prob for cover in covers], dtype=torch.float64).exp()
            drawn.append(covers[int(torch.multinomial(shares, 1, generator=generator))])
        return drawn[0] if state.single else drawn

    def leaked(self, state: ByteState) -> float | list[float]:
        """The share of the next token that the model gives to sequences that no encoder produces, per text.

        0 where the last byte completed no token, or where validity is off and nothing was checked.
        """
        found = [row.leaked for row in state.rows]
        return found[0] if state.single else found

    # -- how it runs ---------------------------------------------------------------------------------------------

    def _run_plans(self, plans: Sequence[Plan], single: bool) -> ByteState:
        """Score all nodes: one pass over the bases, one over the sequences that go on from them, all texts together."""
        if any(not made.base for made in plans):
            raise ValueError(
                "nothing predicts the first token: the tokenizer has no beginning-of-sequence token, so give "
                "bos_token_id or prefix_ids, or a text of more than one word"
            )
        bases = run_prefixes(self.model, [made.base for made in plans], caching=self._caching)
        leaves = [(i, node) for i, made in enumerate(plans) for node in made.nodes if node.leaf]
        if all(not node.tokens for _, node in leaves):
            rows = [self._score(made, {id(made.nodes[0]): bases.logits[i, -1]}) for i, made in enumerate(plans)]
            return ByteState(tuple(rows), single, bases, tuple(range(len(plans))))
        owners = [i for i, _ in leaves]
        sequences = [[*plans[i].base, *node.tokens] for i, node in leaves]
        prefixes = run_prefixes(self.model, sequences, bases, owners, caching=self._caching)
        found: list[dict[int, Tensor]] = [{id(made.nodes[0]): bases.logits[i, -1]} for i, made in enumerate(plans)]
        for number, (i, leaf) in enumerate(leaves):
            node: Node | None = leaf
            while node is not None and node.parent is not None:
                found[i][id(node)] = prefixes.logits[number, -1 - (len(leaf.tokens) - len(node.tokens))]
                node = node.parent
        rows = [self._score(made, logits) for made, logits in zip(plans, found, strict=True)]
        ending = [n for n, (i, node) in enumerate(leaves) if node.at == len(plans[i].data)]
        missing = [n for i in range(len(plans)) if i not in {owners[n] for n in ending} for n in [owners.index(i)]]
        kept = sorted(ending + missing)  # every text keeps at least one row of the cache
        return ByteState(tuple(rows), single, prefixes.select(kept), tuple(owners[n] for n in kept))

    def _score(self, made: Plan, logits: dict[int, Tensor]) -> Row:
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
            ids = self._running_past(made.data[node.at :])
            ids = ids[log_probs[ids] > -torch.inf]
            if len(ids):
                bundles.append(Bundle(source, ids, node.log_mass + log_probs[ids], end - node.at))
        return self._row(made.data, made.base, made.nodes[0].tail, sources, bundles, log_ends, leaked)

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

    def _running_past(self, rest: bytes) -> Tensor:
        """Ids of the tokens that begin with ``rest`` and go on."""
        table, lengths = self.vocabulary.table, self.vocabulary.lengths
        if len(rest) >= table.shape[1]:
            return torch.empty(0, dtype=torch.long)
        begins = lengths > len(rest)
        if rest:
            begins = begins & (table[:, : len(rest)] == torch.tensor(list(rest), dtype=table.dtype)).all(1)
        return begins.nonzero()[:, 0]

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

    def _advance(self, state: ByteState, bytes_: dict[int, int]) -> ByteState:
        """Append bytes to some of the texts; the others stay as they are."""
        fresh: list[tuple[int, Source]] = []
        kept: dict[int, list[Bundle]] = {}
        for number, byte in bytes_.items():
            row = state.rows[number]
            if not 0 <= byte < END:
                raise ValueError(f"byte must lie in 0 .. 255, got {byte}")
            kept[number] = []
            for bundle in row.bundles:
                sources, rest = self.vocabulary.consume(bundle, byte, self.validity)
                fresh += [(number, source) for source in sources]
                kept[number] += [] if rest is None else [rest]
        prefixes, owners = state.prefixes, state.owners
        if fresh:
            prefixes, owners = self._run_sources(state, fresh)
        rows = list(state.rows)
        for number, byte in bytes_.items():
            rows[number] = self._advanced_row(rows[number], number, byte, fresh, kept[number], prefixes)
        _check_possible(rows)
        return ByteState(tuple(rows), state.single, prefixes, owners)

    def _run_sources(self, state: ByteState, fresh: list[tuple[int, Source]]) -> tuple[Prefixes, tuple[int, ...]]:
        """The model after each new source; texts that complete no token keep the row they have."""
        sequences, parents, owners = [], [], []
        for number, source in fresh:
            sequence = [*state.rows[number].base, *source.tokens]
            own = [i for i, owner in enumerate(state.owners) if owner == number]
            sequences.append(sequence)
            parents.append(max(own, key=lambda i: state.prefixes.shared(i, sequence)))
            owners.append(number)
        waiting = set(range(len(state.rows))) - set(owners)
        for i, owner in enumerate(state.owners):
            if owner in waiting:
                sequences.append(state.prefixes.tokens[i])
                parents.append(i)
                owners.append(owner)
        prefixes = run_prefixes(self.model, sequences, state.prefixes, parents, caching=self._caching)
        return prefixes, tuple(owners)

    def _advanced_row(
        self,
        row: Row,
        number: int,
        byte: int,
        fresh: list[tuple[int, Source]],
        kept: list[Bundle],
        prefixes: Prefixes,
    ) -> Row:
        data = row.data + bytes([byte])
        sources, bundles, log_ends, leaked = [], list(kept), [], []
        for place, (owner, source) in enumerate(fresh):
            if owner != number:
                continue
            log_probs, log_end, lost = self._following(prefixes.logits[place, -1], source.tail, data)
            ids = (log_probs > -torch.inf).nonzero()[:, 0]
            if len(ids):
                bundles.append(Bundle(source, ids, source.log_mass + log_probs[ids], 0))
            sources.append(source)
            log_ends.append(source.log_mass + log_end)
            leaked.append((source.log_mass, lost))
        return self._row(data, row.base, row.base_tail, sources, bundles, log_ends, leaked)


def _check_possible(rows: Sequence[Row]) -> None:
    for row in rows:
        if row.log_mass == -math.inf:
            raise ValueError(
                f"the text ending in {row.data[-12:]!r} has probability zero under this model and tokenizer: no valid "
                "token sequence spells it"
            )


def _whole_characters(text: Text) -> tuple[bytes, bytes]:
    """A text's whole characters and its unfinished last one, as UTF-8."""
    if isinstance(text, str):
        return text.encode("utf-8"), b""
    if not isinstance(text, bytes):
        raise TypeError(f"text must be str or bytes, got {type(text).__name__}")
    found = _utf8(text)
    if found is None:
        raise ValueError(f"text is not UTF-8: {text[:40]!r}; the model was trained on encoded characters")
    return found[0].encode("utf-8"), found[1]


def _end_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, given: int | Sequence[int] | None
) -> list[int]:
    ends: Any = given
    if ends is None:
        ends = getattr(getattr(unwrap(model), "generation_config", None), "eos_token_id", None)
    if ends is None:
        ends = tokenizer.eos_token_id
    found = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    size = unwrap(model).get_output_embeddings().weight.shape[0]
    if any(not 0 <= end < size for end in found):
        raise ValueError(f"eos_token_id must lie in 0 .. {size - 1}, got {found}")
    return found
