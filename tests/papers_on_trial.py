"""A folder of papers on trial with recorded evidence of every kind, for tests of what is shown of it."""

import json
import random
from datetime import UTC, datetime
from pathlib import Path

from papertrial.lab.claim import read_card
from papertrial.lab.digests import paper_digest
from papertrial.lab.evidence import Environment, Evidence, TrialRecord, write_evidence

METHOD = '''"""Counting sheep (a method for tests).

>>> sheep = count_sheep(model, most=3)   # doctest: +SKIP
>>> sheep.total
"""


def count_sheep(model: object, most: int) -> int:
    """How many sheep there are."""
    return most
'''
EXPERIMENT = (
    'SCALES = {"smoke": {"steps": 1}, "small": {"seeds": 5, "steps": 10}}\n\n\ndef run(trial):\n    return {}\n'
)

#: slug: (family, how far the method is ahead of the baseline, spread over seeds, further lines of the claim)
PAPERS = {
    "sheep_upheld": ("decoding", 12.0, 1.0, 'margin = 5.0\ncontrols = ["shuffled"]'),
    "sheep_contradicted": ("decoding", -4.0, 1.0, "margin = 5.0"),
    "sheep_undecided": ("attention", 5.0, 3.0, "margin = 5.0"),
    "sheep_exact": ("attention", 0.0, 0.001, 'kind = "exact"\ntolerance = 0.01'),
}


def write_papers(root: Path) -> Path:
    """Write the folders and return their root, for ``PAPERTRIAL_PAPERS``."""
    for slug, (family, ahead, spread, lines) in PAPERS.items():
        folder = root / family / slug
        (folder / "evidence").mkdir(parents=True)
        (folder / "__init__.py").write_text("")
        (folder / "method.py").write_text(METHOD)
        (folder / "experiment.py").write_text(EXPERIMENT)
        word = slug.split("_")[1]
        (folder / "paper.toml").write_text(_card(word, lines))
        card = read_card(folder)
        evidence = _evidence(slug, ahead, spread)
        evidence.paper_digest = paper_digest(card, "small")
        write_evidence(folder / "evidence" / "small.json", evidence)
    return root


def _card(word: str, lines: str) -> str:
    return f"""title = "Counting sheep before sleep is {word}"
published = 2024-05-0{1 + len(word) % 9}
organisation = "Pasture & Sons"
code = "https://github.com/example/sheep"
summary = "{"Argues that a model which counts sheep before it answers dozes off later than one that does not. " * 2}"
limits = "Real sheep are out of reach of every scale here; the flock is made of random numbers."
keywords = ["sheep", "sleep"]
finding = "The flock behaves as the evidence says."

[[claim]]
statement = "A model that counts <b>sheep</b> stays awake longer than one that does not."
baseline = "no_sheep"
method = "sheep"
metric = "minutes_awake"
unit = "min"
{lines}
margin_reason = "Five minutes are what a reader of tests would notice."
paper_figure = "12.5 against 3.1"
"""


def _evidence(slug: str, ahead: float, spread: float) -> Evidence:
    draw = random.Random(slug)
    trials = []
    for seed in range(5):
        base = 30 + draw.gauss(0, 1)
        arms = {"no_sheep": base, "sheep": base + ahead + draw.gauss(0, spread), "shuffled": base + draw.gauss(0, 0.5)}
        curve = {arm: [(float(step), value * step / 10) for step in range(11)] for arm, value in arms.items()}
        figure = {
            "name": "Wakefulness by sheep", "caption": "Minutes awake after each sheep.", "kind": "line",
            "x_label": "sheep", "y_label": "minutes", "log_x": False, "log_y": False, "x": [1, 2, 3],
            "series": {"sheep": [1.0, 2.0, 3.0], "no_sheep": [1.0, 1.0, 1.0]},
        }  # fmt: skip
        trials.append(
            TrialRecord(
                seed=seed,
                metrics={arm: {"minutes_awake": value, "yawns": 60 - value} for arm, value in arms.items()},
                curves={"wakefulness": curve},
                figures=[figure] if seed == 0 else [],
                examples=[{"title": "Night", "prompt": "1, <i>2</i>", "outputs": {"sheep": "3", "no_sheep": "zzz"}}],
                wall_seconds=1.5,
                cpu_seconds=1.4,
                peak_memory_mb=80,
                started=datetime(2026, 1, 1, tzinfo=UTC),
            )
        )  # fmt: skip
    machine = {
        "papertrial": "0",
        "python": "3.11",
        "torch": "2.13",
        "transformers": "5.23",
        "numpy": "2",
        "system": "Linux",
    }
    environment = Environment(**machine, processor="a processor", cores=2, threads=1, device="cpu")
    return Evidence.model_validate_json(
        json.dumps(
            {
                "slug": slug,
                "scale": "small",
                "parameters": {"steps": 10},
                "seeds": list(range(5)),
                "trials": [trial.model_dump(mode="json") for trial in trials],
                "environment": environment.model_dump(),
                "paper_digest": "",
                "recorded": "2026-01-02T00:00:00Z",
            }
        )
    )
