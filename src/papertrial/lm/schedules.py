"""Learning-rate schedules: functions from the step (0-based) to the factor on each group's learning rate."""

import math
from collections.abc import Callable

Schedule = Callable[[int], float]


def _check(steps: int, warmup: int, floor: float) -> None:
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not 0 <= warmup < steps:
        raise ValueError(f"warmup must lie in [0, steps) = [0, {steps}), got {warmup}")
    if not 0.0 <= floor <= 1.0:
        raise ValueError(f"floor is the final factor and must lie in [0, 1], got {floor}")


def constant(warmup: int = 0) -> Schedule:
    """1 after ``warmup`` steps of linear rise; step s of the rise has (s + 1) / warmup.

    Raises
    ------
    ValueError
        For a negative ``warmup``.
    """
    if warmup < 0:
        raise ValueError(f"warmup must not be negative, got {warmup}")
    return lambda step: min(1.0, (step + 1) / warmup) if warmup else 1.0


def linear(steps: int, warmup: int = 0, floor: float = 0.0) -> Schedule:
    """Linear rise over ``warmup`` steps, then a straight line from 1 at step ``warmup`` to ``floor`` at the last step.

    Raises
    ------
    ValueError
        Unless 0 <= warmup < steps and 0 <= floor <= 1.
    """
    _check(steps, warmup, floor)
    return _decay(steps, warmup, lambda progress: 1.0 - (1.0 - floor) * progress)


def warmup_cosine(steps: int, warmup: int = 0, floor: float = 0.1) -> Schedule:
    """Linear rise over ``warmup`` steps, then half a cosine from 1 to ``floor`` at the last step (1608.03549, eq. 5).

    Raises
    ------
    ValueError
        Unless 0 <= warmup < steps and 0 <= floor <= 1.
    """
    _check(steps, warmup, floor)
    return _decay(steps, warmup, lambda progress: floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress)))


def _decay(steps: int, warmup: int, shape: Callable[[float], float]) -> Schedule:
    """``shape`` maps progress in [0, 1] after the warm-up to the factor; it stays at shape(1) beyond ``steps``."""
    last = max(1, steps - 1 - warmup)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return shape(min(1.0, (step - warmup) / last))

    return factor
