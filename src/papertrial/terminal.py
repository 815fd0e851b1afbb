"""What the command line prints: tables, verdicts and live progress. No decisions are made here."""

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from papertrial.lab.trial import ProgressListener

if TYPE_CHECKING:
    from rich.progress import TaskID

    from papertrial.feed.catalogue import Found
    from papertrial.lab.applying import Applied
    from papertrial.lab.catalogue import Standing
    from papertrial.lab.claim import PaperCard
    from papertrial.lab.evidence import Evidence, TrialRecord
    from papertrial.lab.verdict import Judgement

TONES = {"upheld": "green", "contradicted": "red", "undecided": "yellow"}
STATES = {"fresh": "green", "aged": "yellow", "stale": "red", "incomplete": "red", "not yet on trial": "dim"}


class LiveProgress(ProgressListener):
    """A bar per running part of the trial, on standard error: what, how far, rate and time left."""

    def __init__(self, console: Console, seeds: int) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            refresh_per_second=5,
        )
        self._seeds = self._bar.add_task("[bold]seeds", total=seeds, rate="")
        self._parts: dict[str, TaskID] = {}

    def __enter__(self) -> "LiveProgress":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def update(self, what: str, done: int, total: int | None) -> None:
        if what not in self._parts:
            self._parts[what] = self._bar.add_task(escape(what), total=total, rate="")
        task = self._parts[what]
        speed = self._bar.tasks[self._bar.task_ids.index(task)].speed
        self._bar.update(task, completed=done, total=total, rate=f"{speed:,.3g}/s" if speed else "")

    def seed_finished(self, record: "TrialRecord", resumed: bool) -> None:
        own = f"seed {record.seed}: "  # parts of seeds that run beside it stay
        for part in [part for part in self._parts if part.startswith(own) or not part.startswith("seed ")]:
            self._bar.remove_task(self._parts.pop(part))
        self._bar.advance(self._seeds)
        state = "kept from the interrupted run" if resumed else f"{record.wall_seconds:.1f} s"
        outcome = f" - [yellow]{escape(record.undecided)}[/]" if record.undecided else ""
        self._bar.console.print(f"  seed {record.seed}: {state}{outcome}", highlight=False)


def print_run(console: Console, card: "PaperCard", evidence: "Evidence", judged: Iterable["Judgement"]) -> None:
    """The table that ends a run: metric, baseline, method, effect with interval, verdict with scale."""
    from papertrial.lab.statistics import t_interval
    from papertrial.lab.summary import interval_text, number

    judged = list(judged)
    table = Table(title=escape(card.title), title_justify="left", title_style="bold", show_lines=len(judged) > 1)
    for heading in ("metric", "baseline", "method", "effect (plus is what the paper says)", "verdict"):
        table.add_column(heading, overflow="fold")

    def arm(name: str, metric: str) -> str:
        values = evidence.values(name, metric)
        return f"{folded(name)}\n{number(t_interval(values).mean)}" if values else folded(name)

    for j in judged:
        unit = f"\n({j.claim.unit})" if j.claim.unit else ""
        bound = (
            f"tolerance {number(j.claim.tolerance)}"
            if j.claim.kind == "exact"
            else f"margin {number(j.claim.threshold)}"
        )
        effect = "\n".join(
            [interval_text(j.effect, j.claim.effect_unit)]
            + [f"against {name}: {interval_text(control, j.claim.effect_unit)}" for name, control in j.controls]
            + [f"{bound} {j.claim.effect_unit}".rstrip()]
        )
        table.add_row(
            escape(folded(j.claim.metric) + unit),
            escape(arm(j.claim.baseline, j.claim.metric)),
            escape(arm(j.claim.method, j.claim.metric)),
            escape(effect),
            f"[bold {TONES[j.word]}]{j.word}[/]\nat {j.scale}",
        )
    console.print(table)
    claimed = {name for j in judged for name in (j.claim.baseline, j.claim.method)}
    _print_other_arms(console, evidence, judged, claimed)
    said = [(j.claim.metric if j.effect else "", j) for j in judged]  # without an effect the reason is the same for all
    for line in dict.fromkeys(
        f"{escape(metric + ': ') if metric else ''}[{TONES[j.word]}]{j.phrase}[/]: {escape(j.reason)}"
        for metric, j in said
    ):
        console.print(line, highlight=False)


def _print_other_arms(console: Console, evidence: "Evidence", judged: list["Judgement"], claimed: set[str]) -> None:
    from papertrial.lab.statistics import t_interval
    from papertrial.lab.summary import number

    others = [arm for arm in evidence.arms if arm not in claimed]
    judged_metrics = list(dict.fromkeys(j.claim.metric for j in judged))
    found = {
        arm: [m for m in judged_metrics if evidence.values(arm, m)]
        or [m for m in evidence.metrics if evidence.values(arm, m)]
        for arm in others
    }
    if not others:
        return
    table = Table(title="Further arms on the same work", title_justify="left", title_style="dim")
    for heading in ("metric", "arm", "mean"):
        table.add_column(heading, justify="right" if heading == "mean" else "left", overflow="fold")
    for metric in dict.fromkeys([*judged_metrics, *evidence.metrics]):
        arms = [arm for arm in others if metric in found[arm]]
        for place, arm in enumerate(arms):
            mean = number(t_interval(evidence.values(arm, metric)).mean)
            table.add_row(escape("" if place else metric), escape(arm), mean, end_section=place + 1 == len(arms))
    console.print(table)


def folded(name: str, width: int = 14) -> str:
    """A name in lines of at most so many characters, broken after underscores where that is possible."""
    lines = [""]
    for part in re.findall(r"[^_]*_|[^_]+", name):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def print_card(console: Console, card: "PaperCard") -> None:
    """Title, where to read it, what it says and what it claims."""
    console.print(f"[bold]{escape(card.title)}[/]")
    facts = [card.slug, card.family, str(card.published)]
    if card.authors:
        facts.append(f"{card.authors} author{'s' if card.authors != 1 else ''}")
    if card.arxiv:
        facts.append(f"https://arxiv.org/abs/{card.arxiv}")
    if card.code:
        facts.append(card.code)
    console.print("[dim]" + escape("  ·  ".join(facts)) + "[/]", highlight=False, soft_wrap=True)
    console.print(escape(card.summary))
    for i, claim in enumerate(card.claim):
        console.print(
            f"\n[bold]{'Headline claim' if i == 0 else f'Claim {i + 1}'}[/] {escape(claim.statement)}\n"
            f"[dim]{claim.method} against {claim.baseline} on {escape(claim.metric)}; in the paper: "
            f"{escape(claim.paper_figure)}[/]",
            highlight=False,
        )


def print_standings(console: Console, standings: Iterable["Standing"]) -> None:
    """The list of papers: slug, family, verdict of the headline claim, state of the evidence."""
    table = Table(box=None, pad_edge=False)
    for heading in ("paper", "family", "year", "headline verdict", "evidence"):
        table.add_column(heading)
    table.add_column("title", overflow="ellipsis", no_wrap=True)
    for s in standings:
        headline = s.judgements[0] if s.judgements else None
        verdict = f"[{TONES[headline.word]}]{headline.phrase}[/]" if headline else ""
        table.add_row(
            s.card.slug,
            s.card.family,
            str(s.card.year),
            verdict,
            f"[{STATES[s.state]}]{s.state}[/]",
            escape(s.card.title),
        )
    console.print(table)


def print_states(console: Console, states: Iterable[tuple[str, str, Sequence[str]]]) -> None:
    """What is wrong with any paper's folder or evidence, then how many stand where."""
    counts = dict.fromkeys(STATES, 0)
    for slug, state, problems in states:
        counts[state] += 1
        if problems:
            console.print(
                f"[{STATES[state]}]{state}[/] {slug}: {escape('; '.join(problems))}", highlight=False, soft_wrap=True
            )
    console.print(", ".join(f"{n} {state}" for state, n in counts.items() if n), highlight=False)


def print_found(console: Console, found: "Found") -> None:
    """Search hits: rank, title, year, where it stands, and the first words of what it is about."""
    if not found.papers:
        console.print("nothing found")
    for rank, (hit, paper) in enumerate(zip(found.result.hits, found.papers, strict=True), start=1):
        about = paper.summary or paper.abstract or ""
        facts = [
            paper.slug or paper.arxiv_id or "",
            str(paper.published.year) if paper.published else "",
            paper.family or "",
        ]
        console.print(f"[bold]{rank:>2}  {escape(paper.title)}[/]", highlight=False)
        console.print(
            f"    [cyan]{escape('  ·  '.join(filter(None, facts)))}[/]  [dim]score {hit.score:.2f}[/]", highlight=False
        )
        if about:
            words = about if len(about) <= 150 else f"{about[:150].rsplit(' ', 1)[0]} ..."
            console.print(f"    [dim]{escape(words)}[/]", highlight=False, soft_wrap=True)


def found_json(found: "Found") -> dict[str, Any]:
    """Search hits for programs."""
    return {
        "mode": found.result.mode,
        "took_ms": round(found.result.took_ms, 2),
        "notice": found.notice.message if found.notice else None,
        "hits": [
            {
                "score": round(hit.score, 6),
                "bm25": hit.lexical,
                "cosine": hit.dense,
                "slug": paper.slug,
                "arxiv": paper.arxiv_id,
                "title": paper.title,
                "published": paper.published.isoformat() if paper.published else None,
                "family": paper.family,
            }
            for hit, paper in zip(found.result.hits, found.papers, strict=True)
        ],
    }


def print_problems(console: Console, problems: list[str]) -> None:
    """What could not be read, a line each; the first twenty."""
    for problem in problems[:20]:
        console.print(f"[yellow]not read:[/] {escape(problem)}", highlight=False, soft_wrap=True)
    if len(problems) > 20:
        console.print(f"... and {len(problems) - 20} more")


def print_json(data: Any) -> None:
    """JSON on standard output, for programs."""
    import json

    print(json.dumps(data, indent=2, ensure_ascii=False))


def print_options(console: Console, card: "PaperCard") -> None:
    """The options of a paper's ``apply``."""
    from papertrial.lab.apply_options import method_of, options_of

    table = Table(title=f"papertrial apply {card.slug}", title_justify="left", title_style="bold")
    for heading in ("option", "takes", "default", ""):
        table.add_column(heading, overflow="fold")
    for option in options_of(method_of(card).options, card.slug):
        table.add_row(option.flag, escape(option.values), escape(str(option.default)), escape(option.help))
    console.print(table)


def print_applied(console: Console, applied: "Applied") -> None:
    """What was done to a checkpoint, what it cost, and where it lies."""
    console.print(escape(applied.summary), highlight=False)
    table = Table()
    for heading in ("", "before", "after", "change"):
        table.add_column(heading, justify="right" if heading else "left")
    for what, name, form in (
        ("parameters", "parameters", ",d"),
        ("bytes of weights", "bytes", ",d"),
        ("tokens read in a second", "tokens_per_second", ",.0f"),
        ("perplexity", "perplexity", ",.4g"),
    ):
        before, after = getattr(applied.before, name), getattr(applied.after, name)
        table.add_row(what, f"{before:{form}}", f"{after:{form}}", f"{100 * (after / before - 1):+.1f} %")
    console.print(table)
    for name, value in applied.facts.items():
        console.print(f"{escape(name)}: {escape(str(value))}", highlight=False)
    console.print(f"written: {escape(str(applied.folder))}", highlight=False, soft_wrap=True)


def print_measures(console: Console, found: dict[str, Any]) -> None:
    """What `papertrial evaluate` measured, a row per measure."""
    from papertrial.lab.summary import number

    table = Table(title=escape(found["model"]), title_justify="left", title_style="bold")
    for heading in ("on", "measure", "value", "95 % interval"):
        table.add_column(heading, justify="right" if heading in ("value", "95 % interval") else "left")
    data = found.get("data")
    if data is not None:
        counts = data["counts"].items()
        table.caption = ", ".join(
            f"{count:,} {name.removesuffix('s') if count == 1 else name}" for name, count in counts
        )
        for name, value in data["measures"].items():
            interval = " to ".join(map(number, data["intervals"].get(name, ())))
            table.add_row(escape(data["source"]), name.replace("_", " "), number(value), interval)
    for task, measures in found.get("tasks", {}).items():
        for name, value in measures.items():
            table.add_row(escape(task), escape(name), number(value), "")
    console.print(table)
