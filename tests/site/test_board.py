"""The papers in scope: read again when files change, remembered between starts, one bad folder harming no other."""

import json
from pathlib import Path

import pytest

import papertrial.papers
from papers_on_trial import PAPERS, write_papers
from papertrial.home import cache_folder
from papertrial.lab import catalogue
from papertrial.site import standings
from papertrial.site.board import Board


@pytest.fixture
def papers(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Some papers on trial and no others; the home folder is this test's own, its cache too."""
    root = write_papers(tmp_path / "papers")
    monkeypatch.setattr(papertrial.papers, "__path__", [str(root)])
    return root


@pytest.fixture
def worked_out(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The slugs whose standing was worked out, in order."""
    seen: list[str] = []

    def counted(card):  # type: ignore[no-untyped-def]
        seen.append(card.slug)
        return catalogue.standing(card)

    monkeypatch.setattr(standings, "standing", counted)
    return seen


def test_a_standing_is_remembered_between_starts(papers: Path, worked_out: list[str]) -> None:
    first = Board()
    first.warm()
    assert set(PAPERS) <= set(worked_out)
    expected = {e.card.slug: (e.standing.state, e.standing.problems, len(e.judgements)) for e in first.snapshot}
    worked_out.clear()
    second = Board()
    second.warm()
    assert not set(PAPERS) & set(worked_out)
    found = {e.card.slug: (e.standing.state, e.standing.problems, len(e.judgements)) for e in second.snapshot}
    assert found == expected


@pytest.mark.parametrize("name", ["method.py", "experiment.py", "paper.toml"])
def test_a_change_of_a_paper_is_seen_at_once_and_of_that_paper_alone(
    papers: Path, worked_out: list[str], name: str
) -> None:
    board = Board()
    board.warm()
    assert board.snapshot.entries["sheep_upheld"].standing.state == "fresh"
    worked_out.clear()
    file = papers / "decoding" / "sheep_upheld" / name
    text = file.read_text()
    changes = {
        "paper.toml": text.replace("margin = 5.0", "margin = 4.0"),
        "experiment.py": text.replace("return {}", "return dict()"),
        "method.py": text.replace("return most", "return most + 0"),
    }
    file.write_text(changes[name])
    board.refresh()
    board.warm()
    assert board.snapshot.entries["sheep_upheld"].standing.state == "stale"
    assert worked_out == ["sheep_upheld"]
    after = Board()
    after.warm()
    assert after.snapshot.entries["sheep_upheld"].standing.state == "stale"


def test_a_change_of_shared_code_is_a_reason_to_look_again(
    papers: Path, worked_out: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    board = Board()
    board.warm()
    worked_out.clear()
    monkeypatch.setattr("papertrial.site.board.shared_stamp", lambda: "other")
    board.refresh()
    board.warm()
    assert set(PAPERS) <= set(worked_out)


def test_what_was_remembered_and_is_damaged_is_worked_out_again(papers: Path, worked_out: list[str]) -> None:
    Board().warm()
    file = cache_folder("board") / "standings.json"
    good = json.loads(file.read_text())
    key = good["sheep_upheld"][0]
    for damage in ("", "{", "[]", '{"sheep_upheld": 1}', json.dumps({"sheep_upheld": [key, "splendid", []]})):
        file.write_text(damage)
        worked_out.clear()
        board = Board()
        assert board.snapshot.entries["sheep_upheld"].standing.state == "fresh"
        assert worked_out == ["sheep_upheld"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("experiment.py", "def run(trial:\n"),
        ("experiment.py", "x = " + "(" * 3000),
        ("experiment.py", "\0"),
        ("evidence/small.json", "{"),
        ("evidence/small.json", "[" * 100_000),
        ("method.py", "\xff\xfe"),
        ("paper.toml", "title = "),
    ],
)
def test_a_folder_that_cannot_be_read_harms_no_other(papers: Path, name: str, content: str) -> None:
    bad = papers / "decoding" / "sheep_upheld"
    (bad / name).write_bytes(content.encode("latin-1"))
    board = Board()
    board.warm()
    held = board.snapshot.entries.get("sheep_upheld")
    if name == "paper.toml":
        assert held is None
        assert any("sheep_upheld" in problem for problem in board.snapshot.problems)
    else:
        assert held is not None
        assert held.standing.state == "incomplete"
        assert held.standing.problems
    assert board.snapshot.entries["sheep_contradicted"].headline is not None
