"""What a method that changes a checkpoint gives back; ``papertrial apply`` writes it down."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Changed:
    """A changed model, and what a reader of its card needs to know.

    Attributes
    ----------
    model : saves as an ordinary checkpoint.
    summary : what was done to it, one or two sentences.
    facts : figures of the change by name, for the card.
    """

    model: "PreTrainedModel"
    summary: str
    facts: Mapping[str, str | float] = field(default_factory=dict)
