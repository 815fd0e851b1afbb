"""A paper's ``apply`` function and its options: found, checked against the contract, read from the command line.

The contract is in docs/adding-a-paper.md: ``method.apply(checkpoint, texts, options, *, generator, on_progress)``, with
``options`` annotated as a dataclass whose fields are of a few plain types, all with defaults.
"""

import ast
import dataclasses
import difflib
import importlib
import inspect
import math
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from papertrial.errors import PapertrialError, UsageError
from papertrial.lab.claim import PaperCard, paper_folders
from papertrial.lab.python_source import parse

_PARAMETERS = ("checkpoint", "texts", "options", "generator", "on_progress")
_PLAIN = (int, float, str, bool)


@dataclass(frozen=True)
class Method:
    """A paper's function and the dataclass of its options."""

    apply: Callable[..., Any]
    options: type


@dataclass(frozen=True)
class Option:
    """One option of a method.

    Attributes
    ----------
    name : of the field; ``--some-name`` on the command line.
    kind : int, float, str or bool.
    choices : the values it may have, if they are few.
    """

    name: str
    kind: type
    choices: tuple[Any, ...]
    default: Any
    help: str

    @property
    def flag(self) -> str:
        return f"--{self.name.replace('_', '-')}"

    @property
    def values(self) -> str:
        """What may be given, for a table of options."""
        return "|".join(map(str, self.choices)) or self.kind.__name__


def applicable() -> list[str]:
    """Slugs of the papers whose method has ``apply``; reads files only."""
    found = []
    for folder in paper_folders():
        paths = [folder / "method.py", folder / "method" / "__init__.py"]
        if any(_names_apply(path.read_text(encoding="utf-8")) for path in paths if path.is_file()):
            found.append(folder.name)
    return found


def _names_apply(source: str) -> bool:
    for node in parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name == "apply":
            return True
        if isinstance(node, ast.ImportFrom) and any((a.asname or a.name) == "apply" for a in node.names):
            return True
    return False


def method_of(card: PaperCard) -> Method:
    """A paper's ``apply``.

    Raises
    ------
    UsageError
        If the paper has none, naming those that have.
    PapertrialError
        If it does not keep to the contract: the paper's mistake, not the user's.
    """
    able = applicable()
    if card.slug not in able:
        raise UsageError(
            f"{card.slug} has nothing to apply: its method does not change checkpoints, or is not there yet; papers "
            f"that do: {', '.join(able) or 'none'}"
        )
    apply = getattr(importlib.import_module(f"{card.module}.method"), "apply", None)
    if not callable(apply):
        raise PapertrialError(f"{card.slug}: method.apply is not a function")
    missing = [name for name in _PARAMETERS if name not in inspect.signature(apply).parameters]
    kind = None if missing else _hints(apply).get("options")
    if missing or not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        what = f"has no parameter {', '.join(missing)}" if missing else "does not annotate options with a dataclass"
        raise PapertrialError(f"{card.slug}: method.apply {what}; see docs/adding-a-paper.md")
    options_of(kind, card.slug)
    return Method(apply, kind)


def _hints(of: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(of):
        return typing.get_type_hints(of, include_extras=True)
    # only the annotation of options has to resolve: others may name what is imported for type checkers alone
    annotation = inspect.signature(of).parameters["options"].annotation
    return {"options": of.__globals__.get(annotation) if isinstance(annotation, str) else annotation}


def options_of(kind: type, slug: str) -> list[Option]:
    """The options that a dataclass stands for.

    Raises
    ------
    PapertrialError
        For a field without a default or of another type than int, float, str, bool and ``Literal`` of one of them.
    """
    hints, found = _hints(kind), []
    for field in dataclasses.fields(kind):
        annotation, text = hints[field.name], ""
        if typing.get_origin(annotation) is typing.Annotated:
            annotation, *notes = typing.get_args(annotation)
            text = next((note for note in notes if isinstance(note, str)), "")
        choices = typing.get_args(annotation) if typing.get_origin(annotation) is Literal else ()
        plain = type(choices[0]) if choices and len({type(c) for c in choices}) == 1 else annotation
        if plain not in _PLAIN or field.default is dataclasses.MISSING:
            raise PapertrialError(
                f"{slug}: option {field.name} must have a default and be int, float, str, bool or a Literal of one type"
            )
        found.append(Option(field.name, plain, choices, field.default, text))
    return found


def given_options(card: PaperCard, kind: type, arguments: Sequence[str]) -> Any:
    """An instance of the options from ``["--ratio", "0.3", "--flag"]``.

    Raises
    ------
    UsageError
        For an unknown option, one given twice or without a value, a value of another kind.
    """
    options = {option.flag: option for option in options_of(kind, card.slug)}
    switches = {f"--no-{flag[2:]}": option for flag, option in options.items() if option.kind is bool}
    values: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        flag, joined, text = rest.pop(0).partition("=")
        option = options.get(flag) or switches.get(flag)
        if option is None:
            near = difflib.get_close_matches(flag, options, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UsageError(f"{card.slug} has no option {flag!r}; {hint}it has {', '.join(options)}")
        if option.name in values:
            raise UsageError(f"{option.flag} is given twice")
        if option.kind is bool:
            if joined:
                raise UsageError(f"{option.flag} takes no value: write {option.flag} or --no-{option.flag[2:]}")
            values[option.name] = flag in options
            continue
        if not joined:
            if not rest:
                raise UsageError(f"{option.flag} needs a value: {option.values}")
            text = rest.pop(0)
        values[option.name] = _value(option, text)
    return kind(**values)


def _value(option: Option, text: str) -> Any:
    try:
        value = option.kind(text)
    except ValueError:
        raise UsageError(f"{option.flag} is {text!r}; it takes {option.values}") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{option.flag} is {text!r}; it takes a finite number")
    if option.choices and value not in option.choices:
        raise UsageError(f"{option.flag} is {text!r}; it takes {option.values}")
    return value
