"""The verdict on a claim, computed from evidence and never written by hand."""

from dataclasses import dataclass
from typing import Literal

from papertrial.lab.claim import Claim
from papertrial.lab.evidence import Evidence, TrialRecord
from papertrial.lab.statistics import Interval, t_interval

Word = Literal["upheld", "contradicted", "undecided"]
FEWEST_SEEDS = 3


@dataclass(frozen=True)
class Judgement:
    """A verdict with what it rests on; effects are signed so that plus is what the paper says."""

    claim: Claim
    scale: str
    word: Word
    reason: str
    effects: tuple[float, ...] = ()
    effect: Interval | None = None
    controls: tuple[tuple[str, Interval], ...] = ()

    @property
    def phrase(self) -> str:
        """The word, always together with its scale."""
        return f"{self.word} at {self.scale}"


def seed_effect(claim: Claim, trial: TrialRecord, against: str) -> float:
    """Effect of one seed: method minus ``against``, signed by the claim's direction, in the claim's effect unit.

    Raises
    ------
    ZeroDivisionError
        For a relative claim whose baseline value is zero.
    """
    method = trial.metrics[claim.method][claim.metric]
    other = trial.metrics[against][claim.metric]
    effect = method - other if claim.better == "higher" else other - method
    return 100 * effect / abs(other) if claim.relative else effect


def judge(claim: Claim, evidence: Evidence) -> Judgement:
    """The verdict on one claim.

    ``upheld`` when the whole 95 % interval of the paired effect lies above the margin, ``contradicted`` when it lies
    below, else ``undecided``; exact claims by their tolerance. Fewer than three seeds, a failed precondition in any
    seed, or the smoke scale are always ``undecided``.
    """

    def undecided(reason: str) -> Judgement:
        return Judgement(claim, evidence.scale, "undecided", reason)

    if evidence.scale == "smoke":
        return undecided("smoke tests the plumbing only and is never evidence")
    if not evidence.trials:
        return undecided("no trial was run")
    for trial in evidence.trials:
        if trial.undecided is not None:
            return undecided(f"seed {trial.seed}: {trial.undecided}")
        for arm in claim.arms:
            if claim.metric not in trial.metrics.get(arm, {}):
                return undecided(f"seed {trial.seed} has no {claim.metric} of arm {arm}; run it again")
    try:
        effects = tuple(seed_effect(claim, trial, claim.baseline) for trial in evidence.trials)
        controls = tuple(
            (arm, t_interval([seed_effect(claim, trial, arm) for trial in evidence.trials])) for arm in claim.controls
        )
    except ZeroDivisionError:
        return undecided("the effect is relative and a baseline value is zero")
    interval = t_interval(effects)
    word, reason = _weigh_exact(claim, effects) if claim.kind == "exact" else _weigh(claim, interval, dict(controls))
    if len(effects) < FEWEST_SEEDS:
        word, reason = "undecided", f"{len(effects)} of at least {FEWEST_SEEDS} seeds were run"
    return Judgement(claim, evidence.scale, word, reason, effects, interval, controls)


def _weigh(claim: Claim, effect: Interval, controls: dict[str, Interval]) -> tuple[Word, str]:
    against = {claim.baseline: effect, **controls}
    margin = f"the margin of {claim.threshold:g} {claim.effect_unit}".rstrip()
    below = [arm for arm, interval in against.items() if interval.high < claim.threshold]
    if below:
        return "contradicted", f"against {' and '.join(below)} the whole interval lies below {margin}"
    unclear = [arm for arm, interval in against.items() if not interval.low > claim.threshold]
    if unclear:
        return "undecided", f"against {' and '.join(unclear)} the interval does not clear {margin}"
    return "upheld", f"against {' and '.join(against)} the whole interval lies above {margin}"


def _weigh_exact(claim: Claim, effects: tuple[float, ...]) -> tuple[Word, str]:
    worst = max(abs(effect) for effect in effects)
    tolerance = claim.tolerance or 0.0
    if worst <= tolerance:
        return "upheld", f"the largest difference, {worst:.3g}, is within the tolerance of {tolerance:g}"
    return "contradicted", f"the largest difference, {worst:.3g}, exceeds the tolerance of {tolerance:g}"
