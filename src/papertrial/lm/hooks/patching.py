"""Changing what passes a site: replace, add, scale, or any function, at chosen positions and units."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from papertrial.lm.anatomy import anatomy
from papertrial.lm.hooks.junctions import attach_edit
from papertrial.lm.hooks.sites import HEAD_SITES, locate

Positions = int | Sequence[int] | Tensor | None
Units = int | Sequence[int] | None


@dataclass(frozen=True)
class Edit:
    """One change of one site; made by :func:`replace`, :func:`add`, :func:`scale` or :func:`change`.

    Attributes
    ----------
    site, layer
        Where, see :mod:`papertrial.lm.hooks.sites`; ``layer`` is None for ``final_hidden``.
    function
        From the selected values to new ones of a shape that broadcasts to theirs. They are cast to the model's dtype.
    positions
        Time steps of this forward, negative ones from the end. None: all, the selection is (B, T, ...). An int: one
        step, (B, ...). A list of P ints: those steps in every row, (B, P, ...). A tensor (B,): one step per row, (B,
        ...). A tensor (B, P): P steps per row, (B, P, ...).
    units
        Heads (of ``query``, ``key``, ``value``, ``head_out``) or entries of the last axis (elsewhere). None: all. An
        int takes that axis away, a list keeps it.
    """

    site: str
    layer: int | None
    function: Callable[[Tensor], Tensor]
    positions: Positions = None
    units: Units = None

    def __call__(self, values: Tensor) -> Tensor:
        """The edited values (B, T, ...)."""
        rows, steps = self._steps(values)
        index: Any = (rows, steps) if steps is not None else (slice(None), slice(None))
        if self.units is not None:
            axis = -2 if self.site in HEAD_SITES else -1
            size = values.shape[axis]
            wanted = [self.units] if isinstance(self.units, int) else list(self.units)
            if not wanted or not all(-size <= unit < size for unit in wanted):
                raise ValueError(f"units of {self.site} must lie in 0 .. {size - 1}, got {self.units!r}")
            values = values.movedim(axis, 2)
        # select in two steps: indexing time and units with tensors at once would pair them off
        part = values[index]
        unit_axis = part.dim() - (values.dim() - 2)
        selected = part if self.units is None else _take(part, unit_axis, self.units)
        new = self.function(selected)
        try:
            new = torch.broadcast_to(torch.as_tensor(new).to(selected), selected.shape)
        except RuntimeError as error:
            raise ValueError(
                f"new values of {self.site} are {tuple(new.shape)} and must fit the selection {tuple(selected.shape)}"
            ) from error
        edited = values.clone()
        edited[index] = new if self.units is None else _put(part, unit_axis, self.units, new)
        return edited.movedim(2, -2 if self.site in HEAD_SITES else -1) if self.units is not None else edited

    def _steps(self, values: Tensor) -> tuple[Tensor | slice, Tensor | int | None]:
        """Row and time indices that select the positions together; time None for all."""
        batch, length = values.shape[:2]
        if self.positions is None:
            return slice(None), None
        if isinstance(self.positions, Tensor):
            steps = self.positions.to(values.device)
            if steps.dim() not in (1, 2) or steps.shape[0] != batch or steps.is_floating_point():
                raise ValueError(
                    f"positions must be integers ({batch},) or ({batch}, P), got {steps.dtype} {tuple(steps.shape)}"
                )
        else:
            steps = torch.tensor(self.positions, dtype=torch.long, device=values.device)
        if steps.numel() == 0 or int(steps.min()) < -length or int(steps.max()) >= length:
            raise ValueError(f"positions must lie within the {length} steps of this forward, got {self.positions!r}")
        if not isinstance(self.positions, Tensor):
            return slice(None), steps if steps.dim() else int(steps)
        rows = torch.arange(batch, device=values.device)
        return (rows if steps.dim() == 1 else rows[:, None]), steps % length


def _take(part: Tensor, axis: int, units: int | Sequence[int]) -> Tensor:
    if isinstance(units, int):
        return part.select(axis, units)
    return part.movedim(axis, 0)[list(units)].movedim(0, axis)


def _put(part: Tensor, axis: int, units: int | Sequence[int], new: Tensor) -> Tensor:
    moved = part.movedim(axis, 0).clone()
    moved[units if isinstance(units, int) else list(units)] = new if isinstance(units, int) else new.movedim(axis, 0)
    return moved.movedim(0, axis)


def replace(site: str, layer: int | None, values: Tensor, *, positions: Positions = None, units: Units = None) -> Edit:
    """Put ``values`` in place of the selection."""
    return Edit(site, layer, lambda _: values, positions, units)


def add(site: str, layer: int | None, values: Tensor, *, positions: Positions = None, units: Units = None) -> Edit:
    """Add ``values`` to the selection."""
    return Edit(site, layer, lambda selected: selected + values.to(selected), positions, units)


def scale(
    site: str, layer: int | None, factor: float | Tensor, *, positions: Positions = None, units: Units = None
) -> Edit:
    """Multiply the selection; 0 ablates it."""
    return Edit(
        site,
        layer,
        lambda selected: selected * (factor.to(selected) if isinstance(factor, Tensor) else factor),
        positions,
        units,
    )


def change(
    site: str,
    layer: int | None,
    function: Callable[[Tensor], Tensor],
    *,
    positions: Positions = None,
    units: Units = None,
) -> Edit:
    """Apply ``function`` to the selection."""
    return Edit(site, layer, function, positions, units)


@contextlib.contextmanager
def patch(model: nn.Module, *edits: Edit) -> Iterator[None]:
    """Apply edits during the block, in the order given; nested blocks apply theirs after those of the outer ones.

        with patch(model, replace("resid_post", 3, source, positions=-1), scale("head_out", 5, 0.0, units=[2])):
            model(**inputs)

    The hooks are gone when the block is left, also by an error.

    Raises
    ------
    ValueError
        On entry for an unknown site or layer, or a site that the model does not have; during the forward for positions,
        units or values that do not fit.
    """
    parts = anatomy(model)
    with contextlib.ExitStack() as stack:
        for edit in edits:
            stack.callback(attach_edit(locate(parts, edit.site, edit.layer), edit))
        yield
