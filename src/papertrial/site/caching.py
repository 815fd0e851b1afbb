"""Answers that many readers share, kept for a few seconds in each worker."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

T = TypeVar("T")


class Cache:
    """Values by key, at most `entries` of them; the least recently used goes first."""

    def __init__(self, entries: int = 1000, clock: Callable[[], float] = time.monotonic) -> None:
        self._entries, self._clock = entries, clock
        self._lock = threading.Lock()
        self._values: OrderedDict[Hashable, tuple[float, Any]] = OrderedDict()

    def get(self, key: Hashable, seconds: float, make: Callable[[], T]) -> T:
        """The value kept under a key if it is younger than `seconds`, else a new one.

        Two threads that miss at once both make it: cheaper than one waiting for the other.
        """
        now = self._clock()
        with self._lock:
            held = self._values.get(key)
            if held is not None and now - held[0] < seconds:
                self._values.move_to_end(key)
                return held[1]  # type: ignore[no-any-return]
        value = make()
        with self._lock:
            self._values[key] = (now, value)
            self._values.move_to_end(key)
            while len(self._values) > self._entries:
                self._values.popitem(last=False)
        return value

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._values.clear()
