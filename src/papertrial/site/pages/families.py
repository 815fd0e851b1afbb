"""The families of methods as the pages show them: one line about each, and how its papers fared."""

from collections import Counter
from dataclasses import dataclass

from papertrial.lab.claim import FAMILIES
from papertrial.site.board import Snapshot

#: The order in which verdicts are counted everywhere; ``none`` are papers without evidence yet.
WORDS = ("upheld", "contradicted", "undecided", "none")

ABOUT = {
    "architecture": "What the network is made of, and which parts it could do without.",
    "attention": "Where models look, and how to look at less or further back.",
    "compression": "The same model with fewer weights, layers or bits.",
    "decoding": "From next-token probabilities to text: search, sampling, ensembles.",
    "evaluation": "Measuring what models know, leak and get wrong.",
    "finetuning": "From a pre-trained model to one that does the task or heeds a preference.",
    "in_context": "Learning from the prompt, without a change of weights.",
    "interpretability": "Which parts inside compute what, shown by intervening.",
    "multimodal": "Text together with images, video, scenes or other signals.",
    "optimization": "The optimiser and its schedule, at equal work.",
    "pretraining": "Objectives and data of the first, long training.",
    "retrieval": "Finding the text that helps, and using it.",
    "tokenization": "Cutting text into pieces, or doing without.",
}


@dataclass(frozen=True)
class Share:
    """One part of a bar of verdicts: the word, how many, and where it lies in percent."""

    word: str
    number: int
    start: float
    width: float


@dataclass(frozen=True)
class Fared:
    """How many papers got which verdict."""

    counts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    @property
    def judged(self) -> int:
        """Papers with a verdict."""
        return self.total - self.counts["none"]

    @property
    def shares(self) -> list[Share]:
        """The parts of the bar, without the empty ones."""
        parts, start = [], 0.0
        for word, number in self.counts.items():
            if number:
                width = 100 * number / self.total
                parts.append(Share(word, number, round(start, 3), round(width, 3)))
                start += width
        return parts

    @property
    def text(self) -> str:
        """The bar in words."""
        said = [f"{n} {'without a verdict' if word == 'none' else word}" for word, n in self.counts.items() if n]
        return ", ".join(said) or "no papers"


@dataclass(frozen=True)
class Family:
    """A family with papers in scope."""

    name: str
    about: str
    fared: Fared

    @property
    def label(self) -> str:
        """As people read it."""
        return self.name.replace("_", "-")


def fared(snapshot: Snapshot, family: str | None = None) -> Fared:
    """The verdicts on headline claims, of everything in scope or of one family."""
    counts = Counter(
        entry.headline.word if entry.headline else "none"
        for entry in snapshot
        if family is None or entry.card.family == family
    )
    return Fared({word: counts.get(word, 0) for word in WORDS})


def family_of(snapshot: Snapshot, name: str) -> Family:
    """One family."""
    return Family(name, ABOUT[name], fared(snapshot, name))


def families(snapshot: Snapshot) -> list[Family]:
    """Every family that has papers."""
    return [family for family in (family_of(snapshot, name) for name in FAMILIES) if family.fared.total]
