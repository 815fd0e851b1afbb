"""What every draft model offers: proposals for decoding, and all its steps in parallel for training."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from papertrial.lm.anatomy import unwrap
from papertrial.lm.generation import StepDecoder
from papertrial.papers.decoding.chimera.method.trees import Level, TokenTree


class DraftTree(NamedTuple):
    """A proposal for every row.

    ``tokens`` (B, N) in the order of the tree's nodes; ``distributions`` (B, N, V) what each token was sampled from,
    None where the best guesses were taken.
    """

    tokens: Tensor
    distributions: Tensor | None


class StepOutput(NamedTuple):
    """One draft step at M positions: ``logits`` (B, M, V) and, of drafts that estimate them, the base model's final
    hidden ``states`` (B, M, D)."""

    logits: Tensor
    states: Tensor | None


class Sampling(NamedTuple):
    """How children are drawn from the draft's distribution, independently of each other."""

    temperature: float
    generator: torch.Generator


class DraftState(ABC):
    """What a draft remembers of the rows that are being decoded."""

    @abstractmethod
    def expand(self, root: Tensor, tree: TokenTree) -> Iterator[tuple[Level, Tensor, Tensor]]:
        """Level by level: the level, the draft's logits (B, parents, V) there, and a tensor (B, N) of the tree's
        tokens, in which the caller fills in the level's children before it goes on. ``root`` (B,) is the last certain
        token."""

    @abstractmethod
    def extend(self, tokens: Tensor, hidden: Tensor, kept: Tensor) -> None:
        """Take in what was accepted: ``tokens`` (B, P), the base model's final ``hidden`` states there (B, P, D), and
        which of them are ``kept`` (B, P); a row that keeps fewer has its gaps on the left."""

    @abstractmethod
    def select(self, rows: Tensor) -> None:
        """Go on with these rows only."""

    def propose(self, root: Tensor, tree: TokenTree, sampling: Sampling | None = None) -> DraftTree:
        """Draft a tree behind ``root`` (B,): the best guesses, or samples."""
        distributions: list[Tensor] = []
        drafted = root
        for level, logits, drafted in self.expand(root, tree):
            parent_of, ranks = torch.tensor(level.parent_of), torch.tensor(level.ranks)
            parent_of, ranks = parent_of.to(root.device), ranks.to(root.device)
            if sampling is None:
                chosen = logits.topk(level.width, dim=-1).indices[:, parent_of, ranks]
            else:
                q = (logits / sampling.temperature).softmax(-1)
                flat = q.flatten(0, 1).to(sampling.generator.device)
                draws = torch.multinomial(flat, level.width, replacement=True, generator=sampling.generator)
                chosen = draws.to(root.device).unflatten(0, q.shape[:2])[:, parent_of, ranks]
                distributions.append(q[:, parent_of])
            drafted[:, level.children] = chosen
        return DraftTree(drafted, torch.cat(distributions, 1) if distributions else None)


class Draft(nn.Module, ABC):
    """A draft model for one frozen base model.

    Its weights are float32 whatever the base model's are: in bfloat16 most steps of training would be rounded away.

    Parameters
    ----------
    base
        The causal language model that is to be accelerated; its parameters are not part of the draft.
    n_heads
        How many tokens ahead it drafts, at most.
    """

    def __init__(self, base: nn.Module, n_heads: int) -> None:
        super().__init__()
        if n_heads < 1:
            raise ValueError(f"n_heads must be at least 1, got {n_heads}")
        model = unwrap(base)
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        if head is None:
            raise ValueError(f"{type(model).__name__} has no next-token head: load it as a causal language model")
        self.n_heads = n_heads
        self.vocabulary, self.width = cast(Tensor, head.weight).shape
        # in a tuple, so that torch does not count the base model's table among the draft's parameters
        self._base_embedding = (embedding,)
        embedded = cast(Tensor, embedding.weight).shape[1]
        if embedded != self.width:
            raise ValueError(
                f"the base model embeds into {embedded} dimensions and reads out of {self.width}: drafts need one"
            )

    @abstractmethod
    def start(self, decoder: StepDecoder) -> DraftState:
        """Take in the prompts that ``decoder`` (with ``keep_hidden=True``) has just read."""

    @abstractmethod
    def training_steps(
        self,
        input_ids: Tensor,
        hidden: Tensor,
        attention_mask: Tensor | None = None,
        *,
        own_drafts: bool = False,
        detach: bool = True,
    ) -> list[StepOutput]:
        """All draft steps at the first M = T - 1 - n_heads positions of sequences (B, T) at once.

        Step s (from 1) at position i knows the tokens up to i + s and the hidden states up to i, and guesses token
        i + s + 1.

        Parameters
        ----------
        hidden
            The base model's final hidden states (B, T, D) on ``input_ids``.
        own_drafts
            After the first step, read the draft's own best guesses in place of the text's tokens.
        detach
            No gradient from a step into the estimates of earlier steps that it reads.
        """

    def check(self, tree: TokenTree) -> None:
        """ValueError if the tree is deeper than the draft has heads, or branches into more than there are tokens."""
        if tree.depth > self.n_heads:
            raise ValueError(f"the tree is {tree.depth} deep and the draft has {self.n_heads} heads")
        if max(level.width for level in tree.levels) > self.vocabulary:
            raise ValueError(f"a node of the tree has more children than the {self.vocabulary} tokens there are")

    def check_base(self, model: nn.Module) -> None:
        """ValueError if the draft was made for a base model of another vocabulary or width."""
        vocabulary, width = cast(Tensor, unwrap(model).get_output_embeddings().weight).shape
        if vocabulary != self.vocabulary:
            raise ValueError(f"the draft knows {self.vocabulary} tokens and the model {vocabulary}")
        if width != self.width:
            raise ValueError(f"the draft reads states of width {self.width} and the model's have {width}")

    def set_precision(self, dtype: torch.dtype) -> Self:
        """Change the weights' precision, for decoding with a trained draft; returns the draft itself.

        ``to(dtype)`` would round the frequencies of rotary positions as well.
        """
        for parameter in self.parameters():
            parameter.data = parameter.data.to(dtype)
        return self

    def parameter_count(self) -> int:
        """Trainable parameters, those of the base model not included."""
        return sum(parameter.numel() for parameter in self.parameters())

    def embed(self, tokens: Tensor) -> Tensor:
        """The base model's token embeddings (..., D), without gradient."""
        with torch.no_grad():
            return cast(Tensor, self._base_embedding[0](tokens)).to(self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Of the draft's weights."""
        return next(self.parameters()).dtype


def positions_for_training(input_ids: Tensor, n_heads: int) -> int:
    """M, see :meth:`Draft.training_steps`."""
    positions = input_ids.shape[1] - 1 - n_heads
    if positions < 1:
        raise ValueError(f"sequences of {input_ids.shape[1]} tokens are too short to train {n_heads} heads on")
    return positions
