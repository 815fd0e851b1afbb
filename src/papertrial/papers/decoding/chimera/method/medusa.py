"""The baseline: independent heads on the last hidden state (Medusa, arXiv 2401.10774)."""

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from papertrial.lm.anatomy import unwrap
from papertrial.lm.generation import StepDecoder
from papertrial.papers.decoding.chimera.method.drafts import Draft, DraftState, StepOutput, positions_for_training
from papertrial.papers.decoding.chimera.method.trees import Level, TokenTree


class ResidualBlock(nn.Module):
    """``x + SiLU(A x + b)``, the identity at first (A and b zero)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.silu(cast(Tensor, self.linear(x)))


class MedusaDraft(Draft):
    """Head s guesses the token s + 1 places ahead from the last hidden state alone: ``C_s block_s(H_t)``.

    It does not look at the tokens drafted in between, so that every node at one depth has the same children.

    Parameters
    ----------
    base, n_heads
        See :class:`Draft`.
    blocks
        Residual blocks per head; one in the paper.
    widening
        The hidden state is repeated this many times and the head is that much wider, for comparisons at equal numbers
        of parameters; 1 is the paper's. Heads start as copies of the base model's, one for each repeat.
    """

    def __init__(self, base: nn.Module, n_heads: int = 4, *, blocks: int = 1, widening: int = 1) -> None:
        super().__init__(base, n_heads)
        if blocks < 1 or widening < 1:
            raise ValueError(f"blocks and widening must be at least 1, got {blocks} and {widening}")
        weight = cast(Tensor, unwrap(base).get_output_embeddings().weight).detach()
        self.widening = widening
        self.blocks = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(widening * self.width) for _ in range(blocks))) for _ in range(n_heads)
        )
        heads = [nn.Linear(widening * self.width, self.vocabulary, bias=False) for _ in range(n_heads)]
        with torch.no_grad():
            for head in heads:
                head.weight.copy_(torch.cat([weight] * widening, 1))
        self.heads = nn.ModuleList(heads)
        self.to(device=weight.device, dtype=torch.float32)
        self.eval()

    def guess(self, step: int, hidden: Tensor) -> Tensor:
        """Logits (..., V) of step ``step`` (from 1) behind states (..., D)."""
        repeated = torch.cat([hidden.to(self.dtype)] * self.widening, -1)
        return cast(Tensor, self.heads[step - 1](self.blocks[step - 1](repeated)))

    def start(self, decoder: StepDecoder) -> "MedusaState":
        assert decoder.hidden is not None
        return MedusaState(self, decoder.hidden[:, -1])

    def training_steps(
        self,
        input_ids: Tensor,
        hidden: Tensor,
        attention_mask: Tensor | None = None,
        *,
        own_drafts: bool = False,
        detach: bool = True,
    ) -> list[StepOutput]:
        here = hidden[:, : positions_for_training(input_ids, self.n_heads)]
        return [StepOutput(self.guess(step, here), None) for step in range(1, self.n_heads + 1)]


class MedusaState(DraftState):
    """The last hidden state of each row."""

    def __init__(self, draft: MedusaDraft, last: Tensor) -> None:
        self.draft, self.last = draft, last

    def expand(self, root: Tensor, tree: TokenTree) -> Iterator[tuple[Level, Tensor, Tensor]]:
        tokens = root.new_zeros(len(root), len(tree))
        for step, level in enumerate(tree.levels, 1):
            logits = self.draft.guess(step, self.last)[:, None]
            yield level, logits.expand(-1, len(level.parents), -1), tokens

    def extend(self, tokens: Tensor, hidden: Tensor, kept: Tensor) -> None:
        self.last = hidden[:, -1]

    def select(self, rows: Tensor) -> None:
        self.last = self.last[rows]
