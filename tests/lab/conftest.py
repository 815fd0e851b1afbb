"""A toy paper outside the package, as a team would add its own, and evidence made by hand."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from papertrial.lab.claim import Claim, PaperCard
from papertrial.lab.evidence import Environment, Evidence, TrialRecord

CARD = """
title = "A toy paper about adding one"
published = "2024-01"
summary = "It adds a number to another number, and says that the sum is larger than what one began with.\\n\
This summary is long enough for a card to be valid, and says nothing."
limits = "Nothing about language models can be learned from a toy like this one."
[[claim]]
statement = "The method scores more than its baseline on the toy score."
baseline = "plain"
method = "added"
metric = "score"
unit = "points"
margin = 0.5
margin_reason = "half of what is added, so noise cannot do it"
paper_figure = "unknown"
"""

EXPERIMENT = """
import os, time
from papertrial.lab.trial import Trial

SCALES = {
    "smoke": {"seeds": 1, "add": 1.0},
    "small": {"seeds": 4, "add": 1.0},
    "gpu": {"seeds": 3, "add": 2.0},
}

def run(trial: Trial) -> dict[str, dict[str, float]]:
    noise = float(trial.numpy_generator("noise").normal()) * 0.01
    for step in trial.track(range(5), "adding"):
        trial.log("loss", "plain", step, 5.0 - step)
        trial.log("loss", "added", step, 4.0 - step)
    while trial.seed > 0 and os.path.exists(os.environ.get("TOY_HOLD", "")):
        time.sleep(0.02)
    if "TOY_LOG" in os.environ:
        with open(os.environ["TOY_LOG"], "a") as file:
            file.write(f"{trial.seed}\\n")
    mode = os.environ.get("TOY_MODE", "")
    if mode == "die" and trial.seed == 2:
        os.kill(os.getpid(), 9)
    trial.require(mode != "weak", "the base model reaches 10 % where 90 % are needed")
    trial.figure("sums", caption="What was added.", kind="bar", x=["a", "b"], series={"added": [1, 2]})
    trial.example("one sum", "1 + 1", {"plain": "1 <b>&", "added": "2"})
    trial.note("noise", noise)
    result = {"plain": {"score": noise}, "added": {"score": noise + trial["add"]}, "control": {"score": 0.2}}
    if mode == "nan":
        result["added"]["score"] = float("nan")
    if mode == "arm":
        del result["added"]
    if mode == "metric":
        result["added"] = {"other": 1.0}
    return result
"""


@pytest.fixture
def toy_papers(tmp_path: Path) -> Path:
    """A folder for PAPERTRIAL_PAPERS that holds one toy paper on trial."""
    folder = tmp_path / "papers" / "decoding" / "toy"
    folder.mkdir(parents=True)
    (folder / "paper.toml").write_text(CARD)
    (folder / "experiment.py").write_text(EXPERIMENT)
    (folder / "method.py").write_text('"""The method."""\n')
    (folder / "__init__.py").write_text("")
    return tmp_path / "papers"


@pytest.fixture
def toy(toy_papers: Path, monkeypatch) -> PaperCard:
    """The toy paper, importable in this process."""
    import sys

    import papertrial.papers
    from papertrial.lab.claim import read_card

    monkeypatch.setenv("PAPERTRIAL_PAPERS", str(toy_papers))
    monkeypatch.setattr(papertrial.papers, "__path__", [*papertrial.papers.__path__, str(toy_papers)])
    yield read_card(toy_papers / "decoding" / "toy")
    for name in [name for name in sys.modules if name.startswith("papertrial.papers.decoding.toy")]:
        del sys.modules[name]


@pytest.fixture
def environment() -> Environment:
    return Environment(
        papertrial="0",
        python="3.11",
        torch="2",
        transformers="5",
        numpy="2",
        system="Linux",
        processor="one",
        cores=2,
        threads=1,
        device="cpu",
    )


@pytest.fixture
def claim() -> Claim:
    return Claim(
        statement="The method is better than the baseline on the score.",
        baseline="plain",
        method="added",
        metric="score",
        unit="points",
        margin=1.0,
        margin_reason="smaller effects do not matter",
        paper_figure="unknown",
    )


@pytest.fixture
def make_evidence(environment):
    """Build evidence from ``{arm: values per seed}`` of the metric ``score``."""

    def make(arms: dict[str, list[float]], *, scale: str = "small", undecided: str | None = None) -> Evidence:
        seeds = range(len(next(iter(arms.values()))))
        trials = [
            TrialRecord(
                seed=i,
                metrics={arm: {"score": values[i]} for arm, values in arms.items()},
                wall_seconds=1,
                cpu_seconds=1,
                peak_memory_mb=1,
                started=datetime(2026, 1, 1, tzinfo=UTC),
                undecided=undecided if i == 0 else None,
            )
            for i in seeds
        ]
        return Evidence(
            slug="toy",
            scale=scale,
            parameters={},
            seeds=list(seeds),
            trials=trials,
            environment=environment,
            paper_digest="x",
            recorded=datetime(2026, 1, 1, tzinfo=UTC),
        )

    return make
