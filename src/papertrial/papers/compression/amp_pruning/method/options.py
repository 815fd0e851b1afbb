"""The choices that AMP leaves open, by name."""

from typing import Any, Literal

MlpCriterion = Literal["activation", "projected"]
Compensation = Literal["code", "params"]
Grouping = Literal["auto", "whole", "within"]
Parts = Literal["both", "mlp"]


def one_of(name: str, value: str, kind: Any) -> None:
    """Refuse what is not among the values of a ``Literal``."""
    if value not in kind.__args__:
        raise ValueError(f"{name} must be one of {', '.join(kind.__args__)}; got {value!r}")
