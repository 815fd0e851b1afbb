"""Do a trained model and a classical algorithm compute the same thing? Five measures (2212.07677, section 3)."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from papertrial.lm.icl import Predictor, mean_cosine, prediction_distance, query_loss, sensitivities
from papertrial.lm.worlds.regression import LinearRegression, PromptBatch
from papertrial.papers.in_context.icl_gradient_descent.method.attention import LinearSelfAttentionStack, SelfAttention


def alignment(model: Predictor, baseline: Predictor, prompts: PromptBatch) -> dict[str, float]:
    """How closely two predictors agree on the same prompts.

    Parameters
    ----------
    model : any callable ``(x, y, x_query) -> y_hat``: a ``LinearSelfAttentionStack``, an ``InContextDecoder`` around
        a Hugging Face model, or your own.
    baseline : likewise, for example a fitted ``GDBaseline``.
    prompts : fresh tasks that neither was fitted on; the paper uses 10^4.

    Returns
    -------
    dict
        ``pred_l2``: mean distance of the predictions. ``sens_cos`` and ``sens_l2``: mean cosine and mean distance of
        the rows of d y_hat / d x_query, the weights a linear learner implies. ``loss_model`` and ``loss_baseline``.
    """
    of_model, of_baseline = sensitivities(model, prompts), sensitivities(baseline, prompts)
    return {
        "pred_l2": prediction_distance(model, baseline, prompts),
        "sens_cos": mean_cosine(of_model, of_baseline),
        "sens_l2": (of_model - of_baseline).double().norm(dim=-1).mean().item(),
        "loss_model": query_loss(model, prompts),
        "loss_baseline": query_loss(baseline, prompts),
    }


def interpolate(
    model: LinearSelfAttentionStack, constructed: LinearSelfAttentionStack, weight: float = 0.5
) -> LinearSelfAttentionStack:
    """The stack between a trained one and a constructed one: ``(1 - weight) * trained + weight * constructed``.

    Only the products W_K^T W_Q and P W_V matter, and c W_K^T W_Q with P W_V / c computes the same. Before averaging,
    each trained layer is rescaled so that the mean diagonal of the x-block of its W_K^T W_Q equals the constructed one.

    Returns
    -------
    LinearSelfAttentionStack
        A new stack that holds the averaged products as W_Q and P, with W_K = W_V = I.

    Raises
    ------
    ValueError
        For stacks of different depth, sharing or sizes, several heads, softmax, or a trained layer whose W_K^T W_Q has
        no scale (mean diagonal 0).
    """
    for name in ("dim_x", "dim_y", "n_layers", "shared"):
        if getattr(model, name) != getattr(constructed, name):
            raise ValueError(
                f"model and constructed must have the same {name}, got {getattr(model, name)} and "
                f"{getattr(constructed, name)}"
            )
    if not 0 <= weight <= 1:
        raise ValueError(f"weight must lie in [0, 1], got {weight}")
    merged = []
    for index in range(len(model.layers)):
        trained, built = _products(model, index), _products(constructed, index)
        ratio = _x_scale(trained[0], model.dim_x) / _x_scale(built[0], model.dim_x)
        key_query = torch.lerp(trained[0] / ratio, built[0].to(trained[0]), weight)
        projected_value = torch.lerp(trained[1] * ratio, built[1].to(trained[1]), weight)
        identity = torch.eye(len(key_query)).to(key_query)
        merged.append({"W_K": identity, "W_Q": key_query, "W_V": identity, "P": projected_value})
    return LinearSelfAttentionStack.from_weights(
        model.dim_x,
        model.dim_y,
        merged[0] if model.shared else merged,
        n_layers=model.n_layers,
        start=model.start,
        dampening=model.dampening,
        clip=model.clip,
    )


def _products(stack: LinearSelfAttentionStack, index: int) -> tuple[Tensor, Tensor]:
    """W_K^T W_Q and P W_V of a layer of one linear head, each (dim, dim)."""
    layer = stack.layers[index]
    assert isinstance(layer, SelfAttention)
    if layer.n_heads != 1 or layer.softmax:
        raise ValueError(
            f"interpolation needs linear layers of one head; layer {index} has {layer.n_heads} heads and "
            f"softmax={layer.softmax}"
        )
    return layer.key_query[0].detach(), layer.projected_value[0].detach()


def _x_scale(key_query: Tensor, dim_x: int) -> float:
    scale = key_query.diagonal()[:dim_x].mean().item()
    if scale == 0:
        raise ValueError("the mean diagonal of W_K^T W_Q is 0, so the layer cannot be rescaled to the construction")
    return scale


def shifted_losses(
    predictors: Mapping[str, Predictor],
    world: LinearRegression,
    *,
    generator: torch.Generator,
    input_scales: Sequence[float] = (),
    target_scales: Sequence[float] = (),
    n_tasks: int = 10_000,
    device: torch.device | str = "cpu",
) -> dict[str, dict[str, list[float]]]:
    """Test losses outside the training law: inputs, or the weights behind the targets, larger by a factor.

    Every factor is measured on the same draws, so that curves differ by the factor and the predictor alone; the
    generator is left where one sample takes it.

    Returns
    -------
    dict
        ``{"inputs": {predictor: losses along input_scales}, "targets": {...}}``.
    """
    curves: dict[str, dict[str, list[float]]] = {"inputs": {}, "targets": {}}
    state = generator.get_state()
    for kind, scales in (("inputs", input_scales), ("targets", target_scales)):
        for scale in scales:
            generator.set_state(state)
            prompts = world.scaled(**{kind: scale}).sample(n_tasks, generator).to(device)
            for name, predictor in predictors.items():
                curves[kind].setdefault(name, []).append(query_loss(predictor, prompts))
    return curves
