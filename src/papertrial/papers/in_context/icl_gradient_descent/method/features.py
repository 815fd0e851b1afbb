"""Non-linear functions: an MLP embeds the inputs, and attention, or gradient descent, works on its features.

Section 4 of 2212.07677: tokens become (m(x_j), y_j), and a linear self-attention layer on them can take a gradient
step on a linear head over the features m. The counterpart is the same MLP meta-learned together with the learning
rate of an explicit gradient step on that head.
"""

import math

import torch
from torch import Tensor, nn

from papertrial.lm.icl import gd_weights, linear_prediction
from papertrial.papers.in_context.icl_gradient_descent.method.attention import LinearSelfAttentionStack, checked_lr


class FeatureMLP(nn.Sequential):
    """``Linear - GELU (tanh) - Linear`` from dim_x to ``features`` numbers.

    Weights and biases start uniform in +-1/sqrt(fan_in), drawn from ``generator``.
    """

    def __init__(
        self, dim_x: int = 1, hidden: int = 40, features: int = 40, *, generator: torch.Generator | None = None
    ) -> None:
        for name, value in (("dim_x", dim_x), ("hidden", hidden), ("features", features)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        first, second = nn.Linear(dim_x, hidden), nn.Linear(hidden, features)
        for layer in (first, second):
            bound = 1 / math.sqrt(layer.in_features)
            for parameter in (layer.weight, layer.bias):
                parameter.data.uniform_(-bound, bound, generator=generator)
        super().__init__(first, nn.GELU(approximate="tanh"), second)
        self.features = features


class FeatureAttention(nn.Module):
    """Linear self-attention over tokens (m(x), y): a predictor."""

    def __init__(
        self,
        mlp: FeatureMLP,
        dim_y: int = 1,
        n_layers: int = 1,
        *,
        init_scale: float = 0.002,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.mlp = mlp
        self.attention = LinearSelfAttentionStack(
            mlp.features, dim_y, n_layers, init_scale=init_scale, generator=generator
        )

    def forward(self, x: Tensor, y: Tensor, x_query: Tensor) -> Tensor:
        """Predictions (B, q, dim_y)."""
        return self.attention(self.mlp(x), y, self.mlp(x_query))


class FeatureGD(nn.Module):
    """Gradient descent from 0 on a linear head over m(x), with a learned rate: a predictor.

    Parameters
    ----------
    mlp : the features; trained through the gradient steps (meta-learned).
    lr : positive, where the learned rate starts.
    steps : gradient steps on the head.
    """

    def __init__(self, mlp: FeatureMLP, lr: float = 0.1, steps: int = 1) -> None:
        super().__init__()
        self.mlp = mlp
        self.steps = steps
        self.log_lr = nn.Parameter(torch.tensor(math.log(checked_lr(lr))))

    @property
    def lr(self) -> Tensor:
        return self.log_lr.exp()

    def forward(self, x: Tensor, y: Tensor, x_query: Tensor) -> Tensor:
        """Predictions (B, q, dim_y)."""
        return linear_prediction(gd_weights(self.mlp(x), y, self.lr, self.steps), self.mlp(x_query))
