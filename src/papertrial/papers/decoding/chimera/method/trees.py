"""Static token trees: which continuations are drafted, as paths of ranks."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from papertrial.lm.generation.tree import tree_mask

Path = tuple[int, ...]


@dataclass(frozen=True)
class Level:
    """The nodes at one depth of a tree that have children, and those children.

    Attributes
    ----------
    parents : numbers of the nodes with children; -1 is the root, the last token that is certain.
    children : numbers of their children.
    parent_of : for each child, which of ``parents`` it hangs under (an index into that list).
    ranks : for each child, its rank among the draft's guesses there, from 0.
    """

    parents: list[int]
    children: list[int]
    parent_of: list[int]
    ranks: list[int]

    @property
    def width(self) -> int:
        """How many guesses per node are needed."""
        return max(self.ranks) + 1


class TokenTree:
    """A tree of draft nodes under the last certain token.

    Parameters
    ----------
    paths
        One per node: the ranks, from 0, of the guesses that lead to it from the root. ``[[0], [1], [0, 0]]`` drafts the
        two best guesses of the next token and, behind the best, the best guess of the token after it.

    Attributes
    ----------
    paths
        Sorted by depth, then by rank; node n is ``paths[n]``.
    parents
        For each node the number of its parent, -1 under the root.

    Raises
    ------
    ValueError
        No path, an empty or repeated one, a negative rank, or a node whose parent is not in the tree.
    """

    def __init__(self, paths: Sequence[Sequence[int]]) -> None:
        nodes = [tuple(int(rank) for rank in path) for path in paths]
        if not nodes:
            raise ValueError("paths is empty: a tree needs at least one node, such as [[0]]")
        if len(set(nodes)) != len(nodes):
            raise ValueError("paths names a node twice")
        for path in nodes:
            if not path or min(path) < 0:
                raise ValueError(f"every path is one rank or more, from 0 up; got {list(path)}")
            if len(path) > 1 and path[:-1] not in set(nodes):
                raise ValueError(f"the node {list(path)} has no parent: add {list(path[:-1])}")
        self.paths: list[Path] = sorted(nodes, key=lambda path: (len(path), path))
        number = {path: n for n, path in enumerate(self.paths)}
        self.parents = [number[path[:-1]] if len(path) > 1 else -1 for path in self.paths]

    @classmethod
    def chain(cls, depth: int) -> "TokenTree":
        """One guess after another, without branches: standard speculative decoding."""
        return cls([(0,) * (d + 1) for d in range(depth)])

    @classmethod
    def likely(cls, nodes: int, depth: int, *, first: float = 0.5, decay: float = 0.4) -> "TokenTree":
        """The ``nodes`` paths most likely to be right, if a guess of rank r is right with chance ``first * decay**r``.

        Raises
        ------
        ValueError
            Fewer than ``depth`` nodes, or chances outside (0, 1).
        """
        if not nodes >= depth >= 1:
            raise ValueError(f"nodes must be at least depth, and depth at least 1; got {nodes} and {depth}")
        if not (0 < first < 1 and 0 < decay < 1):
            raise ValueError(f"first and decay must lie in (0, 1), got {first} and {decay}")
        chosen: list[Path] = []
        # a node's chance is below its parent's and its elder sibling's, so the best open node is always the next best
        open_nodes: dict[Path, float] = {(0,): first}
        while len(chosen) < nodes:
            best = max(open_nodes, key=lambda path: (open_nodes[path], -len(path), [-rank for rank in path]))
            chance = open_nodes.pop(best)
            chosen.append(best)
            open_nodes[(*best[:-1], best[-1] + 1)] = chance * decay
            if len(best) < depth:
                open_nodes[(*best, 0)] = chance * first
        return cls(chosen)

    def pruned(self, depth: int) -> "TokenTree | None":
        """The nodes down to ``depth``; None if there are none."""
        if depth >= self.depth:
            return self
        return TokenTree([path for path in self.paths if len(path) <= depth]) if depth >= 1 else None

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def depth(self) -> int:
        """Tokens drafted along the longest path."""
        return len(self.paths[-1])

    @property
    def rooted_parents(self) -> list[int]:
        """Parents with the root as node 0 (its own parent -1) and every other number one higher: what is verified."""
        return [-1] + [parent + 1 for parent in self.parents]

    @cached_property
    def attention_mask(self) -> Tensor:
        """Bool (N, N): row n is true at n and its ancestors; the root and the context are seen by all."""
        return tree_mask(self.parents)[0]

    @cached_property
    def levels(self) -> list[Level]:
        """What has to be expanded, one depth after another."""
        levels = []
        for depth in range(1, self.depth + 1):
            children = [n for n, path in enumerate(self.paths) if len(path) == depth]
            parents = sorted({self.parents[n] for n in children})
            levels.append(
                Level(
                    parents,
                    children,
                    [parents.index(self.parents[n]) for n in children],
                    [self.paths[n][-1] for n in children],
                )
            )
        return levels
