"""One unit vector per token of a text."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from papertrial.errors import UsageError
from papertrial.lm.anatomy import anatomy
from papertrial.lm.encoders import encode_batches, load_minilm
from papertrial.lm.generation import evaluating
from papertrial.lm.models import Checkpoint, load

WEIGHTS, CARD = "trained.safetensors", "xtr.json"


class TokenEncoder(nn.Module):
    """A bidirectional transformer, a linear projection of every token, and L2 normalisation.

    Special tokens are kept as tokens; queries are not augmented.

    Parameters
    ----------
    checkpoint
        An encoder of transformers with its tokenizer.
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
        For a decoder, or sizes out of range.

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
        if parts.family.causal:
            raise ValueError(f"{checkpoint.name} reads from left to right: token vectors need an encoder such as BERT")
        if not 0 <= trained_layers <= len(parts.blocks):
            raise ValueError(f"trained_layers must lie between 0 and {len(parts.blocks)}, got {trained_layers}")
        if dim is not None and dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        self.checkpoint, self.max_length, self.trained_layers = checkpoint, max_length, trained_layers
        self.model: PreTrainedModel = checkpoint.model
        self.model.requires_grad_(False)
        self.upper = [block.module for block in parts.blocks[len(parts.blocks) - trained_layers :]]
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
    def dim(self) -> int:
        """Width of a token vector."""
        return self.projection.out_features if self.projection is not None else int(self.model.config.hidden_size)

    def forward(self, inputs: Tensor, attention_mask: Tensor) -> Tensor:
        """Unit vectors (B, S, dim) of a padded batch.

        Parameters
        ----------
        inputs
            Ids (B, S), or the states (B, S, D) that enter the trained layers: nothing below them changes in training,
            so they can be kept (``token_states(checkpoint, texts, layer=-1 - trained_layers)``).
        attention_mask
            (B, S).
        """
        if inputs.dim() == 2:
            return self._project(self.model(input_ids=inputs, attention_mask=attention_mask).last_hidden_state)
        mask = torch.zeros(len(inputs), 1, 1, inputs.shape[1], dtype=inputs.dtype, device=inputs.device)
        mask = mask.masked_fill(~attention_mask.bool()[:, None, None], torch.finfo(inputs.dtype).min)
        for block in self.upper:
            out = block(inputs, attention_mask=mask)
            inputs = out[0] if isinstance(out, tuple) else out
        return self._project(inputs)

    def _project(self, states: Tensor) -> Tensor:
        return normalize(states if self.projection is None else self.projection(states), dim=-1)

    @torch.no_grad()
    def encode(self, texts: Sequence[str], *, batch_size: int = 32) -> list[Tensor]:
        """Unit vectors (S, dim) float32 of each text, on the CPU."""
        found: list[Tensor] = [torch.empty(0)] * len(texts)
        device = self.model.device
        with evaluating(self):
            for places, ids, mask in encode_batches(self.checkpoint, texts, self.max_length, batch_size):
                vectors = self(ids.to(device), mask.to(device)).float().cpu()
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
            name = card["model"]
            base = (
                load_minilm(device=device) if name == "all-MiniLM-L6-v2" else load(name, kind="encoder", device=device)
            )
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
