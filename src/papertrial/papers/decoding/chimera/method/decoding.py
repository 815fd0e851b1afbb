"""Draft a tree, verify it in one pass, keep the longest right path: the base model's own output, sooner."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from papertrial.lm.anatomy import position_limit
from papertrial.lm.generation import LogitsFunction, StepDecoder, draw, evaluating, truncate
from papertrial.lm.generation.decoding import end_tokens, padding_token, row_uniforms
from papertrial.lm.generation.tree import LookAhead, look_ahead
from papertrial.papers.decoding.chimera.method.acceptance import acceptance
from papertrial.papers.decoding.chimera.method.drafts import Draft, DraftTree, Sampling
from papertrial.papers.decoding.chimera.method.stats import SpecStats
from papertrial.papers.decoding.chimera.method.trees import TokenTree

Choose = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Scores (B, V), row numbers (B,) and numbers of tokens made so far (B,) to the base model's next tokens (B,)."""

Stop = Callable[[Tensor], bool]
"""Whether to stop behind the ids (1, t)."""


class SpeculativeOutput(NamedTuple):
    """``tokens`` (B, T) new tokens, padded behind the end of a row; ``mask`` (B, T) true for real ones; ``stats``."""

    tokens: Tensor
    mask: Tensor
    stats: SpecStats


def speculative_generate(
    model: PreTrainedModel,
    draft: Draft,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    tree: TokenTree,
    max_new_tokens: int,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    sampled_drafts: bool = False,
    processors: Sequence[LogitsFunction] = (),
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
) -> SpeculativeOutput:
    """What ``lm.generation.greedy`` or ``sample`` return with the same arguments, in fewer passes of the base model.

    Parameters
    ----------
    model, draft
        The base model and a draft made for it.
    input_ids, attention_mask
        Prompts (B, S), padded on the left. Rows accept drafts independently of each other.
    tree
        What is drafted in each round; no deeper than the draft has heads.
    do_sample, temperature, top_k, top_p
        Sample instead of taking the best token; see ``lm.generation.truncate``.
    generator
        Needed for sampling, as in ``lm.generation.sample``, whose tokens come out exactly (but for rounding): the base
        model's choice at each place uses the same random number, and a draft is accepted where it is that choice.
    sampled_drafts
        Sample the tree's children from the draft instead of taking its best guesses, and accept them with
        :func:`acceptance`: the distribution of the base model, but other tokens than ``sample`` gives. Needs
        ``do_sample`` and a single generator.
    processors
        Applied in turn to the base model's scores before each choice.
    eos_token_id, pad_token_id
        As in ``lm.generation.greedy``.

    Raises
    ------
    ValueError
        A tree deeper than the draft, a draft of another model's size, a model that cannot run trees (other attention
        kernels than eager and sdpa, no key/value cache), unusable prompts or sampling arguments.

    References
    ----------
    arXiv 2402.15758, section 3; tree verification as in arXiv 2305.09781.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    draft.check(tree)
    draft.check_base(model)
    ends = end_tokens(eos_token_id, input_ids.device)
    sampling: Sampling | None = None
    warp: Callable[[Tensor], Tensor] = lambda scores: scores  # noqa: E731
    if do_sample:
        if generator is None:
            raise ValueError("do_sample needs a generator")
        uniforms = row_uniforms(generator, len(input_ids), max_new_tokens, input_ids.device)
        warp = lambda scores: truncate(scores, temperature=temperature, top_k=top_k, top_p=top_p)  # noqa: E731
        warp(torch.zeros(1, 1))  # complain before any work
    if sampled_drafts:
        if not do_sample or not isinstance(generator, torch.Generator):
            raise ValueError("sampled_drafts needs do_sample and one torch.Generator")
        sampling = Sampling(temperature, generator)

    def choose(scores: Tensor, rows: Tensor, made: Tensor) -> Tensor:
        if not do_sample:
            return scores.argmax(-1)
        return draw(warp(scores), uniforms.to(scores.device)[rows, made.clamp(max=max_new_tokens - 1)])

    run = _Run(model, draft, tree, max_new_tokens, ends, choose, tuple(processors), warp=warp, sampling=sampling)
    with evaluating(model), evaluating(draft), torch.no_grad():
        return run.decode(input_ids, attention_mask, padding_token(model, pad_token_id, ends))


def speculative_decoding(draft: Draft, tree: TokenTree) -> Callable[..., Tensor]:
    """A ``custom_generate`` for ``model.generate``, for one prompt at a time (as its assisted generation).

    Honours the logits processors (temperature and the like among them), ``do_sample``, stopping criteria and end tokens
    that ``generate`` prepared; sampling uses torch's global generator, as ``generate`` does. Of what ``generate`` can
    return it has the ids only: beams, several sequences, scores, states and streaming are refused with a ValueError.

    >>> model.generate(ids, custom_generate=speculative_decoding(draft, tree), max_new_tokens=64)   # doctest: +SKIP
    """

    def generate(
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Tensor:
        _refuse(generation_config, model_kwargs)
        if len(input_ids) != 1:
            raise ValueError(
                f"speculative decoding through generate takes one prompt at a time, got {len(input_ids)}: use "
                "speculative_generate for batches"
            )
        draft.check(tree)
        draft.check_base(model)

        def choose(scores: Tensor, rows: Tensor, made: Tensor) -> Tensor:
            if not generation_config.do_sample:
                return scores.argmax(-1)
            return torch.multinomial(scores.softmax(-1), 1)[:, 0]

        ends = end_tokens(None, input_ids.device)  # end tokens are among the stopping criteria
        limit = generation_config.max_length - input_ids.shape[1]
        run = _Run(
            model, draft, tree, limit, ends, choose, (logits_processor,),
            stop=lambda ids: bool(stopping_criteria(ids, None)[0]),
        )  # fmt: skip
        with evaluating(model), evaluating(draft), torch.no_grad():
            output = run.decode(input_ids, model_kwargs.get("attention_mask"), 0)
        return torch.cat([input_ids, output.tokens], 1)

    return generate


def _refuse(generation_config: Any, model_kwargs: Mapping[str, Any]) -> None:
    """ValueError for what a caller of ``generate`` asked for and would not get."""
    for name in ("num_beams", "num_return_sequences"):
        if (getattr(generation_config, name, None) or 1) > 1:
            raise ValueError(
                f"speculative decoding follows one sequence: leave {name} at 1, got {getattr(generation_config, name)}"
            )
    outputs = ("scores", "logits", "attentions", "hidden_states")
    for name in ("return_dict_in_generate", *(f"output_{output}" for output in outputs)):
        if getattr(generation_config, name, None):
            raise ValueError(f"speculative decoding returns token ids only: leave out {name}=True")
    for name in ("streamer", "assistant_model"):
        if model_kwargs.get(name) is not None:
            raise ValueError(f"speculative decoding takes no {name}")
    cache = model_kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise ValueError("speculative decoding reads the whole prompt itself: leave out past_key_values")


@dataclass
class _Run:
    """One call: what does not change from round to round."""

    model: PreTrainedModel
    draft: Draft
    tree: TokenTree
    limit: int
    ends: Tensor
    choose: Choose
    processors: tuple[LogitsFunction, ...]
    stop: Stop | None = None
    warp: Callable[[Tensor], Tensor] = lambda scores: scores
    sampling: Sampling | None = None

    def decode(self, input_ids: Tensor, attention_mask: Tensor | None, pad: int) -> SpeculativeOutput:
        decoder = StepDecoder(self.model, input_ids, attention_mask, keep_hidden=True)
        state = self.draft.start(decoder)
        device = decoder.input_ids.device
        count, depth = len(decoder.input_ids), self.tree.depth
        self.ends = self.ends.to(device)
        # room for a whole round behind the limit; cut off at the end
        self.tokens = torch.full((count, self.limit + depth + 1), pad, dtype=torch.long, device=device)
        self.made = torch.zeros(count, dtype=torch.long, device=device)
        self.rounds = torch.zeros_like(self.made)
        self.tried = torch.zeros(2, depth, dtype=torch.long)  # reached, accepted
        rows = torch.arange(count, device=device)
        root = self.choose(self._processed(decoder.input_ids, decoder.logits), rows, self.made)
        live = ~self._emit(rows, root, decoder.input_ids)
        forwards, drafts, seconds = 0, 0, [0.0, 0.0]
        while bool(live.any()):
            if not bool(live.all()):
                decoder.select(live)
                state.select(live)
                rows, root = rows[live], root[live]
            began = time.perf_counter()
            tree = self._fitting(decoder, rows)
            drafted = None if tree is None else state.propose(root, tree, self.sampling)
            between = time.perf_counter()
            tokens = root[:, None] if drafted is None else torch.cat([root[:, None], drafted.tokens], 1)
            parents = [-1] if tree is None else tree.rooted_parents
            ahead = look_ahead(decoder, tokens, parents)
            self.rounds[rows] += 1
            path, root, live = self._walk(decoder, ahead, rows, parents, drafted)
            ahead.accept(path)
            assert decoder.hidden is not None
            state.extend(tokens.gather(1, path.clamp(min=0)), decoder.hidden, path >= 0)
            forwards += 1
            drafts += 0 if tree is None else tree.depth
            seconds[0] += between - began
            seconds[1] += time.perf_counter() - between
        width = int(self.made.max())
        mask = torch.arange(width, device=device) < self.made[:, None]
        stats = SpecStats(
            self.rounds, self.made, self.tried[0], self.tried[1], forwards + 1, drafts, seconds[0], seconds[1]
        )
        return SpeculativeOutput(self.tokens[:, :width].masked_fill(~mask, pad), mask, stats)

    def _fitting(self, decoder: StepDecoder, rows: Tensor) -> TokenTree | None:
        """The tree as deep as is of use before the length limit, and as the model's table of positions allows."""
        deepest = self.limit - int(self.made[rows].min()) - 1
        table = position_limit(self.model)
        if table is not None:
            deepest = min(deepest, table - int(decoder.attention_mask.sum(-1).max()) - 1)
        return self.tree.pruned(deepest)

    def _processed(self, ids: Tensor, scores: Tensor) -> Tensor:
        for processor in self.processors:
            scores = processor(ids, scores)
        return scores

    def _emit(self, rows: Tensor, token: Tensor, ids: Tensor) -> Tensor:
        """Write down one more token of each of these rows; which of them have ended (R,)."""
        self.tokens[rows, self.made[rows]] = token
        self.made[rows] += 1
        ended = torch.isin(token, self.ends) | (self.made[rows] >= self.limit)
        if self.stop is not None:
            ended = ended | self.stop(torch.cat([ids, token[:, None]], 1))
        return ended

    def _walk(
        self, decoder: StepDecoder, ahead: LookAhead, rows: Tensor, parents: list[int], drafted: DraftTree | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Follow the base model's choices down the tree, whose root is node 0.

        Returns the nodes to keep (R, P) with -1 on the left, each row's last choice (R,), which is not in the tree, and
        which rows go on.
        """
        here, above = torch.arange(len(rows), device=rows.device), torch.tensor(parents, device=rows.device)
        node = torch.zeros_like(rows)
        path = [node]
        last, live = node.clone(), torch.ones_like(rows, dtype=torch.bool)
        going = live.clone()  # rows whose draft is still right
        while bool(going.any()):
            ids = torch.cat([decoder.input_ids, ahead.tokens.gather(1, torch.stack(path, 1).clamp(min=0))], 1)
            scores = self._processed(ids, ahead.logits[here, node])
            below = above == node[:, None]
            if self.sampling is None or drafted is None:
                token = self.choose(scores, rows, self.made[rows])
                right = below & (ahead.tokens == token[:, None])
                child = torch.where(right.any(1), right.int().argmax(1), -1)
            else:
                token, child = self._sampled(scores, node, parents, drafted, going)
            last = torch.where(going, token, last)
            ended = torch.zeros_like(going)
            ended[going] = self._emit(rows[going], token[going], ids[going])
            live &= ~ended
            found = going & ~ended & (child >= 0)
            if (depth := len(path)) <= self.tree.depth:
                tried = going & ~ended & below.any(1)
                self.tried[:, depth - 1] += torch.stack([tried.sum(), found.sum()]).cpu()
            going = found
            node = torch.where(going, child, node)
            path.append(torch.where(going, node, -1))
        table = torch.stack(path[:-1], 1)  # behind the last step nobody went on; gaps stand behind: to the front
        order = (table >= 0).long().argsort(dim=1, stable=True)
        return table.gather(1, order), last, live

    def _sampled(
        self, scores: Tensor, node: Tensor, parents: list[int], drafted: DraftTree, going: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Tokens and children (-1 where none) by the rule for drafts that were sampled."""
        assert self.sampling is not None
        assert drafted.distributions is not None
        probs = self.warp(scores).softmax(-1)
        generator = self.sampling.generator
        token, child = torch.zeros_like(node), torch.full_like(node, -1)
        for row in going.nonzero()[:, 0].tolist():
            children = [n for n, parent in enumerate(parents) if parent == int(node[row])]
            held = [int(drafted.tokens[row, n - 1]) for n in children]
            q = drafted.distributions[row, children[0] - 1] if children else None
            chances, rest = acceptance(probs[row], held, q)
            draws = torch.rand(len(held), generator=generator, dtype=torch.float64, device=generator.device)
            taken = (draws < chances.to(draws.device)).nonzero()
            if len(taken):
                child[row] = children[int(taken[0])]
                token[row] = held[int(taken[0])]
            else:
                token[row] = torch.multinomial(rest.to(generator.device), 1, generator=generator)[0]
        return token, child
