"""What is measured on texts and on questions, with 95 % intervals over them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from papertrial.lm.anatomy import position_limit
from papertrial.lm.evaluation.data import Question, Questions, Texts
from papertrial.lm.models import Checkpoint
from papertrial.lm.scoring import choice_scores, sequence_nll

Z = 1.959963984540054
"""The 97.5 % point of the normal distribution."""

LONGEST_WINDOW = 2048


@dataclass(frozen=True)
class Result:
    """Measures by name.

    Attributes
    ----------
    kind : ``texts`` or ``questions``.
    measures : values; their names tell the unit.
    intervals : 95 % intervals of those that have one.
    counts : what they were measured on.
    """

    kind: str
    measures: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    counts: dict[str, int]


def evaluate(checkpoint: Checkpoint, data: Texts | Questions, *, batch_size: int = 8) -> Result:
    """Measure a causal checkpoint on data of either kind."""
    if isinstance(data, Questions):
        return evaluate_questions(checkpoint, data.questions, batch_size=batch_size)
    return evaluate_texts(checkpoint, data.texts, batch_size=batch_size)


def evaluate_texts(
    checkpoint: Checkpoint, texts: Sequence[str], *, window: int | None = None, batch_size: int = 8
) -> Result:
    """Perplexity per token and per word, and bits per byte, of documents.

    Every token is predicted, the first one from the beginning-of-text token. Bits per byte compare models with other
    tokenizers, perplexities do not. The interval of bits per byte is over documents (a ratio of sums, by the delta
    method) and wants at least two.

    Parameters
    ----------
    window
        Tokens of context at most; longer texts are read in windows that overlap by half. Default: the model's context,
        at most 2048.

    Raises
    ------
    ValueError
        For no text, or a tokenizer without a token that can begin a text.
    """
    if not texts or not all(texts):
        raise ValueError("texts must hold at least one text, and none that is empty")
    start = _start(checkpoint)
    window = _context(checkpoint) if window is None else window
    rows = [[start, *checkpoint.tokenizer.encode(text, add_special_tokens=False)] for text in texts]
    nats = sequence_nll(checkpoint.model, rows, window=window, stride=max(1, window // 2), batch_size=batch_size)
    sizes = torch.tensor([len(text.encode()) for text in texts], dtype=torch.float64)
    tokens = sum(len(row) - 1 for row in rows)
    words = sum(len(text.split()) for text in texts)
    bits, total = nats / math.log(2), float(nats.sum())
    rate = float(bits.sum() / sizes.sum())
    intervals = {}
    if len(texts) > 1:
        spread = float(((bits - rate * sizes) ** 2).sum() * len(texts) / (len(texts) - 1)) ** 0.5 / float(sizes.sum())
        intervals["bits_per_byte"] = (rate - Z * spread, rate + Z * spread)
    measures = {"bits_per_byte": rate, "token_perplexity": math.exp(total / tokens)}
    if words:
        measures["word_perplexity"] = math.exp(min(total / words, 700.0))
    counts = {"texts": len(texts), "tokens": tokens, "bytes": int(sizes.sum())}
    return Result("texts", measures, intervals, counts)


def evaluate_questions(checkpoint: Checkpoint, questions: Sequence[Question], *, batch_size: int = 8) -> Result:
    """Accuracy of multiple choice: the choice to which the model gives the highest likelihood after the context.

    Measured twice: by the log-likelihood itself, and divided by the bytes of the choice, which does not favour short
    ones. A blank is put between context and choice where neither has one. ``chance`` is what guessing gets. Intervals
    are Wilson's.

    Raises
    ------
    ValueError
        For no question.
    """
    if not questions:
        raise ValueError("questions must hold at least one question")
    contexts = [question.context for question in questions]
    choices = [
        [choice if _joined(question.context, choice) else f" {choice}" for choice in question.choices]
        for question in questions
    ]
    scores = choice_scores(
        checkpoint.model, checkpoint.tokenizer, contexts, choices, bos_token_id=_start(checkpoint),
        batch_size=batch_size,
    )  # fmt: skip
    right = normalised = 0
    for question, options, row in zip(questions, choices, scores, strict=True):
        sizes = torch.tensor([len(option.encode()) for option in options], dtype=torch.float64)
        right += int(row.argmax()) == question.answer
        normalised += int((row / sizes).argmax()) == question.answer
    n = len(questions)
    chance = sum(1 / len(question.choices) for question in questions) / n
    return Result(
        "questions",
        {"accuracy": right / n, "accuracy_per_byte": normalised / n, "chance": chance},
        {"accuracy": wilson(right, n), "accuracy_per_byte": wilson(normalised, n)},
        {"questions": n, "choices": sum(len(question.choices) for question in questions)},
    )


def wilson(right: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    share = right / n
    centre = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def _context(checkpoint: Checkpoint) -> int:
    """Tokens that the model was made for, which rotary models could exceed but should not."""
    trained = getattr(checkpoint.model.config.get_text_config(), "max_position_embeddings", None)
    return min(limit for limit in (position_limit(checkpoint.model), trained, LONGEST_WINDOW) if limit is not None)


def _joined(context: str, choice: str) -> bool:
    return not context or context[-1].isspace() or choice[0].isspace()


def _start(checkpoint: Checkpoint) -> int:
    tokenizer = checkpoint.tokenizer
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ValueError(f"the tokenizer of {checkpoint.name} has no token that can begin a text (bos or eos)")
