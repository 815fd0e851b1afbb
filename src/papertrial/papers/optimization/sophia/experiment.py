"""Sophia on trial: its mechanism on losses of known curvature, and language-model pre-training against tuned AdamW.

The toy part is deterministic up to the starting points. In the language-modelling part all arms share the start and
the order of batches; settings are tuned at the same budget on the validation split (``tuning.py`` with seeds of its
own, or, where a scale has no settings, within the trial) and every figure reported is of the test split.
"""

import math
from typing import Any

import torch

from papertrial.lab.trial import Trial
from papertrial.lm.optim import first_crossing
from papertrial.lm.toy_losses import LogCosh, TwoCoordinates, log_spaced_scales
from papertrial.papers.optimization.sophia.mechanism import OPTIMIZERS, at_a_minimum, descend
from papertrial.papers.optimization.sophia.pretraining import ArmRun, make_task, train_arm
from papertrial.papers.optimization.sophia.tuning import runs_to_tune, tune_arm

SCALES: dict[str, dict[str, Any]] = {
    "smoke": {
        "seeds": 1,
        "task": {"name": "prose", "vocabulary": 300, "length": 24, "batch_size": 4, "held_out_windows": 8},
        "model": {"family": "llama", "width": 16, "layers": 1, "heads": 2},
        "steps": 8, "warmup": 0.25, "floor": 0.05, "evaluate_every": 2, "precision": "fp32",
        "k": 2, "curvature_rows": {"sophia_g": 2, "sophia_h": 2},
        "settings": {}, "tuning_share": 0.5,
        "grids": {
            "adamw": {"lr": [3e-3, 6e-3], "beta1": [0.8], "beta2": [0.95], "weight_decay": [0.1]},
            "sophia_g": {"lr": [2e-3], "beta1": [0.8], "beta2": [0.9], "rho": [0.05, 0.5], "weight_decay": [0.1]},
            "sophia_g_half": {"lr": [2e-3], "beta1": [0.8], "beta2": [0.9], "rho": [0.05], "weight_decay": [0.1]},
            "sophia_h": {"lr": [2e-3], "beta1": [0.8], "beta2": [0.9], "rho": [0.01], "weight_decay": [0.1]},
            "sign_momentum": {"lr": [2e-3], "beta1": [0.8], "weight_decay": [0.1]},
        },
        "toy": {
            "condition_numbers": [1, 100, 10000], "dimensions": 4, "spread": 2.0, "rates": [1.0, 0.1, 0.01],
            "steps": 120, "steps_rotated": 120, "target": 1e-3,
            "box": [[-1.5, 1.5], [0.0, 8.0]], "starts": 8, "two_coordinate_steps": 60,
        },
    },
    "small": {
        "seeds": 5,
        "task": {"name": "prose", "vocabulary": 512, "length": 64, "batch_size": 16, "held_out_windows": 128},
        "model": {"family": "llama", "width": 64, "layers": 2, "heads": 4},
        "steps": 300, "warmup": 0.1, "floor": 0.05, "evaluate_every": 25, "precision": "fp32",
        "k": 5, "curvature_rows": {"sophia_g": 8, "sophia_h": 2},
        "settings": {
            "adamw": {"lr": 4.5e-3, "beta1": 0.8, "beta2": 0.99, "weight_decay": 0.1},
            "sophia_g": {"lr": 4.2e-3, "beta1": 0.6, "beta2": 0.95, "rho": 0.1, "weight_decay": 0.1},
            "sophia_g_half": {"lr": 2e-3, "beta1": 0.6, "beta2": 0.95, "rho": 0.02, "weight_decay": 0.1},
            "sophia_h": {"lr": 4.2e-3, "beta1": 0.5, "beta2": 0.95, "rho": 0.01, "weight_decay": 0.1},
            "sign_momentum": {"lr": 3e-3, "beta1": 0.6, "weight_decay": 0.1},
        },
        "grids": {
            "adamw": {
                "lr": [3e-3, 4.5e-3, 7e-3, 1e-2], "beta1": [0.6, 0.7, 0.8, 0.9], "beta2": [0.95, 0.99],
                "weight_decay": [0.1],
            },
            "sophia_g": {
                "lr": [2e-3, 3e-3, 4.2e-3, 6e-3], "beta1": [0.5, 0.6, 0.7, 0.8], "beta2": [0.95],
                "rho": [0.02, 0.1], "weight_decay": [0.1],
            },
            "sophia_g_half": {
                "lr": [1.4e-3, 2e-3, 3e-3], "beta1": [0.6, 0.7, 0.8], "beta2": [0.95], "rho": [0.02],
                "weight_decay": [0.1],
            },
            "sophia_h": {
                "lr": [2e-3, 3e-3, 4.2e-3, 6e-3], "beta1": [0.5, 0.6, 0.7, 0.8], "beta2": [0.95], "rho": [0.01],
                "weight_decay": [0.1],
            },
            "sign_momentum": {
                "lr": [2e-3, 3e-3, 4.2e-3, 6e-3], "beta1": [0.5, 0.6, 0.7, 0.8], "weight_decay": [0.1],
            },
        },
        "toy": {
            "condition_numbers": [1, 10, 100, 1000, 10000], "dimensions": 4, "spread": 2.0,
            "rates": [1.0, 0.46, 0.22, 0.1, 0.046, 0.022, 0.01, 4.6e-3, 2.2e-3, 1e-3, 4.6e-4, 2.2e-4, 1e-4],
            "steps": 5000, "steps_rotated": 500, "target": 1e-3,
            "box": [[-1.5, 1.5], [0.0, 8.0]], "starts": 64, "two_coordinate_steps": 600,
        },
    },
    "gpu": {
        "seeds": 3,
        "task": {"name": "code", "vocabulary": 8192, "length": 512, "batch_size": 64, "held_out_windows": 256},
        "model": {"family": "gpt2", "width": 384, "layers": 6, "heads": 6},
        "steps": 800, "warmup": 0.1, "floor": 0.05, "evaluate_every": 40, "precision": "bf16",
        "k": 10, "curvature_rows": {"sophia_g": 32, "sophia_h": 4},
        "settings": {}, "tuning_share": 0.2,
        "grids": {
            "adamw": {"lr": [1e-3, 2e-3, 4e-3], "beta1": [0.8, 0.9], "beta2": [0.95], "weight_decay": [0.1]},
            "sophia_g": {"lr": [5e-4, 1e-3, 2e-3], "beta1": [0.9], "beta2": [0.95], "rho": [0.02, 0.1],
                         "weight_decay": [0.2]},
            "sophia_g_half": {"lr": [5e-4, 1e-3, 2e-3], "beta1": [0.9], "beta2": [0.95], "rho": [0.02, 0.1],
                              "weight_decay": [0.2]},
            "sophia_h": {"lr": [5e-4, 1e-3, 2e-3], "beta1": [0.9], "beta2": [0.95], "rho": [0.01],
                         "weight_decay": [0.2]},
            "sign_momentum": {"lr": [5e-4, 1e-3, 2e-3], "beta1": [0.9], "weight_decay": [0.2]},
        },
        "toy": {
            "condition_numbers": [1, 10, 100, 1000, 10000], "dimensions": 4, "spread": 2.0,
            "rates": [1.0, 0.46, 0.22, 0.1, 0.046, 0.022, 0.01, 4.6e-3, 2.2e-3, 1e-3, 4.6e-4, 2.2e-4, 1e-4],
            "steps": 5000, "steps_rotated": 500, "target": 1e-3,
            "box": [[-1.5, 1.5], [0.0, 8.0]], "starts": 64, "two_coordinate_steps": 600,
        },
    },
}  # fmt: skip

Metrics = dict[str, dict[str, float]]


def run(trial: Trial) -> Metrics:
    """One seed of both parts."""
    return {**mechanism(trial), **pretraining(trial)}


# -- losses of known curvature ---------------------------------------------------------------------------------------


BASES = {
    "axis-aligned": "Curvature is diagonal.",
    "rotated": "The same losses in rotated coordinates: a diagonal preconditioner no longer sees the curvature.",
}


def mechanism(trial: Trial) -> Metrics:
    """Steps against the condition number on log-cosh losses, and where each method ends on the two-coordinate loss."""
    numbers = trial.generator("toy")
    metrics: Metrics = {arm: {} for arm in OPTIMIZERS}
    for basis in BASES:
        for arm, values in _conditioning(trial, basis, numbers).items():
            metrics[arm] |= values
    for arm, values in _two_valleys(trial, numbers).items():
        metrics[arm] |= values
    return metrics


def _conditioning(trial: Trial, basis: str, numbers: torch.Generator) -> Metrics:
    """Best steps over the learning rates at every condition number. A run that never arrives counts as the longest."""
    toy = trial["toy"]
    kappas, d = torch.tensor(toy["condition_numbers"], dtype=torch.float64), toy["dimensions"]
    centre, offset = torch.randn(2, d, generator=numbers, dtype=torch.float64)
    start, rotation, suffix, longest = centre + toy["spread"] * offset, None, "", toy["steps"]
    if basis == "rotated":
        rotation = torch.linalg.qr(torch.randn(d, d, generator=numbers, dtype=torch.float64)).Q
        start, suffix, longest = start @ rotation, "_rotated", toy["steps_rotated"]
    problem = LogCosh(log_spaced_scales(kappas, d), centre.expand(len(kappas), d), rotation)
    lines: dict[str, list[float]] = {}
    for arm in trial.track(list(OPTIMIZERS), f"log-cosh, {basis}"):
        found = descend(arm, problem, start.expand(len(kappas), d), toy["rates"], steps=longest, target=toy["target"])
        lines[arm] = found.steps.min(0).values.clamp(max=longest).tolist()
    trial.figure(
        f"steps against condition number, {basis}", kind="line", x=toy["condition_numbers"], series=lines,
        x_label="condition number", y_label=f"steps to a loss of {toy['target']:g}", log_x=True, log_y=True,
        caption=f"Best of {len(toy['rates'])} learning rates at every point; no run is longer than {longest} steps. "
        + BASES[basis],
    )  # fmt: skip
    return {
        arm: {
            f"log10_slowdown{suffix}": math.log10(max(steps[-1], 1) / max(steps[0], 1)),
            f"steps_at_worst{suffix}": steps[-1],
        }
        for arm, steps in lines.items()
    }


def _two_valleys(trial: Trial, numbers: torch.Generator) -> Metrics:
    """Shares of random starts that end at a minimum, and at the global one, at the best learning rate for each."""
    toy, loss = trial["toy"], TwoCoordinates()
    low, high = torch.tensor(toy["box"], dtype=torch.float64).unbind(-1)
    starts = low + (high - low) * torch.rand(toy["starts"], 2, generator=numbers, dtype=torch.float64)
    metrics: Metrics = {}
    for arm in OPTIMIZERS:
        ended = descend(
            arm, loss, starts, toy["rates"], steps=toy["two_coordinate_steps"], target=toy["target"], stop_early=False
        )
        arrived = at_a_minimum(loss, ended.points, tolerance=0.01).double().mean(1)  # per learning rate
        solved = ended.steps.isfinite().double().mean(1)
        metrics[arm] = {"at_minimum": 100 * float(arrived.max()), "at_global_minimum": 100 * float(solved.max())}
    return metrics


# -- language modelling ----------------------------------------------------------------------------------------------


def pretraining(trial: Trial) -> Metrics:
    """Every arm once, from one start on one order of batches; Sophia-G a second time at half the steps."""
    scale = trial.parameters
    task = make_task(scale, trial.device)
    settings = scale["settings"] or _tuned_here(trial)

    def streams(purpose: str) -> torch.Generator:
        return trial.generator(purpose, device=trial.device if purpose == "labels and probes" else "cpu")

    runs: dict[str, ArmRun] = {}
    for name, steps in runs_to_tune(scale).items():
        runs[name] = train_arm(
            name.removesuffix("_half"), settings[name], scale, task, streams, steps=steps, split="test",
            device=trial.device, on_progress=trial.reporter(name),
        )  # fmt: skip
        trial.note(f"setting of {name}", ", ".join(f"{key} {value:g}" for key, value in settings[name].items()))
        trial.require(
            runs[name].curve.diverged_at is None,
            f"{name} diverged at step {runs[name].curve.diverged_at} with its tuned setting",
        )
        for step, loss in runs[name].curve.points:
            trial.log("test loss", name, step, loss)
        for step, share in runs[name].win_rates:
            trial.log("win rate", name, step, share)
    _figures(trial, runs)
    trial.note("tokens per step", task.tokens_per_step)
    return {name: _measured(name, runs, scale["steps"]) for name in runs}


def _measured(name: str, runs: dict[str, ArmRun], budget: int) -> dict[str, float]:
    """Metrics of one arm. An arm that never reaches AdamW's final loss counts as the full budget.

    Sophia-G may reach it in either of its runs, the full one or the one whose schedule ends at half the steps.
    """
    run, target = runs[name], runs["adamw"].curve.final
    candidates = [run, *([runs["sophia_g_half"]] if name == "sophia_g" else [])]
    crossings = [x for x in (first_crossing(r.curve.points, target) for r in candidates) if x is not None]
    steps = min(crossings, default=float(budget))
    metrics = {
        "test_loss": run.curve.final,
        "train_loss": run.curve.train_loss,
        "steps_to_adamw_loss": steps,
        "gradient_evaluations_to_adamw_loss": run.evaluations(steps),
        "gradient_evaluations": run.evaluations(run.curve.points[-1][0]),
        "cpu_seconds_per_step": run.curve.cpu_seconds / run.curve.points[-1][0],
    }
    if run.win_rates:
        metrics["win_rate"] = 100 * sum(share for _, share in run.win_rates) / len(run.win_rates)
    return metrics


def _tuned_here(trial: Trial) -> dict[str, Any]:
    """Settings from the grids, on the validation split with streams of their own, at a share of the length."""
    scale = trial.parameters

    def streams(purpose: str) -> torch.Generator:
        device = trial.device if purpose == "labels and probes" else "cpu"
        return trial.generator(f"tuning/{purpose}", device=device)

    settings = {}
    for name, steps in trial.track(list(runs_to_tune(scale).items()), "tuning"):
        found = tune_arm(name, scale, streams, steps=max(2, round(steps * scale["tuning_share"])), device=trial.device)
        settings[name] = dict(found.best)
        if found.edges:
            trial.note(f"at the edge of the grid, {name}", ", ".join(found.edges))
    return settings


def _figures(trial: Trial, runs: dict[str, ArmRun]) -> None:
    trial.figure(
        "test loss", kind="line", series={name: run.curve.points for name, run in runs.items()},
        x_label="step", y_label="nats per token",
        caption="Held-out loss while training, same start and same batches. sophia_g_half has half the steps and its "
        "own complete learning-rate schedule.",
    )  # fmt: skip
    trial.figure(
        "test loss against compute", kind="line",
        series={name: [(run.evaluations(x), y) for x, y in run.curve.points] for name, run in runs.items()},
        x_label="gradient evaluations, curvature passes included", y_label="nats per token",
        caption="The same runs with every curvature pass charged.",
    )  # fmt: skip
    rates = {name: run.win_rates for name, run in runs.items() if run.win_rates}
    if rates:
        trial.figure(
            "win rate", kind="line", series=rates, x_label="step", y_label="share of unclipped coordinates",
            caption="The paper advises 0.1 to 0.5; near 0 Sophia is sign descent with momentum.",
        )  # fmt: skip
