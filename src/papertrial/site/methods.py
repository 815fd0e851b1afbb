"""What a paper's method offers, read from its source without running it: names, signatures, docstrings, example."""

import ast
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from papertrial.lab.claim import PaperCard
from papertrial.lab.python_source import parse

_MOST = 60


@dataclass(frozen=True, slots=True)
class Member:
    """A public function or class: ``signature`` as in the source, ``doc`` its whole docstring."""

    name: str
    kind: str
    signature: str
    doc: str

    @property
    def line(self) -> str:
        """The docstring's first paragraph as one line."""
        return " ".join(self.doc.split("\n\n")[0].split())


@dataclass(frozen=True, slots=True)
class Method:
    """A paper's method: how to import it, what it offers, and an example where its docstring has one."""

    module: str
    doc: str
    members: tuple[Member, ...]
    example: str | None


def read_method(card: PaperCard) -> Method | None:
    """The method of a paper; None where its folder has none yet."""
    paths = _sources(card.folder)
    if not paths:
        return None
    return _read(f"{card.module}.method", tuple((path, path.stat().st_mtime_ns) for path in paths))


def _sources(folder: Path) -> list[Path]:
    if (folder / "method.py").is_file():
        return [folder / "method.py"]
    package = folder / "method"
    first = package / "__init__.py"
    return [first, *sorted(path for path in package.glob("*.py") if path != first)] if first.is_file() else []


@lru_cache(maxsize=512)
def _read(module: str, sources: tuple[tuple[Path, int], ...]) -> Method | None:
    doc, members = "", []
    for i, (path, _) in enumerate(sources):
        try:
            tree = parse(path.read_text(encoding="utf-8"))
        except (OSError, SyntaxError, ValueError):
            continue
        if i == 0:
            doc = ast.get_docstring(tree) or ""
        members += _members(tree)
    docs = [doc, *(member.doc for member in members)]
    example = next((found for text in docs if (found := _example(text))), None)
    return Method(module, doc, tuple(members[:_MOST]), example)


def _members(tree: ast.Module) -> list[Member]:
    found = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            kind = "class" if isinstance(node, ast.ClassDef) else "function"
            found.append(Member(node.name, kind, _signature(node), ast.get_docstring(node) or ""))
    return found


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> str:
    if isinstance(node, ast.ClassDef):
        makers = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        if makers:
            arguments = ast.unparse(makers[0].args)
            return f"{node.name}({re.sub(r'^self(, )?', '', arguments)})"
        fields = [ast.unparse(n) for n in node.body if isinstance(n, ast.AnnAssign)]
        return f"{node.name}({', '.join(fields)})"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{node.name}({ast.unparse(node.args)}){returns}"


def _example(doc: str) -> str | None:
    """The example of a docstring: what its section ``Examples`` holds, or its ``>>>`` lines, without the prompts."""
    lines = doc.splitlines()
    code = [line.strip() for line in lines if re.match(r"\s*(>>>|\.\.\.)( |$)", line)]
    if code:
        return "\n".join(line[4:] for line in code)
    match = re.search(r"^Examples?\n-{3,}\n(.+?)(?=\n\w[^\n]*\n-{3,}|\Z)", doc, re.DOTALL | re.MULTILINE)
    return match[1].strip("\n") if match else None
