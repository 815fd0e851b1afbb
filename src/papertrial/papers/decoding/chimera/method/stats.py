"""What speculative decoding did, counted, and what it would cost elsewhere."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class SpecStats:
    """Counts of one call of :func:`speculative_generate`.

    Attributes
    ----------
    rounds
        (B,) verification passes of the base model that each row took part in; the pass over the prompt, which gives the
        first token, is not among them.
    emitted
        (B,) new tokens of each row.
    reached, accepted
        (depth,) how often verification came to look for a draft token at each depth, and found it.
    base_forwards, draft_forwards
        Passes of the base model (prompt included) and of the draft (one per depth of the tree) over the whole batch.
    draft_seconds, verify_seconds
        Wall time spent on drafting, and on verification passes and bookkeeping.
    """

    rounds: Tensor
    emitted: Tensor
    reached: Tensor
    accepted: Tensor
    base_forwards: int
    draft_forwards: int
    draft_seconds: float
    verify_seconds: float

    @property
    def tokens_per_forward(self) -> float:
        """tau: new tokens per verification pass, those behind the first token of each row; 1 is no gain.

        Drafts accepted beyond the length limit or an end token are not counted.
        """
        rounds = int(self.rounds.sum())
        return (int(self.emitted.sum()) - len(self.emitted)) / rounds if rounds else float("nan")

    @property
    def acceptance(self) -> list[float]:
        """How often a draft at each depth was right where its parent was."""
        return [int(a) / int(r) if r else float("nan") for a, r in zip(self.accepted, self.reached, strict=True)]


def modelled_speedup(tokens_per_forward: float, *, draft_calls: int, draft_cost: float, tree_cost: float) -> float:
    """Speed-up over decoding token by token: ``tau / (1 + draft_calls * draft_cost + tree_cost)``.

    Parameters
    ----------
    draft_calls
        Draft passes per round, the depth of the tree.
    draft_cost
        Time of one of them, in units of the base model's pass over one token.
    tree_cost
        What the pass over the tree takes longer than one over one token, in the same unit.
    """
    if draft_calls < 0 or draft_cost < 0 or tree_cost < -1:
        raise ValueError(f"costs must not be negative, got {draft_calls}, {draft_cost} and {tree_cost}")
    return tokens_per_forward / (1.0 + draft_calls * draft_cost + tree_cost)
