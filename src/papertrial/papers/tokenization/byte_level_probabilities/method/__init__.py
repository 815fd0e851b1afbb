"""Exact byte-level probabilities of tokenized language models (arXiv 2410.09303), without training.

``validity`` says which token sequences an encoder can produce, ``covers`` which of them cover a text, ``byte_lm`` sums
over them, incrementally; ``sampling`` draws bytes from one model or from several averaged; ``infilling`` makes prompts
for gaps; ``baselines`` are what one does without.
"""

from papertrial.papers.tokenization.byte_level_probabilities.method.baselines import (
    HealedPrompt,
    HealingProcessor,
    encode_prompt,
    healed_next_byte,
    plain_next_byte,
    token_healing,
)
from papertrial.papers.tokenization.byte_level_probabilities.method.byte_lm import ByteLevelLM, ByteState
from papertrial.papers.tokenization.byte_level_probabilities.method.covers import END, Cover
from papertrial.papers.tokenization.byte_level_probabilities.method.infilling import FillTokens, infilling_prompt
from papertrial.papers.tokenization.byte_level_probabilities.method.sampling import ByteEnsemble, ByteProcess
from papertrial.papers.tokenization.byte_level_probabilities.method.validity import Validity

__all__ = [
    "END",
    "ByteEnsemble",
    "ByteLevelLM",
    "ByteProcess",
    "ByteState",
    "Cover",
    "FillTokens",
    "HealedPrompt",
    "HealingProcessor",
    "Validity",
    "encode_prompt",
    "healed_next_byte",
    "infilling_prompt",
    "plain_next_byte",
    "token_healing",
]
