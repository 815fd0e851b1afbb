"""``papertrial mcp``: the tools on standard input and output, for a client that starts the command itself."""

import threading

from papertrial.feed.store import Store
from papertrial.site import upkeep
from papertrial.site.address import with_known_address
from papertrial.site.context import Context
from papertrial.site.limits import Limiter
from papertrial.site.mcp.server import make_server
from papertrial.site.settings import Settings

#: How long the first search waits for an index that is being made.
PATIENCE = 45.0


def serve_stdio(settings: Settings) -> None:
    """Serve one client until it closes standard input. Nothing but the protocol is written to standard output.

    Raises
    ------
    PapertrialError
        The database or the home folder cannot be used.
    """
    with Store.open(settings.database) as store:
        settings = with_known_address(store, settings)
        here = Context(settings, store, Limiter(settings))
        upkeep.prepare(here)
        # A new catalogue takes seconds to index; a client does not wait that long for an answer to its greeting.
        indexing = threading.Thread(target=upkeep.update_index_now, args=(here,), daemon=True)
        indexing.start()
        server = make_server(here, lambda _: None, lambda: indexing.join(PATIENCE))
        server.run("stdio")
