"""The protocol's side: the tools as the official SDK offers them, on standard input and output or over HTTP.

The SDK is imported when the first client comes, not when the service starts: it takes half a second.
"""

import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import anyio.to_thread
from pydantic import Field
from starlette.requests import Request

import papertrial
from papertrial.errors import PapertrialError, UsageError
from papertrial.lab.claim import FAMILIES
from papertrial.site.context import Context
from papertrial.site.errors import Problem
from papertrial.site.mcp import answers, smoke
from papertrial.site.mcp.answers import EvidenceAnswer, PaperAnswer, SearchAnswer
from papertrial.site.mcp.smoke import SmokeAnswer

if TYPE_CHECKING:
    from mcp.server.fastmcp import FastMCP

log = logging.getLogger("papertrial.site.mcp")
_T = TypeVar("_T")

INSTRUCTIONS = (
    "Papers on language models, and whether their claims hold. `search` finds papers; `paper` gives one as Markdown; "
    "`evidence` gives the verdicts on its claims with the effect of every seed (a verdict is only good for the scale "
    "it names); `run_smoke` runs a paper's method and baseline on toy sizes to show that the code works here."
)

Query = Annotated[str, Field(min_length=1, max_length=250, description="words, a title, a sentence or an arXiv id")]
Name = Annotated[str, Field(min_length=1, max_length=80, description="arXiv id, key or slug of a paper")]
Family = Annotated[str | None, Field(max_length=40, description=f"only this family: {', '.join(FAMILIES)}")]
Since = Annotated[
    str | None, Field(max_length=10, description="only papers published on this day or later: YYYY-MM-DD")
]
Many = Annotated[int, Field(ge=1, le=50, description="how many at most")]
Scale = Annotated[Literal["small", "gpu", "paper"] | None, Field(description="only this scale; default, all recorded")]

Metrics = Annotated[Literal["claimed", "all"], Field(description="the metrics that claims are about, or all")]

#: Says whether whoever sent a request may start a run; raises a Problem if not.
MayRun = Callable[[Request | None], None]


def make_server(here: Context, may_run: MayRun, ready: Callable[[], None] = lambda: None) -> "FastMCP[Any]":
    """The tools over one service.

    Parameters
    ----------
    may_run
        Asked before a run is started, in a thread; the request is None on standard input and output.
    ready
        Called in a thread before the first search: whatever has to be there before it.
    """
    from mcp.server.fastmcp import Context as Call
    from mcp.server.fastmcp import FastMCP
    from mcp.server.transport_security import TransportSecuritySettings
    from mcp.types import CallToolResult, TextContent, ToolAnnotations

    # The SDK would count on a session at one worker; without one every worker can answer every request.
    server = FastMCP(
        "papertrial",
        INSTRUCTIONS,
        stateless_http=True,
        json_response=True,
        log_level="WARNING",
        # By default the SDK answers to the name localhost only; who may come is the endpoint's to say.
        transport_security=TransportSecuritySettings(enable_dns_rebinding_protection=False),
    )
    server._mcp_server.version = papertrial.__version__
    reads = ToolAnnotations(readOnlyHint=True, openWorldHint=False)

    @server.tool(description="Find papers by words, a title, a sentence or an arXiv id, best first.", annotations=reads)
    async def search(
        query: Query, limit: Many = 10, family: Family = None, since: Since = None, in_scope: bool = False
    ) -> SearchAnswer:
        def found() -> SearchAnswer:
            ready()
            return answers.search(here, query, limit, family, since, in_scope)

        return await _told(anyio.to_thread.run_sync(found))

    @server.tool(
        description="One paper as Markdown: metadata, abstract, claims beside their verdicts; its method's example.",
        annotations=reads,
    )
    async def paper(paper: Name) -> PaperAnswer:
        return await _told(anyio.to_thread.run_sync(answers.paper, here, paper))

    @server.tool(
        description=(
            "Verdicts on a paper's claims, with effect and interval, by scale: as Markdown, and as structured content "
            "with the claimed metrics of every seed."
        ),
        annotations=reads,
    )
    async def evidence(
        paper: Name, scale: Scale = None, metrics: Metrics = "claimed"
    ) -> Annotated[CallToolResult, EvidenceAnswer]:
        every = metrics == "all"
        told = await _told(anyio.to_thread.run_sync(answers.evidence, here, paper, scale, every))
        # Left to itself the SDK would send all of the structured content a second time, as text.
        text = TextContent(type="text", text=answers.evidence_markdown(told))
        return CallToolResult(content=[text], structuredContent=told.model_dump(mode="json"))

    @server.tool(
        description=(
            "Run a paper's method and baseline here on toy sizes (seconds; one run at a time). It shows that the code "
            "works; it is never evidence. Over HTTP it needs an API token with the scope 'write'."
        ),
        annotations=ToolAnnotations(readOnlyHint=False, destructiveHint=False, openWorldHint=False),
    )
    async def run_smoke(paper: Name, call: Call[Any, Any, Any]) -> SmokeAnswer:
        request = call.request_context.request
        await _told(anyio.to_thread.run_sync(may_run, request))
        return await _told(smoke.run_smoke(here, paper))

    return server


async def _told(work: Awaitable[_T]) -> _T:
    """Errors as a model may read them: what was wrong in the call, never our own insides.

    Raises
    ------
    ToolError
    """
    from mcp.server.fastmcp.exceptions import ToolError

    try:
        return await work
    except Problem as problem:
        raise ToolError(problem.message) from None
    except UsageError as error:
        raise ToolError(str(error)) from None
    except PapertrialError as error:
        log.error("%s", error)
        raise ToolError("the service cannot do this just now; try again in a minute") from None
    except Exception:
        log.exception("a tool failed")
        raise ToolError("an error on our side; it was noted in the log") from None
