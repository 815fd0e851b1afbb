"""What the rule decided for every token and block, and how the two phases of generation differ in it."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, get_args

import torch
from torch import Tensor

Phase = Literal["prompt", "response"]

PHASES: tuple[Phase, ...] = get_args(Phase)
"""Prompt processing and response generation."""


@dataclass(frozen=True)
class LayerTrace:
    """Decisions for B rows of S tokens through L blocks.

    Attributes
    ----------
    norms
        (L + 1, B, S): the norm of what enters the first block, then of what each block puts out.
    progress
        (L, B, S): the norm of a block's output minus that of its input. While voids are skipped, the input of a block
        after a void is not the void's output.
    active
        (L, B, S) bool, false where the rule calls a block void (whether or not it was left out then).
    cosine
        (L, B, S): cosine between a block's input and its output.
    real
        (B, S) bool, false on padding.
    response
        (B, S) bool: generated tokens; the others belong to the prompt.
    """

    norms: Tensor
    progress: Tensor
    active: Tensor
    cosine: Tensor
    real: Tensor
    response: Tensor

    def of(self, phase: Phase | None = None) -> Tensor:
        """Which tokens belong to a phase, (B, S) bool; None for all. Padding belongs to none.

        Raises
        ------
        ValueError
            For an unknown phase.
        """
        if phase is None:
            return self.real
        if phase not in PHASES:
            raise ValueError(f"phase must be one of {', '.join(PHASES)}; got {phase!r}")
        return self.real & (self.response if phase == "response" else ~self.response)

    @property
    def dropped(self) -> Tensor:
        """(B, S) int64: void blocks of each token."""
        return (~self.active).sum(0)

    @classmethod
    def concatenate(cls, traces: "Sequence[LayerTrace]") -> "LayerTrace":
        """Several forward passes of the same rows as one trace along the tokens.

        Raises
        ------
        ValueError
            For an empty list, or passes of different numbers of rows.
        """
        rows = {trace.real.shape[0] for trace in traces}
        if len(rows) != 1:
            raise ValueError(
                f"the passes have {sorted(rows)} rows: a trace is of one or more passes over the same rows"
            )
        return cls(*(torch.cat([getattr(trace, f.name) for trace in traces], dim=-1) for f in fields(cls)))


@dataclass(frozen=True)
class LayerUsage:
    """How many blocks were active: ``mean`` share over blocks and tokens, ``per_layer`` (L,), of ``tokens`` tokens."""

    mean: float
    per_layer: Tensor
    tokens: int


def layer_usage(trace: LayerTrace, phase: Phase | None = None) -> LayerUsage:
    """The share of blocks that are active, over the real tokens of a phase (None: of both).

    Raises
    ------
    ValueError
        For an unknown phase, or one without tokens.
    """
    chosen = trace.of(phase)
    if not bool(chosen.any()):
        raise ValueError(f"the trace has no token of the phase {phase!r}")
    per_layer = trace.active[:, chosen].double().mean(1)
    return LayerUsage(float(per_layer.mean()), per_layer, int(chosen.sum()))


def profile_distance(one: Tensor, other: Tensor) -> float:
    """Mean over layers of the total variation between two shares of active tokens, |p_l - q_l|; profiles are (L,)."""
    if one.shape != other.shape or one.dim() != 1:
        raise ValueError(f"profiles must be two vectors of one length, got {tuple(one.shape)} and {tuple(other.shape)}")
    return float((one.double() - other.double()).abs().mean())


def phase_distance(trace: LayerTrace) -> float:
    """:func:`profile_distance` between prompt and response.

    Raises
    ------
    ValueError
        If a phase has no tokens.
    """
    profiles = [layer_usage(trace, phase).per_layer for phase in PHASES]
    return profile_distance(*profiles)


def shuffled_phase_distances(trace: LayerTrace, count: int, *, generator: torch.Generator) -> Tensor:
    """The null of :func:`phase_distance`: ``count`` distances (count,) with the phases dealt to tokens at random."""
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    tokens = trace.active[:, trace.real].double()  # (L, N)
    responses = int(trace.of("response").sum())
    if not 0 < responses < tokens.shape[1]:
        raise ValueError("a phase has no tokens: trace a prompt and what was generated after it")
    found = []
    for _ in range(count):
        order = torch.randperm(tokens.shape[1], generator=generator, device=generator.device).to(tokens.device)
        dealt = tokens[:, order]
        found.append(profile_distance(dealt[:, responses:].mean(1), dealt[:, :responses].mean(1)))
    return torch.tensor(found, dtype=torch.float64)
