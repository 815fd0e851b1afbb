"""How far apart two groups of tokens are in their active layers, and how far random groups of their sizes are."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from papertrial.papers.compression.void_layers.method import (
    LayerTrace,
    active_layers,
    phase_distance,
    shuffled_phase_distances,
)


@dataclass(frozen=True)
class Comparison:
    """Distances of two groups for A threshold factors.

    Attributes
    ----------
    alphas : the A factors.
    found : the A distances.
    dealt : (A, count), distances with the tokens dealt to the groups at random; a column is one deal.
    """

    alphas: tuple[float, ...]
    found: tuple[float, ...]
    dealt: Tensor

    @property
    def mean(self) -> float:
        return sum(self.found) / len(self.found)

    @property
    def chance(self) -> tuple[float, ...]:
        """The A mean distances of random groups."""
        return tuple(self.dealt.mean(1).tolist())

    @property
    def mean_chance(self) -> float:
        return float(self.dealt.mean())

    def chance_quantile(self, share: float) -> float:
        """A quantile over deals of the mean over factors: what chance alone reaches in ``1 - share`` of all deals."""
        return float(self.dealt.mean(0).quantile(share))


def at_alphas(trace: LayerTrace, alphas: Sequence[float]) -> list[LayerTrace]:
    """What the rule says at each factor of a model that it does not change."""
    return [replace(trace, active=active_layers(trace.norms, alpha)) for alpha in alphas]


def compare(
    trace: LayerTrace, one: Tensor, other: Tensor, alphas: Sequence[float], *, count: int, generator: torch.Generator
) -> Comparison:
    """Compare two groups of tokens of an unchanged model.

    Parameters
    ----------
    one, other
        (B, S) bool, real tokens of which none is in both.
    count
        Random deals; the same ones for every factor, drawn from ``generator``.

    Raises
    ------
    ValueError
        If the groups share a token, hold padding, or one is empty.
    """
    if bool((one & other).any()) or bool(((one | other) & ~trace.real).any()):
        raise ValueError("the groups must be of real tokens, each in one group at most")
    traces = at_alphas(replace(trace, real=one | other, response=other), alphas)
    state = generator.get_state()
    dealt = []
    for judged in traces:
        generator.set_state(state)
        dealt.append(shuffled_phase_distances(judged, count, generator=generator))
    return Comparison(tuple(alphas), tuple(map(phase_distance, traces)), torch.stack(dealt))
