"""Text that every installation carries: documentation and sources of Python and of installed packages.

Files are read and parsed, never imported or executed.
"""

import ast
import inspect
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

MAX_FILE_BYTES = 2_000_000
"""Larger Python files are tables."""

_SKIPPED_FOLDERS = {
    *("test", "tests", "testing", "idlelib", "lib2to3", "turtledemo", "distutils", "ensurepip"),
    *("site-packages", "dist-packages", "__pycache__", "pydoc_data", "encodings"),
    *("_vendor", "vendor", "externals", "extern", "third_party"),
}
_SPHINX_ROLE = re.compile(r":(?:[a-z]+:)?[a-z]+:`")


@dataclass(frozen=True)
class Docstring:
    """A docstring and whose it is: ``package`` and ``module`` (dotted), ``name`` inside the module ("" for its own)."""

    package: str
    module: str
    name: str
    text: str


def package_version(package: str) -> str:
    """Version of an installed package; Python's own for ``stdlib``.

    Raises
    ------
    PackageNotFoundError
        If it is not installed.
    """
    return sys.version.split()[0] if package == "stdlib" else version(package)


def installed(package: str) -> bool:
    """Whether its sources can be read here."""
    try:
        package_version(package)
    except PackageNotFoundError:
        return False
    return package_folder(package).is_dir()


def package_folder(package: str) -> Path:
    """Where the sources of ``package`` lie; the package is found, not imported."""
    if package == "stdlib":
        return Path(sysconfig.get_paths()["stdlib"])
    spec = find_spec(package)
    folders = list(spec.submodule_search_locations or []) if spec else []
    return Path(folders[0] if folders else "absent")


def modules(package: str) -> Iterator[tuple[str, str]]:
    """``(dotted name, source)`` of the package's modules in order of their paths, without tests and vendored copies."""
    root = package_folder(package)
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED_FOLDERS.intersection(relative.parts[:-1]) or relative.name.startswith(("test_", "_sysconfigdata")):
            continue
        if path.stat().st_size > MAX_FILE_BYTES:
            continue
        try:
            source = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        parts = [*relative.parts[:-1], relative.stem] if relative.stem != "__init__" else list(relative.parts[:-1])
        if package != "stdlib":
            parts = [package, *parts]
        yield ".".join(parts), source.replace("\r\n", "\n")


def docstrings(package: str) -> Iterator[Docstring]:
    """All docstrings of a package, in the order of the source."""
    for module, source in modules(package):
        tree = parse(source)
        if tree is None:
            continue
        for name, node in _documented(tree, ""):
            text = ast.get_docstring(node, clean=False)
            if text and text.strip():
                yield Docstring(package, module, name, inspect.cleandoc(text))


def parse(source: str) -> ast.Module | None:
    """The syntax tree, or None where this Python cannot read the source."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's strings
        try:
            return ast.parse(source)
        except (SyntaxError, ValueError, RecursionError):
            return None


def _documented(
    node: ast.AST, prefix: str
) -> Iterator[tuple[str, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]]:
    if isinstance(node, ast.Module):
        yield "", node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = f"{prefix}.{child.name}" if prefix else child.name
            yield name, child
            yield from _documented(child, name)
        elif not isinstance(child, ast.expr):
            yield from _documented(child, prefix)


def topics() -> Iterator[tuple[str, str]]:
    """``(topic, text)`` of the language reference that ``help()`` shows, read from its data file as literals."""
    path = package_folder("stdlib") / "pydoc_data" / "topics.py"
    tree = parse(path.read_text(encoding="utf-8"))
    for statement in tree.body if tree else []:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            yield from sorted(ast.literal_eval(statement.value).items())


def statements(source: str) -> list[str]:
    """Top-level statements with the comments and decorators before them; joined, they give the source again."""
    tree = parse(source)
    if tree is None or not tree.body:
        return [source]
    lines = source.splitlines(keepends=True)
    ends = [node.end_lineno or 0 for node in tree.body]
    pieces, start = [], 0
    for end in ends:
        if end > start:  # two statements on one line are one piece
            pieces.append("".join(lines[start:end]))
            start = end
    if start < len(lines):
        pieces.append("".join(lines[start:]))
    return pieces


_RULER = re.compile(r"[\W_]*")
_RUN = re.compile(r"([^\w\s])\1{3,}")


def clean_prose(text: str) -> str:
    """Drop rulers and table rows, shorten runs of one punctuation mark to three, and close up blank lines."""
    kept: list[str] = []
    for line in text.expandtabs().split("\n"):
        bare = line.strip()
        if bare and (_RULER.fullmatch(bare) or (bare.startswith("|") and bare.count("|") > 1)):
            continue
        if not bare and (not kept or not kept[-1]):
            continue
        kept.append(_RUN.sub(r"\1\1\1", line.rstrip()))
    return _SPHINX_ROLE.sub("`", "\n".join(kept)).strip("\n")


def paragraphs(text: str) -> list[str]:
    """Blocks between blank lines; joined by a blank line, they give the text again."""
    return [block for block in text.split("\n\n") if block.strip()]
