"""Runs a paper's experiment seed by seed: seeding, timing, checking, recording, and resuming after a kill.

A finished trial is on disk before the next one starts. Run folders live under the home folder and are keyed by
everything that decides the numbers, so a changed method never resumes an old run.
"""

import contextlib
import gc
import importlib
import json
import math
import os
import platform
import random
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from papertrial import __version__
from papertrial.errors import PapertrialError, UsageError, first_line
from papertrial.home import home
from papertrial.lab.claim import SCALES, PaperCard
from papertrial.lab.digests import changed_modules, digest, module_digests, paper_digest, read_scales, takes_model
from papertrial.lab.evidence import Environment, Evidence, TrialRecord, write_atomically
from papertrial.lab.trial import PreconditionFailed, ProgressListener, Trial, trial_parameters

LONGEST_CURVE = 200


class TrialFailed(PapertrialError):
    """An experiment returned something that is not evidence: a NaN, a missing arm or metric, or nothing."""


class RunBusy(PapertrialError):
    """Another process is running the same paper."""

    exit_code = 3


@dataclass(frozen=True)
class RunPlan:
    """What will be run; everything in ``key`` decides the numbers."""

    card: PaperCard
    scale: str
    seeds: tuple[int, ...]
    parameters: Mapping[str, Any]
    model: str | None = None
    device: str = "cpu"
    threads: int = 1
    workers: int = 1
    paper_digest: str = field(default="")

    @property
    def key(self) -> str:
        import torch

        parts = [self.paper_digest, json.dumps(dict(self.parameters), sort_keys=True), self.model, self.device]
        return digest("\0".join(map(str, [*parts, torch.__version__])))

    @property
    def folder(self) -> Path:
        return home() / "runs" / self.card.slug / f"{self.scale}-{self.key}"


def plan_run(
    card: PaperCard,
    scale: str,
    *,
    model: str | None = None,
    seeds: int | None = None,
    device: str | None = None,
    threads: int | None = None,
    workers: int | None = None,
) -> RunPlan:
    """Check a request and say what will be run.

    Raises
    ------
    UsageError
        On an unknown scale, a paper that is not on trial, a model where the experiment takes none or that nobody finds,
        a bad number of seeds, or a device that is not there.
    """
    if scale not in SCALES:
        raise UsageError(f"unknown scale {scale!r}; known: {', '.join(SCALES)}")
    if model is not None and card.on_trial and not takes_model(card):
        raise UsageError(f"{card.slug} makes its own models; run it without --model")
    if model is not None:
        from papertrial.lm.models import model_folder

        model_folder(model)  # a name that nothing bears is said before anything is started
    own_seeds, parameters = trial_parameters(card.slug, read_scales(card), scale)
    if seeds is not None and not 1 <= seeds <= 1000:
        raise UsageError(f"--seeds must lie in 1..1000, got {seeds}")
    chosen = (
        own_seeds if seeds is None else [*own_seeds, *range(max(own_seeds) + 1, max(own_seeds) + 1 + seeds)][:seeds]
    )
    chosen_device = _device(device, scale)
    if workers is None:  # one process a core, one thread each; a GPU serves one trial at a time
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = 1 if scale == "smoke" or chosen_device != "cpu" else max(1, min(2, cores // (threads or 1)))
    return RunPlan(
        card,
        scale,
        tuple(chosen),
        parameters,
        model,
        chosen_device,
        threads or 1,
        min(workers, len(chosen)),
        paper_digest(card, scale),
    )


def _device(requested: str | None, scale: str) -> str:
    import torch

    if requested is None:
        if scale == "gpu" and not torch.cuda.is_available():
            raise UsageError(
                "the gpu scale needs a GPU and none is visible; use --scale small, or --device cpu to insist"
            )
        return "cuda" if scale == "gpu" else "cpu"
    try:
        torch.zeros(1, device=requested)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"device {requested!r} cannot be used: {str(error).splitlines()[0]}") from None
    return requested


def run(
    plan: RunPlan,
    *,
    progress: ProgressListener | None = None,
    on_trial: Callable[[TrialRecord, bool], None] | None = None,
    fresh: bool = False,
) -> Evidence:
    """Run (or finish) a plan, one seed after the other.

    Parameters
    ----------
    progress : hears about the steps inside a trial.
    on_trial : called with each record and whether it came from an earlier, interrupted run.
    fresh : throw away what an earlier run of the same plan left.

    Raises
    ------
    RunBusy
        When another process runs the same paper.
    TrialFailed
        When a trial returns something that is not evidence. Finished trials are kept.
    """
    with _locked(plan):
        records: dict[int, TrialRecord] = {}
        for seed in [] if fresh else plan.seeds:
            kept = _resumable(plan.folder / f"seed-{seed}.json")
            if kept is not None:
                records[seed] = kept
                if on_trial:
                    on_trial(kept, True)
        for record in _trials(
            plan, [seed for seed in plan.seeds if seed not in records], progress or ProgressListener()
        ):
            write_atomically(plan.folder / f"seed-{record.seed}.json", record.model_dump_json())
            records[record.seed] = record
            if on_trial:
                on_trial(record, False)
        _require_same_models([records[seed] for seed in plan.seeds])
        return Evidence(
            slug=plan.card.slug,
            scale=plan.scale,
            model=plan.model,
            parameters=dict(plan.parameters),
            seeds=list(plan.seeds),
            trials=[records[seed] for seed in plan.seeds],
            environment=environment(plan.device, plan.threads, plan.workers),
            paper_digest=plan.paper_digest,
            recorded=datetime.now(UTC),
        )


def _trials(plan: RunPlan, seeds: Sequence[int], progress: ProgressListener) -> Iterator[TrialRecord]:
    if min(plan.workers, len(seeds)) > 1:
        from papertrial.lab.workers import run_side_by_side

        yield from run_side_by_side(_run_seed, plan, seeds, progress)
    else:
        for seed in seeds:
            yield _run_seed(plan, seed, progress)


def finished_seeds(plan: RunPlan) -> list[int]:
    """Seeds of the plan that an earlier run has already finished."""
    return [seed for seed in plan.seeds if _resumable(plan.folder / f"seed-{seed}.json") is not None]


def _resumable(path: Path) -> TrialRecord | None:
    """An earlier record, unless it is damaged or the shared modules or checkpoints it used have changed since."""
    try:
        record = TrialRecord.model_validate_json(path.read_bytes())
    except (OSError, ValueError):
        return None
    return None if changed_modules(record.substrate) or _changed_models(record) else record


def _changed_models(record: TrialRecord) -> list[str]:
    """Checkpoints of a record whose weights are others now, or that are gone."""
    from papertrial.lm.models import folder_digest, model_folder

    def same(name: str, recorded: str) -> bool:
        try:
            return folder_digest(model_folder(name)) == recorded
        except (PapertrialError, OSError):
            return False

    return [name for name, recorded in record.models.items() if not same(name, recorded)]


def _require_same_models(records: Sequence[TrialRecord]) -> None:
    """One evidence is about one set of weights; somebody may have written a checkpoint anew during the run."""
    seen: dict[str, str] = {}
    for record in records:
        for name, found in record.models.items():
            if seen.setdefault(name, found) != found:
                raise TrialFailed(f"{name} changed while it was on trial; run again, and leave it alone meanwhile")


@contextlib.contextmanager
def _locked(plan: RunPlan) -> Iterator[None]:
    from filelock import FileLock, Timeout

    folder = home() / "runs" / plan.card.slug
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / "lock", timeout=0)
        lock.acquire()
    except Timeout:
        raise RunBusy(
            f"another run of {plan.card.slug} is in progress; wait for it, or stop it, then run again"
        ) from None
    except OSError as error:
        raise PapertrialError(f"cannot write to {folder}: {error.strerror or error}") from None
    try:
        yield
    finally:
        lock.release()


def _run_seed(plan: RunPlan, seed: int, progress: ProgressListener) -> TrialRecord:
    import numpy as np
    import torch

    experiment = importlib.import_module(f"{plan.card.module}.experiment")
    torch.set_num_threads(plan.threads)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    on_gpu = plan.device.startswith("cuda")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    gc.collect()
    _reset_peak_memory()
    trial = Trial(
        plan.card.slug,
        plan.scale,
        seed,
        plan.parameters,
        device=plan.device,
        scratch=plan.folder / f"scratch-{seed}",
        model=plan.model,
        progress=progress,
    )
    started, wall, cpu = datetime.now(UTC), time.perf_counter(), time.process_time()
    reason: str | None = None
    metrics: dict[str, dict[str, float]] = {}
    try:
        metrics = _checked(experiment.run(trial), plan.card, seed)
    except PreconditionFailed as error:
        reason = str(error)
    except (ValueError, TypeError, LookupError, RuntimeError, AttributeError) as error:
        if plan.model is None:
            raise
        log = plan.folder / f"seed-{seed}.log"
        write_atomically(log, traceback.format_exc())
        what = f"{type(error).__name__}: {first_line(error)}"
        raise TrialFailed(f"{plan.card.slug} cannot run on {plan.model}: {what} (more in {log})") from error
    return TrialRecord(
        seed=seed,
        metrics=metrics,
        undecided=reason,
        curves=_thinned(trial.curves),
        figures=trial.figures,
        examples=trial.examples,
        notes=trial.notes,
        models=trial.models,
        wall_seconds=round(time.perf_counter() - wall, 3),
        cpu_seconds=round(time.process_time() - cpu, 3),
        peak_memory_mb=round(_peak_memory(), 1),
        started=started,
        device_memory_mb=round(torch.cuda.max_memory_allocated() / 2**20, 1) if on_gpu else None,
        substrate=module_digests(
            [m for m in sys.modules if m.startswith("papertrial.lm.") or m == "papertrial.lab.trial"]
        ),
    )


def _checked(returned: Any, card: PaperCard, seed: int) -> dict[str, dict[str, float]]:
    """Only finite numbers for every claimed arm and metric become evidence."""
    where = f"{card.slug}, seed {seed}"
    if not isinstance(returned, Mapping) or not returned:
        raise TrialFailed(f"{where}: run() returned {type(returned).__name__}, not {{arm: {{metric: value}}}}")
    metrics: dict[str, dict[str, float]] = {}
    for arm, values in returned.items():
        metrics[str(arm)] = {}
        for name, value in values.items():
            number = float(value)
            if not math.isfinite(number):
                raise TrialFailed(f"{where}: arm {arm!r} returned {number} for {name}; a diverged arm is not evidence")
            metrics[str(arm)][str(name)] = number
    for claim in card.claim:
        for arm in claim.arms:
            if claim.metric not in metrics.get(arm, {}):
                has = f"it has {', '.join(metrics[arm])}" if arm in metrics else f"there are only {', '.join(metrics)}"
                raise TrialFailed(f"{where}: the claim needs {claim.metric} of arm {arm}; {has}")
    return metrics


def _thinned(
    curves: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Long curves keep evenly spaced points and their last; six digits are more than a plot shows."""

    def thin(line: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
        finite = [(float(f"{x:.6g}"), float(f"{y:.6g}")) for x, y in line if math.isfinite(x) and math.isfinite(y)]
        stride = -(-len(finite) // LONGEST_CURVE) or 1
        return finite[:-1:stride] + finite[-1:]

    return {name: {arm: thin(line) for arm, line in lines.items()} for name, lines in curves.items()}


def _reset_peak_memory() -> None:
    """Linux only: start the process's high-water mark anew, so that it belongs to this trial."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_memory() -> float:
    """High-water mark of resident memory, in MiB."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 1024


def environment(device: str, threads: int, workers: int) -> Environment:
    """What the trials run in."""
    import numpy
    import torch
    import transformers

    name = device
    if device.startswith("cuda"):
        name = f"{device} ({torch.cuda.get_device_name(device)})"
    return Environment(
        papertrial=__version__,
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        numpy=numpy.__version__,
        system=f"{platform.system()} {platform.machine()}",
        processor=_processor(),
        cores=os.cpu_count() or 1,
        threads=threads,
        workers=workers,
        device=name,
    )


def _processor() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def discard(plan: RunPlan) -> None:
    """Remove what a plan left for resuming, once its evidence is written."""
    import shutil

    shutil.rmtree(plan.folder, ignore_errors=True)
