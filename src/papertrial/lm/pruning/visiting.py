"""Looking at activations as they pass, without keeping them."""

import contextlib
from collections.abc import Callable, Iterable, Iterator

from torch import Tensor, nn

from papertrial.lm.anatomy import anatomy
from papertrial.lm.hooks.junctions import attach_reader
from papertrial.lm.hooks.sites import locate


@contextlib.contextmanager
def visit(model: nn.Module, sites: Iterable[str], reader: Callable[[str, int, Tensor], None]) -> Iterator[None]:
    """Call ``reader(site, layer, values)`` for every layer's sites during the block; see :mod:`papertrial.lm.hooks`.

    Statistics over many tokens are summed this way, where a recording of all layers would not fit into memory. The
    values are detached views: copy what is kept.
    """
    parts = anatomy(model)

    def to(site: str, layer: int) -> Callable[[Tensor], None]:
        return lambda values: reader(site, layer, values.detach())

    with contextlib.ExitStack() as stack:
        for site in sites:
            for layer in range(len(parts.blocks)):
                stack.callback(attach_reader(locate(parts, site, layer), to(site, layer), on_path=False))
        yield
