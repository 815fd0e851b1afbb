"""The effect of a claim as a small picture: a point per seed, the interval, and the margin that it has to clear.

Positions are in percent and sizes in pixels, so that the picture takes the width it is given and its text stays
legible. Colours are the page's: everything is drawn by classes of the style sheet, for the light and the dark theme.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from papertrial.lab.claim import Claim
from papertrial.lab.evidence import Evidence
from papertrial.lab.statistics import Interval, t_interval
from papertrial.lab.summary import interval_text, number
from papertrial.lab.verdict import Judgement, seed_effect


@dataclass(frozen=True)
class Scale:
    """From values to percent of the picture's width."""

    low: float
    high: float

    @classmethod
    def over(cls, values: Sequence[float]) -> "Scale":
        """A scale on which all the values lie, with some room at both ends."""
        finite = [value for value in values if math.isfinite(value)]
        low, high = min(finite), max(finite)
        room = 0.07 * (high - low) or max(1.0, abs(high)) * 0.1
        return cls(low - room, high + room)

    def __call__(self, value: float) -> str:
        """A position, kept on the picture: an infinite interval ends at its edge."""
        if math.isinf(value):
            return "0%" if value < 0 else "100%"
        share = 100 * (value - self.low) / (self.high - self.low)
        return f"{min(100.0, max(0.0, share)):.4g}%"

    def width(self, low: float, high: float) -> str:
        ends = [float(self(value).rstrip("%")) for value in (low, high)]
        return f"{max(0.0, ends[1] - ends[0]):.4g}%"

    def ticks(self) -> list[float]:
        """Three to seven round values."""
        span = self.high - self.low
        step = 10.0 ** math.floor(math.log10(span / 3))
        step *= next(factor for factor in (5, 2, 1) if span / (step * factor) >= 3)
        first = math.ceil(self.low / step)
        return [float(f"{i * step:.12g}") for i in range(first, math.floor(self.high / step) + 1)]


def _values(judgement: Judgement) -> list[float]:
    claim = judgement.claim
    bounds = [-(claim.tolerance or 0), claim.tolerance or 0] if claim.kind == "exact" else [claim.threshold]
    found = [0.0, *bounds, *judgement.effects]
    for interval in (judgement.effect, *(interval for _, interval in judgement.controls)):
        if interval is not None and claim.kind != "exact":
            found += [interval.mean, interval.low, interval.high]
    return found


def _zone(claim: Claim, scale: Scale, height: int) -> str:
    """Where an effect has to lie for the claim to be upheld, and the line at which that begins."""
    if claim.kind == "exact":
        low, high = -(claim.tolerance or 0.0), claim.tolerance or 0.0
        lines = {low, high}
    else:
        low, high = claim.threshold, math.inf
        lines = {low}
    drawn = f'<rect class="zone" x="{scale(low)}" y="0" width="{scale.width(low, high)}" height="{height}"/>'
    for value in sorted(lines):
        drawn += f'<line class="margin" x1="{scale(value)}" x2="{scale(value)}" y1="0" y2="{height}"/>'
    return drawn


def _row(scale: Scale, y: float, effects: Sequence[float], interval: Interval | None, radius: float) -> str:
    drawn = ""
    if interval is not None:
        ends = f'x1="{scale(interval.low)}" x2="{scale(interval.high)}" y1="{y}" y2="{y}"'
        drawn += f'<line class="interval" {ends} stroke-width="{2 * radius + 2:g}"/>'
    for effect in effects:
        drawn += f'<circle class="seed" cx="{scale(effect)}" cy="{y}" r="{radius:g}"/>'
    if interval is not None:
        at = scale(interval.mean)
        drawn += f'<line class="mean" x1="{at}" x2="{at}" y1="{y - radius - 4:g}" y2="{y + radius + 4:g}"/>'
    return drawn


def description(judgement: Judgement) -> str:
    """The picture in words, for those who do not see it."""
    claim = judgement.claim
    effect = interval_text(judgement.effect, claim.effect_unit)
    if claim.kind == "exact":
        return f"{len(judgement.effects)} seeds, tolerance {number(claim.tolerance)}: {judgement.phrase}"
    return f"effect {effect}, has to lie above {number(claim.threshold)}: {judgement.phrase}"


def mini(judgement: Judgement | None) -> Markup:
    """The picture for a table or a list; empty without an effect."""
    if judgement is None or judgement.effect is None:
        return Markup("")
    scale, height = Scale.over(_values(judgement)), 22
    interval = None if judgement.claim.kind == "exact" else judgement.effect
    zero = f'<line class="zero" x1="{scale(0)}" x2="{scale(0)}" y1="0" y2="{height}"/>'
    body = _zone(judgement.claim, scale, height) + zero
    body += _row(scale, height / 2, judgement.effects, interval, 2.5)
    return _picture(f"plot mini {judgement.word}", judgement, "132", height, body)


def full(judgement: Judgement, evidence: Evidence) -> Markup:
    """The picture for a paper's page: against the baseline and every control, with an axis; empty without an effect."""
    if judgement.effect is None:
        return Markup("")
    claim = judgement.claim
    rows: list[tuple[str, list[float]]] = [(claim.baseline, list(judgement.effects))]
    for arm, _ in judgement.controls:
        rows.append((arm, [seed_effect(claim, trial, arm) for trial in evidence.trials]))
    scale = Scale.over([*_values(judgement), *(effect for _, effects in rows for effect in effects)])
    step, top = 46, 20
    floor = top + step * len(rows)
    body = f'<g transform="translate(0 {top})">{_zone(claim, scale, floor - top)}</g>'
    body += f'<line class="zero" x1="{scale(0)}" x2="{scale(0)}" y1="{top}" y2="{floor}"/>'
    for place, (arm, effects) in enumerate(rows):
        y = top + step * place + 30
        role = "against" if place == 0 else "against the control"
        body += f'<text class="label" x="4" y="{y - 14}">{role} {escape(arm)}</text>'
        body += _row(scale, y, effects, None if claim.kind == "exact" else t_interval(effects), 4)
    body += f'<line class="axis" x1="0" x2="100%" y1="{floor}" y2="{floor}"/>'
    for tick in scale.ticks():
        at = scale(tick)
        body += f'<line class="axis" x1="{at}" x2="{at}" y1="{floor}" y2="{floor + 4}"/>'
        if 3 < float(at.rstrip("%")) < 97:
            body += f'<text class="tick" x="{at}" y="{floor + 17}">{number(tick)}</text>'
    body += _margin_label(claim, scale)
    return _picture(f"plot full {judgement.word}", judgement, "100%", floor + 22, body)


def _picture(kind: str, judgement: Judgement, width: str, height: int, body: str) -> Markup:
    label = escape(description(judgement))
    return Markup(f'<svg class="{kind}" role="img" aria-label="{label}" width="{width}" height="{height}">{body}</svg>')


def _margin_label(claim: Claim, scale: Scale) -> str:
    """What the dashed line is, on the side of it where there is room."""
    bound = claim.tolerance or 0.0 if claim.kind == "exact" else claim.threshold
    name = "tolerance" if claim.kind == "exact" else "margin"
    unit = f" {claim.effect_unit}" if claim.effect_unit else ""
    left = float(scale(bound).rstrip("%")) > 50
    anchor = "end" if left else "start"
    return (
        f'<text class="tick" x="{scale(bound)}" y="12" dx="{-4 if left else 4}" text-anchor="{anchor}">'
        f"{name} {number(bound)}{escape(unit)}</text>"
    )
