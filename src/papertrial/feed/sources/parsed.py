"""What a parser hands over: the records it read, and what it could not read, by line."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from papertrial.feed.records import Record

#: Larger inputs are refused: a saved page has some 2 MB, a slice of 2,000 arXiv entries some 8 MB.
MAX_BYTES = 64 * 1024 * 1024
#: After so many problems a parser only counts.
MAX_PROBLEMS = 1000
#: A record is nothing without these; any other field can be left out where it is wrong.
_ESSENTIAL = ("title", "source", "arxiv_id")


@dataclass
class Parsed:
    """Records and problems of one input. A problem is one line of text that begins with where it is."""

    source: str
    records: list[Record] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def problem(self, line: int | None, message: str) -> None:
        """Name something that could not be read; `line` counts from 1. What the input holds is made safe to print."""
        message = "".join(c if c.isprintable() else " " for c in message)
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(f"line {line}: {message}" if line else message)
        elif len(self.problems) == MAX_PROBLEMS:
            self.problems.append(f"more than {MAX_PROBLEMS} problems; the rest is not listed")

    def add(self, line: int | None, **fields: Any) -> Record | None:
        """Make a record; a field that is wrong is left out and named, without its title there is no record."""
        fields.setdefault("source", self.source)
        while True:
            try:
                record = Record(**fields)
            except ValueError as error:
                name, _, reason = str(error).partition(": ")
                if name not in fields or name in _ESSENTIAL:
                    self.problem(line, f"entry left out: {error}")
                    return None
                self.problem(line, f"{str(fields.get('title'))[:60]!r}: {name} left out: {reason}")
                del fields[name]
            else:
                self.records.append(record)
                return record

    def extend(self, others: Iterable["Parsed"]) -> None:
        for other in others:
            self.records += other.records
            self.problems += other.problems


def decoded(data: bytes) -> str:
    """Text of unknown encoding: UTF-8 or UTF-16 by its mark, else UTF-8 with what is wrong replaced."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        text = data.decode("utf-16", "replace")
    else:
        text = data.decode("utf-8-sig", "replace")
    return re.sub(r"\r\n?", "\n", text)
