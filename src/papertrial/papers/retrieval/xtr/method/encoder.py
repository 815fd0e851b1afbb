"""One unit vector per token of a text."""

import contextlib
import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from papertrial.errors import UsageError
from papertrial.lm.anatomy import anatomy, position_limit
from papertrial.lm.encoders import encode_batches, load_minilm, token_states
from papertrial.lm.generation import evaluating, position_ids
from papertrial.lm.hooks import record
from papertrial.lm.models import Checkpoint, load

WEIGHTS, CARD = "trained.safetensors", "xtr.json"


class TokenEncoder(nn.Module):
    """A transformer that reads in both directions, a linear projection of every token, and L2 normalisation.

    Special tokens are kept as tokens; queries are not augmented. A decoder is read with a mask that hides padding only,
    so that its tokens see those after them too.

    Parameters
    ----------
    checkpoint
        An encoder or a decoder of transformers with its tokenizer.
    dim
        Width of a token vector; 128 in the paper. None leaves the states as they are.
    trained_layers
        How many of the last blocks are trained beside the projection; the rest of the model is frozen.
    max_length
        Texts are cut there, special tokens included.
    generator
        Of the projection's start, on the CPU.

    Raises
    ------
    ValueError
        For sizes out of range.

    References
    ----------
    arXiv 2304.01982, section 2.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dim: int | None = 128,
        *,
        trained_layers: int = 0,
        max_length: int = 512,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        parts = anatomy(checkpoint.model)
        if not 0 <= trained_layers <= len(parts.blocks):
            raise ValueError(f"trained_layers must lie between 0 and {len(parts.blocks)}, got {trained_layers}")
        if dim is not None and dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        self.checkpoint, self.max_length, self.trained_layers = checkpoint, max_length, trained_layers
        self.model: PreTrainedModel = checkpoint.model
        self.model.requires_grad_(False)
        self.family, self.below = parts.family, len(parts.blocks) - trained_layers
        self.upper = [block.module for block in parts.blocks[self.below :]]
        for module in self.upper:
            module.requires_grad_(True)
        self.projection: nn.Linear | None = None
        if dim is not None:
            self.projection = nn.Linear(parts.width, dim, bias=False)
            nn.init.orthogonal_(self.projection.weight, generator=generator)
            self.projection.to(self.model.device)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.checkpoint.tokenizer

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    @property
    def dim(self) -> int:
        """Width of a token vector."""
        return self.projection.out_features if self.projection is not None else int(self.model.config.hidden_size)

    def forward(self, inputs: Tensor, attention_mask: Tensor) -> Tensor:
        """Unit vectors (B, S, dim) of a padded batch; those of padding mean nothing.

        Parameters
        ----------
        inputs
            Ids (B, S), or the states (B, S, D) that enter the trained layers, see :meth:`states`.
        attention_mask
            (B, S) of 0 and 1; padding may stand on either side.

        Raises
        ------
        ValueError
            For a mask of another shape, or more tokens than the model has positions.
        """
        if attention_mask.shape != inputs.shape[:2]:
            raise ValueError(
                f"attention_mask must be {tuple(inputs.shape[:2])} like the inputs, got {tuple(attention_mask.shape)}"
            )
        if inputs.dim() == 2:
            return self._project(self._body(inputs, attention_mask))
        if not self.upper:
            return self._project(inputs)
        if self.family.causal:
            places = torch.zeros(inputs.shape[:2], dtype=torch.long, device=inputs.device)
            with self._entering_upper(inputs):
                return self._project(self._body(places, attention_mask))
        mask = _additive(attention_mask, inputs.dtype)
        for block in self.upper:
            out = block(inputs, attention_mask=mask)
            inputs = out[0] if isinstance(out, tuple) else out
        return self._project(inputs)

    def _body(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Last hidden states, with positions that ignore padding and every token visible to every other."""
        body: Any = anatomy(self.model).body
        positions, limit = position_ids(attention_mask), position_limit(self.model)
        if limit is not None and int(positions.max()) >= limit:
            raise ValueError(
                f"a text of {int(positions.max()) + 1} tokens does not fit the model's {limit} positions: give a "
                "smaller max_length"
            )
        if self.family.position_offset == "pad":
            positions = positions + int(self.model.config.pad_token_id) + 1
        options: dict[str, Any] = {"input_ids": ids, "attention_mask": attention_mask}
        if "position_ids" in inspect.signature(body.forward).parameters:
            options["position_ids"] = positions
        if self.family.causal:  # a mask of four dimensions is taken as it is, in place of the causal one
            wide = _additive(attention_mask, self.model.dtype).expand(-1, 1, ids.shape[1], -1)
            options |= {"attention_mask": wide, "use_cache": False}
        return cast(Tensor, body(**options).last_hidden_state)

    @contextlib.contextmanager
    def _entering_upper(self, states: Tensor) -> Iterator[None]:
        """A decoder whose blocks are the trained ones, the first of which reads ``states``.

        The body around them computes what its blocks need, such as rotations, and the final norm.
        """
        owner: Any = anatomy(self.model).body
        *path, name = self.family.layers.split(".")
        for step in path:
            owner = getattr(owner, step)

        def replace(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
            return ((states, *given[1:]), named) if given else ((), {**named, "hidden_states": states})

        every, handle = getattr(owner, name), self.upper[0].register_forward_pre_hook(replace, with_kwargs=True)
        setattr(owner, name, nn.ModuleList(self.upper))
        try:
            yield
        finally:
            setattr(owner, name, every)
            handle.remove()

    def _project(self, states: Tensor) -> Tensor:
        return normalize(states if self.projection is None else self.projection(states), dim=-1)

    @torch.no_grad()
    def states(
        self,
        texts: Sequence[str],
        *,
        max_length: int | None = None,
        batch_size: int = 32,
        on_progress: Callable[[int, int | None], None] | None = None,
    ) -> list[NDArray[np.float16]]:
        """What enters the trained layers for every token of every text: training changes nothing below them.

        Parameters
        ----------
        max_length
            Texts are cut there; default the encoder's own.
        on_progress
            Hears (texts done, texts).

        Returns
        -------
        list
            One float16 array (S, D) per text. Those of an encoder with a frozen layer are kept in the cache.
        """
        longest = self.max_length if max_length is None else max_length
        if not self.family.causal and self.below:
            return token_states(
                self.checkpoint, texts, layer=-1 - self.trained_layers, max_length=longest, batch_size=batch_size,
                on_progress=on_progress,
            )  # fmt: skip
        if not texts:
            raise ValueError("texts is empty: give at least one")
        found: list[NDArray[np.float16]] = [np.empty((0, 0), np.float16)] * len(texts)
        done = 0
        for places, ids, mask in encode_batches(self.checkpoint, texts, longest, batch_size):
            layers = [self.below] if self.upper else []
            with evaluating(self.model), record(self.model, "resid_pre", layers=layers) as seen:
                last = self._body(ids.to(self.device), mask.to(self.device))
            hidden = (seen["resid_pre"][self.below] if self.upper else last).to("cpu", torch.float16).numpy()
            if not np.isfinite(hidden).all():
                raise ValueError(f"states of {self.checkpoint.name} do not fit into half precision")
            for row, place in enumerate(places):
                found[place] = hidden[row, : int(mask[row].sum())]
            done += len(places)
            if on_progress:
                on_progress(done, len(texts))
        return found

    @torch.no_grad()
    def encode(self, texts: Sequence[str], *, batch_size: int = 32) -> list[Tensor]:
        """Unit vectors (S, dim) float32 of each text, on the CPU.

        Raises
        ------
        ValueError
            For a text without a token.
        """
        found: list[Tensor] = [torch.empty(0)] * len(texts)
        with evaluating(self):
            for places, ids, mask in encode_batches(self.checkpoint, texts, self.max_length, batch_size):
                if not bool(mask.any(1).all()):
                    raise ValueError("a text has no token: leave empty texts out")
                vectors = self(ids.to(self.device), mask.to(self.device)).float().cpu()
                for row, place in enumerate(places):
                    found[place] = vectors[row, : int(mask[row].sum())]
        return found

    def save(self, folder: Path | str) -> None:
        """Write what was trained, and which model it stands on; the model itself is not copied."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: p.detach().cpu().contiguous() for name, p in self._trained().items()}, folder / WEIGHTS)
        card = {
            "model": self.checkpoint.name,
            "digest": self.checkpoint.digest,
            "kind": "causal" if self.family.causal else "encoder",
            "dim": None if self.projection is None else self.dim,
            "trained_layers": self.trained_layers,
            "max_length": self.max_length,
        }
        (folder / CARD).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path | str, *, device: torch.device | str = "cpu") -> "TokenEncoder":
        """Read what :meth:`save` wrote, over the same model.

        Raises
        ------
        UsageError
            If the folder holds no encoder, its weights do not fit, or the model has changed since.
        """
        folder = Path(folder)
        try:
            card = json.loads((folder / CARD).read_text(encoding="utf-8"))
            name, kind = card["model"], card.get("kind", "encoder")
            base = load_minilm(device=device) if name == "all-MiniLM-L6-v2" else load(name, kind=kind, device=device)
            encoder = cls(base, card["dim"], trained_layers=card["trained_layers"], max_length=card["max_length"])
            tensors = load_file(folder / WEIGHTS)
        except FileNotFoundError:
            raise UsageError(f"{folder} holds no trained token encoder") from None
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise UsageError(f"{folder}: the token encoder cannot be read: {error}") from error
        if base.digest != card["digest"]:
            raise UsageError(f"{folder} was trained over another version of {name}: train it again")
        own = encoder._trained()
        if {name: p.shape for name, p in own.items()} != {name: t.shape for name, t in tensors.items()}:
            raise UsageError(f"{folder}: {WEIGHTS} does not hold the weights of such an encoder")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(tensors[name])
        return encoder.eval()

    def _trained(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {
            f"upper.{i}.{name}": p for i, block in enumerate(self.upper) for name, p in block.named_parameters()
        }
        if self.projection is not None:
            found["projection.weight"] = self.projection.weight
        return found


def _additive(attention_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 1, 1, S): 0 on tokens, the lowest number on padding."""
    mask = torch.zeros(attention_mask.shape, dtype=dtype, device=attention_mask.device)
    return mask.masked_fill(~attention_mask.bool(), torch.finfo(dtype).min)[:, None, None]
