"""A run as one HTML file: claim, verdict, arms, curves, figures, environment, how to repeat. No network."""

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from papertrial.errors import PapertrialError
from papertrial.home import home
from papertrial.lab import figures, summary
from papertrial.lab.claim import Claim, PaperCard
from papertrial.lab.evidence import Evidence, model_in_file_name, write_atomically


def repeat_command(evidence: Evidence) -> str:
    """The command that runs this evidence again."""
    parts = ["papertrial", "run", evidence.slug, "--scale", evidence.scale, "--seeds", str(len(evidence.seeds))]
    if evidence.model:
        parts += ["--model", evidence.model]
    return " ".join(parts)


def drawings(card: PaperCard, evidence: Evidence, width: float = figures.WIDE) -> dict[str, Any]:
    """Every picture of a run as SVG text: ``arms`` by metric, ``curves`` by name, ``figures`` with their captions.

    Figures that a trial kept are the first seed's; curves and arms show every seed.
    """
    judged: dict[str, Claim] = {}
    for claim in card.claim:
        judged.setdefault(claim.metric, claim)  # of claims on one metric the first is drawn
    palette = figures.colours(evidence.arms)
    curves: dict[str, None] = {}
    for trial in evidence.trials:
        curves.update(dict.fromkeys(trial.curves))
    measured = {m: c for m, c in judged.items() if evidence.arms and any(evidence.values(a, m) for a in evidence.arms)}
    return {
        "arms": {metric: figures.draw_arms(evidence, claim, width) for metric, claim in measured.items()},
        "curves": {curve: figures.draw_curves(evidence, curve, width) for curve in curves},
        "figures": [
            {
                "name": data["name"],
                "caption": data["caption"],
                "svg": figures.draw(data, _palette(data, palette), width),
            }
            for data in (evidence.trials[0].figures if evidence.trials else [])
        ],
    }


def _palette(data: Mapping[str, Any], palette: Mapping[str, str]) -> dict[str, str]:
    return {label: palette[label] for label in data["series"] if label in palette}


def render(card: PaperCard, evidence: Evidence) -> str:
    """The report as a self-contained HTML document."""
    from jinja2 import Environment, select_autoescape

    environment = Environment(
        autoescape=select_autoescape(default=True, default_for_string=True), trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = summary.number
    source = resources.files("papertrial.lab").joinpath("templates/report.html.j2").read_text(encoding="utf-8")
    judged = summary.judgements(card, evidence)
    claimed = {claim.metric for claim in card.claim}
    tables = {metric: summary.arm_rows(card, evidence, metric) for metric in evidence.metrics}
    return environment.from_string(source).render(
        card=card,
        evidence=evidence,
        judgements=judged,
        headline=judged[0],
        interval=summary.interval_text,
        claimed={m: rows for m, rows in tables.items() if m in claimed},
        others={m: rows for m, rows in tables.items() if m not in claimed},
        units={claim.metric: claim.unit for claim in card.claim},
        drawings=drawings(card, evidence),
        command=repeat_command(evidence),
    )


def write_report(card: PaperCard, evidence: Evidence, path: Path | None = None) -> Path:
    """Write the report and return where it stands (default: the ``reports`` folder of the home folder)."""
    model = "" if evidence.model is None else f"-{model_in_file_name(evidence.model)}"
    target = path or home() / "reports" / f"{evidence.slug}-{evidence.scale}{model}.html"
    if target.is_dir():
        raise PapertrialError(f"{target} is a folder; name a file for the report")
    write_atomically(target, render(card, evidence))
    return target
