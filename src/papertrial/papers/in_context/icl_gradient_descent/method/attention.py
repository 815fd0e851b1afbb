"""Self-attention without softmax, the stack that reads regression prompts, and the weights that make it descend.

Tokens are e_j = (x_j, y_j) for the examples and e_q = (x_q, -W_0 x_q) for a query. Every layer does

    e <- e + dampening * sum_heads P W_V C^T (C W_K^T W_Q e),        C = the example tokens, (n, dim)

for examples and queries alike; only examples are keys and values. The prediction is MINUS the y-part of the query
token: a layer moves targets by -dW x where gradient descent would move the weights by dW (2212.07677, section 2).
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

WEIGHT_NAMES = ("W_K", "W_Q", "W_V", "P")


class SelfAttention(nn.Module):
    """One attention layer's update, ``sum_h P_h V_h^T (K_h q_h)``, without bias, norm or residual.

    Parameters
    ----------
    dim : width of the tokens.
    n_heads, key_size : heads and their width; ``key_size`` None is ``dim``, as in the paper.
    softmax : weigh with ``softmax(K q / sqrt(key_size))`` instead of ``K q``.
    init_scale : each matrix starts at N(0, init_scale / fan_in); the paper's small random start is 0.002 / layers.
    generator : of the start.

    Attributes
    ----------
    W_K, W_Q, W_V : (n_heads, key_size, dim).
    P : (n_heads, dim, key_size).
    """

    def __init__(
        self,
        dim: int,
        *,
        n_heads: int = 1,
        key_size: int | None = None,
        softmax: bool = False,
        init_scale: float = 0.002,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        key_size = dim if key_size is None else key_size
        for name, value in (("dim", dim), ("n_heads", n_heads), ("key_size", key_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not (math.isfinite(init_scale) and init_scale > 0):
            raise ValueError(f"init_scale must be positive and finite, got {init_scale}; at 0 no gradient flows")
        self.softmax = softmax

        def start(*shape: int, fan_in: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator) * math.sqrt(init_scale / fan_in))

        self.W_K = start(n_heads, key_size, dim, fan_in=dim)
        self.W_Q = start(n_heads, key_size, dim, fan_in=dim)
        self.W_V = start(n_heads, key_size, dim, fan_in=dim)
        self.P = start(n_heads, dim, key_size, fan_in=n_heads * key_size)

    @property
    def n_heads(self) -> int:
        return self.P.shape[0]

    @property
    def key_query(self) -> Tensor:
        """W_K^T W_Q per head (n_heads, dim, dim): all that the scores depend on."""
        return self.W_K.mT @ self.W_Q

    @property
    def projected_value(self) -> Tensor:
        """P W_V per head (n_heads, dim, dim): all that the update depends on beside the scores."""
        return self.P @ self.W_V

    def weights(self, tokens: Tensor, context: Tensor) -> list[Tensor]:
        """What each head gives every context token: per head (B, T, n) for tokens (B, T, dim), context (B, n, dim)."""
        # (tokens W^T) C^T with W = W_K^T W_Q: equal to Q K^T, and cheaper where the tokens are few
        scores = [(tokens @ key_query.mT) @ context.mT for key_query in self.key_query]
        if not self.softmax:
            return scores
        return [(score / math.sqrt(self.W_K.shape[1])).softmax(-1) for score in scores]

    def forward(self, tokens: Tensor, context: Tensor) -> Tensor:
        """Update (B, T, dim) of ``tokens`` (B, T, dim), whose keys and values are ``context`` (B, n, dim)."""
        update = torch.zeros_like(tokens)
        for weights, projected_value in zip(self.weights(tokens, context), self.projected_value, strict=True):
            update = update + (weights @ context) @ projected_value.mT
        return update


class LinearSelfAttentionStack(nn.Module):
    """Self-attention layers that answer a regression prompt: a predictor ``(x, y, x_query) -> y_hat``.

    Parameters
    ----------
    dim_x, dim_y : of the prompts.
    n_layers : number of layers, K.
    shared : one set of weights applied K times (the paper's recurrent model) or K sets of their own.
    n_heads, key_size, softmax, init_scale, generator : see ``SelfAttention``; each layer starts at init_scale / K.
    dampening : factor on every update, below 1 for long recurrent stacks.
    clip : bound on the absolute value of every token coordinate after each layer; None does not clip. The paper's
        deep models are trained with 10.
    start : W_0 (dim_y, dim_x) of the query tokens; None is 0.
    """

    start: Tensor

    def __init__(
        self,
        dim_x: int,
        dim_y: int = 1,
        n_layers: int = 1,
        *,
        shared: bool = True,
        n_heads: int = 1,
        key_size: int | None = None,
        softmax: bool = False,
        dampening: float = 1.0,
        clip: float | None = None,
        start: Tensor | None = None,
        init_scale: float = 0.002,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("dim_x", dim_x), ("dim_y", dim_y), ("n_layers", n_layers)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 < dampening <= 1:
            raise ValueError(f"dampening must lie in (0, 1], got {dampening}")
        if clip is not None and not clip > 0:
            raise ValueError(f"clip must be positive, or None for no clipping; got {clip}")
        self.dim_x, self.dim_y, self.n_layers, self.shared = dim_x, dim_y, n_layers, shared
        self.dampening, self.clip = dampening, clip
        self.layers = nn.ModuleList(
            SelfAttention(
                dim_x + dim_y,
                n_heads=n_heads,
                key_size=key_size,
                softmax=softmax,
                init_scale=init_scale / n_layers,
                generator=generator,
            )
            for _ in range(1 if shared else n_layers)
        )
        self.register_buffer("start", checked_start(start, dim_x, dim_y))

    @classmethod
    def from_weights(
        cls,
        dim_x: int,
        dim_y: int,
        weights: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]],
        *,
        n_layers: int | None = None,
        start: Tensor | None = None,
        dampening: float = 1.0,
        clip: float | None = None,
    ) -> "LinearSelfAttentionStack":
        """A single-head linear stack with given matrices, such as those of ``gd_attention_weights``.

        Parameters
        ----------
        weights : one mapping with W_K, W_Q, W_V (key_size, dim) and P (dim, key_size), applied ``n_layers`` times, or
            a sequence with one for each layer.
        """
        shared = isinstance(weights, Mapping)
        each: list[Mapping[str, Tensor]] = [weights] if isinstance(weights, Mapping) else list(weights)
        if not each:
            raise ValueError("weights must hold at least one layer")
        if not shared and n_layers not in (None, len(each)):
            raise ValueError(f"n_layers is {n_layers}, but weights holds {len(each)} layers")
        depth = (n_layers or 1) if shared else len(each)
        stack = cls(
            dim_x,
            dim_y,
            depth,
            shared=shared,
            key_size=each[0]["W_K"].shape[0],
            start=start,
            dampening=dampening,
            clip=clip,
            generator=torch.Generator(),  # what it draws is overwritten; the global stream stays untouched
        ).to(each[0]["W_K"])
        for layer, given in zip(stack.layers, each, strict=True):
            for name in WEIGHT_NAMES:
                parameter = getattr(layer, name)
                if given[name].shape != parameter.shape[1:]:
                    raise ValueError(
                        f"weights[{name!r}] must have the shape {tuple(parameter.shape[1:])} for dim_x {dim_x} and "
                        f"dim_y {dim_y}, got {tuple(given[name].shape)}"
                    )
                parameter.data.copy_(given[name][None])
        return stack

    def forward(self, x: Tensor, y: Tensor, x_query: Tensor) -> Tensor:
        """Predictions (B, q, dim_y) after the last layer."""
        return self._run(x, y, x_query, self.n_layers, self.dampening, False)[-1]

    def rollout(
        self,
        x: Tensor,
        y: Tensor,
        x_query: Tensor,
        *,
        n_layers: int | None = None,
        dampening: float | None = None,
        targets_only: bool = False,
    ) -> list[Tensor]:
        """Predictions after 0, 1, ... layers, each (B, q, dim_y).

        Parameters
        ----------
        n_layers : may exceed the trained number where the weights are shared: a trained step is then iterated.
        dampening : None is the stack's own.
        targets_only : update only the y-part of the tokens, as gradient descent does.
        """
        depth = self.n_layers if n_layers is None else n_layers
        if depth < 1:
            raise ValueError(f"n_layers must be at least 1, got {depth}")
        if not self.shared and depth > self.n_layers:
            raise ValueError(f"n_layers is {depth}, but the stack has {self.n_layers} layers of their own")
        damp = self.dampening if dampening is None else dampening
        if not 0 < damp <= 1:
            raise ValueError(f"dampening must lie in (0, 1], got {damp}")
        return self._run(x, y, x_query, depth, damp, targets_only)

    def _run(
        self, x: Tensor, y: Tensor, x_query: Tensor, depth: int, dampening: float, targets_only: bool
    ) -> list[Tensor]:
        self._check(x, y, x_query)
        context = torch.cat([x, y], -1)  # (B, n, dim)
        query = torch.cat([x_query, -x_query @ self.start.mT], -1)  # (B, q, dim)
        predictions = [-query[..., self.dim_x :]]
        for step in range(depth):
            layer = self.layers[0 if self.shared else step]
            fresh = self._moved(query, layer(query, context), dampening, targets_only)
            if step + 1 < depth:  # nothing reads the examples after the last layer
                context = self._moved(context, layer(context, context), dampening, targets_only)
            query = fresh
            predictions.append(-query[..., self.dim_x :])
        return predictions

    def _moved(self, tokens: Tensor, update: Tensor, dampening: float, targets_only: bool) -> Tensor:
        if targets_only:
            update = torch.cat([torch.zeros_like(update[..., : self.dim_x]), update[..., self.dim_x :]], -1)
        tokens = tokens + (update if dampening == 1.0 else dampening * update)
        return tokens if self.clip is None else tokens.clamp(-self.clip, self.clip)

    def _check(self, x: Tensor, y: Tensor, x_query: Tensor) -> None:
        if x.shape[-1] != self.dim_x or x_query.shape[-1] != self.dim_x or y.shape[-1] != self.dim_y:
            raise ValueError(
                f"this stack reads dim_x {self.dim_x} and dim_y {self.dim_y}; got x {tuple(x.shape)}, "
                f"y {tuple(y.shape)} and x_query {tuple(x_query.shape)}"
            )


def gd_attention_weights(
    dim_x: int,
    dim_y: int,
    lr: float,
    n_context: int,
    start: Tensor | None = None,
    gamma: float = 0.0,
) -> dict[str, Tensor]:
    """Weights with which a linear self-attention layer takes one step of gradient descent, or of GD++.

    ``W_K = W_Q = [[I, 0], [0, 0]]``, ``W_V = [[-(gamma n / lr) I, 0], [W_0, -I]]``, ``P = (lr / n) I``
    (2212.07677, proposition 1); the upper-left block of ``P W_V`` is then ``-gamma I``, which for gamma > 0 moves all
    inputs by ``x <- (I - gamma X^T X) x`` (GD++, section 3).

    Parameters
    ----------
    dim_x, dim_y : of the prompts.
    lr : learning rate of ``L(W) = 1/(2n) sum_i |W x_i - y_i|^2``.
    n_context : examples per prompt, n: the layer itself only sums.
    start : W_0 (dim_y, dim_x), also of the query tokens; None is 0.
    gamma : strength of the transformation of the inputs.

    Returns
    -------
    dict
        W_K, W_Q, W_V and P, each (dim_x + dim_y, dim_x + dim_y).

    Raises
    ------
    ValueError
        For a learning rate that is not positive, an empty context, or a ``start`` of another shape.
    """
    checked_lr(lr)
    if n_context < 1:
        raise ValueError(f"n_context must be at least 1, got {n_context}")
    if not math.isfinite(gamma):
        raise ValueError(f"gamma must be finite, got {gamma}")
    first = checked_start(start, dim_x, dim_y)
    dim = dim_x + dim_y
    key = torch.zeros(dim, dim, dtype=first.dtype)
    key[:dim_x, :dim_x] = torch.eye(dim_x)
    value = torch.zeros(dim, dim, dtype=first.dtype)
    value[:dim_x, :dim_x] = -(gamma * n_context / lr) * torch.eye(dim_x)
    value[dim_x:, :dim_x] = first
    value[dim_x:, dim_x:] = -torch.eye(dim_y)
    return {"W_K": key, "W_Q": key.clone(), "W_V": value, "P": (lr / n_context) * torch.eye(dim, dtype=first.dtype)}


def checked_lr(lr: float) -> float:
    """``lr`` itself, if gradient descent can use it."""
    if not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"lr must be positive and finite, got {lr}")
    return lr


def checked_start(start: Tensor | None, dim_x: int, dim_y: int) -> Tensor:
    """W_0 (dim_y, dim_x), zeros for None."""
    if start is None:
        return torch.zeros(dim_y, dim_x)
    if start.shape != (dim_y, dim_x):
        raise ValueError(f"start must have the shape (dim_y, dim_x) = {(dim_y, dim_x)}, got {tuple(start.shape)}")
    return start.detach().clone()
