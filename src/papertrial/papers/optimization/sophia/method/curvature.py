"""The two estimators of the diagonal curvature of a loss (arXiv 2305.14342, section 2.3, algorithms 1 and 2)."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Noise = Literal["gaussian", "rademacher"]


class GNBLoss(NamedTuple):
    """The loss whose squared gradient estimates the Gauss-Newton diagonal, and the B that it has to be scaled by."""

    loss: Tensor
    """Mean cross-entropy on sampled labels, a scalar in nats with a graph."""
    tokens: int
    """B: how many positions are in that mean."""


def gnb_loss(logits: Tensor, ignore_mask: Tensor | None = None, generator: torch.Generator | None = None) -> GNBLoss:
    r"""Cross-entropy on labels drawn from the model's own predictions: the loss of the Gauss-Newton-Bartlett estimator.

    With :math:`\hat y_b \sim \mathrm{softmax}(z_b)` for every position b that counts and
    :math:`\hat L = \frac1B \sum_b \ell(z_b, \hat y_b)`, Bartlett's identities give
    :math:`E[B\, \nabla\hat L \odot \nabla\hat L] = \mathrm{diag}(\frac1B \sum_b J_b^\top S_b J_b)`, the diagonal of the
    Gauss-Newton matrix of the mean loss. With the *data* labels it would be the empirical Fisher, another matrix.

    Parameters
    ----------
    logits : (..., V) unnormalised scores with a graph; every leading position is one prediction.
    ignore_mask : (...) bool, True where a position does not count (padding); None counts them all.
    generator : draws the labels; on the device of ``logits``. None uses the global stream of that device.

    Returns
    -------
    GNBLoss
        ``loss`` to differentiate and ``tokens`` to hand to :meth:`SophiaG.update_hessian` as ``bs``.

    Raises
    ------
    ValueError
        If shapes disagree, every position is ignored, or a logit that counts is not finite.
    TypeError
        If the mask is not boolean or the logits are not floating point.

    Notes
    -----
    arXiv 2305.14342, algorithm 2.
    """
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point, got {logits.dtype}")
    if logits.ndim < 2 or logits.shape[-1] < 2:
        raise ValueError(f"logits must be (..., V) with V >= 2 and one leading dimension, got {tuple(logits.shape)}")
    flat = logits.reshape(-1, logits.shape[-1])  # (N, V)
    if ignore_mask is not None:
        if ignore_mask.dtype != torch.bool:
            raise TypeError(f"ignore_mask must be bool (True = does not count), got {ignore_mask.dtype}")
        if ignore_mask.shape != logits.shape[:-1]:
            raise ValueError(f"ignore_mask is {tuple(ignore_mask.shape)}, logits need {tuple(logits.shape[:-1])}")
        flat = flat[~ignore_mask.reshape(-1)]
    if len(flat) == 0:
        raise ValueError("no position counts: ignore_mask covers every one of them")
    if flat.dtype in (torch.float16, torch.bfloat16):
        flat = flat.float()  # a softmax over a vocabulary in half precision moves log-probabilities by 0.1 nat
    log_probs = flat.log_softmax(-1)
    probs = log_probs.detach().exp()
    if not torch.isfinite(probs).all():
        raise ValueError("logits hold NaN or +inf where they count: the model has diverged")
    sampled = torch.multinomial(probs, 1, generator=generator).squeeze(-1)  # (N,)
    return GNBLoss(F.nll_loss(log_probs, sampled), len(flat))


def hutchinson_diagonal(
    loss: Tensor,
    params: Sequence[Tensor],
    generator: torch.Generator | None = None,
    noise: Noise = "gaussian",
) -> list[Tensor | None]:
    r"""One draw of Hutchinson's estimate :math:`u \odot (\nabla^2 L\, u)` of the Hessian's diagonal, unbiased.

    Parameters
    ----------
    loss : scalar with a graph that can be differentiated twice. The fused attention kernels cannot: build it under
        ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`` (:func:`refresh_hessian` does) or with eager attention.
    params : tensors of any shape that require grad.
    generator : draws u on the generator's own device (CPU if None); values are moved to each parameter's device.
    noise : law of u: ``"gaussian"`` as in the paper, or ``"rademacher"`` (+-1), exact where the Hessian is diagonal.

    Returns
    -------
    list of tensors
        One estimate per parameter, of its shape; None where the loss does not depend on the parameter.

    Raises
    ------
    ValueError
        If ``loss`` is not a scalar or ``noise`` is unknown.
    RuntimeError
        If the loss has no graph.

    Notes
    -----
    arXiv 2305.14342, algorithm 1. A parameter in which the loss is linear has a zero Hessian: its estimate is 0.
    """
    if noise not in ("gaussian", "rademacher"):
        raise ValueError(f"noise must be 'gaussian' or 'rademacher', got {noise!r}")
    if loss.numel() != 1:
        raise ValueError(f"loss must be a scalar, got shape {tuple(loss.shape)}")
    if not loss.requires_grad:
        raise RuntimeError("loss has no graph: compute it with gradients enabled")
    params = list(params)
    gradients = torch.autograd.grad(loss.reshape(()), params, create_graph=True, allow_unused=True)
    probes = [_probe(p, generator, noise) for p in params]
    curved = [(g, u) for g, u in zip(gradients, probes, strict=True) if g is not None and g.requires_grad]
    products: Sequence[Tensor | None] = [None] * len(params)
    if curved:
        directional = torch.stack([(g * u).sum().to(loss) for g, u in curved]).sum()
        products = torch.autograd.grad(directional, params, allow_unused=True)
    estimates: list[Tensor | None] = []
    for p, g, u, product in zip(params, gradients, probes, products, strict=True):
        if g is None:
            estimates.append(None)
        else:
            estimates.append(torch.zeros_like(p) if product is None else u * product)
    return estimates


def _probe(like: Tensor, generator: torch.Generator | None, noise: Noise) -> Tensor:
    device = generator.device if generator is not None else torch.device("cpu")
    if noise == "gaussian":
        u = torch.randn(like.shape, generator=generator, device=device)
    else:
        u = torch.randint(0, 2, like.shape, generator=generator, device=device).mul_(2).sub_(1)
    return u.to(device=like.device, dtype=like.dtype)


def all_reduce_mean(tensors: Sequence[Tensor]) -> None:
    """Average tensors in place over the workers of the default process group.

    The ``reduce`` hook of the optimisers: with GNB it sees the gradients of the sampled loss **before** they are
    squared (the estimator squares the mean), with Hutchinson the estimates, which are linear. The mean is over workers,
    so every worker must hold the same number of tokens, and ``bs`` is their sum.

    Raises
    ------
    RuntimeError
        If no process group is initialised.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("all_reduce_mean needs an initialised process group; leave reduce=None on one worker")
    world = dist.get_world_size()
    for tensor in tensors:
        dist.all_reduce(tensor)
        tensor.div_(world)
