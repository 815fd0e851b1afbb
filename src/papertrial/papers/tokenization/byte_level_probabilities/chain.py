"""A Markov chain over bytes and the token model that it induces, in closed form: a source with a known answer.

Let A(v | l) be the probability that the chain writes the bytes of token v after byte l. For BPE without pre-tokenizer,
token v may follow u exactly if the pair encodes to itself. Then the encoded chain is a Markov chain of tokens,

    p(v | u) = fits(u, v) A(v | last(u)) Z(v) / Z(u),

where Z(u) is the probability that no token crosses the end of u. Z solves Z(u) = sum_v fits(u, v) A(v | last(u)) Z(v)
with sum_v A(v | l) Z(v) = 1 for every byte l: some token comes first.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutput

from papertrial.lm.token_bytes import TokenBytes
from papertrial.papers.tokenization.byte_level_probabilities.method.validity import Validity


@dataclass(frozen=True)
class ByteChain:
    """A chain of order 1: ``alphabet`` of k bytes, ``initial`` (k,), ``transition`` (k, k), float64."""

    alphabet: bytes
    initial: Tensor
    transition: Tensor

    @classmethod
    def random(cls, alphabet: bytes, generator: torch.Generator, *, sharpness: float = 2.0) -> "ByteChain":
        """Rows are softmax of normal numbers times ``sharpness``: larger is more predictable."""
        k = len(alphabet)
        rows = (sharpness * torch.randn(k + 1, k, generator=generator, dtype=torch.float64)).softmax(-1)
        return cls(alphabet, rows[0], rows[1:])

    def sample(self, length: int, generator: torch.Generator) -> bytes:
        """A string of ``length`` bytes."""
        uniforms = torch.rand(length, generator=generator, dtype=torch.float64).tolist()
        sums, at = self.transition.cumsum(1).tolist(), None
        made = bytearray()
        for u in uniforms:
            row = self.initial.cumsum(0).tolist() if at is None else sums[at]
            at = next((i for i, total in enumerate(row) if u < total), len(row) - 1)
            made.append(self.alphabet[at])
        return bytes(made)

    def next_row(self, data: bytes) -> Tensor:
        """(257,) the chain's own next-byte probabilities after ``data``."""
        row = self.transition[self.alphabet.index(data[-1])] if data else self.initial
        full = torch.zeros(257, dtype=torch.float64)
        full[list(self.alphabet)] = row
        return full

    def writes(self, data: bytes, after: int | None) -> float:
        """A: probability of writing ``data`` after the byte ``after`` (None: at the beginning)."""
        total, at = 1.0, None if after is None else self.alphabet.index(after)
        for byte in data:
            to = self.alphabet.index(byte)
            total *= float(self.initial[to] if at is None else self.transition[at, to])
            at = to
        return total


class ChainTokenConfig(PretrainedConfig):
    """Number of tokens only."""

    model_type = "byte_chain"


class ChainTokenModel(PreTrainedModel, GenerationMixin):
    """A causal language model whose next token depends on the last alone, by a table (V, V) of log-probabilities."""

    config_class = ChainTokenConfig

    def __init__(self, config: ChainTokenConfig, table: Tensor) -> None:
        super().__init__(config)
        self.table = nn.Embedding.from_pretrained(table)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.table

    def get_output_embeddings(self) -> nn.Embedding:
        return self.table

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: object) -> CausalLMOutput:
        return CausalLMOutput(logits=self.table(input_ids))


def induced_model(chain: ByteChain, tokenizer: PreTrainedTokenizerFast, dtype: torch.dtype) -> ChainTokenModel:
    """The token model that is the encoded chain; its first token is predicted after the beginning-of-sequence token.

    Raises
    ------
    ValueError
        If the tokenizer splits texts into words (tokens then depend on more than their neighbour), or lacks a byte of
        the alphabet.
    ArithmeticError
        If the equations for Z have no solution, which would mean that the encoding is not local.
    """
    tokens = TokenBytes(tokenizer)
    if tokens.splits:
        raise ValueError("the tokenizer must not split texts into words: train it with split_words=False")
    validity = Validity(tokens)
    allowed = set(chain.alphabet)
    used = [
        t for t in range(tokens.size) if (d := tokens.bytes_of(t)) and set(d) <= allowed and validity.accepts((), t)
    ]
    data = [tokens.bytes_of(t) or b"" for t in used]
    if {d[0] for d in data if len(d) == 1} != allowed:
        raise ValueError("the tokenizer must have every byte of the alphabet as a token")
    after = {byte: torch.tensor([chain.writes(d, byte) for d in data], dtype=torch.float64) for byte in chain.alphabet}
    writes = torch.stack([after[d[-1]] for d in data])  # (m, m): A(v | last(u))
    fits = torch.stack([validity.mask((t,))[used] for t in used]).double()
    equations = torch.cat([fits * writes - torch.eye(len(used)).double(), torch.stack(list(after.values()))])
    right = torch.cat([torch.zeros(len(used)), torch.ones(len(allowed))]).double()
    z = torch.linalg.lstsq(equations, right[:, None], driver="gelsd").solution[:, 0]
    if float((equations @ z - right).abs().max()) > 1e-9 or float(z.min()) < -1e-9:
        raise ArithmeticError("the encoded chain is not a chain of tokens: the tokenizer's pairs do not decide")
    table = torch.full((tokens.size, tokens.size), -torch.inf, dtype=torch.float64)
    rows = (fits * writes * z[None]).log()
    table[torch.tensor(used)[:, None], torch.tensor(used)[None]] = rows - rows.logsumexp(1, keepdim=True)
    first = (torch.tensor([chain.writes(d, None) for d in data], dtype=torch.float64) * z).log()
    table[tokenizer.bos_token_id, used] = first - first.logsumexp(0)
    unused = torch.ones(tokens.size, dtype=torch.bool)
    unused[[*used, tokenizer.bos_token_id]] = False
    table[unused] = 0.0  # never reached; finite, so that no softmax meets a row of -inf
    config = ChainTokenConfig()
    config.vocab_size, config.eos_token_id = tokens.size, tokenizer.eos_token_id
    return ChainTokenModel(config, table.to(dtype)).eval()
