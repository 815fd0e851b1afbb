"""What policy and reference say about the tokens of answers: log-probabilities and exact divergences.

One home for the shift (logits at t predict the label at t + 1), for float32, and for working through a large
vocabulary in pieces.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from papertrial.lm.anatomy import body, device_of, read_out
from papertrial.lm.losses import IGNORED
from papertrial.lm.preferences.pairs import CACHED, PreferenceBatch, PreferencePair, check_ids, collate
from papertrial.lm.preferences.reference import Reference, vocabulary_of
from papertrial.lm.scoring import LOGITS_AT_ONCE, token_log_probs
from papertrial.lm.scoring.forward import chunks, forward_inputs, states_and_head, stock_forward

WANTS = ("kl", "reverse_kl", "entropy", "hidden")
NEEDS_REFERENCE = frozenset({"kl", "reverse_kl", "hidden"})


@dataclass(frozen=True, eq=False)
class TokenStats:
    """Per answer token, aligned with ``input_ids[:, 1:]``; (N, S - 1) float32 in nats, zero where ``mask`` is false.

    Attributes
    ----------
    mask
        Bool, true on answer tokens.
    logps, ref_logps
        Log-probability of the token under the policy and under the reference.
    kl
        KL(reference || policy) of the next-token distributions, over the whole vocabulary; None unless wanted.
    reverse_kl
        KL(policy || reference), likewise.
    entropy
        Of the policy's next-token distribution, likewise.
    hidden
        The reference's hidden states after each layer, (N, S - 1, D) each, the last after the final norm; likewise.
    extras
        The batch's.
    """

    mask: Tensor
    logps: Tensor
    ref_logps: Tensor
    kl: Tensor | None = None
    reverse_kl: Tensor | None = None
    entropy: Tensor | None = None
    hidden: tuple[Tensor, ...] | None = None
    extras: dict[str, Tensor] = field(default_factory=dict)

    @property
    def logratio(self) -> Tensor:
        """log policy - log reference of each token (N, S - 1)."""
        return self.logps - self.ref_logps

    def total(self, name: Literal["logratio", "logps", "ref_logps", "kl", "reverse_kl", "entropy"]) -> Tensor:
        """Sums over the answers (N,) of one of the columns; ValueError if it was not computed."""
        values = getattr(self, name)
        if values is None:
            raise ValueError(f"{name} was not computed: ask for it with want, or name it in the objective's wants")
        return cast(Tensor, values.sum(-1))

    def halves(self) -> tuple["TokenStats", "TokenStats"]:
        """The chosen and the rejected answers of a :class:`PreferenceBatch`."""
        rows = len(self.mask) // 2
        return self._rows(slice(None, rows)), self._rows(slice(rows, None))

    def _rows(self, rows: slice) -> "TokenStats":
        def some(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[rows]

        return replace(
            self,
            mask=self.mask[rows],
            logps=self.logps[rows],
            ref_logps=self.ref_logps[rows],
            kl=some(self.kl),
            reverse_kl=some(self.reverse_kl),
            entropy=some(self.entropy),
            hidden=None if self.hidden is None else tuple(layer[rows] for layer in self.hidden),
            extras={name: values[rows] for name, values in self.extras.items()},
        )


# -- from logits -------------------------------------------------------------------------------------------------


def _log_softmax(name: str, logits: Tensor) -> Tensor:
    logits = logits if logits.dtype == torch.float64 else logits.float()
    log_probs = logits.log_softmax(-1)
    if bool(log_probs[..., 0].detach().isnan().any()):  # one NaN or +inf among the logits makes its whole row NaN
        raise ValueError(f"{name} logits hold NaN or +inf: the model is broken, or its last update was too large")
    return log_probs


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) along the last axis; a token of probability 0 under p adds nothing."""
    gap = (log_p - log_q).masked_fill(log_p == -torch.inf, 0.0)
    return (log_p.exp() * gap).sum(-1)


def _aligned(policy_logits: Tensor, ref_logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Float log-probabilities of both (N, S - 1, V), targets (0 where there is none) and their mask (N, S - 1)."""
    if policy_logits.shape != ref_logits.shape:
        raise ValueError(
            f"policy logits {tuple(policy_logits.shape)} and reference logits {tuple(ref_logits.shape)} must agree: "
            "both models need the same tokenizer and vocabulary"
        )
    if policy_logits.ndim != 3 or policy_logits.shape[:2] != labels.shape:
        raise ValueError(
            f"logits must be (N, S, V) for labels (N, S), got {tuple(policy_logits.shape)} and {tuple(labels.shape)}"
        )
    targets = labels[:, 1:]
    mask = _answer_mask(labels)
    check_ids("labels", targets[mask], policy_logits.shape[-1])
    # masked places may hold anything, so only the others are looked at
    ours, theirs = (
        _log_softmax(name, logits[:, :-1].masked_fill(~mask[..., None], 0.0))
        for name, logits in (("policy", policy_logits), ("reference", ref_logits.detach()))
    )
    return ours, theirs, targets.masked_fill(~mask, 0), mask


def _answer_mask(labels: Tensor) -> Tensor:
    mask = labels[:, 1:] != IGNORED
    empty = ~mask.any(-1)
    if bool(empty.any()):
        raise ValueError(
            f"row {int(empty.nonzero()[0])} of labels has no answer token after its first position (all {IGNORED})"
        )
    return mask


def token_log_ratio(policy_logits: Tensor, ref_logits: Tensor, labels: Tensor) -> Tensor:
    """log policy - log reference of every answer token, (N, S - 1), 0 elsewhere.

    Parameters
    ----------
    policy_logits, ref_logits
        (N, S, V); computed in float32 (float64 stays). No gradient goes into the reference.
    labels
        (N, S): token ids, -100 on prompt and padding; the label at t is predicted by the logits at t - 1.

    Raises
    ------
    ValueError
        Shapes or vocabularies that differ, labels outside the vocabulary, a row without an answer token, NaN logits.
    """
    ours, theirs, targets, mask = _aligned(policy_logits, ref_logits, labels)
    gap = (ours - theirs).gather(-1, targets[..., None])[..., 0]
    return gap.masked_fill(~mask, 0.0)


def token_kl(
    policy_logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor,
    direction: Literal["forward", "reverse"] = "forward",
) -> Tensor:
    """Divergence of the next-token distributions at every answer token, over the whole vocabulary, (N, S - 1).

    ``forward`` is KL(reference || policy), ``reverse`` KL(policy || reference). Arguments and errors otherwise as in
    :func:`token_log_ratio`.
    """
    if direction not in ("forward", "reverse"):
        raise ValueError(f"direction must be 'forward' or 'reverse', got {direction!r}")
    ours, theirs, _, mask = _aligned(policy_logits, ref_logits, labels)
    kl = _divergence(theirs, ours) if direction == "forward" else _divergence(ours, theirs)
    return kl.masked_fill(~mask, 0.0)


# -- from models -------------------------------------------------------------------------------------------------


def token_stats(
    model: nn.Module,
    reference: Reference | None,
    batch: PreferenceBatch,
    *,
    want: Collection[str] = (),
    logits_at_once: int = LOGITS_AT_ONCE,
) -> TokenStats:
    """Run policy and reference over a batch.

    Differentiable in the policy where gradients are enabled; the policy runs in its current training mode. Only answer
    positions are unembedded, and where their logits exceed ``logits_at_once`` they are made in pieces (and again in
    the backward pass): the result is the same.

    Parameters
    ----------
    model
        The policy, possibly wrapped for distributed training or by peft.
    reference
        See :class:`Reference`; it may lie on another device. None takes its log-probabilities from the batch, where
        :func:`cache_reference` put them.
    batch
        Padded on either side; any rows with labels, not only pairs.
    want
        What to compute beside the log-probabilities: ``kl``, ``reverse_kl``, ``entropy``, ``hidden``.
    logits_at_once
        Bound on how many logits of each model are held at a time.

    Raises
    ------
    ValueError
        An unknown want, one that needs the reference where there is none, vocabularies that differ, ids outside them, a
        row without an answer, NaN logits, too many positions.
    """
    _check_want(want, reference, batch)
    vocabulary = vocabulary_of(model)
    check_ids("input_ids of the batch", batch.input_ids, vocabulary)
    inputs, ids, _ = forward_inputs(model, batch.input_ids, batch.attention_mask)
    mask = _answer_mask(batch.labels.to(ids.device))
    targets = ids[:, 1:][mask]
    theirs, hidden = None, None
    if reference is not None:
        theirs, hidden = _reference_states(reference, inputs, mask, "hidden" in want)
    states, head = states_and_head(model, inputs)
    columns = [name for name in ("kl", "reverse_kl", "entropy") if name in want]

    def terms(ours: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        ref_logits = None
        if reference is not None and theirs is not None:
            ref_logits = _reference_logits(reference, theirs[rows.to(theirs.device)]).to(ours.device)
        return _terms(head(ours), ref_logits, targets[rows], columns)

    rows = torch.arange(len(targets), device=ids.device)
    pieces = list(chunks(states[:, :-1][mask], rows, vocabulary, logits_at_once))
    again = len(pieces) > 1 and torch.is_grad_enabled() and states.requires_grad
    parts = [cast(Any, checkpoint(terms, *piece, use_reentrant=False)) if again else terms(*piece) for piece in pieces]
    empty = torch.zeros(mask.shape, device=ids.device)
    logps, *found = (empty.masked_scatter(mask, torch.cat(column)) for column in zip(*parts, strict=True))
    extras = {name: values.to(ids.device) for name, values in batch.extras.items()}
    ref_logps = extras.pop(CACHED, None)
    if reference is not None:
        ref_logps, *found = found
    return TokenStats(mask, logps, ref_logps, hidden=hidden, extras=extras, **dict(zip(columns, found, strict=True)))  # type: ignore[arg-type]


def cache_reference(
    pairs: Sequence[PreferencePair],
    reference: Reference,
    *,
    batch_size: int = 64,
    pad_id: int = 0,
    logits_at_once: int = LOGITS_AT_ONCE,
) -> list[PreferencePair]:
    """The pairs with the reference's log-probabilities of their answer tokens, as the extra ``ref_logps``.

    With them, objectives that need no more of the reference train without running it: see ``token_stats`` with
    ``reference=None``. They hold for this reference and these tokens only.
    """
    done = []
    for start in range(0, len(pairs), batch_size):
        some = pairs[start : start + batch_size]
        batch = collate(some, pad_id)
        with reference.active() as ref:
            check_ids("input_ids of the batch", batch.input_ids, vocabulary_of(ref))
            scores = token_log_probs(
                cast(Any, ref), batch.input_ids, batch.attention_mask, logits_at_once=logits_at_once
            )
        rows = [values[keep] for values, keep in zip(scores.cpu(), _answer_mask(batch.labels), strict=True)]
        for pair, chosen, rejected in zip(some, rows[: len(some)], rows[len(some) :], strict=True):
            done.append(
                replace(
                    pair,
                    chosen_extras={**pair.chosen_extras, CACHED: chosen},
                    rejected_extras={**pair.rejected_extras, CACHED: rejected},
                )
            )
    return done


def _check_want(want: Collection[str], reference: Reference | None, batch: PreferenceBatch) -> None:
    unknown = set(want) - set(WANTS)
    if unknown:
        raise ValueError(f"want holds {', '.join(sorted(unknown))}; known: {', '.join(WANTS)}")
    if reference is not None:
        return
    if needs := sorted(NEEDS_REFERENCE.intersection(want)):
        raise ValueError(f"{', '.join(needs)} cannot be had from cached log-probabilities: give a reference")
    if CACHED not in batch.extras:
        raise ValueError(f"reference is None and the batch has no {CACHED!r}: pass its pairs through cache_reference")


def _reference_states(
    reference: Reference, inputs: dict[str, Any], mask: Tensor, keep_hidden: bool
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """What precedes the answer tokens, (n, D) final states, or (n, V) logits where the way between them is not known,
    on the reference's device; and the layers' states (N, S - 1, D) on that of the inputs.
    """
    with reference.active() as ref:
        device = device_of(ref)
        moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
        hidden = None
        if not keep_hidden:
            states = states_and_head(ref, moved)[0]
        else:
            stock = stock_forward(ref)
            output = (body(ref) if stock else ref)(**moved, output_hidden_states=True)
            states = output.last_hidden_state if stock else output.logits
            # the first is the embedding
            hidden = tuple(layer[:, :-1].to(mask.device) for layer in output.hidden_states[1:])
    return states[:, :-1][mask.to(states.device)], hidden


def _reference_logits(reference: Reference, states: Tensor) -> Tensor:
    with reference.active() as ref:
        return read_out(ref, states) if stock_forward(ref) else states


def _terms(logits: Tensor, ref_logits: Tensor | None, targets: Tensor, columns: list[str]) -> tuple[Tensor, ...]:
    """log p of the targets under the policy and, if there is one, the reference, then the columns; each (n,)."""
    ours = _log_softmax("policy", logits)
    values = [ours.gather(-1, targets[:, None])[:, 0]]
    theirs = ours
    if ref_logits is not None:
        if logits.shape != ref_logits.shape:
            raise ValueError(
                f"the policy gives {logits.shape[-1]} logits a token and the reference {ref_logits.shape[-1]}"
            )
        theirs = _log_softmax("reference", ref_logits)
        values.append(theirs.gather(-1, targets[:, None])[:, 0])
    for column in columns:
        if column == "kl":
            values.append(_divergence(theirs, ours))
        elif column == "reverse_kl":
            values.append(_divergence(ours, theirs))
        else:
            values.append(-(ours.exp() * ours.masked_fill(ours == -torch.inf, 0.0)).sum(-1))
    return tuple(values)
