"""The language-modelling part: one arm is one optimiser on the shared task, with its curvature passes counted."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from papertrial.lm.optim import SignSGD
from papertrial.lm.optimizer_study import LanguageModelTask, LossCurve, corpus_task, decoder
from papertrial.lm.training import parameter_groups, warmup_cosine
from papertrial.papers.optimization.sophia.method import Sophia, SophiaG, SophiaH, refresh_hessian

Streams = Callable[[str], torch.Generator]
"""A fresh generator for a purpose, the same for every arm."""

PASS_COST = {"sophia_g": 1.0, "sophia_h": 3.0}
"""Cost of one curvature pass over a full batch, in gradient evaluations: GNB is a gradient; Hutchinson is a gradient
and the way back through it, which takes twice a gradient."""


@dataclass
class ArmRun:
    """One training run of one arm."""

    curve: LossCurve
    optimizer: Optimizer
    win_rates: list[tuple[float, float]] = field(default_factory=list)
    cost_per_pass: float = 0.0
    every: int = 1

    def evaluations(self, step: float) -> float:
        """Gradient evaluations of the first ``step`` steps, curvature passes included (at steps 0, k, 2k ...)."""
        return step + self.cost_per_pass * (-(-step // self.every))


def make_optimizer(arm: str, model: nn.Module, setting: Mapping[str, float]) -> Optimizer:
    """The optimiser of an arm; weight decay acts on matrices only, in every arm.

    ``setting`` holds lr, beta1, weight_decay, for all but sign momentum beta2, and for Sophia rho.
    """
    groups = parameter_groups(model, setting["weight_decay"])
    lr, beta1 = setting["lr"], setting["beta1"]
    if arm == "sign_momentum":
        return SignSGD(groups, lr=lr, momentum=beta1)
    betas = (beta1, setting["beta2"])
    if arm == "adamw":
        return AdamW(groups, lr=lr, betas=betas, fused=True)
    kinds: dict[str, type[Sophia]] = {"sophia_g": SophiaG, "sophia_h": SophiaH}
    if arm not in kinds:
        raise ValueError(f"unknown arm {arm!r}; known: adamw, sign_momentum, {', '.join(kinds)}")
    return kinds[arm](groups, lr=lr, betas=betas, rho=setting["rho"])


def make_task(scale: Mapping[str, Any], device: torch.device) -> LanguageModelTask:
    """The task that a scale's ``task`` entry describes, on a device."""
    return corpus_task(**scale["task"]).to(device)


def train_arm(
    arm: str,
    setting: Mapping[str, float],
    scale: Mapping[str, Any],
    task: LanguageModelTask,
    streams: Streams,
    *,
    steps: int,
    split: str,
    device: torch.device,
    on_progress: Callable[[int, int | None], None] | None = None,
) -> ArmRun:
    """Train one arm from the shared start on the shared batch order.

    Parameters
    ----------
    scale : holds ``model``, ``warmup`` and ``floor`` (shares), ``evaluate_every``, ``precision``, ``k`` and
        ``curvature_rows``.
    streams : gives the generators named init, batches and curvature. Curvature batches are fresh windows of the
        training text, of which only the inputs are used by sophia_g.
    split : followed during training.
    """
    model = decoder(task, streams("init"), **scale["model"]).to(device)
    optimizer = make_optimizer(arm, model, setting)
    run = ArmRun(LossCurve(), optimizer)
    hook = None
    if isinstance(optimizer, Sophia):
        rows = scale["curvature_rows"][arm]
        run.every, run.cost_per_pass = scale["k"], PASS_COST[arm] * rows / task.batch_size
        hook = _curvature_schedule(model, optimizer, task, streams, run, rows, scale)
    run.curve = task.run(
        model, optimizer, streams("batches"), steps=steps, split=split, evaluate_every=scale["evaluate_every"],
        schedule=warmup_cosine(steps, max(1, round(scale["warmup"] * steps)), scale["floor"]),
        before_update=hook, on_progress=on_progress, precision=scale["precision"],
    )  # fmt: skip
    return run


def _curvature_schedule(
    model: nn.Module,
    optimizer: Sophia,
    task: LanguageModelTask,
    streams: Streams,
    run: ArmRun,
    rows: int,
    scale: Mapping[str, Any],
) -> Callable[[int], None]:
    """A hook between gradient and update that refreshes h every k steps and follows the win rate."""
    batches = task.batches(streams("curvature"))
    draws = streams("labels and probes")
    half = scale["precision"] == "bf16" and isinstance(optimizer, SophiaG)
    device = next(model.parameters()).device

    def before_update(step: int) -> None:
        if step % scale["k"] == 0:
            ids = next(batches)[:rows]
            with torch.autocast(device.type, dtype=torch.bfloat16) if half else nullcontext():
                refresh_hessian(model, {"input_ids": ids, "labels": ids}, optimizer, generator=draws)
        if step and step % scale["evaluate_every"] == 0:
            run.win_rates.append((float(step), optimizer.win_rate()))

    return before_update
