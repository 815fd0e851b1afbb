"""What an ``experiment.py`` is given: one seed of one paper at one scale, on one device.

An experiment reads its sizes from ``trial["steps"]``, draws randomness from ``trial.generator(...)``, loads models
through ``trial.checkpoint(...)`` and returns ``{arm: {metric: value}}``. Everything else - repetition, resuming,
timing, recording, statistics - is the runner's.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from papertrial.errors import PapertrialError, UsageError

if TYPE_CHECKING:
    import numpy as np
    import torch

    from papertrial.lm.models import Checkpoint

Item = TypeVar("Item")
Metrics = dict[str, dict[str, float]]


class PreconditionFailed(PapertrialError):
    """The set-up cannot test the claim (the base model is too weak, the effect is absent): undecided, not a number."""


class ProgressListener:
    """Hears what a trial is doing. The default hears nothing; the command line shows a bar."""

    def update(self, what: str, done: int, total: int | None) -> None:
        """``done`` of ``total`` steps of the part called ``what`` are finished."""


class Trial:
    """One seeded run of all arms on the same work.

    Parameters
    ----------
    slug, scale : the paper and the scale being run.
    seed : non-negative integer; everything random derives from it.
    parameters : the scale's entry of ``SCALES`` without its ``seeds``.
    device : where the arms run.
    scratch : a folder of this seed alone, kept until the run is recorded; for checkpoints of long arms.
    model : the user's ``--model`` (hub id, local folder or ``house:<name>``), or None for the experiment's own choice.
    progress : hears about progress.
    """

    def __init__(
        self,
        slug: str,
        scale: str,
        seed: int,
        parameters: Mapping[str, Any],
        *,
        device: "torch.device | str" = "cpu",
        scratch: Path | None = None,
        model: str | None = None,
        progress: ProgressListener | None = None,
    ) -> None:
        import torch

        self.slug = slug
        self.scale = scale
        self.seed = seed
        self.parameters = dict(parameters)
        self.device = torch.device(device)
        self.requested_model = model
        self.curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
        self.figures: list[dict[str, Any]] = []
        self.examples: list[dict[str, Any]] = []
        self.notes: dict[str, str | float] = {}
        self.models: dict[str, str] = {}
        self._scratch = scratch
        self._progress = progress or ProgressListener()

    # -- what the experiment reads -------------------------------------------------------------------------------

    def __getitem__(self, parameter: str) -> Any:
        """A parameter of the scale, such as ``trial["steps"]``."""
        try:
            return self.parameters[parameter]
        except KeyError:
            raise KeyError(
                f"scale {self.scale!r} of {self.slug} has no {parameter!r}; it has {sorted(self.parameters)}"
            ) from None

    @property
    def scratch(self) -> Path:
        """A folder of this seed's own, created on first use."""
        if self._scratch is None:
            raise RuntimeError("this trial was built without a scratch folder")
        self._scratch.mkdir(parents=True, exist_ok=True)
        return self._scratch

    def _stream(self, purpose: str) -> int:
        digest = hashlib.sha256(f"{self.slug}/{self.seed}/{purpose}".encode()).digest()
        return int.from_bytes(digest[:7], "big")

    def generator(self, purpose: str = "", device: "torch.device | str" = "cpu") -> "torch.Generator":
        """A fresh generator for one purpose. The same seed and purpose always give the same stream, in every arm."""
        import torch

        return torch.Generator(device=device).manual_seed(self._stream(purpose))

    def numpy_generator(self, purpose: str = "") -> "np.random.Generator":
        """The same for numpy."""
        import numpy as np

        return np.random.default_rng(self._stream(purpose))

    def checkpoint(self, default: str) -> "Checkpoint":
        """The user's ``--model`` if one was given, else ``default`` (``house:prose``, a hub id ...), on the device."""
        from papertrial.lm.models import load

        checkpoint = load(self.requested_model or default, device=self.device)
        self.models[checkpoint.name] = checkpoint.digest
        return checkpoint

    # -- what the experiment reports -----------------------------------------------------------------------------

    def require(self, condition: bool, reason: str) -> None:
        """State a precondition of the test. Where it fails the verdict is ``undecided`` with this reason."""
        if not condition:
            raise PreconditionFailed(reason)

    def track(self, items: Iterable[Item], what: str, total: int | None = None) -> Iterator[Item]:
        """Iterate with progress shown under the name ``what``."""
        if total is None and hasattr(items, "__len__"):
            total = len(items)  # type: ignore[arg-type]
        self._progress.update(what, 0, total)
        for done, item in enumerate(items, start=1):
            yield item
            self._progress.update(what, done, total)

    def reporter(self, what: str) -> Callable[[int, int | None], None]:
        """A callback ``(done, total)`` for loops that are not ours, such as the training loop's ``on_progress``."""
        return lambda done, total: self._progress.update(what, done, total)

    def log(self, curve: str, arm: str, x: float, y: float) -> None:
        """Add a point to an arm's line of a curve, as in ``trial.log("validation loss", "adamw", step, loss)``."""
        self.curves.setdefault(curve, {}).setdefault(arm, []).append((float(x), float(y)))

    def figure(
        self,
        name: str,
        *,
        caption: str,
        kind: Literal["line", "scatter", "bar", "heatmap", "histogram"] = "line",
        x_label: str = "",
        y_label: str = "",
        series: "Mapping[str, Sequence[Any] | np.ndarray | torch.Tensor]",
        x: "Sequence[Any] | np.ndarray | torch.Tensor | None" = None,
        log_x: bool = False,
        log_y: bool = False,
    ) -> None:
        """Keep a figure as data; reports and pages draw it.

        ``line``, ``scatter`` and ``bar``: ``series`` maps a label to its y values along ``x`` (numbers, or strings for
        bars; default 0, 1, 2 ...), or to a list of (x, y) pairs. ``histogram``: labels to raw values. ``heatmap``: one
        series, a list of rows. Figures larger than 4,000 numbers are refused: thin them first.
        """
        from papertrial.lab.figures import figure_data

        self.figures.append(
            figure_data(
                name,
                caption=caption,
                kind=kind,
                x_label=x_label,
                y_label=y_label,
                series=series,
                x=x,
                log_x=log_x,
                log_y=log_y,
            )
        )

    def example(self, title: str, prompt: str, outputs: Mapping[str, str]) -> None:
        """Keep what the arms produced on one input, for readers to see: ``outputs`` maps an arm to its text."""
        if len(self.examples) < 8:
            self.examples.append(
                {"title": title, "prompt": prompt[:2000], "outputs": {a: t[:2000] for a, t in outputs.items()}}
            )

    def note(self, name: str, value: str | float) -> None:
        """Keep a fact about the set-up that readers of the evidence need (a tuned learning rate, a parameter count)."""
        self.notes[name] = value


def trial_parameters(
    slug: str, scales: Mapping[str, Mapping[str, Any]], scale: str
) -> tuple[list[int], dict[str, Any]]:
    """Seeds and parameters of a scale of an experiment's ``SCALES``; ``seeds`` may be a count or a list."""
    if scale not in scales:
        raise UsageError(f"{slug} has no scale {scale!r}; it has {', '.join(scales)}")
    parameters = dict(scales[scale])
    seeds = parameters.pop("seeds", 1)
    return (list(range(seeds)) if isinstance(seeds, int) else [int(s) for s in seeds]), parameters
