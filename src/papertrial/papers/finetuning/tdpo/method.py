"""Token-level direct preference optimisation (arXiv 2404.11999).

DPO holds a policy to its reference through the log-ratio of whole answers alone. TDPO adds, token by token, the exact
forward divergence from the reference: with the log-ratio R(y) = sum_t log pi(y_t|x, y_<t) - log r(y_t|x, y_<t) and the
sequential divergence K(y) = sum_t KL(r(.|x, y_<t) || pi(.|x, y_<t)),

    u      = R(y_w) - R(y_l)
    TDPO1:   delta = K(y_l) - K(y_w)                  loss = -log sigmoid(beta * (u - delta))
    TDPO2:   delta = K(y_l) - stop_gradient(K(y_w))   loss = -log sigmoid(beta * (u - alpha * delta))

>>> import torch
>>> from papertrial.lm.models import load
>>> from papertrial.lm.training import adamw, constant
>>> start = load("house:prose")  # or a hub id, or a folder
>>> pairs = [{"prompt": "The function", "chosen": " returns a list.", "rejected": " is."}]
>>> trainer = PreferenceTrainer(start.model, objective=TDPO(beta=0.1, alpha=0.5), tokenizer=start.tokenizer)
>>> settings = {"optimizer": adamw(1e-4), "schedule": constant(warmup=2), "generator": torch.Generator()}
>>> report = trainer.fit(pairs, steps=8, batch_size=1, **settings)
>>> report.losses[-1] < report.losses[0], trainer.evaluate(pairs).accuracy
(True, 1.0)

The reference is a frozen copy of the policy as it was, or the base model of a peft adapter.
``pairs`` are mappings with ``prompt``, ``chosen`` and ``rejected`` as text or token ids. Generation needs nothing but
the policy. The authors train from the supervised model for one epoch with RMSprop at 5e-6 (150 steps of linear
warm-up), gradients clipped at 10, sequences of at most 512 tokens.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor

from papertrial.lm.preferences import PreferenceLoss, PreferenceTrainer, TokenStats, check_totals, token_kl
from papertrial.lm.preferences.objectives import check_beta

__all__ = ["TDPO", "PreferenceTrainer", "Variant", "tdpo_loss", "token_kl"]

Variant = Literal["tdpo1", "tdpo2"]


def tdpo_loss(
    chosen_logratio: Tensor,
    rejected_logratio: Tensor,
    chosen_kl: Tensor,
    rejected_kl: Tensor,
    *,
    beta: float = 0.1,
    alpha: float = 0.5,
    variant: Variant = "tdpo2",
) -> PreferenceLoss:
    """The TDPO loss of a batch of pairs.

    Parameters
    ----------
    chosen_logratio, rejected_logratio
        R(y_w), R(y_l), (B,) nats: *summed* over the answer's tokens (a mean would rescale beta by the length).
    chosen_kl, rejected_kl
        K(y_w), K(y_l), (B,) nats: sums of the full-vocabulary KL(reference || policy) of each answer position.
    beta
        Positive: how strongly the reference holds.
    alpha
        TDPO2's weight of the divergences, not negative; 0 is DPO. TDPO1 has none and ignores it.
    variant
        ``tdpo2``, which the paper recommends; or ``tdpo1``, whose gradient also *rewards* divergence on the chosen
        answer.

    Returns
    -------
    PreferenceLoss
        Loss (B,); implicit rewards beta * (R(y) + K(y)), without gradient.

    Raises
    ------
    ValueError
        beta <= 0, alpha < 0, an unknown variant, shapes other than (B,), NaN.

    References
    ----------
    arXiv 2404.11999, section 4 (TDPO1 is the loss as derived, TDPO2 the modified one).
    """
    _check(beta, alpha, variant)
    check_totals(
        chosen_logratio=chosen_logratio,
        rejected_logratio=rejected_logratio,
        chosen_kl=chosen_kl,
        rejected_kl=rejected_kl,
    )
    u = chosen_logratio - rejected_logratio
    if variant == "tdpo1":
        logit = u - (rejected_kl - chosen_kl)
    else:
        logit = u - alpha * (rejected_kl - chosen_kl.detach())
    return PreferenceLoss(
        F.softplus(-beta * logit),
        beta * (chosen_logratio + chosen_kl).detach(),
        beta * (rejected_logratio + rejected_kl).detach(),
    )


@dataclass(frozen=True)
class TDPO:
    """:func:`tdpo_loss` as an objective for ``PreferenceTrainer``.

    Parameters
    ----------
    beta
        0.1, as in the authors' configuration.
    alpha
        0.5, likewise.
    variant
        ``tdpo2`` (recommended by the paper) or ``tdpo1``.
    """

    beta: float = 0.1
    alpha: float = 0.5
    variant: Variant = "tdpo2"

    def __post_init__(self) -> None:
        _check(self.beta, self.alpha, self.variant)

    @property
    def wants(self) -> tuple[str, ...]:
        """The exact divergence of every answer position."""
        return ("kl",)

    def __call__(self, chosen: TokenStats, rejected: TokenStats) -> PreferenceLoss:
        return tdpo_loss(
            chosen.total("logratio"),
            rejected.total("logratio"),
            chosen.total("kl"),
            rejected.total("kl"),
            beta=self.beta,
            alpha=self.alpha,
            variant=self.variant,
        )


def _check(beta: float, alpha: float, variant: str) -> None:
    check_beta(beta)
    if not (alpha >= 0 and math.isfinite(alpha)):
        raise ValueError(f"alpha must not be negative, and be finite, got {alpha}")
    if variant not in get_args(Variant):
        raise ValueError(f"variant must be one of {', '.join(get_args(Variant))}, got {variant!r}")
