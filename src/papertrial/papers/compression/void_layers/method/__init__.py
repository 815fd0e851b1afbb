"""L2 Adaptive Computation (arXiv 2505.14467): which blocks are void for which token, and what leaving them out does.

``rule`` decides from the lengths of the residual vectors, ``computation`` applies the decision while a model runs,
``trace`` holds what was decided and compares the two phases, ``controls`` drops as many layers by other rules.
"""

from papertrial.papers.compression.void_layers.method.computation import (
    L2AdaptiveComputation,
    skip_layers,
    trace_layers,
)
from papertrial.papers.compression.void_layers.method.controls import last_layers, least_turning_layers, random_layers
from papertrial.papers.compression.void_layers.method.rule import VoidRule, active_layers
from papertrial.papers.compression.void_layers.method.trace import (
    PHASES,
    LayerTrace,
    LayerUsage,
    layer_usage,
    phase_distance,
    profile_distance,
    shuffled_phase_distances,
)

__all__ = [
    "PHASES",
    "L2AdaptiveComputation",
    "LayerTrace",
    "LayerUsage",
    "VoidRule",
    "active_layers",
    "last_layers",
    "layer_usage",
    "least_turning_layers",
    "phase_distance",
    "profile_distance",
    "random_layers",
    "shuffled_phase_distances",
    "skip_layers",
    "trace_layers",
]
