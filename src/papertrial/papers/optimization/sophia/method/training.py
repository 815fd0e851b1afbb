"""One Sophia training step on a transformers language model, with the curvature schedule."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from papertrial.papers.optimization.sophia.method.curvature import gnb_loss
from papertrial.papers.optimization.sophia.method.optimizer import Sophia, SophiaG, SophiaH


class StepOutcome(NamedTuple):
    """What one :func:`train_step` did."""

    loss: float
    """Training loss before the update, nats per token."""
    gradient_norm: float
    """Global norm before clipping."""
    refreshed: bool
    """Whether h was updated."""


def refresh_hessian(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    optimizer: Sophia,
    *,
    generator: torch.Generator | None = None,
    shifted: bool = True,
) -> None:
    """Estimate the diagonal curvature on one batch and fold it into the optimiser. ``p.grad`` is left alone.

    Parameters
    ----------
    model : a transformers model with a language-modelling head; a DistributedDataParallel wrapper is looked through,
        so give the optimiser ``reduce=all_reduce_mean`` there.
    batch : ``input_ids`` (B, T), ``labels`` (B, T) with -100 where a position does not count, and what else the model
        takes. SophiaG uses the labels only to know which positions count; it samples its own.
    optimizer : a :class:`SophiaG` or :class:`SophiaH`. The paper gives G half a batch and H a fifteenth.
    generator : draws the labels (on the model's device) or the probe.
    shifted : the logits of position t predict the label of t + 1 (causal models); False for masked-language models.

    Raises
    ------
    ValueError
        If ``batch`` has no ``labels`` or none of them counts.
    TypeError
        If the optimiser has no estimator of its own.
    """
    if "labels" not in batch:
        raise ValueError(f"batch needs labels to know which positions count; it has {sorted(batch)}")
    module = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    labels = batch["labels"]
    ignored = (labels[:, 1:] if shifted else labels) == -100
    if bool(ignored.all()):
        raise ValueError("batch has no label that counts: all are -100")
    if isinstance(optimizer, SophiaG):
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits = module(**inputs).logits
        sampled = gnb_loss(logits[:, :-1] if shifted else logits, ignored, generator)
        workers = torch.distributed.get_world_size() if module is not model else 1
        optimizer.update_hessian(sampled.tokens * workers, sampled.loss)
    elif isinstance(optimizer, SophiaH):
        with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no second derivative
            loss = module(**batch).loss
            optimizer.update_hessian(loss, generator)
    else:
        raise TypeError(
            f"optimizer must be SophiaG or SophiaH, got {type(optimizer).__name__}; use its fold_in instead"
        )


def train_step(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    optimizer: Sophia,
    step: int,
    *,
    k: int = 10,
    curvature_batch: Mapping[str, Tensor] | None = None,
    clip_norm: float = 1.0,
    generator: torch.Generator | None = None,
    shifted: bool = True,
) -> StepOutcome:
    """One step of algorithm 3: gradient, clip by global norm, curvature every k steps, update.

    Parameters
    ----------
    model, batch, optimizer, generator, shifted : as in :func:`refresh_hessian`.
    step : from 0; h is refreshed at steps 0, k, 2k ... (the paper counts from 1 and refreshes where t mod k = 1).
    k : steps between refreshes.
    curvature_batch : a fresh (sub-)batch for the estimate; None reuses ``batch``.
    clip_norm : largest global gradient norm, > 0; ``inf`` for none.

    Raises
    ------
    ValueError
        If ``step`` < 0, ``k`` < 1 or ``clip_norm`` <= 0; see also :func:`refresh_hessian`.
    RuntimeError
        If the loss or the gradient is not finite; nothing has been updated then.
    """
    if step < 0 or k < 1:
        raise ValueError(f"step must be >= 0 and k >= 1, got step={step}, k={k}")
    if not clip_norm > 0:
        raise ValueError(f"clip_norm must be positive, got {clip_norm}")
    optimizer.zero_grad(set_to_none=True)
    loss = model(**batch).loss
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    if not bool(torch.isfinite(loss.detach())) or not bool(torch.isfinite(norm)):
        raise RuntimeError(f"loss {loss.item()} with gradient norm {norm.item()} at step {step}: lower lr or raise rho")
    refresh = step % k == 0
    if refresh:
        refresh_hessian(model, curvature_batch or batch, optimizer, generator=generator, shifted=shifted)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepOutcome(float(loss.detach()), float(norm), refresh)
