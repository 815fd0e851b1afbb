"""Digests that tell whether recorded evidence still belongs to the code: comments and docstrings do not count."""

import ast
import hashlib
import io
import json
import tokenize
from functools import lru_cache
from pathlib import Path
from typing import Any

from papertrial.errors import UsageError
from papertrial.lab.claim import PaperCard
from papertrial.lab.python_source import parse

PACKAGE = Path(__file__).resolve().parent.parent


def code_text(source: str) -> str:
    """Python source without comments, docstrings, blank lines and trailing space; the same on every Python version."""
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                for row in range(first.lineno - 1, first.end_lineno or first.lineno):
                    lines[row] = ""
    return "\n".join(stripped for line in lines if (stripped := line.rstrip()))


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_scales(card: PaperCard) -> dict[str, dict[str, Any]]:
    """``SCALES`` of a paper's experiment, read as data without importing the module.

    Raises
    ------
    UsageError
        When the paper is not on trial, or its ``SCALES`` is not plain data.
    """
    if not card.on_trial:
        raise UsageError(f"{card.slug} is not yet on trial: its folder has no experiment.py")
    return _split_scales((card.folder / "experiment.py").read_text(encoding="utf-8"), card.slug)[0]


def takes_model(card: PaperCard) -> bool:
    """Whether a paper's experiment runs on a checkpoint of the user's choice: it asks its trial for one."""
    tree = parse((card.folder / "experiment.py").read_text(encoding="utf-8"))
    asked = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return not asked.isdisjoint({"checkpoint", "requested_model"})


def _split_scales(source: str, slug: str) -> tuple[dict[str, dict[str, Any]], str]:
    for node in parse(source).body:
        target = (
            node.targets[0]
            if isinstance(node, ast.Assign)
            else node.target
            if isinstance(node, ast.AnnAssign)
            else None
        )
        if isinstance(target, ast.Name) and target.id == "SCALES" and isinstance(node, ast.Assign | ast.AnnAssign):
            try:
                scales = ast.literal_eval(node.value) if node.value else None
            except ValueError:
                scales = None
            if not isinstance(scales, dict) or not all(isinstance(v, dict) for v in scales.values()):
                break
            lines = source.splitlines()
            del lines[node.lineno - 1 : node.end_lineno]
            return scales, "\n".join(lines)
    raise UsageError(f"{slug}: experiment.py must assign SCALES a plain dict of dicts (literals only)")


def paper_digest(card: PaperCard, scale: str) -> str:
    """Digest of what decides a paper's numbers at a scale: its code, the judged part of its claims, the parameters."""
    parts: list[str] = []
    for path in sorted(card.folder.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        if path.name == "experiment.py" and path.parent == card.folder:
            scales, source = _split_scales(source, card.slug)
            parts.append(json.dumps(scales.get(scale), sort_keys=True))
        parts.append(f"{path.relative_to(card.folder)}\n{code_text(source)}")
    for claim in card.claim:
        parts.append(claim.model_dump_json(exclude={"statement", "unit", "margin_reason", "paper_figure"}))
    return digest("\n\0".join(parts))


def module_digests(modules: list[str]) -> dict[str, str]:
    """Digests of package files by path relative to the package, for the dotted module names given."""
    found = {}
    for name in sorted(modules):
        relative = Path(*name.split(".")[1:])
        for path in (PACKAGE / relative.with_suffix(".py"), PACKAGE / relative / "__init__.py"):
            if path.is_file():
                found[path.relative_to(PACKAGE).as_posix()] = file_digest(path)
    return found


def file_digest(path: Path) -> str:
    """Digest of a file's code; worked out once for each state of the file, since many papers stand on the same ones."""
    status = path.stat()
    return _file_digest(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=1024)
def _file_digest(path: Path, _changed: int, _size: int) -> str:
    return digest(code_text(path.read_text(encoding="utf-8")))


def changed_modules(substrate: dict[str, str]) -> list[str]:
    """Which of the recorded shared modules differ from today's, or are gone."""
    return [
        name
        for name, recorded in substrate.items()
        if not (PACKAGE / name).is_file() or file_digest(PACKAGE / name) != recorded
    ]
