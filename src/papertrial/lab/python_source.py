"""Reading Python source without running it."""

import ast
import threading

_one_at_a_time = threading.RLock()


def parse(source: str) -> ast.Module:
    """``ast.parse``, one thread at a time.

    CPython 3.11 counts the depth of a tree for all threads together, so that of two that parse at once either may end
    in ``SystemError: AST constructor recursion depth mismatch``.

    Raises
    ------
    SyntaxError, ValueError
        As ``ast.parse``.
    """
    with _one_at_a_time:
        return ast.parse(source)
