"""Evidence in short: the rows that the command line, the report and the service all show, and the same as JSON."""

import math
from dataclasses import dataclass
from typing import Any

from papertrial.lab.claim import PaperCard
from papertrial.lab.evidence import Evidence
from papertrial.lab.statistics import Interval, t_interval
from papertrial.lab.verdict import Judgement, judge


@dataclass(frozen=True)
class ArmRow:
    """One arm's metric over seeds. ``role`` is baseline, method or control of the headline claim, or empty."""

    arm: str
    role: str
    metric: str
    interval: Interval
    values: tuple[float, ...]


def arm_rows(card: PaperCard, evidence: Evidence, metric: str) -> list[ArmRow]:
    """Every arm that has the metric, the claimed pair first, then controls, then the rest."""
    claim = next((c for c in card.claim if c.metric == metric), card.headline)
    roles = {claim.baseline: "baseline", claim.method: "method"} | dict.fromkeys(claim.controls, "control")
    order = ["baseline", "method", "control", ""]
    rows = [
        ArmRow(arm, roles.get(arm, ""), metric, t_interval(values), tuple(values))
        for arm in evidence.arms
        if (values := evidence.values(arm, metric))
    ]
    return sorted(rows, key=lambda row: order.index(row.role))


def judgements(card: PaperCard, evidence: Evidence) -> list[Judgement]:
    return [judge(claim, evidence) for claim in card.claim]


def number(value: float | None, digits: int = 4) -> str:
    """A figure as people read it: four significant digits, no needless exponent."""
    if value is None or math.isnan(value):
        return "-"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    size = abs(value)
    if value == 0 or 1e-3 <= size < 1e5:
        decimals = max(0, digits - 1 - math.floor(math.log10(size))) if value else 0
        text = f"{value:,.{min(decimals, 6)}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    return f"{value:.3g}"


def interval_text(interval: Interval | None, unit: str = "") -> str:
    """``+12.3 [8.1, 16.5] %``; a single seed has no interval."""
    if interval is None:
        return "-"
    space = f" {unit}" if unit else ""
    if math.isinf(interval.low):
        return f"{interval.mean:+.4g}{space} (one seed, no interval)"
    return f"{interval.mean:+.4g} [{interval.low:+.4g}, {interval.high:+.4g}]{space}"


def as_json(card: PaperCard, evidence: Evidence, *, full: bool = False) -> dict[str, Any]:
    """Evidence and verdicts as JSON; ``full`` adds curves and figures."""
    skipped = set() if full else {"curves", "figures", "substrate"}
    return {
        "slug": card.slug,
        "title": card.title,
        "arxiv": card.arxiv,
        "scale": evidence.scale,
        "model": evidence.model,
        "recorded": evidence.recorded.isoformat(),
        "claims": [judgement_json(j) for j in judgements(card, evidence)],
        "arms": {
            row.arm: {
                m: {
                    "mean": r.interval.mean,
                    "low": _finite(r.interval.low),
                    "high": _finite(r.interval.high),
                    "values": r.values,
                }
                for m in evidence.metrics
                for r in arm_rows(card, evidence, m)
                if r.arm == row.arm
            }
            for metric in evidence.metrics
            for row in arm_rows(card, evidence, metric)
        },
        "wall_seconds": evidence.wall_seconds,
        "cpu_seconds": evidence.cpu_seconds,
        "peak_memory_mb": evidence.peak_memory_mb,
        "environment": evidence.environment.model_dump(),
        "parameters": evidence.parameters,
        "trials": [t.model_dump(mode="json", exclude=skipped) for t in evidence.trials],
    }


def judgement_json(judgement: Judgement) -> dict[str, Any]:
    effect = judgement.effect
    return {
        **judgement.claim.model_dump(),
        "scale": judgement.scale,
        "verdict": judgement.word,
        "reason": judgement.reason,
        "effects": list(judgement.effects),
        "effect": None
        if effect is None
        else {"mean": effect.mean, "low": _finite(effect.low), "high": _finite(effect.high)},
        "effect_unit": judgement.claim.effect_unit,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
