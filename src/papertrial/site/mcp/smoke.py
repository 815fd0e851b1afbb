"""A smoke run of one paper, in a process of its own: with a time limit, one thread, and nothing left behind.

The service never imports a paper's code. The process gets an empty home folder (but for the cache of what can be made
again), none of the service's settings, and no terminal; when its time is over, or nobody waits for it any more, it is
killed with everything that it started.
"""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import anyio.to_thread
from pydantic import BaseModel, Field

from papertrial.home import home
from papertrial.site.background import give_lease_back, take_lease
from papertrial.site.context import Context
from papertrial.site.errors import Problem
from papertrial.site.mcp.answers import in_scope

#: A smoke run takes seconds; imports on a busy machine take most of this.
SECONDS = 120.0
_LEASE = "smoke"
_MOST_OUTPUT = 1_000_000
_SHOWN_OUTPUT = 2_000
_NOTE = "A smoke run shows that the code runs here, on toy sizes. It is never evidence for or against a claim."


class SmokeAnswer(BaseModel):
    """What a smoke run did."""

    slug: str
    passed: bool = Field(description="every arm ran and gave every metric")
    seconds: float
    arms: dict[str, Any] = Field(description="by arm and metric: mean and values by seed")
    output: str = Field(description="the end of what the run said, where it did not pass")
    note: str = _NOTE


async def run_smoke(here: Context, name: str, seconds: float = SECONDS) -> SmokeAnswer:
    """Run a paper at smoke scale; one at a time over all workers of a database.

    Raises
    ------
    Problem
        404 for a paper that cannot be run, 409 while another run goes on.
    """
    entry = await anyio.to_thread.run_sync(in_scope, here, name)
    slug = entry.card.slug
    if not entry.card.on_trial:
        raise Problem(404, f"paper: {slug} has no method and experiment here yet", field="paper")
    holder = f"smoke-{secrets.token_hex(8)}"
    if not await anyio.to_thread.run_sync(take_lease, here.store, _LEASE, holder, seconds + 30):
        raise Problem(409, "another smoke run is going on; try again in a minute")
    try:
        return await _run(slug, seconds)
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(give_lease_back, here.store, _LEASE, holder)


async def _run(slug: str, seconds: float) -> SmokeAnswer:
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="papertrial-smoke-", ignore_cleanup_errors=True) as folder:
        command = [sys.executable, "-m", "papertrial.cli", "run", slug, "--scale", "smoke", "--json", "--fresh"]
        command += ["--device", "cpu", "--threads", "1", "--workers", "1", "--report", f"{folder}/report.html"]
        process = await anyio.open_process(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=_environment(Path(folder)),
            cwd=folder,
            start_new_session=True,
        )
        said: dict[str, bytes] = {}
        try:
            with anyio.move_on_after(seconds) as timer:
                async with anyio.create_task_group() as group:
                    group.start_soon(_read, process.stdout, said, "stdout")
                    group.start_soon(_read, process.stderr, said, "stderr")
                await process.wait()
        finally:
            _kill(process.pid)
            with anyio.CancelScope(shield=True):
                await process.aclose()
    took = time.monotonic() - started
    problem = f"stopped: it took more than {seconds:.0f} seconds\n" if timer.cancelled_caught else ""
    return _answer(slug, took, process.returncode, said, problem)


def _answer(slug: str, took: float, status: int | None, said: dict[str, bytes], problem: str) -> SmokeAnswer:
    arms: dict[str, Any] = {}
    if not problem and status == 0:
        try:
            arms = json.loads(said["stdout"])["arms"]
        except (ValueError, KeyError, TypeError):
            problem = "the run ended well, but did not say what came out\n"
    passed = not problem and status == 0
    output = "" if passed else problem + said.get("stderr", b"").decode("utf-8", "replace")[-_SHOWN_OUTPUT:]
    return SmokeAnswer(slug=slug, passed=passed, seconds=round(took, 2), arms=arms, output=output)


async def _read(stream: anyio.abc.ByteReceiveStream | None, said: dict[str, bytes], name: str) -> None:
    """All of a stream, so that its writer never waits; of a torrent the end is kept."""
    said[name] = b""
    assert stream is not None
    async for chunk in stream:
        said[name] = (said[name] + chunk)[-_MOST_OUTPUT:]


def _kill(pid: int) -> None:
    """The whole process group; it may be gone."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _environment(folder: Path) -> dict[str, str]:
    cache = home() / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    (folder / "cache").symlink_to(cache.resolve())
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PAPERTRIAL_")}
    return kept | {"PAPERTRIAL_HOME": str(folder), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}
