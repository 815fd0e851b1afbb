"""Function prompts: sequences of examples of a fresh random function, for models that learn it in context.

    world = LinearRegression(dim_x=10, n_context=10)
    prompts = world.sample(512, generator)          # x (512, 10, 10), y (512, 10, 1), x_query (512, 1, 10), ...

Every draw comes from the generator that the caller passes and lies on that generator's device.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class PromptBatch:
    """In-context examples and queries of B functions.

    Attributes
    ----------
    x, y : (B, n, dim_x) and (B, n, dim_y): the examples a learner may look at.
    x_query, y_query : (B, q, dim_x) and (B, q, dim_y): what it is asked, each query on its own, and the answers.
    weights : (B, dim_y, dim_x), the true map of a linear world; None elsewhere. For oracles only.
    """

    x: Tensor
    y: Tensor
    x_query: Tensor
    y_query: Tensor
    weights: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("x", "y", "x_query", "y_query"):
            if getattr(self, name).ndim != 3:
                raise ValueError(f"{name} must have the shape (B, n, dim), got {tuple(getattr(self, name).shape)}")
        if self.x.shape[:2] != self.y.shape[:2]:
            raise ValueError(f"x {tuple(self.x.shape)} and y {tuple(self.y.shape)} must hold the same examples")
        if self.x_query.shape[:2] != self.y_query.shape[:2]:
            raise ValueError(
                f"x_query {tuple(self.x_query.shape)} and y_query {tuple(self.y_query.shape)} must hold the same points"
            )
        if self.x.shape[0] != self.x_query.shape[0] or self.x.shape[2] != self.x_query.shape[2]:
            raise ValueError(
                f"x {tuple(self.x.shape)} and x_query {tuple(self.x_query.shape)} must agree in B and dim_x"
            )
        if self.y.shape[2] != self.y_query.shape[2]:
            raise ValueError(f"y {tuple(self.y.shape)} and y_query {tuple(self.y_query.shape)} must agree in dim_y")

    def __len__(self) -> int:
        return self.x.shape[0]

    @property
    def n_context(self) -> int:
        return self.x.shape[1]

    @property
    def dim_x(self) -> int:
        return self.x.shape[2]

    @property
    def dim_y(self) -> int:
        return self.y.shape[2]

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None, *, non_blocking: bool = False
    ) -> "PromptBatch":
        """The same prompts on another device or in another floating-point type."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device=device or tensor.device, dtype=dtype or tensor.dtype, non_blocking=non_blocking)

        weights = None if self.weights is None else move(self.weights)
        return PromptBatch(move(self.x), move(self.y), move(self.x_query), move(self.y_query), weights)

    def first(self, examples: int) -> "PromptBatch":
        """The same queries after only the first ``examples`` examples (0 gives an empty context)."""
        if not 0 <= examples <= self.n_context:
            raise ValueError(f"examples must lie in [0, {self.n_context}], got {examples}")
        return replace(self, x=self.x[:, :examples], y=self.y[:, :examples])

    def rows(self, index: slice | Tensor) -> "PromptBatch":
        """Some of the prompts."""
        weights = None if self.weights is None else self.weights[index]
        return PromptBatch(self.x[index], self.y[index], self.x_query[index], self.y_query[index], weights)


class World(Protocol):
    """A distribution over prompts."""

    def sample(self, batch: int, generator: torch.Generator) -> PromptBatch:
        """Draw ``batch`` independent prompts, each of a fresh function."""
        ...


def prompt_stream(world: World, batch: int, generator: torch.Generator) -> Iterator[PromptBatch]:
    """An endless iterator over fresh batches: no function is seen twice."""
    while True:
        yield world.sample(batch, generator)


class InputLaw(Protocol):
    """The law of a prompt's inputs."""

    @property
    def dim(self) -> int: ...

    def sample(self, batch: int, count: int, generator: torch.Generator) -> Tensor:
        """Inputs (batch, count, dim); all inputs of one prompt share whatever the law draws per prompt."""
        ...


IndependentLaw = Literal["uniform", "normal", "laplace", "exponential"]

# second and fourth raw moments at scale 1
_MOMENTS: dict[str, tuple[float, float]] = {
    "uniform": (1 / 3, 1 / 5),
    "normal": (1.0, 3.0),
    "laplace": (2.0, 24.0),
    "exponential": (2.0, 24.0),
}


@dataclass(frozen=True)
class IndependentInputs:
    """Inputs whose coordinates are independent and alike.

    Parameters
    ----------
    dim : number of coordinates.
    law : ``uniform`` on [-scale, scale], ``normal`` with standard deviation ``scale``, ``laplace`` centred at 0 with
        that scale, or (not centred) ``exponential`` with mean ``scale``.
    scale : positive.
    """

    dim: int
    law: IndependentLaw = "uniform"
    scale: float = 1.0

    def __post_init__(self) -> None:
        _at_least("dim", self.dim, 1)
        _positive("scale", self.scale)
        if self.law not in _MOMENTS:
            raise ValueError(f"law must be one of {', '.join(_MOMENTS)}; got {self.law!r}")

    @property
    def second_moment(self) -> float:
        """E[x_1^2]."""
        return _MOMENTS[self.law][0] * self.scale**2

    @property
    def fourth_moment(self) -> float:
        """E[x_1^4]."""
        return _MOMENTS[self.law][1] * self.scale**4

    def sample(self, batch: int, count: int, generator: torch.Generator) -> Tensor:
        shape, device = (batch, count, self.dim), generator.device
        if self.law == "normal":
            return torch.randn(shape, generator=generator, device=device) * self.scale
        if self.law == "uniform":
            return (2 * torch.rand(shape, generator=generator, device=device) - 1) * self.scale
        size = torch.empty(shape, device=device).exponential_(generator=generator) * self.scale
        if self.law == "exponential":
            return size
        return torch.where(torch.rand(shape, generator=generator, device=device) < 0.5, -size, size)


@dataclass(frozen=True)
class GaussianInputs:
    """Inputs from N(0, covariance), with one covariance for all prompts, or a fresh diagonal one for each.

    Parameters
    ----------
    covariance : (dim, dim), symmetric and positive definite.
    random_eigenvalues : each prompt's covariance is ``covariance`` with rows and columns scaled by the roots of dim
        independent draws from the exponential law of mean 1; the prompt's inputs all share them (2306.09927).
    """

    covariance: Tensor
    random_eigenvalues: bool = False
    _root: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        covariance = self.covariance
        if covariance.ndim != 2 or covariance.shape[0] != covariance.shape[1]:
            raise ValueError(f"covariance must be square, got the shape {tuple(covariance.shape)}")
        if not torch.allclose(covariance, covariance.mT, atol=1e-6):
            raise ValueError("covariance must be symmetric")
        root, failed = torch.linalg.cholesky_ex(covariance)
        if failed:
            least = torch.linalg.eigvalsh(covariance)[0].item()
            raise ValueError(f"covariance must be positive definite; its smallest eigenvalue is {least:.3g}")
        object.__setattr__(self, "_root", root)

    @property
    def dim(self) -> int:
        return self.covariance.shape[0]

    def sample(self, batch: int, count: int, generator: torch.Generator) -> Tensor:
        device = generator.device
        x = torch.randn((batch, count, self.dim), generator=generator, device=device) @ self._root.to(device).mT
        if self.random_eigenvalues:
            x = x * torch.empty((batch, 1, self.dim), device=device).exponential_(generator=generator).sqrt()
        return x


@dataclass(frozen=True)
class LinearRegression:
    """y = W x + noise with a fresh W, entries from N(0, weight_std^2), for every prompt.

    Parameters
    ----------
    inputs : law of the inputs of examples and queries; its ``dim`` is dim_x.
    n_context : examples per prompt.
    dim_y : outputs.
    n_query : queries per prompt.
    weight_std : standard deviation of the entries of W.
    noise_std : standard deviation of the noise on every y, examples and queries alike.
    """

    inputs: InputLaw
    n_context: int
    dim_y: int = 1
    n_query: int = 1
    weight_std: float = 1.0
    noise_std: float = 0.0

    def __post_init__(self) -> None:
        _at_least("n_context", self.n_context, 1)
        _at_least("dim_y", self.dim_y, 1)
        _at_least("n_query", self.n_query, 1)
        _positive("weight_std", self.weight_std)
        if not (math.isfinite(self.noise_std) and self.noise_std >= 0):
            raise ValueError(f"noise_std must be finite and not negative, got {self.noise_std}")

    @property
    def dim_x(self) -> int:
        return self.inputs.dim

    def sample(self, batch: int, generator: torch.Generator) -> PromptBatch:
        """``batch`` prompts, each of a fresh W."""
        _at_least("batch", batch, 1)
        device = generator.device
        weights = torch.randn((batch, self.dim_y, self.dim_x), generator=generator, device=device) * self.weight_std
        x = self.inputs.sample(batch, self.n_context + self.n_query, generator)
        y = x @ weights.mT
        if self.noise_std:
            y = y + torch.randn(y.shape, generator=generator, device=device) * self.noise_std
        n = self.n_context
        return PromptBatch(x[:, :n], y[:, :n], x[:, n:], y[:, n:], weights)

    def scaled(self, *, inputs: float = 1.0, targets: float = 1.0) -> "LinearRegression":
        """The same world with inputs, or W, larger by a factor: the paper's tests outside the training law.

        Raises
        ------
        ValueError
            For a factor that is not positive, or inputs whose law has no scale.
        """
        _positive("inputs", inputs)
        _positive("targets", targets)
        law = self.inputs
        if inputs != 1.0:
            if isinstance(law, IndependentInputs):
                law = replace(law, scale=law.scale * inputs)
            elif isinstance(law, GaussianInputs):
                law = GaussianInputs(law.covariance * inputs**2, law.random_eigenvalues)
            else:
                raise ValueError(f"{type(law).__name__} does not say how to scale its inputs")
        return replace(self, inputs=law, weight_std=self.weight_std * targets)


@dataclass(frozen=True)
class SineRegression:
    """y = a sin(x + p) with a fresh amplitude a and phase p for every prompt (dim_x = dim_y = 1).

    Parameters
    ----------
    n_context, n_query : examples and queries per prompt.
    x_range, amplitude, phase : bounds (low, high) of the three uniform laws. The defaults are those of 2212.07677,
        section 4 (and of the meta-learning literature it compares with).
    """

    n_context: int
    n_query: int = 1
    x_range: tuple[float, float] = (-5.0, 5.0)
    amplitude: tuple[float, float] = (0.1, 0.5)
    phase: tuple[float, float] = (0.0, math.pi)

    def __post_init__(self) -> None:
        _at_least("n_context", self.n_context, 1)
        _at_least("n_query", self.n_query, 1)
        for name in ("x_range", "amplitude", "phase"):
            low, high = getattr(self, name)
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise ValueError(f"{name} must be finite bounds (low, high) with low < high, got {(low, high)}")

    def sample(self, batch: int, generator: torch.Generator) -> PromptBatch:
        """``batch`` prompts, each of a fresh sine."""
        _at_least("batch", batch, 1)

        def uniform(bounds: tuple[float, float], count: int) -> Tensor:
            unit = torch.rand((batch, count, 1), generator=generator, device=generator.device)
            return bounds[0] + (bounds[1] - bounds[0]) * unit

        amplitude, phase = uniform(self.amplitude, 1), uniform(self.phase, 1)
        x = uniform(self.x_range, self.n_context + self.n_query)
        y = amplitude * torch.sin(x + phase)
        n = self.n_context
        return PromptBatch(x[:, :n], y[:, :n], x[:, n:], y[:, n:])


def _at_least(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be positive and finite, got {value}")
