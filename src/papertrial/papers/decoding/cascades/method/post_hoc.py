"""The learned rule: a small network that reads quantiles (and states) and says how much the large model would gain."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import torch
from numpy.typing import ArrayLike
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from papertrial.lm.losses import Batch, Loss
from papertrial.lm.training import StepReport, adamw, train, warmup_cosine
from papertrial.papers.decoding.cascades.method.answers import Records
from papertrial.papers.decoding.cascades.method.confidence import ALPHAS, quantile_features

Features = Literal["quantile", "quantile+embed1", "quantile+embed1+embed2"]
Target = Literal["regression", "classification"]
_STANDARDS = ("mean", "scale", "offset", "spread")


class PostHocDeferral:
    """A deferral rule that is learnt from inputs both models have answered.

    Parameters
    ----------
    features
        ``quantile``: quantiles, sum and mean of the token log-probabilities. ``+embed1``: the small model's mean
        last-layer state. ``+embed2``: early states of the large model.
    target
        ``regression`` of the gain ``q_large - q_small`` (squared error), or ``classification`` of whether the large
        model is better (cross-entropy). Default: classification where all qualities are 0 or 1 and the large model is
        better on some inputs but not on all, else regression; :attr:`fitted_target` says which it was.
    alphas, length
        See :func:`quantile_features`.
    hidden
        Widths of the hidden layers.
    steps, lr, weight_decay, dropout
        Full-batch AdamW; the weights of the step with the least loss on the held-out part are kept.
    held_out
        Share of the fitted records that is kept for that choice.
    generator
        Source of initial weights, the split and dropout.

    References
    ----------
    arXiv 2404.10136.
    """

    def __init__(
        self,
        features: Features = "quantile",
        *,
        target: Target | None = None,
        alphas: Sequence[float] = ALPHAS,
        length: bool = False,
        hidden: Sequence[int] = (32, 32),
        steps: int = 400,
        lr: float = 3e-3,
        weight_decay: float = 0.05,
        dropout: float = 0.1,
        held_out: float = 1 / 3,
        generator: torch.Generator,
    ) -> None:
        if features not in get_args(Features):
            raise ValueError(f"features must be one of {', '.join(get_args(Features))}; got {features!r}")
        if target is not None and target not in get_args(Target):
            raise ValueError(f"target must be one of {', '.join(get_args(Target))} or None; got {target!r}")
        if not 0 < held_out < 1:
            raise ValueError(f"held_out is a share between 0 and 1, got {held_out}")
        if not hidden or min(hidden) < 1:
            raise ValueError(f"hidden must name one width or more, got {list(hidden)}")
        self.features, self.target, self.alphas, self.length = features, target, tuple(alphas), length
        self.hidden, self.steps, self.lr = tuple(hidden), steps, lr
        self.weight_decay, self.dropout, self.held_out = weight_decay, dropout, held_out
        self.generator = generator
        self.network: nn.Module | None = None
        self.fitted_target: Target | None = None

    @property
    def needs_large(self) -> bool:
        """Whether part of the large model runs before the decision."""
        return "embed2" in self.features

    def phi(self, records: Records) -> Tensor:
        """Features (N, P) before they are standardised.

        Raises
        ------
        ValueError
            If the rule reads early states of the large model and the records have none.
        """
        parts = [quantile_features(records.log_probs, self.alphas, length=self.length)]
        if "embed1" in self.features:
            parts.append(records.states.double())
        if self.needs_large:
            if records.early is None:
                raise ValueError("the rule reads early states of the large model: make the records with large=...")
            parts.append(records.early.double())
        return torch.cat(parts, 1)

    def fit(self, records: Records, q_small: ArrayLike, q_large: ArrayLike) -> "PostHocDeferral":
        """Learn from records and the quality (N,) of both models' answers; not from inputs the models were trained on.

        Raises
        ------
        ValueError
            Columns of other lengths or with numbers that are not finite; fewer than 8 records; where classification
            was asked for, a large model that is never or always better.
        """
        return self.fit_features(self.phi(records), q_small, q_large)

    def fit_features(self, phi: Tensor, q_small: ArrayLike, q_large: ArrayLike) -> "PostHocDeferral":
        """:meth:`fit` on features (N, P) made by other means."""
        gain, graded = self._gain(len(phi), q_small, q_large)
        self.fitted_target = self._chosen_target(gain, graded)
        target = (gain > 0).double() if self.fitted_target == "classification" else gain
        if not bool(torch.isfinite(phi).all()):
            raise ValueError("phi holds a number that is not finite")
        count = round(self.held_out * len(phi))
        if not 1 <= count <= len(phi) - 2:
            raise ValueError(
                f"held_out {self.held_out} of {len(phi)} records leaves {count} for the choice and {len(phi) - count} "
                "to fit on: at least 1 and 2 are needed"
            )
        held, fitted = torch.randperm(len(phi), generator=self.generator).split([count, len(phi) - count])
        self.mean, self.scale = phi[fitted].mean(0), phi[fitted].std(0)
        self.scale[self.scale < 1e-8] = 1.0  # a constant feature says nothing
        inputs = self._standardised(phi)
        self.offset, self.spread = torch.zeros(()).double(), torch.ones(()).double()
        if self.fitted_target == "regression":
            self.offset, self.spread = target[fitted].mean(), target[fitted].std().clamp(min=1e-8)
        wanted = ((target - self.offset) / self.spread).float()
        self.network = self._train(inputs[fitted], wanted[fitted], inputs[held], wanted[held])
        return self

    def score(self, records: Records) -> Tensor:
        """Confidence (N,) that the small model's answer should be kept: minus the expected gain (regression), or minus
        the log-odds that the large model is better."""
        return self.score_features(self.phi(records))

    @torch.no_grad()
    def score_features(self, phi: Tensor) -> Tensor:
        """:meth:`score` of features (N, P)."""
        if self.network is None:
            raise ValueError("the rule has not been fitted: call fit first")
        if phi.shape[1] != len(self.mean):
            raise ValueError(f"the rule was fitted on {len(self.mean)} features, got {phi.shape[1]}")
        return -(self.network(self._standardised(phi))[:, 0].double() * self.spread + self.offset)

    def _standardised(self, phi: Tensor) -> Tensor:
        return ((phi - self.mean) / self.scale).float()

    def _gain(self, rows: int, q_small: ArrayLike, q_large: ArrayLike) -> tuple[Tensor, bool]:
        """The gains (N,), and whether the qualities are other numbers than 0 and 1."""
        small, large = (torch.as_tensor(q, dtype=torch.float64) for q in (q_small, q_large))
        if small.shape != (rows,) or large.shape != (rows,):
            raise ValueError(
                f"{rows} records need as many qualities, got {tuple(small.shape)} and {tuple(large.shape)}"
            )
        if rows < 8:
            raise ValueError(f"a rule needs at least 8 records to be fitted on, got {rows}")
        gain, both = large - small, torch.cat([small, large])
        if not bool(torch.isfinite(gain).all()):
            raise ValueError("the qualities hold a number that is not finite")
        return gain, not bool(((both == 0) | (both == 1)).all())

    def _chosen_target(self, gain: Tensor, graded: bool) -> Target:
        better = gain > 0
        mixed = bool(better.any()) and not bool(better.all())
        if self.target == "classification" and not mixed:
            raise ValueError(
                f"the large model is {'always' if better[0] else 'never'} better on these records: there is nothing to "
                "classify; fit target='regression', or use a quantile of the log-probabilities as it is"
            )
        return self.target or ("classification" if mixed and not graded else "regression")

    def _loss(self, network: nn.Module, inputs: Tensor, target: Tensor) -> Tensor:
        guess = network(inputs)[:, 0]
        if self.fitted_target == "regression":
            return nn.functional.mse_loss(guess, target)
        return nn.functional.binary_cross_entropy_with_logits(guess, target)

    def _train(self, inputs: Tensor, target: Tensor, held: Tensor, held_target: Tensor) -> nn.Module:
        seed = int(torch.randint(2**62, (1,), generator=self.generator))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = self._network(inputs.shape[1])
        best: tuple[float, dict[str, Tensor]] = (float("inf"), copy.deepcopy(network.state_dict()))

        def loss(model: nn.Module, _: Batch) -> Loss:
            return Loss(self._loss(model, inputs, target), 1.0)

        def keep_best(report: StepReport) -> None:
            nonlocal best
            if report.step % 5 == 0 or report.step == report.steps:
                network.eval()
                with torch.no_grad():
                    value = float(self._loss(network, held, held_target))
                if value < best[0]:
                    best = (value, copy.deepcopy(network.state_dict()))

        train(
            network,
            [inputs],
            steps=self.steps,
            optimizer=adamw(self.lr, weight_decay=self.weight_decay),
            schedule=warmup_cosine(self.steps, 0, floor=0.1),
            loss=loss,
            seed=seed,
            on_step=keep_best,
        )
        if best[0] == float("inf"):
            raise ValueError(f"training did not give a finite loss: lower lr, which is {self.lr}")
        network.load_state_dict(best[1])
        return network.eval()

    def _network(self, width: int) -> nn.Module:
        layers: list[nn.Module] = []
        for wide in self.hidden:
            layers += [nn.Linear(width, wide), nn.ReLU(), nn.Dropout(self.dropout)]
            width = wide
        return nn.Sequential(*layers, nn.Linear(width, 1))

    # -- keeping a fitted rule ---------------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write a fitted rule to a safetensors file.

        Raises
        ------
        ValueError
            If it has not been fitted.
        """
        if self.network is None:
            raise ValueError("the rule has not been fitted: call fit first")
        tensors = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        tensors |= {name: getattr(self, name).clone() for name in _STANDARDS}
        settings = {
            "features": self.features, "target": self.fitted_target, "alphas": self.alphas, "length": self.length,
            "hidden": self.hidden,
        }  # fmt: skip
        save_file(tensors, path, {"deferral": json.dumps(settings)})

    @classmethod
    def load(cls, path: Path) -> "PostHocDeferral":
        """Read a rule that :meth:`save` wrote; it scores as it did, and can be fitted anew.

        Raises
        ------
        ValueError
            If the file is not one of a deferral rule.
        """
        try:
            with safe_open(path, "pt") as file:
                settings = json.loads((file.metadata() or {})["deferral"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            target = settings.pop("target")
            rule = cls(**settings, generator=torch.Generator().manual_seed(0))
            network = rule._network(len(tensors["mean"]))
            network.load_state_dict({n.removeprefix("network."): v for n, v in tensors.items() if "." in n})
            rule.mean, rule.scale, rule.offset, rule.spread = (tensors[name] for name in _STANDARDS)
        except (SafetensorError, KeyError, TypeError, RuntimeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not a saved deferral rule: {error}") from error
        rule.network, rule.fitted_target = network.eval(), target
        return rule
