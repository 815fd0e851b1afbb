"""Training runs as paths of reward against divergence, and what may be read off them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from papertrial.lm.preferences import at_matched

Record = dict[str, float]


@dataclass(frozen=True)
class Setting:
    """How an arm is trained, and its checkpoints: at step ``first`` and every ``every`` steps from there."""

    objective: str
    beta: float
    lr: float
    steps: int
    first: int
    every: int

    def __str__(self) -> str:
        return f"{self.objective}, beta {self.beta}, lr {self.lr}"

    def checkpoint(self, step: int) -> bool:
        """Whether the run is measured after this many steps."""
        return step == self.steps or (step >= self.first and (step - self.first) % self.every == 0)


@dataclass
class Path:
    """One training run, and what it measured at its checkpoints on either set of prompts."""

    setting: Setting
    records: dict[str, list[Record]] = field(default_factory=lambda: {"valid": [], "test": []})
    policy: PreTrainedModel | None = None

    def passed(self, level: float) -> bool:
        """Whether the run has reached a reward on both sets of prompts."""
        return all(any(record["reward"] >= level for record in records) for records in self.records.values())

    def matched(self, levels: Sequence[float], prompts: str) -> Record | None:
        """Means over the moments at which the run first reached each reward; None if it missed one."""
        return _matched(self.records[prompts], levels)

    def cost(self, levels: Sequence[float]) -> float:
        """What the setting is chosen by: divergence at the matched rewards on the validation prompts."""
        record = self.matched(levels, "valid")
        return torch.inf if record is None else record["reverse_kl"]

    def add(self, found: Mapping[str, Record]) -> None:
        """One checkpoint, measured on each set of prompts."""
        for name, record in found.items():
            self.records[name].append(record)

    def jump_to(self, found: Mapping[str, Record]) -> float:
        """How far the divergence of a checkpoint to be added lies from that of the last one, nats."""
        return max(
            (_jump(self.records[name][-1], record) for name, record in found.items() if self.records[name]), default=0.0
        )

    def largest_jump(self, levels: Sequence[float], prompts: str) -> float:
        """The most that the divergence changed over steps that were not looked at before the last level was read, nats.

        A run that falls apart between two checkpoints may have passed a level unseen and reach it again much later and
        at a much higher price. What shows it is the jump of the divergence; the reward may be alike on either side.
        Nothing lies between two successive steps, so that theirs does not count.
        """
        largest, before = 0.0, None
        for record in self.records[prompts]:
            if before is not None and record["step"] > before["step"] + 1:
                largest = max(largest, _jump(before, record))
            if record["reward"] >= max(levels):
                break
            before = record
        return largest

    def grid_error(self, levels: Sequence[float], prompts: str) -> float | None:
        """By how many percent the divergence at the levels moves when every second checkpoint is left out.

        None where a level is missed, with all of them or with half.
        """
        full, half = (_matched(self.records[prompts][::stride], levels) for stride in (1, 2))
        if full is None or half is None:
            return None
        return 100 * abs(half["reverse_kl"] / full["reverse_kl"] - 1)


def _jump(one: Record, other: Record) -> float:
    return abs(one["reverse_kl"] - other["reverse_kl"])


def _matched(records: Sequence[Record], levels: Sequence[float]) -> Record | None:
    found = [at_matched(records, level) for level in levels]
    reached = [record for record in found if record is not None]
    if len(reached) < len(levels):
        return None
    return {name: sum(record[name] for record in reached) / len(levels) for name in reached[0]}
