"""Prompts whose inputs and targets are separate tokens: the first layer has to bring each pair together.

Section 5 of 2212.07677: a softmax layer with positions learns to copy each token's neighbour into it, after which the
construction for tokens (x_j, y_j) applies to the linear layer above.
"""

import math

import torch
from torch import Tensor, nn

from papertrial.lm.icl import ridge_weights
from papertrial.lm.worlds.regression import PromptBatch
from papertrial.papers.in_context.icl_gradient_descent.method.attention import SelfAttention


def sinusoidal_positions(length: int, dim: int) -> Tensor:
    """The sine and cosine position codes of 1706.03762, section 3.5 (length, dim); ``dim`` must be even."""
    if dim < 2 or dim % 2:
        raise ValueError(f"dim of the position codes must be even and at least 2, got {dim}")
    angle = torch.arange(length)[:, None] * torch.exp(torch.arange(0, dim, 2) * (-math.log(10_000.0) / dim))
    return torch.stack([angle.sin(), angle.cos()], -1).reshape(length, dim)


class SplitTokenTransformer(nn.Module):
    """A softmax layer and a linear layer over x_1, y_1, ..., x_n, y_n, x_q: a predictor for scalar targets.

    A target token holds y in the last of the dim_x coordinates and zeros elsewhere; position codes are appended to
    every token. As in ``LinearSelfAttentionStack`` the query is no key, and the answer is minus its last x-coordinate.

    Parameters
    ----------
    dim_x : of the prompts.
    n_context : examples per prompt; fixed, because of the positions.
    position_dim : width of the position codes.
    init_scale : each matrix starts at N(0, init_scale / 2 / fan_in); the released code takes 0.02.
    """

    positions: Tensor

    def __init__(
        self,
        dim_x: int,
        n_context: int,
        *,
        position_dim: int = 10,
        n_heads: int = 1,
        init_scale: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if dim_x < 1 or n_context < 1:
            raise ValueError(f"dim_x and n_context must be at least 1, got {dim_x} and {n_context}")
        self.dim_x, self.n_context = dim_x, n_context
        self.register_buffer("positions", sinusoidal_positions(2 * n_context + 1, position_dim))

        def layer(softmax: bool) -> SelfAttention:
            return SelfAttention(
                dim_x + position_dim, n_heads=n_heads, softmax=softmax, init_scale=init_scale / 2, generator=generator
            )

        self.copy, self.descend = layer(True), layer(False)

    def tokens(self, x: Tensor, y: Tensor, x_query: Tensor) -> Tensor:
        """Tokens (B, 2 n_context + 1, dim_x + position_dim) of prompts with one query."""
        if x.shape[1:] != (self.n_context, self.dim_x) or y.shape[2] != 1 or x_query.shape[1] != 1:
            raise ValueError(
                f"this model reads {self.n_context} examples of dim_x {self.dim_x}, scalar targets and one query; got "
                f"x {tuple(x.shape)}, y {tuple(y.shape)}, x_query {tuple(x_query.shape)}"
            )
        target = torch.cat([y.new_zeros(*y.shape[:2], self.dim_x - 1), y], -1)
        pairs = torch.stack([x, target], 2).flatten(1, 2)  # x_1, y_1, x_2, ...
        sequence = torch.cat([pairs, x_query], 1)
        return torch.cat([sequence, self.positions.to(sequence).expand(len(sequence), -1, -1)], -1)

    def after_copy(self, tokens: Tensor) -> Tensor:
        """The tokens after the first layer."""
        return tokens + self.copy(tokens, tokens[:, :-1])

    def forward(self, x: Tensor, y: Tensor, x_query: Tensor) -> Tensor:
        """Predictions (B, q, 1); several queries are asked one at a time."""
        b, q = x_query.shape[:2]
        if q > 1:
            x, y, x_query = x.repeat_interleave(q, 0), y.repeat_interleave(q, 0), x_query.reshape(b * q, 1, -1)
        tokens = self.after_copy(self.tokens(x, y, x_query))
        query = tokens[:, -1:] + self.descend(tokens[:, -1:], tokens[:, :-1])
        return -query[:, 0, self.dim_x - 1].reshape(b, q, 1)


def copy_probe(model: SplitTokenTransformer, prompts: PromptBatch) -> dict[str, float]:
    """What the first layer writes into the token of an x_j.

    Parameters
    ----------
    model : trained or not; compare the two.
    prompts : with one query. The first half fits the decoder below, the second half tests it.

    Returns
    -------
    dict
        ``own``, ``next``, ``other``: norm of the derivative, averaged over tasks, of the token's summed output by its
        own input token, by the next one (its target) and by any other token on average (the measure of the paper's
        section 5, over input tokens). ``attention_next``: the weight it gives its target. ``partner_r2``: share of
        y_j's variance that a linear map of its output explains on unseen prompts; 1 if the token contains (x_j, y_j).
        The map is a ridge regression with 1 % of the output's power as penalty, so that a trace of y_j too weak for
        the next layer to use does not count.
    """
    if len(prompts) < 4 * (model.dim_x + model.positions.shape[1]):
        raise ValueError(f"prompts must be many more than the token's width to fit the decoder, got {len(prompts)}")
    tokens = model.tokens(prompts.x, prompts.y, prompts.x_query).requires_grad_()
    with torch.enable_grad():
        output = model.after_copy(tokens)
        own, following, other = [], [], []
        for k in range(0, 2 * model.n_context, 2):
            gradient = torch.autograd.grad(output[:, k].sum(), tokens, retain_graph=True)[0]
            norms = gradient.mean(0).norm(dim=-1)  # (T,)
            own.append(norms[k].item())
            following.append(norms[k + 1].item())
            other.append((norms.sum() - norms[k] - norms[k + 1]).item() / (len(norms) - 2))
        (weights, *_) = model.copy.weights(tokens[:, 0 : 2 * model.n_context : 2], tokens[:, :-1])
    return {
        "attention_next": weights[:, :, 1::2].diagonal(dim1=1, dim2=2).mean().item(),
        "own": sum(own) / len(own),
        "next": sum(following) / len(following),
        "other": sum(other) / len(other),
        "partner_r2": _decoded(output.detach()[:, 0 : 2 * model.n_context : 2], prompts.y),
    }


def _decoded(outputs: Tensor, targets: Tensor) -> float:
    """R^2 on the second half of the prompts of a linear decoder, fitted on the first half, one for each position."""
    half = len(outputs) // 2
    inputs = outputs.transpose(0, 1).double()  # (n, B, dim)
    inputs = inputs - inputs[:, :half].mean(1, keepdim=True)
    answers = targets.transpose(0, 1).double()  # (n, B, 1)
    penalty = 0.01 * half * inputs[:, :half].square().mean().item()
    weights = ridge_weights(inputs[:, :half], answers[:, :half], penalty)
    residual = answers[:, half:] - inputs[:, half:] @ weights.mT
    return 1 - (residual.square().sum() / answers[:, half:].square().sum()).item()
