"""What a paper asserts, as data: the claims and the card (``paper.toml``) of a paper folder.

Importing this module is quick: no torch, no scipy.
"""

import difflib
import re
import tomllib
from datetime import date
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from papertrial.errors import PapertrialError, UsageError

FAMILIES = (
    "architecture",
    "attention",
    "compression",
    "decoding",
    "evaluation",
    "finetuning",
    "in_context",
    "interpretability",
    "multimodal",
    "optimization",
    "pretraining",
    "retrieval",
    "tokenization",
)

SCALES = ("smoke", "small", "gpu", "paper")

ArmName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_+.-]*$", max_length=48)]
MetricName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_@.-]*$", max_length=64)]


class Claim(BaseModel):
    """One assertion: the method arm against the baseline arm, on one metric.

    The effect of a seed is ``method - baseline`` (``relative = true``: in percent of the baseline's absolute value),
    signed so that plus is what the paper says. A ``no_worse`` claim ("matches", "without loss") needs the effect to lie
    above minus the margin, so that a gain counts as well. An ``exact`` claim ("lossless", "equivalent") holds while
    ``|method - baseline|`` stays within ``tolerance`` in every seed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=True)

    statement: str = Field(min_length=20, max_length=400)
    kind: Literal["effect", "no_worse", "exact"] = "effect"
    baseline: ArmName
    method: ArmName
    metric: MetricName
    unit: str = Field(max_length=40, description="unit of the metric, empty for a pure number")
    better: Literal["higher", "lower"] = Field(
        "higher", description="direction in which the paper says the method goes"
    )
    relative: bool = Field(
        False, description="judge the effect in percent of the baseline instead of the metric's unit"
    )
    margin: float = Field(0.0, ge=0, description="smallest effect (or loss) that counts, fixed before the run")
    margin_reason: str = Field(min_length=10, max_length=300, description="why that margin (or that tolerance)")
    tolerance: float | None = Field(None, ge=0, description="exact claims only")
    controls: tuple[ArmName, ...] = Field(
        (), description="further arms that the method must beat by the margin as well"
    )
    paper_figure: str = Field(
        min_length=1, max_length=300, description="the figure as the paper gives it, or 'unknown'"
    )

    @model_validator(mode="after")
    def _consistent(self) -> "Claim":
        if self.baseline == self.method:
            raise ValueError(f"baseline and method are the same arm {self.method!r}")
        if self.kind == "exact" and self.tolerance is None:
            raise ValueError("an exact claim needs a tolerance")
        if self.kind != "exact" and self.tolerance is not None:
            raise ValueError("tolerance belongs to exact claims only")
        if self.kind == "exact" and (self.margin or self.controls or self.relative):
            raise ValueError("margin, controls and relative do not belong to exact claims")
        if self.kind == "no_worse" and not self.margin:
            raise ValueError("a no_worse claim needs a margin: the largest loss that does not count")
        return self

    @property
    def arms(self) -> tuple[str, ...]:
        """Every arm that a trial must return for this claim."""
        return (self.baseline, self.method, *self.controls)

    @property
    def threshold(self) -> float:
        """What the whole interval of the effect must lie above."""
        return -self.margin if self.kind == "no_worse" else self.margin

    @property
    def effect_unit(self) -> str:
        """Per cent of the baseline, or the metric's unit; a difference of percentages is in points."""
        if self.relative:
            return "%"
        return "points" if self.unit == "%" else self.unit


class PaperCard(BaseModel):
    """``paper.toml``: everything about a paper that is data and not code. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=True)

    slug: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    family: str
    folder: Path
    title: str = Field(min_length=5, max_length=300)
    arxiv: str | None = Field(None, pattern=r"^\d{4}\.\d{4,5}$")
    published: date | str = Field(description="date, or 'YYYY-MM' where only the month is known")
    authors: int | None = Field(None, ge=1, description="how many authors, where known")
    organisation: str | None = None
    code: str | None = Field(None, pattern=r"^https://", description="official code, if any")
    summary: str = Field(min_length=120, max_length=900, description="our own words, 2-4 sentences")
    limits: str = Field(min_length=30, max_length=900, description="what the scales here cannot test")
    keywords: tuple[str, ...] = Field((), max_length=10)
    finding: str | None = Field(None, max_length=900, description="our reading of the evidence, once there is any")
    claim: tuple[Claim, ...] = Field(min_length=1, description="the first is the headline")

    @model_validator(mode="after")
    def _known_family(self) -> "PaperCard":
        if self.family not in FAMILIES:
            raise ValueError(f"unknown family {self.family!r}; known: {', '.join(FAMILIES)}")
        if isinstance(self.published, str) and not re.fullmatch(r"\d{4}-(0[1-9]|1[0-2])", self.published):
            raise ValueError(f"published is {self.published!r}; write a date, or 'YYYY-MM'")
        return self

    @property
    def headline(self) -> Claim:
        return self.claim[0]

    @property
    def on_trial(self) -> bool:
        """Whether the folder has a method and an experiment, not only its card."""
        return (self.folder / "experiment.py").is_file()

    @property
    def module(self) -> str:
        """Dotted name of the paper's package."""
        return f"papertrial.papers.{self.family}.{self.slug}"

    @property
    def year(self) -> int:
        return self.published.year if isinstance(self.published, date) else int(self.published[:4])


def papers_folders() -> list[Path]:
    """The folders that hold one folder per family, one per paper in it: ours, and the user's if any."""
    import papertrial.papers

    return [Path(path) for path in papertrial.papers.__path__]


def read_card(folder: Path) -> PaperCard:
    """Read and validate one paper folder's ``paper.toml``.

    Raises
    ------
    UsageError
        Naming the file and every field that is wrong.
    """
    path = folder / "paper.toml"
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{folder} is not a paper folder: it has no paper.toml") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not valid TOML: {error}") from None
    try:
        return PaperCard(slug=folder.name, family=folder.parent.name, folder=folder, **data)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'card'}: {e['msg']}" for e in error.errors())
        raise UsageError(f"{path}: {problems}") from None


def paper_folders() -> list[Path]:
    """Every paper folder, sorted by slug."""
    found = [toml.parent for folder in papers_folders() for toml in folder.glob("*/*/paper.toml")]
    return sorted(found, key=lambda folder: folder.name)


def read_cards() -> list[PaperCard]:
    """The cards of all papers in scope, sorted by slug; one that cannot be read is an error."""
    return [read_card(folder) for folder in paper_folders()]


def readable_cards() -> tuple[list[PaperCard], dict[str, str]]:
    """The cards that can be read, sorted by slug, and of every other folder what is wrong with its card, by slug."""
    cards: list[PaperCard] = []
    wrong: dict[str, str] = {}
    for folder in paper_folders():
        try:
            cards.append(read_card(folder))
        except PapertrialError as error:
            wrong[folder.name] = str(error)
    return cards, wrong


def find_card(slug: str) -> PaperCard:
    """The card of one paper by slug or arXiv id; an unknown one is an error that suggests the nearest."""
    folders = {folder.name: folder for folder in paper_folders()}
    if slug in folders:
        return read_card(folders[slug])
    if re.fullmatch(r"(arxiv:)?\d{4}\.\d{4,5}(v\d+)?", slug, re.IGNORECASE):
        wanted = re.sub(r"^arxiv:|v\d+$", "", slug, flags=re.IGNORECASE)
        for card in readable_cards()[0]:
            if card.arxiv == wanted:
                return card
        raise UsageError(f"no paper in scope has the arXiv id {wanted}; `papertrial list` shows them all")
    near = difflib.get_close_matches(slug.lower().replace("-", "_"), folders, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "`papertrial list` shows them all"
    raise UsageError(f"unknown paper {slug!r}; {hint}")
