"""Running a model with its voids left out, or only watched.

Two meanings of "left out" are kept apart:

- ``skip``: the next block gets, for each token, the vector of the last active block. A void changes all that follows.
- ``readout``: every block runs on the unchanged residual stream, and only what leaves the last block is replaced by the
  output of the token's last active block. This is what the authors' code does; inner voids change nothing.

In both a block has to run before it is known to be void, and its keys and values stay in the cache, so that later
tokens find an entry for every token in every block: nothing is saved.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator
from types import TracebackType
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from papertrial.lm.anatomy import anatomy, body
from papertrial.lm.generation import evaluating
from papertrial.lm.hooks import change, patch
from papertrial.lm.scoring.forward import forward_inputs
from papertrial.papers.compression.void_layers.method.rule import ProgressRange, VoidRule, lengths
from papertrial.papers.compression.void_layers.method.trace import PHASES, LayerTrace, Phase

Semantics = Literal["skip", "readout"]

Judge = Callable[[int, Tensor, Tensor], Tensor]
"""``(block from 0, its input (B, S, D), its output) -> (B, S)`` bool, false where the output is left out."""


@contextlib.contextmanager
def _carrying(model: nn.Module, judge: Judge, semantics: Semantics) -> Iterator[None]:
    """Carry each token's last kept vector past the blocks that ``judge`` leaves out."""
    last = len(anatomy(model).blocks) - 1
    entered: Tensor
    state: Tensor

    def begin(values: Tensor) -> Tensor:
        nonlocal entered, state
        entered = state = values
        return values

    def leave(layer: int, output: Tensor) -> Tensor:
        nonlocal entered, state
        keep = judge(layer, entered, output)
        state = torch.where(keep[..., None], output, state)
        entered = state if semantics == "skip" else output
        return state if layer == last else entered

    def after(layer: int) -> Callable[[Tensor], Tensor]:
        return lambda output: leave(layer, output)

    edits = [change("resid_post", layer, after(layer)) for layer in range(last + 1)]
    with patch(model, change("resid_pre", 0, begin), *edits):
        yield


class L2AdaptiveComputation:
    """Leave out void blocks while a model runs, token by token (arXiv 2505.14467).

    Parameters
    ----------
    model
        A causal language model with pre-norm blocks, of a family that :func:`papertrial.lm.anatomy.anatomy` knows.
    alpha, include_current, range_from
        See :class:`VoidRule`.
    phases
        Where voids are left out: in the ``prompt``, in the ``response``, in both; with ``()`` nothing is changed and
        the rule only watches.
    semantics
        ``skip`` or ``readout``, see the module.
    prompt_length
        Columns of the attention mask that are prompt, padding included; an int, or (B,) for each row. Default: with a
        cache, tokens that are fed onto an empty one are prompt and later ones response; a forward without cache is all
        prompt. Give it where that is not so: whole texts in one forward, or a prompt fed in pieces.

    Attributes
    ----------
    passes
        A :class:`LayerTrace` of each forward inside the block, oldest first. They stay after it.

    Raises
    ------
    ValueError
        For a dial out of range, an unknown phase or meaning, a model without a known list of blocks, or with post-norm
        blocks: after those all vectors are about equally long and the rule says nothing.

    Examples
    --------
    >>> with L2AdaptiveComputation(model, alpha=0.8, semantics="readout") as lac:      # doctest: +SKIP
    ...     model.generate(**inputs, max_new_tokens=20)
    >>> layer_usage(lac.trace, "response").mean                                         # doctest: +SKIP
    0.61
    """

    def __init__(
        self,
        model: PreTrainedModel,
        alpha: float = 0.8,
        *,
        phases: Collection[Phase] = PHASES,
        semantics: Semantics = "skip",
        prompt_length: int | Tensor | None = None,
        include_current: bool = False,
        range_from: int = 1,
    ) -> None:
        self.rule = VoidRule(alpha, include_current, range_from)
        unknown = [phase for phase in phases if phase not in PHASES]
        if isinstance(phases, str) or unknown:
            raise ValueError(f"phases must be some of {PHASES}, as a tuple or list; got {phases!r}")
        _check_semantics(semantics)
        parts = anatomy(model)
        family, self._last = parts.family, len(parts.blocks) - 1
        if family.placement == "post" or not family.causal:
            raise ValueError(
                f"{type(model).__name__} normalises inside its residual stream or is no decoder: the norms of its "
                "vectors say nothing about its layers"
            )
        if isinstance(prompt_length, Tensor) and prompt_length.dim() != 1:
            raise ValueError(f"prompt_length must be an int or (rows,), got shape {tuple(prompt_length.shape)}")
        self.model, self.phases, self.semantics = model, tuple(phases), semantics
        self.prompt_length = prompt_length
        self.passes: list[LayerTrace] = []
        self._stack: contextlib.ExitStack | None = None
        self._under_way: _Pass | None = None

    def __enter__(self) -> "L2AdaptiveComputation":
        if self._stack is not None:
            raise RuntimeError("this computation is already in force: leave it first, or make another")
        with contextlib.ExitStack() as stack:
            handle = body(self.model).register_forward_pre_hook(self._begin, with_kwargs=True)
            stack.callback(handle.remove)
            stack.enter_context(_carrying(self.model, self._judge, self.semantics))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, where: TracebackType | None
    ) -> None:
        stack, self._stack, self._under_way = self._stack, None, None
        if stack is not None:
            stack.close()

    @property
    def trace(self) -> LayerTrace:
        """All passes so far as one, along the tokens; needs the same rows in each.

        Raises
        ------
        ValueError
            If nothing was run, or the number of rows changed.
        """
        if not self.passes:
            raise ValueError("nothing was traced: run the model inside the block")
        return LayerTrace.concatenate(self.passes)

    def clear(self) -> None:
        """Forget the passes."""
        self.passes.clear()

    # -- one forward pass ----------------------------------------------------------------------------------------

    def _begin(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        mask = kwargs.get("attention_mask")
        if mask is None and len(args) > 1:
            mask = args[1]
        self._under_way = _Pass(
            ProgressRange(self.rule),
            0 if cache is None else int(cache.get_seq_length()),
            mask if isinstance(mask, Tensor) and mask.dim() == 2 else None,
        )

    def _judge(self, layer: int, entered: Tensor, output: Tensor) -> Tensor:
        current = self._under_way
        if current is None:  # a block was run by itself, outside the model's forward
            raise RuntimeError("a block ran outside a forward pass of the model: run the whole model")
        with torch.no_grad():
            active = current.judge(entered, output)
            response = self._response(current.before, output)
            applied = torch.zeros_like(response)
            if "prompt" in self.phases:
                applied |= ~response
            if "response" in self.phases:
                applied |= response
            if layer == self._last:
                self.passes.append(current.trace(response))
                self._under_way = None
        return active | ~applied

    def _response(self, before: int, output: Tensor) -> Tensor:
        """(B, S) bool: which of the tokens under way are response."""
        rows, count = output.shape[:2]
        if self.prompt_length is None:
            return torch.full((rows, count), before > 0, device=output.device)
        columns = torch.arange(before, before + count, device=output.device).expand(rows, count)
        if isinstance(self.prompt_length, int):
            return columns >= self.prompt_length
        if len(self.prompt_length) != rows:
            raise ValueError(f"prompt_length has {len(self.prompt_length)} entries for {rows} rows")
        return columns >= self.prompt_length.to(output.device)[:, None]


class _Pass:
    """What is known of the forward pass under way."""

    def __init__(self, judged: ProgressRange, before: int, mask: Tensor | None) -> None:
        self.judged, self.before, self.mask = judged, before, mask
        self.norms: list[Tensor] = []
        self.progress: list[Tensor] = []
        self.active: list[Tensor] = []
        self.cosine: list[Tensor] = []

    def judge(self, entered: Tensor, output: Tensor) -> Tensor:
        """(B, S) bool for the next block."""
        start, end = lengths(entered), lengths(output)
        if not self.norms:
            self.norms.append(start)
        self.norms.append(end)
        self.progress.append(end - start)
        self.active.append(self.judged.active(end - start))
        self.cosine.append(F.cosine_similarity(entered.to(start.dtype), output.to(start.dtype), dim=-1))
        return self.active[-1]

    def trace(self, response: Tensor) -> LayerTrace:
        real = torch.ones_like(response)
        if self.mask is not None:
            real = self.mask[:, self.mask.shape[1] - response.shape[1] :].bool().to(response.device)
        return LayerTrace(
            torch.stack(self.norms),
            torch.stack(self.progress),
            torch.stack(self.active),
            torch.stack(self.cosine),
            real,
            response,
        )


@contextlib.contextmanager
def skip_layers(model: PreTrainedModel, active: Tensor, *, semantics: Semantics = "skip") -> Iterator[None]:
    """Leave out given blocks for given tokens.

    Parameters
    ----------
    active
        (L, B, S) bool, false where a block's output is left out; for forwards of B rows of S tokens.

    Raises
    ------
    ValueError
        For another number of blocks, or, during the forward, of rows or tokens.
    """
    _check_semantics(semantics)
    layers = len(anatomy(model).blocks)
    if active.dtype != torch.bool or active.dim() != 3 or active.shape[0] != layers:
        raise ValueError(f"active must be bool ({layers}, rows, tokens), got {active.dtype} {tuple(active.shape)}")

    def judge(layer: int, _entered: Tensor, output: Tensor) -> Tensor:
        if output.shape[:2] != active.shape[1:]:
            given, here = tuple(active.shape[1:]), tuple(output.shape[:2])
            raise ValueError(f"active is for rows and tokens {given}, this forward has {here}")
        return active[layer].to(output.device)

    with _carrying(model, judge, semantics):
        yield


@torch.no_grad()
def trace_layers(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    alpha: float = 0.8,
    *,
    prompt_length: int | Tensor | None = None,
    include_current: bool = False,
    range_from: int = 1,
) -> LayerTrace:
    """Which blocks the rule calls void, on texts (B, S) in one forward of the unchanged model.

    Parameters
    ----------
    input_ids, attention_mask
        (B, S), padded on the left.
    alpha, include_current, range_from
        See :class:`VoidRule`.
    prompt_length
        Columns that are prompt, an int or (B,); default all.

    Raises
    ------
    ValueError
        As :class:`L2AdaptiveComputation`, for texts that do not fit the model, and for vectors that are not finite.
    """
    inputs, _, _ = forward_inputs(model, input_ids, attention_mask)
    watching = L2AdaptiveComputation(
        model,
        alpha,
        phases=(),
        prompt_length=input_ids.shape[1] if prompt_length is None else prompt_length,
        include_current=include_current,
        range_from=range_from,
    )
    with evaluating(model), watching:
        body(model)(**inputs)
    trace = watching.trace
    if not bool(trace.norms[:, trace.real].isfinite().all()):
        raise ValueError("a vector is not finite: load the model in a wider type than " + str(model.dtype))
    return trace


def _check_semantics(semantics: str) -> None:
    if semantics not in get_args(Semantics):
        raise ValueError(f"semantics must be one of {', '.join(get_args(Semantics))}; got {semantics!r}")
