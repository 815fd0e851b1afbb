"""Trained linear self-attention against gradient descent with the best learning rates, on regression prompts.

Every trained model starts from small random weights and sees each task once. Gradient descent and GD++ are tuned on
10^4 tasks of the same law; all arms are then measured on the same 10^4 fresh tasks. A seed draws all of these anew.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from papertrial.lab.trial import Trial
from papertrial.lm.icl import Predictor, linear_prediction, ols_weights, prompt_loss, query_loss
from papertrial.lm.training import StepReport, train, warmup_cosine
from papertrial.lm.worlds.regression import (
    IndependentInputs,
    LinearRegression,
    PromptBatch,
    SineRegression,
    World,
    prompt_stream,
)
from papertrial.papers.in_context.icl_gradient_descent.method import (
    FeatureAttention,
    FeatureGD,
    FeatureMLP,
    GDBaseline,
    GDPlusPlusBaseline,
    LinearSelfAttentionStack,
    SelfAttention,
    SplitTokenTransformer,
    alignment,
    copy_probe,
    interpolate,
    one_step_optimum,
    shifted_losses,
)

SCALES = {
    "smoke": {
        "seeds": 1,
        "dim_x": 3,
        "n_context": 6,
        "tasks": 400,
        "iterations": 3,
        "stacks": [
            {"layers": 1, "shared": True, "steps": 60, "batch": 64, "lr": 2e-2},
            {"layers": 2, "shared": True, "steps": 60, "batch": 64, "lr": 2e-2},
        ],
        "sine": {"steps": 20, "batch": 32, "lr": 1e-2},
        "split": {"dim_x": 2, "n_context": 3, "steps": 20, "batch": 32, "lr": 1e-2},
    },
    "small": {
        "seeds": 5,
        "dim_x": 10,
        "n_context": 10,
        "tasks": 10_000,
        "iterations": 30,
        "stacks": [
            {"layers": 1, "shared": True, "steps": 1500, "batch": 512, "lr": 2e-3},
            {"layers": 2, "shared": True, "steps": 2500, "batch": 256, "lr": 5e-3},
        ],
        "sine": {"steps": 2000, "batch": 256, "lr": 1e-2},
        "split": None,  # copying emerges too late, and not in every seed, for two cores
    },
    "gpu": {
        "seeds": 5,
        "dim_x": 10,
        "n_context": 10,
        "tasks": 10_000,
        "iterations": 50,
        "stacks": [
            {"layers": 1, "shared": True, "steps": 5000, "batch": 2048, "lr": 2e-3},
            {"layers": 2, "shared": True, "steps": 5000, "batch": 2048, "lr": 3e-3},
            {"layers": 5, "shared": True, "steps": 10_000, "batch": 2048, "lr": 1e-3, "clip": 10.0, "grad_clip": 10.0},
            {"layers": 5, "shared": False, "steps": 10_000, "batch": 2048, "lr": 1e-3, "clip": 10.0, "grad_clip": 10.0},
        ],
        "sine": {"steps": 10_000, "batch": 2048, "lr": 5e-3},
        "split": {"dim_x": 10, "n_context": 10, "steps": 10_000, "batch": 2048, "lr": 5e-3},
    },
}

Arms = dict[str, dict[str, float]]
INPUT_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
TARGET_SCALES = (0.5, 1.0, 1.5, 2.0)
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
UNTUNED = 0.1  # a learning rate nobody tuned
DAMPENING = 0.75


def run(trial: Trial) -> Arms:
    """Stacks on linear tasks against GD and GD++, an MLP with attention on sines, and split tokens."""
    arms: Arms = {}
    for settings in trial["stacks"]:
        part = one_layer(trial, settings) if settings["layers"] == 1 else deep_stack(trial, settings)
        for arm, metrics in part.items():  # two stacks of one depth share their baselines
            arms.setdefault(arm, {}).update(metrics)
    arms |= sines(trial)
    return arms | split_tokens(trial) if trial["split"] else arms


def one_layer(trial: Trial, settings: dict[str, Any]) -> Arms:
    """One layer against one tuned step of gradient descent, with controls that are not the same algorithm."""
    world = linear_world(trial)
    tasks = evaluation_tasks(trial, world, "linear")
    gd = GDBaseline(UNTUNED).fit(world, trial.generator("tuning"), n_tasks=trial["tasks"])
    assert isinstance(gd.lr, float)
    trial.note("gd_1 learning rate", gd.lr)
    law = world.inputs
    assert isinstance(law, IndependentInputs)
    best = one_step_optimum(law.dim, world.n_context, law.second_moment, law.fourth_moment)
    trial.note("gd_1 learning rate, closed form", best[0])
    trial.note("gd_1 expected loss, closed form", best[1])

    model = trained_stack(trial, settings, world, {"gd_1": gd}, tasks)
    built = gd.attention_stack(world.dim_x, 1, world.n_context).to(trial.device)
    predictors: dict[str, Predictor] = {
        "gd_1": gd,
        "lsa_1": model,
        "lsa_1_interpolated": interpolate(model, built),
        "lsa_1_untrained": fresh_stack(trial, settings, world),
        "gd_1_untuned": GDBaseline(UNTUNED),
        "ols": lambda x, y, x_query: linear_prediction(ols_weights(x, y), x_query),
    }
    curves = shifted_losses(
        predictors,
        world,
        generator=trial.generator("shifted"),
        input_scales=INPUT_SCALES,
        target_scales=TARGET_SCALES,
        n_tasks=trial["tasks"],
        device=trial.device,
    )
    arms: Arms = {}
    for arm, predictor in predictors.items():
        report = alignment(predictor, gd, tasks)
        arms[arm] = {
            "query_loss": report["loss_model"],
            "relative_loss": report["loss_model"] / report["loss_baseline"],
            "sensitivity_cosine": report["sens_cos"],
            "sensitivity_distance": report["sens_l2"],
            "prediction_distance": report["pred_l2"],
            "gap_larger_inputs": largest_gap(curves["inputs"][arm], curves["inputs"]["gd_1"]),
            "gap_larger_targets": largest_gap(curves["targets"][arm], curves["targets"]["gd_1"]),
        }
    one_layer_figures(trial, curves, model, built, gd, tasks)
    return arms


def largest_gap(losses: list[float], reference: list[float]) -> float:
    """Largest difference between two curves, in percent of the reference."""
    return max(100 * abs(a - b) / b for a, b in zip(losses, reference, strict=True))


def one_layer_figures(
    trial: Trial,
    curves: dict[str, dict[str, list[float]]],
    model: LinearSelfAttentionStack,
    built: LinearSelfAttentionStack,
    gd: GDBaseline,
    tasks: PromptBatch,
) -> None:
    for kind, scales in (("inputs", INPUT_SCALES), ("targets", TARGET_SCALES)):
        trial.figure(
            f"larger {kind}",
            caption=f"Query loss on {kind} larger or smaller by a factor than those the layer was trained on.",
            x_label=f"factor on the {kind}",
            y_label="query loss",
            x=list(scales),
            series={arm: curves[kind][arm] for arm in ("gd_1", "lsa_1", "lsa_1_interpolated")},
            log_y=True,
        )
    path_figure(trial, "lsa_1 to the construction", model, built, tasks)
    iteration_figure(trial, model, gd, tasks)
    layer = model.layers[0]
    assert isinstance(layer, SelfAttention)
    for name, matrix in (("W_K^T W_Q", layer.key_query), ("P W_V", layer.projected_value)):
        trial.figure(
            name,
            caption=f"{name} of the trained layer. The construction has a multiple of the identity in the x-block of "
            "W_K^T W_Q, a number in the corner of P W_V, and zeros elsewhere.",
            kind="heatmap",
            series={name: matrix[0].detach().cpu()},
        )


def iteration_figure(trial: Trial, model: LinearSelfAttentionStack, gd: GDBaseline, tasks: PromptBatch) -> None:
    """A trained layer used many times over, which it was not trained for, and gradient descent run as long."""
    depth = trial["iterations"]
    assert isinstance(gd.lr, float)
    with torch.no_grad():
        answers = model.rollout(tasks.x, tasks.y, tasks.x_query, n_layers=depth, dampening=DAMPENING, targets_only=True)
    losses = [0.5 * (answer - tasks.y_query).square().mean().item() for answer in answers]
    descent = [query_loss(GDBaseline(DAMPENING * gd.lr, steps), tasks) for steps in range(1, depth + 1)]
    trial.figure(
        "one trained layer, iterated",
        caption=f"The trained layer applied again and again with dampening {DAMPENING}, and as many equally dampened "
        "steps of gradient descent.",
        x_label="layers, or steps",
        y_label="query loss",
        x=list(range(depth + 1)),
        series={"lsa_1": losses, "gd_1": [losses[0], *descent]},
    )


def path_figure(
    trial: Trial, name: str, model: LinearSelfAttentionStack, built: LinearSelfAttentionStack, tasks: PromptBatch
) -> None:
    """The loss along the line from trained to constructed weights."""
    trial.figure(
        name,
        caption="Query loss between the trained weights (0) and the constructed ones (1), after rescaling.",
        x_label="share of the construction",
        y_label="query loss",
        x=list(WEIGHTS),
        series={"interpolated": [query_loss(interpolate(model, built, weight), tasks) for weight in WEIGHTS]},
    )


def deep_stack(trial: Trial, settings: dict[str, Any]) -> Arms:
    """K layers against K steps of GD (one rate, or one for each step) and of GD++."""
    steps, shared = settings["layers"], settings["shared"]
    world = linear_world(trial)
    tasks = evaluation_tasks(trial, world, "linear")
    lsa, suffix = f"lsa_{steps}{'' if shared else '_distinct'}", f"_{steps}" if shared else f"_{steps}_free"
    n_tasks = trial["tasks"]

    def tuning() -> torch.Generator:
        return trial.generator("tuning")  # the same tasks for all three

    gd = GDBaseline(UNTUNED, steps)
    gdpp = GDPlusPlusBaseline(UNTUNED, 0.0, steps).fit(world, tuning(), n_tasks=n_tasks, per_step=not shared)
    tuned: dict[str, GDBaseline | GDPlusPlusBaseline] = {
        f"gd_{steps}": gd.fit(world, tuning(), n_tasks=n_tasks),
        f"gd_{steps}_free": gd.fit(world, tuning(), n_tasks=n_tasks, per_step=True),
        f"gdpp{suffix}": gdpp,
    }
    for name, optimiser in tuned.items():
        trial.note(f"{name} rates", str(optimiser))
    optimisers: dict[str, Predictor] = dict(tuned)
    if clip := settings.get("clip"):  # many steps diverge on a rare task and rule the mean: clip the arms alike
        sizes = (world.dim_x, world.dim_y, world.n_context)
        optimisers = {
            name: optimiser.attention_stack(*sizes, clip=clip).to(trial.device) for name, optimiser in tuned.items()
        }

    model = trained_stack(trial, settings, world, optimisers, tasks)
    predictors: dict[str, Predictor] = {
        **optimisers,
        lsa: model,
        f"{lsa}_untrained": fresh_stack(trial, settings, world),
    }
    target, over = ("trained", "gdpp") if shared else ("distinct", "gdpp_free")
    arms: Arms = {}
    for arm, predictor in predictors.items():
        report = alignment(predictor, model, tasks)
        arms[arm] = {
            "query_loss": report["loss_model"],
            f"cosine_to_{target}": report["sens_cos"],
            f"sensitivity_distance_to_{target}": report["sens_l2"],
            f"prediction_distance_to_{target}": report["pred_l2"],
            f"loss_over_{over}": report["loss_model"] / query_loss(optimisers[f"gdpp{suffix}"], tasks),
        }
    if shared:
        built = gdpp.attention_stack(world.dim_x, 1, world.n_context).to(trial.device)
        path_figure(trial, f"{lsa} to the construction of GD++", model, built, tasks)
    return arms


def sines(trial: Trial) -> Arms:
    """MLP features with a linear attention layer, or with an explicit gradient step on a head, trained alike."""
    settings = trial["sine"]
    world = SineRegression(n_context=10)
    tasks = evaluation_tasks(trial, world, "sine")
    models: dict[str, nn.Module] = {
        "mlp_gd": FeatureGD(FeatureMLP(generator=trial.generator("mlp"))),
        "mlp_lsa": FeatureAttention(
            FeatureMLP(generator=trial.generator("mlp")), generator=trial.generator("mlp attention")
        ),
    }
    untrained = query_loss(models["mlp_lsa"], tasks.to("cpu"))
    for arm, model in models.items():
        model.to(trial.device)
        watch = watched(trial, "query loss on sines", arm, settings["steps"], partial(query_loss, model, tasks))
        fit(trial, model, world, "sine prompts", settings, arm, watch, clip=1.0)
    arms: Arms = {"mlp_lsa_untrained": {"sine_loss": untrained}}
    for arm, model in models.items():
        report = alignment(model, models["mlp_gd"], tasks)
        arms[arm] = {
            "sine_loss": report["loss_model"],
            "sine_prediction_distance": report["pred_l2"],
            "sine_sensitivity_cosine": report["sens_cos"],
        }
    for metrics in arms.values():
        metrics["relative_sine_loss"] = metrics["sine_loss"] / arms["mlp_gd"]["sine_loss"]
    return arms


def split_tokens(trial: Trial) -> Arms:
    """Inputs and targets as separate tokens: does the softmax layer bring each pair together?"""
    settings = trial["split"]
    world = LinearRegression(IndependentInputs(settings["dim_x"]), settings["n_context"])
    tasks = evaluation_tasks(trial, world, "split")
    gd = GDBaseline(UNTUNED).fit(world, trial.generator("split tuning"), n_tasks=trial["tasks"])

    def fresh() -> SplitTokenTransformer:
        start = trial.generator("split start")
        return SplitTokenTransformer(world.dim_x, world.n_context, generator=start).to(trial.device)

    model, untrained = fresh(), fresh()
    few = tasks.rows(slice(0, 2000))
    every = max(1, settings["steps"] // 20)

    def watch(report: StepReport) -> None:
        if report.step % every == 0:
            trial.log("query loss, split tokens", "split_lsa", report.step, query_loss(model, few))
            trial.log(
                "attention of an input to its target",
                "split_lsa",
                report.step,
                copy_probe(model, few)["attention_next"],
            )

    fit(trial, model, world, "split prompts", settings, "split_lsa", watch, clip=10.0)
    reference = query_loss(gd, tasks)
    arms: Arms = {}
    for arm, candidate in (("split_lsa", model), ("split_untrained", untrained)):
        probe = copy_probe(candidate, tasks)
        arms[arm] = {f"copy_{name}": value for name, value in probe.items()}
        arms[arm]["split_loss_over_gd_1"] = query_loss(candidate, tasks) / reference
    return arms


def linear_world(trial: Trial) -> LinearRegression:
    return LinearRegression(IndependentInputs(trial["dim_x"]), trial["n_context"])


def evaluation_tasks(trial: Trial, world: World, purpose: str) -> PromptBatch:
    return world.sample(trial["tasks"], trial.generator(f"{purpose} evaluation")).to(trial.device)


def fresh_stack(trial: Trial, settings: dict[str, Any], world: LinearRegression) -> LinearSelfAttentionStack:
    """The stack as it starts: small random weights, the same for every call with the same settings."""
    return LinearSelfAttentionStack(
        world.dim_x,
        world.dim_y,
        settings["layers"],
        shared=settings["shared"],
        clip=settings.get("clip"),
        generator=trial.generator(f"start {settings['layers']} {settings['shared']}"),
    ).to(trial.device)


def trained_stack(
    trial: Trial,
    settings: dict[str, Any],
    world: LinearRegression,
    optimisers: dict[str, Predictor],
    tasks: PromptBatch,
) -> LinearSelfAttentionStack:
    """Train a stack from small random weights, logging loss and alignment with every optimiser on the way."""
    name = f"{settings['layers']} layer{'s' if settings['layers'] > 1 else ''}"
    name += "" if settings["shared"] else ", distinct weights"
    arm = f"lsa_{settings['layers']}{'' if settings['shared'] else '_distinct'}"
    model = fresh_stack(trial, settings, world)
    few = tasks.rows(slice(0, 2000))
    every = max(1, settings["steps"] // 25)

    def watch(report: StepReport) -> None:
        if report.step % every and report.step != 1:
            return
        for optimiser, predictor in optimisers.items():
            agreement = alignment(model, predictor, few)
            trial.log(f"query loss, {name}", optimiser, report.step, agreement["loss_baseline"])
            trial.log(f"cosine of sensitivities, {name}", optimiser, report.step, agreement["sens_cos"])
            trial.log(f"distance of sensitivities, {name}", optimiser, report.step, agreement["sens_l2"])
            trial.log(f"distance of predictions, {name}", optimiser, report.step, agreement["pred_l2"])
        trial.log(f"query loss, {name}", arm, report.step, agreement["loss_model"])

    fit(trial, model, world, f"prompts {name}", settings, arm, watch, clip=settings.get("grad_clip"))
    return model


def watched(
    trial: Trial, curve: str, arm: str, steps: int, measure: Callable[[], float]
) -> Callable[[StepReport], None]:
    every = max(1, steps // 20)

    def watch(report: StepReport) -> None:
        if report.step % every == 0:
            trial.log(curve, arm, report.step, measure())

    return watch


def fit(
    trial: Trial,
    model: nn.Module,
    world: World,
    purpose: str,
    settings: dict[str, Any],
    arm: str,
    watch: Callable[[StepReport], None],
    clip: float | None,
) -> None:
    """Adam on fresh prompts of every step; arms that share a ``purpose`` see the same ones."""
    steps, lr = settings["steps"], settings["lr"]
    train(
        model,
        prompt_stream(world, settings["batch"], trial.generator(purpose, device=trial.device)),
        steps=steps,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=lr, betas=(0.9, 0.98), fused=True),
        schedule=warmup_cosine(steps, min(100, steps // 10), 0.01),
        loss=prompt_loss,
        clip_norm=clip,
        on_step=watch,
        on_progress=trial.reporter(f"training {arm}"),
    )
