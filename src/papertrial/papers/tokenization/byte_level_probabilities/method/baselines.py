"""What one does without the byte-level sum: feed the plain encoding, or heal its last token.

Both are given the same context as :class:`ByteLevelLM` gives, and are measured on the same 257 symbols.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor

from papertrial.lm.anatomy import device_of
from papertrial.lm.generation import left_pad
from papertrial.papers.tokenization.byte_level_probabilities.method.byte_lm import ByteLevelLM
from papertrial.papers.tokenization.byte_level_probabilities.method.characters import Text, listed, whole_characters
from papertrial.papers.tokenization.byte_level_probabilities.method.covers import END
from papertrial.papers.tokenization.byte_level_probabilities.method.prefixes import run_prefixes


def encode_prompt(lm: ByteLevelLM, text: Text, prefix_ids: Sequence[int] | None = None) -> list[int]:
    """The ids that one would feed: the beginning-of-sequence token and the encoding of ``text`` as it stands."""
    whole, partial = whole_characters(text)
    if partial:
        raise ValueError(f"the text ends inside a character ({partial!r}); an encoder takes whole characters only")
    return [*(lm.bos if prefix_ids is None else prefix_ids), *lm.tokens.encode_bytes(whole)]


def plain_next_byte(lm: ByteLevelLM, text: Text | Sequence[Text]) -> Tensor:
    """Next-byte log-probabilities as the first byte of the next token after the plain encoding.

    This is the biased estimate that the paper starts from: the encoding says that no token crosses the cut.

    Returns
    -------
    Tensor
        (257,) or (B, 257) float64, normalised over bytes and the end; other special tokens are left out.
    """
    texts, single = listed("text", text, (str, bytes))
    sequences = [encode_prompt(lm, one) for one in texts]
    _not_empty(sequences)
    logits = run_prefixes(lm.model, sequences, caching=False).logits[:, -1]
    found = _first_bytes(lm, logits.to("cpu", torch.float64).log_softmax(-1), [b""] * len(texts))
    found = found - found.logsumexp(1, keepdim=True)
    return found[0] if single else found


def healed_next_byte(lm: ByteLevelLM, text: Text | Sequence[Text]) -> Tensor:
    """Next-byte log-probabilities under token healing: the last token is taken back and sampled again among the tokens
    that begin with its bytes. Where the same token is drawn, the next one decides. Shapes as in the plain estimate.
    """
    texts, single = listed("text", text, (str, bytes))
    sequences = [encode_prompt(lm, one) for one in texts]
    _not_empty([sequence[:-1] for sequence in sequences])
    logits = run_prefixes(lm.model, sequences, caching=False).logits[:, -2:].to("cpu", torch.float64).log_softmax(-1)
    last = [lm.tokens.bytes_of(sequence[-1]) or b"" for sequence in sequences]
    longer = _first_bytes(lm, logits[:, 0], last)
    longer[:, END] = -torch.inf  # an end instead of the last token would contradict the text
    same = torch.tensor([float(row[sequence[-1]]) for row, sequence in zip(logits[:, 0], sequences, strict=True)])
    after = _first_bytes(lm, logits[:, 1], [b""] * len(texts))
    after = after - after.logsumexp(1, keepdim=True)
    found = torch.logaddexp(longer, same.double()[:, None] + after)
    found = found - found.logsumexp(1, keepdim=True)
    return found[0] if single else found


def _first_bytes(lm: ByteLevelLM, log_probs: Tensor, begun: Sequence[bytes]) -> Tensor:
    """(B, 257) log-mass of the tokens that begin with ``begun`` and go on, by their next byte, and of the end."""
    table = lm.vocabulary.table
    found = torch.full((len(log_probs), END + 1), -torch.inf, dtype=torch.float64)
    for row, start in enumerate(begun):
        ids = lm.vocabulary.running_past(start)
        if len(ids):
            masses = log_probs[row, ids]
            top = masses.max()
            sums = torch.zeros(END + 1, dtype=torch.float64)
            sums.index_add_(0, table[ids, len(start)].long(), (masses - top).exp())
            found[row] = sums.log() + top
        if lm.ends:
            found[row, END] = log_probs[row, lm.ends].logsumexp(0)
    return found


@dataclass(frozen=True)
class HealedPrompt:
    """A prompt without its last token, and the processor that makes the first new token spell it.

    ``model.generate(healed.input_ids, attention_mask=healed.attention_mask, logits_processor=[healed.processor])``
    """

    input_ids: Tensor
    attention_mask: Tensor
    processor: "HealingProcessor"


class HealingProcessor(LogitsProcessor):
    """Allows as the first new token only tokens that begin with what was taken back; later ones are free.

    Parameters
    ----------
    allowed
        (B, V) bool.
    length
        Tokens of the padded prompt.
    """

    def __init__(self, allowed: Tensor, length: int) -> None:
        self.allowed, self.length = allowed, length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] != self.length:
            return scores
        if len(scores) % len(self.allowed):
            raise ValueError(
                f"{len(scores)} rows cannot be samples of the {len(self.allowed)} prompts that were healed"
            )
        allowed = self.allowed.repeat_interleave(len(scores) // len(self.allowed), 0).to(scores.device)
        return scores.masked_fill(~allowed, -torch.inf)


def token_healing(
    lm: ByteLevelLM, text: Text | Sequence[Text], *, prefix_ids: Sequence[int] | None = None
) -> HealedPrompt:
    """Take back the last token of each prompt; what is generated then begins with that token's bytes.

    ``prefix_ids`` go before every prompt instead of the beginning-of-sequence token, as in :meth:`ByteLevelLM.start`.

    Raises
    ------
    ValueError
        If nothing is left of a prompt.
    """
    texts, _ = listed("text", text, (str, bytes))
    sequences = [encode_prompt(lm, one, prefix_ids) for one in texts]
    _not_empty([sequence[:-1] for sequence in sequences])
    size = lm.model.get_output_embeddings().weight.shape[0]
    allowed = torch.zeros(len(texts), size, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        last = lm.tokens.bytes_of(sequence[-1]) or b""
        allowed[row, lm.vocabulary.running_past(last)] = True
        allowed[row, list(lm.tokens.ids_of[last])] = True
    ids, mask = left_pad([sequence[:-1] for sequence in sequences], 0)
    device = device_of(lm.model)
    return HealedPrompt(ids.to(device), mask.to(device), HealingProcessor(allowed, ids.shape[1]))


def _not_empty(sequences: Sequence[Sequence[int]]) -> None:
    if not all(sequences):
        raise ValueError("a prompt has no token to go on from: give a longer text, or a model with a first token")
