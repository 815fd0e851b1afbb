"""Teacher-forced scores: token log-probabilities, perplexity, bits per byte, multiple choice.

Everything is computed from float32 log-softmax, ignores padding on either side, and never holds more than a fixed
number of logits, so that a vocabulary of 150,000 and a long text fit into memory. A token is scored when it and the
token before it are real: the first token of a sequence has no context and is never scored (give it a
beginning-of-sequence token).
"""

from papertrial.lm.scoring.choices import choice_scores, continuation_scores, label_log_probs
from papertrial.lm.scoring.sequences import bits_per_byte, perplexity, sequence_nll, text_bits, windows
from papertrial.lm.scoring.tokens import LOGITS_AT_ONCE, TokenScores, score_tokens, scored_positions, token_log_probs

__all__ = [
    "LOGITS_AT_ONCE",
    "TokenScores",
    "bits_per_byte",
    "choice_scores",
    "continuation_scores",
    "label_log_probs",
    "perplexity",
    "score_tokens",
    "scored_positions",
    "sequence_nll",
    "text_bits",
    "token_log_probs",
    "windows",
]
