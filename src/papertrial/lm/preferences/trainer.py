"""Training a policy on preference pairs against a frozen reference."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from papertrial.lm.anatomy import unwrap
from papertrial.lm.losses import Batch, Loss
from papertrial.lm.preferences.evaluation import PairReport, evaluate_pairs
from papertrial.lm.preferences.objectives import Objective
from papertrial.lm.preferences.pairs import CACHED, PreferencePair, as_pairs, check_ids, pair_batches
from papertrial.lm.preferences.reference import Reference, vocabulary_of
from papertrial.lm.preferences.stats import NEEDS_REFERENCE, cache_reference, token_stats
from papertrial.lm.scoring import LOGITS_AT_ONCE
from papertrial.lm.training import OptimizerFactory, TrainingReport, train

Pairs = Sequence[PreferencePair | Mapping[str, Any]]


class PreferenceTrainer:
    """A policy, its reference and an objective.

    Parameters
    ----------
    model
        The policy: any causal language model of transformers, or one wrapped by peft. Trained in place.
    ref_model
        The reference. None freezes a copy of the policy as it is now, or, for a peft model, switches its adapter off.
    objective
        What to minimise, such as :class:`DPO`.
    tokenizer
        Needed only for pairs given as text.
    logits_at_once
        Bound on the logits held at a time, see :func:`token_stats`.
    """

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        ref_model: nn.Module | None = None,
        *,
        objective: Objective,
        tokenizer: PreTrainedTokenizerBase | None = None,
        logits_at_once: int = LOGITS_AT_ONCE,
    ) -> None:
        if unwrap(model).get_output_embeddings() is None:
            raise ValueError(f"{type(unwrap(model)).__name__} has no language-model head: load a causal language model")
        self.model, self.objective, self.tokenizer = model, objective, tokenizer
        self.reference = Reference(model, ref_model)
        self.logits_at_once = logits_at_once

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """The objective of a ``PreferenceBatch``, summed over its pairs, as ``training.train`` takes it.

        Pairs that went through ``cache_reference`` do not run the reference where the objective can do without.
        """
        self.reference.follow(model)  # training over several processes places the policy itself
        cached = CACHED in batch.extras and not NEEDS_REFERENCE.intersection(self.objective.wants)
        reference = None if cached else self.reference
        stats = token_stats(model, reference, batch, want=self.objective.wants, logits_at_once=self.logits_at_once)
        chosen, rejected = stats.halves()
        values = self.objective(chosen, rejected)
        parts = {
            "accuracy": (values.chosen_reward > values.rejected_reward).float().mean(),
            "chosen_reward": values.chosen_reward.mean(),
            "rejected_reward": values.rejected_reward.mean(),
        }
        if chosen.kl is not None and rejected.kl is not None:
            parts |= {"chosen_kl": chosen.total("kl").mean(), "rejected_kl": rejected.total("kl").mean()}
        return Loss(values.loss.sum(), float(len(values.loss)), {name: value.detach() for name, value in parts.items()})

    def fit(
        self,
        pairs: Pairs,
        *,
        steps: int,
        batch_size: int,
        optimizer: torch.optim.Optimizer | OptimizerFactory,
        generator: torch.Generator,
        clip_norm: float | None = 10.0,
        dropout: bool = False,
        cache_reference: bool = False,
        **loop: Any,
    ) -> TrainingReport:
        """Train the policy for ``steps`` batches of ``batch_size`` pairs.

        Parameters
        ----------
        pairs
            :class:`PreferencePair`, or mappings with ``prompt``, ``chosen`` and ``rejected`` as token ids or text.
        optimizer
            A factory over the trainable parameters (the policy's, then the objective's own if it has any), or an
            optimiser that was built over them.
        generator
            Orders the pairs.
        clip_norm
            10, as the reference implementations of DPO and its successors have it.
        dropout
            Off by default, as there: dropout would count as divergence from the reference.
        cache_reference
            Run the reference once over all pairs beforehand and not at all while training; pays from the second epoch
            on, for objectives that need no more of it than the log-probability of the answers (DPO).
        **loop
            Everything else of ``training.train``: schedule, accumulate, precision, on_step, checkpoint ...

        Returns
        -------
        TrainingReport
            One loss per step; ``on_step`` also hears accuracy, rewards and, where the objective uses them, divergences.

        Raises
        ------
        ValueError
            No trainable parameter, one in half precision (small updates would be lost), no pairs, a token id outside
            the vocabulary; an objective that cannot do with cached log-probabilities, or that has parameters while
            there are several processes.
        """
        rows = self._rows(pairs)
        if cache_reference:
            if needs := sorted(NEEDS_REFERENCE.intersection(self.objective.wants)):
                raise ValueError(f"cache_reference=True, and the objective needs the reference for {', '.join(needs)}")
            rows = self._cached(rows)
        policy = [p for p in self.model.parameters() if p.requires_grad]
        if not policy:
            raise ValueError("model has no trainable parameter; set requires_grad on what is to be trained")
        coarse = {str(p.dtype) for p in policy if p.dtype not in (torch.float32, torch.float64)}
        if coarse:
            raise ValueError(
                f"the policy's trainable parameters are {', '.join(sorted(coarse))}, which rounds small updates away: "
                "use model.float() with precision='bf16', or an adapter in float32"
            )
        keep = dict(loop.pop("keep", None) or {})
        if isinstance(self.objective, nn.Module):
            if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
                raise ValueError("an objective with parameters of its own is trained by one process only")
            self.objective.to(policy[0].device).train()
            policy += [p for p in self.objective.parameters() if p.requires_grad]
            keep["objective"] = self.objective
        if not isinstance(optimizer, torch.optim.Optimizer):
            optimizer = optimizer(policy)
        report = train(
            self.model,
            pair_batches(rows, batch_size, generator=generator, pad_id=self._pad_id()),
            steps=steps,
            optimizer=optimizer,
            loss=self.loss,
            clip_norm=clip_norm,
            dropout=dropout,
            keep=keep,
            **loop,
        )
        if isinstance(self.objective, nn.Module):
            self.objective.eval()
        return report

    def _rows(self, pairs: Pairs) -> list[PreferencePair]:
        """Pairs as token ids that the policy knows: told before the first step, not when their batch comes up."""
        rows, vocabulary = as_pairs(pairs, self.tokenizer), vocabulary_of(self.model)
        for row, pair in enumerate(rows):
            for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
                check_ids(f"{name} of pair {row}", getattr(pair, name), vocabulary)
        return rows

    def _cached(self, rows: list[PreferencePair]) -> list[PreferencePair]:
        return cache_reference(rows, self.reference, pad_id=self._pad_id(), logits_at_once=self.logits_at_once)

    def evaluate(self, pairs: Pairs, *, batch_size: int = 64) -> PairReport:
        """The policy on held-out pairs, see :func:`evaluate_pairs`."""
        return evaluate_pairs(
            self.model,
            self.reference,
            self.objective,
            self._rows(pairs),
            batch_size=batch_size,
            pad_id=self._pad_id(),
            logits_at_once=self.logits_at_once,
        )

    def _pad_id(self) -> int:
        pad = unwrap(self.model).config.pad_token_id
        # some checkpoints name a padding id that was never given an embedding; padding is masked, so any id will do
        return int(pad) if pad is not None and 0 <= pad < vocabulary_of(self.model) else 0
