r"""What is hot now.

The interest in a paper at time :math:`t` is its votes and comments, halved every `HALF_LIFE_DAYS` since its feed day:

.. math:: s(t) = (1 + \text{upvotes} + w\,\text{comments}) \cdot 2^{-(t - \text{feed day}) / h}

with :math:`h` = `HALF_LIFE_DAYS` and :math:`w` = `COMMENT_WEIGHT`. Since all papers decay at one rate, their order
does not depend on :math:`t`: it is that of

.. math:: \log_2(1 + \text{upvotes} + w\,\text{comments}) + \text{feed day} / h

That number is stored with each paper (``heat``) and has an index, so the hottest of millions are read without looking
at the others, and nothing has to be recomputed as time goes by.
"""

from datetime import date

from papertrial.feed.merging import COMMENT_WEIGHT, HALF_LIFE_DAYS
from papertrial.feed.paging import Page
from papertrial.feed.records import Paper
from papertrial.feed.store import Store

__all__ = ["COMMENT_WEIGHT", "HALF_LIFE_DAYS", "score", "trending"]


def score(paper: Paper, on: date) -> float:
    """A paper's interest on a day, in votes of that day."""
    votes = 1.0 + paper.upvotes + COMMENT_WEIGHT * paper.comment_count
    return float(votes * 2.0 ** (-(on - paper.feed_day).days / HALF_LIFE_DAYS))


def trending(store: Store, *, limit: int = 50, cursor: str | None = None) -> Page:
    """The hottest papers, hottest first; a page at a time."""
    return store.listing(limit=limit, cursor=cursor, order="trending")
