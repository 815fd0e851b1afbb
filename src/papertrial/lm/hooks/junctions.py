"""One hook per tapped module side, shared by all edits and readers, so that their order is ours and not torch's.

Edits run in the order in which they were entered, readers after all edits: a recording shows what the model went on
with.
"""

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from papertrial.lm.hooks.sites import Tap

Change = Callable[[Tensor], Tensor]
Reader = Callable[[Tensor], None]


class Junction:
    """The edits and readers of one side of one module."""

    def __init__(self, tap: Tap) -> None:
        self.side = tap.side
        self.edits: list[tuple[Tap, Change]] = []
        self.readers: list[tuple[Tap, Reader, bool]] = []
        self.shape: tuple[int, ...] | None = None
        self.handles: list[RemovableHandle] = []
        if tap.block is not None:
            # OPT merges batch and time inside its feed-forward layer; the block's input still has both
            self.handles.append(tap.block.register_forward_pre_hook(self._note_shape, with_kwargs=True))
        if tap.side == "input":
            self.handles.append(tap.module.register_forward_pre_hook(self._on_input, with_kwargs=True))
        else:
            self.handles.append(tap.module.register_forward_hook(self._on_output))

    def _note_shape(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = args[0] if args else kwargs["hidden_states"]
        self.shape = tuple(values.shape[:2])

    def _on_input(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (self._pass(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._pass(kwargs["hidden_states"])}

    def _on_output(self, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, Tensor):
            return self._pass(output)
        if hasattr(output, "last_hidden_state"):
            output.last_hidden_state = self._pass(output.last_hidden_state)
            return output
        return (self._pass(output[0]), *output[1:])

    def _pass(self, raw: Tensor) -> Tensor:
        shape = raw.shape
        merged = raw.dim() == 2 and self.shape is not None
        values = raw.reshape(*self.shape, -1) if merged and self.shape is not None else raw
        for tap, change in self.edits:
            # the change may keep its input for the backward pass: what is overwritten in place goes to it as a copy
            source = values.clone() if tap.in_place else values
            values = _written(tap, values, change(tap.view(source)))
        for tap, reader, on_path in self.readers:
            part = tap.view(values)
            if on_path:
                # a view beside the path to the loss would have no gradient: send the values through what the reader
                # gets
                part = part.clone()
                values = _written(tap, values, part)
            reader(part)
        return values.reshape(shape) if merged else values

    @property
    def idle(self) -> bool:
        """Nobody needs the hook any more."""
        return not self.edits and not self.readers

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()


_junctions: "weakref.WeakKeyDictionary[nn.Module, dict[str, Junction]]" = weakref.WeakKeyDictionary()


def _written(tap: Tap, values: Tensor, part: Tensor) -> Tensor:
    """``values`` with the tap's part of them overwritten."""
    if tap.in_place:
        return values.copy_(part)
    edited = values.clone()
    tap.view(edited).copy_(part)
    return edited


def attach_edit(tap: Tap, change: Change) -> Callable[[], None]:
    """Enter an edit; returns the function that takes it out again."""
    junction = _junction(tap)
    return _entered(tap, junction, junction.edits, (tap, change))


def attach_reader(tap: Tap, reader: Reader, *, on_path: bool) -> Callable[[], None]:
    """Enter a reader; ``on_path`` gives it tensors that the loss depends on. Returns the function that takes it out."""
    junction = _junction(tap)
    return _entered(tap, junction, junction.readers, (tap, reader, on_path))


def _junction(tap: Tap) -> Junction:
    sides = _junctions.setdefault(tap.module, {})
    if tap.side not in sides:
        sides[tap.side] = Junction(tap)
    return sides[tap.side]


def _entered(tap: Tap, junction: Junction, entries: list[Any], entry: Any) -> Callable[[], None]:
    entries.append(entry)

    def detach() -> None:
        entries[:] = [other for other in entries if other is not entry]
        if junction.idle and _junctions.get(tap.module, {}).get(tap.side) is junction:
            junction.close()
            del _junctions[tap.module][tap.side]

    return detach
