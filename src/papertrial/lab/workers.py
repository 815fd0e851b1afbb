"""Seeds side by side: each in a process of its own with one thread, which small models use better than many threads."""

import multiprocessing
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from papertrial.errors import PapertrialError
from papertrial.lab.evidence import TrialRecord
from papertrial.lab.trial import ProgressListener

if TYPE_CHECKING:
    from papertrial.lab.runner import RunPlan

LAST_SECONDS = 5.0
RunSeed = Callable[["RunPlan", int, ProgressListener], TrialRecord]


class WorkerLostError(PapertrialError):
    """A worker process ended without a word: killed, or out of memory."""


class _Sender(ProgressListener):
    """Passes progress on to the parent, at most ten times a second for each part."""

    def __init__(self, events: Any, seed: int) -> None:
        self._events, self._seed = events, seed
        self._last: dict[str, float] = {}

    def update(self, what: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        if done == total or now - self._last.get(what, 0.0) > 0.1:
            self._last[what] = now
            self._events.put(("progress", self._seed, (what, done, total)))


def run_side_by_side(
    run_seed: RunSeed, plan: "RunPlan", seeds: Sequence[int], progress: ProgressListener
) -> Iterator[TrialRecord]:
    """Run seeds in ``plan.workers`` processes; yields records as they come. Workers end with the parent, killed or not.

    Raises
    ------
    PapertrialError
        What a trial raised, by its message; or ``WorkerLostError``. The other workers are stopped.
    """
    context = multiprocessing.get_context("spawn")
    tasks, events = context.Queue(), context.Queue()
    count = min(plan.workers, len(seeds))
    for task in (*seeds, *[None] * count):  # None: there is nothing more
        tasks.put(task)
    processes = [
        context.Process(target=_work, args=(run_seed, plan, tasks, events, os.getpid()), daemon=True)
        for _ in range(count)
    ]
    for process in processes:
        process.start()
    waiting = set(seeds)
    try:
        while waiting:
            try:
                kind, seed, content = events.get(timeout=0.2)
            except queue.Empty:
                lost = [process for process in processes if process.exitcode not in (None, 0)]
                if lost:
                    raise WorkerLostError(
                        f"a worker process ended with code {lost[0].exitcode} (out of memory?); finished seeds are kept"
                    ) from None
                continue
            if kind == "progress":
                progress.update(f"seed {seed}: {content[0]}", content[1], content[2])
            elif kind == "record":
                waiting.discard(seed)
                yield TrialRecord.model_validate_json(content)
            else:
                raise content
        for process in processes:
            process.join(LAST_SECONDS)  # they give back what libraries hold in the system
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _work(run_seed: RunSeed, plan: "RunPlan", tasks: Any, events: Any, parent: int) -> None:
    """A worker's life: seeds until there are none left."""
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    while True:
        try:
            seed = tasks.get()
        except KeyboardInterrupt:
            return
        if seed is None:
            return
        try:
            record = run_seed(plan, seed, _Sender(events, seed))
            events.put(("record", seed, record.model_dump_json()))
        except KeyboardInterrupt:
            return
        except (PapertrialError, OSError) as error:  # what the command line has a line for, such as a full disk
            events.put(("failed", seed, error))
            return
        except Exception as error:
            import traceback

            events.put(("failed", seed, RuntimeError(f"seed {seed}: {error!r}\n{traceback.format_exc()}")))
            return


def _end_with(parent: int) -> None:
    """Leave when the parent is gone, also when it was killed: nobody would hear the result."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
