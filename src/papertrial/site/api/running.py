"""How the service runs: the last ingests and their errors, and when sources are fetched next."""

from typing import Annotated, Any

from fastapi import APIRouter, Query

from papertrial.feed.runs import recent_runs
from papertrial.site import ingesting
from papertrial.site.context import Here
from papertrial.site.signing_in import iso

router = APIRouter(tags=["service"])


@router.get("/api/ingest-runs")
def ingest_runs(
    here: Here, limit: Annotated[int, Query(ge=1, le=200, description="how many at most")] = 50
) -> list[dict[str, Any]]:
    """The last ingests, newest first: what came in, and what went wrong."""
    return [
        {
            "id": run.id,
            "source": run.source,
            "started": run.started.isoformat(),
            "finished": run.finished.isoformat() if run.finished else None,
            "added": run.added,
            "updated": run.updated,
            "unchanged": run.unchanged,
            "problem_count": run.problem_count,
            "problems": list(run.problems[:20]),
            "error": run.error,
        }
        for run in recent_runs(here.store, limit)
    ]


@router.get("/api/ingest-schedule")
def ingest_schedule(here: Here) -> list[dict[str, Any]]:
    """The sources that the service fetches by itself: the last fetch that succeeded, and when the next is due."""
    return [
        {
            "source": source.name,
            "every_seconds": source.every,
            "last": iso(source.last) if source.last else None,
            "next": iso(source.following) if source.following else None,
        }
        for source in ingesting.schedule(here)
    ]
