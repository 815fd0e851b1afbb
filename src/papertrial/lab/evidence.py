"""Evidence: the recorded trials of a paper at a scale, with their environment. Plain JSON, validated on read."""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from papertrial.errors import PapertrialError
from papertrial.home import home
from papertrial.lab.claim import PaperCard

SCHEMA_VERSION = 1
Curves = dict[str, dict[str, list[tuple[float, float]]]]


class TrialRecord(BaseModel):
    """One finished seed: what every arm scored, or why the set-up could not test the claim."""

    model_config = ConfigDict(extra="forbid")

    seed: int = Field(ge=0)
    metrics: dict[str, dict[str, float]] = {}
    undecided: str | None = None
    curves: Curves = {}
    figures: list[dict[str, Any]] = []
    examples: list[dict[str, Any]] = []
    notes: dict[str, str | float] = {}
    models: dict[str, str] = Field({}, description="checkpoints that the trial loaded, name -> digest")
    wall_seconds: float = Field(ge=0)
    cpu_seconds: float = Field(ge=0)
    peak_memory_mb: float = Field(ge=0)
    device_memory_mb: float | None = None
    started: datetime
    substrate: dict[str, str] = Field({}, description="shared modules that the run imported, path -> digest")

    @field_validator("metrics")
    @classmethod
    def _finite(cls, metrics: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
        for arm, values in metrics.items():
            for name, value in values.items():
                if not math.isfinite(value):
                    raise ValueError(f"arm {arm!r}, metric {name!r} is {value}")
        return metrics


class Environment(BaseModel):
    """Where the trials ran: enough to say why two recordings differ."""

    model_config = ConfigDict(extra="forbid")

    papertrial: str
    python: str
    torch: str
    transformers: str
    numpy: str
    system: str
    processor: str
    cores: int
    threads: int
    workers: int = Field(1, description="seeds that ran side by side, each with its own threads")
    device: str


class Evidence(BaseModel):
    """The trials of one paper at one scale."""

    model_config = ConfigDict(extra="forbid")

    schema_version: int = SCHEMA_VERSION
    slug: str
    scale: str
    model: str | None = Field(None, description="the user's --model, or None for the experiment's own")
    parameters: dict[str, Any]
    seeds: list[int]
    trials: list[TrialRecord]
    environment: Environment
    paper_digest: str
    recorded: datetime

    @property
    def wall_seconds(self) -> float:
        return math.fsum(t.wall_seconds for t in self.trials)

    @property
    def cpu_seconds(self) -> float:
        return math.fsum(t.cpu_seconds for t in self.trials)

    @property
    def peak_memory_mb(self) -> float:
        return max((t.peak_memory_mb for t in self.trials), default=0.0)

    @property
    def arms(self) -> list[str]:
        """Arms in the order the experiment returned them."""
        names: dict[str, None] = {}
        for trial in self.trials:
            names.update(dict.fromkeys(trial.metrics))
        return list(names)

    @property
    def metrics(self) -> list[str]:
        names: dict[str, None] = {}
        for trial in self.trials:
            for values in trial.metrics.values():
                names.update(dict.fromkeys(values))
        return list(names)

    def values(self, arm: str, metric: str) -> list[float]:
        """The metric of an arm, per seed, where it was measured."""
        return [t.metrics[arm][metric] for t in self.trials if metric in t.metrics.get(arm, {})]


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old or the new content, never a part; survives kill -9 at any moment.

    Raises
    ------
    PapertrialError
        When the disk is full or the folder cannot be written; what stood there before is untouched.
    """
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.fchmod(descriptor, 0o644)  # mkstemp's are for the owner alone
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise PapertrialError(
            f"cannot write {path}: {error.strerror or error}; nothing recorded before was lost"
        ) from None


def write_evidence(path: Path, evidence: Evidence) -> None:
    """Record evidence as JSON, a value on a line, so that a diff can be read."""
    write_atomically(path, json.dumps(evidence.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n")


def read_evidence(path: Path) -> Evidence:
    """Read evidence; a damaged file is an error that names it."""
    try:
        return Evidence.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        place = f"{'.'.join(map(str, first['loc']))}: " if first["loc"] else ""
        raise PapertrialError(f"{path} is not evidence: {place}{first['msg']}") from None
    except OSError as error:
        raise PapertrialError(f"cannot read {path}: {error.strerror}") from None


def read_all_evidence(paths: Iterable[Path]) -> tuple[list[Evidence], list[str]]:
    """Evidence of every file that can be read, and what is wrong with the others."""
    found: list[Evidence] = []
    damaged: list[str] = []
    for path in paths:
        try:
            found.append(read_evidence(path))
        except PapertrialError as error:
            damaged.append(str(error))
    return found, damaged


def reference_path(card: PaperCard, scale: str) -> Path:
    """Where the maintainers' evidence of a paper at a scale stands."""
    return card.folder / "evidence" / f"{scale}.json"


def own_path(slug: str, scale: str, model: str | None) -> Path:
    """Where the latest evidence of the user's own runs stands."""
    suffix = "" if model is None else f"@{model_in_file_name(model)}"
    return home() / "evidence" / slug / f"{scale}{suffix}.json"


def model_in_file_name(model: str) -> str:
    """A model's name as part of a file name: readable, and another one for every other model."""
    readable = "".join(c if c.isalnum() or c in "-._" else "-" for c in model)[-60:]
    return f"{readable}-{hashlib.sha256(model.encode()).hexdigest()[:8]}"


def reference_evidence(card: PaperCard) -> dict[str, Evidence]:
    """The maintainers' evidence of a paper, by scale, the largest scale last."""
    found = {}
    for scale in ("small", "gpu", "paper"):
        path = reference_path(card, scale)
        if path.is_file():
            found[scale] = read_evidence(path)
    return found
