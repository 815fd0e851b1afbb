"""The standard tasks of EleutherAI's lm-evaluation-harness on a checkpoint that is already loaded."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from papertrial.errors import UsageError, first_line
from papertrial.lm.models import Checkpoint


def run_tasks(
    checkpoint: Checkpoint,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    task_folder: Path | None = None,
) -> dict[str, dict[str, float]]:
    """Run tasks of the harness, as it defines and scores them.

    Parameters
    ----------
    tasks
        Names such as ``hellaswag`` or ``arc_easy``; the harness downloads their data.
    limit
        Documents per task; None is all of them, which is what published figures are of.
    task_folder
        A folder with tasks of one's own, in the harness's YAML format.

    Returns
    -------
    dict
        Task to measure to value, standard errors included, under the harness's names.

    Raises
    ------
    UsageError
        If the harness is not installed, does not know a task, or cannot get its data.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UsageError("standard tasks need lm-evaluation-harness: pip install 'papertrial[eval]'") from None
    manager = TaskManager(include_path=None if task_folder is None else str(task_folder))
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown or not tasks:
        raise UsageError(f"the harness has no task {', '.join(map(repr, unknown))}" if unknown else "no task was named")
    model = HFLM(pretrained=checkpoint.model, tokenizer=checkpoint.tokenizer, batch_size=batch_size)
    try:
        found: Any = lm_eval.simple_evaluate(
            model=model, tasks=list(tasks), limit=limit, task_manager=manager, bootstrap_iters=0, log_samples=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"the harness cannot run {', '.join(tasks)}: {first_line(error)}") from None
    return {
        task: {name.removesuffix(",none"): float(value) for name, value in measures.items() if _number(value)}
        for task, measures in found["results"].items()
    }


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
