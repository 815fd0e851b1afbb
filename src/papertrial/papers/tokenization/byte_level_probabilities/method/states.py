"""Where texts stand between two bytes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from papertrial.papers.tokenization.byte_level_probabilities.method.covers import Row
from papertrial.papers.tokenization.byte_level_probabilities.method.prefixes import Prefixes


@dataclass(frozen=True, eq=False)
class ByteState:
    """Where one or several texts stand. Never changed: advancing makes a new one, and old ones can be branched from.

    Attributes
    ----------
    rows : a text each.
    single : whether it was started from one text and not from a list.
    prefixes : what the model was last run on; ``owners`` says for each of its rows which text it belongs to.
    """

    rows: tuple[Row, ...]
    single: bool
    prefixes: Prefixes
    owners: tuple[int, ...]

    @property
    def texts(self) -> list[bytes]:
        """The texts so far, each with the blank that its encoder put before it."""
        return [row.data for row in self.rows]


def check_possible(rows: Sequence[Row]) -> None:
    """Raise ValueError if a text cannot be."""
    for row in rows:
        if row.log_mass == -math.inf:
            raise ValueError(
                f"the text ending in {row.data[-12:]!r} has probability zero under this model and tokenizer: no valid "
                "token sequence spells it"
            )
