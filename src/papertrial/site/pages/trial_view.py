"""What the page of a paper shows of its trial: claims beside evidence, arms, figures, how to repeat it."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from markupsafe import Markup

from papertrial.lab import figures as lab_figures
from papertrial.lab.claim import Claim
from papertrial.lab.evidence import Evidence
from papertrial.lab.report import repeat_command
from papertrial.lab.summary import ArmRow, arm_rows
from papertrial.lab.verdict import Judgement, judge
from papertrial.site.board import Entry
from papertrial.site.pages import effect_plot
from papertrial.site.pages.method_example import example, given_names


@dataclass(frozen=True)
class ClaimView:
    """One claim, and what was found about it if anything was."""

    claim: Claim
    judgement: Judgement | None
    plot: Markup
    mini: Markup


@dataclass(frozen=True)
class Picture:
    """A figure that is served as a file of its own; width and height in pixels keep its place on the page."""

    address: str
    height: int
    caption: str
    alt: str
    width: int = round(72 * lab_figures.WIDE)
    narrow_width: int = round(72 * lab_figures.NARROW)

    @property
    def narrow_address(self) -> str:
        """The same figure for phones."""
        return self.address.removesuffix(".svg") + "-narrow.svg"


@dataclass(frozen=True)
class MetricView:
    """Every arm's values of one metric, with their picture where a claim is about the metric."""

    metric: str
    unit: str
    rows: Sequence[ArmRow]
    picture: Picture | None


@dataclass(frozen=True)
class TrialView:
    """A paper's trial, ready to be shown.

    Attributes
    ----------
    scales : the headline verdict at each recorded scale, largest first.
    command : runs the trial (again); None for a paper that is not on trial.
    given : names in the example that its reader brings along.
    """

    entry: Entry
    claims: Sequence[ClaimView]
    evidence: Evidence | None
    scales: Sequence[Judgement]
    claimed: Sequence[MetricView]
    others: Sequence[MetricView]
    figures: Sequence[Picture]
    command: str | None
    example: str | None
    given: Sequence[str]


def trial_view(entry: Entry, scale: str | None = None) -> TrialView:
    """The trial of one paper, from its evidence at one of the recorded scales; None is the largest.

    Raises
    ------
    KeyError
        Nothing was recorded at that scale.
    """
    card, recorded = entry.card, entry.standing.evidence
    judgements: Sequence[Judgement | None] = entry.judgements or [None] * len(card.claim)
    evidence = list(recorded.values())[-1] if recorded else None
    if scale is not None:
        evidence = recorded[scale]
        judgements = [judge(claim, evidence) for claim in card.claim]
    claims = [
        ClaimView(
            claim,
            judged,
            effect_plot.full(judged, evidence) if judged and evidence else Markup(""),
            effect_plot.mini(judged),
        )
        for claim, judged in zip(card.claim, judgements, strict=True)
    ]
    claimed, others = _metrics(entry, evidence) if evidence else ([], [])
    command = repeat_command(evidence) if evidence else f"papertrial run {card.slug} --scale small"
    code = example(card)
    return TrialView(
        entry,
        claims,
        evidence,
        [judge(card.headline, recorded[name]) for name in reversed(recorded)],
        claimed,
        others,
        _figures(entry, evidence) if evidence else [],
        command if card.on_trial else None,
        code,
        given_names(code) if code else (),
    )


@lru_cache(maxsize=1024)
def figure_digest(entry: Entry, scale: str) -> str:
    """What a figure's address changes with: the evidence, the claims and the code that draws."""
    total = hashlib.sha256(Path(lab_figures.__file__).read_bytes())
    total.update(entry.standing.evidence[scale].model_dump_json().encode())
    for claim in entry.card.claim:
        total.update(claim.model_dump_json().encode())
    return total.hexdigest()[:20]


def figure_folder(home: Path, entry: Entry, scale: str, digest: str) -> Path:
    """Where drawn figures are kept."""
    return home / "figures" / f"{entry.card.slug}-{scale}-{digest}"


def _address(entry: Entry, evidence: Evidence, name: str) -> str:
    return f"/figures/{entry.card.slug}/{evidence.scale}/{figure_digest(entry, evidence.scale)}/{name}.svg"


def _metrics(entry: Entry, evidence: Evidence) -> tuple[list[MetricView], list[MetricView]]:
    card = entry.card
    units = {claim.metric: claim.unit for claim in card.claim}
    claimed: list[MetricView] = []
    others: list[MetricView] = []
    # In the order of the claims, so that the headline's metric comes first.
    ordered = [metric for metric in units if metric in evidence.metrics]
    ordered += [metric for metric in evidence.metrics if metric not in units]
    for metric in ordered:
        found = arm_rows(card, evidence, metric)
        picture = None
        if metric in units:
            # The size that papertrial.lab.figures draws arms at, 72 points an inch.
            height = round(72 * (0.9 + 0.42 * len(found)))
            name = f"arms-{list(units).index(metric)}"
            alt = f"{metric} of every arm: a point per seed, the mean and its 95 % interval"
            caption = "A point is a seed, the tick the mean, the band its 95 % interval."
            picture = Picture(_address(entry, evidence, name), height, caption, alt)
        (claimed if metric in units else others).append(MetricView(metric, units.get(metric, ""), found, picture))
    return claimed, others


def _figures(entry: Entry, evidence: Evidence) -> list[Picture]:
    kept = evidence.trials[0].figures if evidence.trials else []
    seed = f" (seed {evidence.seeds[0]})" if len(evidence.seeds) > 1 else ""
    pictures = [
        Picture(_address(entry, evidence, f"figures-{place}"), 230, f"{data['caption']}{seed}", str(data["name"]))
        for place, data in enumerate(kept)
    ]
    curves = list(dict.fromkeys(name for trial in evidence.trials for name in trial.curves))
    for place, name in enumerate(curves):
        caption = f"{name}: thin lines are seeds, thick lines their mean."
        pictures.append(Picture(_address(entry, evidence, f"curves-{place}"), 230, caption, f"{name} of every arm"))
    return pictures
