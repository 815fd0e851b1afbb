"""The exact byte-level process of a tokenized language model (sections 3 and 4 of arXiv 2410.09303)."""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from papertrial.lm import cache as kv
from papertrial.lm.anatomy import unwrap
from papertrial.lm.token_bytes import TokenBytes
from papertrial.papers.tokenization.byte_level_probabilities.method.characters import (
    Text,
    listed,
    pair_up,
    whole_characters,
)
from papertrial.papers.tokenization.byte_level_probabilities.method.covers import (
    END,
    Bundle,
    Cover,
    Node,
    Plan,
    Source,
    Vocabulary,
    base_of,
    plan,
)
from papertrial.papers.tokenization.byte_level_probabilities.method.masses import Masses
from papertrial.papers.tokenization.byte_level_probabilities.method.prefixes import Prefixes, run_prefixes
from papertrial.papers.tokenization.byte_level_probabilities.method.sampling import ByteProcess
from papertrial.papers.tokenization.byte_level_probabilities.method.states import ByteState, check_possible
from papertrial.papers.tokenization.byte_level_probabilities.method.validity import Mode, Validity


class ByteLevelLM(ByteProcess):
    """A causal language model, read byte by byte and without the bias of a cut inside a token.

    Parameters
    ----------
    model
        Any causal language model of transformers; it is run where it lies.
    tokenizer
        Its tokenizer: BPE, byte-level or SentencePiece. With the name of a special token in a text, the name is meant.
    validity
        ``exact``, ``pairwise`` or ``off``, see :class:`Validity`, or one made before for the same tokenizer. ``off``
        spares the check of the vocabulary at every step; the mass that the model gives to impossible sequences is then
        counted until they end.
    renormalise
        False is the paper's form: impossible sequences are left out of the sum, and what remains is normalised over the
        symbols at the end. True conditions the model after every token on the sequence staying valid, so that it is a
        language model of texts and its byte probabilities obey the chain rule even where the model gives mass to
        impossible sequences (:meth:`leaked`); without such mass both are the same.
    caching
        Keep keys and values between bytes. Default: where the model's cache can be cut back; False runs whole
        sequences.
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
        validity: Mode | Validity = "exact",
        *,
        renormalise: bool = False,
        caching: bool | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
    ) -> None:
        inner = unwrap(model)
        if not inner.can_generate() or getattr(inner.config, "is_encoder_decoder", False):
            raise ValueError(f"{type(inner).__name__} does not predict the next token: give a causal language model")
        self.model, self.tokenizer = model, tokenizer
        self.tokens = TokenBytes(tokenizer)
        self.validity = validity if isinstance(validity, Validity) else Validity(self.tokens, validity)
        if self.validity.tokens.ids_of != self.tokens.ids_of:
            raise ValueError("validity was made for another tokenizer: make one for this one, or give its name")
        rows = inner.get_output_embeddings().weight.shape[0]
        if self.tokens.size > rows:
            raise ValueError(
                f"the tokenizer has {self.tokens.size} ids and the model predicts {rows}: they do not match"
            )
        self.vocabulary = Vocabulary(self.tokens)
        bos = tokenizer.bos_token_id if bos_token_id is None else bos_token_id
        self.bos = [] if bos is None else [int(cast(int, bos))]
        self.ends = _end_tokens(model, tokenizer, eos_token_id)
        self._masses = Masses(self.vocabulary, self.validity, self.ends, renormalise)
        self._caching = _can_cache(model) if caching is None else caching

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
        texts, single = listed("text", text, (str, bytes))
        prefix = self.bos if prefix_ids is None else self._checked_ids(prefix_ids)
        plans, unfinished = [], []
        for one in texts:
            whole, partial = whole_characters(one)
            data = self.tokens.dummy_prefix(whole) + whole
            at, base, tail = base_of(data, self.validity)
            plans.append(plan(data, at, prefix + base, tail, self.validity))
            unfinished.append(partial)
        state = self._run_plans(plans, single)
        check_possible(state.rows)
        while any(unfinished):
            busy = [row for row, partial in enumerate(unfinished) if partial]
            moved = self._advance(state, {row: unfinished[row][0] for row in busy})
            unfinished = [partial[1:] for partial in unfinished]
            state = moved
        return state

    def _checked_ids(self, ids: Sequence[int]) -> list[int]:
        size = unwrap(self.model).get_output_embeddings().weight.shape[0]
        found = [int(token) for token in ids]
        wrong = [token for token in found if not 0 <= token < size]
        if wrong:
            raise ValueError(f"prefix_ids must lie in 0 .. {size - 1}, the model's ids; got {wrong[:5]}")
        return found

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
        texts, contexts, single = pair_up(text, context)
        plans = []
        for before, after in zip(contexts, texts, strict=True):
            data = self.tokens.dummy_prefix(before or after) + before
            at, base, tail = base_of(data, self.validity)
            plans += [plan(part, at, self.bos + base, tail, self.validity) for part in (data, data + after)]
        state = self._run_plans(plans, False)
        masses = [row.log_mass for row in state.rows]
        check_possible(state.rows[::2])
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
            rows = [self._masses.score(made, {id(made.nodes[0]): bases.logits[i, -1]}) for i, made in enumerate(plans)]
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
        rows = [self._masses.score(made, logits) for made, logits in zip(plans, found, strict=True)]
        ending = [n for n, (i, node) in enumerate(leaves) if node.at == len(plans[i].data)]
        missing = [n for i in range(len(plans)) if i not in {owners[n] for n in ending} for n in [owners.index(i)]]
        kept = sorted(ending + missing)  # every text keeps at least one row of the cache
        return ByteState(tuple(rows), single, prefixes.select(kept), tuple(owners[n] for n in kept))

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
            own = [(s, prefixes.logits[i, -1]) for i, (owner, s) in enumerate(fresh) if owner == number]
            rows[number] = self._masses.advanced(rows[number], byte, own, kept[number])
        check_possible(rows)
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


def _can_cache(model: PreTrainedModel) -> bool:
    """Not for state-space and other models whose state cannot be cut back."""
    try:
        kv.new_cache(model)
    except ValueError:
        return False
    return True


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
