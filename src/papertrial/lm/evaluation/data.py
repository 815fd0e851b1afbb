"""Reads evaluation data: texts or multiple-choice questions, from a file or a data set of the Hugging Face Hub."""

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from papertrial.errors import UsageError, first_line

MAX_BYTES = 512 << 20

QUESTION_FIELDS = ("question", "query", "ctx", "context", "prompt", "sentence", "goal")
CHOICE_FIELDS = ("choices", "endings", "options")
ANSWER_FIELDS = ("answer", "label", "gold", "target", "answer_index", "answerKey", "correct")
TEXT_FIELDS = ("text", "content", "document", "story")

_HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+|[\w.-]+)(?::(?P<config>[\w.-]+))?(?:@(?P<split>[\w.\[\]:%+-]+))?\Z")


@dataclass(frozen=True)
class Question:
    """``choices`` are what may follow ``context``; ``answer`` is the number of the right one, from 0."""

    context: str
    choices: tuple[str, ...]
    answer: int

    def __post_init__(self) -> None:
        if len(self.choices) < 2:
            raise ValueError(f"a question needs at least two choices, got {len(self.choices)}")
        if not 0 <= self.answer < len(self.choices):
            raise ValueError(f"the answer must lie in 0..{len(self.choices) - 1}, got {self.answer}")


@dataclass(frozen=True)
class Texts:
    """Documents to be predicted, and where they come from."""

    texts: tuple[str, ...]
    source: str


@dataclass(frozen=True)
class Questions:
    """Multiple-choice questions, and where they come from."""

    questions: tuple[Question, ...]
    source: str


def read_data(source: str, *, limit: int | None = None) -> Texts | Questions:
    """Read a file, or a data set of the Hub.

    Parameters
    ----------
    source
        A file: ``.jsonl``, ``.json`` (a list of objects), ``.csv`` with a header, or any other as one document of UTF-8
        text. Or a data set ``id[:configuration][@split]`` (split: test), which needs the package ``datasets``. Rows
        with choices are questions, rows with a text are texts; see ``QUESTION_FIELDS`` and its neighbours for the names
        that fields may have. An answer is a number from 0, a letter, one of the labels of ``choices``, or a choice.
    limit
        Read at most so many rows.

    Raises
    ------
    UsageError
        Naming the row and what is wrong with it. Nothing is skipped.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"--limit must be at least 1, got {limit}")
    path = Path(source)
    if path.is_file() and path.suffix not in (".jsonl", ".json", ".csv"):
        text = _read(path)
        if not text.strip():
            raise UsageError(f"{source} is empty")
        return Texts((text,), source)
    rows = _file_rows(path) if path.is_file() else _hub_rows(source)
    return _sorted_out(islice(rows, limit), source)


def read_texts(source: str, *, limit: int | None = None) -> Texts:
    """Texts, read as by :func:`read_data`; a `UsageError` where the source holds questions."""
    data = read_data(source, limit=limit)
    if isinstance(data, Questions):
        raise UsageError(f"{source} holds multiple-choice questions; texts are wanted here")
    return data


def _read(path: Path) -> str:
    """The text of a file, once it is known to be one."""
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise UsageError(f"{path} has {size >> 20} MiB; at most {MAX_BYTES >> 20} MiB are read: take a part of it")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None


def _file_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows with the name that an error gives them."""
    text = _read(path)
    if path.suffix == ".jsonl":
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip():
                yield f"line {number}", _json(line, f"{path}, line {number}")
    elif path.suffix == ".json":
        rows = _json(text, str(path))
        if not isinstance(rows, list):
            raise UsageError(f"{path} must hold a list of objects, it holds {_kind(rows)}")
        yield from ((f"entry {number}", row) for number, row in enumerate(rows, start=1))
    else:
        try:
            for number, row in enumerate(csv.DictReader(io.StringIO(text), strict=True), start=2):
                yield f"row {number}", row
        except csv.Error as error:
            raise UsageError(f"{path} is not CSV: {error}") from None


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UsageError(f"{where} is not JSON: {error}") from None


def _hub_rows(source: str) -> Iterator[tuple[str, Any]]:
    match = _HUB_ID.match(source)
    if match is None or Path(source).suffix in (".txt", ".jsonl", ".json", ".csv"):
        raise UsageError(f"there is no file {source!r}, and it is no data set's id either (org/name[:config][@split])")
    try:
        from datasets import load_dataset
    except ImportError:
        raise UsageError(
            f"there is no file {source!r}; data sets of the Hub need an extra: pip install 'papertrial[eval]'"
        ) from None
    try:
        # streaming: a limit of ten rows must not download the rest
        rows = load_dataset(match["id"], match["config"], split=match["split"] or "test", streaming=True)
        for number, row in enumerate(rows, start=1):
            yield f"row {number}", row
    except Exception as error:  # the package raises its own, the hub's and the reader's errors
        raise UsageError(f"cannot read the data set {source}: {first_line(error)}") from None


def _sorted_out(rows: Iterable[tuple[str, Any]], source: str) -> Texts | Questions:
    texts: list[str] = []
    questions: list[Question] = []
    for name, row in rows:
        where = f"{source}, {name}"
        if not isinstance(row, Mapping):
            raise UsageError(f"{where} must be an object with named fields, it is {_kind(row)}")
        if any(field in row for field in CHOICE_FIELDS):
            questions.append(_question(row, where))
        else:
            texts.append(_text(row, where))
        if texts and questions:
            raise UsageError(f"{source} mixes texts and questions, first at {name}: keep them in files of their own")
    if not texts and not questions:
        raise UsageError(f"{source} holds no rows")
    return Questions(tuple(questions), source) if questions else Texts(tuple(texts), source)


def _text(row: Mapping[str, Any], where: str) -> str:
    field = next((name for name in TEXT_FIELDS if name in row), None)
    if field is None:
        raise UsageError(f"{where} has neither choices nor a text; its fields are {', '.join(map(str, row))}")
    if not isinstance(row[field], str) or not row[field]:
        raise UsageError(f"{where}: {field} must be a text that is not empty")
    return str(row[field])


def _question(row: Mapping[str, Any], where: str) -> Question:
    asked = next((row[name] for name in QUESTION_FIELDS if isinstance(row.get(name), str)), None)
    if asked is None:
        raise UsageError(f"{where} has choices and no question; one of {', '.join(QUESTION_FIELDS)} is wanted")
    field = next(name for name in CHOICE_FIELDS if name in row)
    choices, labels = _choices(row[field], where, field)
    named = next((name for name in ANSWER_FIELDS if row.get(name) not in (None, "")), None)
    if named is None:
        raise UsageError(f"{where} has no answer; one of {', '.join(ANSWER_FIELDS)} is wanted")
    answer = _answer(row[named], choices, labels)
    if answer is None:
        raise UsageError(f"{where}: {named} {row[named]!r} is none of the {len(choices)} choices")
    if len(choices) < 2:
        raise UsageError(f"{where}: a question needs at least two choices")
    return Question(asked, tuple(choices), answer)


def _choices(given: Any, where: str, field: str) -> tuple[list[str], list[str]]:
    """Choices and the labels they go by: A, B, C ... where the data has none."""
    labels: Any = None
    if isinstance(given, str):  # a cell of a CSV file
        given = _json(given, f"{where}: {field}")
    if isinstance(given, Mapping):
        given, labels = given.get("text"), given.get("label")
    if not isinstance(given, list) or not given or not all(isinstance(x, str) and x for x in given):
        raise UsageError(f"{where}: {field} must be a list of texts")
    if labels is None or len(labels) != len(given):
        labels = [chr(ord("A") + i) for i in range(len(given))]
    return given, [str(label) for label in labels]


def _answer(given: Any, choices: list[str], labels: list[str]) -> int | None:
    if isinstance(given, int) and not isinstance(given, bool):
        return given if 0 <= given < len(choices) else None
    text = str(given).strip()
    for names in (labels, choices):  # a label first: data sets that number their choices from 1 say so
        if text in names:
            return names.index(text)
    return int(text) if text.isdecimal() and int(text) < len(choices) else None


def _kind(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "a text", type(None): "nothing"}.get(type(value), "a number")
