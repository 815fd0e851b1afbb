"""The draft model of the paper: trigram encoder, full-context encoder, heads with a residual from the base model."""

import copy
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from papertrial.lm import cache as kv
from papertrial.lm.anatomy import anatomy, body, unwrap
from papertrial.lm.anatomy.families import family_of
from papertrial.lm.generation import StepDecoder, position_ids
from papertrial.papers.decoding.chimera.method.drafts import Draft, DraftState, StepOutput, positions_for_training
from papertrial.papers.decoding.chimera.method.medusa import ResidualBlock
from papertrial.papers.decoding.chimera.method.trees import Level, TokenTree


class TrigramEncoder(nn.Module):
    """Short-range features of three tokens: ``u = B (x + SiLU(A x + b))``, x their three embeddings side by side.

    A and b start at zero. With ``trigram=False`` the last token's embedding stands in all three places: the same
    parameters without the neighbours, for ablations.
    """

    def __init__(self, width: int, trigram: bool = True) -> None:
        super().__init__()
        self.trigram = trigram
        self.block = ResidualBlock(3 * width)
        self.out = nn.Linear(3 * width, width, bias=False)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Embeddings (..., 3, D), the oldest first, to features (..., D)."""
        if not self.trigram:
            embeddings = embeddings[..., 2:, :].expand(*embeddings.shape[:-2], 3, -1)
        return self.out(self.block(embeddings.flatten(-2)))


class FullContextEncoder(nn.Module):
    """One decoder layer of the base architecture with weights and positions of its own, no embedding, no final norm.

    The layer's inputs are the base model's *final* hidden states of the past, its own earlier outputs where those do
    not exist yet, and the trigram feature at the last place, where its output is an estimate of the final hidden state.
    As it is one layer, what others read of a place depends on the place's input alone, not on what that place saw.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        model = unwrap(base)
        anatomy(model)  # complains about families that are not known
        config = copy.deepcopy(model.config)
        config.num_hidden_layers = 1
        if getattr(config, "layer_types", None):  # what is visible is decided by our own masks
            config.layer_types = ["full_attention"]
        self.layer: Any = type(body(model))(config)
        kernel = model.config._attn_implementation
        config._attn_implementation = kernel if kernel in ("eager", "sdpa") else "sdpa"  # those that take any mask
        self.layer.set_input_embeddings(nn.Identity())
        family = family_of(config.model_type)
        if family is not None and family.final_norm is not None:
            setattr(self.layer, family.final_norm, nn.Identity())

    def forward(self, states: Tensor, positions: Tensor, visible: Tensor, cache: DynamicCache) -> Tensor:
        """Append n places to the cache and run them.

        Parameters
        ----------
        states, positions
            Inputs (B, n, D) and their positions (B, n).
        visible
            Bool (B, n, S + n): what each new place sees of the S cached ones and of the new ones.

        Returns
        -------
        Tensor
            (B, n, D).
        """
        mask = torch.zeros(visible.shape, dtype=states.dtype, device=states.device)
        mask = mask.masked_fill(~visible, torch.finfo(states.dtype).min)[:, None]
        out = self.layer(
            inputs_embeds=states, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        return out.last_hidden_state


class ChimeraDraft(Draft):
    """Drafts that read all tokens, arXiv 2402.15758.

    Step i guesses from ``C_i [H_t ; g_{t+i}]``: the base model's last true state and the full-context encoder's
    estimate of the state that the base model would have behind the tokens drafted so far.

    Parameters
    ----------
    base
        The frozen causal language model, of any family known to :mod:`papertrial.lm.anatomy`.
    n_heads
        How many tokens ahead it drafts, at most; 4 in the authors' training command.
    trigram, full_context
        False takes one part out without changing the number of parameters: the encoder sees the last token only, or the
        layer sees its own place only.
    generator
        Source of the initial weights; None uses torch's global one. Heads start as two copies of the base model's side
        by side.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        n_heads: int = 4,
        *,
        trigram: bool = True,
        full_context: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(base, n_heads)
        weight = cast(Tensor, unwrap(base).get_output_embeddings().weight).detach()
        self.full_context = full_context
        with torch.random.fork_rng(devices=[], enabled=generator is not None):
            if generator is not None:
                torch.manual_seed(int(torch.randint(2**62, (1,), generator=generator, device=generator.device)))
            self.trigrams = TrigramEncoder(self.width, trigram)
            self.context = FullContextEncoder(base)
            heads = [nn.Linear(2 * self.width, self.vocabulary, bias=False) for _ in range(n_heads)]
        with torch.no_grad():
            for head in heads:
                head.weight.copy_(torch.cat([weight, weight], 1))
        self.heads = nn.ModuleList(heads)
        self.to(device=weight.device, dtype=torch.float32)
        self.eval()

    def guess(self, step: int, hidden: Tensor, estimate: Tensor) -> Tensor:
        """Logits (..., V) of step ``step`` (from 1) from the last true states and the estimates, both (..., D)."""
        return cast(Tensor, self.heads[step - 1](torch.cat([hidden, estimate], -1)))

    def features(self, older: Tensor, old: Tensor, token: Tensor) -> Tensor:
        """Trigram features (..., D) of tokens (...), each with the two before it."""
        return cast(Tensor, self.trigrams(self.embed(torch.stack([older, old, token], -1))))

    def start(self, decoder: StepDecoder) -> "ChimeraState":
        return ChimeraState(self, decoder)

    def training_steps(
        self,
        input_ids: Tensor,
        hidden: Tensor,
        attention_mask: Tensor | None = None,
        *,
        own_drafts: bool = False,
        detach: bool = True,
    ) -> list[StepOutput]:
        """See :meth:`Draft.training_steps`; padding is on the left or on the right."""
        places = positions_for_training(input_ids, self.n_heads)
        hidden = hidden.to(self.dtype)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        positions, here = position_ids(mask)[:, :places], hidden[:, :places]
        own = torch.eye(places, dtype=torch.bool, device=input_ids.device).expand(len(input_ids), -1, -1)
        past, above = torch.ones_like(own).tril() & mask[:, None, :places].bool(), own
        if not self.full_context:
            past, above = torch.zeros_like(own), torch.zeros_like(own)
        cache = DynamicCache()
        self.context(here, positions, own, cache)  # only to be read later: what these places see does not matter

        outputs: list[StepOutput] = []
        first = positions == 0
        # the token at each place, the one before it, and the one before that, as the draft knows them
        old, token = input_ids[:, :places], input_ids[:, 1 : places + 1]
        older = nn.functional.pad(old, (1, 0))[:, :-1]
        estimate: Tensor | None = None
        for step in range(1, self.n_heads + 1):
            if step > 1:
                drafted = outputs[-1].logits.argmax(-1)
                older, old = old, token
                token = drafted if own_drafts else input_ids[:, step : places + step]
                feature = self.features(older, old, token)
            else:
                feature = self.features(*_first_trigram(older, old, token, first))
            inputs, where = feature, positions + step
            visible = torch.cat([past, *[above] * (step - 1), own], 2)  # of states, earlier estimates, features
            if estimate is not None:
                inputs, where = torch.cat([estimate, inputs], 1), torch.cat([where - 1, where], 1)
                visible = torch.cat([visible.roll(-places, 2), visible], 1)  # estimates see themselves, at least
            output = self.context(inputs, where, visible, cache)[:, -places:]
            kv.crop(cache, places)
            outputs.append(StepOutput(self.guess(step, here, output), output))
            estimate = output.detach() if detach else output
        return outputs


def _first_trigram(older: Tensor, old: Tensor, token: Tensor, first: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The trigram behind the first token of a text repeats the second: (x0, x1, x1)."""
    return torch.where(first, old, older), torch.where(first, token, old), token


class ChimeraState(DraftState):
    """Cached places of the full-context encoder, and the last two tokens of each row."""

    def __init__(self, draft: ChimeraDraft, decoder: StepDecoder) -> None:
        assert decoder.hidden is not None
        self.draft = draft
        ids, mask = decoder.input_ids, decoder.attention_mask
        self.cache = DynamicCache()
        self.seen = mask.new_zeros(len(ids), 0, dtype=torch.bool)
        self.tail = torch.cat([ids[:, -2:-1] if ids.shape[1] > 1 else ids, ids[:, -1:]], 1)
        self.length = mask.sum(1)
        self.fresh, self.kept, self.where = decoder.hidden.to(draft.dtype), mask.bool(), position_ids(mask)
        self.last = self.fresh[:, -1]

    def expand(self, root: Tensor, tree: TokenTree) -> Iterator[tuple[Level, Tensor, Tensor]]:
        draft, rows = self.draft, len(root)
        tokens = root.new_zeros(rows, len(tree))
        feature = draft.features(*_first_trigram(self.tail[:, 0], self.tail[:, 1], root, self.length == 1))[:, None]
        known = self.seen.shape[1] + self.fresh.shape[1]
        self.seen = torch.cat([self.seen, self.kept], 1)
        inputs = torch.cat([self.fresh, feature], 1)
        positions = torch.cat([self.where, self.length[:, None]], 1)
        self.fresh, self.kept, self.where = self.fresh[:, :0], self.kept[:, :0], self.where[:, :0]
        estimated: list[int] = []  # nodes whose estimates lie in the cache, in that order
        for step, level in enumerate(tree.levels, 1):
            width = len(level.parents)
            visible = self._visible(inputs.shape[1], level, estimated, tree)
            estimate = draft.context(inputs, positions, visible, self.cache)[:, -width:]
            kv.crop(self.cache, width)
            logits = draft.guess(step, self.last[:, None].expand(-1, width, -1), estimate)
            yield level, logits, tokens
            if step == tree.depth:
                break
            below = tree.levels[step].parents
            feature = self._features(root, tokens, below, tree)
            inputs = torch.cat([estimate, feature], 1)
            places = [step - 1] * width + [step] * len(below)
            positions = self.length[:, None] + torch.tensor(places, device=root.device)
            estimated = estimated + level.parents
        kv.crop(self.cache, kv.length(self.cache) - known)

    def _visible(self, fresh: int, level: Level, estimated: list[int], tree: TokenTree) -> Tensor:
        """What the ``fresh`` new places see, bool (B, fresh, cached + fresh); only the last, the features, matter."""
        rows, width = len(self.seen), len(level.parents)
        total = kv.length(self.cache) + fresh
        device = self.seen.device
        visible = torch.zeros(rows, fresh, total, dtype=torch.bool, device=device)
        places = torch.arange(fresh, device=device)
        visible[:, places, total - fresh + places] = True
        if not self.draft.full_context:
            return visible
        known = self.seen.shape[1]
        visible[:, -width:, :known] = self.seen[:, None]
        # estimates stand between the states and the features; a feature sees those of its own ancestors
        between = total - known - width
        if between:
            sees = [[_is_ancestor(tree, node, parent) for node in estimated] for parent in level.parents]
            visible[:, -width:, known : known + between] = torch.tensor(sees, device=device)
        return visible

    def _features(self, root: Tensor, tokens: Tensor, nodes: list[int], tree: TokenTree) -> Tensor:
        """Trigram features (B, nodes, D) of drafted nodes."""
        # columns: the two tokens before the root, the root, and the nodes
        table = torch.cat([self.tail, root[:, None], tokens], 1)
        column = {-3: 0, -2: 1, -1: 2}

        def behind(node: int) -> int:
            return tree.parents[node] if node >= 0 else node - 1

        def columns(of: list[int]) -> list[int]:
            return [column.get(node, node + 3) for node in of]

        old = [behind(node) for node in nodes]
        older = [behind(node) for node in old]
        return self.draft.features(table[:, columns(older)], table[:, columns(old)], table[:, columns(nodes)])

    def extend(self, tokens: Tensor, hidden: Tensor, kept: Tensor) -> None:
        count = kept.sum(1)
        before = torch.where(count > 1, tokens[:, -2] if tokens.shape[1] > 1 else tokens[:, -1], self.tail[:, 1])
        self.tail = torch.stack([before, tokens[:, -1]], 1)
        # behind what is still to be taken in, if the last round drafted nothing
        self.fresh = torch.cat([self.fresh, hidden.to(self.draft.dtype)], 1)
        self.kept = torch.cat([self.kept, kept], 1)
        where = (self.length[:, None] + kept.long().cumsum(1) - 1).clamp(min=0)
        self.where = torch.cat([self.where, where], 1)
        self.length = self.length + count
        self.last = self.fresh[:, -1]

    def select(self, rows: Tensor) -> None:
        if kv.length(self.cache):
            kv.select(self.cache, rows)
        for name in ("seen", "tail", "length", "fresh", "kept", "where", "last"):
            setattr(self, name, getattr(self, name)[rows])


def _is_ancestor(tree: TokenTree, node: int, of: int) -> bool:
    """Whether ``node`` (-1 the root) lies above ``of``."""
    while of >= 0:
        of = tree.parents[of]
        if of == node:
            return True
    return False
