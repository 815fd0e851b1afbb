"""Every paper folder, by itself: adding a folder adds its tests."""

import ast
import importlib
from pathlib import Path

import pytest

from papertrial.lab.catalogue import standing
from papertrial.lab.claim import find_card, paper_folders, read_card
from papertrial.lab.digests import PACKAGE, read_scales
from papertrial.lab.verdict import judge

FOLDERS = {folder.name: folder for folder in paper_folders()}
ON_TRIAL = sorted(slug for slug, folder in FOLDERS.items() if (folder / "experiment.py").is_file())
ROOMS = ("papers", "lm", "lab", "feed", "site")
MAY_IMPORT = {
    "lm": {"lm"},
    "lab": {"lab", "lm", "papers"},  # of papers only the package's path; checked below
    "feed": {"feed"},
    "site": {"site", "feed", "lab"},
}
EVERYONE = {"errors", "home"}


def imported(path: Path) -> set[str]:
    """Dotted names of what a file imports from the package, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("papertrial.")}


def rooms_of(names: set[str]) -> set[str]:
    return {name.split(".")[1] for name in names} - EVERYONE - {"__version__"}


def test_all_papers_in_scope_have_a_card():
    assert len(FOLDERS) >= 119
    assert not list(PACKAGE.glob("papers/*/__init__.py")), "family folders are namespaces, so that users can add papers"


@pytest.mark.parametrize("slug", sorted(FOLDERS))
def test_card_is_valid(slug):
    card = read_card(FOLDERS[slug])
    assert card.summary.endswith((".", "!", "?"))
    assert (card.folder / "__init__.py").is_file()
    if card.arxiv:
        assert find_card(card.arxiv).slug == slug


@pytest.mark.parametrize("room", sorted(MAY_IMPORT))
def test_arrows_between_rooms_point_one_way(room):
    for path in (PACKAGE / room).rglob("*.py"):
        wrong = rooms_of(imported(path)) - MAY_IMPORT[room]
        assert not wrong, f"{path.relative_to(PACKAGE)} imports {sorted(wrong)}"
    if room == "lab":
        names = {name for path in (PACKAGE / "lab").rglob("*.py") for name in imported(path)}
        assert {name for name in names if name.startswith("papertrial.papers")} <= {"papertrial.papers"}


@pytest.mark.parametrize("slug", ON_TRIAL)
def test_a_method_stands_on_lm_only_and_an_experiment_uses_only_the_trial(slug):
    folder = FOLDERS[slug]
    own = f"papertrial.papers.{folder.parent.name}.{slug}"
    for path in folder.rglob("*.py"):
        names = {name for name in imported(path) if name != own and not name.startswith(f"{own}.")}
        allowed = {"lm"}
        if path.name == "experiment.py":
            allowed.add("lab")
            lab = {name for name in names if name.startswith("papertrial.lab")}
            assert lab <= {
                "papertrial.lab.trial",
                "papertrial.lab.trial.Trial",
                "papertrial.lab.trial.PreconditionFailed",
                "papertrial.lab.trial.Metrics",
            }
        assert not rooms_of(names) - allowed, f"{path.relative_to(folder)} imports {sorted(rooms_of(names) - allowed)}"


@pytest.mark.parametrize("slug", ON_TRIAL)
def test_smoke_runs_and_returns_every_claimed_arm_and_metric(slug):
    from papertrial.lab import runner

    card = read_card(FOLDERS[slug])
    assert callable(importlib.import_module(f"{card.module}.experiment").run)
    evidence = runner.run(runner.plan_run(card, "smoke", seeds=1, threads=1))
    for claim in card.claim:
        for arm in claim.arms:
            assert evidence.values(arm, claim.metric), f"{arm} has no {claim.metric}"


@pytest.mark.parametrize("slug", ON_TRIAL)
def test_evidence_is_of_the_code_as_it_stands(slug):
    card = read_card(FOLDERS[slug])
    state = standing(card)
    assert state.state in ("fresh", "aged"), f"{slug} is {state.state}: {'; '.join(state.problems)}"
    small = state.evidence["small"]
    assert len(small.seeds) >= 3
    assert small.seeds == [trial.seed for trial in small.trials]
    assert small.parameters == {k: v for k, v in read_scales(card)["small"].items() if k != "seeds"}
    assert all(judge(claim, small).word in ("upheld", "contradicted", "undecided") for claim in card.claim)


def test_what_must_start_quickly_imports_nothing_heavy():
    import subprocess
    import sys

    heavy = ["torch", "transformers", "scipy.stats", "matplotlib", "numpy", "sqlalchemy", "fastapi"]
    code = f"import papertrial.cli, sys; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
    code = (
        "import importlib, pkgutil, sys, papertrial.feed as feed\n"
        "[importlib.import_module(m.name) for m in pkgutil.walk_packages(feed.__path__, 'papertrial.feed.')\n"
        " if 'migrations' not in m.name]\n"
        "import papertrial.lab.claim\n"
        "print([m for m in ('torch', 'transformers', 'scipy.stats') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
