"""A Hugging Face decoder as an in-context learner of functions: prompts go in as embeddings, predictions come out.

model = InContextDecoder(GPT2Model(GPT2Config(n_embd=64, n_layer=3, n_head=4)), dim_x=3)
y_hat = model(x, y, x_query)          # a predictor, for papertrial.lm.icl
curve = model.curve(x, y)             # what it would have said before each y
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class InContextDecoder(nn.Module):
    """Reads x_1, y_1, x_2, y_2, ... as separate tokens and answers at the x tokens (the layout of 2211.15661).

    A token is (y; x) with the absent half zero, mapped to the decoder's width by one linear map; another maps the last
    hidden state to a prediction. Both start at N(0, 1/fan_in) with zero bias and train with the decoder.

    Parameters
    ----------
    decoder : a causal decoder (GPT-2, Llama, Qwen, Mistral ...), with or without language-model head.
    dim_x, dim_y : of the prompts.
    generator : of the two linear maps' start.

    Raises
    ------
    ValueError
        If the decoder looks ahead: a token must not influence what comes before it.
    """

    def __init__(
        self, decoder: PreTrainedModel, dim_x: int, dim_y: int = 1, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        for name, value in (("dim_x", dim_x), ("dim_y", dim_y)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.decoder: nn.Module = decoder.base_model
        self.dim_x, self.dim_y = dim_x, dim_y
        table = decoder.get_input_embeddings().weight
        assert isinstance(table, Tensor)
        width = table.shape[1]
        self.read_in = nn.Linear(dim_y + dim_x, width)
        self.read_out = nn.Linear(width, dim_y)
        for layer in (self.read_in, self.read_out):
            start = torch.randn(layer.weight.shape, generator=generator) * layer.in_features**-0.5
            layer.weight.data.copy_(start)
            layer.bias.data.zero_()
        self.to(device=table.device, dtype=table.dtype)
        self._require_causal()

    def forward(self, x: Tensor, y: Tensor, x_query: Tensor) -> Tensor:
        """Predictions (B, q, dim_y) at x_query (B, q, dim_x) after x (B, n, dim_x), y (B, n, dim_y); n may be 0.

        Each query is asked on its own.
        """
        b, q = x_query.shape[:2]
        if q > 1:
            x, y = x.repeat_interleave(q, 0), y.repeat_interleave(q, 0)
        tokens = torch.cat([self._pairs(x, y), self._input_tokens(x_query.reshape(b * q, 1, -1))], 1)
        return self._answers(tokens)[:, -1].reshape(b, q, self.dim_y)

    def curve(self, x: Tensor, y: Tensor) -> Tensor:
        """Predictions (B, n, dim_y); the k-th is for x_k and has seen the k - 1 pairs before it, in one pass."""
        return self._answers(self._pairs(x, y)[:, :-1])[:, 0::2]

    def _answers(self, tokens: Tensor) -> Tensor:
        limit = getattr(self.decoder.config, "max_position_embeddings", None)
        if limit is not None and tokens.shape[1] > limit:
            raise ValueError(f"the prompt takes {tokens.shape[1]} tokens, the decoder's context holds {limit}")
        return self.read_out(self._hidden(self.read_in(tokens.to(self.read_in.weight.dtype))))

    def _hidden(self, embeddings: Tensor) -> Tensor:
        # without a mask, transformers may take a prompt for several packed ones
        mask = torch.ones(embeddings.shape[:2], dtype=torch.long, device=embeddings.device)
        return self.decoder(inputs_embeds=embeddings, attention_mask=mask, use_cache=False).last_hidden_state

    def _input_tokens(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.dim_x:
            raise ValueError(f"this model reads inputs of dim_x {self.dim_x}, got the shape {tuple(x.shape)}")
        return torch.cat([x.new_zeros(*x.shape[:2], self.dim_y), x], -1)

    def _pairs(self, x: Tensor, y: Tensor) -> Tensor:
        if y.shape[-1] != self.dim_y or x.shape[:2] != y.shape[:2]:
            raise ValueError(
                f"x {tuple(x.shape)} and y {tuple(y.shape)} must hold the same examples, with dim_y {self.dim_y}"
            )
        targets = torch.cat([y, y.new_zeros(*y.shape[:2], self.dim_x)], -1)
        return torch.stack([self._input_tokens(x), targets], 2).flatten(1, 2)

    def _require_causal(self) -> None:
        training = self.decoder.training
        self.decoder.eval()
        try:
            with torch.no_grad():
                width, dtype = self.read_in.out_features, self.read_in.weight.dtype
                probe = torch.linspace(-1, 1, 4 * width, device=self.read_in.weight.device, dtype=dtype)
                probe = probe.reshape(1, 4, width)
                changed = probe.clone()
                changed[:, -1] = -changed[:, -1]
                ahead = (self._hidden(probe) - self._hidden(changed))[:, :-1].abs().max().item()
        finally:
            self.decoder.train(training)
        if ahead > 1e-3:
            raise ValueError(
                f"{type(self.decoder).__name__} is not causal: changing the last token moved earlier ones by "
                f"{ahead:.2g}"
            )
