"""Learning from preferred and rejected answers: pairs, token statistics against a reference, training, evaluation.

    trainer = PreferenceTrainer(model, objective=DPO(beta=0.1))          # the reference is a frozen copy
    trainer.fit(pairs, steps=300, batch_size=64, optimizer=adamw(1e-4), generator=generator)
    evaluate_policy(model, trainer.reference, prompts, reward=reward, max_new_tokens=32, generator=generator)

What every objective here shares is computed in one place: the shift between logits and targets, the float32
log-softmax, and the exact divergence from the reference over the whole vocabulary.
"""

from papertrial.lm.preferences.evaluation import (
    PairReport,
    PolicyReport,
    at_matched,
    evaluate_pairs,
    evaluate_policy,
    frontier,
)
from papertrial.lm.preferences.objectives import DPO, Objective, PreferenceLoss, check_beta, check_totals, dpo_loss
from papertrial.lm.preferences.pairs import (
    PairBatches,
    PreferenceBatch,
    PreferencePair,
    as_pairs,
    collate,
    pair_batches,
    read_pairs,
)
from papertrial.lm.preferences.reference import Reference
from papertrial.lm.preferences.sampling import pairs_from_samples
from papertrial.lm.preferences.stats import TokenStats, cache_reference, token_kl, token_log_ratio, token_stats
from papertrial.lm.preferences.trainer import PreferenceTrainer

__all__ = [
    "DPO",
    "Objective",
    "PairBatches",
    "PairReport",
    "PolicyReport",
    "PreferenceBatch",
    "PreferenceLoss",
    "PreferencePair",
    "PreferenceTrainer",
    "Reference",
    "TokenStats",
    "as_pairs",
    "at_matched",
    "cache_reference",
    "check_beta",
    "check_totals",
    "collate",
    "dpo_loss",
    "evaluate_pairs",
    "evaluate_policy",
    "frontier",
    "pair_batches",
    "pairs_from_samples",
    "read_pairs",
    "token_kl",
    "token_log_ratio",
    "token_stats",
]
