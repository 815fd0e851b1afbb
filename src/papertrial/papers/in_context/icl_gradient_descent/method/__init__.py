"""Linear self-attention as gradient descent (2212.07677): the construction, trained stacks and how alike they are.

world = LinearRegression(IndependentInputs(10), n_context=10)
gd = GDBaseline(1.0).fit(world, generator)
report = alignment(my_model, gd, world.sample(10_000, generator))     # any callable (x, y, x_query) -> y_hat
"""

from papertrial.papers.in_context.icl_gradient_descent.method.alignment import (
    alignment,
    interpolate,
    shifted_losses,
)
from papertrial.papers.in_context.icl_gradient_descent.method.attention import (
    LinearSelfAttentionStack,
    SelfAttention,
    gd_attention_weights,
)
from papertrial.papers.in_context.icl_gradient_descent.method.baselines import (
    GDBaseline,
    GDPlusPlusBaseline,
    one_step_optimum,
)
from papertrial.papers.in_context.icl_gradient_descent.method.features import FeatureAttention, FeatureGD, FeatureMLP
from papertrial.papers.in_context.icl_gradient_descent.method.split_tokens import (
    SplitTokenTransformer,
    copy_probe,
    sinusoidal_positions,
)

__all__ = [
    "FeatureAttention",
    "FeatureGD",
    "FeatureMLP",
    "GDBaseline",
    "GDPlusPlusBaseline",
    "LinearSelfAttentionStack",
    "SelfAttention",
    "SplitTokenTransformer",
    "alignment",
    "copy_probe",
    "gd_attention_weights",
    "interpolate",
    "one_step_optimum",
    "shifted_losses",
    "sinusoidal_positions",
]
