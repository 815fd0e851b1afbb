"""The Sophia update (arXiv 2305.14342, algorithm 3) and its two members, SophiaG and SophiaH."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from papertrial.papers.optimization.sophia.method.curvature import Noise, hutchinson_diagonal

Reduce = Callable[[Sequence[Tensor]], None]
HALF = (torch.float16, torch.bfloat16)
PIECE = 1 << 17
"""Elements that a CPU works on at a time: few enough to stay in cache, enough to pay for the calls."""


class Sophia(Optimizer):
    r"""Momentum divided by a moving average of diagonal curvature, clipped per coordinate.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1)\, g_t \\
        h_t &= \beta_2 h_{t-k} + (1 - \beta_2)\, \hat h_t \quad\text{every } k \text{ steps, otherwise } h_{t-1} \\
        \theta &\leftarrow \theta - \eta \lambda \theta \\
        \theta &\leftarrow \theta - \eta\, \mathrm{clip}(m_t / \max(\rho\, h_t, \epsilon),\ 1)

    Both averages start at zero and are **not** bias-corrected. Where h <= 0 the quotient is huge and the clip turns the
    step into :math:`\eta\,\mathrm{sign}(m)`: the safe fallback. No coordinate ever moves by more than lr (after decay).

    This class takes any diagonal estimate (:meth:`fold_in`); :class:`SophiaG` and :class:`SophiaH` bring the paper's
    two. ``rho`` is the paper's :math:`\gamma` in the scale of the official code: there h holds an average of
    :math:`\hat g^2` and the token count B multiplies it at every step; here h holds the average of
    :math:`B \hat g^2` as in the paper. The two agree while B is constant, and only this one is right when it varies.

    Parameters
    ----------
    params : parameters or groups; a group may carry its own ``lr``, ``betas``, ``rho``, ``weight_decay``, ``eps``.
    lr : step size, and the largest move of a coordinate in one step.
    betas : decay of the momentum and of the curvature, each in [0, 1).
    rho : >= 0. Larger means fewer clipped coordinates; 0 is momentum sign descent. Tune it for a
        :meth:`win_rate` between 0.1 and 0.5.
    weight_decay : decoupled, >= 0; usually about twice AdamW's.
    eps : > 0, the floor of ``rho * h``.
    reduce : hook that averages tensors over data-parallel workers in place, such as :func:`all_reduce_mean`.
    foreach : batched tensor operations over many parameters (default), or one parameter at a time, which needs less
        memory on an accelerator. The same arithmetic, bit for bit.

    Raises
    ------
    ValueError, TypeError
        For settings outside their range and for complex or integer parameters.

    Notes
    -----
    Half-precision parameters get float32 averages (h is a sum of small squares), but an update below the parameter's
    own resolution is lost: keep float32 weights under autocast. With a gradient scaler unscale before :meth:`step`
    **and** before any curvature update. arXiv 2305.14342, algorithm 3.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 6e-4,
        betas: tuple[float, float] = (0.965, 0.99),
        rho: float = 0.05,
        weight_decay: float = 0.2,
        *,
        eps: float = 1e-12,
        reduce: Reduce | None = None,
        foreach: bool = True,
    ) -> None:
        self.reduce = reduce
        self.foreach = foreach
        super().__init__(params, {"lr": lr, "betas": betas, "rho": rho, "weight_decay": weight_decay, "eps": eps})

    def __getstate__(self) -> dict[str, Any]:
        # torch keeps only what it knows; a copied or pickled optimiser needs these as well
        return {**super().__getstate__(), "reduce": self.reduce, "foreach": self.foreach}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        beta1, beta2 = group["betas"]
        for name, value, fits, want in (
            ("lr", group["lr"], 0.0 <= group["lr"] < float("inf"), ">= 0"),
            ("betas[0]", beta1, 0.0 <= beta1 < 1.0, "in [0, 1)"),
            ("betas[1]", beta2, 0.0 <= beta2 < 1.0, "in [0, 1)"),
            ("rho", group["rho"], 0.0 <= group["rho"] < float("inf"), ">= 0"),
            ("weight_decay", group["weight_decay"], 0.0 <= group["weight_decay"] < float("inf"), ">= 0"),
            ("eps", group["eps"], 1e-38 <= group["eps"] < float("inf"), ">= 1e-38, so that it is not 0 in float32"),
        ):
            if not fits:
                raise ValueError(f"{name} must be {want}, got {value}")
        for p in group["params"]:
            if not p.is_floating_point():
                raise TypeError(f"Sophia needs real floating-point parameters, got {p.dtype}")

    # -- state ---------------------------------------------------------------------------------------------------

    def parameters(self) -> Iterator[Tensor]:
        """Every parameter, in the order of the groups: the order in which :meth:`fold_in` takes estimates."""
        for group in self.param_groups:
            yield from group["params"]

    def _averages(self, p: Tensor) -> dict[str, Tensor]:
        state = self.state[p]
        if not state:
            dtype = torch.float32 if p.dtype in HALF else p.dtype
            state["exp_avg"] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
            state["hessian"] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, except that the float32 averages of half-precision parameters stay float32."""
        super().load_state_dict(state_dict)
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, p in zip(saved_ids, self.parameters(), strict=True):
            if p.dtype in HALF and i in state_dict["state"]:
                for name, value in state_dict["state"][i].items():
                    self.state[p][name] = value.detach().to(device=p.device, dtype=torch.float32, copy=True)

    # -- the update ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One parameter update from ``p.grad``; parameters without a gradient are left alone.

        Raises
        ------
        RuntimeError
            For a sparse gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            _refuse_sparse([p.grad for p in params])
            self._update(params, group)
        return loss

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        averages = [self._averages(p) for p in params]
        momenta, hessians = [a["exp_avg"] for a in averages], [a["hessian"] for a in averages]
        gradients = [p.grad.to(m.dtype) for p, m in zip(params, momenta, strict=True)]  # type: ignore[union-attr]
        beta1, lr = group["betas"][0], group["lr"]
        for theta, g, m, h in self._batches(params, gradients, momenta, hessians):
            torch._foreach_mul_(m, beta1)
            torch._foreach_add_(m, g, alpha=1 - beta1)
            scales = torch._foreach_mul(h, group["rho"])
            torch._foreach_clamp_min_(scales, group["eps"])  # h <= 0 ends here: m / eps is clipped to the sign of m
            updates = torch._foreach_div(m, scales)
            torch._foreach_clamp_max_(updates, 1.0)
            torch._foreach_clamp_min_(updates, -1.0)
            if group["weight_decay"]:
                torch._foreach_mul_(theta, 1 - lr * group["weight_decay"])
            torch._foreach_add_(theta, updates, alpha=-lr)

    def _batches(self, *columns: list[Tensor]) -> Iterator[tuple[list[Tensor], ...]]:
        """Aligned lists of tensors in portions that one batched operation takes together.

        On an accelerator that is everything of one device and dtype, for few launches. On a CPU it is at most ``PIECE``
        elements, large tensors cut up, so that a portion stays in cache through all the operations on it.
        """
        rows = list(zip(*columns, strict=True))
        if not self.foreach:
            yield from (tuple([tensor] for tensor in row) for row in rows)
            return
        buckets: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, ...]]] = {}
        for row in rows:
            buckets.setdefault((row[0].device, row[0].dtype), []).append(row)
        for (device, _), members in buckets.items():
            portion: list[tuple[Tensor, ...]] = []
            room = PIECE
            for row in (piece for member in members for piece in _cut(member)) if device.type == "cpu" else members:
                if device.type == "cpu" and portion and row[0].numel() > room:
                    yield tuple(list(column) for column in zip(*portion, strict=True))
                    portion, room = [], PIECE
                portion.append(row)
                room -= row[0].numel()
            yield tuple(list(column) for column in zip(*portion, strict=True))

    # -- the curvature -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def fold_in(self, estimates: Sequence[Tensor | None]) -> None:
        """Move h towards a diagonal estimate: ``h <- beta2 h + (1 - beta2) estimate``.

        Parameters
        ----------
        estimates : one tensor per parameter, in the order of :meth:`parameters` and of its shape; None leaves that
            parameter's h as it is.

        Raises
        ------
        ValueError
            If their number or a shape is wrong, or none was given.
        RuntimeError
            If an estimate is not finite. It would stay in h for good, so it is refused before anything has changed.
        """
        params = list(self.parameters())
        if len(estimates) != len(params):
            raise ValueError(f"estimates must be one per parameter ({len(params)}), got {len(estimates)}")
        given = [e for e in estimates if e is not None]
        if not given:
            raise ValueError("estimates are all None: nothing to fold in")
        for p, e in zip(params, estimates, strict=True):
            if e is not None and e.shape != p.shape:
                raise ValueError(f"an estimate has shape {tuple(e.shape)} where its parameter has {tuple(p.shape)}")
        _refuse_broken(given, lambda e: e)
        for group, pairs in self._by_group(estimates):
            beta2 = group["betas"][1]
            hessians = [self._averages(p)["hessian"] for p, _ in pairs]
            widened = [e.to(h.dtype) for h, (_, e) in zip(hessians, pairs, strict=True)]
            for some, new in self._batches(hessians, widened):
                torch._foreach_mul_(some, beta2)
                torch._foreach_add_(some, new, alpha=1 - beta2)

    def _by_group(
        self, values: Sequence[Tensor | None]
    ) -> Iterator[tuple[dict[str, Any], list[tuple[Tensor, Tensor]]]]:
        """(group, [(parameter, value)]) of values in the order of :meth:`parameters`, those that are None left out."""
        remaining = iter(values)
        for group in self.param_groups:
            pairs = [(p, next(remaining)) for p in group["params"]]
            yield group, [(p, value) for p, value in pairs if value is not None]

    @torch.no_grad()
    def win_rate(self) -> float:
        """Share of coordinates whose step is **not** clipped, from the current averages.

        Raises
        ------
        RuntimeError
            Before the first step.
        """
        unclipped, total = [], 0
        for group in self.param_groups:
            for p in group["params"]:
                if self.state.get(p):
                    m, h = self.state[p]["exp_avg"], self.state[p]["hessian"]
                    unclipped.append((m.abs() < (h * group["rho"]).clamp_min(group["eps"])).sum().cpu())
                    total += m.numel()
        if not total:
            raise RuntimeError("win_rate needs at least one step")
        return float(torch.stack(unclipped).sum()) / total


class SophiaG(Sophia):
    """Sophia with the Gauss-Newton-Bartlett estimate :math:`\\hat h = B\\, \\hat g \\odot \\hat g` (never negative).

    Every k steps (10 in the paper), before :meth:`step`::

        sampled = gnb_loss(model(ids).logits[:, :-1])
        optimizer.update_hessian(sampled.tokens, sampled.loss)

    or, where gradients are accumulated over micro-batches or reduced by DDP, ``backward()`` the sampled losses into
    ``p.grad`` as a mean over all tokens and call ``update_hessian(tokens)``, then ``zero_grad``. The defaults are
    GPT-2 125M's (lr 6e-4, rho 0.05, weight decay 0.2). Parameters: see :class:`Sophia`.

    Notes
    -----
    arXiv 2305.14342, algorithms 2 and 3.
    """

    @torch.no_grad()
    def update_hessian(self, bs: int, loss: Tensor | None = None) -> None:
        """Fold in the estimate from the gradient of a :func:`gnb_loss`.

        Parameters
        ----------
        bs : B, the number of tokens in the mean that was differentiated, over all micro-batches and workers.
        loss : the sampled-label loss; its gradient is taken here and ``p.grad`` is neither read nor changed. None
            reads ``p.grad``.

        Raises
        ------
        ValueError
            If ``bs`` is not positive.
        RuntimeError
            If ``loss`` is None and no parameter has a gradient, or gradients are sparse or not finite.
        """
        if isinstance(bs, bool) or not isinstance(bs, int):
            raise TypeError(f"bs is a number of tokens, got {bs!r}")
        if bs <= 0:
            raise ValueError(f"bs is the number of tokens in the mean loss and must be positive, got {bs}")
        params = list(self.parameters())
        if loss is not None:
            gradients = _gradients(loss, params)
        else:
            gradients = [None if p.grad is None else p.grad for p in params]
            if all(g is None for g in gradients):
                raise RuntimeError("no parameter has a gradient: backward() the gnb_loss first, or pass it as loss")
        _refuse_sparse(gradients)
        if self.reduce is not None:
            if loss is None:
                gradients = [None if g is None else g.clone() for g in gradients]  # p.grad is the caller's
            self.reduce([g for g in gradients if g is not None])
        present = [g for g in gradients if g is not None]
        _refuse_broken(present, lambda g: g.float().square() * bs)
        for group, pairs in self._by_group(gradients):
            beta2 = group["betas"][1]
            hessians = [self._averages(p)["hessian"] for p, _ in pairs]
            # float32 first: the square of a half-precision gradient underflows
            widened = [g.to(h.dtype) for h, (_, g) in zip(hessians, pairs, strict=True)]
            for some, new in self._batches(hessians, widened):
                torch._foreach_mul_(some, beta2)
                torch._foreach_addcmul_(some, new, new, value=(1 - beta2) * bs)


class SophiaH(Sophia):
    """Sophia with Hutchinson's estimate :math:`\\hat h = u \\odot (\\nabla^2 L\\, u)` (unbiased, may be negative).

    Every k steps ``optimizer.update_hessian(loss)`` with a loss that can be differentiated twice, before
    :meth:`step`. Default rho is the paper's 0.01. Parameters: see :class:`Sophia`.

    Notes
    -----
    arXiv 2305.14342, algorithms 1 and 3.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 6e-4,
        betas: tuple[float, float] = (0.965, 0.99),
        rho: float = 0.01,
        weight_decay: float = 0.2,
        *,
        eps: float = 1e-12,
        reduce: Reduce | None = None,
        foreach: bool = True,
    ) -> None:
        super().__init__(params, lr, betas, rho, weight_decay, eps=eps, reduce=reduce, foreach=foreach)

    def update_hessian(self, loss: Tensor, generator: torch.Generator | None = None, noise: Noise = "gaussian") -> None:
        """Draw one Hutchinson estimate and fold it in; ``p.grad`` is neither read nor changed.

        Parameters and errors: :func:`hutchinson_diagonal`; RuntimeError if the estimate is not finite.
        """
        params = list(self.parameters())
        trainable = [p for p in params if p.requires_grad]
        drawn = iter(hutchinson_diagonal(loss, trainable, generator, noise))
        estimates = [next(drawn) if p.requires_grad else None for p in params]
        if self.reduce is not None:
            self.reduce([e for e in estimates if e is not None])
        self.fold_in(estimates)


def _gradients(loss: Tensor, params: list[Tensor]) -> list[Tensor | None]:
    """Gradients of ``loss`` without touching ``p.grad``; None for frozen parameters and those it does not reach."""
    if not loss.requires_grad:
        raise RuntimeError("loss has no graph: compute it with gradients enabled")
    trainable = [p for p in params if p.requires_grad]
    found = iter(torch.autograd.grad(loss, trainable, allow_unused=True))
    return [next(found) if p.requires_grad else None for p in params]


def _cut(row: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    """One row of aligned tensors as rows of flat views of at most ``PIECE`` elements."""
    plain = all(type(t) in (Tensor, torch.nn.Parameter) and t.is_contiguous() for t in row)
    if not plain or row[0].numel() <= PIECE:
        yield row
    else:
        yield from zip(*(t.detach().view(-1).split(PIECE) for t in row), strict=True)


def _refuse_sparse(gradients: Iterable[Tensor | None]) -> None:
    if any(g is not None and g.is_sparse for g in gradients):
        raise RuntimeError("Sophia does not support sparse gradients: build the embedding with sparse=False")


def _refuse_broken(values: list[Tensor], estimate: Callable[[Tensor], Tensor]) -> None:
    """Refuse values whose estimate is not finite: it would stay in h for good."""
    # a norm is one quick pass; only where it is huge or NaN are the elements looked at
    suspects = [v for v, norm in zip(values, torch._foreach_norm(values), strict=True) if not norm.item() < 1e15]
    bad = sum(not bool(torch.isfinite(estimate(v)).all()) for v in suspects)
    if bad:
        raise RuntimeError(f"{bad} of {len(values)} curvature estimates hold NaN or infinity; h is unchanged")
