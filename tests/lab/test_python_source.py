import sys
import threading
import time

import pytest

from papertrial.lab.python_source import parse


class Cycle:
    """Garbage whose end runs Python, in which threads take turns."""

    def __init__(self) -> None:
        self.itself = self

    def __del__(self) -> None:
        sum(range(200))


def test_many_threads_read_python_at_once():
    source = "\n".join(
        f"def f{i}(x):\n    return [g(x, {i}) for g in (f0, f{i})] if x else {{'a': (1, {i})}}" for i in range(200)
    )
    failures: list[BaseException] = []
    end = time.monotonic() + 3

    def read() -> None:
        while time.monotonic() < end and not failures:
            for _ in range(20):
                Cycle()
            try:
                assert len(parse(source).body) == 200
            except BaseException as error:
                failures.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        threads = [threading.Thread(target=read) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failures


def test_what_is_no_python_is_a_syntax_error():
    with pytest.raises(SyntaxError):
        parse("def broken(:")
