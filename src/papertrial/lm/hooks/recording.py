"""Keeping what passes a site."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from papertrial.lm.anatomy import anatomy
from papertrial.lm.hooks.junctions import attach_reader
from papertrial.lm.hooks.sites import BLOCK_SITES, SITES, locate


class Recording:
    """What was seen, of the latest forward or of all.

    ``recording["resid_post"][3]`` is layer 3's tensor, ``recording["resid_post"]`` a dictionary by layer,
    ``recording["final_hidden"]`` a tensor.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[str, int | None], list[Tensor]] = {}

    def __getitem__(self, site: str) -> Any:
        return self._by_layer(site, lambda passes: passes[-1])

    def history(self, site: str) -> Any:
        """All forwards in order (needs ``every=True``): a list, or a dictionary of lists by layer."""
        return self._by_layer(site, lambda passes: list(passes))

    def _by_layer(self, site: str, pick: Callable[[list[Tensor]], Any]) -> Any:
        layers = {layer: passes for (name, layer), passes in self._seen.items() if name == site}
        if not layers:
            recorded = sorted({name for name, _ in self._seen})
            raise KeyError(f"{site!r} was not recorded; recorded: {', '.join(recorded) or 'nothing'}")
        empty = [layer for layer, passes in layers.items() if not passes]
        if empty:
            raise KeyError(f"{site!r} of layer {empty[0]} was not passed: run the model inside the block")
        if None in layers:
            return pick(layers[None])
        return {layer: pick(passes) for layer, passes in layers.items()}


@contextlib.contextmanager
def record(
    model: nn.Module,
    sites: str | Iterable[str],
    *,
    layers: Sequence[int] | None = None,
    detach: bool = True,
    every: bool = False,
) -> Iterator[Recording]:
    """Record sites during the block.

        with record(model, ["resid_post", "final_hidden"]) as seen:
            model(**inputs)
        seen["resid_post"][3]        # (B, T, D)

    Parameters
    ----------
    model
        Any model that :func:`papertrial.lm.anatomy.anatomy` knows.
    sites
        Names from :mod:`papertrial.lm.hooks.sites`.
    layers
        Which layers, negative ones count from the end; default all. Keys of the recording are never negative.
    detach
        Detach from the graph. With False the tensors can be differentiated by and through.
    every
        Keep all forwards (each decoding step) instead of the latest, see :meth:`Recording.history`.

    Notes
    -----
    Recorded values are those after all patches, whichever context was entered first. With gradient checkpointing a
    block's sites pass twice per step: record without gradients there.
    """
    parts = anatomy(model)
    names = [sites] if isinstance(sites, str) else list(sites)
    unknown = [name for name in names if name not in SITES]
    if unknown:
        raise ValueError(f"unknown site {unknown[0]!r}; known: {', '.join(SITES)}")
    count = len(parts.blocks)
    chosen = range(count) if layers is None else [layer + count if -count <= layer < 0 else layer for layer in layers]
    recording = Recording()
    with contextlib.ExitStack() as stack:
        for name in dict.fromkeys(names):
            for layer in chosen if name in BLOCK_SITES else [None]:
                passes = recording._seen.setdefault((name, layer), [])
                reader = _keep(passes, detach=detach, every=every)
                stack.callback(attach_reader(locate(parts, name, layer), reader, on_path=not detach))
        yield recording


def _keep(passes: list[Tensor], *, detach: bool, every: bool) -> Callable[[Tensor], None]:
    def reader(values: Tensor) -> None:
        if not every:
            passes.clear()
        passes.append(values.detach() if detach else values)

    return reader
