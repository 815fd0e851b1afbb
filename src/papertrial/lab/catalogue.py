"""The state of every paper in scope: is its folder complete, and is its evidence still that of the code?"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from papertrial.errors import PapertrialError
from papertrial.lab.claim import PaperCard
from papertrial.lab.digests import PACKAGE, changed_modules, paper_digest, read_scales
from papertrial.lab.evidence import Evidence, reference_evidence
from papertrial.lab.verdict import Judgement, judge

State = Literal["not yet on trial", "incomplete", "stale", "aged", "fresh"]


@dataclass(frozen=True)
class Standing:
    """Where a paper stands, and what is wrong if anything is."""

    card: PaperCard
    state: State
    problems: tuple[str, ...]
    evidence: dict[str, Evidence]

    @property
    def judgements(self) -> list[Judgement]:
        """Verdicts on every claim from the evidence at the largest scale recorded."""
        if not self.evidence:
            return []
        largest = list(self.evidence.values())[-1]
        return [judge(claim, largest) for claim in self.card.claim]


def standing(card: PaperCard) -> Standing:
    """Look at one paper's folder and evidence; reads files only, imports none of its code."""
    if not card.on_trial:
        return Standing(card, "not yet on trial", (), {})
    try:
        evidence = reference_evidence(card)
        scales = read_scales(card)
    except PapertrialError as error:
        return Standing(card, "incomplete", (str(error),), {})
    missing = [f"no {part}" for part in _missing(card.folder)]
    missing += [f"SCALES has no {scale}" for scale in ("smoke", "small") if scale not in scales]
    if "small" not in evidence:
        missing.append("no evidence at small")
    if missing:
        return Standing(card, "incomplete", tuple(missing), evidence)
    stale = [scale for scale, e in evidence.items() if e.paper_digest != paper_digest(card, scale)]
    if stale:
        problems = tuple(f"evidence at {scale} is stale: code, claims or parameters changed since" for scale in stale)
        return Standing(card, "stale", problems, evidence)
    changed = {name for e in evidence.values() for name in changed_modules(_substrate(e))}
    changed |= {name for e in evidence.values() for name in _changed_models(e)}
    if changed:
        return Standing(card, "aged", (f"changed since: {', '.join(sorted(changed))}",), evidence)
    return Standing(card, "fresh", (), evidence)


def _missing(folder: Path) -> list[str]:
    wanted = {"method.py or method/": ("method.py", "method/__init__.py"), "__init__.py": ("__init__.py",)}
    return [name for name, paths in wanted.items() if not any((folder / path).is_file() for path in paths)]


def _substrate(evidence: Evidence) -> dict[str, str]:
    return {name: recorded for trial in evidence.trials for name, recorded in trial.substrate.items()}


def _changed_models(evidence: Evidence) -> list[str]:
    """Shipped house models that were trained anew since."""
    from papertrial.lm.models import folder_digest

    used = {name: recorded for trial in evidence.trials for name, recorded in trial.models.items()}
    folders = {name: PACKAGE / "lm" / "house_models" / name.removeprefix("house:") for name in used}
    return [name for name, folder in folders.items() if folder.is_dir() and folder_digest(folder) != used[name]]
