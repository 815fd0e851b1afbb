"""Losses small enough to see what an optimiser does on them, with their exact derivatives.

All are sums over coordinates (or, rotated, a rotation of such a sum), so that gradient and Hessian diagonal are closed
forms and many starting points run as one batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LogCosh:
    r"""The convex loss :math:`\sum_i a_i \log\cosh(x_i - c_i)`, optionally in rotated coordinates.

    Quadratic near the minimum (curvature a_i), linear far from it, so that Newton's method diverges from starts beyond
    about 1.09 from the minimum, and the condition number is max(a) / min(a).

    Attributes
    ----------
    scale : (..., d) the a_i > 0.
    centre : (..., d) the minimum, in the loss's own coordinates.
    rotation : (d, d) orthogonal R; the loss is then taken at ``R x``. None for no rotation.
    """

    scale: Tensor
    centre: Tensor
    rotation: Tensor | None = None

    def __post_init__(self) -> None:
        if not bool((self.scale > 0).all()):
            raise ValueError(f"scale must be positive everywhere, got a minimum of {self.scale.min().item()}")
        if self.rotation is not None:
            d = self.scale.shape[-1]
            if self.rotation.shape != (d, d):
                raise ValueError(f"rotation must be ({d}, {d}), got {tuple(self.rotation.shape)}")
            gram = self.rotation @ self.rotation.T
            if not torch.allclose(gram, torch.eye(d, dtype=gram.dtype, device=gram.device), atol=1e-5):
                raise ValueError("rotation is not orthogonal")

    def _offset(self, x: Tensor) -> Tensor:
        return (x if self.rotation is None else x @ self.rotation.T) - self.centre

    def value(self, x: Tensor) -> Tensor:
        """Loss of every point: (..., d) -> (...)."""
        z = self._offset(x).abs()
        # log cosh z = z + log(1 + exp(-2z)) - log 2, which cannot overflow; near 0 it cancels, so use its series there
        far = z + torch.log1p(torch.exp(-2 * z)) - 0.6931471805599453
        return (self.scale * torch.where(z < 1e-2, z.square() / 2 - z.pow(4) / 12, far)).sum(-1)

    def gradient(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        g = self.scale * torch.tanh(self._offset(x))
        return g if self.rotation is None else g @ self.rotation

    def hessian_diagonal(self, x: Tensor) -> Tensor:
        """Diagonal of the Hessian in the coordinates of ``x``: (..., d) -> (..., d)."""
        h = self.scale * torch.cosh(self._offset(x).clamp(-40, 40)).pow(-2)  # beyond 40 it is 0 in any precision used
        return h if self.rotation is None else h @ self.rotation.square()


def log_spaced_scales(condition_numbers: Tensor, d: int) -> Tensor:
    """Scales a_i from 1 to kappa, evenly spaced in the logarithm: (K,) condition numbers -> (K, d).

    Raises
    ------
    ValueError
        If ``d`` < 2 or a condition number is below 1.
    """
    if d < 2:
        raise ValueError(f"d must be at least 2 for a condition number to mean anything, got {d}")
    if not bool((condition_numbers >= 1).all()):
        raise ValueError(f"condition numbers must be >= 1, got {condition_numbers.tolist()}")
    return condition_numbers[:, None] ** torch.linspace(0, 1, d, dtype=condition_numbers.dtype)


class TwoCoordinates:
    r"""The two-coordinate example of arXiv 2305.14342, section 2.1: sharp and non-convex in u, flat and convex in v.

    :math:`L(u, v) = 8 (u-1)^2 (1.3 u^2 + 2u + 1) + \tfrac12 (v-4)^2`, minimum 0 at (1, 4). Points are (..., 2).
    The u part has a second minimum at -0.654 (value 5.43) and a maximum at 0, to which Newton's method goes from
    every start with negative curvature, -0.366 < u < 0.596.
    """

    minimum = (1.0, 4.0)

    def value(self, x: Tensor) -> Tensor:
        """(..., 2) -> (...)."""
        u, v = x.unbind(-1)
        return 8 * (u - 1).square() * (1.3 * u.square() + 2 * u + 1) + (v - 4).square() / 2

    def gradient(self, x: Tensor) -> Tensor:
        """(..., 2) -> (..., 2)."""
        u, v = x.unbind(-1)
        # 8 (u-1)^2 (1.3 u^2 + 2u + 1) = 10.4 u^4 - 4.8 u^3 - 13.6 u^2 + 8
        return torch.stack([41.6 * u.pow(3) - 14.4 * u.square() - 27.2 * u, v - 4], -1)

    def hessian_diagonal(self, x: Tensor) -> Tensor:
        """(..., 2) -> (..., 2); the u entry is negative around the maximum."""
        u, v = x.unbind(-1)
        return torch.stack([124.8 * u.square() - 28.8 * u - 27.2, torch.ones_like(v)], -1)
