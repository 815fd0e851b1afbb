"""Decoding: greedy, beam, sampling with results that do not depend on the batch, and a driver for step-wise decoders.

``model.generate`` remains the way to run a stock decoder. What it cannot do, and this package can: take a generator,
give a row the same sample in every batch, force a prefix, and report log-probabilities under the model's own
distribution.
"""

from papertrial.lm.generation.choosing import draw, truncate
from papertrial.lm.generation.decoding import Generation, LogitsFunction, beam, greedy, sample
from papertrial.lm.generation.inputs import evaluating, left_pad, position_ids
from papertrial.lm.generation.stepping import StepDecoder

__all__ = [
    "Generation",
    "LogitsFunction",
    "StepDecoder",
    "beam",
    "draw",
    "evaluating",
    "greedy",
    "left_pad",
    "position_ids",
    "sample",
    "truncate",
]
