"""A paper's Python example, taken from the text of its method: read by ``ast``, never imported or run."""

import ast
import builtins
import re
from pathlib import Path

from papertrial.lab.claim import PaperCard
from papertrial.lab.python_source import parse

LONGEST_LINE = 88
_PROMPT = re.compile(r"^\s*(>>>|\.\.\.)( |$)")
_DIRECTIVE = re.compile(r"\s*#\s*doctest:.*$")
_DOING = (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Import, ast.ImportFrom, ast.With, ast.For)


def example(card: PaperCard) -> str | None:
    """Lines that use the method, with the import that they need; None while there is no method.

    Taken from the module's docstring, else from that of a public function or class, else its import and signature.
    """
    path = next((p for p in (card.folder / "method.py", card.folder / "method" / "__init__.py") if p.is_file()), None)
    if path is None:
        return None
    try:
        tree = parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError):
        return None
    return _from_tree(tree, f"{card.module}.method", path)


def given_names(code: str) -> list[str]:
    """Names that a piece of code uses and neither makes, imports nor finds in Python, in the order of their use."""
    try:
        nodes = list(ast.walk(parse(code)))
    except SyntaxError:
        return []
    made = {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    made |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    taken = [alias for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names]
    made |= {(alias.asname or alias.name).partition(".")[0] for alias in taken}
    used = [node for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)]
    used.sort(key=lambda node: (node.lineno, node.col_offset))
    names = dict.fromkeys(node.id for node in used)
    return [name for name in names if name not in made and not hasattr(builtins, name)]


def _from_tree(tree: ast.Module, module: str, path: Path) -> str | None:
    public = _public_names(tree)
    defined = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name in public]
    for node in (tree, *defined):
        lines = _code_in(ast.get_docstring(node) or "")
        if lines:
            return "\n".join([*_imports(lines, public, module), *lines])
    if not public:
        return None
    lines = [f"from {module} import {', '.join(public[:3])}"]
    first = next((n for n in defined if isinstance(n, ast.FunctionDef)), None)
    if first is not None:
        returns = f" -> {ast.unparse(first.returns)}" if first.returns else ""
        lines += ["", f"# {first.name}({ast.unparse(first.args)}){returns}"]
    return "\n".join(lines)


def _public_names(tree: ast.Module) -> list[str]:
    """``__all__`` where there is one, else what is defined or taken in at the top, without a leading underscore."""
    defined: list[str] = []
    taken: list[str] = []
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            try:
                return [str(name) for name in ast.literal_eval(node.value)]
            except ValueError:
                continue
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.append(node.name)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("papertrial.papers"):
            taken += [alias.asname or alias.name for alias in node.names]
    return [name for name in [*defined, *taken] if not name.startswith("_")]


def _code_in(docstring: str) -> list[str]:
    """Doctest lines without their prompts, else the first paragraph that is Python which does something."""
    prompted = [line for line in docstring.splitlines() if _PROMPT.match(line)]
    if prompted:
        return [_DIRECTIVE.sub("", _PROMPT.sub("", line, count=1)).rstrip() for line in prompted]
    for paragraph in re.split(r"\n\s*\n", docstring):
        lines = paragraph.splitlines()
        indent = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
        code = [line[indent:].rstrip() for line in lines]
        if _does_something("\n".join(code)):
            return code
    return []


def _does_something(text: str) -> bool:
    try:
        body = parse(text).body
    except (SyntaxError, ValueError):
        return False
    return any(isinstance(n, _DOING) or (isinstance(n, ast.Expr) and isinstance(n.value, ast.Call)) for n in body)


def _imports(lines: list[str], public: list[str], module: str) -> list[str]:
    """Imports of torch and of the public names that the lines use; none of what they import for themselves."""
    text = "\n".join(lines)
    wanted = given_names(text)
    imports = ["import torch"] if "torch" in wanted else []
    used = [name for name in public if name in wanted]
    if used:
        line = f"from {module} import {', '.join(used)}"
        short = len(line) <= LONGEST_LINE
        imports += [line] if short else [f"from {module} import (", *(f"    {name}," for name in used), ")"]
    return [*imports, ""] if imports else []
