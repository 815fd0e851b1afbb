"""What the service is, and the rules that its numbers follow."""

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from papertrial.feed.merging import COMMENT_WEIGHT, HALF_LIFE_DAYS
from papertrial.site.context import Here, MaybeReader
from papertrial.site.pages.serving import page
from papertrial.site.people import pulse

router = APIRouter(include_in_schema=False)


@router.get("/about")
def about(request: Request, here: Here, reader: MaybeReader) -> Response:
    """How verdicts are reached, what trending means, and how programs read all this."""

    def values() -> dict[str, Any]:
        return {
            "papers": here.store.count(),
            "in_scope": len(here.board.snapshot.entries),
            "on_trial": here.board.snapshot.on_trial,
            "half_life": HALF_LIFE_DAYS,
            "comment_weight": COMMENT_WEIGHT,
            "votes_a_day": pulse.VOTES_A_DAY,
            "burst": pulse.BURST,
            "full_weight_days": pulse.FULL_WEIGHT_DAYS,
        }

    return page(request, reader, "about.html.j2", values)
