"""A paper as Markdown, for people and programs that read text.

Full text is not served: arXiv's terms allow metadata only unless the paper's own licence says more.
"""

import re

from papertrial.lab.report import repeat_command
from papertrial.lab.summary import interval_text
from papertrial.site.board import Entry
from papertrial.site.context import Context
from papertrial.site.listing import Shown

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~])")


def escaped(text: str) -> str:
    """Text that Markdown shows as it is."""
    return _SPECIAL.sub(r"\\\1", text)


def paper_markdown(shown: Shown, here: Context) -> str:
    """The page of a paper as Markdown."""
    paper = shown.paper
    lines = [f"# {escaped(paper.title)}", ""]
    if paper.authors:
        lines += [", ".join(escaped(name) for name in paper.authors), ""]
    facts = {
        "arXiv": f"<https://arxiv.org/abs/{paper.arxiv_id}>" if paper.arxiv_id else None,
        "Published": paper.published_text,
        "Organisation": escaped(paper.organisation) if paper.organisation else None,
        "Code": f"<{paper.code_url}>" if paper.code_url else None,
        "Project": f"<{paper.project_url}>" if paper.project_url else None,
        "Votes": str(shown.upvotes),
        "Keywords": ", ".join(escaped(word) for word in paper.keywords) or None,
        "Page": f"<{here.settings.url(f'/papers/{paper.key}')}>",
    }
    lines += [f"- {name}: {value}" for name, value in facts.items() if value]
    if paper.abstract:
        lines += ["", "## Abstract", "", escaped(paper.abstract)]
    if paper.summary:
        lines += ["", "## Summary", "", escaped(paper.summary)]
    card = here.board.snapshot.get(paper.slug)
    if card is not None:
        lines += _trial(card)
    return "\n".join(lines) + "\n"


def _trial(entry: Entry) -> list[str]:
    card, judgements = entry.card, entry.judgements
    lines = ["", "## On trial"]
    for number, claim in enumerate(card.claim):
        lines += ["", f"{number + 1}. {escaped(claim.statement)}"]
        pair = f"`{claim.method}` against `{claim.baseline}`, {escaped(claim.metric)}"
        lines.append(f"   - Measured: {pair}; in the paper: {escaped(claim.paper_figure)}")
        if not judgements:
            lines.append("   - Verdict: none yet, there is no evidence")
            continue
        judged = judgements[number]
        lines.append(f"   - Verdict: **{judged.word}** at {judged.scale} scale: {escaped(judged.reason)}")
        if judged.effect is not None:
            lines.append(f"   - Effect: {escaped(interval_text(judged.effect, claim.effect_unit))}")
    lines += ["", f"Limits: {escaped(card.limits)}"]
    if card.finding:
        lines += ["", f"Our reading: {escaped(card.finding)}"]
    for evidence in entry.evidence.values():
        lines += ["", f"To repeat: `{repeat_command(evidence)}`"]
    return lines
