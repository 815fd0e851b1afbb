"""The driver under every step-wise decoder: prefill once, feed tokens, repeat, select and take back rows."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from papertrial.lm import cache as kv
from papertrial.lm.anatomy import body, device_of, position_limit, unwrap
from papertrial.lm.generation.inputs import as_prompt, position_ids


class StepDecoder:
    """Prefill once, then feed tokens: the loop body of every step-wise decoder.

    Parameters
    ----------
    model
        A causal language model of transformers.
    input_ids, attention_mask
        Prompts (B, S), padded on the left.
    use_cache
        False re-runs the whole sequence at each step: for models whose state cannot be repeated or cropped
        (state-space), and as the oracle of the tests.
    keep_hidden
        Also keep the vectors that the unembedding reads, see :attr:`hidden`.

    Attributes
    ----------
    logits
        (B, V) float32 after the last token of each row.
    hidden
        (B, n, D), final hidden states of the tokens fed last (of the prompt, after construction); None unless asked
        for.
    input_ids, attention_mask
        Everything fed so far, (B, t).
    cache
        The key/value cache, None with ``use_cache=False``.

    Notes
    -----
    Gradients are not tracked. The model's training mode is the caller's business, see :func:`evaluating`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        use_cache: bool = True,
        keep_hidden: bool = False,
    ) -> None:
        self.model = model
        device = device_of(model)
        self.input_ids, self.attention_mask = as_prompt(input_ids, attention_mask, device)
        self.cache = kv.new_cache(model) if use_cache else None
        self.keep_hidden = keep_hidden
        self.hidden: Tensor | None = None
        self._parameters = inspect.signature(unwrap(model).forward).parameters
        self._limit = position_limit(model)
        self.logits = self._forward(self.input_ids.shape[1], 1)[:, -1]

    @property
    def takes_positions(self) -> bool:
        """Whether the model's forward has a ``position_ids`` argument."""
        return "position_ids" in self._parameters

    @torch.no_grad()
    def _forward(self, fresh: int, keep: int) -> Tensor:
        """Run the last ``fresh`` tokens (all, without a cache); float32 logits (B, keep, V) of the last ``keep``."""
        start = 0 if self.cache is None else self.input_ids.shape[1] - fresh
        inputs: dict[str, Any] = {"input_ids": self.input_ids[:, start:], "attention_mask": self.attention_mask}
        inputs |= {"use_cache": self.cache is not None}
        if self.cache is not None:
            inputs["past_key_values"] = self.cache
        if self.takes_positions:
            inputs["position_ids"] = position_ids(self.attention_mask)[:, start:]
        if "logits_to_keep" in self._parameters:
            inputs["logits_to_keep"] = keep
        logits, hidden = self.run(inputs)
        self.hidden = None if hidden is None else hidden[:, -fresh:]
        return logits[:, -keep:]

    def run(self, inputs: dict[str, Any], deeper: int = 0) -> tuple[Tensor, Tensor | None]:
        """One forward pass as the decoder makes them: float32 logits (B, T', V), and the final hidden states (B, T, D)
        where they are kept. ``deeper`` is how many positions beyond the attention mask the inputs reach.
        """
        positions = int(self.attention_mask.sum(-1).max()) + deeper
        if self._limit is not None and positions > self._limit:
            raise ValueError(
                f"the sequence needs {positions} positions and the model's position table has {self._limit}: shorten "
                "the prompt or max_new_tokens"
            )
        if not self.keep_hidden:
            return self.model(**inputs).logits.float(), None
        states: list[Tensor] = []
        handle = body(self.model).register_forward_hook(lambda _m, _a, output: states.append(output.last_hidden_state))
        try:
            logits = self.model(**inputs).logits.float()
        finally:
            handle.remove()
        return logits, states[-1]

    def step(self, tokens: Tensor) -> Tensor:
        """Feed one token per row (B,), or a block (B, n); returns float32 logits (B, V), or (B, n, V) for a block."""
        if tokens.shape[0] != self.input_ids.shape[0] or tokens.dim() not in (1, 2):
            raise ValueError(
                f"tokens must be ({self.input_ids.shape[0]},) or with a second axis, got {tuple(tokens.shape)}"
            )
        block = tokens[:, None] if tokens.dim() == 1 else tokens
        block = block.to(self.input_ids)
        self.input_ids = torch.cat([self.input_ids, block], dim=1)
        self.attention_mask = torch.cat([self.attention_mask, torch.ones_like(block)], dim=1)
        logits = self._forward(block.shape[1], block.shape[1])
        self.logits = logits[:, -1]
        return self.logits if tokens.dim() == 1 else logits

    def repeat(self, n: int) -> None:
        """Repeat every row ``n`` times, copies side by side."""
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        if self.cache is not None:
            kv.repeat(self.cache, n)
        self._map_rows(lambda rows: rows.repeat_interleave(n, dim=0))

    def select(self, rows: Tensor) -> None:
        """Keep the rows named by an integer or boolean tensor, in that order."""
        rows = rows.to(self.input_ids.device)
        if self.cache is not None:
            kv.select(self.cache, rows)
        self._map_rows(lambda values: values[rows])

    def drop(self, n: int) -> None:
        """Take back the last ``n`` tokens of every row. ``logits`` and ``hidden`` stay those of the last step."""
        if not 0 <= n < self.input_ids.shape[1]:
            raise ValueError(f"n must lie between 0 and {self.input_ids.shape[1] - 1}, got {n}")
        if self.cache is not None:
            kv.crop(self.cache, n)
        stop = self.input_ids.shape[1] - n
        self.input_ids, self.attention_mask = self.input_ids[:, :stop], self.attention_mask[:, :stop]

    def _map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        self.input_ids, self.attention_mask = change(self.input_ids), change(self.attention_mask)
        self.logits = change(self.logits)
        if self.hidden is not None:
            self.hidden = change(self.hidden)
