"""The one training loop: steps of an optimiser over batches, on one process or, through ``torchrun``, on many.

    model = LlamaForCausalLM(config)
    batches = random_batches(tokens, batch_size=16, length=256, generator=generator)
    report = train(model, batches, steps=500, optimizer=adamw(3e-3), schedule=warmup_cosine(500, 50))

The loop is bit-reproducible on one machine with a fixed number of threads, and a run that was killed and started again
with the same arguments and the same ``checkpoint`` folder ends with the same weights, bit for bit.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from papertrial.lm import training_state
from papertrial.lm.losses import IGNORED, Batch, Loss, causal_loss, masked_loss, token_cross_entropy
from papertrial.lm.schedules import Schedule, constant, linear, warmup_cosine

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = [
    "IGNORED",
    "Batch",
    "Loss",
    "NonFiniteLossError",
    "Schedule",
    "StepReport",
    "TrainingReport",
    "adamw",
    "causal_loss",
    "constant",
    "linear",
    "masked_loss",
    "parameter_groups",
    "token_cross_entropy",
    "train",
    "warmup_cosine",
]

logger = logging.getLogger(__name__)

OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class NonFiniteLossError(ArithmeticError):
    """The loss or gradient of step ``step`` (from 1) was infinite or not a number; the weights are as before it."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


@dataclass(frozen=True)
class StepReport:
    """One optimiser step.

    Attributes
    ----------
    step, steps : this step (from 1) and the last one.
    loss : weighted mean over the step's micro-batches and processes (nats per target for the losses of this package).
    grad_norm : Euclidean norm of the whole gradient before clipping.
    lr : learning rate of the first parameter group.
    targets : sum of the loss weights of the step (target tokens).
    targets_per_second : since this process began the loop.
    seconds_left : at that rate, for the remaining steps.
    parts : the means that the loss reported beside itself.
    """

    step: int
    steps: int
    loss: float
    grad_norm: float
    lr: float
    targets: float
    targets_per_second: float
    seconds_left: float
    parts: Mapping[str, float]


@dataclass
class TrainingReport:
    """What a run did: ``losses[i]`` and ``grad_norms[i]`` are those of step i + 1, resumed steps included.

    ``seconds`` and ``cpu_seconds`` (of this process, all threads) add up over the resumed parts.
    """

    steps: int = 0
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    targets: float = 0.0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    resumed_at: int = 0


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices (two or more dimensions), which decay, and biases and norm gains, which do not.

    Tied parameters appear once.
    """
    return _decay_groups([p for p in model.parameters() if p.requires_grad], weight_decay)


def _decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def adamw(
    lr: float,
    *,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
) -> OptimizerFactory:
    """A factory of fused AdamW (1711.05101) for ``train``; weight decay on matrices only.

    ``betas`` default to those of 2005.14165, appendix B: a short second-moment memory suits short runs.
    """
    return lambda parameters: torch.optim.AdamW(
        _decay_groups(parameters, weight_decay), lr=lr, betas=betas, eps=eps, fused=True
    )


def train(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    steps: int,
    optimizer: torch.optim.Optimizer | OptimizerFactory,
    schedule: Schedule | None = None,
    loss: Callable[[nn.Module, Batch], Loss | Tensor] | None = None,
    penalties: Mapping[str, Callable[[nn.Module, Batch], Tensor]] | None = None,
    clip_norm: float | None = 1.0,
    accumulate: int = 1,
    precision: Literal["fp32", "bf16"] = "fp32",
    dropout: bool = True,
    compile: bool = False,
    seed: int | None = None,
    before_step: Callable[[int], None] | None = None,
    before_update: Callable[[int], None] | None = None,
    after_step: Callable[[int], None] | None = None,
    on_step: Callable[[StepReport], None] | None = None,
    on_progress: Callable[[int, int | None], None] | None = None,
    checkpoint: Path | str | None = None,
    checkpoint_every: int = 200,
    keep: Mapping[str, Any] | None = None,
) -> TrainingReport:
    """Train ``model`` in place for ``steps`` optimiser steps and leave it in evaluation mode.

    Parameters
    ----------
    model : on its device; its parameters should be float32 (updates smaller than bfloat16's resolution are lost).
    batches : anything to iterate over. What can be iterated again (a list, a DataLoader) is started over when it ends.
        Over several processes each must see the same sequence: process r takes every world-th micro-batch from the
        r-th, so that w processes at ``accumulate=a`` compute what one process does at ``accumulate=w*a``.
    optimizer : an optimiser, or a function from the list of trainable parameters to one (see ``adamw``).
    schedule : factor on every group's learning rate at step 0, 1, ...; None keeps it constant.
    loss : ``loss(model, batch)`` gives a ``Loss`` (sum and weight), or a scalar tensor, which counts as a mean of
        weight 1. Use the model that is passed in: it may be wrapped. Default ``causal_loss``.
    penalties : terms added to the mean loss of every micro-batch, each ``f(model, batch) -> scalar tensor``, called
        after ``loss`` (so they may read activations that hooks captured); reported by name.
    clip_norm : bound on the Euclidean norm of the gradient; None does not clip.
    accumulate : micro-batches per step and process. Their losses are weighted by ``Loss.weight``, so that two
        micro-batches give the gradient of their concatenation even if they hold unequal numbers of targets.
    precision : ``bf16`` runs the forward pass under autocast; weights and optimiser stay as they are.
    dropout : False trains in evaluation mode.
    compile : compile the model with ``torch.compile``; pays from a few minutes of training on.
    seed : of dropout and other draws from the global generators, which are put back afterwards. None leaves them alone.
    before_step, before_update, after_step : called with the 0-based step: before the first forward pass, between the
        clipped gradient and the update, and after the update.
    on_step : hears a ``StepReport`` after each step (on every process).
    on_progress : hears ``(done, steps)`` after each step, and once at the start.
    checkpoint : folder of this run's place. If it holds one, the run goes on from there.
    checkpoint_every : steps between saves; the end is always saved.
    keep : further things with state that the steps depend on, by name: ``torch.Generator``s drawn from inside ``loss``,
        or objects with ``state_dict``; saved and restored with the rest.

    Returns
    -------
    TrainingReport

    Raises
    ------
    NonFiniteLossError
        Naming the step; the update is not made.
    ValueError
        For unusable arguments, batches that end too early, a step without any target, or a checkpoint of another run.
    """
    _check_arguments(steps, clip_norm, accumulate, precision, checkpoint_every)
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("model has no trainable parameter; set requires_grad on what is to be trained")
    if not isinstance(optimizer, torch.optim.Optimizer):
        optimizer = optimizer(trainable)
    run = _Run(
        model=model,
        optimizer=optimizer,
        steps=steps,
        schedule=schedule or constant(),
        loss=loss or causal_loss,
        penalties=dict(penalties or {}),
        clip_norm=clip_norm,
        accumulate=accumulate,
        precision=precision,
        dropout=dropout,
        compile=compile,
        keep=dict(keep or {}),
    )
    with ExitStack() as stack:
        if seed is not None:
            stack.enter_context(torch.random.fork_rng(devices=[run.device] if run.device.type == "cuda" else []))
            torch.manual_seed(seed + run.accelerator.process_index)
        stack.callback(model.eval)
        folder = None if checkpoint is None else Path(checkpoint)
        stream = run.resume(batches, folder)
        if on_progress:
            on_progress(run.report.steps, steps)
        clock = _Clock(run.report)
        for step in range(run.report.steps, steps):
            if before_step:
                before_step(step)
            report = run.step(step, stream, before_update, clock)
            if after_step:
                after_step(step)
            if on_step:
                on_step(report)
            if on_progress:
                on_progress(step + 1, steps)
            if folder is not None and ((step + 1) % checkpoint_every == 0 or step + 1 == steps):
                clock.stop()
                run.save(folder)
        clock.stop()
    return run.report


def _check_arguments(steps: int, clip_norm: float | None, accumulate: int, precision: str, every: int) -> None:
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if accumulate < 1:
        raise ValueError(f"accumulate must be at least 1, got {accumulate}")
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"clip_norm must be positive, or None to leave the gradient as it is; got {clip_norm}")
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"precision must be 'fp32' or 'bf16', got {precision!r}")
    if every < 1:
        raise ValueError(f"checkpoint_every must be at least 1, got {every}")


class _Clock:
    """Adds wall and CPU time to a report, and knows the rate since this process began."""

    def __init__(self, report: TrainingReport) -> None:
        self.report = report
        self.began = self.wall = time.perf_counter()
        self.cpu = time.process_time()
        self.targets = report.targets
        self.steps = report.steps

    def stop(self) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        self.report.seconds += wall - self.wall
        self.report.cpu_seconds += cpu - self.cpu
        self.wall, self.cpu = wall, cpu

    def rate_and_left(self, steps: int) -> tuple[float, float]:
        elapsed = max(time.perf_counter() - self.began, 1e-9)
        done = self.report.steps - self.steps
        return (self.report.targets - self.targets) / elapsed, elapsed / max(1, done) * (steps - self.report.steps)


class _Stream:
    """This process's share of the batches, and how many micro-batches all processes have taken."""

    def __init__(self, batches: Iterable[Batch], rank: int, world: int) -> None:
        self.batches, self.rank, self.world = batches, rank, world
        self.iterator: Iterator[Batch] = iter(batches)
        self.one_shot = self.iterator is batches
        self.taken = 0

    def _next(self) -> Batch:
        try:
            batch = next(self.iterator)
        except StopIteration:
            if self.one_shot:
                raise ValueError(
                    f"batches ended after {self.taken} micro-batches; give an endless iterator, or a list to go round"
                ) from None
            self.iterator = iter(self.batches)
            try:
                batch = next(self.iterator)
            except StopIteration:
                raise ValueError("batches is empty") from None
        self.taken += 1
        return batch

    def take(self) -> Batch:
        """The next micro-batch of this process; every process consumes all ``world`` of them."""
        row = [self._next() for _ in range(self.world)]
        return row[self.rank]

    def skip_to(self, position: int) -> None:
        """Draw and drop what an earlier part of this run has seen."""
        while self.taken < position:
            self._next()


@dataclass
class _Run:
    """The moving parts of one call of ``train``."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    steps: int
    schedule: Schedule
    loss: Callable[[nn.Module, Batch], Loss | Tensor]
    penalties: dict[str, Callable[[nn.Module, Batch], Tensor]]
    clip_norm: float | None
    accumulate: int
    precision: str
    dropout: bool
    compile: bool
    keep: dict[str, Any]
    report: TrainingReport = field(default_factory=TrainingReport)

    def __post_init__(self) -> None:
        self.device = next(self.model.parameters()).device
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", float(group["lr"]))
        self.accelerator = _accelerator()
        if self.accelerator.num_processes > 1:
            self.device = self.accelerator.device
            self.model.to(self.device)
        self.wrapped, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        if self.compile:
            self.wrapped = torch.compile(self.wrapped)  # type: ignore[assignment]
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]

    # -- one step ------------------------------------------------------------------------------------------------

    def step(
        self, step: int, stream: _Stream, before_update: Callable[[int], None] | None, clock: _Clock
    ) -> StepReport:
        if self.wrapped.training != self.dropout:  # a hook may have evaluated in between
            self.wrapped.train(self.dropout)
        factor = self.schedule(step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        self.optimizer.zero_grad(set_to_none=True)
        total, weight, parts = self._accumulate_gradients(step, stream)
        if not math.isfinite(total):
            raise NonFiniteLossError(
                f"the loss of step {step + 1} is {total}; lower the learning rate or look at that batch", step + 1
            )
        grad_norm = self._clip(step)
        if before_update:
            before_update(step)
        self.optimizer.step()
        self.report.steps = step + 1
        self.report.losses.append(total)
        self.report.grad_norms.append(grad_norm)
        self.report.targets += weight
        rate, left = clock.rate_and_left(self.steps)
        lr = float(self.optimizer.param_groups[0]["lr"])
        return StepReport(step + 1, self.steps, total, grad_norm, lr, weight, rate, left, parts)

    def _accumulate_gradients(self, step: int, stream: _Stream) -> tuple[float, float, dict[str, float]]:
        """Backward passes of one step. Returns the mean loss, its weight, and the means of the parts."""
        sums: dict[str, Tensor] = {}
        weights = torch.zeros((), device=self.device, dtype=torch.float64)
        for micro in range(self.accumulate):
            last = micro + 1 == self.accumulate
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                loss, parts = self._forward(stream.take())
                self.accelerator.backward(loss.total)
            weight = torch.as_tensor(loss.weight, device=self.device, dtype=torch.float64)
            weights = weights + weight
            for name, value in {"": loss.total.detach(), **parts}.items():
                value = torch.as_tensor(value, device=self.device).detach().double()
                sums[name] = sums.get(name, 0.0) + (value if name == "" else value * weight)
        names = list(sums)
        row = torch.stack([weights, *(sums[name] for name in names)])
        row = self.accelerator.reduce(row, reduction="sum")
        weight, *values = row.tolist()
        if not weight > 0:
            raise ValueError(
                f"step {step + 1} has no target: all its labels are {IGNORED}, or its weights sum to {weight}"
            )
        # the backward passes summed over targets and averaged over processes; the step is the mean over all targets
        scale = self.accelerator.num_processes / weight
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(scale)
        means = {name: value / weight for name, value in zip(names, values, strict=True)}
        return means.pop(""), weight, means

    def _forward(self, batch: Batch) -> tuple[Loss, dict[str, Tensor | float]]:
        from accelerate.utils import send_to_device

        batch = send_to_device(batch, self.device)
        with self._autocast():
            loss = self.loss(self.wrapped, batch)
            if isinstance(loss, Tensor):
                loss = Loss(loss, 1.0)
            parts: dict[str, Tensor | float] = dict(loss.parts)
            total = loss.total
            for name, penalty in self.penalties.items():
                value = penalty(self.wrapped, batch)
                total = total + value * loss.weight
                parts[name] = value
        if total.ndim != 0:
            raise ValueError(f"loss must give a scalar; got the shape {tuple(total.shape)}")
        return loss._replace(total=total), parts

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def _clip(self, step: int) -> float:
        """Norm of the gradient before clipping. Not accelerate's, which wants all parameters in the model's order."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if hasattr(norm, "full_tensor"):  # sharded: a partial sum until it is gathered
            norm = norm.full_tensor()
        grad_norm = float(norm)
        if not math.isfinite(grad_norm):
            raise NonFiniteLossError(
                f"the gradient of step {step + 1} has norm {grad_norm}, though its loss is finite", step + 1
            )
        if self.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.clip_norm, norm)
        return grad_norm

    # -- the place on disk ---------------------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        """What two runs must share for one to go on from the other."""
        shapes = ";".join(f"{name}{tuple(p.shape)}" for name, p in self.model.named_parameters())
        return {
            "steps": self.steps,
            "accumulate": self.accumulate,
            "precision": self.precision,
            "clip_norm": self.clip_norm,
            "processes": self.accelerator.num_processes,
            "parameters": shapes,
            "optimizer": type(_bare(self.optimizer)).__name__,
            "keep": sorted(self.keep),
        }

    @property
    def _stateful_model(self) -> nn.Module:
        """Sharded weights live in the wrapper; alone, the caller's own module has the plain names."""
        return self.model if self.accelerator.num_processes == 1 else self.wrapped

    def save(self, folder: Path) -> None:
        processes = self.accelerator.num_processes
        state = training_state.model_and_optimizer(self._stateful_model, _bare(self.optimizer), processes)
        random = training_state.random_state(self.device)
        everyone = [random]
        if processes > 1:
            everyone = [{}] * processes
            torch.distributed.all_gather_object(everyone, random)
        if self.accelerator.is_main_process:
            state |= {
                "run": self._identity(),
                "step": self.report.steps,
                "taken": self.stream.taken,
                "random": everyone,
                "report": {name: value for name, value in vars(self.report).items() if name != "resumed_at"},
                "keep": {name: training_state.capture(thing) for name, thing in self.keep.items()},
            }
            training_state.save_atomically(state, folder)
        self.accelerator.wait_for_everyone()

    def resume(self, batches: Iterable[Batch], folder: Path | None) -> _Stream:
        """The stream of batches, at the place that the checkpoint (if any) was saved at; everything else with it."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        self.stream = _Stream(batches, rank, world)
        state = None if folder is None else training_state.load(folder)
        if state is None:
            return self.stream
        if state["run"] != (mine := self._identity()):
            differ = [key for key in mine if state["run"].get(key) != mine[key]]
            raise ValueError(
                f"the checkpoint in {folder} belongs to another run (different {', '.join(differ)}); use another folder"
            )
        training_state.restore_model_and_optimizer(self._stateful_model, _bare(self.optimizer), state, world)
        self.report = TrainingReport(**state["report"], resumed_at=state["step"])
        self.stream.skip_to(state["taken"])
        # after the stream has been wound on: drawing batches may itself draw from these
        for name, thing in self.keep.items():
            training_state.restore(thing, state["keep"][name])
        training_state.restore_random_state(state["random"][rank], self.device)
        logger.info("resumed at step %d of %d", self.report.steps, self.steps)
        return self.stream


def _accelerator() -> "Accelerator":
    from accelerate import Accelerator, DistributedType
    from accelerate.state import AcceleratorState, is_initialized

    # a single process keeps the model where the caller put it
    precision = AcceleratorState().mixed_precision if is_initialized() else "no"
    accelerator = Accelerator(device_placement=False, mixed_precision=precision)
    # Accelerate knows one precision per process, perhaps already another's; the loop's own autocast is per run.
    accelerator.native_amp = False
    accelerator.scaler = None
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError("FSDP version 1 is not supported by the training loop; set FSDP_VERSION=2")
    return accelerator


def _bare(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The caller's optimiser inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
